"""SA²VP's `paper` profile: the published training and tests, and the tables of results."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from ... import backbones
from ...data import DATASETS, classification
from ...evaluation.tables import Cells, Results, compare_published, published_table
from ...ops.papers import paper
from ...ops.papers import protocol as filled
from ...training.callbacks import EarlyStop
from ...training.fit import Hardware, predict
from ...training.recipe import Training
from ...training.schedules import adamw, schedule
from ..layers import vpt
from .model import DROPOUT, PROMPT_WEIGHT, SA2VP, SA2VPSwin, loss

EPOCHS, WARMUP_EPOCHS, MIN_LR, WEIGHT_DECAY = 100, 10, 1e-7, 1e-4
SCHEDULE = schedule("cosine", WARMUP_EPOCHS / EPOCHS, MIN_LR)
# the batch of the scripts for VTAB-1k, by group; the README gives 40 or 64 for Natural
SCRIPT_BATCH = {"natural": 64, "specialized": 40, "structured": 40}
BATCH_OF = {"fgvc": "fgvc/cub200", "hta": "hta/dtd"}  # a set of each other benchmark, whose sets share one batch
DROP_PATH = 0.2  # of Swin, linear over the blocks
PIXELS = (0.5, 0.5, 0.5)  # the authors' mean and std for all backbones
NORMALISATIONS = ("0.5", "backbone")
TOKENS = 50  # prompts of VPT, here
DRY_CLASSES = 10
WORKERS = min(8, os.cpu_count() or 1)
RESULTS = Results.of("sa2vp")


@dataclass(frozen=True)
class Setting:
    """The data of a run and its trainings.

    Attributes:
        train, test: items (image, label).
        classes: names by label.
        input: size and normalisation of the images.
        hardware: of trainings and tests.
        learning_rates: of the trained methods.
        trainings: by method; `training.recipe.run` runs one.
        folder: of the run, for checkpoints and final weights; None: they are not saved.
    """

    title: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    input: backbones.Input
    hardware: Hardware
    learning_rates: dict[str, float]
    trainings: dict[str, Training]
    folder: Path | None = None


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile for the notebook's parameters; results go below `out`.

    `p.profile`, `dry_run`, `method`, `backbone`, `dataset`, `attention`, `width`, `batch`, `normalisation`, `seed`,
    `data_root`, `weights` and the hardware are read.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    hardware = Hardware.of(p, "sa2vp", workers=WORKERS)
    weights = "random" if p.dry_run else p.weights or "pretrained"
    seen = input_of(p, backbones.build(p.backbone, weights))
    published = published_settings(p.backbone, p.dataset)
    batch = p.batch or published["batch"]
    if p.dry_run:
        # the published batch needs the memory of a GPU
        batch = batch if p.accelerator != "cpu" and torch.cuda.is_available() else 8
        title, parts, names = "generated images (dry run: accuracies mean nothing)", generated(p, batch, seen), CLASSES
    else:
        title, parts = p.dataset, images(p, seen)
        train = parts["train"]
        names = tuple(train.class_names if p.dataset == "folder" else map(str, range(train.classes)))
        if p.dataset == "folder":
            batch = min(batch, max(len(train) // p.devices, 1) * p.devices)
    facts = {"data_root": Path(p.data_root), "attention": p.attention, "precision": hardware.precision}
    facts |= {"batch": batch, "mean": seen.mean, "std": seen.std, "epoch": "best on val" if "val" in parts else "last"}
    if p.dataset == "folder" and not p.dry_run:  # its images and labels may change between runs
        paths = [os.path.relpath(path, p.data_root) for path in parts["train"].sources]
        facts |= {"images": paths, "labels": parts["train"].labels, "classes": names}
    options = fit_options(published["lr"], hardware, parts.get("val"))
    training = Training(
        name=f"{title}, {p.method}",
        build=lambda: build(p, p.method, len(names), weights),
        loss=loss,
        data=lambda: parts["train"],
        fit=options | {"epochs": 1 if p.dry_run else EPOCHS, "batch": batch, "seed": p.seed, "name": p.method},
        facts=facts,
    )
    return Setting(
        title=title,
        train=parts["train"],
        test=parts["test"],
        classes=names,
        input=seen,
        hardware=hardware,
        learning_rates={p.method: published["lr"]},
        trainings={p.method: training},
        folder=None if p.dry_run else Path(out),
    )


# --- data -------------------------------------------------------------------------------------------------------------


def input_of(p: SimpleNamespace, backbone: nn.Module) -> backbones.Input:
    """Size and normalisation of the images: as released, mean and std of 0.5, or those of the backbone's training."""
    seen = backbones.input_of(backbone)
    return replace(seen, mean=PIXELS, std=PIXELS) if p.normalisation == "0.5" else seen


