"""Small slides for H-ViT, pyramids on disk in PANDA's layout, graded by the position or the amount of tumour.

    <root>/pocket/slides-<task>/train.csv  train_images/<image_id>.tiff  train_label_masks/<image_id>_mask.tiff
                                folds/fold-0/{train,tune,test}.csv  drawn.json

A slide has five regions of 128 px in one or two ragged pieces of tissue between white margins; a region is 4 x 4
patches of 32 px. Stroma is a crop of the photograph of stained tissue that ships with scikit-image. A patch may contain
a benign gland, one large ring with a white lumen, or tumour, seven small dark rings. Two tasks grade slides from 0 to
5:

* "place": a region is free of tumour, or has four tumour patches, of which three are in its centre ("core"), or all on
  its border ("rim"). The grade is the number of core regions; of the others a random number are rim. The amount of
  tumour alone gives a kappa of about 60, its position inside the region determines the grade: the task is built for a
  model with a trained region level, and favours Local H-ViT by construction.
* "count": tumour patches are at random positions, and the grade is their number: four per grade, plus or minus one. A
  bag of patches is sufficient.

In both tasks every region has four benign glands. Stroma of training, tuning and test slides is cropped from separate
tiles, as in `scenes`. `data.slides` reads them as PANDA.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import check_choice
from ...models.hvit.slides import Tiling, write_pyramid
from ...ops.files import read_json
from ..scenes import SPLITS, photograph, quantise, tiles
from . import write_once, write_table

TASKS = ("place", "count")
PATCH, SIDE, REGIONS = 32, 4, 5  # pixels per patch, patches per side of a region, regions per slide
REGION = PATCH * SIDE
GRADES = 6
COUNTS = {"train": 160, "val": 40, "test": 80}
FILES = {"train": "train", "val": "tune", "test": "test"}  # split -> the name of its list
MPP = 0.5  # microns per pixel of level 0, as stated in the files
STROMA, BENIGN, TUMOUR = 1, 2, 3  # of the label masks, PANDA's values for Radboud; 0 is glass
GLASS = 243
VERSION = 1  # to be increased when a change of this file or of scenes.py changes the slides

# settings with which the regions are found: HS2P's, at toy scale
TILING = Tiling(region=REGION, mpp=MPP, downsample=4, otsu=True, median=3, close=3, area=0.1, hole_area=0.05)

_GRID = 4  # every piece begins at a multiple of it, the downsample of the tissue mask
_CORE = np.array([5, 6, 9, 10])  # the inner patches of a region, row by row
_RIM = np.setdiff1d(np.arange(SIDE**2), _CORE)


@dataclass(frozen=True)
class Drawn:
    """A slide with its annotations.

    Attributes:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8, the label mask.
        corners: (5, 2), x and y of the regions.
        cells: (5, 16), the kind of each patch, row by row: `STROMA`, `BENIGN` or `TUMOUR`.
        grade: 0 to 5.
    """

    image: np.ndarray
    labels: np.ndarray
    corners: np.ndarray
    cells: np.ndarray
    grade: int


def is_core(cells: Sequence[int]) -> bool:
    """Whether a region's tumour is in its centre: at least three of its four inner patches."""
    return int((np.asarray(cells)[_CORE] == TUMOUR).sum()) >= 3


# --- content of a slide -----------------------------------------------------------------------------------------------


def arrangement(rng: np.random.Generator, task: str, grade: int) -> np.ndarray:
    """The kinds of the patches of a slide of `grade`, (5, 16). Raises `BadParameter` for an unknown task or grade."""
    check_choice("task", task, TASKS)
    check_choice("grade", grade, range(GRADES))
    cells = np.full((REGIONS, SIDE**2), STROMA)
    if task == "place":
        rims = int(rng.integers(REGIONS - grade + 1))
        states = np.array(["core"] * grade + ["rim"] * rims + ["none"] * (REGIONS - grade - rims))
        for region, state in zip(cells, rng.permutation(states), strict=True):
            if state == "core":
                region[rng.choice(_CORE, 3, replace=False)] = TUMOUR
                region[rng.choice(_RIM)] = TUMOUR
            elif state == "rim":
                region[rng.choice(_RIM, 4, replace=False)] = TUMOUR
    else:
        count = 4 * grade + int(rng.integers(-1, 2)) * (grade > 0)
        cells.flat[rng.choice(cells.size, count, replace=False)] = TUMOUR
    for region in cells:
        free = np.flatnonzero(region == STROMA)
        region[rng.choice(free, min(4, len(free)), replace=False)] = BENIGN
    return cells


# --- drawing ----------------------------------------------------------------------------------------------------------


