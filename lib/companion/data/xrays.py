"""Radiographs and fundus images: classes, masks, boxes, reports; PNG, JPEG, TIFF and DICOM.

    image, labels = load("xrays/chestx-ray14", "data", "test")[0]            # float32 (1, 1024, 1024), float32 (14,)
    load("xrays/rsna", "data", "train", task="detection", share="10")[0]     # image, boxes (10, 5)
    reports("xrays/mimic-cxr", "data").texts[0]

`root` is the data folder (`data`). Opening a set reads its list; an image is decoded on access.
xrays_sets.yaml describes the sets.

Images come as one grey channel in 0 to 1: 16-bit images keep their full depth, colours are converted to grey as by PIL
(as in the authors' code also fundus images for classification; for segmentation RIGA keeps its colours), and a DICOM's
window or VOI LUT is applied, MONOCHROME1 inverted, one with a palette refused; see `decoding`. (The authors' loaders
convert 16 bits to 8 by clipping at 255.)
"""

from __future__ import annotations

import ast
import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import download_url
from torchvision.ops import box_convert

from ..errors import BadParameter, CorruptFile, Whole, check_choice, check_names, typed
from ..io.files import atomic
from . import DataSet, check_listed, check_own, facts, find, once, own_set, tables
from .downloads import fetched
from .folders import SPELLED, at, entries, spelled
from .radiographs import Labelled, Masked, PairTransform, Radiographs, Stacked, Transform

_FACTS = facts("xrays")
TASKS: tuple[str, ...] = _FACTS["TASKS"]
CLASSES: dict[str, tuple[str, ...]] = _FACTS["CLASSES"]
"""Names by label, in the order of the columns in the authors' lists; of COVIDx and APTOS, whose lists have class
numbers, the names of the sets' own tables."""
ONE_OF: tuple[str, ...] = _FACTS["ONE_OF"]
"""Sets with one class an image; all others have 0 or 1 for each class."""
SIZES: dict[tuple[str, str], dict[str, int]] = {
    (name, task): lengths for name, by_task in _FACTS["SIZES"].items() for task, lengths in by_task.items()
}
"""Images of each list: the training list for 1, 10 and 100 % of the labels, validation and test. Those of 100 % that
are absent here could not be read; a list of any length is accepted for them."""
REPORTS: tuple[str, ...] = _FACTS["REPORTS"]
WINDOWS: tuple[str, ...] = _FACTS["WINDOWS"]

# the training list for 1, 10 and 100 % of the labels (none is part of a larger one), then validation and test
_SPLITS = {"1": "train_list_1", "10": "train_list_10", "100": "train_list", "val": "val_list", "test": "test_list"}
SPLITS = ("train", "val", "test")
SHARES = ("1", "10", "100")
BOXES = 10  # rows of an image's boxes
BOX_UNIT, RUN_SIDE = 1024, 1024  # pixels of the square in which RSNA's boxes and SIIM's runs are given
_CHESTMNIST = (
    "chestmnist_224.npz",
    "https://zenodo.org/records/10519652/files/chestmnist_224.npz?download=1",
    "45bd33e6f06c3e8cdb481c74a89152aa",
)


def lists(task: str) -> dict[str, str]:
    """The list of each share and split of a task, below a set's folder."""
    return {key: f"{stem}.{'txt' if task == 'classification' else 'csv'}" for key, stem in _SPLITS.items()}


def tasks(name: str) -> tuple[str, ...]:
    """The tasks that a set supports, the usual one first."""
    return tuple(task for task in TASKS if (name, task) in SIZES) or ("pre-training",)


@typed
def rle_mask(runs: str) -> np.ndarray:
    """SIIM's mask (1024, 1024) from one run-length encoded line: start, length, start, ... A start is relative to the
    end of the last run; the mask is filled column by column. "-1" is an empty mask.

    Raises `ValueError`: not pairs of whole numbers, or a run beyond the image.
    """
    flat, numbers = np.zeros(RUN_SIDE**2, bool), np.array([int(n) for n in runs.split()])
    if numbers.tolist() != [-1]:
        if len(numbers) % 2:
            raise ValueError("an odd number of starts and lengths")
        starts, lengths = numbers.reshape(-1, 2).T
        ends = np.cumsum(starts + lengths)
        if numbers.min() < 0 or max(numbers.max(), ends[-1]) > flat.size:  # a sum of large ones would overflow
            raise ValueError(f"its runs, which end at {ends[-1]}, are not inside {flat.size} pixels")
        for end, length in zip(ends, lengths, strict=True):
            flat[end - length : end] = True
    return flat.reshape(RUN_SIDE, RUN_SIDE).T


