"""The three small teachers of DMT, and the factor that each does not encode.

    MAE       predicts masked patches: positions, and little of textures.
    MoCo v3   contrasts grey views: no colour, so neither hues nor the reddish square.
    iBOT      matches crops that are mirrored and of another contrast: colour, and little of positions.

All are ViTs of one shape, trained on the same unlabelled collages. The factor that each does not encode is our choice
(section 14.4): three teachers together can encode more than any one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backbones
from ...errors import check_choice
from ...models.dmt.vit import SIZES, ViT, build
from .. import encoders

NAME = "pocket_teachers"
TEACHERS = ("MAE", "MoCo v3", "iBOT")
SHAPE = {"depth": 3}  # else as `vit.SIZES["pocket teacher"]`
OPTIONS: dict[str, Any] = {
    "MAE": {},
    "MoCo v3": {"positions": "mocov3"},
    "iBOT": {"positions": "learned", "masked": True},
}
MASKED = 0.65  # masked share of the patches for MAE: 5 of 16 are visible


def untrained(name: str = "MAE", seed: int = 0) -> ViT:
    """The teacher before its training, in eval mode. Raises `BadParameter` for another name."""
    check_choice("teacher", name, TEACHERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("pocket teacher", **SHAPE, **OPTIONS[name]).eval()


def load() -> dict[str, ViT]:
    """The shipped teachers by name, in eval mode. Raises `MissingWeights`, `CorruptFile`."""
    state = backbones.read_state(encoders.weights_file(NAME))
    found = {}
    for name in TEACHERS:
        prefix = f"{name}/"
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        found[name] = ViT.from_official(part, SIZES["pocket teacher"]["heads"], name)
    return found


def grey(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) without their colour: the weighted mean of the channels (ITU-R 601), three times."""
    weights = backbones.per_channel((0.299, 0.587, 0.114), images.device).flatten().to(images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None].expand_as(images)
