"""Figures of BAT alone: frames with boxes, overlap over time, attention and exchange of the streams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...data import tracking as data
from ...evaluation.metrics.tracking import iou
from ...viz import plots
from ...viz.style import method_colours, styled
from .model import BAT, STAGES, halves
from .ostrack import OSTrack

STREAMS = ("RGB", "thermal")
CHUNK = 60  # crops in one forward pass


# --- frames -----------------------------------------------------------------------------------------------------------


Boxes = Mapping[str, Mapping[str, np.ndarray]]  # method -> video -> (n, 4)


def boxes_at(video: data.Sequence, frame: int, tracked: Boxes) -> dict[str, Sequence[float]]:
    """Colour -> box of a frame: the true one white, those of the methods in their colours."""
    colours = method_colours(tracked)
    return {"white": video.boxes[frame]} | {colours[name]: tracked[name][video.name][frame] for name in colours}


@styled
def frames(video: data.Sequence, times: Sequence[int], captions: Sequence[str], tracked: Boxes | None = None) -> Figure:
    """Frames of both streams below their number and caption, with the boxes of `boxes_at` and their legend."""
    tracked = tracked or {}
    figure, axes = plt.subplots(2, len(times), figsize=(1.35 * len(times), 2.9 + 0.3 * bool(tracked)), squeeze=False)
    for column, t in zip(axes.T, times, strict=True):
        image, drawn = video.frame(t), boxes_at(video, t, tracked)
        for ax, part in zip(column, (image[..., :3], image[..., 3:]), strict=True):
            plots.boxes(ax, part, drawn)
        column[0].set_title(f"frame {t}\n{captions[t]}")
    for ax, stream in zip(axes[:, 0], STREAMS, strict=True):
        ax.set_ylabel(stream)
    colours = method_colours(tracked)
    if colours:
        lines = [plt.Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
        figure.legend(lines, list(colours), loc="outside lower center", ncols=4)
    return figure


@styled
def overlap(video: data.Sequence, captions: Sequence[str], tracked: Boxes, method: str) -> Figure:
    """IoU with the true box over a video, one line a method, `method` thicker; grey where one stream fails."""
    figure, ax = plt.subplots(figsize=(8, 3))
    for name, colour in method_colours(tracked).items():
        width = 2.4 if name == method else 1.2
        ax.plot(iou(tracked[name][video.name], video.boxes), label=name, color=colour, linewidth=width)
    edges = [0, *(t for t in range(1, len(video)) if captions[t] != captions[t - 1]), len(video)]
    for start, stop in pairwise(edges):
        if captions[start] in ("dark", "glare", "crossover"):
            grey = "#eeeeee" if captions[start] == "crossover" else "#cccccc"
            ax.axvspan(start - 0.5, stop - 0.5, color=grey, zorder=0)
        ax.text((start + stop - 1) / 2, 1.02, captions[start], ha="center", fontsize=8)
    ax.set(xlabel="frame", ylabel="IoU with the true box", ylim=(0, 1.1), xlim=(-0.5, len(video) - 0.5))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- attention and exchange -------------------------------------------------------------------------------------------


class Crops(NamedTuple):
    """Crops of a video as the tracker reads them; each search crop is around the true box of the frame before.

    Attributes:
        template: (n, 6, t, t), the same for all.
        search: (n, 6, s, s).
        boxes: (n, 4), the true box x, y, w, h in pixels of the search crop.
    """

    template: Tensor
    search: Tensor
    boxes: np.ndarray


def crops(tracker: OSTrack, video: data.Sequence, times: Iterable[int]) -> Crops:
    """The crops of `times`, each 1 or more."""
    template = data.normalise(data.crop(video.frame(0), video.boxes[0], 2, tracker.template)[0])
    search, boxes = [], []
    for t in times:
        patch, scale = data.crop(video.frame(t), video.boxes[t - 1], 4, tracker.search)
        search.append(data.normalise(patch))
        boxes.append(tracker.search * data.box_in_crop(video.boxes[t], video.boxes[t - 1], scale, tracker.search))
    return Crops(template.expand(len(search), -1, -1, -1), torch.stack(search), np.array(boxes))


class Traced(NamedTuple):
    """What one block does on n crops of f x f search tokens: for each stream, maps (n, f, f).

    Attributes:
        attention: of the template's central token to the search tokens, mean of the heads.
        exchange: by stage, the norm of the adapter's output over that of the frozen term to which it is added.
    """

    attention: tuple[Tensor, Tensor]
    exchange: dict[str, tuple[Tensor, Tensor]]


@torch.inference_mode()
def trace(model: BAT, template: Tensor, search: Tensor) -> list[Traced]:
    """Attention and exchange in each block of a model without candidate elimination, on normalised crops."""
    f, found = model.tracker.f, []

    def on_crop(values: Tensor) -> tuple[Tensor, Tensor]:
        return halves(rearrange(values[:, -(f**2) :], "b (h w) -> b h w", h=f))

    x, kept = model.embed(model.embed_template(template), search)
    for i in range(len(model.adapters)):
        x, kept, out = model.block(i, x, kept)
        ratios = [out[a].norm(dim=-1) / out[term].norm(dim=-1) for a, term in (("A1", "MHSA"), ("A2", "MLP"))]
        attention = on_crop(model.template_attention(out["q"], out["k"]).mean(1))
        found.append(Traced(attention, dict(zip(STAGES, map(on_crop, ratios), strict=True))))
    return found


@styled
def maps(seen: Crops, rows: Mapping[str, tuple[int, Tensor]], titles: Sequence[str], label: str) -> Figure:
    """Maps over search crops, one row for each entry of `rows`, on one colour scale from 0; the true box is white.

    Args:
        rows: name -> stream (0 or 1) and maps (n, f, f).
        titles: of the n columns.
        label: of the colour bar.
    """
    limits = (0.0, max(float(heat.max()) for _, heat in rows.values()))
    size = (1.1 * len(titles) + 1.3, 1.1 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False)
    for row, (name, (stream, heats)) in zip(axes, rows.items(), strict=True):
        for ax, image, heat, box in zip(row, seen.search, heats, seen.boxes, strict=True):
            artist = _map(ax, image.chunk(2)[stream], heat, box, limits=limits)
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, rotation=90, va="center", ha="right", fontsize=8.5)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8.5)
    figure.colorbar(artist, ax=axes, shrink=0.7, label=label)
    return figure


@styled
def pair(seen: Crops, column: int, heats: tuple[Tensor, Tensor], title: str) -> Figure:
    """One column of `maps` for both streams side by side, each on a scale of its own: a frame of the widget."""
    figure, axes = plt.subplots(1, 2, figsize=(4.2, 2.3), dpi=90)
    for ax, image, heat, stream in zip(axes, seen.search[column].chunk(2), heats, STREAMS, strict=True):
        _map(ax, image, heat[column], seen.boxes[column])
        ax.set_title(f"{stream}, {title}", fontsize=8.5)
    return figure


def _map(ax: Axes, image: Tensor, heat: Tensor, box: Sequence[float], **options: Any) -> Any:
    x, y, w, h = box
    ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=1.2))
    return plots.overlay(ax, image, heat, mode="nearest", mean=data.MEAN, std=data.STD, **options)


def exchanged(model: BAT, groups: Mapping[str, Sequence[tuple[data.Sequence, int]]]) -> dict[str, pd.DataFrame]:
    """The mean of `Traced.exchange` over search tokens, for each stream: a row for each group of frames, a column for
    each adapter."""
    rows: dict[str, dict[str, list[float]]] = {f"into {stream}": {} for stream in STREAMS}
    for group, members in groups.items():
        parts = [crops(model.tracker, video, [t]) for video, t in members[:CHUNK]]
        traced = trace(model, torch.cat([p.template for p in parts]), torch.cat([p.search for p in parts]))
        for stream, into in enumerate(rows.values()):
            into[group] = [float(ratio[stream].mean()) for block in traced for ratio in block.exchange.values()]
    columns = [f"{i + 1} {stage}" for i in range(len(model.adapters)) for stage in ("attn", "MLP")]
    return {name: pd.DataFrame(means, index=columns).T for name, means in rows.items()}


@styled
def exchange_table(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """The tables of `exchanged` as heatmaps on one colour scale, with the values where there is room."""
    top = max(table.to_numpy().max() for table in tables.values())
    first = next(iter(tables.values()))
    size = (9, 0.42 * len(first) + 1.6)
    figure, axes = plt.subplots(1, len(tables), figsize=size, sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        least = -math.inf if table.shape[1] <= 8 else math.inf
        artist = plots.heat_cells(ax, table.to_numpy(), (0, top), ".2f", least)
        ax.set_xticks(range(table.shape[1]), table.columns, rotation=60, ha="right", fontsize=8)
        ax.set_yticks(range(len(table)), table.index)
        ax.set_title(f"{name}, by block and stage")
    figure.colorbar(artist, ax=axes, label="ratio of norms")
    return figure
