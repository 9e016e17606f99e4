"""H-ViT: the cases of heatmaps, whose ranks depend on rounding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from companion.models.hvit import HViT, PatchEncoder, RegionEncoder, heatmaps, official, slides
from companion.models.hvit.model import grids, patches_of

from . import fill
from .runner import Case

ROUNDING = 4e-6  # of attention in float32, relative
Bounds = tuple[np.ndarray, ...]  # ranks, and the lowest and the highest that rounding allows

read = official.read_checkpoint


@torch.no_grad()
def heatmap(case: Case) -> dict[str, Tensor]:
    """The attention of the levels on regions, ranked and blended; with smoothing also of windows that are shifted."""
    settings = case.facts["settings"]
    patch_level, region_level, slide_level = _levels(case)
    order = slides.file_order(np.array(settings["corners"]))
    drawn = np.stack([case.input(list(case.facts["inputs"])[i]).cpu() for i in order])
    regions = np.clip(np.round(48 * drawn + 128), 0, 255).astype(np.uint8)
    side, downscale = regions.shape[1], settings["downscale"]
    windows = [k * settings["step"] for k in range(4 if settings["smoothed"] else 1)]

    low: list[list[Bounds]] = []  # by window: all regions' maps
    high: list[list[Bounds]] = []
    seen: list[tuple[np.ndarray, np.ndarray, Tensor]] = []  # of the first window: attention, and region embeddings
    for k, offset in enumerate(windows):
        moved = np.pad(regions[:, offset:, offset:], ((0, 0), (0, offset), (0, offset), (0, 0)), constant_values=255)
        low.append([])
        high.append([])
        for pixels in slides.tensor(moved, "half", torch.get_default_device()):
            e, out = patch_level.forward_intermediates(patches_of(pixels[None], patch_level.image))
            r, above = region_level.forward_intermediates(grids(e[None]))
            tokens, patches = (heatmaps.cls_maps(named["attention"].cpu()) for named in (out, above))
            seen += [(tokens, patches[0], r)] * (k == 0)
            low[k].append(tuple(map(heatmaps.lay_out, _ranks(tokens))))
            factor = side // downscale // patches.shape[-1]
            high[k].append(tuple(heatmaps.upsample(x, factor) for x in _ranks(patches[0])))
    _, out = slide_level.forward_intermediates(torch.cat([r for *_, r in seen])[None])
    share = heatmaps.ranks(out["pooling"][0].cpu().numpy(), axes=1)
    made: dict[str, Bounds | np.ndarray] = {
        "patch_attention": seen[0][0],
        "region_attention": seen[0][1],
        "slide_attention": share,
        "coords": np.array(settings["corners"])[order],
        "patch_score_head0": tuple(x[0] for x in low[0][0]),
        "region_score_head0": tuple(x[0] for x in _ranks(seen[0][1])),
    }
    for name, blend in settings["blends"].items():

        def blended(bound: int, i: int, head: int, token_head: int, blend: Mapping = blend) -> np.ndarray:
            """The patch maps are shifted once, the region maps three times."""
            maps = [p[i][bound][token_head] for p in low[:2]], [r[i][bound][head] for r in high]
            step, kind = settings["step"] // downscale, (blend["gamma"], blend["variant"])
            return granular(*maps, share[i], step, *kind, smoothed=settings["smoothed"])

        made[name] = tuple(np.stack([blended(bound, *one) for one in blend["chosen"]]) for bound in range(3))
    nearest = {name: _nearest(case, name, x) if isinstance(x, tuple) else x for name, x in made.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in nearest.items()}


def granular(
    patch: list[np.ndarray],
    region: list[np.ndarray],
    slide: float,
    step: int,
    gamma: float,
    variant: str,
    *,
    smoothed: bool,
) -> np.ndarray:
    """`heatmaps.factorised`, of maps (s, s) made again after shifts, so that the edges between patches do not show.

    Args:
        patch, region: the k-th map was made with the region's window `k step` further right and down. Each is laid
            where it belongs. A level's weight is shared by its maps; where some of them are missing, near the upper and
            the left edge, the others' shares grow so that both levels together weigh as much as elsewhere.
        smoothed: as released: the two levels together weigh 1 whatever gamma is, while the sum is divided by
            2 (1 - gamma) + gamma in Global. There scores shrink unless gamma is 0.5.
    """
    weights = heatmaps.level_weights(gamma, variant)
    total, share = np.zeros(np.shape(patch[0])), np.zeros(np.shape(patch[0]))
    for maps, weight in zip((patch, region), weights, strict=False):
        for k, scores in enumerate(maps):
            offset, side = k * step, scores.shape[-1]
            total[offset:, offset:] += weight / len(maps) * scores[: side - offset, : side - offset]
            share[offset:, offset:] += weight / len(maps)
    mean = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    below = 1.0 if smoothed else weights[0] + weights[1]
    return (below * mean + weights[2] * slide) / sum(weights)


def _levels(case: Case) -> tuple[PatchEncoder, RegionEncoder, torch.nn.Module]:
    state = {
        level: {n: torch.as_tensor(a) for n, a in fill.state_dict(own, case.seed).items()}
        for level, own in case.names.items()
    }
    # the heatmap's slide model ends at the slide's embedding
    width = len(state["slide"]["global_phi.0.weight"])
    last = {"classifier.weight": torch.zeros(6, width), "classifier.bias": torch.zeros(6)}
    slide = HViT.from_official(state["slide"] | last, "classification").slide
    return PatchEncoder.from_official(state["patch"]), RegionEncoder.from_official(state["region"]), slide


def _ranks(attention: np.ndarray) -> Bounds:
    """Ranks of maps (..., s, s), the lowest and the highest that rounding allows.

    float32 attention has a relative error of 3e-6 (against float64). Two tokens whose attention is nearer than that may
    swap, and a score changes by a whole rank: at gamma 0.4 by 0.6 / 2 / 256 / 1.4 = 8e-4 in a smoothed local
    blend, 1.0e-3 of the largest.
    """
    flat = attention.reshape(*attention.shape[:-2], -1).astype(np.float64)
    ordered = np.sort(flat, axis=-1).reshape(-1, flat.shape[-1])
    rows = flat.reshape(ordered.shape)
    low, high = (
        np.stack([np.searchsorted(o, r * factor, "left") for o, r in zip(ordered, rows, strict=True)])
        for factor in (1 - ROUNDING, 1 + ROUNDING)
    )
    bounds = (x.reshape(attention.shape) / flat.shape[-1] for x in (low, high - 1))
    return heatmaps.ranks(attention), *bounds


def _nearest(case: Case, name: str, bounds: Bounds) -> np.ndarray:
    """Scores; of the scores that rounding allows those nearest to the recorded ones."""
    scores, low, high = bounds
    if name not in case.recorded:
        return scores
    recorded = case.recorded[name].cpu().numpy().reshape(scores.shape)
    return np.where(low < high, np.clip(recorded, low, high), scores)
