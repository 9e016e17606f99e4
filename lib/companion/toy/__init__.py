"""Small synthetic data sets in the real layouts, and small backbones trained on them."""
