"""BAT's published training and its tests: LasHeR, RGBT234, GTOT, VisEvent; or a dry run on generated videos."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from ...ops.papers import paper
from ...tracking import Frames, follow, run
from ...training import checkpoints
from ...training.callbacks import ClipNorm
from ...training.checkpoints import Checkpoint
from ...training.fit import Batch, Hardware, History, fit
from ...training.schedules import MakeOptimizer, adamw, learning_rates
from . import model as bat

RULES = {"rgbt/lasher": "lasher", "rgbt/rgbt234": "rgbt234", "rgbt/gtot": "gtot", "rgbe/visevent": "visevent"}
TITLES = {"rgbt/lasher": "LasHeR", "rgbt/rgbt234": "RGBT234", "rgbt/gtot": "GTOT", "rgbe/visevent": "VisEvent"}
METRICS = ["PR", "NPR", "SR", "MPR", "MSR"]
# rgbt.yaml of the authors: the learning rate falls to a tenth for the last 12 epochs; an epoch is 60,000 drawn pairs.
# Their script starts 3 processes of 32 pairs for LasHeR, 4 for VisEvent
EPOCHS, BATCH, EVENT_BATCH, PAIRS, WORKERS = 60, 96, 128, 60_000, 8
TOGETHER = 16  # videos of a test
LEARNING_RATE, LAST_LEARNING_RATE, WEIGHT_DECAY, CLIP = 4e-4, 4e-5, 1e-4, 0.1

METHODS: dict[str, Callable[[bat.OSTrack], nn.Module]] = {
    "BAT": bat.BAT,
    "full fine-tuning": lambda tracker: bat.BAT(tracker, tuned="all"),
    "sum of features": lambda tracker: bat.BAT(tracker, width=0),
    "mean of features": lambda tracker: bat.BAT(tracker, width=0, fusion="mean"),
    "higher peak": bat.HigherPeak,
    "RGB only": lambda tracker: bat.SingleStream(tracker, 0),
    "thermal only": lambda tracker: bat.SingleStream(tracker, 1),
}
TRAINED = ("BAT", "full fine-tuning")


@dataclass(frozen=True)
class Setting:
    """The methods of a run, their training, and the videos they are tested on.

    Attributes:
        train: builds a method and trains it: from its name to the model and the history, empty where nothing is
            trained.
        track: from a method's name and its model to the boxes (n, 4) of every video.
        rules, pixels: of `companion.evaluation.metrics.tracking.evaluate`.
    """

    title: str
    videos: Sequence
    methods: tuple[str, ...]
    train: Callable[[str], tuple[nn.Module, History]]
    track: Callable[[str, nn.Module], dict[str, np.ndarray]]
    rules: str
    pixels: float | None = None

    def scores(self, boxes: Mapping[str, np.ndarray]) -> Scores:
        """The scores of a method's boxes by the benchmark's rules."""
        return evaluate(boxes, self.videos, self.rules, self.pixels)


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile: the published training, released weights, or a dry run.

    A training resumes from its checkpoint in `out`/checkpoints; its weights are saved under the authors' names as
    `out`/trained/<method>, <rgbt or rgbe>, seed <n>.safetensors, for the parameter `checkpoint`.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, with the change or download needed.
    """
    hardware = Hardware.of(p, "bat", workers=WORKERS)
    if p.dry_run:
        return _dry_run(p, hardware)
    videos = data.load(p.dataset, p.data_root, "test")
    state = _released(p) if p.checkpoint else {}
    tracker = None if p.checkpoint else bat.foundation(weights(p))
    trained = p.method in TRAINED and not p.checkpoint
    # RGB-T and RGB-E have different training sets
    name = f"{p.method}, {p.dataset.partition('/')[0]}, seed {p.seed}" if trained else p.method
    pairs = _pairs(p, tracker) if trained and tracker is not None else None

    def train(method: str) -> tuple[nn.Module, History]:
        if tracker is None:
            return bat.BAT.from_official(state), []
        model = build(method, tracker, p.seed)
        if pairs is None:
            return model.eval(), []
        videos = [sequence.name for sequence in pairs.sequences]
        checkpoint = Checkpoint.of(out / "checkpoints", name, model=model, videos=videos)
        batch = batch_of(p.dataset)
        settings: dict[str, Any] = {"epochs": EPOCHS, "batch": batch, "checkpoint": checkpoint, "name": method}
        history = learn(model, pairs, p.seed, hardware, **settings)
        checkpoints.save(out / "trained", name, model.to_official())
        return model, history

    def track(method: str, model: nn.Module) -> dict[str, np.ndarray]:
        return run(model, videos, out / "results" / TITLES[p.dataset] / name, together=TOGETHER, hardware=hardware)

    return Setting(TITLES[p.dataset], videos, (p.method,), train, track, RULES[p.dataset])


