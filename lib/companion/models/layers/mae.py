"""Parts of masked autoencoders (He et al., CVPR 2022): patches of pixels, random masks, the loss on hidden patches."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .pos_embed import sincos_table


def patchify(images: Tensor, patch: int) -> Tensor:
    """Patches of pixels (B, h w, p p 3) of images (B, 3, h p, w p); within a patch by row, column, channel."""
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Square images (B, 3, H, H) of patches (B, N, p p 3): the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    x = patches.reshape(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, 3, side * patch, side * patch)


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


def visible_tokens(vit: nn.Module, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """The input of the blocks of one of timm's ViTs: (B, 1 + K, D), positions added, the [CLS] token first.

    `keep` (B, K): indices of the visible patches; None: all N of them.
    """
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    if keep is not None:
        x = x.take_along_dim(keep[..., None], 1)
    return torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)


def with_mask_tokens(x: Tensor, keep: Tensor, mask_token: Tensor, patches: int) -> Tensor:
    """Tokens of all patches (B, 1 + N, D) from those of the visible ones (B, 1 + K, D), which are `keep` (B, K)."""
    full = mask_token.to(x.dtype).repeat(len(x), patches, 1)
    full = full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
    return torch.cat([x[:, :1], full], 1)


class Decoder(nn.Module):
    """From visible tokens to all positions: a linear layer, mask tokens, positions, blocks, norm."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, side: int, positions: str = "mae"):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_table(width, side, positions), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)

    def hidden(self, latent: Tensor, keep: Tensor, depth: int | None = None) -> Tensor:
        """Tokens (B, 1 + N, width) in raster order, before the norm, after the first `depth` blocks (None: all).

        Args:
            latent: (B, 1 + K, D).
            keep: (B, K) indices of these patches.
        """
        patches = self.pos_embed.shape[1] - 1
        x = with_mask_tokens(self.embed(latent), keep, self.mask_token, patches) + self.pos_embed
        for block in self.blocks[:depth]:
            x = block(x)
        return x

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """As `hidden`, after the norm."""
        return self.norm(self.hidden(latent, keep))
