"""The three small teachers of DMT: their training, the factor that each does not encode, and the probes that measure
it.

    python -m companion.toy.encoders.teachers      (about 4 minutes on one core)

    MAE       predicts masked patches: positions, and little of textures.
    MoCo v3   contrasts grey views: no colour, so neither hues nor the reddish square.
    iBOT      matches crops that are mirrored and of another contrast: colour, and little of positions.

All are ViTs of one shape, trained on the same unlabelled collages. The factor that each does not encode is our choice
(section 14.4): three teachers together can encode more than any one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ... import backbones
from ...errors import check_choice
from ...models.dmt.downstream import Features, ridge
from ...models.dmt.teachers import contrastive_loss, mlp
from ...models.dmt.vit import ViT, build
from ...models.layers.dino import SelfDistillation, half_cosine
from ...models.layers.mae import MAE
from ...training.callbacks import EMA, Callback, ClipNorm, ema_copy
from ...training.fit import CPU, History, fit, predict
from ...training.schedules import adamw
from .. import encoders
from ..datasets import collage
from . import card

NAME = "pocket_teachers"
TEACHERS = ("MAE", "MoCo v3", "iBOT")
SHAPE = {"depth": 3}  # else as `vit.SIZES["pocket teacher"]`
OPTIONS: dict[str, Any] = {
    "MAE": {},
    "MoCo v3": {"positions": "mocov3"},
    "iBOT": {"positions": "learned", "masked": True},
}
IMAGES = 6000
RECIPES: dict[str, dict[str, Any]] = {
    "MAE": {"steps": 2400, "batch": 128, "lr": 2e-3, "betas": (0.9, 0.95)},
    "MoCo v3": {"steps": 700, "batch": 128, "lr": 2e-3},
    "iBOT": {"steps": 900, "batch": 96, "lr": 2e-3, "clip": 3.0},
}
MASKED = 0.65  # masked share of the patches for MAE: 5 of 16 are visible
SHOTS, DRAWS = 10, 10  # labels per class for a probe, and the number of draws
RIDGE = {SHOTS: 10.0, None: 30.0}  # by labels per class; None: all


# --- the teachers -----------------------------------------------------------------------------------------------------


def untrained(name: str = "MAE", seed: int = 0) -> ViT:
    """The teacher before its training, in eval mode. Raises `BadParameter` for another name."""
    check_choice("teacher", name, TEACHERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("pocket teacher", **SHAPE, **OPTIONS[name]).eval()


def load() -> dict[str, ViT]:
    """The shipped teachers by name, in eval mode. Raises `MissingWeights`, `CorruptFile`."""
    state = backbones.read_state(encoders.weights_file(NAME))
    found = {}
    for name in TEACHERS:
        prefix = f"{name}/"
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        found[name] = ViT.from_official(part, untrained(name).heads, name)
    return found


def grey(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) without their colour: the weighted mean of the channels (ITU-R 601), three times."""
    weights = backbones.per_channel((0.299, 0.587, 0.114), images.device).flatten().to(images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None].expand_as(images)


