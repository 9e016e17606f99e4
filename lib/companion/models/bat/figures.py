"""Figures of BAT alone: frames with boxes, overlap over time, maps over search crops; and what they show of each block:
what passes from stream to stream, and where the template attends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...data import tracking as data
from ...evaluation.metrics.tracking import iou
from ...viz import plots
from ...viz.style import method_colours, styled
from .crops import MEAN, STD, box_in_crop, crop, normalise
from .model import BAT, halves
from .official import STAGES
from .ostrack import OSTrack

STREAMS = ("RGB", "thermal")
CHUNK = 60  # crops in one forward pass


class Crops(NamedTuple):
    """Crops of a video as the tracker reads them; each search crop is around the true box of the frame before.

    Attributes:
        template: (n, 6, t, t), the same for all.
        search: (n, 6, s, s).
        boxes: (n, 4), the true box x, y, w, h in pixels of the search crop.
        titles: number and situation of each frame.
    """

    template: Tensor
    search: Tensor
    boxes: np.ndarray
    titles: list[str]


def situations(video: data.Annotated) -> Sequence[str]:
    """The situation of each frame, where it is known, or empty texts."""
    return getattr(video, "situation", [""] * len(video))


def crops(tracker: OSTrack, video: data.Annotated, times: Iterable[int]) -> Crops:
    """The crops of `times`, each 1 or more."""
    template = normalise(crop(video.frame(0), video.boxes[0], 2, tracker.template)[0])
    search, boxes, titles = [], [], []
    for t in times:
        patch, scale = crop(video.frame(t), video.boxes[t - 1], 4, tracker.search)
        search.append(normalise(patch))
        boxes.append(tracker.search * box_in_crop(video.boxes[t], video.boxes[t - 1], scale, tracker.search))
        titles.append(f"frame {t}\n{situations(video)[t]}")
    return Crops(template.expand(len(search), -1, -1, -1), torch.stack(search), np.array(boxes), titles)


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
    f, traced = model.tracker.f, []

    def on_crop(values: Tensor) -> tuple[Tensor, Tensor]:
        return halves(rearrange(values[:, -(f**2) :], "b (h w) -> b h w", h=f))

    x, kept = model.embed(model.embed_template(template), search)
    for i in range(len(model.adapters)):
        x, kept, out = model.block(i, x, kept)
        ratios = [out[a].norm(dim=-1) / out[term].norm(dim=-1) for a, term in (("A1", "MHSA"), ("A2", "MLP"))]
        attention = on_crop(model.template_attention(out["q"], out["k"]).mean(1))
        traced.append(Traced(attention, dict(zip(STAGES, map(on_crop, ratios), strict=True))))
    return traced


def exchanged(model: BAT, groups: Mapping[str, Sequence[tuple[data.Annotated, int]]]) -> pd.DataFrame:
    """The mean of `Traced.exchange` over search tokens in percent, a row for each group of frames and stream, a column
    for each adapter, named by the layer that it is next to and the block."""
    rows: dict[str, list[float]] = {}
    for group, members in groups.items():
        parts = [crops(model.tracker, video, [t]) for video, t in members[:CHUNK]]
        traced = trace(model, torch.cat([p.template for p in parts]), torch.cat([p.search for p in parts]))
        for stream, name in enumerate(STREAMS):
            ratios = [ratio[stream] for block in traced for ratio in block.exchange.values()]
            rows[f"{group}, into {name}"] = [100 * float(ratio.mean()) for ratio in ratios]
    columns = [f"{stage}{i + 1}" for i in range(len(model.adapters)) for stage in ("att", "MLP")]
    return pd.DataFrame(rows, index=columns).T


Boxes = Mapping[str, Mapping[str, np.ndarray]]  # method -> video -> (n, 4)


def boxes_at(video: data.Annotated, frame: int, tracked: Boxes) -> dict[str, Sequence[float]]:
    """Colour -> box of a frame: the true one white, those of the methods in their colours."""
    colours = method_colours(tracked)
    return {"white": video.boxes[frame]} | {colours[name]: tracked[name][video.name][frame] for name in colours}


def spread(video: data.Annotated) -> list[int]:
    """Up to five frames, evenly spread over those that show the target as the one before does."""
    there: np.ndarray = np.all(video.boxes[:, 2:] > 0, 1)
    shown = np.flatnonzero(there[1:] & there[:-1]) + 1
    return shown[np.unique(np.linspace(0, len(shown) - 1, 5).astype(int))].tolist()


def film(video: data.Annotated, tracked: Boxes) -> list[np.ndarray]:
    """Up to 16 frames of both streams side by side, with the boxes of `boxes_at`."""
    images = []
    for t in np.unique(np.linspace(0, len(video) - 1, 16, dtype=int)):
        image, drawn = video.frame(t), boxes_at(video, t, tracked)
        parts = [plots.boxed(part.copy(), drawn) for part in (image[..., :3], image[..., 3:])]
        images.append(np.concatenate(parts, 1))
    return images


@styled
def frames(video: data.Annotated, times: Sequence[int], tracked: Boxes | None = None) -> Figure:
    """Frames of both streams below their number and situation, with the boxes of `boxes_at` and their legend."""
    tracked, situation = tracked or {}, situations(video)
    figure, axes = plt.subplots(2, len(times), figsize=(1.35 * len(times), 2.9 + 0.3 * bool(tracked)), squeeze=False)
    for column, t in zip(axes.T, times, strict=True):
        image, drawn = video.frame(t), boxes_at(video, t, tracked)
        for ax, part in zip(column, (image[..., :3], image[..., 3:]), strict=True):
            plots.boxes(ax, part, drawn)
        column[0].set_title(f"frame {t}\n{situation[t]}")
    for ax, stream in zip(axes[:, 0], STREAMS, strict=True):
        ax.set_ylabel(stream)
    colours = method_colours(tracked)
    if colours:
        lines = [plt.Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
        figure.legend(lines, list(colours), loc="outside lower center", ncols=4)
    return figure


@styled
def overlap(video: data.Annotated, tracked: Boxes, method: str) -> Figure:
    """IoU with the true box over a video, one line a method, `method` thicker; grey where one stream fails."""
    captions = situations(video)
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


@styled
def maps(seen: Crops, rows: Mapping[str, tuple[int, Tensor]], label: str) -> Figure:
    """Maps over search crops, one row for each entry of `rows`, on one colour scale from 0; the true box is white.

    Args:
        rows: name -> stream (0 or 1) and maps (n, f, f).
        label: of the colour bar.
    """
    look: dict[str, Any] = {"mode": "nearest", "mean": MEAN, "std": STD}
    look["limits"] = 0.0, max(float(heat.max()) for _, heat in rows.values())
    size = (1.1 * len(seen.titles) + 1.3, 1.1 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(seen.titles), figsize=size, squeeze=False)
    for row, (name, (stream, heats)) in zip(axes, rows.items(), strict=True):
        for ax, image, heat, (x, y, w, h) in zip(row, seen.search, heats, seen.boxes, strict=True):
            artist = plots.overlay(ax, image.chunk(2)[stream], heat, **look)
            ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=1.2))
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, rotation=90, va="center", ha="right", fontsize=8.5)
    for ax, title in zip(axes[0], seen.titles, strict=True):
        ax.set_title(title, fontsize=8.5)
    figure.colorbar(artist, ax=axes, shrink=0.7, label=label)
    return figure
