"""NAME, on the images of LIKE."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from companion.models.SLUG import NAME
from tests.papers.common import Training, vit
from tests.papers.LIKE import EXAMPLE, FAULTS, RUNS, small, train, write

__all__ = ["EXAMPLE", "FAULTS", "RUNS", "small", "write"]

TRAININGS = {"": Training(train, {}, batch=64, runs="vtab")}
MODELS: dict[str, Callable[[], nn.Module]] = {"NAME": lambda: NAME(vit(), 3)}
