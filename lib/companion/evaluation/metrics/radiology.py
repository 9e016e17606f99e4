"""Metrics of ECAMP's downstream tasks, by scikit-learn and torchmetrics; its released protocols and plain ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import BadParameter, check_choice, check_range
from . import checked

IOUS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
PROTOCOLS = ("released", "plain")


def mean_auroc(labels: np.ndarray | Tensor, scores: np.ndarray | Tensor) -> float:
    """The plain mean of the classes' areas under the ROC curve, in percent; labels 0 or 1 and scores (n, classes).

    Raises `BadParameter`: a class with positives only, or none, whose area is not defined; other labels; scores of
    another shape, or that are not finite.
    """
    from sklearn.metrics import roc_auc_score  # imported here because it takes a second

    given = {"labels": checked("labels", labels, low=0, high=1, whole=True), "scores": checked("scores", scores)}
    given = {name: values[:, None] if values.ndim == 1 else values for name, values in given.items()}
    labels = checked("labels", given["labels"], axes=2).numpy(force=True)
    scores = checked("scores", given["scores"], labels.shape).numpy(force=True)
    alike = [c for c in range(labels.shape[1]) if len(set(labels[:, c].tolist())) < 2]
    if alike:
        raise BadParameter("labels", f"classes {alike} with one value only", "positives and negatives of each class")
    areas = [roc_auc_score(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
    return 100 * float(np.mean(areas))


def dice(probability: Tensor, truth: Tensor, protocol: str = "released") -> Tensor:
    """Dice of each image (n,) at a threshold of 0.5; probability and truth (n, ...).

    "released": an image without ground truth scores 1 when nothing was predicted and 0 otherwise, so the mean rewards
    empty predictions: with 78 % healthy images, predicting nothing scores 78. "plain" leaves those images out (nan).
    """
    check_choice("protocol", protocol, PROTOCOLS)
    truth = checked("truth", truth, low=0, high=1.001)  # the mean of a mask, up to rounding
    probability = checked("probability", probability, truth.shape, low=0, high=1)
    if truth.ndim < 2:
        raise BadParameter("truth", f"shape {tuple(truth.shape)}", "an axis of images, and of their pixels")
    p, t = ((x > 0.5).flatten(1).float() for x in (probability, truth))
    both, sums = (p * t).sum(1), p.sum(1) + t.sum(1)
    healthy = (p.sum(1) == 0).float() if protocol == "released" else torch.full_like(both, torch.nan)
    return torch.where(t.sum(1) == 0, healthy, 2 * both / sums.clamp_min(1))


def mean_precision(found: Sequence[Tensor], boxes: Tensor, size: int, protocol: str = "released") -> float:
    """mAP over IoUs of 0.40 to 0.75, in percent.

    Args:
        found: for each image (m, 7), the output of `models.ecamp.detection.suppress`.
        boxes: the truth (n, T, 5), class, centre and size as fractions; rows of zeros are padding.
        size: the image's side in pixels.
        protocol: "released" skips images without ground truth and images without detections, so that false positives on
            healthy images and complete misses have no effect; "plain" counts all.

    Returns:
        The mAP; -100, as in torchmetrics, when no ground-truth box is left.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    from torchmetrics.detection import MeanAveragePrecision  # takes a second to import; most users do not need it

    metric = MeanAveragePrecision(iou_thresholds=list(IOUS), backend="faster_coco_eval")
    check_range("size", size, 1)
    boxes = checked("boxes", boxes, low=0)
    boxes = checked("boxes", boxes, (len(found), *boxes.shape[1:2], 5))
    metric.warn_on_many_detections = False  # as released: the hundred best of an image are scored
    for kept, truth in zip(found, boxes, strict=True):
        kept = checked("found", kept).float()
        kept = checked("found", kept, (len(kept), 7))
        truth = truth[truth[:, 3] > 0]
        if protocol == "released" and not (len(kept) and len(truth)):
            continue
        half = truth[:, 3:] / 2
        corners = torch.cat([truth[:, 1:3] - half, truth[:, 1:3] + half], 1) * size
        metric.update(
            [{"boxes": kept[:, :4], "scores": kept[:, 4], "labels": kept[:, 6].long()}],
            [{"boxes": corners, "labels": truth[:, 0].long()}],
        )
    return 100 * float(metric.compute()["map"])
