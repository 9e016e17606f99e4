"""Figures of DMT alone: the patch tokens of teachers and students, and how similar they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from ...viz import plots
from ...viz.style import styled
from .vit import ViT


@torch.no_grad()
def attention(models: Mapping[str, ViT], images: Tensor) -> dict[str, Tensor]:
    """By model, the attention of the [CLS] token to the patches in the last block, mean of the heads: (B, h, w)."""
    return {
        name: model.attention(images).mean(1).unflatten(1, model.patch_embed.dynamic_feat_size(images.shape[2:]))
        for name, model in models.items()
    }


@styled
def similar(image: Tensor, tokens: Mapping[str, Tensor], row: int, column: int) -> Figure:
    """The cosine of each position's token with that of one position, marked in the image, by encoder.

    Args:
        image: (3, H, W) in 0 to 1.
        tokens: an encoder's name and its patch tokens (s * s, D).
        row, column: the position.
    """
    figure, axes = plt.subplots(1, 1 + len(tokens), figsize=(1.45 * (1 + len(tokens)), 1.6), dpi=80)
    axes[0].imshow(image.permute(1, 2, 0))
    axes[0].set_title("image", fontsize=8.5)
    for ax, (name, x) in zip(axes[1:], tokens.items(), strict=True):
        side, unit = math.isqrt(len(x)), F.normalize(x - x.mean(0), dim=-1)
        cosines = (unit @ unit[row * side + column]).view(side, side)
        drawn = plots.overlay(ax, image, cosines, limits=(-1, 1))
        ax.set_title(name, fontsize=8.5)
    size = image.shape[-1] / side
    axes[0].add_patch(Rectangle((column * size, row * size), size, size, fill=False, edgecolor="red", linewidth=2))
    axes[0].set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="cosine")
    return figure
