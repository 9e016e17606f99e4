"""Figures of SA²VP alone: attention of the [CLS] token, what the prompts read, where they act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...viz import plots
from ...viz.attention import Recorder, class_token_map
from ...viz.style import styled
from .model import SA2VP, neighbourhood


class Trace(NamedTuple):
    """What a forward pass of `SA2VP` computes on the way, a list entry for each block.

    Attributes:
        prompts: the prompt tokens after the block (b, N, D).
        cross: attention maps of the interaction (b, heads, N, N).
        own: self-attention maps of the image pathway (b, heads, N, N).
        fusion: s F (b, N, D), which is added to the query's pathway.
    """

    prompts: list[Tensor]
    cross: list[Tensor]
    own: list[Tensor]
    fusion: list[Tensor]


def trace(model: SA2VP, images: Tensor) -> Trace:
    """Run `images` (b, 3, H, W) through the model and record its attention maps."""
    with Recorder(model) as recorder, torch.no_grad():
        _, blocks = model.forward_intermediates(images)
    cross, own = [], dict[str, Tensor]()
    for name, attention in zip(recorder.names, recorder.maps, strict=True):
        if name == "cross":
            cross.append(attention)
        else:  # a block runs on the image tokens first, alone or in front of the prompt tokens
            own.setdefault(name, attention[: len(images)])
    fusion = [model.scale * out["fusion"] for out in blocks]
    return Trace([out["prompt"] for out in blocks], cross, list(own.values()), fusion)


def class_attention(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Attention of the [CLS] token in the last block, (b, rows, columns), by baseline, whose `backbone` is a ViT."""
    maps = {}
    for name, model in models.items():
        with Recorder(model.backbone, layers=[-1]) as recorder, torch.no_grad():
            model(images)
        grid = model.backbone.patch_embed.grid_size
        between = recorder.maps[0].shape[-1] - 1 - grid[0] * grid[1]  # prompts between [CLS] and the patches
        maps[name] = class_token_map(recorder.maps[0], grid, between)
    return maps


def reads(model: SA2VP, found: Trace) -> dict[str, Tensor]:
    """What the [CLS] prompt attends to, (b, rows, columns), in the blocks in which the image informs the prompts."""
    stages = range(0, len(found.cross), model.period)
    return {f"block {i}": class_token_map(found.cross[i], model.grid) for i in stages}


def strength(model: SA2VP, found: Trace) -> dict[str, Tensor]:
    """The norm of s F at each image token, (b, rows, columns), in the first, middle and last block that adds it."""
    acting = [i for i in range(len(found.fusion)) if i % model.period]
    chosen = acting[0], acting[len(acting) // 2], acting[-1]
    return {f"block {i}": found.fusion[i][:, 1:].norm(dim=-1).unflatten(1, model.grid) for i in chosen}


def between_images(tokens: Tensor) -> float:
    """The share of the variance of tokens (b, N, D), over images and positions, that is between images."""
    between = tokens.var(0, unbiased=False).sum(-1).mean()
    return float(between / (tokens - tokens.mean((0, 1))).square().sum(-1).mean())


def masks(grid: tuple[int, int]) -> Figure:
    """The patches that the [CLS] token, and those in a corner, on an edge and in the middle, attend to (dark)."""
    rows, columns = grid
    mask, middle = neighbourhood(grid), 1 + rows // 2 * columns + columns // 2
    queries = {"[CLS]": 0, "corner": 1, "edge": 1 + columns // 2, "inside": middle}
    near = {name: mask[query, 1:] for name, query in queries.items()}
    shades = [0.9 - 0.6 * one.view(grid).expand(3, -1, -1) for one in near.values()]
    titles = [f"{name}: {int(one.sum())} patches" for name, one in near.items()]
    return plots.image_rows({"attends to": shades}, titles)


@styled
def neighbours(image: Tensor, cross: Tensor, position: tuple[int, int], seen: Mapping[str, Sequence[float]]) -> Figure:
    """What the prompt at a position attends to, mean of the heads, over the image in grey; each patch a square.

    Args:
        image: (3, H, W), normalised by `seen`, a "mean" and a "std".
        cross: attention map of an interaction (heads, N, N), of a square grid.
        position: row and column of the prompt.
    """
    side = int((cross.shape[-1] - 1) ** 0.5)
    heat = cross.mean(0)[1 + position[0] * side + position[1], 1:].view(side, side)
    figure, ax = plt.subplots(figsize=(2.6, 2.6), layout="constrained")
    plots.overlay(ax, image, heat, mode="nearest", mean=seen["mean"], std=seen["std"], colour_bar=True)
    return figure
