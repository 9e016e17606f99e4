"""The toy domain models, masked autoencoders that replace those of DPLQ. About 2 minutes each on one core.

Each reconstructs the masked half of unlabelled images of its domain, drawn over training tiles, without labels of
classes or sensors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion.models.dplq.model import MAEFeatures
from companion.toy.dplq import unlabelled
from companion.toy.encoders.domain_mae import NAMES, load
from companion.toy.encoders.training import fit_steps
from companion.toy.encoders.vit_and_clip import pixels
from companion.training.fit import outputs_of
from companion.training.hardware import CPU

from . import ship

RECIPE: dict[str, Any] = {"images": 6000, "steps": 2400, "batch": 64, "learning_rate": 3e-3, "seed": 0}


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model.model(batch[0])


def train(domain: str, images: int, steps: int, batch: int, learning_rate: float, seed: int) -> MAEFeatures:
    """The model of a domain, pre-trained from scratch on unlabelled images."""
    drawn, _ = unlabelled(domain, images, "train", seed)
    torch.manual_seed(seed)
    model = load(domain, "random")
    fit_steps(model, loss, TensorDataset(pixels(drawn)), steps, batch, learning_rate, seed, NAMES[domain])
    return model


def measure(domain: str, model: MAEFeatures) -> dict[str, float]:
    """The fraction of the features' variance that the means of the two sensors explain, on 1,000 test images."""
    images, sensors = unlabelled(domain, 1000, "test", 1)
    features = outputs_of(model, TensorDataset(pixels(images)), hardware=CPU)
    means = torch.stack([features[torch.from_numpy(sensors == sensor)].mean(0) for sensor in (0, 1)])
    centred = features - features.mean(0)
    return {"share": float((means[sensors] - features.mean(0)).square().sum() / centred.square().sum())}


def tensors(model: MAEFeatures) -> dict[str, Tensor]:
    return model.model.to_official()


if __name__ == "__main__":
    for domain, name in NAMES.items():
        ship(name, partial(train, domain), partial(measure, domain), RECIPE, tensors=tensors, world=1)
