"""Average precision of boxes by the rules of COCO and LVIS, by group of classes, and of image-level recognition.

    scores = evaluate("instances_val2017_all_2.json", results)
    scores.totals["AP50"], scores.mean(NOVEL)      # percent

The matching and the curves are faster-coco-eval's, whose numbers are those of pycocotools and of the LVIS toolkit (the
package `lvis` 0.5.3 does not run on today's NumPy); the numbers recorded from both are reproduced to the last digit.
This module adds the mean over the classes of a group, for open-vocabulary tables. As in COCO, AP is the mean of the
precision at 101 recalls, and a class without a box in the annotations has no AP: it is left out of every mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.coco import check_results, is_box
from ...errors import BadParameter, CorruptFile, check_choice, extra
from ...io.files import read_json
from . import checked

with extra("detection"):
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as rle

BLOCK = 250_000  # images x classes scored at once: about half a GB
KINDS = ("bbox", "segm")
# our names of the numbers, and those of the library
STYLES = {
    "coco": {"AR@1": "AR_all", "AR@10": "AR_second", "AR@100": "AR_third"},
    "lvis": {"APr": "APr", "APc": "APc", "APf": "APf", "AR@300": "AR_all"},
}
for _names, _of in ((STYLES["coco"], ""), (STYLES["lvis"], "@300")):
    _names |= {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75"}
    for _size in ("small", "medium", "large"):
        _names |= {f"AP{_size[0]}": f"AP_{_size}", f"AR{_size[0]}{_of}": f"AR_{_size}"}


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
    """

    categories: tuple[int, ...]
    names: tuple[str, ...]
    ap: np.ndarray
    ap50: np.ndarray
    totals: dict[str, float]

    def mean(self, categories: Iterable[int]) -> float:
        """The mean AP50 of some category ids; nan when none of them has a box."""
        values = self.ap50[np.isin(self.categories, list(categories))]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def evaluate(
    annotations: str | Path | dict,
    results: str | Path | Sequence[Mapping],
    *,
    style: str = "coco",
    kind: str = "bbox",
    top: int | None = None,
) -> Scores:
    """Score a list of results against annotations in COCO's or LVIS' format.

    Args:
        annotations: a file, or its content.
        results: rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, or a file with them.
        style: "coco"; or "lvis", federated: a detection of a class that is neither annotated in the image nor listed
            under `neg_category_ids` is dropped, and an unmatched one of a class under `not_exhaustive_category_ids` is
            not a false positive; the file's frequencies of classes give APr, APc and APf.
        kind: "bbox", or "segm" for masks, as in the tables of OV-LVIS; rows then have "segmentation".
        top: how many of the best rows of an image count: by default 100 of each class in style "coco", 300 of all
            classes in "lvis". With another number "coco" has no recalls by number.

    Raises:
        BadParameter: an unknown style or kind, a `top` below 1, a row without a field, with NaN, with another shape, or
            of an image that the annotations do not have.
        CorruptFile: a malformed file.
    """
    check_choice("style", style, STYLES)
    check_choice("kind", kind, KINDS)
    truth, lvis = _annotations(annotations, style, kind), style == "lvis"
    top = (300 if lvis else 100) if top is None else top
    if top < 1:
        raise BadParameter("top", top, "1 or more")
    file = results if isinstance(results, (str, Path)) else None
    rows: Sequence[Mapping] = check_results(read_json(file) if file else results, file, kind)
    named = {category["id"]: category["name"] for category in truth["categories"]}
    ids, images = sorted(named), {image["id"] for image in truth["images"]}
    if foreign := {row["image_id"] for row in rows} - images:
        some = sorted(foreign, key=str)[:5]
        raise BadParameter("results", f"image_id {some}", f"ids of the {len(images)} annotated images")
    # LVIS counts the best of an image over all classes, COCO those of each class
    rows = _best([row for row in rows if row["category_id"] in named], top if lvis else len(rows))

    # the library requires numeric image ids; OpenImages has names. Ties are broken by image order, which is that of the
    # ids, not of the file
    number = {key: i for i, key in enumerate(sorted(images, key=lambda k: (isinstance(k, str), k)), 1)}
    for entry in truth["images"]:
        entry["id"] = number[entry["id"]]
    for i, entry in enumerate(truth["annotations"], 1):
        # it also treats a box with id 0, or a duplicate id, as unmatched; the ids have no other use
        entry |= {"id": i, "image_id": number[entry["image_id"]]}
    gt = COCO(truth)
    for entry in truth["annotations"]:
        if entry.get("area") is None:  # the library would take it for 0
            *_, w, h = entry.get("bbox", (0, 0))
            entry["area"] = rle.area(gt.annToRLE(entry)) if entry.get("segmentation") else w * h
    own = [{**row, "image_id": number[row["image_id"]]} for row in rows]
    dt = gt.loadRes(own) if own else COCO(truth | {"annotations": []})
    run = COCOeval_faster(gt, dt, kind, lvis_style=lvis, print_function=lambda *_: None)
    run.params.maxDets = [top] if lvis else [*(n for n in (1, 10) if n < top), top]
    precision, recall = [], []  # classes are scored in blocks: the library needs half a kB per image, class and area
    for block in np.array_split(ids, min(len(ids), -(-len(ids) * len(images) // BLOCK))):
        run.params.catIds = block.tolist()
        run.evaluate()
        run.accumulate()
        precision.append(run.eval["precision"])  # [overlap, recall, class, area, top]
        recall.append(run.eval["recall"])  # [overlap, class, area, top]
    run.eval = {"precision": np.concatenate(precision, 2), "recall": np.concatenate(recall, 1)}
    run.params.catIds = ids
    if lvis:
        run.freq_groups = [[i for i, c in enumerate(gt.load_cats(ids)) if c["frequency"] == letter] for letter in "rcf"]
    run.summarize()

    def percent(values: Any) -> np.ndarray:
        return np.where(np.asarray(values) > -1, 100 * np.asarray(values), np.nan)

    stats = run.stats_as_dict
    each = run.eval["precision"][:, :, :, 0, -1]  # at overlaps 0.5, 0.55 ... 0.95
    totals = {name: float(percent(stats[label])) for name, label in STYLES[style].items() if label in stats}
    ap, ap50 = percent(each.mean((0, 1))), percent(each[0].mean(0))
    return Scores(tuple(ids), tuple(named[i] for i in ids), ap, ap50, totals)


def _annotations(given: str | Path | dict, style: str, kind: str) -> dict:
    """The annotations, checked; the parts that the evaluation modifies are copied."""
    truth = given if isinstance(given, dict) else read_json(given)
    where = "annotations" if isinstance(given, dict) else given
    fields = {"images": ["id"], "categories": ["id", "name"], "annotations": ["image_id", "category_id"]}
    fields["categories"] += ["frequency"] if style == "lvis" else []
    fields["annotations"] += ["bbox"] if kind == "bbox" else []
    if not isinstance(truth, dict) or not all(isinstance(truth.get(part), list) for part in fields):
        raise CorruptFile(where, f"not COCO's format: an object with the lists {', '.join(fields)}")
    if not truth["images"] or not truth["categories"]:
        raise CorruptFile(where, "no images, or no categories")
    for part, names in fields.items():
        for i, entry in enumerate(truth[part]):
            if lost := [name for name in names if not isinstance(entry, Mapping) or entry.get(name) is None]:
                raise CorruptFile(where, f"{part}[{i}]: '{lost[0]}' is missing")
    known, classes = ({entry["id"] for entry in truth[part]} for part in ("images", "categories"))
    for i, entry in enumerate(truth["annotations"]):
        if entry["image_id"] not in known:
            raise CorruptFile(where, f"annotations[{i}]: 'image_id' is {entry['image_id']!r}, which no image is")
        if entry["category_id"] not in classes:
            raise CorruptFile(where, f"annotations[{i}]: 'category_id' is {entry['category_id']!r}, which no class is")
        if "bbox" in entry and not is_box(entry["bbox"]):
            wrong = str(entry["bbox"])[:80]
            raise CorruptFile(where, f"annotations[{i}]: 'bbox' is {wrong}, not [x, y, width, height]")
    return truth | {part: [dict(entry) for entry in truth[part]] for part in ("images", "annotations")}


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

    Raises `BadParameter`: other labels than 0 and 1, scores of another shape or that are not finite.
    """
    from sklearn.metrics import average_precision_score  # imported here because it takes a second

    labels = checked("labels", labels, axes=2, low=0, high=1, whole=True).numpy(force=True)
    scores = checked("scores", scores, labels.shape).numpy(force=True)
    found = np.full(labels.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        found[c] = 100 * average_precision_score(labels[:, c], scores[:, c])
    return found