def transforms(dataset: str, seen: backbones.Input) -> tuple[v2.Transform, v2.Transform]:
    """The transforms of a dataset's training and test images: whole images for VTAB-1k, crops for all others."""
    if dataset.startswith("vtab/"):
        return (classification.resize_transform(seen),) * 2
    return classification.crop_transform(seen, train=True), classification.crop_transform(seen, train=False)


def images(p: SimpleNamespace, seen: backbones.Input) -> dict[str, classification.Images]:
    """The "train" and "test" images of a dataset, and "val" if it selects the epoch.

    VTAB-1k trains on all 1,000 images and tests the last epoch. FGVC trains on its training list alone and tests the
    epoch with the best accuracy on val; HTA does the same, inferred from the loaders that it shares with FGVC. On a
    folder nothing is selected on val: it is tested, or trained on where there is a test split.

    Raises `MissingData`, `CorruptFile`: see `classification.load`.
    """
    training, test = transforms(p.dataset, seen)
    if p.dataset == "folder":
        own = classification.image_folder(p.data_root, seed=p.seed)
        parts = dict(zip(("train", "test"), ("trainval", "test") if "test" in own else ("train", "val"), strict=True))
        for part, name in parts.items():
            own[name].transform = training if part == "train" else test
        return {part: own[name] for part, name in parts.items()}
    parts = {"train": "trainval", "test": "test"}
    if not p.dataset.startswith("vtab/"):
        parts = {"train": "train", "val": "val", "test": "test"}
    return {
        part: classification.load(p.dataset, p.data_root, name, training if part == "train" else test)
        for part, name in parts.items()
    }


CLASSES = tuple(f"class {i}" for i in range(DRY_CLASSES))  # of a dry run


def generated(p: SimpleNamespace, batch: int, seen: backbones.Input) -> dict[str, TensorDataset]:
    """Random images of the real shape in the splits of a dataset, for two optimiser steps."""
    generator = torch.Generator().manual_seed(p.seed)
    counts = {"train": 2 * batch, "test": 16} | ({"val": 16} if p.dataset.startswith(("fgvc/", "hta/")) else {})
    return {
        part: TensorDataset(
            torch.randn(count, 3, seen.size, seen.size, generator=generator), torch.arange(count) % DRY_CLASSES
        )
        for part, count in counts.items()
    }


# --- model, optimiser, schedule, selection ----------------------------------------------------------------------------


