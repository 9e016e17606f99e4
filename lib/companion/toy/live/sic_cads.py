"""SIC-CADS: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor
from torchvision.ops import box_convert

from ...data import detection
from ...evaluation.metrics.detection import evaluate, recognition_ap
from ...models.sic_cads import model as sic_cads
from ...models.sic_cads import recipe as full
from ...ops.progress import progress
from ..ablations import sic_cads as study
from ..datasets import detection as pocket
from ..encoders import detector as made

TASK, METHOD = "shipped", "SIC-CADS"
BRANCHES = study.BRANCHES
"""Where image-level scores come from: the text branch, the student, CLIP's own crops, and the two fusions."""


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and which detector is refined on which pictures.

    Attributes:
        names: of the C classes.
        base, novel: (C,) bool; classes that are neither are scored nowhere.
        test: the pictures that are tested on, and their boxes.
        build: the recogniser, before training.
        learn: trains it in place: (model, arguments of `fit`) to the history; empty where nothing is trained.
        detect: one picture, (3, H, W) uint8, to all boxes (R, 4), xyxy, and the probabilities (R, C).
        branch, gamma: what refines, and how much.
        threshold, nms, top: what is cut off after the refinement.
        rate: the learning rate at pocket scale.
    """

    title: str
    names: tuple[str, ...]
    base: Tensor
    novel: Tensor
    test: detection.Boxes
    build: Callable[[], sic_cads.MLR]
    learn: Callable[..., list[dict]]
    detect: Callable[[Tensor], tuple[Tensor, Tensor]]
    branch: str
    gamma: float
    threshold: float
    nms: float | None
    top: int
    rate: float = 0.0


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket pictures are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights, CorruptFile: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    return Setting(**full.parts(p, out))


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The scenes of the run's seed, the shipped detector and CLIP, a recogniser trained as the study does."""
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    test, _ = study.pictures(root, p.seed, "test")
    clip, detector = study.foundation(TASK, p.seed)
    text, rate = made.texts(clip), rates[TASK, METHOD]

    def learn(model: sic_cads.MLR, **options) -> list[dict]:
        lesson = study.lessons(model, *study.pictures(root, p.seed, "train"))
        return study.train_model(model, lesson, rate, p.seed, **options)

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, probabilities = detector(study.pixels(image[None]), text)
        return boxes[0], probabilities[0]

    return Setting(
        title="pocket scenes",
        names=pocket.CLASSES,
        base=test.mask(test.base),
        novel=test.mask(test.novel),
        test=test,
        build=functools.partial(study.build, TASK, p.seed),
        learn=learn,
        detect=detect,
        branch=p.branch,
        gamma=p.gamma,
        threshold=study.THRESHOLD,
        nms=study.NMS,
        top=study.TOP,
        rate=rate,
    )


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, **options) -> tuple[sic_cads.MLR, list[dict]]:
    """Build the recogniser of a setting and train it; the history is empty where nothing is trained."""
    model = found.build()
    history = found.learn(model, **options)
    return model.eval(), history


@torch.no_grad()
def branches(model: sic_cads.MLR, image: Tensor) -> dict[str, Tensor]:
    """The image-level probabilities (C,) of one picture, (3, H, W) uint8, by branch; of `BRANCHES` those that the model
    has: without a teacher only the learned ones."""
    e_text, e_image = model(model.prepared(image[None]))
    student = model.recognised(e_text, e_image)
    found = {"text": student.p_text[0], "visual": student.p_image[0], "fused": student.p[0]}
    if model.teacher is not None:
        own = model.recognised(e_text, model.teach(image[None]))
        found |= {"visual+": own.p_image[0], "SIC-CADS": own.p[0]}
    return {name: found[name] for name in BRANCHES if name in found}


@dataclass(frozen=True)
class Looked:
    """What detector and recogniser say of the first n test pictures.

    Attributes:
        boxes, probabilities: of each picture, (R, 4) and (R, C), before anything is cut off.
        p: by branch, (n, C).
    """

    boxes: list[Tensor]
    probabilities: list[Tensor]
    p: dict[str, Tensor]


def look(found: Setting, model: sic_cads.MLR, count: int = 0) -> Looked:
    """Detector and recogniser on the first `count` test pictures, 0 for all."""
    boxes, probabilities, rows = [], [], []
    for index in progress(range(min(count or len(found.test), len(found.test))), "looking"):
        image, _ = found.test[index]
        for kept, one in zip((boxes, probabilities), found.detect(image), strict=True):
            kept.append(one)
        rows.append(branches(model, image))
    return Looked(boxes, probabilities, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def refined(found: Setting, looked: Looked, index: int, branch: str = "", gamma: float | None = None) -> Tensor:
    """One picture's probabilities (R, C) after Eq. 7; `branch` and `gamma` are the setting's unless given."""
    gamma = found.gamma if gamma is None else gamma
    return sic_cads.refine(looked.probabilities[index], looked.p[branch or found.branch][index], gamma)


def detections(found: Setting, looked: Looked, branch: str = "", gamma: float | None = None) -> list[dict]:
    """Finished detections of all pictures looked at, rows in COCO's result format."""
    rows = []
    for index, boxes in enumerate(looked.boxes):
        kept = sic_cads.detect(
            boxes, refined(found, looked, index, branch, gamma), found.threshold, found.nms, found.top
        )
        shown = box_convert(kept.boxes, "xyxy", "xywh").tolist()
        for box, score, label in zip(shown, kept.scores.tolist(), kept.classes.tolist(), strict=True):
            category = found.test.categories[label]
            rows.append({"image_id": found.test.image_ids[index], "category_id": category, "bbox": box, "score": score})
    return rows


def scores(found: Setting, looked: Looked, branch: str = "", gamma: float | None = None) -> dict[str, float]:
    """AP50 of novel and base classes and of all that are scored, over the pictures looked at, in percent."""
    ids = set(found.test.image_ids[: len(looked.boxes)])
    truth = found.test.truth
    part = {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in ids],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in ids],
    }
    scored = evaluate(part, detections(found, looked, branch, gamma), top=found.top)
    return {
        "novel": scored.mean(found.test.novel),
        "base": scored.mean(found.test.base),
        "all": scored.mean((*found.test.novel, *found.test.base)),
    }


def recognition(found: Setting, looked: Looked, branch: str) -> dict[str, float]:
    """mAP of image-level scores by themselves over the novel and the base classes, in percent."""
    n = len(looked.boxes)
    each = torch.from_numpy(recognition_ap(found.test.positives[:n].numpy(), looked.p[branch].numpy()))
    return {name: float(each[mask].nanmean()) for name, mask in (("novel", found.novel), ("base", found.base))}


# --- results that gather ----------------------------------------------------------------------------------------------


def keep(path: Path, p: SimpleNamespace, found: Setting, looked: Looked) -> None:
    """Let the real results, with and without refinement, join those in `path`."""
    for gamma in (0.0, found.gamma):
        own = full.scores(p, found.test, detections(found, looked, gamma=gamma))
        row = {"method": full.label(p, gamma > 0), "dataset": p.dataset, "pictures": p.pictures, "seed": p.seed}
        full.measured(path, row | own)


def tables(path: Path) -> dict[str, pd.DataFrame]:
    """The paper's tables of results by title, with what is in `path` beside the published numbers."""
    return full.tables(full.measured(path))
