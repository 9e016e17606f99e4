"""Figures of H-ViT: slides and regions, tiling, maps of the three levels, and views of real tissue.

The authors' weights for prostate tissue are not public. A pretrained ViT-S has the architecture of the patch level and
can stand in for it on real tissue. Nothing stands in for the region and the slide level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch.utils.data import Dataset

from ...data import real, slides
from ...data.photographs import PHOTOGRAPHS
from ...data.pyramids import Slide, write_pyramid
from ...viz.attention import token_pca
from ...viz.style import COLOURS, HEAT, styled
from .encoders import patch_encoder
from .heatmaps import AttentionMaps, attention_maps, stitched
from .model import HViT, PatchEncoder, RegionEncoder, SlideTransformer
from .slides import PANDA, Tiles, Tiling, tile

Cores = Mapping[tuple[int, int], bool | None]
"""Corner of a region -> whether its tumour lies in the core (True), on the rim (False), or is absent (None)."""


def frame(ax: Axes, corners: Iterable[tuple[float, float]], side: float, colour: str, style: str = "-") -> None:
    """Frame squares of an image, in its pixels."""
    for x, y in corners:
        square = Rectangle((x - 0.5, y - 0.5), side, side, fill=False, edgecolor=colour, linestyle=style, linewidth=1.5)
        ax.add_patch(square)


def frame_tumour(ax: Axes, cores: Cores, side: float, scale: float = 1.0) -> None:
    """Frame the regions with tumour: core in full lines, rim in dotted ones.

    Args:
        side: of a region, in pixels of level 0.
        scale: pixels of level 0 a pixel of the image.
    """
    for core, style in ((True, "-"), (False, ":")):
        corners = [(x / scale, y / scale) for (x, y), kind in cores.items() if kind is core]
        frame(ax, corners, side / scale, "black", style)


@styled
def slide_and_regions(slide: np.ndarray, cores: Cores, side: int, title: str) -> Figure:
    """A synthetic slide with its regions framed, and one region of each kind with its 4 x 4 patches.

    Args:
        side: of a region, in pixels of the slide.
    """
    names = {True: "core region", False: "rim region", None: "no tumour"}
    corners = {names[kind]: corner for corner, kind in cores.items()}
    regions = {name: slide[y : y + side, x : x + side] for name, (x, y) in sorted(corners.items())}
    figure, axes = plt.subplots(1, 1 + len(regions), figsize=(8, 2.5), width_ratios=[2.1] + [1.0] * len(regions))
    for ax, (name, image) in zip(axes, {title: slide, **regions}.items(), strict=True):
        ax.imshow(image)
        ax.set_title(name)
        ax.set_axis_off()
    frame_tumour(axes[0], cores, side)
    for ax in axes[1:]:
        frame(ax, [(x, y) for x in range(0, side, side // 4) for y in range(0, side, side // 4)], side / 4, "white")
    return figure


@styled
def tiling(thumbnail: np.ndarray, saturation: np.ndarray, mask: np.ndarray, corners: np.ndarray, side: float) -> Figure:
    """A thumbnail (h, w, 3), its saturation and its tissue mask, with the selected regions.

    Args:
        corners, side: of the regions, in pixels of the thumbnail.
    """
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.6))
    shown = {"thumbnail and regions": thumbnail, "saturation": saturation, "tissue mask": mask}
    for ax, (title, image) in zip(axes, shown.items(), strict=True):
        ax.imshow(image, cmap="Greys_r")
        frame(ax, corners, side, COLOURS[5])
        ax.set_title(title)
        ax.set_axis_off()
    return figure


@styled
def level_maps(
    rows: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
    *,
    label: str = "rank",
    cores: Cores | None = None,
    side: float = 1.0,
    scale: float = 1.0,
) -> Figure:
    """A grid of maps over tissue in grey: a row for each model or slide, with a colour bar from 0 to 1.

    Args:
        rows: name -> (tissue (h, w, 3) uint8, title -> map (h, w) in 0 to 1, see `heatmaps.stitched`, or image
            (h, w, 3), which is shown alone). The last one is a map, to whose extent all are cropped.
        cores, side, scale: see `frame_tumour`.
    """
    count = max(len(maps) for _, maps in rows.values())
    figure, axes = plt.subplots(len(rows), count, figsize=(8, 1.95 * len(rows) + 0.25), squeeze=False)
    for line, (name, (tissue, maps)) in zip(axes, rows.items(), strict=True):
        inside, margin = ~np.isnan(list(maps.values())[-1]), 0.02 * max(tissue.shape)
        (top, bottom), (left, right) = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (1, 0))
        line[0].text(-0.05, 0.5, name, rotation=90, ha="right", va="center", transform=line[0].transAxes, fontsize=9.5)
        for ax in line:
            ax.set_axis_off()
        for ax, (title, values) in zip(line, maps.items(), strict=False):
            if values.ndim == 3:
                ax.imshow(np.nan_to_num(values, nan=1.0))
            else:
                ax.imshow(Image.fromarray(tissue).convert("L"), cmap="Greys_r", vmin=0, vmax=255)
                ax.imshow(np.ma.masked_invalid(values), cmap=HEAT, vmin=0, vmax=1, alpha=0.72)
            frame_tumour(ax, cores or {}, side, scale)
            ax.set_title(title, fontsize=9)
            ax.set(xlim=(left - margin, right + margin), ylim=(bottom + margin, top - margin))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT), ax=axes, shrink=0.7, aspect=22, pad=0.015)
    bar.set_label(label)
    return figure


def level_panels(maps: AttentionMaps, tiles: Tiles, size: tuple[int, int], shrink: float) -> dict[str, np.ndarray]:
    """The attention of each level over the tissue, title -> (h, w), for `level_maps`.

    Args:
        size: (h, w) of the tissue's image.
        shrink: pixels of level 0 a pixel of it.
    """
    slide = np.broadcast_to(maps.slide[:, None, None], maps.patch.shape)
    levels = {"patch level": maps.patch, "region level": maps.region, "slide level": slide}
    return {name: stitched(scores, tiles, size, shrink) for name, scores in levels.items()}


# --- the slide of the figures -----------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A slide for attention maps, how it is tiled, its patch level, and the normalisation of its pixels."""

    title: str
    path: Path
    tiling: Tiling
    patch: PatchEncoder
    normalise: str


