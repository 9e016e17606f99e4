"""DPLQ's `paper` profile: the published training, the protocols, and the tables of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ... import backbones
from ...data import domains, few, fewshot, find, present
from ...data.domains import CLASSES
from ...data.images import Images
from ...errors import BadParameter, MissingWeights
from ...evaluation.tables import Cells, Results, compare_published, published_table
from ...io import papers
from ...training.fit import History
from ...training.hardware import Hardware, RunParameters
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import MakeOptimizer, Schedule, schedule, sgd
from ..layers import classifying
from ..layers.clip_prompting import PromptedCLIP
from . import baselines as coop
from .model import DPLQ, PROMPT, TEST_BATCH, loss
from .official import domain_model

CLIP = "ViT-B-16/openai"
DOMAINS = {"remote": "remote-sensing", "medical": "medical"}
TRANSFERS = {"cross-dataset": fewshot.cross_dataset, "domain generalisation": fewshot.domain_generalisation}
UNTRAINED = ("zero-shot CLIP",)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD, on all trainable parameters
SOURCES = {"remote": "remote/rsicd", "medical": "medical/btmri"}
"""The sets that the transfers begin from: of the medical script, and the example in the README of the successor."""
WORKERS = 8
RESULTS = Results.of("dplq")


class Parameters(RunParameters, Protocol):
    """The notebook's parameters."""

    method: str
    protocol: str
    dataset: str
    targets: str
    domain: str
    domain_weights: str
    noise: str


