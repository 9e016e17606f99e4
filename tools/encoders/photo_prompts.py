"""Prompts of SA²VP and VPT for a real ViT-S/14, trained on crops of photographs. Half an hour on one core.

The task is to name the photograph that a crop comes from, with 12 photographs; training crops come from the left two
thirds of each, test crops from the right third. Needs the extra `real`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion import backbones
from companion.models.sa2vp import recipe
from companion.toy import scenes
from companion.toy.encoders.photo_prompts import CLASSES, METHODS, NAME, build
from companion.training.checkpoints import trained_state
from companion.training.fit import fit
from companion.training.hardware import CPU

from . import ship

ENCODER, SIZE = "vit_small_patch14_dinov2", 224


def crops(count: int, split: str, seed: int) -> TensorDataset:
    """Random crops (count, 3, 224, 224) of the photographs, normalised for the ViT, and which photograph (count,).

    A crop has 20 to 100 % of the area of the left two thirds of a photograph ("train") or of its right third ("test").
    """
    seen, shown = backbones.input_of(backbones.build(ENCODER, "random", img_size=SIZE)), []
    for name in CLASSES:
        pixels = torch.from_numpy(scenes.photograph(name).copy()).permute(2, 0, 1)
        border = 2 * pixels.shape[2] // 3
        shown.append(pixels[..., :border] if split == "train" else pixels[..., border:])
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(seen.mean), list(seen.std)),
        ]
    )
    labels = torch.arange(count) % len(CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.stack([crop(shown[i]) for i in labels.tolist()])
    return TensorDataset(images, labels)


def train(count: int, epochs: int, batch: int, learning_rate: float, seed: int) -> dict[str, nn.Module]:
    """Both methods."""
    data, models = crops(count, "train", seed), {}
    for method in METHODS:
        models[method] = build(method, backbones.build(ENCODER, img_size=SIZE), seed)
        options = recipe.fit_options(learning_rate, CPU) | {"epochs": epochs, "batch": batch, "seed": seed}
        fit(models[method], recipe.loss, data, **options, name=method)
    return models


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    """Accuracy on 120 crops of the right third, in percent."""
    held_out = crops(120, "test", 1)
    return {method: recipe.accuracy(model, held_out, CPU, batch=20) for method, model in models.items()}


def tensors(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": x.half() for name, model in models.items() for key, x in trained_state(model).items()}


if __name__ == "__main__":
    settings = {"count": 360, "epochs": 3, "batch": 20, "learning_rate": 1e-3, "seed": 0}
    ship(NAME, train, measure, settings, tensors=tensors)
