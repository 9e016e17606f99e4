"""Figures of TIP alone: images by prompt, and where and when the adaptor acts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from ...evaluation.tables import published_table
from ...viz import plots
from ...viz.style import HEAT, styled
from .degradations import BLIND, Op, Sample, degrade, prompt
from .model import Adaptor


def before_after(
    restore: Callable[..., Tensor], samples: Sequence[Sample], kinds: Mapping[str, str], title: str
) -> Figure:
    """Inputs, images restored with each kind of prompts, and clean images; one of each caption, at most three.

    Args:
        restore: (samples, kind of prompts) to images.
        kinds: label -> kind, of `recipe.TEXTS`.
    """
    restored, captions = [restore(samples, kind) for kind in kinds.values()], [s.semantic for s in samples]
    shown = {}
    for i in sorted(map(captions.index, {*captions}))[:3]:
        shown[captions[i]] = [samples[i].degraded, *(images[i] for images in restored), samples[i].clean]
    return plots.image_rows(shown, ["input", *kinds, "clean"], title=title)


def grid(
    restore: Callable[..., Tensor], sample: Sample, semantic: Sequence[str], restoration: Sequence[str], title: str
) -> Figure:
    """One image restored by all combinations of two prompts: rows differ in c_s, columns in c_r."""
    rows = {}
    for text in semantic:
        pairs = [sample._replace(semantic=text, restoration=instruction) for instruction in restoration]
        rows[text or "(empty)"] = [restore([pair])[0] for pair in pairs]
    rows["input, clean"] = [sample.degraded, sample.clean]
    return plots.image_rows(rows, restoration, side=1.25, title=title)


def published_strengths() -> dict[str, list[float]]:
    """The numbers of the prompts in the project page's figure, by kind of degradation."""
    table = published_table("tip", "fig-prompt-walk").set_index("method")
    return {kind: [*table.loc[f"{verb} with sigma"]] for kind, verb in (("noise", "Denoise"), ("blur", "Deblur"))}


def walk(
    restore: Callable[..., Tensor],
    sample: Sample,
    ops: Sequence[Op],
    strengths: Mapping[str, Sequence[float]],
    title: str,
    edge: str = "replicate",
) -> Figure:
    """An image degraded by `ops`, and restored by prompts that name one degradation, whose number grows in a row."""
    worse = sample._replace(degraded=degrade(sample.clean, ops, 0, edge=edge))
    rows, titles = {}, {}
    for kind, values in strengths.items():
        prompts = [BLIND, *(prompt([Op(kind, value)]) for value in values), prompt(ops)]
        images = [restore([worse._replace(restoration=text)])[0] for text in prompts]
        rows[kind], titles[kind] = [worse.degraded, *images, worse.clean], ["input", *prompts, "clean"]
    return plots.image_rows(rows, titles, title=title)


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
