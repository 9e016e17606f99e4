"""BAT: training on LasHeR or VisEvent, tests on them, on RGBT234 and on GTOT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from companion import backbones
from companion.data import tracking
from companion.models import bat
from companion.training.hardware import Hardware
from companion.training.recipe import run
from tests.data import test_tracking as layouts
from tests.data.conftest import expect
from tests.models.common import draw
from tests.papers.common import Fault, Found, Training, images, moved, spoil, vit

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

BOX = [10, 8, 12, 9]
BOXES = [BOX] * 24
STREAMS = {"visible": "v{:03d}.png", "infrared": "i{:03d}.png"}
FILES = {"visible.txt": BOXES, "infrared.txt": BOXES, "init.txt": BOXES}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Videos of 24 frames: two to train on, where the set has some, and two to test."""
    video = layouts.video
    if name == "rgbt/lasher":
        expect(patch, name, sizes={"train": 1, "val": 1, "trainval": 2, "test": 2})
        patch.setattr(tracking, "_LISTS", lists := root / "lists")
        for split, names in {"train": ["man"], "val": ["car"], "test": ["bike", "head"]}.items():
            layouts.rows(lists / f"lasher_{split}.txt", [[each] for each in names])
            for each in names:
                folder = "TestingSet/testingset" if split == "test" else "TrainingSet/trainingset"
                video(root / "rgbt/LasHeR" / folder / each, STREAMS, FILES, range(24))
                layouts.rows(root / f"rgbt/LasHeR/AttriSeqsTxt/{each}.txt", [[1] + [0] * 18])
    elif name == "rgbe/visevent":
        expect(patch, name, sizes={"train": 2, "test": 2})
        streams = {"vis_imgs": "frame{:04d}.bmp", "event_imgs": "frame{:04d}.bmp"}
        for part in ("train", "test"):
            layouts.rows(root / f"rgbe/VisEvent/{part}/{part}list.txt", [[f"{part}1"], [f"{part}2"]])
            for each in (f"{part}1", f"{part}2"):
                video(folder := root / "rgbe/VisEvent" / part / each, streams, {"groundtruth.txt": BOXES}, range(24))
                layouts.rows(folder / "absent_label.txt", [[1]] * 24)
    else:
        expect(patch, name, sizes={"test": 2})
        corners = [[10, 8, 22, 17]] * 24
        for each in ("car3", "dog1"):
            if name == "rgbt/gtot":
                files = {"groundTruth_v.txt": corners, "groundTruth_i.txt": corners}
                video(root / "rgbt/GTOT" / each, {"v": "{:05d}v.png", "i": "{:05d}i.png"}, files, range(24))
            else:
                video(root / "rgbt/RGBT234" / each, STREAMS, FILES, range(24))


RUNS = [{"dataset": name} for name in ("rgbt/lasher", "rgbt/rgbt234", "rgbt/gtot", "rgbe/visevent")]
RUNS += [{"dataset": "rgbt/lasher", "method": "full fine-tuning", "grad_checkpointing": True}]
RUNS += [{"dataset": "rgbt/lasher", "method": "RGB only"}]


def overlap(root: Path) -> Path:
    layouts.rows(root / "rgbe/VisEvent/test/testlist.txt", [["test1"], ["train1"]])
    (root / "rgbe/VisEvent/train/train1").rename(path := root / "rgbe/VisEvent/test/train1")
    (root / "rgbe/VisEvent/train/train1").symlink_to(path)
    return path


def without_training(root: Path) -> Path:
    """LasHeR's test set alone."""
    shutil.rmtree(path := root / "rgbt/LasHeR/TrainingSet")
    return path


LASHER, BIKE = {"dataset": "rgbt/lasher"}, "TestingSet/testingset/bike"
FAULTS = {
    "a missing annotation": Fault(LASHER, spoil("rgbt/LasHeR/TrainingSet/trainingset/man/init.txt"), "is not there"),
    "a box of three numbers": Fault(LASHER, spoil(f"rgbt/LasHeR/{BIKE}/visible.txt", b"1,2,3,4\n1,2,3\n"), "line 2"),
    "an unreadable frame": Fault(
        LASHER, spoil(f"rgbt/LasHeR/{BIKE}/infrared/i000.png", b"\x89PNG"), "cannot|not|truncated"
    ),
    "an unreadable frame to train on": Fault(
        LASHER, spoil("rgbt/LasHeR/TrainingSet/trainingset/man/visible/v000.png", b""), "cannot|not|truncated"
    ),
    "splits that overlap": Fault({"dataset": "rgbe/visevent"}, overlap, "two splits"),
    "no videos to train on": Fault(LASHER, without_training, r"train: there is no folder .*TrainingSet"),
    "another set's frames": Fault(LASHER, spoil(f"rgbt/LasHeR/{BIKE}/visible.txt", b"1,2,3,4\n"), "visible 24"),
}


