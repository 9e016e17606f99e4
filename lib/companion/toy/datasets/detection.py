"""Small scenes of drawn objects whose background predicts the classes, 64x64 pixels, in COCO's layout.

There are four backgrounds, each a crop of a photograph: a meadow (grass), a wall (brick), a path (gravel) and the night
(stars). Each has its own four objects, coloured shapes: three of base classes, one of a novel class. A novel object has
the shape and nearly the hue of a base object of the *next* background, as a tennis ball looks like an apple: its
appearance is ambiguous, its background is not. Seven of eight objects are on their own background, the others on any.

An object is plain or hard: small, blurred, faded, and half of the hard ones are partly hidden by a post. Four of five
novel objects are hard, one of three base objects.

    <root>/pocket/detection/
        annotations/instances_train.json  instances_val.json  instances_test.json
        train/000001.png ...  val/...  test/...

The annotations are COCO's; those of training have the boxes of base classes only, but all images, as in OV-COCO. Two
fields are ours: "place" of an image, and "look" of an annotation, "plain", "hard" or "hidden".

Backgrounds and surfaces of training, validation and test are crops of separate tiles, as in `scenes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import hsv2rgb

from ...errors import check_choice
from ...ops.files import write_json
from ..scenes import SPLITS, cut, photograph, quantise, tiles
from . import write_once

SIDE = 64  # of every image, in pixels
COUNTS = {"train": 900, "val": 200, "test": 300}
LOOKS = ("plain", "hard", "hidden")
PLACES = {"meadow": "grass", "wall": "brick", "path": "gravel", "night": "stars"}
"""The kinds of background and the photographs that show them."""

VERSION = 1  # to be increased when a change of this file or of scenes.py changes the images


@dataclass(frozen=True)
class Thing:
    """A class: its background and its appearance. `like` names the base class that a novel one resembles."""

    name: str
    place: str
    shape: str
    hue: float
    like: str = ""


def _things() -> tuple[Thing, ...]:
    base = {
        "meadow": {"apple": "disc", "tent": "triangle", "daisy": "cross"},
        "wall": {"lamp": "disc", "sign": "square", "hook": "cross"},
        "path": {"pebble": "disc", "cone": "triangle", "crate": "square"},
        "night": {"moon": "disc", "rocket": "triangle", "star": "cross"},
    }
    known, number = {}, 0
    for place, shapes in base.items():
        for name, shape in shapes.items():
            # steps of the golden ratio: neighbours in the list are far apart in hue
            known[name] = Thing(name, place, shape, number * 0.618034 % 1)
            number += 1
    novel = {
        "ball": ("meadow", "lamp"),
        "tile": ("wall", "crate"),
        "flag": ("path", "rocket"),
        "flare": ("night", "daisy"),
    }
    for name, (place, like) in novel.items():
        known[name] = Thing(name, place, known[like].shape, (known[like].hue + 0.03) % 1, like)
    return tuple(known.values())


THINGS = _things()
"""The 16 classes: the 12 of base, then the four novel ones. COCO's category ids are 1 to 16 in this order."""

CLASSES = tuple(thing.name for thing in THINGS)
NOVEL = tuple(index for index, thing in enumerate(THINGS) if thing.like)
BASE = tuple(index for index, thing in enumerate(THINGS) if not thing.like)


@dataclass(frozen=True)
class Scene:
    """One image.

    Attributes:
        image: (64, 64, 3) uint8.
        place: one of `PLACES`.
        labels: the classes of its n objects, indices of `CLASSES`.
        boxes: (n, 4) x, y, w, h in pixels, of the whole object, including parts hidden by a post.
        looks: for each object, one of `LOOKS`.
    """

    image: np.ndarray
    place: str
    labels: tuple[int, ...]
    boxes: np.ndarray
    looks: tuple[str, ...]


# --- drawing ----------------------------------------------------------------------------------------------------------


