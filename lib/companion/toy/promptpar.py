"""PromptPAR's ablation at toy scale: drawn pedestrians, the methods, one training and one score.

Every image is 64x32. A person stands before a crop of a photograph and wears a top, trousers or shorts, and shoes,
each red, blue, green or grey, with crops of photographs as texture; optionally a hat and a bag in any of the four
colours. The same colours occur on every part, and two persons in three wear red: only its vertical position is
informative. So a model with region strips can have an advantage.

There are two cameras. The toy CLIP is trained on images of the clear one. The street camera is dim, with a colour cast,
low resolution and strong noise: its images are the data set for prompt learning. Backgrounds and textures of training,
validation and test are crops of separate tiles, as in `scenes`.

All methods build on the same toy CLIP and on the same fusion block, the last of the small ViT, and are trained on the
same images with the same loss, optimiser, number of epochs and grid.
"""

from __future__ import annotations

import copy
import csv
import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from skimage.color import hsv2rgb
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ..data.images import as_rgb
from ..evaluation.ablations import Study
from ..evaluation.metrics.attributes import evaluate
from ..io.config import configure
from ..models.promptpar import PromptPAR, Settings, loss
from ..training.callbacks import ClipNorm
from ..training.fit import Batch, History, fit, outputs_of
from ..training.hardware import CPU
from ..training.schedules import adamw
from . import encoders
from .encoders.pedestrian_clip import tokenizer
from .encoders.vit_and_clip import pixels
from .scenes import PHOTOGRAPHS, cut, photograph, quantise, tiles

HEIGHT, WIDTH = 64, 32  # of every image, in pixels
COLOURS = ("red", "blue", "green", "grey")
CAMERAS = ("clear", "street")
COUNTS = {"train": 400, "val": 300, "test": 600}

# the attributes by label, with the prompt of each
SENTENCES = {
    "hat": "a pedestrian with a hat",
    "long hair": "a pedestrian with long hair",
    "red top": "a pedestrian in a red top",
    "blue top": "a pedestrian in a blue top",
    "striped top": "a pedestrian in a striped top",
    "shorts": "a pedestrian in shorts",
    "red trousers": "a pedestrian in red trousers",
    "blue trousers": "a pedestrian in blue trousers",
    "red shoes": "a pedestrian in red shoes",
    "blue shoes": "a pedestrian in blue shoes",
    "backpack": "a pedestrian with a backpack",
    "handbag": "a pedestrian with a handbag",
}
ATTRIBUTES = tuple(SENTENCES)
# the body part of each attribute
PARTS = {
    "head": ATTRIBUTES[:2],
    "upper body": ATTRIBUTES[2:5],
    "legs": ATTRIBUTES[5:8],
    "feet": ATTRIBUTES[8:10],
    "bags": ATTRIBUTES[10:],
}
# the first and the last row of the 8 rows of patches that show each
ROWS = {"head": (0, 1), "upper body": (1, 4), "legs": (4, 7), "feet": (6, 7), "bags": (1, 5)}

_HUE = {"red": 0.0, "blue": 0.62, "green": 0.36}
_SKIN = ((0.93, 0.76, 0.65), (0.78, 0.57, 0.44), (0.48, 0.32, 0.24))
_LARGE = tuple(name for name in PHOTOGRAPHS if name not in ("page", "coins"))  # tiles of at least 64 x 32 pixels


@dataclass(frozen=True)
class Pedestrian:
    """A person's clothes; colours are of `COLOURS`.

    Attributes:
        hat: its colour, or "".
        hair: "long" or "short".
        top, lower, shoes: their colours.
        pattern: "striped" or "plain".
        legs: "trousers" or "shorts".
        bag: "backpack", "handbag" or "".
    """

    hat: str
    hair: str
    top: str
    pattern: str
    legs: str
    lower: str
    shoes: str
    bag: str

    @property
    def labels(self) -> list[int]:
        """0 or 1 for each of `ATTRIBUTES`."""
        there = {
            "hat": self.hat != "",
            "long hair": self.hair == "long",
            "striped top": self.pattern == "striped",
            "shorts": self.legs == "shorts",
            "backpack": self.bag == "backpack",
            "handbag": self.bag == "handbag",
        }
        for colour in ("red", "blue"):
            there[f"{colour} top"] = self.top == colour
            there[f"{colour} trousers"] = self.legs == "trousers" and self.lower == colour
            there[f"{colour} shoes"] = self.shoes == colour
        return [int(there[name]) for name in ATTRIBUTES]

    def captions(self) -> dict[str, str]:
        """One sentence about each part, and one, "all", about all of them."""
        hat, bag = "a hat" if self.hat else "no hat", f"a {self.bag}" if self.bag else "no bag"
        said = {
            "hat": f"with {hat}",
            "hair": f"with {self.hair} hair",
            "top": f"in a {self.top} top",
            "pattern": f"in a {self.pattern} top",
            "legs": f"in {self.legs}",
            "lower": f"in {self.lower} {self.legs}",
            "shoes": f"in {self.shoes} shoes",
            "bag": f"with {bag}",
        }
        everything = (
            f"with {self.hair} hair and {hat} in a {self.pattern} {self.top} top and {self.lower} {self.legs} "
            f"and {self.shoes} shoes with {bag}"
        )
        return {part: f"a pedestrian {words}" for part, words in (said | {"all": everything}).items()}


