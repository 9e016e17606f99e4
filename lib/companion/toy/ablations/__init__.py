"""Ablation studies on the synthetic datasets, one module per paper; `toy.ablation` runs them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CompanionError

# one protocol for all studies: learning rates are selected on some seeds, and tested on others not used while data
# sets, methods and grids were designed
SELECTION_SEEDS = [100, 101, 102]
SEEDS = [200, 201, 202, 203, 204]

_SELECTING: ContextVar[bool] = ContextVar("selecting", default=False)


def study_root(root: str | Path, seed: int) -> Path:
    """The data root of a seed of a study: each seed has its own images, so the std includes their variation."""
    return Path(root) / f"seed{seed}"


def last_loss(history: Sequence[Mapping[str, float]], steps: int = 20) -> float:
    """The mean loss of a training's last steps, or of all if it has fewer."""
    return round(float(np.mean([row["loss"] for row in history[-steps:]])), 4)


@contextlib.contextmanager
def selecting() -> Iterator[None]:
    """Context manager for the selection of learning rates: no function made by `reader` returns the test split."""
    token = _SELECTING.set(True)
    try:
        yield
    finally:
        _SELECTING.reset(token)


class _Reader:
    """A function that reads a split, named by its argument `split`, but not the test split during selection."""

    def __init__(self, read: Callable, cached: int):
        functools.update_wrapper(self, read)
        self._cached = functools.lru_cache(cached)(read)
        self._place = list(inspect.signature(read).parameters).index("split")
        self.cache_clear = self._cached.cache_clear

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        split = str(named["split"] if "split" in named else arguments[self._place])
        if _SELECTING.get() and split.startswith("test"):
            name = getattr(self._cached, "__qualname__", "a reader")
            raise CompanionError(f"{name}: learning rates are selected without the test split")
        return self._cached(*arguments, **named)


def reader(cached: int = 0) -> Callable[[Callable], _Reader]:
    """A decorator for a function that reads a split, named by its argument `split`; it keeps `cached` results.

    The function raises `CompanionError` when the test split is read during the selection of learning rates.
    """
    return functools.partial(_Reader, cached=cached)
