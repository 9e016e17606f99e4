"""SA²VP's `paper` profile: the published training and tests, and the tables of results."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import timm
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ... import backbones
from ...data import DATASETS, classification
from ...errors import check_choice
from ...evaluation.tables import Cells, Results, compare_published, published_table
from ...io import papers
from ...training.callbacks import EarlyStop
from ...training.hardware import WORKERS, Hardware
from ...training.recipe import Opened, Training, opened, train
from ...training.schedules import adamw, schedule
from ..layers import classifying
from ..layers.classifying import Data, Tested, accuracy, weights
from . import baselines as vpt
from . import model
from .model import SA2VP, loss
from .swin import SA2VPSwin

EPOCHS, WARMUP_EPOCHS, MIN_LR, WEIGHT_DECAY = 100, 10, 1e-7, 1e-4
SCHEDULE = schedule("cosine", WARMUP_EPOCHS / EPOCHS, MIN_LR)
DROP_PATH = 0.2  # of Swin, linear over the blocks
PIXELS = (0.5, 0.5, 0.5)  # the authors' mean and std for all backbones
TOKENS = 50  # prompts of VPT, here
BASELINES: dict[str, Callable[..., nn.Module]] = {  # of a backbone and the number of classes
    "VPT-deep": functools.partial(vpt.VPT, tokens=TOKENS, deep=True),
    "VPT-shallow": functools.partial(vpt.VPT, tokens=TOKENS, deep=False),
    "linear probing": classifying.LinearProbe,
    "full fine-tuning": classifying.FineTuning,
}
RESULTS = Results.of("sa2vp")


class Parameters(classifying.Parameters, Protocol):
    """The parameters of the notebook that the recipe reads."""

    attention: str
    width: int
    scale: float
    transform: str
    batch: int


def prepare(p: Parameters, out: Path) -> tuple[Data, Opened]:
    """The images of a run, and its training with model and checkpoint: all that it reads is opened, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    found = data(p)
    return found, opened(training(p, found), out)


def run(p: Parameters, out: Path) -> Tested:
    """Train and test `p.method` as published; the accuracy becomes a row of `out`/measured.csv.

    A stopped training resumes from `out`/checkpoints; the trained tensors are saved in `out`/trained. A dry run takes
    two steps on a few images of the dataset, or on generated ones where it is not below `data_root`. Raises as
    `prepare`.
    """
    found, ready = prepare(p, out)
    model, history = train(ready)
    score = accuracy(model, found.splits["test"], hardware(p))
    row = {"backbone": p.backbone, "method": label(p), "dataset": found.dataset, "seed": p.seed, "accuracy": score}
    RESULTS.measured(out / "measured.csv", row, dry_run=p.dry_run)
    return Tested(found, model, history, score)


def training(p: Parameters, found: Data) -> Training:
    """The training of `p.method` as published, or of two steps in a dry run."""
    return classifying.training(
        p,
        found,
        build=lambda: build(p, p.method, len(found.classes), weights(p)),
        loss=loss,
        facts={"attention": p.attention, "scale": p.scale, "transform": p.transform},
        epochs=EPOCHS,
        batch=batch_of(p),
        **fit_options(published_settings(p.backbone, p.dataset)["lr"], hardware(p), found.splits.get("val")),
    )


def hardware(p: Parameters) -> Hardware:
    """The hardware of training and test."""
    return Hardware.of(p, "sa2vp", workers=WORKERS)


def batch_of(p: Parameters) -> int:
    """Images per step."""
    return p.batch or published_settings(p.backbone, p.dataset)["batch"]


# --- data -------------------------------------------------------------------------------------------------------------


def data(p: Parameters) -> Data:
    """The images of the notebook's parameters; in a dry run a few of them, or generated ones.

    Raises `MissingData`, `CorruptFile`, `MissingWeights`: with the download needed.
    """
    seen = input_of(p.backbone)
    return classifying.data(p, batch_of(p), seen, transforms(p.dataset, seen, p.transform))


def input_of(backbone: str) -> backbones.Input:
    """Size and normalisation of the images, as released with a mean and std of 0.5."""
    return backbones.Input(timm.get_pretrained_cfg(backbones.TIMM[backbone]).input_size[-1], PIXELS, PIXELS)


