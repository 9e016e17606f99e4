"""Attention maps of a slide: the attention of the three levels, ranked, weighed together and stitched.

    tokens inside a patch   (P, heads, t, t)     each patch ranked by itself
    patches inside a region (heads, n, n)        each region ranked by itself
    regions of the slide    (M,)                 the pooling weights, ranked over the slide

A **factorised** score joins them: levels that training left alone weigh 1 - gamma, levels that it changed weigh gamma.
At gamma = 0 the map shows what the pre-trained encoders attend to whatever the task, at 1 only what the task taught.

Written from the facts of computationalpathologygroup/hvit at 444bb72.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from ...data.pyramids import LARGEST_THUMBNAIL, Slide, write_pyramid
from ...errors import BadParameter, CorruptFile
from ...io.files import atomic
from .model import HViT, PatchEncoder, grids, patches_of
from .slides import Tiles, tensor

TRAINED = {"global": (False, False, True), "local": (False, True, True), "whole": (True, True, True)}
"""Which of the levels patch, region, slide each variant trains."""


def ranks(values: np.ndarray, axes: int = 2) -> np.ndarray:
    """Values as the share of their map that is lower, in [0, 1); a map is the last `axes` axes."""
    flat = values.reshape(*values.shape[: values.ndim - axes], -1)
    return ((rankdata(flat, method="min", axis=-1) - 1) / flat.shape[-1]).reshape(values.shape)


def upsample(scores: np.ndarray, factor: int) -> np.ndarray:
    """Maps (..., h, w), each value repeated `factor` times along both."""
    return scores.repeat(factor, -2).repeat(factor, -1)


def patch_map(attention: np.ndarray) -> np.ndarray:
    """Token attention (P, heads, t, t) of a region's patches, ranked and laid out: (heads, n t, n t)."""
    return lay_out(ranks(attention))


def lay_out(scores: np.ndarray) -> np.ndarray:
    """Maps (P, heads, t, t) of a region's patches, row by row: (heads, n t, n t)."""
    n = math.isqrt(len(scores))
    return rearrange(scores, "(i j) h y x -> h (i y) (j x)", i=n, j=n)


def region_map(attention: np.ndarray, side: int) -> np.ndarray:
    """Patch attention (heads, n, n) of a region, ranked and brought to (heads, side, side)."""
    return upsample(ranks(attention), side // attention.shape[-1])


def factorised(
    patch: np.ndarray, region: np.ndarray, slide: float | np.ndarray, gamma: float = 0.5, variant: str = "local"
) -> np.ndarray:
    """The weighed mean of the three levels' scores, in [0, 1) as they are.

    Args:
        patch, region, slide: ranked scores that broadcast, such as (s, s), (s, s) and the region's number.
        gamma: weight of the levels that `variant` trains; the others weigh 1 - gamma.
    """
    weights = level_weights(gamma, variant)
    return (weights[0] * patch + weights[1] * region + weights[2] * slide) / sum(weights)


def level_weights(gamma: float, variant: str) -> list[float]:
    """What patch, region and slide level weigh: gamma where `variant` trains the level, else 1 - gamma."""
    weights = [gamma if trained else 1 - gamma for trained in TRAINED[variant]]
    if not 0 <= gamma <= 1 or not any(weights):
        raise BadParameter("gamma", gamma, "0 to 1; more than 0 where all levels are trained")
    return weights


def stitched(maps: np.ndarray, tiles: Tiles, size: tuple[int, int], shrink: float = 1.0) -> np.ndarray:
    """The maps of a slide's regions as one image, their mean where regions overlap and NaN outside them.

    Args:
        maps: (M, s, s), or (M, s, s, 3) of colours; resized by nearest neighbour.
        size: (h, w) of the image; what lies outside is cropped.
        shrink: pixels of level 0 a pixel of it.
    """
    colours = maps.shape[3:]
    total, count = np.zeros((*size, *colours), np.float32), np.zeros((*size, *(1 for _ in colours)), np.float32)
    side = max(round(tiles.step / shrink), 1)
    index = np.arange(side) * maps.shape[1] // side
    for (x, y), scores in zip(tiles.coords.tolist(), maps, strict=True):
        left, top = int(x / shrink), int(y / shrink)
        part = scores[index][:, index][max(-top, 0) : max(size[0] - top, 0), max(-left, 0) : max(size[1] - left, 0)]
        window = np.s_[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]]
        total[window] += part
        count[window] += 1
    return total / np.where(count, count, np.nan)


