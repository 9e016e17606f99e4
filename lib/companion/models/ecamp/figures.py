"""Figures of ECAMP alone: weights of words, reconstructions, lesions and attention maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.style import COLOURS, styled
from ..layers.mae import patchify, unpatchify
from .model import ECAMP, Batch
from .text import Vocabulary, boilerplate, descriptors, mask

ROLES = {"entity": COLOURS[1], "descriptor": COLOURS[0], "boiler-plate": "#8c8c8c", "other": "#cfcfcf"}
MASKED = 0.89  # grey value of masked patches
LOOK: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.15,) * 3}  # of the synthetic chests


def roles(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """The role of each position of a text, one of `ROLES`."""
    found = ["boiler-plate" if plain else "other" for plain in boilerplate(ids, vocabulary)]
    for i in descriptors(ids, vocabulary):
        found[i] = "descriptor"
    return ["entity" if int(word) in vocabulary.entities else role for word, role in zip(ids, found, strict=True)]


def masked_shares(text: str, vocabulary: Vocabulary, kind: str, seed: int) -> dict[str, float]:
    """The share of 3,000 draws in which the words of a text are masked, by their role; boiler-plate counts as "other".

    Args:
        kind: of `text.mask`.
    """
    ids, draw = vocabulary.encode(text, 48), np.random.default_rng(seed).random
    share = np.mean([mask(ids, vocabulary, draw, kind) == vocabulary.mask for _ in range(3000)], axis=0)
    found: dict[str, list[float]] = {}
    for i, role in enumerate(roles(ids, vocabulary)):
        if i and ids[i] != vocabulary.pad and int(ids[i]) not in vocabulary.continues:
            found.setdefault(role.replace("boiler-plate", "other"), []).append(share[i])
    return {role: float(np.mean(shares)) for role, shares in found.items()}


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


@torch.no_grad()
def reconstructions(model: ECAMP, batch: Batch, titles: Sequence[str], mean: float, std: float) -> Figure:
    """Visible patches, reconstruction, super-resolved image (if the model has one) and original of a batch, in rows.

    The orange frame is the window of the super-resolution loss.

    Args:
        mean, std: of the images' normalisation.
    """
    out = model.forward_intermediates(batch)[1]
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
