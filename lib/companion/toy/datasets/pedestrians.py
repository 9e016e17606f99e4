"""Small pedestrians, 64x32 pixels, whose attributes depend on vertical position: the same colours occur on every part.

A person stands before a crop of a real photograph and wears a top, trousers or shorts, and shoes, each red, blue, green
or grey, with crops of photographs as texture; optionally a hat and a bag in any of the four colours. Two
persons in three wear red: only its position is informative. So a model with region strips can have an advantage.

There are two cameras. The toy CLIP is trained on images of the clear one. The street camera is dim, with a colour cast,
low resolution and strong noise: its images are the data set for prompt learning.

    <root>/pocket/pedestrians/annotation.mat  data/000001.png

`data.attributes` reads it as PA100K.

Backgrounds and textures of training, validation and test are crops of separate tiles, as in `scenes`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from skimage.color import hsv2rgb

from ...errors import check_choice
from . import write_once
from .scenes import PHOTOGRAPHS, SPLITS, cut, photograph, quantise, tiles

HEIGHT, WIDTH = 64, 32  # of every image, in pixels
COLOURS = ("red", "blue", "green", "grey")
CAMERAS = ("clear", "street")
COUNTS = {"train": 400, "val": 300, "test": 600}
VERSION = 1  # to be increased when a change of this file or of scenes.py changes the images

# the attributes by label, with the prompt of each
SENTENCES = {
    "hat": "a pedestrian with a hat",
    "long hair": "a pedestrian with long hair",
    "red top": "a pedestrian in a red top",
    "blue top": "a pedestrian in a blue top",
    "striped top": "a pedestrian in a striped top",
    "shorts": "a pedestrian in shorts",
    "red trousers": "a pedestrian in red trousers",
    "blue trousers": "a pedestrian in blue trousers",
    "red shoes": "a pedestrian in red shoes",
    "blue shoes": "a pedestrian in blue shoes",
    "backpack": "a pedestrian with a backpack",
    "handbag": "a pedestrian with a handbag",
}
ATTRIBUTES = tuple(SENTENCES)
# the body part of each attribute
PARTS = {
    "head": ATTRIBUTES[:2],
    "upper body": ATTRIBUTES[2:5],
    "legs": ATTRIBUTES[5:8],
    "feet": ATTRIBUTES[8:10],
    "bags": ATTRIBUTES[10:],
}

_HUE = {"red": 0.0, "blue": 0.62, "green": 0.36}
_SKIN = ((0.93, 0.76, 0.65), (0.78, 0.57, 0.44), (0.48, 0.32, 0.24))
_LARGE = tuple(name for name in PHOTOGRAPHS if name not in ("page", "coins"))  # tiles of at least 64 x 32 pixels


@dataclass(frozen=True)
class Pedestrian:
    """A person's clothes; colours are of `COLOURS`.

    Attributes:
        hat: its colour, or "".
        hair: "long" or "short".
        top, lower, shoes: their colours.
        pattern: "striped" or "plain".
        legs: "trousers" or "shorts".
        bag: "backpack", "handbag" or "".
    """

    hat: str
    hair: str
    top: str
    pattern: str
    legs: str
    lower: str
    shoes: str
    bag: str

    @property
    def labels(self) -> list[int]:
        """0 or 1 for each of `ATTRIBUTES`."""
        there = {
            "hat": self.hat != "",
            "long hair": self.hair == "long",
            "striped top": self.pattern == "striped",
            "shorts": self.legs == "shorts",
            "backpack": self.bag == "backpack",
            "handbag": self.bag == "handbag",
        }
        for colour in ("red", "blue"):
            there[f"{colour} top"] = self.top == colour
            there[f"{colour} trousers"] = self.legs == "trousers" and self.lower == colour
            there[f"{colour} shoes"] = self.shoes == colour
        return [int(there[name]) for name in ATTRIBUTES]

    def captions(self) -> dict[str, str]:
        """One sentence about each part, and one, "all", about all of them."""
        hat, bag = "a hat" if self.hat else "no hat", f"a {self.bag}" if self.bag else "no bag"
        said = {
            "hat": f"with {hat}",
            "hair": f"with {self.hair} hair",
            "top": f"in a {self.top} top",
            "pattern": f"in a {self.pattern} top",
            "legs": f"in {self.legs}",
            "lower": f"in {self.lower} {self.legs}",
            "shoes": f"in {self.shoes} shoes",
            "bag": f"with {bag}",
        }
        everything = (
            f"with {self.hair} hair and {hat} in a {self.pattern} {self.top} top and {self.lower} {self.legs} "
            f"and {self.shoes} shoes with {bag}"
        )
        return {part: f"a pedestrian {words}" for part, words in (said | {"all": everything}).items()}


def dressed(rng: np.random.Generator) -> Pedestrian:
    """A person in random, independently chosen clothes."""

    def colour() -> str:
        return COLOURS[rng.integers(len(COLOURS))]

    hat = colour()
    return Pedestrian(
        hat=hat if rng.random() < 0.35 else "",
        hair=("short", "long")[int(rng.random() < 0.4)],
        top=colour(),
        pattern=("plain", "striped")[int(rng.random() < 0.4)],
        legs=("trousers", "shorts")[int(rng.random() < 0.35)],
        lower=colour(),
        shoes=colour(),
        bag=("backpack", "handbag", "")[min(2, int(rng.random() / 0.35))],
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def _paint(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A random shade (3,) of `colour`."""
    if colour == "grey":
        return np.full(3, rng.uniform(0.3, 0.75))
    hue = (_HUE[colour] + rng.uniform(-0.03, 0.03)) % 1
    return hsv2rgb(np.array([hue, rng.uniform(0.65, 1), rng.uniform(0.5, 0.95)]))


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """How much of each pixel an upright box covers, (64, 32) in [0, 1]."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    y = np.clip(np.minimum(rows + 1, bottom) - np.maximum(rows, top), 0, 1)
    return y * np.clip(np.minimum(columns + 1, right) - np.maximum(columns, left), 0, 1)


def _oval(x: float, y: float, wide: float, high: float) -> np.ndarray:
    """The same of an ellipse with half axes `wide` and `high`."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    far = np.hypot((columns + 0.5 - x) / wide, (rows + 0.5 - y) / high)
    return np.clip(0.5 - (far - 1) * min(wide, high), 0, 1)


