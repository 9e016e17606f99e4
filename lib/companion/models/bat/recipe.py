"""BAT's published training and its tests: LasHeR, RGBT234, GTOT, VisEvent; or a dry run on generated videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from ...data import present
from ...data import tracking as data
from ...errors import BadParameter
from ...evaluation.metrics.tracking import Scores, evaluate
from ...evaluation.tables import Cells, Results
from ...io import papers
from ...training.callbacks import ClipNorm
from ...training.fit import Batch
from ...training.hardware import Hardware, RunParameters
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import MakeOptimizer, adamw, learning_rates
from . import crops, tracking
from .baselines import FeatureFusion, FullFineTuning, HigherPeak, SingleStream
from .model import BAT, losses, overlaps
from .official import ostrack_file, released
from .ostrack import OSTrack, foundation

RULES = {"rgbt/lasher": "lasher", "rgbt/rgbt234": "rgbt234", "rgbt/gtot": "gtot", "rgbe/visevent": "visevent"}
# rgbt.yaml of the authors: the learning rate falls to a tenth for the last 12 epochs; an epoch is 60,000 drawn pairs.
# Their script starts 3 processes of 32 pairs for LasHeR, 4 for VisEvent
EPOCHS, BATCH, EVENT_BATCH, PAIRS, WORKERS = 60, 96, 128, 60_000, 8
TOGETHER = 16  # videos of a test
DRY_FRAMES = 4  # of a video of a dry run
LEARNING_RATE, LAST_LEARNING_RATE, WEIGHT_DECAY, CLIP = 4e-4, 4e-5, 1e-4, 0.1
EVENT_SIDE = 5  # pixels: a smaller box of VisEvent does not show the object
RESULTS = Results.of("bat")
tables = RESULTS.tables  # published and measured, by title
TITLES = RESULTS.names["dataset"]

METHODS: dict[str, Callable[[OSTrack], nn.Module]] = {
    "BAT": BAT,
    "full fine-tuning": FullFineTuning,
    "sum of features": FeatureFusion,
    "mean of features": partial(FeatureFusion, fusion="mean"),
    "higher peak": HigherPeak,
    "RGB only": partial(SingleStream, stream=0),
    "thermal only": partial(SingleStream, stream=1),
}
TRAINED = ("BAT", "full fine-tuning")


class Parameters(RunParameters, Protocol):
    """The notebook's parameters."""

    method: str
    dataset: str
    checkpoint: str


class Tested(NamedTuple):
    """A model of the `paper` profile, and the boxes (n, 4) of the test videos by name, with their scores."""

    title: str
    model: nn.Module
    videos: Sequence
    boxes: dict[str, np.ndarray]
    scores: Scores


def prepare(p: Parameters, out: Path) -> tuple[Sequence, Opened]:
    """The test videos of a run, and its training with model and checkpoint: all that it reads is opened, nothing is
    computed.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, with the change or download needed.
    """
    return test_videos(p), opened(training(p, Hardware.of(p, "bat", workers=WORKERS)), out)


def run(p: Parameters, out: Path) -> Tested:
    """Train and test as published; the scores become a row of `out`/measured.csv.

    A dry run takes two steps, and tests a few frames of two videos of the benchmark, or generated ones where it is not
    below `data_root`.

    A training resumes from its checkpoint in `out`/checkpoints; its weights are saved under the authors' names as
    `out`/trained/<method>, <rgbt or rgbe>, seed <n>.safetensors, for the parameter `checkpoint`. Tracks of finished
    videos are kept in `out`/results. Raises as `prepare`.
    """
    (sequences, ready), title = prepare(p, out), TITLES[p.dataset]
    model, _ = train(ready)
    folder, hardware = out / "results" / title / ready.training.name, ready.training.fit["hardware"]
    boxes = tracking.run(model, sequences, folder, together=TOGETHER, hardware=hardware)
    scores = evaluate(boxes, sequences, RULES[p.dataset])
    source = f"weights of {Path(p.checkpoint).name}" if p.checkpoint else "trained here"
    row = {"method": p.method, "weights": source, "dataset": p.dataset, "seed": p.seed}
    RESULTS.measured(out / "measured.csv", row | scores.totals, dry_run=p.dry_run)
    return Tested(title, model, sequences, boxes, scores)


