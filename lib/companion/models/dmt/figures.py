"""Figures of DMT alone: layers compared, learning rates, probes of a student, t-SNE, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from ...evaluation.ablations import selected
from ...viz import plots
from ...viz.style import COLOURS, method_colours, styled


@styled
def layers(grids: Mapping[str, np.ndarray], teachers: Sequence[str]) -> Figure:
    """Linear CKA between blocks: a panel for each student.

    Args:
        grids: student -> (blocks of all teachers, blocks of the student), as `live.cka_grids`.
        teachers: whose blocks the rows are, in equal numbers.
    """
    figure, axes = plt.subplots(1, len(grids), figsize=(2.4 * len(grids) + 1.6, 3.1), squeeze=False)
    for ax, (name, grid) in zip(axes[0], grids.items(), strict=True):
        drawn = plots.heat_cells(ax, grid, (0, 1), ".2f")
        ax.set(title=name, yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_xticks(range(grid.shape[1]), [f"block {i + 1}" for i in range(grid.shape[1])])
    rows = len(next(iter(grids.values())))
    names = [f"{name}, block {i + 1}" for name in teachers for i in range(rows // len(teachers))]
    axes[0, 0].set_yticks(range(rows), names)
    figure.colorbar(drawn, ax=axes, label="linear CKA")
    return figure


@styled
def learning_rates(rows: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Mean accuracy on validation by learning rate, with the std over selection seeds; a dot marks the selected one."""
    figure, ax = plt.subplots(figsize=(6.4, 3.2))
    chosen, tried = selected(rows), rows[rows.stage == "select"]
    for name, colour in method_colours(methods).items():
        found = tried[tried.method == name]
        scores = found.groupby("learning_rate")["mean"].agg(["mean", "std"]).fillna(0)
        ax.errorbar(scores.index, scores["mean"], scores["std"], color=colour, label=name, capsize=2, elinewidth=0.9)
        best = next(rate for (_, method), rate in chosen.items() if method == name)
        ax.plot(best, scores["mean"][best], "o", color=colour)
    ax.set_xscale("log", base=2)
    values = sorted(tried.learning_rate.unique())
    ax.set_xticks(values, [f"{rate:g}" for rate in values])
    ax.minorticks_off()
    ax.set(xlabel="learning rate", ylabel="mean accuracy,\nvalidation split (%)")
    figure.legend(loc="outside right center")
    return figure


@styled
def probed(scores: pd.DataFrame, title: str) -> Figure:
    """A student's accuracy by factor, between that of an untrained student and of the best teacher.

    Args:
        scores: a row for each factor; columns mean, std, untrained, best teacher; in percent.
    """
    figure, ax = plt.subplots(figsize=(4.6, 2.7))
    ax.bar(range(len(scores)), scores["mean"], 0.6, yerr=scores["std"], color=COLOURS[0], error_kw={"capsize": 3})
    lines = {"untrained": ("#555555", "--"), "best teacher": (COLOURS[3], "-")}
    for name, (colour, dashes) in lines.items():
        ends = np.arange(len(scores))
        ax.hlines(scores[name], ends - 0.4, ends + 0.4, color=colour, linestyle=dashes, label=name)
    ax.set(ylim=(0, 100), ylabel="accuracy (%)", title=title)
    ax.set_xticks(range(len(scores)), list(scores.index))
    ax.legend(loc="upper left")
    return figure


@styled
def tsne(features: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Sequence[str]]], seed: int = 0) -> Figure:
    """t-SNE of each entry of `features` (n, D), standardised: a row for each factor, which gives the colours.

    Args:
        factors: name -> classes (n,) and their names.
    """
    figure, axes = plt.subplots(
        len(factors), len(features), figsize=(2 * len(features) + 1.2, 2.1 * len(factors)), squeeze=False
    )
    for column, (name, found) in zip(axes.T, features.items(), strict=True):
        scaled = (found - found.mean(0)) / found.std(0).clamp_min(1e-6)
        for ax, (classes, names) in zip(column, factors.values(), strict=True):
            plots.tsne(scaled, classes, ax, seed, names)
            if not ax.get_subplotspec().is_last_col():
                ax.get_legend().remove()
        column[0].set_title(name)
    for ax, factor in zip(axes[:, 0], factors, strict=True):
        ax.set_ylabel(f"by {factor}")
    return figure


@styled
def masks(images: Sequence[np.ndarray], truth: Sequence[Tensor], predicted: Sequence[Tensor], name: str) -> Figure:
    """Contours of an object's true mask (white) and of the predicted one (orange) on each image."""
    figure, axes = plt.subplots(1, len(images), figsize=(1.35 * len(images), 1.75))
    for ax, image, *both in zip(np.atleast_1d(axes), images, truth, predicted, strict=True):
        ax.imshow(image)
        for mask, colour in zip(both, ("white", COLOURS[3]), strict=True):
            if mask.any() and not mask.all():
                ax.contour(mask, levels=[0.5], colors=[colour], linewidths=1.6)
        ax.set_axis_off()
    figure.suptitle(f"synthetic scenes; white: the object's mask; orange: {name}", fontsize=9)
    return figure