def transforms(dataset: str, seen: backbones.Input, kind: str = "recipe") -> tuple[v2.Transform, v2.Transform]:
    """The transforms of a dataset's training and test images: of `kind` "whole" or "crops".

    "recipe": whole images for VTAB-1k, crops for all others; for HTA that is inferred.
    """
    check_choice("kind", kind, ("recipe", "whole", "crops"))
    if kind == "whole" or (kind == "recipe" and dataset.startswith("vtab/")):
        return (classification.resize_transform(seen),) * 2
    return classification.crop_transform(seen, train=True), classification.crop_transform(seen, train=False)


# --- model, optimiser, schedule, selection ----------------------------------------------------------------------------


def published_settings(backbone: str, dataset: str) -> dict[str, Any]:
    """Width r, scale s, learning rate and batch of a dataset, from the authors' README and scripts (the paper's YAML).

    A dataset without its own row uses its group's, others that of VTAB-1k Natural.
    """
    table = "vitb_hyperparameters" if backbone == "vit_b16" else "swinb_hyperparameters"
    rows = published_table("sa2vp", table).set_index("method").to_dict("index")
    group = DATASETS[dataset].group if dataset in DATASETS else ""
    row = rows.get(dataset) or rows.get(group) or rows["VTAB-1k Natural"]
    return row | {name: int(row[name]) for name in ("width", "batch")}


def build(p: Parameters, method: str, classes: int, weights: str | Path) -> nn.Module:
    """A method at full size on the backbone that the parameters name."""
    # VPT and linear probing have no stochastic depth (the encoder stays in eval mode)
    options: dict[str, Any] = {"drop_path_rate": DROP_PATH} if p.backbone == "swin_b" else {}
    torch.manual_seed(p.seed)  # of random weights in a dry run
    backbone = backbones.build(p.backbone, weights, **options)
    torch.manual_seed(p.seed)
    if method == "SA²VP":
        published = published_settings(p.backbone, p.dataset)
        sizes = (p.width or published["width"], p.scale or published["scale"])
        if p.backbone == "swin_b":
            return SA2VPSwin(backbone, classes, *sizes, attention=p.attention)
        maps = 1 if p.dataset == "fgvc/cars196" else 2
        return SA2VP(backbone, classes, *sizes, attention=p.attention, new_maps=maps)
    return BASELINES[method](backbone, classes)


def fit_options(learning_rate: float, hardware: Hardware, val: Dataset | None = None) -> dict[str, Any]:
    """Arguments of `fit`: the published optimiser and schedule, and the selection of the epoch.

    Args:
        val: items (image, label); the weights of the epoch with the best accuracy on them are selected, in ties the
            first. None: those of the last epoch.
    """
    best = [EarlyStop(functools.partial(accuracy, data=val, hardware=hardware))] if val is not None else []
    optimizer = adamw(learning_rate, WEIGHT_DECAY)
    return {"optimizer": optimizer, "schedule": SCHEDULE, "callbacks": best, "hardware": hardware}


# --- results ----------------------------------------------------------------------------------------------------------


def label(p: Parameters) -> str:
    """The method's name in the tables, with its differences from the published setting."""
    usual, ours = published_settings(p.backbone, p.dataset), p.method == "SA²VP"
    changes = {
        f"{p.attention} attention": ours and p.attention != "aligned",
        f"r = {p.width}": ours and p.width not in (0, usual["width"]),
        f"s = {p.scale:g}": ours and p.scale not in (0, usual["scale"]),
        f"{p.transform} images": p.transform != "recipe",
        f"batch {p.batch}": p.batch not in (0, usual["batch"]),
    }
    return RESULTS.label(p.method, changes)


