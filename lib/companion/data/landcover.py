"""Aerial and satellite images with a class for each pixel and their location.

    train = load("landcover/openearthmap", "data", "train")
    image, labels = train[0]          uint8 (3, H, W); int64 (H, W), 0 ... C - 1, and C where unknown
    train.zones()[0]                  "Cfb"; None for an unknown location
    own("my_area", ["field", "wood"])["train"]    your own GeoTIFFs

Opening a set lists its files; an image is decoded on access, of a large image only the window. Codes on disk
are mapped to training labels; unknown, border and padding pixels are ignored in training and in scores.
landcover_sets.yaml describes the sets.
"""

from __future__ import annotations

import colorsys
import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive

from ..errors import BadParameter, CorruptFile, Count, check_choice, check_names, check_range, typed
from . import DataSet, Parts, climate, facts, find, own_set, tables
from .climate import TABLE, Place, read_places
from .downloads import fetched
from .folders import at, check_apart, entries, of_file, spelled
from .rasters import SUFFIXES, Raster

OEM, LOVEDA, POTSDAM = "landcover/openearthmap", "landcover/loveda", "landcover/potsdam"
UAVID = "landcover/uavid"
_FACTS = facts("landcover")
CLASSES: dict[str, dict[str, tuple[int, int, int]]] = _FACTS["CLASSES"]
"""By set, the classes in the order of their training labels, with the colour (red, green, blue) of each.

The label after the last class is ignored in training and scores: unknown, no data, border, padding."""
LEFT_OUT: dict[str, tuple[int, ...]] = _FACTS["LEFT_OUT"]
"""Classes excluded from the means of the scores; their pixels still count for the other classes (section 7)."""
XBD: tuple[str, ...] = _FACTS["XBD"]
"""Regions of OpenEarthMap whose images come from xBD."""
LOVEDA_FILES: dict[str, str] = _FACTS["LOVEDA_FILES"]
"""Zip files of Zenodo record 5706578 and their MD5."""
POTSDAM_TILES: dict[str, tuple[str, ...]] = _FACTS["POTSDAM_TILES"]
POTSDAM_LABELS: dict[str, tuple[str, ...]] = _FACTS["POTSDAM_LABELS"]
"""The folders of the labels, by version."""
POTSDAM_FAULTY: str = _FACTS["POTSDAM_FAULTY"]
"""The tile with wrong labels, not used to train MetaSegNet: its author's papers exclude it."""
TO_LOVEDA: dict[str, str] = _FACTS["TO_LOVEDA"]
"""RECONSTRUCTION (section 7). OpenEarthMap's classes mapped to LoveDA's, for the cross-dataset test."""

SPLITS = ("train", "val", "test")
MOST = 255  # classes: one value of a byte is ignored
LOOKED_AT = 8  # label files of one's own, for the codes in them
LABELS = {"full": "", "eroded": "_noBoundary"}  # of Potsdam: the ending of their names
PADDINGS = ("ignored", "impervious")
TILE = 1024  # side in pixels of the windows of Potsdam's tiles and UAVid's frames
FLIPS: dict[str, tuple[int, ...]] = {"": (), "left-right": (-1,), "upside down": (-2,)}
ENDINGS = ("", "_mask", "_label", "_labels", "_gt")  # endings of the names of users' label files
COAST = 3  # cells of the map, about 3 km each: maximum distance of a location on water from the nearest land
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AerialImage:
    """An image file, its labels (None where they are withheld) and its region."""

    image: Path
    label: Path | None
    region: str


