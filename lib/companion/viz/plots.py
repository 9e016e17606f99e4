"""Figures in the house style: images, attention overlays, curves, bars, boxes, radar, t-SNE."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import BadParameter, check_choice, check_range
from .style import COLOURS, HEAT, STYLE, method_colours, styled

_DPI = STYLE["figure.dpi"]
_PHOTO_PIXELS = 120_000  # a photograph takes about 2 bytes a pixel as PNG: this keeps a figure of them below 300 kB
_DASHES = ("-", "--", ":", "-.")


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A model's input (3, H, W) as an RGB image (H, W, 3) in 0 to 1. Raises `BadParameter`: another shape."""
    if image.ndim != 3 or not len(image) == len(mean) == len(std) == 3:
        given = f"{tuple(image.shape)}, {len(mean)} means and {len(std)} deviations"
        raise BadParameter("image", given, "(3, H, W), 3 means and 3 standard deviations")
    rgb = image.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return rgb.clamp(0, 1).permute(1, 2, 0).numpy()


def overlay(
    ax: Axes,
    image: Tensor,
    heat: Tensor,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    limits: tuple[float, float] | None = None,
    mode: str = "bilinear",
    colour_bar: bool = False,
) -> AxesImage:
    """Draw `heat` in colour over the image in grey.

    Args:
        image: (3, H, W), normalised with `mean` and `std`.
        heat: (rows, columns), stretched over the image.
        limits: the heat's values at the two ends of the colours; default its smallest and largest.
        mode: "bilinear" or "nearest" (each patch a square).

    Returns:
        The heat's artist, for a colour bar of several images.
    """
    check_choice("mode", mode, ("bilinear", "nearest"))
    grey = denormalise(image, mean, std) @ np.array([0.299, 0.587, 0.114])
    height, width = grey.shape
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    values = torch.as_tensor(heat).detach().float().cpu().numpy()
    low, high = limits or (values.min(), values.max())
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    drawn = ax.imshow(values, cmap=HEAT, vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation=mode)
    ax.set_axis_off()
    if colour_bar:
        ax.figure.colorbar(ScalarMappable(Normalize(low, high), HEAT), ax=ax, shrink=0.85)
    return drawn


