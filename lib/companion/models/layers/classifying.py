"""A recipe for image classification on an encoder: weights, images, facts of a training, accuracy; and two baselines,
full fine-tuning and linear probing, which map images (b, 3, H, W) to logits (b, classes).

What a paper adds is its model, its transforms and its numbers: see `models/sa2vp/recipe.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ... import backbones
from ...data import classification, few, present
from ...data.images import Images
from ...errors import BadParameter, Count
from ...evaluation import metrics
from ...io.config import configure
from ...training.fit import History, Loss, outputs_of
from ...training.hardware import Hardware, RunParameters
from ...training.recipe import Training, dry_items
from .frozen import frozen_copy
from .predicting import OnBackbone, head

DRY_CLASSES = 10


class Parameters(RunParameters, Protocol):
    """The parameters of a notebook that this recipe reads."""

    method: str
    backbone: str
    dataset: str


class Data(NamedTuple):
    """The images of a run.

    Attributes:
        dataset: as the rows of results name it; other lists than the published ones have a name of their own.
        classes: names by label.
        input: size and normalisation of the images.
        splits: items (image, label) of "train", "test", and of "val" where it selects the epoch.
    """

    title: str
    dataset: str
    classes: tuple[str, ...]
    input: backbones.Input
    splits: dict[str, Any]


class Tested(NamedTuple):
    """A model of the `paper` profile, the history of its training, and its accuracy in percent on the test images."""

    data: Data
    model: nn.Module
    history: History
    accuracy: float


def weights(p: Parameters) -> str | Path:
    """The weights of the backbone: the parameter, or those of the cache, without which a dry run's are random."""
    chosen = p.weights or "pretrained"
    return backbones.or_random(p.backbone, chosen) if p.dry_run else chosen


def data(p: Parameters, batch: int, seen: backbones.Input, transforms: tuple[v2.Transform, v2.Transform]) -> Data:
    """The images of the notebook's parameters; in a dry run those of two batches, or generated ones.

    Args:
        batch: images per step.
        seen: size and normalisation of the images.
        transforms: of the training images, and of all others.

    Raises `MissingData`, `CorruptFile`: with the download needed.
    """
    count = dry_items(p, batch)
    if p.dry_run and not present(p.dataset, p.data_root, *split_names(p.dataset).values()):
        generator, labels = torch.Generator().manual_seed(p.seed), torch.arange(count) % DRY_CLASSES
        made = {
            part: TensorDataset(torch.randn(count, 3, seen.size, seen.size, generator=generator), labels)
            for part in split_names(p.dataset)
        }
        title = f"generated images in place of {p.dataset} (dry run)"
        return Data(title, p.dataset, tuple(map(str, range(DRY_CLASSES))), seen, made)
    splits = images(p, transforms)
    learn = splits["train"]
    names = learn.class_names or map(str, range(learn.classes))
    return Data(learn.name, learn.name, tuple(names), seen, few(splits, count) if p.dry_run else splits)


def images(p: Parameters, transforms: tuple[v2.Transform, v2.Transform]) -> dict[str, Images]:
    """The "train" and "test" images of a dataset, and "val" if it selects the epoch.

    VTAB-1k trains on all 1,000 images and tests the last epoch. FGVC trains on its training list alone and tests the
    epoch with the best accuracy on val; HTA does the same, inferred from the loaders of SA²VP's code, which it shares
    with FGVC. On a folder nothing is selected on val: it is tested, or trained on where there is a test split.

    Raises `MissingData`, `CorruptFile`: see `classification.load`.
    """
    if p.dataset == "folder":
        own = classification.own(p.data_root, seed=p.seed)
        train, test = (own[name] for name in (("trainval", "test") if "test" in own else ("train", "val")))
        (train.transform, test.transform), train.name = transforms, p.dataset
        return {"train": train, "test": test}
    return {
        part: classification.load(p.dataset, p.data_root, name, transforms[part != "train"])
        for part, name in split_names(p.dataset).items()
    }


def split_names(dataset: str) -> dict[str, str]:
    """The splits that a run reads, by what they are to it."""
    selects = dataset.startswith(("fgvc/", "hta/"))
    return dict(train="train", val="val", test="test") if selects else dict(train="trainval", test="test")


def training(
    p: Parameters, found: Data, build: Callable[[], nn.Module], loss: Loss, facts: Mapping[str, Any], **fit: Any
) -> Training:
    """The training of `p.method`, or of two steps in a dry run; a small folder of one's own is one batch.

    Args:
        build: makes the model.
        loss: see `fit`.
        facts: the paper's own settings: a checkpoint with others is not resumed.
        fit: arguments of `fit`: epochs, batch, optimizer, schedule, callbacks, hardware.
    """
    learn = found.splits["train"]
    own = own_facts(p.dataset, p.data_root, learn)
    if own:
        fit["batch"] = min(fit["batch"], max(len(learn) // p.devices, 1) * p.devices)
    same = {"data_root": Path(p.data_root), "precision": fit["hardware"].precision, "batch": fit["batch"]}
    seen, epoch = found.input, "best on val" if "val" in found.splits else "last"
    same |= {"mean": seen.mean, "std": seen.std, "epoch": epoch}
    return Training(
        name=f"{found.title}, {p.method}",
        build=build,
        loss=loss,
        data=learn,
        fit=fit | {"seed": p.seed, "name": p.method},
        facts={**facts, **same, **own},
        dry_run=p.dry_run,
    )


def own_facts(dataset: str, root: str | Path, data: Any) -> dict[str, Any]:
    """Paths, labels and classes of images of one's own, which may change between runs; {} of all others."""
    if dataset != "folder" or not present(dataset, root):  # generated
        return {}
    paths = [os.path.relpath(path, root) for path in data.sources]
    return {"images": paths, "labels": data.labels, "classes": data.class_names}


def accuracy(model: nn.Module, data: Any, hardware: Hardware, batch: int = 64) -> float:
    """Top-1 accuracy in percent."""
    labels = torch.as_tensor(data.labels if hasattr(data, "labels") else data.tensors[1])
    return metrics.accuracy(labels, outputs_of(model, data, batch=batch, hardware=hardware))


# --- baselines --------------------------------------------------------------------------------------------------------


def width(backbone: nn.Module) -> int:
    """The width of a backbone's outputs; some models of timm have a layer between features and classifier.

    Raises `BadParameter`: they are those of a classifier."""
    if getattr(backbone, "num_classes", 0):
        raise BadParameter("backbone", f"one of {backbone.num_classes} classes", "one without a classifier")
    found: int = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return found


class FineTuning(OnBackbone):
    """Full fine-tuning: the encoder and the head are trained. `backbone` is any timm model without classifier."""

    def __init__(self, backbone: nn.Module, classes: Count):
        configure(self, locals())
        super().__init__()
        self.head = head(width(backbone), classes)
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        backbones.check_input(self.backbone, images)
        return self.head(self.backbone(images))


class OnFrozen(OnBackbone):
    """A head on a frozen copy of the encoder, which stays in eval mode."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = frozen_copy(backbone)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self


class LinearProbe(OnFrozen):
    """Linear probing: the encoder is frozen, runs without autograd and without dropout; only the head is trained."""

    def __init__(self, backbone: nn.Module, classes: Count):
        configure(self, locals())
        super().__init__(backbone)
        self.head = head(width(backbone), classes)

    def forward(self, images: Tensor) -> Tensor:
        backbones.check_input(self.backbone, images)
        with torch.no_grad():
            features = self.backbone(images)
        return self.head(features)
