"""The figures of SIC-CADS' notebook: scenes, image-level scores, boxes before and after, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou, nms

from ...viz.style import HEAT, method_colours, styled
from .model import windows
from .predictions import BRANCHES, Predictions, Setting, refined

BASE, NOVEL = "#5a5a5a", "#D55E00"  # of classes; no branch has these colours
CORRECT, WRONG = "#00c060", "#ff3030"
RELEASED = {"gamma": (0.5, 0.7), "lambda_base": (0.8,), "lambda_novel": (0.5, 0.8)}  # LVIS and COCO


def _names(setting: Setting, labels: Iterable[int], most: int = 4) -> str:
    """Class names, two in a line."""
    names = [setting.names[label] for label in list(labels)[:most]]
    return "\n".join(", ".join(names[i : i + 2]) for i in range(0, len(names), 2))


def _show(ax: Axes, image: Tensor) -> None:
    height, width = image.shape[1:]
    ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if width < 128 else "antialiased")
    ax.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    ax.spines[:].set_visible(False)


def _box(ax: Axes, box: Tensor, colour: str, style: str = "-") -> None:
    x, y, x2, y2 = box.tolist()
    corner = (x - 0.5, y - 0.5)
    ax.add_patch(Rectangle(corner, x2 - x, y2 - y, fill=False, edgecolor=colour, linewidth=1.6, linestyle=style))


@styled
def scenes(setting: Setting, count: int = 6) -> Figure:
    """The first test images with their boxes, of base classes in white, of novel classes in orange."""
    count = min(count, len(setting.test))
    figure, axes = plt.subplots(1, count, figsize=(1.5 * count + 0.1, 2.15), squeeze=False)
    for ax, index in zip(axes[0], range(count), strict=True):
        image, target = setting.test[index]
        _show(ax, image)
        for box, label in zip(target.boxes, target.labels.tolist(), strict=True):
            _box(ax, box, NOVEL if setting.novel[label] else "white")
        ax.set_xlabel(_names(setting, target.labels.tolist()), fontsize=8.5)
    figure.suptitle(f"{setting.title}: test images; boxes of base classes white, of novel classes orange", fontsize=9)
    return figure


@styled
def image_scores(setting: Setting, found: Predictions, index: int, branches: Sequence[str], most: int = 16) -> Figure:
    """One image and its image-level probabilities by branch, the classes in order of the setting's branch."""
    image, target = setting.test[index]
    order = found.p[setting.branch][index].argsort(descending=True)[:most]
    figure, (left, ax) = plt.subplots(1, 2, figsize=(9.0, 3.1), width_ratios=[1, 3.2])
    _show(left, image)
    left.set_title(setting.title)
    width = 0.8 / len(branches)
    for number, (branch, colour) in enumerate(method_colours(branches).items()):
        shift = (number - (len(branches) - 1) / 2) * width
        ax.bar(np.arange(len(order)) + shift, found.p[branch][index][order].numpy(), width, color=colour, label=branch)
    present = set(target.labels.tolist())
    for x, label in enumerate(order.tolist()):
        if label in present:
            ax.plot(x, 1.03, "o", color="black", markersize=5)
    ax.set_xticks(range(len(order)), [setting.names[i] for i in order], rotation=45, ha="right")
    for tick, label in zip(ax.get_xticklabels(), order.tolist(), strict=True):
        tick.set_color(NOVEL if setting.novel[label] else BASE)
    ax.set(ylim=(0, 1.09), ylabel="image-level probability")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 1.2), ncols=len(branches))
    return figure


