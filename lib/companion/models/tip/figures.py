"""Figures of TIP alone: where and when the adaptor acts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from ...viz.style import HEAT, styled
from .model import Adaptor


@contextlib.contextmanager
def watched(adaptor: Adaptor) -> Iterator[list[dict]]:
    """A list that gets a row for each call of an adaptor and each site: {"step", "t", "site", "gamma", "beta"}, the
    mean magnitudes of the maps; gamma is None where it is added."""
    rows: list[dict] = []

    def watch(module: Adaptor, inputs: tuple, maps: Sequence[Tensor]) -> None:
        step = rows[-1]["step"] + 1 if rows else 0
        for i, m in enumerate(maps):
            site = "middle" if i == len(maps) - 1 else f"skip {i}"
            halves = m.chunk(2 if module.config.fusion == "modulate" else 1, 1)
            *gamma, beta = (float(half.abs().mean()) for half in halves)
            row = {"step": step, "t": int(inputs[1]), "site": site, "gamma": gamma[0] if gamma else None}
            rows.append(row | {"beta": beta})

    handle = adaptor.register_forward_hook(watch)
    try:
        yield rows
    finally:
        handle.remove()


@styled
def adaptor_maps(trace: Sequence[dict], title: str = "") -> Figure:
    """Mean magnitude of gamma and of beta at each site and sampling step, on logarithmic colour scales.

    Args:
        trace: see `watched`.
        title: of the figure.
    """
    frame = pd.DataFrame(trace)
    shown = [what for what in ("gamma", "beta") if frame[what].notna().any()]  # a plain ControlNet has no gamma
    figure, axes = plt.subplots(1, len(shown), figsize=(4.1 * len(shown), 2.8), squeeze=False)
    figure.suptitle(title)
    for ax, what in zip(axes[0], shown, strict=True):
        sites = frame.site[frame[what].notna()].unique()
        table = frame.pivot_table(index="site", columns="step", values=what).loc[sites]
        times = frame.groupby("step").t.first()
        drawn = ax.imshow(table, cmap=HEAT, aspect="auto", norm="log")
        ax.set_yticks(range(len(table)), table.index)
        ticks = range(0, len(times), max(1, len(times) // 4))
        ax.set_xticks(ticks, [str(times.iloc[i]) for i in ticks])
        ax.set(xlabel="timestep t, from noise to image")
        bar = figure.colorbar(drawn, ax=ax, label=rf"mean $|\{what}|$", ticks=LogLocator(subs=(1, 2, 5)), format="%g")
        bar.minorticks_off()
    return figure
