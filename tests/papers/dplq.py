"""DPLQ: base to novel classes on eleven sets, the transfers of both domains, and a folder of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from companion.data import DATASETS
from companion.data.domains import CLASSES
from companion.models import dplq
from companion.models.dplq import baselines as coop
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from companion.training.fit import outputs_of
from tests.data import test_domains as layouts
from tests.data.conftest import expect
from tests.models.common import draw
from tests.papers.common import FLOWERS, NAMES, Fault, Found, Training, moved, without

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

LIST = "medical/BTMRI/split_cao_BTMRI.json"
TARGETS = {"remote/rsicd": ["remote/whurs19", "remote/rsscn7"], "medical/btmri": ["medical/chmnist", "medical/ccbtm"]}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Four images of each class in the authors' layout, BTMRI with a list; of two sets those of their transfers too."""
    if name == "folder":
        layouts.tree(root, ("bear", "cat", "owl"), 10)
        return
    for each in (name, *TARGETS.get(name, ())):
        folder, own = DATASETS[each].folders
        classes = sorted(CLASSES[each])
        counts = {part: images * len(classes) for part, images in {"train": 2, "val": 1, "test": 1, "all": 4}.items()}
        expect(patch, each, sizes=counts)
        layouts.tree(root / folder / own, classes, 10 if each == "medical/btmri" else 4)
    if name == "medical/btmri":
        layouts.listed(root / LIST, CLASSES[name])


RUNS = [{"dataset": name} for name in sorted(CLASSES, reverse=True)]
RUNS += [
    {"dataset": name, "protocol": protocol, "targets": ", ".join(others)}
    for protocol in ("cross-dataset", "domain generalisation")
    for name, others in TARGETS.items()
]
RUNS += [{"dataset": "folder", "domain": "clip"}, {"dataset": "folder", "method": "zero-shot CLIP"}]


def missing(root: Path) -> Path:
    shutil.rmtree(path := root / "remote/RSSCN7/RSSCN7/Grass")
    return path


def listed(name: str = "medical/btmri", **parts: list):  # type: ignore[no-untyped-def]
    """The list with other classes or entries."""

    def damage(root: Path) -> Path:
        return layouts.listed(root / LIST, CLASSES[name], **parts)

    return damage


def unreadable(root: Path) -> Path:
    (path := root / "medical/BTMRI/BTMRI/glioma/7.jpg").write_bytes(path.read_bytes()[:300])
    return path


BTMRI = {"dataset": "medical/btmri"}
FAULTS = {
    "a missing class": Fault({"dataset": "remote/rsscn7"}, missing, "1 of 7"),
    "a label out of range": Fault(BTMRI, listed(test=[["glioma/0.jpg", 4, "glioma"]]), "label 4 is not in"),
    "an unreadable image": Fault(BTMRI, unreadable, "cannot read"),
    "splits that overlap": Fault(BTMRI, listed(test=[["glioma/7.jpg", 0, "glioma"]]), "image .*'train'"),
    "the list of another set": Fault(BTMRI, listed("medical/ccbtm"), "2 of 2 .* of split_cao_BTMRI.json"),
}


def nested(root: Path) -> Path:
    """The list of BTMRI next to a folder that holds the class folders in another one."""
    return moved("medical/BTMRI/BTMRI", "medical/BTMRI/archive/Data")(root)


def halves(root: Path) -> Path:
    """WHU-RS19 as others split it."""
    place = root / "remote/WHURS19"
    moved("remote/WHURS19/WHURS19", "remote/WHURS19/train")(root)
    shutil.copytree(place / "train", place / "test")
    return place


def again(root: Path) -> Path:
    """An image as a browser names its second download."""
    path = root / "remote/RSSCN7/RSSCN7/Grass/0.jpg"
    return Path(shutil.copy(path, path.with_name("0 (1).jpg")))


def released(root: Path) -> Path:
    """One of the two folders of the archive of BTMRI."""
    (root / LIST).unlink()
    return moved("medical/BTMRI/BTMRI", "medical/BTMRI/Training")(root)


