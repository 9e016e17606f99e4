"""Images with boxes in COCO's and LVIS' files, in the splits of open-vocabulary detection.

    test = load("detection/ov-coco", "data", "test")
    image, target = test[0]                # uint8 (3, H, W); target.boxes (n, 4) xyxy, target.labels (n,)
    test.positives                         # (N, C) bool: which classes each image shows
    test.truth                             # the annotations, for `metrics.detection.evaluate`

A class has an index, its rank among the categories sorted by id, and a category id. Opening a set reads its annotations
and checks them; an image is decoded on access. `root` is the data folder; detection_sets.yaml describes the sets and
their splits.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from ..errors import BadParameter, CorruptFile, Share, check_choice, check_names, typed
from ..io.files import read_json
from . import DataSet, check_own, facts, find, once, own_set, tables
from .coco import CAPTION, SCHEMA, Annotations, Fields, arrays, check_fields, failure, is_id, read_annotations
from .folders import at, below, doubled, of_file, told
from .images import Files

_FACTS = facts("detection")
COCO_BASE: dict[str, int] = _FACTS["COCO_BASE"]
"""The 48 base classes of OV-COCO and COCO's category ids."""
COCO_NOVEL: dict[str, int] = _FACTS["COCO_NOVEL"]
"""The 17 novel classes of OV-COCO and COCO's category ids."""
COCO_OTHER: dict[str, int] = _FACTS["COCO_OTHER"]
"""The 15 of COCO's 80 classes that are annotated nowhere in OV-COCO, and COCO's category ids."""
FILES: dict[str, dict[str, tuple[str, ...]]] = _FACTS["FILES"]
"""The annotation file of each split below the set's folder, the usual spelling first."""
IMAGES: dict[str, dict[str, tuple[str, ...]]] = _FACTS["IMAGES"]
"""Where the images of each split may be."""
NAMES_FIX: tuple[str, ...] = _FACTS["NAMES_FIX"]

OV_COCO_BASE, OV_COCO_NOVEL = tuple(COCO_BASE.values()), tuple(COCO_NOVEL.values())
"""Category ids of the 48 and the 17."""

FREQUENCIES = ("r", "c", "f")
LVIS_CLASSES = Path(__file__).with_name("lvis_classes.csv")


class Target(NamedTuple):
    """The annotations of one image."""

    boxes: Tensor  # (n, 4) float32, xyxy, pixels
    labels: Tensor  # (n,) indices of classes
    crowd: Tensor  # (n,) bool: a box around many
    image_id: int | str


