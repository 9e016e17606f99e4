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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from ...errors import BadParameter, check_choice
from ...ops.files import atomic
from .model import HViT, PatchEncoder, grids, patches_of
from .slides import LARGEST_THUMBNAIL, Slide, Tiles, tensor, write_pyramid

TRAINED = {"global": (False, False, True), "local": (False, True, True), "whole": (True, True, True)}
"""Which of the levels patch, region, slide each variant trains."""


def ranks(values: np.ndarray, axes: int = 2) -> np.ndarray:
    """Values as the share of their map that is lower, in [0, 1); a map is the last `axes` axes."""
    values = np.asarray(values)
    if values.ndim < axes:
        raise BadParameter("values", values.shape, f"{axes} axes or more")
    flat = values.reshape(*values.shape[: values.ndim - axes], -1)
    return ((rankdata(flat, method="min", axis=-1) - 1) / flat.shape[-1]).reshape(values.shape)


def upsample(scores: np.ndarray, factor: int) -> np.ndarray:
    """Maps (..., h, w), each value repeated `factor` times along both."""
    return np.asarray(scores).repeat(factor, -2).repeat(factor, -1)


def patch_map(attention: np.ndarray) -> np.ndarray:
    """Token attention (P, heads, t, t) of a region's patches, ranked and laid out: (heads, n t, n t)."""
    return lay_out(ranks(attention))


def lay_out(scores: np.ndarray) -> np.ndarray:
    """Maps (P, heads, t, t) of a region's patches, row by row: (heads, n t, n t)."""
    n = math.isqrt(len(scores))
    return rearrange(scores, "(i j) h y x -> h (i y) (j x)", i=n, j=n)


