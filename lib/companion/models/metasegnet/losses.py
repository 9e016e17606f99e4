"""The losses of the author's image-only networks; MetaSegNet's own are not known."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, labels: Tensor, ignore: int, smoothing: float = 0.05) -> Tensor:
    """Cross-entropy with label smoothing; ignored pixels count 0, and the mean is over ALL pixels, ignored ones too.

    logits (B, C, H, W), labels (B, H, W) int64."""
    return F.cross_entropy(logits, labels, ignore_index=ignore, label_smoothing=smoothing, reduction="none").mean()


def dice_loss(logits: Tensor, labels: Tensor, ignore: int, smooth: float = 0.05) -> Tensor:
    """1 - Dice of the softmax, of each class over the whole batch, averaged over all classes.

    A class without a true pixel counts 0 in this mean."""
    classes, valid = logits.shape[1], (labels != ignore)[:, None]
    p = logits.softmax(1) * valid  # (B, C, H, W)
    truth = F.one_hot(labels.where(valid[:, 0], 0), classes).movedim(-1, 1) * valid  # (B, C, H, W)
    over = (0, 2, 3)
    score = (2 * (p * truth).sum(over) + smooth) / ((p + truth).sum(over) + smooth).clamp_min(1e-7)  # (C,)
    return ((1 - score) * (truth.sum(over) > 0)).mean()


def joint_loss(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Soft cross-entropy + Dice (section 4)."""
    return soft_cross_entropy(logits, labels, ignore) + dice_loss(logits, labels, ignore)
