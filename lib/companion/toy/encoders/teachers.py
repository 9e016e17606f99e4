"""The three small teachers of DMT, the factor that each does not encode, and the probes that measure it.

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
from torch.utils.data import TensorDataset

from ... import backbones
from ...errors import check_choice
from ...models.dmt.downstream import Features, ridge
from ...models.dmt.vit import SIZES, ViT, build
from ...training.fit import CPU, predict
from .. import encoders
from ..datasets import collage

NAME = "pocket_teachers"
TEACHERS = ("MAE", "MoCo v3", "iBOT")
SHAPE = {"depth": 3}  # else as `vit.SIZES["pocket teacher"]`
OPTIONS: dict[str, Any] = {
    "MAE": {},
    "MoCo v3": {"positions": "mocov3"},
    "iBOT": {"positions": "learned", "masked": True},
}
MASKED = 0.65  # masked share of the patches for MAE: 5 of 16 are visible
SHOTS, DRAWS = 10, 10  # labels per class for a probe, and the number of draws
RIDGE = {SHOTS: 10.0, None: 30.0}  # by labels per class; None: all


# --- the teachers -----------------------------------------------------------------------------------------------------


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


# --- probes -----------------------------------------------------------------------------------------------------------


def features(encoder: ViT, images: Tensor) -> Tensor:
    """The input of a probe for each image: [CLS] token and mean patch token (n, 2 D)."""
    return predict(Features(encoder), TensorDataset(images), hardware=CPU)


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """The indices of `count` random images of each class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in labels.unique():
        indices = torch.nonzero(labels == label)[:, 0]
        found.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
    return torch.cat(found)


def probe(known: Tensor, factors: Tensor, tested: Tensor, truth: Tensor, shots: int | None = SHOTS) -> dict[str, float]:
    """Accuracy in percent on each factor of linear probes on features, and their "mean".

    Args:
        known, factors: features (n, D) of training images and their factors (n, 4).
        tested, truth: those of test images.
        shots: labels per class; the mean over `DRAWS` draws of them. None: all labels, once.
    """
    found = {}
    for i, (name, classes) in enumerate(collage.FACTORS.items()):
        draws = [slice(None)] if shots is None else [drawn(factors[:, i], shots, seed) for seed in range(DRAWS)]
        right = [
            ridge(known[draw], factors[draw, i], classes, tested, RIDGE[shots]).argmax(1) == truth[:, i]
            for draw in draws
        ]
        found[name] = 100 * float(torch.stack(right).float().mean())
    return found | {"mean": sum(found.values()) / len(found)}


def measure(encoder: ViT, train: collage.Part, test: collage.Part, shots: int | None = SHOTS) -> dict[str, float]:
    """`probe` of an encoder's features."""
    known, tested = (features(encoder, part.images) for part in (train, test))
    return probe(known, train.factors, tested, test.factors, shots)
