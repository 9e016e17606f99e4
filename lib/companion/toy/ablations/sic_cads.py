"""SIC-CADS on the synthetic scenes: the image-level branches, their effect on a frozen detector, and the controls.

Detector and CLIP are trained once. Each seed has its own images and its own recogniser (MLR), trained on the labels of
base classes; the task "detector from scratch" trains detector and CLIP for each seed too, so that its spread includes
all three. Only the recogniser's learning rate is chosen, by the metric on validation images, novel classes among them,
for every method alike. Gamma and both lambdas are the released values of OV-COCO, gamma 0.5 that of OV-LVIS; the sweeps
over them are measured on test images, and nothing is chosen by them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.ops import box_iou

from ...backbones import Input
from ...data import detection as data
from ...evaluation.metrics.detection import evaluate
from ...models.sic_cads import model as sic_cads
from ...models.sic_cads.detectors import rows as coco_rows
from ...models.sic_cads.predictions import BRANCHES, recognition
from ...training.fit import CPU, History, fit
from ...training.schedules import adamw
from ..datasets import detection as pocket
from ..encoders import detector as made
from . import last_loss, reader, study_root

# not larger: at 0.1 and 0.3 training fails (its loss ends half as high again, and twice as high), and yet the metric
# rises: an untrained recogniser leaves the fused scores to CLIP's own, which are best for novel classes
LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
METRIC = "AP50 novel"
EPOCHS, BATCH, WEIGHT_DECAY = 12, 48, 1e-4
BUDGET = f"{EPOCHS} epochs, batch {BATCH}"
# lambdas and gamma as released for OV-COCO and OV-LVIS; tau as for OV-COCO. The released weight of the distillation,
# 0.01, belongs to 180,000 steps and 512 dimensions: here there are 216 and 64
LAMBDA_BASE, LAMBDA_NOVEL, GAMMA, TAU, DISTILL, WIDTH = 0.8, 0.5, 0.5, 20.0, 0.2, 32
INPUT = Input(pocket.SIDE, (0.5,) * 3, (0.5,) * 3)
THRESHOLD, NMS, TOP = 0.01, 0.5, 50
FINISHED = 0.05  # the usual threshold of a detector's own results (detectron2)

# the image-level scores: the branches, and what a method changes
METHODS: dict[str, dict] = {
    "no refinement": {"gamma": 0.0},
    "text": {"branch": "text"},
    "visual": {"branch": "visual"},
    "visual+": {"branch": "visual+"},
    "fused": {"branch": "fused"},
    "SIC-CADS": {},
    "SIC-CADS, gamma 0.7": {"gamma": 0.7},
    "SIC-CADS, lambdas of LVIS": {"lambda_novel": 0.8},
    "SIC-CADS, one level": {"levels": 1},
    "SIC-CADS, no z-score": {"z_score": False},
    "SIC-CADS, on finished results": {"where": "finished"},
    "SIC-CADS, one class a box": {"where": "one class"},
    "another image's scores": {"control": "other"},
    "average scores": {"control": "average"},
}
UNTRAINED = ("no refinement", "visual+")
TASKS = {
    "shipped detector": list(METHODS),
    "detector from scratch": ["no refinement", *BRANCHES, "another image's scores"],
}
GAMMAS = tuple(round(0.1 * i, 1) for i in range(11))
LAMBDAS = tuple(round(0.2 * i, 1) for i in range(6))


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    pocket.write(study_root(root, seed), seed)


@reader(8)
def images_of(root: str, seed: int, split: str) -> tuple[data.Boxes, Tensor]:
    """A split as the reader returns it, and all its images (n, 3, 64, 64), uint8."""
    found = data.load("pocket/detection", study_root(root, seed), split)
    return found, torch.stack([image for image, _ in found])


@functools.lru_cache(maxsize=2)
def foundation(task: str, seed: int) -> tuple[made.SceneCLIP, made.Detector]:
    """The frozen CLIP and detector of a task: the shipped ones, or two that are trained for this seed."""
    if task == "shipped detector":
        return made.clip(), made.detector()
    teacher = made.train_clip(seed=1 + seed)
    return teacher, made.train_detector(seed=1 + seed, teacher=teacher)


@dataclass(frozen=True)
class Detected:
    """The detector's outputs for n images, before threshold, suppression and top-k.

    Attributes:
        boxes: (n, R, 4) xyxy, pixels.
        probabilities: (n, R, C).
    """

    boxes: Tensor
    probabilities: Tensor


@functools.lru_cache(maxsize=4)
def detected(task: str, root: str, seed: int, split: str) -> Detected:
    """The detector's boxes on a split."""
    clip, detector = foundation(task, seed)
    _, images = images_of(root, seed, split)
    text = made.texts(clip)
    parts = [detector(pixels(part), text) for part in images.split(100)]
    return Detected(*(torch.cat(column) for column in zip(*parts, strict=True)))


