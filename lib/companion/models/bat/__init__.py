"""BAT: Bi-directional Adapter for Multi-modal Tracking."""
