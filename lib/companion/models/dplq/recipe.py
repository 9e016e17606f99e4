"""DPLQ: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from ... import backbones
from ...data import DATASETS, domains, fewshot
from ...data.domains_sets import CLASSES
from ...errors import BadParameter, MissingWeights
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.papers import paper
from ...toy.ablations import dplq as study
from ...toy.datasets import domains as pocket
from ...training.fit import fit, predict
from ..layers import clip_prompting as prompting
from . import model as dplq

TASK, LIVE = "remote", ("zero-shot CLIP", "MaPLe", "DPLQ")
DOMAINS = {"remote": "remote-sensing", "medical": "medical"}
TRANSFERS = {"cross-dataset": fewshot.cross_dataset, "domain generalisation": fewshot.domain_generalisation}
TEST_BATCH = 24  # as released: the noise of an image's prompts depends on its batch, at test time too
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and tested on what.

    Attributes:
        classes: the names of the classes that are trained on, by label.
        test_classes: the same of every test set, by its name.
        rates: learning rates of the methods that are trained.
        build: the model of a method, before training.
        inputs: of a method and "train" or the name of a test set: items (image, label), or what the method reads of an
            image (see `toy.ablations.dplq.INPUTS`), its label, and the domain feature when it is known already.
        learn: trains a model in place: (model, method, its training inputs, arguments of `fit`) to the history.
        accuracy: of a model, test inputs and their class names; top-1, in percent.
    """

    title: str
    classes: tuple[str, ...]
    test_classes: dict[str, tuple[str, ...]]
    methods: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str], prompting.PromptedCLIP]
    inputs: Callable[[str, str], Dataset]
    learn: Callable[..., list[dict]]
    accuracy: Callable[[prompting.PromptedCLIP, Dataset, tuple[str, ...]], float]


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
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
    check_targets(p)
    return _dry(p) if p.dry_run else _paper(p)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), TASK, p.seed)
    classes = {part: study.pictures(TASK, root, p.seed, part)[2] for part in ("train", "test base", "test novel")}
    chosen = {method: rates[TASK, method] for method in LIVE if method not in study.UNTRAINED}

    def inputs(method: str, part: str) -> TensorDataset:
        return study.inputs(method, TASK, root, p.seed, part if part == "train" else f"test {part}")

    def build(method: str) -> prompting.PromptedCLIP:
        return study.build(method, classes["train"], p.seed, inputs(method, "train").tensors[-1].shape[-1])

    def learn(model: nn.Module, method: str, data: TensorDataset, **options) -> list[dict]:
        return study.train_model(model, method, data, chosen[method], p.seed, **options)

    return Setting(
        title=f"{TASK} (pocket), base to novel",
        classes=classes["train"],
        test_classes={half: classes[f"test {half}"] for half in ("base", "novel")},
        methods=LIVE,
        rates=chosen,
        build=build,
        inputs=inputs,
        learn=learn,
        accuracy=functools.partial(study.accuracy, seed=p.seed),
    )


# --- the published recipe ---------------------------------------------------------------------------------------------


def published_settings(protocol: str) -> dict[str, float]:
    """Learning rate, epochs, depth, shots, ... of a protocol, from the authors' configuration files (the paper's YAML).

    Domain generalisation tests the model of the cross-dataset runs.
    """
    column = "base_to_novel" if protocol == "base to novel" else "cross_dataset"
    return published_table("dplq", "code-recipe").set_index("method")[column].to_dict()


def _options(p: SimpleNamespace, workers: int = 0) -> dict:
    """The authors' optimiser for `fit`: SGD, one rate an epoch, the first epoch at a small constant one."""
    recipe = published_settings(p.protocol)
    epochs = int(recipe["epochs"])
    return {
        "epochs": epochs,
        "batch": int(recipe["train batch"]),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "decay": "all",
        "schedule": "cosine by epoch",
        "warmup": recipe["warm-up epochs"] / epochs,
        "warmup_lr": recipe["warm-up learning rate"],
        "final_lr": 0.0,
        "workers": workers,
    }


