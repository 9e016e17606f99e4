"""NAME's figures."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from .model import NAME


def shown(models: Mapping[str, NAME], images: Tensor) -> Figure:
    """TODO what the method looks at, for models by name."""
    raise NotImplementedError("TODO: models/SLUG/figures.py")
