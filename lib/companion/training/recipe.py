"""The sequence of a recipe's training: build the model, fit or resume it, save the final weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import Count, typed
from ..io import record
from ..io.files import write_json
from .callbacks import Callback, Loop
from .checkpoints import Checkpoint, save, trained_state
from .fit import History, Loss, fit
from .hardware import Hardware, RunParameters, device


@typed
@dataclass(frozen=True)
class Training:
    """One training of a recipe, written down before anything is built or read. It runs once: callbacks have a state.

    Attributes:
        name: of the training, its checkpoint and its file of final weights.
        build: makes the model, with its seed.
        loss: from the model and a batch to the loss, see `fit`.
        data: makes the training data; None: nothing is trained.
        fit: the other arguments of `fit`: optimizer, schedule, epochs, batch, last, callbacks, seed, hardware; a
            checkpoint of its own.
        facts: identity of data and settings: a checkpoint with other facts is not resumed.
        weights: the tensors of the model to save at the end; None: the caller saves them.
        metadata: text to save with them.
        every: steps between two checkpoints.
        dry_run: one epoch of two steps; `data` makes few items, see `dry_items`.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[], Dataset] | None
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


@typed
def run(training: Training, out: str | Path | None = None, **changes: Any) -> tuple[nn.Module, History]:
    """The trained model, in eval mode, and the history of its training (empty when nothing is trained).

    Args:
        out: folder of the run: a stopped training is resumed from `out`/checkpoints, and the final weights are written
            to `out`/trained. None: neither is written.
        changes: replace arguments of `fit`.
    """
    model, options = training.build(), {"name": training.name, **training.fit, **changes}
    if training.data is None:
        return model.eval(), []
    if out and "checkpoint" not in options:
        folder, facts = Path(out) / "checkpoints", {**training.facts, "model": model}
        options["checkpoint"] = Checkpoint.of(folder, training.name, training.every, **facts)
    data = training.data()
    if training.dry_run:  # a small set has fewer images than two batches, of which batch norm needs two;
        # micro-batches stay as large as they are
        hardware = options.get("hardware", Hardware())
        each = max(len(data) // (2 * hardware.devices), min(2, len(data) // hardware.devices), 1)
        batch = min(options["batch"], each * hardware.devices)
        hardware = replace(hardware, accumulate=-(-hardware.accumulate * batch // options["batch"]))
        options |= {"epochs": 1, "batch": batch, "last": "drop", "hardware": hardware}
        if out:
            clock = Clock(Path(out) / "step.json", options["batch"])
            options["callbacks"] = [*options.get("callbacks", ()), clock]
    history = fit(model, training.loss, data, **options)
    if out and training.weights:
        metadata = training.metadata(model) if training.metadata else None
        save(Path(out) / "trained", training.name, training.weights(model), metadata)
    return model.eval(), history
