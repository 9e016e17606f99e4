"""ECAMP's downstream tasks, an entry of `TASKS` each: data, model, loss and score, as the authors' code has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...data import xrays
from ...data.xrays import CLASSES, ONE_OF
from ...evaluation.metrics import accuracy, radiology
from ...training.schedules import MakeOptimizer, adamw, sgd
from . import detection, heads, transforms

SIDE = 224  # of an image
FIRST = {"1": 60, "10": 100, "100": 50}  # step after which detection is validated, by percent of the labels
EXPANSION = {"1": 8, "10": 8, "100": 4}  # of the detector's bottlenecks
BOX = [0, 0.4, 0.5, 0.3, 0.3]  # of a generated image, see `xrays.box_labels`
MOMENTUM, DECAY = 0.9, 0.05  # SGD's; AdamW's weight decay

Scored = Iterable[tuple[Any, Tensor]]
"""Outputs and truth, batch by batch."""


def labels_score(batches: Scored, _: str) -> float:
    """Accuracy for class indices (n,), the mean AUROC of the classes for labels (n, classes), in percent."""
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return accuracy(labels, logits) if labels.ndim == 1 else radiology.mean_auroc(labels, logits)


def masks_score(batches: Scored, protocol: str) -> float:
    """Dice in percent, averaged over images, then over the structures to segment."""
    dice = [  # (images, structures) of each batch
        radiology.dice(logits.sigmoid().flatten(0, 1), masks.flatten(0, 1), protocol).view(masks.shape[:2])
        for logits, masks in batches
    ]
    return 100 * float(torch.cat(dice).nanmean(0).mean())


def boxes_score(batches: Scored, protocol: str) -> float:
    """mAP in percent on images of side `SIDE`; nan if the protocol excludes all images.

    As released, images where nothing is found are left out.
    """
    kept, boxes = [], []
    for levels, truth in batches:
        kept += detection.decode(levels, SIDE)
        boxes += truth
    scored = (truth.any() and (protocol == "plain" or len(k)) for k, truth in zip(kept, boxes, strict=True))
    return radiology.mean_precision(kept, torch.stack(boxes), SIDE, protocol) if any(scored) else math.nan


def generated_labels(count: int, dataset: str, _: torch.Generator) -> Tensor:
    """Positive and negative labels of each class, as an area under the curve needs."""
    numbers, classes = torch.arange(count), len(CLASSES[dataset])
    return numbers % classes if dataset in ONE_OF else ((numbers[:, None] + torch.arange(classes)) % 2).float()


@dataclass(frozen=True)
class Task:
    """What a downstream task has of its own.

    Attributes:
        lists: the kind of the data set's lists, see `xrays.load`.
        dry_set: the set whose images a dry run without data generates.
        numbers: the table of learning rates, steps and batches.
        metric: the name of the score; {} is the protocol.
        score: in percent, of outputs and truth, and the protocol.
        transform: of the images of a set (its name), in training or not.
        truth: of so many generated images of a set (its name), by a random generator.
        model: on an encoder, with a number of classes, for the parameters of a run.
        loss: of outputs and truth (labels, masks or boxes), for images of side `SIDE`.
        optimizer: of a learning rate.
        patience: epochs without a new best after which a training ends.
        released_test: the list that the authors' code tests on.
        first: step after which the model is validated, by percent of the labels; without an entry the first one.
    """

    lists: str
    dry_set: str
    numbers: str
    metric: str
    score: Callable[[Scored, str], float]
    transform: Callable[[str, bool], Callable]
    truth: Callable[..., Tensor]
    model: Callable[..., nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    optimizer: Callable[[float], MakeOptimizer]
    patience: int = 20
    released_test: str = "test"
    first: Mapping[str, int] = field(default_factory=dict)


decayed = partial(adamw, weight_decay=DECAY, decay="all")
fine_tune = Task(
    lists="classification",
    dry_set="xrays/chestx-ray14",
    numbers="recipe-finetune",
    metric="AUROC",
    score=labels_score,
    transform=lambda dataset, train: transforms.train_transform() if train else transforms.test_transform(),
    truth=generated_labels,
    model=lambda vit, classes, p: heads.classifier(vit, classes),
    loss=heads.classification_loss,
    optimizer=partial(sgd, momentum=MOMENTUM, decay="all"),
)
TASKS = {
    "fine-tune": fine_tune,
    "linear probe": replace(
        fine_tune,
        dry_set="xrays/covidx",
        numbers="recipe-linear",
        model=lambda vit, classes, p: heads.classifier(vit, classes, probe=True),
    ),
    "segment": Task(
        lists="segmentation",
        dry_set="xrays/siim",
        numbers="recipe-segmentation",
        metric="Dice ({})",
        score=masks_score,
        transform=transforms.MaskTransform,
        truth=lambda count, dataset, generator: (
            torch.rand(count, len(CLASSES[dataset]), SIDE, SIDE, generator=generator) > 0.7
        ).float(),
        # the authors freeze the encoder; on RIGA, which they also run from random weights, not a random one
        model=lambda vit, classes, p: heads.Segmenter(
            vit, classes, frozen=(p.dataset, p.encoder) != ("fundus/riga", "random")
        ),
        loss=lambda logits, masks: heads.segmentation_loss(logits.float(), masks),
        optimizer=decayed,
        patience=40,
    ),
    "detect": Task(
        lists="detection",
        dry_set="xrays/rsna",
        numbers="recipe-detection",
        metric="mAP ({})",
        score=boxes_score,
        transform=lambda dataset, train: transforms.squeeze_transform(),
        truth=lambda count, *_: torch.tensor([BOX] + [[0] * 5] * (xrays.BOXES - 1)).repeat(count, 1, 1),
        model=lambda vit, classes, p: detection.Detector(vit, expansion=EXPANSION[p.labels]),
        loss=lambda levels, boxes: detection.detection_loss([level.float() for level in levels], boxes, SIDE),
        optimizer=decayed,
        released_test="val",
        first=FIRST,
    ),
}
