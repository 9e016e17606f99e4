"""The synthetic scenes: 32x32 images of one drawn object on a real photograph, with caption, box, mask, attributes.

The photographs ship with scikit-image and scikit-learn, so nothing is downloaded. Each is divided into a 4x4 grid of
tiles, every tile belongs to one split, and a crop never leaves its tile: training, validation and test images share no
pixel of any photograph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage import data
from skimage.color import hsv2rgb
from sklearn.datasets import load_sample_image

from ..errors import BadParameter, check_choice

SIZE = 32  # side of every image, in pixels
SPLITS = ("train", "val", "test")
SHAPES = ("disc", "ring", "cross", "bar")
HUES = ("red", "green", "cyan", "violet")  # a quarter of the colour circle apart
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# The split of each tile of a photograph: 9 train, 3 val, 4 test, spread so that each covers all parts.
TILES = ("ttvs", "tstt", "vtst", "svtt")
_LETTER = {"train": "t", "val": "v", "test": "s"}


@dataclass(frozen=True)
class Photograph:
    """A bundled photograph: its loader, the part that is used, and the factor by which it is reduced (block means)."""

    load: Callable[[], np.ndarray]
    part: tuple[slice, slice] = (slice(None), slice(None))
    reduce: int = 1


# The names are the words of the captions.
PHOTOGRAPHS = {
    "astronaut": Photograph(data.astronaut),
    "brick": Photograph(data.brick),
    "cameraman": Photograph(data.camera),
    "cat": Photograph(data.cat),
    "coffee": Photograph(data.coffee),
    "coins": Photograph(data.coins),
    "flower": Photograph(lambda: load_sample_image("flower.jpg")),
    "grass": Photograph(data.grass),
    "gravel": Photograph(data.gravel),
    "moon": Photograph(data.moon),
    "motorcycle": Photograph(lambda: data.stereo_motorcycle()[0]),
    "page": Photograph(data.page),
    "retina": Photograph(data.retina, (slice(205, 1205), slice(205, 1205)), 2),  # the square inside the round image
    "rocket": Photograph(data.rocket),
    "stars": Photograph(data.hubble_deep_field, reduce=2),
    "temple": Photograph(lambda: load_sample_image("china.jpg")),
    "tissue": Photograph(data.immunohistochemistry),
}


@dataclass(frozen=True)
class Cut:
    """A square window of a photograph: `box` (left, top, right, bottom) in it, `pixels` (32, 32, 3) in [0, 1]."""

    photograph: str
    box: tuple[int, int, int, int]
    pixels: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One synthetic image and its annotations.

    Attributes:
        image: (32, 32, 3) uint8.
        caption: for example "a large red disc at the top left on grass".
        label: class of the object, `shape * len(HUES) + hue`, in 0..15 (`CLASSES` names them).
        box: (left, top, right, bottom) of the object's visible pixels, right and bottom excluded.
        mask: (32, 32) bool, True where the object covers at least half of the pixel.
        centre: (x, y) of the object in pixels.
        attributes: shape, hue, size, position ("place"), background, each as the word in the caption.
    """

    image: np.ndarray
    caption: str
    label: int
    box: tuple[int, int, int, int]
    mask: np.ndarray
    centre: tuple[float, float]
    attributes: dict[str, str]


CLASSES = tuple(f"{hue} {shape}" for shape in SHAPES for hue in HUES)


@functools.cache
def photograph(name: str) -> np.ndarray:
    """The used part of a photograph, (height, width, 3) uint8. Raises `BadParameter` for unknown names."""
    check_choice("photograph", name, PHOTOGRAPHS)
    entry = PHOTOGRAPHS[name]
    pixels = np.asarray(entry.load())[entry.part]
    return np.array(Image.fromarray(pixels).convert("RGB").reduce(entry.reduce))


def tiles(name: str, split: str) -> list[tuple[int, int, int, int]]:
    """The tiles (left, top, right, bottom) of a photograph that belong to `split`; the three splits tile it."""
    check_choice("split", split, SPLITS)
    height, width = photograph(name).shape[:2]
    y, x = np.linspace(0, height, 5).astype(int).tolist(), np.linspace(0, width, 5).astype(int).tolist()
    return [
        (x[column], y[row], x[column + 1], y[row + 1])
        for row in range(4)
        for column in range(4)
        if TILES[row][column] == _LETTER[split]
    ]


