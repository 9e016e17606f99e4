"""Metrics of the benchmarks, by their own rules, one file per task. No module here depends on a model or a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadParameter

HIGHEST = 255  # grade that a table of confusions has a row for


def checked(
    name: str,
    values: Any,
    shape: Sequence[int] | None = None,
    *,
    axes: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> Tensor:
    """`values`, an array, tensor or list, as a tensor without its graph: integers of any width and booleans as int64,
    half precision as float32.

    Args:
        name: of the argument, for the error.
        shape: None: any.
        axes: their number, for values that must not be empty; None: any.
        whole: no fractions, as in labels.

    Raises `BadParameter` unless they are finite numbers of `shape` from `low` to `high`.
    """
    try:
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            values = values.copy()  # torch warns
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise BadParameter(name, type(values).__name__, "numbers: an array, a tensor or a list of them") from None
    if found.is_complex():
        raise BadParameter(name, str(found.dtype), "real numbers")
    if not found.is_floating_point():
        found = found.long()
    elif found.element_size() < 4:
        found = found.float()
    if shape is not None and found.shape != tuple(shape):
        raise BadParameter(name, f"shape {tuple(found.shape)}", f"{tuple(shape)}, one value for each that is scored")
    if axes is not None and (found.ndim != axes or not found.numel()):
        raise BadParameter(name, f"shape {tuple(found.shape)}", f"{axes} axes, and at least one value")
    if not found.numel():
        return found
    good = found.isfinite() & (found >= low) & (found <= high)
    if not good.all():
        place = tuple((~good).nonzero()[0].tolist())
        raise BadParameter(name, f"{found[place]:g} at {place}", f"finite numbers from {low:g} to {high:g}")
    if whole and found.is_floating_point():
        if not found.equal(found.floor()):
            raise BadParameter(name, "fractions", "whole numbers")
        found = found.long()
    return found


def accuracy(labels: Tensor, outputs: Tensor) -> float:
    """Top-1 accuracy in percent of outputs (n, classes) against labels (n,).

    Raises `BadParameter`: outputs that are not finite, labels that are no class, or not one for each output.
    """
    outputs = checked("outputs", outputs, axes=2)
    labels = checked("labels", labels, outputs.shape[:1], low=0, high=outputs.shape[1] - 1, whole=True)
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def quadratic_kappa(truth: Tensor, predicted: Tensor) -> float:
    """Quadratic weighted kappa of grades; predictions that are all the same give 0.

    Raises `BadParameter`: grades that are no whole numbers from 0 to `HIGHEST`, or not one for each slide.
    """
    from sklearn.metrics import cohen_kappa_score  # here: it takes a second to import

    truth = checked("truth", truth, axes=1, low=0, high=HIGHEST, whole=True)
    predicted = checked("predicted", predicted, truth.shape, low=0, high=HIGHEST, whole=True)
    labels = list(range(1 + int(max(truth.max(), predicted.max()))))
    value = cohen_kappa_score(truth.cpu().numpy(), predicted.cpu().numpy(), weights="quadratic", labels=labels)
    return 0.0 if math.isnan(value) else float(value)
