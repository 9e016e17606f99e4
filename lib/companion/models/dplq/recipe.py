"""DPLQ's `paper` profile: the published training, the protocols, and the tables of results.

`p` are the checked parameters of the notebook, dplq.ipynb: `method`, `protocol`, `dataset`, `targets`, `data_root`,
`clip`, `weights`, `domain`, `domain_weights`, `noise`, `seed`, `dry_run`, and those that `Hardware.of` reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, domains, fewshot
from ...data.domains_sets import CLASSES
from ...errors import BadParameter, MissingWeights
from ...evaluation.tables import Results, compare_published, published_table
from ...ops import papers
from ...training.fit import Hardware, History, predict
from ...training.recipe import Training, run
from ...training.schedules import MakeOptimizer, Schedule, schedule, sgd
from ..layers import clip_prompting as prompting
from .model import DPLQ, PROMPT, domain_model, loss

DOMAINS = {"remote": "remote-sensing", "medical": "medical"}
TRANSFERS = {"cross-dataset": fewshot.cross_dataset, "domain generalisation": fewshot.domain_generalisation}
UNTRAINED = ("zero-shot CLIP",)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD, on all trainable parameters
SOURCES = {"remote": "remote/rsicd", "medical": "medical/btmri"}
"""The sets that the transfers begin from: of the medical script, and the example in the README of the successor."""
TEST_BATCH = 24  # as released: the noise of an image's prompts depends on its batch, also at test time
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """The trainings and test sets of a run.

    Attributes:
        classes: the names of the training classes, by label.
        test_classes: the same of every test set, by its name.
        trainings: by method, in the order of the tables.
        learning_rates: of the methods that are trained.
        inputs: of a method and "train" or the name of a test set: items (image, label), or (features or image, label,
            and optionally domain feature) if features are cached.
        accuracy: of a model, test inputs and their class names; top-1, in percent.
        out: folder of the run, for checkpoints and final weights; None: they are not saved.
    """

    title: str
    classes: tuple[str, ...]
    test_classes: Mapping[str, tuple[str, ...]]
    trainings: Mapping[str, Training]
    learning_rates: Mapping[str, float]
    inputs: Callable[[str, str], Dataset]
    accuracy: Callable[[prompting.PromptedCLIP, Dataset, tuple[str, ...]], float]
    out: Path | None = None

    def train(self, method: str, **changes: Any) -> tuple[prompting.PromptedCLIP, History]:
        """The trained model of a method and its history, empty where nothing is trained; `changes` go to `fit`.

        With a folder, a stopped training is resumed, a finished one is loaded, and the final weights are saved: domain
        generalisation tests those of the cross-dataset run in the same folder.
        """
        return run(self.trainings[method], self.out, **changes)

    def scores(self, method: str, model: prompting.PromptedCLIP) -> dict[str, float]:
        """Accuracy in percent on every test set over its own classes, and "HM", the harmonic mean of base and novel.

        Afterwards the model has its training classes again.
        """
        accuracies = {
            part: self.accuracy(model, self.inputs(method, part), classes)
            for part, classes in self.test_classes.items()
        }
        model.set_classes(self.classes)
        if {"base", "novel"} <= accuracies.keys():
            accuracies["HM"] = fewshot.harmonic_mean(accuracies["base"], accuracies["novel"])
        return accuracies

    def items(self, method: str, part: str, count: int) -> tuple[Tensor, ...]:
        """The first items of `inputs`, stacked: inputs of the model (n, ...), labels (n,), and optionally domain
        features (n, F)."""
        data = self.inputs(method, part)
        rows = [data[i] for i in range(min(count, len(data)))]
        return tuple(torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*rows, strict=True))


# --- the published recipe ---------------------------------------------------------------------------------------------


def published_settings(protocol: str) -> dict[str, float]:
    """Learning rate, epochs, depth, shots, ... of a protocol, from the authors' configuration files (the paper's YAML).

    Domain generalisation tests the model of the cross-dataset runs.
    """
    column = "base_to_novel" if protocol == "base to novel" else "cross_dataset"
    return published_table("dplq", "code-recipe").set_index("method")[column].to_dict()


def optimizer(learning_rate: float, weight_decay: float = WEIGHT_DECAY, momentum: float = MOMENTUM) -> MakeOptimizer:
    """The authors' optimiser: SGD with momentum and weight decay on all trainable parameters."""
    return sgd(learning_rate, weight_decay, momentum=momentum, decay="all")


def learning_rates(epochs: int, warmup: float, warmup_lr: float) -> Schedule:
    """One learning rate per epoch: `warmup` epochs at a small constant one, then a cosine over the length of all
    epochs."""
    return schedule("cosine by epoch", warmup / epochs, 0.0, warmup_lr)


