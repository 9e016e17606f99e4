"""What DPLQ's notebook shows of a model: quaternion blocks, class texts, attention of prompts, probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ...viz import plots
from ...viz.attention import Recorder
from ...viz.style import COLOURS, styled
from ..layers.clip_prompting import encode_text
from .model import DPLQ

BLOCKS = (("R", "I", "J", "K"), ("−I", "R", "K", "−J"), ("−J", "−K", "R", "I"), ("−K", "J", "−I", "R"))
"""Rows: r, i, j, k of the input; columns: of the output."""
SENSORS = ("first sensor", "second sensor")
MARKERS = ("s", "D", "*")  # of texts for the first sensor, for the second, and without bias
SHADES = {"red": ("#8c0000", "#ff8a80"), "cyan": ("#007c8a", "#6fe3ef")}  # of the classes with this colour in the name
SHADES |= {"green": ("#2e9e2e", "#b5e8b5"), "violet": ("#4b2a85", "#c3a6ff")}


@torch.inference_mode()
def class_texts(model: DPLQ, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Text features of the classes without noise: for images with domain features (b, C, E), and of no bias (C, E)."""
    _, texts = model.encode(images, model.prompts(features, torch.zeros(len(images), model.ctx.shape[1])))
    context = model.mixed(model.mix_text, model.ctx, torch.zeros_like(model.ctx))
    return texts, encode_text(model.clip, model.prompted(context), model.ends, model.deep_text)


@torch.inference_mode()
def prompt_attention(model: DPLQ, images: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention of each prompt token to the patches in the last prompted block, mean of the heads, without noise.

    Args:
        features: domain features (b, F) of the images, by name.

    Returns maps (b, rows, columns) by prompt and name.
    """
    tokens, grid, maps = len(model.ctx), tuple(model.clip.visual.grid_size), dict[str, Tensor]()
    for name, given in features.items():
        with Recorder(model.clip.visual) as record:
            model.encode(images, model.prompts(given, torch.zeros(len(images), model.ctx.shape[1])))
        rows = record.maps[len(model.deep_text)].mean(1)[:, -tokens:, 1:-tokens]  # (b, n, patches)
        maps |= {f"prompt {k + 1}, {name}": rows[:, k].unflatten(-1, grid) for k in range(tokens)}
    return maps


def class_colours(classes: Sequence[str]) -> Sequence[str]:
    """A shade of the colour that each class name begins with; where one has none left, the colours of the style."""
    left = {colour: iter(shades) for colour, shades in SHADES.items()}
    found = [next(left.get(name.partition(" ")[0], iter(())), "") for name in classes]
    return found if all(found) else COLOURS


@styled
def blocks(matrix: Tensor) -> Figure:
    """The real matrix (inputs, outputs) of a quaternion layer, and which of its four matrices each block is."""
    (inputs, outputs), top = matrix.shape, float(matrix.abs().max())
    figure, ax = plt.subplots(figsize=(4.4, 3.4))
    image = ax.imshow(np.asarray(matrix), cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for (row, column), name in np.ndenumerate(np.array(BLOCKS)):
        at = (column + 0.5) * outputs / 4 - 0.5, (row + 0.5) * inputs / 4 - 0.5
        box = {"facecolor": "white", "linewidth": 0, "pad": 1.5}
        ax.text(*at, name, ha="center", va="center", fontsize=12, bbox=box)
    for edge in (1, 2, 3):
        ax.axhline(inputs * edge / 4 - 0.5, color="black", linewidth=0.8)
        ax.axvline(outputs * edge / 4 - 0.5, color="black", linewidth=0.8)
    ax.set(title=f"weights, {inputs} × {outputs}", xlabel="output channel", ylabel="input channel")
    figure.colorbar(image, ax=ax, label="weight")
    return figure


@styled
def texts(features: Tensor, unbiased: Tensor, sensors: Tensor, classes: Sequence[str], seed: int = 0) -> Figure:
    """t-SNE of class texts: one point for each image and class, one star for each class without bias.

    Args:
        features: (images, classes, E), the text features made for each image.
        unbiased: (classes, E).
        sensors: (images,), 0 or 1; all 0 where the sensor is not known.
        classes: names; at most 8 are drawn.
    """
    classes = list(classes)[:8]
    kept, images, colours = len(classes), len(features), class_colours(classes)
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
