"""DMT: distillation and classification on ImageNet-1k, detection on COCO, segmentation on ADE20K, a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from companion.data.pretraining import ADE20K, COCO, IMAGENET
from companion.io.files import read_json, write_json
from companion.models import dmt
from companion.models.dmt import downstream
from companion.training.recipe import run
from tests.data import test_pretraining as layouts
from tests.papers.common import FLOWERS, Fault, Found, Training, moved, spoil, without

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The data set in its layout, of 4 training images and a test image or two."""
    layouts.shrink(patch)
    if name == "folder":
        for i in range(4):
            layouts.picture(root / "ab"[i % 2] / f"{i}.png", 50 * i)
    else:
        {IMAGENET: layouts.imagenet, COCO: layouts.coco, ADE20K: layouts.ade20k}[name](root)


FINE, DETECT = {"task": "fine-tune", "dataset": IMAGENET}, {"task": "detect", "dataset": COCO}
SEGMENT, OWN = {"task": "segment", "dataset": ADE20K}, {"task": "distil", "dataset": "folder"}
RUNS = [
    FINE,
    FINE | {"task": "linear probe"},
    FINE | {"encoder": "teacher", "grad_checkpointing": True},
    DETECT,
    SEGMENT,
    OWN,
]
RUNS += [OWN | {"dataset": IMAGENET}]


def boxes(**changes: object) -> Callable[[Path], Path]:
    """COCO's test annotations with other entries; "first" are changes of the first instance."""

    def damage(root: Path) -> Path:
        content = read_json(path := root / "coco/annotations/instances_val2017.json")
        content["annotations"][0] |= changes.get("first", {})
        write_json(path, content | changes)
        return path

    return damage


def labels(value: int, size: tuple[int, int] = (12, 8)) -> Callable[[Path], Path]:
    """A label image of ADE20K with another value or size."""

    def damage(root: Path) -> Path:
        path = root / "ade/ADEChallengeData2016/annotations/training/b.png"
        layouts.picture(path, value, size=size, mode="L")
        return path

    return damage


def emptied(root: Path) -> Path:
    """A class folder of ImageNet without its image; the error names the folder of the split."""
    return spoil("imagenet/train/n02/n02_0.JPEG")(root).parents[1]


LVIS = [{"id": i, "name": str(i)} for i in range(1203)]
FAULTS = {
    "a missing list": Fault(DETECT, spoil("coco/annotations/instances_train2017.json"), "is not there"),
    "a listed image that is missing": Fault(DETECT, spoil("coco/train2017/2.jpg"), "1 of 4 listed"),
    "a category out of range": Fault(DETECT, boxes(first={"category_id": 12}), "category"),
    "an instance without a mask": Fault(DETECT, boxes(first={"segmentation": "none"}), "annotation 1: 'segm"),
    "the annotations of LVIS": Fault(DETECT, boxes(categories=LVIS), "1203 categories, 2 are"),
    "a label out of range": Fault(SEGMENT, labels(151), "0 to 150 a pixel .* up to 151"),
    "labels of another size": Fault(SEGMENT, labels(1, (10, 8)), "its image"),
    "an unreadable image": Fault(FINE, spoil("imagenet/val/n02/n02_0.JPEG", b"none"), "cannot read"),
    "an unreadable image to distil": Fault(OWN, spoil("a/2.png", b"none"), "cannot read"),
    "fewer images": Fault(FINE, emptied, "3 images for 'train' .* 4 are expected"),
}


def flat(files: Mapping[str, str]) -> Callable[[Path], Path]:
    """The test images of ImageNet in one folder, and lists of their classes."""

    def damage(root: Path) -> Path:
        for name, text in files.items():
            (root / "imagenet" / name).write_text(text)
        return layouts.flat(root)

    return damage


def kaggle(root: Path) -> Path:
    """Kaggle's folders of ImageNet."""
    flat({"LOC_val_solution.csv": SOLUTION})(root)
    for split in ("train", "val"):
        moved(f"imagenet/{split}", f"imagenet/ILSVRC/Data/CLS-LOC/{split}")(root)
    return root


