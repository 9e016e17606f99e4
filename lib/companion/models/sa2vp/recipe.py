"""SA²VP: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, classification
from ...evaluation.tables import upsert_rows
from ...ops.papers import paper
from ...toy import encoders
from ...toy.ablations import sa2vp as study
from ...toy.datasets import classification as pocket
from ...training.fit import fit, predict
from ..layers import vpt
from . import model as sa2vp

DRY_CLASSES = 10
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """What is trained on what. `fit` holds the arguments of `companion.training.fit.fit` besides the learning rate."""

    title: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str], nn.Module]
    fit: dict = field(default_factory=dict)
    input: backbones.Input | None = None


def setting(p: SimpleNamespace, out: Path, rates: dict[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket pictures are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    return _dry(p) if p.dry_run else _paper(p)


def _pocket(p: SimpleNamespace, out: Path, rates: dict[tuple[str, str], float]) -> Setting:
    task, root = "textures", str(out / "data")
    pocket.write(study.folder(root, p.seed), list(study.TASKS), p.seed)
    methods = ("linear probing", "VPT-deep", "SA²VP")
    return Setting(
        title="which photograph a cut comes from (pocket)",
        train=study.pictures(task, root, p.seed, "trainval"),
        test=study.pictures(task, root, p.seed, "test"),
        classes=pocket.TASKS[task].classes,
        methods=methods,
        rates={method: rates[task, method] for method in methods},
        build=lambda method: study.build(method, len(pocket.TASKS[task].classes), p.seed),
        fit={"epochs": study.EPOCHS, "batch": study.BATCH, "seed": p.seed, "accelerator": "cpu"},
        input=backbones.input_of(encoders.build("pocket_vit", "random")),
    )


def published_settings(backbone: str, dataset: str) -> dict[str, float]:
    """Width r, scale s, learning rate and batch of a data set, from the authors' README (the paper's YAML).

    A data set without a row of its own takes its group's. Where the README gives two values, the first is taken for the
    batch and the larger for s of Swin (0.5 is what its code has).
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
        "batch": int(str(row["batch"]).split("/")[0]),
    }


def build(p: SimpleNamespace, method: str, classes: int, dataset: str, weights: str | Path) -> nn.Module:
    """A method at full size on the backbone that the parameters name."""
    # Swin's stochastic depth is the released 0.2; frozen VPT and probing never see it (they keep eval mode)
    options = {"drop_path_rate": 0.2} if p.backbone == "swin_b" else {}
    backbone = backbones.build(p.backbone, weights, **options)
    torch.manual_seed(p.seed)
    if method == "SA²VP":
        published = published_settings(p.backbone, dataset)
        kind = sa2vp.SA2VP if p.backbone == "vit_b16" else sa2vp.SA2VPSwin
        width = p.width or published["width"]
        maps = {"new_maps": 1} if dataset == "fgvc/cars196" and p.backbone == "vit_b16" else {}
        return kind(backbone, classes, width, published["scale"], attention=p.attention, **maps)
    if method.startswith("VPT"):
        return vpt.VPT(backbone, classes, tokens=50, deep=method == "VPT-deep")
    return {"linear probing": vpt.LinearProbe, "full fine-tuning": vpt.FineTuning}[method](backbone, classes)


