"""PromptPAR: five sets of pedestrians, two of them also split by person, and a folder of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from companion.data.attributes import PHRASES, ZERO_SHOT
from companion.models import promptpar
from companion.models.layers import clip_prompting
from companion.models.promptpar import PromptPAR, Settings
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from tests.data import test_attributes as layouts
from tests.data.conftest import expect, picture
from tests.models.common import draw
from tests.papers.common import NAMES, Fault, Found, Training, images, moved, vit

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

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
RUNS[0] |= {"grad_checkpointing": True}


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
    "a missing list": Fault({"dataset": "par/rapv1"}, missing, r"none of RAP_annotation/RAP_annotation\.mat"),
    "a label out of range": Fault(PA100K, changed(test_label=3 * layouts.raw(8, 26)[5:]), "a label is 3"),
    "an unreadable image": Fault(PA100K, unreadable, "truncated|cannot read"),
    "splits that overlap": Fault(PA100K, overlap, "'train' and 'test'"),
    "the file of another set": Fault(PA100K, another, "not those of PA-100K"),
}


def ending(name: str, end: str):  # type: ignore[no-untyped-def]
    """The images of a folder with another ending."""

    def damage(root: Path) -> Path:
        for path in (root / name).iterdir():
            path.rename(path.with_suffix(end))
        return root / name

    return damage


def doubled(root: Path) -> Path:
    """An image with two other endings: which of them is meant is not known."""
    ending("par/PETA/images", ".bmp")(root)
    return Path(shutil.copy(root / "par/PETA/images/00005.bmp", root / "par/PETA/images/00005.jpg"))


def written(name: str, content: bytes | None = None, size: int = 0):  # type: ignore[no-untyped-def]
    """A file below the data root with another content, or its first bytes."""

    def damage(root: Path) -> Path:
        (root / name).write_bytes((root / name).read_bytes()[:size] if content is None else content)
        return root / name

    return damage


def version_one(root: Path) -> Path:
    """RAPv2 with the annotation of RAPv1, as in the bundle of PromptPAR's authors."""
    name = "RAP_annotation/RAP_annotation.mat"
    return Path(shutil.copy(layouts.rapv1(root) / name, root / "par/RAPV2" / name))


HDF5 = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"
PETA, RAP1, RAP2 = {"dataset": "par/peta"}, {"dataset": "par/rapv1"}, {"dataset": "par/rapv2"}
COPIES = {
    "PA100K with its second folder": Fault(PA100K, moved("par/PA100k/data", "par/PA100k/release_data"), ""),
    "RAP in other letters": Fault(RAP1, moved("par/RAPV1/RAP_dataset", "par/RAPV1/rap_Dataset"), ""),
    "annotations in other letters": Fault(
        {"dataset": "par/wider"},
        moved("par/WIDER/Annotations/test_name.txt", "par/WIDER/Annotations/Test_name.TXT"),
        "",
    ),
    "PETA as JPEGs": Fault(PETA, ending("par/PETA/images", ".jpg"), ""),
    "PETA as bitmaps": Fault(PETA, ending("par/PETA/images", ".BMP"), ""),
    "an image with two other endings": Fault(PETA, doubled, r"PETA\.mat lists 00005\.png .*images \(00001\.bmp"),
    "images in another folder": Fault(
        PETA,
        moved("par/PETA/images", "par/PETA/pictures"),
        r"PETA\.mat lists .*not both of which are in .*Pad_datasets",
    ),
    "an image fewer": Fault(
        PETA, lambda root: (root / "par/PETA/images/00007.png").unlink(), r"1 of 3 listed images of PETA\.mat"
    ),
    "a truncated annotation": Fault(PETA, written("par/PETA/PETA.mat", size=700), "truncated, .* 700 bytes .*download"),
    "an empty annotation": Fault(RAP1, written("par/RAPV1/RAP_annotation/RAP_annotation.mat"), "truncated, .* 0 bytes"),
    "an annotation in HDF5": Fault(PETA, written("par/PETA/PETA.mat", HDF5), r"format 7\.3 \(HDF5\).* -v7"),
    "RAPv2 with RAPv1's annotation": Fault(RAP2, version_one, r"but those of RAP v1\. .*OpenPAR 59, 67"),
    "PA100K with PETA's annotation": Fault(PA100K, another, "not those of PA-100K .*but those of PETA"),
}


# --- small models


def small_backbones(embed: int = 64) -> tuple[CLIP, VisionTransformer]:
    """PromptPAR's CLIP and fusion."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(2, 64, 32, patch_size=8, image_size=64)
    clip = CLIP(embed, vision, CLIPTextCfg(16, 64, width=64, heads=1, layers=2), quick_gelu=True).eval()
    return clip, VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "_backbones", lambda p: small_backbones())
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())


def people() -> promptpar.PromptPAR:
    clip, sentences = encoders.build("pocket_pedestrian_clip"), [f"a {name}" for name in NAMES]
    model = promptpar.PromptPAR(
        clip, sentences, Tokenizer(context_length=24), vit(), promptpar.Settings(prompts=5, depth=2, visual_embed=True)
    )
    return model.half_clip()  # its precision is a part of the model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PromptPAR": people,
    "PromptPAR, embedded": lambda: promptpar.PromptPAR(
        encoders.build("pocket_clip"),
        clip_prompting.embed_texts(Tokenizer(), encoders.build("pocket_clip"), NAMES),
        None,
        vit(),
        promptpar.Settings(visual_embed=True),
    ),
}
"""That `companion.save` writes, by name."""


FULL_SIZE = ["full_l14_pa100k"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    return (draw(batch, 3, *model.clip.visual.image_size),)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    torch.manual_seed(p.seed)
    untrained = recipe.build(p, found.names, *recipe._backbones(p))
    return found.history, recipe.probabilities(p, untrained, found.test)


TRAININGS = {"": Training(train, {}, batch=16, runs="peta pa100k rapv1 rapv2 wider rap-zs peta-zs", rounding=16)}


# the notebook's losses: the shares of the attributes are copied to the GPU, as in the README
WAITS = {"<cell 14 of promptpar>": 1, "<cell 28 of promptpar>": 1}


# --- the example on own data


def people() -> None:
    images(Path("people"), [f"{i}.jpg" for i in range(16)], (60, 30))
    rows = [f"{i}.jpg,{'train' if i < 15 else 'test'},{i % 2},{i % 3 // 2}" for i in range(16)]
    head = "image,split,a pedestrian with a hat,a pedestrian with a bag"
    Path("people/labels.csv").write_text("\n".join([head, *rows]))
    images(Path(), ["new.jpg"])


EXAMPLE = people, r"\[\{\'a pedestrian with a (hat|bag)\': 0\.\d+, "
