"""TIP: Text-Driven Image Processing with Semantic and Restoration Instructions."""

from .model import TIP, Adaptor, fuse, loss
from .pipeline import TIPPipeline, build, clip_tokenizer, load_adaptor, save_adaptor, tokenize

__all__ = [
    "TIP",
    "Adaptor",
    "TIPPipeline",
    "build",
    "clip_tokenizer",
    "fuse",
    "load_adaptor",
    "loss",
    "save_adaptor",
    "tokenize",
]
