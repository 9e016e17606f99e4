"""ECAMP: pre-training on MIMIC-CXR, OpenI or a folder, and the four downstream tasks."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from companion.data import DATASETS, xrays
from companion.data.xrays import CLASSES, ONE_OF, REPORTS, SIZES, lists, tasks
from companion.models import ecamp
from companion.training.recipe import run as trained
from tests.data.test_xrays import openi, picture, table
from tests.papers.common import Fault, Found, Training, images, spoil

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have

COUNTS = {"1": 4, "10": 5, "100": 6, "val": 4, "test": 5}
FOLDERS = {"xrays/chestx-ray14": "images_001", "xrays/rsna": "train_images", "fundus/riga": "Image/BinRushed"}
FOLDERS |= {"xrays/siim": "train/images/1024/dicom"}
BOXES = ("[[0.0, 0.0, 0.0, 0.0]]", "[[256.0, 512.0, 512.0, 1024.0], [0.0, 0.0, 128.0, 128.0]]")
TEXTS = ["The heart is large. No pneumothorax.", "There is a small right effusion.", "No mass.", "Mild edema."]


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The data set in its layout: a few images of each list, none of which is in another."""
    folder = root if name == "folder" else root / DATASETS[name].folders[0]
    if name == "xrays/openi":
        openi(folder)
    elif name in ("folder", "xrays/mimic-cxr"):
        paths = [f"files/p10/p1000003{i}/s5041426{i}/{i}.jpg" for i in range(4)]
        for path in paths:
            picture(folder / path, 90)
        xrays.write_reports(folder / REPORTS[name == "folder" or 1], paths, TEXTS, [f"There is {t}" for t in TEXTS])
    for task in (task for task in tasks(name) if (name, task) in SIZES):
        known = {key: COUNTS[key] for key in SIZES[name, task]}
        patch.setitem(xrays.SIZES, (name, task), known)
        if name == "xrays/chestmnist":
            chestmnist(folder, {"train": COUNTS["100"], "val": COUNTS["val"], "test": COUNTS["test"]})
            continue
        for key, file in lists(task).items():
            listed(name, task, folder / file, [f"{key}_{i}" for i in range(COUNTS[key])])


def listed(name: str, task: str, path: Path, ids: list[str]) -> None:
    """A list of a task with the images, whose labels, masks or boxes alternate."""
    below, end = FOLDERS.get(name, "train"), "tif" if name == "fundus/riga" else "png"
    images = [f"{below}/{each}.{end}" for each in ids]
    for image in images:
        colour = {"value": (90, 60, 30), "mode": "RGB"} if name.startswith("fundus/") else {"value": 90}
        picture(path.parent / image, **colour, size=(48, 40))
    if task == "classification":
        classes = len(CLASSES[name])
        labels = [[i % classes] if name in ONE_OF else [(i + c) % 2 for c in range(classes)] for i in range(len(ids))]
        lines = [" ".join(map(str, (image, *of))) for image, of in zip(images, labels, strict=True)]
        path.write_text("\n".join(lines) + "\n")
    elif name == "xrays/siim":
        table(path, ("ImageId", "EncodedPixels"), *((each, ("-1", "0 1024")[i % 2]) for i, each in enumerate(ids)))
    elif name == "fundus/riga":
        masks = [image.replace("Image", "FinalLabel") for image in images]
        for i, mask in enumerate(masks):
            picture(path.parent / mask, (128, 255)[i % 2], size=(48, 40))
        table(path, ("img_path", "mask_path"), *zip(images, masks, strict=True))
    else:
        table(path, ("image_path", "bbox"), *((image, BOXES[i % 2]) for i, image in enumerate(images)))


def chestmnist(folder: Path, counts: dict[str, int]) -> None:
    arrays = {f"{split}_images": np.full((n, 224, 224), 90, np.uint8) for split, n in counts.items()}
    arrays |= {f"{split}_labels": np.indices((n, 14)).sum(0).astype(np.uint8) % 2 for split, n in counts.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "chestmnist_224.npz", **arrays)


def run(task: str, name: str, **changes: str) -> dict[str, str]:
    return {"task": task, "dataset": name} | changes


COVIDX = run("fine-tune", "xrays/covidx")
RUNS = [COVIDX]
RUNS += [run("fine-tune", f"xrays/{name}", labels="10") for name in ("chestx-ray14", "chexpert", "rsna", "chestmnist")]
RUNS += [run("linear probe", "xrays/chestx-ray14", encoder="MRM")]
RUNS += [run("segment", f"xrays/{name}", labels="1") for name in ("siim", "rsna")]
RUNS += [run("segment", "fundus/riga", encoder=encoder, protocol="plain") for encoder in ("ECAMP", "random")]
RUNS += [run("detect", "xrays/rsna", protocol=protocol) for protocol in ("released", "plain")]
RUNS += [run("pre-train", name) for name in ("xrays/mimic-cxr", "xrays/openi", "folder")]
RUNS += [run("pre-train", "xrays/mimic-cxr", method="ECAMP, no distillation", grad_checkpointing=True)]