@styled
def patch_cosines(setting: Setting, index: int, cosines: Tensor, levels: int = 2) -> Figure:
    """CLIP's crops of an image, and below each its cosines (P, C) with the names of the classes that are present."""
    image, target = setting.test[index]
    labels = sorted(set(target.labels.tolist()))[:6]
    height, width = image.shape[1:]
    crops = windows(height, width, levels)
    figure = plt.figure(figsize=(1.35 * len(crops) + 1.6, 1.7 + 0.4 * len(labels)))
    grid = figure.add_gridspec(2, len(crops), height_ratios=[1.25, 0.4 * len(labels)])
    above = [figure.add_subplot(grid[0, column]) for column in range(len(crops))]
    for number, (ax, (left, top, right, bottom)) in enumerate(zip(above, crops, strict=True)):
        _show(ax, image[:, top:bottom, left:right])
        ax.set_title("whole image" if number == 0 else f"crop {number}", fontsize=9)
    ax = figure.add_subplot(grid[1, :])
    drawn = ax.imshow(cosines[:, labels].T.numpy(), cmap=HEAT, aspect="auto")
    middle = (drawn.get_clim()[0] + drawn.get_clim()[1]) / 2
    for row, label in enumerate(labels):
        best = 1 + int(cosines[1:, label].argmax()) if len(crops) > 1 else 0
        corner = (best - 0.47, row - 0.44)
        ax.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor="#56b4e9", linewidth=2.5))
        for patch, value in enumerate(cosines[:, label].tolist()):
            colour = "black" if value > middle else "white"
            ax.text(patch, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    ax.set_yticks(range(len(labels)), [setting.names[c] for c in labels])
    ax.set_xticks([])
    figure.colorbar(drawn, ax=[*above, ax], label="cosine", shrink=0.8, aspect=15)
    return figure


def best_boxes(setting: Setting, found: Predictions, index: int, gamma: float) -> list[tuple[int, int, float, bool]]:
    """The best boxes of an image, as many as it has objects: row, class, score, and whether the class is correct."""
    scores, labels = refined(setting, found, index, gamma=gamma).max(1)
    target, best = setting.test.target(index), []
    for row in nms(found.boxes[index], scores, 0.3)[: len(target.labels)].tolist():
        same = target.boxes[target.labels == labels[row]]
        correct = bool(len(same)) and box_iou(found.boxes[index][row, None], same).max().item() >= 0.5
        best.append((row, labels[row].item(), scores[row].item(), correct))
    return best


def _predicted(ax: Axes, setting: Setting, found: Predictions, index: int, best: Sequence[tuple]) -> None:
    image, _ = setting.test[index]
    _show(ax, image)
    height, width = image.shape[1:]
    for row, label, score, correct in best:
        box, colour = found.boxes[index][row], CORRECT if correct else WRONG
        _box(ax, box, colour, "-" if correct else "--")
        x, y = box[:2].tolist()
        inside = y < 0.1 * height
        corner = min(max(x, 0.01 * width), 0.62 * width), max(y, 0) + 0.5 if inside else y - 1
        name = ax.text(*corner, f"{setting.names[label]} {score:.2f}", fontsize=8, color="white")
        name.set(va="top" if inside else "bottom")
        name.set_bbox({"facecolor": "#00803c" if correct else "#c00000", "pad": 0.8, "linewidth": 0})


@styled
def before_after(setting: Setting, found: Predictions, images: Sequence[int]) -> Figure:
    """The best boxes of some images, above by the detector alone, below refined."""
    figure, axes = plt.subplots(2, len(images), figsize=(2.3 * len(images), 4.9), squeeze=False)
    for column, index in enumerate(images):
        for ax, gamma in zip(axes[:, column], (0.0, setting.gamma), strict=True):
            _predicted(ax, setting, found, index, best_boxes(setting, found, index, gamma))
        axes[0, column].set_title(_names(setting, setting.test.target(index).labels.tolist()), fontsize=8.5)
    axes[0, 0].set_ylabel("detector alone")
    axes[1, 0].set_ylabel(f"refined, γ = {setting.gamma:g}")
    figure.suptitle(f"{setting.title}; above each column the classes that are present", fontsize=9)
    return figure


@styled
def refined_at(setting: Setting, found: Predictions, index: int, gamma: float) -> Figure:
    """The best boxes of an image at `gamma`, and its eight highest (box, class) scores."""
    best = best_boxes(setting, found, index, gamma)
    matrix = refined(setting, found, index, gamma=gamma)[[row for row, *_ in best]]
    pairs = [(score, box, label) for box, line in enumerate(matrix.tolist(), 1) for label, score in enumerate(line)]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:8]
    dpi = 80 if setting.test[index][0].shape[-1] < 128 else 60  # an explorer holds many photographs
    figure, (left, ax) = plt.subplots(1, 2, figsize=(6.6, 2.7), dpi=dpi, width_ratios=[1, 1.15])
    _predicted(left, setting, found, index, best)
    for number, (row, *_) in enumerate(best, 1):
        x, y, x2, y2 = found.boxes[index][row].tolist()
        style = {"fontsize": 9, "color": "white", "ha": "center", "va": "center", "fontweight": "bold"}
        left.text((x + x2) / 2, (y + y2) / 2, str(number), **style)
    colours = [NOVEL if setting.novel[label] else BASE for _, _, label in pairs]
    ax.barh(range(len(pairs)), [score for score, *_ in pairs], color=colours)
    ax.set_yticks(range(len(pairs)), [f"box {box}: {setting.names[label]}" for _, box, label in pairs])
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="score (grey: base class, orange: novel class)")
    names = ", ".join(setting.names[i] for i in setting.test.target(index).labels.tolist()[:4])
    ax.set_title(f"present: {names}", fontsize=8.5)
    return figure


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweep(rows: pd.DataFrame, group: str, name: str) -> tuple[list[float], pd.DataFrame]:
    """The values of a swept parameter, and AP50 at each of them, a row a seed."""
    columns = [column for column in rows.columns if column.startswith(f"{group}, {name} ")]
    return [float(column.rpartition(" ")[2]) for column in columns], rows[columns]


