"""The outputs of detector and recogniser for test images, refined by any branch and gamma, and their scores."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ...data import detection
from ...evaluation.metrics.detection import evaluate, recognition_ap
from ...io.progress import progress
from ...training.hardware import CPU, Hardware, evaluating
from ...training.stored import saved
from ..layers.precision import without_autocast
from . import detectors
from . import model as sic_cads

BRANCHES = ("text", "visual", "visual+", "fused", "SIC-CADS")
"""Image-level scores: the text branch, the student, CLIP's own crops, and the two fusions."""
KEPT = 2**28  # bytes of probabilities that predictions hold


@torch.no_grad()
def branch_scores(model: sic_cads.MLR, images: Tensor) -> dict[str, Tensor]:
    """The image-level probabilities (n, C) of images (n, 3, H, W), uint8, by branch; without a teacher only the learned
    branches of `BRANCHES`."""
    parts = images.split(100)
    learned = [model(model.prepared(part)) for part in parts]
    e_text, e_image = (torch.cat(column) for column in zip(*learned, strict=True))
    student = model.recognised(e_text, e_image)
    scores = {"text": student.p_text, "visual": student.p_image, "fused": student.p}
    if model.teacher is not None:
        plus = model.recognised(e_text, torch.cat([model.teacher_embeddings(part) for part in parts]))
        scores |= {"visual+": plus.p_image, "SIC-CADS": plus.p}
    return {name: scores[name] for name in BRANCHES if name in scores}


@dataclass(frozen=True)
class Predictions:
    """The outputs of detector and recogniser for the n test images, and how they are combined.

    All probabilities of a large test do not fit in memory: LVIS has 20,000 images of 576 boxes and 1,203 classes.

    Attributes:
        title: of the data.
        test: the test images and their boxes.
        branch, gamma: the image-level scores that refine, and their weight.
        threshold, nms, top: of the detections, after the refinement.
        boxes: of each image, (R, 4).
        scores: the image-level ones by branch, (n, C).
        best: by branch, the detections of each image refined by `gamma`, after threshold, suppression and top-k: scores
            (k,), classes (k,) and rows (k,) of its boxes. Those of the detector alone are "".
        probabilities: (R, C) of the first images, as many as `KEPT` bytes hold.
    """

    title: str
    test: detection.Boxes
    branch: str = "SIC-CADS"
    gamma: float = 0.5
    threshold: float = sic_cads.FLOOR
    nms: float | None = None
    top: int = 100
    boxes: list[Tensor] = field(default_factory=list)
    scores: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    probabilities: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the C classes."""
        return tuple(self.test.class_names)

    @functools.cached_property
    def novel(self) -> Tensor:
        """Which classes are novel (C,) bool; classes that are neither base nor novel are not scored."""
        return self.test.mask(self.test.novel)

    def refined(self, index: int, gamma: float | None = None) -> Tensor:
        """The probabilities (R, C) of one of the first images after Eq. 7; `gamma` is the usual unless given."""
        scores = self.scores[self.branch][index]
        return sic_cads.refine(self.probabilities[index], scores, self.gamma if gamma is None else gamma)

    def detections(self, branch: str) -> list[dict]:
        """Detections of all predicted images, rows in COCO's result format; `branch` "": of the detector alone."""
        rows = []
        for index, (boxes, (scores, classes, chosen)) in enumerate(zip(self.boxes, self.best[branch], strict=True)):
            best = sic_cads.Detections(boxes[chosen], scores, classes, chosen)
            rows += detectors.rows(best, self.test.image_ids[index], self.test.categories)
        return rows

    def ap50(self, branch: str) -> dict[str, float]:
        """AP50 of novel and base classes and of all that are scored, in percent.

        `branch`: of the image-level scores; "" for the detector alone.
        """
        style = "lvis" if self.test.name == "detection/ov-lvis" else "coco"
        scored = evaluate(self.test.truth, self.detections(branch), style=style, top=self.top)
        groups = {"novel": self.test.novel, "base": self.test.base, "all": (*self.test.novel, *self.test.base)}
        return {name: scored.mean(group) for name, group in groups.items()}


def collect(
    model: sic_cads.MLR,
    detect: sic_cads.Detector,
    test: detection.Boxes,
    hardware: Hardware = CPU,
    *,
    branches: Sequence[str] = BRANCHES,
    folder: Path | None = None,
    **combined: Any,
) -> Predictions:
    """The outputs of detector and recogniser for the test images, both in float32.

    Args:
        hardware: device, and number of processes that decode the images.
        branches: those that the outputs have, of `BRANCHES`; the detector alone is always there.
        folder: where they are saved as they come. Those that are there are not computed again: its name must
            identify models, images and settings.
        combined: see `Predictions`.

    Raises `CorruptFile`: a file in `folder` that cannot be read.
    """
    outputs, rows, held = Predictions(test=test, **combined), list[dict[str, Any]](), 0

    def computed(done: int) -> Iterator[dict[str, Any]]:
        images = DataLoader(Subset(test, range(done, len(test))), None, num_workers=hardware.workers)
        # the authors' recogniser is tested in float32; half precision would move boxes by pixels
        with evaluating(hardware, model) as where, without_autocast(where):
            for index, (image, _) in enumerate(progress(images, "test images", len(images)), done):
                boxes, probabilities = (x.cpu() for x in detect(image)[:2])
                scores = {name: each[0].cpu() for name, each in branch_scores(model, image[None].to(where)).items()}
                scores = {name: scores[name] for name in scores if name in branches}
                row: dict[str, Any] = {"boxes": boxes, "scores": scores, "best": {}}
                for branch, each in {"": None, **scores}.items():
                    matrix = probabilities if each is None else sic_cads.refine(probabilities, each, outputs.gamma)
                    best = _best(outputs, index, boxes, matrix)
                    row["best"][branch] = best.scores.clone(), best.classes.int(), best.rows.int()
                if held + probabilities.nbytes <= KEPT:
                    row["probabilities"] = probabilities
                yield row

    for row in saved(folder, len(test), computed):
        rows.append(row)
        held += row["probabilities"].nbytes if "probabilities" in row else KEPT
    return replace(
        outputs,
        boxes=[row["boxes"] for row in rows],
        scores={name: torch.stack([row["scores"][name] for row in rows]) for name in rows[0]["scores"]},
        best={branch: [row["best"][branch] for row in rows] for branch in rows[0]["best"]},
        probabilities=[row["probabilities"] for row in rows if "probabilities" in row],
    )


def _best(outputs: Predictions, index: int, boxes: Tensor, matrix: Tensor) -> sic_cads.Detections:
    """The detections of an image; of LVIS those that count, of classes annotated in it or known to be absent."""
    best = sic_cads.detect(boxes, matrix, outputs.threshold, outputs.nms, outputs.top)
    absent = outputs.test.images[index].get("neg_category_ids")
    if absent is None:
        return best
    counted = (outputs.test.positives[index] | outputs.test.mask(absent))[best.classes]
    return sic_cads.Detections(*(values[counted] for values in best))


def recognition(test: detection.Boxes, scores: Tensor) -> dict[str, float]:
    """mAP of image-level scores (n, C) of the images, over the base and the novel classes, in percent."""
    each = recognition_ap(test.positives.numpy(), scores.numpy())
    groups = {"base": test.base, "novel": test.novel}
    return {name: float(np.nanmean(each[test.mask(group).numpy()])) for name, group in groups.items()}
