"""SA²VP: VTAB-1k on both backbones, FGVC, HTA, and a folder of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from companion import backbones
from companion.data import DATASETS
from companion.models import sa2vp
from companion.models.layers import classifying
from companion.models.sa2vp import baselines as vpt
from companion.toy import encoders
from companion.training.fit import outputs_of
from tests.data import test_classification as layouts
from tests.data.conftest import picture
from tests.models.common import draw
from tests.papers.common import FLOWERS, Fault, Found, Training, moved, vit, without

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The data set in its layout, of three classes or two."""
    group, _, key = name.partition("/")
    if name == "folder":
        for number in range(12):
            picture(root / "ab"[number % 2] / f"{number}.png", number)
    elif name == "hta/cifar100":
        layouts.shrink(patch, name, 2, 8, 2, 4)
        layouts.cifar(root, patch, "cifar100")
    elif name in layouts.HTA:
        layouts.shrink(patch, name, 2, *map(len, layouts.HTA[name][1:]))
        layouts.HTA[name][0](root, patch)
    else:
        layouts.shrink(patch, name, 3, 3, 2, 4)
        layouts.vtab(root, DATASETS[name].folders[0]) if group == "vtab" else layouts.fgvc(root, key)


RUNS = [{"dataset": name} for name, known in DATASETS.items() if known.task == "classification"]
RUNS += [{"dataset": "vtab/svhn", "backbone": "swin_b"}, {"dataset": "folder"}]


def listed(text: str):  # type: ignore[no-untyped-def]
    """The training list of VTAB-1k, with another text."""

    def damage(root: Path) -> Path:
        (path := root / "vtab-1k/svhn/train800val200.txt").write_text(text)
        return path

    return damage


def unreadable(root: Path) -> Path:
    (path := root / "vtab-1k/svhn/images/test/1.png").write_bytes(path.read_bytes()[:40])
    return path


def missing(root: Path) -> Path:
    (path := root / "vtab-1k/svhn/test.txt").unlink()
    return path


def overlap(root: Path) -> Path:
    lists = [root / f"vtab-1k/svhn/{name}.txt" for name in ("test", "train800val200")]
    rows = [path.read_text().splitlines(keepends=True) for path in lists]
    lists[0].write_text("".join([rows[1][0], *rows[0][1:]]))
    return Path(rows[1][0].split()[0])


SVHN = {"dataset": "vtab/svhn"}
THREE = "".join(f"images/trainval/{i}.png 1\n" for i in range(3))
FAULTS = {
    "a missing list": Fault(SVHN, missing, "test.txt"),
    "a label out of range": Fault(SVHN, listed("images/trainval/0.png 3\n" * 5), "line 1"),
    "an unreadable image": Fault(SVHN, unreadable, "1.png"),
    "splits that overlap": Fault(SVHN, overlap, "'train' and 'test'"),
    "the list of another set": Fault(SVHN, listed(THREE), "3 .* 5 "),
}


def spaced(root: Path) -> Path:
    """Lists with blanks, a tab and an empty line."""
    for path in (root / "vtab-1k/svhn").glob("*.txt"):
        first, *rows = path.read_text().splitlines()
        path.write_text("\n".join([f"{first} \t", rows[0].replace(" ", "\t"), *rows[1:], " ", ""]))
    return root


def twice(root: Path) -> Path:
    path = root / "vtab-1k/svhn/test.txt"
    path.write_text(path.read_text().splitlines()[0] + "\n" + "".join(path.read_text().splitlines(True)[:-1]))
    return path


def benchmark(root: Path) -> Path:
    """The benchmark's training images of GTSRB, of which there are more."""
    place = moved("hta/gtsrb/GTSRB/Training", "hta/gtsrb/GTSRB/Final_Training/Images")(root)
    for number in range(3):
        picture(place / "00000" / f"9999{number}.ppm", number)
    return place


