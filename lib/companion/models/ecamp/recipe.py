"""ECAMP: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from lightning_fabric import is_wrapped
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, xrays
from ...data.xrays_sets import CLASSES, ONE_OF, tasks
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics import radiology
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.papers import paper
from ...toy.ablations import ecamp as study
from ...toy.datasets import chests as pocket
from ...training import checkpoints as kept
from ...training.fit import fit, launcher
from . import heads as ecamp_heads
from . import model as ecamp
from .model import ECAMP
from .text import Pairs, Vocabulary

TASK, LIVE = "chests", ("MIM only", "ECAMP")
STEPS = 150  # of a live pocket training: the losses are seen to fall; the study's have four times as many


@dataclass(frozen=True)
class Setting:
    """What is pre-trained on what.

    Attributes:
        title: of the data.
        methods: what is trained.
        rates: their learning rates.
        vocabulary: the words of the reports.
        pairs: of a method, its training data: items are `ecamp.Batch` without the B.
        build: the model of a method, before training.
        learn: trains a model in place: (model, method, list that receives the four losses of each step, arguments of
            `fit`) to the history.
        parts: "train" and "test" of the pocket chests, to probe and to look at; empty at the paper profile.
    """

    title: str
    methods: tuple[str, ...]
    rates: dict[str, float]
    vocabulary: Vocabulary
    pairs: Callable[[str], Pairs]
    build: Callable[[str], ECAMP]
    learn: Callable[..., list[dict]]
    parts: dict[str, pocket.Part]


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket chests, and what a training of the paper profile keeps, are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    if p.dataset != "folder":
        _check(p.dataset, "pre-training")
    return _dry(p) if p.dry_run else _paper(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The chests of the run's seed, and the study's trainings, cut to `STEPS`."""
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    words = study.vocabulary(root, p.seed)
    chosen = {method: rates[TASK, method] for method in LIVE}
    per_epoch = pocket.COUNTS["train"] // study.RECIPE["batch"]

    def learn(model: ECAMP, method: str, terms: list[list[float]] | None = None, **options) -> list[dict]:
        data = study.pairs(method, root, p.seed)
        return study.train_model(
            model, data, chosen[method], p.seed, terms, **({"epochs": STEPS / per_epoch, "name": method} | options)
        )

    return Setting(
        title="pocket chests",
        methods=LIVE,
        rates=chosen,
        vocabulary=words,
        pairs=functools.partial(study.pairs, root=root, seed=p.seed),
        build=functools.partial(study.build, seed=p.seed, words=len(words)),
        learn=learn,
        parts={split: study.part(root, p.seed, split) for split in ("train", "test")},
    )


# --- pre-training as published ----------------------------------------------------------------------------------------

WORKERS = min(16, os.cpu_count() or 1)
PRETRAINED: dict[str, tuple[dict, dict]] = {
    **{name: found for name, found in study.METHODS.items() if name not in study.UNTRAINED},
    "ECAMP, whole picture": ({"window": None}, {}),
    "ECAMP, mean token": ({"fusion": "mean"}, {}),
    "ECAMP, patch attention": ({"fusion": "patch"}, {}),
}
"""By method the model's arguments and those of its pairs."""


def recipe(table: str) -> dict[str, float]:
    """The numbers of pre-training in the authors' scripts (the paper's YAML)."""
    return published_table("ecamp", table).set_index("method")["value"].to_dict()


def pretrain_rates(steps_an_epoch: int) -> np.ndarray:
    """The learning rate at each step: linear warm-up, then a cosine that would end at epoch 200 and is left at 120."""
    r = recipe("recipe-pretraining")
    epoch = np.arange(int(r["stop_epoch"]) * steps_an_epoch) / steps_an_epoch
    falling = 0.5 * (1 + np.cos(np.pi * (epoch - r["warmup_epochs"]) / (r["cosine_end_epoch"] - r["warmup_epochs"])))
    return r["lr"] * np.where(epoch < r["warmup_epochs"], epoch / r["warmup_epochs"], falling)


