"""Figures of ECAMP alone: weights of words, reconstructions, super-resolution, attention of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.style import COLOURS, HEAT, styled
from ..layers.mae import patchify, unpatchify
from .model import ECAMP, Batch

ROLES = {"entity": COLOURS[1], "descriptor": COLOURS[0], "boiler-plate": "#8c8c8c", "other": "#cfcfcf"}
BOX = COLOURS[5]  # the true box of a lesion
MASKED = 0.89  # grey value of masked patches
LOOK: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.15,) * 3, "mode": "nearest"}  # of the synthetic chests


@styled
def weights(words: Sequence[str], values: Sequence[float], roles: Sequence[str], title: str) -> Figure:
    """The weight of each word of a report in the text loss, coloured by its role, one of `ROLES`."""
    figure, ax = plt.subplots(figsize=(8.6, 2.9))
    for role, colour in ROLES.items():
        at = [i for i, own in enumerate(roles) if own == role]
        ax.bar(at, [values[i] for i in at], color=colour, label=role)
    ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    ax.set(ylabel="weight in the text loss", title=title)
    figure.legend(ncols=len(ROLES), loc="outside lower center")
    return figure


def _grey(ax: Axes, image: Tensor, mean: float, std: float) -> None:
    """An image (C, H, W), normalised with `mean` and `std`, in grey."""
    ax.imshow((image[0] * std + mean).detach().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _frame(ax: Axes, box: Sequence[float], colour: str = BOX) -> None:
    """A box, left, top, right, bottom in pixels, of which the last two are exclusive."""
    left, top, right, bottom = (float(x) - 0.5 for x in box)
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))


@styled
def images(pixels: Tensor, boxes: Tensor, titles: Sequence[str], columns: int = 4) -> Figure:
    """Chests (n, 1, H, W) with the box of their lesion, each below its title."""
    rows = -(-len(pixels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.25 * columns, 2.55 * rows), squeeze=False)
    for ax in axes.flat[len(pixels) :]:
        ax.set_axis_off()
    for ax, image, box, title in zip(axes.flat, pixels, boxes, titles, strict=False):
        _grey(ax, image, 0.5, 0.15)
        _frame(ax, box)
        ax.set_title(title, fontsize=8)
    return figure


def reconstructed(model: ECAMP, batch: Batch, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Input, reconstruction, super-resolved image and original of a batch by name, normalised; masked patches are NaN.

    A model without super-resolution has no row for it.
    """
    visible = patchify(out["low"], model.patch)  # (B, N, 3 p p)
    visible = visible.masked_fill(out["hidden"][..., None] > 0, torch.nan)
    rows = {"visible patches": visible, "reconstruction": out["pixels"]}
    rows = {name: unpatchify(patches, model.patch) for name, patches in rows.items()}
    if "super_resolved" in out:
        rows["super-resolved"] = out["super_resolved"]
    return rows | {"original": batch.images}


@styled
def reconstructions(
    model: ECAMP, batch: Batch, out: Mapping[str, Tensor], titles: Sequence[str], mean: float, std: float
) -> Figure:
    """The rows of `reconstructed`; the orange frame is the window of the super-resolution loss.

    Args:
        out: of `ECAMP.forward_intermediates` of the batch.
        mean, std: of the images' normalisation.
    """
    rows = reconstructed(model, batch, out)
    count = len(batch.images)
    figure, axes = plt.subplots(len(rows), count, figsize=(1.25 * count + 1.1, 1.28 * len(rows) + 0.3), squeeze=False)
    cell = 2 * model.patch
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image, corner in zip(line, images, batch.window.tolist(), strict=True):
            _grey(ax, image.nan_to_num((MASKED - mean) / std), mean, std)
            if name == "super-resolved" and model.window is not None:
                top, left = (cell * x for x in corner)
                _frame(ax, (left, top, left + cell * model.window, top + cell * model.window), COLOURS[1])
        line[0].set_ylabel(name.replace(" ", "\n").replace("super-", "super-\n"), rotation=0, ha="right", va="center")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8.5)
    return figure


