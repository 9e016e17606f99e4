"""PromptPAR: five sets of pedestrians, two of them also split by person, and a folder of one's own."""

from pathlib import Path

import pytest
import torch

from companion.data.attributes import PHRASES, ZERO_SHOT
from companion.models.promptpar import PromptPAR, Settings
from companion.toy.tokens import Tokenizer
from tests.data import test_attributes as layouts
from tests.data.conftest import expect, picture
from tests.rehearsal.common import Fault
from tests.small import small_backbones

SIZES: dict[str, dict[str, int]] = {
    "par/peta": {"train": 3, "val": 2, "trainval": 5, "test": 3},
    "par/pa100k": {"train": 4, "val": 1, "trainval": 5, "test": 3},
    "par/rapv1": {"trainval": 5, "test": 3},
    "par/rapv2": {"train": 3, "val": 2, "trainval": 5, "test": 3},
    "par/wider": {"trainval": 5, "test": 3},
    "par-zs/peta": {"train": 3, "val": 1, "trainval": 4, "test": 3},
    "par-zs/rap": {"train": 3, "val": 1, "trainval": 4, "test": 3},
}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The dataset of eight images in its layout; of RAPv1 the released weights too, in the current folder."""
    if name == "folder":
        lines = ["image,split,A person with a hat,A person with a bag,A person in red"]
        for i in range(24):
            picture(root / f"{i}.png", i, (20, 40))
            lines.append(f"{i}.png,{'train' if i < 20 else 'test'},{i % 2},{i // 2 % 2},1")
        (root / "labels.csv").write_text("\n".join(lines))
        return
    expect(patch, name, sizes=SIZES[name])
    folder = (layouts.MAKERS | {"par/wider": layouts.wider})[ZERO_SHOT.get(name, name)](root)
    if name in ZERO_SHOT:
        layouts.new_split(folder)
    if name == "par/rapv1":
        released(root / "RAP1.pth", PHRASES[name])
        patch.chdir(root)


def released(path: Path, texts: tuple[str, ...]) -> None:
    """Weights in the layout of the authors' file."""
    clip, fusion = small_backbones()
    state = PromptPAR(clip, texts, Tokenizer(), fusion, Settings(official_quirks=True)).to_official()
    parts = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("clip_model.", "model.")}
    torch.save({"ViT_model": parts["clip_model."], "model_state_dict": parts["model."]}, path)


RUNS = [{"dataset": name} for name in SIZES]
RUNS += [{"dataset": "par/rapv1", "checkpoint": "RAP1.pth"}, {"dataset": "folder"}]
RUNS += [{"dataset": "par/rapv1", "clip": "ViT-B-16-quickgelu/openai", "release": "2025", "select": "maxima"}]


def changed(**fields: object):  # type: ignore[no-untyped-def]
    """Other fields in the annotation of PA100K."""

    def damage(root: Path) -> Path:
        return layouts.pa100k(root, **fields) / "annotation.mat"

    return damage


def missing(root: Path) -> Path:
    (path := root / "par/RAPV1/RAP_annotation/RAP_annotation.mat").unlink()
    return path


def unreadable(root: Path) -> Path:
    (path := root / "par/PA100k/data/000006.jpg").write_bytes(path.read_bytes()[:400])
    return path


def overlap(root: Path) -> Path:
    changed(test_images_name=layouts.cells([f"00000{i}.jpg" for i in (2, 7, 8)]))(root)
    return Path("000002.jpg")


def another(root: Path) -> Path:
    path = layouts.peta(root) / "PETA.mat"
    return path.replace(root / "par/PA100k/annotation.mat")


PA100K = {"dataset": "par/pa100k"}
FAULTS = {
    "a missing list": Fault({"dataset": "par/rapv1"}, missing, "is not there"),
    "a label out of range": Fault(PA100K, changed(test_label=3 * layouts.raw(8, 26)[5:]), "a label is 3"),
    "an unreadable image": Fault(PA100K, unreadable, "truncated|cannot read"),
    "splits that overlap": Fault(PA100K, overlap, "'train' and 'test'"),
    "the file of another set": Fault(PA100K, another, "not those of PA-100K"),
}
