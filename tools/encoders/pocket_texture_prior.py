"""The frozen modules of TIP at the `pocket` profile, on clean images with captions. A few minutes on one core.

The autoencoder is a principal component analysis in closed form; the UNet learns to denoise its latents.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.models.tip import model as tip
from companion.toy import tip as toy
from companion.toy.encoders.texture_prior import CHANNELS, NAME, PATCH, PatchPCA, scheduler, text, times, unet
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.schedules import adamw

from . import ship

SEED = 1  # of the images and weights; the ablations' images have others


def shown(split: str, seed: int) -> tuple[Tensor, list[str]]:
    """Images (n, 3, 16, 16) in [-1, 1] and their captions."""
    found = toy.pictures(split, seed)
    images = torch.from_numpy(np.stack([picture.image for picture in found])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, [picture.caption for picture in found]


@torch.no_grad()
def principal_components(images: Tensor) -> PatchPCA:
    """The autoencoder of images (n, 3, H, W) in [-1, 1]."""
    vae = PatchPCA()
    rows = F.pixel_unshuffle(images, PATCH).movedim(1, -1).flatten(0, -2).double()
    vae.mean.copy_(rows.mean(0))
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T.cov())
    kept = values.argsort(descending=True)[:CHANNELS]
    basis = vectors[:, kept].T
    # the sign of an eigenvector depends on the solver
    vae.basis.copy_(basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign())
    vae.deviation.copy_(values[kept].sqrt())
    return vae


class Prior(nn.Module):
    """The UNet with the signature that `tip.loss` calls; degraded image and restoration prompt are ignored."""

    def __init__(self, net: UNet2DConditionModel):
        super().__init__()
        self.unet = net

    def forward(self, z: Tensor, t: Tensor, semantic: Tensor, *_: Tensor) -> Tensor:
        """The prediction (B, L, h, w) of z_t, t (B,) and states (B, M, d)."""
        return self.unet(z, t, semantic).sample


def train(
    steps: int, batch: int, learning_rate: float, weight_decay: float, no_caption: float, seed: int
) -> nn.ModuleDict:
    """Autoencoder and UNet; `no_caption` is the share of images that are shown without their caption."""
    images, captions = shown("train", seed)
    vae, words = principal_components(images), text()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = unet().requires_grad_(True)
    states = words(words.ids(captions))[0]
    empty, noise = words(words.ids([""]))[0], scheduler()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, semantic = batch
        semantic = torch.where(torch.rand(len(z), 1, 1, device=z.device) < no_caption, empty.to(z.device), semantic)
        return tip.loss(model, (z, z, semantic, semantic), noise, times(len(z), z.device))

    data, optimizer = TensorDataset(tip.to_latents(vae, images), states), adamw(learning_rate, weight_decay)
    epochs = steps / (len(data) // batch)
    fit(Prior(net), loss, data, epochs=epochs, batch=batch, optimizer=optimizer, seed=seed, hardware=CPU, name="prior")
    return nn.ModuleDict({"vae": vae, "unet": net})


@torch.no_grad()
def measure(model: nn.ModuleDict) -> dict[str, float]:
    """The denoising loss on test images with their captions, at times 300 to 999."""
    images, captions = shown("test", SEED)
    z, generator, words = tip.to_latents(model["vae"], images), torch.Generator().manual_seed(SEED), text()
    t = torch.randint(300, 1000, (len(z),), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    batch = (z, z, words(words.ids(captions))[0], None)
    return {"loss": float(tip.loss(Prior(model["unet"]), batch, scheduler(), t=t, noise=noise))}


if __name__ == "__main__":
    recipe = {"steps": 1500, "batch": 64, "learning_rate": 3e-3, "weight_decay": 0.01, "no_caption": 0.1, "seed": SEED}
    ship(NAME, train, measure, recipe)