@styled
def super_resolution(target: Tensor, output: Tensor, error: Tensor, rest: Tensor) -> Figure:
    """The output of super-resolution by the target's value, and two maps of the squared error of one image.

    Args:
        target, output: (n,), pixels inside the window, normalised.
        error: (H, W), squared errors.
        rest: (H, W), the part of them that no weights can remove.
    """
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.7), width_ratios=[1.25, 1, 1])
    limits = [[-3, 3.2], [-0.4, 3.2]]
    counts = axes[0].hist2d(target.numpy(), output.numpy(), bins=60, range=limits, cmap="cividis", norm="log")
    axes[0].plot([-3, 3.2], [-3, 3.2], color=COLOURS[3], linewidth=1)
    axes[0].set(xlabel="target, normalised", ylabel="output", ylim=(-0.4, 3.2), title="pixels inside the window")
    figure.colorbar(counts[3], ax=axes[0], label="pixels")
    for ax, values, title in zip(axes[1:], (error, rest), ("squared error", "part that cannot be fitted"), strict=True):
        drawn = ax.imshow(values.numpy(), cmap=HEAT, vmin=0, vmax=4)
        ax.set(xticks=[], yticks=[], title=title)
    figure.colorbar(drawn, ax=axes[1:], label="squared error", extend="max", shrink=0.9)
    return figure


@styled
def word_probabilities(
    pixels: Tensor, titles: Sequence[str], words: Sequence[str], probabilities: Mapping[str, Tensor]
) -> Figure:
    """Chests (n, 1, H, W) above the predicted probability of words at their masked positions.

    Args:
        words: the candidates.
        probabilities: image that the decoder receives -> (n, words).
    """
    figure, axes = plt.subplots(2, len(pixels), figsize=(2.25 * len(pixels), 4.2), height_ratios=[1.15, 1])
    thick = 0.8 / len(probabilities)
    for i, (image, (upper, lower)) in enumerate(zip(pixels, axes.T, strict=True)):
        _grey(upper, image, 0.5, 0.15)
        upper.set_title(titles[i], fontsize=8)
        for k, (name, values) in enumerate(probabilities.items()):
            at = np.arange(len(words)) + thick * (k - (len(probabilities) - 1) / 2)
            lower.barh(at, values[i].numpy(), 0.9 * thick, color=COLOURS[k], label=f"{name} image")
        lower.set_yticks(range(len(words)), words if i == 0 else [])
        lower.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="predicted probability")
        lower.invert_yaxis()
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def attention(pixels: Tensor, boxes: Tensor, rows: Mapping[str, Tensor], titles: Sequence[str]) -> Figure:
    """Attention maps (n, rows, columns) over chests (n, 1, H, W), a row for each entry; the lesion's box is blue."""
    coloured = pixels.expand(-1, 3, -1, -1)
    figure = plots.attention_grid(coloured, rows, label="attention, synthetic chests", **LOOK)
    for i, ax in enumerate(figure.axes[: len(pixels) * (len(rows) + 1)]):
        _frame(ax, boxes[i % len(pixels)])
    for ax, title in zip(figure.axes, titles, strict=False):
        ax.set_title(title, fontsize=8.5)
    return figure


@styled
def word_map(pixels: Tensor, box: Tensor, heat: Tensor, title: str) -> Figure:
    """A chest (1, H, W) and the attention (rows, columns) of one word over it: a frame of the widget."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(4.3, 2.5), dpi=80)
    _grey(left, pixels, 0.5, 0.15)
    plots.overlay(right, pixels.expand(3, -1, -1), 100 * heat, colour_bar=True, **LOOK)
    right.set_title("attention (%)", fontsize=9)
    for ax in (left, right):
        _frame(ax, box)
    figure.suptitle(title, fontsize=9)
    return figure
