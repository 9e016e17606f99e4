"""The frozen modules of TIP at the `pocket` profile: a linear autoencoder and a text-conditioned UNet on its latents.

    python -m companion.toy.encoders.texture_prior      (a few minutes on one core)

The autoencoder is a principal component analysis of patches of 4x4 pixels, in closed form. The model card compares it
with diffusers' small KL autoencoder, trained for as many steps as the UNet, which has 4 channels where this one has 12.
The UNet learns to denoise clean images of `datasets.restoration` with their captions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ... import backbones
from ...errors import BadParameter, check_choice
from ...evaluation.metrics.restoration import psnr
from ...models.tip import model as tip
from ...models.tip.degradations import BLIND, Op, prompt
from ...models.tip.pipeline import TIPPipeline
from ...training.fit import CPU, History, Loss, fit
from ...training.schedules import adamw
from .. import encoders
from ..datasets import restoration as pocket
from . import card
from .words import WordText

NAME = "pocket_texture_prior"
PATCH, CHANNELS = 4, 12
SEED = 1  # of the shipped images and weights; the ablations' images have others
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1500, 64, 3e-3, 0.01
NO_CAPTION, POWER = 0.1, 0.7  # share of images without their caption; t is 1000 u^0.7
CONDITIONING_CHANNELS = (48,)  # widths of the adaptor's network for the image, after a pixel-unshuffle by 4
UNET = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 48),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
KL = {  # diffusers' small KL autoencoder, for comparison
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
# x0 prediction and a last step of pure noise learn faster at this size
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "sample",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


class PatchPCA(ModelMixin, ConfigMixin):
    """Whitened principal components of patches of pixels, with the interface of an `AutoencoderKL`.

    A choice of ours for the `pocket` profile: linear, in closed form, exact on the components it keeps.

    Args:
        patch: side of a patch, p.
        channels: number of retained components, L of the 3 p^2.
        block_out_channels: as of an `AutoencoderKL`; their number gives the factor.
        scaling_factor: as of an `AutoencoderKL`; 1, as the components are whitened.
    """

    @register_to_config
    def __init__(
        self,
        patch: int = PATCH,
        channels: int = CHANNELS,
        block_out_channels: Sequence[int] = (CHANNELS,) * 3,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        if 2 ** (len(block_out_channels) - 1) != patch:
            raise BadParameter("patch", patch, f"{2 ** (len(block_out_channels) - 1)}, as of block_out_channels")
        self.mean = nn.Parameter(torch.zeros(3 * patch**2), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(channels, 3 * patch**2), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(channels), requires_grad=False)

    @torch.no_grad()
    def learn(self, images: Tensor) -> float:
        """Set the components to those of images (n, 3, H, W) in [-1, 1]; return the share of explained variance."""
        rows = self._rows(images).movedim(1, -1).flatten(0, -2).double()
        self.mean.copy_(rows.mean(0))
        values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T.cov())
        kept = values.argsort(descending=True)[: self.config.channels]
        basis = vectors[:, kept].T
        # the sign of an eigenvector depends on the solver
        self.basis.copy_(basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign())
        self.deviation.copy_(values[kept].sqrt())
        return float(values[kept].sum() / values.sum())

    def _rows(self, images: Tensor) -> Tensor:
        """(n, 3 p^2, H / p, W / p): a patch's pixels as channels."""
        return F.pixel_unshuffle(images, self.config.patch)

    def encode(self, images: Tensor) -> SimpleNamespace:
        """Latents (n, L, H / p, W / p) of images in [-1, 1], as `latent_dist.mode()`; a sample is the mode."""
        rows = self._rows(images) - self.mean[:, None, None]
        z = torch.einsum("nchw,lc->nlhw", rows, self.basis) / self.deviation[:, None, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z, sample=lambda generator=None: z))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Images (n, 3, H, W) of latents, as `sample`."""
        rows = torch.einsum("nlhw,lc->nchw", z * self.deviation[:, None, None], self.basis)
        return SimpleNamespace(sample=F.pixel_shuffle(rows + self.mean[:, None, None], self.config.patch))


# --- building ---------------------------------------------------------------------------------------------------------


def text() -> WordText:
    """The frozen text encoder: all words of the toy captions and of the restoration prompts."""
    every = prompt([Op("blur", 1), Op("resize", 2), Op("noise", 0.1), Op("jpeg", 50)])
    with torch.random.fork_rng(devices=[]):  # its vectors have their own seed
        return WordText.of([*pocket.CAPTIONS, every, BLIND])


def scheduler() -> DDIMScheduler:
    """Zero terminal signal, x0 predicted, "trailing" steps (ours)."""
    return DDIMScheduler(**NOISE)


def unet() -> UNet2DConditionModel:
    """The toy UNet on latents of 12 channels, untrained (torch's current seed)."""
    return UNet2DConditionModel(**UNET)


class PatchAdaptor(tip.Adaptor):
    """An adaptor whose network reads the image's patches of 4x4 pixels, a pixel-unshuffle, as the autoencoder does."""

    channels = 3 * PATCH**2

    @property
    def factor(self) -> int:
        """Pixels of the degraded image per position of z_t, along a side."""
        return PATCH * super().factor

    def forward(self, z: Tensor, t: Tensor, states: Tensor, degraded: Tensor) -> tuple[Tensor | None, ...]:
        """As an `Adaptor`."""
        return super().forward(z, t, states, F.pixel_unshuffle(degraded, PATCH))


def adaptor(net: UNet2DConditionModel, fusion: str = "modulate", mid: str | None = None) -> PatchAdaptor:
    """An adaptor of the UNet before training; its network for the image is initialised from torch's current seed."""
    return PatchAdaptor.of(net, CONDITIONING_CHANNELS, fusion=fusion, mid=mid)


def times(count: int, device: torch.device) -> Tensor:
    """Timesteps (count,), 1000 u^0.7 with u uniform in [0, 1): noisy ones more often."""
    return (1000 * torch.rand(count, device=device) ** POWER).long()


def build(fusion: str = "modulate", mid: str | None = None, seed: int = 0, prior: str = "trained") -> TIPPipeline:
    """A pipeline on the shipped prior, its adaptor before training.

    Args:
        fusion, mid: of the adaptor.
        seed: of the random weights: the adaptor's network for the image, and the UNet where it is untrained.
        prior: "trained", the shipped one, or "untrained".

    Raises:
        BadParameter: another `prior`.
        MissingWeights, CorruptFile: the shipped file is missing, or differs from its model card.
    """
    check_choice("prior", prior, ("trained", "untrained"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"vae": PatchPCA(), "unet": unet()}
        if prior == "trained":
            state = backbones.read_state(encoders.weights_file(NAME))
            for name, part in parts.items():
                own = {n.removeprefix(f"{name}."): t.float() for n, t in state.items() if n.startswith(f"{name}.")}
                part.load_state_dict(own)
        found = adaptor(parts["unet"], fusion, mid)
        # again, because the fusions draw different numbers before it: adaptors of one seed start equal
        torch.manual_seed(seed)
        found.branch.controlnet_cond_embedding.conv_out.reset_parameters()
        return TIPPipeline(parts["vae"], text(), parts["unet"], found, scheduler())


# --- training ---------------------------------------------------------------------------------------------------------


def shown(split: str, seed: int = SEED, counts: tuple[int, int] | None = None) -> tuple[Tensor, list[str]]:
    """Images (n, 3, 16, 16) in [-1, 1] and their captions."""
    found = pocket.pictures(split, seed, counts)
    images = torch.from_numpy(np.stack([picture.image for picture in found])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, [picture.caption for picture in found]


class Prior(nn.Module):
    """The UNet with the signature that `tip.loss` calls; degraded image and restoration prompt are ignored."""

    def __init__(self, net: UNet2DConditionModel):
        super().__init__()
        self.unet = net

    def forward(self, z: Tensor, t: Tensor, semantic: Tensor, *_: Tensor) -> Tensor:
        """The prediction (B, L, h, w) of z_t, t (B,) and states (B, M, d)."""
        return self.unet(z, t, semantic).sample


def _fit(model: nn.Module, loss: Loss, data: TensorDataset, steps: int, seed: int, name: str, **options) -> History:
    epochs = steps / (len(data) // BATCH)
    return fit(model, loss, data, epochs=epochs, batch=BATCH, seed=seed, hardware=CPU, name=name, **options)


def train(seed: int = SEED, steps: int = STEPS) -> tuple[PatchPCA, UNet2DConditionModel, History, float]:
    """Autoencoder and UNet trained from scratch, the history of the training, and the share of explained variance."""
    images, captions = shown("train", seed)
    vae, words = PatchPCA(), text()
    share = vae.learn(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = unet().requires_grad_(True)
    states = words(words.ids(captions))[0]
    empty, noise = words(words.ids([""]))[0], scheduler()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, semantic = batch
        semantic = torch.where(torch.rand(len(z), 1, 1, device=z.device) < NO_CAPTION, empty.to(z.device), semantic)
        return tip.loss(model, (z, z, semantic, semantic), noise, times(len(z), z.device))

    data, optimizer = TensorDataset(tip.to_latents(vae, images), states), adamw(LEARNING_RATE, WEIGHT_DECAY)
    return vae, net, _fit(Prior(net), loss, data, steps, seed, "prior", optimizer=optimizer), share


def train_kl(seed: int = SEED, steps: int = STEPS) -> AutoencoderKL:
    """diffusers' small KL autoencoder on the same images, for comparison: squared error, KL by 1e-6."""
    images, _ = shown("train", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**KL)

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        posterior = model.encode(batch[0]).latent_dist
        return F.mse_loss(model.decode(posterior.sample()).sample, batch[0]) + 1e-6 * posterior.kl().mean()

    _fit(vae, loss, TensorDataset(images), steps, seed, "KL autoencoder", optimizer=adamw(2e-3, 0.0))
    return vae.eval()


# --- measuring and shipping -------------------------------------------------------------------------------------------


@torch.no_grad()
def ceiling(vae: PatchPCA | AutoencoderKL, seed: int = SEED) -> dict[str, float]:
    """PSNR in dB of test scenes and test photographs after encoding and decoding: an upper bound of restoration."""
    images, _ = shown("test", seed)
    found = psnr(tip.to_images(vae, tip.to_latents(vae, images)) / 2 + 0.5, images / 2 + 0.5)
    count = pocket.COUNTS["test"][0]
    return {"scenes": round(float(found[:count].mean()), 2), "photographs": round(float(found[count:].mean()), 2)}


@torch.no_grad()
def measure(vae: PatchPCA, net: UNet2DConditionModel, seed: int = SEED) -> dict[str, float]:
    """On test images: the denoising loss with the right caption, none, and another's, at the same times and noise; and,
    in percent, how often a scene generated from its caption alone has the texture of the caption."""
    images, captions = shown("test", seed)
    pipe = TIPPipeline(vae, text(), net, adaptor(net), scheduler())
    z, generator = tip.to_latents(vae, images), torch.Generator().manual_seed(seed)
    t = torch.randint(300, 1000, (len(z),), generator=generator)
    drawn = torch.randn(z.shape, generator=generator)
    wrong = [next(c for c in (*captions[i:], *captions[:i]) if c != captions[i]) for i in range(len(captions))]
    found = {}
    for name, given in (("right", captions), ("no", [""] * len(captions)), ("wrong", wrong)):
        batch = (z, z, pipe.states(given), None)
        value = tip.loss(Prior(net), batch, pipe.scheduler, t=t, noise=drawn)
        found[f"loss, {name} caption"] = round(float(value), 4)
    kinds = [pocket.KINDS[i % 3] for i in range(96)]
    blank = torch.full((len(kinds), 3, pocket.SIZE, pocket.SIZE), 0.5)
    made = pipe(blank, [pocket.caption(k) for k in kinds], scale=0.0, steps=10, generator=generator).images
    seen = pocket.seen_kind(made)
    found["texture of its caption"] = round(100 * sum(map(str.__eq__, seen, kinds)) / len(kinds), 1)
    return found


def ship(folder: Path = encoders.WEIGHTS, seed: int = SEED) -> Path:
    """Train, measure, and write the weights and their model card."""
    start = time.monotonic()
    vae, net, history, share = train(seed)
    seconds = time.monotonic() - start
    state = {f"{name}.{n}": t for name, part in (("vae", vae), ("unet", net)) for n, t in part.state_dict().items()}
    recipe = {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "captions left out": NO_CAPTION}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = unet()
    quality = {
        "variance explained": round(share, 4),
        "PSNR of the autoencoder": ceiling(vae, seed),
        "PSNR of a small KL autoencoder": ceiling(train_kl(seed), seed),
        "UNet": measure(vae, net, seed),
        "UNet untrained": measure(vae, plain, seed),
        "last loss": round(sum(row["loss"] for row in history[-50:]) / 50, 4),
    }
    recipe |= {"power of t": POWER, "seed": seed}
    return card.save(folder, NAME, state, quality, recipe, seconds, world=pocket.VERSION)


if __name__ == "__main__":
    card.command(ship, seed=SEED)