def region_map(attention: np.ndarray, side: int) -> np.ndarray:
    """Patch attention (heads, n, n) of a region, ranked and brought to (heads, side, side)."""
    if side % attention.shape[-1]:
        raise BadParameter("side", side, f"a multiple of the {attention.shape[-1]} patches a side")
    return upsample(ranks(attention), side // attention.shape[-1])


def factorised(
    patch: np.ndarray, region: np.ndarray, slide: float | np.ndarray, gamma: float = 0.5, variant: str = "local"
) -> np.ndarray:
    """The weighed mean of the three levels' scores, in [0, 1) as they are.

    Args:
        patch, region, slide: ranked scores that broadcast, such as (s, s), (s, s) and the region's number.
        gamma: weight of the levels that `variant` trains; the others weigh 1 - gamma.
    """
    weights = _weights(gamma, variant)
    return np.asarray(sum(w * a for w, a in zip(weights, (patch, region, slide), strict=True))) / sum(weights)


def granular(
    patch: Sequence[np.ndarray],
    region: Sequence[np.ndarray],
    slide: float,
    step: int,
    gamma: float = 0.5,
    variant: str = "local",
    *,
    official_quirks: bool = False,
) -> np.ndarray:
    """`factorised`, of maps (s, s) made again after shifts, so that the edges between patches do not show.

    Args:
        patch, region: the k-th map was made with the region's window `k step` further right and down. Each is laid
            where it belongs. A level's weight is shared by its maps; where some of them are missing, near the upper and
            the left edge, the others' shares grow so that both levels together weigh as much as elsewhere.
        official_quirks: as released: the two levels together weigh 1 whatever gamma is, while the sum is divided by
            2 (1 - gamma) + gamma in Global. There scores shrink unless gamma is 0.5.
    """
    weights = _weights(gamma, variant)
    total, share = np.zeros(np.shape(patch[0])), np.zeros(np.shape(patch[0]))
    for maps, weight in zip((patch, region), weights, strict=False):
        for k, scores in enumerate(maps):
            offset, side = k * step, scores.shape[-1]
            total[offset:, offset:] += weight / len(maps) * scores[: side - offset, : side - offset]
            share[offset:, offset:] += weight / len(maps)
    mean = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    below = 1.0 if official_quirks else weights[0] + weights[1]
    return (below * mean + weights[2] * slide) / sum(weights)


def _weights(gamma: float, variant: str) -> list[float]:
    """What patch, region and slide level weigh."""
    check_choice("variant", variant, TRAINED)
    if not 0 <= gamma <= 1:
        raise BadParameter("gamma", gamma, "0 to 1")
    weights = [gamma if trained else 1 - gamma for trained in TRAINED[variant]]
    if not sum(weights):
        raise BadParameter("gamma", gamma, f"more than 0: {variant!r} trains every level")
    return weights


def stitch(
    maps: Iterable[tuple[tuple[int, int], np.ndarray]], shape: tuple[int, int], downsample: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lay square maps out over a slide.

    Args:
        maps: the upper left corner (x, y) at level 0, and the map (s, s) in pixels of the result.
        shape: (h, w) of the result; what lies outside is cropped.
        downsample: level-0 pixels a pixel of the result.

    Returns:
        The mean (h, w) float32 where maps lie, and where that is (h, w) bool.
    """
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.uint16)
    for (x, y), scores in maps:
        left, top = int(x / downsample), int(y / downsample)
        part = scores[max(-top, 0) : max(shape[0] - top, 0), max(-left, 0) : max(shape[1] - left, 0)]
        if part.size:
            window = np.s_[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]]
            total[window] += part
            count[window] += 1
    return total / np.maximum(count, 1), count > 0


def overlay(
    tissue: np.ndarray, scores: np.ndarray, there: np.ndarray, *, threshold: float | None = None, opacity: float = 0.5
) -> np.ndarray:
    """Scores as colours over the tissue: uint8 (h, w, 3).

    Args:
        tissue: uint8 (h, w, 3).
        scores, there: see `stitch`.
        threshold: leave what is below without colour.
        opacity: of the colours.
    """
    if tissue.shape[:2] != scores.shape:
        raise BadParameter("scores", scores.shape, f"{tissue.shape[:2]}, as the tissue")
    colours = 255 * (colormaps["jet"](np.clip(scores, 0, 1))[..., :3] / 2 + 0.5)  # a lightened jet
    coloured = there if threshold is None else there & (scores >= threshold)
    mixed = np.where(coloured[..., None], (1 - opacity) * tissue + opacity * colours, tissue)
    return np.round(mixed).astype(np.uint8)


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
    return rearrange(attention[..., 1:], "... (i j) -> ... i j", i=s, j=s).numpy()


@torch.inference_mode()
def attention_maps(model: HViT, patch: PatchEncoder, slide: Slide, tiles: Tiles, normalise: str) -> AttentionMaps:
    """The attention of all levels on a slide, one region in memory at a time.

    Args:
        model: the two upper levels, in eval mode.
        patch: the level below them, in eval mode.
    """
    low, high, embedded, region = [], [], [], model.level("region")
    for x, y in tiles.coords:
        pixels = tensor(slide.region(x, y, tiles)[None], normalise)
        each = [patch.forward_intermediates(part) for part in patches_of(pixels, patch.image).split(128)]
        e = torch.cat([cls for cls, _ in each])  # (p, d)
        r, out = region.forward_intermediates(grids(e[None]))
        maps = patch_map(cls_maps(torch.cat([made["attention"] for _, made in each])))  # (h, s, s)
        low.append(maps.mean(0))
        high.append(region_map(cls_maps(out["attention"][0]), maps.shape[-1]).mean(0))
        embedded.append(r)
    output, out = model.slide.forward_intermediates(torch.cat(embedded)[None])
    alpha = out["pooling"][0].numpy()
    return AttentionMaps(np.stack(low), np.stack(high), ranks(alpha, axes=1), alpha, output)


def write_heatmap(
    slide: Slide,
    tiles: Tiles,
    maps: Iterable[np.ndarray],
    stem: str | Path,
    *,
    downsample: int = 16,
    threshold: float | None = None,
    opacity: float = 0.5,
) -> dict[str, Path]:
    """Scores stitched over a slide: `<stem>.tiff`, a pyramid aligned with the slide in a viewer, and `<stem>.png`.

    Args:
        maps: one square map (s, s) for each region, in the order of `tiles`; resized by nearest neighbour.
        downsample: of the image.
        threshold, opacity: see `overlay`.

    Returns:
        The files by kind.
    """
    width, height = (-(-side // downsample) for side in slide.size)
    if width * height > LARGEST_THUMBNAIL:
        raise BadParameter("downsample", downsample, f"one that leaves at most {LARGEST_THUMBNAIL} pixels")
    side = max(int(tiles.step / downsample), 1)

    def sized() -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        for (x, y), scores in zip(tiles.coords.tolist(), maps, strict=True):
            index = np.arange(side) * len(scores) // side
            yield (x, y), np.asarray(scores)[index][:, index]

    scores, there = stitch(sized(), (height, width), downsample)
    thumbnail, _ = slide.thumbnail(downsample)
    tissue = np.asarray(Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BILINEAR))
    picture = overlay(tissue, scores, there, threshold=threshold, opacity=opacity)
    files = {"tiff": Path(f"{stem}.tiff"), "png": Path(f"{stem}.png")}
    write_pyramid(files["tiff"], lambda y0, y1: picture[y0:y1], (width, height), slide.mpp * downsample)
    with atomic(files["png"]) as temporary:
        Image.fromarray(picture).save(temporary)
    return files
