"""The two lower levels of the small H-ViT, trained by DINO on unlabelled regions.

The patch level learns from crops of patches, the region level from crops of regions, which are grids of the patch
level's embeddings. No label of glands, tumour or grades is used. Both trainings are short: at this size DINO later
collapses (the loss reaches the logarithm of the number of outputs), as it did in every trial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backbones
from ...errors import check_choice
from ...models.hvit import model as hvit
from ...models.layers.state_dicts import below, load_official
from .. import encoders

NAME = "pocket_slide_dino"
NORMALISE = "half"  # of the pixels, as HIPT's
SIDE = 4  # patches per side of a region


def build(levels: str = "dino", seed: int = 0) -> tuple[hvit.PatchEncoder, hvit.RegionEncoder]:
    """The two encoders in eval mode: "dino" the shipped ones, "random" from `seed`.

    Raises:
        BadParameter: other `levels`.
        MissingWeights, CorruptFile: the shipped file is missing, or not the one that its model card describes.
    """
    check_choice("levels", levels, ("dino", "random"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hvit.build("pocket", "global", patches=SIDE)
    if levels == "dino":
        state = backbones.read_state(encoders.weights_file(NAME))
        for level in ("patch", "region"):
            encoder = getattr(model, level)
            load_official(encoder, below(state, f"{level}."), None, NAME)
    return model.get_submodule("patch").eval(), model.get_submodule("region").eval()


@torch.inference_mode()
def embed(patch: hvit.PatchEncoder, regions: Tensor) -> Tensor:
    """Patch embeddings (M, 16, D) of regions (M, 3, 128, 128)."""
    whole = hvit.HViT(hvit.SlideTransformer(48), hvit.RegionEncoder(SIDE, patch.dim, 48), patch)
    return torch.cat([whole.embed_patches(part, batch=512) for part in regions.split(64)])
