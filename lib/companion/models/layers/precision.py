"""Computations that stay in float32 under autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context manager that disables autocast on `device`; the caller casts the inputs."""
    if device.type == "meta":  # the meta device, which autocast does not support
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