@typed
def load(
    name: str | DataSet,
    root: str | Path,
    split: str,
    *,
    task: str | None = None,
    share: str = "100",
    transform: Transform | PairTransform | None = None,
    seed: Whole = 0,
) -> Radiographs:
    """One split of a set.

    Args:
        name: a name of `DATASETS` whose task is "xrays", or a `DataSet` of this task.
        root: the data folder.
        split: "train", "val" or "test". For detection on RSNA "test" is the test list; the authors' code reads the
            validation list for it.
        task: "classification", "segmentation" or "detection", where the set has several; the first of them if None.
        share: of "train": "1", "10" or "100" % of the labels.
        transform: of an image; for segmentation of an image and its mask.
        seed: of SIIM's training list, of which as many negatives are drawn as there are positives, as released.

    Returns:
        `Labelled`, of detection with `box_labels`, or `Masked`.

    Raises:
        BadParameter: an unknown name, split, task or share.
        MissingData: the folder, a list or a mask is missing, or its number of images differs from the published one.
        CorruptFile: a malformed line of a list, or a path that leaves the folder; both are in the message.
    """
    dataset = name if isinstance(name, DataSet) else find(name, "xrays")
    name = dataset.name
    key = share if split == "train" else split
    check_choice("split", split, SPLITS)
    check_choice("share", share, SHARES)
    known = TASKS[:3] if dataset.group == "own" else [t for t in tasks(name) if t != "pre-training"]
    task = task or (known[0] if known else "classification")
    if task not in known:
        raise BadParameter("task", task, known or "none: this set is for pre-training, see `reports`")
    if task == "classification" and not dataset.classes:
        raise BadParameter("classes", (), "a name for each label of a line: own(root, classes)")
    if name == "xrays/chestmnist":
        return _chestmnist(dataset, Path(root), split, share, transform)
    usual = dataset.folder(root) / lists(task)[key]
    others = SPELLED[split][1:] if dataset.group == "own" else ()
    path = tables.existing(dataset, root, usual, *(usual.with_name(usual.name.replace(split, o)) for o in others))
    make: Callable[..., Masked]
    make = functools.partial(Masked, dataset, root, transform=transform, listing=path)  # type: ignore[arg-type]
    found: Radiographs
    if task == "classification":
        one = name in ONE_OF
        paths, digits = _labels(path, 1 if one else dataset.classes, dataset.classes if one else 2)
        labels = torch.from_numpy(digits.astype(np.int64 if one else np.float32))
        found = Labelled(dataset, root, paths, labels[:, 0] if one else labels, transform, path)
    elif task == "detection":
        paths, boxes = _boxes(path)
        found = Labelled(dataset, root, paths, box_labels(boxes), transform, path)
    elif name == "xrays/rsna":
        paths, boxes = _boxes(path)
        found = make(paths, functools.partial(_box_mask, boxes))
    elif name == "xrays/siim":
        runs = _runs(path, seed if split == "train" else None)
        paths = [f"train/images/1024/dicom/{image}.png" for image in runs]
        found = make(paths, functools.partial(_run_mask, path, [*runs.items()]))
    else:
        paths, files = tables.columns(path, "img_path", "mask_path")
        masks = Radiographs(dataset, root, files, listing=path)
        check_listed(dataset, masks.root, masks.sources, masks.listing)
        if name == "fundus/riga":
            found = make(paths, masks.grey, finish=_disc_and_cup, colour=True)
        else:
            found = make(paths, functools.partial(_own_mask, masks))
            found.paired = True
    if not len(found):
        raise CorruptFile(path, "lists no image")
    listed = len(set(tables.columns(path, "ImageId", "EncodedPixels")[0])) if name == "xrays/siim" else len(found)
    tables.check_count(dataset, root, listed, SIZES.get((name, task), {}).get(key), f"images in {path.name}")
    return found