def cut(rng: np.random.Generator, name: str, split: str) -> Cut:
    """A random window of 32 to 64 pixels inside one tile of `split`, scaled to 32x32 and mirrored at random."""
    places = tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = int(rng.integers(SIZE, min(64, right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph(name)[y : y + side, x : x + side])
    pixels = np.asarray(window.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return Cut(name, (x, y, x + side, y + side), pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def coverage(shape: str, centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """How much of each pixel the shape covers, (32, 32) in [0, 1].

    Args:
        shape: one of `SHAPES`.
        centre: (x, y) in pixels, the image's corner being (0, 0).
        radius: half of the longest extent, in pixels.
        angle: rotation in radians, counted from the x axis towards the y axis (which points down).
    """
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    dx, dy = columns - centre[0], rows - centre[1]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    far, arm = np.hypot(u, v), 0.3 * radius
    bar = np.maximum(abs(u) - radius, abs(v) - arm)
    distance = {
        "disc": far - radius,
        "ring": abs(far - 0.75 * radius) - 0.25 * radius,
        "cross": np.minimum(bar, np.maximum(abs(v) - radius, abs(u) - arm)),
        "bar": bar,
    }
    if shape not in distance:
        raise BadParameter("shape", shape, SHAPES)
    return np.clip(0.5 - distance[shape], 0, 1)


def cell(x: float, y: float) -> int:
    """The index of the 3x3 cell, in reading order, that contains a point of the image: 0..8."""
    return 3 * min(int(3 * y / SIZE), 2) + min(int(3 * x / SIZE), 2)


def canvas(rng: np.random.Generator, split: str, contrast: tuple[float, float], background: str | None = None) -> Cut:
    """A crop of a photograph (a random one unless named) whose contrast is lowered to a random factor in `contrast`."""
    names = list(PHOTOGRAPHS)
    taken = cut(rng, background or names[rng.integers(len(names))], split)
    mean = taken.pixels.mean((0, 1))
    return Cut(taken.photograph, taken.box, mean + rng.uniform(*contrast) * (taken.pixels - mean))


def quantise(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], clipped there, as uint8."""
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def scene(
    rng: np.random.Generator,
    split: str,
    *,
    shape: str | None = None,
    hue: str | None = None,
    centre: tuple[float, float] | None = None,
    radius: tuple[float, float] = (4, 7),
    angle: float | None = None,
    contrast: tuple[float, float] = (0.3, 0.7),
) -> Scene:
    """Draw one scene; arguments that are not given are random.

    Args:
        rng: the only source of randomness: equal generators give equal scenes.
        split: "train", "val" or "test": the split whose tiles are used for the background and the object's texture.
        shape, hue: one of `SHAPES`, one of `HUES`.
        centre: (x, y) in pixels; random ones keep half of the object inside the image.
        radius: range of the object's radius in pixels; "large" is above 5.5.
        angle: rotation in radians; random ones are within 0.3 of upright.
        contrast: range of the factor on the background's contrast.
    """
    shape = shape or SHAPES[rng.integers(len(SHAPES))]
    hue = hue or HUES[rng.integers(len(HUES))]
    check_choice("hue", hue, HUES)
    r = rng.uniform(*radius)
    x, y = centre or rng.uniform(0.5 * r, SIZE - 0.5 * r, 2)
    angle = rng.uniform(-0.3, 0.3) if angle is None else angle
    background = canvas(rng, split, contrast)

    colour = np.array([(HUES.index(hue) + rng.uniform(-0.3, 0.3)) / 4 % 1, rng.uniform(0.7, 1), rng.uniform(0.6, 1)])
    names = list(PHOTOGRAPHS)
    grain = cut(rng, names[rng.integers(len(names))], split).pixels.mean(-1, keepdims=True)
    # the object's surface is a photograph too: its luminance times the object's colour
    surface = hsv2rgb(colour) * (1 + rng.uniform(0, 0.6) * (grain - grain.mean()))
    covered = coverage(shape, (x, y), r, angle)[..., None]
    pixels = background.pixels * (1 - covered) + surface * covered + rng.normal(0, 0.02, (SIZE, SIZE, 3))

    mask = covered[..., 0] >= 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    attributes = {
        "shape": shape,
        "hue": hue,
        "size": SIZES[int(r > 5.5)],
        "place": PLACES[cell(x, y)],
        "background": background.photograph,
    }
    return Scene(
        image=quantise(pixels),
        caption="a {size} {hue} {shape} at the {place} on {background}".format(**attributes),
        label=SHAPES.index(shape) * len(HUES) + HUES.index(hue),
        box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
        mask=mask,
        centre=(float(x), float(y)),
        attributes=attributes,
    )


def scenes(count: int, split: str, seed: int = 0) -> list[Scene]:
    """`count` random scenes of a split; the same seed gives the same scenes."""
    rng = np.random.default_rng((seed, SPLITS.index(split) if split in SPLITS else 0))
    return [scene(rng, split) for _ in range(count)]
