"""TIP's training step, denoising pass and sampling compared with plain passes of UNet and ControlNet.

The reference is diffusers' own: `ControlNetModel` and `UNet2DConditionModel.forward` with added residuals, the UNet
frozen. The network is Stable Diffusion 1.5's at two fifths of its width, so that all networks fit in memory at once.
Modulation adds 1x1 convolutions of twice the width and one product per skip connection. With guidance TIP calls its
adaptor once for both prompts, a stock pipeline once for each. The last comparison is at toy scale: 8 images of 64
pixels, 20 steps.
"""

from __future__ import annotations

import os

os.environ["COMPANION_PROGRESS"] = "off"

import bench
import torch
from bench import Step
from diffusers import ControlNetModel

from companion.models.tip import TIP, TIPPipeline, build
from companion.toy.encoders import texture_prior

NARROW = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768}
COUNT, SIDE, STEPS = 2, 16, 20


def given() -> dict[str, torch.Tensor]:
    """A batch at 128 pixels: latents, times, states of both prompts, the degraded image."""
    generator = torch.Generator().manual_seed(0)
    return {
        "z": torch.randn(COUNT, 4, SIDE, SIDE, generator=generator),
        "t": torch.tensor([100, 800]),
        "semantic": torch.randn(COUNT, 77, 768, generator=generator),
        "restoration": torch.randn(COUNT, 77, 768, generator=generator),
        "degraded": torch.rand(COUNT, 3, 8 * SIDE, 8 * SIDE, generator=generator) * 2 - 1,
    }


def pipeline() -> TIPPipeline:
    torch.manual_seed(0)
    small = {"hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    return build("sd15", unet=NARROW, text=small, vae={"block_out_channels": (32,) * 4, "layers_per_block": 1})


def ours() -> TIP:
    return pipeline().model.train()


class Plain(torch.nn.Module):
    """diffusers' UNet, frozen, and its ControlNet."""

    def __init__(self):
        super().__init__()
        self.unet = pipeline().unet.requires_grad_(False)
        self.controlnet = ControlNetModel.from_unet(self.unet)

    def forward(self, z, t, semantic, restoration, degraded) -> torch.Tensor:
        down, mid = self.controlnet(z, t, restoration, degraded, return_dict=False)
        return self.unet(z, t, semantic, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


def training(make) -> Step:
    model, batch = make(), given()

    def step() -> None:
        model(**batch).square().mean().backward()
        model.zero_grad()

    return step


def forward(make) -> Step:
    model, batch = make(), given()

    def step() -> None:
        with torch.no_grad():
            model(**batch)

    return step


def our_training() -> Step:
    return training(ours)


def plain_training() -> Step:
    return training(Plain)


def our_forward() -> Step:
    return forward(ours)


def plain_forward() -> Step:
    return forward(Plain)


def our_guided() -> Step:
    """One step of the pipeline with guidance on c_s, without VAE and text encoder."""
    model, x = ours(), given()
    both = torch.cat([x["semantic"], torch.zeros_like(x["semantic"])])

    def step() -> None:
        with torch.no_grad():
            z, t = x["z"].repeat(2, 1, 1, 1), x["t"].repeat(2)
            maps = model.adaptor(x["z"], x["t"], x["restoration"], x["degraded"])
            model.fused(model.encode(z, t, both), [m.repeat(2, 1, 1, 1) for m in maps], 1.0, both)

    return step


def plain_guided() -> Step:
    model = Plain()
    doubled = {name: torch.cat([value, value]) for name, value in given().items()}

    def step() -> None:
        with torch.no_grad():
            model(**doubled)

    return step


def pocket() -> TIPPipeline:
    torch.manual_seed(0)
    unet = texture_prior.UNET | {"in_channels": 4, "out_channels": 4}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vae = {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return build("sd15", unet=unet, vae=vae, text=text, conditioning_channels=(16, 24, 32))


def our_pocket() -> Step:
    """Sampling at toy scale, including text encoder and VAE."""
    pipe, images = pocket(), torch.rand(8, 3, 64, 64)
    return lambda: pipe(images, "a picture", steps=STEPS)


def plain_pocket() -> Step:
    """The same number of passes of UNet and ControlNet of that size."""
    pipe, images = pocket(), torch.rand(8, 3, 64, 64) * 2 - 1
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 24, 32))
    z, states = torch.randn(8, 4, 16, 16), pipe.states(["a picture"] * 8)

    def step() -> None:
        with torch.no_grad():
            for t in torch.linspace(999, 49, STEPS):
                down, mid = controlnet(z, t, states, images, return_dict=False)
                pipe.unet(z, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid)

    return step


def main() -> None:
    makers = {
        "training step": our_training,
        "UNet and ControlNet, training step": plain_training,
        "denoising pass": our_forward,
        "UNet and ControlNet, forward": plain_forward,
        "denoising pass with guidance": our_guided,
        "UNet and ControlNet on both texts": plain_guided,
        "pocket: 8 images of 64 px, 20 steps": our_pocket,
        "pocket: UNet and ControlNet, 20 times": plain_pocket,
    }
    names = list(makers)
    bench.run(
        "tip",
        f"Stable Diffusion 1.5 at two fifths of its width, {COUNT} images of {8 * SIDE} px; pocket size",
        makers,
        [
            ("training step / plain UNet and ControlNet", names[0], names[1]),
            ("denoising pass / plain UNet and ControlNet", names[2], names[3]),
            ("with guidance / plain UNet and ControlNet on both texts", names[4], names[5]),
            ("pocket, 8 images of 64 px in 20 steps / plain UNet and ControlNet", names[6], names[7]),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()
