"""BAT's ablations at toy scale: the methods, and one training of any of them, tested on videos.

Every method builds on the same toy tracker, which was trained on one clear stream. Trained methods see 6,400 pairs
of the training videos once, drawn and augmented as in the authors' code, with its losses, optimiser and clipping. The
reliable stream changes within each test video. A lost target stays lost unless it comes near the search window again,
as in the real benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...data import tracking as data
from ...evaluation.metrics.tracking import evaluate, iou
from ...models.bat import BAT, FeatureFusion, FullFineTuning, HigherPeak, OSTrack, SingleStream, losses, recipe
from ...models.bat.model import Adapter, halves
from ...training.callbacks import ClipNorm
from ...training.fit import CPU, Batch, History, fit
from ...training.schedules import adamw
from ..datasets import tracking as toy
from ..encoders import tracker
from . import last_loss, reader, study_root

LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]
METRIC = "SR"
PAIRS, BATCH = 6400, 32
BUDGET = f"{PAIRS:,} pairs once, batch {BATCH}"
PIXELS = 5  # of precision, on videos of 128x128 pixels; the benchmarks take 20 of about 640x480
WIDTH = 8
STD = 0.02 * (768 / 64) ** 0.5  # the released 0.02 at width 768, scaled to width 64


class _Into(Adapter):
    """An adapter whose output reaches one stream alone, 0 or 1."""

    def __init__(self, stream: int, *sizes: Any):
        super().__init__(*sizes)
        self.stream = stream

    def forward(self, h: Tensor) -> Tensor:
        received = [torch.zeros_like(x) for x in halves(h)]
        received[self.stream] = super().forward(halves(h)[self.stream])
        return torch.cat(received)


class OneDirection(BAT):
    """BAT whose adapters pass features into one stream alone, 0 or 1."""

    def __init__(self, tracker: OSTrack, into: int, **options: Any):
        self.into = into
        super().__init__(tracker, **options)

    def adapter(self, stage: str, *sizes: Any) -> nn.Module:
        return _Into(self.into, *sizes)


class _Nothing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


class OneStage(BAT):
    """BAT with adapters at one stage alone, "attention" or "mlp"."""

    def __init__(self, tracker: OSTrack, stage: str, **options: Any):
        self.stage = stage
        super().__init__(tracker, **options)

    def adapter(self, stage: str, *sizes: Any) -> nn.Module:
        return Adapter(*sizes) if stage == self.stage else _Nothing()


class _OneEach(nn.Module):
    """An adapter for each direction."""

    def __init__(self, *sizes: Any):
        super().__init__()
        self.into_second, self.into_first = Adapter(*sizes), Adapter(*sizes)

    def forward(self, h: Tensor) -> Tensor:
        second, first = halves(h)  # what the first stream receives, and the second
        return torch.cat([self.into_first(second), self.into_second(first)])


class SeparateAdapters(BAT):
    """BAT with an adapter for each direction."""

    def adapter(self, stage: str, *sizes: Any) -> nn.Module:
        return _OneEach(*sizes)


def _ours(kind: type[BAT] = BAT, **changes: Any) -> Callable[[OSTrack], nn.Module]:
    return lambda tracker: kind(tracker, **({"width": WIDTH, "std": STD} | changes))


METHODS: dict[str, Callable[[OSTrack], nn.Module]] = {
    "RGB only": functools.partial(SingleStream, stream=0),
    "thermal only": functools.partial(SingleStream, stream=1),
    "sum of features": FeatureFusion,
    "mean of features": functools.partial(FeatureFusion, fusion="mean"),
    "higher peak": HigherPeak,
    "RGB to thermal": _ours(OneDirection, into=1),
    "thermal to RGB": _ours(OneDirection, into=0),
    "BAT": _ours(),
    "full fine-tuning": _ours(FullFineTuning),
    "BAT, beside attention only": _ours(OneStage, stage="attention"),
    "BAT, beside the MLP only": _ours(OneStage, stage="mlp"),
    "BAT, one adapter a direction": _ours(SeparateAdapters),
    "BAT, width 2": _ours(width=2),
    "BAT, width 16": _ours(width=16),
    "BAT, from zeros": _ours(std=0),
}
UNTRAINED = list(METHODS)[:5]
TASKS = {"videos": list(METHODS)}
SITUATIONS = ("clear", "conjunction", "dark", "glare", "crossover")


def build(method: str, seed: int) -> nn.Module:
    """A method on the toy tracker; its new parameters are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](tracker.build())