def _panel(count: int) -> float:
    """Side of one of `count` photographs in inches, so that all of them together make a small PNG."""
    return float(np.clip(math.sqrt(_PHOTO_PIXELS / count) / _DPI, 0.8, 1.4))


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], loc: Any) -> None:
    """A legend of as many columns as fit the figure's width."""
    longest = max(map(len, labels)) * 5.4 + 40  # points: letters of the legend, its line and gaps
    columns = int(np.clip(figure.get_figwidth() * 72 // longest, 1, len(labels)))
    figure.legend(handles, labels, loc=loc, ncols=columns)


def _wrap(text: str, inches: float, size: float = 8.5) -> str:
    """Break `text` into lines that fit; DejaVu's letters are about 0.6 of their size wide, some wider."""
    return textwrap.fill(str(text), max(8, int(inches * 72 / (0.62 * size))))


@styled
def show_images(
    images: Tensor,
    titles: Sequence[str] | None = None,
    columns: int = 6,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> Figure:
    """A grid of images (number, 3, H, W), normalised with `mean` and `std`, each below its title.

    Raises `BadParameter`: no image, or not one title each."""
    check_range("number of images", len(images), 1)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    side = _panel(len(images))
    labels = [_wrap(title, side) for title in titles] if titles is not None else [""] * len(images)
    if len(labels) != len(images):
        raise BadParameter("titles", f"{len(labels)} titles", f"{len(images)}, one an image")
    lines = max(label.count("\n") + 1 if label else 0 for label in labels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * (side + 0.12), rows * (side + 0.1 + 0.17 * lines)), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, label in zip(axes.flat, images, labels, strict=False):
        ax.imshow(denormalise(image, mean, std), interpolation="nearest" if image.shape[-1] < 64 else "antialiased")
        ax.set_title(label, fontsize=8.5)
    return figure


@styled
def image_rows(
    rows: Mapping[str, Sequence[Tensor]],
    titles: Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    side: float = 1.2,
    title: str = "",
) -> Figure:
    """A grid of images, one row for each entry of `rows`, whose name stands on its left.

    Args:
        rows: a name and its images (3, H, W) in 0 to 1; a row may be shorter than the others.
        titles: above the images of the first row, or by the name of a row above its own.
        side: of an image in inches.
        title: of the figure.

    Raises `BadParameter`: no image, or more titles than images.
    """
    check_range("images of the longest row", max(map(len, rows.values()), default=0), 1)
    above = titles if isinstance(titles, Mapping) else {next(iter(rows)): titles}
    if unknown := [name for name in above if len(above[name]) > len(rows.get(name, ()))]:
        raise BadParameter("titles", unknown, f"at most one an image, by the names of the rows: {list(rows)}")
    labels = {name: [_wrap(text, side) for text in above.get(name, ())] for name in rows}
    lines = sum(max((x.count("\n") + 1 for x in some), default=0) for some in labels.values())
    wide, names = max(map(len, rows.values())), [_wrap(name, 1.3) for name in rows]
    margin = 0.085 * max(len(line) for name in names for line in name.split("\n"))
    size = (wide * (side + 0.1) + margin, len(rows) * (side + 0.12) + 0.17 * lines + 0.3 * bool(title))
    figure, axes = plt.subplots(len(rows), wide, figsize=size, squeeze=False, layout="compressed")
    for line, (name, images) in enumerate(rows.items()):
        for ax, image, text in itertools.zip_longest(axes[line], images, labels[name]):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if image is not None:
                shown = denormalise(image, (0, 0, 0), (1, 1, 1))
                ax.imshow(shown, interpolation="nearest" if image.shape[-1] < 64 else "antialiased")
                ax.set_title(text or "", fontsize=8.5)
        axes[line, 0].set_ylabel(names[line], rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


@styled
def attention_grid(
    images: Tensor,
    rows: Mapping[str, Tensor | np.ndarray],
    titles: Sequence[str] | None = None,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    mode: str = "bilinear",
    shared: bool = False,
    label: str = "attention",
) -> Figure:
    """A grid of attention maps: a column for each image, a row for each method, the plain images on top.

    Args:
        images: (number, 3, H, W), normalised with `mean` and `std`.
        rows: a method's name and its maps: (number, rows, columns), drawn as heat over the images, or RGB colours in
            0 to 1 (number, rows, columns, 3), drawn alone.
        titles: one for each image.
        mode: see `overlay`.
        shared: one scale for all maps, with its colour bar; otherwise each map goes from its own lowest to its own
            highest value, and the bar is marked.
        label: what the colours show.
    """
    for name, maps in rows.items():
        if len(maps) != len(images):
            raise BadParameter("rows", f"{name}: {len(maps)} maps", f"{len(images)} maps, one an image")
    check_range("number of images", len(images), 1)
    side = _panel(len(images) * (len(rows) + 1))
    names = {"image": "image"} | {name: _wrap(name, 1.1, 9) for name in rows}
    lines = max((_wrap(title, side).count("\n") + 1 for title in titles or ()), default=0)
    size = (len(images) * (side + 0.05) + 1.9, (len(rows) + 1) * (side + 0.05) + 0.17 * lines)
    figure, axes = plt.subplots(len(rows) + 1, len(images), figsize=size, squeeze=False, layout="compressed")
    heat = [torch.as_tensor(maps).flatten() for maps in rows.values() if maps.ndim == 3]
    limits = (torch.cat(heat).min().item(), torch.cat(heat).max().item()) if shared and heat else None
    for column, image in enumerate(images):
        axes[0, column].imshow(denormalise(image, mean, std), interpolation="antialiased")
        if titles is not None:
            axes[0, column].set_title(_wrap(titles[column], side), fontsize=8.5)
        for line, maps in enumerate(rows.values(), 1):
            if maps.ndim == 3:
                overlay(axes[line, column], image, maps[column], mean=mean, std=std, limits=limits, mode=mode)
            else:
                axes[line, column].imshow(
                    maps[column], extent=(0, image.shape[-1], image.shape[-2], 0), interpolation=mode
                )
    for line, name in enumerate(names.values()):
        axes[line, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    if not heat:
        return figure
    bar = figure.colorbar(ScalarMappable(Normalize(*(limits or (0, 1))), HEAT), ax=axes, shrink=0.75, aspect=25)
    bar.set_label(label, labelpad=3)
    bar.outline.set_visible(False)
    if not shared:
        bar.set_ticks([0, 1], labels=["lowest", "highest"])
    return figure


def tsne(features: Tensor, labels: Tensor, ax: Axes, seed: int = 0, names: Sequence[str] | None = None) -> np.ndarray:
    """Draw features (number, channels) of classes `labels` (number,) by scikit-learn's t-SNE; return the points.

    The perplexity is 30, or less for fewer than 100 points. Classes differ by colour and marker. Distances between
    groups and sizes of groups mean nothing in such a plot. Returns positions (number, 2).

    Raises `BadParameter`: fewer than two points, or not one label each.
    """
    check_range("number of features", len(features), 2)
    if len(labels) != len(features):
        raise BadParameter("labels", f"{len(labels)} labels", f"{len(features)}, one a feature")
    from sklearn.manifold import TSNE  # imported here because it takes a second

    features = features.detach().float().cpu().numpy()
    labels = np.asarray(labels)
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    for i, kind in enumerate(np.unique(labels)):
        here = points[labels == kind]
        colour, marker = COLOURS[i % len(COLOURS)], "osD^vP*X"[i // len(COLOURS) % 8]
        name = str(kind) if names is None else names[int(kind)]
        x, y = here.T
        ax.scatter(x, y, s=16, color=colour, marker=marker, edgecolors="#333333", linewidths=0.3, label=name)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, handletextpad=0.2)
    return points


@styled
def curves(histories: Mapping[str, Mapping[str, Any]], x: str = "epoch") -> Figure:
    """Training curves: one panel for each measure, one line for each method.

    Args:
        histories: method -> measure -> its values, one a step, or (seeds, steps): then the mean is drawn, and the
            range over the seeds as a band. A pandas DataFrame serves as the inner mapping. Values under the key `x`
            are the positions of the steps; without it they are counted from 1.
        x: the horizontal axis.
    """
    measures = list(dict.fromkeys(name for history in histories.values() for name in history if name != x))
    if not measures:
        raise BadParameter("histories", dict(histories), "at least one method with one measure")
    figure, axes = plt.subplots(1, len(measures), figsize=(max(4.2, 3.2 * len(measures)), 2.9), squeeze=False)
    handles: dict[str, Any] = {}
    colours = method_colours(histories)
    for ax, measure in zip(axes[0], measures, strict=True):
        for i, (method, history) in enumerate(histories.items()):
            if measure not in history:
                continue
            values = np.atleast_2d(np.asarray(history[measure], dtype=float))
            steps = np.asarray(history[x]) if x in history else np.arange(1, values.shape[1] + 1)
            (handles[method],) = ax.plot(steps, values.mean(0), _DASHES[i % 4], color=colours[method], label=method)
            if len(values) > 1:
                ax.fill_between(steps, values.min(0), values.max(0), color=colours[method], alpha=0.18, linewidth=0)
        ax.set(xlabel=x, title=measure)
        ax.grid(axis="y")
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if len(handles) > 1:
        _legend(figure, list(handles.values()), list(handles), "outside lower center")
    return figure


@styled
def bars(table: pd.DataFrame, error: pd.DataFrame | None = None, value: str = "accuracy (%)") -> Figure:
    """A bar chart: a group for each row (task), a bar for each column (method), labelled with its value.

    Args:
        table: the values; a missing one (NaN) is left out.
        error: the standard deviations, same rows and columns, drawn as whiskers on both sides.
        value: what the values are, with their unit.
    """
    if error is not None and not (table.index.equals(error.index) and table.columns.equals(error.columns)):
        raise BadParameter("error", list(error.columns), f"the rows and columns of the table: {list(table.columns)}")
    groups, methods = len(table.index), len(table.columns)
    thick = 0.19  # inches a bar: a number at 8 points fits next to it
    figure, ax = plt.subplots(figsize=(6.4, groups * (methods * thick + 0.14) + 0.75 + 0.2 * math.ceil(methods / 4)))
    step = 1 / (methods + 0.14 / thick)
    colours = method_colours(map(str, table.columns))
    for i, (method, colour) in enumerate(zip(table.columns, colours.values(), strict=True)):
        positions = np.arange(groups) + (i - (methods - 1) / 2) * step
        values = table[method].to_numpy(dtype=float)
        spread = np.zeros(groups) if error is None else np.nan_to_num(error[method].to_numpy(dtype=float))
        ax.barh(
            positions,
            values,
            step * 0.86,
            xerr=None if error is None else spread,
            color=colour,
            label=str(method),
            error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2},
        )
        for y, number, reach in zip(positions, values, spread, strict=True):
            if math.isfinite(number):
                text = f"{number:.1f}" if error is None else f"{number:.1f} ± {reach:.1f}"
                ax.annotate(
                    text, (max(number + reach, 0), y), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
    ax.set_yticks(range(groups), [_wrap(name, 1.5) for name in table.index])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.margins(x=0.14, y=0.01)
    if not (table < 0).any(axis=None):  # also where a whisker would go below
        ax.set_xlim(left=0)
    ax.grid(axis="x")
    ax.set_xlabel(value)
    if methods > 1:
        _legend(figure, *ax.get_legend_handles_labels(), "outside upper center")
    return figure


@styled
def scores(rows: pd.DataFrame, panels: Mapping[tuple[str, str], Iterable[str]]) -> Figure:
    """Test scores of a study: a panel for each (task, metric), a line for each method, a dot a seed, a bar at the mean.

    Variants are grey: there are more of them than colours, and each line has its name.

    Args:
        rows: of `evaluation.ablations.read`.
        panels: the methods of each panel, from top to bottom.
    """
    heights = [len(list(methods)) for methods in panels.values()]
    colours = method_colours((method for methods in panels.values() for method in methods), "#767676")
    figure, axes = plt.subplots(
        len(panels), figsize=(6.4, 0.28 * sum(heights) + 0.55 * len(panels) + 0.2), height_ratios=heights, squeeze=False
    )
    for ax, ((task, metric), methods) in zip(axes[:, 0], panels.items(), strict=True):
        tested = rows[(rows.stage == "test") & (rows.task == task)].groupby("method")[metric]
        for y, method in enumerate(methods):
            values = tested.get_group(method)
            ax.plot(values, [y] * len(values), "o", color=colours[method], markersize=5, alpha=0.6, markeredgewidth=0)
            ax.plot(values.mean(), y, "|", color=colours[method], markersize=15, markeredgewidth=2.5)
        ax.set_yticks(range(len(list(methods))), list(methods))
        difference = metric.endswith(("base gain", "lead"))  # of percentages
        unit = "points" if difference else "dB" if "PSNR" in metric else "%"
        if difference:
            ax.axvline(0, color="black", linewidth=0.8)
        ax.set(ylim=(len(list(methods)) - 0.5, -0.5), xlabel=f"{metric} ({unit}) on “{task}”, synthetic test images")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    return figure


def heat_cells(
    ax: Axes, values: np.ndarray, limits: tuple[float, float], text: str = ".0f", least: float = -math.inf
) -> AxesImage:
    """Draw values (rows, columns) as colours between `limits`, with their numbers; NaN is left white, with a dash.

    Args:
        text: format of the numbers.
        least: smaller values have no number.
    """
    drawn = ax.imshow(np.ma.masked_invalid(values), cmap=HEAT, vmin=limits[0], vmax=limits[1], aspect="auto")
    middle = limits[0] + 0.6 * (limits[1] - limits[0])
    for (row, column), value in np.ndenumerate(values):
        if not value < least:
            number = "–" if math.isnan(value) else f"{value:{text}}"
            colour = "white" if value < middle else "black"
            ax.text(column, row, number, ha="center", va="center", fontsize=8, color=colour)
    return drawn


@styled
def heat_table(
    table: pd.DataFrame,
    label: str,
    limits: tuple[float, float],
    frames: Mapping[str, tuple[int, int]] = {},
    title: str = "",
) -> Figure:
    """A table as colours, with its numbers and a colour bar; NaN is left white.

    Args:
        label: what the values are, with their unit.
        limits: the values at the two ends of the colours.
        frames: column -> first and last row of a frame around its cells.
    """
    values, (rows, columns) = table.to_numpy(dtype=float), table.shape
    names = [str(name) for name in table.columns]
    longest = max(len(word) for name in names for word in name.replace("-", " ").split())
    wide = float(np.clip(0.07 * longest + 0.04, 0.4, 0.8))  # inches a column: its longest word fits
    figure, ax = plt.subplots(figsize=(wide * columns + 2.2, max(0.3 * rows + 1, 2.2)))
    drawn = heat_cells(ax, values, limits)
    for name, (first, last) in frames.items():
        corner = (list(table.columns).index(name) - 0.47, first - 0.5)
        ax.add_patch(Rectangle(corner, 0.94, last - first + 1, fill=False, edgecolor="#56B4E9", linewidth=2.2))
    ax.set_yticks(range(rows), [str(name) for name in table.index])
    ax.set_xticks(range(columns), [_wrap(name, wide, 8) for name in names], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    figure.colorbar(drawn, ax=ax, aspect=18, pad=0.02, label=label)
    return figure


@styled
def confusion(truth: Sequence[int], predicted: Mapping[str, Sequence[int]], names: Sequence[object]) -> Figure:
    """A confusion matrix for each method: the share of each true class that is predicted as each class, in percent.

    Args:
        truth: labels (n,), 0 to the number of classes - 1.
        predicted: method -> its labels (n,).
        names: of the classes; long ones are written upwards on the axis of the predicted classes.
    """
    classes, longest = len(names), max(len(str(name)) for name in names)
    side, margin = max(2.0, 0.3 * classes), 0.07 * longest
    size = (side * len(predicted) + 0.9 + margin, side + 0.6 + margin)
    figure, axes = plt.subplots(1, len(predicted), figsize=size, squeeze=False)
    for ax, (method, labels) in zip(axes[0], predicted.items(), strict=True):
        counts = np.zeros((classes, classes))
        np.add.at(counts, (np.asarray(truth), np.asarray(labels)), 1)
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        drawn = heat_cells(ax, shares, (0, 100), least=0.5)
        ax.set_aspect("equal")
        ax.set(title=method, xlabel="predicted")
        ax.set_xticks(range(classes), names, rotation=90 if longest > 2 else 0)
        ax.set_yticks(range(classes), names if ax is axes[0, 0] else [""] * classes)
    axes[0, 0].set_ylabel("true class")
    figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=20, pad=0.02, label="% of the true class")
    return figure


def boxes(ax: Axes, image: np.ndarray, drawn: Mapping[str, Sequence[float]]) -> None:
    """Show an image (H, W, 3) uint8 with boxes on it: colour (as matplotlib names it) -> x, y, w, h in pixels."""
    ax.imshow(image, interpolation="antialiased")
    for colour, (x, y, w, h) in drawn.items():
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, linewidth=1.3))
    ax.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def boxed(image: np.ndarray, boxes: Mapping[str, Sequence[float]], scale: int = 2) -> np.ndarray:
    """A video frame with boxes drawn into its pixels, enlarged so that thin lines stay sharp.

    Args:
        image: (H, W, 3) uint8.
        boxes: colour (as matplotlib names it) -> x, y, w, h in pixels; later ones are drawn over earlier ones.
        scale: how many pixels each pixel becomes, each way.

    Returns:
        (scale * H, scale * W, 3) uint8.
    """
    large = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(large)
    for colour, (x, y, w, h) in boxes.items():
        corners = np.array([x, y, x + w, y + h]) * scale
        pen.rectangle(corners.round().tolist(), outline=to_hex(colour), width=max(1, scale))
    return np.asarray(large)


@styled
def radar(tables: Mapping[str, Mapping[str, float]], low: float = 0.0, high: float = 100.0) -> Figure:
    """One radar for each table: its rows around the circle, from `low` at the centre to `high` at the rim."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.9 * len(tables), 3.9), squeeze=False, subplot_kw={"projection": "polar"}
    )
    for i, (ax, (name, rows)) in enumerate(zip(axes[0], tables.items(), strict=True)):
        turns = np.linspace(0, 2 * np.pi, len(rows), endpoint=False)
        spokes, values = [*turns, turns[0]], [*rows.values(), next(iter(rows.values()))]
        ax.plot(spokes, values, color=COLOURS[i], linewidth=1.6)
        ax.fill(spokes, values, color=COLOURS[i], alpha=0.15)
        ax.set_xticks(turns, [f"{row}\n{value:.1f}" for row, value in rows.items()], fontsize=8)
        ax.set(ylim=(low, high), title=name)
        ax.set_yticks(np.linspace(low, high, 5)[1:], labels=[])
        ax.tick_params(axis="x", pad=6)
        ax.set_theta_zero_location("N")
        ax.set_theta_direction(-1)
    return figure
