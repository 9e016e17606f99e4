"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt (AAAI 2024)."""

from .model import SA2VP, loss, two_pathway_loss
from .swin import SA2VPSwin

__all__ = ["SA2VP", "SA2VPSwin", "loss", "two_pathway_loss"]
