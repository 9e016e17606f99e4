"""The two lower levels of the small H-ViT, trained by DINO on unlabelled regions, and linear probes of their features.

    python -m companion.toy.encoders.slide_dino      (about a minute on one core)

The patch level learns from crops of patches, the region level from crops of regions, which are grids of the patch
level's embeddings. No label of glands, tumour or grades is used. Both trainings are short: at this size DINO later
collapses (the loss reaches the logarithm of the number of outputs), as it did in every trial.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ... import backbones
from ...errors import check_choice
from ...models.hvit import model as hvit
from ...models.hvit.pretrain import pretrain
from ...models.hvit.slides import tensor
from ...models.layers import dino
from ...models.layers.state_dicts import load_official
from ...training.fit import CPU, History
from .. import encoders
from ..datasets import slides as pocket
from . import card

NAME = "pocket_slide_dino"
NORMALISE = "half"  # of the pixels, as HIPT's
REGIONS, TESTED = 400, 200
STEPS, BATCH, LEARNING_RATE, OUTPUTS = {"patch": 40, "region": 60}, 64, 1e-3, 64
# a lower momentum than the published 0.996: there are few steps
HEAD = {"outputs": OUTPUTS, "hidden": 128, "bottleneck": 32, "frozen_epochs": 0, "momentum": 0.95}


def unlabelled(count: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Regions of slides of both tasks, normalised (count, 3, 128, 128), and the kinds of their patches (count, 16).

    The kinds are for measuring; DINO does not get them.
    """
    rng = np.random.default_rng((seed, pocket.SPLITS.index(split), 11))
    pixels: list[np.ndarray] = []
    cells = []
    while len(pixels) < count:
        task = pocket.TASKS[rng.integers(len(pocket.TASKS))]
        for row in pocket.arrangement(rng, task, int(rng.integers(pocket.GRADES))):
            shown, _ = pocket.region(rng, row, split)
            shown = shown * rng.uniform(0.92, 1.04, 3) + rng.normal(0, 0.015, shown.shape)
            pixels.append(pocket.quantise(shown))
            cells.append(row)
    return tensor(np.stack(pixels[:count]), NORMALISE), torch.from_numpy(np.stack(cells[:count]))


def build(levels: str = "dino", seed: int = 0) -> tuple[hvit.PatchEncoder, hvit.RegionEncoder]:
    """The two encoders in eval mode: "dino" the shipped ones, "random" from `seed`.

    Raises:
        BadParameter: other `levels`.
        MissingWeights, CorruptFile: the shipped file is missing, or not the one that its model card describes.
    """
    check_choice("levels", levels, ("dino", "random"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hvit.build("pocket", "global", patches=pocket.SIDE)
    if levels == "dino":
        state = backbones.read_state(encoders.weights_file(NAME))
        for level in ("patch", "region"):
            encoder = getattr(model, level)
            part = {name.removeprefix(f"{level}."): t for name, t in state.items() if name.startswith(f"{level}.")}
            load_official(encoder, part, {name: name for name in encoder.state_dict()}, NAME)
    return model.get_submodule("patch").eval(), model.get_submodule("region").eval()


@torch.inference_mode()
def embed(patch: hvit.PatchEncoder, regions: Tensor) -> Tensor:
    """Patch embeddings (M, 16, D) of regions (M, 3, 128, 128)."""
    whole = hvit.HViT(hvit.SlideTransformer(48), hvit.RegionEncoder(pocket.SIDE, patch.dim, 48), patch)
    return torch.cat([whole.embed_patches(part, batch=512) for part in regions.split(64)])


def standardise(patch: hvit.PatchEncoder, seed: int = 0) -> hvit.PatchEncoder:
    """Set the last norm of `patch` in place, so that outputs have mean 0 and std 1 over training patches; return it."""
    found = embed(patch, unlabelled(100, "train", seed)[0]).flatten(0, 1)
    mean, std = found.mean(0), found.std(0).clamp_min(1e-6)
    with torch.no_grad():
        patch.norm.weight.div_(std)
        patch.norm.bias.sub_(mean).div_(std)
    return patch


def train(seed: int = 0) -> tuple[hvit.PatchEncoder, hvit.RegionEncoder, dict[str, History]]:
    """Both encoders trained from scratch, the patch level standardised, and the histories of the two trainings."""
    patch, region = (encoder.requires_grad_(True) for encoder in build("random", seed))
    regions, _ = unlabelled(REGIONS, "train", seed)
    side, each = pocket.PATCH, STEPS["patch"] * BATCH
    patches = regions.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(patches))[:each])
    options: dict[str, Any] = HEAD | {"batch": BATCH, "lr": LEARNING_RATE, "warmup": 0, "seed": seed, "hardware": CPU}
    crops = dino.ImageViews((28, 12), ((0.5, 1.0), (0.15, 0.5)), 4, 0.5, (0.5,) * 3, (0.5,) * 3)
    histories = {}
    # crops are taken of pixels in [0, 1] and then normalised
    pixels = patches[order] * 0.5 + 0.5
    patch, histories["patch"] = pretrain(patch, pixels, crops, epochs=1, name="DINO, patches", **options)
    standardise(patch, seed)
    grids = embed(patch, regions).mT.unflatten(2, (pocket.SIDE, pocket.SIDE))
    epochs = STEPS["region"] // (len(grids) // BATCH)
    views = dino.GridViews(pocket.SIDE, small=4, shares=(0.875, 0.5))
    region, histories["region"] = pretrain(region, grids, views, epochs=epochs, name="DINO, regions", **options)
    return patch, region, histories


