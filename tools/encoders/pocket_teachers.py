"""The three small teachers of DMT, trained on the same unlabelled collages. About 4 minutes on one core.

    MAE       predicts masked patches: positions, and little of textures.
    MoCo v3   contrasts grey views: no colour, so neither hues nor the reddish square.
    iBOT      matches crops that are mirrored and of another contrast: colour, and little of positions.

The factor that each does not encode is our choice: three teachers together can encode more than any one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.models.dmt.vit import ViT
from companion.models.hvit.dino import SelfDistillation, half_cosine
from companion.models.layers.mae import MAE
from companion.toy import dmt
from companion.toy.encoders import teachers
from companion.toy.encoders.teachers import grey
from companion.training.callbacks import EMA, Callback, ClipNorm, ema_copy
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.schedules import adamw

from . import ship

RECIPE: dict[str, Any] = {
    "methods": {
        "MAE": {"steps": 2400, "batch": 128, "lr": 2e-3, "betas": [0.9, 0.95]},
        "MoCo v3": {"steps": 700, "batch": 128, "lr": 2e-3, "betas": [0.9, 0.999]},
        "iBOT": {"steps": 900, "batch": 96, "lr": 2e-3, "betas": [0.9, 0.999], "clip": 3.0},
    },
    "images": 6000,
    "seed": 0,
}


def mlp(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """MoCo v3's heads: linear layers without bias, batch norm and ReLU between, a last batch norm without affine."""
    steps: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        steps.append(nn.Linear(inputs if i == 0 else hidden, outputs if last else hidden, bias=False))
        steps += [nn.BatchNorm1d(outputs, affine=False)] if last else [nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*steps)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of each query (B, E) with its key among all of the batch, times 2 T."""
    q, k = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1).detach()
    return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device)) * (2 * temperature)


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
        model = MAE(encoder, (48, 1, 4), mask_ratio=teachers.MASKED, normalise=False)
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
    luma = torch.tensor(dmt.LUMA, dtype=weight.dtype)[None, :, None, None]
    weight.copy_(weight.sum(1, keepdim=True) * luma)
    return encoder


def train_one(
    name: str, images: Tensor, seed: int, steps: int, batch: int, lr: float, betas: list, clip: float = 0
) -> ViT:
    """One teacher trained from scratch on images (N, 3, 32, 32), in eval mode."""
    encoder = teachers.untrained(name, seed).train()
    torch.manual_seed(seed)
    model, loss, callbacks = objective(name, encoder, steps)
    fit(
        model,
        loss,
        TensorDataset(images),
        epochs=steps / (len(images) // batch),
        batch=batch,
        optimizer=adamw(lr, 0.05, betas=tuple(betas)),
        callbacks=[ClipNorm(clip), *callbacks] if clip else callbacks,
        seed=seed,
        hardware=CPU,
        name=name,
    )
    encoder = model.export() if name == "iBOT" else model.encoder
    return (see_grey(encoder) if name == "MoCo v3" else encoder).eval()


def collages(count: int, split: str, seed: int) -> dmt.Part:
    """As `dmt.part`, up to rounding: the shipped weights were trained on these."""
    images, factors = (torch.from_numpy(array) for array in dmt.collages(count, split, seed))
    return dmt.Part((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, factors)


def train(methods: Mapping[str, Mapping[str, Any]], images: int, seed: int) -> nn.ModuleDict:
    """The teachers by name."""
    drawn = collages(images, "train", seed).images
    return nn.ModuleDict({name: train_one(name, drawn, seed, **options) for name, options in methods.items()})


def measure(models: nn.ModuleDict) -> dict[str, float]:
    """The mean accuracy over the four factors of linear probes, in percent."""
    train, test = collages(3000, "train", 1), collages(1500, "test", 1)
    return {name: dmt.probes(model, train, test)["mean"] for name, model in models.items()}


def tensors(models: nn.ModuleDict) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    ship(teachers.NAME, train, measure, RECIPE, tensors=tensors, world=1)
