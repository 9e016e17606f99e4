"""The loss of BAT and OSTrack (section 4): a focal loss of the score map, GIoU and L1 of the box at its peak.

Boxes (b, 4) are x, y, w, h as fractions of the search crop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from .ostrack import Prediction


def losses(prediction: Prediction, boxes: Tensor) -> dict[str, Tensor]:
    """The terms "focal", "giou" and "l1", and their sum "loss" = focal + 2 GIoU + 5 L1, for boxes (b, 4)."""
    predicted, target = corners(prediction.box, boxes)
    terms = {
        "focal": focal(prediction.score, centre_map(boxes, prediction.score.shape[-1])),
        # of all pairs: torchvision's loss of matched pairs takes masks as indices
        "giou": 1 - generalized_box_iou(predicted, target).diagonal().mean(),
        "l1": F.l1_loss(predicted, target),
    }
    return terms | {"loss": terms["focal"] + 2 * terms["giou"] + 5 * terms["l1"]}


def overlaps(prediction: Prediction, boxes: Tensor) -> Tensor:
    """The IoU (b,) of each predicted box with that of `boxes` (b, 4), without gradient."""
    return box_iou(*corners(prediction.box.detach(), boxes)).diagonal()


def corners(predicted: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners x1, y1, x2, y2 of predicted boxes cx, cy, w, h, and of true ones, which are clipped to the crop."""
    return box_convert(predicted, "cxcywh", "xyxy"), box_convert(boxes, "xywh", "xyxy").clamp(0, 1)


def centre_map(boxes: Tensor, f: int, overlap: float = 0.7) -> Tensor:
    """The target score map (b, 1, f, f): a Gaussian around the centre's cell, 1 at the centre.

    Its radius is CornerNet's, the largest shift of a box's corners that leaves the IoU above `overlap`, in the variant
    that divides by 2 throughout.
    """
    x, y, w, h = (boxes * f).unbind(1)  # (b,) each
    cx, cy = (x + w / 2).round(), (y + h / 2).round()

    def root(b: Tensor, c: Tensor, a: float) -> Tensor:
        return (b + (b**2 - 4 * a * c).sqrt()) / 2

    radius = torch.stack(
        [
            root(h + w, w * h * (1 - overlap) / (1 + overlap), 1),
            root(2 * (h + w), (1 - overlap) * w * h, 4),
            root(-2 * overlap * (h + w), (overlap - 1) * w * h, 4 * overlap),
        ]
    )
    r = radius.amin(0).clamp_min(0).floor()[:, None, None]  # (b, 1, 1)
    cells = torch.arange(f, device=boxes.device, dtype=boxes.dtype)
    dx, dy = cells - cx[:, None, None], cells[:, None] - cy[:, None, None]  # (b, 1, f), (b, f, 1)
    near = (dx.abs() <= r) & (dy.abs() <= r)  # (b, f, f)
    return (near * torch.exp(-(dx**2 + dy**2) / (2 * ((2 * r + 1) / 6) ** 2)))[:, None]


def focal(score: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss (alpha 2, beta 4) of a score map and `centre_map`, over the number of centres."""
    # no masks as indices, which would synchronise with a GPU
    p, centre = score.clamp_min(1e-12), target == 1
    positive = (p.log() * (1 - p) ** 2 * centre).sum()
    negative = ((1 - p).clamp_min(1e-12).log() * p**2 * (1 - target) ** 4).sum()
    return -(positive + negative) / centre.sum().clamp_min(1)