def training(p: Parameters, hardware: Hardware) -> Training:
    """The training of `p.method`: as published, of two steps in a dry run, or none with a checkpoint or a baseline."""
    pairs: Any = None
    if p.checkpoint:
        name, make = p.method, partial(BAT.from_official, released(p.checkpoint, p.method))
    else:
        make = partial(build, p.method, tracker := foundation(ostrack_file(p.weights, p.data_root, p.dry_run)), p.seed)
        # RGB-T and RGB-E have different training sets
        name = f"{p.method}, {p.dataset.partition('/')[0]}, seed {p.seed}" if p.method in TRAINED else p.method
        pairs = train_pairs(p, tracker) if p.method in TRAINED else None
    options = {"epochs": EPOCHS, "batch": batch_of(p.dataset), "seed": p.seed, "hardware": hardware}
    return Training(
        name=name,
        build=make,
        loss=loss,
        data=pairs,
        fit=fit_options() | options | {"name": p.method},
        facts={"videos": [video.name for video in getattr(pairs, "sequences", ())]},
        weights=BAT.to_official,
        dry_run=p.dry_run,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def test_videos(p: Parameters) -> Sequence:
    """The test videos of a benchmark; in a dry run a few frames of two of them, or of two generated ones."""
    if not p.dry_run:
        return data.load(p.dataset, p.data_root, "test")
    if not present(p.dataset, p.data_root, "test"):
        return [Generated(f"generated {i}", np.random.default_rng((p.seed, i))) for i in (1, 2)]
    return data.short(data.load(p.dataset, p.data_root, "test"), 2, DRY_FRAMES)


def train_pairs(p: Parameters, tracker: OSTrack) -> crops.Pairs:
    """The training pairs of a benchmark; RGBT234 and GTOT have no training videos: the authors trained on LasHeR."""
    name = p.dataset if p.dataset.startswith("rgbe/") else "rgbt/lasher"
    videos: Sequence
    if p.dry_run and not present(name, p.data_root, "train"):
        videos = [Generated("generated", np.random.default_rng(p.seed), 24)]
    else:
        videos = data.load(name, p.data_root, "train")
    if p.dry_run:
        data.short([video for video in videos if isinstance(video, data.Video)], DRY_FRAMES, 1)
    pairs = dry_items(p, batch_of(p.dataset)) if p.dry_run else PAIRS
    template, search = (2, tracker.template), (4, tracker.search)
    return crops.Pairs(videos, pairs, min_side=min_side(p.dataset), template=template, search=search)


def min_side(dataset: str) -> float:
    """Width and height in pixels above which a box counts as showing the object in training."""
    return EVENT_SIDE if dataset.startswith("rgbe/") else 0


class Generated(tracking.Frames):
    """A video of noise in memory with the attributes of a benchmark's sequence."""

    def __init__(self, name: str, rng: np.random.Generator, length: int = 4):
        super().__init__(list(rng.integers(256, size=(length, 180, 240, 6), dtype=np.uint8)))
        boxes = np.tile([90.0, 70.0, 36.0, 28.0], (length, 1))
        self.name, self.boxes, self.boxes_infrared = name, boxes, boxes
        self.absent = np.zeros(length, bool)
        self.attributes: frozenset[str] = frozenset()


# --- model, loss, optimiser, schedule ---------------------------------------------------------------------------------


def build(method: str, tracker: OSTrack, seed: int) -> nn.Module:
    """A method on a foundation; its new parameters are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](tracker)


def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The paper's loss and its terms on crops (b, 6, t, t), (b, 6, s, s) and boxes (b, 4), and the boxes' "iou".

    Crops are uint8, as a loader copies them to the GPU, or normalised.
    """
    template, search, boxes = batch
    if template.dtype == torch.uint8:
        template, search = crops.normalise(template), crops.normalise(search)
    prediction = model(template, search)
    return losses(prediction, boxes) | {"iou": overlaps(prediction, boxes).mean()}


def optimizer(lr: float = LEARNING_RATE, weight_decay: float = WEIGHT_DECAY) -> MakeOptimizer:
    """AdamW of all trained tensors in one group; biases decay too."""
    return adamw(lr, weight_decay, decay="all")


def stepped(base: float, steps: int, per_epoch: int) -> np.ndarray:
    """The learning rate of each step: `base`, and a tenth of it for the last fifth."""
    return learning_rates("step", base, steps, final=base * LAST_LEARNING_RATE / LEARNING_RATE)


def fit_options(lr: float = LEARNING_RATE, weight_decay: float = WEIGHT_DECAY, clip: float = CLIP) -> dict[str, Any]:
    """Arguments of `fit` by the authors' settings; no callback selects: the weights after the last epoch are used."""
    return {"optimizer": optimizer(lr, weight_decay), "schedule": stepped, "callbacks": [ClipNorm(clip)]}


def batch_of(dataset: str) -> int:
    """Pairs of a step in the training for a benchmark."""
    return EVENT_BATCH if dataset.startswith("rgbe/") else BATCH


# --- test -------------------------------------------------------------------------------------------------------------


def rescored(folder: str | Path) -> Cells:
    """The scores of published result files, `folder`/LasHeR/*.txt, `folder`/RGBT234/*.txt, or one of them, as cells of
    the published table and of the claims.

    No images are needed: the package `rgbt` includes the ground truth.

    Raises:
        BadParameter: neither folder exists.
        CorruptFile, CompanionError: a file that cannot be read, or sequences that are missing (listed).
    """
    cells: Cells = {}
    for name in ("rgbt/lasher", "rgbt/rgbt234"):
        part = Path(folder) / TITLES[name]
        if part.is_dir():
            truth = data.ground_truth(name)
            totals = evaluate(data.read_results(part, [s.name for s in truth]), truth, RULES[name]).totals
            cells |= {("result files, scored here", f"{TITLES[name]}_{metric}"): x for metric, x in totals.items()}
    if not cells:
        raise BadParameter("results", str(folder), "a folder with LasHeR/<sequence>.txt or RGBT234/<sequence>.txt")
    return cells


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    precision = papers.paper("bat")["precision"]
    return {
        "optimiser": f"AdamW on the adapters, learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g} on all",
        "schedule": f"{LAST_LEARNING_RATE:g} from epoch {EPOCHS - EPOCHS // 5 + 1} on, no warm-up",
        "gradient clipping": f"total norm {CLIP:g}",
        "epochs": f"{EPOCHS} of {PAIRS:,} drawn pairs",
        "batch": (
            f"{BATCH} pairs for RGB-T as the training script has it (the released test opens a run named after two "
            f"GPUs, 64 pairs), {EVENT_BATCH} for RGB-E; the last pairs of an epoch are left out"
        ),
        "selection": "none; the weights after the last epoch",
        "crops": "template 2 x the box, 128 pixels; search 4 x the box, 256 pixels; OpenCV, no antialiasing",
        "jitter of the search box": (
            f"centre {crops.JITTER[0]:g} / 2 of the size, sides exp({crops.JITTER[1]:g} N(0, 1))"
        ),
        "augmentation": "both flipped, brightness 0.8 to 1.2, each flipped once more, all flips with probability 0.5",
        "dropout": "0.1 in the adapters, stochastic depth up to 0.1; the head's batch norms in eval mode",
        "loss": "focal + 2 GIoU + 5 L1",
        "test": "Hann window, template of the first frame, frames in order of their numbers",
        "data": "882 videos of LasHeR, the authors' list; RGBT234 and GTOT are tested without training on them",
        "precision": f"{precision} in training and test",
        "seeds": "one, 0",
        "sweep": "none found",
    }