# --- the attention of a model on a slide ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMaps:
    """Ranked attention on a slide of M regions, the mean over heads.

    Attributes:
        patch, region: (M, s, s), s tokens along a region's side.
        slide: (M,).
        alpha: (M,), the pooling weights themselves.
        output: (1, ...), of the slide level.
    """

    patch: np.ndarray
    region: np.ndarray
    slide: np.ndarray
    alpha: np.ndarray
    output: Tensor

    def factorised(self, gamma: float, variant: str) -> np.ndarray:
        """All levels in one map (M, s, s)."""
        return factorised(self.patch, self.region, self.slide[:, None, None], gamma, variant)


def cls_maps(attention: Tensor) -> np.ndarray:
    """From (..., 1 + s s) to (..., s, s): the [CLS] key left out, nothing renormalised."""
    s = math.isqrt(attention.shape[-1] - 1)
    return rearrange(attention[..., 1:], "... (i j) -> ... i j", i=s, j=s).cpu().numpy()


@torch.inference_mode()
def attention_maps(model: HViT, patch: PatchEncoder, slide: Slide, tiles: Tiles, normalise: str) -> AttentionMaps:
    """The attention of all levels on a slide, one region in memory at a time.

    Args:
        model: the two upper levels, in eval mode.
        patch: the level below them, in eval mode, on the same device.

    Raises:
        BadParameter: regions that are no whole patches, or embeddings that do not fit the region level.
        CorruptFile: the slide has no region.
    """
    if not len(tiles):
        raise CorruptFile(slide.path, "no region with tissue was found")
    low, high, embedded, region = [], [], [], model.level("region")
    device = patch.cls_token.device
    if tiles.region % patch.image or patch.dim != region.inputs:
        given = f"regions of {tiles.region} px, patches of {patch.image} px and width {patch.dim}"
        raise BadParameter("patch", given, f"regions of whole patches, and the model's width of them, {region.inputs}")
    for x, y in tiles.coords:
        pixels = tensor(tiles.read(slide, x, y)[None], normalise, device)
        each = [patch.forward_intermediates(part) for part in patches_of(pixels, patch.image).split(128)]
        e = torch.cat([cls for cls, _ in each])  # (p, d)
        r, out = region.forward_intermediates(grids(e[None]))
        maps = patch_map(cls_maps(torch.cat([made["attention"] for _, made in each])))  # (h, s, s)
        low.append(maps.mean(0))
        high.append(region_map(cls_maps(out["attention"][0]), maps.shape[-1]).mean(0))
        embedded.append(r)
    output, out = model.slide.forward_intermediates(torch.cat(embedded)[None])
    alpha = out["pooling"][0].cpu().numpy()
    return AttentionMaps(np.stack(low), np.stack(high), ranks(alpha, axes=1), alpha, output.cpu())


def write_heatmap(
    slide: Slide, tiles: Tiles, maps: np.ndarray, stem: str | Path, downsample: int = 16
) -> dict[str, Path]:
    """Scores over the tissue: `<stem>.tiff`, a pyramid aligned with the slide in a viewer, and `<stem>.png`, by kind.

    Args:
        maps: (M, s, s) in 0 to 1, in the order of `tiles`.
        downsample: of the image; doubled until it has at most `LARGEST_THUMBNAIL` pixels.
    """
    while math.prod(size := [-(-side // downsample) for side in slide.size]) > LARGEST_THUMBNAIL:
        downsample *= 2
    width, height = size
    scores = stitched(maps, tiles, (height, width), downsample)[..., None]
    thumbnail, _ = slide.thumbnail(downsample)
    tissue = np.asarray(Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BILINEAR))
    colours = 255 * (colormaps["jet"](np.nan_to_num(scores[..., 0]))[..., :3] / 2 + 0.5)  # a lightened jet
    mixed = np.where(np.isnan(scores), tissue, (tissue + colours) / 2).round().astype(np.uint8)
    files = {"tiff": Path(f"{stem}.tiff"), "png": Path(f"{stem}.png")}
    write_pyramid(files["tiff"], mixed, slide.mpp * downsample)
    with atomic(files["png"]) as temporary:
        Image.fromarray(mixed).save(temporary)
    return files
