"""DPLQ at toy scale: the methods, the two domains, and one training run of any method, from base to novel classes.

All methods prompt the same small frozen CLIP with 16 images of each base class, the same optimiser, number of epochs
and grid of learning rates. Features that do not change are computed once per image: the domain model's, and CLIP's
image feature for the methods without prompts in the image tower.

Learning rates are chosen by the harmonic mean on validation images, those of novel classes among them, for every
method alike: so no method has a learning rate that degrades CLIP's accuracy on other classes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import domains, fewshot
from ...models.dplq import DPLQ
from ...models.dplq.model import CLIPFeatures, NoFeatures, loss
from ...models.dplq.recipe import TEST_BATCH, UNTRAINED
from ...models.layers import clip_prompting as prompting
from ...models.layers import coop
from ...models.layers.quaternion import QuaternionLinear
from ...ops.files import read_json
from ...training.fit import CPU, History, fit, predict
from ...training.schedules import MakeOptimizer, adamw
from .. import encoders
from ..datasets import domains as pocket
from ..encoders import domain_mae
from ..tokens import Tokenizer
from . import last_loss, reader, study_root

LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
METRIC = "HM"
SHOTS = 16
TRAINING: dict[str, Any] = {"epochs": 40, "batch": 16, "hardware": CPU}  # of `fit`
BUDGET = f"{TRAINING['epochs']} epochs, batch {TRAINING['batch']}"
DEPTH, HIDDEN = 6, 16  # all six layers of the image tower; the width of the small network, for which E / 16 would be 4
TEMPLATE = "a photo of a {}"
SENSORS = ("first sensor", "second sensor")

# features that are computed before training; "images" are the images themselves
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
OPTIONS: dict[str, dict[str, Any]] = {
    "DPLQ, mean 1, noise in training only": {"noise": "train"},
    "DPLQ, mean 1, noise off": {"noise": "off"},
}
METHODS = tuple(INPUTS)
TASKS = {"remote": list(METHODS), "medical": list(METHODS)[: METHODS.index("DPLQ, real layers") + 1]}


class RealLayers(DPLQ):
    """A control: real linear layers on the sum of prompt and bias."""

    def mixing_layer(self, inputs: int, outputs: int, layers: int | None = None) -> nn.Module:
        return nn.Linear(inputs, outputs) if layers is None else coop.LinearStack(inputs, outputs, layers)

    def mixed(self, layer: nn.Module, prompt: Tensor, bias: Tensor) -> Tensor:
        return layer(prompt + bias)


class AxisEach(DPLQ):
    """Not the authors': the prompt is the component i of a quaternion, the bias its component j."""

    def mixing_layer(self, inputs: int, outputs: int, layers: int | None = None) -> nn.Module:
        return QuaternionLinear(4 * inputs, outputs, layers)

    def mixed(self, layer: nn.Module, prompt: Tensor, bias: Tensor) -> Tensor:
        width = prompt.shape[-1]
        return layer(F.pad(torch.cat(torch.broadcast_tensors(prompt, bias), -1), (width, width)))


KINDS = {"DPLQ, real layers": RealLayers, "DPLQ, an axis each": AxisEach}


@functools.cache
def clip() -> nn.Module:
    """The small CLIP; the methods keep copies of it."""
    return encoders.build("pocket_clip")


def build(method: str, classes: tuple[str, ...], seed: int, features: int) -> prompting.PromptedCLIP:
    """The model of a method; its new tensors are drawn from `seed`. `features`: the width of the domain feature."""
    torch.manual_seed(seed)
    common = (clip(), classes, Tokenizer())
    if method == "zero-shot CLIP":
        return coop.ZeroShot(*common, template="a {}")  # as in the captions that the small CLIP was trained on
    if method == "CoOp":
        return coop.CoOp(*common, tokens=4, template=TEMPLATE)
    if method == "CoCoOp":
        return coop.CoCoOp(*common, template=TEMPLATE, hidden=HIDDEN)
    if method == "MaPLe":
        return coop.MaPLe(*common, depth=DEPTH, template=TEMPLATE)
    kind, options = KINDS.get(method, DPLQ), OPTIONS.get(method, {})
    return kind(*common, features, depth=DEPTH, template=TEMPLATE, hidden=HIDDEN, **options)


def encoder(what: str, task: str, seed: int) -> nn.Module:
    """The model of one of `INPUTS`, from images to features (b, F)."""
    if what == "CLIP":
        return prompting.ImageFeatures(clip())
    if what == "CLIP, scaled":
        return CLIPFeatures(clip())
    if what == "none":
        return NoFeatures(clip().visual.output_dim)
    if what == "untrained":
        torch.manual_seed(seed)
        return domain_mae.load(task, "random")
    return domain_mae.load(task if what == "domain" else next(name for name in pocket.DOMAINS if name != task))


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    for task in TASKS:
        pocket.write(study_root(root, seed), task, seed)