class LandCover(Parts, Dataset):
    """Map-style: images and labels, whole or by windows.

    Attributes:
        pictures, places: the files, and the table by region (for your own images also by file name).
        classes: their names; `ignore` is the label after the last one. `palette`: one colour each.
        left_out: classes excluded from the means of the scores.
        absent: regions left out, those of xBD.
        windows: (image, top, left, flip) of each item; mirrored by `flip` (see `FLIPS`).

    Args:
        decode: reads a window of a label file as training labels (`earth`, `loveda`, `colours`, `plain_or_coloured`).
        size: side of the windows in pixels, at a distance of `stride` (None: `size`). None: whole images.
        pad: pad windows at the edges with black, ignored pixels; otherwise they are smaller.
        before: pad at the top and the left, as in GeoSeg's tool, instead of at the bottom and the right.
        padding: label of the padding; None: ignored.
        mirrored: each image has its windows three times: unchanged, mirrored left-right, and upside down.
        transform: of the pair; None: unchanged.
    """

    each = ("windows",)

    @typed
    def __init__(
        self,
        dataset: DataSet,
        pictures: Sequence[AerialImage],
        palette: Mapping[str, tuple[int, int, int]],
        decode: Callable[..., np.ndarray],
        places: Mapping[str, Place] | None = None,
        *,
        size: Count | None = None,
        stride: Count | None = None,
        pad: bool = True,
        before: bool = False,
        padding: int | None = None,
        mirrored: bool = False,
        transform: Transform | None = None,
        absent: Sequence[str] = (),
    ):
        self.dataset, self.pictures, self.places = dataset, list(pictures), dict(places or {})
        self.classes, self.palette, self.decode = list(palette), list(palette.values()), decode
        self.ignore, self.left_out, self.absent = len(palette), LEFT_OUT.get(dataset.name, ()), list(absent)
        self.size, self.pad, self.transform = size, pad, transform
        self.padding = self.ignore if padding is None else padding
        self.windows = [(i, 0, 0, "") for i in range(len(self.pictures))]
        self._zones: dict[int, str | None] = {}  # by picture, looked up when asked for
        if size is None and stride is not None:
            raise BadParameter("stride", stride, "None without a size")
        if size is not None:
            self.windows = []
            for i, picture in enumerate(self.pictures):
                with Raster(picture.image) as raster:
                    tops, lefts = (range(-(-n % size) if before else 0, n, stride or size) for n in raster.size)
                flips = FLIPS if mirrored else [""]
                self.windows += [(i, top, left, flip) for flip in flips for top in tops for left in lefts]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.pair(index)
        if self.transform is None:
            return image, labels
        image, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, h, w) and labels int64 (h, w) before any transform.

        Raises `CorruptFile`: a file cannot be read, or the labels have another size or an unknown code."""
        i, *corner, flip = self.windows[index]
        picture, starts, lengths, around = self.pictures[i], list[int](), list[int](), list[tuple[int, int]]()
        with Raster(picture.image) as raster:
            for axis, first, side in zip((-2, -1), corner, raster.size, strict=True):
                end = first + (self.size or side)
                inside = range(max(first, 0), min(end, side))  # lines of the mirrored image
                starts.append(side - inside.stop if axis in FLIPS[flip] else inside.start)  # the same, in the file
                lengths.append(len(inside))
                around.append((inside.start - first, end - inside.stop if self.pad else 0))
            window = (*starts, *lengths)
            image = raster.read(*window)
            labels = np.full(lengths, self.ignore)
            if picture.label is not None:
                with Raster(picture.label) as truth:
                    if truth.size != raster.size:
                        raise CorruptFile(picture.label, f"it is {truth.size}, its image {raster.size}")
                    labels = self.decode(truth, *window)
            if self.dataset.group == "own":  # no-data pixels of the file; the sets' labels mark them already
                labels = np.where(raster.valid(*window), labels, self.ignore)
        image = np.pad(np.flip(image, FLIPS[flip]), [(0, 0), *around])
        labels = np.pad(np.flip(labels, FLIPS[flip]), around, constant_values=self.padding)
        return torch.from_numpy(image), torch.from_numpy(labels)

    def picture(self, index: int) -> AerialImage:
        """The file of an item."""
        return self.pictures[self.windows[index][0]]

    @property
    def sources(self) -> list[str]:
        """The image file of each item."""
        return [str(self.picture(i).image) for i in range(len(self))]

    def where(self, keep: Sequence[bool]) -> LandCover:
        """The items for which `keep` is true, such as those of some zones; raises `BadParameter` when none is left, or
        `keep` has not a value for each."""
        if np.shape(keep) != (len(self),) or not any(keep):
            raise BadParameter("keep", keep, f"True or False for each of {len(self)} items, and one True")
        return self.part(np.flatnonzero(keep).tolist())

    def zones(self) -> list[str | None]:
        """The climate zone of each item; None where the location is unknown, or is sea on the map.

        The zone in the table of locations has priority, then the image's georeference, then the coordinates in the
        table."""
        numbers = [i for i, *_ in self.windows]
        self._zones |= {i: self._zone(self.pictures[i]) for i in {*numbers} - self._zones.keys()}
        return [self._zones[i] for i in numbers]

    def texts(self) -> list[str | None]:
        """The user's text for each item, from the column `text` of the table of locations; None without one."""
        return [self._place(self.picture(i)).text for i in range(len(self))]

    def _place(self, picture: AerialImage) -> Place:
        return self.places.get(picture.image.stem) or self.places.get(picture.region) or Place()

    def _zone(self, picture: AerialImage) -> str | None:
        said = self._place(picture)
        if said.zone is not None:
            return said.zone
        with Raster(picture.image) as raster:
            found = climate.zone(*(raster.place or (said.latitude, said.longitude)), reach=COAST)
        return None if found == climate.OCEAN else found


