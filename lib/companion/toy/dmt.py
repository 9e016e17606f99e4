"""DMT's ablation at toy scale: collages of four factors, students of three, two, one and no teacher, linear probes.

Collages are 32x32 images of four independent factors:

* texture: the background is a crop of one of eight photographs, in grey, tinted through all hues of the colour circle.
* shape: a disc, ring, cross or square near the middle.
* hue: the shape's, one of eight. The background's tint has every hue, so the object itself must be attended to.
* quadrant: a reddish square of 8x8 pixels at a random position in one of the four corners. It has the luma of the
  texture under it and differs only in colour.

A tint does not change a pixel's luma (ITU-R 601): in grey, neither hues nor the reddish square are visible. Each of the
three teachers (`encoders.teachers`) misses some of the factors. Splits share no pixel of a photograph.

All students are one small ViT with the same initial weights, trained for as many steps on the same 3,000 unlabelled
collages. The teachers are the same for all seeds: the spread over seeds is that of images, initial weights and order.
Scores are accuracies in percent of linear probes on the frozen features, with 10 labels per class (the mean over ten
draws) and, in columns that end in "all", with all 3,000.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms.v2.functional import to_dtype

from ..evaluation.ablations import Study
from ..models.dmt.downstream import Features, ridge
from ..models.dmt.model import DMT, Teachers, loss
from ..models.dmt.vit import ViT, build
from ..training.fit import History, fit, outputs_of
from ..training.hardware import CPU
from ..training.schedules import adamw
from . import scenes
from .encoders import teachers
from .scenes import SIZE, SPLITS, quantise

TEXTURES = ("brick", "coins", "grass", "gravel", "page", "stars", "temple", "tissue")
SHAPES = ("disc", "ring", "cross", "square")
HUES, QUADRANTS = 8, ("top left", "top right", "bottom left", "bottom right")
FACTORS = {"texture": len(TEXTURES), "shape": len(SHAPES), "hue": HUES, "quadrant": len(QUADRANTS)}
COUNTS = {"train": 3000, "val": 800, "test": 1500}

WINDOW = 44  # largest side of a crop, in pixels of the photograph
MARKER, RANGE = 8, 4  # side of the reddish square, and its distances 1 to 4 from the image's edge
STRENGTH, MARKED = 0.6, 0.9  # saturation of the tint, and of the square
LUMA = np.array([0.299, 0.587, 0.114])


# --- images ---


@functools.cache
def _plane() -> np.ndarray:
    """Two directions in colour space (2, 3) that preserve the luma; the first is reddish."""
    first = np.array([1.0, 0, 0]) - LUMA[0] / (LUMA @ LUMA) * LUMA
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(LUMA / np.linalg.norm(LUMA), first)])


def tint(hue: np.ndarray | float, strength: np.ndarray | float) -> np.ndarray:
    """The factor (..., 3) that colours a grey value; `hue` in turns. Its mean weighted by `LUMA` is 1."""
    turn = 2 * np.pi * np.asarray(hue)
    colour = np.stack([np.cos(turn), np.sin(turn)], -1) @ _plane()
    return 1 + np.asarray(strength)[..., None] * colour * np.sqrt(1.5)


@functools.cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(scenes.photograph(name)).convert("L")


def texture(rng: np.random.Generator, name: str, split: str) -> np.ndarray:
    """A crop of a photograph (32, 32) from the tiles of `split`, mean 0, standard deviation 1, clipped at 2.5."""
    places = scenes.tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = min(WINDOW, right - left, bottom - top)
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    window = _photograph(name).crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = np.asarray(window, dtype=np.float32)
    return np.clip((pixels - pixels.mean()) / (pixels.std() + 1e-3), -2.5, 2.5)


def coverage(shape: str, centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """As `scenes.coverage`, for one of this file's `SHAPES`."""
    if shape != "square":
        return scenes.coverage(shape, centre, radius, angle)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    dx, dy = columns - centre[0], rows - centre[1]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return np.clip(0.5 - np.maximum(abs(u) - 0.8 * radius, abs(v) - 0.8 * radius), 0, 1)


