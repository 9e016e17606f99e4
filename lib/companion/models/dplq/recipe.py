"""DPLQ's `paper` profile: the published training, the protocols, and the tables of results."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
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
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.papers import paper
from ...training import checkpoints
from ...training.fit import Hardware, History, fit, predict
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
    """The methods, training data and test sets of a run.

    Attributes:
        classes: the names of the training classes, by label.
        test_classes: the same of every test set, by its name.
        methods: in the order of the tables; learning_rates: of the trained ones.
        build: the model of a method, before training.
        inputs: of a method and "train" or the name of a test set: items (image, label), or (features or image, label,
            and optionally domain feature) if features are cached.
        optimizer: of a learning rate.
        options: the other arguments of `fit`.
        accuracy: of a model, test inputs and their class names; top-1, in percent.
        folder: of the run, for checkpoints and final weights; None: they are not saved.
        training: name of the training, used for these files.
        facts: the identity of the training, for the checkpoint's key.
    """

    title: str
    classes: tuple[str, ...]
    test_classes: dict[str, tuple[str, ...]]
    methods: tuple[str, ...]
    learning_rates: dict[str, float]
    build: Callable[[str], prompting.PromptedCLIP]
    inputs: Callable[[str, str], Dataset]
    optimizer: Callable[[float], MakeOptimizer]
    options: dict
    accuracy: Callable[[prompting.PromptedCLIP, Dataset, tuple[str, ...]], float]
    folder: Path | None = None
    training: str = ""
    facts: dict = field(default_factory=dict)


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile for the notebook's parameters; results go below `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    check_targets(p)
    return _dry(p) if p.dry_run else _paper(p, out)


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


def _options(p: SimpleNamespace) -> dict:
    """The other arguments of `fit`: one learning rate per epoch, the first epoch at a small constant one."""
    recipe = published_settings(p.protocol)
    epochs = int(recipe["epochs"])
    return {
        "epochs": epochs,
        "batch": int(recipe["train batch"]),
        "schedule": learning_rates(epochs, recipe["warm-up epochs"], recipe["warm-up learning rate"]),
        "seed": p.seed,
        "hardware": Hardware.of(p, "dplq", workers=WORKERS),
    }


def last(images: int, recipe: Mapping[str, float]) -> str:
    """The argument `last` of `fit`: the last images of an epoch are dropped, unless there is no full batch."""
    return "drop" if images >= recipe["train batch"] else "train"


def build(
    p: SimpleNamespace, method: str, classes: tuple[str, ...], clip: nn.Module, domain: nn.Module | None
) -> prompting.PromptedCLIP:
    """A method at full size on a frozen CLIP; only DPLQ uses the domain model."""
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
        "DPLQ": lambda: DPLQ(*given, domain, tokens=tokens, depth=depth, noise=p.noise),
    }
    return kinds[method]()


def _clip(p: SimpleNamespace, weights: str | Path) -> nn.Module:
    config = open_clip.get_model_config(p.clip.partition("/")[0])
    if config and "hf_tokenizer_name" in config["text_cfg"]:
        raise BadParameter("clip", p.clip, "a CLIP with OpenAI's vocabulary, such as 'ViT-B-16/openai'")
    return backbones.build(f"openclip:{p.clip}", weights)


def domain_name(p: SimpleNamespace) -> str:
    """The domain model that the parameters name; by default the one of the dataset's domain."""
    found = p.domain or DOMAINS.get(p.dataset.partition("/")[0])
    if not found:
        raise BadParameter("domain", p.domain, [*DOMAINS.values(), "clip", "none", "an encoder of timm"])
    return found


