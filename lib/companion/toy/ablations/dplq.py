"""DPLQ at pocket scale: the methods, the two domains, and one training run of any method, from base to novel classes.

All methods prompt the same frozen pocket CLIP with 16 pictures of each base class, the same optimiser, number of
epochs and grid of learning rates. What does not change is computed once a picture: the domain model's feature, and
CLIP's image feature for the methods that leave the image tower alone.

Learning rates are chosen by the harmonic mean on validation pictures, those of novel classes among them, for every
method alike: so no method's rate is one that ruins what CLIP knows of other classes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import domains, fewshot
from ...models.dplq import model as dplq
from ...models.layers import clip_prompting as prompting
from ...ops.files import read_json
from ...training.fit import fit, predict
from .. import encoders
from ..datasets import domains as pocket
from ..datasets.tokens import Tokenizer
from ..encoders import domain_mae

LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
SEEDS = [0, 1, 2, 3, 4]
SELECTION_SEED = 100
METRIC = "HM"
SHOTS, EPOCHS, BATCH = 16, 40, 16
DEPTH, HIDDEN = 6, 16  # all six layers of the image tower; the small net's width, where the papers' E / 16 would be 4
TEMPLATE = "a photo of a {}"
SENSORS = ("first sensor", "second sensor")

# what is computed of a picture before training; "images" are the pictures themselves
INPUTS = {
    "zero-shot CLIP": ("CLIP",),
    "CoOp": ("CLIP",),
    "CoCoOp": ("CLIP",),
    "MaPLe": ("images",),
    "DPLQ": ("images", "domain"),
    "DPLQ, no domain feature": ("images", "none"),
    "DPLQ, CLIP's own feature": ("images", "CLIP, scaled"),
    "DPLQ, untrained domain model": ("images", "untrained"),
    "DPLQ, the other domain's model": ("images", "other"),
    "DPLQ, real layers": ("images", "domain"),
    "DPLQ, an axis each": ("images", "domain"),
    "DPLQ, mean 1": ("images", "domain, mean 1"),
    "DPLQ, mean 1, noise in training only": ("images", "domain, mean 1"),
    "DPLQ, mean 1, noise off": ("images", "domain, mean 1"),
}
OPTIONS = {
    "DPLQ, real layers": {"language": "real", "vision": "real"},
    "DPLQ, an axis each": {"axes": "i, j"},
    "DPLQ, mean 1, noise in training only": {"noise": "train"},
    "DPLQ, mean 1, noise off": {"noise": "off"},
}
METHODS = tuple(INPUTS)
UNTRAINED = ("zero-shot CLIP",)
TASKS = {"remote": list(METHODS), "medical": list(METHODS)[: METHODS.index("DPLQ, real layers") + 1]}


@functools.cache
def clip() -> nn.Module:
    """The pocket CLIP, frozen; one for all methods, which only read it."""
    return encoders.build("pocket_clip").requires_grad_(False)


def build(method: str, classes: tuple[str, ...], seed: int, features: int) -> prompting.PromptedCLIP:
    """The model of a method; its new tensors are drawn from `seed`. `features`: the width of the domain feature."""
    torch.manual_seed(seed)
    common = (clip(), classes, Tokenizer())
    if method == "zero-shot CLIP":
        return prompting.ZeroShot(*common, template="a {}")  # as the captions that the pocket CLIP was trained on
    if method == "CoOp":
        return prompting.CoOp(*common, tokens=4, template=TEMPLATE)
    if method == "CoCoOp":
        return prompting.CoCoOp(*common, template=TEMPLATE, hidden=HIDDEN)
    if method == "MaPLe":
        return prompting.MaPLe(*common, depth=DEPTH, template=TEMPLATE)
    options = OPTIONS.get(method, {})
    return dplq.DPLQ(*common, features, depth=DEPTH, template=TEMPLATE, hidden=HIDDEN, **options)


def encoder(what: str, task: str, seed: int) -> nn.Module:
    """The frozen model behind one of `INPUTS`, from pictures to features (b, F)."""
    if what == "CLIP":
        return prompting.ImageFeatures(clip())
    if what == "CLIP, scaled":
        return dplq.CLIPFeatures(clip())
    if what == "none":
        return dplq.NoFeatures(clip().visual.output_dim)
    if what == "untrained":
        torch.manual_seed(seed)
        return domain_mae.load(task, "random")
    return domain_mae.load(task if what == "domain" else next(name for name in pocket.DOMAINS if name != task))


def prepare(root: str | Path) -> None:
    """Write the pictures of every seed: each seed has its own, so that the spread holds their chance too."""
    for seed in (SELECTION_SEED, *SEEDS):
        for task in TASKS:
            pocket.write(folder(root, seed), task, seed)


def folder(root: str | Path, seed: int) -> Path:
    """The data root of a seed."""
    return Path(root) / f"seed{seed}"


def _part(task: str, root: str, seed: int, part: str) -> fewshot.Part:
    split, _, half = part.partition(" ")
    sets = domains.own_folder(folder(root, seed) / task, domains.clip_transform(backbones.input_of(clip())))
    base = len(fewshot.halves(sets[split].class_names)[0])
    classes = range(base, sets[split].classes) if half == "novel" else range(base)
    chosen = fewshot.select(sets[split], classes)
    return fewshot.few_shot(chosen, SHOTS, seed) if split == "train" else chosen


@functools.lru_cache(maxsize=16)
def pictures(task: str, root: str, seed: int, part: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (n, 3, 32, 32), labels (n,) and names of the classes of "train", "val base", "val novel", "test base" ...

    "train" has `SHOTS` pictures of each base class.
    """
    chosen = _part(task, root, seed, part)
    return torch.stack([image for image, _ in chosen]), torch.tensor(chosen.labels), chosen.class_names