def dressed(rng: np.random.Generator) -> Pedestrian:
    """A person in random, independently chosen clothes."""

    def colour() -> str:
        return COLOURS[rng.integers(len(COLOURS))]

    hat = colour()
    return Pedestrian(
        hat=hat if rng.random() < 0.35 else "",
        hair=("short", "long")[int(rng.random() < 0.4)],
        top=colour(),
        pattern=("plain", "striped")[int(rng.random() < 0.4)],
        legs=("trousers", "shorts")[int(rng.random() < 0.35)],
        lower=colour(),
        shoes=colour(),
        bag=("backpack", "handbag", "")[min(2, int(rng.random() / 0.35))],
    )


# --- drawing ---


def _paint(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A random shade (3,) of `colour`."""
    if colour == "grey":
        return np.full(3, rng.uniform(0.3, 0.75))
    hue = (_HUE[colour] + rng.uniform(-0.03, 0.03)) % 1
    return hsv2rgb(np.array([hue, rng.uniform(0.65, 1), rng.uniform(0.5, 0.95)]))


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """How much of each pixel an upright box covers, (64, 32) in [0, 1]."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    y = np.clip(np.minimum(rows + 1, bottom) - np.maximum(rows, top), 0, 1)
    return y * np.clip(np.minimum(columns + 1, right) - np.maximum(columns, left), 0, 1)


def _oval(x: float, y: float, wide: float, high: float) -> np.ndarray:
    """The same of an ellipse with half axes `wide` and `high`."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    far = np.hypot((columns + 0.5 - x) / wide, (rows + 0.5 - y) / high)
    return np.clip(0.5 - (far - 1) * min(wide, high), 0, 1)


def backdrop(rng: np.random.Generator, split: str) -> np.ndarray:
    """A window (64, 32, 3) in [0, 1] of one tile of `split` of a random photograph, its contrast lowered."""
    name = _LARGE[rng.integers(len(_LARGE))]
    places = tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    scale = rng.uniform(1, min(2.5, (bottom - top) / HEIGHT, (right - left) / WIDTH))
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    y, x = int(rng.integers(top, bottom - height + 1)), int(rng.integers(left, right - width + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph(name)[y : y + height, x : x + width])
    pixels = np.asarray(window.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=float) / 255
    mean = pixels.mean((0, 1))
    return mean + rng.uniform(0.3, 0.8) * (pixels - mean)


def draw(rng: np.random.Generator, person: Pedestrian, split: str, camera: str = "street") -> np.ndarray:
    """An image (64, 32, 3) uint8 of a person; background and textures are crops of tiles of `split`."""
    pixels = backdrop(rng, split)
    grain = cut(rng, _LARGE[rng.integers(len(_LARGE))], split).pixels.mean(-1)
    cloth = 1 + rng.uniform(0.2, 0.6) * np.tile(grain - grain.mean(), (2, 1))[..., None]

    high = rng.uniform(54, 60)  # head to toe
    top, x = rng.uniform(2, 63 - high), 16 + rng.uniform(-2, 2)
    wide = rng.uniform(0.9, 1.15) * 6

    def at(part: float) -> float:
        return top + part * high

    def wear(mask: np.ndarray, paint: np.ndarray, fabric: bool = True) -> None:
        nonlocal pixels
        pixels = pixels * (1 - mask[..., None]) + paint * (cloth if fabric else 1) * mask[..., None]

    skin = np.array(_SKIN[rng.integers(len(_SKIN))]) * rng.uniform(0.9, 1.05)
    hair = np.array([0.25, 0.16, 0.1]) * rng.uniform(0.4, 2.2)
    side = (-1, 1)[rng.integers(2)]
    bag = _paint(rng, COLOURS[rng.integers(len(COLOURS))])
    if person.bag == "backpack":  # behind the body: visible next to the shoulders
        left, right = sorted((x + side * (wide - 1), x + side * (wide + 5.5)))
        wear(_box(left, at(0.18), right, at(0.48)), bag)
    if person.hair == "long":
        wear(_box(x - 5.2, at(0.05), x + 5.2, at(0.28)), hair, fabric=False)
    wear(_oval(x, at(0.085), 3.4, 4.6), skin, fabric=False)
    wear(_oval(x, at(0.085), 3.6, 4.8) * _box(0, 0, WIDTH, at(0.06)), hair, fabric=False)

    # legs, shoes over them, then the top
    gap = 0.7
    hem = at(0.69) if person.legs == "shorts" else at(0.93)
    lower = _paint(rng, person.lower)
    for sign in (-1, 1):
        left, right = sorted((x + sign * gap, x + sign * (wide - 0.8)))
        wear(_box(left, at(0.5), right, at(0.94)), skin, fabric=False)
        wear(_box(left, at(0.5), right, hem), lower)
    shoes = _paint(rng, person.shoes)
    for sign in (-1, 1):
        left, right = sorted((x + sign * gap * 0.6, x + sign * (wide + 0.6)))
        wear(_box(left, at(0.925), right, at(1.0)), shoes)
    shirt = _paint(rng, person.top)
    arms = _box(x - wide - 2, at(0.2), x + wide + 2, at(0.45))
    body = np.maximum(_box(x - wide, at(0.185), x + wide, at(0.52)), arms)
    wear(body, shirt)
    if person.pattern == "striped":
        period = rng.uniform(4.5, 6)
        stripes = np.sin(2 * np.pi * (np.arange(HEIGHT) + 0.5 - at(0.185)) / period) > 0.2
        wear(body * stripes[:, None], np.full(3, rng.uniform(0.85, 1)))
    if person.bag == "handbag":
        hand = x + side * (wide + 3)
        wear(_box(hand - 3.4, at(0.46), hand + 3.4, at(0.63)), bag)
    if person.hat:
        paint = _paint(rng, person.hat)
        wear(_box(x - 6.5, at(0.035), x + 6.5, at(0.07)), paint)
        wear(_oval(x, at(0.04), 4.4, 4.8) * _box(0, 0, WIDTH, at(0.05)), paint)
    return quantise(_seen(rng, np.clip(pixels, 0, 1), camera))


def _seen(rng: np.random.Generator, pixels: np.ndarray, camera: str) -> np.ndarray:
    """A camera's image of a clear one (64, 32, 3) in [0, 1]."""
    if camera == "clear":
        return pixels + rng.normal(0, 0.02, pixels.shape)
    cast = rng.uniform(0.6, 1, 3)
    pixels = (0.5 + rng.uniform(0.45, 0.8) * (pixels - 0.5)) * cast * rng.uniform(0.6, 1)
    few = (int(WIDTH / 1.6), int(HEIGHT / 1.6))
    coarse = Image.fromarray(quantise(pixels)).resize(few, Image.Resampling.BILINEAR)
    pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=float) / 255
    return pixels + rng.normal(0, 0.06, pixels.shape)


