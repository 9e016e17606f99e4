"""How a pocket model is shipped: its weights, and a card beside them that says what made it and how good it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic

ATTRIBUTION = (
    "photographs china.jpg (danielbuechele) and flower.jpg (vultilion), CC BY 2.0; others free, see scikit-image's "
    "documentation of skimage.data"
)


def ship(path: Path, state: Mapping[str, Tensor], head: Mapping[str, object], quality: object, text: str) -> Path:
    """Write tensors to `path`, a .safetensors, and their card to the .md beside it; return `path`.

    Args:
        head: what the card says first: "library_name", "data", "command", "recipe", "seconds", "parameters".
        quality: what was measured.
        text: the card's prose.
    """
    with atomic(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)
    facts = {
        "license": "mit",
        "attribution": ATTRIBUTION,
        **head,
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    write(path, facts, quality, text)
    return path


def write(path: Path, facts: Mapping[str, object], quality: object, text: str) -> None:
    """Write the card of the weights at `path`."""
    with atomic(path.with_suffix(".md")) as temporary:
        head = yaml.safe_dump({**facts, "quality": quality}, sort_keys=False, allow_unicode=True, width=110)
        temporary.write_text(f"---\n{head}---\n{text}", encoding="utf-8")
