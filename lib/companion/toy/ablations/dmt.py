"""DMT at pocket scale: students of three teachers, of two, of one and of none, and what a probe finds in them.

All students are one small ViT that starts from the same numbers and takes as many steps on the same 3,000 unlabelled
collages. The three teachers are the shipped ones, in all seeds the same: the spread over seeds is that of pictures, of
the student's start and of the order of training. What teachers say of whole pictures is asked once a seed and cached.

Measures are accuracies in percent of linear probes on the frozen features, with 10 labels a class (the mean over ten
draws of them) and, in columns that end in "all", with all 3,000. Learning rates are chosen on validation pictures of a
seed of their own by the mean of the four probes, after trainings of half the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ...models.dmt import cache as dmt_cache
from ...models.dmt import model as dmt
from ...models.dmt import teachers as dmt_teachers
from ...models.dmt.model import ViT
from ...training.fit import fit
from .. import encoders
from ..datasets import collage as pocket
from ..encoders import teachers as taught

TASK = "collage"
LEARNING_RATES = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128]
SEEDS = [11, 12, 13, 14, 15]  # none of these pictures was seen while the world and the teachers were being chosen
SELECTION_SEED = 100
METRIC = "mean"
STEPS = 500
RECIPE = {"batch": 128, "weight_decay": 0.05, "accelerator": "cpu"}
STUDENT = {"width": 48}  # else as `dmt.SIZES["pocket"]`
SETTINGS = {"mask_ratio": 0.5, "decoder": "pocket"}

# the teachers of a student, and what differs from the settings
STUDENTS: dict[str, tuple[tuple[str, ...], dict]] = {
    "DMT": (taught.TEACHERS, {}),
    "MAE only": (("MAE",), {}),
    "MoCo v3 only": (("MoCo v3",), {}),
    "iBOT only": (("iBOT",), {}),
    "MAE + MoCo v3": (("MAE", "MoCo v3"), {}),
    "MAE + iBOT": (("MAE", "iBOT"), {}),
    "MoCo v3 + iBOT": (("MoCo v3", "iBOT"), {}),
    "averaged teachers": (taught.TEACHERS, {"fusion": "mean"}),
    "gate": (taught.TEACHERS, {"fusion": "gate"}),
    "LN targets": (taught.TEACHERS, {"target_norm": "ln"}),
    "token loss only": (taught.TEACHERS, {"map": 0.0}),
    "map loss only": (taught.TEACHERS, {"token": 0.0}),
    "same view": (taught.TEACHERS, {"view": "same"}),
}
UNTAUGHT = ("untrained", "supervised from scratch", "MAE from scratch")
THEMSELVES = {f"teacher {name}": name for name in taught.TEACHERS}
METHODS = (*STUDENTS, *UNTAUGHT, *THEMSELVES)
UNTRAINED = ("untrained", *THEMSELVES)
TASKS = {TASK: list(METHODS)}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(root: str | Path) -> None:
    """Write the collages of every seed, and what the teachers say of them."""
    for seed in (SELECTION_SEED, *SEEDS):
        pocket.write(folder(root, seed), seed)
        said(str(root), seed)


def folder(root: str | Path, seed: int) -> Path:
    """The data root of a seed: each seed has its own collages, so that the spread holds their chance too."""
    return Path(root) / f"seed{seed}"


@functools.lru_cache(maxsize=6)
def part(root: str, seed: int, split: str) -> pocket.Part:
    """A split, in memory."""
    return pocket.read(folder(root, seed), split)


def said(root: str, seed: int) -> dmt_cache.Cache:
    """What the three teachers say of the training pictures; asked the first time, then read from disk."""
    # other weights have another cache: one of other teachers would be refused
    name = f"said-{encoders.read_card(taught.NAME)['sha256'][:8]}"
    views = dmt_cache.Views(part(root, seed, "train").images)
    return dmt_cache.build(
        folder(root, seed) / name, dmt.Teachers(taught.load()), views, dtype="float32", accelerator="cpu"
    )


# --- training ---------------------------------------------------------------------------------------------------------


def student(seed: int) -> ViT:
    """The student before its training: the same for all methods of a seed."""
    torch.manual_seed(seed)
    return dmt.build("pocket", **STUDENT)


class Supervised(nn.Module):
    """A student that is told all four factors: a linear layer for each on what the probes read."""

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(2 * encoder.width, count) for count in pocket.FACTORS.values())

    def forward(self, images: Tensor, factors: Tensor) -> Tensor:
        found = self.encoder.features(images)
        return sum(F.cross_entropy(head(found), factors[:, i]) for i, head in enumerate(self.heads))


def assemble(method: str, seed: int, root: str) -> tuple[nn.Module, Callable, TensorDataset]:
    """What is trained by a method, its loss of a batch, and the data; the student is its `.student` or `.encoder`."""
    data = part(root, seed, "train")
    if method in UNTAUGHT:
        encoder = student(seed)
        if method == "supervised from scratch":
            return Supervised(encoder), lambda model, batch: model(*batch), TensorDataset(data.images, data.factors)
        model = dmt_teachers.MAE(encoder, dmt.DECODERS["pocket"], mask_ratio=taught.MASKED, normalise=False)
        return model, lambda model, batch: model(batch[0]), TensorDataset(data.images)
    names, changes = STUDENTS[method]
    options = SETTINGS | changes
    if (view := options.pop("view", "full")) != "full":
        shipped = taught.load()
        teachers = dmt.Teachers({name: shipped[name] for name in names}, view=view)
        return dmt.DMT(student(seed), teachers, **options), dmt.loss, TensorDataset(data.images)
    cache = said(root, seed)
    tokens = [whole for name, whole in zip(cache.names, cache.tensors(), strict=True) if name in names]
    # the student last: loading and asking teachers draws random numbers, and adapters and decoder follow its own
    model = dmt.DMT(student(seed), [t.shape[-1] for t in tokens], **options)
    return model, dmt.loss, TensorDataset(data.images, *tokens)


def train_model(method: str, rate: float, seed: int, root: str, steps: int = STEPS, **options) -> tuple:
    """Train a method; the student in eval mode, what trained it, and the history. `options` go to `fit`."""
    model, loss, data = assemble(method, seed, root)
    per_epoch = len(data) // RECIPE["batch"]
    options = RECIPE | {"lr": rate, "seed": seed, "epochs": steps / per_epoch, "name": method} | options
    history = fit(model, loss, data, **options)
    return (model.student if method in STUDENTS else model.encoder).eval(), model, history


def train(method: str, task: str, rate: float, seed: int, root: str, split: str = "test", **options) -> dict:
    """One method, trained where there is something to train, and its probes. Returns a row.

    `split` "select": half the steps, tested on validation pictures with 10 labels; "test": on test pictures, with all
    labels too. `options` go to `fit`.
    """
    root, last = str(root), 0.0
    if method in UNTRAINED:
        encoder = taught.load()[THEMSELVES[method]] if method in THEMSELVES else student(seed).eval()
    else:
        steps = STEPS // 2 if split == "select" else STEPS
        encoder, _, history = train_model(method, rate, seed, root, steps, **options)
        last = sum(row["loss"] for row in history[-20:]) / len(history[-20:])
    found = probes(encoder, root, seed, split)
    if method in THEMSELVES:
        found["own-probe lead"] = lead(method, root, seed, found)
    if split == "test":
        found |= {f"{name} all": value for name, value in probes(encoder, root, seed, split, shots=None).items()}
    return {name: round(value, 2) for name, value in found.items()} | {"loss": round(last, 4)}


# --- what a student is worth ------------------------------------------------------------------------------------------


def probes(
    encoder: ViT, root: str, seed: int, split: str = "test", shots: int | None = taught.SHOTS
) -> dict[str, float]:
    """Accuracy by factor and their "mean", on the pictures of `split` ("select": validation) with `shots` labels a
    class; None: all."""
    return taught.measure(
        encoder, part(root, seed, "train"), part(root, seed, "val" if split == "select" else "test"), shots
    )


def lead(method: str, root: str, seed: int, own: dict[str, float]) -> float:
    """On the probe where it is largest: a teacher's accuracy less that of the better of the two others, in points."""
    teachers = taught.load()
    others = [probes(teachers[name], root, seed) for whose, name in THEMSELVES.items() if whose != method]
    return max(own[name] - max(other[name] for other in others) for name in pocket.FACTORS)
