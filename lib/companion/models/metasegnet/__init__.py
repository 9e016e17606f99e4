"""MetaSegNet: Metadata-collaborative Vision-Language Segmentation."""
