"""H-ViT on the synthetic slides: the methods, and one training of any of them on either task.

Slides are read as real ones: pyramids in PANDA's layout, tissue, tiling by spacing, the frozen patch level. Its
embeddings are stored once for each seed. All methods are trained on them with one loss (unless the name has another),
one optimiser, one number of epochs and one grid of learning rates.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...data import slides as data
from ...models.hvit import model as hvit
from ...models.hvit.recipe import kappa, voted
from ...models.hvit.slides import Slide, tensor, tile
from ...ops.files import atomic
from ...training.fit import CPU, History, fit, predict
from ...training.schedules import adamw
from ..datasets import slides as pocket
from ..encoders import slide_dino
from . import reader, study_root

LEARNING_RATES = [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
METRIC = "kappa"
# AdamW instead of Adam, and a cosine instead of steps: at this length they hardly differ
EPOCHS, BATCH, WEIGHT_DECAY = 40, 16, 1e-5
BUDGET = f"{EPOCHS} epochs, batch {BATCH}"
FOLDS = 5
# kind: which levels are trained. head: the meaning of the output. patch, region: initial weights of the level.
# shuffled: patches of each region in a random order. folds: number of models that vote
METHODS: dict[str, dict] = {
    "mean pooling": {"kind": "mean"},
    "gated attention": {"kind": "attention"},
    "Global": {"kind": "global"},
    "Local": {"kind": "local"},
    "Global, random region level": {"kind": "global", "region": "random"},
    "Local, region level from random": {"kind": "local", "region": "random"},
    "Local, random patch level": {"kind": "local", "patch": "random"},
    "Local, places shuffled": {"kind": "local", "shuffled": True},
    "Local, cross-entropy": {"kind": "local", "head": "classification"},
    "Local, ordinal": {"kind": "local", "head": "ordinal"},
    "Local, CORAL": {"kind": "local", "head": "coral"},
    "Local, CORN": {"kind": "local", "head": "corn"},
    "Local, vote of five": {"kind": "local", "folds": FOLDS},
}
MAIN = ("mean pooling", "gated attention", "Global", "Local")
TASKS = {"place": list(METHODS), "count": [*MAIN, "Local, cross-entropy"]}
SPLITS = {"train": ("train",), "val": ("tune",), "trainval": ("train", "tune"), "test": ("test",)}


def prepare(root: str | Path, seed: int) -> None:
    """Write the slides of a seed and store their patch embeddings."""
    for task in TASKS:
        store(root, seed, task)
    store(root, seed, "place", "random")


@functools.lru_cache(maxsize=4)
def encoders(levels: str) -> tuple[hvit.PatchEncoder, hvit.RegionEncoder]:
    """The frozen patch level, standardised, and the region level: "dino" or "random"."""
    patch, region = slide_dino.build(levels)
    return (patch if levels == "dino" else slide_dino.standardise(patch)), region


def regions(item: data.Item) -> tuple[np.ndarray, np.ndarray]:
    """The regions of a slide, uint8 (5, 128, 128, 3), and their corners, in the order of their file names."""
    with Slide(item.path) as slide:
        tiles = tile(slide, pocket.TILING)
        return np.stack([slide.region(x, y, tiles) for x, y in tiles.coords]), tiles.coords


def store(root: str | Path, seed: int, task: str, levels: str = "dino") -> Path:
    """The file of a seed's patch embeddings (n, 5, 16, 48) and grades (n,) by split; written if it does not exist."""
    path = study_root(root, seed) / f"features-{task}-{levels}.safetensors"
    if path.is_file():
        return path
    pocket.write(study_root(root, seed), task, seed)
    patch, found = encoders(levels)[0], {}
    for split in data.SPLITS:
        items = data.load(f"pocket/slides-{task}", study_root(root, seed), split)
        pixels = [tensor(regions(item)[0], slide_dino.NORMALISE) for item in items]
        found[f"{split}.features"] = slide_dino.embed(patch, torch.cat(pixels)).unflatten(0, (len(items), -1))
        found[f"{split}.grades"] = torch.tensor([item.grade for item in items])
    with atomic(path) as temporary:
        save_file({name: value.contiguous() for name, value in found.items()}, temporary)
    return path


@reader(8)
def embeddings(root: str, seed: int, task: str, split: str, levels: str = "dino") -> TensorDataset:
    """Patch embeddings (n, 5, 16, 48) and grades (n,) of a split, "trainval" being both."""
    found = load_file(store(root, seed, task, levels))
    return TensorDataset(*(torch.cat([found[f"{s}.{what}"] for s in SPLITS[split]]) for what in ("features", "grades")))


