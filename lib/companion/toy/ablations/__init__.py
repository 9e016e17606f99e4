"""Ablation studies on the synthetic datasets, one module a paper; `toy.ablation` runs them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from ...errors import CompanionError

# one protocol for all studies: learning rates are selected on some seeds, and tested on others not used while data
# sets, methods and grids were designed
SELECTION_SEEDS = [100, 101, 102]
SEEDS = [200, 201, 202, 203, 204]

Read = TypeVar("Read", bound=Callable)
_SELECTING: ContextVar[bool] = ContextVar("selecting", default=False)


def study_root(root: str | Path, seed: int) -> Path:
    """The data root of a seed of a study: each seed has images of its own, so that the std holds their variation."""
    return Path(root) / f"seed{seed}"


@contextlib.contextmanager
def selecting() -> Iterator[None]:
    """Inside the block learning rates are selected: no function made by `reader` returns the test split."""
    token = _SELECTING.set(True)
    try:
        yield
    finally:
        _SELECTING.reset(token)


def reader(cached: int = 0) -> Callable[[Read], Read]:
    """A decorator for a function that reads a split, named by its argument `split`; it keeps `cached` results.

    The function raises `CompanionError` when the test split is asked for while learning rates are selected.
    """

    def decorate(read: Callable) -> Callable:
        inner = functools.lru_cache(cached)(read) if cached else read
        place = list(inspect.signature(read).parameters).index("split")

        @functools.wraps(read)
        def guarded(*arguments: object, **named: object) -> object:
            split = str(named["split"] if "split" in named else arguments[place])
            if _SELECTING.get() and split.startswith("test"):
                raise CompanionError(
                    f"{read.__module__}.{read.__name__}: learning rates are selected without the test split"
                )
            return inner(*arguments, **named)

        if cached:
            guarded.cache_clear = inner.cache_clear  # type: ignore[attr-defined, union-attr]
        return guarded

    return decorate  # type: ignore[return-value]
