"""BAT: Bi-directional Adapter for Multi-modal Tracking."""

from .baselines import FeatureFusion, FullFineTuning, HigherPeak, SingleStream
from .model import BAT, losses
from .ostrack import OSTrack, Prediction, foundation

__all__ = [
    "BAT",
    "FeatureFusion",
    "FullFineTuning",
    "HigherPeak",
    "OSTrack",
    "Prediction",
    "SingleStream",
    "foundation",
    "losses",
]
