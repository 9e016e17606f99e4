"""Figures of SA²VP alone: its architecture, and the 3 x 3 neighbourhoods of an interaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz.style import styled

FROZEN = {"facecolor": "#dddddd", "edgecolor": "#999999"}
TRAINED = {"facecolor": "#fbd9b5", "edgecolor": "#d55e00"}
IMAGE, PROMPT, ATTENDED = "#cfe3f3", "#fbe3c8", "#d55e00"
ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}


def _box(ax: Axes, x: float, y: float, width: float, text: str, kind: dict[str, Any], height: float = 0.7) -> None:
    ax.add_patch(Rectangle((x, y - height / 2), width, height, **kind))
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)


def _arrow(ax: Axes, *points: tuple[float, float], dashed: bool = False) -> None:
    """An arrow along `points`, whose last piece has the head."""
    style = "--" if dashed else "-"
    ax.plot(*zip(*points[:-1], strict=True), color="black", linewidth=1.2, linestyle=style)
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=ARROW | {"linestyle": style})


def _grid(ax: Axes, x: float, y: float, side: float, colour: str, lit: Sequence[tuple[int, int]], title: str) -> None:
    """A grid of 6 x 6 tokens with its upper left corner at (x, y)."""
    step = side / 6
    for row in range(6):
        for column in range(6):
            face = ATTENDED if (row, column) in lit else colour
            corner = (x + column * step, y - (row + 1) * step)
            ax.add_patch(Rectangle(corner, 0.9 * step, 0.9 * step, facecolor=face, edgecolor="none"))
    ax.text(x + side / 2, y + 0.12, title, ha="center", va="bottom", fontsize=8.5)


@styled
def architecture() -> Figure:
    """Both pathways through block i, the interaction between them, and its 3 x 3 neighbourhood.

    Frozen parts are grey and trained ones orange; numbers in parentheses are those of the notebook's equations.
    """
    figure, ax = plt.subplots(figsize=(8.8, 4.4))
    top, middle, bottom, new = 4.3, 2.75, 1.2, 0.05
    ax.add_patch(Rectangle((3.75, -0.4), 5.0, 5.35, fill=False, edgecolor="#777777", linestyle=":"))
    ax.text(3.9, 4.8, "block $i$, repeated $L$ times", va="center", fontsize=8.5)
    ax.text(0, top, "image $x$", va="center")
    _box(ax, 1.15, top, 1.75, "patch embedding\n+ pos  (3.1)", FROZEN)
    _box(ax, 0, bottom, 0.85, "map $M$", TRAINED)
    _box(ax, 1.15, bottom, 1.75, "$W_P$, + pos\n(3.1)", TRAINED)
    _arrow(ax, (0.85, top), (1.15, top))
    _arrow(ax, (0.85, bottom), (1.15, bottom))
    for y, name in ((top, "$B$"), (bottom, "$P$")):
        _arrow(ax, (2.9, y), (4.9, y))
        ax.text(3.3, y + 0.2, name, ha="center")
        _box(ax, 4.9, y, 1.1, "$T_i$", FROZEN)
        _arrow(ax, (6.0, y), (8.0, y))
        ax.text(8.2, y, "+", ha="center", va="center", bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white"})
        _arrow(ax, (8.4, y), (9.2, y))
        _arrow(ax, (4.15, y), (4.15, middle + (0.35 if y == top else -0.35)))
    _box(ax, 3.9, middle, 2.2, "aligned attention\nwith $T_i$'s weights (3.2)", FROZEN)
    _box(ax, 6.35, middle, 0.95, "adapter\n(3.3)", TRAINED)
    _arrow(ax, (6.1, middle), (6.35, middle))
    _arrow(ax, (7.3, middle), (8.2, middle), (8.2, top - 0.25))
    _arrow(ax, (8.2, middle), (8.2, bottom + 0.25), dashed=True)
    ax.text(7.45, middle + 0.15, "$s\\,F$", fontsize=8.5)
    ax.text(8.1, 3.5, "most blocks", ha="right", va="center", fontsize=8)
    ax.text(8.1, 2.0, "$i = 0,\\ L/3,\\ 2L/3$", ha="right", va="center", fontsize=8)
    _box(ax, 4.0, new, 3.1, "new map: $\\gamma_k \\odot T_i(W_k D_k)$  (3.4)", TRAINED, 0.55)
    _arrow(ax, (7.1, new), (8.2, new), (8.2, bottom - 0.25), dashed=True)
    for y, text in ((top, "class of the image"), (bottom, "training only")):
        _box(ax, 9.2, y, 1.2, "norm, head\n(3.5)", FROZEN | {"edgecolor": TRAINED["edgecolor"]})
        _arrow(ax, (10.4, y), (10.75, y))
        ax.text(10.8, y, text, va="center", fontsize=8.5)
    near = [(row, column) for row in (1, 2, 3) for column in (2, 3, 4)]
    _grid(ax, 9.2, 3.35, 1.3, IMAGE, [(2, 3)], "query $B_j$")
    _grid(ax, 11.2, 3.35, 1.3, PROMPT, near, "keys $P_n$")
    _arrow(ax, (11.6, 2.8), (10.12, 2.8))
    _box(ax, 9.2, new, 0.9, "frozen", FROZEN, 0.45)
    _box(ax, 10.3, new, 0.9, "trained", TRAINED, 0.45)
    ax.set(xlim=(-0.1, 12.7), ylim=(-0.5, 5.0))
    ax.set_axis_off()
    return figure


@styled
def neighbourhoods(mask: Tensor, grid: tuple[int, int]) -> Figure:
    """The attention mask of an interaction, and the patches that four of its queries attend to.

    Args:
        mask: boolean (N, N), of `model.neighbourhood`.
        grid: rows and columns.
    """
    rows, columns = grid
    inside = 1 + (rows // 2) * columns + columns // 2
    queries = {"[CLS]": 0, "corner": 1, "edge": 1 + columns // 2, "inside": inside}
    figure, axes = plt.subplots(1, 5, figsize=(8.8, 2.2), width_ratios=[1.3, 1, 1, 1, 1])
    axes[0].imshow(mask.numpy(), cmap="Greys")
    axes[0].set(title="mask (black: attends)", xlabel="key token", ylabel="query token")
    for ax, (name, query) in zip(axes[1:], queries.items(), strict=True):
        near = mask[query, 1:].view(rows, columns).numpy()
        ax.imshow(near, cmap="Greys", vmin=0, vmax=1)
        ax.set(title=f"{name}: {int(near.sum())} patches", xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    return figure