AID, WHU, RSSCN7 = {"dataset": "remote/aid"}, {"dataset": "remote/whurs19"}, {"dataset": "remote/rsscn7"}
COPIES = {
    "Kaggle's folders of AID": Fault(AID, moved("remote/AID/AID", "remote/AID/AID_dataset/AID"), ""),
    "AID in small letters": Fault(AID, moved("remote/AID", "remote/aid"), ""),
    "WHU-RS19 as released": Fault(WHU, moved("remote/WHURS19/WHURS19", "remote/WHURS19/WHU-RS19"), ""),
    "CCBTM in Data": Fault({"dataset": "medical/ccbtm"}, moved("medical/CCBTM/CCBTM", "medical/CCBTM/Data"), ""),
    "all sets in a folder more": Fault(AID, moved("remote", "remote/remote"), ""),
    "a list next to a nested folder": Fault(BTMRI, nested, ""),
    "a list in the nested folder": Fault(BTMRI, moved(LIST, "medical/BTMRI/BTMRI/split_cao_BTMRI.json"), ""),
    "a split alone": Fault(WHU, halves, "test is one split of a copy"),
    "a part of BTMRI": Fault(BTMRI, released, "Testing has no class folders"),
    "an image twice": Fault(RSSCN7, again, "29 images for 'all' .* 28 are expected"),
    "a listed image that is missing": Fault(BTMRI, without("medical/BTMRI/BTMRI/glioma/7.jpg"), "split_cao_BTMRI.json"),
    "no classes": Fault(RSSCN7, moved("remote/RSSCN7/RSSCN7", "remote/RSSCN7/RSSCN7/images/all"), "no class folders"),
}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """The toy CLIP, whose image tower has 6 blocks."""
    published = recipe.published_settings
    patch.setattr(recipe, "published_settings", lambda protocol: published(protocol) | {"prompt depth": 3})
    patch.setattr(recipe, "_clip", lambda weights: encoders.build("pocket_clip"))
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())
    domain = recipe.domain_model
    # a dry run's have random weights
    small = {"random": "clip"}
    patch.setattr(recipe, "domain_model", lambda name, source, clip: domain(small.get(source, name), source, clip=clip))


def prompted(kind: type, **options: Any) -> nn.Module:
    return kind(encoders.build("pocket_clip"), NAMES, Tokenizer(), **options)


def domain() -> nn.Module:
    return dplq.domain_model("vit_tiny_patch16_224", "random", clip=encoders.build("pocket_clip"))


def _by_clip(clip: nn.Module) -> nn.Module:
    return dplq.DPLQ(clip, NAMES, Tokenizer(), dplq.domain_model("clip", clip=clip), depth=3, noise="off")


def _with_classes(model: dplq.DPLQ) -> dplq.DPLQ:
    model.reset_classifier(["a large red ring at the top", "disc"])  # more and longer than those that it was made with
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DPLQ": lambda: prompted(dplq.DPLQ, domain=domain(), depth=3, noise="off"),
    "DPLQ, other classes": lambda: _with_classes(prompted(dplq.DPLQ, domain=64, depth=3, noise="off")),
    "DPLQ, controlled by CLIP": lambda: _by_clip(encoders.build("pocket_clip")),
    "CoOp": lambda: prompted(coop.CoOp, tokens=4),
    "zero-shot": lambda: prompted(coop.ZeroShot),
}
"""That `companion.save` writes, by name."""


OFFICIAL = ["baseline_cocoop", "baseline_coop", "baseline_maple", "model_vitb16"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["model_vitb16", "domain_mae"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    images = draw(batch, 3, 32, 32)
    return (images, draw(batch, 64)) if name == "DPLQ, other classes" else (images,)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found, clip = recipe.run(p, out), recipe._clip("random")
    test = found.tests["source"]
    untrained = recipe.build(p, p.method, test.class_names, clip, recipe._domain(p, clip))
    torch.manual_seed(0)  # the noise of the prompts
    return found.history, outputs_of(untrained, test, hardware=recipe.hardware(p))


TRAININGS = {
    # its texts, and so its memory, grow with the number of classes: no `runs`
    "": Training(train, {"protocol": "cross-dataset"}, batch=4)
}


# --- the example on own data


EXAMPLE = FLOWERS