class Tested(NamedTuple):
    """A model of the `paper` profile with its training classes, the history of its training, its test sets by name,
    and the accuracies on them in percent."""

    title: str
    model: PromptedCLIP
    history: History
    tests: dict[str, Any]
    scores: dict[str, float]

    def examples(self, count: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """The first images of the first test set, (n, 3, H, W), their labels (n,), and the names of its classes."""
        data = next(iter(self.tests.values()))
        images, labels = default_collate([data[i] for i in range(min(count, len(data)))])
        return images, labels, tuple(data.class_names)


def prepare(p: Parameters, out: Path) -> tuple[str, Any, dict[str, Any], Opened]:
    """A title, the training images, the test images by name, and the training with model and checkpoint: all that a run
    reads is opened, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with the change or download needed.
    """
    check_targets(p)
    torch.manual_seed(p.seed)  # of the random weights of a dry run
    chosen = weights(p, "clip", p.weights)
    clip = _clip(backbones.or_random(f"openclip:{CLIP}", chosen) if p.dry_run else chosen)
    domain = _domain(p, clip)
    title, tests = data(p, clip)
    learn = tests.pop("train")
    return title, learn, tests, opened(training(p, learn, clip, domain), out)


def run(p: Parameters, out: Path) -> Tested:
    """Train `p.method` as published and test it by `p.protocol`; rows of `out`/measured.csv.

    A training resumes from its checkpoint in `out`/checkpoints, and a finished one is loaded from there: domain
    generalisation tests the weights of the cross-dataset run in the same folder. The last weights are saved in
    `out`/trained. A dry run takes two steps on a few images of the datasets, or on generated ones where the dataset is
    not below `data_root`. Raises as `prepare`.
    """
    title, learn, tests, ready = prepare(p, out)
    model, history = train(ready)
    assert isinstance(model, PromptedCLIP)
    scores = {name: accuracy(model, data, tuple(data.class_names), p.seed, hardware(p)) for name, data in tests.items()}
    model.reset_classifier(tuple(learn.class_names))
    if p.protocol == "base to novel":
        scores["HM"] = fewshot.harmonic_mean(scores["base"], scores["novel"])
    RESULTS.measured(out / "measured.csv", *rows(p, scores), dry_run=p.dry_run)
    return Tested(title, model, history, tests, scores)


def training(p: Parameters, data: Any, clip: nn.Module, domain: nn.Module | None) -> Training:
    """The training of `p.method` by the authors' settings, on images with labels and class names."""
    # both transfers test one model: the second run reuses the training of the first
    trained_on = "base classes" if p.protocol == "base to novel" else "all classes"
    options = fit_options(p) | {"last": last(len(data), published_settings(p.protocol)), "name": p.method}
    facts = {"dataset": p.dataset, "noise": p.noise, "seed": p.seed, "precision": options["hardware"].precision}
    facts |= {
        "data_root": Path(p.data_root),
        "trained on": trained_on,
        **classifying.own_facts(p.dataset, p.data_root, data),
    }
    classes = tuple(data.class_names)
    return Training(
        name=f"{p.dataset}, {trained_on}, seed {p.seed}, {p.method}",
        build=lambda: build(p, p.method, classes, clip, domain),
        loss=loss,
        data=None if p.method in UNTRAINED else data,
        fit=options,
        facts=facts,
        dry_run=p.dry_run,
    )


# --- datasets ---------------------------------------------------------------------------------------------------------


def check_targets(p: Parameters) -> None:
    """Raise `BadParameter` when `targets` conflicts with `protocol` and `dataset`."""
    named = _named(p)
    if p.protocol == "base to novel" and named:
        raise BadParameter("targets", p.targets, "nothing with the protocol 'base to novel': it tests on the same set")
    if (p.protocol != "base to novel" and p.dataset == "folder" and not named) or p.dataset in named:
        raise BadParameter("targets", p.targets, [name for name in CLASSES if name != p.dataset])


def _named(p: Parameters) -> list[str]:
    return [name.strip() for name in p.targets.split(",") if name.strip()]


def targets(p: Parameters) -> list[str]:
    """The datasets that a model is transferred to: those named, or all others of the same domain."""
    domain = p.dataset.partition("/")[0]
    return _named(p) or [name for name in CLASSES if name.startswith(f"{domain}/") and name != p.dataset]


def splits(p: Parameters, name: str, transform: Callable) -> dict[str, Any]:
    """The splits of a dataset below `data_root`; "folder" is that folder itself."""
    if name == "folder":
        return domains.own(p.data_root, transform)
    return domains.splits(name, p.data_root, transform)


def data(p: Parameters, clip: nn.Module) -> tuple[str, dict[str, Any]]:
    """A title, and the images of a run: "train", 16 per class of the training set, and the test sets of the protocol;
    in a dry run a few of them, or generated ones.

    Raises `BadParameter`, `MissingData`, `CorruptFile`: with the change or download needed.
    """
    size, settings = backbones.input_of(clip), published_settings(p.protocol)
    made = p.dry_run and not present(p.dataset, p.data_root)
    read, transform, shots = generated if made else splits, domains.clip_transform(size), int(settings["shots"])
    source = read(p, p.dataset, transform)
    source["train"].transform = domains.clip_transform(size, train=True)
    if p.protocol == "base to novel":
        protocol = fewshot.base_to_novel(source, shots, p.seed)
    else:
        others = {name: read(p, name, transform) for name in targets(p)}
        protocol = TRANSFERS[p.protocol](source, others, shots, p.seed)
    found: dict[str, Any] = {"train": protocol.train, **protocol.tests}
    found = few(found, dry_items(p, int(settings["train batch"]))) if p.dry_run else found
    return f"generated images in place of {p.dataset} (dry run)" if made else f"{p.dataset}, {p.protocol}", found


def generated(p: Parameters, name: str, transform: Callable) -> dict[str, Any]:
    """An image of noise of each class in each split of a dataset."""
    dataset = find("remote/aid" if name == "folder" else name)
    names = tuple(CLASSES[dataset.name].values())
    pixels = np.random.default_rng(p.seed).integers(0, 256, (len(names), 64, 64, 3), np.uint8)
    return {
        part: Images(dataset, Path(), pixels, range(len(names)), len(names), transform, names)
        for part in domains.SPLITS
    }


# --- models -----------------------------------------------------------------------------------------------------------


def published_settings(protocol: str) -> dict[str, float]:
    """Learning rate, epochs, depth, shots, ... of a protocol, from the authors' configuration files (the paper's YAML).

    Domain generalisation tests the model of the cross-dataset runs.
    """
    column = "base_to_novel" if protocol == "base to novel" else "cross_dataset"
    return published_table("dplq", "code-recipe").set_index("method")[column].to_dict()


def build(
    p: Parameters, method: str, classes: tuple[str, ...], clip: nn.Module, domain: nn.Module | None
) -> PromptedCLIP:
    """A method at full size on a frozen CLIP; only DPLQ uses the domain model."""
    torch.manual_seed(p.seed)
    published = published_settings(p.protocol)
    tokens, depth = int(published["context tokens"]), int(published["prompt depth"])
    common = (clip, classes, open_clip.get_tokenizer(CLIP.partition("/")[0]))
    kinds = {
        "zero-shot CLIP": lambda: coop.ZeroShot(*common),
        "CoOp": lambda: coop.CoOp(*common),
        "CoCoOp": lambda: coop.CoCoOp(*common),
        "MaPLe": lambda: coop.MaPLe(*common, tokens=tokens, depth=depth),
        "DPLQ": lambda: DPLQ(*common, domain, tokens=tokens, depth=depth, noise=p.noise),
    }
    return kinds[method]()


def _clip(weights: str | Path) -> nn.Module:
    return backbones.build(f"openclip:{CLIP}", weights)


def domain_name(p: Parameters) -> str:
    """The domain model that the parameters name; by default the one of the dataset's domain."""
    name = p.domain or DOMAINS.get(p.dataset.partition("/")[0])
    if not name:
        raise BadParameter("domain", p.domain, [*DOMAINS.values(), "clip", "none", "an encoder of timm"])
    return name


def weights(p: Parameters, name: str, parameter: str) -> str | Path:
    """The weights of "clip", "remote-sensing" or "medical": the parameter, the usual file below
    `<data_root>/weights`, or the pretrained ones."""
    file = next(w["file"] for w in papers.paper("dplq")["weights"] if w["name"] == name)
    usual = Path(p.data_root) / "weights" / file
    return parameter or (usual if usual.is_file() else "pretrained")


def _domain(p: Parameters, clip: nn.Module) -> nn.Module | None:
    """The domain model of DPLQ; a random one in a dry run without its weights."""
    if p.method != "DPLQ":
        return None
    name = domain_name(p)
    source = weights(p, name, p.domain_weights) if name in DOMAINS.values() else p.domain_weights or "pretrained"
    try:
        return domain_model(name, source, clip=clip)
    except MissingWeights:
        if not p.dry_run:
            raise
    print(f"{name}: its weights are not here; random ones in this dry run")
    return domain_model(name, "random", clip=clip)


# --- optimiser, schedule ----------------------------------------------------------------------------------------------


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


def fit_options(p: Parameters) -> dict[str, Any]:
    """The arguments of `fit`; no callback selects: the weights after the last epoch are used."""
    published = published_settings(p.protocol)
    epochs = int(published["epochs"])
    return {
        "epochs": epochs,
        "batch": int(published["train batch"]),
        "optimizer": optimizer(published["learning rate"]),
        "schedule": learning_rates(epochs, published["warm-up epochs"], published["warm-up learning rate"]),
        "seed": p.seed,
        "hardware": hardware(p),
    }


def hardware(p: Parameters) -> Hardware:
    """The hardware of training and tests."""
    return Hardware.of(p, "dplq", workers=WORKERS)


# --- test -------------------------------------------------------------------------------------------------------------


def accuracy(model: PromptedCLIP, data: Any, classes: tuple[str, ...], seed: int, hardware: Hardware) -> float:
    """Top-1 accuracy in percent on (image, label) among `classes`; `seed` is that of DPLQ's noise."""
    model.reset_classifier(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return classifying.accuracy(model, data, hardware, TEST_BATCH)


def rows(p: Parameters, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """The accuracies on the test sets as rows for `RESULTS.measured`.

    The method's name tells its differences from the published setting.
    """
    changes = []
    if p.method == "DPLQ":
        usual = DOMAINS.get(p.dataset.partition("/")[0])
        changes += [f"domain model {p.domain}"] if p.domain not in ("", usual) else []
        changes += [f"noise {p.noise}"] if p.noise != "always" else []
    same = {"method": ", ".join([p.method, *changes]), "protocol": p.protocol, "dataset": p.dataset, "seed": p.seed}
    return [same | {"test": p.dataset if n == "source" else n, "accuracy": a} for n, a in scores.items()]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds, as in the authors' script: of the population, not of a sample."""
    groups = table.groupby(["method", "protocol", "dataset", "test"]).accuracy
    return groups.agg(mean="mean", std=lambda x: x.std(ddof=0), seeds="count").reset_index()


def claim_cells(table: pd.DataFrame) -> Cells:
    """Means over all sets of a domain by (method, column), where all were measured.

    The columns are "base to novel, remote", which is HM, and of the transfers from `SOURCES` "cross-dataset, remote",
    "domain generalisation, remote", over the sets that were not trained on; and the same with "medical".
    """
    means = {}
    for protocol in ("base to novel", *TRANSFERS):
        for domain, source in SOURCES.items():
            measured = RESULTS.filled(table, RESULTS.cells[f"{protocol.replace(' ', '-')}-{domain}"])
            names = RESULTS.names["dataset"]
            sets, start = [names[name] for name in CLASSES if name.startswith(f"{domain}/")], names[source]
            for method in dict.fromkeys(table.method):
                cells = [(f"{method}, trained on {start}", name) for name in sets if name != start]
                if protocol == "base to novel":
                    cells = [(method, f"{name} HM") for name in sets]
                if measured.keys() >= set(cells):
                    means[method, f"{protocol}, {domain}"] = sum(measured[cell] for cell in cells) / len(cells)
    return means


def tables(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published and measured numbers by title, in the columns that have a number."""
    shown = {}
    for name, spec in RESULTS.cells.items():
        frame, measured = published_table("dplq", name), RESULTS.filled(table, spec)
        filled = {column for _, column in measured} | {*frame.dropna(axis=1, how="all")}
        columns = [column for column in frame.columns[1:] if column in filled]
        if columns:
            shown[frame.attrs["title"]] = compare_published(frame[["method", *columns]], measured)
    return shown


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, one per row, from its constants."""
    novel, transfer = (published_settings(name) for name in ("base to novel", "cross-dataset"))
    both = {
        name: f"{novel[name]:g}" if novel[name] == value else f"{novel[name]:g} (base to novel), {value:g} (transfers)"
        for name, value in transfer.items()
    }
    precision = papers.paper("dplq")["precision"]
    return {
        "optimiser": f"SGD, momentum {MOMENTUM:g}, weight decay {WEIGHT_DECAY:g} on everything that is trained",
        "learning rate": f"{both['learning rate']}; one for each epoch",
        "schedule": (
            f"{both['warm-up learning rate']} for {both['warm-up epochs']} epoch, then lr (1 + cos(pi (e - 1) / E)) / 2"
        ),
        "epochs": f"{both['epochs']}",
        "batch": f"{both['train batch']}; the last images of an epoch are dropped, unless the set has no whole batch",
        "precision": (
            f"{precision} on a GPU: float32 weights, float16 autocast, scaled loss; logits in float32 (the authors: "
            "float16 weights in the context, the small net, the projection and the text's quaternion layer, no loss "
            "scaling)"
        ),
        "prompts": f"{both['context tokens']} tokens, from '{PROMPT}'; prompted layers: {both['prompt depth']}",
        "training images": (
            f"{both['shots']} of each class, or all; random crop of {domains.CROP[0]:.0%} to {domains.CROP[1]:.0%} "
            f"of the area to {both['image size']} (bicubic), flip"
        ),
        "test images": (
            f"short side to {both['image size']} (bicubic), centre; batches of {TEST_BATCH}, on which the noise of "
            "the prompts depends (the medical domain model: 1024, nearest pixel)"
        ),
        "splits": "50 / 20 / 30 % of each class; the authors' lists were not released, here the shuffle is fixed",
        "classes": "base are the first half of the sorted folders, the larger one where they are odd",
        "transfers": (
            "trained on all classes of one set; cross-dataset tests the test split of the others, domain "
            "generalisation all their images, with the same weights"
        ),
        "selection": "none; the last epoch is tested",
        "seeds": "1, 2, 3 (README of the successor); here the parameter seed",
        "metric": "top-1 over all test images, percent; mean and standard deviation (of the population) over seeds",
        "noise": "drawn at test time too, from the seed",
        "baselines": "how the paper trained them was not found; here as DPLQ: its optimiser, learning rate and epochs",
        "sweep": "none found",
    }
