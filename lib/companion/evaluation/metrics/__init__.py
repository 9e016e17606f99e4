"""Metrics of the benchmarks, by their own rules, one file per task. No module here depends on a model or a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BadParameter


def check_values(
    name: str,
    values: Any,
    shape: Sequence[int] | None = None,
    *,
    axes: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise `BadParameter` unless `values`, an array or tensor, are finite numbers of `shape` from `low` to `high`.

    Args:
        shape: None: any.
        axes: their number, for values that must not be empty; None: any.
        whole: no fractions, as in labels.
    """
    found = torch.as_tensor(values)
    if shape is not None and found.shape != tuple(shape):
        raise BadParameter(name, f"shape {tuple(found.shape)}", f"{tuple(shape)}, one value for each that is scored")
    if axes is not None and (found.ndim != axes or not found.numel()):
        raise BadParameter(name, f"shape {tuple(found.shape)}", f"{axes} axes, and at least one value")
    if not found.numel():
        return
    ends = float(found.min()), float(found.max())
    if not (all(map(math.isfinite, ends)) and low <= ends[0] and ends[1] <= high):
        raise BadParameter(name, f"{ends[0]:g} to {ends[1]:g}", f"finite numbers from {low:g} to {high:g}")
    if whole and found.is_floating_point() and not found.equal(found.floor()):
        raise BadParameter(name, "fractions", "whole numbers")


def accuracy(labels: Tensor, outputs: Tensor) -> float:
    """Top-1 accuracy in percent of outputs (n, classes) against labels (n,).

    Raises `BadParameter`: outputs that are not finite, labels that are no class, or not one for each output.
    """
    check_values("outputs", outputs, axes=2)
    check_values("labels", labels, outputs.shape[:1], low=0, high=outputs.shape[1] - 1, whole=True)
    return 100 * float((outputs.argmax(1) == labels).double().mean())