def build(method: str, tracker: bat.OSTrack, seed: int) -> nn.Module:
    """A method on a foundation; its new parameters are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](tracker)


def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The paper's loss and its terms on crops (B, 6, t, t), (B, 6, s, s) and boxes (B, 4), and the boxes' "iou".

    Crops are uint8, as a loader copies them to the GPU, or normalised.
    """
    template, search, boxes = batch
    if template.dtype == torch.uint8:
        template, search = data.normalise(template), data.normalise(search)
    prediction = model(template, search)
    return bat.losses(prediction, boxes) | {"iou": bat.mean_iou(prediction, boxes)}


def batch_of(dataset: str) -> int:
    """Pairs of a step in the training for a benchmark."""
    return EVENT_BATCH if dataset == "rgbe/visevent" else BATCH


def optimizer(lr: float = LEARNING_RATE, weight_decay: float = WEIGHT_DECAY) -> MakeOptimizer:
    """AdamW of all trained tensors in one group; biases decay too."""
    return adamw(lr, weight_decay, decay="all")


def stepped(base: float, steps: int, per_epoch: int) -> np.ndarray:
    """The learning rate of each step: `base`, and a tenth of it for the last fifth."""
    return learning_rates("step", base, steps, final=base * LAST_LEARNING_RATE / LEARNING_RATE)


def learn(
    model: nn.Module,
    pairs: Dataset,
    seed: int,
    hardware: Hardware,
    *,
    epochs: int,
    batch: int,
    lr: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    clip: float = CLIP,
    checkpoint: Checkpoint | None = None,
    name: str = "BAT",
) -> History:
    """Train a model in place by the authors' settings; the weights after the last epoch are the result."""
    return fit(
        model,
        loss,
        pairs,
        epochs=epochs,
        batch=batch,
        optimizer=optimizer(lr, weight_decay),
        schedule=stepped,
        callbacks=[ClipNorm(clip)],
        checkpoint=checkpoint,
        seed=seed,
        hardware=hardware,
        name=name,
    )


def weights(p: SimpleNamespace) -> str | Path:
    """The weights of `bat.foundation` at the `paper` profile: the parameter, or OSTrack's file in
    `<data_root>/weights`."""
    usual = Path(p.data_root) / "weights" / "OSTrack_ep0300.pth.tar"
    return p.weights or (usual if usual.is_file() else "pretrained")


def follow_in_memory(model: nn.Module, videos: Sequence, name: str, hardware: Hardware) -> dict[str, np.ndarray]:
    """The boxes (n, 4) of short videos by name, all videos as one batch."""
    tracks = follow(model, videos, [video.boxes[0] for video in videos], hardware=hardware, name=name)
    return {video.name: track.boxes for video, track in zip(videos, tracks, strict=True)}


