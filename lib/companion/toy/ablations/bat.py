"""BAT at pocket scale: the methods, and one training run of any of them, judged on videos.

Every method stands on the same pocket tracker, which knows one clear stream. What is trained sees 6,400 pairs of the
training videos once, drawn and augmented as the authors draw theirs, with their losses, optimiser and clipping. Then
the tracker follows the test videos, in which the stream to be trusted changes: a target that is lost stays lost unless
it comes near the search window again, as in the real benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ...data import tracking as data
from ...evaluation.metrics.tracking import evaluate, iou
from ...models.bat import model as bat
from ...tracking import follow
from ...training.fit import fit
from ..datasets import tracking as pocket

LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]
SEEDS = [0, 1, 2, 3, 4]
SELECTION_SEED = 100
METRIC = "SR"
PAIRS, BATCH = 6400, 32
PIXELS = 5  # of precision, on videos of 128x128 pixels; the benchmarks take 20 of about 640x480
# the published recipe but for its length, batch and schedule
RECIPE = {
    "epochs": 1,
    "batch": BATCH,
    "accelerator": "cpu",
    "clip": 0.1,
    "weight_decay": 1e-4,
    "decay": "all",
    "schedule": "cosine",
    "warmup": 0.1,
}
WIDTH = 8
STD = 0.02 * (768 / 64) ** 0.5  # the released 0.02 at width 768: as near to zero, relatively, at width 64


def _ours(**changes) -> Callable[[bat.OSTrack], nn.Module]:
    return lambda tracker: bat.BAT(tracker, **({"width": WIDTH, "std": STD} | changes))


METHODS: dict[str, Callable[[bat.OSTrack], nn.Module]] = {
    "RGB only": functools.partial(bat.SingleStream, stream=0),
    "thermal only": functools.partial(bat.SingleStream, stream=1),
    "sum of features": _ours(width=0),
    "mean of features": _ours(width=0, fusion="mean"),
    "higher peak": bat.HigherPeak,
    "RGB to thermal": _ours(directions="first to second"),
    "thermal to RGB": _ours(directions="second to first"),
    "BAT": _ours(),
    "full fine-tuning": _ours(tuned="all"),
    "BAT, beside attention only": _ours(stages=("attention",)),
    "BAT, beside the MLP only": _ours(stages=("mlp",)),
    "BAT, one adapter a direction": _ours(shared=False),
    "BAT, width 2": _ours(width=2),
    "BAT, width 16": _ours(width=16),
    "BAT, from zeros": _ours(std=0),
}
UNTRAINED = list(METHODS)[:5]
TASKS = {"videos": list(METHODS)}
SITUATIONS = ("clear", "conjunction", "dark", "glare", "crossover")


def build(method: str, seed: int) -> nn.Module:
    """The model of a method on the pocket tracker; its new tensors are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](bat.foundation("pocket_ostrack"))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The paper's loss on uint8 templates (B, 6, t, t), uint8 searches (B, 6, s, s) and boxes (B, 4)."""
    template, search, boxes = batch
    return bat.losses(model(data.normalise(template), data.normalise(search)), boxes)["total"]


def prepare(root: str | Path) -> None:
    """Write the videos of every seed: each seed has its own, so that the spread holds their chance too."""
    for seed in (SELECTION_SEED, *SEEDS):
        pocket.write(folder(root, seed), seed)


def folder(root: str | Path, seed: int) -> Path:
    """The data root of a seed."""
    return Path(root) / f"seed{seed}"


@functools.lru_cache(maxsize=2)
def pairs(root: str, seed: int, split: str) -> TensorDataset:
    """Training pairs of a split: uint8 (n, 6, 32, 32), uint8 (n, 6, 64, 64), boxes (n, 4)."""
    videos = data.load("pocket/rgbt", folder(root, seed), split)
    return data.Pairs(videos, PAIRS, template=(2, 32), search=(4, 64)).draw(seed, PAIRS)


def follow_all(model: nn.Module, root: str, seed: int, split: str) -> dict[str, np.ndarray]:
    """The boxes (n, 4) of a method on every video of a split, all videos as one batch."""
    videos = data.load("pocket/rgbt", folder(root, seed), split)
    tracks = follow(model, videos, [video.boxes[0] for video in videos], accelerator="cpu")
    return {video.name: track.boxes for video, track in zip(videos, tracks, strict=True)}


def measure(results: Mapping[str, np.ndarray], root: str, seed: int, split: str) -> dict[str, float]:
    """PR, NPR, SR by LasHeR's rules, MPR and MSR by RGBT234's, and SR of the frames of each situation; in percent."""
    videos = data.load("pocket/rgbt", folder(root, seed), split)
    found = dict(evaluate(results, videos, "lasher", PIXELS).totals)
    # only the test videos are annotated in both streams, as in LasHeR
    if all(video.boxes_infrared is not None for video in videos):
        found |= evaluate(results, videos, "rgbt234", PIXELS).totals
    words = pocket.situations(folder(root, seed), split)
    # the first frame is given, so it does not count here
    overlap = np.concatenate([iou(results[video.name], video.boxes)[1:] for video in videos])
    word = np.concatenate([np.array(words[video.name][1:]) for video in videos])
    success = (overlap[:, None] > np.linspace(0, 1, 21)).mean(1)
    found |= {name: 100 * success[word == name].mean() for name in SITUATIONS if (word == name).any()}
    return {name: round(float(value), 2) for name, value in found.items()}


def train(method: str, task: str, rate: float, seed: int, root: str, split: str = "test", **options) -> dict:
    """Train one method, if it has anything to train, and follow the videos.

    `split` "select": trained on 60 videos, validated on 12; "test": trained on those 72, tested on 24. `options` go to
    `fit`. Returns a row: the scores of `measure`, the last loss, how many numbers were trained.
    """
    train_on, held_out = ("train", "val") if split == "select" else ("trainval", "test")
    model, last = build(method, seed), 0.0
    if method not in UNTRAINED:
        history = train_model(model, method, pairs(str(root), seed, train_on), rate, seed, **options)
        last = round(sum(row["loss"] for row in history[-20:]) / 20, 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scores = measure(follow_all(model, str(root), seed, held_out), str(root), seed, held_out)
    return scores | {"loss": last, "trained": 0 if method in UNTRAINED else trained}


def train_model(model: nn.Module, method: str, pairs: TensorDataset, rate: float, seed: int, **options) -> list[dict]:
    """Train `model` in place; return its history."""
    return fit(model, loss, pairs, **(RECIPE | {"lr": rate, "seed": seed, "name": method} | options))
