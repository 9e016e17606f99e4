"""H-ViT: Hierarchical Vision Transformers for Context-Aware Prostate Cancer Grading."""

from .model import HViT, PatchEncoder, RegionEncoder, SlideTransformer, build, graded, loss, vote

__all__ = ["HViT", "PatchEncoder", "RegionEncoder", "SlideTransformer", "build", "graded", "loss", "vote"]
