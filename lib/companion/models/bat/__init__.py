"""BAT: Bi-directional Adapter for Multi-modal Tracking."""

from .model import BAT, HigherPeak, OSTrack, Prediction, SingleStream, foundation, losses

__all__ = ["BAT", "HigherPeak", "OSTrack", "Prediction", "SingleStream", "foundation", "losses"]
