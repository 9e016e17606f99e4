"""Small images with captions for TIP, 16x16 pixels, whose two prompts restore information lost by degradation.

A scene has two coloured halves under a texture with a period of 4 pixels, rows, columns or checks, of one of four
contrasts. Degradation makes two things ambiguous, one for each prompt (section 14):

* Downscaling by four removes the kind of texture. The caption names it, for example rows.
* A faint texture, and a strong one that was blurred, look alike. The restoration prompt distinguishes them: "Deblur
  with sigma 0.9" names a blur to undo, "Dejpeg with quality 80" implies that there was none.

Kind, contrast and layout are independent, and a layout (two colours, the position and direction of their border)
belongs to one split. In addition there are crops of the photographs that ship with scikit-image and scikit-learn, "a
photograph of a cat", as real images; no two splits share a tile of one.

    <root>/pocket/restoration/{train,val,test}/captions.jsonl    {"file", "caption", "kind", "contrast"}
                                               images/0000.png   uint8 RGB

That is the layout of a user's folder (`data.restoration.own_folder`), with two additional fields; those of a photograph
are "" and 0.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data import restoration
from ...errors import BadParameter, CorruptFile, check_choice
from ...models.tip.degradations import Op, Recipe
from . import scenes, write_once
from .scenes import SPLITS

SIZE = 16  # side of every image, in pixels
KINDS = ("rows", "columns", "checks")
CONTRASTS = (0.15, 0.4, 0.7, 1.0)
COLOURS = ((0.90, 0.30, 0.25), (0.25, 0.75, 0.35), (0.30, 0.40, 0.95), (0.95, 0.85, 0.30))
COUNTS = {"train": (2400, 600), "val": (192, 48), "test": (384, 96)}  # scenes and photographs
VERSION = 1  # to be increased when a change of this file changes the images


class Listed(Recipe):
    """A recipe whose strengths are drawn from lists of values."""

    def value(self, rng: np.random.Generator, kind: str) -> float:
        values = getattr(self, kind)
        return values[rng.integers(len(values))]


# One pass, the values of the prototype (section 14). 16 pixels allow only one operation of each kind.
RECIPE = Listed(
    blur=(0.6, 0.9, 1.2),
    resize=(4.0,),
    noise=(0.05, 0.10, 0.20),
    jpeg=(20, 50, 80),
    passes=1,
    skip={"blur": 0.5, "resize": 0.75, "noise": 0.5, "jpeg": 0.5},
)
EDGE = "circular"  # the textures continue beyond the border
HEAVY = (Op("resize", 4.0), Op("noise", 0.10))
MILD = ((1.0, (Op("blur", 0.9),)), (0.15, (Op("jpeg", 80),)), (0.4, (Op("noise", 0.05),)))
"""Contrast and what was done: without the restoration prompt each could be another."""
WALK = (0.4, Op("blur", 0.6), (0.6, 0.9, 1.2))
"""Contrast, what was done, and the values of "Deblur with sigma"."""


@dataclass(frozen=True)
class Layout:
    """Two colours of `COLOURS`, the first row or column of the second, and whether the halves are left and right."""

    first: int
    second: int
    at: int
    upright: bool


_ALL = [
    Layout(a, b, at, upright)
    for a, b in itertools.permutations(range(len(COLOURS)), 2)
    for at in range(4, 13)
    for upright in (False, True)
]


def layouts(split: str) -> list[Layout]:
    """The layouts of a split: two thirds of all, a sixth and a sixth. Raises `BadParameter` for an unknown split."""
    check_choice("split", split, SPLITS)
    order = np.random.default_rng(0).permutation(len(_ALL))
    parts = np.split(order, [2 * len(_ALL) // 3, 5 * len(_ALL) // 6])
    return [_ALL[i] for i in parts[SPLITS.index(split)]]


def pattern(kind: str, side: int = SIZE) -> np.ndarray:
    """A texture, (side, side) of -1 and 1. Raises `BadParameter` for an unknown kind."""
    check_choice("kind", kind, KINDS)
    y, x = np.mgrid[:side, :side] // 2
    return 1.0 - 2.0 * ({"rows": y, "columns": x, "checks": x + y}[kind] % 2)


def paint(layout: Layout, kind: str, contrast: float) -> np.ndarray:
    """A scene, (16, 16, 3) uint8: colour times 0.6 + 0.4 contrast (+-1)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    place = (x if layout.upright else y) >= layout.at
    colour = np.where(place[..., None], COLOURS[layout.second], COLOURS[layout.first])
    return scenes.quantise(colour * (0.6 + 0.4 * contrast * pattern(kind))[..., None])


def caption(kind: str = "", photograph: str = "") -> str:
    """The caption of a scene or a photograph."""
    return f"a photograph of a {photograph}" if photograph else f"a picture with {kind}"


CAPTIONS = (*map(caption, KINDS), *(caption(photograph=name) for name in scenes.PHOTOGRAPHS))


