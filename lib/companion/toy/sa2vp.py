"""SA²VP's ablation at toy scale: small classification tasks on real photographs and digits, the methods, one training.

Images are 32x32, and every task has the size of VTAB-1k: 800 training and 200 validation images.

* where: which of the 3x3 cells contains the object, of any class. Requires position, as dSprites location does: a
  position-invariant feature cannot solve it.
* digits: scikit-learn's handwritten digits (real scans), enlarged to 28 pixels, on photographs of low contrast.
* textures: which photograph a crop was taken from; training, validation and test crops come from different tiles.
* orient: the direction of a bar, four classes of 45 degrees. The ablation leaves it out.

All methods share the frozen (or fine-tuned) small ViT, the optimiser, the number of epochs and the grid of learning
rates. Dropout is off for all: the released code applies dropout in the frozen blocks during training and VPT's does
not, so either choice would favour one.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage.color import hsv2rgb
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from .. import backbones
from ..data.classification import resize_transform
from ..errors import check_choice
from ..evaluation.ablations import Study
from ..models.layers import classifying
from ..models.sa2vp import SA2VP, recipe
from ..models.sa2vp import baselines as vpt
from ..models.sa2vp.model import AlignedAttention, neighbourhood
from ..training.fit import History, fit, outputs_of
from ..training.hardware import CPU, Hardware
from . import encoders
from .scenes import PLACES, SIZE, SPLITS, canvas, cut, quantise, scene

TEXTURES = (
    "brick",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "motorcycle",
    "page",
    "retina",
    "stars",
    "tissue",
)


# --- images ---


def _where(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(9))
    side = SIZE / 3
    x, y = (label % 3 + rng.uniform(0.1, 0.9)) * side, (label // 3 + rng.uniform(0.1, 0.9)) * side
    return scene(rng, split, centre=(x, y), radius=(5, 7), contrast=(0.05, 0.15)).image, label


def _orient(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(4))
    angle = (label + rng.uniform(-0.35, 0.35)) * np.pi / 4
    centre = tuple(rng.uniform(8, SIZE - 8, 2))
    return scene(rng, split, shape="bar", centre=centre, radius=(6, 9), angle=angle, contrast=(0.1, 0.3)).image, label


@functools.cache
def _originals() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits (1797, 8, 8) in 0..16 and their labels, in one fixed random order."""
    images, labels = load_digits().images, load_digits().target
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order]


