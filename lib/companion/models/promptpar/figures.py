"""The attention mask of PromptPAR."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ...viz.style import COLOURS, styled

_VISIBLE = ListedColormap(["#e3e3e3", COLOURS[0]])  # not attended to; attended to


@styled
def mask(forbidden: Tensor, groups: int, title: str) -> Figure:
    """The attention mask of a sequence: which token (row) attends to which (column).

    Args:
        forbidden: (L, L) as `model.region_mask` returns it, of groups of equal size.
        groups: tokens of the groups together; the patches follow.
    """
    figure, ax = plt.subplots(figsize=(4.9, 3.7))
    ax.imshow(~forbidden.numpy(), cmap=_VISIBLE, interpolation="nearest")
    size, patches = groups / 5, (groups + len(forbidden)) / 2
    names = ["CLS, $P_0$", *(f"$LC_{r}, P_{r}$" for r in range(1, 5)), "patches"]
    ax.set_yticks([*((r + 0.5) * size - 0.5 for r in range(5)), patches], names)
    ax.set_xticks([groups / 2, patches], ["groups", "patches, row by row"])
    ax.set(xlabel="key", ylabel="query", title=title)
    ax.tick_params(length=0)
    handles = [Rectangle((0, 0), 1, 1, color=_VISIBLE(i)) for i in (1, 0)]
    figure.legend(handles, ["attends", "masked"], loc="outside right center")
    return figure
