"""Average precision of boxes by the rules of COCO and LVIS, by group of classes, and of image-level recognition.

    scores = evaluate("instances_val2017_all_2.json", results, groups={"base": BASE, "novel": NOVEL})
    scores.totals["AP50"], scores.mean(scores.groups["novel"])      # percent

The matching and the curves are faster-coco-eval's, whose numbers are those of pycocotools and of the LVIS toolkit (the
package `lvis` 0.5.3 does not run on today's NumPy); the numbers recorded from both are reproduced to the last digit.
This module adds the mean over the classes of a group, for open-vocabulary tables. As in COCO, AP is the mean of the
precision at 101 recalls, and a class without a box in the annotations has no AP: it is left out of every mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from faster_coco_eval import COCO, COCOeval_faster

from ...data.detection import check_results, is_box
from ...errors import BadParameter, CorruptFile, check_choice
from ...ops.files import read_json

BLOCK = 250_000  # images x classes scored at once: about half a GB
STYLES = ("coco", "lvis")
KINDS = ("bbox", "segm")
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of `evaluate`, in percent.

    Attributes:
        categories: ids of the C classes, ascending; `names` are theirs.
        ap: (C,) AP of each over overlaps 0.5 to 0.95; nan where the annotations have no box of it.
        ap50: (C,) at an overlap of 0.5.
        totals: "AP", "AP50", "AP75", "APs", "APm", "APl" and the recalls: "AR@1", "AR@10", "AR@100", "ARs", "ARm" and
            "ARl" (style "coco"), or "AR@300", "ARs@300" ... (style "lvis", which has "APr", "APc" and "APf" too). nan
            where no class has such boxes.
        groups: category ids by name, as given.
    """

    categories: tuple[int, ...]
    names: tuple[str, ...]
    ap: np.ndarray
    ap50: np.ndarray
    totals: dict[str, float]
    groups: dict[str, tuple[int, ...]]

    def mean(self, categories: Iterable[int], measure: str = "ap50") -> float:
        """The mean of "ap50" or "ap" over some category ids; nan when none of them has a box."""
        values = getattr(self, measure)[np.isin(self.categories, list(categories))]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def by_group(self) -> pd.DataFrame:
        """A row for each group and one for all classes: "classes" (with boxes), "AP50", "AP"."""
        rows = []
        for name, ids in {**self.groups, "all": self.categories}.items():
            there = np.isin(self.categories, ids) & np.isfinite(self.ap)
            row = {"group": name, "classes": int(there.sum())}
            rows.append(row | {"AP50": self.mean(ids), "AP": self.mean(ids, "ap")})
        return pd.DataFrame(rows)