def collage(rng: np.random.Generator, split: str, factors: list[int] | None = None) -> tuple[np.ndarray, list[int]]:
    """An image (32, 32, 3) uint8 and its factors in the order of `FACTORS`; those that are not given are random."""
    factors = factors or [int(rng.integers(n)) for n in FACTORS.values()]
    kind, shape, hue, quadrant = factors
    grain = texture(rng, TEXTURES[kind], split)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    turn = rng.uniform(0, 2 * np.pi)
    # the tint runs once through the colour circle along one side of the image
    around = rng.uniform() + rng.choice((-1, 1)) * (columns * np.cos(turn) + rows * np.sin(turn)) / SIZE
    strength = np.full((SIZE, SIZE), STRENGTH * rng.uniform(0.8, 1))
    y, x = (int(n) for n in rng.integers(1, RANGE + 1, 2))
    y, x = (SIZE - MARKER - y if quadrant // 2 else y), (SIZE - MARKER - x if quadrant % 2 else x)
    around[y : y + MARKER, x : x + MARKER], strength[y : y + MARKER, x : x + MARKER] = 0, MARKED
    ground = (0.42 + 0.13 * grain)[..., None] * tint(around, strength)

    centre = tuple(SIZE / 2 + rng.uniform(-2, 2, 2))
    covered = coverage(SHAPES[shape], centre, rng.uniform(6, 8), rng.uniform(-0.3, 0.3))[..., None]
    own = tint((hue + rng.uniform(-0.25, 0.25)) / HUES, STRENGTH * rng.uniform(0.8, 1)) * rng.uniform(0.45, 0.6)
    surface = own * (1 + 0.06 * grain[::-1, ::-1, None])
    pixels = ground * (1 - covered) + surface * covered + rng.normal(0, 0.02, (SIZE, SIZE, 3))
    return quantise(pixels), factors


def collages(count: int, split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 of a split and their factors (count, 4); the same seed gives the same ones."""
    rng = np.random.default_rng((seed, SPLITS.index(split), 3))
    images, factors = zip(*(collage(rng, split) for _ in range(count)), strict=True)
    return np.stack(images), np.array(factors)


# --- data ---


class Part(NamedTuple):
    """Images (n, 3, 32, 32), pixels from -1 to 1, and factors (n, 4) in the order of `FACTORS`."""

    images: Tensor
    factors: Tensor


def part(count: int, split: str, seed: int = 0) -> Part:
    """`collages` as tensors."""
    images, factors = (torch.from_numpy(array) for array in collages(count, split, seed))
    return Part((to_dtype(images.permute(0, 3, 1, 2).contiguous(), torch.float32, scale=True) - 0.5) / 0.5, factors)


@functools.lru_cache(4)
def load(seed: int, split: str) -> Part:
    """A split, "train", "val" or "test", of the study."""
    return part(COUNTS[split], split, seed)


@functools.lru_cache(1)
def unlabelled(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What students learn from: the training images (n, 3, 32, 32), and each teacher's tokens (n, 17, 48) of them."""
    images, three = load(seed, "train").images, Teachers(teachers.load())
    tokens = zip(*map(three, images.split(64)), strict=True)
    return images, {name: torch.cat(parts) for name, parts in zip(three.models, tokens, strict=True)}


def data(task: str, seed: int, split: str) -> Any:
    """`unlabelled`, to train; the splits "train" and `split`, to probe."""
    return unlabelled(seed) if split.startswith("train") else (load(seed, "train"), load(seed, split))


# --- methods, training, score ---

TASK = "collage"
STEPS, BATCH, WEIGHT_DECAY = 500, 128, 0.05
SETTINGS: dict[str, Any] = {"mask_ratio": 0.5, "decoder": "pocket"}
# the teachers of a student, and its changes to the settings
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "DMT": (teachers.TEACHERS, {}),
    "MoCo v3 + iBOT": (("MoCo v3", "iBOT"), {}),
    "iBOT only": (("iBOT",), {}),
    "token loss only": (teachers.TEACHERS, {"map_weight": 0.0}),
    "LN targets": (teachers.TEACHERS, {"target_norm": "ln"}),
    "untrained": (teachers.TEACHERS, {}),
}
UNTRAINED = ("untrained",)
SHOTS, DRAWS = 10, 10  # labels per class for a probe, and the number of draws
RIDGE = {SHOTS: 10.0, None: 30.0}  # penalty by labels per class; None: all


def student(seed: int) -> ViT:
    """The student before its training: the same for all methods of a seed."""
    torch.manual_seed(seed)
    return build("pocket", width=48)


def train(
    method: str, task: str, learn: tuple[Tensor, Mapping[str, Tensor]], learning_rate: float, seed: int
) -> tuple[DMT, History]:
    """A method trained on `unlabelled` data, and its history."""
    names, options = METHODS[method]
    tokens = [learn[1][name] for name in names]
    model = DMT(student(seed), [t.shape[-1] for t in tokens], **SETTINGS | options)
    if method in UNTRAINED:
        return model, []
    return model, fit(
        model,
        loss,
        TensorDataset(learn[0], *tokens),
        epochs=STEPS / (len(learn[0]) // BATCH),
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )


def score(model: DMT, task: str, parts: tuple[Part, Part]) -> dict[str, float]:
    """The `probes` of the student, rounded."""
    return {name: round(value, 2) for name, value in probes(model.export(), *parts).items()}


def probes(encoder: ViT, known: Part, tested: Part) -> dict[str, float]:
    """`probe` of an encoder's features with 10 labels per class, and as "<factor> all" with all labels."""
    x, others = (outputs_of(Features(encoder), TensorDataset(each.images), hardware=CPU) for each in (known, tested))
    few, every = (probe(x, known.factors, others, tested.factors, shots) for shots in (SHOTS, None))
    return few | {f"{name} all": value for name, value in every.items()}


def probe(known: Tensor, factors: Tensor, tested: Tensor, truth: Tensor, shots: int | None = SHOTS) -> dict[str, float]:
    """Accuracy in percent on each factor of linear probes on features, and their "mean".

    Args:
        known, factors: features (n, D) of training images and their factors (n, 4).
        tested, truth: those of test images.
        shots: labels per class; the mean over `DRAWS` draws of them. None: all labels, once.
    """
    found = {}
    for i, (name, classes) in enumerate(FACTORS.items()):
        draws = [slice(None)] if shots is None else [drawn(factors[:, i], shots, seed) for seed in range(DRAWS)]
        right = [
            ridge(known[draw], factors[draw, i], classes, tested, RIDGE[shots]).argmax(1) == truth[:, i]
            for draw in draws
        ]
        found[name] = 100 * float(torch.stack(right).float().mean())
    return found | {"mean": sum(found.values()) / len(found)}


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """The indices of `count` random images of each class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in labels.unique():
        indices = torch.nonzero(labels == label)[:, 0]
        found.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
    return torch.cat(found)


STUDY = Study(
    tasks={TASK: tuple(METHODS)},
    learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128),
    budget=f"{STEPS} steps, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    metric="mean",
    untrained=UNTRAINED,
)