def doubled(root: Path) -> Path:
    path = root / "rgbt/LasHeR" / BIKE / "infrared/i003.png"
    return Path(shutil.copy(path, path.with_name("i003 (1).png")))


def gone(name: str):  # type: ignore[no-untyped-def]
    def damage(root: Path) -> Path:
        (root / name).unlink()
        return root / name

    return damage


RGBT234, GTOT, VISEVENT = {"dataset": "rgbt/rgbt234"}, {"dataset": "rgbt/gtot"}, {"dataset": "rgbe/visevent"}
COPIES = {
    "RGBT234 as unpacked": Fault(RGBT234, moved("rgbt/RGBT234", "rgbt/RGBT234/RGB-T234"), ""),
    "GTOT as unpacked": Fault(GTOT, moved("rgbt/GTOT", "GTOT/GTOT"), ""),
    "streams in other letters": Fault(RGBT234, moved("rgbt/RGBT234/car3/visible", "rgbt/RGBT234/car3/Visible"), ""),
    "LasHeR's test set alone": Fault(LASHER, without_training, "there is no folder .*TrainingSet"),
    "a missing frame": Fault(
        LASHER, gone(f"rgbt/LasHeR/{BIKE}/infrared/i005.png"), r"i006\.png: .* a frame is missing"
    ),
    "a frame that is there twice": Fault(LASHER, doubled, r"i003 \(1\)\.png: .* there twice"),
    "RGBT234 without a stream's boxes": Fault(
        RGBT234, gone("rgbt/RGBT234/dog1/infrared.txt"), r"dog1/infrared\.txt is"
    ),
    "GTOT without a stream's boxes": Fault(
        GTOT, gone("rgbt/GTOT/dog1/groundTruth_i.txt"), r"groundTruth_i\.txt is not"
    ),
    "a video fewer": Fault(
        GTOT, lambda root: shutil.rmtree(root / "rgbt/GTOT/dog1"), "1 sequences in .*, 2 are expected"
    ),
    "VisEvent's train in its test": Fault(VISEVENT, overlap, r"train1 is in two splits: .*list\.txt"),
}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.toy.encoders import tracker

    patch.setattr(recipe, "foundation", lambda weights: tracker.build())
    patch.setattr(recipe, "BATCH", 4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BAT": lambda: bat.BAT(bat.OSTrack(vit(), 32, 64, 32), 4, elimination={1: 0.7})
}
"""That `companion.save` writes, by name."""


OFFICIAL = ["model_192_depth4"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["model_256", "track_loop"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    return draw(batch, 6, 32, 32), draw(batch, 6, 64, 64)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    _, history = run(recipe.training(p, Hardware.of(p, "bat")))
    for boxes in recipe.run(p, out).boxes.values():  # in images of 240 x 180
        assert np.isfinite(boxes).all() and (boxes[:, :2] + boxes[:, 2:] <= [240, 180]).all()
    return history, None


TRAININGS = {"": Training(train, {}, batch=96, runs="lasher visevent")}


# --- the example on own data


def walk() -> None:
    for folder in ("walk", "new"):
        for stream in ("visible", "infrared"):
            images(Path(folder) / stream, [f"{i:02d}.jpg" for i in range(21)], (200, 260))
    np.savetxt("walk/boxes.txt", [[100 + i, 80, 40, 60] for i in range(21)], delimiter=",")
    vit = backbones.build("vit_tiny_patch16_224", "random", depth=1, embed_dim=64, num_heads=1)
    torch.save({"net": bat.OSTrack(vit, head_channels=32).to_official()}, "OSTrack_ep0300.pth.tar")


EXAMPLE = walk, r"\[\[120"