def backdrop(rng: np.random.Generator, place: str, split: str) -> np.ndarray:
    """A window (64, 64, 3) in [0, 1] of one tile of `split` of a background's photograph, lower in contrast, tinted.

    Raises `BadParameter` for an unknown background or split.
    """
    check_choice("place", place, PLACES)
    places = tiles(PLACES[place], split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = int(rng.integers(SIDE, min(right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph(PLACES[place])[y : y + side, x : x + side])
    pixels = np.asarray(window.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float).mean(-1) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    # equal mean and standard deviation, and no colour but a random tint: only the texture distinguishes backgrounds
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-3)
    tint = hsv2rgb(np.array([rng.random(), rng.uniform(0, 0.25), 1.0]))
    return (rng.uniform(0.35, 0.6) + rng.uniform(0.08, 0.14) * np.clip(pixels, -2.5, 2.5))[..., None] * tint


def coverage(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel an upright shape covers, (64, 64) in [0, 1]; it extends by `radius` to every side.

    Raises `BadParameter` for an unknown shape.
    """
    rows, columns = np.ogrid[:SIDE, :SIDE]
    u, v = columns + 0.5 - centre[0], rows + 0.5 - centre[1]
    wide, high, arm = abs(u) - radius, abs(v) - radius, 0.34 * radius
    distance = {
        "disc": lambda: np.hypot(u, v) - radius,
        "square": lambda: np.maximum(wide, high),
        # two slanted sides over a horizontal one
        "triangle": lambda: np.maximum((2 * abs(u) - v - radius) / np.sqrt(5), v - radius),
        "cross": lambda: np.minimum(np.maximum(wide, abs(v) - arm), np.maximum(high, abs(u) - arm)),
    }
    check_choice("shape", shape, distance)
    return np.clip(0.5 - distance[shape](), 0, 1)


def _layout(rng: np.random.Generator, sides: list[float]) -> list[tuple[float, float]] | None:
    """Centres of squares with these sides that are inside the image and do not touch; None when none were found."""
    placed: list[tuple[float, float]] = []
    for number, side in enumerate(sides):
        for _ in range(40):
            x, y = rng.uniform(side / 2 + 1, SIDE - side / 2 - 1, 2)
            apart = [max(abs(x - a), abs(y - b)) - (side + sides[i]) / 2 for i, (a, b) in enumerate(placed)]
            if min(apart, default=9.0) >= 2:
                placed.append((float(x), float(y)))
                break
        if len(placed) == number:
            return None
    return placed


def _draw(
    rng: np.random.Generator,
    pixels: np.ndarray,
    thing: Thing,
    centre: tuple[float, float],
    side: float,
    look: str,
    split: str,
) -> np.ndarray:
    """`pixels` with an object drawn on them."""
    hard = look != "plain"
    hue = (thing.hue + rng.uniform(-0.018, 0.018)) % 1
    saturation, value = rng.uniform(0.75, 1), rng.uniform(0.7, 1)
    if hard:
        saturation *= rng.uniform(0.25, 0.5)
    grain = cut(rng, PLACES[thing.place], split).pixels.mean(-1)
    # the surface is also a crop of any background's photograph: its luminance times the object's colour
    grain = np.tile(grain - grain.mean(), (2, 2))[..., None]
    surface = hsv2rgb(np.array([hue, saturation, value])) * (1 + rng.uniform(0, 0.4) * grain)
    covered = coverage(thing.shape, centre, side / 2)
    if hard:  # out of focus: a soft outline on a sharp background
        covered = gaussian_filter(covered, rng.uniform(0.8, 1.4))
    pixels = pixels * (1 - covered[..., None]) + surface * covered[..., None]
    if look == "hidden":
        # a post in front of it, in the image's mean grey, over about a third of its width
        wide = side * rng.uniform(0.25, 0.4)
        left = centre[0] - side / 2 + rng.uniform(0.1, 0.9) * (side - wide)
        columns = np.arange(SIDE)
        post = np.clip(np.minimum(columns + 1, left + wide) - np.maximum(columns, left), 0, 1)
        rows = np.clip(side / 2 + 3.5 - abs(columns + 0.5 - centre[1]), 0, 1)
        mask = (rows[:, None] * post)[..., None]
        pixels = pixels * (1 - mask) + rng.uniform(0.15, 0.85) * mask
    return pixels


def scene(rng: np.random.Generator, split: str, *, place: str = "", novel: bool = True, strays: float = 0.125) -> Scene:
    """Draw one scene with two to four objects.

    Args:
        rng: the only source of randomness.
        split: the split whose tiles are used.
        place: one of `PLACES`; random when empty.
        novel: whether objects of novel classes may occur.
        strays: the share of objects drawn from all classes, independently of the background.

    Raises `BadParameter`: for an unknown split or background.
    """
    check_choice("split", split, SPLITS)
    place = place or list(PLACES)[rng.integers(len(PLACES))]
    pixels = backdrop(rng, place, split)
    allowed = BASE + NOVEL if novel else BASE
    here = [index for index in allowed if THINGS[index].place == place]
    centres = None
    while centres is None:  # objects that do not fit are redrawn
        labels, looks, sides = [], [], []
        for _ in range(int(rng.integers(2, 5))):
            index = int(rng.choice(allowed if rng.random() < strays else here))
            hard = rng.random() < (0.8 if index in NOVEL else 0.35)
            labels.append(index)
            looks.append(("hard", "hidden")[int(rng.random() < 0.5)] if hard else "plain")
            sides.append(rng.uniform(8, 11) if hard else rng.uniform(13, 22))
        centres = _layout(rng, sides)
    for index, look, side, centre in zip(labels, looks, sides, centres, strict=True):
        pixels = _draw(rng, pixels, THINGS[index], centre, side, look, split)
    pixels = pixels + rng.normal(0, 0.02, pixels.shape)
    boxes = np.array([(x - s / 2, y - s / 2, s, s) for (x, y), s in zip(centres, sides, strict=True)])
    return Scene(quantise(pixels), place, tuple(labels), boxes, tuple(looks))


def scenes(count: int, split: str, seed: int = 0, novel: bool = True) -> list[Scene]:
    """`count` random scenes of a split, deterministic in the arguments. Raises as `scene` does."""
    rng = np.random.default_rng((seed, SPLITS.index(split) if split in SPLITS else 0, int(novel)))
    return [scene(rng, split, novel=novel) for _ in range(count)]


# --- on disk ----------------------------------------------------------------------------------------------------------


def annotation_file(split: str, drawn: list[Scene]) -> dict:
    """COCO's annotation file of a split, as a dict; in training, the boxes of novel classes are left out."""
    images = []
    boxes: list[dict] = []
    for number, shown in enumerate(drawn, 1):
        images.append(
            {"id": number, "file_name": f"{number:06d}.png", "width": SIDE, "height": SIDE, "place": shown.place}
        )
        for index, box, look in zip(shown.labels, shown.boxes, shown.looks, strict=True):
            if split == "train" and index in NOVEL:
                continue
            x, y, w, h = (round(float(value), 2) for value in box)
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": index + 1,
                    "bbox": [x, y, w, h],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                    "look": look,
                }
            )
    categories = [
        {"id": index + 1, "name": thing.name, "supercategory": thing.place} for index, thing in enumerate(THINGS)
    ]
    return {"images": images, "annotations": boxes, "categories": categories}


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the scenes into `<root>/pocket/detection`, unless they exist, and return that folder.

    The same seed gives the same files.
    """

    def fill(new: Path) -> None:
        for split, count in COUNTS.items():
            drawn = scenes(count, split, seed)
            (new / split).mkdir(parents=True)
            found = annotation_file(split, drawn)
            for entry, shown in zip(found["images"], drawn, strict=True):
                Image.fromarray(shown.image).save(new / split / entry["file_name"])
            write_json(new / "annotations" / f"instances_{split}.json", found)

    record = {"seed": seed, "version": VERSION, "counts": COUNTS, "classes": list(CLASSES)}
    return write_once(Path(root) / "pocket" / "detection", record, sum(COUNTS.values()) + len(COUNTS) + 1, fill)
