"""A small ViT trained by DMT's losses on photographs, from a ViT-S/14 and an EfficientNet-Lite0. Half an hour on one
core; needs the extra `real`.

Neither a crop of the held-out photographs nor a teacher's tokens of them is used in training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.io.progress import progress
from companion.models.dmt.model import DMT, loss
from companion.models.dmt.vit import ViT
from companion.toy import scenes
from companion.toy.encoders import photo_student
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.schedules import adamw

from . import ship


def crops(count: int, seed: int) -> Tensor:
    """Random crops (count, 3, 256, 256) in 0 to 1 of the photographs that are not held out: 10 to 100 % of the area."""
    names = [name for name in scenes.PHOTOGRAPHS if name not in photo_student.HELD_OUT]
    loaded = [np.atleast_3d(scenes.PHOTOGRAPHS[name].load()) for name in names]
    pixels = [torch.from_numpy(x.copy()).permute(2, 0, 1)[:3] for x in loaded]
    crop = v2.Compose([v2.RandomResizedCrop(256, (0.1, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [crop(pixels[i % len(pixels)]).expand(3, -1, -1) for i in range(count)]
    return torch.stack(found).float() / 255


def train(
    count: int, epochs: float, batch: int, learning_rate: float, weight_decay: float, masked: float, seed: int
) -> ViT:
    """The student, trained from scratch on `count` crops and each teacher's tokens of them."""
    known, images = photo_student.teachers(), crops(count, seed)
    parts = progress(images.split(20), "teachers' tokens")
    each = [[photo_student.tokens(name, encoder, part) for name, encoder in known.items()] for part in parts]
    targets = [torch.cat(found) for found in zip(*each, strict=True)]
    torch.manual_seed(seed)
    widths = [found.shape[-1] for found in targets]
    student = photo_student.student(seed)
    model = DMT(student, widths, mask_ratio=masked, statistics="running", decoder="pocket")
    fit(
        model,
        loss,
        TensorDataset(photo_student.seen_by_student(images), *targets),
        epochs=epochs,
        batch=batch,
        optimizer=adamw(learning_rate, weight_decay),
        seed=seed,
        hardware=CPU,
        name=photo_student.NAME,
    )
    return model.export()


@torch.no_grad()
def measure(student: ViT) -> dict[str, float]:
    """The mean `agreement` with each teacher on the held-out photographs."""
    images = photo_student.held_out()
    own, found = student(photo_student.seen_by_student(images))[:, 1:], {}
    for name, teacher in photo_student.teachers().items():
        tokens = photo_student.tokens(name, teacher, images)[:, 1:]
        found[name] = float(photo_student.agreement(own, tokens).mean())
    return found


def tensors(student: ViT) -> dict[str, Tensor]:
    return {name: value.half() for name, value in student.to_official().items()}


if __name__ == "__main__":
    recipe = {"count": 800, "epochs": 60, "batch": 32, "learning_rate": 2e-3, "weight_decay": 0.05, "masked": 0.5}
    ship(photo_student.NAME, train, measure, recipe | {"seed": 0}, tensors=tensors)