def last(images: int, published: Mapping[str, float]) -> str:
    """The argument `last` of `fit`: the last images of an epoch are dropped, unless there is no full batch."""
    return "drop" if images >= published["train batch"] else "train"


def fit_options(p: SimpleNamespace) -> dict[str, Any]:
    """The arguments of `fit`: one learning rate per epoch, the first epoch at a small constant one."""
    published = published_settings(p.protocol)
    epochs = int(published["epochs"])
    return {
        "epochs": epochs,
        "batch": int(published["train batch"]),
        "optimizer": optimizer(published["learning rate"]),
        "schedule": learning_rates(epochs, published["warm-up epochs"], published["warm-up learning rate"]),
        "seed": p.seed,
        "hardware": Hardware.of(p, "dplq", workers=WORKERS),
    }


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile for the notebook's parameters; results go below `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    check_targets(p)
    published = published_settings(p.protocol)
    torch.manual_seed(p.seed)  # of the random weights of a dry run
    clip = _clip(p, "random" if p.dry_run else weights(p, "clip", p.weights))
    domain = _domain(p, clip)
    data = _generated(p, clip) if p.dry_run else _real(p, clip)
    train, trained = data.parts["train"], p.method not in UNTRAINED

    options = fit_options(p) | {"last": last(len(train), published), "name": p.method}
    if p.dry_run:  # a single epoch would be all warm-up, so it uses the learning rate of the second published one
        options |= {"epochs": 1, "schedule": schedule("cosine by epoch", 0.0, 0.0)}
    training = Training(
        name=f"{data.training}, {p.method}",
        build=lambda: build(p, p.method, data.names["train"], clip, domain),
        loss=loss,
        data=(lambda: train) if trained else None,
        fit=options,
        facts={**data.facts, "precision": options["hardware"].precision},
    )

    def top1(model: prompting.PromptedCLIP, tested: Dataset, classes: tuple[str, ...]) -> float:
        return accuracy(model, tested, classes, p.seed, options["hardware"])

    return Setting(
        title=data.title,
        classes=data.names["train"],
        test_classes={name: classes for name, classes in data.names.items() if name != "train"},
        trainings={p.method: training},
        learning_rates={p.method: published["learning rate"]} if trained else {},
        inputs=lambda method, part: data.parts[part],
        accuracy=top1,
        out=None if p.dry_run else Path(out),
    )


def build(
    p: SimpleNamespace, method: str, classes: tuple[str, ...], clip: nn.Module, domain: nn.Module | None
) -> prompting.PromptedCLIP:
    """A method at full size on a frozen CLIP; only DPLQ uses the domain model."""
    torch.manual_seed(p.seed)
    published = published_settings(p.protocol)
    tokens, depth = int(published["context tokens"]), int(published["prompt depth"])
    common = (clip, classes, open_clip.get_tokenizer(p.clip.partition("/")[0]))
    kinds = {
        "zero-shot CLIP": lambda: prompting.ZeroShot(*common),
        "CoOp": lambda: prompting.CoOp(*common),
        "CoCoOp": lambda: prompting.CoCoOp(*common),
        "MaPLe": lambda: prompting.MaPLe(*common, tokens=tokens, depth=depth),
        "DPLQ": lambda: DPLQ(*common, domain, tokens=tokens, depth=depth, noise=p.noise),
    }
    return kinds[method]()


# --- CLIP and domain models -------------------------------------------------------------------------------------------


def _clip(p: SimpleNamespace, weights: str | Path) -> nn.Module:
    config = open_clip.get_model_config(p.clip.partition("/")[0])
    if config and "hf_tokenizer_name" in config["text_cfg"]:
        raise BadParameter("clip", p.clip, "a CLIP with OpenAI's vocabulary, such as 'ViT-B-16/openai'")
    return backbones.build(f"openclip:{p.clip}", weights)


def domain_name(p: SimpleNamespace) -> str:
    """The domain model that the parameters name; by default the one of the dataset's domain."""
    name = p.domain or DOMAINS.get(p.dataset.partition("/")[0])
    if not name:
        raise BadParameter("domain", p.domain, [*DOMAINS.values(), "clip", "none", "an encoder of timm"])
    return name


def weights(p: SimpleNamespace, name: str, given: str) -> str | Path:
    """The weights of "clip", "remote-sensing" or "medical": the parameter, the usual file below
    `<data_root>/weights`, or the cached ones."""
    file = next(w["file"] for w in papers.paper("dplq")["weights"] if w["name"] == name)
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
    if p.dry_run:
        return _domain_model(name, "random", clip)
    own = name in DOMAINS.values()
    return _domain_model(name, weights(p, name, p.domain_weights) if own else p.domain_weights or "pretrained", clip)


