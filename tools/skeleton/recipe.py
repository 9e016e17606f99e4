"""NAME's `paper` profile: the published training and test, and the tables of results."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import v2

from ... import backbones
from ...data import classification
from ...evaluation.tables import Results
from ...io import papers
from ...training.callbacks import EarlyStop
from ...training.hardware import WORKERS, Hardware
from ...training.recipe import Opened, Training, opened, train
from ...training.schedules import schedule, sgd
from ..layers.classifying import Data, FineTuning, LinearProbe, Parameters, Tested, accuracy, weights
from ..layers.classifying import data as images_of
from ..layers.classifying import training as training_of
from .model import NAME, loss

EPOCHS, WARMUP_EPOCHS, BATCH, RATE = 100, 10, 64, 0.1  # TODO the published settings
SCHEDULE = schedule("cosine", WARMUP_EPOCHS / EPOCHS, 0.0)
METHODS: dict[str, type[nn.Module]] = {"NAME": NAME, "linear probing": LinearProbe, "full fine-tuning": FineTuning}
RESULTS = Results.of("SLUG")


def prepare(p: Parameters, out: Path) -> tuple[Data, Opened]:
    """The images of a run, and its training with model and checkpoint: all that it reads is opened, nothing is
    trained."""
    found = data(p)
    return found, opened(training(p, found), out)


def run(p: Parameters, out: Path) -> Tested:
    """Train and test `p.method` as published; the accuracy becomes a row of `out`/measured.csv."""
    found, ready = prepare(p, out)
    model, history = train(ready)
    score = accuracy(model, found.splits["test"], hardware(p))
    row = {"backbone": p.backbone, "method": p.method, "dataset": found.dataset, "seed": p.seed, "accuracy": score}
    RESULTS.measured(out / "measured.csv", row, dry_run=p.dry_run)
    return Tested(found, model, history, score)


def training(p: Parameters, found: Data) -> Training:
    """The training of `p.method` as published, or of two steps in a dry run; where there is "val", the best epoch."""
    val, used = found.splits.get("val"), hardware(p)
    return training_of(
        p,
        found,
        build=lambda: build(p, len(found.classes)),
        loss=loss,
        facts={},
        epochs=EPOCHS,
        batch=BATCH,
        optimizer=sgd(RATE),
        schedule=SCHEDULE,
        callbacks=[EarlyStop(functools.partial(accuracy, data=val, hardware=used))] if val is not None else [],
        hardware=used,
    )


def hardware(p: Parameters) -> Hardware:
    """The hardware of training and test."""
    return Hardware.of(p, "SLUG", workers=WORKERS)


def data(p: Parameters) -> Data:
    """The images of the notebook's parameters."""
    seen = backbones.input_of(backbones.build(p.backbone, weights(p)))
    learn = v2.Compose([v2.RGB(), v2.RandomResizedCrop(seen.size), *classification.normalised(seen)])
    return images_of(p, BATCH, seen, (learn, classification.crop_transform(seen, train=False)))


def build(p: Parameters, classes: int) -> nn.Module:
    """A method at full size on the backbone that the parameters name."""
    torch.manual_seed(p.seed)
    return METHODS[p.method](backbones.build(p.backbone, weights(p)), classes)


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    return {
        "optimiser": f"SGD, learning rate {RATE:g}",
        "epochs": f"{EPOCHS}, {WARMUP_EPOCHS} of warm-up",
        "batch": f"{BATCH}",
        "precision": papers.paper("SLUG")["precision"],
    }
