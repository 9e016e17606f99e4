"""DMT on the synthetic collages: students of three teachers, of two, of one and of none, scored by linear probes.

All students are one small ViT with the same initial weights, trained for as many steps on the same 3,000 unlabelled
collages. The three teachers are the shipped ones for all seeds: the spread over seeds is that of images, the student's
initial weights and the order of training. The teachers' tokens of whole images are cached once per seed.

Measures are accuracies in percent of linear probes on the frozen features, with 10 labels per class (the mean over ten
draws) and, in columns that end in "all", with all 3,000. Learning rates are selected by the mean of the four probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ...models.dmt import cache as dmt_cache
from ...models.dmt.model import DECODERS, DMT, Losses, TargetNorm, Teachers, loss
from ...models.dmt.vit import ViT, build
from ...models.layers.mae import MAE, take
from ...training.fit import CPU, History, fit
from ...training.schedules import adamw
from .. import encoders
from ..datasets import collage as pocket
from ..encoders import teachers as taught
from . import last_loss, reader, study_root

TASK = "collage"
LEARNING_RATES = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128]
METRIC = "mean"
STEPS = 500
BATCH, WEIGHT_DECAY = 128, 0.05
BUDGET = f"{STEPS} steps, batch {BATCH}"
STUDENT = {"width": 48}  # else as `vit.SIZES["pocket"]`
SETTINGS = {"mask_ratio": 0.5, "decoder": "pocket"}


# --- other reconstructions --------------------------------------------------------------------------------------------


class Averaged(DMT):
    """One head and one target, the mean of the teachers, which have one width."""

    def __init__(self, student: ViT, teachers: Teachers | Sequence[int], **options: Any):
        widths = teachers.widths if isinstance(teachers, Teachers) else teachers
        super().__init__(student, widths[:1], **options)
        norm, self.teachers = self.target_norms[0].kind, teachers if isinstance(teachers, Teachers) else None
        self.target_norms = nn.ModuleList(TargetNorm(width, norm) for width in widths)

    def fused(self, targets: Tensor, predicted: Tensor) -> Tensor:
        """One target (B, N, D) of the teachers' (K, B, N, D)."""
        return torch.einsum("k,kbnd->bnd", targets.new_ones(len(targets)) / len(targets), targets)

    def compare(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return super().compare(predicted, [self.fused(torch.stack(list(targets)), predicted[0])])


class Gated(Averaged):
    """One target, in which each token weighs the teachers by their agreement with student and others [2nd: CoMAD] (6).

    The weights are the softmax over teachers of the cosine between the student's prediction and the teacher's target
    times the teacher's mean cosine with the other teachers, over a temperature of 0.1.
    """

    def fused(self, targets: Tensor, predicted: Tensor) -> Tensor:
        if len(targets) == 1:
            return targets[0]
        unit = F.normalize(targets, dim=-1)
        affinity = torch.einsum("bnd,kbnd->kbn", F.normalize(predicted.detach(), dim=-1), unit)
        every = torch.einsum("jbnd,kbnd->jkbn", unit, unit)
        agreement = (every.sum(0) - torch.diagonal(every).movedim(-1, 0)) / (len(targets) - 1)  # (K, B, N)
        return torch.einsum("kbn,kbnd->bnd", (affinity * agreement / 0.1).softmax(0), targets)


class SameView(DMT):
    """Teachers see the student's visible patches alone [anc: G2SD], and both losses are on these."""

    def forward(self, images: Tensor, tokens: Sequence[Tensor] | None = None, noise: Tensor | None = None) -> Losses:
        keep = self.keep(images, noise)
        with torch.no_grad():
            tokens = [teacher.hidden(images, keep=keep)[0] for teacher in self.teachers.models.values()]
        targets = [norm(y) for norm, y in zip(self.target_norms, tokens, strict=True)]  # (B, 1 + V, D_k)
        z = self.student(images, keep)
        token = self.compare([adapter(z) for adapter in self.adapters], targets)
        decoded = self.decoder(z, keep)  # type: ignore[misc]
        mapped = self.compare([take(head(decoded), keep) for head in self.map_heads], targets)
        return Losses((token + mapped).mean(), token, mapped)


FUSIONS = (DMT, Averaged, Gated)
# the teachers of a student, its class, and its changes to the settings
STUDENTS: dict[str, tuple[tuple[str, ...], type[DMT], dict]] = {
    "DMT": (taught.TEACHERS, DMT, {}),
    "MAE only": (("MAE",), DMT, {}),
    "MoCo v3 only": (("MoCo v3",), DMT, {}),
    "iBOT only": (("iBOT",), DMT, {}),
    "MAE + MoCo v3": (("MAE", "MoCo v3"), DMT, {}),
    "MAE + iBOT": (("MAE", "iBOT"), DMT, {}),
    "MoCo v3 + iBOT": (("MoCo v3", "iBOT"), DMT, {}),
    "averaged teachers": (taught.TEACHERS, Averaged, {}),
    "gate": (taught.TEACHERS, Gated, {}),
    "LN targets": (taught.TEACHERS, DMT, {"target_norm": "ln"}),
    "token loss only": (taught.TEACHERS, DMT, {"map_weight": 0.0}),
    "map loss only": (taught.TEACHERS, DMT, {"token_weight": 0.0}),
    "same view": (taught.TEACHERS, SameView, {}),
}
UNTAUGHT = ("untrained", "supervised from scratch", "MAE from scratch")
THEMSELVES = {f"teacher {name}": name for name in taught.TEACHERS}
METHODS = (*STUDENTS, *UNTAUGHT, *THEMSELVES)
UNTRAINED = ("untrained", *THEMSELVES)
TASKS = {TASK: list(METHODS)}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(root: str | Path, seed: int) -> None:
    """Write the collages of a seed, and the teachers' tokens of them."""
    write(root, seed)
    cached_tokens(str(root), seed)


def write(root: str | Path, seed: int) -> None:
    """Write the collages of a seed."""
    pocket.write(study_root(root, seed), seed)


@reader(6)
def part(root: str, seed: int, split: str) -> pocket.Part:
    """A split, in memory."""
    return pocket.read(study_root(root, seed), split)


def cached_tokens(root: str, seed: int) -> dmt_cache.Cache:
    """The three teachers' tokens of the training images; computed the first time, then read from disk."""
    # other weights have another cache: a cache of other teachers would be refused
    name = f"tokens-{encoders.read_card(taught.NAME)['sha256'][:8]}"
    views = dmt_cache.Views(part(root, seed, "train").images)
    return dmt_cache.build(study_root(root, seed) / name, Teachers(taught.load()), views, dtype="float32", hardware=CPU)


# --- training ---------------------------------------------------------------------------------------------------------


def student(seed: int) -> ViT:
    """The student before its training: the same for all methods of a seed."""
    torch.manual_seed(seed)
    return build("pocket", **STUDENT)


class Supervised(nn.Module):
    """A student supervised by all four factors: a linear layer for each on the features that probes read."""

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(2 * encoder.width, count) for count in pocket.FACTORS.values())

    def forward(self, images: Tensor, factors: Tensor) -> Tensor:
        found = self.encoder.features(images)
        return sum(F.cross_entropy(head(found), factors[:, i]) for i, head in enumerate(self.heads))


