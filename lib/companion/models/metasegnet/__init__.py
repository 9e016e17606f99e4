"""MetaSegNet (arXiv 2312.12735), reconstructed: land-cover segmentation with a text on the climate zone."""

from .model import MetaSegNet, augmented, bands, joint_loss, segment, swin
from .text import BertText, ClipText, TextEncoder, Words

__all__ = [
    "BertText",
    "ClipText",
    "MetaSegNet",
    "TextEncoder",
    "Words",
    "augmented",
    "bands",
    "joint_loss",
    "segment",
    "swin",
]
