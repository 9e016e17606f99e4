"""SA²VP on real images: a pretrained ViT-S/14, aerial scenes and CIFAR-10, under the protocol of all studies.

    COMPANION_REAL_DATA=<folder> python -m companion.studies.study sa2vp_real reports/real/sa2vp

All methods have the same encoder at 112 px (8 x 8 patches) and grid of learning rates, and those that run it in every
step the same epochs and batch. The linear probe is trained on features that are computed once, so its 100 epochs cost
less than one of the others. Trainings are in bf16 (autocast), which takes two thirds of the time where the CPU
multiplies bf16, and with attention as plain matrix products, with which a step took 8 to 18 % less time on the CPU of
this study than with the default; features of the probe and scores are in fp32. Not tuned: the width and scale of SA²VP
(its authors' scale for natural images), the 8 prompts of VPT.

`reports/real/sa2vp/losses.csv` has the loss of each step of SA²VP on CIFAR-10 at the selected learning rate with two of
the test seeds, one of which starts late.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

from .. import backbones
from ..evaluation.ablations import Study
from ..models.layers import classifying
from ..models.sa2vp import SA2VP, recipe
from ..models.sa2vp import baselines as vpt
from ..toy.sa2vp import TOKENS
from ..training.fit import History, fit, outputs_of
from ..training.hardware import CPU, Hardware
from . import real

ENCODER, SIDE = "vit_small_patch14_dinov2", 112
HARDWARE = Hardware("cpu", precision="bf16-mixed")
EPOCHS, PROBE_EPOCHS, BATCH = 5, 100, 20
PROBE = f"linear probe, {PROBE_EPOCHS} epochs"
METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "full fine-tuning": classifying.FineTuning,
    PROBE: lambda encoder, classes: classifying.head(encoder.num_features, classes),
    "VPT-shallow": functools.partial(vpt.VPT, tokens=TOKENS, deep=False, dropout=0.0),
    "VPT-deep": functools.partial(vpt.VPT, tokens=TOKENS, deep=True, dropout=0.0),
    "SA²VP": lambda encoder, classes: SA2VP(encoder, classes, width=8, scale=0.1, dropout=0.0),
}


class Part(NamedTuple):
    """A split of a task for a seed."""

    task: str
    seed: int
    split: str

    def read(self) -> TensorDataset:
        """Images (n, 3, 112, 112) as the encoder sees them, and labels (n,)."""
        return real.images(*self, backbones.input_of(backbones.build(ENCODER, "random", img_size=SIDE)))


def data(task: str, seed: int, split: str) -> Part:
    """A split; tests are of models of the training images too, which are as many in each task as its name says."""
    return Part(task, seed, "train" if split == "trainval" else split)


@functools.lru_cache(6)
def features(part: Part) -> TensorDataset:
    """The features (n, 384) of a split that a probe reads, and labels; computed once, because the encoder is frozen."""
    images, labels = part.read().tensors
    encoder = backbones.build(ENCODER, img_size=SIDE)
    return TensorDataset(outputs_of(encoder, TensorDataset(images), hardware=CPU), labels)


def train(method: str, task: str, learn: Part, learning_rate: float, seed: int) -> tuple[nn.Module, History]:
    """A trained method, and the last ten steps of its history."""
    encoder = backbones.build(ENCODER, img_size=SIDE)
    torch.manual_seed(seed)
    model, probe = METHODS[method](encoder, real.CLASSES[task]), method == PROBE
    options = recipe.fit_options(learning_rate, HARDWARE) | {"seed": seed, "name": method}
    with sdpa_kernel(SDPBackend.MATH):
        history = fit(
            model,
            recipe.loss,
            features(learn) if probe else learn.read(),
            epochs=PROBE_EPOCHS if probe else EPOCHS,
            batch=BATCH,
            **options,
        )
    return model.eval(), history[-10:]


def score(model: nn.Module, task: str, part: Part) -> dict[str, float]:
    """The accuracy in percent, of the image pathway if there are two; a probe's on the features."""
    read = features(part) if isinstance(model, nn.Linear) else part.read()
    return {"accuracy": round(recipe.accuracy(model, read, CPU, batch=256), 2)}


STUDY = Study(
    tasks={task: tuple(METHODS) for task in real.FOLDERS},
    learning_rates=(3.3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 9e-3, 2.7e-2),
    budget=f"{EPOCHS} epochs ({PROBE_EPOCHS} of the linear probe), batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    seeds=(200, 201, 202, 203, 204),
)
