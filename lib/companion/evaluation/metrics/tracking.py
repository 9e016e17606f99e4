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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ...data.tracking import Annotated
from ...errors import BadParameter, CompanionError, check_choice

RULES = {
    "lasher": "boxes are rounded; the first is not scored; a box without area repeats the one before; frames whose "
    "true box has a number of 0 or less are hits in PR and NPR and misses in SR; mean over sequences",
    "rgbt234": "predicted boxes are rounded, every frame is scored against both streams; mean over sequences",
    "gtot": "as rgbt234, but centres are x + w / 2, distances must be below the threshold, the area under the success "
    "curve is taken by trapezoids, and all frames are pooled, so that long sequences weigh more",
    "visevent": "no rounding; the first box is not scored; a box without area repeats the one before; frames without "
    "the object are never hits, yet are counted; sequences without any hit are left out of the mean",
}


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x, y, w, h: (..., 4) and (..., 4) to (...); nan where both have no area."""
    first, second = np.asarray(first), np.asarray(second)
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
    first, second = np.asarray(first), np.asarray(second)
    last = 1 if inclusive else 0
    centres = [(boxes[..., 2:] - last) / 2 + boxes[..., :2] for boxes in (first, second)]
    if normalised:
        with np.errstate(divide="ignore", invalid="ignore"):
            centres = [centre / (second[..., 2:] + centre.dtype.type(1e-8)) for centre in centres]
    with np.errstate(invalid="ignore"):
        return np.sqrt(((centres[0] - centres[1]) ** 2).sum(-1))


@dataclass(frozen=True, eq=False)
class Curve:
    """A share (in 0..1) at each of `thresholds`, the mean over sequences (GTOT: over frames); both (thresholds,)."""

    thresholds: np.ndarray
    rates: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """What `evaluate` found. Scores are in percent, curves in 0..1.

    Attributes:
        rules: the benchmark's rules, a key of `RULES`.
        pixels: the threshold of PR.
        per_sequence: a row for each sequence, in their order; columns PR, NPR, SR, or MPR, MSR.
        weights: the weight of each sequence in the mean, of the same shape.
        attributes: sequence -> its attributes.
        precision, normalised, success: the curves; `normalised` is None under rules without NPR.
    """

    rules: str
    pixels: float
    per_sequence: pd.DataFrame
    weights: pd.DataFrame
    attributes: Mapping[str, frozenset[str]]
    precision: Curve
    normalised: Curve | None
    success: Curve

    @property
    def totals(self) -> dict[str, float]:
        """The scores over all sequences, in percent."""
        return self._mean(self.per_sequence.index)

    def per_attribute(self, attributes: Iterable[str] | None = None) -> pd.DataFrame:
        """The scores over the sequences that have an attribute: columns attribute, sequences and the scores.

        Args:
            attributes: their selection and order, such as `companion.data.tracking.ATTRIBUTES["rgbt/lasher"]`;
                None for all that occur, sorted.

        Raises:
            CompanionError: the sequences came without attributes.
            BadParameter: an attribute that none of the sequences has.
        """
        known = sorted(set().union(*self.attributes.values()))
        if not known:
            raise CompanionError("no attributes are known for these sequences")
        rows = []
        for attribute in known if attributes is None else attributes:
            names = [name for name, found in self.attributes.items() if attribute in found]
            if not names:
                raise BadParameter("attribute", attribute, known)
            rows.append({"attribute": attribute, "sequences": len(names), **self._mean(names)})
        return pd.DataFrame(rows)

    def _mean(self, names: Iterable[str]) -> dict[str, float]:
        values, weights = self.per_sequence.loc[list(names)], self.weights.loc[list(names)]
        return {column: float(_average(values[column], weights[column])) for column in values}


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
        CompanionError: sequences without result or results without sequence (listed), too few rows, a box that is not a
            number, or a ground truth without the second stream that the rules require.
    """
    check_choice("rules", rules, RULES)
    truth = {sequence.name: sequence for sequence in sequences}
    _check(results, truth, rules)
    pixels = (5 if rules == "gtot" else 20) if pixels is None else pixels
    within = np.less if rules == "gtot" else np.less_equal
    thresholds = {
        "precision": np.linspace(0, 25 if rules == "gtot" else 50, 51),
        "normalised": np.linspace(0, 0.5, 51),
        "success": np.linspace(0, 1, 21),
    }
    measure = _both_streams if rules in ("rgbt234", "gtot") else _one_stream

    found: dict[str, list] = {key: [] for key in ("PR", "NPR", *thresholds)}
    frames = []
    for name, sequence in truth.items():
        distance, normalised, overlap, count = measure(np.asarray(results[name], np.float64), sequence, rules)
        found["PR"].append(within(distance, pixels).sum() / count)
        found["precision"].append(_rates(within, distance, thresholds["precision"], count))
        if normalised is not None:
            found["NPR"].append((normalised <= 0.2).sum() / count)
            found["normalised"].append(_rates(np.less_equal, normalised, thresholds["normalised"], count))
        found["success"].append(_rates(np.greater, overlap, thresholds["success"], count))
        frames.append(count)
    rates = {key: np.array(values) for key, values in found.items() if values}
    success = rates["success"]
    area = (success[:, 1:] + success[:, :-1]).sum(1) * 0.025 if rules == "gtot" else success.mean(1)

    names = {"PR": "MPR", "SR": "MSR"} if measure is _both_streams else {"PR": "PR", "NPR": "NPR", "SR": "SR"}
    values = pd.DataFrame(
        {shown: 100 * (area if key == "SR" else rates[key]) for key, shown in names.items()},
        index=pd.Index(truth, name="sequence"),
    )
    weights = pd.DataFrame(1.0, index=values.index, columns=values.columns)
    curves = {"PR": "precision", "NPR": "normalised", "SR": "success"}
    for key, shown in names.items():
        if rules == "gtot":
            weights[shown] = np.array(frames, np.float64)
        elif rules == "visevent":
            weights[shown] = (rates[curves[key]].sum(1) > 0).astype(np.float64)
    drawn = {
        curves[key]: Curve(thresholds[curves[key]], _average(rates[curves[key]], weights[shown]))
        for key, shown in names.items()
    }
    return Scores(
        rules=rules,
        pixels=pixels,
        per_sequence=values,
        weights=weights,
        attributes={name: sequence.attributes for name, sequence in truth.items()},
        precision=drawn["precision"],
        normalised=drawn.get("normalised"),
        success=drawn["success"],
    )


