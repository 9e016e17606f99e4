"""DPLQ's ablation at toy scale: two domains with two sensors each, the methods, one training and one score.

An image is a drawn object on a grey crop of a photograph: an aerial view in "remote", tissue or retina in "medical".
Each comes from one of two sensors, at random. A sensor has two properties:

* its colours: the first sensor's are unchanged, the second's have every hue rotated by half the colour circle (remote:
  a false-colour composite) or are a negative (medical). Red becomes cyan in either. So the class names are right for
  one half of the images and wrong for the other, and no fixed prompt is right for both.
* its fixed pattern of lines, in its own direction and always at the same position, like the fixed-pattern noise of real
  sensors. The toy CLIP was trained to name objects on any background, and its feature does not contain the pattern; a
  model that learns to reconstruct images of the domain must represent it.

So a domain model has information that CLIP lacks and that also holds for new classes: DPLQ's mechanism needs it to have
an effect, and the data were built to contain it. A fixed pattern is easy to detect, though: an untrained network's
feature contains it too, at a smaller scale, and the study has that control. Base and novel classes are combinations of
the same words: each word occurs in training, in other combinations.

All methods prompt the same small frozen CLIP with 16 images of each base class, the same optimiser, number of epochs
and grid of learning rates. Features that do not change are computed once per image: the domain model's, and CLIP's
image feature for CoCoOp, which has no prompts in the image tower.

Learning rates are chosen by the harmonic mean on validation images, those of novel classes among them, for every
method alike: so no method has a learning rate that degrades CLIP's accuracy on other classes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .. import backbones
from ..data import fewshot
from ..data.domains import clip_transform
from ..errors import check_choice
from ..evaluation.ablations import Study
from ..models.dplq import baselines as coop
from ..models.dplq.model import DPLQ, TEST_BATCH, NoFeatures, loss
from ..models.layers.clip_prompting import ImageFeatures, PromptedCLIP
from ..training.fit import History, fit, outputs_of
from ..training.hardware import CPU
from ..training.schedules import adamw
from . import encoders
from .encoders import domain_mae
from .scenes import HUES, PLACES, SHAPES, SIZE, canvas, coverage, cut, quantise
from .tokens import Tokenizer

EACH = {"train": 16, "val": 20, "test": 40}  # images of each class
AMPLITUDE, PERIOD = 0.12, 8  # of the sensors' lines: amplitude relative to the range of pixels; period in pixels
SENSORS = ("first sensor", "second sensor")
TRANSFORM = clip_transform(backbones.Input(SIZE, (0.5,) * 3, (0.5,) * 3))  # of the small CLIP


# --- the domains ---


@dataclass(frozen=True)
class Domain:
    """One domain.

    Attributes:
        photographs: whose crops are the backgrounds.
        words: combined with a hue they form the classes: shapes, or positions.
        name: from a hue and a word to the class name, as in a caption.
        second: the second sensor's colour transform, (32, 32, 3) in [0, 1] to the same.
        lines: for each sensor the x and y component of the direction across its lines.
    """

    photographs: tuple[str, ...]
    words: tuple[str, ...]
    name: Callable[[str, str], str]
    second: Callable[[np.ndarray], np.ndarray]
    lines: tuple[tuple[int, int], tuple[int, int]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The hue and the word of each class: first the base half, in which each hue occurs with half of the words and
        vice versa."""
        pairs = [(h, w) for w in range(len(self.words)) for h in range(len(HUES))]
        return [(HUES[h], self.words[w]) for h, w in sorted(pairs, key=lambda pair: sum(pair) % 2)]

    @property
    def classes(self) -> list[str]:
        """The names of the classes by label."""
        return [self.name(hue, word) for hue, word in self.pairs]


def false_colour(image: np.ndarray) -> np.ndarray:
    """An image (32, 32, 3) in [0, 1] with every hue rotated by half the colour circle: red and cyan are exchanged."""
    hsv = rgb2hsv(image)
    hsv[..., 0] = (hsv[..., 0] + 0.5) % 1
    return hsv2rgb(hsv)


def negative(image: np.ndarray) -> np.ndarray:
    """An image (32, 32, 3) in [0, 1], light and dark exchanged in every channel."""
    return 1 - image


DOMAINS = {
    "remote": Domain(("brick", "grass", "gravel", "moon"), SHAPES, "{} {}".format, false_colour, ((1, -1), (1, 1))),
    "medical": Domain(
        ("retina", "tissue"),
        tuple(place for place in PLACES if place in ("top", "left", "right", "bottom")),
        "{} object at the {}".format,
        negative,
        ((0, 1), (1, 0)),
    ),
}


