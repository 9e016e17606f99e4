"""What a training of many hours leaves in its run's folder: a checkpoint to go on from, and the trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ops.files import atomic


def checkpoint(folder: str | Path, name: str, model: nn.Module, *data: object) -> dict[str, object]:
    """Arguments of `fit` by which a training that was stopped goes on where it was, and a finished one is only read.

    Args:
        folder: where the file is, or comes to be.
        name: of the training, the beginning of the file's name.
        model: before training. What it starts from is part of the file's name, so that what was trained on other
            weights is not taken for this one's.
        data: what tells the training data from others, such as names of files and labels.
    """
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + _bytes(tensor))
    for part in data:
        digest.update(_bytes(part) if isinstance(part, Tensor) else repr(part).encode())
    return {"checkpoint": _path(folder, f"{name}, {digest.hexdigest()[:16]}.pt"), "resume": True}


def save(folder: str | Path, name: str, state: Mapping[str, Tensor]) -> Path:
    """Write `state` as `folder`/`name`.safetensors, under a temporary name first."""
    path = _path(folder, f"{name}.safetensors")
    with atomic(path) as temporary:
        # copies: a tensor under two names is none that safetensors takes
        save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}, temporary)
    return path


def _path(folder: str | Path, name: str) -> Path:
    """Names of sets and models have strokes in them."""
    return Path(folder) / name.replace("/", "-")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
