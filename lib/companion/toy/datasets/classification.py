"""Four small classification tasks on real photographs and real digits, in VTAB-1k's layout.

    <root>/pocket/<task>/train800.txt  val200.txt  train800val200.txt  test.txt  images/<split>/<number>.png

Each line of a list is "relative/path label", one space, labels from 0.

* where: which of the 3x3 cells contains the object, of any class. Requires position, as dSprites location does: a
  position-invariant feature cannot solve it.
* orient: the direction of a bar, four classes of 45 degrees.
* digits: scikit-learn's handwritten digits (real scans), enlarged to 28 pixels, on photographs of low contrast.
* textures: which photograph a crop was taken from; training, validation and test crops come from different tiles.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import hsv2rgb
from sklearn.datasets import load_digits

from ...errors import check_choice
from ..scenes import PLACES, SIZE, SPLITS, canvas, cut, quantise, scene
from . import write_once

TEXTURES = (
    "brick",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "motorcycle",
    "page",
    "retina",
    "stars",
    "tissue",
)
LISTS = {
    "train800.txt": ("train",),
    "val200.txt": ("val",),
    "train800val200.txt": ("train", "val"),
    "test.txt": ("test",),
}
VERSION = 2  # to be increased when a change of this file or of scenes.py changes the images


def _where(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(9))
    side = SIZE / 3
    x, y = (label % 3 + rng.uniform(0.1, 0.9)) * side, (label // 3 + rng.uniform(0.1, 0.9)) * side
    return scene(rng, split, centre=(x, y), radius=(5, 7), contrast=(0.05, 0.15)).image, label


def _orient(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(4))
    angle = (label + rng.uniform(-0.35, 0.35)) * np.pi / 4
    centre = tuple(rng.uniform(8, SIZE - 8, 2))
    return scene(rng, split, shape="bar", centre=centre, radius=(6, 9), angle=angle, contrast=(0.1, 0.3)).image, label


@functools.cache
def _originals() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits (1797, 8, 8) in 0..16 and their labels, in one fixed random order."""
    images, labels = load_digits().images, load_digits().target
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order]


def _digits(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    images, labels = _originals()
    original = index + {"train": 0, "val": 800, "test": 1000}[split]
    ink = Image.fromarray((images[original] * 255 / 16).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    covered = np.zeros((SIZE, SIZE, 1))
    covered[2:30, 2:30, 0] = np.asarray(ink) / 255
    paper = canvas(rng, split, (0.0, 0.1)).pixels
    # in the saturated colours of the drawn objects that the toy backbones were trained on
    colour = hsv2rgb(np.array([rng.uniform(), rng.uniform(0.7, 1), rng.uniform(0.6, 1)]))
    return quantise(paper * (1 - covered) + colour * covered), int(labels[original])


def _textures(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(len(TEXTURES)))
    return quantise(cut(rng, TEXTURES[label], split).pixels * rng.uniform(0.85, 1.15)), label


@dataclass(frozen=True)
class Task:
    """A toy task: its class names, number of test images, and the function that generates an image."""

    classes: tuple[str, ...]
    test: int
    make: Callable[[np.random.Generator, str, int], tuple[np.ndarray, int]]

    @property
    def sizes(self) -> dict[str, int]:
        """Images per split."""
        return {"train": 800, "val": 200, "test": self.test}


TASKS = {
    "where": Task(PLACES, 500, _where),
    "orient": Task(("0°", "45°", "90°", "135°"), 500, _orient),
    "digits": Task(tuple("0123456789"), 797, _digits),
    "textures": Task(TEXTURES, 500, _textures),
}


def examples(task: str, split: str, seed: int = 0) -> Iterable[tuple[np.ndarray, int]]:
    """The images (32, 32, 3) uint8 and labels of one split of a task, in order, without writing them.

    Raises `BadParameter` for an unknown task or split.
    """
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, zlib.crc32(f"{task}/{split}".encode())))
    return (TASKS[task].make(rng, split, index) for index in range(TASKS[task].sizes[split]))


def write(root: str | Path, tasks: Iterable[str] = tuple(TASKS), seed: int = 0) -> list[Path]:
    """Write toy tasks below `<root>/pocket/`; a complete one is left unchanged, an incomplete one is rewritten.

    Args:
        root: the data folder, as passed to the readers.
        tasks: names of `TASKS`.
        seed: the same seed gives the same files.

    Returns:
        The folders of the tasks, in the given order.

    Raises `BadParameter`: for an unknown task, before anything is written.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    for task in tasks:
        check_choice("tasks", task, TASKS)
    folders = []
    for task in tasks:
        sizes = TASKS[task].sizes
        record = {"task": task, "seed": seed, "version": VERSION, "classes": list(TASKS[task].classes), "sizes": sizes}
        write = functools.partial(_write_task, task=task, seed=seed)
        folder = Path(root) / "pocket" / task
        folders.append(write_once(folder, record, sum(sizes.values()) + len(LISTS) + 1, write, "task.json"))
    return folders


def _write_task(new: Path, task: str, seed: int) -> None:
    lines: dict[str, list[str]] = {}
    for split in SPLITS:
        (new / "images" / split).mkdir(parents=True)
        lines[split] = []
        for index, (pixels, label) in enumerate(examples(task, split, seed)):
            path = f"images/{split}/{index:04d}.png"
            Image.fromarray(pixels).save(new / path)
            lines[split].append(f"{path} {label}\n")
    for listing, splits in LISTS.items():
        (new / listing).write_text("".join(line for split in splits for line in lines[split]), encoding="utf-8")