def pattern(domain: str, sensor: int) -> np.ndarray:
    """The lines of a sensor, (32, 32, 1) in -`AMPLITUDE`..`AMPLITUDE`."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    x, y = DOMAINS[domain].lines[sensor]
    return AMPLITUDE * np.sin(2 * np.pi * (x * columns + y * rows) / PERIOD)[..., None]


def draw(rng: np.random.Generator, domain: str, split: str, label: int, sensor: int) -> np.ndarray:
    """One image (32, 32, 3) uint8 of a class; background and surface are crops of tiles of `split`."""
    world = DOMAINS[domain]
    hue, word = world.pairs[label]
    shape = word if word in SHAPES else SHAPES[rng.integers(len(SHAPES))]
    radius, angle = rng.uniform(4, 7), rng.uniform(-0.3, 0.3)
    centre = rng.uniform(6, SIZE - 6, 2)
    if word in PLACES:
        column, row = PLACES.index(word) % 3, PLACES.index(word) // 3
        centre = (np.array([column, row]) + rng.uniform(0.2, 0.8, 2)) * SIZE / 3
    covered = coverage(shape, tuple(centre), radius, angle)[..., None]

    names = world.photographs
    background = canvas(rng, split, (0.3, 0.7), names[rng.integers(len(names))]).pixels.mean(-1, keepdims=True)
    # grey, with random brightness: the background reveals neither the colour rotation nor the negative
    background = background - background.mean() + rng.uniform(0.3, 0.7)
    grain = cut(rng, names[rng.integers(len(names))], split).pixels.mean(-1, keepdims=True)
    colour = np.array([(HUES.index(hue) + rng.uniform(-0.3, 0.3)) / 4 % 1, rng.uniform(0.7, 1), rng.uniform(0.6, 1)])
    surface = hsv2rgb(colour) * (1 + rng.uniform(0, 0.6) * (grain - grain.mean()))
    shown = np.clip(background * (1 - covered) + surface * covered, 0, 1)
    if sensor:
        shown = world.second(shown)
    return quantise(shown + pattern(domain, sensor) + rng.normal(0, 0.02, (SIZE, SIZE, 3)))


def unlabelled(domain: str, count: int, split: str = "train", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 of any class of a domain, and their sensors (count,), 0 or 1.

    The sensors are for evaluation only; pre-training does not use them. Raises `BadParameter`: another domain.
    """
    check_choice("domain", domain, DOMAINS)
    rng = _generator(f"unlabelled {domain}", split, seed)
    sensors, labels = rng.integers(2, size=count), rng.integers(len(DOMAINS[domain].classes), size=count)
    images = [draw(rng, domain, split, *pair) for pair in zip(labels, sensors, strict=True)]
    return np.stack(images), sensors


def _generator(what: str, split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(f"{what}/{split}".encode())))


# --- data ---


class Half(NamedTuple):
    """The images of the base or of the novel classes: (n, 3, 32, 32) in [-1, 1], labels (n,), sensors (n,) of 0 or 1,
    which no method uses, and class names by label."""

    images: Tensor
    labels: Tensor
    sensors: Tensor
    classes: tuple[str, ...]


class Split(NamedTuple):
    """A split of a domain, and the seed of DPLQ's noise on it."""

    base: Half
    novel: Half
    seed: int


