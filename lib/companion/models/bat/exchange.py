"""What each block of BAT passes from stream to stream, and where the template attends, on crops of a video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from torch import Tensor

from ...data import tracking as data
from .model import BAT, STAGES, halves
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
    template = data.normalise(data.crop(video.frame(0), video.boxes[0], 2, tracker.template)[0])
    search, boxes, titles = [], [], []
    for t in times:
        patch, scale = data.crop(video.frame(t), video.boxes[t - 1], 4, tracker.search)
        search.append(data.normalise(patch))
        boxes.append(tracker.search * data.box_in_crop(video.boxes[t], video.boxes[t - 1], scale, tracker.search))
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