@reader()
def _part(task: str, root: str, seed: int, split: str) -> fewshot.Part:
    """A part such as "val base"."""
    split, _, half = split.partition(" ")
    sets = domains.own_folder(study_root(root, seed) / task, domains.clip_transform(backbones.input_of(clip())))
    base = len(fewshot.halves(sets[split].class_names)[0])
    classes = range(base, sets[split].classes) if half == "novel" else range(base)
    chosen = fewshot.select(sets[split], classes)
    return fewshot.few_shot(chosen, SHOTS, seed) if split == "train" else chosen


@functools.lru_cache(maxsize=16)
def images(task: str, root: str, seed: int, part: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (n, 3, 32, 32), labels (n,) and names of the classes of "train", "val base", "val novel", "test base" ...

    "train" has `SHOTS` images of each base class.
    """
    chosen = _part(task, root, seed, part)
    return torch.stack([image for image, _ in chosen]), torch.tensor(chosen.labels), chosen.class_names


@functools.lru_cache(maxsize=16)
def sensors(task: str, root: str, seed: int, part: str) -> Tensor:
    """The sensor of each image of a part, (n,), 0 or 1. No method uses it."""
    known = read_json(study_root(root, seed) / task / "sensors.json")
    files = map(Path, _files(_part(task, root, seed, part)))
    return torch.tensor([known[f"{file.parent.name}/{file.name}"] for file in files])


def _files(data: Dataset) -> list[str]:
    if not isinstance(data, fewshot.Part):
        return data.sources
    files = _files(data.dataset)
    return [files[index] for index in data.indices]


@functools.lru_cache(maxsize=64)
def features(what: str, task: str, root: str, seed: int, part: str) -> Tensor:
    """One of `INPUTS` for the images of a part: features, or the images themselves.

    The features of the small domain models have a mean near 0, and the noise is as large as the mean. "domain, mean 1"
    is the same feature with a mean of 1, so that the noise is as large as its standard deviation.
    """
    if what == "domain, mean 1":
        return features("domain", task, root, seed, part) + 1
    found = images(task, root, seed, part)[0]
    if what == "images":
        return found
    return predict(encoder(what, task, seed), TensorDataset(found), hardware=CPU)


def inputs(method: str, task: str, root: str, seed: int, part: str) -> TensorDataset:
    """A part as input of a method: images or CLIP features, labels, and the domain feature where it has one."""
    first, *others = (features(what, task, str(root), seed, part) for what in INPUTS[method])
    return TensorDataset(first, images(task, str(root), seed, part)[1], *others)


@torch.inference_mode()
def hits(model: prompting.PromptedCLIP, data: TensorDataset, classes: tuple[str, ...], seed: int = 0) -> Tensor:
    """Whether each image is classified correctly among `classes`: (n,) of 0 and 1. `seed` is that of DPLQ's noise."""
    model.eval().set_classes(classes)
    first, labels, *domain = data.tensors
    parts = zip(*(x.split(TEST_BATCH) for x in (first, *domain)), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predicted = torch.cat([model(*part).argmax(-1) for part in parts])
    return (predicted == labels).double()


def accuracy(model: prompting.PromptedCLIP, data: TensorDataset, classes: tuple[str, ...], seed: int = 0) -> float:
    """Top-1 accuracy in percent; arguments as `hits`."""
    return 100 * float(hits(model, data, classes, seed).mean())


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict:
    """Train one method on the base classes of one domain, if it has anything to train, and test it on both halves.

    `split` "select": tested on the validation images, 20 per class; "test": on 40 others. `options` go to `fit`.
    Returns a row: the accuracies of base and of novel classes and their harmonic mean, and the accuracy on all images
    of each sensor, in percent; the last loss; the number of trainable parameters.
    """
    data = inputs(method, task, root, seed, "train")
    classes = images(task, str(root), seed, "train")[2]
    model, last = build(method, classes, seed, data.tensors[-1].shape[-1]), 0.0
    if method not in UNTRAINED:
        history = train_model(model, data, learning_rate, **{"seed": seed, "name": method} | options)
        last = last_loss(history)
    held_out = "val" if split == "select" else "test"
    right, took, found = [], [], {}
    for half in ("base", "novel"):
        part = f"{held_out} {half}"
        classes = images(task, str(root), seed, part)[2]
        right.append(hits(model, inputs(method, task, root, seed, part), classes, seed))
        took.append(sensors(task, str(root), seed, part))
        found[half] = 100 * float(right[-1].mean())
    found["HM"] = fewshot.harmonic_mean(found["base"], found["novel"])
    for sensor, name in enumerate(SENSORS):
        found[name] = 100 * float(torch.cat(right)[torch.cat(took) == sensor].mean())
    row = {name: round(value, 2) for name, value in found.items()}
    return row | {"loss": last, "trained": 0 if method in UNTRAINED else model.count()}


def optimizer(learning_rate: float) -> MakeOptimizer:
    """AdamW with the published weight decay."""
    return adamw(learning_rate, 5e-4)


def train_model(model: nn.Module, data: TensorDataset, learning_rate: float, **options: Any) -> History:
    """Train `model` in place on the result of `inputs`; `options` go to `fit`."""
    return fit(model, loss, data, optimizer=optimizer(learning_rate), **TRAINING | options)