def evaluate(
    annotations: str | Path | dict,
    results: str | Path | Sequence[Mapping],
    *,
    style: str = "coco",
    groups: Mapping[str, Iterable[int]] | None = None,
    kind: str = "bbox",
    top: int | None = None,
) -> Scores:
    """Score a list of results against annotations in COCO's or LVIS' format.

    Args:
        annotations: a file, or its content.
        results: rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, or a file with them.
        style: "coco"; or "lvis", federated: a detection of a class that is neither annotated in the image nor listed
            under `neg_category_ids` is dropped, and an unmatched one of a class under `not_exhaustive_category_ids` is
            not a false positive.
        groups: category ids by name, for the means of `Scores.by_group`. In style "lvis" the file's own frequencies
            give APr, APc and APf.
        kind: "bbox", or "segm" for masks, as in the tables of OV-LVIS; rows then have "segmentation".
        top: number of best results per image; by default 100 in COCO, 300 in LVIS.

    Raises:
        BadParameter: an unknown style or kind, a group without a known class, a row without a field, with NaN, with
            another shape, or of an image that the annotations do not have.
        CorruptFile: a malformed file.
    """
    check_choice("style", style, STYLES)
    check_choice("kind", kind, KINDS)
    truth, rows = _annotations(annotations, style, kind), _rows(results, kind)
    ids = sorted(category["id"] for category in truth["categories"])
    named = {category["id"]: category["name"] for category in truth["categories"]}
    named_groups = {name: tuple(group) for name, group in (groups or {}).items()}
    for name, members in named_groups.items():
        if unknown := set(members) - set(ids):
            raise BadParameter(f"groups['{name}']", sorted(unknown), "category ids of the annotations")
    pictures = {image["id"] for image in truth["images"]}
    if foreign := {row["image_id"] for row in rows} - pictures:
        some = sorted(foreign, key=str)[:5]
        raise BadParameter("results", f"image_id {some}", f"ids of the {len(pictures)} annotated images")
    known = set(ids)
    rows = [row for row in rows if row["category_id"] in known]
    top = top or {"coco": 100, "lvis": 300}[style]
    # LVIS counts the best of an image over all classes, COCO those of each class
    rows = _best(rows, top) if style == "lvis" else rows

    # the library requires numeric image ids; OpenImages has names. Ties are broken by image order, which is that of the
    # ids, not of the file
    number = {key: i for i, key in enumerate(sorted(pictures, key=lambda k: (isinstance(k, str), k)), 1)}
    for entry in truth["images"]:
        entry["id"] = number[entry["id"]]
    for entry in truth["annotations"]:
        entry["image_id"] = number[entry["image_id"]]
    # it also treats a box with id 0, or a duplicate id, as unmatched; the ids have no other use
    for i, entry in enumerate(truth["annotations"], 1):
        entry["id"] = i
    # classes are scored separately: the library needs half a kB per image, class and area
    blocks = np.array_split(np.array(ids), min(len(ids), -(-len(ids) * len(pictures) // BLOCK)))
    precisions, recalls = [], []
    for block in map(set, blocks):
        boxes = [entry for entry in truth["annotations"] if entry["category_id"] in block]
        categories = [category for category in truth["categories"] if category["id"] in block]
        gt = COCO({**truth, "annotations": boxes, "categories": categories})
        own = [{**row, "image_id": number[row["image_id"]]} for row in rows if row["category_id"] in block]
        dt = gt.loadRes(own) if own else COCO({**truth, "annotations": [], "categories": categories})
        run = COCOeval_faster(gt, dt, kind, lvis_style=style == "lvis", print_function=lambda *_: None)
        run.params.maxDets = [top] if style == "lvis" else [*(n for n in (1, 10) if n < top), top]
        run.evaluate()
        run.accumulate()
        precisions.append(run.eval["precision"])
        recalls.append(run.eval["recall"])
    # [overlap, recall, class, area, top], [overlap, class, area, top]
    precision, recall = np.concatenate(precisions, 2), np.concatenate(recalls, 1)

    def average(values: np.ndarray) -> float:
        return 100 * float(values[values > -1].mean()) if (values > -1).any() else float("nan")

    def per_class(values: np.ndarray) -> np.ndarray:
        found = values.mean((0, 1))
        return np.where(found > -1, 100 * found, np.nan)

    totals = {"AP": average(precision[:, :, :, 0, -1])}
    totals |= {f"AP{100 * t:.0f}": average(precision[_at(run, t), :, :, 0, -1]) for t in (0.5, 0.75)}
    totals |= {f"AP{size}": average(precision[:, :, :, i, -1]) for i, size in enumerate("sml", 1)}
    ap = per_class(precision[:, :, :, 0, -1])
    if style == "lvis":
        frequency = {category["id"]: category["frequency"] for category in truth["categories"]}
        for letter, name in FREQUENCIES.items():
            mine = np.array([frequency[i] == letter for i in ids])
            totals[name] = average(precision[:, :, mine, 0, -1])
        suffix = f"@{top}"
        totals[f"AR{suffix}"] = average(recall[:, :, 0, -1])
    else:
        suffix = ""
        totals |= {f"AR@{n}": average(recall[:, :, 0, i]) for i, n in enumerate(run.params.maxDets)}
    totals |= {f"AR{size}{suffix}": average(recall[:, :, i, -1]) for i, size in enumerate("sml", 1)}
    ap50 = per_class(precision[_at(run, 0.5)][None, :, :, 0, -1])
    return Scores(tuple(ids), tuple(named[i] for i in ids), ap, ap50, totals, named_groups)


def _at(run: COCOeval_faster, overlap: float) -> int:
    return int(np.flatnonzero(np.isclose(run.params.iouThrs, overlap))[0])


def _annotations(given: str | Path | dict, style: str, kind: str) -> dict:
    """The annotations, checked; the parts that the evaluation modifies are copied."""
    truth = given if isinstance(given, dict) else read_json(given)
    parts = ("images", "annotations", "categories")
    where = "annotations" if isinstance(given, dict) else given
    if not isinstance(truth, dict) or not all(isinstance(truth.get(part), list) for part in parts):
        raise CorruptFile(where, f"not COCO's format: an object with the lists {', '.join(parts)}")
    if not truth["images"] or not truth["categories"]:
        raise CorruptFile(where, "no images, or no categories")
    fields = {"images": ["id"], "categories": ["id", "name"], "annotations": ["image_id", "category_id"]}
    fields["categories"] += ["frequency"] if style == "lvis" else []
    fields["annotations"] += ["bbox"] if kind == "bbox" else []
    for part, names in fields.items():
        for i, entry in enumerate(truth[part]):
            if lost := [name for name in names if not isinstance(entry, Mapping) or entry.get(name) is None]:
                raise CorruptFile(where, f"{part}[{i}]: '{lost[0]}' is missing")
    known = {entry["id"] for entry in truth["images"]}
    for i, entry in enumerate(truth["annotations"]):
        if entry["image_id"] not in known:
            raise CorruptFile(where, f"annotations[{i}]: 'image_id' is {entry['image_id']!r}, which no image is")
        if "bbox" in entry and not is_box(entry["bbox"]):
            wrong = str(entry["bbox"])[:80]
            raise CorruptFile(where, f"annotations[{i}]: 'bbox' is {wrong}, not [x, y, width, height]")
    return {**truth, **{part: [dict(entry) for entry in truth[part]] for part in ("images", "annotations")}}


def _rows(given: str | Path | Sequence[Mapping], kind: str) -> Sequence[Mapping]:
    if isinstance(given, (str, Path)):
        return check_results(read_json(given), given, kind)
    return check_results(given, kind=kind)


def _best(rows: Sequence[Mapping], top: int) -> list[Mapping]:
    """The best `top` rows of each image, over all classes."""
    by_picture: dict[object, list[Mapping]] = {}
    for row in rows:
        by_picture.setdefault(row["image_id"], []).append(row)
    return [row for some in by_picture.values() for row in sorted(some, key=lambda row: -row["score"])[:top]]


# --- image-level recognition ------------------------------------------------------------------------------------------


def recognition_ap(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AP of each class over images (C,), in percent, from labels and scores (n, C); nan where no image has the class.

    The mean over the images with the class of the precision at their rank, not interpolated.
    """
    from sklearn.metrics import average_precision_score  # imported here because it takes a second

    labels, scores = _both(labels, scores)
    found = np.full(labels.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        found[c] = 100 * average_precision_score(labels[:, c], scores[:, c])
    return found


def _both(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 2 or labels.shape != scores.shape or not labels.size:
        raise BadParameter("scores", scores.shape, f"the shape of the labels, {labels.shape}: images by classes")
    return labels, scores
