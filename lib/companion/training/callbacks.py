"""Callbacks of `fit`: gradient clipping, early stopping, moving averages of weights, Lookahead; and the state they see.

A callback of your own overrides the hooks that it needs. Its `state_dict` is part of the checkpoint.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadParameter, Count, Positive, Share, Whole, check_range, typed
from .checkpoints import trained_state

if TYPE_CHECKING:  # imported only for training: it takes a second, because it imports torchmetrics
    from lightning_fabric import Fabric

PLAIN = (bool, int, float, str, np.generic, type(None))


@dataclass
class Loop:
    """The state of a training, passed to callbacks.

    Attributes:
        model: on its device, without Fabric's wrapper.
        step: finished optimiser steps; `steps` of the whole training, `per_epoch` of an epoch.
        precision: of `Hardware`.
        stopped: set to True to end the training after this step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    fabric: Fabric
    steps: int
    per_epoch: int
    precision: str
    step: int = 0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.per_epoch

    @property
    def ended(self) -> bool:
        """Whether no step follows."""
        return self.stopped or self.step == self.steps

    @property
    def epoch_ended(self) -> bool:
        """Whether the next step, if any, begins an epoch."""
        return self.ended or self.step % self.per_epoch == 0


class Callback:
    """A callback that does nothing.

    Hooks: `begin` before a training, perhaps another one with the same object; `on_gradients` after the backward pass,
    gradients unscaled, before the optimiser's step; `on_step_end`; `on_epoch_end`, also when a training ends within an
    epoch; `on_fit_end`. Setting `loop.stopped` in any of them but the first ends the training.

    A training resumes with callbacks of the same classes and `settings`; those without settings and `state_dict`
    replace each other.
    """

    def settings(self, steps: int) -> dict[str, Any]:
        """The hyper-parameters for a training of so many steps: by default the constructor's arguments that are plain
        values (numbers, text, bool, None), read from the attributes of their names."""
        own = {name: vars(self).get(name, ...) for name in inspect.signature(type(self)).parameters}
        return {name: value for name, value in own.items() if isinstance(value, PLAIN)}

    def begin(self) -> None:
        """Forget the training before: an object may serve several."""

    def on_gradients(self, loop: Loop) -> None:
        """Before the optimiser's step."""

    def on_step_end(self, loop: Loop) -> None:
        """After the optimiser's step; `loop.step` counts it."""

    def on_epoch_end(self, loop: Loop) -> None:
        """After the last step of an epoch."""

    def on_fit_end(self, loop: Loop) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed training needs; tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""


class ClipNorm(Callback):
    """Clip the gradient to a maximum norm: over all parameter groups of one `name`, or for each tensor separately.

    Args:
        max_norm: the maximum norm.
        per_tensor: clip each tensor separately, as in DINO's code.
    """

    @typed
    def __init__(self, max_norm: Positive, *, per_tensor: bool = False):
        self.max_norm, self.per_tensor = float(max_norm), per_tensor

    def on_gradients(self, loop: Loop) -> None:
        groups: dict[object, list[nn.Parameter]] = {}
        for group in loop.optimizer.param_groups:
            groups.setdefault(group.get("name"), []).extend(group["params"])
        for parameters in groups.values():
            for one in [[p] for p in parameters] if self.per_tensor else [parameters]:
                nn.utils.clip_grad_norm_(one, self.max_norm)


class ClipValue(Callback):
    """Clip every entry of the gradient to [-max_value, max_value]."""

    @typed
    def __init__(self, max_value: Positive):
        self.max_value = float(max_value)

    def on_gradients(self, loop: Loop) -> None:
        for group in loop.optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], self.max_value)


