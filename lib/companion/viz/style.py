"""The style of every figure: fonts, sizes, and colours that colour-blind readers can distinguish.

The colours are M. Okabe and K. Ito's set.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

# Okabe-Ito, with black and yellow last: black reads as "reference", yellow is weak on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
HEAT = "inferno"  # perceptually even, readable with every common kind of colour blindness and in grey

# the methods of several papers that are drawn together, each group in one of COLOURS: first the papers' own
_METHODS = (
    "SA²VP; BAT; DMT; DPLQ; ECAMP; Local; MetaSegNet; PromptPAR; SIC-CADS; TIP",
    "VPT-shallow; thermal only; MAE only; MAE; CoOp; MIM only; gated attention; constant text; plain ControlNet; "
    "visual; PromptPAR, not masked",
    "VPT-deep; mean of features; iBOT only; iBOT; MaPLe; MRM-like; Global; zone names; deep prompts; visual+; "
    "semantic only; wrong restoration prompt",
    "full fine-tuning; MoCo v3 only; MoCo v3; CoCoOp; random init; wrong zone's text; restoration only; "
    "wrong semantic prompt; another image's scores",
    "sum of features; one-hot zone; fused; no skipping; prompts swapped; PromptPAR, linear fusion; "
    "ECAMP, no super-resolution",
    "higher peak; empty text; MiniLM text; text; blind prompt; regions, no similarity loss; ECAMP, descriptors hidden",
    "linear probing; RGB only; untrained; zero-shot CLIP; raw pixels; mean pooling; unimodal; heads only; "
    "no refinement; no text",
)
_COLOUR_OF = {name: colour for group, colour in zip(_METHODS, COLOURS, strict=False) for name in group.split("; ")}

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.figsize": (6.4, 3.6),
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # the names of classes and data sets are shown verbatim
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "image.cmap": HEAT,
    "image.interpolation": "nearest",
}


def method_colours(methods: Iterable[str], others: str | None = None) -> dict[str, str]:
    """The colour of each method: a baseline or a paper's own method has the same one in every figure.

    Other names (variants, losses) have the colour `others`, or by default the remaining colours in their order.
    """
    methods = list(methods)
    fixed = {name: _COLOUR_OF[name] for name in methods if name in _COLOUR_OF}
    free = itertools.cycle([colour for colour in COLOURS if colour not in fixed.values()])
    return {name: fixed.get(name) or others or next(free) for name in methods}


def style() -> AbstractContextManager[None]:
    """The house style inside a `with` block."""
    return plt.rc_context(STYLE)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draw in the house style whatever style is set outside."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made when first drawn, and take the style of that moment
            return figure

    return wrapped
