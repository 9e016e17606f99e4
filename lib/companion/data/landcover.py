"""Aerial and satellite images with a class for each pixel and their location.

    train = load("landcover/openearthmap", "data", "train")
    image, labels = train[0]          uint8 (3, H, W); int64 (H, W), 0 ... C - 1, and C where unknown
    train.zones()[0]                  "Cfb"; None for an unknown location
    own("my_area", ["field", "wood"]) your own GeoTIFFs

Opening a set lists its files; an image is decoded on access, of a large image only the window. Codes on disk
are mapped to training labels; unknown, border and padding pixels are ignored in training and in scores.
`landcover_sets` describes the sets, `landcover_transforms` the augmentation.
"""

from __future__ import annotations

import colorsys
import csv
import functools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive

from ..errors import BadParameter, CorruptFile, check_choice
from ..ops.files import atomic
from . import DataSet, Parts, Status, climate, downloading, find, own_set
from .landcover_sets import CLASSES, LEFT_OUT, LOVEDA, LOVEDA_FILES, OEM, POTSDAM, POTSDAM_TILES, UAVID, XBD
from .rasters import SUFFIXES, Raster, quiet

SPLITS = ("train", "val", "test")
LABELS = ("full", "eroded")
PADDINGS = ("ignored", "impervious")
TILE = 1024  # side in pixels of the windows of Potsdam's tiles and UAVid's frames
FLIPS: dict[str, tuple[int, ...]] = {"": (), "left-right": (-1,), "upside down": (-2,)}
ENDINGS = ("_mask", "_label", "_labels", "_gt")  # endings of the names of users' label files
PLACES = Path(__file__).with_name("openearthmap_places.csv")
COAST = 3  # cells of the map, about 3 km each: maximum distance of a location on water from the nearest land
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Picture:
    """An image file, its labels (None where they are withheld) and its region."""

    image: Path
    label: Path | None
    region: str


@dataclass(frozen=True)
class Place:
    """A table's entry for a region or an image; missing values are None."""

    latitude: float | None = None
    longitude: float | None = None
    zone: str | None = None
    text: str | None = None


