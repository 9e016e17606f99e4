"""NAME's ablation at toy scale: crops of twelve photographs, those of `toy.sa2vp`, 1,000 to train."""

from __future__ import annotations

from torch import manual_seed, nn
from torch.utils.data import TensorDataset

from ..evaluation.ablations import Study
from ..models.SLUG import loss, recipe
from ..training.fit import History, fit
from ..training.hardware import CPU
from ..training.schedules import sgd
from . import encoders
from .sa2vp import TASKS, data

EPOCHS, BATCH = 2, 20
METHODS = {name: recipe.METHODS[name] for name in ("NAME", "linear probing")}


def build(method: str, classes: int, seed: int) -> nn.Module:
    """The model of a method on the small ViT; its new tensors are drawn from `seed`."""
    manual_seed(seed)
    return METHODS[method](encoders.build("pocket_vit"), classes)


def train(method: str, task: str, learn: TensorDataset, learning_rate: float, seed: int) -> tuple[nn.Module, History]:
    """A trained method, and the last ten steps of its history."""
    model = build(method, len(TASKS[task].classes), seed)
    options = {"epochs": EPOCHS, "batch": BATCH, "schedule": recipe.SCHEDULE, "hardware": CPU}
    return model, fit(model, loss, learn, optimizer=sgd(learning_rate), seed=seed, name=method, **options)[-10:]


def score(model: nn.Module, task: str, held_out: TensorDataset) -> dict[str, float]:
    """The accuracy in percent."""
    return {"accuracy": round(recipe.accuracy(model, held_out, CPU, batch=256), 2)}


STUDY = Study(
    tasks={"textures": tuple(METHODS)},
    learning_rates=(0.03, 0.1, 0.3),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
)
