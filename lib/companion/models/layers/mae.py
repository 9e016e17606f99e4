"""Parts of masked autoencoders (He et al., CVPR 2022): patches of pixels, random masks, the loss on hidden patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