class LandCover(Parts, Dataset):
    """Map-style: images and labels, whole or by windows.

    Attributes:
        images, places: the files, and the table by region (for your own images also by file name).
        classes: their names; `ignore` is the label after the last one. `palette`: one colour each.
        left_out: classes excluded from the means of the scores.
        absent: regions left out because xBD's images are missing.
        windows: (image, top, left, flip) of each item if `size` is given; mirrored by `flip` (see `FLIPS`).

    Args:
        decode: maps labels as on disk, and the image, to training labels (see `earth`, `loveda`, `colours`, `plain`).
        size: side of the windows in pixels, at a distance of `stride` (None: `size`). None: whole images.
        pad: pad windows at the edges with black, ignored pixels; otherwise they are smaller.
        before: pad at the top and the left, as in GeoSeg's tool, instead of at the bottom and the right.
        padding: label of the padding; None: ignored.
        mirrored: each image has its windows three times: unchanged, mirrored left-right, and upside down.
        transform: of the pair; None: unchanged.
    """

    def __init__(
        self,
        dataset: DataSet,
        pictures: Sequence[Picture],
        palette: Mapping[str, tuple[int, int, int]],
        decode: Callable[..., np.ndarray],
        places: Mapping[str, Place] | None = None,
        *,
        size: int | None = None,
        stride: int | None = None,
        pad: bool = True,
        before: bool = False,
        padding: int | None = None,
        mirrored: bool = False,
        transform: Transform | None = None,
        absent: Sequence[str] = (),
    ):
        if size is not None and not (size >= 1 and (stride is None or stride >= 1)):
            raise BadParameter("size, stride", (size, stride), "1 or more pixels")
        self.dataset, self.pictures, self.places = dataset, list(pictures), dict(places or {})
        self.classes, self.palette, self.decode = list(palette), list(palette.values()), decode
        self.ignore, self.left_out, self.absent = len(palette), LEFT_OUT.get(dataset.name, ()), list(absent)
        self.size, self.pad, self.transform, self.windows = size, pad, transform, None
        self.padding = self.ignore if padding is None else padding
        if size is not None:
            self.windows = []
            for i, picture in enumerate(self.pictures):
                with Raster(picture.image) as raster:
                    firsts = [-(-length % size) if before else 0 for length in raster.size]
                    tops, lefts = (range(k, n, stride or size) for k, n in zip(firsts, raster.size, strict=True))
                flips = FLIPS if mirrored else [""]
                self.windows += [(i, top, left, flip) for flip in flips for top in tops for left in lefts]

    def __len__(self) -> int:
        return len(self.pictures if self.windows is None else self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.pair(index)
        if self.transform is None:
            return image, labels
        image, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, h, w) and labels int64 (h, w) before any transform.

        Raises `CorruptFile`: a file cannot be read, or the labels have another size or an unknown code."""
        i, top, left, flip = (index, 0, 0, "") if self.windows is None else self.windows[index]
        picture = self.pictures[i]
        with Raster(picture.image) as raster:
            sides = raster.size
            # first and last line in the mirrored image, and the same lines in the file
            inside = [(max(k, 0), min(k + (self.size or n), n)) for k, n in zip((top, left), sides, strict=True)]
            starts = [
                n - b if axis in FLIPS[flip] else a for (a, b), n, axis in zip(inside, sides, (-2, -1), strict=True)
            ]
            lengths = [b - a for a, b in inside]
            window = (*starts, *lengths)
            pixels = raster.read(*window)
            shape = (self.size, self.size) if self.size and self.pad else tuple(lengths)
            place = tuple(slice(a - k, b - k) for (a, b), k in zip(inside, (top, left), strict=True))
            image = np.zeros((3, *shape), np.uint8)
            image[:, *place] = np.flip(pixels, FLIPS[flip])
            labels, own = np.full(shape, self.padding, np.int64), np.full(lengths, self.ignore, np.int64)
            if picture.label is not None:
                with Raster(picture.label) as truth:
                    if truth.size != sides:
                        raise CorruptFile(picture.label, f"it is {truth.size}, its image {sides}")
                    own = self.decode(truth, pixels, *window)
            if self.dataset.group == "own":  # no-data pixels of the file; the sets' labels mark them already
                own = np.where(raster.valid(*window), own, self.ignore)
            labels[place] = np.flip(own, FLIPS[flip])
        return torch.from_numpy(image), torch.from_numpy(labels)

    def picture(self, index: int) -> Picture:
        """The file of an item."""
        return self.pictures[index if self.windows is None else self.windows[index][0]]

    @property
    def sources(self) -> list[str]:
        """The image file of each item."""
        return [str(self.picture(i).image) for i in range(len(self))]

    def where(self, keep: Sequence[bool]) -> LandCover:
        """The items for which `keep` is true, such as those of some zones; raises `BadParameter` when none is left."""
        if len(keep) != len(self) or not any(keep):
            raise BadParameter("keep", f"{sum(map(bool, keep))} of {len(keep)}", f"some of {len(self)} items")
        return self.part([i for i, kept in enumerate(keep) if kept])

    def part(self, rows: Sequence[int]) -> Self:
        """The items of these numbers."""
        found = super().part(rows)
        if self.windows is None:
            found.__dict__.pop("_zones", None)
        return found

    @property
    def each(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Parts`."""
        return ("pictures",) if self.windows is None else ("windows",)

    @functools.cached_property
    def _zones(self) -> list[str | None]:
        return [self._zone(picture) for picture in self.pictures]

    def zones(self) -> list[str | None]:
        """The climate zone of each item; None where the location is unknown, or is sea on the map.

        The zone in the table of locations has priority, then the image's georeference, then the coordinates in the
        table."""
        return [self._zones[i] for i in (range(len(self.pictures)) if self.windows is None else self._of())]

    def texts(self) -> list[str | None]:
        """The user's text for each item, from the column `text` of the table of locations; None without one."""
        found = [self._place(picture).text for picture in self.pictures]
        return found if self.windows is None else [found[i] for i in self._of()]

    def _of(self) -> list[int]:
        return [i for i, *_ in self.windows]

    def _place(self, picture: Picture) -> Place:
        return self.places.get(picture.image.stem) or self.places.get(picture.region) or Place()

    def _zone(self, picture: Picture) -> str | None:
        said = self._place(picture)
        if said.zone is not None:
            return said.zone
        with Raster(picture.image) as raster:
            found = climate.zone(*(raster.place or (said.latitude, said.longitude)), reach=COAST)
        return None if found == climate.OCEAN else found


