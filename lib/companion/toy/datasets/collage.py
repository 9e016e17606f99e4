"""Collages: 32x32 images of four independent factors, for teachers that are each invariant to one of them.

    <root>/pocket/collage/{train,val,test}/<texture>/00000.png   factors.csv   collage.json

* texture: the background is a crop of one of eight photographs that ship with scikit-image and scikit-learn, in grey,
  tinted through all hues of the colour circle.
* shape: a disc, ring, cross or square near the middle.
* hue: the shape's, one of eight. The background's tint has every hue, so the object itself must be attended to.
* quadrant: a reddish square of 8x8 pixels at a random position in one of the four corners. It has the luma of the
  texture under it and differs only in colour.

A tint does not change a pixel's luma (ITU-R 601): in grey, neither hues nor the reddish square are visible. The folders
are torchvision's ImageFolder by texture; factors.csv (path,texture,shape,hue,quadrant) has all four. Splits share no
pixel of a photograph: each uses its own tiles (`scenes.TILES`).
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.classification import image_folder, in_memory
from ...errors import CorruptFile, MissingData, check_choice
from . import scenes, write_once, write_table
from .scenes import SIZE, SPLITS, quantise

TEXTURES = ("brick", "coins", "grass", "gravel", "page", "stars", "temple", "tissue")
SHAPES = ("disc", "ring", "cross", "square")
HUES, QUADRANTS = 8, ("top left", "top right", "bottom left", "bottom right")
FACTORS = {"texture": len(TEXTURES), "shape": len(SHAPES), "hue": HUES, "quadrant": len(QUADRANTS)}
COUNTS = {"train": 3000, "val": 800, "test": 1500}
MEAN, STD = 0.5, 0.5  # normalisation of pixels in 0..1
VERSION = 1  # to be increased when a change of this file or of scenes.py changes the images

WINDOW = 44  # largest side of a crop, in pixels of the photograph
MARKER, RANGE = 8, 4  # side of the reddish square, and its distances 1 to 4 from the image's edge
STRENGTH, MARKED = 0.6, 0.9  # saturation of the tint, and of the square
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Collage:
    """An image (32, 32, 3) uint8, and its factors in the order of `FACTORS`."""

    image: np.ndarray
    factors: tuple[int, int, int, int]


@functools.cache
def _plane() -> np.ndarray:
    """Two directions in colour space (2, 3) that preserve the luma; the first is reddish."""
    first = np.array([1.0, 0, 0]) - LUMA[0] / (LUMA @ LUMA) * LUMA
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(LUMA / np.linalg.norm(LUMA), first)])


def tint(hue: np.ndarray | float, strength: np.ndarray | float) -> np.ndarray:
    """The factor (..., 3) that colours a grey value; `hue` in turns. Its mean weighted by `LUMA` is 1."""
    turn = 2 * np.pi * np.asarray(hue)
    colour = np.stack([np.cos(turn), np.sin(turn)], -1) @ _plane()
    return 1 + np.asarray(strength)[..., None] * colour * np.sqrt(1.5)


@functools.cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(scenes.photograph(name)).convert("L")


def texture(rng: np.random.Generator, name: str, split: str) -> np.ndarray:
    """A crop of a photograph (32, 32) from the tiles of `split`, mean 0, standard deviation 1, clipped at 2.5."""
    places = scenes.tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = min(WINDOW, right - left, bottom - top)
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    window = _photograph(name).crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = np.asarray(window, dtype=np.float32)
    return np.clip((pixels - pixels.mean()) / (pixels.std() + 1e-3), -2.5, 2.5)


def coverage(shape: str, centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """As `scenes.coverage`, for one of this file's `SHAPES`."""
    if shape != "square":
        return scenes.coverage(shape, centre, radius, angle)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    dx, dy = columns - centre[0], rows - centre[1]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return np.clip(0.5 - np.maximum(abs(u) - 0.8 * radius, abs(v) - 0.8 * radius), 0, 1)