def crops(images: Tensor, share: tuple[float, float]) -> Tensor:
    """A crop of each image (B, 3, S, S) at the same size: `share` of the area, mirrored either way or not."""
    count, (low, high), device = len(images), share, images.device
    area = torch.empty(count, device=device).uniform_(low, high)
    ratio = torch.empty(count, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    sides = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)  # width and height, of 1
    centre = (2 * torch.rand(count, 2, device=device) - 1) * (1 - sides)
    mirrored = sides * (torch.randint(2, (count, 2), device=device) * 2 - 1)
    theta = torch.cat([torch.diag_embed(mirrored), centre[..., None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def light(images: Tensor, contrast: tuple[float, float], level: float) -> Tensor:
    """Images with random contrast and level of the luma; colours are unchanged."""
    each = images.new_empty(len(images), 1, 1, 1)
    change = each.uniform_(*contrast) - 1
    return images + change * grey(images) + each.uniform_(-level, level)


class MoCo(nn.Module):
    """MoCo v3 with a trained patch projection (the released code freezes it): two views of each image to the loss."""

    def __init__(self, encoder: ViT, hidden: int, outputs: int):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.projector, self.predictor = mlp(encoder.width, hidden, outputs, 3), mlp(outputs, hidden, outputs, 2)
        self.key_encoder, self.key_projector = ema_copy(self.encoder), ema_copy(self.projector)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric loss of two views (B, 3, S, S)."""
        views = (first, second)
        q = [self.predictor(self.projector(self.encoder(x)[:, 0])) for x in views]
        with torch.no_grad():
            k = [self.key_projector(self.key_encoder(x)[:, 0]) for x in views]
        return contrastive_loss(q[0], k[1]) + contrastive_loss(q[1], k[0])

    def ema(self, steps: int, momentum: float) -> EMA:
        """The callback that updates the key encoder, its momentum rising to 1 over `steps`.

        The released code updates it before the keys of a step are computed, with the momentum of that step. An update
        after the previous step is equivalent: at the first step both encoders are equal.
        """
        pairs = [(self.key_encoder, self.encoder), (self.key_projector, self.projector)]
        return EMA(pairs, lambda step: half_cosine(momentum, 1.0, step, steps))


def objective(name: str, encoder: ViT, steps: int) -> tuple[nn.Module, Callable, list[Callback]]:
    """The model that trains an encoder, its loss of a batch of images (the views are drawn here), and its callbacks."""
    if name == "MAE":
        model = MAE(encoder, (48, 1, 4), mask_ratio=MASKED, normalise=False)
        return model, lambda model, batch: model(batch[0]), []
    if name == "MoCo v3":

        def grey_view(images: Tensor) -> Tensor:
            return light(grey(crops(images, (0.3, 1.0))), (0.6, 1.4), 0.2)

        model = MoCo(encoder, 128, 64)
        return model, lambda model, batch: model(grey_view(batch[0]), grey_view(batch[0])), [model.ema(steps, 0.98)]

    def view(images: Tensor) -> Tensor:
        return light(crops(images, (0.4, 1.0)), (0.3, 1.2), 0.3)

    model = SelfDistillation(encoder, 64, 128, 32, norm_last_layer=True, patch_weight=1.0, teacher=0.06)
    return model, lambda model, batch: model([view(batch[0]), view(batch[0])]), [model.ema(steps, 0.97)]


@torch.no_grad()
def see_grey(encoder: ViT) -> ViT:
    """Restrict the patch projection to luma, in place: its output for any image is that for the grey one."""
    weight = encoder.patch_embed.proj.weight
    luma = torch.tensor(collage.LUMA, dtype=weight.dtype)[None, :, None, None]
    weight.copy_(weight.sum(1, keepdim=True) * luma)
    return encoder


def train(name: str, images: Tensor, seed: int = 0, **changes: int) -> tuple[ViT, History]:
    """One teacher trained from scratch, in eval mode, and the history of its training on images (N, 3, 32, 32).

    `changes` to its recipe: "steps", "batch" and others of `RECIPES`.
    """
    encoder = untrained(name, seed).train()
    recipe = RECIPES[name] | changes
    torch.manual_seed(seed)
    model, loss, callbacks = objective(name, encoder, recipe["steps"])
    history = fit(
        model,
        loss,
        TensorDataset(images),
        epochs=recipe["steps"] / (len(images) // recipe["batch"]),
        batch=recipe["batch"],
        optimizer=adamw(recipe["lr"], 0.05, betas=recipe.get("betas", (0.9, 0.999))),
        callbacks=[ClipNorm(recipe["clip"]), *callbacks] if "clip" in recipe else callbacks,
        seed=seed,
        hardware=CPU,
        name=name,
    )
    encoder = model.export() if name == "iBOT" else model.encoder
    return (see_grey(encoder) if name == "MoCo v3" else encoder).eval(), history


# --- probes -----------------------------------------------------------------------------------------------------------


def features(encoder: ViT, images: Tensor) -> Tensor:
    """The input of a probe for each image: [CLS] token and mean patch token (n, 2 D)."""
    return predict(Features(encoder), TensorDataset(images), hardware=CPU)


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """The indices of `count` random images of each class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in labels.unique():
        indices = torch.nonzero(labels == label)[:, 0]
        found.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
    return torch.cat(found)


def probe(known: Tensor, factors: Tensor, tested: Tensor, truth: Tensor, shots: int | None = SHOTS) -> dict[str, float]:
    """Accuracy in percent on each factor of linear probes on features, and their "mean".

    Args:
        known, factors: features (n, D) of training images and their factors (n, 4).
        tested, truth: those of test images.
        shots: labels per class; the mean over `DRAWS` draws of them. None: all labels, once.
    """
    found = {}
    for i, (name, classes) in enumerate(collage.FACTORS.items()):
        draws = [slice(None)] if shots is None else [drawn(factors[:, i], shots, seed) for seed in range(DRAWS)]
        right = [
            ridge(known[draw], factors[draw, i], classes, tested, RIDGE[shots]).argmax(1) == truth[:, i]
            for draw in draws
        ]
        found[name] = 100 * float(torch.stack(right).float().mean())
    return found | {"mean": sum(found.values()) / len(found)}


def measure(encoder: ViT, train: collage.Part, test: collage.Part, shots: int | None = SHOTS) -> dict[str, float]:
    """`probe` of an encoder's features."""
    known, tested = (features(encoder, part.images) for part in (train, test))
    return probe(known, train.factors, tested, test.factors, shots)


# --- shipping ---------------------------------------------------------------------------------------------------------


def collages(count: int, split: str, seed: int) -> collage.Part:
    """Collages of a split in memory, without writing them."""
    drawn = collage.collages(count, split, seed)
    images = torch.stack([torch.from_numpy(c.image) for c in drawn]).permute(0, 3, 1, 2).float() / 255
    return collage.Part((images - collage.MEAN) / collage.STD, torch.tensor([c.factors for c in drawn]))


def quality(teachers: Mapping[str, ViT], seed: int = 1) -> dict[str, dict[str, float]]:
    """Probes of the teachers, and of an untrained one, on collages that were not used in training."""
    train, test = collages(3000, "train", seed), collages(1500, "test", seed)
    models = dict(teachers) | {"untrained": untrained()}
    return {
        name: {key: round(value, 1) for key, value in measure(model, train, test).items()}
        for name, model in models.items()
    }


def ship(folder: Path = encoders.WEIGHTS, seed: int = 0) -> Path:
    """Train all three, measure, and write the weights and their model card."""
    start = time.monotonic()
    images = collages(IMAGES, "train", seed).images
    found = {name: train(name, images, seed) for name in TEACHERS}
    state = {f"{name}/{key}": value for name, (model, _) in found.items() for key, value in model.state_dict().items()}
    seconds = time.monotonic() - start
    recipe: dict[str, Any] = {
        name: each | {"betas": list(each.get("betas", (0.9, 0.999)))} for name, each in RECIPES.items()
    }
    recipe |= {"images": IMAGES, "masked": MASKED, "seed": seed}
    ends = {
        name: {
            at: round(sum(row["loss"] for row in rows) / len(rows), 3)
            for at, rows in (("first", history[:20]), ("last", history[-20:]))
        }
        for name, (_, history) in found.items()
    }
    measured = {"probes": quality({name: model for name, (model, _) in found.items()}), "losses": ends}
    return card.save(folder, NAME, state, measured, recipe, seconds, world=collage.VERSION)


if __name__ == "__main__":
    card.command(ship)
