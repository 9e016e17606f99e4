"""How TIP's frozen parts at pocket scale were made: the autoencoder, and a text-conditioned UNet on its latents.

    python -m companion.toy.encoders.texture_prior      (a few minutes on one core)

The autoencoder is a principal component analysis of patches of 4x4 pixels, in closed form. Beside it stands the small
KL autoencoder of diffusers, trained for as many steps as the UNet, in the card: it blurs more, of 4 numbers a patch to
the 12 here, and costs minutes.
The UNet learns to denoise pictures of `pocket.restoration` with their captions, and sees none that is degraded.
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
from ...data.degradations import BLIND, Op, prompt
from ...errors import BadParameter
from ...evaluation.metrics.restoration import psnr
from ...models.tip import model as tip
from ...models.tip.pipeline import SIZES, TIPPipeline
from ...models.tip.text import WordText
from ...training.fit import fit
from .. import encoders
from ..datasets import restoration as pocket
from . import card

NAME = "pocket_texture_prior"
PATCH, CHANNELS = 4, 12
SEED = 1  # of the shipped pictures and weights; the study's pictures have others
STEPS, BATCH, RATE = 1500, 64, 3e-3
UNTOLD, POWER = 0.1, 0.7  # share of pictures without their caption; t is drawn as 1000 u^0.7
HINT = (48,)  # widths of the adaptor's network for the picture, after folding by 4


class PatchPCA(ModelMixin, ConfigMixin):
    """Whitened principal components of patches of pixels, with the face of an `AutoencoderKL`.

    A choice of ours for the pocket profile (section 14): linear, without a loss to train, exact on what it keeps.

    Args:
        patch: side of a patch, p.
        channels: components kept, L of the 3 p^2.
        block_out_channels: as an `AutoencoderKL`'s, of which the number says the factor.
        scaling_factor: likewise; the components are whitened already.
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
            raise BadParameter("patch", patch, f"{2 ** (len(block_out_channels) - 1)}, as block_out_channels says")
        self.mean = nn.Parameter(torch.zeros(3 * patch**2), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(channels, 3 * patch**2), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(channels), requires_grad=False)

    @torch.no_grad()
    def learn(self, pictures: Tensor) -> float:
        """Set the components to those of pictures (n, 3, H, W) in [-1, 1]; return the share of variance kept."""
        rows = self._rows(pictures).movedim(1, -1).flatten(0, -2).double()
        self.mean.copy_(rows.mean(0))
        values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T.cov())
        kept = values.argsort(descending=True)[: self.config.channels]
        basis = vectors[:, kept].T
        # the sign of an eigenvector is the solver's whim
        self.basis.copy_(basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign())
        self.deviation.copy_(values[kept].sqrt())
        return float(values[kept].sum() / values.sum())

    def _rows(self, pictures: Tensor) -> Tensor:
        """(n, 3 p^2, H / p, W / p): a patch's pixels as channels."""
        return F.pixel_unshuffle(pictures, self.config.patch)

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """Latents (n, L, H / p, W / p) of pictures in [-1, 1], as `latent_dist.mode()`; there is nothing to draw."""
        rows = self._rows(pictures) - self.mean[:, None, None]
        z = torch.einsum("nchw,lc->nlhw", rows, self.basis) / self.deviation[:, None, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z, sample=lambda generator=None: z))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Pictures (n, 3, H, W) of latents, as `sample`."""
        rows = torch.einsum("nlhw,lc->nchw", z * self.deviation[:, None, None], self.basis)
        return SimpleNamespace(sample=F.pixel_shuffle(rows + self.mean[:, None, None], self.config.patch))


# --- building ---------------------------------------------------------------------------------------------------------


def text() -> WordText:
    """The frozen text encoder: every word of the pocket captions and of the restoration prompts."""
    every = prompt([Op("blur", 1), Op("resize", 2), Op("noise", 0.1), Op("jpeg", 50)])
    with torch.random.fork_rng():  # its vectors have a seed of their own
        return WordText.of([*pocket.CAPTIONS, every, BLIND])


def scheduler() -> DDIMScheduler:
    """Zero terminal signal, x0 predicted, "trailing" steps (ours, section 14)."""
    return DDIMScheduler(**SIZES["pocket"]["scheduler"])


def unet() -> UNet2DConditionModel:
    """The pocket UNet on latents of 12 channels, untrained (torch's current seed)."""
    return UNet2DConditionModel(**SIZES["pocket"]["unet"] | {"in_channels": CHANNELS, "out_channels": CHANNELS})


def adaptor(net: UNet2DConditionModel, fusion: str = "modulate", mid: str | None = None) -> tip.Adaptor:
    """An adaptor of the UNet before training; its network for the picture is drawn from torch's current seed."""
    return tip.Adaptor.of(net, HINT, fusion=fusion, mid=mid, unshuffle=PATCH, hint_zero=False)


def build(fusion: str = "modulate", mid: str | None = None, seed: int = 0, prior: str = "trained") -> TIPPipeline:
    """A pipeline on the shipped prior, its adaptor before training.

    Args:
        fusion, mid: of the adaptor.
        seed: of what is drawn: the adaptor's network for the picture, and the UNet where it is untrained.
        prior: "trained", the shipped one, or "untrained".

    Raises:
        BadParameter: another `prior`.
        MissingWeights, CorruptFile: the shipped file is not there, or not the one that its card describes.
    """
    if prior not in ("trained", "untrained"):
        raise BadParameter("prior", prior, ("trained", "untrained"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"vae": PatchPCA(), "unet": unet()}
        if prior == "trained":
            state = backbones.read_state(encoders.weights_file(NAME))
            for name, part in parts.items():
                own = {n.removeprefix(f"{name}."): t.float() for n, t in state.items() if n.startswith(f"{name}.")}
                part.load_state_dict(own)
        found = adaptor(parts["unet"], fusion, mid)
        # once more, whatever the fusion drew before it: so adaptors of one seed begin alike
        torch.manual_seed(seed)
        found.branch.controlnet_cond_embedding.conv_out.reset_parameters()
        return TIPPipeline(parts["vae"], text(), parts["unet"], found, scheduler())


# --- training ---------------------------------------------------------------------------------------------------------


def shown(split: str, seed: int = SEED, counts: tuple[int, int] | None = None) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, 16, 16) in [-1, 1] and their captions."""
    found = pocket.pictures(split, seed, counts)
    images = torch.from_numpy(np.stack([picture.image for picture in found])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, [picture.caption for picture in found]


class Prior(nn.Module):
    """The UNet as `tip.loss` calls a model: it reads neither the degraded picture nor its text."""

    def __init__(self, net: UNet2DConditionModel):
        super().__init__()
        self.unet = net

    def forward(self, z: Tensor, t: Tensor, semantic: Tensor, *_: Tensor) -> Tensor:
        """The prediction (B, L, h, w) of z_t, t (B,) and states (B, M, d)."""
        return self.unet(z, t, semantic).sample


def train(seed: int = SEED, steps: int = STEPS) -> tuple[PatchPCA, UNet2DConditionModel, list[dict], float]:
    """Autoencoder and UNet from nothing, the history of the training, and the share of variance that is kept."""
    images, captions = shown("train", seed)
    vae, words = PatchPCA(), text()
    share = vae.learn(images)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = unet().requires_grad_(True)
    states = words(words.ids(captions))[0]
    empty, noise = words(words.ids([""]))[0], scheduler()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, semantic = batch
        semantic = torch.where(torch.rand(len(z), 1, 1) < UNTOLD, empty, semantic)
        return tip.loss(model, (z, z, semantic, semantic), noise, POWER)

    data = TensorDataset(tip.latents(vae, images), states)
    options = {"epochs": steps / (len(images) // BATCH), "batch": BATCH, "lr": RATE, "weight_decay": 0.01}
    history = fit(Prior(net), loss, data, seed=seed, accelerator="cpu", name="prior", **options)
    return vae, net, history, share


def train_kl(seed: int = SEED, steps: int = STEPS) -> AutoencoderKL:
    """diffusers' small KL autoencoder (section 3.6) on the same pictures, for comparison: squared error, KL by 1e-6."""
    images, _ = shown("train", seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(**SIZES["pocket"]["vae"])

    options = {"epochs": steps / (len(images) // BATCH), "batch": BATCH, "lr": 2e-3, "weight_decay": 0.0}
    fit(
        _Reconstruction(vae),
        lambda model, batch: model(*batch),
        TensorDataset(images),
        seed=seed,
        accelerator="cpu",
        name="KL autoencoder",
        **options,
    )
    return vae.eval()


class _Reconstruction(nn.Module):
    """The loss of a KL autoencoder."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        found = self.vae.encode(pictures).latent_dist
        return F.mse_loss(self.vae.decode(found.sample()).sample, pictures) + 1e-6 * found.kl().mean()


# --- measuring and shipping -------------------------------------------------------------------------------------------


@torch.no_grad()
def ceiling(vae: PatchPCA | AutoencoderKL, seed: int = SEED) -> dict[str, float]:
    """PSNR in dB of test scenes and test photographs that go through an autoencoder and back: the best a prior can."""
    images, _ = shown("test", seed)
    found = psnr(tip.pictures(vae, tip.latents(vae, images)) / 2 + 0.5, images / 2 + 0.5)
    count = pocket.COUNTS["test"][0]
    return {"scenes": round(float(found[:count].mean()), 2), "photographs": round(float(found[count:].mean()), 2)}


@torch.no_grad()
def measure(vae: PatchPCA, net: UNet2DConditionModel, seed: int = SEED) -> dict[str, float]:
    """On test pictures: the denoising loss with the right caption, none, and another's, at the same times and noise;
    and, in percent, how often a scene that is drawn from its caption alone has the texture that it says."""
    images, captions = shown("test", seed)
    pipe = TIPPipeline(vae, text(), net, adaptor(net), scheduler())
    z, generator = tip.latents(vae, images), torch.Generator().manual_seed(seed)
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
    """Train, measure, and write the weights and their card."""
    start = time.monotonic()
    vae, net, history, share = train(seed)
    seconds = round(time.monotonic() - start)
    state = {f"{name}.{n}": t for name, part in (("vae", vae), ("unet", net)) for n, t in part.state_dict().items()}
    head = {
        "library_name": "companion",
        "data": "drawn scenes of two colours under a texture, and cuts of the photographs that ship with scikit-image "
        "and scikit-learn, train layouts and train tiles only, each with its caption; nothing degraded",
        "command": "python -m companion.toy.encoders.texture_prior",
        "recipe": {
            "steps": STEPS,
            "batch": BATCH,
            "rate": RATE,
            "captions left out": UNTOLD,
            "power of t": POWER,
            "seed": seed,
        },
        "world": pocket.VERSION,
        "seconds": seconds,
        "parameters": sum(t.numel() for t in state.values()),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = unet()
    quality = {
        "variance kept": round(share, 4),
        "PSNR of the autoencoder": ceiling(vae, seed),
        "PSNR of a small KL autoencoder": ceiling(train_kl(seed), seed),
        "UNet": measure(vae, net, seed),
        "UNet untrained": measure(vae, plain, seed),
        "last loss": round(sum(row["loss"] for row in history[-50:]) / 50, 4),
    }
    return card.ship(folder / f"{NAME}.safetensors", state, head, quality, _CARD)


_CARD = """
# pocket_texture_prior

What TIP keeps frozen, at pocket scale: an autoencoder (whitened principal components of patches of 4x4 pixels, 12 of
48) and a text-conditioned UNet of diffusers on its latents (two levels, widths 32 and 48), which predicts the clean
latents. They stand in for a latent diffusion model such as Stable Diffusion. The text encoder (random frozen vectors
of words) needs no file.

`companion.toy.encoders.texture_prior.build()` gives the pipeline, with an adaptor before training.

**Measured** on pictures never seen in training: see `quality` above. `PSNR`: of pictures that go through the
autoencoder and back, beside diffusers' small KL autoencoder trained for as many steps as the UNet on the same pictures.
That one keeps 4 numbers for each 4x4 pixels, the components 12.
`loss`: of denoising, with the right caption, none, and another picture's, at times 300 to 999. `texture of its
caption`: how often, in percent, a scene drawn from noise and its caption alone shows the texture that the caption
names; chance is a third.

**Limits.** It knows three textures and 17 photographs at 16x16 pixels. Larger pictures go through, as everything in it
is a convolution or an attention without positions, but nothing larger than 16 pixels was learnt.
"""


if __name__ == "__main__":
    card.command(ship, seed=SEED)