def weights(p: SimpleNamespace, name: str, given: str) -> str | Path:
    """The weights of "clip", "remote-sensing" or "medical": the parameter, the usual file below
    `<data_root>/weights`, or the cached ones."""
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


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on real images: 16 images per class, tested by the protocol."""
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
    facts = {name: getattr(p, name) for name in ("dataset", "noise", "seed")}
    options = _options(p) | {"last": last(len(protocol.train), published_settings(p.protocol))}
    # both transfers test one model: the second run reuses the training of the first
    trained_on = "base classes" if p.protocol == "base to novel" else "all classes"
    facts |= {"data_root": Path(p.data_root), "precision": options["hardware"].precision, "trained on": trained_on}
    if p.dataset == "folder":  # its images and labels may change between runs
        paths = [os.path.relpath(path, p.data_root) for path in protocol.train.sources]
        facts |= {"images": paths, "labels": protocol.train.labels, "classes": names["train"]}
    saved = {"folder": Path(out), "facts": facts, "training": f"{p.dataset}, {trained_on}, seed {p.seed}"}
    return _full_size(p, f"{p.dataset}, {p.protocol}", parts, names, clip, domain, options, **saved)


def _full_size(
    p: SimpleNamespace,
    title: str,
    parts: dict[str, Dataset],
    names: dict[str, tuple[str, ...]],
    clip: nn.Module,
    domain: nn.Module | None,
    options: dict,
    **saved: Any,
) -> Setting:
    """A setting of `parts`, "train" and the test sets, whose classes are `names`."""
    trained = {} if p.method in UNTRAINED else {p.method: published_settings(p.protocol)["learning rate"]}
    return Setting(
        title=title,
        classes=names["train"],
        test_classes={name: classes for name, classes in names.items() if name != "train"},
        methods=(p.method,),
        learning_rates=trained,
        build=lambda method: build(p, method, names["train"], clip, domain),
        inputs=lambda method, part: parts[part],
        optimizer=optimizer,
        options=options,
        accuracy=functools.partial(accuracy, seed=p.seed, hardware=options["hardware"]),
        **saved,
    )


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size models with random weights, two optimiser steps on generated images of the real shape."""
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

    # a single epoch would be all warm-up, so it uses the learning rate of the second published one
    options = _options(p) | {"epochs": 1, "schedule": schedule("cosine by epoch", 0.0, 0.0)}
    tests = ("source", "generated") if transfer else ("base", "novel")
    named = {"train": names, tests[0]: names, tests[1]: others}
    # two test images: on a CPU the medical domain model takes many seconds for each
    parts = {part: generated(2, len(classes)) for part, classes in named.items()}
    parts["train"] = generated(2 * options["batch"], len(names))
    return _full_size(p, "generated images (dry run: accuracies mean nothing)", parts, named, clip, domain, options)


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


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **changes: Any) -> tuple[prompting.PromptedCLIP, History]:
    """Build a method of a setting and train it; the history of a method without training is empty.

    `changes` go to `fit`. With a folder, a stopped training is resumed, a finished one is loaded, and the final weights
    are saved: domain generalisation tests those of the cross-dataset run in the same folder.
    """
    model, name = found.build(method), f"{found.training or found.title}, {method}"
    if method not in found.learning_rates:
        return model.eval(), []
    options = found.options | {"name": method} | changes
    if found.folder:
        facts = found.facts | {"model": model}
        options["checkpoint"] = checkpoints.Checkpoint.of(found.folder / "checkpoints", name, **facts)
    made = found.optimizer(found.learning_rates[method])
    history = fit(model, loss, found.inputs(method, "train"), optimizer=made, **options)
    if found.folder:
        checkpoints.save(found.folder / "trained", name, checkpoints.trained_state(model))
    return model, history


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


def scores(model: prompting.PromptedCLIP, found: Setting, method: str) -> dict[str, float]:
    """Accuracy in percent on every test set over its own classes, and "HM", the harmonic mean of base and novel.

    Afterwards the model has its training classes again.
    """
    accuracies = {
        part: found.accuracy(model, found.inputs(method, part), classes) for part, classes in found.test_classes.items()
    }
    model.set_classes(found.classes)
    if {"base", "novel"} <= accuracies.keys():
        accuracies["HM"] = fewshot.harmonic_mean(accuracies["base"], accuracies["novel"])
    return accuracies


def first(found: Setting, method: str, part: str, count: int) -> tuple[Tensor, ...]:
    """The first items of `inputs`, stacked: inputs of the model (n, ...), labels (n,), and optionally domain features
    (n, F).

    `images, labels, *domain = first(found, "DPLQ", "base", 24)`, then `model(images, *domain)`.
    """
    data = found.inputs(method, part)
    items = [data[i] for i in range(min(count, len(data)))]
    return tuple(torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*items, strict=True))


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


