"""Figures of TIP alone: its architecture, and where and when the adaptor acts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ...viz.style import HEAT, styled

FROZEN = {"facecolor": "#dddddd", "edgecolor": "#999999"}
TRAINED = {"facecolor": "#fbd9b5", "edgecolor": "#d55e00"}
NO_WEIGHTS = {"facecolor": "white", "edgecolor": "black"}
ARROW = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}


@styled
def architecture() -> Figure:
    """The two networks and their fusion: frozen modules grey, trained ones orange, operations without weights white."""
    figure, ax = plt.subplots(figsize=(8.6, 3.7))

    def box(x: float, y: float, width: float, text: str, kind: dict[str, Any]) -> None:
        ax.add_patch(plt.Rectangle((x, y - 0.3), width, 0.6, **kind))
        ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)

    def arrow(*points: tuple[float, float]) -> None:
        *before, last = points
        for start, end in itertools.pairwise(before):
            ax.plot(*zip(start, end, strict=True), color="black", linewidth=1.2)
        ax.annotate("", xy=last, xytext=before[-1], arrowprops=ARROW)

    for y, text in ((3.6, "semantic prompt $c_s$"), (2.45, "noisy latent $z_t$"), (1.3, "degraded image $y$")):
        ax.text(0, y, text, va="center")
    ax.text(0, 0.3, "restoration prompt $c_r$", va="center")
    box(2.9, 3.6, 1.7, "text encoder", FROZEN)
    box(2.9, 0.3, 1.7, "text encoder", FROZEN)
    box(2.9, 1.3, 1.7, "embedding $E(y)$", TRAINED)
    box(5.9, 3.6, 2.2, "UNet: encoder, middle", FROZEN)
    box(5.9, 0.3, 2.2, "adaptor: their copy", TRAINED)
    box(6.0, 1.3, 2.0, "1×1 conv. $M_i$", TRAINED)
    box(8.9, 2.45, 2.6, r"$\hat f_i = (1 + s\,\gamma_i)\,f_i + s\,\beta_i$", NO_WEIGHTS)
    box(9.3, 3.6, 1.8, "UNet: decoder", FROZEN)
    for y in (3.6, 0.3):
        arrow((2.5, y), (2.9, y))
        arrow((4.6, y), (5.9, y))
    arrow((2.15, 1.3), (2.9, 1.3))
    arrow((2.0, 2.45), (5.4, 2.45), (5.4, 3.45), (5.9, 3.45))
    ax.text(5.2, 1.3, "+", ha="center", va="center", bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white"})
    arrow((5.2, 2.45), (5.2, 1.52))
    arrow((4.6, 1.3), (4.98, 1.3))
    arrow((5.2, 1.08), (5.2, 0.45), (5.9, 0.45))
    arrow((7.0, 0.6), (7.0, 1.0))
    ax.text(7.1, 0.8, "$h_i$", va="center", fontsize=8.5)
    arrow((8.0, 1.3), (10.2, 1.3), (10.2, 2.15))
    ax.text(9.1, 1.47, r"$\gamma_i,\ \beta_i$ at each site", ha="center", fontsize=8.5)
    arrow((7.0, 3.3), (7.0, 2.45), (8.9, 2.45))
    ax.text(7.95, 2.6, "features $f_i$", ha="center", fontsize=8.5)
    arrow((10.2, 2.75), (10.2, 3.3))
    arrow((11.1, 3.6), (11.6, 3.6))
    ax.text(11.65, 3.6, r"$\hat\epsilon$ or $\hat z_0$", va="center")
    ax.set(xlim=(0, 12.7), ylim=(-0.1, 4.0), title="Frozen modules are grey, trained modules orange")
    ax.axis("off")
    return figure


@styled
def adaptor_maps(trace: Sequence[dict], title: str = "") -> Figure:
    """Mean magnitude of gamma and of beta at each site and sampling step, on logarithmic colour scales.

    Args:
        trace: of `TIPPipeline.__call__`.
        title: of the figure.
    """
    frame = pd.DataFrame(trace)
    shown = [what for what in ("gamma", "beta") if frame[what].notna().any()]  # a plain ControlNet has no gamma
    figure, axes = plt.subplots(1, len(shown), figsize=(4.1 * len(shown), 2.8), squeeze=False)
    figure.suptitle(title)
    for ax, what in zip(axes[0], shown, strict=True):
        sites = frame.site[frame[what].notna()].unique()
        table = frame.pivot_table(index="site", columns="step", values=what).loc[sites]
        times = frame.groupby("step").t.first()
        drawn = ax.imshow(table, cmap=HEAT, aspect="auto", norm="log")
        ax.set_yticks(range(len(table)), table.index)
        ticks = range(0, len(times), max(1, len(times) // 4))
        ax.set_xticks(ticks, [str(times.iloc[i]) for i in ticks])
        ax.set(xlabel="timestep t, from noise to image")
        bar = figure.colorbar(drawn, ax=ax, label=rf"mean $|\{what}|$", ticks=LogLocator(subs=(1, 2, 5)), format="%g")
        bar.minorticks_off()
    return figure