def means(rows: pd.DataFrame, backbone: str = "vit_b16") -> Cells:
    """Mean accuracy over seeds by (method, dataset), and by (method, benchmark) where all its datasets were measured.

    The benchmarks are "fgvc", "hta", the groups "vtab_natural", "vtab_specialized" and "vtab_structured", and the two
    means over VTAB-1k that are in use.
    """
    spec = {"where": {"backbone": backbone}, "row": "{method}", "column": "{name}"}
    found = RESULTS.filled(rows.assign(name=rows.dataset), spec)
    benchmarks = defaultdict(list)
    for name, dataset in DATASETS.items():
        if name.startswith(("fgvc/", "hta/", "vtab/")):
            benchmarks[dataset.group.lower().replace("vtab-1k ", "vtab_")].append(name)
    groups = [name for name in benchmarks if name.startswith("vtab_")]
    benchmarks["vtab_mean_19_tasks"] = [dataset for name in groups for dataset in benchmarks[name]]
    benchmarks["vtab_mean_of_3_groups"] = groups
    for method in dict.fromkeys(method for method, _ in found):
        for benchmark, names in benchmarks.items():
            if all((method, name) in found for name in names):
                found[method, benchmark] = sum(found[method, name] for name in names) / len(names)
    return found


def group_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means by benchmark on ViT-B/16: the baselines, and SA²VP as each citing paper quotes it."""
    quoted = published_table("sa2vp", "sa2vp_vitb_group_means")
    quoted["method"] = [f"SA2VP, {group}" for group in quoted.attrs["groups"]]
    both = pd.concat([published_table("sa2vp", "vitb_group_means_baselines"), quoted], ignore_index=True)
    ours = {cell: value for cell, value in means(rows, "vit_b16").items() if cell[1] in both.columns}
    columns = papers.paper("sa2vp")["group_means"]
    return compare_published(both, ours)[list(columns)].rename(columns=columns)


def per_task(rows: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Title and table by id, of those published tables in which at least one accuracy was measured."""
    hta = {cell: value for cell, value in means(rows, "vit_b16").items() if cell[1] == "hta"}
    cells = {name: RESULTS.filled(rows, spec) for name, spec in RESULTS.cells.items()} | {"vitb_hta_means": hta}
    frames = {name: published_table("sa2vp", name) for name, ours in cells.items() if ours}
    return {n: (f"{f.attrs['title']}, top-1 %", compare_published(f, cells[n])) for n, f in frames.items()}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published and measured numbers by title: `group_means` and `per_task`."""
    return {"ViT-B/16, means by benchmark, top-1 %": group_means(rows)} | dict(per_task(rows).values())


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    precision = papers.paper("sa2vp")["precision"]
    return {
        "optimiser": f"AdamW, betas 0.9 and 0.999, weight decay {WEIGHT_DECAY:g} on tensors with two axes or more",
        "learning rate": "0.001, but 0.0005 on VTAB-1k Pets and CLEVR count; not scaled with the batch",
        "schedule": f"linear from 0 over {WARMUP_EPOCHS} epochs, then half a cosine to {MIN_LR:g}, new at each step",
        "epochs": f"{EPOCHS}",
        "batch": "FGVC 64, HTA 64, VTAB-1k Natural 64, VTAB-1k Specialized 40, VTAB-1k Structured 40",
        "last images of an epoch": "left out, too few for a batch; others in each epoch",
        "width, scale": "by data set: r 8, 16, 32, 64; s 0.1, 0.5, 1.5 (table vitb_hyperparameters)",
        "loss": (
            f"{1 - model.PROMPT_WEIGHT:g} CE of the image pathway + {model.PROMPT_WEIGHT:g} CE of the prompt pathway"
        ),
        "dropout": f"{model.DROPOUT:g} after the cross-attention, in the adapters and in the frozen blocks of the ViT",
        "stochastic depth": f"{DROP_PATH:g} in Swin, none in the ViT",
        "precision": f"{precision} on a GPU, in training and test; no gradient clipping, no EMA",
        "training images": "VTAB-1k: as test; FGVC, HTA: short side 256, random crop of 224, horizontal flip",
        "test images": "VTAB-1k: resized to 224 x 224; FGVC, HTA: short side 256, centre crop of 224",
        "normalisation": f"mean and std {PIXELS[0]:g}, whatever the backbone",
        "training set": "VTAB-1k: all 1,000 images; FGVC, HTA: train, without val",
        "epoch tested": "VTAB-1k: the last; FGVC, HTA: the best on val, of equal ones the first",
        "metric": "top-1 accuracy of the image pathway on the test split",
        "seeds": "the parameter seed; how many runs the paper averages was not found",
        "sweep": "r and s by data set, chosen by the authors on val; one learning rate",
        "baselines": f"SA²VP's recipe, VPT with {TOKENS} tokens; the published rows had recipes of their own",
    }