def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The paper's loss on uint8 templates (B, 6, t, t), uint8 searches (B, 6, s, s) and boxes (B, 4)."""
    template, search, boxes = batch
    return losses(model(data.normalise(template), data.normalise(search)), boxes)


def prepare(root: str | Path, seed: int) -> None:
    """Write the videos of a seed."""
    toy.write(study_root(root, seed), seed)


@reader()
def videos_of(root: str, seed: int, split: str) -> list[data.Sequence]:
    """The videos of a split."""
    return data.load("pocket/rgbt", study_root(root, seed), split)


@functools.lru_cache(maxsize=2)
def pairs(root: str, seed: int, split: str) -> TensorDataset:
    """Training pairs of a split: uint8 (n, 6, 32, 32), uint8 (n, 6, 64, 64), boxes (n, 4)."""
    return data.Pairs(videos_of(root, seed, split), PAIRS, template=(2, 32), search=(4, 64)).draw(seed, PAIRS)


def measure(results: Mapping[str, np.ndarray], root: str, seed: int, split: str) -> dict[str, float]:
    """PR, NPR, SR by LasHeR's rules, MPR and MSR by RGBT234's, and SR of the frames of each situation, in percent."""
    videos = videos_of(root, seed, split)
    found = dict(evaluate(results, videos, "lasher", PIXELS).totals)
    # only the test videos are annotated in both streams, as in LasHeR
    if all(video.boxes_infrared is not None for video in videos):
        found |= evaluate(results, videos, "rgbt234", PIXELS).totals
    situations = toy.situations(study_root(root, seed), split)
    # the box of the first frame is given, so it does not count here
    overlap = np.concatenate([iou(results[video.name], video.boxes)[1:] for video in videos])
    situation = np.concatenate([np.array(situations[video.name][1:]) for video in videos])
    success = (overlap[:, None] > np.linspace(0, 1, 21)).mean(1)
    found |= {name: 100 * success[situation == name].mean() for name in SITUATIONS if (situation == name).any()}
    return {name: round(float(value), 2) for name, value in found.items()}


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **changes) -> dict:
    """Train one method, if it has trainable parameters, and track the videos of a split.

    `split` "select": trained on 60 videos, validated on 12; "test": trained on those 72, tested on 24. `changes` are
    arguments of `fit`. Returns a row: the scores of `measure`, the last loss, the number of trainable parameters.
    """
    train_on, held_out = ("train", "val") if split == "select" else ("trainval", "test")
    model, last, trained = build(method, seed), 0.0, 0
    if method not in UNTRAINED:
        history = train_model(model, method, pairs(str(root), seed, train_on), learning_rate, seed, **changes)
        last = last_loss(history)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    videos = videos_of(str(root), seed, held_out)
    boxes = recipe.follow_in_memory(model, videos, method, CPU)
    return measure(boxes, str(root), seed, held_out) | {"loss": last, "trained": trained}


def train_model(
    model: nn.Module, method: str, pairs: TensorDataset, learning_rate: float, seed: int, **changes: Any
) -> History:
    """Train `model` in place with the published settings except length, batch size and schedule; return its history."""
    settings: dict[str, Any] = {"epochs": 1, "batch": BATCH, "seed": seed, "hardware": CPU, "name": method}
    optimizer, callbacks = adamw(learning_rate, recipe.WEIGHT_DECAY, decay="all"), [ClipNorm(recipe.CLIP)]
    return fit(model, loss, pairs, **settings | {"optimizer": optimizer, "callbacks": callbacks} | changes)
