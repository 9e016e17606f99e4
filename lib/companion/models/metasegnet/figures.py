"""Figures of MetaSegNet alone: maps of land cover, and the attention of positions to words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.attention import Recorder
from ...viz.style import HEAT, method_colours, styled
from .model import MetaSegNet

ONLY = method_colours(["MetaSegNet", "unimodal"])
"""Colours of the pixels that one network alone predicts correctly."""


def painted(image: np.ndarray | Tensor, classes: Mapping[str, str]) -> Tensor:
    """An RGB image (3, H, W) in 0 to 1: labels (H, W) in the colours of the classes, unlabelled pixels black."""
    image = torch.as_tensor(image)
    if image.ndim == 3:
        return image
    colours = torch.tensor([to_rgb(colour) for colour in (*classes.values(), "black")])
    return colours[image.long().clamp_max(len(classes))].permute(2, 0, 1)


def differing(truth: Tensor, predicted: Mapping[str, Tensor]) -> Tensor:
    """An image (3, H, W): pixels that one network of `ONLY` alone predicts correctly in its colour, others grey."""
    correct = {name: predicted[name] == truth for name in ONLY}
    drawn = torch.full((*truth.shape, 3), 0.93)
    for name, other in itertools.permutations(ONLY):
        drawn[correct[name] & ~correct[other]] = torch.tensor(to_rgb(ONLY[name]))
    return drawn.permute(2, 0, 1)


@styled
def land_cover(
    rows: Mapping[str, Sequence[np.ndarray | Tensor]],
    classes: Mapping[str, str],
    titles: Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    side: float = 1.2,
    title: str = "",
) -> Figure:
    """A grid of images (3, H, W) and label maps (H, W), with a legend of the classes; arguments as `image_rows`."""
    coloured = {name: [painted(image, classes) for image in images] for name, images in rows.items()}
    figure = plots.image_rows(coloured, titles, side=side, title=title)
    legend(figure, classes)
    return figure


def legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """Squares with names below a figure, in as few rows as its width allows."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="#333333", linewidth=0.5) for c in colours.values()]
    points = sum(5.4 * len(name) + 34 for name in colours)  # letters, square and gap
    columns = math.ceil(len(colours) / math.ceil(points / (72 * figure.get_figwidth())))
    figure.legend(handles, list(colours), loc="outside lower center", ncols=columns, handlelength=1, columnspacing=1)


@torch.no_grad()
def attention(model: MetaSegNet, images: Tensor, texts: Sequence[str] | Tensor) -> dict[int, Tensor]:
    """The attention (B, h, w, L) of each position to each word by stage, mean over heads; texts as in `forward`."""
    with Recorder(model, ["fusions.*"]) as record:
        _, out = model.eval().forward_intermediates(images, texts)
    return {
        int(k): rearrange(each.mean(1), "b (h w) l -> b h w l", h=out["fused"][int(k) - 1].shape[-2])
        for k, each in zip(model.fusions, record.maps, strict=True)
    }


@styled
def word_maps(image: Tensor, maps: Mapping[str, Tensor], words: Sequence[str], shown: Sequence[int]) -> Figure:
    """Attention of each position to some words: a row for each stage, a column for each word, one colour scale.

    Args:
        image: (3, H, W) in 0 to 1.
        maps: stage -> attention (h, w, L).
        words: the L words. shown: the indices of those drawn.
    """
    size = (8.4, 1.02 * len(maps) + 0.3)
    figure, axes = plt.subplots(len(maps), 1 + len(shown), figsize=size, squeeze=False, layout="compressed")
    scale = Normalize(0, max(float(m[..., list(shown)].max()) for m in maps.values()))
    for line, (stage, attention) in zip(axes, maps.items(), strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy())
        line[0].set_ylabel(f"{stage}\n{attention.shape[0]} × {attention.shape[1]}")
        for ax, index in zip(line[1:], shown, strict=True):
            ax.imshow(attention[..., index].numpy(), cmap=HEAT, norm=scale)
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    axes[0, 0].set_title("synthetic image", fontsize=8.5)
    for ax, index in zip(axes[0, 1:], shown, strict=True):
        ax.set_title(f"“{words[index]}” ({index + 1})", fontsize=8.5)
    bar = figure.colorbar(ScalarMappable(scale, HEAT), ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.set_label("attention, mean over heads")
    return figure


@styled
def classes_and_words(panels: Mapping[str, tuple[Sequence[str], np.ndarray]], classes: Sequence[str]) -> Figure:
    """Attention of the pixels of each class to each word, minus the mean over the classes, in percentage points.

    Args:
        panels: title -> words (L), attention (C, L) in percent.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.6, 2.75 * len(panels)), squeeze=False)
    excess = {title: values - values.mean(0) for title, (_, values) in panels.items()}
    reach = max(float(np.abs(x).max()) for x in excess.values())
    scale = Normalize(-reach, reach)
    for ax, (title, values) in zip(axes[:, 0], excess.items(), strict=True):
        drawn = ax.imshow(values, cmap="PuOr", norm=scale, aspect="auto")
        words = panels[title][0]
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
        ax.set_yticks(range(len(classes)), classes, fontsize=8)
        ax.set_title(title)
    figure.colorbar(drawn, ax=axes, aspect=25, pad=0.01, label="attention minus mean over classes (points)")
    return figure