class Boxes(Files):
    """Images with boxes, decoded on access: `boxes[i]` is (uint8 (3, H, W), `Target`).

    An image is rotated upright by its EXIF orientation unless only the stored one has the size of its annotation.

    Attributes:
        annotations: those of its file, perhaps also of other images; see `target` for those of one image.
        images, image_ids: the entries of the N images in the annotations, and their ids.
        categories: ids of the C classes; `class_names` are theirs.
        base, novel: category ids with boxes in training, and without but scored. For another vocabulary both are empty.
        positives: (N, C) bool, from the boxes, or from `pos_category_ids` where images have labels only.

    Raises (on indexing) as `images.Files`.
    """

    each = ("sources", "images", "image_ids", "positives", "_ends")

    def __init__(
        self, dataset: DataSet, root: Path, folder: Path, truth: Mapping, base: Sequence[int], novel: Sequence[int]
    ):
        ordered = sorted(truth["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in ordered]
        sources = [str(folder / image["file_name"]) for image in truth["images"]]
        super().__init__(dataset, root, sources)
        self.images, self.classes, self.class_names = truth["images"], len(names), tuple(names)
        self.categories = tuple(category["id"] for category in ordered)
        self.image_ids = tuple(image["id"] for image in truth["images"])
        self.base, self.novel = tuple(base), tuple(novel)
        self.index = {category: i for i, category in enumerate(self.categories)}
        self.annotations: Annotations = truth["annotations"]
        self._categories, found = truth["categories"], self.annotations
        self._order = found.images.argsort(kind="stable").astype(np.int32)  # of the annotations, by image
        self._ends = np.cumsum(np.bincount(found.images, minlength=len(self)))[:, None] + [0, 0]
        self._ends[1:, 0], self._ends[:1, 0] = self._ends[:-1, 1], 0
        self.positives = torch.zeros(len(self), len(names), dtype=torch.bool)
        self.positives[found.images, found.labels] = True
        for row, image in zip(self.positives, truth["images"], strict=True):
            if known := image.get("pos_category_ids"):
                row[:] = False
                row[[self.index[category] for category in known]] = True

    @property
    def truth(self) -> dict[str, list]:
        """{"images", "annotations", "categories"} of this split, in COCO's format, for an evaluation."""
        found, rows = self.annotations, list[dict]()
        ids, boxes, labels = found.ids.tolist(), found.boxes.tolist(), found.labels.tolist()
        areas, crowd = found.areas.tolist(), found.crowd.tolist()
        for index, image in enumerate(self.image_ids):
            for i in self._rows(index).tolist():
                row = {"id": ids[i], "image_id": image, "category_id": self.categories[labels[i]]}
                row |= {"bbox": boxes[i], "iscrowd": int(crowd[i])}
                row |= {} if math.isnan(areas[i]) else {"area": areas[i]}
                rows.append(row | ({"segmentation": found.shape(i)} if found.text else {}))
        return {"images": list(self.images), "annotations": rows, "categories": self._categories}

    def _rows(self, index: int) -> np.ndarray:
        """The numbers of an image's annotations."""
        return self._order[slice(*self._ends[index])]

    def mask(self, categories: Sequence[int]) -> Tensor:
        """(C,) bool: which classes these category ids are, for instance of `boxes.novel`.

        Raises `BadParameter`: an unknown id."""
        for category in categories:
            check_choice("categories", category, self.categories)
        found = torch.zeros(len(self.categories), dtype=torch.bool)
        found[[self.index[category] for category in categories]] = True
        return found

    @property
    def unseen(self) -> Tensor:
        """(C,) bool: the classes without boxes in training, scored or not; the authors' code calls them novel."""
        return ~self.mask(self.base)

    def target(self, index: int) -> Target:
        """The annotations of an image, without opening it."""
        rows, found = self._rows(index), self.annotations
        boxes, labels, crowd = (torch.from_numpy(values[rows]) for values in (found.boxes, found.labels, found.crowd))
        return Target(box_convert(boxes.float(), "xywh", "xyxy"), labels.long(), crowd, self.image_ids[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        stored, upright = self.pixels(index)
        image = self.images[index]
        known = (image["height"], image["width"])
        for found in (upright, stored):  # some tools draw boxes on the stored image
            if known == found.shape[:2]:
                return torch.from_numpy(found).permute(2, 0, 1), self.target(index)
        raise CorruptFile(self.sources[index], f"is {stored.shape[1::-1]} pixels, its annotation has {known[::-1]}")


# --- public functions -------------------------------------------------------------------------------------------------


@typed
def load(name: str, root: str | Path, split: str) -> Boxes:
    """One split of a set: "train" and "test" of "detection/ov-coco" and "detection/ov-lvis", "test" of
    "detection/objects365" and "detection/openimages", and "captions" of OV-COCO: its training images with the classes
    that their captions name, see `caption_labels`.

    Raises:
        BadParameter: unknown name, or a split that the set does not have.
        MissingData: the folder, an annotation file or the images are missing, or not as many as published.
        CorruptFile: an annotation file that is truncated, or has a wrong or missing field, which is named.
    """
    dataset, root = find(name, "detection"), Path(root)
    check_choice("split", split, FILES[dataset.name])
    truth, base, novel = _read(dataset, root, split)
    if not truth["images"]:
        raise dataset.missing(root, f"no image for '{split}': none has a box, or a caption, of a class of this set")
    folder, truth["images"] = _images(dataset, root, split, truth["images"])
    return Boxes(dataset, root, folder, truth, base, novel)


@typed
def own(root: str | Path, novel: Sequence[str] = ()) -> dict[str, Boxes]:
    """Your own images, see `companion.data`: "train", of `root`/annotations.json, a file in COCO's format; the images
    are in `root`/images, or in `root` where that is missing.

    Args:
        novel: names of classes that count as novel; all others are base.

    Raises as `load`; also `CorruptFile`: two categories of one name, two annotations of one id, an image twice, a box
    without a pixel of its image, or no box to learn from; and `BadParameter` for a name that the file does not have.
    """
    dataset = own_set(root, "detection", "annotations.json    in COCO's format\nimages/             or the images here")
    root = Path(root)
    file = tables.existing(dataset, root, root / "annotations.json")
    truth, images = _of_file(file), at(root, "images")
    named = {category["id"]: category["name"] for category in truth["categories"]}
    with of_file(file):
        check_names(named.values())
    rows, listed = truth["annotations"], [(image["width"], image["height"]) for image in truth["images"]]
    sizes = np.array(listed, float)[rows.images]
    corners, sides = np.split(rows.boxes, 2, axis=1)
    outside = ((corners >= sizes) | (corners + sides <= 0) | (sides == 0)).any(1)
    for number in np.flatnonzero(outside)[:1]:
        ends = listed[rows.images[number]]
        what = f"annotations[{number}]: 'bbox' is {rows.boxes[number].tolist()}: no pixel in its image of {ends} pixels"
        raise CorruptFile(file, what)
    if twice := doubled(i for i in rows.ids.tolist() if i is not None):
        raise CorruptFile(file, f"two annotations have the id {twice[0]!r}")
    check_names(novel)
    if unknown := set(novel) - {*named.values()}:
        raise BadParameter("novel", sorted(map(str, unknown)), sorted({*named.values()}))
    held = [i for i, name in named.items() if name in novel]
    folder, base = images if images.is_dir() else root, [i for i in named if i not in held]
    found = Boxes(dataset, root, folder, truth, base, sorted(held))
    if not found.positives[:, found.mask(base)].any():
        raise CorruptFile(file, f"no image has a box of a class that is not novel: {told(novel)}")
    check_own(dataset, root, {"train": found.sources}, file.name)
    return {"train": found}


_parsed = once(read_annotations)


@once
def _captioned(file: Path) -> dict[str, Any]:
    known = {**COCO_BASE, **COCO_NOVEL, **COCO_OTHER}
    categories = [{"id": i, "name": name} for name, i in sorted(known.items(), key=lambda pair: pair[1])]
    return caption_labels(read_json(file), with_synonyms(categories), file)


def _of_file(file: Path, shapes: bool = False, captions: bool = False) -> dict[str, Any]:
    """`read_annotations`, or `caption_labels`, of a file, which is parsed once while it does not change; the lists are
    the caller's own."""
    found = _captioned(file) if captions else _parsed(file, shapes)
    return found | {part: [dict(row) for row in found[part]] for part in ("images", "categories")}


# --- the splits -------------------------------------------------------------------------------------------------------


def ov_coco(instances: Mapping, split: str) -> dict:
    """OV-COCO from COCO's instances: boxes of the 48 base classes in "train", of all 65 in "test", and only images
    that still have one. All 80 categories stay."""
    check_choice("split", split, ("train", "test"))
    return _only(instances, set(OV_COCO_BASE) | (set() if split == "train" else set(OV_COCO_NOVEL)))


def ov_lvis(annotations: Mapping, split: str) -> dict:
    """OV-LVIS from LVIS v1: "train" without the boxes of rare classes and of crowds, and only images that still have
    one, as detectron2's loader leaves them; "test" unchanged."""
    check_choice("split", split, ("train", "test"))
    if split == "test":
        return dict(annotations)
    often = {category["id"] for category in annotations["categories"] if category["frequency"] != "r"}
    return _only(annotations, often, crowds=False)


def _only(truth: Mapping, categories: Container[int], crowds: bool = True) -> dict:
    """The annotations of these categories, with those of crowds or without, and the images that still have one."""
    rows: Annotations = truth["annotations"]
    kept = np.array([i in categories for i in sorted(category["id"] for category in truth["categories"])])[rows.labels]
    rows = rows.part(np.flatnonzero(kept & (crowds | ~rows.crowd)))
    there, rows.images = np.unique(rows.images, return_inverse=True)
    return {**truth, "images": [truth["images"][i] for i in there], "annotations": rows}


@functools.cache
def lvis_categories() -> tuple[dict[str, Any], ...]:
    """The 1203 categories of LVIS v1, as in its files: "id", "name", "frequency", "synonyms".

    "coco" is the id of COCO's category of the same synset, None where there is none.
    """
    rows = [row for _, row in tables.rows(LVIS_CLASSES)]
    return tuple(
        row | {"id": i, "synonyms": row["synonyms"].split(";"), "coco": int(row["coco"] or 0) or None}
        for i, row in enumerate(rows, 1)
    )


def with_synonyms(categories: Sequence[Mapping]) -> list[dict[str, Any]]:
    """COCO's categories with the "synonyms" that LVIS lists for their synsets: of person also man, woman, boy, ..."""
    of = {found["coco"]: found["synonyms"] for found in lvis_categories() if found["coco"]}
    return [{**category, "synonyms": of[category["id"]]} for category in categories]


def caption_labels(captions: Mapping, categories: Sequence[Mapping], file: str | Path | None = None) -> dict:
    """Image labels from COCO's captions, with which Detic and SIC-CADS train on OV-COCO.

    An image has a class when one of its "synonyms", or its name if it has none, occurs between spaces in the image's
    concatenated lower-case captions, also at their start or end, but not as the whole text. Underscores count as
    spaces, and the text after an opening bracket is removed. Images without any class are dropped.

    Args:
        captions: COCO's captions file: "images", "annotations" with "image_id" and "caption".
        categories: with "id", "name", and optionally "synonyms"; COCO's from `with_synonyms`.

    Returns:
        {"images" with `pos_category_ids`, "annotations" that are none, "categories"}.

    Raises `CorruptFile` with the name of their `file`, `BadParameter` without one: not COCO's format; entry and field
    are named.
    """
    wrong = functools.partial(failure, "captions", "COCO's captions", file)
    known: Fields = SCHEMA["images"] if file else {"id": is_id}
    for part, fields in {"images": known, "annotations": CAPTION}.items():
        rows = captions.get(part) if isinstance(captions, Mapping) else None
        if not isinstance(rows, list):
            raise wrong(f"not COCO's format: no list '{part}'")
        check_fields(rows, part + "[{}]", fields, wrong)
    written: dict[object, list[str]] = {}
    for annotation in captions["annotations"]:
        written.setdefault(annotation["image_id"], []).append(annotation["caption"].lower())
    words = {c["id"]: [_in_words(n) for n in c.get("synonyms") or [c["name"]]] for c in categories}
    images = []
    for image in captions["images"]:
        text = " ".join(written.get(image["id"], ()))
        found = [c for c, names in words.items() if any(name != text and f" {name} " in f" {text} " for name in names)]
        if found:
            images.append({**image, "pos_category_ids": found})
    return {"images": images, "annotations": arrays([], {}, {}, wrong), "categories": list(categories)}


def _in_words(name: str) -> str:
    """A class name of LVIS as it occurs in captions: "bat_(animal)" is "bat"."""
    return name.partition("(")[0].replace("_", " ").strip().lower()


@typed
def repeat_factors(boxes: Boxes, threshold: Share = 0.001) -> np.ndarray:
    """How often each image is used in an epoch (N,): LVIS' repeat-factor sampling.

    max(1, sqrt(threshold / f_c)) for its rarest class c, where f_c is the share of images with that class.

    Raises `BadParameter`: a threshold outside 0 to 1.
    """
    share = boxes.positives.float().mean(0)
    each = (threshold / share.clamp_min(1e-12)).sqrt().clamp_min(1)
    return torch.where(boxes.positives, each, 1.0).amax(1).numpy()


# --- implementation ---------------------------------------------------------------------------------------------------


def _read(dataset: DataSet, root: Path, split: str) -> tuple[dict, Sequence[int], Sequence[int]]:
    """The annotations of a split, and the category ids of base and novel classes."""
    folder = dataset.folder(root)
    file = tables.existing(dataset, root, *(folder / name for name in FILES[dataset.name][split]))
    if split == "captions":
        return _of_file(file, captions=True), OV_COCO_BASE, OV_COCO_NOVEL
    found = _of_file(file)
    tables.check_count(dataset, root, len(found["images"]), dataset.sizes.get(split), f"images in {file}")
    ids = [category["id"] for category in found["categories"]]
    if dataset.classes and len(ids) != dataset.classes:
        raise CorruptFile(file, f"{len(ids)} categories, {dataset.classes} are expected")
    if dataset.name == "detection/ov-coco":
        named = {category["name"]: category["id"] for category in found["categories"]}
        if wrong := [name for name, i in {**COCO_BASE, **COCO_NOVEL, **COCO_OTHER}.items() if named.get(name) != i]:
            raise CorruptFile(file, f"the categories {wrong[:5]} have not COCO's ids")
        return ov_coco(found, split), OV_COCO_BASE, OV_COCO_NOVEL
    if dataset.name == "detection/ov-lvis":
        often: Fields = {"frequency": lambda value: value in FREQUENCIES}
        check_fields(found["categories"], "categories[{}]", often, functools.partial(CorruptFile, file))
        rare = {category["id"] for category in found["categories"] if category["frequency"] == "r"}
        return ov_lvis(found, split), sorted({*ids} - rare), sorted(rare)
    if dataset.name == "detection/objects365":
        return _renamed(found, folder, file), (), ()
    return found, (), ()


def _renamed(found: Mapping, folder: Path, file: Path) -> dict:
    """Objects365 with corrected names, if the table exists and the file is not corrected already."""
    table = next((folder / name for name in NAMES_FIX if (folder / name).is_file()), None)
    if table is None or "fixname" in file.name:
        return dict(found)
    try:
        names = {int(number): name.strip() for number, _, name, *_ in csv.reader(tables.lines(table))}
    except ValueError as error:
        raise CorruptFile(table, f"lines 'id,old name,new name' were expected ({error})") from error
    categories = [{**category, "name": names.get(category["id"], category["name"])} for category in found["categories"]]
    return {**found, "categories": categories}


def _images(dataset: DataSet, root: Path, split: str, images: Sequence[Mapping]) -> tuple[Path, list[Mapping]]:
    """The image folder, the first known one that has the first and the last image, and the images, named below it.

    It is searched below the set's folder, the folders that it is in, and those in it. A path in the annotations may
    begin with folders that the copy does not have: those of an archive.
    """
    folder = dataset.folder(root)
    bases = [folder, *folder.parents[: len(folder.relative_to(root).parts)], *below(folder)]
    places = list(dict.fromkeys(at(base, place) for base in bases for place in IMAGES[dataset.name][split]))
    ends = [PurePath(images[i]["file_name"]).parts for i in (0, -1)]
    for skipped in range(min(map(len, ends))):
        for place in itertools.chain(places, *map(below, places)):
            if all(place.joinpath(*parts[skipped:]).is_file() for parts in ends):
                if not skipped:
                    return place, list(images)
                named = ("/".join(PurePath(image["file_name"]).parts[skipped:]) for image in images)
                return place, [{**image, "file_name": name} for image, name in zip(images, named, strict=True)]
    where, wanted = " or ".join(str(place) for place in places if place.is_dir()), " and ".join(map("/".join, ends))
    raise dataset.missing(root, f"the annotations list {wanted}, which are not both in {where or places[0]}")
