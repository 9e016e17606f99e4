"""The outputs of detector and recogniser for test images, refined by any branch and gamma, and their scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...data import detection
from ...evaluation.metrics.detection import evaluate, recognition_ap
from ...ops.progress import progress
from ...training.fit import CPU, Hardware, History, evaluating
from ..layers.precision import without_autocast
from . import detectors
from . import model as sic_cads

BRANCHES = ("text", "visual", "visual+", "fused", "SIC-CADS")
"""Image-level scores: the text branch, the student, CLIP's own crops, and the two fusions."""
KEPT = 2**28  # bytes of probabilities that predictions hold


@dataclass(frozen=True)
class Setting:
    """The recogniser of a run, the detector that it refines, and the test images.

    Attributes:
        test: the test images and their boxes.
        build: the recogniser, before training.
        train: from arguments of `fit` that differ to the trained recogniser and its history, empty where nothing is
            trained.
        detect: one image (3, H, W), uint8, to all boxes (R, 4), xyxy, and their probabilities (R, C).
        branch, gamma: the image-level scores that refine, and their weight.
        threshold, nms, top: of the detections, after the refinement.
        hardware: of the recogniser at test.
    """

    title: str
    test: detection.Boxes
    build: Callable[[], sic_cads.MLR]
    train: Callable[..., tuple[sic_cads.MLR, History]]
    detect: Callable[[Tensor], tuple[Tensor, Tensor]]
    branch: str
    gamma: float
    threshold: float
    nms: float | None
    top: int
    hardware: Hardware = CPU

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the C classes."""
        return tuple(self.test.class_names)

    @functools.cached_property
    def base(self) -> Tensor:
        """Which classes are base classes (C,) bool; classes that are neither base nor novel are not scored."""
        return self.test.mask(self.test.base)

    @functools.cached_property
    def novel(self) -> Tensor:
        """Which classes are novel (C,) bool."""
        return self.test.mask(self.test.novel)


def truth_of(data: detection.Boxes, count: int) -> dict:
    """The annotations of the first `count` images."""
    images = data.truth["images"][:count]
    ids = {image["id"] for image in images}
    rows = [row for row in data.truth["annotations"] if row["image_id"] in ids]
    return data.truth | {"images": images, "annotations": rows}


@torch.no_grad()
def branch_scores(model: sic_cads.MLR, image: Tensor) -> dict[str, Tensor]:
    """The image-level probabilities (C,) of one image (3, H, W), uint8, by branch; without a teacher only the learned
    branches of `BRANCHES`."""
    e_text, e_image = model(model.prepared(image[None]))
    student = model.recognised(e_text, e_image)
    scores = {"text": student.p_text[0], "visual": student.p_image[0], "fused": student.p[0]}
    if model.teacher is not None:
        plus = model.recognised(e_text, model.teacher_embeddings(image[None]))
        scores |= {"visual+": plus.p_image[0], "SIC-CADS": plus.p[0]}
    return {name: scores[name] for name in BRANCHES if name in scores}


@dataclass(frozen=True)
class Predictions:
    """The outputs of detector and recogniser for the first n test images.

    All probabilities of a large test do not fit in memory: LVIS has 20,000 images of 576 boxes and 1,203 classes.

    Attributes:
        boxes: of each image, (R, 4).
        p: by branch, (n, C).
        best: by branch, the detections of each image refined by the setting's gamma, after threshold, suppression and
            top-k: scores (k,), classes (k,) and rows (k,) of its boxes. Those of the detector alone are "".
        probabilities: (R, C) of the first images, as many as `KEPT` bytes hold.
    """

    boxes: list[Tensor] = field(default_factory=list)
    p: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    probabilities: list[Tensor] = field(default_factory=list)


def predict(setting: Setting, model: sic_cads.MLR, count: int = 0) -> Predictions:
    """Run detector and recogniser on the first `count` test images, 0 for all."""
    outputs, rows, held = Predictions(), [], 0
    with evaluating(setting.hardware, model) as where:
        for index in progress(range(min(count or len(setting.test), len(setting.test))), "test images"):
            image, _ = setting.test[index]
            with without_autocast(where):  # half precision would move boxes by pixels
                boxes, probabilities = setting.detect(image)
            scores = {name: p.cpu() for name, p in branch_scores(model, image.to(where)).items()}
            outputs.boxes.append(boxes)
            rows.append(scores)
            for branch, p in {"": None, **scores}.items():
                matrix = probabilities if p is None else sic_cads.refine(probabilities, p, setting.gamma)
                best = _best(setting, index, boxes, matrix)
                reduced = best.scores.clone(), best.classes.int(), best.rows.int()
                outputs.best.setdefault(branch, []).append(reduced)
            held += probabilities.nbytes
            if held <= KEPT:
                outputs.probabilities.append(probabilities)
    outputs.p.update({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return outputs


def _best(setting: Setting, index: int, boxes: Tensor, matrix: Tensor) -> sic_cads.Detections:
    """The detections of an image; of LVIS those that count, of classes annotated in it or known to be absent."""
    best = sic_cads.detect(boxes, matrix, setting.threshold, setting.nms, setting.top)
    absent = setting.test.truth["images"][index].get("neg_category_ids")
    if absent is None:
        return best
    counted = (setting.test.positives[index] | setting.test.mask(absent))[best.classes]
    return sic_cads.Detections(*(values[counted] for values in best))


def refined(setting: Setting, outputs: Predictions, index: int, branch: str = "", gamma: float | None = None) -> Tensor:
    """The probabilities (R, C) of one of the first images after Eq. 7; `branch` and `gamma` are the setting's unless
    given."""
    p = outputs.p[branch or setting.branch][index]
    return sic_cads.refine(outputs.probabilities[index], p, setting.gamma if gamma is None else gamma)


def detections(setting: Setting, outputs: Predictions, branch: str) -> list[dict]:
    """Detections of all predicted images, rows in COCO's result format; `branch` "": of the detector alone."""
    rows = []
    for index, (boxes, (scores, classes, chosen)) in enumerate(zip(outputs.boxes, outputs.best[branch], strict=True)):
        best = sic_cads.Detections(boxes[chosen], scores, classes, chosen)
        rows += detectors.rows(best, setting.test.image_ids[index], setting.test.categories)
    return rows


def ap50(setting: Setting, outputs: Predictions, branch: str) -> dict[str, float]:
    """AP50 of novel and base classes and of all that are scored, over the predicted images, in percent.

    `branch`: of the image-level scores; "" for the detector alone.
    """
    style = "lvis" if setting.test.name == "detection/ov-lvis" else "coco"
    truth, rows = truth_of(setting.test, len(outputs.boxes)), detections(setting, outputs, branch)
    scored = evaluate(truth, rows, style=style, top=setting.top)
    groups = {"novel": setting.test.novel, "base": setting.test.base, "all": (*setting.test.novel, *setting.test.base)}
    return {name: scored.mean(group) for name, group in groups.items()}


def recognition(test: detection.Boxes, p: Tensor) -> dict[str, float]:
    """mAP of image-level scores (n, C) of the first n images, over the base and the novel classes, in percent."""
    each = recognition_ap(test.positives[: len(p)].numpy(), p.numpy())
    groups = {"base": test.base, "novel": test.novel}
    return {name: float(np.nanmean(each[test.mask(group).numpy()])) for name, group in groups.items()}