class OneByOne(nn.Module):
    """A frozen encoder that runs on one image at a time: (b, 3, H, W) to (b, F), with `num_features` F.

    For large images: at 1024 pixels SAM's attention takes gigabytes per image.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.num_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.encoder(image) for image in images.split(1)])


def _domain_model(name: str, source: str | Path, clip: nn.Module) -> nn.Module:
    model = domain_model(name, source, clip=clip)
    return OneByOne(model) if name == "medical" else model


# --- datasets ---------------------------------------------------------------------------------------------------------


def check_targets(p: SimpleNamespace) -> None:
    """Raise `BadParameter` when `targets` conflicts with `protocol` and `dataset`."""
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
    """The datasets that a model is transferred to: those named, or all others of the same domain."""
    domain = p.dataset.partition("/")[0]
    return _named(p) or [name for name in CLASSES if name.startswith(f"{domain}/") and name != p.dataset]


def splits(p: SimpleNamespace, name: str, transform: Callable) -> dict[str, Dataset]:
    """The splits of a dataset below `data_root`; "folder" is that folder itself."""
    return (
        domains.own_folder(p.data_root, transform) if name == "folder" else domains.splits(name, p.data_root, transform)
    )


@dataclass(frozen=True)
class _Data:
    """Images of a run: "train" and the test sets, with their class names; what identifies the training."""

    title: str
    parts: Mapping[str, Dataset]
    names: Mapping[str, tuple[str, ...]]
    training: str = "dry run"
    facts: Mapping[str, Any] = field(default_factory=dict)


def _real(p: SimpleNamespace, clip: nn.Module) -> _Data:
    """16 images per class of the training set, and the test sets of the protocol."""
    seen = backbones.input_of(clip)
    transform, shots = domains.clip_transform(seen), int(published_settings(p.protocol)["shots"])
    source = splits(p, p.dataset, transform)
    source["train"].transform = domains.clip_transform(seen, train=True)
    if p.protocol == "base to novel":
        protocol = fewshot.base_to_novel(source, shots, p.seed)
    else:
        others = {name: splits(p, name, transform) for name in targets(p)}
        protocol = TRANSFERS[p.protocol](source, others, shots, p.seed)
    parts = {"train": protocol.train, **protocol.tests}
    names = {name: tuple(part.class_names) for name, part in parts.items()}
    # both transfers test one model: the second run reuses the training of the first
    trained_on = "base classes" if p.protocol == "base to novel" else "all classes"
    facts = {name: getattr(p, name) for name in ("dataset", "noise", "seed")}
    facts |= {"data_root": Path(p.data_root), "trained on": trained_on}
    if p.dataset == "folder":  # its images and labels may change between runs
        paths = [os.path.relpath(path, p.data_root) for path in protocol.train.sources]
        facts |= {"images": paths, "labels": protocol.train.labels, "classes": names["train"]}
    return _Data(f"{p.dataset}, {p.protocol}", parts, names, f"{p.dataset}, {trained_on}, seed {p.seed}", facts)


def _generated(p: SimpleNamespace, clip: nn.Module) -> _Data:
    """Generated images of the real shape, for two optimiser steps of a dry run."""
    known = tuple(CLASSES.get(p.dataset, CLASSES["remote/aid"]).values())
    base, novel = fewshot.halves(known)
    names = {"train": base, "base": base, "novel": novel}
    if p.protocol != "base to novel":
        names = {"train": known, "source": known, "generated": known}
    size, generator = backbones.input_of(clip).size, torch.Generator().manual_seed(p.seed)
    # two test images: on a CPU the medical domain model takes many seconds for each
    counts = dict.fromkeys(names, 2) | {"train": 2 * int(published_settings(p.protocol)["train batch"])}

    def part(count: int, classes: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % classes)

    parts = {name: part(counts[name], len(classes)) for name, classes in names.items()}
    return _Data("generated images (dry run: accuracies mean nothing)", parts, names)


# --- testing ----------------------------------------------------------------------------------------------------------


def accuracy(
    model: prompting.PromptedCLIP, data: Dataset, classes: tuple[str, ...], seed: int, hardware: Hardware
) -> float:
    """Top-1 accuracy in percent on (image, label) among `classes`; `seed` is that of DPLQ's noise."""
    model.set_classes(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predicted = predict(model, data, batch=TEST_BATCH, hardware=hardware).argmax(1)
    labels = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor(data.labels)
    return 100 * float((predicted == labels).double().mean())


# --- results ----------------------------------------------------------------------------------------------------------


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with its differences from the published setting."""
    changed = []
    if p.method == "DPLQ":
        usual = DOMAINS.get(p.dataset.partition("/")[0])
        changed += [f"domain model {p.domain}"] if p.domain not in ("", usual) else []
        changed += [f"noise {p.noise}"] if p.noise != "always" else []
    changed += [p.clip] if p.clip != "ViT-B-16/openai" else []
    return ", ".join([p.method, *changed])


def rows(p: SimpleNamespace, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """The result of `Setting.scores` as rows for `measured`, one per test set."""
    same = {"method": label(p), "protocol": p.protocol, "dataset": p.dataset}
    return [same | {"test": n, "seed": p.seed, "accuracy": a} for n, a in scores.items() if n != "HM"]


RESULTS = Results.of("dplq")


def cells(table: pd.DataFrame, protocol: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) of the protocol's tables, as `tables.compare_published` takes them.

    Base to novel has the columns "AID base", "AID novel" and "AID HM" for every set; HM is taken for each seed. The
    other protocols have one column per set, and one row per training set.
    """
    one_run = ["method", "protocol", "dataset", "seed"]
    both = table[table.test.isin(["base", "novel"])].pivot_table(index=one_run, columns="test", values="accuracy")
    if {"base", "novel"} <= set(both):
        pairs = both.dropna().reset_index()
        harmonic = [fewshot.harmonic_mean(base, novel) for base, novel in zip(pairs.base, pairs.novel, strict=True)]
        table = pd.concat([table, pairs[one_run].assign(test="HM", accuracy=harmonic)])
    test = table.test.where(table.test != "source", table.dataset)
    named = table.assign(dataset=table.dataset.map(_column), test=test.map(_column))
    return RESULTS.filled(named, RESULTS.cells[protocol])


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds, as in the authors' script: of the population, not of a sample."""
    groups = table.groupby(["method", "protocol", "dataset", "test"]).accuracy
    return groups.agg(mean="mean", std=lambda x: x.std(ddof=0), seeds="count").reset_index()


def claim_cells(table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over all sets of a domain by (method, column), where all were measured.

    The columns are "base to novel, remote", which is HM, and of the transfers from `SOURCES` "cross-dataset, remote",
    "domain generalisation, remote", over the sets that were not trained on; and the same with "medical".
    """
    found: dict[tuple[str, str], float] = {}
    known = {protocol: cells(table, protocol) for protocol in ("base to novel", *TRANSFERS)}
    for domain, source in SOURCES.items():
        sets = [name for name in CLASSES if name.startswith(f"{domain}/")]
        for method in dict.fromkeys(table.method):
            named = {"base to novel": [(method, f"{_column(name)} HM") for name in sets]}
            row = f"{method}, trained on {_column(source)}"
            named |= {protocol: [(row, _column(name)) for name in sets if name != source] for protocol in TRANSFERS}
            for protocol, wanted in named.items():
                if known[protocol].keys() >= set(wanted):
                    found[method, f"{protocol}, {domain}"] = sum(known[protocol][cell] for cell in wanted) / len(wanted)
    return found


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row, from its constants."""
    novel, transfer = (published_settings(name) for name in ("base to novel", "cross-dataset"))
    both = {
        name: f"{novel[name]:g}" if novel[name] == value else f"{novel[name]:g} (base to novel), {value:g} (transfers)"
        for name, value in transfer.items()
    }
    constants = {"MOMENTUM": MOMENTUM, "WEIGHT_DECAY": WEIGHT_DECAY, "TEST_BATCH": TEST_BATCH, "PROMPT": PROMPT}
    return papers.protocol(
        "dplq", both=both, precision=papers.paper("dplq")["precision"], CROP=domains.CROP, **constants
    )


def _column(name: str) -> str:
    """The authors' name of a dataset, which the tables use."""
    return DATASETS[name].folders[-1] if name in DATASETS else name


def tables(table: pd.DataFrame, protocol: str) -> dict[str, pd.DataFrame]:
    """Published and measured numbers, by title: for base to novel one table for each set with a number, one for the
    others."""
    measured_here, found = cells(table, protocol), {}
    for domain in DOMAINS:
        frame = published_table("dplq", f"{protocol.replace(' ', '-')}-{domain}")
        columns = [c for c in frame.columns if c != "method"]
        known = {column for _, column in measured_here} | set(frame[columns].dropna(axis=1, how="all").columns)
        groups = {frame.attrs["title"]: {c: c for c in columns}}
        if protocol == "base to novel":
            sets = dict.fromkeys(c.rpartition(" ")[0] for c in columns)
            groups = {s: {f"{s} {c}": c for c in ("base", "novel", "HM")} for s in sets}
        empty: list[str] = []
        for title, named in groups.items():
            if known & named.keys():
                here = {(m, named[c]): value for (m, c), value in measured_here.items() if c in named}
                found[title] = compare_published(frame[["method", *named]].rename(columns=named), here)
            else:
                empty += named
        if empty:
            found[frame.attrs["title"]] = compare_published(frame[["method", *empty]])
    return found
