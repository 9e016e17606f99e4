"""Figures of PromptPAR alone: architecture, mask and strips, label weights, maps of region and attribute tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz import plots
from ...viz.style import COLOURS, HEAT, styled

HALF = (0.5, 0.5, 0.5)  # mean and std of PromptPAR's normalisation of images
_VISIBLE = ListedColormap(["#e3e3e3", COLOURS[0]])  # not attended to; attended to


def architecture(image: np.ndarray, spans: Sequence[tuple[float, float]]) -> Figure:
    """The method from the image and the sentences to the logits, and the similarity of the loss.

    Args:
        image: (H, W, 3) uint8, synthetic.
        spans: top and bottom of each strip, as shares of the height.
    """
    groups = [f"$LC_{r}, P_{r}$" for r in range(1, len(spans) + 1)]
    rows = [0.8, *(1.9 + 0.62 * r for r in range(len(spans)))]
    middle, last = rows[2] + 0.31, rows[-1]
    nodes = {"all\npatches": (1.15, rows[0], "tensor"), "CLS (frozen), $P_0$": (2.3, rows[0], "trained")}
    for r, (name, y) in enumerate(zip(groups, rows[1:], strict=True), 1):
        nodes |= {f"strip {r}": (1.15, y, "tensor"), name: (2.3, y, "trained")}
    tower, fusion, head = "CLIP\nimage\ntower (3)", "ViT block\n(5)", "a head for\neach attribute\n(6)"
    similarity = "softmax over\nattributes, pick\n(7), (8)"
    nodes |= {
        tower: (3.6, middle, "frozen"),
        "$v$": (4.45, middle, "tensor"),
        "“a pedestrian in red shoes”, …": (2.1, 0.1, "tensor"),
        "CLIP text tower": (4.15, 0.1, "frozen"),
        "$T$": (5.45, 0.1, "tensor"),
        "$T$ ": (5.45, last, "tensor"),
        "$W_t$": (5.45, 0.95, "trained"),
        fusion: (5.45, middle, "frozen"),
        head: (6.85, middle, "trained"),
        "logits $z$": (8.05, middle, "tensor"),
        similarity: (6.85, last, "operation"),
        "$q$, in the\nloss alone": (8.05, last, "tensor"),
    }
    arrows = [("all\npatches", "CLS (frozen), $P_0$"), *((f"strip {r}", name) for r, name in enumerate(groups, 1))]
    arrows += [(name, tower) for name in ("CLS (frozen), $P_0$", *groups)] + [(tower, "$v$"), ("$v$", fusion)]
    arrows += [("“a pedestrian in red shoes”, …", "CLIP text tower"), ("CLIP text tower", "$T$"), ("$T$", "$W_t$")]
    arrows += [("$W_t$", fusion), (fusion, head), (head, "logits $z$")]
    arrows += [("$v$", similarity), ("$T$ ", similarity), (similarity, "$q$, in the\nloss alone")]
    figure = plots.diagram({name: (x, y + 0.35, kind) for name, (x, y, kind) in nodes.items()}, arrows)
    ax, height = figure.axes[0], len(image)
    shown = [image, *(image[round(a * height) : round(b * height)] for a, b in spans)]
    for y, part in zip(rows, shown, strict=True):
        small = OffsetImage(part, zoom=1.25, interpolation="nearest")
        ax.add_artist(AnnotationBbox(small, (0.4, y + 0.35), pad=0.1, bboxprops={"edgecolor": "#767676"}))
    return figure


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