def photograph(rng: np.random.Generator, name: str, split: str, side: int = SIZE) -> np.ndarray:
    """A crop of a photograph, (side, side, 3) uint8, inside one of the split's tiles, at full or half size."""
    places = scenes.tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    wide = side * int(rng.integers(1, 3)) if min(right - left, bottom - top) >= 2 * side else side
    if min(right - left, bottom - top) < side:
        raise BadParameter("side", side, f"at most {min(right - left, bottom - top)}, as the tiles of {name!r}")
    x, y = int(rng.integers(left, right - wide + 1)), int(rng.integers(top, bottom - wide + 1))
    window = Image.fromarray(scenes.photograph(name)[y : y + wide, x : x + wide])
    return np.asarray(window.resize((side, side), Image.Resampling.BOX))


@dataclass(frozen=True)
class Picture:
    """An image (16, 16, 3) uint8 and its annotations: kind and contrast are "" and 0 for a photograph."""

    image: np.ndarray
    caption: str
    kind: str = ""
    contrast: float = 0.0


def pictures(split: str, seed: int = 0, counts: tuple[int, int] | None = None) -> list[Picture]:
    """Scenes, then photographs, in the numbers of `counts`; deterministic in the arguments."""
    own = layouts(split)
    count, photographs = COUNTS[split] if counts is None else counts
    rng, found = np.random.default_rng((seed, SPLITS.index(split), 7)), []
    for _ in range(count):
        layout, kind = own[rng.integers(len(own))], KINDS[rng.integers(len(KINDS))]
        contrast = CONTRASTS[rng.integers(len(CONTRASTS))]
        found.append(Picture(paint(layout, kind, contrast), caption(kind), kind, contrast))
    names = list(scenes.PHOTOGRAPHS)
    for _ in range(photographs):
        name = names[rng.integers(len(names))]
        found.append(Picture(photograph(rng, name, split), caption(photograph=name)))
    return found


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the images of a seed into `<root>/pocket/restoration`, unless they exist, and return that folder."""

    def fill(new: Path) -> None:
        for split in SPLITS:
            (new / split / "images").mkdir(parents=True)
            lines = []
            for number, found in enumerate(pictures(split, seed)):
                file = f"{number:04d}.png"
                Image.fromarray(found.image).save(new / split / "images" / file, compress_level=1)
                row = {"file": file, "caption": found.caption, "kind": found.kind, "contrast": found.contrast}
                lines.append(json.dumps(row))
            (new / split / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    record = {"seed": seed, "version": VERSION, "counts": {split: list(counts) for split, counts in COUNTS.items()}}
    files = sum(map(sum, COUNTS.values())) + len(SPLITS) + 1
    return write_once(Path(root) / "pocket" / "restoration", record, files, fill)


@dataclass(frozen=True)
class Part:
    """A split in memory.

    Attributes:
        images: (n, 3, 16, 16) in [0, 1].
        captions: of each image.
        kinds, contrasts: of each; "" and 0 for photographs.
    """

    images: Tensor
    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    contrasts: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """As `data.restoration.Captioned`, so that `data.restoration.Degraded` reads it."""
        return self.images[index], self.captions[index]

    def where(self, keep: list[int]) -> Part:
        """The images of some indices."""
        captions, kinds = (tuple(a[i] for i in keep) for a in (self.captions, self.kinds))
        return Part(self.images[keep], captions, kinds, tuple(self.contrasts[i] for i in keep))

    def scenes(self, contrast: float | None = None) -> Part:
        """The scenes, of one contrast unless it is None; no photographs."""
        return self.where(
            [i for i, (k, c) in enumerate(zip(self.kinds, self.contrasts, strict=True)) if k and contrast in (None, c)]
        )


def read(root: str | Path, split: str) -> Part:
    """Read a split that `write` wrote below `root`, with the reader of all such folders.

    Raises:
        BadParameter: an unknown split.
        MissingData: it does not exist.
        CorruptFile: an image or the captions cannot be read; the path is in the message.
    """
    found = restoration.load("pocket/restoration", root, split)
    listing = Path(root) / "pocket" / "restoration" / split / "captions.jsonl"
    rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    try:
        kinds, contrasts = tuple(row["kind"] for row in rows), tuple(float(row["contrast"]) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(listing, f"a line lacks kind or contrast ({error})") from error
    return Part(torch.stack([image for image, _ in found]), found.captions, kinds, contrasts)


# --- measures of a restored image -------------------------------------------------------------------------------------


def seen_kind(pictures: Tensor) -> list[str]:
    """The strongest texture of each image (n, 3, 16, 16): the largest |mean(grey pattern)|."""
    patterns = torch.from_numpy(np.stack([pattern(kind, pictures.shape[-1]) for kind in KINDS])).to(pictures)
    strength = torch.einsum("nhw,khw->nk", pictures.mean(1), patterns).abs()
    return [KINDS[i] for i in strength.argmax(1).tolist()]


def seen_contrast(pictures: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """The strength of the texture of that kind, (n,): mean(grey pattern) / mean(grey); for a scene 2/3 of its
    contrast."""
    patterns = torch.from_numpy(np.stack([pattern(kind, pictures.shape[-1]) for kind in kinds])).to(pictures)
    grey = pictures.mean(1)
    return (grey * patterns).mean((1, 2)) / grey.mean((1, 2)).clamp_min(1e-6)