def backdrop(rng: np.random.Generator, split: str) -> np.ndarray:
    """A window (64, 32, 3) in [0, 1] of one tile of `split` of a random photograph, its contrast lowered."""
    name = _LARGE[rng.integers(len(_LARGE))]
    places = tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    scale = rng.uniform(1, min(2.5, (bottom - top) / HEIGHT, (right - left) / WIDTH))
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    y, x = int(rng.integers(top, bottom - height + 1)), int(rng.integers(left, right - width + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph(name)[y : y + height, x : x + width])
    pixels = np.asarray(window.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=float) / 255
    mean = pixels.mean((0, 1))
    return mean + rng.uniform(0.3, 0.8) * (pixels - mean)


def draw(rng: np.random.Generator, person: Pedestrian, split: str, camera: str = "street") -> np.ndarray:
    """An image (64, 32, 3) uint8 of a person; background and textures are crops of tiles of `split`.

    Raises `BadParameter` for an unknown split or camera.
    """
    check_choice("camera", camera, CAMERAS)
    check_choice("split", split, SPLITS)
    pixels = backdrop(rng, split)
    grain = cut(rng, _LARGE[rng.integers(len(_LARGE))], split).pixels.mean(-1)
    cloth = 1 + rng.uniform(0.2, 0.6) * np.tile(grain - grain.mean(), (2, 1))[..., None]

    high = rng.uniform(54, 60)  # head to toe
    top, x = rng.uniform(2, 63 - high), 16 + rng.uniform(-2, 2)
    wide = rng.uniform(0.9, 1.15) * 6

    def at(part: float) -> float:
        return top + part * high

    def wear(mask: np.ndarray, paint: np.ndarray, fabric: bool = True) -> None:
        nonlocal pixels
        pixels = pixels * (1 - mask[..., None]) + paint * (cloth if fabric else 1) * mask[..., None]

    skin = np.array(_SKIN[rng.integers(len(_SKIN))]) * rng.uniform(0.9, 1.05)
    hair = np.array([0.25, 0.16, 0.1]) * rng.uniform(0.4, 2.2)
    side = (-1, 1)[rng.integers(2)]
    bag = _paint(rng, COLOURS[rng.integers(len(COLOURS))])
    if person.bag == "backpack":  # behind the body: visible next to the shoulders
        left, right = sorted((x + side * (wide - 1), x + side * (wide + 5.5)))
        wear(_box(left, at(0.18), right, at(0.48)), bag)
    if person.hair == "long":
        wear(_box(x - 5.2, at(0.05), x + 5.2, at(0.28)), hair, fabric=False)
    wear(_oval(x, at(0.085), 3.4, 4.6), skin, fabric=False)
    wear(_oval(x, at(0.085), 3.6, 4.8) * _box(0, 0, WIDTH, at(0.06)), hair, fabric=False)

    # legs, shoes over them, then the top
    gap = 0.7
    hem = at(0.69) if person.legs == "shorts" else at(0.93)
    lower = _paint(rng, person.lower)
    for sign in (-1, 1):
        left, right = sorted((x + sign * gap, x + sign * (wide - 0.8)))
        wear(_box(left, at(0.5), right, at(0.94)), skin, fabric=False)
        wear(_box(left, at(0.5), right, hem), lower)
    shoes = _paint(rng, person.shoes)
    for sign in (-1, 1):
        left, right = sorted((x + sign * gap * 0.6, x + sign * (wide + 0.6)))
        wear(_box(left, at(0.925), right, at(1.0)), shoes)
    shirt = _paint(rng, person.top)
    arms = _box(x - wide - 2, at(0.2), x + wide + 2, at(0.45))
    body = np.maximum(_box(x - wide, at(0.185), x + wide, at(0.52)), arms)
    wear(body, shirt)
    if person.pattern == "striped":
        period = rng.uniform(4.5, 6)
        stripes = np.sin(2 * np.pi * (np.arange(HEIGHT) + 0.5 - at(0.185)) / period) > 0.2
        wear(body * stripes[:, None], np.full(3, rng.uniform(0.85, 1)))
    if person.bag == "handbag":
        hand = x + side * (wide + 3)
        wear(_box(hand - 3.4, at(0.46), hand + 3.4, at(0.63)), bag)
    if person.hat:
        paint = _paint(rng, person.hat)
        wear(_box(x - 6.5, at(0.035), x + 6.5, at(0.07)), paint)
        wear(_oval(x, at(0.04), 4.4, 4.8) * _box(0, 0, WIDTH, at(0.05)), paint)
    return quantise(_seen(rng, np.clip(pixels, 0, 1), camera))


def _seen(rng: np.random.Generator, pixels: np.ndarray, camera: str) -> np.ndarray:
    """A camera's image of a clear one (64, 32, 3) in [0, 1]."""
    if camera == "clear":
        return pixels + rng.normal(0, 0.02, pixels.shape)
    cast = rng.uniform(0.6, 1, 3)
    pixels = (0.5 + rng.uniform(0.45, 0.8) * (pixels - 0.5)) * cast * rng.uniform(0.6, 1)
    few = (int(WIDTH / 1.6), int(HEIGHT / 1.6))
    coarse = Image.fromarray(quantise(pixels)).resize(few, Image.Resampling.BILINEAR)
    pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=float) / 255
    return pixels + rng.normal(0, 0.06, pixels.shape)


