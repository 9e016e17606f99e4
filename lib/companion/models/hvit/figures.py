"""Figures of H-ViT alone: slides and regions, tiling, and maps of the three levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ...viz.style import COLOURS, HEAT, styled

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
def slide_and_regions(slide: np.ndarray, cores: Cores | None, regions: Mapping[str, np.ndarray], title: str) -> Figure:
    """A synthetic slide with its regions framed, and one region of each kind, (S, S, 3), with its 4 x 4 patches."""
    side = len(next(iter(regions.values())))
    figure, axes = plt.subplots(1, 1 + len(regions), figsize=(8, 2.5), width_ratios=[2.1] + [1.0] * len(regions))
    for ax, (name, image) in zip(axes, {title: slide, **regions}.items(), strict=True):
        ax.imshow(image)
        ax.set_title(name)
        ax.set_axis_off()
    frame_tumour(axes[0], cores or {}, side)
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
