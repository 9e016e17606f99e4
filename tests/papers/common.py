"""What the tests need to know of a paper is in `tests/papers/<slug>.py`, found by the slug:

    small(recipe, patch)    small models in the place of the recipe's full-size ones
    MODELS                  those that `companion.save` writes, by name. inputs(name, model, batch): of their forward
                            pass, if not images of 32 pixels
    OFFICIAL, FULL_SIZE     recorded cases: those whose names are tested, and those that take gigabytes
    TRAININGS               of the recipe, by task ("": its only one)
    WAITS                   of a training step on a GPU: the file where the host waits, and how often at most
    EXAMPLE                 of site/docs/own_data/: makes its folders; a pattern of what it prints.
                            small_example(patch): small models under the names that it uses
    write(name, root, patch)   the miniature of a data set, in its layout, below the data root
    RUNS, FAULTS            parameters of all dry runs, the first that of the notebook's tests; copies that are refused
    COPIES, ALONE           other usual copies; parts of a set that a run needs alone

`test_hooks.py` names those that a paper lacks.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from companion import backbones
from companion.io.papers import slugs

NAMES = ("disc", "ring", "cross")
Found = tuple[list[dict], Tensor | None]
"""The history of a training, and outputs of the untrained model: None where rounding may change which is selected."""


class Training(NamedTuple):
    """A training of a recipe.

    Attributes:
        train: from the recipe, the parameters and a folder to `Found`.
        changes: of the parameters.
        batch: images, pairs, slides or crops of a step on one GPU: the published batch (the smallest, if there are
            several), or the recipe's micro-batch.
        runs: of paper.yaml, whose memory is that of this training.
        full: parameters of the published size where `changes` have a smaller one.
        rounding: how many roundings of bfloat16 its losses may differ by.
    """

    train: Callable[..., Found]
    changes: Mapping[str, object]
    batch: int = 0
    runs: str = ""
    full: Mapping[str, object] = {}
    rounding: int = 4


class Fault(NamedTuple):
    """A copy that cannot be used.

    Attributes:
        run: the parameters of a dry run on it.
        damage: spoils the miniature below the data root; returns the file that the error names.
        words: which the error has too.
    """

    run: Mapping[str, object]
    damage: Callable[[Path], Path]
    words: str


def hooks(slug: str) -> ModuleType:
    """The module of a paper."""
    return importlib.import_module(f"tests.papers.{slug}")


def of_all(name: str) -> dict[str, Any]:
    """A hook of every paper that has it, by slug."""
    return {slug: getattr(hooks(slug), name) for slug in slugs() if hasattr(hooks(slug), name)}


def trainings() -> dict[str, Training]:
    """Those of all papers, by slug and task: "sa2vp", "dmt, distil"."""
    return {
        f"{slug}, {task}".removesuffix(", "): training
        for slug, tasks in of_all("TRAININGS").items()
        for task, training in tasks.items()
    }


def shrink(slug: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe of a paper, whose models are small from now on and whose loaders start no processes."""
    recipe = pytest.importorskip(f"companion.models.{slug}.recipe")
    hooks(slug).small(recipe, patch)
    if hasattr(recipe, "WORKERS"):
        patch.setattr(recipe, "WORKERS", 0)
    return recipe


def vit(depth: int = 6) -> nn.Module:
    return backbones.build("vit_tiny_patch16_224", "random", img_size=32, depth=depth, embed_dim=48, num_heads=3)


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def images(folder: Path, names: list[str], size: tuple[int, int] = (40, 48)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture(i, size).save(folder / name)


def flowers() -> None:
    for name in ("rose", "tulip"):
        images(Path("flowers") / name, [f"{i}.jpg" for i in range(26)])
    images(Path(), ["new.jpg"])


FLOWERS = flowers, r"\[\{'(rose|tulip)': 0\.\d+, "


def spoil(name: str, content: str | bytes | None = None, image: str = "") -> Callable[[Path], Path]:
    """A file below the data root with another content, or without it; the error names the `image`, or the file."""

    def damage(root: Path) -> Path:
        path = root / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Path(image) if image else path

    return damage


def moved(old: str, new: str) -> Callable[[Path], Path]:
    """A file or folder below the data root at another place."""

    def damage(root: Path) -> Path:
        shutil.move(root / old, aside := root / "aside")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(aside, root / new)
        return root / new

    return damage


def without(name: str) -> Callable[[Path], Path]:
    """Neither this file, nor this folder, below the data root."""

    def damage(root: Path) -> Path:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return path

    return damage