def published_settings(backbone: str, dataset: str) -> dict[str, Any]:
    """Width r, scale s, learning rate and batch of a dataset, from the authors' README (the paper's YAML).

    A dataset without its own row uses its group's. If the README gives two values, the batch is that of the scripts on
    VTAB-1k and the first one elsewhere, and s of Swin is the larger one (its code has 0.5).
    """
    group, _, name = dataset.partition("/")
    kind = DATASETS[dataset].group.lower() if dataset in DATASETS else ""
    default = next((g for g in ("natural", "specialized", "structured") if g in kind), "natural")
    rows = {
        row["method"]: row
        for t in paper("sa2vp")["tables"]
        if t["id"] == ("vitb_hyperparameters" if backbone == "vit_b16" else "swinb_hyperparameters")
        for row in t["rows"]
    }
    wanted = {
        "fgvc": [name, f"{name} (FGVC)"],
        "hta": ["hta (all)"],
        "vtab": [f"{name} (vtab)", name, f"vtab {default} (default)", f"vtab {default}"],
    }.get(group, ["vtab natural (default)", "vtab natural"])
    row = next((rows[w] for w in wanted if w in rows), rows.get("vtab natural (default)") or rows["vtab natural"])
    scale = row["values"].get("add_scale") or max(float(s) for s in str(row["add_scale"]).split("/"))
    return {
        "width": int(row["values"]["inter_dim"]),
        "scale": float(scale),
        "lr": float(row["values"].get("lr", 1e-3)),
        "batch": int(str(row["batch"]).split("/")[0]) if group in ("fgvc", "hta") else SCRIPT_BATCH[default],
    }


def build(p: SimpleNamespace, method: str, classes: int, weights: str | Path) -> nn.Module:
    """A method at full size on the backbone that the parameters name."""
    # VPT and linear probing have no stochastic depth (the encoder stays in eval mode)
    options: dict[str, Any] = {"drop_path_rate": DROP_PATH} if p.backbone == "swin_b" else {}
    torch.manual_seed(p.seed)  # of random weights in a dry run
    backbone = backbones.build(p.backbone, weights, **options)
    torch.manual_seed(p.seed)
    if method == "SA²VP":
        published = published_settings(p.backbone, p.dataset)
        kind = SA2VP if p.backbone == "vit_b16" else SA2VPSwin
        maps = {"new_maps": 1} if p.dataset == "fgvc/cars196" and p.backbone == "vit_b16" else {}
        return kind(backbone, classes, p.width or published["width"], published["scale"], attention=p.attention, **maps)
    if method.startswith("VPT"):
        return vpt.VPT(backbone, classes, tokens=TOKENS, deep=method == "VPT-deep")
    return {"linear probing": vpt.LinearProbe, "full fine-tuning": vpt.FineTuning}[method](backbone, classes)


def fit_options(learning_rate: float, hardware: Hardware, val: Dataset | None = None) -> dict[str, Any]:
    """Arguments of `fit`: the published optimiser and schedule, and the selection of the epoch.

    Args:
        val: items (image, label); the weights of the epoch with the best accuracy on them are selected, in ties the
            first. None: those of the last epoch.
    """
    best = [EarlyStop(functools.partial(accuracy, data=val, hardware=hardware))] if val is not None else []
    optimizer = adamw(learning_rate, WEIGHT_DECAY)
    return {"optimizer": optimizer, "schedule": SCHEDULE, "callbacks": best, "hardware": hardware}


# --- test -------------------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: Dataset, hardware: Hardware, batch: int = 64) -> float:
    """Top-1 accuracy in percent, of the image pathway if there are two."""
    predicted = predict(model, data, batch=batch, hardware=hardware).argmax(1)
    labels = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)
    return 100 * float((predicted == labels).float().mean())


