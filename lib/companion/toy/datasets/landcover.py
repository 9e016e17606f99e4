"""Small land-cover images, 64x64 pixels, in which the appearance of a class depends on the climate zone; for
MetaSegNet.

Nine zones are the nine pairs of a moisture and a style of building. Three colours of fields (straw, red-brown, green)
and three of built-up areas (pale, terracotta, metal) are assigned to the classes by zone:

    moisture    bareland    rangeland   agriculture        style   building     developed
    dry         straw       red-brown   green              0       pale         terracotta
    temperate   red-brown   straw       green              1       terracotta   metal
    wet         red-brown   green       straw              2       metal        pale

The layout does not depend on the zone, and all colours of fields occur in every zone: without the location of an image
the three fields cannot be distinguished, except by one weak cue: in 30% of the images trees are tinted by moisture.
Built-up areas have two colours of three; the pair of colours identifies the style, a single roof does not. Trees, roads
and water look the same everywhere. THE APPEARANCES ARE INVENTED: the zones' codes and names are Koeppen's and Geiger's,
vegetation and buildings are not (section 14).

Surfaces are photographs that ship with scikit-image, whose luminance modulates the colours: one for all fields, one for
all built-up areas, so that they do not distinguish classes of one kind. Each split has its own tiles of them.

    <root>/pocket/landcover/pocket_csa/images/pocket_csa_1.tif     uint8 RGB, GeoTIFF
                            pocket_csa/labels/pocket_csa_1.tif     0 unknown, 1 bareland ... 8 building
                            {train,val,test}.txt                   file names, without folders
                            places.csv                             region, latitude, longitude, zone

That is OpenEarthMap's layout with our region table. The images are georeferenced at a real town of their zone, which is
unrelated to their content: it tests the path from coordinates to a text.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from ...data.landcover import read_places
from ...errors import CorruptFile, MissingData, check_choice
from .. import scenes
from ..scenes import SPLITS
from . import read_image, write_once, write_table

SIZE = 64  # side of every image, in pixels
CLASSES = ("bareland", "rangeland", "developed", "road", "tree", "water", "agriculture", "building")
IGNORE = len(CLASSES)  # the label of unlabelled pixels
PAINT = ("#800000", "#00ff24", "#949494", "#ffffff", "#226126", "#0045ff", "#4bb549", "#de1f07")  # OpenEarthMap's
COUNTS = {"train": 30, "val": 10, "test": 40}  # of each zone
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the author's normalisation (ImageNet's)
PROMPTS = Path(__file__).parent.with_name("climate_prompts.yaml")
VERSION = 1  # to be increased when a change of this file changes the images

MOISTURES = ("dry", "temperate", "wet")


class Zone(NamedTuple):
    """A zone: its moisture and style in the two invented rules, and the town of its georeference."""

    moisture: int  # of MOISTURES
    style: int  # 0, 1 or 2
    town: str
    latitude: float
    longitude: float


ZONES = {
    "BWh": Zone(0, 0, "Aswan", 24.09, 32.90),
    "BSk": Zone(0, 1, "Konya", 37.87, 32.48),
    "BSh": Zone(0, 2, "Niamey", 13.51, 2.11),
    "Csa": Zone(1, 0, "Rome", 41.90, 12.50),
    "Cfa": Zone(1, 1, "Atlanta", 33.75, -84.39),
    "Cfb": Zone(1, 2, "Paris", 48.86, 2.35),
    "Aw": Zone(2, 0, "Brasilia", -15.79, -47.88),
    "Af": Zone(2, 1, "Singapore", 1.35, 103.82),
    "Am": Zone(2, 2, "Monrovia", 6.31, -10.80),
}

COLOURS = {
    "straw": (0.78, 0.70, 0.50),
    "red-brown": (0.62, 0.42, 0.28),
    "green": (0.42, 0.60, 0.30),
    "pale": (0.85, 0.83, 0.80),
    "terracotta": (0.70, 0.35, 0.28),
    "metal": (0.42, 0.46, 0.58),
    "road": (0.45, 0.45, 0.46),
    "water": (0.12, 0.22, 0.42),
    "tree": (0.16, 0.32, 0.14),
}
FIELDS = (("straw", "red-brown", "green"), ("red-brown", "straw", "green"), ("red-brown", "green", "straw"))
BUILT = (("pale", "terracotta"), ("terracotta", "metal"), ("metal", "pale"))
TINTS = ((0.10, 0.06, 0.08), (0.0, 0.04, 0.0), (-0.06, 0.04, -0.04))  # of trees, by moisture
TINTED = 0.3  # of the images
# the photograph whose luminance modulates each class: the same one for classes that swap colours
SURFACES = {
    "grass": ("bareland", "rangeland", "agriculture"),
    "brick": ("developed", "building"),
    "gravel": ("tree",),
    "moon": ("road", "water"),
}
ROUGHNESS = 0.05  # standard deviation of the surfaces
PIXEL = 0.3  # metres on the ground


# --- drawing ----------------------------------------------------------------------------------------------------------


def look(zone: str) -> dict[str, str]:
    """The name of each class's colour in a zone, a key of `COLOURS`. Raises `BadParameter` for an unknown zone."""
    check_choice("zone", zone, ZONES)
    fields, built = FIELDS[ZONES[zone].moisture], BUILT[ZONES[zone].style]
    own = dict(zip(("bareland", "rangeland", "agriculture", "building", "developed"), fields + built, strict=True))
    return {name: own.get(name, name) for name in CLASSES}