class PatchBag(nn.Module):
    """The baselines: a slide (b, m, p, d) as a bag of patch embeddings, their mean or gated attention over them."""

    def __init__(self, pooling: str, dim: int = 48, dropout: float = 0.1):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.pool = hvit.GatedPool(dim, dropout) if pooling == "attention" else None
        self.classifier = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The grades (b, 1)."""
        h = self.phi(x).flatten(1, 2)  # (b, m p, d)
        return self.classifier(h.sum(1) / h.shape[1] if self.pool is None else self.pool(h)[0])


def build(method: str, seed: int) -> nn.Module:
    """The model of a method; its new tensors are drawn from `seed`."""
    options = METHODS[method]
    torch.manual_seed(seed)
    if options["kind"] in ("mean", "attention"):
        return PatchBag(options["kind"])
    levels = ("region", "slide")
    model = hvit.build("pocket", options["kind"], head(method), patches=pocket.SIDE, levels=levels)
    if options.get("region") != "random":
        model.get_submodule("region").load_state_dict(encoders("dino")[1].state_dict())
    return model


def head(method: str) -> str:
    """The meaning of a method's outputs, one of `hvit.HEADS`."""
    return METHODS[method].get("head", "regression")


def inputs_of(method: str, task: str, root: str, seed: int, split: str) -> TensorDataset:
    """A method's patch embeddings of a split, and the grades."""
    options = METHODS[method]
    found = embeddings(str(root), seed, task, split, options.get("patch", "dino"))
    if not options.get("shuffled"):
        return found
    features, grades = found.tensors
    rng = np.random.default_rng((seed, len(grades)))
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(features.shape[2]), (*features.shape[:2], 1)), axis=-1))
    return TensorDataset(features.gather(2, order[..., None].expand_as(features)), grades)


def inputs(model: nn.Module, features: Tensor) -> Tensor:
    """The input of a training: the region embeddings, computed once, where that level is frozen; else `features`."""
    if not isinstance(model, hvit.HViT) or model.variant != "global":
        return features
    with torch.inference_mode():
        return model.embed_regions(features.flatten(0, 1)).unflatten(0, features.shape[:2]).clone()


def train_model(
    model: nn.Module, method: str, data: TensorDataset, learning_rate: float, seed: int, **changes: Any
) -> History:
    """Train `model` in place; return its history. `changes`: arguments of `fit` that differ."""
    features, grades = data.tensors

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return hvit.loss(head(method), model(batch[0]), batch[1], pocket.GRADES)

    settings: dict[str, Any] = {"epochs": EPOCHS, "batch": BATCH, "seed": seed, "hardware": CPU, "name": method}
    data, optimizer = TensorDataset(inputs(model, features), grades), adamw(learning_rate, WEIGHT_DECAY)
    return fit(model, loss, data, **settings | {"optimizer": optimizer} | changes)


def grades(model: nn.Module, method: str, features: Tensor) -> Tensor:
    """The predicted grades (n,)."""
    outputs = predict(model, TensorDataset(inputs(model, features)), hardware=CPU)
    return hvit.predict(head(method), outputs, pocket.GRADES)


def without_fold(found: TensorDataset, fold: int, seed: int) -> TensorDataset:
    """The slides that fold `fold` of five trains on: all but one in five."""
    order = torch.from_numpy(np.random.default_rng((seed, 5)).permutation(len(found)))
    others = order[torch.arange(len(found)) % FOLDS != fold]
    return TensorDataset(*(t[others] for t in found.tensors))


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Train one method and test it.

    `split` "select": trained on 160 slides, tested on 40 of tuning; "test": trained on those 200, tested on 80.

    Returns:
        A row: the quadratic kappa and the accuracy in percent, the last loss, the number of trainable parameters; where
        folds vote, "fold", the mean kappa of a single one.
    """
    train_on, held_out = ("train", "val") if split == "select" else ("trainval", "test")
    found = inputs_of(method, task, root, seed, train_on)
    features, truth = inputs_of(method, task, root, seed, held_out).tensors
    folds, each, losses = METHODS[method].get("folds", 1), [], []
    for fold in range(folds):
        model = build(method, seed + 1000 * fold)
        part = found if folds == 1 else without_fold(found, fold, seed)
        history = train_model(model, method, part, learning_rate, seed + 1000 * fold)
        losses += [row["loss"] for row in history[-10:]]
        each.append(grades(model, method, features))
    vote = voted(each)
    row = {"kappa": kappa(truth, vote), "accuracy": round(100 * float((vote == truth).float().mean()), 2)}
    row |= {
        "loss": round(sum(losses) / len(losses), 4),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return row | ({"fold": round(float(np.mean([kappa(truth, one) for one in each])), 2)} if folds > 1 else {})
