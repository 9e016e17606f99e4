"""DMT on real images: a small ViT distilled from two real encoders, scored by linear probes, under the protocol of all
studies.

    COMPANION_REAL_DATA=<folder> python -m companion.studies.study dmt_real reports/real/dmt

The teachers are a ViT-S/14 and an EfficientNet-Lite0, unlike in architecture, width and pre-training; both have 8 x 8
positions here, at 112 and at 128 px. A student learns from their tokens of a task's training images, without labels,
then its frozen features ([CLS] token and mean patch token) are classified by ridge regression on the labels of the same
images. All students have the same initial weights (by seed), steps, batch and grid of learning rates. Not tuned: the
student's size and DMT's other settings, those of the shipped `photo_student`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .. import backbones
from ..evaluation.ablations import Study
from ..models.dmt.downstream import ridge
from ..models.dmt.model import DMT, loss
from ..models.dmt.vit import build
from ..toy.encoders import photo_student
from ..toy.encoders.photo_student import TEACHERS
from ..training.fit import History, fit
from ..training.hardware import CPU
from ..training.schedules import adamw
from . import real

SIDES = {"ViT-S/14": 112, "EfficientNet-Lite0": 128}  # pixels; both give 8 x 8 positions
SEEN = backbones.Input(SIDES["EfficientNet-Lite0"], (0.0,) * 3, (1.0,) * 3)
STUDENT = photo_student.STUDENT | {"image": 112}
STEPS, BATCH, WEIGHT_DECAY, MASKED = 800, 32, 0.05, 0.5
STUDENTS = {"DMT": tuple(TEACHERS)} | {f"{name} only": (name,) for name in TEACHERS}
THEMSELVES = {f"teacher {name}": name for name in TEACHERS}
UNTRAINED = ("untrained", *THEMSELVES)


class Part(NamedTuple):
    """A split of a task for a seed."""

    task: str
    seed: int
    split: str

    def read(self) -> tuple[Tensor, ...]:
        """The images (n, 3, 128, 128) in 0 to 1, and their labels (n,)."""
        return real.images(*self, SEEN).tensors


def data(task: str, seed: int, split: str) -> Part:
    """A split; tests are of students of the training images too, since probing needs no validation images."""
    return Part(task, seed, "train" if split == "trainval" else split)


@functools.cache
def _teachers() -> dict[str, nn.Module]:
    return photo_student.teachers(SIDES["ViT-S/14"])


@functools.lru_cache(8)
def tokens(name: str, part: Part) -> Tensor:
    """A teacher's tokens (n, 1 + 64, D) of a split; computed once per process, because every teacher is frozen."""
    pixels = part.read()[0].split(50)
    return torch.cat([photo_student.tokens(name, _teachers()[name], some, SIDES[name]) for some in pixels])


def features(encoder: nn.Module, part: Part) -> Tensor:
    """The features (n, F) of a split that are probed, of a student or a teacher."""
    teacher = next((name for name, model in _teachers().items() if model is encoder), "")
    if teacher:
        found = tokens(teacher, part)
    else:
        with torch.inference_mode():
            pixels = part.read()[0].split(50)
            found = torch.cat([encoder(photo_student.seen_by_student(some, STUDENT["image"])) for some in pixels])
    return torch.cat([found[:, 0], found[:, 1:].mean(1)], 1)


def train(method: str, task: str, learn: Part, learning_rate: float, seed: int) -> tuple[nn.Module, History]:
    """The encoder of a method, a student or a teacher itself, and the history of its training."""
    if method in THEMSELVES:
        return _teachers()[THEMSELVES[method]], []
    targets = [tokens(name, learn) for name in STUDENTS.get(method, ())]
    torch.manual_seed(seed)  # after the teachers, which draw random numbers when they are built
    student = build("pocket", **STUDENT).eval()
    if method in UNTRAINED:
        return student, []
    pixels = photo_student.seen_by_student(learn.read()[0], STUDENT["image"])
    model = DMT(student, [t.shape[-1] for t in targets], mask_ratio=MASKED, statistics="running", decoder="pocket")
    batch = min(BATCH, len(pixels))
    history = fit(
        model,
        loss,
        TensorDataset(pixels, *targets),
        epochs=STEPS / (len(pixels) // batch),
        batch=batch,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )
    return model.export().eval(), history


def score(encoder: nn.Module, task: str, part: Part) -> dict[str, float]:
    """Accuracy in percent of a ridge regression on the features of the training images."""
    known = part._replace(split="train")
    outputs = ridge(features(encoder, known), known.read()[1], real.CLASSES[task], features(encoder, part))
    right = outputs.argmax(1) == part.read()[1]
    return {"accuracy": round(100 * right.double().mean().item(), 2)}


STUDY = Study(
    tasks={task: (*STUDENTS, *UNTRAINED) for task in real.FOLDERS},
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
    budget=f"{STEPS} steps, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    untrained=UNTRAINED,
    seeds=(200, 201, 202),
)
