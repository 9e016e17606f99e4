"""SIC-CADS: Simple Image-level Classification Improves Open-vocabulary Object Detection."""

from .model import MLR, Output, Settings, detect, distillation_loss, fuse, rank_loss, refine, refined, vocabulary

__all__ = [
    "MLR",
    "Output",
    "Settings",
    "detect",
    "distillation_loss",
    "fuse",
    "rank_loss",
    "refine",
    "refined",
    "vocabulary",
]