@typed
def own(
    root: str | Path, classes: Sequence[str] = (), transform: Callable | None = None, *, task: str = "classification"
) -> dict[str, Any]:
    """Your own images, see `companion.data`, of a task as for `load`; of "pre-training" the `Reports`.

    The lists have the authors' forms: train_list.txt (a path, then 0 or 1 for each class), train_list.csv with
    img_path,mask_path or image_path,bbox (of an image of 1024 pixels), val_list and test_list alike; and pretrain.csv
    with img_path,report and optionally llm_output. A mask has values of 0 and 255, or of 0 and 1.

    Raises as `load`; also `BadParameter`: `classes` are no different names.
    """
    check_names(classes)
    check_choice("task", task, (*TASKS[:3], "pre-training"))
    layout = (
        "{train,val,test}_list.txt    a line: path, then 0 or 1 for each class\n{train,val,test}_list.csv    "
        "img_path,mask_path or image_path,bbox\npretrain.csv                 img_path,report,llm_output"
    )
    dataset, root, found = own_set(root, "xrays", layout, len(classes)), Path(root), dict[str, Any]()
    if task == "pre-training":
        found["train"] = reports(dataset, root, transform)
    else:
        known = spelled(root, entries(root), lists(task)["val"].removeprefix("val"))
        for split in {"train": "", **known}:
            found[split] = load(dataset, root, split, task=task, transform=transform)
    check_own(dataset, root, {split: getattr(data, "images", data).sources for split, data in found.items()})
    return found


@once
def _labels(path: Path, count: int, values: int) -> tuple[Sequence[str], np.ndarray]:
    """The paths of a list, and their labels, uint8 (n, `count`), each below `values`."""
    paths, labels, allowed = list[str](), list[str](), {str(i) for i in range(values)}
    for number, line in enumerate(tables.read_text(path).split("\n"), 1):
        name, *entries = line.rsplit(maxsplit=count) or [""]  # a name may contain blanks
        if not name:
            continue
        if len(entries) != count or not {*entries} <= allowed or name.split()[-1].isdigit():
            raise CorruptFile(path, f"line {number} is not a path and {count} of {sorted(allowed)}: {line[:80]!r}")
        paths.append(name.strip())
        labels += entries
    digits = np.frombuffer("".join(labels).encode(), np.uint8) - ord("0")  # of at most ten classes
    digits.flags.writeable = False
    return tuple(paths), digits.reshape(-1, count)


@once
def _boxes(path: Path) -> tuple[Sequence[str], Sequence[np.ndarray]]:
    paths, boxes = [], []
    for line, row in tables.stream(path, "image_path", "bbox"):
        try:
            found = np.array(ast.literal_eval(row["bbox"]), dtype=np.float64)
            found = found.reshape(-1, 4) if found.size in (0, 4) else found
            if found.shape[1:] != (4,):
                raise ValueError
        except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise CorruptFile(path, f"line {line}: not a list of [x1, y1, x2, y2]: {row['bbox'][:80]!r}") from error
        found = found[found.any(1)]  # [0, 0, 0, 0] means no box
        if len(found) > BOXES:
            raise CorruptFile(path, f"line {line}: {len(found)} boxes; at most {BOXES} are read")
        inside = (found >= 0) & (found <= BOX_UNIT)  # NaN is not
        if wrong := found[~(inside.all(1) & (found[:, 2:] > found[:, :2]).all(1))].tolist():
            wanted = f"x1 < x2 and y1 < y2 in an image of {BOX_UNIT} pixels are expected"
            raise CorruptFile(path, f"line {line}: the box [x1, y1, x2, y2] = {wrong[0]}: {wanted}")
        paths.append(row["image_path"])
        boxes.append(found.astype(np.float32))
        boxes[-1].flags.writeable = False
    return tuple(paths), tuple(boxes)


def box_labels(boxes: Sequence[np.ndarray]) -> Tensor:
    """The boxes of images (n, 10, 5): class 0, centre and size as fractions of the image; padded with zeros.

    Args:
        boxes: of each image, (n, 4) x1, y1, x2, y2 in pixels of a square of `BOX_UNIT`.
    """
    labels = torch.zeros(len(boxes), BOXES, 5)
    for own, corners in zip(labels, boxes, strict=True):
        found = torch.tensor(corners, dtype=torch.float32) / BOX_UNIT
        own[: len(found), 1:] = box_convert(found, "xyxy", "cxcywh")
    return labels


