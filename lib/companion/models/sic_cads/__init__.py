"""SIC-CADS: Simple Image-level Classification Improves Open-vocabulary Object Detection."""

from .model import MLR, Settings, detect, distillation_loss, fuse, rank_loss, refine, vocabulary

__all__ = ["MLR", "Settings", "detect", "distillation_loss", "fuse", "rank_loss", "refine", "vocabulary"]