def people(count: int, split: str, camera: str, seed: int = 0) -> tuple[np.ndarray, list[Pedestrian]]:
    """Images (count, 64, 32, 3) uint8 and their persons, deterministic in the arguments."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{camera}/{split}".encode())))
    persons = [dressed(rng) for _ in range(count)]
    return np.stack([draw(rng, person, split, camera) for person in persons]), persons


# --- data ---


@functools.lru_cache(maxsize=4)
def images(seed: int, split: str) -> TensorDataset:
    """The street's images (n, 3, 64, 32) in [-1, 1] and labels (n, 12) of "train", "val", "trainval" or "test"."""
    if split == "trainval":
        both = (images(seed, part).tensors for part in ("train", "val"))
        return TensorDataset(*map(torch.cat, zip(*both, strict=True)))
    drawn, persons = people(COUNTS[split], split, "street", seed)
    return TensorDataset(pixels(drawn), torch.tensor([person.labels for person in persons], dtype=torch.float32))


def transform() -> v2.Transform:
    """From a PIL image to the input (3, 64, 32) of the toy CLIP, in [-1, 1]."""
    steps = [as_rgb, v2.Resize([HEIGHT, WIDTH]), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return configure(v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)]), {}, transform)


def save(folder: Path, seed: int, names: tuple[str, ...], count: int = 200) -> Path:
    """Write a folder as a user has it: images, one in ten a test image, and `labels.csv` with the attributes `names`.

    Returns `folder`.
    """
    drawn, persons = people(count, "train", "street", seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "split", *(SENTENCES[name] for name in names)])
        for i, (image, person) in enumerate(zip(drawn, persons, strict=True)):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
            labels = dict(zip(ATTRIBUTES, person.labels, strict=True))
            rows.writerow([f"{i:03d}.png", "train" if i % 10 else "test", *(labels[name] for name in names)])
    return folder


