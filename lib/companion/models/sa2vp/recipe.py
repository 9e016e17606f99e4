"""SA²VP's `paper` profile: the published training and tests, and the tables of results."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from ...evaluation.tables import upsert_rows
from ...ops.papers import paper
from ...training import checkpoints
from ...training.callbacks import EarlyStop
from ...training.fit import Hardware, History, fit, predict
from ...training.schedules import adamw, schedule
from ..layers import vpt
from .model import DROPOUT, PROMPT_WEIGHT, SA2VP, SA2VPSwin, loss

EPOCHS, WARMUP_EPOCHS, MIN_LR, WEIGHT_DECAY = 100, 10, 1e-7, 1e-4
SCHEDULE = schedule("cosine", WARMUP_EPOCHS / EPOCHS, MIN_LR)
# the batch of the scripts for VTAB-1k, by group; the README gives 40 or 64 for Natural
SCRIPT_BATCH = {"natural": 64, "specialized": 40, "structured": 40}
DROP_PATH = 0.2  # of Swin, linear over the blocks
PIXELS = (0.5, 0.5, 0.5)  # the authors' mean and std for all backbones
NORMALISATIONS = ("0.5", "backbone")
TOKENS = 50  # prompts of VPT, here
DRY_CLASSES = 10
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """The data and methods of a run.

    Attributes:
        train, test: items (image, label).
        val: used to select the epoch; None: the last epoch is tested.
        classes: names by label.
        input: size and normalisation of the images.
        learning_rates: of the trained methods.
        build: the model of a method, before training.
        options: arguments of `fit`: epochs, batch, seed, hardware.
        folder: of the run, for checkpoints and final weights; None: they are not saved.
        facts: the identity of the training, for the checkpoint's key.
    """

    title: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    input: backbones.Input
    learning_rates: dict[str, float]
    build: Callable[[str], nn.Module]
    options: dict
    folder: Path | None = None
    facts: dict = field(default_factory=dict)
    val: Dataset | None = None


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile for the notebook's parameters; results go below `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    return _dry(p) if p.dry_run else _paper(p, out)


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


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row."""
    names = [name for name in DATASETS if name.startswith(("vtab/", "fgvc/", "hta/"))]
    found = [published_settings("vit_b16", name) for name in names]
    low, high = sorted({one["lr"] for one in found})
    widths, scales = ({f"{value:g}": 0 for value in sorted(one[key] for one in found)} for key in ("width", "scale"))
    batches = {"FGVC": published_settings("vit_b16", "fgvc/cub200")["batch"]}
    batches |= {"HTA": published_settings("vit_b16", "hta/dtd")["batch"]}
    batches |= {f"VTAB-1k {group.title()}": batch for group, batch in SCRIPT_BATCH.items()}
    return {
        "optimiser": f"AdamW, betas 0.9 and 0.999, weight decay {WEIGHT_DECAY:g} on tensors with two axes or more",
        "learning rate": f"{high:g}, but {low:g} on VTAB-1k Pets and CLEVR count; not scaled with the batch",
        "schedule": f"linear from 0 over {WARMUP_EPOCHS} epochs, then half a cosine to {MIN_LR:g}, new at each step",
        "epochs": f"{EPOCHS}",
        "batch": ", ".join(f"{name} {batch}" for name, batch in batches.items()),
        "last images of an epoch": "left out, too few for a batch; others in each epoch",
        "width, scale": f"by data set: r {', '.join(widths)}; s {', '.join(scales)} (table vitb_hyperparameters)",
        "loss": f"{1 - PROMPT_WEIGHT:g} CE of the image pathway + {PROMPT_WEIGHT:g} CE of the prompt pathway",
        "dropout": f"{DROPOUT:g} after the cross-attention, in the adapters and in the frozen blocks of the ViT",
        "stochastic depth": f"{DROP_PATH:g} in Swin, none in the ViT",
        "precision": f"{paper('sa2vp')['precision']} on a GPU, in training and test; no gradient clipping, no EMA",
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


def input_of(p: SimpleNamespace, backbone: nn.Module) -> backbones.Input:
    """Size and normalisation of the images: as released, mean and std of 0.5, or those of the backbone's training."""
    seen = backbones.input_of(backbone)
    return replace(seen, mean=PIXELS, std=PIXELS) if p.normalisation == "0.5" else seen


def transforms(dataset: str, seen: backbones.Input) -> tuple[v2.Transform, v2.Transform]:
    """The transforms of a dataset's training and test images: whole images for VTAB-1k, crops for all others."""
    if dataset.startswith("vtab/"):
        return (classification.resize_transform(seen),) * 2
    return classification.crop_transform(seen, train=True), classification.crop_transform(seen, train=False)


def splits(dataset: str, root: str | Path, seen: backbones.Input) -> dict[str, classification.Images]:
    """The "train" and "test" images of a dataset, and "val" if it selects the epoch.

    VTAB-1k trains on all 1,000 images and tests the last epoch. FGVC trains on its training list alone and tests the
    epoch with the best accuracy on val; HTA does the same, inferred from the loaders that it shares with FGVC.

    Raises `MissingData`, `CorruptFile`: see `classification.load`.
    """
    names = {"train": "trainval", "test": "test"}
    if not dataset.startswith("vtab/"):
        names = {"train": "train", "val": "val", "test": "test"}
    training, test = transforms(dataset, seen)
    return {
        part: classification.load(dataset, root, name, training if part == "train" else test)
        for part, name in names.items()
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


def _options(p: SimpleNamespace, epochs: int, batch: int) -> dict:
    """Arguments of `fit` that the parameters name; optimiser and schedule are those of `train_model`."""
    hardware = Hardware.of(p, "sa2vp", workers=WORKERS)
    return {"epochs": epochs, "batch": batch, "seed": p.seed, "hardware": hardware}


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size model with random weights, two optimiser steps on generated images of the real shape."""
    published = published_settings(p.backbone, p.dataset)
    # the published batch size needs the memory of a GPU
    batch = 8 if p.accelerator == "cpu" or not torch.cuda.is_available() else p.batch or published["batch"]
    seen = input_of(p, backbones.build(p.backbone, "random"))
    generator = torch.Generator().manual_seed(p.seed)

    def generated(count: int) -> TensorDataset:
        images = torch.randn(count, 3, seen.size, seen.size, generator=generator)
        return TensorDataset(images, torch.arange(count) % DRY_CLASSES)

    return Setting(
        title="generated images (dry run: accuracies mean nothing)",
        train=generated(2 * batch),
        test=generated(16),
        classes=tuple(f"class {i}" for i in range(DRY_CLASSES)),
        input=seen,
        learning_rates={p.method: published["lr"]},
        build=lambda method: build(p, method, DRY_CLASSES, "random"),
        options=_options(p, 1, batch),
        val=generated(16) if p.dataset.startswith(("fgvc/", "hta/")) else None,
    )


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on real images."""
    weights = p.weights or "pretrained"
    seen = input_of(p, backbones.build(p.backbone, weights))
    published = published_settings(p.backbone, p.dataset)
    batch = p.batch or published["batch"]
    val = None
    if p.dataset == "folder":  # nothing is selected on val: tested on, or trained on where there is a test split
        parts = classification.image_folder(p.data_root, seed=p.seed)
        train, test = (parts["trainval"], parts["test"]) if "test" in parts else (parts["train"], parts["val"])
        train.transform, test.transform = transforms(p.dataset, seen)
        names = tuple(train.class_names)
        batch = min(batch, max(len(train) // p.devices, 1) * p.devices)
    else:
        parts = splits(p.dataset, p.data_root, seen)
        train, val, test = parts["train"], parts.get("val"), parts["test"]
        names = tuple(map(str, range(train.classes)))
    options = _options(p, EPOCHS, batch)
    facts = {"data_root": Path(p.data_root), "attention": p.attention, "precision": options["hardware"].precision}
    facts |= {"batch": batch, "mean": seen.mean, "std": seen.std, "epoch": "last" if val is None else "best on val"}
    if p.dataset == "folder":  # its images and labels may change between runs
        paths = [os.path.relpath(path, p.data_root) for path in train.sources]
        facts |= {"images": paths, "labels": train.labels, "classes": names}
    return Setting(
        title=p.dataset,
        train=train,
        test=test,
        classes=names,
        input=seen,
        learning_rates={p.method: published["lr"]},
        build=lambda method: build(p, method, len(names), weights),
        options=options,
        folder=Path(out),
        facts=facts,
        val=val,
    )


def train(found: Setting, method: str, **changes: Any) -> tuple[nn.Module, History]:
    """Build and train a method of a setting; return the model, in eval mode, and the history of its training.

    `changes` go to `fit`. With a folder, a stopped training is resumed, and the final weights are saved.
    """
    model, name = found.build(method), f"{found.title}, {method}"
    options = found.options | {"name": method} | changes
    if found.folder:
        facts = found.facts | {"model": model}
        options["checkpoint"] = checkpoints.Checkpoint.of(found.folder / "checkpoints", name, **facts)
    history = train_model(model, found.train, found.learning_rates[method], val=found.val, **options)
    if found.folder:
        checkpoints.save(found.folder / "trained", name, checkpoints.trained_state(model))
    return model, history


def train_model(
    model: nn.Module,
    data: Dataset,
    learning_rate: float,
    *,
    val: Dataset | None = None,
    weight_decay: float = WEIGHT_DECAY,
    **options: Any,
) -> History:
    """Train `model` in place with the published optimiser and schedule; `options` go to `fit`.

    A linear probe on images in memory is trained on their features, computed once, since the encoder is frozen; on one
    device.

    Args:
        val: items (image, label); the weights of the epoch with the best accuracy on them are selected, in ties the
            first. None: those of the last epoch.
    """
    trained = model
    if isinstance(model, vpt.LinearProbe) and isinstance(data, TensorDataset):
        hardware = Hardware(options["hardware"].accelerator)

        def features(images: TensorDataset) -> TensorDataset:
            return TensorDataset(predict(model.backbone, images, hardware=hardware), images.tensors[1])

        trained, data, val = model.head, features(data), features(val) if isinstance(val, TensorDataset) else val
        options["hardware"] = replace(options["hardware"], devices=1)
    defaults: dict[str, Any] = {"schedule": SCHEDULE, "callbacks": ()}
    options = defaults | options
    if val is not None:
        best = EarlyStop(functools.partial(accuracy, data=val, hardware=options["hardware"]))
        options["callbacks"] = [*options["callbacks"], best]
    history = fit(trained, loss, data, optimizer=adamw(learning_rate, weight_decay), **options)
    model.eval()
    return history


def accuracy(model: nn.Module, data: Dataset, hardware: Hardware, batch: int = 64) -> float:
    """Top-1 accuracy in percent, of the image pathway if there are two."""
    predicted = predict(model, data, batch=batch, hardware=hardware).argmax(1)
    labels = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)
    return 100 * float((predicted == labels).float().mean())


def first(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first items of a dataset: images (n, 3, H, W), labels (n,)."""
    items = [data[i] for i in range(min(count, len(data)))]
    return torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])


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


def measured(path: Path, new: dict[str, Any] | None = None) -> pd.DataFrame:
    """The real results in `path`, one row per (backbone, method, dataset, seed); `new` is added, or replaces its
    row."""
    return upsert_rows(path, ["backbone", "method", "dataset", "seed"], ["accuracy"], [new] if new else ())


def cells(rows: pd.DataFrame, backbone: str, group: str) -> dict[tuple[str, str], float]:
    """Mean accuracy over seeds by (method, column) for the datasets of a group ("vtab", "fgvc", "hta"), in the format
    of `tables.compare_published`. The mean over a table's columns is left to `with_mean`."""
    chosen = rows[(rows.backbone == backbone) & rows.dataset.astype(str).str.startswith(f"{group}/")]
    means = chosen.groupby(["method", "dataset"]).accuracy.mean()
    return {(_published_name(method), dataset.partition("/")[2]): value for (method, dataset), value in means.items()}


def _published_name(method: str) -> str:
    names = {
        "SA²VP": "SA2VP",
        "VPT-deep": "VPT-Deep",
        "VPT-shallow": "VPT-Shallow",
        "linear probing": "Linear",
        "full fine-tuning": "Full fine-tuning",
    }
    name, comma, changed = method.partition(", ")
    return names[name] + comma + changed


def benchmark_means(rows: pd.DataFrame, backbone: str) -> dict[tuple[str, str], float]:
    """Mean accuracy by (method, benchmark) of the methods with all its datasets: "fgvc", "hta", the three
    groups "vtab_natural", "vtab_specialized" and "vtab_structured", and the two means over VTAB-1k that are in use."""
    sets = defaultdict(list)
    for name, dataset in DATASETS.items():
        group, _, key = name.partition("/")
        if dataset.task == "classification" and group in ("fgvc", "hta", "vtab"):
            sets[group if group != "vtab" else dataset.group.replace("VTAB-1k ", "vtab_").lower()].append((group, key))
    found: dict[tuple[str, str, str], float] = {}
    for group in ("fgvc", "hta", "vtab"):
        found |= {(method, group, key): value for (method, key), value in cells(rows, backbone, group).items()}
    means = {}
    parts = [benchmark for benchmark in sets if benchmark.startswith("vtab_")]
    sets["vtab_mean_19_tasks"] = [task for part in parts for task in sets[part]]
    for method in {method for method, *_ in found}:
        for benchmark, known in sets.items():
            if all((method, *one) in found for one in known):
                means[method, benchmark] = sum(found[method, *one] for one in known) / len(known)
        if all((method, part) in means for part in parts):
            means[method, "vtab_mean_of_3_groups"] = sum(means[method, part] for part in parts) / len(parts)
    return means


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The measurements that judge paper results: the benchmark means of ViT-B/16, see `benchmark_means`."""
    return benchmark_means(rows, "vit_b16")


def with_mean(found: dict[tuple[str, str], float], columns: list[str]) -> dict[tuple[str, str], float]:
    """`found` with the mean of each method that has all of `columns` but "mean": computed from cells, never typed."""
    sets = [c for c in columns if c not in ("mean", "method")]
    complete = [m for m in {m for m, _ in found} if all((m, c) in found for c in sets)]
    return found | {(m, "mean"): sum(found[m, c] for c in sets) / len(sets) for m in complete}