# --- public functions -------------------------------------------------------------------------------------------------


@typed
def load(
    name: str,
    root: str | Path,
    split: str = "train",
    *,
    labels: str | None = None,
    without_xbd: bool = False,
    mirrored: bool = False,
    padding: str = "ignored",
    size: Count | None = None,
    stride: Count | None = None,
    transform: Transform | None = None,
) -> LandCover:
    """A split of a set.

    Args:
        name: a name of `DATASETS` whose task is "landcover".
        root: the data folder.
        split: "train", "val" or "test"; Potsdam has no "val". Withheld labels are all ignored.
        labels: for Potsdam "full" or "eroded"; None: full for training, eroded for testing, as in GeoSeg.
        mirrored: for Potsdam: see `LandCover`.
        padding: for Potsdam: "ignored", or "impervious", the label that GeoSeg's tool assigns by mistake.
        without_xbd: for OpenEarthMap: leave out the images of xBD's regions, present or not; `absent` names them.
        size, stride, transform: see `LandCover`; Potsdam's tiles and UAVid's frames are read by 1,024 pixels unless
            `size` is given, Potsdam's padded at the top and the left.

    Raises `BadParameter`, `MissingData`, `CorruptFile`, `CompanionError`, with the change or download needed.
    """
    dataset, root = find(name, "landcover"), Path(root)
    check_choice("split", split, POTSDAM_TILES if name == POTSDAM else SPLITS)
    if name != POTSDAM and (labels or mirrored or padding != "ignored"):
        raise BadParameter("labels, mirrored, padding", (labels, mirrored, padding), "None: only Potsdam has them")
    check_choice("padding", padding, PADDINGS)
    if not dataset.folder(root).is_dir():
        raise dataset.missing(root)
    pictures, absent = _pictures(dataset, root, split, labels, without_xbd)
    options: dict[str, Any] = {"size": size, "stride": stride, "transform": transform, "absent": absent}
    decode: Callable[..., np.ndarray] = earth
    places: dict[str, Place] = {}
    if name == LOVEDA:
        decode, places = loveda, dict.fromkeys(("urban", "rural"), Place(*climate.PLACES["LoveDA"][0][1:]))
    elif name == POTSDAM:
        decode, places = colours, {"potsdam": Place(*climate.PLACES["Potsdam"][0][1:])}
        options |= {"size": size or TILE, "before": True, "mirrored": mirrored}
        options["padding"] = None if padding == "ignored" else 0
    elif name == UAVID:
        decode = functools.partial(plain_or_coloured, tuple(CLASSES[UAVID].values()))
        options["size"] = size or TILE
    else:
        table = dataset.folder(root) / "places.csv"
        places = read_places(table if table.is_file() else TABLE)
    return LandCover(dataset, pictures, CLASSES[name], decode, places, **options)


