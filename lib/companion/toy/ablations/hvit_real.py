"""H-ViT's patch level on real cells: embeddings of a pretrained ViT-S/14, random weights and raw pixels, by k-NN.

    COMPANION_REAL_DATA=<folder> python -m companion.toy.ablation hvit_real reports/real/hvit

No patch encoder pre-trained on tissue is available offline, and no tissue with labels of regions. This measures what
the [CLS] embedding of a patch, all that H-ViT's upper levels read, holds of the cell at its centre when the encoder saw
no stained cells: red blood cell, white blood cell or platelet. A patch is a window of 160 px around a cell's box, at
112 px; its size is fixed, as on a slide.

The images are <folder>/bccd_small/JPEGImages/<name>.jpg with Annotations/<name>.xml (Pascal VOC), 80 blood smears. Each
seed draws 40 of them for training, 20 for validation and 20 for the test: no smear is in two splits. Of each class at
most 4 cells per smear are taken. k-NN has DINO's 20 neighbours and temperature of 0.07, which are not tuned, but reads
embeddings standardised one by one, as the linear layer does, whose learning rate is tuned. The score is the mean recall
of the three classes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ... import backbones
from ...data import decoding, real
from ...errors import CorruptFile
from ...models.hvit import PatchEncoder
from ...training.fit import CPU, fit
from ...training.schedules import adamw
from . import reader

ENCODER, SIZE, WINDOW = "vit_small_patch14_dinov2", 112, 160
CLASSES = {"RBC": "red blood cells", "WBC": "white blood cells", "Platelets": "platelets"}
MOST = 4  # cells of a class per smear
SPLITS = {"train": slice(0, 40), "val": slice(40, 60), "test": slice(60, 80)}
NEIGHBOURS, TEMPERATURE = 20, 0.07
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
METRIC = "recall"
STEPS, BATCH = 300, 32
BUDGET = f"{STEPS} steps, batch {BATCH}"
SEEDS = [200, 201, 202]
EMBEDDINGS = ("ViT-S/14", "random weights", "raw pixels")
UNTRAINED = tuple(f"{name}, k-NN" for name in EMBEDDINGS)
METHODS = (*UNTRAINED, *(f"{name}, linear" for name in EMBEDDINGS))
TASKS = {"blood cells": list(METHODS)}
PIXELS = 11  # side in pixels of a patch of "raw pixels": 363 features, about as many as the ViT's 384


def folder() -> Path:
    """The folder of the smears. Raises `MissingData`: it does not exist."""
    return real.folder(
        "bccd_small/Annotations",
        title="BCCD, a part",
        layout="bccd_small/JPEGImages/<name>.jpg\nbccd_small/Annotations/<name>.xml   Pascal VOC, 80 of each",
        source="github.com/Shenggan/BCCD_Dataset",
        licence="MIT",
    )


def cells_of(path: Path) -> list[tuple[str, int, int]]:
    """The class and the centre (x, y) in pixels of the cells of an annotation file, at most `MOST` of a class.

    Raises `CorruptFile`: not Pascal VOC, or a class that is not in `CLASSES`.
    """
    found: dict[str, list[tuple[str, int, int]]] = {name: [] for name in CLASSES}
    try:
        for cell in ElementTree.parse(path).getroot().iter("object"):
            name = str(cell.findtext("name"))
            x0, y0, x1, y1 = (int(str(cell.findtext(f"bndbox/{side}"))) for side in ("xmin", "ymin", "xmax", "ymax"))
            found[name].append((name, (x0 + x1) // 2, (y0 + y1) // 2))
    except (ElementTree.ParseError, ValueError) as error:
        raise CorruptFile(path, f"is no annotation of Pascal VOC ({error})") from error
    except KeyError as error:
        raise CorruptFile(path, f"has the class {error}, which is none of {', '.join(CLASSES)}") from error
    return [cell for own in found.values() for cell in own[:MOST]]


def prepare(_: str | Path, seed: int) -> None:
    """Raise `MissingData` or `CorruptFile` before anything is trained, when smears or annotations are missing."""
    names = sorted(path.stem for path in (folder() / "Annotations").glob("*.xml"))
    if len(names) != SPLITS["test"].stop:
        raise CorruptFile(folder() / "Annotations", f"has {len(names)} annotations, not {SPLITS['test'].stop}")
    for name in names:
        cells_of(folder() / "Annotations" / f"{name}.xml")
        if not (image := folder() / "JPEGImages" / f"{name}.jpg").is_file():
            raise CorruptFile(folder() / "Annotations" / f"{name}.xml", f"there is no {image}")


@functools.cache
def _patches() -> tuple[Tensor, Tensor, Tensor]:
    """All patches (n, 3, 112, 112) in 0 to 1, their labels and the number of their smear (n,)."""
    patches, labels, smears = [], [], []
    for i, path in enumerate(sorted((folder() / "Annotations").glob("*.xml"))):
        with decoding.opened(folder() / "JPEGImages" / f"{path.stem}.jpg") as image:
            pixels = decoding.pixels(image)
        half = WINDOW // 2
        wide = np.pad(pixels, ((half, half), (half, half), (0, 0)), mode="reflect")
        for name, x, y in cells_of(path):
            patches.append(torch.from_numpy(wide[y : y + WINDOW, x : x + WINDOW]).permute(2, 0, 1))
            labels.append(list(CLASSES).index(name))
            smears.append(i)
    small = v2.functional.resize(torch.stack(patches).float() / 255, [SIZE, SIZE], antialias=True)
    return small, torch.tensor(labels), torch.tensor(smears)


@functools.cache
def _embedded(embedding: str) -> Tensor:
    """The embeddings (n, D) of all patches; computed once per process, because every encoder is frozen."""
    patches = _patches()[0]
    if embedding == "raw pixels":
        return F.interpolate(patches, PIXELS, mode="area").flatten(1)
    torch.manual_seed(0)
    vit = backbones.build(ENCODER, "pretrained" if embedding == "ViT-S/14" else "random", img_size=SIZE)
    if embedding == "random weights":  # untrained LayerScale is 1e-5, which no image would pass
        for block in vit.blocks:
            nn.init.ones_(block.ls1.gamma)
            nn.init.ones_(block.ls2.gamma)
    seen, level = backbones.input_of(vit), PatchEncoder.from_timm(vit)
    with torch.inference_mode():
        found = [level(v2.functional.normalize(x, list(seen.mean), list(seen.std))) for x in patches.split(50)]
    return torch.cat(found).clone()


@reader()
def cells(embedding: str, seed: int, split: str) -> TensorDataset:
    """The embeddings (n, D) of the cells of a split, each standardised to mean 0 and std 1, and their labels (n,)."""
    smears = torch.randperm(SPLITS["test"].stop, generator=torch.Generator().manual_seed(seed))
    own = torch.isin(_patches()[2], smears[SPLITS[split]])
    x = _embedded(embedding)[own]
    return TensorDataset(F.layer_norm(x, x.shape[1:]), _patches()[1][own])


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Classify the cells of the validation (`split` "select") or test smears by those of the training smears.

    Returns a row: the mean recall and that of each class in percent, and the last loss (0 for k-NN).
    """
    embedding, kind = method.split(", ")
    known, held_out = (cells(embedding, seed, s).tensors for s in ("train", "val" if split == "select" else "test"))
    last = 0.0
    if kind == "k-NN":
        options: dict[str, Any] = {"metric": "cosine", "weights": lambda apart: np.exp((1 - apart) / TEMPERATURE)}
        predicted = KNeighborsClassifier(NEIGHBOURS, **options).fit(*known).predict(held_out[0])
    else:
        torch.manual_seed(seed)
        head = nn.Linear(known[0].shape[1], len(CLASSES))
        nn.init.trunc_normal_(head.weight, std=2e-5)
        nn.init.zeros_(head.bias)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        settings: dict[str, Any] = {"epochs": STEPS / (len(known[0]) // BATCH), "batch": BATCH, "seed": seed}
        optimizer = adamw(learning_rate, 0.0)
        history = fit(head, loss, TensorDataset(*known), optimizer=optimizer, hardware=CPU, name=method, **settings)
        last = history[-1]["loss"]
        with torch.inference_mode():
            predicted = head(held_out[0]).argmax(1)
    recalls = 100 * recall_score(held_out[1], predicted, labels=range(len(CLASSES)), average=None)
    row = {"recall": recalls.mean()} | {f"recall {name}": x for name, x in zip(CLASSES.values(), recalls, strict=True)}
    return {name: round(float(value), 2) for name, value in row.items()} | {"loss": round(last, 4)}
