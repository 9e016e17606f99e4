"""The sequence of a recipe's training: `opened` builds the model and opens data and checkpoint, `train` fits or
resumes it and saves the final weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import Count, typed
from ..io import record
from ..io.files import write_json
from .callbacks import Callback, Loop
from .checkpoints import Checkpoint, save, trained_state
from .fit import History, Loss, fit, plan
from .hardware import Hardware, RunParameters, check_devices, device


@typed
@dataclass(frozen=True)
class Training:
    """One training of a recipe, written down before anything is built or read. It runs once: callbacks have a state.

    Attributes:
        name: of the training, its checkpoint and its file of final weights.
        build: makes the model, with its seed.
        loss: from the model and a batch to the loss, see `fit`.
        data: the training data, or what computes it when the training begins; None: nothing is trained.
        fit: the other arguments of `fit`: optimizer, schedule, epochs, batch, last, callbacks, seed, hardware; a
            checkpoint of its own.
        facts: identity of data and settings: a checkpoint with other facts is not resumed.
        weights: the tensors of the model to save at the end; None: the caller saves them.
        metadata: text to save with them.
        every: steps between two checkpoints.
        dry_run: one epoch of two steps; of a few items, see `dry_items`.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    data: Dataset | Callable[[], Dataset] | None
    fit: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[nn.Module], Mapping[str, Tensor]] | None = trained_state
    metadata: Callable[[nn.Module], Mapping[str, str]] | None = None
    every: Count = 200
    dry_run: bool = False


@typed
def dry_items(p: RunParameters, batch: Count) -> int:
    """The images of a split that a dry run reads: of two steps with `batch` images, at most 256, on a CPU 4."""
    return 2 * min(batch, 256 if device(p.accelerator) == "cuda" else 4)


class Clock(Callback):
    """Write the seconds of the last step to `file`, by which `companion doctor` estimates hours."""

    def __init__(self, file: Path, images: int):
        self.file, self.images = file, images

    def begin(self) -> None:
        self.times = [time.monotonic()]

    def on_step_end(self, loop: Loop) -> None:
        """Wait for the device and read the clock."""
        if loop.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.monotonic())

    def on_fit_end(self, loop: Loop) -> None:
        """Write the file; the first step's seconds include what happens once."""
        if loop.fabric.global_rank == 0 and len(self.times) > 1:
            seconds = self.times[-1] - self.times[-2]
            write_json(self.file, {"images": self.images, "seconds": seconds, "device": record.device()})


class Opened(NamedTuple):
    """A training before its first step: its model and the arguments of `fit`; `out` as of `opened`."""

    training: Training
    model: nn.Module
    options: dict[str, Any]
    out: Path | None


@typed
def opened(training: Training, out: str | Path | None = None, **changes: Any) -> Opened:
    """Build the model of a training on the CPU and open its checkpoint; nothing is computed.

    Args:
        out: folder of the run: a stopped training is resumed from `out`/checkpoints, and the final weights are written
            to `out`/trained. None: neither is written.
        changes: replace arguments of `fit`.

    Raises what `fit` raises before its first step.
    """
    model, options = training.build(), {"name": training.name, **training.fit, **changes}
    hardware = options.get("hardware", Hardware())
    check_devices(hardware, hardware.devices)
    ready = Opened(training, model, options, None if out is None else Path(out))
    if training.data is None:
        return ready
    if out and "checkpoint" not in options:
        facts = {**training.facts, "model": model}
        options["checkpoint"] = Checkpoint.of(Path(out) / "checkpoints", training.name, training.every, **facts)
    if not callable(training.data):
        plan(model, training.data, **_shortened(ready, training.data))
    return ready


@typed
def train(ready: Opened) -> tuple[nn.Module, History]:
    """The trained model, in eval mode, and the history of its training (empty when nothing is trained)."""
    training, model, out = ready.training, ready.model, ready.out
    if training.data is None:
        return model.eval(), []
    data = training.data() if callable(training.data) else training.data
    history = fit(model, training.loss, data, **_shortened(ready, data))
    if out and training.weights:
        metadata = training.metadata(model) if training.metadata else None
        save(out / "trained", training.name, training.weights(model), metadata)
    return model.eval(), history


def run(training: Training, out: str | Path | None = None, **changes: Any) -> tuple[nn.Module, History]:
    """`train` what was `opened`."""
    return train(opened(training, out, **changes))


def _shortened(ready: Opened, data: Dataset) -> dict[str, Any]:
    """The arguments of `fit`; in a dry run for an epoch of two steps, which are timed."""
    options = dict(ready.options)
    if ready.training.dry_run:  # a small set has fewer images than two batches, of which batch norm needs two;
        # micro-batches stay as large as they are
        hardware = options.get("hardware", Hardware())
        each = max(len(data) // (2 * hardware.devices), min(2, len(data) // hardware.devices), 1)
        batch = min(options["batch"], each * hardware.devices)
        hardware = replace(hardware, accumulate=-(-hardware.accumulate * batch // options["batch"]))
        options |= {"epochs": 1, "batch": batch, "last": "drop", "hardware": hardware}
        if ready.out:
            options["callbacks"] = [*options.get("callbacks", ()), Clock(ready.out / "step.json", batch)]
    return options