def _stroma(rng: np.random.Generator, split: str) -> np.ndarray:
    """The stroma of a region (128, 128, 3) in [0, 1]: a crop of one tile of `split` of the tissue, tinted pink."""
    places = tiles("tissue", split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = int(rng.integers(64, min(right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph("tissue")[y : y + side, x : x + side])
    pixels = np.asarray(window.resize((REGION, REGION), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = np.rot90(pixels, int(rng.integers(4)))
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return np.array([0.85, 0.62, 0.76]) + rng.uniform(0.35, 0.6) * (pixels - pixels.mean((0, 1)))


def _rings(centres: np.ndarray, radius: np.ndarray, thick: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fractions of each pixel of a patch that are wall and lumen of round glands: two (32, 32) in [0, 1]."""
    rows, columns = np.mgrid[:PATCH, :PATCH] + 0.5
    far = np.hypot(columns[..., None] - centres[:, 0], rows[..., None] - centres[:, 1])
    whole = np.clip(0.5 - (far - radius), 0, 1)
    lumen = np.clip(0.5 - (far - radius + thick), 0, 1)
    return (whole - lumen).max(-1), lumen.max(-1)


def _gland(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wall, lumen (32, 32) and the colour of the wall of a benign gland or of a patch of tumour."""
    middle = PATCH / 2 + rng.uniform(-2, 2, 2)
    if kind == BENIGN:
        wall, lumen = _rings(middle[None], rng.uniform(9, 12, 1), rng.uniform(3, 4.5, 1))
        return wall, lumen, np.array([0.56, 0.36, 0.64]) * rng.uniform(0.9, 1.1)
    turns = rng.uniform(0, 2 * np.pi) + np.arange(6) * np.pi / 3
    around = middle + rng.uniform(8, 9.5) * np.stack([np.cos(turns), np.sin(turns)], -1)
    centres = np.concatenate([middle[None], around]) + rng.normal(0, 0.6, (7, 2))
    wall, lumen = _rings(centres, rng.uniform(2.8, 4.2, 7), rng.uniform(1.6, 2.6, 7))
    return wall, lumen, np.array([0.36, 0.2, 0.48]) * rng.uniform(0.85, 1.15)


def region(rng: np.random.Generator, cells: Sequence[int], split: str) -> tuple[np.ndarray, np.ndarray]:
    """A region of the patches `cells` (16,): pixels (128, 128, 3) in [0, 1] and labels (128, 128) uint8."""
    pixels = _stroma(rng, split)
    labels = np.full((REGION, REGION), STROMA, np.uint8)
    for index, kind in enumerate(cells):
        if kind == STROMA:
            continue
        row, column = (PATCH * i for i in divmod(index, SIDE))
        window = np.s_[row : row + PATCH, column : column + PATCH]
        wall, lumen, colour = _gland(rng, kind)
        for covered, paint in ((wall[..., None], colour), (lumen[..., None], np.array([0.95, 0.93, 0.95]))):
            pixels[window] = pixels[window] * (1 - covered) + paint * covered
        labels[window][wall + lumen > 0.5] = kind
    return pixels, labels


def _edge(rng: np.random.Generator, length: int) -> np.ndarray:
    """How far an edge recedes along its length, in pixels: bays between straight segments."""
    points = np.arange(length)
    wave = sum(np.sin(2 * np.pi * (points / rng.uniform(70, 160) + rng.random())) for _ in range(2))
    depth = np.clip(wave - np.quantile(wave, 0.45), 0, None)
    return rng.uniform(4, 8) * depth / max(depth.max(), 1e-6)


def _ragged(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The mask of a piece of tissue, (height, width) bool; it touches all four sides of the rectangle."""
    rows, columns = np.mgrid[:height, :width]
    inside = (rows >= _edge(rng, width)) & (rows < height - _edge(rng, width))
    return inside & (columns >= _edge(rng, height)[:, None]) & (columns < width - _edge(rng, height)[:, None])


def draw(rng: np.random.Generator, task: str, grade: int, split: str) -> Drawn:
    """A slide of a grade; stroma is cropped from tiles of `split`. Raises `BadParameter` for an unknown name or
    grade."""
    check_choice("split", split, SPLITS)
    cells = arrangement(rng, task, grade)
    first = int(rng.integers(2, REGIONS + 1))
    pieces = [n for n in (first, REGIONS - first) if n]
    margin, gap = (_GRID * rng.integers(8, 20, 4)).tolist(), _GRID * int(rng.integers(10, 20))
    width = REGION * max(pieces) + margin[0] + margin[1]
    height = REGION * len(pieces) + gap * (len(pieces) - 1) + margin[2] + margin[3]
    image = np.full((height, width, 3), GLASS / 255)
    labels = np.zeros((height, width), np.uint8)
    stain = rng.uniform(0.92, 1.04, 3)
    corners: list[tuple[int, int]] = []
    row = margin[2]
    for count in pieces:
        column = margin[0] + _GRID * int(rng.integers((max(pieces) - count) * REGION // _GRID + 1))
        drawn = [region(rng, cells[len(corners) + i], split) for i in range(count)]
        pixels, said = (np.concatenate(part, 1) for part in zip(*drawn, strict=True))
        here = _ragged(rng, REGION, REGION * count)
        window = np.s_[row : row + REGION, column : column + REGION * count]
        pixels = pixels * stain + rng.normal(0, 0.015, pixels.shape)
        image[window] = np.where(here[..., None], pixels, image[window])
        labels[window] = np.where(here, said, 0)
        corners += [(column + REGION * i, row) for i in range(count)]
        row += REGION + gap
    image, labels, turned = _turned(rng, image, labels, np.array(corners))
    return Drawn(quantise(image), labels, turned, cells, grade)


def _turned(
    rng: np.random.Generator, image: np.ndarray, labels: np.ndarray, corners: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Transposes the pieces of half of the slides: regions change their position, not their content."""
    if rng.random() < 0.5:
        return image, labels, corners
    upright, said = np.full((*labels.T.shape, 3), GLASS / 255), np.zeros_like(labels.T)
    for x, y in corners:
        here, there = np.s_[y : y + REGION, x : x + REGION], np.s_[x : x + REGION, y : y + REGION]
        upright[there], said[there] = image[here], labels[here]
    return upright, said, corners[:, ::-1].copy()


def slides(count: int, task: str, split: str, seed: int = 0) -> list[Drawn]:
    """`count` slides of random, balanced grades, deterministic in the arguments. Raises as `draw`."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{task}/{split}".encode())))
    grades = rng.permutation(np.arange(count) % GRADES)
    return [draw(rng, task, int(grade), split) for grade in grades]


# --- on disk ----------------------------------------------------------------------------------------------------------


def folder(root: str | Path, task: str) -> Path:
    """The folder of the slides of a task below `root`."""
    check_choice("task", task, TASKS)
    return Path(root) / "pocket" / f"slides-{task}"


def write(root: str | Path, task: str, seed: int = 0) -> Path:
    """Write the slides of a task below `root`, unless they exist, and return their folder.

    The same seed gives the same files. Raises `BadParameter` for an unknown task.
    """

    def fill(new: Path) -> dict[str, Any]:
        lists: dict[str, list] = {split: [] for split in COUNTS}
        drawn = {}
        for split, count in COUNTS.items():
            for number, slide in enumerate(slides(count, task, split, seed)):
                image_id = f"{task}_{split}_{number:03d}"
                write_slide(new, image_id, slide)
                lists[split].append((image_id, slide.grade))
                drawn[image_id] = {"corners": slide.corners.tolist(), "cells": slide.cells.tolist()}
        rows = [(i, "radboud", grade, _gleason(grade)) for split in COUNTS for i, grade in lists[split]]
        write_table(new / "train.csv", ("image_id", "data_provider", "isup_grade", "gleason_score"), rows)
        for split, pairs in lists.items():
            write_table(new / "folds" / "fold-0" / f"{FILES[split]}.csv", ("slide_id", "isup_grade"), pairs)
        return {"slides": drawn}

    record = {"task": task, "seed": seed, "version": VERSION, "counts": COUNTS}
    files = 2 * sum(COUNTS.values()) + len(COUNTS) + 2
    return write_once(folder(root, task), record, files, fill, "drawn.json")


def write_slide(root: Path, image_id: str, slide: Drawn) -> None:
    """Write one slide and its label mask below `root`, in PANDA's layout."""
    for path, pixels, levels in (
        (root / "train_images" / f"{image_id}.tiff", slide.image, (1, 4)),
        # one level: labels cannot be averaged
        (root / "train_label_masks" / f"{image_id}_mask.tiff", slide.labels[..., None].repeat(3, -1), (1,)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pyramid(path, pixels, MPP, levels, tile=128)


def _gleason(grade: int) -> str:
    """A Gleason score of this grade in PANDA."""
    return ("negative", "3+3", "3+4", "4+3", "4+4", "4+5")[grade]


def drawn_cells(data: str | Path) -> dict[str, dict[tuple[int, int], list[int]]]:
    """The content of a folder of `write`: slide -> corner (x, y) of a region -> kinds of its patches (16)."""
    found = read_json(Path(data) / "drawn.json")["slides"]
    return {
        name: {tuple(corner): cells for corner, cells in zip(slide["corners"], slide["cells"], strict=True)}
        for name, slide in found.items()
    }
