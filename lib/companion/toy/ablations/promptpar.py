"""PromptPAR's ablations at toy scale: the methods, and one training of any of them on the street camera's pedestrians.

All methods build on the same toy CLIP, trained on clear images only, and on the same fusion block, the last of the
small ViT. All are trained on the same images with the same loss, optimiser, number of epochs and grid.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...data import attributes as data
from ...evaluation.metrics.attributes import evaluate
from ...models.promptpar import PromptPAR, Settings, loss
from ...training.callbacks import ClipNorm
from ...training.fit import CPU, Batch, History, fit, predict
from ...training.schedules import adamw
from .. import encoders
from ..datasets import pedestrians as toy
from ..encoders.pedestrian_clip import tokenizer
from ..encoders.vit_and_clip import pixels
from . import last_loss, reader, study_root

LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
METRIC = "mA"
EPOCHS, BATCH = 30, 32
BUDGET = f"{EPOCHS} epochs, batch {BATCH}"
PROMPTS = 10  # two for each of the five groups, ten as published
# the model's arguments, and the weight of the similarity in the loss
METHODS: dict[str, dict] = {
    "heads only": {"prompts": 0, "regions": 0},
    "deep prompts": {"regions": 0},
    "regions, not masked, no similarity loss": {"masked": False, "similarity": 0.0},
    "regions, no similarity loss": {"similarity": 0.0},
    "PromptPAR": {},
    "full fine-tuning": {"prompts": 0, "regions": 0},
    "PromptPAR, not masked": {"masked": False},
    "PromptPAR, strips without overlap": {"overlap": 0},
    "PromptPAR, 2 regions": {"regions": 2},
    "PromptPAR, linear fusion": {"mm_layers": 0},
    "PromptPAR, as released": {"official_quirks": True},
}
TASKS = {"street": list(METHODS)}


class FineTuned(PromptPAR):
    """The baseline that trains the whole image tower, of a copy of the CLIP."""

    def __init__(self, clip: CLIP, *options: Any):
        super().__init__(copy.deepcopy(clip), *options)
        self.clip.visual.requires_grad_(True)


def build(method: str, seed: int) -> PromptPAR:
    """A method on the toy CLIP; its new parameters are drawn from `seed`."""
    torch.manual_seed(seed)
    options = {"prompts": PROMPTS, "text_prompts": 0} | METHODS[method]
    options.pop("similarity", None)
    clip, fusion = encoders.build("pocket_pedestrian_clip"), encoders.build("pocket_vit")
    kind = FineTuned if method == "full fine-tuning" else PromptPAR
    return kind(clip, list(toy.SENTENCES.values()), tokenizer(), fusion, Settings(**options))


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    toy.write(study_root(root, seed), seed)


@reader(4)
def images(root: str, seed: int, split: str) -> TensorDataset:
    """Images (n, 3, 64, 32) in [-1, 1] and labels (n, 12) of a split."""
    found = data.load("pocket/pedestrians", study_root(root, seed), split, lambda image: pixels([np.asarray(image)])[0])
    return TensorDataset(torch.stack([image for image, _ in found]), found.labels)


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
    return Head(model), predict(Tower(model), TensorDataset(images), hardware=CPU)


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **changes) -> dict:
    """Train one method and test it.

    `split` "select": trained on 400 images, tested on 300 of validation; "test": trained on those 700, tested on 600.
    `changes` are arguments of `fit`. Returns a row: the scores of `metrics.attributes`, mA of the attributes of each
    part of the body, the last loss, the number of trainable parameters.
    """
    train_on, held_out = ("train", "val") if split == "select" else ("trainval", "test")
    model = build(method, seed)
    history = train_model(model, method, images(str(root), seed, train_on), learning_rate, seed, **changes)
    scores = measure(model, images(str(root), seed, held_out))
    return scores | {"loss": last_loss(history), "trained": model.count()}


def train_model(
    model: PromptPAR, method: str, data: TensorDataset, learning_rate: float, seed: int, **changes: Any
) -> History:
    """Train `model` in place on `images`, with the published weight decay and clipping; return its history."""
    images, labels = data.tensors
    ratio, weight = functools.cache(labels.mean(0).to), METHODS[method].get("similarity", 0.5)

    def value(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model(batch[0]), batch[1], ratio(batch[1].device), weight)

    # AdamW instead of SGD, and one learning rate for prompts and heads
    settings: dict[str, Any] = {"optimizer": adamw(learning_rate, 1e-4), "callbacks": [ClipNorm(10)]}
    settings |= {"epochs": EPOCHS, "batch": BATCH, "seed": seed, "hardware": CPU, "name": method} | changes
    trained, inputs = cached(model, images)
    return fit(trained, value, TensorDataset(inputs, labels), **settings)


def probabilities(model: PromptPAR, images: Tensor) -> Tensor:
    """The probability of each attribute, (n, A)."""
    tested, inputs = cached(model, images)
    return predict(tested, TensorDataset(inputs), hardware=CPU).sigmoid()


def measure(model: PromptPAR, data: TensorDataset) -> dict[str, float]:
    """mA, Acc, Prec, Rec and both F1, and mA of the attributes of each part of the body, in percent."""
    images, labels = data.tensors
    found = evaluate(labels.numpy(), probabilities(model, images).numpy())
    by_name = dict(zip(toy.ATTRIBUTES, found.balanced, strict=True))
    parts = {part: sum(by_name[name] for name in names) / len(names) for part, names in toy.PARTS.items()}
    return {name: round(float(value), 2) for name, value in (found.totals | parts).items()}