def build(
    p: SimpleNamespace, method: str, classes: tuple[str, ...], clip: nn.Module, domain: nn.Module | None
) -> prompting.PromptedCLIP:
    """A method at full size on a frozen CLIP; only DPLQ reads the domain model."""
    torch.manual_seed(p.seed)
    recipe = published_settings(p.protocol)
    tokens, depth = int(recipe["context tokens"]), int(recipe["prompt depth"])
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    given = (clip, classes, tokenizer)
    kinds = {
        "zero-shot CLIP": lambda: prompting.ZeroShot(*given),
        "CoOp": lambda: prompting.CoOp(*given),
        "CoCoOp": lambda: prompting.CoCoOp(*given),
        "MaPLe": lambda: prompting.MaPLe(*given, tokens=tokens, depth=depth),
        "DPLQ": lambda: dplq.DPLQ(*given, domain, tokens=tokens, depth=depth, noise=p.noise),
    }
    return kinds[method]()


def _clip(p: SimpleNamespace, weights: str | Path) -> nn.Module:
    config = open_clip.get_model_config(p.clip.partition("/")[0])
    if config and "hf_tokenizer_name" in config["text_cfg"]:
        raise BadParameter("clip", p.clip, "a CLIP with OpenAI's vocabulary, such as 'ViT-B-16/openai'")
    return backbones.build(f"openclip:{p.clip}", weights)


def domain_name(p: SimpleNamespace) -> str:
    """The domain model that the parameters ask for, by the data set when they leave it open."""
    found = p.domain or DOMAINS.get(p.dataset.partition("/")[0])
    if not found:
        raise BadParameter("domain", p.domain, [*DOMAINS.values(), "clip", "none", "an encoder of timm"])
    return found


def weights(p: SimpleNamespace, name: str, given: str) -> str | Path:
    """What is loaded for "clip", "remote-sensing" or "medical": the parameter, the usual file below
    `<data_root>/weights`, or what the cache has."""
    file = next(w["file"] for w in paper("dplq")["weights"] if w["name"] == name)
    usual = Path(p.data_root) / "weights" / file
    if given or usual.is_file() or name != "remote-sensing":
        return given or (usual if usual.is_file() else "pretrained")
    ways = [
        f"put {file} into {usual.parent}; the README of github.com/ViTAE-Transformer/Remote-Sensing-RVSA links it",
        "domain_weights = '<file>', the same file wherever it is",
        "domain = 'vit_base_patch16_224.mae' stands in with natural images, domain = 'clip' is the control",
    ]
    raise MissingWeights("remote-sensing MAE ViT-B/16", usual.parent, ways)


def _domain(p: SimpleNamespace, clip: nn.Module) -> nn.Module | None:
    if p.method != "DPLQ":
        return None
    name = domain_name(p)
    own = name in DOMAINS.values()
    source = weights(p, name, p.domain_weights) if own else p.domain_weights or "pretrained"
    return _domain_model(name, source, clip)