def shown(p: Any, out: Path, test: Dataset) -> Shown:
    """The first test slide of a run of the recipe with HIPT's patch level of `<data_root>`/weights.

    Without that file, and with generated features: a slide of one generated region, `out`/generated.tiff, and random
    weights.
    """
    tiling, file = replace(PANDA, region=p.region), Path(p.data_root) / "weights" / "vit256_small_dino.pth"
    if file.is_file() and isinstance(test, slides.Features):
        return Shown(test.items[0].name, test.items[0].path, tiling, patch_encoder(file), p.normalise)
    side = min(p.region, 2048)  # 4096 px take a CPU minutes
    pixels = np.full((side + 512, side + 512, 3), 255, np.uint8)
    grey = np.random.default_rng(p.seed).integers(90, 200, (side, side, 1), np.uint8)
    pixels[256:-256, 256:-256] = grey // np.array([1, 2, 1], np.uint8)
    path = write_pyramid(out / "generated.tiff", pixels, 0.5)
    torch.manual_seed(p.seed)
    title = "generated slide, random weights"
    return Shown(title, path, replace(tiling, region=side), PatchEncoder().eval(), p.normalise)


# --- real tissue ------------------------------------------------------------------------------------------------------


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
        """Title -> map over the tissue, for `level_maps`; the slide level where there are regions to weigh."""
        size = self.tissue.shape[:2]
        patch, region, slide = level_panels(self.maps, self.tiles, size, self.shrink).values()
        components = stitched(self.components, self.tiles, size, self.shrink)
        shown = {"tissue": self.tissue, "patch level": patch, "patch tokens, PCA": components}
        shown["region level,\nuntrained"] = region
        return shown | ({"slide level,\nuntrained": slide} if len(self.tiles) > 1 else {})

    def scores(self) -> dict[str, np.ndarray]:
        """Scores of the slide's tokens (h, w), for `stain_auroc`; the mean colour of each token is the control."""
        token = self.tiles.step / self.maps.patch.shape[-1]  # pixels of level 0
        h, w = (round(side * self.shrink / token) for side in self.tissue.shape[:2])
        colours = reduce(self.tissue.astype(float), "(h y) (w x) c -> (h w) c", "mean", h=h, w=w)
        return {
            "[CLS] attention, rank in its patch": stitched(self.maps.patch, self.tiles, (h, w), token),
            "first principal component of the tokens": stitched(self.components[..., 0], self.tiles, (h, w), token),
            "first principal component of the colours (control)": PCA(1).fit_transform(colours).reshape(h, w),
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
    with Slide(path) as slide:
        mpp = slide.mpp * pixels / patch.image
        settings = Tiling(region=2 * patch.image, mpp=mpp, resample=True, area=0.1, least=0.5)
        tissue, shrink = slide.thumbnail(slide.size[1] / 512)
        tiles = tile(slide, settings, np.ones(tissue.shape[:2], np.uint8))
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
    path = write_pyramid(folder / "glands.tiff", PHOTOGRAPHS["tissue"](), mpp=1.0, downsamples=(1, 4))
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