class EarlyStop(Callback):
    """Score the model after each epoch; restore its best weights at the end, and stop early when the score stops
    rising.

    Args:
        score: from the model, in eval mode and without autograd, to its score (higher is better, nan is the lowest); or
            to two scores: the first selects the best weights, the second stops the training.
        patience: epochs without a new best after which training stops; 0: never.
        first_step: step before which nothing is scored.
        ties: among equal scores the later weights are selected.
        patient_ties: a score equal to the best restarts the patience.
        start: the initial best score: a lower score (without ties, also an equal one) neither selects weights nor
            restarts the patience; if none is better, the training ends with its last weights. None: the first score is
            the initial best.

    Attributes:
        scores: one for each epoch scored, (step, score, stopping score).
    """

    @typed
    def __init__(
        self,
        score: Callable[[nn.Module], float | tuple[float, float]],
        patience: Whole = 0,
        *,
        first_step: Whole = 0,
        ties: bool = False,
        patient_ties: bool = False,
        start: float | None = None,
    ):
        self.score, self.patience, self.first_step = score, patience, first_step
        self.ties, self.patient_ties = ties, patient_ties
        self.start = start
        self.begin()

    def begin(self) -> None:
        self.best: dict[str, Tensor] = {}
        self.scores: list[tuple[int, float, float]] = []
        # the best of the scores that select, and of those that stop; epochs since the latter
        self.highest = self.top = -np.inf if self.start is None else float(self.start)
        self.waited = 0

    def on_epoch_end(self, loop: Loop) -> None:
        """Score, store the best weights, stop if the patience is exhausted."""
        if loop.step < self.first_step:
            return
        loop.model.eval()
        with torch.no_grad():  # only one of several devices scores, so that all stop at the same step
            score = self.score(loop.model) if loop.fabric.global_rank == 0 else 0.0
        score = loop.fabric.broadcast(score)
        loop.model.train()
        both = score if isinstance(score, tuple) else (score, score)
        try:
            selects, stops = (-np.inf if math.isnan(float(value)) else float(value) for value in both)
        except (TypeError, ValueError) as error:
            raise BadParameter("score", score, "one that returns a number, or two") from error
        first = not (self.best or self.start is not None)
        if selects > self.highest or (self.ties and selects == self.highest) or first:
            self.best = trained_state(loop.model)
        self._count(loop.step, selects, stops)
        if self.patience and self.waited >= self.patience:
            loop.stopped = True

    def _count(self, step: int, selects: float, stops: float) -> None:
        better = stops > self.top or (self.patient_ties and stops == self.top)
        better = better or (self.start is None and not self.scores)
        self.waited = 0 if better else self.waited + 1
        self.highest, self.top = max(self.highest, selects), max(self.top, stops)
        self.scores.append((step, selects, stops))

    def on_fit_end(self, loop: Loop) -> None:
        loop.model.load_state_dict(self.best, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()
        self.best = state["best"]
        for row in state["scores"]:
            self._count(*row)


class Lookahead(Callback):
    """Lookahead (Zhang et al., 2019): move the parameters to slow copies, slow += alpha (fast - slow); fast = slow.

    The copies are made after the first step and updated after steps k + 1, 2 k + 1, ...
    """

    @typed
    def __init__(self, k: Count = 5, alpha: Share = 0.5):
        self.k, self.alpha = k, alpha
        self.begin()

    def begin(self) -> None:
        self.slow: list[Tensor] = []

    @torch.no_grad()
    def on_step_end(self, loop: Loop) -> None:
        fast = [p for group in loop.optimizer.param_groups for p in group["params"]]
        if not self.slow:
            self.slow = [p.detach().clone() for p in fast]
        elif (loop.step - 1) % self.k == 0:
            self.slow = [slow.to(p.device) for slow, p in zip(self.slow, fast, strict=True)]
            torch._foreach_lerp_(self.slow, fast, self.alpha)
            torch._foreach_copy_(fast, self.slow)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow = state["slow"]


class EMA(Callback):
    """Exponential moving averages of modules, updated after each step: of parameters and floating-point buffers (batch
    norm's running statistics). Other buffers are copied.

    Args:
        pairs: an average (see `ema_copy`), which is a part of the model, and the module that it averages.
        momentum: maps the number of finished steps to the momentum, 0 to 1.
    """

    @typed
    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: Callable[[int], float]):
        if any({*_values(module)} - {*dict(average.named_buffers())} for average, module in pairs):
            raise BadParameter("pairs", pairs, "each module after its `ema_copy`")
        self.pairs, self.momentum = pairs, momentum

    def settings(self, steps: int) -> dict[str, Any]:
        """The momentum of the first, a middle and the last step."""
        return {"momentum": [self.momentum(step) for step in (1, steps // 2 + 1, steps)]}

    @torch.no_grad()
    def on_step_end(self, loop: Loop) -> None:
        """Update the averages in place: momentum * average + (1 - momentum) * module."""
        for average, module in self.pairs:
            own, values = dict(average.named_buffers()), _values(module)
            momentum = self.momentum(loop.step)
            check_range("momentum", momentum, 0, 1)
            floats = [name for name, value in values.items() if value.is_floating_point()]
            torch._foreach_lerp_([own[name] for name in floats], [values[name] for name in floats], 1 - momentum)
            for name in values.keys() - floats:
                own[name].copy_(values[name])


def _values(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, a shared one under each of its names as in its `ema_copy`, and buffers."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def ema_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with buffers instead of parameters: stored in checkpoints, without gradients."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            del part._parameters[name]
            part.register_buffer(name, value.detach().clone())
    return twin
