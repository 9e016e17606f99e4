"""SIC-CADS: recognisers of OV-COCO and OV-LVIS, a test without training, and one on foreign vocabularies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from torch import nn

from companion import backbones
from companion.io.files import read_json, write_json
from companion.models import sic_cads
from companion.models.sic_cads import official, predictions, recipe
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from companion.training.checkpoints import save
from companion.training.hardware import Hardware
from companion.training.recipe import run
from tests.conftest import parameters
from tests.data import test_detection as layouts
from tests.data.conftest import expect
from tests.models.common import draw
from tests.papers.common import NAMES, Fault, Found, Training, images, moved

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

COCO, LVIS = "detection/ov-coco", "detection/ov-lvis"
PLACES = {  # of a split: the annotations, the folder of the images, and a file name
    COCO: {
        "train": ("coco/annotations/instances_train2017.json", "coco/train2017", "{}.jpg"),
        "test": ("coco/annotations/instances_val2017.json", "coco/val2017", "{}.jpg"),
    },
    LVIS: {
        "train": ("lvis/lvis_v1_train.json", "coco", "train2017/{}.jpg"),
        "test": ("lvis/lvis_v1_val.json", "coco", "val2017/{}.jpg"),
    },
    "detection/objects365": {
        "test": ("objects365/annotations/zhiyuan_objv2_val.json", "objects365/val", "images/v1/patch0/{}.jpg")
    },
    "detection/openimages": {
        "test": ("oid/annotations/oid_challenge_2019_val_expanded.json", "oid/images", "0/{}.jpg")
    },
}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Eight images a split in the layout of the set, each with a box of two classes; a trained recogniser of LVIS."""
    categories = layouts.coco_categories() if name == COCO else layouts.lvis_file()["categories"]
    base, novel = (1, 17) if name == COCO else (1, 2)
    expect(patch, name, classes=len(categories), sizes=dict.fromkeys(PLACES[name], 8))
    for split, (file, folder, spelled) in PLACES[name].items():
        numbers = range(1, 9) if split == "train" else range(101, 109)
        images = [layouts.image(i, file_name=spelled.format(i)) for i in numbers]
        for found in images:
            layouts.picture(root / folder / found["file_name"])
            if name == LVIS:
                found["coco_url"] = f"http://images.cocodataset.org/{found.pop('file_name')}"
        boxes = [layouts.box(2 * i + (c == novel), i, c) for i in numbers for c in (base, novel)]
        write_json(root / file, {"images": images, "annotations": boxes, "categories": categories})
        if name == COCO and split == "train":
            said = [{"image_id": i, "caption": "a man and a dog"} for i in numbers]
            write_json(root / "coco/annotations/captions_train2017.json", {"images": images, "annotations": said})
    if name not in (COCO, LVIS):
        p = parameters("sic_cads", dataset=LVIS)
        model = recipe.build(p, small_clip(), torch.zeros(3, 24), torch.zeros(3) > 0, "random")
        save(root, "recogniser ov-lvis seed 0", official.trained_weights(model))
        patch.chdir(root)


RUNS = [{"dataset": COCO}, {"dataset": COCO, "branch": "visual+"}, {"dataset": LVIS}]
RUNS += [
    {"dataset": name, "checkpoint": "recogniser ov-lvis seed 0.safetensors"}
    for name in ("detection/objects365", "detection/openimages")
]


def missing(root: Path) -> Path:
    (path := root / "coco/annotations/captions_train2017.json").unlink()
    return path


def changed(file: str, part: str, **fields: object):  # type: ignore[no-untyped-def]
    """The last entry of a part of the annotations with other fields."""

    def damage(root: Path) -> Path:
        found = read_json(root / file)
        found[part][-1] |= fields
        write_json(root / file, found)
        return root / file

    return damage


def unreadable(root: Path) -> Path:
    (path := root / "coco/train2017/3.jpg").write_bytes(path.read_bytes()[:300])
    return path


def overlap(root: Path) -> Path:
    changed("lvis/lvis_v1_val.json", "images", coco_url="http://images.cocodataset.org/train2017/4.jpg")(root)
    return Path("train2017/4.jpg")


def another(root: Path) -> Path:
    (path := root / "coco/annotations/instances_val2017.json").unlink()
    found = layouts.lvis_file()
    write_json(path, found | {"images": [found["images"][0] | {"id": i} for i in range(1, 9)]})
    return path


def ids_of_pandas(root: Path) -> Path:
    """Numbers with a point, as pandas writes columns that have a hole."""
    for file in (root / "coco/annotations").glob("instances*"):
        found = read_json(file)
        for row in (*found["images"], *found["annotations"]):
            row |= {name: float(row[name]) for name in ("id", "image_id", "category_id", "width") if name in row}
        write_json(file, found)
    return root


def linked(root: Path) -> Path:
    """LVIS is a link to another disk, which has no COCO beside it."""
    (path := root / "disk" / "lvis").parent.mkdir()
    (root / "lvis").rename(path)
    (root / "lvis").symlink_to(path, target_is_directory=True)
    return path


