"""Computations that stay in float32 under autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which autocast is off on `device`; its inputs are cast by the caller."""
    if device.type == "meta":  # shapes alone, which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
