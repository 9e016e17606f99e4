"""ECAMP: Entity-centered Context-aware Medical Vision Language Pre-training."""