def other_zone(zone: str, avoid: str | None = None) -> str:
    """The zone whose text is the wrong one for a zone: another moisture AND another style; `avoid` is excluded."""
    moisture, style = ZONES[zone].moisture, ZONES[zone].style
    for step in (1, 2):
        pair = ((moisture + step) % 3, (style + step) % 3)
        found = next(code for code, entry in ZONES.items() if (entry.moisture, entry.style) == pair)
        if found != avoid:
            return found
    raise AssertionError("two zones differ in both")


def layout(rng: np.random.Generator) -> np.ndarray:
    """A random label map, (64, 64) uint8 of indices of `CLASSES`, independent of the zone.

    Nine regions around random points, five of them one of each field, tree and water; one straight road; six rectangles
    of 7 to 13 pixels a side, half of them buildings and half developed.
    """
    number = {name: i for i, name in enumerate(CLASSES)}
    some = [number[name] for name in ("bareland", "rangeland", "agriculture", "tree")]
    kinds = np.array([*some, number["water"], *rng.choice(some, 4)], np.uint8)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    points = rng.uniform(0, SIZE, (len(kinds), 2))
    labels = kinds[((rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2).argmin(-1)]
    angle, (y, x) = rng.uniform(0, np.pi), rng.uniform(SIZE / 4, 3 * SIZE / 4, 2)
    labels[abs((rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)) < 2.2] = number["road"]
    for kind in rng.permutation([number["building"], number["developed"]] * 3):
        height, width = rng.integers(7, 14, 2)
        top, left = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
        labels[top : top + height, left : left + width] = kind
    return labels


def _surface(rng: np.random.Generator, name: str, split: str) -> np.ndarray:
    """Luminance of a 64 to 128 pixel crop of one of the split's tiles of a photograph, (64, 64), mean 0, std 1."""
    tiles = scenes.tiles(name, split)
    left, top, right, bottom = tiles[rng.integers(len(tiles))]
    side = int(rng.integers(SIZE, min(128, right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    part = Image.fromarray(scenes.photograph(name)[y : y + side, x : x + side]).convert("L")
    grey = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)
    grey = np.rot90(grey, int(rng.integers(4)))
    return (grey - grey.mean()) / max(grey.std(), 1e-6)


def paint(labels: np.ndarray, zone: str, rng: np.random.Generator, split: str) -> np.ndarray:
    """The image (64, 64, 3) uint8 of a layout in a zone; raises `BadParameter` for an unknown zone or split."""
    palette = np.array([COLOURS[name] for name in look(zone).values()])
    if rng.random() < TINTED:
        palette[CLASSES.index("tree")] += TINTS[ZONES[zone].moisture]
    pixels = palette[labels]
    for name, classes in SURFACES.items():
        here = np.isin(labels, [CLASSES.index(c) for c in classes])
        pixels = pixels + np.where(here, ROUGHNESS * _surface(rng, name, split), 0)[..., None]
    pixels = pixels + rng.normal(0, 0.03, pixels.shape)
    pixels = pixels * rng.uniform(0.88, 1.12) + rng.normal(0, 0.02, 3)  # random brightness
    return scenes.quantise(pixels)


def pictures(zone: str, count: int, split: str, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of an image (64, 64, 3) uint8 and its labels (64, 64) uint8, deterministic.

    The random stream of layouts does not depend on the zones' appearances."""
    check_choice("split", split, SPLITS)
    look(zone)
    streams = [
        np.random.default_rng((seed, zlib.crc32(f"{what}/{zone}/{split}".encode()))) for what in ("layout", "paint")
    ]
    found = []
    for _ in range(count):
        labels = layout(streams[0])
        found.append((paint(labels, zone, streams[1], split), labels))
    return found


# --- on disk ----------------------------------------------------------------------------------------------------------


def region(zone: str) -> str:
    """The folder of a zone. It contains an underscore, like some of OpenEarthMap's."""
    return f"pocket_{zone.lower()}"


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the land cover of a seed into `<root>/pocket/landcover`, unless it exists, and return that folder.

    The same seed gives the same files.
    """

    def fill(new: Path) -> None:
        listed: dict[str, list[str]] = {split: [] for split in COUNTS}
        for zone in ZONES:
            for part in ("images", "labels"):
                (new / region(zone) / part).mkdir(parents=True)
            number = 0
            for split, count in COUNTS.items():
                for picture, labels in pictures(zone, count, split, seed):
                    number += 1
                    file = f"{region(zone)}_{number}.tif"
                    save(new / region(zone) / "images" / file, picture, zone, number)
                    save(new / region(zone) / "labels" / file, labels + np.uint8(1), zone, number)
                    listed[split].append(file)
        for split, files in listed.items():
            (new / f"{split}.txt").write_text("\n".join(files) + "\n", encoding="utf-8")
        rows = [(region(code), zone.latitude, zone.longitude, code) for code, zone in ZONES.items()]
        write_table(new / "places.csv", ("region", "latitude", "longitude", "zone"), rows)

    record = {"seed": seed, "version": VERSION, "counts": COUNTS, "zones": list(ZONES)}
    files = 2 * len(ZONES) * sum(COUNTS.values()) + len(COUNTS) + 2
    return write_once(Path(root) / "pocket" / "landcover", record, files, fill)


def save(path: str | Path, pixels: np.ndarray, zone: str, number: int = 0) -> None:
    """Write pixels (H, W) or (H, W, 3) uint8 as a GeoTIFF in longitude and latitude (EPSG:4326) near the zone's town.

    `number` shifts it, so that images of a zone are next to each other."""
    entry = ZONES[zone]
    up = PIXEL / 111_320  # degrees per pixel
    across = up / math.cos(math.radians(entry.latitude))
    row, column = divmod(number, 10)
    left, top = entry.longitude + column * SIZE * across, entry.latitude - row * SIZE * up
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    # scale; pixel (0, 0) to the corner; keys: version 1.1.0, three of them: geographic, pixels are areas, EPSG:4326
    for tag, kind, values in (
        (33550, 12, (across, up, 0.0)),
        (33922, 12, (0.0, 0.0, 0.0, left, top, 0.0)),
        (34735, 3, (1, 1, 0, 3, 1024, 0, 1, 2, 1025, 0, 1, 1, 2048, 0, 1, 4326)),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = values
    Image.fromarray(pixels).save(path, format="TIFF", compression="tiff_deflate", tiffinfo=tags)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Images in memory.

    Attributes:
        images: (n, 3, 64, 64), normalised by `MEAN` and `STD`.
        labels: (n, 64, 64) int64, indices of `CLASSES`, `IGNORE` where unlabelled.
        zones: the code of each image's zone.
    """

    images: Tensor
    labels: Tensor
    zones: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.zones)

    def of(self, zones: Sequence[str]) -> Part:
        """The images of some zones."""
        keep = [i for i, zone in enumerate(self.zones) if zone in zones]
        return Part(self.images[keep], self.labels[keep], tuple(self.zones[i] for i in keep))


def normalise(pixels: np.ndarray) -> Tensor:
    """Network input (..., 3, H, W) of images (..., H, W, 3) uint8."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).movedim(-1, -3).contiguous()


def read(root: str | Path, split: str) -> Part:
    """Read a split that `write` wrote below `root`.

    Raises:
        BadParameter: an unknown split.
        MissingData: the folder does not exist.
        CorruptFile: an image or a table cannot be read; its path is in the message.
    """
    check_choice("split", split, SPLITS)
    folder = Path(root) / "pocket" / "landcover"
    if not (folder / "landcover.json").is_file():
        tree = "landcover.json\nplaces.csv\n{train,val,test}.txt\n<region>/{images,labels}/<region>_<n>.tif"
        raise MissingData(
            "pocket land cover",
            folder,
            tree,
            "companion.toy.datasets.landcover.write(root, seed)",
            "drawn; surfaces from photographs of scikit-image",
        )
    zones = {name: place.zone for name, place in read_places(folder / "places.csv").items() if place.zone}
    listed = folder / f"{split}.txt"
    try:
        files = [(name.rpartition("_")[0], name) for name in listed.read_text(encoding="utf-8").split()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(listed, f"no list of images ({error})") from error
    if unknown := sorted({where for where, _ in files} - zones.keys()):
        raise CorruptFile(listed, f"regions without a zone in places.csv: {', '.join(unknown)}")
    images = np.stack([read_image(folder / where / "images" / name) for where, name in files])
    stored = np.stack([read_image(folder / where / "labels" / name) for where, name in files]).astype(np.int64)
    labels = torch.from_numpy(np.where(stored == 0, IGNORE, stored - 1))
    return Part(normalise(images), labels, tuple(zones[where] for where, _ in files))