def items(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first items of a dataset: images (n, 3, H, W), labels (n,)."""
    pairs = [data[i] for i in range(min(count, len(data)))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


# --- results ----------------------------------------------------------------------------------------------------------


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with its differences from the published setting."""
    changed, usual = [], published_settings(p.backbone, p.dataset)
    if p.method == "SA²VP":
        changed += [f"{p.attention} attention"] if p.attention != "aligned" else []
        changed += [f"r = {p.width}"] if p.width not in (0, usual["width"]) else []
    changed += [f"batch {p.batch}"] if p.batch not in (0, usual["batch"]) else []
    # ViT-B/16 was trained with 0.5
    changed += ["normalised as its backbone"] if p.normalisation != "0.5" and p.backbone != "vit_b16" else []
    return ", ".join([p.method, *changed])


def benchmarks() -> dict[str, list[str]]:
    """The datasets of each benchmark: "fgvc", "hta", and the groups "vtab_natural", "vtab_specialized" and
    "vtab_structured"."""
    found = defaultdict(list)
    for name, dataset in DATASETS.items():
        group = name.partition("/")[0]
        if dataset.task == "classification" and group in ("fgvc", "hta", "vtab"):
            found[group if group != "vtab" else dataset.group.replace("VTAB-1k ", "vtab_").lower()].append(name)
    return dict(found)


def means(rows: pd.DataFrame, backbone: str) -> Cells:
    """Mean accuracy over seeds by (method, dataset), and by (method, benchmark) where all its datasets were measured.

    The benchmarks are those of `benchmarks` and the two means over VTAB-1k that are in use.
    """
    found = RESULTS.filled(rows, {"where": {"backbone": backbone}, "row": "{method}", "column": "{dataset}"})
    parts = benchmarks()
    groups = [name for name in parts if name.startswith("vtab_")]
    parts |= {"vtab_mean_19_tasks": [dataset for name in groups for dataset in parts[name]]}
    parts |= {"vtab_mean_of_3_groups": groups}
    for method in dict.fromkeys(method for method, _ in found):
        for benchmark, names in parts.items():
            if all((method, name) in found for name in names):
                found[method, benchmark] = sum(found[method, name] for name in names) / len(names)
    return found


def group_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means by benchmark on ViT-B/16: the baselines, and SA²VP as each citing paper quotes it."""
    quoted = published_table("sa2vp", "sa2vp_vitb_group_means")
    facts = next(table for table in paper("sa2vp")["tables"] if table["id"] == quoted.attrs["id"])["rows"]
    quoted["method"] = [f"SA2VP, {row['group']}" for row in facts]
    both = pd.concat([published_table("sa2vp", "vitb_group_means_baselines"), quoted], ignore_index=True)
    columns = paper("sa2vp")["group_means"]
    return compare_published(both, _columns(means(rows, "vit_b16"), both))[list(columns)].rename(columns=columns)


def per_task(rows: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Title and table by id, of those published tables in which at least one accuracy was measured."""
    tables = {}
    for name, of in paper("sa2vp")["per_task"].items():
        frame = published_table("sa2vp", name)
        ours = means(rows, of["backbone"])
        for (method, dataset), value in list(ours.items()):
            if dataset.startswith(f"{of['group']}/"):
                ours[method, dataset.partition("/")[2]] = value
        ours = _columns(ours, frame)
        sets = [column for column in frame.columns if column not in ("mean", "method")]
        for method in {method for method, _ in ours}:
            if all((method, column) in ours for column in sets):
                ours[method, "mean"] = sum(ours[method, column] for column in sets) / len(sets)
        if ours:
            tables[name] = (f"{frame.attrs['title']}, top-1 %", compare_published(frame, ours))
    return tables


def _columns(cells: Cells, frame: pd.DataFrame) -> Cells:
    """The cells of a table's columns."""
    return {cell: value for cell, value in cells.items() if cell[1] in frame.columns}


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    names = [name for name in DATASETS if name.startswith(("vtab/", "fgvc/", "hta/"))]
    published = [published_settings("vit_b16", name) for name in names]
    low, high = sorted({one["lr"] for one in published})
    widths, scales = (
        ", ".join(f"{x:g}" for x in sorted({one[key] for one in published})) for key in ("width", "scale")
    )
    batches = {name: published_settings("vit_b16", of)["batch"] for name, of in BATCH_OF.items()} | SCRIPT_BATCH
    facts = {"low": low, "high": high, "batches": batches, "widths": widths, "scales": scales}
    facts |= {"image_weight": 1 - PROMPT_WEIGHT, "prompt_weight": PROMPT_WEIGHT, "dropout": DROPOUT}
    facts |= {"precision": paper("sa2vp")["precision"]}
    return filled("sa2vp", **globals(), **facts)