TEST = "xrays/covidx/test_list.txt"
MIMIC = run("pre-train", "xrays/mimic-cxr")
FAULTS = {
    "a missing list": Fault(COVIDX, spoil("xrays/covidx/val_list.txt"), "is not there"),
    "a shorter list": Fault(COVIDX, spoil(TEST, "train/test_0.png 1\n"), "1 images in test_list.txt, 5 are"),
    "a label out of range": Fault(COVIDX, spoil(TEST, "train/test_0.png 3\n"), "line 1 .*'0', '1', '2'"),
    "a missing image": Fault(
        COVIDX, spoil("xrays/covidx/train/100_2.png"), r"1 of 6 listed images of train_list\.txt are not there"
    ),
    "an unreadable image": Fault(COVIDX, spoil("xrays/covidx/train/100_5.png", "no image"), "cannot read"),
    "splits that overlap": Fault(COVIDX, spoil(TEST, "./train/100_1.png 1\n" * 5, "100_1.png"), "'train' and 'test'"),
    "the lists of another set": Fault(COVIDX, spoil(TEST, "a.png" + " 0" * 14), "line 1 is not a path and 1 of"),
    "runs beyond the image": Fault(
        run("segment", "xrays/siim", labels="1"),
        spoil("xrays/siim/train_list_1.csv", "ImageId,EncodedPixels\n" + "".join(f"1_{i},9 9 9\n" for i in range(4))),
        "1_0: an odd number",
    ),
    "boxes of another scale": Fault(
        run("detect", "xrays/rsna"),
        spoil("xrays/rsna/val_list.csv", 'image_path,bbox\ntrain_images/val_0.png,"[[0, 0, 2048, 2048]]"\n'),
        "line 2: the box .* 1024",
    ),
    "no reports": Fault(MIMIC, spoil(f"xrays/mimic-cxr/{REPORTS[1]}"), "none of"),
    "the reports of another set": Fault(
        MIMIC, spoil(f"xrays/mimic-cxr/{REPORTS[1]}", "path,text\na.png,none\n"), "has no column img_path, report"
    ),
}


def moved(name: str, *places: tuple[str, str], end: str = ""):  # type: ignore[no-untyped-def]
    """The images of a set below other folders, in which "*" is the image's own name; with another ending."""

    def damage(root: Path) -> Path:
        folder = root / DATASETS[name].folders[0]
        for listed, there in places:
            for file in sorted((folder / listed).glob("*")):
                new = folder / there.replace("*", file.stem) / f"{file.stem}{end or file.suffix}"
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, new)
            if not any((folder / listed).iterdir()):
                (folder / listed).rmdir()
        return folder

    return damage


def kaggle(name: str, *places: tuple[str, str], words: str = "", **options: str) -> Fault:
    return Fault({"dataset": f"xrays/{name}"}, moved(f"xrays/{name}", *places, **options), words)


def fewer(root: Path) -> Path:
    """Lists alone: each of them counts its own images."""
    shutil.rmtree(root / "xrays/covidx/train")
    return root


def without(name: str, list_name: str, share: str) -> Fault:
    """A run on a list that nobody has ends before its first step."""
    task = "segment" if name == "siim" else "fine-tune"
    return Fault(run(task, f"xrays/{name}", labels=share), spoil(f"xrays/{name}/{list_name}"), "labels = 100 alone")


