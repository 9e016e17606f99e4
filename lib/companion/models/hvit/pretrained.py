"""H-ViT's patch level with the weights of a real ViT, and the attention of the three levels on real tissue.

The authors' weights for prostate tissue are not public. A pretrained ViT-S has the architecture of the patch level and
can stand in for it. Nothing stands in for the region and the slide level, which are untrained here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from timm.models.vision_transformer import VisionTransformer

from ...data import real
from ...data.photographs import PHOTOGRAPHS
from ...errors import BadParameter
from ...slides import Slide, Tiles, Tiling, tile, write_pyramid
from ...viz.attention import token_pca
from . import recipe
from .figures import stitched
from .model import HViT, PatchEncoder, RegionEncoder, SlideTransformer


def patch_level(vit: VisionTransformer) -> PatchEncoder:
    """The patch encoder that gives the outputs of a timm ViT, as `forward_features` of both; in eval mode.

    LayerScale, which H-ViT's blocks lack, multiplies the output of a linear layer: it is folded into that layer.

    Raises `BadParameter`: a ViT with register tokens, without a [CLS] token, or for images that are not square.
    """
    side, token = vit.patch_embed.grid_size[0], vit.patch_embed.patch_size[0]
    if vit.num_prefix_tokens != 1 or vit.patch_embed.grid_size[1] != side:
        found = f"{vit.num_prefix_tokens} prefix tokens, grid {tuple(vit.patch_embed.grid_size)}"
        raise BadParameter("vit", found, "one [CLS] token and a square grid of patches")
    state = {name: value for name, value in vit.state_dict().items() if ".ls" not in name and "head." not in name}
    for i, block in enumerate(vit.blocks):
        for layer, scale in (("attn.proj", block.ls1), ("mlp.fc2", block.ls2)):
            gamma = getattr(scale, "gamma", torch.ones(vit.embed_dim)).detach()
            state[f"blocks.{i}.{layer}.weight"] = gamma[:, None] * state[f"blocks.{i}.{layer}.weight"]
            state[f"blocks.{i}.{layer}.bias"] = gamma * state[f"blocks.{i}.{layer}.bias"]
    first, ratio = vit.blocks[0], len(vit.blocks[0].mlp.fc1.bias) / vit.embed_dim
    level = PatchEncoder(
        side * token, token, vit.embed_dim, len(vit.blocks), first.attn.num_heads, mlp_ratio=ratio, side=side
    )
    level.load_state_dict(state)
    return level.eval()


@dataclass(frozen=True)
class View:
    """The three levels on a slide, the region and the slide level with random weights.

    Attributes:
        tissue: (h, w, 3) uint8, the slide.
        shrink: pixels of level 0 a pixel of `tissue`.
        tiles: its regions.
        maps: the attention of the levels.
        components: (M, s, s, 3) in 0 to 1, the first three principal components of the patch tokens.
    """

    tissue: np.ndarray
    shrink: float
    tiles: Tiles
    maps: recipe.AttentionMaps
    components: np.ndarray

    def panels(self) -> dict[str, np.ndarray]:
        """Title -> map over the tissue, for `figures.level_maps`; the slide level where there are regions to weigh."""
        maps = {
            "patch level": self.maps.patch,
            "patch tokens, PCA": self.components,
            "region level,\nuntrained": self.maps.region,
        }
        if len(self.tiles) > 1:
            flat = np.broadcast_to(self.maps.slide[:, None, None], self.maps.patch.shape)
            maps["slide level,\nuntrained"] = flat
        size = self.tissue.shape[:2]
        return {"tissue": self.tissue} | {k: stitched(m, self.tiles, size, self.shrink) for k, m in maps.items()}

    def scores(self) -> dict[str, np.ndarray]:
        """Scores of the slide's tokens (h, w), for `stain_auroc`; the mean colour of each token is the control."""
        token = self.tiles.step / self.maps.patch.shape[-1]  # pixels of level 0
        h, w = (round(side * self.shrink / token) for side in self.tissue.shape[:2])
        colour = self.tissue.reshape(h, len(self.tissue) // h, w, self.tissue.shape[1] // w, 3).mean((1, 3))
        return {
            "[CLS] attention, rank in its patch": stitched(self.maps.patch, self.tiles, (h, w), token),
            "first principal component of the tokens": stitched(self.components[..., 0], self.tiles, (h, w), token),
            "first principal component of the colours (control)": PCA(1)
            .fit_transform(colour.reshape(-1, 3))
            .reshape(h, w),
        }


def view(patch: PatchEncoder, path: str | Path, pixels: int, seed: int = 0, normalise: str = "imagenet") -> View:
    """The three levels on a slide, in regions of 2 x 2 patches that cover all of it.

    Args:
        patch: pretrained.
        pixels: side of a patch in pixels of level 0, which are resized to `patch.image`.
        seed: of the random weights of the region and the slide level.
        normalise: of the pixels, as `patch` wants them.
    """
    tokens: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HViT(SlideTransformer(192), RegionEncoder(2, patch.dim), patch)
    assert model.patch is not None
    # `attention_maps` copies the model, and this hook with it
    model.patch.blocks[-1].register_forward_hook(lambda module, given, out: tokens.append(out[:, 1:]))
    with Slide(path) as slide, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        mpp = slide.mpp * pixels / patch.image
        tiling = Tiling(region=2 * patch.image, mpp=mpp, resample=True, area=0.1, least=0.5)
        tissue, shrink = slide.thumbnail(slide.size[1] / 512)
        tiles = tile(slide, tiling, np.ones(tissue.shape[:2], np.uint8))
        maps = recipe.attention_maps(model, model.patch, slide, tiles, normalise)
    found = torch.cat(tokens)  # (M · 4, T, D)
    side = math.isqrt(found.shape[1])
    with torch.no_grad():
        colours = token_pca(model.patch.norm(found).flatten(0, 1), (len(found) * side, side))
    laid = colours.reshape(len(tiles), 2, 2, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return View(tissue, shrink, tiles, maps, laid.reshape(len(tiles), 2 * side, 2 * side, 3))


def views(patch: PatchEncoder, folder: Path, seed: int = 0, normalise: str = "imagenet") -> dict[str, View]:
    """The photograph of colonic glands, written below `folder` as a slide, and the Aperio slide where it is found:
    `slides/*.svs` below COMPANION_REAL_DATA (default: data/ of the checkout)."""
    image = PHOTOGRAPHS["tissue"]()
    size = (image.shape[1], image.shape[0])
    path = write_pyramid(folder / "glands.tiff", lambda y0, y1: image[y0:y1], size, mpp=1.0, downsamples=(1, 4))
    found = {"glands": view(patch, path, 256, seed, normalise)}
    for slide in sorted((real.root() / "slides").glob("*.svs"))[:1]:
        found["Aperio slide"] = view(patch, slide, 555, seed, normalise)
    if len(found) == 1:
        print("no .svs file in slides/ below COMPANION_REAL_DATA: the photograph alone is shown")
    return found


def stain_auroc(image: np.ndarray, scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """How well scores separate brown (DAB) from unstained tissue: the AUROC over squares of the image.

    A square counts as stained where most of its pixels lie above Otsu's threshold of the DAB channel.

    Args:
        image: (H, W, 3) uint8, of immunohistochemistry.
        scores: by name, (h, w) that divide H and W. The sign of a principal component is arbitrary, so the larger of
            the two directions counts.
    """
    brown = rgb2hed(image)[..., 2]
    stained = brown > threshold_otsu(brown)
    rows = []
    for name, values in scores.items():
        h, w = values.shape
        truth = stained.reshape(h, stained.shape[0] // h, w, stained.shape[1] // w).mean((1, 3)) > 0.5
        area = roc_auc_score(truth.ravel(), values.ravel())
        rows.append({"score": name, "squares": truth.size, "AUROC": max(area, 1 - area)})
    return pd.DataFrame(rows)
