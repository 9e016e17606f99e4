"""TIP: restoration steered by two texts, what the picture shows and what to undo (Qi et al., ECCV 2024 as SPIRE).

    z_t, t, c_s --frozen UNet: encoder--> skips f_i, middle f_m
    z_t, t, c_r, y --adaptor--> (gamma_i, beta_i) at every skip and at the middle
    f_hat_i = (1 + s gamma_i) f_i + s beta_i --frozen UNet: decoder--> prediction

Neither the paper's text nor its code could be had; this is a RECONSTRUCTION on its pipeline figure and on diffusers'
ControlNet (section 3). The tag of each part says where it comes from:

* figure: two prompts, each read by one part alone; UNet and text encoder frozen; the degraded picture meets z_t at a
  plus sign, in the adaptor alone; each skip is multiplied by gamma, then beta is added, both from the adaptor's feature
  of that level.
* relative (diffusers' `ControlNetModel`): the adaptor is a copy of the UNet's encoder and middle with a small network
  for the picture; its 13 sites; zero convolutions.
* ours: the 1 beside gamma (from memory, not read; without it a start at zero would wipe the frozen model out)
  and gamma before beta in the channels; and, each a named argument, `mid`, `scale`, guidance, sampler, training.

That the paper may say "concatenate" where the figure has a plus sign needs no argument: a convolution of two inputs put
side by side is the sum of a convolution of each, which is what conv_in(z_t) + hint(y) is.

Shapes: B pictures (B, 3, H, W), latents (B, L, h, w) with h = H / f, texts (B, M, d); C_i channels at site i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, ConfigMixin, ControlNetModel, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter

FUSIONS = ("modulate", "add")  # the paper's figure; a plain ControlNet's
MIDS = ("modulate", "add", "none")

# --- the frozen UNet in two halves ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What the UNet's encoder and middle give."""

    time: Tensor  # (B, T) embedding of t
    skips: tuple[Tensor, ...]  # the sites, first to last
    mid: Tensor


# what of a UNet's configuration the two halves do not compute
_UNHANDLED = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_embedding_act_fn",
    "time_cond_proj_dim",
    "center_input_sample",
)


def check_unet(unet: UNet2DConditionModel) -> None:
    """Raises `BadParameter` where a UNet has inputs that Stable Diffusion 1 and 2 have not."""
    if found := {name: unet.config[name] for name in _UNHANDLED if unet.config.get(name)}:
        raise BadParameter("unet", found, "one whose inputs are z_t, t and one text (Stable Diffusion 1.x, 2.x)")
    if (kind := unet.config.mid_block_type) != "UNetMidBlock2DCrossAttn":
        raise BadParameter(
            "unet", f"mid_block_type {kind}", "one whose middle reads the text (Stable Diffusion 1.x, 2.x)"
        )


def encode(unet: UNet2DConditionModel, z: Tensor, t: Tensor, states: Tensor) -> Encoded:
    """The first half: z (B, L, h, w), t (B,) or (), states (B, M, d) of the semantic prompt."""
    time = unet.time_embedding(unet.get_time_embed(z, t))
    h = unet.conv_in(z)
    skips = (h,)
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        h, more = block(hidden_states=h, temb=time, **text)
        skips += more
    return Encoded(time, skips, unet.mid_block(h, time, encoder_hidden_states=states))


def decode(unet: UNet2DConditionModel, x: Encoded, states: Tensor) -> Tensor:
    """The second half: (B, L, h, w). With what `encode` gave unchanged, UNet2DConditionModel.forward bit for bit."""
    h, skips = x.mid, x.skips
    for block in unet.up_blocks:
        n = len(block.resnets)
        own, skips = skips[-n:], skips[:-n]
        more = {"upsample_size": skips[-1].shape[2:]} if skips else {}  # h, w that are no multiple of 2^levels
        if getattr(block, "has_cross_attention", False):
            more["encoder_hidden_states"] = states
        h = block(hidden_states=h, temb=x.time, res_hidden_states_tuple=own, **more)
    if unet.conv_norm_out:
        h = unet.conv_act(unet.conv_norm_out(h))
    return unet.conv_out(h)


# --- the adaptor and the fusion ---------------------------------------------------------------------------------------


