"""The sequence of a recipe's training: build the model, fit or resume it, save the final weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from .checkpoints import Checkpoint, save, trained_state
from .fit import History, Loss, fit


@dataclass(frozen=True)
class Training:
    """One training of a recipe, written down before anything is built or read. It runs once: callbacks have a state.

    Attributes:
        name: of the training, its checkpoint and its file of final weights.
        build: makes the model, with its seed.
        loss: from the model and a batch to the loss, see `fit`.
        data: makes the training data; None: nothing is trained.
        fit: the other arguments of `fit`: optimizer, schedule, epochs, batch, last, callbacks, seed, hardware.
        facts: identity of data and settings: a checkpoint with other facts is not resumed.
        weights: the tensors of the model to save at the end.
        metadata: text to save with them.
        every: steps between two checkpoints.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[], Dataset] | None
    fit: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[nn.Module], Mapping[str, Tensor]] = trained_state
    metadata: Callable[[nn.Module], Mapping[str, str]] | None = None
    every: int = 200


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
    if out:
        folder, facts = Path(out) / "checkpoints", {**training.facts, "model": model}
        options["checkpoint"] = Checkpoint.of(folder, training.name, training.every, **facts)
    history = fit(model, training.loss, training.data(), **options)
    if out:
        metadata = training.metadata(model) if training.metadata else None
        save(Path(out) / "trained", training.name, training.weights(model), metadata)
    return model.eval(), history