FAULTS |= {
    "all labels of CheXpert": without("chexpert", "train_list.txt", "100"),
    "all labels of SIIM": without("siim", "train_list.csv", "100"),
    "an image outside of the folder": Fault(COVIDX, spoil(TEST, "../../a.png 1\n" * 5), "leaves the data set's folder"),
    "an unreadable image of a list": Fault(
        COVIDX, spoil("xrays/covidx/train/100_5.png", "no image"), r"\(listed in train_list\.txt\)"
    ),
}
COPIES = {
    "NIH of Kaggle": kaggle("chestx-ray14", ("images_001", "images_001/images")),
    "NIH, all images in one folder": kaggle("chestx-ray14", ("images_001", "images")),
    "CheXpert as unpacked": kaggle("chexpert", ("train", "CheXpert-v1.0-small/train")),
    "SIIM's DICOMs": kaggle("siim", ("train/images/1024/dicom", "dicom-images-train/*/1.2"), end=".dcm"),
    "RSNA of Kaggle": kaggle("rsna", ("train_images", "stage_2_train_images"), end=".dcm"),
    "OpenI, images alone": kaggle("openi", ("images/images_normalized", "images_normalized")),
    "MIMIC as downloaded": kaggle("mimic-cxr", ("files", "physionet.org/files/mimic-cxr-jpg/2.1.0/files")),
    "CheXpert without the list that nobody has": Fault(
        {"dataset": "xrays/chexpert"}, spoil("xrays/chexpert/train_list.txt"), ""
    ),
    "SIIM without the list that nobody has": Fault({"dataset": "xrays/siim"}, spoil("xrays/siim/train_list.csv"), ""),
    "lists alone": Fault(
        COVIDX, fewer, r"train 10 %: 5 of 5 listed images of train_list_10\.txt .*no folder .*train\)"
    ),
    "a folder with another name": kaggle(
        "chestx-ray14",
        ("images_001", "pictures"),
        words=r"of 6 listed images of train_list\.txt .*no folder .*images_001",
    ),
    "masks of RIGA that are not there": Fault(
        {"dataset": "fundus/riga"}, spoil("fundus/riga/FinalLabel/BinRushed/val_1.tif"), r"1 of 4 .* of val_list\.csv"
    ),
    "a truncated array": Fault(
        {"dataset": "xrays/chestmnist"}, spoil("xrays/chestmnist/chestmnist_224.npz", "PK"), "truncated.* 2 bytes"
    ),
}


# --- small models


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.models.ecamp import detection, heads
    from companion.models.ecamp.model import Bert, Blocks

    def encoder(p: object) -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")

    text = Bert(width=48, depth=1, heads=2, length=16)
    narrow = {"encoder": Blocks(48, 1, 2), "decoder": Blocks(32, 1, 2), "text": text}
    patch.setattr(recipe, "encoder", encoder)
    patch.setattr(recipe, "ReportPairs", functools.partial(recipe.ReportPairs, length=16))
    patch.setattr(heads, "Segmenter", functools.partial(heads.Segmenter, channels=(32, 16, 8, 8)))
    patch.setattr(detection, "Detector", functools.partial(detection.Detector, channels=(64, 32, 16)))
    patch.setitem(recipe.ecamp.SIZES, "paper", narrow)


def chest(kind: str) -> nn.Module:
    encoder = ecamp.build("pocket").encoder
    if kind == "classifier":
        return ecamp.classifier(encoder, 3)
    return ecamp.Segmenter(encoder) if kind == "segmenter" else ecamp.Detector(encoder, 1, 8, (64, 48, 32))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ECAMP": lambda: ecamp.build("pocket"),
    **{f"ECAMP's {kind}": lambda kind=kind: chest(kind) for kind in ("classifier", "segmenter", "detector")},
}
"""That `companion.save` writes, by name."""


OFFICIAL = ["model_small", "detector", "segmenter"]
"""Recorded cases whose state dict is read and given back under the authors' names."""


FULL_SIZE = ["model_full", "attention_map", "classifier", "detector"]
"""Recorded cases that take gigabytes, or minutes."""


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "pre-train":
        return trained(recipe.pretraining(p, out, real=False))[1], None
    training, data = recipe.downstream(p, real=False)
    torch.manual_seed(0)
    history = trained(training)[1]
    torch.manual_seed(0)
    ((outputs, _),) = recipe.outputs(p, training.build(), data["test"])
    return history, torch.cat([x.flatten() for x in (outputs if isinstance(outputs, list) else [outputs])])


TRAININGS = {
    "pre-train": Training(train, {}, batch=64, runs="pre-training"),
    "fine-tune": Training(
        train, {"task": "fine-tune", "dataset": "xrays/covidx"}, batch=96, runs="chestx-ray14 chexpert rsna covidx"
    ),
    "segment": Training(
        train, {"task": "segment", "dataset": "xrays/siim"}, batch=96, runs="siim-segmentation rsna-segmentation riga"
    ),
    "detect": Training(train, {"task": "detect", "dataset": "xrays/rsna"}, batch=16, runs="rsna-detection"),
}


# --- the example on own data


def chests() -> None:
    images(Path("chests"), [f"{i}.png" for i in range(16)])
    Path("chests/train_list.txt").write_text("\n".join(f"{i}.png {i % 2} {i % 3 // 2}" for i in range(16)))
    images(Path(), ["new.png"])
    torch.manual_seed(0)
    sizes = {"encoder": ecamp.Blocks(64, 3, 1), "decoder": ecamp.Blocks(64, 1, 1)}
    torch.save(ecamp.build("pocket", image=224, patch=16, **sizes).to_official(), "ECAMP.pth")


EXAMPLE = chests, r"\[\{'(effusion|nodule)': 0\.\d+, "
