"""Figures of SA²VP alone: the 3 x 3 neighbourhoods of an interaction."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from ...viz.style import styled


@styled
def neighbourhoods(mask: Tensor, grid: tuple[int, int]) -> Figure:
    """The attention mask of an interaction, and the patches that four of its queries attend to.

    Args:
        mask: boolean (N, N), of `model.neighbourhood`.
        grid: rows and columns.
    """
    rows, columns = grid
    inside = 1 + (rows // 2) * columns + columns // 2
    queries = {"[CLS]": 0, "corner": 1, "edge": 1 + columns // 2, "inside": inside}
    figure, axes = plt.subplots(1, 5, figsize=(8.8, 2.2), width_ratios=[1.3, 1, 1, 1, 1])
    axes[0].imshow(mask.numpy(), cmap="Greys")
    axes[0].set(title="mask (black: attends)", xlabel="key token", ylabel="query token")
    for ax, (name, query) in zip(axes[1:], queries.items(), strict=True):
        near = mask[query, 1:].view(rows, columns).numpy()
        ax.imshow(near, cmap="Greys", vmin=0, vmax=1)
        ax.set(title=f"{name}: {int(near.sum())} patches", xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    return figure
