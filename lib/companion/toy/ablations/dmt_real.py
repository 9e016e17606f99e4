"""DMT on real images: a small ViT distilled from two real encoders, scored by linear probes, under the protocol of all
studies.

    COMPANION_REAL_DATA=<folder> python -m companion.toy.ablation dmt_real reports/real/dmt

The teachers are a ViT-S/14 and an EfficientNet-Lite0, unlike in architecture, width and pre-training; both have 8 x 8
positions here, at 112 and at 128 px. A student learns from their tokens of a task's training images, without labels,
then its frozen features ([CLS] token and mean patch token) are classified by ridge regression on the labels of the same
images. The tasks, their images and splits are those of `sa2vp_real`. All students have the same initial weights (by
seed), steps, batch and grid of learning rates. Not tuned: the student's size and DMT's other settings, those of the
shipped `photo_student`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ... import backbones
from ...data import classification
from ...models.dmt import downstream
from ...models.dmt.model import DMT, loss
from ...models.dmt.vit import ViT, build
from ...training.fit import CPU, fit
from ...training.schedules import adamw
from ..encoders import photo_student
from ..encoders.photo_student import TEACHERS
from . import last_loss, reader, sa2vp_real

SIDES = {"ViT-S/14": 112, "EfficientNet-Lite0": 128}  # pixels; both give 8 x 8 positions
STUDENT = photo_student.STUDENT | {"image": 112}
LEARNING_RATES = [5e-4, 1e-3, 2e-3, 4e-3]
STEPS, BATCH, WEIGHT_DECAY, MASKED = 800, 32, 0.05, 0.5
BUDGET = f"{STEPS} steps, batch {BATCH}"
SEEDS = [200, 201, 202]
STUDENTS = {"DMT": tuple(TEACHERS)} | {f"{name} only": (name,) for name in TEACHERS}
THEMSELVES = {f"teacher {name}": name for name in TEACHERS}
UNTRAINED = ("untrained", *THEMSELVES)
METHODS = (*STUDENTS, *UNTRAINED)
TASKS = {task: list(METHODS) for task in sa2vp_real.TASKS}


def prepare(root: str | Path, seed: int) -> None:
    """Raise `MissingData` or `CorruptFile` before anything is trained, when images are missing."""
    sa2vp_real.prepare(root, seed)


@reader(6)
def images(task: str, seed: int, split: str) -> TensorDataset:
    """A split of a task in memory, (n, 3, 128, 128) in 0 to 1 and labels (n,): "train", "val" or "test"."""
    transform = classification.resize_transform(backbones.Input(SIDES["EfficientNet-Lite0"], (0.0,) * 3, (1.0,) * 3))
    folder = sa2vp_real.folder(task)
    return classification.in_memory(classification.image_folder(folder, 1 / 6, seed, transform)[split])


@functools.cache
def _teachers() -> dict[str, nn.Module]:
    return photo_student.teachers(SIDES["ViT-S/14"])


@reader(8)
def tokens(name: str, task: str, seed: int, split: str) -> Tensor:
    """A teacher's tokens (n, 1 + 64, D) of a split; computed once per process, because every teacher is frozen."""
    pixels = images(task, seed, split).tensors[0].split(50)
    return torch.cat([photo_student.tokens(name, _teachers()[name], part, SIDES[name]) for part in pixels])


def student(seed: int) -> ViT:
    """The student before its training: the same for all methods of a seed."""
    torch.manual_seed(seed)
    return build("pocket", **STUDENT).eval()


def features(encoder: ViT | str, task: str, seed: int, split: str) -> Tensor:
    """The features (n, F) of a split that are probed, of a student, or of the teacher of that name."""
    if isinstance(encoder, str):
        found = tokens(encoder, task, seed, split)
    else:
        pixels = images(task, seed, split).tensors[0].split(50)
        with torch.inference_mode():
            found = torch.cat([encoder(photo_student.seen_by_student(part, STUDENT["image"])) for part in pixels])
    return torch.cat([found[:, 0], found[:, 1:].mean(1)], 1)


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict:
    """Train a student, if the method has one, and probe it on validation (`split` "select") or test images.

    `options` go to `fit`. Returns a row: accuracy in percent, and the last loss.
    """
    last = 0.0
    if method not in STUDENTS:
        encoder = THEMSELVES.get(method) or student(seed)
    else:
        pixels = photo_student.seen_by_student(images(task, seed, "train").tensors[0], STUDENT["image"])
        targets = [tokens(name, task, seed, "train") for name in STUDENTS[method]]
        # the student last: teachers that are built draw random numbers; adapters and decoder are drawn after it
        widths = [found.shape[-1] for found in targets]
        model = DMT(student(seed), widths, mask_ratio=MASKED, statistics="running", decoder="pocket")
        batch = min(BATCH, len(pixels))
        settings: dict[str, Any] = {"epochs": STEPS / (len(pixels) // batch), "batch": batch, "hardware": CPU}
        settings |= {"optimizer": adamw(learning_rate, WEIGHT_DECAY), "seed": seed, "name": method}
        history = fit(model, loss, TensorDataset(pixels, *targets), **settings | options)
        encoder, last = model.export().eval(), last_loss(history)
    known, held_out = "train", "val" if split == "select" else "test"
    labels, truth = (images(task, seed, name).tensors[1] for name in (known, held_out))
    x, others = (features(encoder, task, seed, name) for name in (known, held_out))
    right = downstream.ridge(x, labels, sa2vp_real.CLASSES[task], others).argmax(1) == truth
    return {"accuracy": round(100 * right.double().mean().item(), 2), "loss": last}
