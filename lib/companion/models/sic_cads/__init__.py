"""SIC-CADS: Simple Image-level Classification Improves Open-vocabulary Object Detection."""

from .model import (
    MLR,
    Detections,
    Recognition,
    ZeroShotClassifier,
    cascade_boxes,
    detect,
    detector_scores,
    distillation_loss,
    fuse,
    normalise,
    rank_loss,
    refine,
    text_share,
    vocabulary,
)

__all__ = [
    "MLR",
    "Detections",
    "Recognition",
    "ZeroShotClassifier",
    "cascade_boxes",
    "detect",
    "detector_scores",
    "distillation_loss",
    "fuse",
    "normalise",
    "rank_loss",
    "refine",
    "text_share",
    "vocabulary",
]