@styled
def gamma_curves(rows: pd.DataFrame) -> Figure:
    """AP50 against gamma for each branch: the mean over the seeds, and for SIC-CADS one standard deviation.

    Args:
        rows: the test rows of the study, of one task.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.3))
    for ax, group in zip(axes, ("novel", "base"), strict=True):
        for method, colour in method_colours(BRANCHES).items():
            values, own = _sweep(rows[rows.method == method], group, "gamma")
            ax.plot(values, own.mean(), color=colour, linewidth=2.4 if method == "SIC-CADS" else 1.4, label=method)
            if method == "SIC-CADS":
                low, high = own.mean() - own.std(), own.mean() + own.std()
                ax.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
        for released in RELEASED["gamma"]:
            ax.axvline(released, color="grey", linewidth=0.9, linestyle=":")
        ax.set(xlabel="γ", ylabel=f"AP50 of {group} classes (%)", xlim=(0, 1))
        ax.grid()
    axes[0].set_ylim(35, 85)
    axes[1].set_ylim(85, 97)
    figure.suptitle("synthetic test images; dotted: released γ; band: one std of SIC-CADS over the seeds", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


@styled
def lambda_curves(rows: pd.DataFrame) -> Figure:
    """The gain of AP50 against each lambda, mean and standard deviation over the seeds.

    Args:
        rows: the test rows of SIC-CADS in the study, of one task.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.0))
    letters = {"lambda_base": r"$\lambda_B$", "lambda_novel": r"$\lambda_N$"}
    for ax, (name, letter) in zip(axes, letters.items(), strict=True):
        for group, colour in (("novel", NOVEL), ("base", BASE)):
            values, own = _sweep(rows, group, name)
            gain = own.sub(rows[f"{group}, gamma 0.0"], axis=0)
            ax.errorbar(values, gain.mean(), gain.std(), color=colour, capsize=3, label=f"{group} classes")
        for value in RELEASED[name]:
            ax.axvline(value, color="grey", linewidth=0.9, linestyle=":")
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xlabel=letter, ylabel="gain of AP50 (points)")
    figure.suptitle("synthetic test images; dotted: released values; whiskers: one std over the seeds", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
