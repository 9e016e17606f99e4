"""SA²VP at toy scale: the methods, the tasks, and one training run of any of them.

Three tasks: "where" needs the position, "digits" and "textures" are real images. All methods share the frozen (or
fine-tuned) small ViT, the optimiser, the number of epochs and the grid of learning rates. Dropout is off for all: the
released code applies dropout in the frozen blocks during training and VPT's does not, so either choice would favour
one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ... import backbones
from ...data import classification
from ...models.layers import vpt
from ...models.sa2vp import SA2VP, recipe
from ...models.sa2vp.model import AlignedAttention, neighbourhood
from ...training.fit import CPU, Hardware, History, fit, predict
from .. import encoders
from ..datasets import classification as pocket
from . import last_loss, reader, study_root

LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]
OPTIONS: dict[str, Any] = {"epochs": 8, "batch": 20, "hardware": CPU}  # of `fit`
BUDGET = f"{OPTIONS['epochs']} epochs, batch {OPTIONS['batch']}"
WIDTH, SCALE, TOKENS = 8, 1.5, 8


def _reach(radius: int | None) -> Callable[[nn.Module, int], SA2VP]:
    """SA²VP whose tokens attend to the tokens at most `radius` away: 0 the same position only, None all (a control)."""

    def build(backbone: nn.Module, classes: int) -> SA2VP:
        model = _ours()(backbone, classes)
        model.cross = AlignedAttention(neighbourhood(model.grid, radius))
        return model

    return build


def _ours(**changes) -> Callable[[nn.Module, int], SA2VP]:
    options = dict(width=WIDTH, scale=SCALE, dropout=0.0) | changes
    return lambda backbone, classes: SA2VP(backbone, classes, **options)


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "full fine-tuning": vpt.FineTuning,
    "linear probing": vpt.LinearProbe,
    "VPT-shallow": functools.partial(vpt.VPT, tokens=TOKENS, deep=False, dropout=0.0),
    "VPT-deep": functools.partial(vpt.VPT, tokens=TOKENS, deep=True, dropout=0.0),
    "SA²VP": _ours(),
    "SA²VP, global attention": _reach(None),
    "SA²VP, s = 0.1": _ours(scale=0.1),
    "SA²VP, same position only": _reach(0),
    "SA²VP, no new maps": _ours(new_maps=0),
}
MAIN = list(METHODS)[:7]
TASKS = {"where": list(METHODS), "digits": MAIN, "textures": MAIN}


def build(method: str, classes: int, seed: int) -> nn.Module:
    """The model of a method on the small ViT; its new tensors are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](encoders.build("pocket_vit"), classes)


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    pocket.write(study_root(root, seed), TASKS, seed)


@reader(8)
def images(task: str, root: str, seed: int, split: str) -> TensorDataset:
    """A split of a task in memory: images (n, 3, 32, 32), labels (n,)."""
    seen = backbones.input_of(encoders.build("pocket_vit", "random"))
    transform = classification.resize_transform(seen)
    return classification.in_memory(classification.load(f"pocket/{task}", study_root(root, seed), split, transform))


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict:
    """Train one method on one task. `split` "select": on 800 images, validated on 200; "test": on 1000, tested.

    `options` go to `fit`. Returns a row: accuracy in percent, the last loss, the trainable parameters (no head).
    """
    train_on, test_on = ("train", "val") if split == "select" else ("trainval", "test")
    data, held_out = (images(task, str(root), seed, name) for name in (train_on, test_on))
    model = build(method, len(pocket.TASKS[task].classes), seed)
    return row(
        model, held_out, fitted(model, data, learning_rate, **OPTIONS | {"seed": seed, "name": method} | options)
    )


def fitted(model: nn.Module, data: TensorDataset, learning_rate: float, **options: Any) -> History:
    """Train a method in place by the published recipe; `options` go to `fit`. A linear probe trains its head alone, on
    features computed once, since its encoder is frozen."""
    options = recipe.fit_options(learning_rate, options["hardware"]) | options
    if isinstance(model, vpt.LinearProbe):
        features = predict(model.backbone, data, hardware=Hardware(options["hardware"].accelerator))
        history = fit(model.head, recipe.loss, TensorDataset(features, data.tensors[1]), **options)
        model.eval()
        return history
    return fit(model, recipe.loss, data, **options)


def row(model: nn.Module, held_out: TensorDataset, history: History) -> dict:
    """A row of the study: accuracy in percent, the last loss, the trainable parameters (no head)."""
    return {
        "accuracy": round(recipe.accuracy(model, held_out, CPU, batch=256), 2),
        "loss": last_loss(history, 10),
        "trained": sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")),
    }