def _box_mask(boxes: Sequence[np.ndarray], i: int) -> Tensor:
    """RSNA: the union of an image's boxes."""
    found = torch.zeros(1, BOX_UNIT, BOX_UNIT)
    for x1, y1, x2, y2 in boxes[i].astype(int):
        found[:, y1:y2, x1:x2] = 1
    return found


def _runs(path: Path, seed: int | None) -> dict[str, list[str]]:
    """SIIM: the run-length lines of each image; with a seed positives, and as many negatives drawn at random."""
    runs: dict[str, list[str]] = {}
    for name, text in zip(*tables.columns(path, "ImageId", "EncodedPixels"), strict=True):
        runs.setdefault(name, []).append(text.strip())
    negative = sorted(name for name in runs if runs[name] == ["-1"])
    if seed is not None:
        count = min(len(runs) - len(negative), len(negative))
        for name in np.random.default_rng(seed).permutation(negative)[count:].tolist():
            del runs[name]
    return runs


def _run_mask(path: Path, runs: Sequence[tuple[str, list[str]]], i: int) -> Tensor:
    name, texts = runs[i]
    try:
        found = np.logical_or.reduce([rle_mask(text) for text in texts])
    except ValueError as error:
        raise CorruptFile(path, f"{name}: {error}") from error
    return torch.from_numpy(found)[None].float()


def _own_mask(masks: Radiographs, i: int) -> Tensor:
    """A mask of 0 and 255, or of 0 and 1, in 0 to 1. Raises `CorruptFile`: other values, but for those that JPEG adds
    to them."""
    mask = masks.grey(i)
    if 0 < mask.max() <= 1.5 / 255:
        mask = mask * 255
    if (wrong := mask[(mask > 0.1 * (mask.max() > 0.9)) & (mask < 0.9)]).numel():
        what = f"it has the value {255 * float(wrong[0]):g} of 255: 0 and 255, or 0 and 1, are expected"
        raise CorruptFile(masks.sources[i], what)
    return mask


def _disc_and_cup(mask: Tensor) -> Tensor:
    """RIGA: disc where a resized mask is not 0, cup where it is 255. As released, for masks resized as 8-bit images:
    values that round to 0 are no disc, values that round to 255 are cup."""
    return torch.cat([mask >= 0.5 / 255, mask >= 254.5 / 255]).float()


def _chestmnist(dataset: DataSet, root: Path, split: str, share: str, transform) -> Labelled:
    """MedMNIST's file. Without published lists, its 1 or 10 % of the training images are every hundredth or tenth."""
    path = tables.existing(dataset, root, dataset.folder(root) / _CHESTMNIST[0])
    try:
        with np.load(path, allow_pickle=False) as file:
            pictures, labels = file[f"{split}_images"], file[f"{split}_labels"]
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        what = f"truncated, or not MedMNIST's file: it has {path.stat().st_size:,} bytes ({error!r}); fetch it again"
        raise CorruptFile(path, what) from error
    known = SIZES[dataset.name, "classification"]["100" if split == "train" else split]
    tables.check_count(dataset, root, len(pictures), known, f"images of '{split}'")
    step = {"1": 100, "10": 10, "100": 1}[share] if split == "train" else 1
    return Stacked(dataset, root, pictures[::step], torch.from_numpy(labels[::step].astype(np.float32)), transform)


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reports:
    """Images and their reports, in the same order.

    Attributes:
        images: item i is the image.
        texts: the reports.
        statements: their distillation by a language model; None if the file has no such column.
        windows: (n, 2) row and column of super-resolution's window; None without the file (it was never released).
    """

    images: Radiographs
    texts: list[str]
    statements: list[str] | None
    windows: Tensor | None


