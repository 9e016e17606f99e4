"""The frozen modules of TIP at the `pocket` profile: a linear autoencoder and a text-conditioned UNet on its latents.

The autoencoder is a principal component analysis of patches of 4x4 pixels, in closed form. The UNet is trained to
denoise clean images of `toy.tip` with their captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import backbones
from ...errors import extra
from ...models.tip import model as tip
from ...models.tip.degradations import BLIND, Op, prompt
from ...models.tip.pipeline import TIPPipeline
from .. import encoders
from ..scenes import PHOTOGRAPHS
from .words import WordText

with extra("diffusion"):
    from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DConditionModel
    from diffusers.configuration_utils import register_to_config

NAME = "pocket_texture_prior"
KINDS = ("rows", "columns", "checks")  # of textures
CAPTIONS = (*(f"a picture with {kind}" for kind in KINDS), *(f"a photograph of a {name}" for name in PHOTOGRAPHS))
PATCH, CHANNELS = 4, 12
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
        block_out_channels: as of an `AutoencoderKL`; their number gives the factor, PATCH.
        scaling_factor: as of an `AutoencoderKL`; 1, as the components are whitened.
    """

    @register_to_config
    def __init__(self, block_out_channels: Sequence[int] = (CHANNELS,) * 3, scaling_factor: float = 1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3 * PATCH**2), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(CHANNELS, 3 * PATCH**2), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(CHANNELS), requires_grad=False)

    def encode(self, images: Tensor) -> SimpleNamespace:
        """Latents (n, L, H / p, W / p) of images in [-1, 1], as `latent_dist.mode()`; a sample is the mode."""
        rows = F.pixel_unshuffle(images, PATCH) - self.mean[:, None, None]
        z = torch.einsum("nchw,lc->nlhw", rows, self.basis) / self.deviation[:, None, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z, sample=lambda generator=None: z))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Images (n, 3, H, W) of latents, as `sample`."""
        rows = torch.einsum("nlhw,lc->nchw", z * self.deviation[:, None, None], self.basis)
        return SimpleNamespace(sample=F.pixel_shuffle(rows + self.mean[:, None, None], PATCH))


def text() -> WordText:
    """The frozen text encoder: all words of the toy captions and of the restoration prompts."""
    every = prompt([Op("blur", 1), Op("resize", 2), Op("noise", 0.1), Op("jpeg", 50)])
    with torch.random.fork_rng(devices=[]):  # its vectors have their own seed
        return WordText.of([*CAPTIONS, every, BLIND])


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


def times(count: int, device: torch.device) -> Tensor:
    """Timesteps (count,), 1000 u^0.7 with u uniform in [0, 1): noisy ones more often."""
    return (1000 * torch.rand(count, device=device) ** 0.7).long()


def build(fusion: str = "modulate", seed: int = 0) -> TIPPipeline:
    """A pipeline on the shipped prior, its adaptor of `fusion` before training, whose network for the image `seed`
    initialises.

    Raises `MissingWeights`, `CorruptFile`: the shipped file is missing, or differs from its model card.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts, state = {"vae": PatchPCA(), "unet": unet()}, backbones.read_state(encoders.weights_file(NAME))
        for name, part in parts.items():
            own = {n.removeprefix(f"{name}."): t.float() for n, t in state.items() if n.startswith(f"{name}.")}
            part.load_state_dict(own)
        found = PatchAdaptor.of(parts["unet"], CONDITIONING_CHANNELS, fusion=fusion)
        # again, because the fusions draw different numbers before it: adaptors of one seed start equal
        torch.manual_seed(seed)
        found.branch.controlnet_cond_embedding.conv_out.reset_parameters()
        return TIPPipeline(parts["vae"], text(), parts["unet"], found, scheduler())