@typed
def own(
    root: str | Path,
    classes: Sequence[str] | Mapping[str, tuple[int, int, int]],
    transform: Transform | None = None,
    *,
    size: Count | None = None,
    stride: Count | None = None,
) -> dict[str, LandCover]:
    """Your own images, see `companion.data`: "all", and those listed in `<split>.txt`, one file name per line; without
    train.txt "train" is all that no list names.

    images/*.tif (or .png, .jpg with a world file), uint8, and labels/ with the same names. A label file has one band,
    in which 0 is the first of `classes` and codes beyond the last are ignored, or three bands with the colours of
    `classes`, in which black is ignored; a warning says so where the first few hold 0 and 255 alone in their middle.
    Its name is the image's, with or without one of `ENDINGS`. An image may have no label file; no-data pixels of the
    image are ignored. The location is the image's georeference, or else given by `places.csv` next to the folders, with
    the column `image` (a name with or without its ending) and any of latitude, longitude, zone, text.

    Args:
        classes: names, or name -> colour (red, green, blue), such as `read_classes` gives.
        size, stride: see `LandCover`; windows at the edges are smaller.

    Raises as `load`.
    """
    palette = _palette(classes)
    layout = (
        "images/*.tif    uint8, red, green, blue\nlabels/*.tif    optional: one band, the same names\n"
        "places.csv      optional: image,latitude,longitude,zone,text\n{train,val,test}.txt    optional: file names"
    )
    dataset, root = own_set(root, "landcover", layout, len(palette)), Path(root)
    files, labels = (_by_stem(at(root, folder)) for folder in ("images", "labels"))
    if not files:
        raise dataset.missing(root, "no images in images/")
    label_of = {s: next((labels[s + end] for end in ENDINGS if s + end in labels), None) for s in files}
    bare = [stem for stem, label in label_of.items() if label is None]
    if bare and (stray := sorted({*labels.values()} - {*label_of.values()}, key=str)):
        ways = f"its name, or that and {', '.join(ENDINGS[1:])}, is expected"
        raise CorruptFile(stray[0], f"it labels no image of images/, and {bare[0]} has no label: {ways}")
    if lossy := [path for path in labels.values() if path.suffix.lower() in (".jpg", ".jpeg")]:
        raise CorruptFile(lossy[0], "JPEG changes the values of labels: save them as PNG or TIFF")
    pictures = {path.name: AerialImage(path, label_of[path.stem], path.stem) for path in files.values()}
    table = at(root, "places.csv")
    places = read_places(table) if table.is_file() else {}
    first = [label for label in label_of.values() if label is not None][:LOOKED_AT]
    if _codes(first) == {0, MOST}:
        told = f"in the middle of {first[0]} and all of the first {len(first)} there is 0 and {MOST}, which is ignored"
        warnings.warn(f"{told}: where {MOST} means {list(palette)[1]!r}, write it as 1", stacklevel=3)
    if unknown := places.keys() - files.keys():
        raise CorruptFile(table, f"no image of images/ is called {min(unknown)!r}")
    decode = functools.partial(plain_or_coloured, tuple(palette.values()))
    options: dict[str, Any] = {"size": size, "stride": stride, "pad": False, "transform": transform}
    listed = {split: tables.names(root / name) for split, name in spelled(root, entries(root), ".txt").items()}
    known = {name for names in listed.values() for name in names}
    if lost := known - pictures.keys():
        raise dataset.missing(root, f"images/{min(lost)} is not there")
    chosen = {"train": [name for name in pictures if name not in known]} | listed
    check_apart({split: [str(pictures[name].image) for name in names] for split, names in chosen.items()})
    found = {}
    for split, names in ({"all": [*pictures]} | chosen).items():
        if not names:
            raise dataset.missing(root, f"no image is left for '{split}'")
        found[split] = LandCover(dataset, [pictures[n] for n in names], palette, decode, places, **options)
    return found


@typed
def read_classes(root: str | Path) -> dict[str, tuple[int, int, int]]:
    """The classes of your own images from `classes.txt`: one name per line, optionally with its colour, "field 75 181
    73".

    Raises `CorruptFile` with the faulty line."""
    path = Path(root) / "classes.txt"
    found: dict[str, tuple[int, int, int]] = {}
    for i, line in enumerate(tables.lines(path)):
        ((name, *colour),) = re.findall(r"^(.*?)(?:\s(\d+)\s+(\d+)\s+(\d+))?$", line)
        red, green, blue = map(int, colour) if colour[0] else _colour(i)
        if name in found:
            raise CorruptFile(path, f"{line!r} is not a new name")
        found[name] = red, green, blue
    with of_file(path):
        return _palette(found)


