"""The open-vocabulary detector of SIC-CADS' toy study. About 2 minutes on one core.

It learns from boxes of base classes alone, on images without novel objects (zero-shot splits remove those images).
"""

from __future__ import annotations

import torch
from torchvision.ops import box_iou

from companion.toy.encoders.detector import DETECTOR, Detector, clip, texts
from companion.toy.sic_cads import boxes_of, own_seed, scenes, stack, train_detector

from . import ship


@torch.inference_mode()
def measure(model: Detector) -> dict[str, float]:
    """The share of base objects, in percent, whose best box has an IoU of 0.5 and the right class, on test images."""
    drawn = scenes(400, "test", own_seed(1), novel=False)
    text, right = texts(clip()), []
    for true, labels, shown in zip(*boxes_of(drawn), drawn, strict=True):
        boxes, scores = model(stack([shown]), text)
        overlap, best = box_iou(true[labels >= 0], boxes[0]).max(1)
        right.append((overlap >= 0.5) & (scores[0, best].argmax(1) == labels[labels >= 0]))
    return {"base objects detected": 100 * float(torch.cat(right).float().mean())}


if __name__ == "__main__":
    recipe = {"pictures": 2000, "steps": 600, "batch": 16, "learning_rate": 2e-3, "seed": 0}
    ship(DETECTOR, train_detector, measure, recipe)
