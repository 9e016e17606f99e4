"""The self-supervised teachers of DMT: how MAE and MoCo v3 are trained, and where released teachers come from.

    MAE      predicts the pixels of the masked three quarters of patches           (He et al., CVPR 2022)
    MoCo v3  matches two views of an image among those of a batch                  (Chen et al., ICCV 2021)
    iBOT, DINO: `layers.dino.SelfDistillation`

All follow their official codes, written from scratch and checked against outputs recorded from them: mae at
efb2a80 and moco-v3 at c349e6e of facebookresearch (CC BY-NC 4.0), ibot at da316d8 of bytedance and dino at 7c446df of
facebookresearch (Apache 2.0). That DMT's three teachers are MAE, MoCo v3 and iBOT is inferred from its successor.

The encoder is `ViT` in all of them. Each is a module from a batch to its loss, which `fit` trains; moving averages of
weights are buffers, so that a resumed training is bit-identical.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import check_state, find_weights, hub_file, read_state
from ...errors import BadParameter, CorruptFile, MissingWeights, check_choice
from ...ops import unpickle
from ...training.callbacks import EMA, ema_copy
from ..layers import state_dicts
from ..layers.dino import half_cosine
from ..layers.mae import masked_pixel_loss, normalised, patchify, random_mask
from .vit import Decoder, ViT, build, visible

# source of a released ViT-Base/16: position embedding, timm's name or the hub's repository, and its file or link
RELEASED = {
    "MAE": ("mae", "vit_base_patch16_224.mae", "facebookresearch/mae, mae_pretrain_vit_base.pth"),
    "MoCo v3": ("mocov3", "nyu-visionx/moco-v3-vit-b", "facebookresearch/moco-v3, vit-b-300ep.pth.tar"),
    "iBOT": ("learned", "", "bytedance/ibot, vitb_16/checkpoint_teacher.pth"),
    "DINO": ("learned", "vit_base_patch16_224.dino", "facebookresearch/dino, dino_vitbase16_pretrain.pth"),
}


# --- released teachers ------------------------------------------------------------------------------------------------


def released(name: str, weights: str | Path = "pretrained", *, download: bool = False) -> ViT:
    """A teacher at paper size, ViT-Base/16, by its name in `RELEASED`, in eval mode.

    Args:
        weights: "pretrained": timm's release of MAE and DINO; of MoCo v3 an unofficial mirror on the hub; iBOT has
            neither. "random" (torch's current seed), or an official file, see `read`.
        download: download weights that are not in the cache.

    Raises:
        BadParameter: unknown name, or a missing file.
        MissingWeights: they are not cached, and downloading is off or fails.
        CorruptFile, BadCheckpoint: the file cannot be read, or is of another model.
    """
    check_choice("teacher", name, RELEASED)
    positions, pretrained, source = RELEASED[name]
    if weights == "random":
        return build("base", positions=positions).eval()
    if weights != "pretrained":
        if not Path(weights).is_file():
            raise BadParameter("weights", str(weights), "'pretrained', 'random' or an existing file")
        return ViT.from_official(read(weights), what=f"{name}, ViT-Base/16")
    if not pretrained:
        way = f"the file of {source}: give its path as weights"
        raise MissingWeights(f"{name}, ViT-Base/16", Path(), [way])
    if pretrained.startswith("vit_"):
        path = find_weights(pretrained, download=download)
    else:
        path = hub_file(name, pretrained, ["model.safetensors"], download)
    return ViT.from_official(read(path), what=f"{name}, ViT-Base/16")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a released file: MAE's (under "model"), MoCo v3's and iBOT's backbone ("state_dict"), iBOT's and
    DINO's full checkpoint (its "teacher"), or a plain state dict. Raises `CorruptFile`."""
    try:
        return read_state(path)
    except CorruptFile as error:
        if Path(path).suffix == ".safetensors":
            raise
        reason = error.reason
    whole = unpickle.load_torch(path)
    state = whole.get("teacher") if isinstance(whole, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptFile(path, f"{reason}; no 'model', 'state_dict' or 'teacher' with named tensors in it")
    check_state(path, state)
    return state


# --- objectives -------------------------------------------------------------------------------------------------------


class MAE(state_dicts.OfficialModel):
    """A masked autoencoder: images to the loss on their masked patches.

    Args:
        encoder: trained in place; it receives the visible patches.
        decoder: its width, depth and heads.
        mask_ratio: share of hidden patches.
        normalise: predict pixels standardised by each patch's own mean and std (norm_pix_loss, on in the released
            training).
    """

    def __init__(
        self,
        encoder: ViT,
        decoder: tuple[int, int, int] = (512, 8, 16),
        *,
        mask_ratio: float = 0.75,
        normalise: bool = True,
    ):
        super().__init__()
        positions = "mae" if encoder.positions == "learned" else encoder.positions
        self.encoder, self.mask_ratio, self.normalise = encoder, mask_ratio, normalise
        self.decoder = Decoder(encoder.width, *decoder, encoder.grid, positions)
        self.pixels = nn.Linear(decoder[0], 3 * encoder.patch**2)
        nn.init.xavier_uniform_(self.pixels.weight)
        nn.init.zeros_(self.pixels.bias)
        visible(encoder.patches, mask_ratio)

    def forward(self, images: Tensor, noise: Tensor | None = None, trace: dict | None = None) -> Tensor:
        """The loss of images (B, 3, S, S).

        Args:
            noise: (B, L) the patches with the least of it are visible; None: drawn.
            trace: receives "keep" (B, V), "hidden" (B, L), "latent" (B, 1 + V, D), "pixels" and "target" (B, L, p p 3).
        """
        patches = self.encoder.patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        keep, hidden = random_mask(noise, visible(patches, self.mask_ratio))
        latent = self.encoder(images, keep)
        pixels = self.pixels(self.decoder(latent, keep)[:, 1:])
        target = patchify(images, self.encoder.patch)
        if self.normalise:
            target = normalised(target)
        if trace is not None:
            trace |= {"keep": keep, "hidden": hidden, "latent": latent, "pixels": pixels, "target": target}
        return masked_pixel_loss(pixels, target, hidden)

    def official_names(self) -> dict[str, str]:
        """Our names -> the authors'."""
        names = {}
        for name in self.state_dict():
            official = name.removeprefix("encoder.").replace("pixels.", "decoder_pred.")
            official = official.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")
            names[name] = official
        return names

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, decoder_heads: int = 16) -> MAE:
        """The model of an official pre-training file, decoder included, in eval mode. Raises `BadCheckpoint`.

        Args:
            heads, decoder_heads: not in the tensors. None: one for 64 channels of the encoder.
        """
        encoder = ViT.from_official(state, heads, "MAE's encoder")
        what = "MAE with its decoder (files of the encoder alone have none)"
        state_dicts.check_names(state, ("decoder_embed.weight", "decoder_blocks.0.norm1.weight"), what)
        depth = state_dicts.depth(state, "decoder_blocks.")
        model = cls(encoder, (len(state["decoder_embed.weight"]), depth, decoder_heads))
        state_dicts.load_official(model, state, model.official_names(), "MAE with its decoder")
        return model.eval()


def mlp(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """MoCo v3's heads: linear layers without bias, batch norm and ReLU between, a last batch norm without affine."""
    steps: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        steps.append(nn.Linear(inputs if i == 0 else hidden, outputs if last else hidden, bias=False))
        steps += [nn.BatchNorm1d(outputs, affine=False)] if last else [nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*steps)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of each query (B, E) with its key among all of the batch, of all workers, times 2 T."""
    q, k = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1).detach()
    rank = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        parts = [torch.empty_like(k) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, k.contiguous())
        k = torch.cat(parts)
    labels = torch.arange(len(q), device=q.device) + rank * len(q)
    return F.cross_entropy(q @ k.T / temperature, labels) * (2 * temperature)


class MoCo(nn.Module):
    """MoCo v3: two views of each image to the loss.

    Args:
        encoder: copied; the copy, `encoder`, is trained, and is what the official linear probe loads.
        hidden, outputs: of the projector (three layers) and the predictor (two).
        temperature: T.
        frozen_patches: leave the patch projection at its initial weights, as released; the pocket model trains it.
    """

    def __init__(
        self,
        encoder: ViT,
        hidden: int = 4096,
        outputs: int = 256,
        *,
        temperature: float = 0.2,
        frozen_patches: bool = True,
    ):
        super().__init__()
        if temperature <= 0:
            raise BadParameter("temperature", temperature, "above 0")
        self.encoder, self.temperature = copy.deepcopy(encoder), temperature
        self.projector = mlp(encoder.width, hidden, outputs, 3)
        self.predictor = mlp(outputs, hidden, outputs, 2)
        self.encoder.patch_embed.requires_grad_(not frozen_patches)
        self.key_encoder, self.key_projector = ema_copy(self.encoder), ema_copy(self.projector)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric loss of two views (B, 3, S, S)."""
        views = (first, second)
        q = [self.predictor(self.projector(self.encoder(x)[:, 0])) for x in views]
        with torch.no_grad():
            k = [self.key_projector(self.key_encoder(x)[:, 0]) for x in views]
        return contrastive_loss(q[0], k[1], self.temperature) + contrastive_loss(q[1], k[0], self.temperature)

    def ema(self, steps: int, momentum: float = 0.99) -> EMA:
        """The callback that updates the key encoder, its momentum rising to 1 over `steps`.

        The released code updates it before the keys of a step are computed, with the momentum of that step. An update
        after the previous step is equivalent: at the first step both encoders are equal.
        """
        if not 0 < momentum <= 1:
            raise BadParameter("momentum", momentum, "above 0, up to 1")
        pairs = [(self.key_encoder, self.encoder), (self.key_projector, self.projector)]
        return EMA(pairs, lambda step: half_cosine(momentum, 1.0, step, steps))
