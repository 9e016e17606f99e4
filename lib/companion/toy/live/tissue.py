"""H-ViT on real tissue: the attention of a pretrained patch level, and of untrained levels above it.

The authors' weights for prostate tissue are not public. A pretrained ViT-S has the architecture of the patch level and
can stand in for it. Nothing stands in for the region and the slide level.
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
from einops import rearrange, reduce
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from ...data import real
from ...data.photographs import PHOTOGRAPHS
from ...models.hvit.heatmaps import AttentionMaps, attention_maps, stitched
from ...models.hvit.model import HViT, PatchEncoder, RegionEncoder, SlideTransformer
from ...models.hvit.slides import Slide, Tiles, Tiling, tile, write_pyramid
from ...viz.attention import token_pca


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
    maps: AttentionMaps
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
        colours = reduce(self.tissue.astype(float), "(h y) (w x) c -> (h w) c", "mean", h=h, w=w)
        main = PCA(1).fit_transform(colours)
        return {
            "[CLS] attention, rank in its patch": stitched(self.maps.patch, self.tiles, (h, w), token),
            "first principal component of the tokens": stitched(self.components[..., 0], self.tiles, (h, w), token),
            "first principal component of the colours (control)": main.reshape(h, w),
        }


def view(patch: PatchEncoder, path: str | Path, pixels: int, seed: int = 0, normalise: str = "imagenet") -> View:
    """The three levels on a slide, in regions of 2 x 2 patches that cover all of it.

    Args:
        patch: pretrained.
        pixels: side of a patch in pixels of level 0, which are resized to `patch.image`.
        seed: of the random weights of the region and the slide level.
        normalise: of the pixels, as `patch` wants them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HViT(SlideTransformer(192), RegionEncoder(2, patch.dim))
    tokens: list[torch.Tensor] = []
    watch = patch.norm.register_forward_hook(lambda module, given, out: tokens.append(out[:, 1:]))
    with Slide(path) as slide, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        mpp = slide.mpp * pixels / patch.image
        tiling = Tiling(region=2 * patch.image, mpp=mpp, resample=True, area=0.1, least=0.5)
        tissue, shrink = slide.thumbnail(slide.size[1] / 512)
        tiles = tile(slide, tiling, np.ones(tissue.shape[:2], np.uint8))
        maps = attention_maps(model, patch, slide, tiles, normalise)
    watch.remove()
    every = torch.cat(tokens)  # (M 4, T, D)
    side = math.isqrt(every.shape[1])
    colours = token_pca(every.flatten(0, 1), (len(every) * side, side))
    laid = rearrange(colours, "(m i j h) w c -> m (i h) (j w) c", i=2, j=2, h=side)
    return View(tissue, shrink, tiles, maps, laid)


def views(patch: PatchEncoder, folder: Path, seed: int = 0, normalise: str = "imagenet") -> dict[str, View]:
    """The photograph of colonic glands, written below `folder` as a slide, and the Aperio slide where it is found:
    `slides/*.svs` below COMPANION_REAL_DATA (default: data/ of the checkout)."""
    image = PHOTOGRAPHS["tissue"]()
    path = write_pyramid(folder / "glands.tiff", image, mpp=1.0, downsamples=(1, 4))
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
        truth = reduce(stained.astype(float), "(h y) (w x) -> (h w)", "mean", h=h, w=w) > 0.5
        area = roc_auc_score(truth, values.ravel())
        rows.append({"score": name, "squares": truth.size, "AUROC": max(area, 1 - area)})
    return pd.DataFrame(rows)
