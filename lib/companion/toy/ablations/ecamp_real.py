"""ECAMP's linear probe on real chest X-rays: a real pretrained ViT-S/14 next to random weights and raw pixels.

    COMPANION_REAL_DATA=<folder> python -m companion.toy.ablation ecamp_real reports/real/ecamp

No encoder pre-trained by ECAMP is available offline, so this measures the probe and its data, not ECAMP: the result of
a ViT trained without X-rays, with ECAMP's classification head (mean patch token, LayerNorm, linear layer) and loss.

The images are <folder>/nih_xrays_small/images/<image> with labels.csv: 1,000 of the NIH's, split by patient into 477,
149 and 374. The score is the mean AUROC of the findings in `FINDINGS`. Task "10 %" trains on 48 images drawn by the
seed, task "100 %" on all. The test images are the same for all seeds: the std includes the draw and the initialisation.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ... import backbones
from ...data import real, xrays
from ...errors import CorruptFile
from ...evaluation.metrics.radiology import mean_auroc
from ...models.ecamp import heads
from ...training.fit import CPU, fit
from ...training.schedules import adamw
from . import reader

ENCODER, SIZE = "vit_small_patch14_dinov2", 224
# at least 40 of the 1,000 images have each, and 11 of the validation images
FINDINGS = ("Pneumonia", "Infiltration", "Atelectasis", "Edema", "Effusion")
COLUMNS = ("image", "split", "findings")
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
METRIC = "AUROC"
STEPS, BATCH = 300, 32
BUDGET = f"{STEPS} steps, batch {BATCH}"
SEEDS = [200, 201, 202]
METHODS = ("ViT-S/14", "random weights", "raw pixels")
TASKS = {"10 %": list(METHODS), "100 %": list(METHODS)}
PIXELS = 20  # side in pixels of an image of "raw pixels": 400 features, about as many as the ViT's 384


def folder() -> Path:
    """The folder of the X-rays. Raises `MissingData`: it does not exist."""
    return real.folder(
        "nih_xrays_small/labels.csv",
        title="NIH's X-rays, a part",
        layout="nih_xrays_small/labels.csv            image,split,patient,age,sex,view,findings\n"
        "nih_xrays_small/images/<image>        256 px",
        source="NIH ChestX-ray14, a part",
        licence="free use with credit to the NIH Clinical Center",
    )


def table(split: str) -> tuple[list[Path], Tensor]:
    """The images of a split, and which of `FINDINGS` each has, (n, 5) of 0 and 1.

    Raises `CorruptFile`: labels.csv has other columns, or lists no image of the split.
    """
    path = folder() / "labels.csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise CorruptFile(path, f"without the columns {', '.join(COLUMNS)}")
    own = [row for row in rows if row["split"] == split]
    if not own:
        raise CorruptFile(path, f"lists no image of the split {split!r}")
    labels = [[float(finding in row["findings"].split("|")) for finding in FINDINGS] for row in own]
    return [path.parent / "images" / row["image"] for row in own], torch.tensor(labels)


def prepare(_: str | Path, seed: int) -> None:
    """Raise `MissingData` or `CorruptFile` before anything is trained, when images are missing."""
    for split in ("train", "val", "test"):
        for path in table(split)[0]:
            if not path.is_file():
                raise CorruptFile(path.parent.parent / "labels.csv", f"lists {path.name}, which is not there")


@reader(9)
def features(method: str, split: str) -> TensorDataset:
    """The inputs (n, D) of the linear layer, and the labels; computed once per process, because every encoder is
    frozen."""
    paths, labels = table(split)
    grey = [torch.from_numpy(xrays.read_image(path))[None] for path in paths]
    if method == "raw pixels":
        small = torch.stack([F.interpolate(image[None], PIXELS, mode="area")[0] for image in grey])
        return TensorDataset(F.layer_norm(small.flatten(1), [PIXELS**2]), labels)
    encoder, transform = _encoder(method), xrays.test_transform(SIZE)
    with torch.inference_mode():
        tokens = [encoder.forward_features(transform(image)[None])[:, 1:].mean(1) for image in grey]
    found = torch.cat(tokens).clone()
    return TensorDataset(F.layer_norm(found, found.shape[1:]), labels)


@functools.cache
def _encoder(method: str) -> nn.Module:
    """A frozen encoder without its last norm, as in `heads.classifier`."""
    torch.manual_seed(0)
    encoder = backbones.build(ENCODER, "pretrained" if method == "ViT-S/14" else "random", img_size=SIZE)
    encoder.norm = nn.Identity()
    return encoder.eval().requires_grad_(False)


def drawn(labels: Tensor, seed: int) -> Tensor:
    """The indices of a tenth of the training images, with every finding in at least one of them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)[: round(len(labels) / 10)]
        if labels[order].any(0).all():
            return order


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Train the linear layer of a method and score it on validation (`split` "select") or on test images.

    Returns a row: the mean AUROC and that of each finding in percent, the last loss, trainable parameters.
    """
    x, labels = features(method, "train").tensors
    if task == "10 %":
        own = drawn(labels, seed)
        x, labels = x[own], labels[own]
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[1], len(FINDINGS))
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return heads.classification_loss(model(batch[0]), batch[1])

    batch = min(BATCH, len(x))
    settings: dict[str, Any] = {"epochs": STEPS / (len(x) // batch), "batch": batch, "seed": seed, "hardware": CPU}
    history = fit(head, loss, TensorDataset(x, labels), optimizer=adamw(learning_rate, 0.0), name=method, **settings)
    held_out, truth = features(method, "val" if split == "select" else "test").tensors
    with torch.inference_mode():
        scores = head(held_out)
    row = {"AUROC": mean_auroc(truth, scores)}
    row |= {f"AUROC {name}": mean_auroc(truth[:, i], scores[:, i]) for i, name in enumerate(FINDINGS)}
    row = {name: round(value, 2) for name, value in row.items()}
    return row | {"loss": round(history[-1]["loss"], 4), "trained": sum(p.numel() for p in head.parameters())}