def probe(features: Tensor, labels: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Test accuracy of a logistic regression on standardised features."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    classifier = LogisticRegression(max_iter=500).fit(((features - mean) / std).numpy(), labels.numpy())
    return round(float(classifier.score(((tested - mean) / std).numpy(), truth.numpy())), 3)


@torch.inference_mode()
def measure(patch: hvit.PatchEncoder, region: hvit.RegionEncoder) -> dict[str, float]:
    """Accuracy of linear probes on test tiles: "patch", which of the three kinds a patch is; "core", whether a region
    with three or more tumour patches has them in its middle."""
    (seen, cells), (unseen, truth) = unlabelled(REGIONS, "train", 1), unlabelled(TESTED, "test", 1)
    below, tested = embed(patch, seen), embed(patch, unseen)
    found = {"patch": probe(below.flatten(0, 1)[:3000], cells.flatten()[:3000], tested.flatten(0, 1), truth.flatten())}
    above = [region(part.mT.unflatten(2, (pocket.SIDE, pocket.SIDE))) for part in (below, tested)]
    full = [(part == pocket.TUMOUR).sum(1) >= 3 for part in (cells, truth)]
    core = [torch.tensor([pocket.is_core(row) for row in part.tolist()]) for part in (cells, truth)]
    train, test = [(a[f], c[f].long()) for a, f, c in zip(above, full, core, strict=True)]
    found["core"] = probe(*train, *test)
    share = float(test[1].float().mean())
    found["chance"] = round(max(share, 1 - share), 3)
    return found


def ship(folder: Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train, measure, and write the weights and their model card."""
    start = time.monotonic()
    patch, region, histories = train(seed)
    state = {
        f"{level}.{name}": t
        for level, encoder in (("patch", patch), ("region", region))
        for name, t in encoder.state_dict().items()
    }
    plain = build("random", seed)
    seconds = time.monotonic() - start
    recipe = dict(regions=REGIONS, steps=STEPS, batch=BATCH, learning_rate=LEARNING_RATE, outputs=OUTPUTS, seed=seed)
    ends = {level: round(rows[-1]["loss"], 2) for level, rows in histories.items()}
    quality = {
        "DINO": measure(patch, region),
        "untrained": measure(standardise(plain[0], seed), plain[1]),
        "last loss": ends,
        "loss of a constant prediction": round(float(np.log(OUTPUTS)), 2),
    }
    return card.save(folder, NAME, state, quality, recipe, seconds, world=pocket.VERSION)


if __name__ == "__main__":
    card.command(ship)