def collage(rng: np.random.Generator, split: str, factors: tuple[int, int, int, int] | None = None) -> Collage:
    """Draw one image; factors that are not given are random."""
    kind, shape, hue, quadrant = factors or [int(rng.integers(n)) for n in FACTORS.values()]
    grain = texture(rng, TEXTURES[kind], split)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    turn = rng.uniform(0, 2 * np.pi)
    # the tint runs once through the colour circle along one side of the image
    around = rng.uniform() + rng.choice((-1, 1)) * (columns * np.cos(turn) + rows * np.sin(turn)) / SIZE
    strength = np.full((SIZE, SIZE), STRENGTH * rng.uniform(0.8, 1))
    y, x = (int(n) for n in rng.integers(1, RANGE + 1, 2))
    y, x = (SIZE - MARKER - y if quadrant // 2 else y), (SIZE - MARKER - x if quadrant % 2 else x)
    around[y : y + MARKER, x : x + MARKER], strength[y : y + MARKER, x : x + MARKER] = 0, MARKED
    ground = (0.42 + 0.13 * grain)[..., None] * tint(around, strength)

    centre = tuple(SIZE / 2 + rng.uniform(-2, 2, 2))
    covered = coverage(SHAPES[shape], centre, rng.uniform(6, 8), rng.uniform(-0.3, 0.3))[..., None]
    own = tint((hue + rng.uniform(-0.25, 0.25)) / HUES, STRENGTH * rng.uniform(0.8, 1)) * rng.uniform(0.45, 0.6)
    surface = own * (1 + 0.06 * grain[::-1, ::-1, None])
    pixels = ground * (1 - covered) + surface * covered + rng.normal(0, 0.02, (SIZE, SIZE, 3))
    return Collage(quantise(pixels), (kind, shape, hue, quadrant))


def collages(count: int, split: str, seed: int = 0) -> list[Collage]:
    """`count` random collages of a split; the same seed gives the same ones. Raises `BadParameter` (split)."""
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, SPLITS.index(split), 3))
    return [collage(rng, split) for _ in range(count)]


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the three splits to `<root>/pocket/collage` and return it; a complete one is left unchanged."""

    def fill(new: Path) -> None:
        rows = []
        for split in SPLITS:
            for name in TEXTURES:
                (new / split / name).mkdir(parents=True)
            for i, drawn in enumerate(collages(COUNTS[split], split, seed)):
                path = f"{split}/{TEXTURES[drawn.factors[0]]}/{i:05d}.png"
                Image.fromarray(drawn.image).save(new / path)
                rows.append([path, *drawn.factors])
        write_table(new / "factors.csv", ["path", *FACTORS], rows)

    record = {"seed": seed, "version": VERSION, "counts": COUNTS}
    return write_once(Path(root) / "pocket" / "collage", record, sum(COUNTS.values()) + 2, fill)


@dataclass(frozen=True)
class Part:
    """A split in memory: images (n, 3, 32, 32), pixels from -1 to 1, and factors (n, 4) in the order of `FACTORS`."""

    images: Tensor
    factors: Tensor


def read(root: str | Path, split: str) -> Part:
    """Read a split that `write` wrote below `root`, with the reader of class folders, in the order of generation.

    Raises:
        BadParameter: an unknown split.
        MissingData: the folder does not exist.
        CorruptFile: an image or the list cannot be read; its path is in the message.
    """
    check_choice("split", split, SPLITS)
    folder = Path(root) / "pocket" / "collage"
    listing = folder / "factors.csv"
    if not listing.is_file():
        layout = "{train,val,test}/<texture>/00000.png\nfactors.csv    path,texture,shape,hue,quadrant\ncollage.json"
        raise MissingData(
            "pocket collages", folder, layout, "companion.toy.datasets.collage.write(root, seed)", "none, drawn"
        )
    found = image_folder(folder)[split]
    place = {Path(path).relative_to(folder).as_posix(): i for i, path in enumerate(found.sources)}
    order, factors = [], []
    with listing.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                if not row["path"].startswith(f"{split}/"):
                    continue
                order.append(place[row["path"]])
                factors.append([int(row[name]) for name in FACTORS])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CorruptFile(listing, f"no image and four factors: {row}") from error
    if len(order) != len(place):
        raise CorruptFile(listing, f"{len(order)} images of {split}, not {len(place)}, as there are")
    pixels = in_memory(found).tensors[0]
    return Part((pixels[torch.tensor(order)] - MEAN) / STD, torch.tensor(factors))
