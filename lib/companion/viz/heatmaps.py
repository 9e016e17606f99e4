"""Where a hierarchical model looks on a slide: the attention of its levels, ranked, weighed together and stitched.

    tokens inside a patch   (P, heads, t, t)     each patch ranked by itself
    patches inside a region (heads, n, n)        each region ranked by itself
    regions of the slide    (M,)                 the pooling weights, ranked over the slide

A **factorised** score joins them: levels that training left alone weigh 1 - gamma, levels that it changed weigh gamma.
At gamma = 0 one sees what the pre-trained encoders look at whatever the task, at 1 only what the task taught.

Arrays in, arrays out: nothing here knows a model. H-ViT's `forward(trace=...)` gives the attention. Written from the
facts of computationalpathologygroup/hvit at 444bb72 (section 10 of its description).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import colormaps
from scipy.stats import rankdata

from ..errors import BadParameter, check_choice

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
    count, heads, t, _ = scores.shape
    n = math.isqrt(count)
    if n * n != count:
        raise BadParameter("attention", scores.shape, "a square number of patches first")
    tiled = scores.reshape(n, n, heads, t, t).transpose(2, 0, 3, 1, 4)
    return tiled.reshape(heads, n * t, n * t)


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