# --- public functions -------------------------------------------------------------------------------------------------


def load(
    name: str,
    root: str | Path,
    split: str = "train",
    *,
    size: int | None = None,
    stride: int | None = None,
    labels: str | None = None,
    without_xbd: bool = False,
    mirrored: bool = False,
    padding: str = "ignored",
    transform: Transform | None = None,
) -> LandCover:
    """A split of a set.

    Args:
        name: a name of `DATASETS` whose task is "landcover".
        root: the data folder.
        split: "train", "val" or "test"; Potsdam has no "val". Withheld labels are all ignored.
        size, stride: see `LandCover`; Potsdam's tiles and UAVid's frames are read by 1,024 pixels unless `size` is
            given, Potsdam's padded at the top and the left.
        labels: for Potsdam "full" or "eroded"; None: full for training, eroded for testing, as in GeoSeg.
        mirrored: for Potsdam: see `LandCover`; GeoSeg's training patches are mirrored already.
        padding: for Potsdam: "ignored", or "impervious", the label that GeoSeg's tool assigns by mistake.
        without_xbd: for OpenEarthMap: leave out the images that must be compiled from xBD; `absent` names the regions.
        transform: see `LandCover`.

    Raises `BadParameter`, `MissingData`, `CorruptFile`, `CompanionError`, with the change or download needed.
    """
    dataset, root = find(name, "landcover"), Path(root)
    splits = tuple(POTSDAM_TILES) if name == POTSDAM else SPLITS
    check_choice("split", split, splits)
    if labels is not None and (name != POTSDAM or labels not in LABELS):
        raise BadParameter("labels", labels, LABELS if name == POTSDAM else "None: only Potsdam has two kinds")
    check_choice("padding", padding, PADDINGS)
    if name != POTSDAM and (mirrored or padding != "ignored"):
        raise BadParameter("mirrored, padding", (mirrored, padding), "False, 'ignored': only Potsdam has them")
    if not dataset.folder(root).is_dir():
        raise dataset.missing(root)
    absent: list[str] = []
    options: dict[str, Any] = {}
    if name == LOVEDA:
        pictures, decode = _loveda(dataset, root, split), loveda
        places = {scene: _city("LoveDA") for scene in ("urban", "rural")}
    elif name == POTSDAM:
        pictures, decode = _potsdam(dataset, root, split, labels or {"train": "full", "test": "eroded"}[split])
        places, size = {"potsdam": _city("Potsdam")}, size or TILE
        options = {"before": True, "mirrored": mirrored and decode is colours}
        if padding == "impervious":
            options["padding"], decode = 0, colours if decode is colours else functools.partial(plain, 6)
    elif name == UAVID:
        pictures, places, size = _uavid(dataset, root, split), {}, size or TILE
        decode = functools.partial(plain_or_coloured, tuple(CLASSES[UAVID].values()))
    else:
        pictures, absent = _earth(dataset, root, split, without_xbd)
        decode, table = earth, dataset.folder(root) / "places.csv"
        places = read_places(table if table.is_file() else PLACES)
    return LandCover(
        dataset,
        pictures,
        CLASSES[name],
        decode,
        places,
        size=size,
        stride=stride,
        transform=transform,
        absent=absent,
        **options,
    )


