"""The two lower levels of the small H-ViT, trained by DINO on unlabelled regions, and linear probes of their features.

The patch level learns from crops of patches, the region level from crops of regions, which are grids of the patch
level's embeddings. No label of glands, tumour or grades is used. Both trainings are short: at this size DINO later
collapses (the loss reaches the logarithm of the number of outputs), as it did in every trial.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ... import backbones
from ...errors import check_choice
from ...models.hvit import model as hvit
from ...models.hvit.slides import tensor
from ...models.layers.state_dicts import load_official
from .. import encoders
from ..datasets import slides as pocket

NAME = "pocket_slide_dino"
NORMALISE = "half"  # of the pixels, as HIPT's


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


def probe(features: Tensor, labels: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Test accuracy of a logistic regression on standardised features."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    classifier = LogisticRegression(max_iter=500).fit(((features - mean) / std).numpy(), labels.numpy())
    return round(float(classifier.score(((tested - mean) / std).numpy(), truth.numpy())), 3)
