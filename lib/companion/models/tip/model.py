"""TIP: image restoration steered by a semantic and a restoration prompt (Qi et al., ECCV 2024 as SPIRE).

    z_t, t, c_s --frozen UNet: encoder--> skips f_i, middle f_m
    z_t, t, c_r, y --adaptor--> (gamma_i, beta_i) at every skip and at the middle
    f_hat_i = (1 + s gamma_i) f_i + s beta_i --frozen UNet: decoder--> prediction

Neither the paper's text nor its code is available; this is a RECONSTRUCTION from its pipeline figure and diffusers'
ControlNet. Sources of the parts:

* figure: two prompts, each read by one part alone; UNet and text encoder frozen; the degraded image is added to z_t in
  the adaptor alone; each skip times gamma plus beta, both from the adaptor's feature of that level.
* diffusers' `ControlNetModel`: the adaptor is a copy of the UNet's encoder and middle with a small network that embeds
  the image; its 13 sites; zero convolutions.
* ours: the 1 next to gamma (without it a zero initialisation would erase the frozen features); gamma before beta in the
  channels; the fusion of the middle, `scale`, guidance, sampler, training.

Whether the paper adds or concatenates the image makes no difference: a convolution of two concatenated inputs is the
sum of a convolution of each, which is conv_in(z_t) + conditioning(y).

Shapes: B images (B, 3, H, W), latents (B, L, h, w) with h = H / f, prompts (B, M, d); C_i channels at site i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter, check_choice, extra
from ..layers.frozen import frozen_copy

with extra("diffusion"):
    from diffusers import AutoencoderKL, ConfigMixin, ControlNetModel, DDIMScheduler, ModelMixin, UNet2DConditionModel
    from diffusers.configuration_utils import register_to_config

# --- the frozen UNet in two halves ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Features of the UNet's encoder and middle."""

    time: Tensor  # (B, T) embedding of t
    skips: tuple[Tensor, ...]  # the sites, first to last
    mid: Tensor


# options of a UNet's configuration that the two halves do not compute
_UNHANDLED = {"class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"}
_UNHANDLED |= {"time_embedding_act_fn", "time_cond_proj_dim", "center_input_sample"}


def frozen(module: nn.Module) -> nn.Module:
    """A module in eval mode without gradients: itself when it is so already, else a copy that shares its tensors."""
    trained = module.training or any(p.requires_grad for p in module.parameters())
    return frozen_copy(module) if trained else module


def encode(unet: UNet2DConditionModel, z: Tensor, t: Tensor, states: Tensor) -> Encoded:
    """Encoder and middle of a UNet: z (B, L, h, w), t (B,) or (), states (B, M, d) of the semantic prompt."""
    time = unet.time_embedding(unet.get_time_embed(z, t))
    h = unet.conv_in(z)
    skips = (h,)
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        h, more = block(hidden_states=h, temb=time, **text)
        skips += more
    return Encoded(time, skips, unet.mid_block(h, time, encoder_hidden_states=states))


def decode(unet: UNet2DConditionModel, x: Encoded, states: Tensor) -> Tensor:
    """Decoder of a UNet, to (B, L, h, w); of unchanged `encode` features UNet2DConditionModel.forward bit for bit."""
    h, skips = x.mid, x.skips
    for block in unet.up_blocks:
        n = len(block.resnets)
        own, skips = skips[-n:], skips[:-n]
        more = {"upsample_size": skips[-1].shape[2:]} if skips else {}  # h, w not a multiple of 2^levels
        if getattr(block, "has_cross_attention", False):
            more["encoder_hidden_states"] = states
        h = block(hidden_states=h, temb=x.time, res_hidden_states_tuple=own, **more)
    if unet.conv_norm_out:
        h = unet.conv_act(unet.conv_norm_out(h))
    return unet.conv_out(h)


# --- the adaptor and the fusion ---------------------------------------------------------------------------------------