@functools.lru_cache(maxsize=16)
def sensors(task: str, root: str, seed: int, part: str) -> Tensor:
    """Which sensor took each picture of a part, (n,), 0 or 1. No method is given it."""
    known = read_json(folder(root, seed) / task / "sensors.json")
    files = map(Path, _files(_part(task, root, seed, part)))
    return torch.tensor([known[f"{file.parent.name}/{file.name}"] for file in files])


def _files(data: Dataset) -> list[str]:
    if not isinstance(data, fewshot.Part):
        return data.sources
    files = _files(data.dataset)
    return [files[index] for index in data.indices]


@functools.lru_cache(maxsize=64)
def features(what: str, task: str, root: str, seed: int, part: str) -> Tensor:
    """What the model behind one of `INPUTS` gives for the pictures of a part, or the pictures themselves.

    The pocket domain models' features have a mean near 0, and the noise is as large as the mean. "domain, mean 1" says
    the same with a mean of 1, so that the noise is as large as the feature's own deviation.
    """
    if what == "domain, mean 1":
        return features("domain", task, root, seed, part) + 1
    images = pictures(task, root, seed, part)[0]
    if what == "images":
        return images
    return predict(encoder(what, task, seed), TensorDataset(images), accelerator="cpu")


def inputs(method: str, task: str, root: str, seed: int, part: str) -> TensorDataset:
    """A part as a method reads it: what `INPUTS` says first, the labels, and the domain feature where it has one."""
    first, *others = (features(what, task, str(root), seed, part) for what in INPUTS[method])
    return TensorDataset(first, pictures(task, str(root), seed, part)[1], *others)


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy over the classes."""
    first, labels, *domain = batch
    return F.cross_entropy(model(first, *domain), labels)


@torch.inference_mode()
def hits(model: prompting.PromptedCLIP, data: TensorDataset, classes: tuple[str, ...], seed: int = 0) -> Tensor:
    """Whether each picture is named right among `classes`, whose names the model is given: (n,) of 0 and 1.

    `seed` is that of DPLQ's noise.
    """
    model.eval().set_classes(classes)
    first, labels, *domain = data.tensors
    # the published batch of the test: the noise's size is a mean over a batch
    parts = zip(*(x.split(24) for x in (first, *domain)), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        said = torch.cat([model(*part).argmax(-1) for part in parts])
    return (said == labels).double()


def accuracy(model: prompting.PromptedCLIP, data: TensorDataset, classes: tuple[str, ...], seed: int = 0) -> float:
    """Top-1 accuracy in percent; arguments as `hits`."""
    return 100 * float(hits(model, data, classes, seed).mean())


def train(method: str, task: str, rate: float, seed: int, root: str, split: str = "test", **options) -> dict:
    """Train one method on the base classes of one domain, if it has anything to train, and test it on both halves.

    `split` "select": tested on the pictures of validation, 20 a class; "test": on 40 others. `options` go to `fit`.
    Returns a row: the accuracies of base and of novel classes and their harmonic mean, and the accuracy on all pictures
    of each sensor, in percent; the last loss; how many numbers were trained.
    """
    data = inputs(method, task, root, seed, "train")
    classes = pictures(task, str(root), seed, "train")[2]
    model, last = build(method, classes, seed, data.tensors[-1].shape[-1]), 0.0
    if method not in UNTRAINED:
        history = train_model(model, method, data, rate, seed, **options)
        last = round(sum(row["loss"] for row in history[-20:]) / 20, 4)
    held_out = "val" if split == "select" else "test"
    right, took, found = [], [], {}
    for half in ("base", "novel"):
        part = f"{held_out} {half}"
        classes = pictures(task, str(root), seed, part)[2]
        right.append(hits(model, inputs(method, task, root, seed, part), classes, seed))
        took.append(sensors(task, str(root), seed, part))
        found[half] = 100 * float(right[-1].mean())
    found["HM"] = fewshot.harmonic_mean(found["base"], found["novel"])
    for sensor, name in enumerate(SENSORS):
        found[name] = 100 * float(torch.cat(right)[torch.cat(took) == sensor].mean())
    row = {name: round(value, 2) for name, value in found.items()}
    return row | {"loss": last, "trained": 0 if method in UNTRAINED else model.count()}


def train_model(model: nn.Module, method: str, data: TensorDataset, rate: float, seed: int, **options) -> list[dict]:
    """Train `model` in place on what `inputs` gives; return its history."""
    settings = dict(epochs=EPOCHS, batch=BATCH, lr=rate, weight_decay=5e-4, seed=seed, accelerator="cpu", name=method)
    return fit(model, loss, data, **(settings | options))
