"""Layers and baselines that several papers share."""