def rows(p: SimpleNamespace, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """The result of `scores` as rows for `measured`, one per test set."""
    same = {"method": label(p), "protocol": p.protocol, "dataset": p.dataset}
    return [same | {"test": n, "seed": p.seed, "accuracy": a} for n, a in found.items() if n != "HM"]


def measured(path: Path, new: Iterable[Mapping[str, object]] = ()) -> pd.DataFrame:
    """The real results in `path`, one row per (method, protocol, dataset, test, seed); `new` are added."""
    return upsert_rows(path, ["method", "protocol", "dataset", "test", "seed"], ["accuracy"], new)


def cells(table: pd.DataFrame, protocol: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column) of the protocol's tables, as `tables.compare_published` takes them.

    Base to novel has the columns "AID base", "AID novel" and "AID HM" for every set; HM is taken for each seed. The
    other protocols have one column per set, and one row per training set.
    """
    chosen = table[table.protocol == protocol]
    found: dict[tuple[str, str], float] = {}
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
    for domain, source in SOURCES.items():
        sets = [name for name in CLASSES if name.startswith(f"{domain}/")]
        harmonic = cells(table, "base to novel")
        for method in dict.fromkeys(table.method):
            values = {"base to novel": [harmonic.get((method, f"{_column(name)} HM")) for name in sets]}
            for protocol in TRANSFERS:
                rows = table[(table.method == method) & (table.protocol == protocol) & (table.dataset == source)]
                means = rows.groupby("test").accuracy.mean().to_dict()
                values[protocol] = [means.get(name) for name in sets if name != source]
            for protocol, known in values.items():
                numbers = [value for value in known if value is not None]
                if len(numbers) == len(known):
                    found[method, f"{protocol}, {domain}"] = sum(numbers) / len(numbers)
    return found


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row, from its constants."""
    novel, transfer = (published_settings(name) for name in ("base to novel", "cross-dataset"))

    def both(name: str, form: str = "g") -> str:
        one, other = (f"{settings[name]:{form}}" for settings in (novel, transfer))
        return one if one == other else f"{one} (base to novel), {other} (transfers)"

    return {
        "optimiser": f"SGD, momentum {MOMENTUM:g}, weight decay {WEIGHT_DECAY:g} on everything that is trained",
        "learning rate": f"{both('learning rate')}; one for each epoch",
        "schedule": f"{both('warm-up learning rate')} for {both('warm-up epochs')} epoch, then "
        "lr (1 + cos(pi (e - 1) / E)) / 2",
        "epochs": both("epochs"),
        "batch": f"{both('train batch')}; the last images of an epoch are dropped, unless the set has no whole batch",
        "precision": f"{paper('dplq')['precision']} on a GPU: float32 weights, float16 autocast, scaled loss; logits "
        "in float32 (the authors: float16 weights in the context, the small net, the projection and the text's "
        "quaternion layer, no loss scaling)",
        "prompts": f"{both('context tokens')} tokens, from '{PROMPT}'; prompted layers: {both('prompt depth')}",
        "training images": f"{both('shots')} of each class, or all; random crop of {domains.CROP[0]:.0%} to "
        f"{domains.CROP[1]:.0%} of the area to {both('image size')} (bicubic), flip",
        "test images": f"short side to {both('image size')} (bicubic), centre; batches of {TEST_BATCH}, on which "
        "the noise of the prompts depends (the medical domain model: 1024, nearest pixel)",
        "splits": "50 / 20 / 30 % of each class; the authors' lists were not released, here the shuffle is fixed",
        "classes": "base are the first half of the sorted folders, the larger one where they are odd",
        "transfers": "trained on all classes of one set; cross-dataset tests the test split of the others, domain "
        "generalisation all their images, with the same weights",
        "selection": "none; the last epoch is tested",
        "seeds": "1, 2, 3 (README of the successor); here the parameter `seed`",
        "metric": "top-1 over all test images, percent; mean and standard deviation (of the population) over seeds",
        "noise": "drawn at test time too, from the seed",
        "baselines": "how the paper trained them was not found; here as DPLQ: its optimiser, learning rate and epochs",
        "sweep": "none found",
    }


def _column(dataset: str) -> str:
    """The authors' name of a dataset, which the tables use."""
    return DATASETS[dataset].folders[-1] if dataset in DATASETS else dataset


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