def _rates(compare: np.ufunc, values: np.ndarray, thresholds: np.ndarray, count: int) -> np.ndarray:
    """The share of `count` frames that pass each threshold, (thresholds,)."""
    return compare(values[:, None], thresholds).sum(0) / count


def _average(values: np.ndarray | pd.Series, weights: pd.Series) -> np.ndarray:
    """Weighted mean over sequences; 0 if all weights are 0 (a tracker without any hit)."""
    values, weights = np.asarray(values), np.asarray(weights)
    if not weights.any():
        return np.zeros(values.shape[1:])
    return np.average(values, axis=0, weights=weights)


def _one_stream(boxes: np.ndarray, sequence: Annotated, rules: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Distances in pixels and in box sizes, overlaps, and the number of frames to divide by."""
    truth = sequence.boxes
    boxes = boxes[: len(truth)]
    if rules == "lasher":
        boxes, truth = np.rint(boxes.astype(np.float32)), np.rint(truth.astype(np.float32))
    boxes = boxes.copy()
    boxes[0] = truth[0]
    good = np.all(boxes[:, 2:] > 0, 1)
    good[0] = True
    boxes = boxes[np.maximum.accumulate(np.where(good, np.arange(len(boxes)), 0))]  # the last valid one so far
    if rules == "visevent":
        boxes, truth = boxes[~sequence.absent], truth[~sequence.absent]
    distance, overlap = centre_distance(boxes, truth), iou(boxes, truth)
    normalised = centre_distance(boxes, truth, normalised=True)
    unsure = (truth <= 0).any(1)
    distance[unsure] = normalised[unsure] = overlap[unsure] = -1
    return distance, normalised, overlap, len(sequence)


def _both_streams(boxes: np.ndarray, sequence: Annotated, rules: str) -> tuple[np.ndarray, None, np.ndarray, int]:
    """As `_one_stream`, by the better of the two annotations."""
    truths = [np.asarray(truth, np.float32) for truth in (sequence.boxes, sequence.boxes_infrared)]
    boxes = np.rint(boxes[: len(sequence)].astype(np.float32))
    inclusive = rules != "gtot"
    distance = np.minimum(*(centre_distance(boxes, truth, inclusive=inclusive) for truth in truths))
    return distance, None, np.maximum(*(iou(boxes, truth) for truth in truths)), len(sequence)


def _check(results: Mapping[str, np.ndarray], truth: Mapping[str, Annotated], rules: str) -> None:
    if not truth:
        raise CompanionError("there are no sequences to score")
    problems = []
    for what, names in (("no result for", truth.keys() - results), ("no ground truth for", results.keys() - truth)):
        if names:
            more = f" (and {len(names) - 8} more)" if len(names) > 8 else ""
            problems.append(f"{what} {len(names)} sequences: {', '.join(sorted(names)[:8])}{more}")
    if problems:
        raise CompanionError("; ".join(problems))
    for name, sequence in truth.items():
        boxes = np.asarray(results[name])
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) < len(sequence):
            raise CompanionError(f"'{name}': boxes of shape {boxes.shape}, but ({len(sequence)}, 4) are expected")
        if not np.isfinite(boxes).all():
            row = int(np.flatnonzero(~np.isfinite(boxes).all(1))[0])
            raise CompanionError(f"'{name}': the box of frame {row} is {boxes[row].tolist()}")
        if rules in ("rgbt234", "gtot") and sequence.boxes_infrared is None:
            raise CompanionError(f"'{name}' has no annotation of its second stream, which the rules of {rules} ask for")