@typed
def reports(name: str | DataSet, root: str | Path, transform: Transform | None = None) -> Reports:
    """The pre-training pairs of a set, from the authors' CSV: img_path,report,llm_output; for OpenI also from its own
    files.

    Raises:
        BadParameter: an unknown name.
        MissingData: no such CSV.
        CorruptFile: missing columns, or a number of windows that differs from the number of images.
    """
    dataset = name if isinstance(name, DataSet) else find(name, "xrays")
    folder = dataset.folder(root)
    path = next((file for file in (at(folder, name) for name in REPORTS) if file.is_file()), None)
    if path is None and dataset.name == "xrays/openi":
        return _openi(dataset, root, transform)
    if path is None:
        raise dataset.missing(root, f"none of {', '.join(REPORTS)} is there")
    paths, texts, statements = _written(path)
    windows, other = None, next((file for file in (at(folder, name) for name in WINDOWS) if file.is_file()), None)
    if other is not None:
        try:
            windows = torch.tensor([[*map(int, column)] for column in tables.columns(other, "label_i", "label_j")]).T
        except ValueError as error:
            raise CorruptFile(other, f"not whole numbers ({error})") from error
        if len(windows) != len(paths):
            raise CorruptFile(other, f"{len(windows)} windows for {len(paths)} images of {path.name}")
    return Reports(Radiographs(dataset, root, paths, transform, path), [*texts], [*statements] or None, windows)


@once
def _written(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Paths, reports and statements of a CSV; of the last none where it has no such column."""
    paths, texts, statements = list[str](), list[str](), list[str]()
    for _, row in tables.stream(path, "img_path", "report"):
        paths.append(row["img_path"])
        texts.append(row["report"])
        if "llm_output" in row:
            statements.append(row["llm_output"])
    if not paths:
        raise CorruptFile(path, "lists no image")
    return tuple(paths), tuple(texts), tuple(statements)


def _openi(dataset: DataSet, root: str | Path, transform: Transform | None) -> Reports:
    """Findings, then impression, of every frontal image; patients without either are left out."""
    files = [dataset.folder(root) / f"indiana_{name}.csv" for name in ("reports", "projections")]
    written, taken = (tables.existing(dataset, root, file) for file in files)
    texts = {
        row["uid"]: " ".join(filter(None, (row[part].strip() for part in ("findings", "impression"))))
        for _, row in tables.rows(written, "uid", "findings", "impression")
    }
    frontal = [row for _, row in tables.rows(taken, "uid", "filename", "projection") if row["projection"] == "Frontal"]
    kept = [(row["filename"], texts[row["uid"]]) for row in frontal if texts.get(row["uid"])]
    paths = [f"images/images_normalized/{file}" for file, _ in kept]
    return Reports(Radiographs(dataset, root, paths, transform, taken), [text for _, text in kept], None, None)


@typed
def write_reports(path: str | Path, paths: Sequence[str], texts: Sequence[str], statements: Sequence[str]) -> Path:
    """Write the CSV that `reports` reads, which the authors did not release; under a temporary name first.

    Args:
        paths: of the images, relative to the set's folder; MIMIC's contain the study, .../s<study_id>/<id>.jpg.
        texts: one report for each.
        statements: one for each; the authors' MIMIC-Vicuna.json has those of MIMIC, according to them by study_id.

    Raises `BadParameter`: the numbers of texts or statements and of paths differ.
    """
    if {len(texts), len(statements)} != {len(paths)}:
        raise BadParameter("texts, statements", (len(texts), len(statements)), f"{len(paths)}, one for each path")
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["img_path", "report", "llm_output"])
        writer.writerows(zip(paths, texts, statements, strict=True))
    return Path(path)


# --- register ---------------------------------------------------------------------------------------------------------


def parts(dataset: DataSet) -> dict[str, Callable[[Path], Any]]:
    """See `companion.data.parts`: the splits of each task, and shares of the training list; or the reports."""
    found: dict[str, Callable[[Path], Any]] = {}
    for task in tasks(dataset.name):
        for key in SIZES.get((dataset.name, task), ()):
            split, share = ("train", key) if key in SHARES else (key, "100")
            read = functools.partial(load, dataset.name, split=split, task=task, share=share)
            found[part_name(task, split, share)] = read
    return found or {"pairs": lambda root: reports(dataset.name, root).images}


def part_name(task: str, split: str, share: str) -> str:
    """The name of a part for `companion.data.status`: "classification test", "segmentation train 10 %"."""
    return f"{task} {split}" + f" {share} %" * (split == "train")


def fetch(dataset: DataSet, root: Path, progress: bool = True) -> None:
    """Download ChestMNIST, the one set here that is free and has a checksum; in a hidden folder first."""
    name, url, md5 = _CHESTMNIST
    with fetched(dataset, root, progress) as new:
        download_url(url, new, name, md5)