def fuse(feature: Tensor, control: Tensor | None, scale: float | Tensor = 1.0) -> Tensor:
    """(1 + s gamma) f + s beta, element by element: the modulation fusion layer (section 3.4).

    Args:
        feature: f (B, C, h, w) of the frozen UNet.
        control: gamma, then beta, (B, 2C, h, w); (B, C, h, w) is beta alone, a plain ControlNet's; None: f as it is.
        scale: the dial s; 0 is exactly f.
    """
    if control is None:
        return feature
    control = control.to(feature.dtype)
    channels = feature.shape[1]
    if control.shape[1] == channels:
        return feature + scale * control
    gamma, beta = control.split(channels, 1)
    return (1 + scale * gamma) * feature + scale * beta


class Adaptor(ModelMixin, ConfigMixin):
    """The trained part: z_t, t, the restoration prompt and the degraded picture to (gamma, beta) at every site.

    diffusers' ControlNet, whose zero convolutions C -> C are replaced by zero convolutions C -> 2C. It saves and loads
    with `save_pretrained` and `from_pretrained`, which a ControlNet with exchanged modules does not.

    Args:
        controlnet: configuration of the `ControlNetModel`; `Adaptor.of` makes it from a UNet.
        fusion: "modulate" (figure), or "add", a plain ControlNet (the baseline).
        mid: what is done to the middle, which the figure does not draw (ours): "modulate", "add", or "none".
        unshuffle: the picture is first folded by this factor into channels (ours, for the pocket profile).
        hint_zero: the last convolution of the picture's network starts at zero, as ControlNet's; the fusion does so in
            any case.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        controlnet: dict,
        fusion: str = "modulate",
        mid: str = "modulate",
        unshuffle: int = 1,
        hint_zero: bool = True,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise BadParameter("fusion", fusion, FUSIONS)
        if mid not in MIDS or (fusion == "add" and mid == "modulate"):
            raise BadParameter("mid", mid, MIDS if fusion == "modulate" else ("add", "none"))
        self.branch = net = ControlNetModel.from_config(dict(controlnet))
        if fusion == "modulate":
            blocks = net.controlnet_down_blocks
            net.controlnet_down_blocks = nn.ModuleList(_zero_conv(b.in_channels, 2) for b in blocks)
        if mid == "modulate":
            net.controlnet_mid_block = _zero_conv(net.controlnet_mid_block.in_channels, 2)
        elif mid == "none":
            net.mid_block, net.controlnet_mid_block = None, nn.Identity()
        if not hint_zero:
            net.controlnet_cond_embedding.conv_out.reset_parameters()

    @classmethod
    def of(
        cls,
        unet: UNet2DConditionModel,
        hint: Sequence[int] = (16, 32, 96, 256),
        *,
        fusion: str = "modulate",
        mid: str | None = None,
        unshuffle: int = 1,
        hint_zero: bool = True,
    ) -> Adaptor:
        """An adaptor that starts as a copy of a UNet's encoder and middle.

        Args:
            hint: widths of the picture's network; each after the first halves height and width.
            mid: None: as `fusion`.
        """
        check_unet(unet)
        with torch.device("meta"):  # for its configuration alone
            copy = ControlNetModel.from_unet(unet, "rgb", tuple(hint), False, 3 * unshuffle**2)
        config = {k: v for k, v in copy.config.items() if not k.startswith("_")}
        adaptor = cls(config, fusion, fusion if mid is None else mid, unshuffle, hint_zero)
        ours = adaptor.branch
        with torch.no_grad():
            for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
                if getattr(ours, part) is not None:  # without a middle there is none to copy
                    getattr(ours, part).load_state_dict(getattr(unet, part).state_dict())
        return adaptor.to(unet.device)

    @property
    def factor(self) -> int:
        """How many pixels of the degraded picture one place of z_t stands for, on a side."""
        return self.config.unshuffle * 2 ** (len(self.config.controlnet["conditioning_embedding_out_channels"]) - 1)

    def forward(self, z: Tensor, t: Tensor, states: Tensor, picture: Tensor) -> tuple[Tensor | None, ...]:
        """A map for each skip and, last, for the middle: (B, 2 C_i, h_i, w_i), gamma first; (B, C_i, ...) where added.

        Args:
            z: z_t, (B, L, h, w).
            t: (B,) or ().
            states: (B, M, d) of the restoration prompt.
            picture: the degraded picture, (B, 3, H, W) in [-1, 1] as the VAE's (ours; ControlNet's are in [0, 1]).
        """
        if self.config.unshuffle > 1:
            picture = F.pixel_unshuffle(picture, self.config.unshuffle)
        skips, mid = self.branch(z, t, states, picture, return_dict=False)
        return (*skips, None if self.config.mid == "none" else mid)


def _zero_conv(channels: int, times: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, times * channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class TIP(nn.Module):
    """Frozen UNet, trained adaptor, and, to be trained, the frozen text encoder.

    Args:
        unet: without class or added embeddings. It is frozen here.
        adaptor: of that UNet.
        text: maps ids (B, M) to (states, ...); None where only states are given. It is frozen here.
    """

    def __init__(self, unet: UNet2DConditionModel, adaptor: Adaptor, text: nn.Module | None = None):
        super().__init__()
        check_unet(unet)
        self.unet, self.adaptor, self.text = unet, adaptor, text
        for part in (unet, text):
            if part is not None:
                part.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        for part in (self.unet, self.text):
            if part is not None:
                part.eval()
        return self

    def states(self, text: Tensor) -> Tensor:
        """States (B, M, d) of ids (B, M) int64; states are given back as they are (encoded once, and kept)."""
        if text.is_floating_point():
            return text
        with torch.no_grad():
            return self.text(text)[0]

    def encode(self, z: Tensor, t: Tensor, semantic: Tensor) -> Encoded:
        """The frozen half that no trained tensor is upstream of: without a graph, unless z needs one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
            return encode(self.unet, z.to(self.unet.dtype), t, semantic.to(self.unet.dtype))

    def fused(self, x: Encoded, maps: Sequence[Tensor | None], scale: float | Tensor, semantic: Tensor) -> Tensor:
        """The prediction from the encoder's features and the adaptor's maps. Only copies of the skips are changed."""
        skips = tuple(fuse(f, m, scale) for f, m in zip(x.skips, maps[:-1], strict=True))
        fused = Encoded(x.time, skips, fuse(x.mid, maps[-1], scale))
        return decode(self.unet, fused, semantic.to(self.unet.dtype))

    def forward(
        self, z: Tensor, t: Tensor, semantic: Tensor, restoration: Tensor, picture: Tensor, scale: float | Tensor = 1.0
    ) -> Tensor:
        """What the scheduler's `prediction_type` names, (B, L, h, w).

        Args:
            z: z_t, (B, L, h, w).
            t: (B,).
            semantic, restoration: ids (B, M) or states (B, M, d) of c_s, for the UNet, and c_r, for the adaptor.
            picture: degraded, (B, 3, H, W) in [-1, 1].
            scale: the dial s.
        """
        semantic, restoration = self.states(semantic), self.states(restoration)
        x = self.encode(z, t, semantic)
        return self.fused(x, self.adaptor(z, t, restoration, picture), scale, semantic)


