"""Figures of ECAMP alone: weights of words, reconstructions, super-resolution, lesions and attention maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.style import COLOURS, styled
from ..layers.mae import patchify, unpatchify
from .model import ECAMP, Batch

ROLES = {"entity": COLOURS[1], "descriptor": COLOURS[0], "boiler-plate": "#8c8c8c", "other": "#cfcfcf"}
MASKED = 0.89  # grey value of masked patches
LOOK: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.15,) * 3}  # of the synthetic chests


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


def _frame(axes: Iterable[Axes], boxes: Iterable[Sequence[float]], colour: str) -> None:
    """Boxes, one for each of `axes`: left, top, right, bottom in pixels, of which the last two are exclusive."""
    for ax, box in zip(axes, boxes, strict=False):
        left, top, right, bottom = (float(x) - 0.5 for x in box)
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))


def images(pixels: Tensor, boxes: Tensor, titles: Sequence[str]) -> Figure:
    """Chests (n, 1, H, W) with the box of their lesion in blue, each below its title."""
    figure = plots.show_images(pixels.expand(-1, 3, -1, -1), titles, **LOOK)
    _frame(figure.axes, boxes, COLOURS[5])
    return figure


def attention(pixels: Tensor, boxes: Tensor, rows: Mapping[str, Tensor], titles: Sequence[str]) -> Figure:
    """Attention maps (n, rows, columns) over chests (n, 1, H, W), a row for each entry; the lesion's box is blue."""
    coloured, label = pixels.expand(-1, 3, -1, -1), "attention, synthetic chests"
    figure = plots.attention_grid(coloured, rows, label=label, mode="nearest", **LOOK)
    for ax, title in zip(figure.axes, titles, strict=False):
        ax.set_title(title, fontsize=8.5)
    _frame(figure.axes[: len(pixels) * (len(rows) + 1)], itertools.cycle(boxes), COLOURS[5])
    return figure


def reconstructions(
    model: ECAMP, batch: Batch, out: Mapping[str, Tensor], titles: Sequence[str], mean: float, std: float
) -> Figure:
    """Visible patches, reconstruction, super-resolved image (if the model has one) and original of a batch, in rows.

    The orange frame is the window of the super-resolution loss.

    Args:
        out: of `ECAMP.forward_intermediates` of the batch.
        mean, std: of the images' normalisation.
    """
    visible = patchify(out["low"], model.patch).masked_fill(out["hidden"][..., None] > 0, (MASKED - mean) / std)
    rows = {"visible patches": visible, "reconstruction": out["pixels"]}
    rows = {name: unpatchify(patches, model.patch) for name, patches in rows.items()}
    if "super_resolved" in out:
        rows["super-resolved"] = out["super_resolved"]
    rows["original"] = batch.images
    # normalised chests have three equal channels; a reconstruction's may differ
    figure = plots.image_rows({name: x[:, :1].expand(-1, 3, -1, -1) * std + mean for name, x in rows.items()}, titles)
    if "super_resolved" in out and model.window is not None:
        side, corners = 2 * model.patch, batch.window.tolist()
        boxes = [[side * x for x in (left, top, left + model.window, top + model.window)] for top, left in corners]
        _frame(figure.axes[2 * len(boxes) :], boxes, COLOURS[1])
    return figure


@styled
def super_resolution(target: Tensor, output: Tensor) -> Figure:
    """The output of super-resolution by the target's value, of pixels (n,) inside the window, normalised."""
    figure, ax = plt.subplots(figsize=(4.6, 2.9))
    limits = [[-3, 3.2], [-0.4, 3.2]]
    counts = ax.hist2d(target.numpy(), output.numpy(), bins=60, range=limits, cmap="cividis", norm="log")
    ax.plot([-3, 3.2], [-3, 3.2], color=COLOURS[3], linewidth=1)
    ax.set(xlabel="target, normalised", ylabel="output", ylim=(-0.4, 3.2), title="pixels inside the window")
    figure.colorbar(counts[3], ax=ax, label="pixels")
    return figure
