"""Figures of DPLQ alone: quaternion blocks, class texts, attention of the prompts, noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from ...viz import plots
from ...viz.style import COLOURS, styled

BLOCKS = (("R", "I", "J", "K"), ("−I", "R", "K", "−J"), ("−J", "−K", "R", "I"), ("−K", "J", "−I", "R"))
"""Rows: r, i, j, k of the input; columns: of the output."""
SENSORS = ("first sensor", "second sensor")
MARKERS = ("s", "D", "*")  # of texts for the first sensor, for the second, and without bias


@styled
def blocks(matrix: Tensor) -> Figure:
    """Which of the four matrices stands in which block of a quaternion layer, and its real matrix (inputs, outputs)."""
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.1), width_ratios=[1, 1.1])
    colours = dict(zip("RIJK", COLOURS, strict=False))
    for (row, column), text in np.ndenumerate(np.array(BLOCKS)):
        alpha = 0.35 if "−" in text else 0.85
        axes[0].add_patch(Rectangle((column, 3 - row), 0.96, 0.96, facecolor=colours[text[-1]], alpha=alpha))
        axes[0].text(column + 0.48, 3.48 - row, text, ha="center", va="center", fontsize=11)
    axes[0].set(xlim=(0, 4), ylim=(0, 4), aspect="equal", title="matrix and sign of each block", xticks=[], yticks=[])
    inputs, outputs = matrix.shape
    top = float(matrix.abs().max())
    shown = axes[1].imshow(np.asarray(matrix), cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for edge in (1, 2, 3):
        axes[1].axhline(inputs * edge / 4 - 0.5, color="black", linewidth=0.8)
        axes[1].axvline(outputs * edge / 4 - 0.5, color="black", linewidth=0.8)
    axes[1].set(title=f"weights, {inputs} × {outputs}", xlabel="output channel", ylabel="input channel")
    figure.colorbar(shown, ax=axes[1], label="weight")
    return figure


@styled
def texts(
    features: Tensor,
    unbiased: Tensor,
    sensors: Tensor,
    classes: Sequence[str],
    seed: int = 0,
    colours: Sequence[str] = COLOURS,
) -> Figure:
    """t-SNE of class texts: one point for each image and class, one star for each class without bias.

    Args:
        features: (images, classes, E), the text features made for each image.
        unbiased: (classes, E).
        sensors: (images,), 0 or 1; all 0 where the sensor is not known.
        classes: names; at most 8 are drawn.
        colours: of the classes.
    """
    classes = list(classes)[:8]
    kept, images = len(classes), len(features)
    cloud = torch.cat([features[:, :kept].flatten(0, 1), unbiased[:kept]])
    kinds = torch.cat([sensors.repeat_interleave(kept), torch.full((kept,), 2)])
    labels = torch.cat([torch.arange(kept).repeat(images), torch.arange(kept)])
    figure, ax = plt.subplots(figsize=(7.4, 4.4))
    points = plots.tsne(F.normalize(cloud, dim=-1), labels, ax, seed=seed)
    ax.clear()
    for kind, size in enumerate((16, 16, 190)):
        for label in range(kept):
            here = (kinds == kind) & (labels == label)
            x, y = points[here].T
            ax.scatter(x, y, s=size, marker=MARKERS[kind], color=colours[label], edgecolors="#333333", linewidths=0.4)
    names = [*(SENSORS if sensors.any() else ("with bias",)), "no bias"]
    marks = [*(MARKERS[:2] if sensors.any() else MARKERS[:1]), MARKERS[2]]
    legend = [("o", colour, name) for colour, name in zip(colours, classes, strict=False)]
    legend += [(marker, "#888888", name) for marker, name in zip(marks, names, strict=True)]
    handles = [plt.Line2D([], [], marker=m, linestyle="", color=c, label=name) for m, c, name in legend]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xticks=[], yticks=[])
    return figure


@styled
def axes_of_opposites(spots: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Image features on the axes between the text features of opposite colours, a panel for each sensor.

    Args:
        spots: for each sensor (n, 3): the projection on the first sensor's axis, on the second's, and 1 or -1 for the
            class at the positive or negative end.
        titles: of the panels.
    """
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.5), sharex=True, sharey=True)
    for ax, points, title in zip(panels, spots, titles, strict=True):
        for sign, name, marker, colour in ((1, "red, green", "o", COLOURS[6]), (-1, "cyan, violet", "^", COLOURS[1])):
            x, y, _ = points[points[:, 2] == sign].T
            ax.scatter(x, y, s=14, marker=marker, color=colour, label=name)
        ax.axhline(0, color="#888888", linewidth=0.8)
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("axis of the text features, first sensor")
    panels[0].set_ylabel("the same, second sensor")
    panels[1].legend(title="true colour", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def attention_share(shares: Mapping[str, Sequence[float]], uniform: float) -> Figure:
    """The [CLS] token's attention to the prompts, by block; dotted: the share of uniform attention."""
    figure, ax = plt.subplots(figsize=(5.4, 2.6))
    for (name, values), line in zip(shares.items(), ("o-", "s--"), strict=False):
        ax.plot(range(len(values)), values, line, label=name)
    ax.axhline(uniform, color="#888888", linewidth=1, linestyle=":", label="uniform")
    ax.set(xlabel="block of the image encoder", ylabel="share of attention\nto the prompts", ylim=(0, None))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def noise(sizes: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Percentages by the size of the noise at test time, one line each."""
    figure, ax = plt.subplots(figsize=(5.6, 2.8))
    for (name, values), line in zip(curves.items(), ("o-", "s--"), strict=False):
        ax.plot(range(len(sizes)), values, line, label=name)
    ax.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
    ax.set(xlabel="noise at test time, |μ|", ylabel="%", ylim=(0, 100))
    ax.grid(axis="y")
    ax.legend()
    return figure


@styled
def probabilities(image: np.ndarray, title: str, chance: Sequence[float], classes: Sequence[str], true: int) -> Figure:
    """An image (H, W, 3) and the predicted probability of each class; the true one is green."""
    figure, axes = plt.subplots(1, 2, figsize=(5.2, 2.3), width_ratios=[1, 1.3], dpi=80)
    axes[0].imshow(image, interpolation="nearest")
    axes[0].set(xticks=[], yticks=[], title=title.replace(" at the ", "\nat the "))
    axes[1].barh(range(len(classes)), chance, color=[COLOURS[2 if c == true else 0] for c in range(len(classes))])
    axes[1].set_yticks(range(len(classes)), classes, fontsize=9)
    axes[1].set(xlim=(0, 1), xlabel="probability")
    axes[1].invert_yaxis()
    return figure