def fuse(feature: Tensor, control: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """(1 + s gamma) f + s beta, element by element: the modulation fusion layer.

    Args:
        feature: f (B, C, h, w) of the frozen UNet.
        control: gamma, then beta, (B, 2C, h, w); (B, C, h, w): beta alone (a plain ControlNet).
        scale: s; 0 gives exactly f.
    """
    control = control.to(feature.dtype)
    if control.shape == feature.shape:
        return feature + scale * control
    gamma, beta = control.chunk(2, 1)
    return (1 + scale * gamma) * feature + scale * beta


class Adaptor(ModelMixin, ConfigMixin):
    """The trained part: z_t, t, the restoration prompt and the degraded image to (gamma, beta) at every site.

    diffusers' ControlNet with its zero convolutions C -> C replaced by zero convolutions C -> 2C. `save_pretrained` and
    `from_pretrained` work, unlike for a ControlNet with exchanged modules.

    Args:
        controlnet: configuration of the `ControlNetModel`; `Adaptor.of` makes it from a UNet.
        fusion: "modulate" (figure; also of the middle, which it does not draw), or "add", a plain ControlNet (the
            baseline).
    """

    _supports_gradient_checkpointing = True
    channels = 3  # of the image that its network reads

    @register_to_config
    def __init__(self, controlnet: dict, fusion: str = "modulate"):
        super().__init__()
        check_choice("fusion", fusion, ("modulate", "add"))
        self.branch = net = ControlNetModel.from_config(dict(controlnet))
        if fusion == "modulate":
            blocks = net.controlnet_down_blocks
            net.controlnet_down_blocks = nn.ModuleList(_zero_conv(b.in_channels) for b in blocks)
            net.controlnet_mid_block = _zero_conv(net.controlnet_mid_block.in_channels)

    @classmethod
    def of(
        cls,
        unet: UNet2DConditionModel,
        conditioning_channels: Sequence[int] = (16, 32, 96, 256),
        *,
        fusion: str = "modulate",
    ) -> Self:
        """An adaptor that starts as a copy of a UNet's encoder and middle.

        Args:
            conditioning_channels: widths of the image's network; each after the first halves height and width.
        """
        with torch.device("meta"):  # for its configuration alone
            stock = ControlNetModel.from_unet(unet, "rgb", tuple(conditioning_channels), False, cls.channels)
        adaptor = cls({k: v for k, v in stock.config.items() if not k.startswith("_")}, fusion)
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(adaptor.branch, name).load_state_dict(getattr(unet, name).state_dict())
        return adaptor.to(unet.device)

    @property
    def factor(self) -> int:
        """Pixels of the degraded image per position of z_t, along a side."""
        return 2 ** (len(self.config.controlnet["conditioning_embedding_out_channels"]) - 1)

    def forward(self, z: Tensor, t: Tensor, states: Tensor, degraded: Tensor) -> tuple[Tensor, ...]:
        """A map for each skip and, last, for the middle: (B, 2 C_i, h_i, w_i), gamma first; (B, C_i, ...) where added.

        Args:
            z: z_t, (B, L, h, w).
            t: (B,) or ().
            states: (B, M, d) of the restoration prompt.
            degraded: the degraded image, (B, 3, H, W) in [-1, 1] as for the VAE (ours; ControlNet's are in [0, 1]).
        """
        skips, mid = self.branch(z, t, states, degraded, return_dict=False)
        return (*skips, mid)


def _zero_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, 2 * channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class TIP(nn.Module):
    """A frozen UNet, its adaptor, which is trained, and optionally the frozen text encoder.

    UNet and text encoder of the caller stay as they are: see `frozen`.

    Args:
        unet: without class or added embeddings.
        adaptor: of that UNet.
        text: maps ids (B, M) to (states, ...); None where only states are given.

    Raises `BadParameter`: the UNet has inputs that Stable Diffusion 1 and 2 do not have.
    """

    def __init__(self, unet: UNet2DConditionModel, adaptor: Adaptor, text: nn.Module | None = None):
        super().__init__()
        if unhandled := {name: unet.config[name] for name in _UNHANDLED if unet.config.get(name)}:
            raise BadParameter("unet", unhandled, "one whose inputs are z_t, t and one prompt (Stable Diffusion 1, 2)")
        self.unet, self.adaptor, self.text = frozen(unet), adaptor, None if text is None else frozen(text)

    def train(self, mode: bool = True):
        super().train(mode)
        for part in (self.unet, self.text):
            if part is not None:
                part.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the adaptor and the UNet in the backward pass, to save memory."""
        for part in (self.adaptor.branch, self.unet):
            getattr(part, f"{'enable' if enable else 'disable'}_gradient_checkpointing")()

    def states(self, text: Tensor) -> Tensor:
        """States (B, M, d) of ids (B, M) int64; states are returned as they are, so they can be encoded in advance."""
        with torch.no_grad():
            return text if text.is_floating_point() or self.text is None else self.text(text)[0]

    def encode(self, z: Tensor, t: Tensor, semantic: Tensor) -> Encoded:
        """`encode` of the frozen UNet, in its dtype; without a graph, unless z requires a gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
            return encode(self.unet, z.to(self.unet.dtype), t, semantic.to(self.unet.dtype))

    def fused(self, x: Encoded, maps: Sequence[Tensor], scale: float | Tensor, semantic: Tensor) -> Tensor:
        """The prediction from the encoder's features, which stay unchanged, and the adaptor's maps."""
        skips = tuple(fuse(f, m, scale) for f, m in zip(x.skips, maps[:-1], strict=True))
        fused = Encoded(x.time, skips, fuse(x.mid, maps[-1], scale))
        return decode(self.unet, fused, semantic.to(self.unet.dtype))

    def forward(
        self, z: Tensor, t: Tensor, semantic: Tensor, restoration: Tensor, degraded: Tensor, scale: float | Tensor = 1.0
    ) -> Tensor:
        """The prediction, (B, L, h, w): noise, x0 or v by the scheduler's `prediction_type`.

        Args:
            z: z_t, (B, L, h, w).
            t: (B,).
            semantic, restoration: ids (B, M) or states (B, M, d) of c_s, for the UNet, and c_r, for the adaptor.
            degraded: the degraded image, (B, 3, H, W) in [-1, 1].
            scale: s of the fusion.
        """
        semantic, restoration = self.states(semantic), self.states(restoration)
        x = self.encode(z, t, semantic)
        return self.fused(x, self.adaptor(z, t, restoration, degraded), scale, semantic)


# --- training ---------------------------------------------------------------------------------------------------------


def target(scheduler: DDIMScheduler, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The regression target of clean latents, by the scheduler's configuration: noise, x0 or v."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(z, noise, t)
    return {"epsilon": noise, "sample": z}[kind]


def loss(
    model: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    scheduler: DDIMScheduler,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prediction: the standard loss of latent diffusion (inferred).

    Args:
        model: a `TIP`, or a wrapper of one.
        batch: clean latents (B, L, h, w), scaled; degraded images (B, 3, H, W) in [-1, 1]; ids or states of c_s, c_r.
        t, noise: given instead of drawn, t from all timesteps alike.
    """
    z, degraded, semantic, restoration = batch
    if t is None:
        t = (torch.rand(len(z), device=z.device) * scheduler.config.num_train_timesteps).long()
    if noise is None:
        noise = torch.randn_like(z)
    predicted = model(scheduler.add_noise(z, noise, t), t, semantic, restoration, degraded)
    return F.mse_loss(predicted.float(), target(scheduler, z, noise, t).float())


@torch.no_grad()
def to_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (B, L, h, w) of images (B, 3, H, W) in [-1, 1], without a graph.

    The mean of the VAE's posterior, so that latents can be cached (ours).
    """
    return vae.encode(images.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def to_images(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of scaled latents, clamped."""
    return vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample.clamp(-1, 1)
