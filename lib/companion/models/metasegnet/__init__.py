"""MetaSegNet (arXiv 2312.12735), reconstructed: land-cover segmentation with a text on the climate zone."""

from .climate import Prompts
from .inference import augmented, bands, segment
from .losses import joint_loss
from .model import MetaSegNet, swin
from .text import BertText, TextEncoder, Words

__all__ = [
    "BertText",
    "MetaSegNet",
    "Prompts",
    "TextEncoder",
    "Words",
    "augmented",
    "bands",
    "joint_loss",
    "segment",
    "swin",
]