def rescore(folder: str | Path) -> dict[str, Scores]:
    """The scores of published result files: `folder`/LasHeR/*.txt, `folder`/RGBT234/*.txt, or one of them.

    No images are needed: the package `rgbt` includes the ground truth.

    Raises:
        BadParameter: neither folder exists.
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
    """The real results in `path`, one row per (method, weights, dataset, seed); `new` is added, or replaces its row."""
    return upsert_rows(path, ["method", "weights", "dataset", "seed"], METRICS, [new] if new else ())


def cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column of the table `bat_main`), as `compare_published` takes them.

    The authors' weights and our training have separate rows.
    """
    found = {}
    for (method, source, dataset), group in rows.groupby(["method", "weights", "dataset"]):
        for metric in METRICS:
            if metric in group and group[metric].notna().any():
                found[f"{method}, {source}", f"{TITLES[dataset]}_{metric}"] = float(group[metric].mean())
    return found


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The measurements that judge the paper's results: `cells`."""
    return cells(rows)


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    jitter = inspect.signature(data.Pairs).parameters["jitter"].default
    last = EPOCHS - EPOCHS // 5 + 1
    return {
        "optimiser": f"AdamW on the adapters, learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g} on all",
        "schedule": f"{LAST_LEARNING_RATE:g} from epoch {last} on, no warm-up",
        "gradient clipping": f"total norm {CLIP:g}",
        "epochs": f"{EPOCHS} of {PAIRS:,} drawn pairs",
        "batch": f"{BATCH} pairs for RGB-T, {EVENT_BATCH} for RGB-E; the last pairs of an epoch are left out",
        "selection": "none; the weights after the last epoch",
        "crops": "template 2 x the box, 128 pixels; search 4 x the box, 256 pixels; OpenCV, no antialiasing",
        "jitter of the search box": f"centre {jitter[0]:g} / 2 of the size, sides exp({jitter[1]:g} N(0, 1))",
        "augmentation": "both flipped, brightness 0.8 to 1.2, each flipped once more, all flips with probability 0.5",
        "dropout": "0.1 in the adapters, stochastic depth up to 0.1; the head's batch norms in eval mode",
        "loss": "focal + 2 GIoU + 5 L1",
        "test": "Hann window, template of the first frame, frames in order of their numbers",
        "data": "882 videos of LasHeR, the authors' list; RGBT234 and GTOT are tested without training on them",
        "precision": f"{paper('bat')['precision']} in training and test",
        "seeds": "one, 0",
        "sweep": "none found",
    }


def _pairs(p: SimpleNamespace, tracker: bat.OSTrack) -> data.Pairs:
    """The training pairs of a benchmark; RGBT234 and GTOT have no training videos: the authors trained on LasHeR."""
    events = p.dataset == "rgbe/visevent"
    videos = data.load("rgbe/visevent" if events else "rgbt/lasher", p.data_root, "train")
    template, search = (2, tracker.template), (4, tracker.search)
    return data.Pairs(videos, PAIRS, min_side=min_side(p.dataset), template=template, search=search)


def min_side(dataset: str) -> float:
    """Width and height in pixels above which a box counts as showing the object in training."""
    return 5 if dataset == "rgbe/visevent" else 0


def _released(p: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The tensors of the file `checkpoint`."""
    if p.method != "BAT":
        raise BadParameter("method", p.method, ["BAT with a checkpoint: it holds BAT's weights"])
    if not Path(p.checkpoint).is_file():
        ways = [
            "give the path of BAT_rgbt.pth, which the README of github.com/SparkTempest/BAT links",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("BAT_rgbt", p.checkpoint, ways)
    return backbones.read_state(p.checkpoint)


def _dry_run(p: SimpleNamespace, hardware: Hardware) -> Setting:
    """Full-size model with random weights, two optimiser steps on generated pairs, and generated videos of 4 frames."""
    batch = BATCH if p.accelerator != "cpu" and torch.cuda.is_available() else 2  # the published batch needs a GPU
    rng, generator = np.random.default_rng(p.seed), torch.Generator().manual_seed(p.seed)
    videos = [_Generated(f"generated {i}", rng) for i in (1, 2)]
    tracker = bat.foundation("random")
    crops = [torch.randn(2 * batch, 6, s, s, generator=generator) for s in (tracker.template, tracker.search)]
    pairs = TensorDataset(*crops, torch.tensor([[0.4, 0.4, 0.2, 0.2]]).repeat(2 * batch, 1))

    def train(method: str) -> tuple[nn.Module, History]:
        model = build(method, tracker, p.seed)
        if method not in TRAINED:
            return model.eval(), []
        return model, learn(model, pairs, p.seed, hardware, epochs=1, batch=batch, name=method)

    def track(method: str, model: nn.Module) -> dict[str, np.ndarray]:
        return follow_in_memory(model, videos, method, hardware)

    title = "generated videos (dry run: the scores mean nothing)"
    return Setting(title, videos, (p.method,), train, track, "lasher")


class _Generated(Frames):
    """A video of noise in memory with the attributes of a benchmark's sequence."""

    def __init__(self, name: str, rng: np.random.Generator, length: int = 4):
        super().__init__(list(rng.integers(256, size=(length, 180, 240, 6), dtype=np.uint8)))
        boxes = np.tile([90.0, 70.0, 36.0, 28.0], (length, 1))
        self.name, self.boxes, self.boxes_infrared = name, boxes, boxes
        self.absent = np.zeros(length, bool)
        self.attributes: frozenset[str] = frozenset()
