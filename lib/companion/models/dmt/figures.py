"""Figure of DMT alone: what a student encodes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...viz.style import COLOURS, styled


@styled
def probed(scores: pd.DataFrame, title: str) -> Figure:
    """A student's accuracy by factor, between that of an untrained student and of the best teacher.

    Args:
        scores: a row for each factor; columns mean, std, untrained, best teacher; in percent.
    """
    figure, ax = plt.subplots(figsize=(4.6, 2.7))
    ax.bar(range(len(scores)), scores["mean"], 0.6, yerr=scores["std"], color=COLOURS[0], error_kw={"capsize": 3})
    lines = {"untrained": ("#555555", "--"), "best teacher": (COLOURS[3], "-")}
    for name, (colour, dashes) in lines.items():
        ends = np.arange(len(scores))
        ax.hlines(scores[name], ends - 0.4, ends + 0.4, color=colour, linestyle=dashes, label=name)
    ax.set(ylim=(0, 100), ylabel="accuracy (%)", title=title)
    ax.set_xticks(range(len(scores)), list(scores.index))
    ax.legend(loc="upper left")
    return figure
