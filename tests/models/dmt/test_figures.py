"""DMT's figures are legible and show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

from companion.evaluation import ablations
from companion.models.dmt import figures
from tests.viz.test_plots import overlapping_text, visible_texts

TEACHERS = ("MAE", "MoCo v3", "iBOT")
FACTORS = ("texture", "shape", "hue", "quadrant")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def rows() -> pd.DataFrame:
    """Two selection seeds: DMT is best at 0.02, "iBOT only" at 0.01."""
    found = []
    for method, scores in {"DMT": {0.01: 20, 0.02: 40}, "iBOT only": {0.01: 30, 0.02: 10}}.items():
        for rate, score in scores.items():
            for seed in (100, 106):
                row = {"stage": "select", "task": "collage", "method": method, "learning_rate": rate}
                found.append(row | {"seed": seed, "mean": score + (seed - 103.0)})
    return ablations.frame(found, "mean")


def scores() -> pd.DataFrame:
    columns = {"mean": [50.0, 30, 70, 28], "std": [1.0] * 4, "untrained": [25.0] * 4, "best teacher": [55.0] * 4}
    return pd.DataFrame(columns, index=FACTORS)


def tsne():
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(40, 6, generator=generator) for name in ("teacher iBOT", "student", "untrained")}
    classes = torch.arange(40) % 8
    return figures.tsne(
        features, {"hue": (classes, [str(i) for i in range(8)]), "texture": (classes, list("abcdefgh"))}
    )


GRIDS = {name: np.linspace(0, 1, 18).reshape(9, 2) for name in ("DMT", "iBOT only", "untrained")}
MASK = torch.zeros(32, 32, dtype=torch.long)
MASK[8:20, 8:20] = 1
FIGURES = {
    "architecture": figures.architecture,
    "layers": lambda: figures.layers(GRIDS, TEACHERS),
    "learning rates": lambda: figures.learning_rates(rows(), ["DMT", "iBOT only"]),
    "probed": lambda: figures.probed(scores(), "MoCo v3 + iBOT, synthetic data"),
    "t-SNE": tsne,
    "masks": lambda: figures.masks([np.zeros((32, 32, 3), np.uint8)] * 6, [MASK] * 6, [MASK.T] * 6, "UPerNet"),
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_text_is_legible(name):
    figure = FIGURES[name]()
    assert overlapping_text(figure) == []
    assert min(text.get_fontsize() for text in visible_texts(figure)) >= 8


def test_cells_are_labelled_with_their_values():
    *panels, bar = figures.layers(GRIDS, TEACHERS).axes
    assert [ax.get_title() for ax in panels] == list(GRIDS) and bar.get_ylim() == (0, 1)
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels[:4] == ["MAE, block 1", "MAE, block 2", "MAE, block 3", "MoCo v3, block 1"]
    assert [text.get_text() for text in panels[0].texts] == [f"{x:.2f}" for x in np.linspace(0, 1, 18)]


def test_the_dot_is_at_the_selected_learning_rate():
    (ax, *_) = figures.learning_rates(rows(), ["DMT", "iBOT only"]).axes
    dots = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[0.02, 40.0], [0.01, 30.0]]


def test_references_and_bars_have_their_heights():
    (ax,) = figures.probed(scores(), "title").axes
    assert [bar.get_height() for bar in ax.patches] == [50, 30, 70, 28]
    levels = {
        lines.get_label(): lines.get_segments()[0][:, 1].tolist()
        for lines in ax.collections
        if lines.get_label()[0] != "_"
    }
    assert levels == {"untrained": [25, 25], "best teacher": [55, 55]}


def test_a_mask_that_is_empty_has_no_contour():
    empty = torch.zeros_like(MASK)
    figure = figures.masks([np.zeros((32, 32, 3), np.uint8)] * 2, [MASK, MASK], [MASK, empty], "UPerNet")
    drawn = [[tuple(c) for part in ax.collections for c in part.get_edgecolor()] for ax in figure.axes]
    assert drawn == [[to_rgba("white"), to_rgba("#D55E00")], [to_rgba("white")]]