def own(
    root: str | Path,
    classes: Sequence[str] | Mapping[str, tuple[int, int, int]],
    split: str | None = None,
    *,
    size: int | None = None,
    stride: int | None = None,
    transform: Transform | None = None,
) -> LandCover:
    """Your own images: images/*.tif (or .png, .jpg with a world file), uint8, and labels/ with the same names.

    A label file has one band, in which 0 is the first of `classes` and codes beyond the last are ignored, or three
    bands with the colours of `classes`, in which black is ignored. Its name is the image's, with or without one of
    `ENDINGS`. An image may have no label file; no-data pixels of the image are ignored. The location is the image's
    georeference, or else given by `places.csv` next to the folders, with the column `image` (a name with or without its
    ending) and any of latitude, longitude, zone, text.

    Args:
        classes: names, or name -> colour (red, green, blue), such as `read_classes` gives.
        size, stride: see `LandCover`; windows at the edges are smaller.
        split: "train", ...: those listed in `<split>.txt`, one file name per line. None: all.

    Raises as `load`.
    """
    root = Path(root)
    dataset = own_set(
        root,
        "landcover",
        "images/*.tif    uint8, red, green, blue\nlabels/*.tif    optional: one band, the same names\n"
        "places.csv      optional: image,latitude,longitude,zone,text\n{train,val,test}.txt    optional: file names",
        len(classes),
    )
    if not classes or isinstance(classes, str):
        raise BadParameter("classes", classes, "one or more names")
    files = {path.name: path for path in _files(root / "images")}
    names = list(files) if split is None else _listed(dataset, root, root / f"{split}.txt")
    if not files or (lost := [name for name in names if name not in files]):
        raise dataset.missing(root, f"images/{lost[0]} is not there" if files else "no images in images/")
    labels, stems = {path.stem: path for path in _files(root / "labels")}, [path.stem for path in files.values()]
    counts = Counter(stems)
    if twice := [name for name in names if counts[Path(name).stem] > 1]:
        raise CorruptFile(root / "images" / twice[0], "another image has the same name: they would share label and map")
    label_of = {s: next((labels[s + end] for end in ("", *ENDINGS) if s + end in labels), None) for s in stems}
    bare = [stem for stem, label in label_of.items() if label is None]
    if bare and (stray := sorted({*labels.values()} - {*label_of.values()}, key=str)):
        ways = f"its name, or that and {', '.join(ENDINGS)}, is expected"
        raise CorruptFile(stray[0], f"it labels no image of images/, and {bare[0]} has no label: {ways}")
    pictures = [Picture(files[name], label_of[files[name].stem], files[name].stem) for name in names]
    colours = classes if isinstance(classes, Mapping) else {name: _colour(i) for i, name in enumerate(classes)}
    table = root / "places.csv"
    places = read_places(table) if table.is_file() else {}
    if places and not places.keys() & {*stems}:
        raise CorruptFile(table, f"no image of images/ is called {next(iter(places))!r}, nor as any other of its names")
    decode = functools.partial(plain_or_coloured, tuple(colours.values()))
    return LandCover(
        dataset, pictures, colours, decode, places, size=size, stride=stride, pad=False, transform=transform
    )


def read_places(path: str | Path = PLACES) -> dict[str, Place]:
    """A table of locations: region (or image), and any of latitude, longitude, zone, text; lines with # are comments.

    Raises `CorruptFile` with the faulty line or the missing column."""
    places: dict[str, Place] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(path, f"no table of locations ({error})") from error
    if any("\0" in line for line in lines):
        raise CorruptFile(path, "no table of locations (it has bytes of 0)")
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    columns = rows.fieldnames or ()
    key = next((name for name in ("image", "region") if name in columns), None)
    if key is None:
        raise CorruptFile(path, "the column region, or image, is missing")
    said = {"latitude", "longitude", "zone", "text"} & {*columns}
    if not said or len({"latitude", "longitude"} & said) == 1:
        wanted = "latitude and longitude, zone or text are expected"
        raise CorruptFile(path, f"its columns are {', '.join(columns)}: {wanted}")
    for row in rows:
        if None in row.values() or None in row:
            raise CorruptFile(path, f"{row[key]}: a line of {len(columns)} columns was expected")
        try:
            latitude, longitude = (float(row[name]) if row.get(name) else None for name in ("latitude", "longitude"))
            climate.zone(latitude, longitude)
            if any(value is not None and not math.isfinite(value) for value in (latitude, longitude)):
                raise ValueError(f"latitude {latitude}, longitude {longitude} is not a location")
            if row.get("zone"):
                check_choice("zone", row["zone"], climate.codes())
        except ValueError as error:  # not a number, or coordinates out of range
            raise CorruptFile(path, f"{row[key]}: {error}") from error
        name = row[key] if key == "region" else re.sub(rf"(?i)({'|'.join(map(re.escape, SUFFIXES))})$", "", row[key])
        places[name] = Place(latitude, longitude, row.get("zone") or None, row.get("text") or None)
    return places