# --- training ---------------------------------------------------------------------------------------------------------


def target(scheduler: DDIMScheduler, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict of clean latents, by the scheduler's configuration: noise, x0 or v."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(z, noise, t)
    if kind not in ("epsilon", "sample"):
        raise BadParameter("prediction_type", kind, ("epsilon", "sample", "v_prediction"))
    return noise if kind == "epsilon" else z


def loss(
    model: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    scheduler: DDIMScheduler,
    power: float = 1.0,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prediction: the standard loss of latent diffusion (inferred, section 4).

    Args:
        model: a `TIP`, or what wraps one.
        batch: clean latents (B, L, h, w), scaled; degraded pictures (B, 3, H, W) in [-1, 1]; c_s and c_r as ids or
            states.
        power: t is drawn as 1000 u^power; 1 is uniform, less draws the noisy end more often (section 14).
        t, noise: given instead of drawn, for comparisons.
    """
    z, picture, semantic, restoration = batch
    if t is None:
        u = torch.rand(len(z), device=z.device) ** power
        t = (u * scheduler.config.num_train_timesteps).long()
    if noise is None:
        noise = torch.randn_like(z)
    found = model(scheduler.add_noise(z, noise, t), t, semantic, restoration, picture)
    return F.mse_loss(found.float(), target(scheduler, z, noise, t).float())


@torch.no_grad()
def latents(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scaled latents (B, L, h, w) of pictures (B, 3, H, W) in [-1, 1], without a graph.

    The mean of the VAE's posterior, so that they can be computed once and kept (ours); with `generator` a draw from it.
    """
    found = vae.encode(pictures.to(vae.dtype)).latent_dist
    z = found.mode() if generator is None else found.sample(generator)
    return z * vae.config.scaling_factor


@torch.no_grad()
def pictures(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of scaled latents, clamped."""
    return vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample.clamp(-1, 1)
