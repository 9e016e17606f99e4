"""The two lower levels of the small H-ViT, trained by DINO on unlabelled regions. Under a minute on one core.

The patch level learns from crops of patches, the region level from crops of regions, which are grids of the patch
level's embeddings. No label of glands, tumour or grades is used. Both trainings are short: at this size DINO later
collapses (the loss reaches the logarithm of the number of outputs), as it did in every trial.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from companion.models.hvit import dino
from companion.models.hvit.model import PatchEncoder
from companion.models.hvit.pretrain import pretrain
from companion.toy.encoders.slide_dino import NAME, SIDE, build, embed
from companion.toy.hvit import PATCH, TUMOUR, is_core, unlabelled
from companion.training.hardware import CPU

from . import ship

# a lower momentum than the published 0.996: there are few steps
HEAD = {"hidden": 128, "bottleneck": 32, "frozen_epochs": 0, "momentum": 0.95}


def train(
    regions: int, steps: dict[str, int], batch: int, learning_rate: float, outputs: int, seed: int
) -> nn.ModuleDict:
    """Both encoders trained from scratch, the patch level standardised."""
    patch, region = (encoder.requires_grad_(True) for encoder in build("random", seed))
    images, _ = unlabelled(regions, "train", seed)
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(patches))[: steps["patch"] * batch])
    options: dict[str, Any] = {"outputs": outputs, "batch": batch, "lr": learning_rate, "warmup": 0, "seed": seed}
    options |= HEAD | {"hardware": CPU}
    crops = dino.ImageViews((28, 12), ((0.5, 1.0), (0.15, 0.5)), 4, 0.5, (0.5,) * 3, (0.5,) * 3)
    # crops are taken of pixels in [0, 1] and then normalised
    patch, _ = pretrain(patch, patches[order] * 0.5 + 0.5, crops, epochs=1, name="DINO, patches", **options)
    standardise(patch, seed)
    grids = embed(patch, images).mT.unflatten(2, (SIDE, SIDE))
    epochs = steps["region"] // (len(grids) // batch)
    views = dino.GridViews(SIDE, small=4, shares=(0.875, 0.5))
    region, _ = pretrain(region, grids, views, epochs=epochs, name="DINO, regions", **options)
    return nn.ModuleDict({"patch": patch, "region": region})


def standardise(patch: PatchEncoder, seed: int = 0) -> None:
    """Set the last norm of `patch` in place, so that outputs have mean 0 and std 1 over training patches."""
    found = embed(patch, unlabelled(100, "train", seed)[0]).flatten(0, 1)
    mean, std = found.mean(0), found.std(0).clamp_min(1e-6)
    with torch.no_grad():
        patch.norm.weight.div_(std)
        patch.norm.bias.sub_(mean).div_(std)


def probe(features: Tensor, labels: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Test accuracy of a logistic regression on standardised features."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    classifier = LogisticRegression(max_iter=500).fit(((features - mean) / std).numpy(), labels.numpy())
    return round(float(classifier.score(((tested - mean) / std).numpy(), truth.numpy())), 3)


@torch.inference_mode()
def measure(levels: nn.ModuleDict) -> dict[str, float]:
    """Test accuracy of a linear probe of the region level: whether a region with three or more tumour patches has them
    in its middle."""
    found = []
    for split, count in (("train", 400), ("test", 200)):
        images, cells = unlabelled(count, split, 1)
        above = levels["region"](embed(levels["patch"], images).mT.unflatten(2, (SIDE, SIDE)))
        full = (cells == TUMOUR).sum(1) >= 3
        found += [above[full], torch.tensor([is_core(row) for row in cells.tolist()])[full].long()]
    return {"core": probe(*found)}


if __name__ == "__main__":
    recipe = {"regions": 400, "steps": {"patch": 40, "region": 60}, "batch": 64, "learning_rate": 1e-3}
    recipe |= {"outputs": 64, "seed": 0}
    ship(NAME, train, measure, recipe, world=1)
