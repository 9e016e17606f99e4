"""Masked autoencoders (He et al., CVPR 2022): patches of pixels, random masks, decoder, the loss on hidden patches.

Shapes: B images, N patches (K of them visible), the [CLS] token first, D and E the widths of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...backbones import check_input
from ...errors import BadParameter, Count, Share
from ...io.config import configure
from .heads import vit_sizes
from .pos_embed import resize_pos_embed, sincos_table
from .state_dicts import OfficialModel, check_names, depth

# --- patches and masks ------------------------------------------------------------------------------------------------


def patchify(images: Tensor, patch: int) -> Tensor:
    """Patches of pixels (B, h h, p p 3) of square images (B, 3, h p, h p); within a patch by row, column, channel.

    Raises `BadParameter`: images that are not square, which `unpatchify` could not tell."""
    if images.shape[-1] != images.shape[-2]:
        raise BadParameter("images", tuple(images.shape), "square images (B, 3, H, H)")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Square images (B, 3, H, H) of patches (B, N, p p 3): the inverse of `patchify`."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch, q=patch)


def visible(patches: int, ratio: float) -> int:
    """The number of visible patches when the share `ratio` is masked: N (1 - ratio) rounded down, as in MAE."""
    count = int(patches * (1 - ratio))
    if not 0 < count <= patches:
        raise BadParameter("mask_ratio", ratio, f"0 or more, and one that leaves a patch of {patches}")
    return count


def random_mask(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """The visible patches (B, visible), those with the least noise (B, N), and the mask (B, N): 1 where hidden."""
    keep = noise.argsort(1)[:, :visible]
    return keep, torch.ones_like(noise).scatter(1, keep, 0)


def normalised(patches: Tensor) -> Tensor:
    """Patches with their own mean and standard deviation removed (`norm_pix_loss` of the official code)."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_pixel_loss(pixels: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """The mean squared error over the hidden patches; pixels, target (B, N, p p 3), hidden (B, N) 1 or 0."""
    return ((pixels - target).square().mean(-1) * hidden).sum() / hidden.sum()


# --- tokens -----------------------------------------------------------------------------------------------------------


def plain_input(vit: nn.Module) -> bool:
    """Whether the blocks of a timm ViT read a [CLS] token and the patches, each with its position, and nothing else.

    That is: no register tokens, no norm before the blocks (as CLIP's have), patches that are a sequence already.
    """
    return (
        isinstance(vit, VisionTransformer)
        and vit.num_prefix_tokens == 1
        and vit.pos_embed is not None
        and vit.pos_embed.shape[1] == 1 + vit.patch_embed.num_patches
        and not vit.dynamic_img_size
        and isinstance(vit.norm_pre, nn.Identity)
    )


PLAIN_INPUT = "a timm VisionTransformer with a [CLS] token that has a position, and no norm before its blocks"


def visible_tokens(vit: nn.Module, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
    """The input of the blocks of a timm ViT of `plain_input`: (B, 1 + K, D), positions added, the [CLS] token first.

    Args:
        keep: (B, K) indices of the visible patches, the others are dropped; None: all N of them.
        masked: (B, N) bool; True: replaced by `vit.masked_embed` before its position is added, as iBOT does.
    """
    check_input(vit, images)
    x = vit.patch_embed(images)  # (B, N, D)
    if masked is not None:
        x = torch.where(masked.flatten(1)[..., None], vit.masked_embed.to(x.dtype), x)
    grid = [n // p for n, p in zip(images.shape[2:], vit.patch_embed.patch_size, strict=True)]
    table = resize_pos_embed(vit.pos_embed, grid, offset=0.1)  # of images of another size, the offset is iBOT's
    x = x + table[:, 1:]
    if keep is not None:
        x = x.take_along_dim(keep[..., None], 1)  # (B, K, D)
    return torch.cat([(vit.cls_token + table[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)


def encode(vit: nn.Module, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Tokens (B, 1 + K, D) after the norm of a timm ViT; `keep` (B, K): the visible patches, None: all."""
    x = visible_tokens(vit, images, keep)
    return vit.norm(checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x))


def with_mask_tokens(x: Tensor, keep: Tensor, mask_token: Tensor, patches: int) -> Tensor:
    """Tokens of all patches (B, 1 + N, E) from those of the visible ones (B, 1 + K, E), which are `keep` (B, K)."""
    full = mask_token.to(x.dtype).repeat(len(x), patches, 1)
    full = full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
    return torch.cat([x[:, :1], full], 1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The [CLS] token and the patches `index` (B, K) of tokens (B, 1 + N, D): (B, 1 + K, D)."""
    return torch.cat([tokens[:, :1], tokens[:, 1:].take_along_dim(index[..., None], 1)], 1)


# --- models -----------------------------------------------------------------------------------------------------------


def initialise(module: nn.Module) -> None:
    """MAE's initial weights: linear layers Xavier-uniform, biases 0; norms stay at 1 and 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def initialise_stem(vit: nn.Module) -> None:
    """MAE's initial weights of a ViT's patch embedding, which is drawn as a linear layer, and of its [CLS] token."""
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
    nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=0.02)