def pretrain(
    p: SimpleNamespace,
    model: ECAMP,
    data: Dataset,
    terms: list[list[float]] | None = None,
    rates: np.ndarray | None = None,
    at_once: int = 256,
    **changes: object,
) -> list[dict]:
    """Pre-train by the authors' recipe, in place; return the history.

    Args:
        terms: receives the four losses of every step; of a training that was resumed, or ran in several processes,
            the total alone.
        rates: of each step; the published ones without it.
        at_once: pairs that go through a device together; the gradients of a step's pairs are added up.
        changes: arguments of `fit`.
    """
    r = recipe("recipe-pretraining")
    options = {
        "batch": min(int(r["effective_batch"]), len(data)),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "workers": WORKERS,
        "name": "pre-training",
        "weight_decay": r["weight_decay"],
        "betas": (r["beta1"], r["beta2"]),
    } | changes
    per_epoch = len(data) // options["batch"]
    rates = pretrain_rates(per_epoch) if rates is None else rates
    parts, of_parts = -(-options["batch"] // (options["devices"] * at_once)), []

    def loss(model: nn.Module, items: tuple[Tensor, ...]) -> Tensor:
        found = model(ecamp.Batch(*items))
        if terms is not None:
            of_parts.append([len(items[0]), *(float(x.detach()) for x in found)])
            if len(of_parts) == parts:
                count, *values = np.transpose(of_parts)
                terms.append(np.average(values, axis=1, weights=count).tolist())
                of_parts.clear()
        return found.total

    sides = {"all": ([t for t in model.parameters() if t.requires_grad], rates)}
    history = fit(model, loss, data, epochs=len(rates) / per_epoch, accumulate=parts, sides=sides, **options)
    if terms is not None and len(terms) != len(history):
        terms[:] = [[row["loss"], *[float("nan")] * 3] for row in history]
    return history


def _pretraining(
    p: SimpleNamespace,
    title: str,
    words: Vocabulary,
    pairs: Callable[[str], Dataset],
    keep: tuple[Path, Sequence[object]] | None = None,
    **options: object,
) -> Setting:
    """`keep`: the folder for the checkpoint and the trained weights, and what tells the data from others."""

    def build(method: str) -> ECAMP:
        torch.manual_seed(p.seed)
        model = ecamp.build("paper", words=len(words), **PRETRAINED[method][0])
        if not p.dry_run:
            model.load_mae(backbones.read_state(_file(p, "mae")))
        return model

    def learn(model: ECAMP, method: str, terms: list[list[float]] | None = None, **changes: object) -> list[dict]:
        if keep is None:
            return pretrain(p, model, pairs(method), terms, **(options | {"name": method} | changes))
        name = f"{method}, {p.dataset}, seed {p.seed}"
        resumed = kept.checkpoint(keep[0], name, model, *keep[1])
        history = pretrain(p, model, pairs(method), terms, **(options | {"name": method} | resumed | changes))
        kept.save(keep[0], name, model.to_official())
        return history

    return Setting(
        title=title,
        methods=(p.method,),
        rates={p.method: recipe("recipe-pretraining")["lr"]},
        vocabulary=words,
        pairs=pairs,
        build=build,
        learn=learn,
        parts={},
    )


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published pre-training on the set's pictures and reports; "folder": those of `data_root` itself.

    It leaves its checkpoint in `out`/trained, to go on from, and the weights under the authors' names, which the
    downstream tasks take as `weights`.
    """
    dataset = xrays.own(p.data_root) if p.dataset == "folder" else DATASETS[p.dataset]
    found = xrays.reports(dataset, p.data_root, xrays.pretrain_transform())
    stored = dataset.folder(p.data_root) / "mimic_wordpiece.json"
    words = Vocabulary.read(stored) if stored.is_file() else Vocabulary.train(found.texts)

    def pairs(method: str) -> Pairs:
        options = {"statements": found.statements, "windows": found.windows} | PRETRAINED[method][1]
        return Pairs(found.images, found.texts, words, **options)

    if found.windows is not None and not (found.windows.min() >= 0 and found.windows.max() <= 14 - 12):
        corners = f"corners of {found.windows.min()} to {found.windows.max()}"
        raise BadParameter("windows", corners, "0 to 2: a window has 12 of the 14 patches of a side")
    keep = out / "trained", (found.images.paths, found.texts, found.statements)
    return _pretraining(p, f"{p.dataset}, {len(found.texts):,} pictures", words, pairs, keep)


def _dry(p: SimpleNamespace) -> Setting:
    """The full-size model with random weights, two optimiser steps on generated pairs of the real shape."""
    generator = torch.Generator().manual_seed(p.seed)
    images = torch.randn(2 * DRY_BATCH, 3, 448, 448, generator=generator)
    reports = ["There is a small right effusion. There is no evidence of pneumothorax."] * len(images)
    words = Vocabulary.train(reports, 200)
    # as many words as MIMIC's vocabulary: the model's size is the published one
    words.pieces += ["[UNK]"] * (30_000 - len(words))

    def pairs(method: str) -> Pairs:
        options = {"statements": ["There is effusion."] * len(images)} | PRETRAINED[method][1]
        return Pairs(images, reports, words, **options)

    rates = np.full(2, recipe("recipe-pretraining")["lr"])
    title = "generated pairs (dry run: losses mean nothing)"
    return _pretraining(p, title, words, pairs, rates=rates, batch=DRY_BATCH, workers=0)


# --- downstream, as published -----------------------------------------------------------------------------------------

DRY_BATCH = 2
# what a set is called in the tables, and the share of labels there
TITLES = {
    "xrays/chestx-ray14": "ChestX-ray14",
    "xrays/chestmnist": "ChestX-ray14",
    "xrays/chexpert": "CheXpert",
    "xrays/rsna": "RSNA",
    "xrays/covidx": "COVIDx",
    "xrays/siim": "SIIM",
    "fundus/odir": "ODIR-5K",
    "fundus/aptos": "APTOS-2019",
    "fundus/mured": "MuReD",
    "fundus/riga": "RIGA",
}
RECIPES = {
    "fine-tune": "recipe-finetune",
    "linear probe": "recipe-linear",
    "segment": "recipe-segmentation",
    "detect": "recipe-detection",
}
KINDS = {
    "fine-tune": "classification",
    "linear probe": "classification",
    "segment": "segmentation",
    "detect": "detection",
}
PATIENCE = {"segment": 40}  # epochs without a new best; 20 for the others
FIRST = {"1": 60, "10": 100, "100": 50}  # step of the first look at validation in detection
LONGEST = 4  # times the published steps, where patience has not ended a training before


@dataclass(frozen=True)
class Downstream:
    """A task on a set, what it is trained on and how it is scored.

    Attributes:
        title: of task, set and share of labels.
        metric: what `score` gives, in percent.
        data: "train", "val" and "test".
        build: the model, before training.
        learn: trains a model in place: (model, arguments of `fit`) to the history; the best state on "val" is kept.
        score: of a model and a split.
        recipe: lr, warmup_steps, steps, batch.
    """

    title: str
    metric: str
    data: dict[str, Dataset]
    build: Callable[[], nn.Module]
    learn: Callable[..., list[dict]]
    score: Callable[[nn.Module, Dataset], float]
    recipe: dict[str, float]


def downstream_recipe(task: str, dataset: str, labels: str) -> dict[str, float]:
    """lr, warmup_steps, steps and batch of the authors' scripts. ChestMNIST takes ChestX-ray14's.

    Raises:
        BadParameter: a task, set and share that they have none for, the fundus sets' classification among them.
    """
    rows = published_table("ecamp", RECIPES[task]).set_index("method").to_dict("index")
    name = f"{TITLES.get(dataset, dataset)}, {labels}%"
    if name not in rows:
        raise BadParameter("dataset", f"{dataset} with {labels} %", f"for {task}: {list(rows)}")
    return rows[name]


def downstream(p: SimpleNamespace) -> Downstream:
    """What the parameters `task`, `dataset`, `labels`, `encoder`, `weights` and `protocol` ask for.

    Raises:
        BadParameter, MissingData, MissingWeights, BadCheckpoint: with what to change or get.
    """
    if p.task not in KINDS:
        raise BadParameter("task", p.task, list(KINDS))
    kind = KINDS[p.task]
    _check(p.dataset, kind)
    numbers = downstream_recipe(p.task, p.dataset, p.labels)
    if p.dry_run:
        data = _generated(p, kind)
        numbers = numbers | {"batch": DRY_BATCH, "steps": 2, "warmup_steps": 0}
        title = f"{p.task}, generated pictures of {p.dataset} (dry run: the score means nothing)"
    else:
        data = _splits(p, kind)
        title = f"{p.task} on {p.dataset}, {p.labels} % of the labels"
    score, metric = {
        "classification": (functools.partial(_classified, p), "accuracy" if p.dataset in ONE_OF else "AUROC"),
        "segmentation": (functools.partial(_segmented, p), f"Dice ({p.protocol})"),
        "detection": (functools.partial(_detected, p), f"mAP ({p.protocol})"),
    }[kind]
    return Downstream(
        title=title,
        metric=metric,
        data=data,
        build=functools.partial(_head, p, kind),
        learn=functools.partial(_learn, p, data=data, score=score, numbers=numbers),
        score=score,
        recipe=numbers,
    )


def encoder(p: SimpleNamespace) -> VisionTransformer:
    """The ViT-B/16 that `encoder` names: from the file of `weights`, from the usual one below `<data_root>/weights`, or
    random."""
    torch.manual_seed(p.seed)
    blank = VisionTransformer(img_size=224, num_classes=0, global_pool="")
    if p.encoder == "random" or p.dry_run:
        return blank
    # the decoders of a file, which pre-training alone needs, are left out
    state = backbones.read_state(_file(p, p.encoder.lower()))
    own = {n: t for n, t in state.items() if n in blank.state_dict()}
    ecamp.load_official(blank, own, {n: n for n in blank.state_dict()}, f"{p.encoder}'s ViT-B/16")
    return blank


def _file(p: SimpleNamespace, name: str) -> Path:
    """A file of the paper's weights: the parameter, or the usual place."""
    entry = next(w for w in paper("ecamp")["weights"] if w["name"] == name)
    path = Path(p.weights) if p.weights else Path(p.data_root) / "weights" / entry["file"]
    if not path.is_file():
        ways = [f"put {entry['file']} into {Path(p.data_root) / 'weights'}; {entry['source']}", "weights = '<file>'"]
        if name != "mae":
            ways.append("encoder = 'random', for an untrained one")
        raise MissingWeights(entry["what"], path.parent, ways)
    return path


def _check(dataset: str, kind: str) -> None:
    """Raises `BadParameter` for a set that cannot be used so."""
    known = [name for name, d in DATASETS.items() if d.task == "xrays" and d.group != "pocket" and kind in tasks(name)]
    if dataset not in known:
        raise BadParameter("dataset", dataset, [*known, "folder"] if kind == "pre-training" else known)


def _splits(p: SimpleNamespace, kind: str) -> dict[str, Dataset]:
    transforms = {
        "classification": lambda train: xrays.train_transform() if train else xrays.test_transform(),
        # on SIIM the picture is warped and the mask is not, as released
        "segmentation": lambda train: xrays.MaskTransform(train=train, warp_mask=p.dataset != "xrays/siim"),
        "detection": lambda train: xrays.squeeze_transform(),
    }[kind]
    found = {}
    for split in xrays.SPLITS:
        # for detection the authors test on the validation list
        listed = "val" if (kind, split, p.protocol) == ("detection", "test", "released") else split
        found[split] = xrays.load(
            p.dataset,
            p.data_root,
            listed,
            task=kind,
            share=p.labels,
            transform=transforms(split == "train"),
            seed=p.seed,
        )
    return found


def _generated(p: SimpleNamespace, kind: str) -> dict[str, Dataset]:
    generator = torch.Generator().manual_seed(p.seed)
    classes = len(CLASSES[p.dataset])

    def part(count: int) -> TensorDataset:
        images = torch.randn(count, 3, 224, 224, generator=generator)
        if kind == "classification":
            # positives and negatives of each class: an area under the curve needs both
            numbers = torch.arange(count)
            one = numbers % classes
            labels = one if p.dataset in ONE_OF else (numbers[:, None] + torch.arange(classes)) % 2
            return TensorDataset(images, labels if p.dataset in ONE_OF else labels.float())
        if kind == "segmentation":
            return TensorDataset(images, (torch.rand(count, classes, 224, 224, generator=generator) > 0.7).float())
        boxes = torch.zeros(count, xrays.BOXES, 5)
        boxes[:, 0] = torch.tensor([0, 0.4, 0.5, 0.3, 0.3])
        return TensorDataset(images, boxes)

    return {"train": part(2 * DRY_BATCH), "val": part(2), "test": part(2)}


def _head(p: SimpleNamespace, kind: str) -> nn.Module:
    """The model of a task on its encoder. The authors' segmenter freezes a trained encoder, and trains a random one."""
    base, classes = encoder(p), len(CLASSES[p.dataset])
    if kind == "classification":
        return ecamp_heads.classifier(base, classes, probe=p.task == "linear probe")
    if kind == "segmentation":
        return ecamp_heads.Segmenter(base, classes, frozen=p.encoder != "random")
    return ecamp_heads.Detector(base, expansion=4 if p.labels == "100" else 8)


class _Enough(Exception):
    """No new best for long enough: no error, but how training is ended from inside its loss."""


class Watched:
    """A loss that scores the validation pictures after each epoch, and gives the model its best state back at the end.

    As in the authors' code a training ends after `patience` epochs without a new best, or when an epoch ends on a
    multiple of `steps`.
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
        score: Callable[[nn.Module], float],
        per_epoch: int,
        steps: int,
        patience: int,
        first: int = 0,
    ):
        self.loss, self.score, self.per_epoch, self.steps = loss, score, per_epoch, steps
        self.patience, self.first = patience, first
        self.scores: list[tuple[int, float]] = []
        self.best, self.state, self.waited, self.rows = -np.inf, None, 0, []

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        step = len(self.rows)
        if step and step % self.per_epoch == 0:
            self.look(model, step)
            if self.waited >= self.patience or step % self.steps == 0:
                raise _Enough
        value = self.loss(model, batch)
        self.rows.append({"step": step, "loss": value.detach()})
        return value

    def look(self, model: nn.Module, step: int) -> None:
        """Score the model; keep its state when it is the best so far."""
        if step < self.first:
            return
        model.eval()
        found = self.score(model)
        model.train()
        self.scores.append((step, found))
        self.waited += 1
        if found > self.best:
            self.best, self.waited = found, 0
            self.state = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}

    def finish(self, model: nn.Module) -> None:
        """Put the best state back."""
        if self.state is not None:
            model.load_state_dict({n.removeprefix("_forward_module."): t for n, t in self.state.items()})
        model.to("cpu").eval()


def _learn(
    p: SimpleNamespace,
    model: nn.Module,
    *,
    data: Mapping[str, Dataset],
    score: Callable[[nn.Module, Dataset], float],
    numbers: Mapping[str, float],
    **changes: object,
) -> list[dict]:
    """Train by the authors' recipe, in place; the best state on validation is kept. One device."""
    train, steps = data["train"], int(numbers["steps"])
    classifies = KINDS[p.task] == "classification"
    options = {
        "batch": min(int(numbers["batch"]), len(train)),
        "seed": p.seed,
        "accelerator": p.accelerator,
        "precision": p.precision,
        "workers": 0 if p.dry_run else WORKERS,
        "clip": 1.0,
        "name": p.task,
        "optimizer": "sgd" if classifies else "adamw",
        "momentum": 0.9,
        "decay": "all",
        "weight_decay": 0.0 if classifies else 0.05,
    } | changes
    per_epoch = len(train) // options["batch"]
    longest = steps if p.dry_run else LONGEST * steps
    step, warm = np.arange(longest), int(numbers["warmup_steps"])
    done = (step - warm) / max(1, steps - warm)
    # beyond the published steps the cosine rises again, as released
    rates = numbers["lr"] * np.where(step < warm, step / max(1, warm), 0.5 * (1 + np.cos(np.pi * done)))
    loss = {"classification": _classify, "segmentation": _segment, "detection": _detect}[KINDS[p.task]]
    first = FIRST[p.labels] if p.task == "detect" and not p.dry_run else 0
    watched = Watched(
        functools.partial(loss, model),
        lambda one: score(one, data["val"]),
        per_epoch,
        steps,
        PATIENCE.get(p.task, 20),
        first,
    )
    sides = {"all": ([t for t in model.parameters() if t.requires_grad], rates)}
    try:
        history = fit(model, watched, train, epochs=longest / per_epoch, sides=sides, **options)
        watched.look(model, len(history))
    except _Enough:
        history = [row | {"lr": float(rates[row["step"]]), "loss": float(row["loss"])} for row in watched.rows]
    watched.finish(model)
    return history


def _classify(net: nn.Module, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return ecamp_heads.classification_loss(model(batch[0]), batch[1])


def _segment(net: nn.Module, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return ecamp_heads.segmentation_loss(model(batch[0]).float(), batch[1])


def _detect(net: ecamp_heads.Detector, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return net.loss([head.float() for head in model(batch[0])], batch[1])


@torch.no_grad()
def _outputs(p: SimpleNamespace, model: nn.Module, part: Dataset) -> Iterator[tuple[object, Tensor]]:
    """Outputs and truth, batch by batch, on the CPU. A model in training is on its device already; another one is
    sent there, and comes back."""
    home = next(model.parameters()).device
    net = model
    if not is_wrapped(model):
        net = launcher(accelerator=p.accelerator, devices=1, precision=p.precision).setup_module(model)
    device = next(net.parameters()).device
    for images, truth in DataLoader(part, 2 if p.dry_run else 64, num_workers=0 if p.dry_run else WORKERS):
        found = net(images.to(device))
        yield [x.float().cpu() for x in found] if isinstance(found, (list, tuple)) else found.float().cpu(), truth
    model.to(home)


def _classified(p: SimpleNamespace, model: nn.Module, part: Dataset) -> float:
    """Mean AUROC of the classes, or accuracy, in percent."""
    logits, truth = (torch.cat(parts) for parts in zip(*_outputs(p, model, part), strict=True))
    if p.dataset in ONE_OF:
        return 100 * float((logits.argmax(1) == truth).float().mean())
    return radiology.mean_auroc(truth, logits)


def _segmented(p: SimpleNamespace, model: nn.Module, part: Dataset) -> float:
    """Dice, the mean over pictures and then over things to segment, in percent."""
    each = [
        torch.stack(
            [radiology.dice(x, t, p.protocol) for x, t in zip(logits.sigmoid().unbind(1), truth.unbind(1), strict=True)]
        )
        for logits, truth in _outputs(p, model, part)
    ]
    return 100 * float(torch.cat(each, 1).nanmean(1).mean())


def _detected(p: SimpleNamespace, model: nn.Module, part: Dataset) -> float:
    """mAP in percent; nan where the protocol leaves no box to be found."""
    found, boxes = [], []
    size, anchors = 224, torch.tensor(ecamp_heads.ANCHORS, dtype=torch.float32) * 224 / 416
    for heads, truth in _outputs(p, model, part):
        decoded = [ecamp_heads.yolo_decode(x, a, size) for x, a in zip(heads, anchors, strict=True)]
        found += ecamp_heads.suppress(torch.cat(decoded, 1))
        boxes.append(truth)
    truth = torch.cat(boxes)
    left = (truth[..., 3] > 0).any(1)
    if p.protocol == "released":
        left &= torch.tensor([len(kept) > 0 for kept in found])
    return radiology.mean_precision(found, truth, size, p.protocol) if left.any() else float("nan")


# --- results ----------------------------------------------------------------------------------------------------------

KEYS = ["task", "dataset", "labels", "encoder", "protocol", "seed"]
_TABLES = {
    "fine-tune": "classification-finetune",
    "linear probe": "classification-linear",
    "segment": "segmentation",
    "detect": "detection",
}


def measured(path: Path, *new: Mapping[str, object]) -> pd.DataFrame:
    """The scores on real data in the CSV `path`; `new` rows, `KEYS` and "score", are added, or replace theirs."""
    # a CSV gives "10" back as a number
    return upsert_rows(path, KEYS, ["score"], [{**row, "labels": int(row["labels"])} for row in new])


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Means over seeds by (row, column) of a published table: only the published protocol is set beside it."""
    found = {}
    own = {title: name for name, title in TITLES.items() if name != "xrays/chestmnist"}
    rows = rows[rows.protocol == "released"]
    for (task, dataset, labels, start), group in rows.groupby(["task", "dataset", "labels", "encoder"]):
        fundus = dataset.startswith("fundus/")
        if (table == "fundus") != fundus or (not fundus and _TABLES.get(task) != table):
            continue
        title = TITLES.get(dataset, dataset)
        if own.get(title) == dataset:
            name = "random init" if start == "random" else start
            found[name, f"{title} {labels} %"] = float(group.score.mean())
    return found


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title, the paper's tables with what was measured behind each number."""
    found = {}
    for table in ("classification-finetune", "classification-linear", "segmentation", "detection", "fundus"):
        frame = published_table("ecamp", table)
        found[frame.attrs["title"]] = compare_published(frame, cells(rows, table))
    return found