def devkit(root: Path) -> Path:
    """Stanford Cars with VPT's lists, which name images in car_ims, and those of torchvision, with other numbers."""
    for path in (root / "fgvc/cars").glob("*.json"):
        path.write_text(path.read_text().replace("cars_train/", "car_ims/"))
    return root


GTSRB, DTD, CARS = {"dataset": "hta/gtsrb"}, {"dataset": "hta/dtd"}, {"dataset": "fgvc/cars196"}
TRAIN = "fgvc/cars/cars_train"
COPIES = {
    "VTAB's whole archive with a folder more": Fault(SVHN, moved("vtab-1k", "vtab-1k/vtab-1k"), ""),
    "VTAB's lists with blanks": Fault(SVHN, spaced, ""),
    "an image listed twice": Fault(SVHN, twice, "test.txt: line 2: .* further up"),
    "torchvision's folder of DTD": Fault(DTD, moved("hta/dtd", "hta/dtd/dtd"), ""),
    "DTD without its lists": Fault(DTD, without("hta/dtd/labels"), "(?s)train1.txt is not there.*dtd-r1.0.1"),
    "torchvision's folder of GTSRB": Fault(GTSRB, moved("hta/gtsrb", "hta/gtsrb/gtsrb"), ""),
    "GTSRB of the benchmark": Fault(GTSRB, benchmark, "(?s)13 images for 'train' .*, 10 are .*Training_fixed.zip"),
    "GTSRB without a class": Fault(GTSRB, without("hta/gtsrb/GTSRB/Training/00001"), "1 class folders .* 2 are"),
    "Kaggle's folder of Stanford Cars": Fault(CARS, moved(TRAIN, f"{TRAIN}/cars_train"), ""),
    "Stanford Cars with lists of other images": Fault(CARS, devkit, "(?s)train.json .*car_ims/0.jpg.*official_lists"),
    "no training list": Fault({"dataset": "fgvc/dogs120"}, without("fgvc/dogs/train.json"), "train.json is not there"),
}
ALONE = {"VTAB's lists of a published training": Fault(SVHN, without("vtab-1k/svhn/val200.txt"), "")}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    build = recipe.backbones.build

    def small(name: str, *args: object, **options: object) -> torch.nn.Module:
        counted = torch.get_default_device().type == "meta"  # the parameters of the full-size models
        photographs = name == "vit_small_patch14_dinov2"  # the real encoder's own section, which trains nothing
        if counted or photographs:
            return build(name, *args, **options)
        if name == "swin_b":
            sizes = {"embed_dim": 16, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 4, 8)}
            return timm.create_model("swin_base_patch4_window7_224", num_classes=0, **sizes, **options).eval()
        return encoders.build("pocket_vit")

    patch.setattr(recipe.backbones, "build", small)
    seen = recipe.input_of
    patch.setattr(recipe, "input_of", lambda name: replace(seen(name), size=32 if name == "vit_b16" else 224))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SA²VP": lambda: sa2vp.SA2VP(vit(), 3, 8, 0.5, attention="padded"),
    "SA²VP on a toy ViT": lambda: sa2vp.SA2VP(encoders.build("pocket_vit"), 3),
    "SA²VP on a Swin": lambda: sa2vp.SA2VPSwin(
        backbones.build("swin_b", "random", img_size=64, embed_dim=24, depths=(1, 1, 6, 1), window_size=2), 3
    ),
    "VPT": lambda: vpt.VPT(vit(1), 3),
    "fine-tuning": lambda: classifying.FineTuning(vit(), 3),
}
"""That `companion.save` writes, by name."""


OFFICIAL = ["swin_b_full", "tiny_vit_full"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["vit_b16_full", "vit_b16_full_acc", "swin_b_full"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    side = 64 if name == "SA²VP on a Swin" else 32
    return (draw(batch, 3, side, side),)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    untrained = recipe.training(p, found.data).build()
    return found.history, outputs_of(untrained, found.data.splits["test"], hardware=recipe.hardware(p))


TRAININGS = {"": Training(train, {}, batch=64, runs="vtab fgvc hta")}


# --- the example on own data


EXAMPLE = FLOWERS
