"""PromptPAR at pocket scale: the methods, and one training run of any of them on the street's pedestrians.

All methods stand on the same pocket CLIP, which has seen clear pictures alone, and on the same fusion block, the last
of the pocket ViT. All are trained on the same pictures with the same loss, optimiser, number of epochs and grid.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...data import attributes as data
from ...evaluation.metrics.attributes import evaluate
from ...models.promptpar import model as promptpar
from ...training.fit import fit, predict
from .. import encoders
from ..datasets import pedestrians as pocket
from ..encoders.pedestrian_clip import tokenizer
from ..encoders.vit_and_clip import pixels

LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
SEEDS = [0, 1, 2, 3, 4]
SELECTION_SEED = 100
METRIC = "mA"
# the published decay and clipping; AdamW in place of SGD, and one rate for prompts and heads
RECIPE = {"epochs": 30, "batch": 32, "accelerator": "cpu", "weight_decay": 1e-4, "clip": 10.0}
PROMPTS = 10  # two for each of the five groups, ten as published
# the model's arguments, and the weight of the similarity in the loss
METHODS: dict[str, dict] = {
    "heads only": {"prompts": 0, "regions": 0},
    "deep prompts": {"regions": 0},
    "regions, not masked, no similarity loss": {"masked": False, "similarity": 0.0},
    "regions, no similarity loss": {"similarity": 0.0},
    "PromptPAR": {},
    "full fine-tuning": {"prompts": 0, "regions": 0, "tuned": "all"},
    "PromptPAR, not masked": {"masked": False},
    "PromptPAR, strips without overlap": {"overlap": 0},
    "PromptPAR, 2 regions": {"regions": 2},
    "PromptPAR, linear fusion": {"mm_layers": 0},
    "PromptPAR, as released": {"official_quirks": True},
}
TASKS = {"street": list(METHODS)}


def build(method: str, seed: int) -> promptpar.PromptPAR:
    """The model of a method on the pocket CLIP; its new tensors are drawn from `seed`."""
    torch.manual_seed(seed)
    options = {"prompts": PROMPTS, "text_prompts": 0} | METHODS[method]
    options.pop("similarity", None)
    clip, fusion = encoders.build("pocket_pedestrian_clip"), encoders.build("pocket_vit")
    return promptpar.PromptPAR(clip, list(pocket.SENTENCES.values()), tokenizer(), fusion, **options)


def prepare(root: str | Path) -> None:
    """Write the pictures of every seed: each seed has its own, so that the spread holds their chance too."""
    for seed in (SELECTION_SEED, *SEEDS):
        pocket.write(folder(root, seed), seed)


def folder(root: str | Path, seed: int) -> Path:
    """The data root of a seed."""
    return Path(root) / f"seed{seed}"


@functools.lru_cache(maxsize=4)
def pictures(root: str, seed: int, split: str) -> TensorDataset:
    """Images (n, 3, 64, 32) in [-1, 1] and labels (n, 12) of a split."""
    found = data.load("pocket/pedestrians", folder(root, seed), split, lambda picture: pixels([picture])[0])
    return TensorDataset(torch.stack([image for image, _ in found]), found.labels)


def inputs(model: promptpar.PromptPAR, images: Tensor) -> Tensor:
    """What the model is given: its image tokens (n, L, E), once, when nothing in its tower is trained, else images."""
    if len(model.prompts) or len(model.region_tokens) or model.clip.visual.proj.requires_grad:
        return images
    return predict(_Tower(model), TensorDataset(images), accelerator="cpu")


class _Tower(nn.Module):
    def __init__(self, model: promptpar.PromptPAR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.visual_tokens(images)


def train(method: str, task: str, rate: float, seed: int, root: str, split: str = "test", **options) -> dict:
    """Train one method and test it.

    `split` "select": trained on 400 pictures, tested on 300 of validation; "test": trained on those 700, tested on 600.
    `options` go to `fit`. Returns a row: the scores of `metrics.attributes`, mA of the attributes of each part of the
    body, the last loss, how many numbers were trained.
    """
    train_on, held_out = ("train", "val") if split == "select" else ("trainval", "test")
    model = build(method, seed)
    history = train_model(model, method, pictures(str(root), seed, train_on), rate, seed, **options)
    scores = measure(model, pictures(str(root), seed, held_out))
    return scores | {"loss": round(sum(row["loss"] for row in history[-20:]) / 20, 4), "trained": model.count()}


def train_model(
    model: promptpar.PromptPAR, method: str, data: TensorDataset, rate: float, seed: int, **options
) -> list[dict]:
    """Train `model` in place on `pictures`; return its history."""
    images, labels = data.tensors
    ratio, weight = labels.mean(0), METHODS[method].get("similarity", 0.5)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return promptpar.loss(model(batch[0]), batch[1], ratio, weight)

    settings = RECIPE | {"lr": rate, "seed": seed, "name": method} | options
    return fit(model, loss, TensorDataset(inputs(model, images), labels), **settings)


def probabilities(model: promptpar.PromptPAR, images: Tensor) -> Tensor:
    """The probability of each attribute, (n, A)."""
    return predict(model, TensorDataset(inputs(model, images)), accelerator="cpu").sigmoid()


def measure(model: promptpar.PromptPAR, data: TensorDataset) -> dict[str, float]:
    """mA, Acc, Prec, Rec and both F1, and mA of the attributes of each part of the body; in percent."""
    images, labels = data.tensors
    found = evaluate(labels.numpy(), probabilities(model, images).numpy())
    by_name = dict(zip(pocket.ATTRIBUTES, found.balanced, strict=True))
    parts = {part: sum(by_name[name] for name in names) / len(names) for part, names in pocket.PARTS.items()}
    return {name: round(float(value), 2) for name, value in (found.totals | parts).items()}
