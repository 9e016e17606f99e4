"""Scores of a land-cover map from one confusion matrix over a whole test set (MetaSegNet, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadParameter, check_range
from . import checked

MOST = 4096  # classes: their matrix has so many rows and columns


class Scores(NamedTuple):
    """In percent; a class that is neither present nor predicted is nan and left out of the means."""

    iou: Tensor  # (C,) intersection over union of each class
    f1: Tensor  # (C,)
    miou: float
    mf1: float
    oa: float  # share of correct pixels


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (C, C) of pixels, rows the truth, columns the prediction; truth outside 0 ... C - 1 is left out.

    The matrices of several images can be summed.

    Raises `BadParameter`: fewer than two classes, a truth with fractions, a prediction outside 0 ... C - 1, or of
    another shape than the truth.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # takes a second to import

    check_range("classes", classes, 2, MOST)
    truth = checked("truth", truth, whole=True)
    predicted = checked("predicted", predicted, truth.shape, low=0, high=classes - 1, whole=True)
    truth = truth.where((truth >= 0) & (truth < classes), -1)
    return multiclass_confusion_matrix(predicted, truth, classes, ignore_index=-1)


def scores(matrix: Tensor, left_out: Iterable[int] = (), *, undefined: bool = False) -> Scores:
    """IoU, F1, their means and the overall accuracy of a confusion matrix.

    Args:
        left_out: classes excluded from the means (Potsdam's clutter); their pixels remain in the matrix, as errors of
            other classes and in the overall accuracy.
        undefined: F1 from precision and recall, as in GeoSeg: nan, and not in the mean, for every class without a true
            positive, even if it is present or predicted. Otherwise it is 0 then.

    Raises `BadParameter`: what is no square matrix of counts, or every class left out.
    """
    matrix = checked("matrix", matrix, axes=2, low=0).double()
    if matrix.shape[0] != matrix.shape[1] or not matrix.any():
        raise BadParameter("matrix", f"shape {tuple(matrix.shape)}", "a row and a column for each class, and pixels")
    left_out = set(left_out)
    if not left_out < set(range(len(matrix))):
        raise BadParameter("left_out", left_out, f"some, not all, of the classes 0 to {len(matrix) - 1}")
    hit, wrong = matrix.diag(), matrix.sum(0) + matrix.sum(1) - 2 * matrix.diag()
    iou, f1 = 100 * hit / (hit + wrong), 200 * hit / (2 * hit + wrong)  # 0 / 0 is nan: an absent class
    if undefined:
        f1 = f1.where(hit > 0, torch.nan)
    kept: Sequence[int] = [c for c in range(len(matrix)) if c not in left_out]
    oa = 100 * hit.sum() / matrix.sum()
    miou, mf1 = (float(torch.nanmean(v[kept])) for v in (iou, f1))
    return Scores(iou, f1, miou, mf1, float(oa))
