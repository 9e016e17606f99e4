"""A small ViT that learned from two real encoders on photographs: DMT's losses, a ViT-S/14 and an EfficientNet-Lite0.

    python -m companion.toy.encoders.photo_student      (needs the extra `real`; half an hour on one core)

The teachers differ in architecture, width and pre-training; both have 16 x 16 positions, at 224 and at 256 pixels. Four
photographs are held out: neither a crop of them nor a teacher's tokens of them is used in training. The settings were
fixed before the first training, none was selected.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ... import backbones
from ...data.photographs import photographs
from ...models.dmt.model import DMT, loss
from ...models.dmt.vit import ViT, build
from ...ops.progress import progress
from ...training.fit import CPU, History, fit
from ...training.schedules import adamw
from .. import encoders
from ..datasets import scenes
from . import card

NAME = "photo_student"
TEACHERS = {"ViT-S/14": "vit_small_patch14_dinov2", "EfficientNet-Lite0": "tf_efficientnet_lite0"}
SIDES = {"ViT-S/14": 224, "EfficientNet-Lite0": 256}  # pixels; both give 16 x 16 positions
STRIDE_16 = 3  # the EfficientNet's stage
GRID = (16, 16)
HELD_OUT = ("astronaut", "coffee", "rocket", "flower")
STUDENT = {"image": 224, "patch": 14, "width": 96, "depth": 3, "heads": 3}
SEEN = backbones.Input(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # normalisation of the student's images
RECIPE = {"crops": 800, "epochs": 60, "batch": 32, "learning rate": 2e-3, "weight decay": 0.05, "masked": 0.5}
FITTED = 100  # training crops of the regression that measures the student


def student(seed: int = 0) -> ViT:
    """The student before its training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("pocket", **STUDENT).eval()


def load() -> ViT:
    """The shipped student, in eval mode. Raises `MissingWeights`, `CorruptFile`."""
    state = backbones.read_state(encoders.weights_file(NAME))
    return ViT.from_official({name: value.float() for name, value in state.items()}, int(STUDENT["heads"]), NAME)


def teachers(side: int = SIDES["ViT-S/14"]) -> dict[str, nn.Module]:
    """The real encoders, the ViT for images of `side` px. Raises `MissingWeights`: neither cached nor installed."""
    vit, convnet = TEACHERS.values()
    return {"ViT-S/14": backbones.build(vit, img_size=side), "EfficientNet-Lite0": backbones.build(convnet)}