def _digits(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    images, labels = _originals()
    original = index + {"train": 0, "val": 800, "test": 1000}[split]
    ink = Image.fromarray((images[original] * 255 / 16).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    covered = np.zeros((SIZE, SIZE, 1))
    covered[2:30, 2:30, 0] = np.asarray(ink) / 255
    paper = canvas(rng, split, (0.0, 0.1)).pixels
    # in the saturated colours of the drawn objects that the toy backbones were trained on
    colour = hsv2rgb(np.array([rng.uniform(), rng.uniform(0.7, 1), rng.uniform(0.6, 1)]))
    return quantise(paper * (1 - covered) + colour * covered), int(labels[original])


def _textures(rng: np.random.Generator, split: str, index: int) -> tuple[np.ndarray, int]:
    label = int(rng.integers(len(TEXTURES)))
    return quantise(cut(rng, TEXTURES[label], split).pixels * rng.uniform(0.85, 1.15)), label


class Task(NamedTuple):
    """A task: its class names, the number of test images, and the function that draws image `index` of a split."""

    classes: tuple[str, ...]
    test: int
    make: Callable[[np.random.Generator, str, int], tuple[np.ndarray, int]]


TASKS = {
    "where": Task(PLACES, 500, _where),
    "orient": Task(("0°", "45°", "90°", "135°"), 500, _orient),
    "digits": Task(tuple("0123456789"), 797, _digits),
    "textures": Task(TEXTURES, 500, _textures),
}


def examples(task: str, split: str, seed: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """The images (32, 32, 3) uint8 and labels of one split of a task, in order.

    Raises `BadParameter` for an unknown task or split.
    """
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, zlib.crc32(f"{task}/{split}".encode())))
    count = {"train": 800, "val": 200, "test": TASKS[task].test}[split]
    return (TASKS[task].make(rng, split, index) for index in range(count))


@functools.lru_cache(8)
def data(task: str, seed: int, split: str) -> TensorDataset:
    """A split as the small ViT sees it: images (n, 3, 32, 32), labels (n,). "trainval" is "train", then "val"."""
    transform = resize_transform(backbones.input_of(encoders.build("pocket_vit", "random")))
    parts = ("train", "val") if split == "trainval" else (split,)
    images, labels = zip(*itertools.chain(*(examples(task, part, seed) for part in parts)), strict=True)
    return TensorDataset(torch.stack([transform(Image.fromarray(x)) for x in images]), torch.tensor(labels))


def save(folder: Path, names: tuple[str, ...] = ("brick", "coffee"), count: int = 20, seed: int = 0) -> Path:
    """Write crops of the photographs `names`, `count` of each, as `folder`/<name>/<number>.png; return `folder`."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        chosen = (image for image, label in examples("textures", "train", seed) if TEXTURES[label] == name)
        for number, image in enumerate(itertools.islice(chosen, count)):
            Image.fromarray(image).save(folder / name / f"{number:02d}.png")
    return folder


# --- methods, training, score ---

OPTIONS: dict[str, Any] = {"epochs": 8, "batch": 20, "hardware": CPU}  # of `fit`
WIDTH, SCALE, TOKENS = 8, 1.5, 8


def _ours(scale: float = SCALE, radius: int | None = 1) -> Callable[[nn.Module, int], SA2VP]:
    """SA²VP whose tokens attend to the tokens at most `radius` away; None: to all, a control."""

    def build(backbone: nn.Module, classes: int) -> SA2VP:
        model = SA2VP(backbone, classes, width=WIDTH, scale=scale, dropout=0.0)
        model.cross = AlignedAttention(neighbourhood(model.grid, radius))
        return model

    return build


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "full fine-tuning": classifying.FineTuning,
    "linear probing": classifying.LinearProbe,
    "VPT-deep": functools.partial(vpt.VPT, tokens=TOKENS, deep=True, dropout=0.0),
    "SA²VP": _ours(),
    "SA²VP, global attention": _ours(radius=None),
    "SA²VP, s = 0.1": _ours(scale=0.1),
}


def build(method: str, classes: int, seed: int) -> nn.Module:
    """The model of a method on the small ViT; its new tensors are drawn from `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](encoders.build("pocket_vit"), classes)


def train(method: str, task: str, learn: TensorDataset, learning_rate: float, seed: int) -> tuple[nn.Module, History]:
    """A trained method, and the last ten steps of its history."""
    model = build(method, len(TASKS[task].classes), seed)
    return model, fitted(model, learn, learning_rate, **OPTIONS, seed=seed, name=method)[-10:]


def fitted(model: nn.Module, learn: TensorDataset, learning_rate: float, **options: Any) -> History:
    """Train a method in place by the published recipe; `options` go to `fit`. A linear probe trains its head alone, on
    features computed once, since its encoder is frozen."""
    options = recipe.fit_options(learning_rate, options["hardware"]) | options
    if isinstance(model, classifying.LinearProbe):
        features = outputs_of(model.backbone, learn, hardware=Hardware(options["hardware"].accelerator))
        history = fit(model.head, recipe.loss, TensorDataset(features, learn.tensors[1]), **options)
        model.eval()
        return history
    return fit(model, recipe.loss, learn, **options)


def score(model: nn.Module, task: str, held_out: TensorDataset) -> dict[str, float]:
    """The accuracy in percent, of the image pathway if there are two."""
    return {"accuracy": round(recipe.accuracy(model, held_out, CPU, batch=256), 2)}


STUDY = Study(
    tasks={task: tuple(METHODS) for task in ("where", "digits", "textures")},
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    budget=f"{OPTIONS['epochs']} epochs, batch {OPTIONS['batch']}",
    data=data,
    fit=train,
    score=score,
)