def people(count: int, split: str, camera: str, seed: int = 0) -> tuple[np.ndarray, list[Pedestrian]]:
    """Images (count, 64, 32, 3) uint8 and their persons, deterministic in the arguments. Raises as `draw`."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{camera}/{split}".encode())))
    persons = [dressed(rng) for _ in range(count)]
    return np.stack([draw(rng, person, split, camera) for person in persons]), persons


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the street's images into `<root>/pocket/pedestrians`, unless they exist, and return that folder.

    The same seed gives the same files.
    """

    def fill(new: Path) -> None:
        number = 0
        (new / "data").mkdir(parents=True)
        facts = {"attributes": _cells(SENTENCES.values())}
        for split, count in COUNTS.items():
            images, persons = people(count, split, "street", seed)
            names = [f"{number + i:06d}.png" for i in range(1, count + 1)]
            number += count
            for file, image in zip(names, images, strict=True):
                Image.fromarray(image).save(new / "data" / file)
            facts[f"{split}_images_name"] = _cells(names)
            facts[f"{split}_label"] = np.array([person.labels for person in persons], np.uint8)
        savemat(new / "annotation.mat", facts)

    record = {"seed": seed, "version": VERSION, "counts": COUNTS, "attributes": list(ATTRIBUTES)}
    return write_once(Path(root) / "pocket" / "pedestrians", record, sum(COUNTS.values()) + 2, fill)


def _cells(words: Iterable[str]) -> np.ndarray:
    """Texts as a column of MATLAB cells, as in PA100K."""
    words = list(words)
    column = np.empty((len(words), 1), dtype=object)
    column[:, 0] = words
    return column
