"""Small data sets written in the real layouts, and the small backbones that are trained on them."""