def pixels(images: Tensor) -> Tensor:
    """The input of the toy detector and CLIP, in [-1, 1], of uint8 images."""
    return images.float() / 127.5 - 1


# --- the recogniser ---------------------------------------------------------------------------------------------------


class MLR(sic_cads.MLR):
    """The recogniser without P6 and P7; its rank loss is that of the committed study, bit by bit."""

    top = None

    @functools.cached_property
    def base(self) -> Tensor:
        """The indices of the base classes."""
        return (~self.novel).nonzero().flatten()

    def ranked(self, scores: Tensor, positives: Tensor, boxes: Tensor | bool) -> Tensor:
        """The rank loss of boxes, summed over the positives alone."""
        scores, positives = scores[:, self.base], positives[:, self.base]
        image, label = positives.nonzero(as_tuple=True)
        each = (1 + scores[image] - scores[image, label, None]).clamp_min(0).mean(1)
        return (each / positives.sum(1).clamp_min(1)[image]).sum() / len(scores)


SETTINGS = sic_cads.Settings(
    indices=(1, 2, 3),
    width=WIDTH,
    lambda_base=LAMBDA_BASE,
    lambda_novel=LAMBDA_NOVEL,
    tau=TAU,
    distill=DISTILL,
    image_input=INPUT,
    teacher_input=INPUT,
    freeze_norms=False,
)


