"""Checkpoints and final weights of trainings: a key from named facts, atomic saving, resuming."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BadParameter, CorruptFile, Count, typed
from ..io.files import atomic, full_disk_is_said

LONGEST = 480  # seconds of a training that a kill costs, and up to 20 steps more on several devices
PAUSE = 20  # between two checkpoints, times the whole seconds that the first took to write


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors changed by training, by name, on the CPU: parameters that require a gradient, and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if name not in frozen}


def plain(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The history with losses as numbers, in place; those on a GPU are copied in one transfer."""
    cells = [(row, name) for row in history for name, value in row.items() if isinstance(value, Tensor)]
    values = torch.stack([row[name] for row, name in cells]).tolist() if cells else []
    for (row, name), value in zip(cells, values, strict=True):
        row[name] = value
    return history


def checkpoint_key(**facts: Any) -> str:
    """A short hash of named facts: two trainings whose facts differ never share a checkpoint.

    A model is hashed by its tensors (its weights before training), a path by its resolved location, everything else by
    its value; the order of the names does not matter.
    """
    return hashlib.sha256(json.dumps(as_json(facts), sort_keys=True).encode()).hexdigest()[:16]


def as_json(fact: object) -> object:
    """A fact as JSON: tensors and arrays as hashes, NumPy's numbers as Python's, tuples as lists."""
    if isinstance(fact, nn.Module):
        return as_json(fact.state_dict())
    if isinstance(fact, Tensor):
        data = fact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [str(fact.dtype), list(fact.shape), hashlib.sha256(data.tobytes()).hexdigest()]
    if isinstance(fact, np.ndarray):
        return as_json(torch.from_numpy(fact))
    if isinstance(fact, Path):
        return str(fact.resolve())
    if isinstance(fact, np.generic):
        return fact.item()
    if isinstance(fact, Mapping):
        return {str(name): as_json(value) for name, value in fact.items()}
    if isinstance(fact, (list, tuple)):
        return [as_json(value) for value in fact]
    if fact is None or isinstance(fact, (bool, int, float, str)):
        return fact
    raise BadParameter("facts", type(fact).__name__, "numbers, text, tensors, models, paths, lists and dicts of them")


def file(folder: str | Path, name: str, suffix: str) -> Path:
    """`folder`/`name``suffix`; slashes in names of datasets and models are replaced."""
    return Path(folder) / f"{name.replace('/', '-')}{suffix}"


@typed
def save(folder: str | Path, name: str, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write trained weights as `folder`/`name`.safetensors, under a temporary name first; return the path."""
    path = file(folder, name, ".safetensors")
    with atomic(path) as temporary:
        # copies: safetensors refuses tensors that share memory
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
        save_file(copies, temporary, None if metadata is None else dict(metadata))
    return path


class Checkpoint:
    """The file of a training in progress. `<file>.csv` next to it holds the history, one line per step, appended.

    It is written every so many steps, after eight minutes at the latest, and at the end of the training. Writing takes
    at most a twentieth of the time: after one that took a second or more, steps alone are no reason for twenty times
    that.

    Args:
        path: of the file.
        every: interval in steps.
    """

    @typed
    def __init__(self, path: str | Path, every: Count = 200):
        self.path, self.every = Path(path), every
        if self.path.is_dir():
            raise BadParameter("path", str(path), "a file, not a folder")
        self._begin()

    def _begin(self) -> None:
        """Forget the training before: an object may serve several."""
        self._written = 0  # rows of the history already in the file
        self._since, self._pause = time.monotonic(), 0.0  # the last writing, and seconds until steps are a reason again

    @classmethod
    def of(cls, folder: str | Path, name: str, every: Count = 200, **facts: Any) -> Checkpoint:
        """The checkpoint of a training identified by `facts`, see `checkpoint_key`."""
        return cls(file(folder, f"{name}, {checkpoint_key(**facts)}", ".pt"), every)

    @property
    def history(self) -> Path:
        """The file of the history."""
        return self.path.with_name(f"{self.path.name}.csv")

    def read(self, model: nn.Module, settings: Mapping[str, object]) -> dict[str, Any] | None:
        """The saved state with its history; None if there is no file.

        Raises:
            BadParameter: it was saved under other settings, or of another model.
            CorruptFile: it cannot be read, or its history is shorter than the training.
        """
        self._begin()
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            written, step = saved["settings"], saved["step"]
        except Exception as error:
            reason = f"not a checkpoint of this version's fit ({type(error).__name__}); delete it to train from scratch"
            raise CorruptFile(self.path, reason) from error
        for key in {**settings, **written}:
            if written.get(key) != settings.get(key):
                accepted = f"{written.get(key)!r}, as in the checkpoint to resume ({self.path})"
                raise BadParameter(key, settings.get(key), accepted)
        if saved["model"].keys() != trained_state(model).keys():
            raise BadParameter("model", type(model).__name__, f"the model of the checkpoint to resume ({self.path})")
        saved["history"] = self._read_history(step)
        self._written = step
        return saved

    def due(self, step: int) -> bool:
        """Whether to write the state after that step, by the host's clock: no GPU is waited for."""
        passed = time.monotonic() - self._since
        return passed >= LONGEST or (step % self.every == 0 and passed >= self._pause)

    def append(self, history: list[dict[str, Any]]) -> None:
        """Append the new rows of the history to its file; their losses become numbers, in place.

        Raises `BadParameter`: a step has other scalars than the first; they are the columns of the file.
        """
        new, names = plain(history[self._written :]), list(history[0])
        if other := next((list(row) for row in new if row.keys() != history[0].keys()), None):
            raise BadParameter("scalars of the loss", other, f"{names}, those of the first step, with a checkpoint")
        if self._written == 0:
            with atomic(self.history) as temporary:
                temporary.write_text(",".join(names) + "\n", encoding="utf-8")
        with full_disk_is_said(self.history), self.history.open("a", encoding="utf-8") as lines:
            lines.writelines(",".join(repr(row[name]) for name in names) + "\n" for row in new)
            lines.flush()
            os.fsync(lines.fileno())
        self._written = len(history)

    def write(self, state: Mapping[str, Any]) -> None:
        """Save the state, whose history is appended, under a temporary name first."""
        begun = time.monotonic()
        with atomic(self.path) as temporary:
            torch.save(state, temporary)
        self._since = time.monotonic()
        self._pause = PAUSE * math.floor(self._since - begun)

    def _read_history(self, step: int) -> list[dict[str, float]]:
        """The first `step` rows; rows that a killed run wrote after its last checkpoint are removed."""
        try:
            lines = self.history.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [
                {name: int(value) if name == "step" else float(value) for name, value in row.items()}
                for row in csv.DictReader(lines[: step + 1])
            ]
        except (OSError, ValueError, TypeError) as error:
            raise CorruptFile(self.history, f"not the history of {self.path.name} ({error})") from error
        if len(rows) != step:
            raise CorruptFile(self.history, f"{len(rows)} rows, and {self.path.name} is at step {step}")
        if len(lines) > step + 1:
            with atomic(self.history) as temporary:
                temporary.write_text("".join(lines[: step + 1]), encoding="utf-8")
        return rows
