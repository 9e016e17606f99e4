"""Learning rate schedules, and optimisers with the parameter groups that the papers use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from ..errors import Amount, Count, Range, Share, Whole, check_choice, check_range, typed

Schedule = Callable[[float, int, int], np.ndarray]
"""From a base learning rate, the steps of the training and those of an epoch to the learning rate of each step."""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Momentum = Annotated[float, Range(0, 1, "[)")]

SCHEDULES = ("constant", "linear", "cosine", "step", "cosine by epoch")
DECAYS = ("matrices", "all")


@typed
def learning_rates(
    schedule: str,
    base: Amount,
    steps: Count,
    warmup: Whole = 0,
    final: Amount = 0.0,
    *,
    warmup_lr: Amount | None = None,
    epoch: Count = 1,
) -> np.ndarray:
    """The learning rate of each step, (steps,).

    A warm-up over `warmup` steps, linear from exactly 0 to `base`, both ends included, or constant at `warmup_lr`. Then
    `schedule`: "constant", "linear" or "cosine" (half a period) from `base` towards `final`; "step": `final` for the
    last fifth; or "cosine by epoch": one learning rate for each `epoch` steps, on half a period that is as long as the
    whole training but begins after the warm-up, so it ends above `final` (CoOp's code and its descendants).

    Raises `BadParameter`: no step, or a warm-up longer than the training.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_range("warmup", warmup, 0, steps)
    after = np.arange(steps - warmup)
    done = after / max(steps - warmup, 1)
    left = {
        "constant": np.ones_like(done),
        "linear": 1 - done,
        "cosine": (1 + np.cos(np.pi * done)) / 2,
        "step": np.where(done < 0.8, 1.0, 0.0),
        "cosine by epoch": (1 + np.cos(np.pi * (after // epoch * epoch) / steps)) / 2,
    }[schedule]
    rising = np.linspace(0, base, warmup) if warmup_lr is None else np.full(warmup, warmup_lr)
    return np.concatenate([rising, final + (base - final) * left])


@typed
def schedule(
    kind: str = "cosine", warmup: Share = 0.1, final_lr: Amount = 1e-7, warmup_lr: Amount | None = None
) -> Schedule:
    """A schedule of `learning_rates` for `fit`; `warmup` is a fraction of all steps, 0 to 1.

    Raises `BadParameter`: an unknown kind, or a fraction out of range.
    """
    check_choice("schedule", kind, SCHEDULES)

    return lambda base, steps, per_epoch: learning_rates(
        kind, base, steps, round(warmup * steps), final_lr, warmup_lr=warmup_lr, epoch=per_epoch
    )


def given(learning_rates: np.ndarray) -> Schedule:
    """A schedule of explicit learning rates, one per step, independent of the base learning rate."""
    return lambda base, steps, per_epoch: learning_rates


@typed
def param_groups(
    parameters: Iterable[nn.Parameter], weight_decay: Amount = 0.0, decay: str = "matrices", **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups of the tensors that require a gradient.

    Args:
        decay: "matrices": weight decay on tensors with two axes or more, not on vectors and biases; "all": on all
            tensors.
        options: of each group, such as `name` or `lr`.
    """
    check_choice("decay", decay, DECAYS)
    trained = [p for p in parameters if p.requires_grad]
    if decay == "all":
        return [{"params": trained, "weight_decay": float(weight_decay)} | options]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": float(weight_decay)} | options,
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0} | options,
    ]


@typed
def adamw(
    lr: Amount,
    weight_decay: Amount = 1e-4,
    *,
    decay: str = "matrices",
    betas: tuple[Momentum, Momentum] = (0.9, 0.999),
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
) -> MakeOptimizer:
    """AdamW of a model's trainable parameters, in `param_groups` or in the groups returned by `groups(model)`."""
    groups = groups or (lambda model: param_groups(model.parameters(), weight_decay, decay))
    options: dict[str, Any] = {"betas": tuple(map(float, betas)), "weight_decay": float(weight_decay)}
    return lambda model: torch.optim.AdamW(groups(model), float(lr), **options)


@typed
def sgd(
    lr: Amount,
    weight_decay: Amount = 0.0,
    *,
    momentum: Momentum = 0.9,
    decay: str = "matrices",
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
) -> MakeOptimizer:
    """SGD with momentum (not Nesterov's) and the weight decay added to the gradient; groups as in `adamw`."""
    groups = groups or (lambda model: param_groups(model.parameters(), weight_decay, decay))
    return lambda model: torch.optim.SGD(groups(model), float(lr), float(momentum), weight_decay=float(weight_decay))
