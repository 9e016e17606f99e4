"""H-ViT: the folds of PANDA on stored features, Local and Global, and a folder of slides of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from companion.data import find, slides
from companion.data.pyramids import write_pyramid
from companion.models import hvit
from companion.training.hardware import Hardware
from tests.data.conftest import expect
from tests.data.test_slides import panda
from tests.models.common import draw
from tests.papers.common import Fault, Found, Training, spoil

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """48 slides, which are empty files, their grades, and features of one to three regions of 4 x 4 patches."""
    if name == "folder":
        for i in range(48):
            (root / f"s{i}.tiff").touch()
        rows = [f"s{i},{i % 6}" for i in range(48)]
        (root / "labels.csv").write_text("\n".join(["slide_id,label", *rows]) + "\n")
        names = [f"s{i}" for i in range(48)]
    else:
        expect(patch, name, sizes={})
        panda(root, 48)
        slides.write_folds(name, root, 2, test=0.25)
        names = [item.name for item in slides.load(name, root)]
    (root / "features").mkdir()
    for i, slide in enumerate(names):
        with h5py.File(root / "features" / f"{slide}.h5", "w") as file:
            file["features"] = np.random.default_rng(i).normal(size=(1 + i % 3, 16, 384)).astype("float32")
            file["coords"], file["shares"] = np.zeros((1 + i % 3, 2), "int64"), np.ones(1 + i % 3)
            file.attrs["settings"] = "{}"


PANDA = {"dataset": "slides/panda", "method": "Local", "region": 1024, "folds": 2}
RUNS = [PANDA, PANDA | {"method": "Global"}, PANDA | {"dataset": "folder"}]


def features(root: Path) -> Path:
    (path := root / "features/0000ab.h5").write_text("no features")
    return path


def overlap(root: Path) -> Path:
    """A slide that fold 0 trains on is in its list of tests too."""
    train, test = (find("slides/panda").folder(root) / f"folds/fold-0/{name}.csv" for name in ("train", "test"))
    row = train.read_text().splitlines()[1]
    test.write_text(test.read_text() + row + "\n")
    return Path(row.split(",")[0])


ROW = "image_id,data_provider,isup_grade,gleason_score\n0000ab,radboud,6,3+3\n"


def hole(root: Path) -> Path:
    (path := find("slides/panda").folder(root) / "train_images/0000ab.tiff").unlink()
    return path


COPIES = {"a hole": Fault(PANDA, hole, "1 of 48 slides of train.csv .*0000ab.tiff")}
FAULTS = {
    "a missing list": Fault(PANDA, spoil("slides/panda/folds/fold-0/test.csv"), "write_folds"),
    "a grade out of range": Fault(PANDA, spoil("slides/panda/train.csv", ROW), "'6'"),
    "unreadable features": Fault(PANDA, features, "0000ab"),
    "splits that overlap": Fault(PANDA, overlap, "disjoint"),
    "the table of another set": Fault(PANDA, spoil("slides/panda/train.csv", "slide_id,label\n1,2\n"), "image_id"),
}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "BATCH", 4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "H-ViT": lambda: hvit.build("pocket", classes=3, levels=("region", "slide"))
}
"""That `companion.save` writes, by name."""


OFFICIAL = ["local_2048_ordinal", "slide_global_coral"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["hipt_1024", "heatmap_blend", "heatmap_blend_smoothed"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    return (draw(batch, 3, 16, 48),)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    return found.history, recipe.outputs(recipe.build(p), found.test, Hardware.of(p, "hvit"))


TRAININGS = {
    "": Training(train, {"region": 1024, "folds": 1}, batch=32, runs="local", full={"region": 2048}, rounding=8)
}


WAITS = {"models/hvit/model.py": 1}  # how many regions the slides of a batch have


# --- the example on own data


def biopsies() -> None:
    for name, grade in [("new", "0"), *((f"slide{i}", "012"[i % 3]) for i in range(8))]:
        slide = Path("biopsies") / grade / f"{name}.tiff"
        slide.parent.mkdir(parents=True, exist_ok=True)
        slide.touch()
        file = Path("new.h5") if name == "new" else Path(f"biopsies/features/{name}.h5")
        file.parent.mkdir(exist_ok=True)
        with h5py.File(file, "w") as features:
            rng = np.random.default_rng(len(name))
            features["features"] = rng.normal(size=(2, 64, 384)).astype("float32")
            features["coords"], features["shares"] = np.zeros((2, 2), int), np.ones((2, 64, 256), "float32")
            features.attrs["settings"] = "{}"
        if name == "new":
            slide.unlink()
    tissue = np.random.default_rng(0).integers(90, 200, (2048, 2048, 3), np.uint8) // (1, 2, 1)
    write_pyramid(Path("new.tiff"), tissue.astype(np.uint8), 0.5)
    torch.save(hvit.PatchEncoder(dim=384, depth=1).to_official(), "vit256_small_dino.pth")


EXAMPLE = biopsies, r"\['(benign|low grade|high grade)'\]"