class OneByOne(nn.Module):
    """A frozen encoder that is given its images one after the other: (b, 3, H, W) to (b, F), with `num_features` F.

    For pictures so large that one of them is work enough: at 1024 pixels SAM's attention takes gigabytes an image.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.num_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.encoder(image) for image in images.split(1)])


def _domain_model(name: str, source: str | Path, clip: nn.Module) -> nn.Module:
    model = dplq.domain_model(name, source, clip=clip)
    return OneByOne(model) if name == "medical" else model


def _paper(p: SimpleNamespace) -> Setting:
    """The published recipe on real pictures: 16 images a class, tested as the protocol says."""
    clip = _clip(p, weights(p, "clip", p.weights))
    domain = _domain(p, clip)
    seen = backbones.input_of(clip)
    transform = domains.clip_transform(seen)
    source = splits(p, p.dataset, transform)
    source["train"].transform = domains.clip_transform(seen, train=True)
    shots = int(published_settings(p.protocol)["shots"])
    if p.protocol == "base to novel":
        protocol = fewshot.base_to_novel(source, shots, p.seed)
    else:
        others = {name: splits(p, name, transform) for name in targets(p)}
        protocol = TRANSFERS[p.protocol](source, others, shots, p.seed)
    parts = {"train": protocol.train, **protocol.tests}
    names = {name: tuple(part.class_names) for name, part in parts.items()}
    return _full_size(p, f"{p.dataset}, {p.protocol}", parts, names, clip, domain, _options(p, WORKERS))


def _full_size(
    p: SimpleNamespace,
    title: str,
    parts: dict[str, Dataset],
    names: dict[str, tuple[str, ...]],
    clip: nn.Module,
    domain: nn.Module | None,
    options: dict,
) -> Setting:
    """A setting of `parts`, "train" and the test sets, whose classes are `names`."""
    rates = _rates(p)

    def learn(model: nn.Module, method: str, data: Dataset, **changes) -> list[dict]:
        return fit(model, study.loss, data, **(options | {"lr": rates[method], "name": method} | changes))

    return Setting(
        title=title,
        classes=names["train"],
        test_classes={name: classes for name, classes in names.items() if name != "train"},
        methods=(p.method,),
        rates=rates,
        build=lambda method: build(p, method, names["train"], clip, domain),
        inputs=lambda method, part: parts[part],
        learn=learn,
        accuracy=functools.partial(
            accuracy, seed=p.seed, accelerator=p.accelerator, precision=p.precision, workers=options["workers"]
        ),
    )


def _rates(p: SimpleNamespace) -> dict[str, float]:
    return {} if p.method in study.UNTRAINED else {p.method: published_settings(p.protocol)["learning rate"]}


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size models with random weights, two optimiser steps on generated pictures of the real shape."""
    known = tuple(CLASSES.get(p.dataset, CLASSES["remote/aid"]).values())
    base, novel = fewshot.halves(known)
    transfer = p.protocol != "base to novel"
    names, others = (known, known) if transfer else (base, novel)
    torch.manual_seed(p.seed)
    clip = _clip(p, "random")
    domain = _domain_model(domain_name(p), "random", clip) if p.method == "DPLQ" else None
    size, generator = backbones.input_of(clip).size, torch.Generator().manual_seed(p.seed)

    def generated(count: int, classes: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % classes)

    # a single epoch has nothing after its warm-up: it gets the rate of the second published one
    options = _options(p) | {"epochs": 1, "warmup": 0.0}
    tests = ("source", "generated") if transfer else ("base", "novel")
    named = {"train": names, tests[0]: names, tests[1]: others}
    # two test pictures: on a CPU the medical domain model takes many seconds for each
    parts = {part: generated(2, len(classes)) for part, classes in named.items()}
    parts["train"] = generated(2 * options["batch"], len(names))
    return _full_size(p, "generated pictures (dry run: accuracies mean nothing)", parts, named, clip, domain, options)


# --- data sets --------------------------------------------------------------------------------------------------------


def check_targets(p: SimpleNamespace) -> None:
    """Raises `BadParameter` when `targets` does not go together with `protocol` and `dataset`."""
    known, named = list(CLASSES), _named(p)
    if p.protocol == "base to novel" and named:
        raise BadParameter("targets", p.targets, "nothing with the protocol 'base to novel': it tests on the same set")
    if p.protocol != "base to novel" and p.dataset == "folder" and not named:
        raise BadParameter("targets", p.targets, known)
    if p.dataset in named:
        raise BadParameter("targets", p.dataset, [name for name in known if name != p.dataset])


def _named(p: SimpleNamespace) -> list[str]:
    return [name.strip() for name in p.targets.split(",") if name.strip()]


def targets(p: SimpleNamespace) -> list[str]:
    """The sets that a model is carried over to: those named, or all others of the same domain."""
    domain = p.dataset.partition("/")[0]
    return _named(p) or [name for name in CLASSES if name.startswith(f"{domain}/") and name != p.dataset]


def splits(p: SimpleNamespace, name: str, transform: Callable) -> dict[str, Dataset]:
    """The splits of a data set below `data_root`; "folder" is that folder itself."""
    return (
        domains.own_folder(p.data_root, transform) if name == "folder" else domains.splits(name, p.data_root, transform)
    )


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **options) -> tuple[prompting.PromptedCLIP, list[dict]]:
    """Build a method of a setting and train it; zero-shot CLIP has nothing to train, its history is empty."""
    model = found.build(method)
    if method not in found.rates:
        return model.eval(), []
    return model, found.learn(model, method, found.inputs(method, "train"), **options)


def accuracy(model: prompting.PromptedCLIP, data: Dataset, classes: tuple[str, ...], seed: int = 0, **options) -> float:
    """Top-1 accuracy in percent on (image, label) among `classes`; `seed` is that of DPLQ's noise, the rest is for
    `companion.training.fit.predict`."""
    model.set_classes(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logits = predict(model, data, batch=TEST_BATCH, **options)
    labels = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)
    return 100 * float(multiclass_accuracy(logits, labels, num_classes=len(classes), average="micro"))


