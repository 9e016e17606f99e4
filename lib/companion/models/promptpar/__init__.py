"""PromptPAR: Pedestrian Attribute Recognition via CLIP based Prompt Vision-Language Fusion."""

from .model import Maps, Output, PromptPAR, Settings, loss, read_checkpoint
from .transforms import square_transform

__all__ = ["Maps", "Output", "PromptPAR", "Settings", "loss", "read_checkpoint", "square_transform"]
