"""MetaSegNet (arXiv 2312.12735), reconstructed: land-cover segmentation with a text on the climate zone."""

from .maps import augmented, bands, segment
from .model import MetaSegNet, joint_loss, loss, swin
from .prompts import Prompts
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
    "loss",
    "segment",
    "swin",
]
