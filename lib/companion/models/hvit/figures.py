"""Figures of H-ViT alone: slides and regions, tiling, losses, and maps of the three levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ...viz.style import COLOURS, HEAT, styled
from .heatmaps import stitch
from .slides import Tiles


def _squares(ax: Axes, corners: np.ndarray, side: float, colour: str, width: float = 1.4) -> None:
    for x, y in corners:
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), side, side, fill=False, edgecolor=colour, linewidth=width))


def _grid(ax: Axes, side: int, parts: int, colour: str = "white") -> None:
    for k in range(1, parts):
        ax.axhline(k * side / parts - 0.5, color=colour, linewidth=0.8)
        ax.axvline(k * side / parts - 0.5, color=colour, linewidth=0.8)


def outline(ax: Axes, cores: Mapping[tuple[int, int], bool | None], side: float, scale: float = 1.0) -> None:
    """Frame the regions with tumour: core in full lines, rim in dotted ones.

    Args:
        cores: corner of a region -> whether its tumour lies in the core (True), on the rim (False), or is absent.
        side: of a region, in pixels of level 0.
        scale: pixels of level 0 a pixel of the image.
    """
    for (x, y), core in cores.items():
        if core is not None:
            style = "-" if core else ":"
            frame = Rectangle((x / scale, y / scale), side / scale, side / scale, fill=False, linestyle=style)
            frame.set(edgecolor="black", linewidth=1.6)
            ax.add_patch(frame)


@styled
def slide_and_regions(
    slide: np.ndarray,
    cores: Mapping[tuple[int, int], bool | None] | None,
    regions: Mapping[str, np.ndarray],
    title: str,
    patches: int = 4,
) -> Figure:
    """A synthetic slide with its regions framed (see `outline`), and one region of each kind with its patch grid.

    Args:
        regions: kind -> (S, S, 3) uint8.
    """
    side = len(next(iter(regions.values())))
    figure, axes = plt.subplots(
        1, 1 + len(regions), figsize=(8, 2.5), width_ratios=[2.1] + [1.0] * len(regions), squeeze=False
    )
    axes[0, 0].imshow(slide)
    outline(axes[0, 0], cores or {}, side)
    axes[0, 0].set_title(title)
    for ax, (kind, image) in zip(axes[0, 1:], regions.items(), strict=True):
        ax.imshow(image)
        ax.set_title(kind)
        _grid(ax, side, patches)
    for ax in axes.flat:
        ax.set_axis_off()
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
        _squares(ax, corners, side, COLOURS[5])
        ax.set_title(title)
        ax.set_axis_off()
    return figure


@styled
def losses(costs: Mapping[str, Sequence[float]], outputs: np.ndarray, grades: np.ndarray, predicted: int) -> Figure:
    """Each loss as a share of its largest value by true grade, and the grades that a regression's outputs give.

    Args:
        costs: head -> its loss for each true grade, of fixed outputs that predict `predicted`.
        outputs, grades: of the regression.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), width_ratios=[1.2, 1])
    for (name, values), marker, colour in zip(costs.items(), "os^Dv", COLOURS, strict=False):
        scaled = np.array(values) / max(values)
        label = {"ordinal": "ordinal, CORAL", "corn": "CORN"}.get(name, name)
        axes[0].plot(range(len(values)), scaled, f"{marker}-", color=colour, label=label, markersize=5)
    axes[0].set(xlabel="true grade", ylabel="loss / largest loss", title=f"loss of an output that predicts {predicted}")
    axes[0].legend()
    axes[1].plot(outputs, grades, color=COLOURS[list(costs).index("regression")])
    axes[1].set(xlabel="regression output f", ylabel="predicted grade", title="prediction of the regression head")
    axes[1].grid()
    return figure


def stitched(maps: np.ndarray, tiles: Tiles, size: tuple[int, int], shrink: float = 1.0) -> np.ndarray:
    """Maps (M, s, s) or (M, s, s, 3) of a slide's regions as one image (h, w) or (h, w, 3), NaN outside them.

    Args:
        size: (h, w).
        shrink: pixels of level 0 a pixel of it.
    """
    if maps.ndim == 4:
        return np.stack([stitched(maps[..., c], tiles, size, shrink) for c in range(maps.shape[-1])], -1)
    side = max(round(tiles.step / shrink), 1)
    index = np.arange(side) * maps.shape[-1] // side
    placed = ((tuple(c), m[index][:, index]) for c, m in zip(tiles.coords.tolist(), maps, strict=True))
    scores, there = stitch(placed, size, shrink)
    return np.where(there, scores, np.nan)


@styled
def level_maps(
    rows: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
    *,
    label: str = "rank",
    cores: Mapping[tuple[int, int], bool | None] | None = None,
    side: float = 1.0,
    scale: float = 1.0,
    height: float = 1.9,
) -> Figure:
    """A grid of maps over tissue in grey: a row for each model or slide, with a colour bar from 0 to 1.

    Args:
        rows: name -> (tissue (h, w, 3) uint8, title -> map): (h, w) in 0 to 1, see `stitched`, or RGB (h, w, 3), which
            is shown alone. A map of the whole tissue (uint8) is shown as it is.
        cores, side, scale: see `outline`.
        height: of a row, in inches.
    """
    count = max(len(maps) for _, maps in rows.values())
    figure, axes = plt.subplots(len(rows), count, figsize=(8, height * len(rows) + 0.25), squeeze=False)
    for line, (name, (tissue, maps)) in zip(axes, rows.items(), strict=True):
        grey = np.asarray(Image.fromarray(tissue).convert("L"))
        there = ~np.isnan(next(np.atleast_3d(m)[..., 0] for m in maps.values() if m.dtype != np.uint8))
        lines, columns, margin = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0)), 0.02 * max(there.shape)
        line[0].text(-0.05, 0.5, name, rotation=90, ha="right", va="center", transform=line[0].transAxes, fontsize=9.5)
        for ax in line:
            ax.set_axis_off()
        for ax, (title, values) in zip(line, maps.items(), strict=False):
            if values.ndim == 3:
                ax.imshow(values if values.dtype == np.uint8 else np.nan_to_num(values, nan=1.0))
            else:
                ax.imshow(grey, cmap="Greys_r", vmin=0, vmax=255)
                ax.imshow(np.ma.masked_invalid(values), cmap=HEAT, vmin=0, vmax=1, alpha=0.72)
            if cores is not None:
                outline(ax, cores, side, scale)
            ax.set_title(title, fontsize=9)
            ax.set_xlim(columns[0] - margin, columns[-1] + margin)
            ax.set_ylim(lines[-1] + margin, lines[0] - margin)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT), ax=axes, shrink=0.7, aspect=22, pad=0.015)
    bar.set_label(label)
    return figure