def read_classes(root: str | Path) -> dict[str, tuple[int, int, int]]:
    """The classes of your own images from `classes.txt`: one name per line, optionally with its colour, "field 75 181
    73".

    Raises `CorruptFile` with the faulty line."""
    path = Path(root) / "classes.txt"
    found: dict[str, tuple[int, int, int]] = {}
    if not path.parent.is_dir():
        raise CorruptFile(path.parent, "there is no such folder")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(path, f"it should name the classes, one a line ({error})") from error
    for i, line in enumerate(lines):
        name, *colour = line.rsplit(maxsplit=3) if line[-1].isdigit() and len(line.split()) > 3 else [line]
        if name in found or not all(v.isdigit() and int(v) < 256 for v in colour):
            raise CorruptFile(path, f"{line!r} is not a new name, or a name and three numbers from 0 to 255")
        red, green, blue = map(int, colour) if colour else _colour(i)
        found[name] = red, green, blue
    if len(found) < 2:
        raise CorruptFile(path, "two classes or more are needed")
    return found


def label_values(data: LandCover) -> dict[tuple[tuple[int, ...], int], int]:
    """Pixels by (value on disk, training label), sorted, over all label files of a set.

    A value is (class number,), or (red, green, blue) where a label file has three bands. The training label is the
    index in `data.classes`, or `data.ignore`. Files are read by windows: memory does not grow with an image's height.

    Raises `CorruptFile`: a label differs in size from its image, or has a code or colour that its set does not know."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for picture in data.pictures:
        if picture.label is None:
            continue
        with Raster(picture.image) as image, Raster(picture.label) as truth:
            if truth.size != image.size:
                raise CorruptFile(picture.label, f"it is {truth.size}, its image {image.size}")
            bands = (1, 2, 3) if truth.bands > 2 else (1,)
            for top in range(0, truth.size[0], TILE):
                window = (top, 0, min(TILE, truth.size[0] - top), truth.size[1])
                keys = data.decode(truth, image.read(*window), *window)  # label, then a byte for each band
                for band in truth.raw(bands, *window):
                    keys = keys << 8 | band
                for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
                    label, value = divmod(int(key), 256 ** len(bands))
                    found[tuple(value.to_bytes(len(bands), "big")), label] += int(count)
    return dict(sorted(found.items()))


def compile_xbd(root: str | Path, xbd: str | Path) -> int:
    """Put xBD's images into OpenEarthMap, as GeoTIFF with the georeference of their labels; returns how many were new.

    `xbd_files.csv` pairs the names; region names may contain underscores, so they end at the last one. (OpenEarthMap's
    script, in the version that we read, takes the part before the FIRST one as the folder, does not find it, and skips
    el_rodeo, mexico_city and similar names without a warning.) Existing files are not overwritten. Each file is written
    under a temporary name, so a killed run can be resumed.

    Args:
        root: the data folder. xbd: a folder below which xBD's `*_pre_disaster.png` are, at any depth.

    Raises:
        MissingData: OpenEarthMap, its list or some of xBD's images are missing; the existing ones have been compiled.
        CorruptFile: an image that cannot be read, or whose size differs from its label's.
    """
    import rasterio  # an extra

    dataset = find(OEM)
    folder, done = dataset.folder(root), 0
    listing = folder / "xbd_files.csv"
    if not listing.is_file():
        raise dataset.missing(root, f"{listing} is not there")
    there = {path.name: path for path in Path(xbd).rglob("*_pre_disaster.png")}
    pairs = [line.split(",") for line in listing.read_text(encoding="utf-8-sig").split()]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise CorruptFile(listing, f"{wrong[0]} is not a pair of names")
    lost = []
    for theirs, name in pairs:
        region = name.rpartition("_")[0]
        label, out = (folder / region / kind / name for kind in ("labels", "images"))
        if out.is_file():
            continue
        if theirs not in there:
            lost.append(theirs)
            continue
        with Raster(there[theirs]) as source:
            image, profile = source.read(), {"crs": None}
        if label.is_file():  # those of the test split are withheld
            with Raster(label) as truth:
                if truth.size != image.shape[1:]:
                    raise CorruptFile(there[theirs], f"it is {image.shape[1:]}, its label {truth.size}")
                profile = {"crs": truth.crs, "transform": truth.transform}
        with atomic(out) as temporary, quiet():
            facts = {"driver": "GTiff", "count": 3, "dtype": "uint8", "compress": "deflate", "photometric": "RGB"}
            height, width = image.shape[1:]
            with rasterio.open(temporary, "w", height=height, width=width, **facts, **profile) as file:
                file.write(image)
        done += 1
    if lost:
        raise dataset.missing(root, f"{len(lost)} of {len(pairs)} images of xBD are not below {xbd}, such as {lost[0]}")
    return done


# --- labels on disk to training labels --------------------------------------------------------------------------------


def earth(truth: Raster, pixels: np.ndarray, *window: int) -> np.ndarray:
    """OpenEarthMap: 0 is unknown, 1 to 8 the classes."""
    return _shifted(truth, 8, window)


def loveda(truth: Raster, pixels: np.ndarray, *window: int) -> np.ndarray:
    """LoveDA: 0 is no data, 1 to 7 the classes."""
    return _shifted(truth, 7, window)


def _shifted(truth: Raster, classes: int, window: tuple[int, ...]) -> np.ndarray:
    codes = truth.raw((1,), *window)[0].astype(np.int64)
    if codes.max() > classes:
        raise CorruptFile(truth.path, f"it has the code {codes.max()}; 0 to {classes} are known")
    return np.where(codes == 0, classes, codes - 1)


# a colour is a corner of the RGB cube, 4 red + 2 green + blue; 5, magenta, is not used
_CORNERS = np.array([6, 1, 3, 2, 5, -1, 4, 0])


def colours(truth: Raster, pixels: np.ndarray, *window: int) -> np.ndarray:
    """Potsdam: colours; black, the borders of the eroded version, is ignored. Nearby shades count as the colour."""
    raw = truth.raw((1, 2, 3), *window) > 127
    labels = _CORNERS[4 * raw[0] + 2 * raw[1] + raw[2]]
    if (labels < 0).any():
        raise CorruptFile(truth.path, "it has pixels of a colour that is no class of Potsdam")
    return labels


def patches(truth: Raster, pixels: np.ndarray, *window: int) -> np.ndarray:
    """GeoSeg's patches of Potsdam: 0 to 5, 6 border.

    Its tool labels the padding, in the first row and column of patches, as the first class, impervious surfaces; here
    labels are ignored where the image begins with black lines."""
    labels = truth.raw((1,), *window)[0].astype(np.int64)
    if labels.max() > 6:
        raise CorruptFile(truth.path, f"it has the label {labels.max()}; 0 to 6 are known")
    seen = np.any(pixels, 0)
    for axis in (0, 1):
        lines = np.flatnonzero(np.any(seen, 1 - axis))
        outside = slice(0, lines[0] if len(lines) else None)
        labels[(outside, slice(None)) if axis == 0 else (slice(None), outside)] = 6
    return labels


def plain(classes: int, truth: Raster, pixels: np.ndarray, *window: int) -> np.ndarray:
    """The label is the class; codes beyond the last class are ignored."""
    return np.minimum(truth.raw((1,), *window)[0], classes).astype(np.int64)


def plain_or_coloured(
    palette: Sequence[tuple[int, int, int]], truth: Raster, pixels: np.ndarray, *window: int
) -> np.ndarray:
    """Your own labels: as `plain`, or three bands with the colours of the classes, in which black is ignored."""
    if truth.bands < 3:
        return plain(len(palette), truth, pixels, *window)
    raw = truth.read(*window).astype(np.int64)
    colours = raw[0] << 16 | raw[1] << 8 | raw[2]
    labels = np.where(colours == 0, len(palette), -1)
    for i, (red, green, blue) in enumerate(palette):
        labels[colours == (red << 16 | green << 8 | blue)] = i
    if (labels < 0).any():
        wrong = tuple(raw[:, labels < 0][:, 0].tolist())
        way = "one band of class numbers, or the colours of the classes, are expected"
        raise CorruptFile(truth.path, f"it has three bands and pixels of the colour {wrong}, which no class has: {way}")
    return labels


# --- called by `companion.data` ---------------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: lists and folders are read, no image is opened."""
    counts = {}
    for split in POTSDAM_TILES if dataset.name == POTSDAM else SPLITS:
        if dataset.name == LOVEDA:
            found = _loveda(dataset, root, split)
        elif dataset.name == POTSDAM:
            found, _ = _potsdam(dataset, root, split, "full" if split == "train" else "eroded")
        elif dataset.name == UAVID:
            found = _uavid(dataset, root, split)
        else:
            found, _ = _earth(dataset, root, split, False)
        counts[split] = len(found)
    return Status("present", ", ".join(f"{count:,} {split}" for split, count in counts.items()))


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`. Each zip is unpacked into a hidden folder, which is moved when complete."""
    folder = dataset.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with downloading(dataset, folder, progress):
        for part, md5 in LOVEDA_FILES.items():
            if (folder / part).is_dir():
                continue
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as new:
                url = f"https://zenodo.org/records/5706578/files/{part}.zip"
                download_and_extract_archive(url, new, filename=f"{part}.zip", md5=md5, remove_finished=True)
                (Path(new) / part).rename(folder / part)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(found)


def _listed(dataset: DataSet, root: Path, listing: Path) -> list[str]:
    """The file names of a list, one per line."""
    if not listing.is_file():
        raise dataset.missing(root, f"{listing} is not there")
    try:
        names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CorruptFile(listing, f"not UTF-8 text ({error})") from error
    if not names or any(
        "/" in name or not name.isprintable() or ("_" not in name and dataset.group != "own") for name in names
    ):
        raise CorruptFile(listing, "expected names such as tokyo_1.tif, one a line, and at least one")
    return names


def _earth(dataset: DataSet, root: Path, split: str, without_xbd: bool) -> tuple[list[Picture], list[str]]:
    """The images of a split, and the regions left out."""
    folder, pictures, lost, bare = dataset.folder(root), [], [], []
    for name in _listed(dataset, root, folder / f"{split}.txt"):
        region = name.rpartition("_")[0]
        image, label = (folder / region / kind / name for kind in ("images", "labels"))
        if not image.is_file():
            lost.append(region)
        elif label.is_file():
            pictures.append(Picture(image, label, region))
        elif split == "test":
            pictures.append(Picture(image, None, region))
        else:
            bare.append(name)
    needed = sorted({region for region in lost if not (without_xbd and region in XBD)})
    if needed:
        compiled = " (compile xBD's in with landcover.compile_xbd, or without_xbd=True)" if {*needed} & {*XBD} else ""
        detail = f"{sum(map(lost.count, needed))} images of {split}.txt in {', '.join(needed)}{compiled}"
        raise dataset.missing(root, detail)
    if bare:
        raise dataset.missing(root, f"{len(bare)} labels of '{split}', the first: {bare[0]}")
    return pictures, sorted({*lost})


def _loveda(dataset: DataSet, root: Path, split: str) -> list[Picture]:
    folder, pictures = dataset.folder(root) / split.capitalize(), []
    for scene in ("Rural", "Urban"):
        for image in _files(folder / scene / "images_png"):
            label = folder / scene / "masks_png" / image.name
            if split != "test" and not label.is_file():
                raise dataset.missing(root, f"{label} is not there")
            pictures.append(Picture(image, None if split == "test" else label, scene.lower()))
    return _complete(dataset, root, split, folder, pictures)


def _uavid(dataset: DataSet, root: Path, split: str) -> list[Picture]:
    folder, pictures = dataset.folder(root) / f"uavid_{split}", []
    for sequence in sorted(folder.glob("seq*"), key=lambda path: (len(path.name), path.name)):
        for image in _files(sequence / "Images"):
            label = sequence / "Labels" / image.name
            if split != "test" and not label.is_file():
                raise dataset.missing(root, f"{label} is not there")
            pictures.append(Picture(image, None if split == "test" else label, sequence.name))
    return _complete(dataset, root, split, folder, pictures)


def _complete(dataset: DataSet, root: Path, split: str, folder: Path, pictures: list[Picture]) -> list[Picture]:
    if len(pictures) != dataset.sizes[split]:
        raise dataset.missing(root, f"{folder} has {len(pictures):,} images, {dataset.sizes[split]:,} are expected")
    return pictures


def _potsdam(dataset: DataSet, root: Path, split: str, kind: str) -> tuple[list[Picture], Callable]:
    """Tiles as released, or in GeoSeg's folders, or GeoSeg's patches; the first of these that exists."""
    folder = dataset.folder(root)
    if (folder / "2_Ortho_RGB").is_dir() or (folder / "4_Ortho_RGBIR").is_dir():
        bands = "RGB" if (folder / "2_Ortho_RGB").is_dir() else "RGBIR"
        images = folder / {"RGB": "2_Ortho_RGB", "RGBIR": "4_Ortho_RGBIR"}[bands]
        masks = [folder / ("5_Labels_all" + ("_noBoundary" if kind == "eroded" else "")), folder]
    elif (folder / f"{split}_images").is_dir():
        bands, images = "RGB", folder / f"{split}_images"
        masks = [folder / (f"{split}_masks" + ("_eroded" if kind == "eroded" else ""))]
    else:
        return _patches(dataset, root, split, kind), patches
    pictures, ending = [], "label_noBoundary" if kind == "eroded" else "label"
    for tile in POTSDAM_TILES[split]:
        image = images / f"top_potsdam_{tile}_{bands}.tif"
        label = [place / f"top_potsdam_{tile}_{ending}.tif" for place in masks]
        found = next((path for path in label if path.is_file()), None)
        for path in (image, found or label[0]):
            if not path.is_file():
                raise dataset.missing(root, f"{path} is not there")
        pictures.append(Picture(image, found, "potsdam"))
    return pictures, colours


def _patches(dataset: DataSet, root: Path, split: str, kind: str) -> list[Picture]:
    folder, pictures = dataset.folder(root) / split, []
    if kind != {"train": "full", "test": "eroded"}[split]:
        raise BadParameter("labels", kind, "full to train and eroded to test: GeoSeg's patches have no others")
    for image in _files(folder / "images_1024"):
        label = folder / "masks_1024" / f"{image.stem}.png"
        if not label.is_file():
            raise dataset.missing(root, f"{label} is not there")
        pictures.append(Picture(image, label, "potsdam"))
    if not pictures:
        raise dataset.missing(root, f"neither tiles nor patches of '{split}' are in {dataset.folder(root)}")
    return pictures


def _city(name: str) -> Place:
    """The first city of a set: all its cities are in one climate zone."""
    _, latitude, longitude = climate.PLACES[name][0]
    return Place(latitude, longitude)


def _colour(index: int) -> tuple[int, int, int]:
    """A colour for a class that has none."""
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(index * 0.618 % 1, 0.65, 0.9))
    return red, green, blue
