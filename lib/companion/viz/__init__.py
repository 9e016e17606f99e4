"""Attention maps, plots, widgets."""
