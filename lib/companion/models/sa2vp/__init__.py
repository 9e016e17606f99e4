"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt (AAAI 2024)."""

from .model import SA2VP, SA2VPSwin, loss, two_pathway_loss

__all__ = ["SA2VP", "SA2VPSwin", "loss", "two_pathway_loss"]