def without(*files: str):  # type: ignore[no-untyped-def]
    def damage(root: Path) -> Path:
        for file in files:
            (root / file).unlink()
        return root

    return damage


OBJECTS = {"dataset": "detection/objects365"}
COPIES = {
    "numbers with a point": Fault({"dataset": COCO}, ids_of_pandas, ""),
    "Ultralytics' folders": Fault({"dataset": COCO}, moved("coco/train2017", "coco/images/train2017"), ""),
    "annotations in their archive's folder": Fault(
        {"dataset": COCO}, moved("coco/annotations", "coco/annotations_trainval2017/annotations"), ""
    ),
    "a linked LVIS": Fault({"dataset": LVIS}, linked, ""),
    "LVIS inside COCO": Fault({"dataset": LVIS}, moved("coco", "lvis/coco"), ""),
    "patches without images/v1": Fault(OBJECTS, moved("objects365/val/images/v1/patch0", "objects365/val/patch0"), ""),
    "no captions": Fault({"dataset": COCO}, without("coco/annotations/captions_train2017.json"), "captions = False"),
    "a hole": Fault({"dataset": COCO}, without("coco/val2017/108.jpg"), "108.jpg"),
}
FAULTS = {
    "a missing list": Fault({"dataset": COCO}, missing, "captions = False"),
    "a label out of range": Fault(
        {"dataset": COCO}, changed(PLACES[COCO]["test"][0], "annotations", category_id=12), "'category_id' is 12"
    ),
    "an unreadable image": Fault({"dataset": COCO}, unreadable, "cannot read"),
    "splits that overlap": Fault({"dataset": LVIS}, overlap, "'train' and 'test'"),
    "the file of another set": Fault({"dataset": COCO}, another, "3 categories, 80"),
}


# --- small models


def small_clip() -> CLIP:
    """SIC-CADS' teacher."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    model = CLIP(24, vision, CLIPTextCfg(77, 49408, width=16, heads=2, layers=1)).eval()
    set_model_preprocess_cfg(model, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from tests.models.sic_cads.test_detectors import owl

    def build(name: str, weights: object = "pretrained", **options: object) -> torch.nn.Module:
        if name.startswith("openclip:"):
            return small_clip()
        return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0)

    whole = recipe.published
    # at 64 pixels P6 is one pixel, for which the CPU's bfloat16 convolution computes gradients of unset memory
    patch.setattr(recipe, "published", lambda *args, **kwargs: dataclasses.replace(whole(*args, **kwargs), size=128))
    patch.setattr(recipe.backbones, "build", build)
    patch.setattr(recipe.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    patch.setattr(recipe, "SHORTER", 64)


def recogniser() -> sic_cads.MLR:
    clip = encoders.build("pocket_clip")
    text = sic_cads.vocabulary(clip, Tokenizer(), NAMES)
    given = {"image_input": backbones.input_of(clip), "teacher_input": backbones.input_of(clip)}
    settings = sic_cads.Settings(width=32, levels=1, **given)
    novel = torch.tensor([False, False, True])
    body = backbones.build("resnet18", "random")
    return sic_cads.MLR(body, text, novel, settings, teacher=clip.visual)


MODELS: dict[str, Callable[[], nn.Module]] = {"MLR": recogniser}
"""That `companion.save` writes, by name."""


FULL_SIZE = ["mlr_lvis_r50"]
"""Recorded cases that take gigabytes, or minutes."""


def inputs(name: str, model: Any, batch: int) -> tuple[Any, ...]:
    return (draw(batch, 3, 64, 64),)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    title, images = recipe.data(p)
    test = images["test"]
    detector, *parts = recipe.frozen(p, test)
    torch.manual_seed(0)
    history = run(recipe.training(p, *recipe.recogniser(p, *parts, test.unseen, images)))[1]
    torch.manual_seed(0)
    model = recipe.build(p, *parts, test.unseen, "random")
    outputs = predictions.collect(model, detector, test, hardware=Hardware.of(p, "sic_cads"), title=title)
    assert outputs.boxes[0].dtype == outputs.probabilities[0].dtype == torch.float32
    return history, outputs.scores[p.branch]


TRAININGS = {"": Training(train, {}, batch=16, runs="ov-coco ov-lvis")}


WAITS = {"toy/sic_cads.py": 1}  # the positives of the rank loss, at toy scale alone


# --- the example on own data


def shop() -> None:
    images(Path("shop/images"), [f"{i}.jpg" for i in range(8)])
    found = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 48} for i in range(8)],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "kiwi"}, {"id": 3, "name": "pear"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 3, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
            for i in range(8)
        ],
    }
    Path("shop/annotations.json").write_text(json.dumps(found))
    images(Path(), ["new.jpg"])


EXAMPLE = shop, r"\[\{'(apple|kiwi|pear)': 0\.\d+, "


def small_example(patch: pytest.MonkeyPatch) -> None:
    from companion.models.sic_cads import recipe

    crops = recipe.Crops
    patch.setattr(recipe, "Crops", lambda data, size, crop: crops(data, size // 5, crop))
