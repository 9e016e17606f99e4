"""Figures of PromptPAR alone: mask and strips, label weights, maps of region and attribute tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.style import COLOURS, HEAT, styled

HALF = (0.5, 0.5, 0.5)  # mean and std of PromptPAR's normalisation of images
_VISIBLE = ListedColormap(["#e3e3e3", COLOURS[0]])  # not attended to; attended to


@styled
def mask(forbidden: Tensor, groups: int, title: str) -> Figure:
    """The attention mask of a sequence: which token (row) attends to which (column).

    Args:
        forbidden: (L, L) as `model.region_mask` returns it, of groups of equal size.
        groups: tokens of the groups together; the patches follow.
    """
    figure, ax = plt.subplots(figsize=(4.9, 3.7))
    ax.imshow(~forbidden.numpy(), cmap=_VISIBLE, interpolation="nearest")
    size, patches = groups / 5, (groups + len(forbidden)) / 2
    names = ["CLS, $P_0$", *(f"$LC_{r}, P_{r}$" for r in range(1, 5)), "patches"]
    ax.set_yticks([*((r + 0.5) * size - 0.5 for r in range(5)), patches], names)
    ax.set_xticks([groups / 2, patches], ["groups", "patches, row by row"])
    ax.set(xlabel="key", ylabel="query", title=title)
    ax.tick_params(length=0)
    handles = [Rectangle((0, 0), 1, 1, color=_VISIBLE(i)) for i in (1, 0)]
    figure.legend(handles, ["attends", "masked"], loc="outside right center")
    return figure


@styled
def strips(rows: Mapping[str, Tensor]) -> Figure:
    """The patches that each region token attends to: a row of panels for each entry (R, rows, columns) of bools."""
    count = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), count, figsize=(6.6, 1.55 * len(rows) + 0.2), squeeze=False)
    for line, (name, seen) in zip(axes, rows.items(), strict=True):
        for r, (ax, strip) in enumerate(zip(line, seen, strict=True), 1):
            ax.imshow(strip.numpy(), cmap=_VISIBLE, vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], title=f"strip {r}: {int(strip.sum())} patches")
        line[0].set_ylabel(name)
    return figure


@styled
def weights_and_schedule(
    share: np.ndarray, present: np.ndarray, absent: np.ndarray, rates: Mapping[str, np.ndarray]
) -> Figure:
    """The weight of a label by the share of images with the attribute, and the learning rate of each epoch by group."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.7))
    left.plot(share, present, label="attribute present", color=COLOURS[0])
    left.plot(share, absent, "--", label="attribute absent", color=COLOURS[1])
    left.set(xlabel="share r of training images with the attribute", ylabel="weight of the label")
    for (group, values), line, colour in zip(rates.items(), ("-", "--"), (COLOURS[2], COLOURS[4]), strict=True):
        right.plot(np.arange(1, len(values) + 1), values, line, label=group, color=colour)
    right.set(xlabel="epoch", ylabel="learning rate")
    for ax in (left, right):
        ax.legend()
        ax.grid(axis="y")
    return figure


@styled
def people(images: Tensor, truth: Tensor, names: Sequence[str], title: str) -> Figure:
    """Images (n, 3, H, W), each above the names of its attributes, `truth` (n, A); with many, their number."""
    figure, axes = plt.subplots(1, len(images), figsize=(8.6, 3.3), squeeze=False)
    for ax, image, labels in zip(axes[0], images, truth, strict=True):
        ax.imshow(
            plots.denormalise(image, HALF, HALF), interpolation="nearest" if image.shape[-1] < 64 else "antialiased"
        )
        named = [name for name, label in zip(names, labels, strict=True) if label == 1]
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel("\n".join(named) if len(names) < 16 else f"{len(named)} attributes", loc="left", fontsize=8)
        ax.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure


@styled
def region_maps(image: Tensor, maps: Mapping[str, Tensor], title: str) -> Figure:
    """The attention of [CLS] and of each region token, a row for each method behind the image; one colour bar.

    The colours end at the 97th percentile of all shares: a few patches with more have the brightest colour.

    Args:
        image: (3, H, W), shown with its contrast stretched.
        maps: method -> (1 + R, rows, columns), the share of each patch in the attention to patches.
    """
    count, high = 1 + max(map(len, maps.values())), image.shape[1] / image.shape[2]
    size = (1.15 * count + 1.4, (1.05 * high + 0.3) * len(maps) + 0.35)
    figure, axes = plt.subplots(len(maps), count, figsize=size, squeeze=False)
    top = float(np.percentile(np.concatenate([100 * found.cpu().numpy().ravel() for found in maps.values()]), 97))
    stretched = (image - image.min()) / (image.max() - image.min())
    for line, (method, found) in zip(axes, maps.items(), strict=True):
        line[0].imshow(plots.denormalise(stretched, (0, 0, 0), (1, 1, 1)), interpolation="antialiased")
        line[0].set_ylabel(method.replace(", ", ",\n"))
        for r, (ax, heat) in enumerate(zip(line[1:], found, strict=False)):
            drawn = ax.imshow(
                100 * heat.cpu().numpy(), cmap=HEAT, vmin=0, vmax=top, aspect=high * heat.shape[1] / len(heat)
            )
            ax.set_title(f"$LC_{r}$" if r else "CLS")
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=22, extend="max")
    bar.set_label("share of the attention (%)")
    figure.suptitle(title)
    return figure


@styled
def attribute_maps(images: Tensor, attention: Tensor, cosines: Tensor, titles: Sequence[str]) -> Figure:
    """For each image (3, H, W): its attention and cosine map of an attribute, both (n, rows, columns), with bars."""
    figure, axes = plt.subplots(1, 3 * len(images), figsize=(1.5 * 3 * len(images), 2.4), squeeze=False, dpi=72)
    for k, image in enumerate(images):
        ax, *others = axes[0, 3 * k : 3 * k + 3]
        ax.imshow(plots.denormalise(image, HALF, HALF), interpolation="antialiased")
        ax.set(xticks=[], yticks=[])
        ax.set_title(titles[k], fontsize=9)
        maps = {"attention (%)": 100 * attention[k], "cosine": cosines[k]}
        for other, (name, heat) in zip(others, maps.items(), strict=True):
            plots.overlay(other, image, heat, mode="nearest", alpha=0.75, colour_bar=True, mean=HALF, std=HALF)
            other.set_title(name, fontsize=9)
    return figure