def scores(model: prompting.PromptedCLIP, found: Setting, method: str) -> dict[str, float]:
    """Accuracy in percent on every test set among its own classes, and "HM", the harmonic mean of base and novel.

    The model is left with the classes that it was trained on.
    """
    accuracies = {
        part: found.accuracy(model, found.inputs(method, part), classes) for part, classes in found.test_classes.items()
    }
    model.set_classes(found.classes)
    if {"base", "novel"} <= accuracies.keys():
        accuracies["HM"] = fewshot.harmonic_mean(accuracies["base"], accuracies["novel"])
    return accuracies


def first(found: Setting, method: str, part: str, count: int) -> tuple[Tensor, ...]:
    """The first items of `inputs`, stacked: what the model reads (n, ...), labels (n,), maybe domain features (n, F).

    `images, labels, *domain = first(found, "DPLQ", "base", 24)`, then `model(images, *domain)`.
    """
    data = found.inputs(method, part)
    items = [data[i] for i in range(min(count, len(data)))]
    return tuple(torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*items, strict=True))


# --- results that gather ----------------------------------------------------------------------------------------------


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with what is not as published."""
    changed = []
    if p.method == "DPLQ":
        usual = DOMAINS.get(p.dataset.partition("/")[0])
        changed += [f"domain model {p.domain}"] if p.domain not in ("", usual) else []
        changed += [f"noise {p.noise}"] if p.noise != "always" else []
    changed += [p.clip] if p.clip != "ViT-B-16/openai" else []
    return ", ".join([p.method, *changed])


def rows(p: SimpleNamespace, found: Mapping[str, float]) -> list[dict[str, object]]:
    """What `scores` gave as rows for `measured`, one a test set."""
    same = {"method": label(p), "protocol": p.protocol, "dataset": p.dataset}
    return [same | {"test": n, "seed": p.seed, "accuracy": a} for n, a in found.items() if n != "HM"]


def measured(path: Path, new: Iterable[Mapping[str, object]] = ()) -> pd.DataFrame:
    """The real results in `path`, a row a (method, protocol, dataset, test, seed); `new` are added."""
    return upsert_rows(path, ["method", "protocol", "dataset", "test", "seed"], ["accuracy"], new)


def cells(table: pd.DataFrame, protocol: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) of the protocol's tables, as `report.beside` takes them.

    Base to novel has the columns "AID base", "AID novel" and "AID HM" for every set; HM is taken for each seed. The
    other protocols have a column a set, and a row for each set that was trained on.
    """
    chosen = table[table.protocol == protocol]
    found = {}
    if protocol == "base to novel":
        for (method, dataset), group in chosen.groupby(["method", "dataset"]):
            both = group.pivot_table(index="seed", columns="test", values="accuracy").dropna()
            if {"base", "novel"} <= set(both.columns):
                both["HM"] = [fewshot.harmonic_mean(b, n) for b, n in zip(both.base, both.novel, strict=True)]
            found |= {(method, f"{_column(dataset)} {test}"): float(both[test].mean()) for test in both.columns}
        return found
    for (method, source, test), group in chosen.groupby(["method", "dataset", "test"]):
        name = f"{method}, trained on {_column(source)}"
        found[name, _column(source if test == "source" else test)] = float(group.accuracy.mean())
    return found


def _column(dataset: str) -> str:
    """A data set as the authors call it, which is how the tables do."""
    return DATASETS[dataset].folders[-1] if dataset in DATASETS else dataset


def tables(table: pd.DataFrame, protocol: str) -> dict[str, pd.DataFrame]:
    """Published beside measured, by title: for base to novel a table a set that has a number, the others in one."""
    measured_here, found = cells(table, protocol), {}
    for domain in DOMAINS:
        frame = published_table("dplq", f"{protocol.replace(' ', '-')}-{domain}")
        columns = [c for c in frame.columns if c != "method"]
        known = {column for _, column in measured_here} | set(frame[columns].dropna(axis=1, how="all").columns)
        groups = {frame.attrs["title"]: {c: c for c in columns}}
        if protocol == "base to novel":
            sets = dict.fromkeys(c.rpartition(" ")[0] for c in columns)
            groups = {s: {f"{s} {c}": c for c in ("base", "novel", "HM")} for s in sets}
        empty = []
        for title, named in groups.items():
            if known & named.keys():
                here = {(m, named[c]): value for (m, c), value in measured_here.items() if c in named}
                found[title] = compare_published(frame[["method", *named]].rename(columns=named), here)
            else:
                empty += named
        if empty:
            found[frame.attrs["title"]] = compare_published(frame[["method", *empty]])
    return found
