"""Scores of a land-cover map from one confusion matrix over a whole test set (MetaSegNet, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadParameter


class Scores(NamedTuple):
    """All in percent; a class that is neither there nor predicted has nan, and no part in a mean."""

    iou: Tensor  # (C,) intersection over union of each class
    f1: Tensor  # (C,)
    miou: float
    mf1: float
    oa: float  # share of pixels that are right


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (C, C) of pixels, rows the truth, columns the prediction; truth outside 0 ... C - 1 is left out.

    Matrices of several images add up."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # a second to import

    truth = truth.long().where((truth >= 0) & (truth < classes), -1)
    return multiclass_confusion_matrix(predicted.long(), truth, classes, ignore_index=-1)


def scores(matrix: Tensor, left_out: Iterable[int] = (), *, undefined: bool = False) -> Scores:
    """IoU, F1, their means and the overall accuracy of a confusion matrix.

    Args:
        left_out: classes that the means leave out (Potsdam's clutter); their pixels stay in the matrix, as errors of
            other classes and in the overall accuracy.
        undefined: F1 from precision and recall, as in GeoSeg: nan, and not in the mean, for every class without a
            right pixel, also for one that is there and missed, or predicted and not there. Otherwise it is 0 then.
    """
    left_out = set(left_out)
    if not left_out < set(range(len(matrix))):
        raise BadParameter("left_out", left_out, f"some, not all, of the classes 0 to {len(matrix) - 1}")
    matrix = matrix.double()
    hit, wrong = matrix.diag(), matrix.sum(0) + matrix.sum(1) - 2 * matrix.diag()
    iou, f1 = 100 * hit / (hit + wrong), 200 * hit / (2 * hit + wrong)  # 0 / 0 is nan: a class that is nowhere
    if undefined:
        f1 = f1.where(hit > 0, torch.nan)
    kept: Sequence[int] = [c for c in range(len(matrix)) if c not in left_out]
    oa = 100 * hit.sum() / matrix.sum()
    miou, mf1 = (float(torch.nanmean(v[kept])) for v in (iou, f1))
    return Scores(iou, f1, miou, mf1, float(oa))
