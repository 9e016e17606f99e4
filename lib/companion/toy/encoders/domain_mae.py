"""Pre-training of the toy domain models, masked autoencoders that replace those of DPLQ, and probes of their features.

    python -m companion.toy.encoders.domain_mae remote      (about 2 minutes on one core; or medical)

Each reconstructs the masked half of unlabelled images of its domain, drawn over training tiles, without labels of
classes or sensors. Patches are 8 pixels wide, so that a few thousand steps suffice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ... import backbones
from ...errors import BadParameter, check_choice
from ...models.dplq.model import CLIPFeatures, MAEFeatures
from ...models.layers import mae
from ...training.fit import CPU, predict
from .. import encoders
from ..datasets.domains import VERSION, unlabelled
from . import card
from .training import fit_steps
from .vit_and_clip import pixels

NAMES = {"remote": "pocket_mae_remote", "medical": "pocket_mae_medical"}
SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
DECODER = (48, 2, 4)  # width, depth, heads
RECIPE: dict[str, Any] = {"images": 6000, "steps": 2400, "batch": 64, "learning_rate": 3e-3, "masked": 0.5}
SHOTS = 128  # images that a probe is fitted on, as many as the prompts have


def load(domain: str, weights: str = "pocket") -> MAEFeatures:
    """The shipped domain model of "remote" or "medical" in eval mode, or with `weights` "random" an untrained one.

    Images are normalised for the small CLIP, to [-1, 1].

    Raises:
        BadParameter: another domain or other weights.
        MissingWeights, CorruptFile: the shipped file is missing, or not the one that its model card describes.
    """
    check_choice("domain", domain, NAMES)
    if weights == "random":
        options: dict[str, Any] = {"mask_ratio": RECIPE["masked"], "normalise": False, "xavier": False}
        model = mae.MAE(mae.encoder(**SHAPE), DECODER, **options)
        for part in (model.encoder, model.decoder):  # of the shipped models: timm's table, MAE's in another order
            table = build_sincos2d_pos_embed(model.encoder.patch_embed.grid_size, part.pos_embed.shape[2])
            part.pos_embed.data = F.pad(table, (0, 0, 1, 0))[None]
        return MAEFeatures(model).eval()
    if weights != "pocket":
        raise BadParameter("weights", weights, ("pocket", "random"))
    state = backbones.read_state(encoders.weights_file(NAMES[domain]))
    return MAEFeatures(mae.MAE.from_official(state, SHAPE["num_heads"], DECODER[2]))


def train(domain: str, count: int = RECIPE["images"], steps: int = RECIPE["steps"], seed: int = 0) -> MAEFeatures:
    """Pre-train the model of a domain from scratch on `count` unlabelled images; returned in eval mode."""
    images, _ = unlabelled(domain, count, "train", seed)
    torch.manual_seed(seed)
    model = load(domain, "random")

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model.model(batch[0])

    data = TensorDataset(pixels(images))
    fit_steps(model, loss, data, steps, RECIPE["batch"], RECIPE["learning_rate"], seed, NAMES[domain])
    return model


def probe(features: Tensor, sensors: np.ndarray, tested: Tensor, truth: np.ndarray) -> float:
    """Test accuracy of a logistic regression that predicts the sensor from features (n, F)."""
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000)).fit(features.numpy(), sensors)
    return float(reader.score(tested.numpy(), truth))


def share(features: Tensor, sensors: np.ndarray) -> float:
    """The fraction of the variance of features (n, F) that the means of the two sensors explain, 0 to 1."""
    means = torch.stack([features[torch.from_numpy(sensors == sensor)].mean(0) for sensor in (0, 1)])
    return float((means[sensors] - features.mean(0)).square().sum() / (features - features.mean(0)).square().sum())


def measure(domain: str, model: nn.Module) -> dict[str, dict[str, float]]:
    """How well the features of `model`, of an untrained one, and of the small CLIP predict the sensor.

    "read" is `probe`, fitted on `SHOTS` images of training tiles, on 1000 of test tiles; "share" is `share` on these;
    "mean" and "deviation" (standard) are of all entries of the feature.
    """
    (few, sensors), (many, truth) = unlabelled(domain, SHOTS, "train", 1), unlabelled(domain, 1000, "test", 1)
    torch.manual_seed(0)
    models = {
        "domain model": model,
        "untrained": load(domain, "random"),
        "CLIP": CLIPFeatures(encoders.build("pocket_clip")),
    }
    found = {}
    for name, encoder in models.items():
        features, tested = (predict(encoder, TensorDataset(pixels(x)), hardware=CPU) for x in (few, many))
        found[name] = {
            "read": round(probe(features, sensors, tested, truth), 3),
            "share": round(share(tested, truth), 3),
            "mean": round(float(tested.mean()), 4),
            "deviation": round(float(tested.std()), 3),
        }
    return found


def ship(domain: str, folder: str | Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train in full, measure, and write the weights and their model card. Raises `BadParameter` for no domain."""
    start = time.monotonic()
    model = train(domain, seed=seed)
    seconds = time.monotonic() - start
    recipe = RECIPE | {"seed": seed}
    state, quality = model.model.to_official(), measure(domain, model)
    return card.save(folder, NAMES[domain], state, quality, recipe, seconds, world=VERSION)


if __name__ == "__main__":
    card.command(ship, NAMES)
