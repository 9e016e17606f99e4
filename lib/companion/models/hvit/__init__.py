"""H-ViT: Hierarchical Vision Transformers for Context-Aware Prostate Cancer Grading."""

from .model import HViT, PatchBag, PatchEncoder, RegionEncoder, SlideTransformer, build, loss, predict, vote

__all__ = ["HViT", "PatchBag", "PatchEncoder", "RegionEncoder", "SlideTransformer", "build", "loss", "predict", "vote"]