@torch.no_grad()
def tokens(name: str, encoder: nn.Module, images: Tensor, side: int = 0) -> Tensor:
    """Tokens (B, 1 + N, D) of images (B, 3, S, S) in 0 to 1: the last block's, before the final norm, or a map of the
    EfficientNet after its mean, which stands in for the [CLS] token. N is 256, or that of images of `side` px."""
    x = seen_by_teacher(name, encoder, images, side)
    if name == "ViT-S/14":
        last = len(encoder.blocks) - 1
        options = {"norm": False, "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        ((patches, first),) = encoder.forward_intermediates(x, indices=[last], **options)
        return torch.cat([first, patches], 1)
    (found,) = encoder.forward_intermediates(x, indices=[STRIDE_16], intermediates_only=True)
    patches = found.flatten(2).mT
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def seen_by_teacher(name: str, encoder: nn.Module, images: Tensor, side: int = 0) -> Tensor:
    """A teacher's input of images in 0 to 1: resized to its side, or `side`, and normalised."""
    seen = backbones.input_of(encoder)
    return v2.functional.normalize(resized(images, side or SIDES[name]), list(seen.mean), list(seen.std))


def resized(images: Tensor, side: int) -> Tensor:
    """Images at `side` x `side` pixels, in 0 to 1."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def seen_by_student(images: Tensor, side: int = STUDENT["image"]) -> Tensor:
    """The student's input (B, 3, side, side) of images in 0 to 1."""
    return v2.functional.normalize(resized(images, side), list(SEEN.mean), list(SEEN.std))


def held_out() -> Tensor:
    """The held-out photographs (4, 3, 256, 256), in 0 to 1."""
    return photographs(backbones.Input(256, (0.0,) * 3, (1.0,) * 3), HELD_OUT)


def crops(count: int, seed: int) -> Tensor:
    """Random crops (count, 3, 256, 256) in 0 to 1 of the photographs that are not held out: 10 to 100 % of the area."""
    names = [name for name in scenes.PHOTOGRAPHS if name not in HELD_OUT]
    loaded = [np.atleast_3d(scenes.PHOTOGRAPHS[name].load()) for name in names]
    pixels = [torch.from_numpy(x.copy()).permute(2, 0, 1)[:3] for x in loaded]
    crop = v2.Compose([v2.RandomResizedCrop(256, (0.1, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [crop(pixels[i % len(pixels)]).expand(3, -1, -1) for i in range(count)]
    return torch.stack(found).float() / 255


def train(images: Tensor, targets: Mapping[str, Tensor], seed: int = 0, epochs: float = 0) -> tuple[ViT, History]:
    """A student trained from scratch on images (N, 3, 256, 256) and each teacher's tokens of them; and its history."""
    torch.manual_seed(seed)
    widths = [found.shape[-1] for found in targets.values()]
    model = DMT(student(seed), widths, mask_ratio=RECIPE["masked"], statistics="running", decoder="pocket")
    history = fit(
        model,
        loss,
        TensorDataset(seen_by_student(images), *targets.values()),
        epochs=epochs or RECIPE["epochs"],
        batch=min(int(RECIPE["batch"]), len(images)),
        optimizer=adamw(RECIPE["learning rate"], RECIPE["weight decay"]),
        seed=seed,
        hardware=CPU,
        name=NAME,
    )
    return model.export(), history


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """How similarly two encoders relate the positions of an image: (B, L), 1 if equally, 0 if unrelated.

    Position j has a row of cosines with all positions; the result is the correlation of the two encoders' rows. No
    adapter is trained, and the widths may differ.

    Args:
        a, b: patch tokens (B, L, D) and (B, L, E).
    """

    def rows(tokens: Tensor) -> Tensor:
        unit = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
        cosines = unit @ unit.mT
        return cosines - cosines.mean(-1, keepdim=True)

    return F.cosine_similarity(rows(a), rows(b), dim=-1)


@torch.no_grad()
def measure(
    encoder: ViT, images: Tensor, targets: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """By teacher, on the held-out photographs: the mean `agreement`, and the share of the variance of its patch tokens
    that a ridge regression predicts from the student's ("R2").

    Args:
        images, targets: training images and each teacher's tokens of them, for the regression.
        found: each teacher's tokens of the held-out photographs.
    """
    known, own = (encoder(seen_by_student(x))[:, 1:] for x in (images, held_out()))
    scores = {}
    for name, tested in found.items():
        fitted = make_pipeline(StandardScaler(), Ridge(1.0)).fit(
            known.flatten(0, 1), targets[name][:, 1:].flatten(0, 1)
        )
        predicted, truth = fitted.predict(own.flatten(0, 1)), tested[:, 1:].flatten(0, 1)
        share = r2_score(truth, predicted, multioutput="variance_weighted")
        scores[name] = {"agreement": float(agreement(own, tested[:, 1:]).mean()), "R2": float(share)}
    return {name: {key: round(value, 3) for key, value in each.items()} for name, each in scores.items()}


def ship(folder: Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train the student, measure it, and write the weights and their model card."""
    start = time.monotonic()
    known, images = teachers(), crops(int(RECIPE["crops"]), seed)
    parts = progress(images.split(20), "teachers' tokens")
    each = [[tokens(name, encoder, part) for name, encoder in known.items()] for part in parts]
    targets = {name: torch.cat(found) for name, found in zip(known, zip(*each, strict=True), strict=True)}
    trained, history = train(images, targets, seed)
    seconds = time.monotonic() - start
    state = {name: value.half() for name, value in trained.to_official().items()}
    found = {name: tokens(name, encoder, held_out()) for name, encoder in known.items()}
    quality = {
        "held-out photographs": {
            name: measure(encoder, images[:FITTED], {n: t[:FITTED] for n, t in targets.items()}, found)
            for name, encoder in (("student", trained), ("untrained", student(seed)))
        },
        "losses": {"first": round(history[0]["loss"], 3), "last": round(history[-1]["loss"], 3)},
    }
    return card.save(folder, NAME, state, quality, RECIPE | {"seed": seed}, seconds)


if __name__ == "__main__":
    card.command(ship)