class Decoder(nn.Module):
    """From visible tokens to all positions: a linear layer, mask tokens, positions, blocks, norm.

    Args:
        inputs, width, depth, heads, side: D, E, blocks, heads, and the root of N.
        positions: see `sincos_table`.
        mask_std: std of the initial mask token; 0: zeros.
    """

    def __init__(
        self, inputs: int, width: int, depth: int, heads: int, side: int, positions: str = "mae", mask_std: float = 0.0
    ):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * mask_std if mask_std else torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_table(width, side, positions), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.grad_checkpointing = norm(width), False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def initialise(self) -> Decoder:
        """This decoder, with MAE's initial weights."""
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)
        return self

    def hidden(self, latent: Tensor, keep: Tensor | None = None, depth: int | None = None) -> Tensor:
        """Tokens (B, 1 + N, E) in raster order, before the norm, after the first `depth` blocks (None: all).

        Args:
            latent: (B, 1 + K, D).
            keep: (B, K) indices of these patches; None: all, in raster order.
        """
        x = self.embed(latent)  # (B, 1 + K, E)
        if keep is not None:
            x = with_mask_tokens(x, keep, self.mask_token, self.pos_embed.shape[1] - 1)  # (B, 1 + N, E)
        x, blocks = x + self.pos_embed, self.blocks[:depth]
        return checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)

    def forward(self, latent: Tensor, keep: Tensor | None = None) -> Tensor:
        """As `hidden`, after the norm."""
        return self.norm(self.hidden(latent, keep))


def encoder(**sizes: Any) -> VisionTransformer:
    """MAE's encoder: timm's ViT (by default ViT-B/16) whose positions are a fixed table of sines and cosines."""
    vit = VisionTransformer(num_classes=0, **sizes)
    vit.pos_embed = nn.Parameter(sincos_table(vit.embed_dim, vit.patch_embed.grid_size[0]), requires_grad=False)
    return vit


class MAE(OfficialModel):
    """A masked autoencoder: images to the loss on the pixels of their masked patches.

    Args:
        encoder: a ViT of timm of `plain_input` and a square grid of patches, trained in place; it receives the visible
            patches.
        decoder: its width, depth and heads.
        mask_ratio: share of hidden patches, one or more of them.
        normalise: predict pixels standardised by each patch's own mean and std (norm_pix_loss, on in the released
            training).
        xavier: MAE's initial weights in decoder and pixel head; False: PyTorch's.

    Raises `BadParameter`: another encoder, or a share that hides or leaves no patch.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: tuple[Count, Count, Count] = (512, 8, 16),
        *,
        mask_ratio: Share = 0.75,
        normalise: bool = True,
        xavier: bool = True,
    ):
        configure(self, locals())
        super().__init__()
        embed: Any = getattr(encoder, "patch_embed", None)
        plain = plain_input(encoder) and isinstance(encoder.fc_norm, nn.Identity) and encoder.attn_pool is None
        if not plain or len(set(embed.grid_size)) > 1:
            found = f"{type(encoder).__name__} of {getattr(embed, 'grid_size', 'no')} patches"
            raise BadParameter("encoder", found, f"{PLAIN_INPUT}, no `fc_norm` and no pooling; of a square grid")
        if visible(embed.num_patches, mask_ratio) == embed.num_patches:
            raise BadParameter("mask_ratio", mask_ratio, f"one that hides a patch of {embed.num_patches}")
        self.encoder, self.patch = encoder, embed.patch_size[0]
        self.mask_ratio, self.normalise = mask_ratio, normalise
        sizes = (encoder.embed_dim, *decoder, embed.grid_size[0])
        self.decoder = Decoder(*sizes).initialise() if xavier else Decoder(*sizes, mask_std=0.02)
        self.pixels = nn.Linear(decoder[0], 3 * self.patch**2)
        if xavier:
            initialise(self.pixels)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """As the function `encode`, by the encoder."""
        return encode(self.encoder, images, keep)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The loss of images (B, 3, S, S); `noise` (B, N): the patches with the least are visible, None: drawn."""
        return self.forward_intermediates(images, noise)[0]

    def forward_intermediates(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and "keep" (B, K), "hidden" (B, N), "latent" (B, 1 + K, D), "pixels" and "target" (B, N, p p 3)."""
        patches = self.encoder.patch_embed.num_patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        keep, hidden = random_mask(noise, visible(patches, self.mask_ratio))
        latent = self.encode(images, keep)  # (B, 1 + K, D)
        pixels = self.pixels(self.decoder(latent, keep)[:, 1:])  # (B, N, p p 3)
        target = patchify(images, self.patch)
        if self.normalise:
            target = normalised(target)
        out = {"keep": keep, "hidden": hidden, "latent": latent, "pixels": pixels, "target": target}
        return masked_pixel_loss(pixels, target, hidden), out

    def official_names(self) -> dict[str, str]:
        """Our names -> the authors'."""
        names = {}
        for name in self.state_dict():
            official = name.removeprefix("encoder.").replace("pixels.", "decoder_pred.")
            names[name] = official.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")
        return names

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], heads: int | None = None, decoder_heads: int = 16, **options: Any
    ) -> MAE:
        """The model of an official pre-training file, decoder included, in eval mode. Raises `BadCheckpoint`.

        Args:
            heads, decoder_heads: not in the tensors. None: one for 64 channels of the encoder.
        """
        what = "MAE with its decoder (files of the encoder alone have none)"
        check_names(state, ("patch_embed.proj.weight", "pos_embed", "decoder_embed.weight"), what)
        decoder = len(state["decoder_embed.weight"]), depth(state, "decoder_blocks."), decoder_heads
        model = cls(encoder(**vit_sizes(state, heads)), decoder, **options)
        return model.loaded(state, what)