# --- methods, training, score ---

EPOCHS, BATCH = 30, 32
PROMPTS = 10  # two for each of the five groups, ten as published


class FullFineTuning(PromptPAR):
    """The baseline that trains the whole image tower, of a copy of the CLIP."""

    def __init__(self, clip: CLIP, *args: Any, **options: Any):
        super().__init__(copy.deepcopy(clip), *args, **options)
        self.clip.visual.requires_grad_(True)


METHODS: dict[str, dict[str, Any]] = {
    "heads only": {"prompts": 0, "regions": 0},
    "deep prompts": {"regions": 0},
    "PromptPAR, not masked": {"masked": False},
    "PromptPAR, linear fusion": {"mm_layers": 0},
    "PromptPAR": {},
    "full fine-tuning": {"prompts": 0, "regions": 0},
}
"""The settings of each method that are not PromptPAR's."""


def build(method: str, seed: int) -> PromptPAR:
    """A method on the toy CLIP; its new parameters are drawn from `seed`."""
    torch.manual_seed(seed)
    clip, fusion = encoders.build("pocket_pedestrian_clip"), encoders.build("pocket_vit")
    kind = FullFineTuning if method == "full fine-tuning" else PromptPAR
    settings = Settings(**{"prompts": PROMPTS, "text_prompts": 0} | METHODS[method])
    return kind(clip, list(SENTENCES.values()), tokenizer(), fusion, settings)


class Head(nn.Module):
    """PromptPAR on the cached tokens (n, L, E) of its image tower."""

    def __init__(self, model: PromptPAR):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(tokens)


class Tower(Head):
    """The image tower of a PromptPAR: from images to tokens (n, L, E)."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def cached(model: PromptPAR, images: Tensor) -> tuple[nn.Module, Tensor]:
    """A model to train or test and its inputs: `Head` and tokens when nothing in the tower is trained, else images."""
    if len(model.prompts) or len(model.region_tokens) or model.clip.visual.proj.requires_grad:
        return model, images
    return Head(model), outputs_of(Tower(model), TensorDataset(images), hardware=CPU)


def train(
    method: str, task: str, data: TensorDataset, learning_rate: float, seed: int, epochs: float = EPOCHS
) -> tuple[PromptPAR, History]:
    """A method trained with the published loss, weight decay and clipping, and its history.

    AdamW takes the place of SGD, with one learning rate for prompts and heads.
    """
    model = build(method, seed)
    inputs, labels = data.tensors
    share = labels.mean(0)

    def value(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model(batch[0]), batch[1], share)

    trained, inputs = cached(model, inputs)
    return model, fit(
        trained,
        value,
        TensorDataset(inputs, labels),
        epochs=epochs,
        batch=BATCH,
        optimizer=adamw(learning_rate, 1e-4),
        callbacks=[ClipNorm(10)],
        seed=seed,
        hardware=CPU,
        name=method,
    )


def score(model: PromptPAR, task: str, data: TensorDataset) -> dict[str, float]:
    """The `scores` of a model."""
    tested, inputs = cached(model, data.tensors[0])
    return scores(outputs_of(tested, TensorDataset(inputs), hardware=CPU).sigmoid(), data.tensors[1])


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """mA, Acc, Prec, Rec and both F1, and mA of the attributes of each part of the body, in percent; both (n, 12)."""
    found = evaluate(labels.numpy(), probabilities.numpy())
    by_name = dict(zip(ATTRIBUTES, found.balanced, strict=True))
    parts = {part: sum(by_name[name] for name in names) / len(names) for part, names in PARTS.items()}
    return {name: round(float(value), 2) for name, value in (found.totals | parts).items()}


STUDY = Study(
    tasks={"street": tuple(METHODS)},
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=lambda task, seed, split: images(seed, split),
    fit=train,
    score=score,
    metric="mA",
)