def assemble(method: str, seed: int, root: str) -> tuple[nn.Module, Callable, TensorDataset]:
    """The model of a method (the student is its `.student` or `.encoder`), the loss of a batch, and the data."""
    data = part(root, seed, "train")
    if method in UNTAUGHT:
        encoder = student(seed)
        if method == "supervised from scratch":
            return Supervised(encoder), lambda model, batch: model(*batch), TensorDataset(data.images, data.factors)
        model = MAE(encoder, DECODERS["pocket"], mask_ratio=taught.MASKED, normalise=False)
        return model, lambda model, batch: model(batch[0]), TensorDataset(data.images)
    names, kind, changes = STUDENTS[method]
    options = SETTINGS | changes
    if kind is SameView:
        teachers = Teachers(taught.load())
        return SameView(student(seed), teachers, **options), loss, TensorDataset(data.images)
    cached = zip(taught.TEACHERS, cached_tokens(root, seed).tensors(), strict=True)
    tokens = [whole for name, whole in cached if name in names]
    # the student last: loading and running teachers draws random numbers; adapters and decoder are drawn after it
    model = kind(student(seed), [t.shape[-1] for t in tokens], **options)
    return model, loss, TensorDataset(data.images, *tokens)


def fit_student(
    model: nn.Module,
    loss: Callable,
    data: TensorDataset,
    method: str,
    learning_rate: float,
    seed: int,
    steps: int,
    **options: Any,
) -> History:
    """Train the model of a method in place, for `steps`. `options` go to `fit`."""
    optimizer, epochs = adamw(learning_rate, WEIGHT_DECAY), steps / (len(data) // BATCH)
    settings: dict[str, Any] = {"epochs": epochs, "seed": seed, "hardware": CPU, "name": method}
    return fit(model, loss, data, batch=BATCH, optimizer=optimizer, **settings | options)


def train_model(
    method: str, learning_rate: float, seed: int, root: str, steps: int = 0, **options: Any
) -> tuple[ViT, nn.Module, History]:
    """Train a method; the student in eval mode, the whole model, and the history. `options` go to `fit`."""
    model, loss, data = assemble(method, seed, root)
    history = fit_student(model, loss, data, method, learning_rate, seed, steps or STEPS, **options)
    return (model.student if method in STUDENTS else model.encoder).eval(), model, history


def train(
    method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test", **options: Any
) -> dict[str, float]:
    """Train one method, if it has trainable parameters, and probe it. Returns a row.

    `split` "select": tested on validation images with 10 labels; "test": on test images, with all labels too. `options`
    go to `fit`.
    """
    root, last = str(root), 0.0
    if method in UNTRAINED:
        encoder = taught.load()[THEMSELVES[method]] if method in THEMSELVES else student(seed).eval()
    else:
        encoder, _, history = train_model(method, learning_rate, seed, root, **options)
        last = last_loss(history)
    found = probes(encoder, root, seed, split)
    if method in THEMSELVES:
        found["own-probe lead"] = lead(method, root, seed, found)
    if split == "test":
        found |= {f"{name} all": value for name, value in probes(encoder, root, seed, split, shots=None).items()}
    return {name: round(value, 2) for name, value in found.items()} | {"loss": last}


# --- probes -----------------------------------------------------------------------------------------------------------


def probes(
    encoder: ViT, root: str, seed: int, split: str = "test", shots: int | None = taught.SHOTS
) -> dict[str, float]:
    """Accuracy by factor and their "mean", on the images of `split` ("select": validation) with `shots` labels per
    class; None: all."""
    test = part(root, seed, "val" if split == "select" else "test")
    return taught.measure(encoder, part(root, seed, "train"), test, shots)


def lead(method: str, root: str, seed: int, own: dict[str, float]) -> float:
    """The largest lead of a teacher over the better of the two others on any probe, in points."""
    teachers = taught.load()
    others = [probes(teachers[name], root, seed) for whose, name in THEMSELVES.items() if whose != method]
    return max(own[name] - max(other[name] for other in others) for name in pocket.FACTORS)