def _options(p: SimpleNamespace, published: dict[str, float], epochs: float) -> dict:
    return {
        "epochs": epochs,
        "batch": published["batch"],
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "schedule": "cosine",
        "warmup": 0.1,
        "final_lr": 1e-7,
        "weight_decay": 1e-4,
    }


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size model with random weights, two optimiser steps on generated pictures of the real shape."""
    published = published_settings(p.backbone, p.dataset)
    if p.accelerator == "cpu" or not torch.cuda.is_available():
        published["batch"] = 8  # the published batch wants the memory of a card
    seen = backbones.input_of(backbones.build(p.backbone, "random"))
    generator = torch.Generator().manual_seed(p.seed)

    def generated(count: int) -> TensorDataset:
        images = torch.randn(count, 3, seen.size, seen.size, generator=generator)
        return TensorDataset(images, torch.arange(count) % DRY_CLASSES)

    torch.manual_seed(p.seed)
    return Setting(
        title="generated pictures (dry run: accuracies mean nothing)",
        train=generated(2 * published["batch"]),
        test=generated(16),
        classes=tuple(f"class {i}" for i in range(DRY_CLASSES)),
        methods=(p.method,),
        rates={p.method: published["lr"]},
        build=lambda method: build(p, method, DRY_CLASSES, p.dataset, "random"),
        fit=_options(p, published, 1),
        input=seen,
    )


def _paper(p: SimpleNamespace) -> Setting:
    """The published recipe on real pictures: 100 epochs; train and validation pictures together where VTAB does so."""
    weights = p.weights or "pretrained"
    seen = backbones.input_of(backbones.build(p.backbone, weights))
    # the released code normalises with 0.5 whatever the backbone; here each gets what it was trained with
    crops = not p.dataset.startswith("vtab/")
    train_transform = classification.crop_transform(seen, True) if crops else classification.resize_transform(seen)
    test_transform = classification.crop_transform(seen, False) if crops else classification.resize_transform(seen)
    published = published_settings(p.backbone, p.dataset)
    if p.dataset == "folder":  # nothing is chosen on val: it is tested on, or trained on where there is a test part
        parts = classification.image_folder(p.data_root, seed=p.seed)
        train, test = (parts["trainval"], parts["test"]) if "test" in parts else (parts["train"], parts["val"])
        train.transform, test.transform = train_transform, test_transform
        names = tuple(train.class_names)
        published["batch"] = min(published["batch"], max(len(train) // p.devices, 1) * p.devices)
    else:
        split = "trainval" if p.dataset.startswith("vtab/") else "train"
        train = classification.load(p.dataset, p.data_root, split, train_transform)
        test = classification.load(p.dataset, p.data_root, "test", test_transform)
        names = tuple(map(str, range(train.classes)))
    return Setting(
        title=p.dataset,
        train=train,
        test=test,
        classes=names,
        methods=(p.method,),
        rates={p.method: published["lr"]},
        build=lambda method: build(p, method, len(names), p.dataset, weights),
        fit=_options(p, published, 100) | {"workers": WORKERS},
        input=seen,
    )


def train(found: Setting, method: str, **options) -> tuple[nn.Module, list[dict]]:
    """Build and train a method of a setting; returns the model, in eval mode, and the history of its training."""
    model = found.build(method)
    settings = found.fit | {"lr": found.rates[method], "name": method} | options
    if isinstance(model, vpt.LinearProbe) and isinstance(found.train, TensorDataset):
        # frozen features do not change: once an image, not once an epoch
        features = predict(model.backbone, found.train, batch=64, accelerator=settings["accelerator"])
        history = fit(model.head, study.loss, TensorDataset(features, found.train.tensors[1]), **settings)
        return model.eval(), history
    return model, fit(model, study.loss, found.train, **settings)


def accuracy(model: nn.Module, found: Setting) -> float:
    """Top-1 accuracy on the test pictures, in percent, of the image pathway."""
    options = {name: found.fit[name] for name in ("accelerator", "precision", "workers") if name in found.fit}
    logits = predict(model, found.test, batch=64, **options)
    labels = found.test.tensors[1] if isinstance(found.test, TensorDataset) else torch.tensor(found.test.labels)
    return 100 * float((logits.argmax(1) == labels).float().mean())


def first(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first items of a data set: images (n, 3, H, W), labels (n,)."""
    items = [data[i] for i in range(min(count, len(data)))]
    return torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with what is not as published."""
    changed = []
    if p.method == "SA²VP":
        changed += [f"{p.attention} attention"] if p.attention != "aligned" else []
        usual = published_settings(p.backbone, p.dataset)["width"]
        changed += [f"r = {p.width}"] if p.width not in (0, usual) else []
    return ", ".join([p.method, *changed])


def measured(path: Path, new: dict[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (backbone, method, dataset, seed); `new` is added, or replaces its row."""
    return upsert_rows(path, ["backbone", "method", "dataset", "seed"], ["accuracy"], [new] if new else ())


def cells(rows: pd.DataFrame, backbone: str, group: str) -> dict[tuple[str, str], float]:
    """Mean accuracy over seeds by (method, column) for the data sets of a group ("vtab", "fgvc", "hta"), as
    `report.beside` takes it. The mean over a table's columns is left to `with_mean`."""
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
    """Mean accuracy by (method, benchmark) of the methods that have all data sets of it: "fgvc", "hta", the three
    groups "vtab_natural", "vtab_specialized" and "vtab_structured", and the two means over VTAB-1k that are in use."""
    sets = defaultdict(list)
    for name, dataset in DATASETS.items():
        group, _, key = name.partition("/")
        if dataset.task == "classification" and group in ("fgvc", "hta", "vtab"):
            sets[group if group != "vtab" else dataset.group.replace("VTAB-1k ", "vtab_").lower()].append((group, key))
    found = {}
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


def with_mean(found: dict[tuple[str, str], float], columns: list[str]) -> dict[tuple[str, str], float]:
    """`found` with the mean of each method that has all of `columns` but "mean": computed from cells, never typed."""
    sets = [c for c in columns if c not in ("mean", "method")]
    complete = [m for m in {m for m, _ in found} if all((m, c) in found for c in sets)]
    return found | {(m, "mean"): sum(found[m, c] for c in sets) / len(sets) for m in complete}
