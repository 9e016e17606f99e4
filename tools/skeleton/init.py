"""NAME: TODO the title and venue."""

from .model import NAME, loss

__all__ = ["NAME", "loss"]