def examples(domain: str, split: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images (n, 32, 32, 3) uint8 of all classes in turn, their labels and their sensors, (n,) each."""
    rng, rows = _generator(domain, split, seed), []
    for label in range(len(DOMAINS[domain].classes)):
        for _ in range(EACH[split]):
            sensor = int(rng.integers(2))
            rows.append((draw(rng, domain, split, label, sensor), label, sensor))
    images, labels, sensors = zip(*rows, strict=True)
    return np.stack(images), np.array(labels), np.array(sensors)


@functools.lru_cache(maxsize=6)
def data(domain: str, seed: int, split: str) -> Split:
    """A split, "train", "val" or "test"; "trainval" is "train": no method is trained with more than 16 shots."""
    drawn, labels, sensors = map(torch.from_numpy, examples(domain, "train" if split == "trainval" else split, seed))
    images = TRANSFORM(drawn.permute(0, 3, 1, 2).contiguous())
    base, novel = fewshot.halves(DOMAINS[domain].classes)
    old = labels < len(base)
    return Split(
        Half(images[old], labels[old], sensors[old], base),
        Half(images[~old], labels[~old] - len(base), sensors[~old], novel),
        seed,
    )


def save(folder: Path, domain: str, seed: int) -> Path:
    """Write the training images of a domain as a user has them, <class>/<number>.png; return `folder`."""
    images, labels, _ = examples(domain, "train", seed)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / DOMAINS[domain].classes[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


# --- methods, training, score ---

EPOCHS, BATCH, WEIGHT_DECAY = 40, 16, 5e-4
DEPTH, HIDDEN = 6, 16  # all six layers of the image tower; the width of the small network, for which E / 16 would be 4
TEMPLATE = "a photo of a {}"
METHODS = ("CoCoOp", "MaPLe", "DPLQ", "DPLQ, no domain feature", "DPLQ, untrained domain model", "DPLQ, real layers")


class RealLayers(DPLQ):
    """A control: real linear layers on the sum of prompt and bias."""

    def mixing_layer(self, inputs: int, outputs: int, layers: int | None = None) -> nn.Module:
        return nn.Linear(inputs, outputs) if layers is None else coop.LinearStack(inputs, outputs, layers)

    def mixed(self, layer: nn.Module, prompt: Tensor, bias: Tensor) -> Tensor:
        return layer(prompt + bias)


def build(method: str, domain: str, classes: tuple[str, ...], seed: int) -> PromptedCLIP:
    """A method on the small CLIP; its new parameters are drawn from `seed`, as are those of an untrained model."""
    clip = encoders.build("pocket_clip")
    model: nn.Module = domain_mae.load(domain)
    if method == "DPLQ, no domain feature":
        model = NoFeatures(clip.visual.output_dim)
    elif method == "DPLQ, untrained domain model":
        torch.manual_seed(seed)
        model = domain_mae.load(domain, "random")
    torch.manual_seed(seed)
    common = (clip, classes, Tokenizer())
    if method == "CoCoOp":
        return coop.CoCoOp(*common, template=TEMPLATE, hidden=HIDDEN)
    if method == "MaPLe":
        return coop.MaPLe(*common, depth=DEPTH, template=TEMPLATE)
    kind = RealLayers if method == "DPLQ, real layers" else DPLQ
    return kind(*common, model, depth=DEPTH, template=TEMPLATE, hidden=HIDDEN)


def inputs(model: PromptedCLIP, images: Tensor) -> list[Tensor]:
    """What a model is called with: the images, with their domain features for DPLQ; or CLIP's features of them, where
    no prompt enters the image tower."""
    each = TensorDataset(images)
    if isinstance(model, DPLQ):
        return [images, outputs_of(model.domain, each, hardware=CPU)]
    return [images if isinstance(model, coop.MaPLe) else outputs_of(ImageFeatures(model.clip), each, hardware=CPU)]


def train(
    method: str, task: str, data: Split, learning_rate: float, seed: int, epochs: float = EPOCHS
) -> tuple[PromptedCLIP, History]:
    """A method trained on the base classes of a domain, and its history. AdamW takes the place of SGD."""
    few = data.base
    model = build(method, task, few.classes, seed)
    first, *domain = inputs(model, few.images)
    history = fit(
        model,
        loss,
        TensorDataset(first, few.labels, *domain),
        epochs=epochs,
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )
    return model, history


@torch.inference_mode()
def hits(model: PromptedCLIP, half: Half, seed: int, domain: Tensor | None = None) -> Tensor:
    """Whether each image is classified correctly among the half's classes: (n,) of 0 and 1.

    Args:
        seed: of DPLQ's noise.
        domain: (n, F), in the place of DPLQ's domain features.
    """
    model.eval().reset_classifier(half.classes)
    read = inputs(model, half.images) if domain is None else [half.images, domain]
    batches = zip(*(x.split(TEST_BATCH) for x in read), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predicted = torch.cat([model(*batch).argmax(-1) for batch in batches])
    return (predicted == half.labels).double()


def score(model: PromptedCLIP, task: str, data: Split) -> dict[str, float]:
    """Accuracy on base and on novel classes, each among its own, their harmonic mean, and the accuracy on all images of
    each sensor, in percent."""
    right = [hits(model, half, data.seed) for half in (data.base, data.novel)]
    found = {name: 100 * float(r.mean()) for name, r in zip(("base", "novel"), right, strict=True)}
    found["HM"] = fewshot.harmonic_mean(found["base"], found["novel"])
    every, sensors = torch.cat(right), torch.cat([data.base.sensors, data.novel.sensors])
    found |= {name: 100 * float(every[sensors == sensor].mean()) for sensor, name in enumerate(SENSORS)}
    return {name: round(value, 2) for name, value in found.items()}


STUDY = Study(
    tasks=dict.fromkeys(DOMAINS, METHODS),
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    metric="HM",
)
