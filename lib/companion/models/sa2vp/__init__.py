"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt."""