SOLUTION = "ImageId,PredictionString\nn02_0,n02 1 2 3 4 n02 5 6 7 8 \nn01_0,n01 1 2 3 4 \n"
OTHERS = SOLUTION.replace("n02 ", "n03 ")
ADE = "ade/ADEChallengeData2016"
ABSENT = "n02_1.JPEG 1\nn01_0.JPEG 0\n"
LISTED = {"val.txt": "n02_0.JPEG 1\nn01_0.JPEG 0\n"}
COPIES = {
    "Kaggle's folders of ImageNet": Fault(FINE, kaggle, ""),
    "flat test images of ImageNet with Caffe's list": Fault(FINE, flat(LISTED), ""),
    "flat test images with a list of names": Fault(FINE, flat({"val.txt": "n02_0.JPEG n02\nn01_0.JPEG n01\n"}), ""),
    "flat test images without a list": Fault(FINE, flat({}), "2 images lie flat in .*LOC_val_solution.csv"),
    "a list of other classes": Fault(FINE, flat({"LOC_val_solution.csv": OTHERS}), "its classes are not those of"),
    "a list that counts from 1": Fault(FINE, flat({"val.txt": "n02_0.JPEG 2\nn01_0.JPEG 1\n"}), "a number from 0"),
    "an image that is listed alone": Fault(FINE, flat({"val.txt": ABSENT}), "1 images of .*val.txt .* n02_1"),
    "other classes in test": Fault(FINE, moved("imagenet/val/n01", "imagenet/val/n03"), "its classes are not those of"),
    "COCO's images in images/": Fault(DETECT, moved("coco/train2017", "coco/images/train2017"), ""),
    "a COCO file next to the images": Fault(
        DETECT, moved("coco/annotations/instances_val2017.json", "coco/instances_val2017.json"), ""
    ),
    "ADE20K in capitals": Fault(SEGMENT, moved(f"{ADE}/images/training", f"{ADE}/images/Training"), ""),
    "labels of ADE20K that are missing": Fault(SEGMENT, without(f"{ADE}/annotations/training/d.png"), "1 of 4 .*d.png"),
    "an image of ADE20K that is missing": Fault(SEGMENT, without(f"{ADE}/images/training/d.jpg"), "3 images for"),
}
ALONE = {"the training images of ImageNet": Fault(OWN | {"dataset": IMAGENET}, without("imagenet/val"), "")}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    depth, whole = {"tiny": 4, "small": 4, "base": 2}, recipe.vit.build

    def build(size: str, **options: object) -> torch.nn.Module:
        return recipe.ViT(224, 16, 48, depth[size], 4, **options) if size in depth else whole(size, **options)

    patch.setattr(recipe, "SIZES", {"detect": 128, "segment": 128})
    few = {"rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 16, "box_batch_size_per_image": 32}
    patch.setattr(recipe.down, "MaskRCNN", functools.partial(recipe.down.MaskRCNN, **few, box_detections_per_img=4))
    patch.setattr(recipe.vit, "build", build)
    patch.setattr(recipe.official, "build", build)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DMT's student": lambda: dmt.build("pocket", heads=2),
    "DMT's classifier": lambda: downstream.classifier(dmt.build("pocket", heads=2), 3),
}
"""That `companion.save` writes, by name."""


FULL_SIZE = ["dino_vitb", "g2sd_generic_vits", "ibot_vitb", "mae_vitb", "mocov3_vitb", "tinymim_relation"]
"""Recorded cases that take gigabytes, or minutes."""


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "distil":
        return run(recipe.distillation(p, out, real=False)[1])[1], None
    _, training, score = recipe.downstream(p, out, real=False)
    model, history = run(training)
    assert np.isfinite([*score(model).values()]).all()
    return history, None


TRAININGS = {
    "distil": Training(train, {}, batch=256, runs="distil"),
    "fine-tune": Training(train, {"task": "fine-tune"}, batch=256, runs="fine-tune"),
    "linear probe": Training(train, {"task": "linear probe"}),
    "detect": Training(train, {"task": "detect"}, batch=8, runs="detect"),
    "segment": Training(train, {"task": "segment"}, batch=4, runs="segment"),
}


WAITS = {
    "models/dmt/downstream.py": 250
}  # torchvision's Mask R-CNN, eight images: boxes by score, suppression, matches


# --- the example on own data


EXAMPLE = FLOWERS


def small_example(patch: pytest.MonkeyPatch) -> None:
    from companion.models import dmt
    from companion.models.dmt import vit

    patch.setitem(vit.SIZES, "tiny", {"width": 48, "depth": 2, "heads": 3})
    patch.setattr(dmt, "released", lambda name: vit.ViT(width=64, depth=1, heads=4))