def build(task: str, seed: int, levels: int = 2) -> MLR:
    """The recogniser of a task on a small body, its initial weights drawn from `seed`."""
    clip, _ = foundation(task, seed)
    novel = torch.tensor([index in pocket.NOVEL for index in range(len(pocket.CLASSES))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = replace(SETTINGS, levels=levels)
        return MLR(made.Stages(), made.texts(clip), novel, settings, teacher=clip.visual)


def training_data(model: MLR, found: data.Boxes, images: Tensor) -> TensorDataset:
    """Images, the base classes that they show, and the teacher's embeddings of their crops."""
    return TensorDataset(images, found.positives, teacher_embeddings(model, images))


def teacher_embeddings(model: MLR, images: Tensor) -> Tensor:
    """CLIP's embeddings (n, P, D) of the crops of all images."""
    return torch.cat([model.teacher_embeddings(part) for part in images.split(100)])


def train_model(model: MLR, dataset: TensorDataset, learning_rate: float, seed: int, **changes: Any) -> History:
    """Train the recogniser in place; return its history. `changes`: arguments of `fit` that differ."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, positives, teacher = batch
        return sum(model.loss(images, positives, teacher=teacher))

    optimizer = adamw(learning_rate, WEIGHT_DECAY, decay="all")
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch": BATCH, "optimizer": optimizer} | changes
    return fit(model, loss, dataset, seed=seed, hardware=CPU, name="MLR", **settings)


@dataclass(frozen=True)
class Embedded:
    """The recogniser's embeddings of n images.

    Attributes:
        text, visual, teacher: (n, P, D), the learned embeddings of both branches, and CLIP's own of the crops.
        table: (C, D), the embedded class names.
        novel: (C,) bool.
        levels: of patches.
    """

    text: Tensor
    visual: Tensor
    teacher: Tensor
    table: Tensor
    novel: Tensor
    levels: int


@torch.no_grad()
def embed(model: MLR, images: Tensor) -> Embedded:
    """The embeddings of images (n, 3, 64, 64), uint8."""
    model.eval()
    learned = [model(model.prepared(part)) for part in images.split(100)]
    text, visual = (torch.cat(column) for column in zip(*learned, strict=True))
    teacher = teacher_embeddings(model, images)
    return Embedded(text, visual, teacher, model.text.detach(), model.novel, model.settings.levels)


@functools.lru_cache(maxsize=4)
def trained(
    task: str, learning_rate: float, levels: int, root: str, seed: int, split: str
) -> tuple[Embedded, float, int]:
    """A trained recogniser's embeddings of a split, its last loss and its number of trainable parameters.

    With learning rate 0 it is not trained, and the last two are 0.
    """
    model, last, count = build(task, seed, levels), 0.0, 0
    if learning_rate:
        dataset = training_data(model, *images_of(root, seed, "train"))
        history = train_model(model, dataset, learning_rate, seed)
        last = last_loss(history)
        count = sum(p.numel() for p in model.trained().values())
    return embed(model, images_of(root, seed, split)[1]), last, count


def scores(
    given: Embedded,
    branch: str = "SIC-CADS",
    lambda_base: float = LAMBDA_BASE,
    lambda_novel: float = LAMBDA_NOVEL,
    z_score: bool = True,
    control: str = "",
) -> Tensor:
    """The image-level probabilities (n, C).

    Args:
        branch: "text", "visual" (the student), "visual+" (CLIP's own crops), "fused" (text and student) or "SIC-CADS"
            (text and CLIP's own).
        lambda_base, lambda_novel: see `models.sic_cads`.
        z_score: False: sigmoid(tau s) in place of the normalised scores.
        control: "other", those of the next image; "average", the mean over all images; "" for none.
    """

    def p(embedding: Tensor) -> Tensor:
        pooled = sic_cads.pool(embedding @ given.table.mT, given.levels)
        return sic_cads.normalise(pooled) if z_score else (TAU * pooled).sigmoid()

    if branch in ("text", "visual", "visual+"):
        found = p({"text": given.text, "visual": given.visual, "visual+": given.teacher}[branch])
    else:
        share = sic_cads.text_share(given.novel, lambda_base, lambda_novel)
        found = sic_cads.fuse(p(given.text), p(given.visual if branch == "fused" else given.teacher), share)
    if control == "average":
        return found.mean(0, keepdim=True).expand_as(found)
    return found.roll(1, 0) if control else found


# --- refinement -------------------------------------------------------------------------------------------------------


def refined(given: Detected, p: Tensor, gamma: float) -> Tensor:
    """Refined probabilities (n, R, C) of all boxes and classes: Eq. 7 on the full matrix of each image."""
    return torch.stack([sic_cads.refine(one, row, gamma) for one, row in zip(given.probabilities, p, strict=True)])


def results(
    boxes: Tensor,
    probabilities: Tensor,
    ids: tuple,
    threshold: float = THRESHOLD,
    p: Tensor | None = None,
    gamma: float = 0.0,
) -> list[dict]:
    """Rows in COCO's format for n images: threshold, suppression within each class, the best `TOP`.

    `p` and `gamma` rescale the scores of these rows: the refinement of finished results.
    """
    rows = []
    for number, image_id in enumerate(ids):
        found = sic_cads.detect(boxes[number], probabilities[number], threshold, NMS, TOP)
        if p is not None:
            found = found._replace(scores=p[number, found.classes] ** gamma * found.scores ** (1 - gamma))
        rows += coco_rows(found, image_id, range(1, 1 + len(pocket.CLASSES)))
    return rows


def rows_of(method: str, given: Detected, p: Tensor, ids: tuple) -> list[dict]:
    """The finished detections of a method, in COCO's format."""
    options = METHODS[method]
    gamma, where = options.get("gamma", GAMMA), options.get("where", "matrix")
    if where == "finished":
        return results(given.boxes, given.probabilities, ids, FINISHED, p, gamma)
    if where == "one class":
        best = given.probabilities == given.probabilities.amax(-1, keepdim=True)
        return results(given.boxes, given.probabilities * best, ids, THRESHOLD, p, gamma)
    return results(given.boxes, refined(given, p, gamma), ids)


def ap50(found: data.Boxes, rows: list[dict]) -> dict[str, float]:
    """AP50 of base and novel classes and of all, in percent."""
    scored = evaluate(found.truth, rows, groups={"base": found.base, "novel": found.novel}, top=TOP)
    return {"base": scored.mean(found.base), "novel": scored.mean(found.novel), "all": scored.totals["AP50"]}


def named_right(given: Detected, probabilities: Tensor, found: data.Boxes) -> dict[str, float]:
    """The share of objects whose best overlapping box has its largest probability for their class, in percent.

    By group and look: "base plain", "novel hidden", ... An object without a box of IoU 0.5 counts as wrong.
    """
    looks = iter(annotation["look"] for annotation in found.truth["annotations"])
    hits: dict[str, list[bool]] = {}
    for number in range(len(found)):
        target = found.target(number)
        overlap, best = box_iou(target.boxes, given.boxes[number]).max(1)
        correct = (probabilities[number, best].argmax(-1) == target.labels) & (overlap >= 0.5)
        for hit, label in zip(correct.tolist(), target.labels.tolist(), strict=True):
            group = "novel" if label in pocket.NOVEL else "base"
            hits.setdefault(f"{group} {next(looks)}", []).append(hit)
    return {key: 100 * float(np.mean(values)) for key, values in sorted(hits.items())}


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Train the recogniser of a method, where it has one, and test the detector that it refines.

    `split` "select": tested on 200 validation images; "test": on 300 others, with curves over gamma and the lambdas.

    Returns:
        A row, in percent: AP50 of novel and base classes and all; the gain over the same detector without refinement;
        the image-level scores' own mAP; the share of objects named right, by look; the last loss; the number of
        trainable parameters.
    """
    part, options = "val" if split == "select" else "test", METHODS[method]
    found, _ = images_of(str(root), seed, part)
    given = detected(task, str(root), seed, part)
    embedded, last, count = trained(task, learning_rate, options.get("levels", 2), str(root), seed, part)
    p = scores(embedded, **_choice(options))
    own = ap50(found, rows_of(method, given, p, found.image_ids))
    plain = ap50(found, results(given.boxes, given.probabilities, found.image_ids))
    row = {f"AP50 {group}": own[group] for group in ("novel", "base", "all")}
    row |= {f"{group} gain": own[group] - plain[group] for group in ("novel", "base")}
    row["novel gain beyond base gain"] = row["novel gain"] - row["base gain"]
    if options.get("gamma", GAMMA):
        row |= {f"mAP {group}": value for group, value in recognition(found, p).items()}
    if split != "select":
        matrix = refined(given, p, options.get("gamma", GAMMA))
        row |= {f"right {what}": value for what, value in named_right(given, matrix, found).items()}
        row |= curves(method, given, embedded, found)
    return {name: round(value, 2) for name, value in row.items()} | {"loss": last, "trained": count}


def _choice(options: Mapping) -> dict:
    """The part of a method's options that `scores` takes."""
    return {k: v for k, v in options.items() if k in ("branch", "lambda_base", "lambda_novel", "z_score", "control")}


def curves(method: str, given: Detected, embedded: Embedded, found: data.Boxes) -> dict[str, float]:
    """AP50 over gamma for the five branches, and over each lambda for SIC-CADS: "novel, gamma 0.3" and the like."""
    row: dict[str, float] = {}
    if method in BRANCHES:
        p = scores(embedded, method)
        for gamma in GAMMAS:
            row |= _named(f"gamma {gamma}", given, p, gamma, found)
    if method == "SIC-CADS":
        for value in LAMBDAS:
            row |= _named(f"lambda_base {value}", given, scores(embedded, lambda_base=value), GAMMA, found)
            row |= _named(f"lambda_novel {value}", given, scores(embedded, lambda_novel=value), GAMMA, found)
    return row


def _named(what: str, given: Detected, p: Tensor, gamma: float, found: data.Boxes) -> dict[str, float]:
    scored = ap50(found, results(given.boxes, refined(given, p, gamma), found.image_ids))
    return {f"{group}, {what}": scored[group] for group in ("novel", "base")}