def _palette(classes: Sequence[str] | Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    """The colour of each class. Raises `BadParameter`: fewer than two names, one twice, or no colours that differ."""
    check_names(classes)
    check_range("classes", len(classes), 2, MOST)
    if not isinstance(classes, Mapping):
        return {name: _colour(i) for i, name in enumerate(classes)}
    colours = [*classes.values()]
    for colour in colours:
        known = isinstance(colour, tuple | list) and len(colour) == 3 and {*colour} <= {*range(256)} and any(colour)
        if not known or colours.count(colour) > 1:
            raise BadParameter("classes", colour, "a colour of its own for each, of numbers from 0 to 255, not black")
    return dict(classes)


def label_values(data: LandCover) -> dict[tuple[tuple[int, ...], int], int]:
    """Pixels by (value on disk, training label), sorted, over all label files of a set.

    A value is (class number,), or (red, green, blue) where a label file has three bands. The training label is the
    index in `data.classes`, or `data.ignore`. Files are read by windows: memory does not grow with an image's height.

    Raises `CorruptFile`: a label has a code or colour that its set does not know."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for path in [picture.label for picture in data.pictures if picture.label is not None]:
        with Raster(path) as truth:
            bands = (1, 2, 3) if truth.bands > 2 else (1,)
            for top in range(0, truth.size[0], TILE):
                window = (top, 0, min(TILE, truth.size[0] - top), truth.size[1])
                keys = data.decode(truth, *window)  # label, then a byte for each band
                for band in truth.raw(bands, *window):
                    keys = keys << 8 | band
                for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
                    label, value = divmod(int(key), 256 ** len(bands))
                    found[tuple(value.to_bytes(len(bands), "big")), label] += int(count)
    return dict(sorted(found.items()))


# --- labels on disk to training labels --------------------------------------------------------------------------------


def _shifted(classes: int, truth: Raster, *window: int) -> np.ndarray:
    codes = truth.raw((1,), *window)[0].astype(np.int64)
    if codes.max() > classes:
        raise CorruptFile(truth.path, f"it has the code {codes.max()}; 0 to {classes} are known")
    return np.where(codes == 0, classes, codes - 1)


earth = functools.partial(_shifted, 8)
"""OpenEarthMap: 0 is unknown, 1 to 8 the classes."""
loveda = functools.partial(_shifted, 7)
"""LoveDA: 0 is no data, 1 to 7 the classes."""

# a colour is a corner of the RGB cube, 4 red + 2 green + blue; 5, magenta, is not used
_CORNERS = np.array([6, 1, 3, 2, 5, -1, 4, 0])


def colours(truth: Raster, *window: int) -> np.ndarray:
    """Potsdam: colours; black, the borders of the eroded version, is ignored. Nearby shades count as the colour."""
    raw = truth.raw((1, 2, 3), *window) > 127
    labels = _CORNERS[4 * raw[0] + 2 * raw[1] + raw[2]]
    if (labels < 0).any():
        raise CorruptFile(truth.path, "it has pixels of a colour that is no class of Potsdam")
    return labels


def plain_or_coloured(palette: Sequence[tuple[int, int, int]], truth: Raster, *window: int) -> np.ndarray:
    """Your own labels: class numbers, of which those beyond the last are ignored, or three bands with the classes'
    colours, in which black is ignored."""
    if truth.bands < 3:
        return np.minimum(truth.raw((1,), *window)[0], len(palette)).astype(np.int64)
    raw = truth.read(*window)
    labels = np.where(raw.any(0), -1, len(palette))
    for i, colour in enumerate(palette):
        labels[(raw == np.array(colour)[:, None, None]).all(0)] = i
    if (labels < 0).any():
        wrong = tuple(raw[:, labels < 0][:, 0].tolist())
        way = "one band of class numbers, or the colours of the classes, are expected"
        raise CorruptFile(truth.path, f"it has three bands and pixels of the colour {wrong}, which no class has: {way}")
    return labels


# --- called by `companion.data` ---------------------------------------------------------------------------------------


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`: each zip that is not there, verified."""
    for part, md5 in LOVEDA_FILES.items():
        if not (dataset.folder(root) / part).is_dir():
            with fetched(dataset, root, progress) as new:
                url = f"https://zenodo.org/records/5706578/files/{part}.zip"
                download_and_extract_archive(url, str(new), filename=f"{part}.zip", md5=md5)


def _codes(labels: Sequence[Path]) -> set[int]:
    """The values in the middle of label files of one band, up to the first file with others than 0 and `MOST`; of
    colours none."""
    found = set[int]()
    for path in labels:
        with Raster(path) as raster:
            if raster.bands >= 3 or found - {0, MOST}:
                break
            sides = [min(side, TILE) for side in raster.size]
            starts = ((whole - side) // 2 for whole, side in zip(raster.size, sides, strict=True))
            found |= {*np.unique(raster.raw((1,), *starts, *sides)).tolist()}
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in SUFFIXES)


def _by_stem(folder: Path) -> dict[str, Path]:
    """The files by name without ending. Raises `CorruptFile`: two of one name."""
    found = dict[str, Path]()
    for path in _files(folder):
        if found.setdefault(path.stem, path) != path:
            raise CorruptFile(path, "another file has the same name: an image has one label and one map")
    return found


def _pictures(
    dataset: DataSet, root: Path, split: str, labels: str | None, without_xbd: bool
) -> tuple[list[AerialImage], list[str]]:
    """The images of a split, and the regions left out."""
    folder, absent = dataset.folder(root), set[str]()
    if dataset.name == OEM:
        names = tables.names(tables.existing(dataset, root, folder / f"{split}.txt"))
        listed = [
            AerialImage(at(folder, f"{region}/images/{name}"), at(folder, f"{region}/labels/{name}"), region)
            for name, region in ((name, name.rpartition("_")[0]) for name in names)
        ]
        pictures = [picture for picture in listed if not (without_xbd and picture.region in XBD)]
        absent = {picture.region for picture in listed} - {picture.region for picture in pictures}
        if needed := [picture.region for picture in pictures if not picture.image.is_file()]:
            how = " (compile xBD's in with data.xbd.compile_xbd, or without_xbd=True)" if {*needed} & {*XBD} else ""
            detail = f"{len(needed)} images of {split}.txt in {', '.join(sorted({*needed}))}{how}"
            raise dataset.missing(root, detail)
    elif dataset.name == POTSDAM:
        pictures = _potsdam(folder, split, labels or {"train": "full", "test": "eroded"}[split])
    else:
        if dataset.name == LOVEDA:
            kinds = "images_png", "masks_png"
            scenes = [at(folder, f"{split.capitalize()}/{scene}") for scene in ("Rural", "Urban")]
        else:
            kinds, top = ("Images", "Labels"), at(folder, f"uavid_{split}")
            scenes = [top / name for name in sorted(entries(top, folders=True), key=lambda name: (len(name), name))]
        pictures = [
            AerialImage(image, at(scene, kinds[1]) / image.name, scene.name.lower())
            for scene in scenes
            for image in _files(at(scene, kinds[0]))
        ]
    tables.check_count(dataset, root, len(pictures), dataset.sizes.get(split), f"images of '{split}'")
    if split == "test" and dataset.name != POTSDAM:  # the labels are withheld
        pictures = [p if p.label and p.label.is_file() else AerialImage(p.image, None, p.region) for p in pictures]
    if gone := [path for p in pictures for path in (p.image, p.label) if path and not path.is_file()]:
        raise dataset.missing(root, f"{len(gone)} files of '{split}', the first: {gone[0]}")
    return pictures, sorted(absent)


def _potsdam(folder: Path, split: str, kind: str) -> list[AerialImage]:
    """The tiles as released, or in GeoSeg's folders; the first of these that exists."""
    check_choice("labels", kind, LABELS)
    images = at(folder, "2_Ortho_RGB", "4_Ortho_RGBIR", f"{split}_images")
    bands, found = "RGBIR" if images.name.lower().endswith("ir") else "RGB", []
    masks = [mask for mask in POTSDAM_LABELS[kind] if split == "train" or "participants" not in mask]
    masks += [f"{split}_masks{'_eroded' if kind == 'eroded' else ''}", ""]
    for tile in POTSDAM_TILES[split]:
        name = f"top_potsdam_{tile}_label{LABELS[kind]}.tif"
        label = at(folder, *(str(Path(mask, name)) for mask in masks))
        found.append(AerialImage(at(images, f"top_potsdam_{tile}_{bands}.tif"), label, "potsdam"))
    return found


def _colour(index: int) -> tuple[int, int, int]:
    """A colour for a class that has none."""
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(index * 0.618 % 1, 0.65, 0.9))
    return red, green, blue
