"""H-ViT: Hierarchical Vision Transformers for Context-Aware Prostate Cancer Grading."""
