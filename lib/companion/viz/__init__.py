"""Attention maps, plots, widgets, heatmaps."""
