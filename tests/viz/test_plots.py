"""The house figures are legible and show their values."""

import io
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import skimage.data
import skimage.transform
import torch
from matplotlib.text import Annotation, Text
from PIL import Image

from companion.errors import BadParameter
from companion.viz import plots


def visible_texts(figure):
    """The laid-out texts that a reader sees: `get_window_extent()` gives their boxes in pixels."""
    figure.draw_without_rendering()
    hidden = set()
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                # a tick outside the limits keeps its text but is not drawn
                if not ax.axison or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().strip())
    return [text for text in texts if text.get_visible() and text not in hidden]


def overlapping_text(figure):
    """The pairs of texts that cover each other by more than a pixel each way."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def photographs(number, size=224):
    names = ["astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry"]
    arrays = [skimage.transform.resize(getattr(skimage.data, n)(), (size, size), anti_aliasing=True) for n in names]
    images = torch.tensor(np.stack(arrays[:number]), dtype=torch.float32).permute(0, 3, 1, 2)
    return (images - 0.5) / 0.5


HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
COLOURED = np.random.default_rng(0).uniform(size=(4, 8, 8, 3))
METHODS = ["linear probing", "full fine-tuning", "VPT-shallow", "VPT-deep", "SA²VP", "SA²VP, global attention"]
TASKS = ["CIFAR-100", "Oxford-IIIT Pets", "CLEVR distance", "dSprites orientation", "Diabetic Retinopathy", "where"]


def table(tasks=TASKS, methods=METHODS):
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.uniform(5, 100, (len(tasks), len(methods))), index=tasks, columns=methods)
    return values, pd.DataFrame(rng.uniform(0.2, 8, values.shape), index=tasks, columns=methods)


def histories():
    steps, rng = np.linspace(0, 3, 20), np.random.default_rng(0)
    return {
        m: {
            "training loss": np.exp(-steps) + rng.uniform(0, 0.2, (3, 20)),
            "validation accuracy (%)": 90 - 60 * np.exp(-steps) + rng.uniform(0, 5, (3, 20)),
        }
        for m in METHODS
    }


def grid_figure():
    rows = {name: torch.rand(5, 14, 14) ** 3 for name in METHODS[2:5]}
    titles = ["astronaut", "tabby cat", "a cup of coffee", "rocket on its pad", "retina, left eye"]
    return plots.attention_grid(photographs(5), rows, titles, **HALF)


def threshold_curves():
    errors = {m: (np.arange(51), np.linspace(0, 1, 51)) for m in METHODS}
    overlaps = {m: (np.linspace(0, 1, 21), np.linspace(1, 0, 21)) for m in METHODS}
    curves = {"centre error (pixels)": errors, "overlap (IoU)": overlaps}
    return plots.threshold_curves(curves, dict.fromkeys(METHODS, "99.9 / 88.8"))


def radar():
    counts = {"LasHeR": 19, "RGBT234": 12}
    return plots.radar({k: {f"A{i}": 50 + 2.0 * i for i in range(n)} for k, n in counts.items()}, 30, 90)


NODES = {
    "image": (0.5, 0.5, "tensor"),
    "ViT\n(Eq. 1)": (2.0, 0.5, "frozen"),
    "prompts $p$": (2.0, 1.4, "trained"),
    "sum": (3.3, 0.9, "operation"),
}
ARROWS = [("image", "ViT\n(Eq. 1)"), ("ViT\n(Eq. 1)", "sum"), ("prompts $p$", "sum")]
TITLES = ["true: tabby cat, predicted: Egyptian cat"] * 6
ROLLOUT = {"Rollout, last layer": torch.linspace(0, 1, 392).view(2, 14, 14) / 196}
HOUSE_FIGURES = {
    "grid": grid_figure,
    "grid, colours": lambda: plots.attention_grid(
        photographs(4), {"attention": torch.rand(4, 8, 8), "principal components": COLOURED}, list("abcd"), **HALF
    ),
    "grid, shared": lambda: plots.attention_grid(photographs(2), ROLLOUT, shared=True, mode="nearest", **HALF),
    "images": lambda: plots.show_images(photographs(6), TITLES, columns=3, **HALF),
    "small images": lambda: plots.show_images(photographs(6, 32), [f"class {i}" for i in range(6)], **HALF),
    "image rows": lambda: plots.image_rows(
        {"a semantic prompt of a whole sentence": photographs(4) / 2 + 0.5, "clean": photographs(1) / 2 + 0.5},
        ["input", "Deblur with sigma 3.0; Denoise with sigma 0.08", "Upsample to 4.0x"],
        title="Photographs, degraded",
    ),
    "bars": lambda: plots.bars(*table()),
    "bars of one method": lambda: plots.bars(table(methods=["SA²VP"])[0]),
    "bars of a benchmark": lambda: plots.bars(*table([f"{t} {i}" for i in range(3) for t in TASKS], METHODS[:4])),
    "curves": lambda: plots.curves(histories()),
    "threshold curves": threshold_curves,
    "radar": radar,
    "diagram": lambda: plots.diagram(NODES, ARROWS),
    "confusion": lambda: plots.confusion([0, 1, 5, 5], {m: [0, 1, 4, 5] for m in METHODS[:4]}, range(6)),
    "heat table": lambda: plots.heat_table(table()[0], "mA (%)", (0, 100), {METHODS[0]: (0, 1)}, "synthetic images"),
    "confusion, names": lambda: plots.confusion([0, 1, 5, 5], {m: [0, 1, 4, 5] for m in METHODS[:2]}, TASKS),
    "curves of one method": lambda: plots.curves({"SA²VP": {"loss": [3.0, 2, 1]}}),
}


@pytest.mark.parametrize("name", HOUSE_FIGURES)
def test_house_figures_are_legible_and_small(name):
    figure = HOUSE_FIGURES[name]()
    assert isinstance(figure, plt.Figure)
    assert overlapping_text(figure) == []
    for text in visible_texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
        assert text.get_fontsize() >= 8  # 11 pixels at 100 dpi
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert len(file.getvalue()) <= 300_000
    assert figure.dpi == 100


def test_overlapping_text_finds_overlaps():
    figure, ax = plt.subplots()
    ax.text(0.5, 0.5, "one")
    ax.text(0.51, 0.5, "two")
    assert overlapping_text(figure) == [("one", "two")]


def test_denormalise_and_overlay_show_the_numbers():
    image = torch.rand(3, 20, 30)
    normalised = (image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    shown = plots.denormalise(normalised, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    np.testing.assert_allclose(shown, image.permute(1, 2, 0).numpy(), atol=1e-6)
    _, ax = plt.subplots()
    heat = torch.arange(6.0).view(2, 3)
    drawn = plots.overlay(ax, image, heat, mode="nearest")
    np.testing.assert_array_equal(drawn.get_array(), heat.numpy())
    luma = np.asarray(Image.fromarray((shown * 255).round().astype(np.uint8)).convert("L")) / 255
    np.testing.assert_allclose(ax.images[0].get_array(), luma, atol=2 / 255)
    assert drawn.get_extent() == [-0.5, 29.5, 19.5, -0.5] and drawn.get_clim() == (0, 5)
    assert plots.overlay(ax, image, heat, limits=(0, 10)).get_clim() == (0, 10)
    with pytest.raises(BadParameter, match="bicubic"):
        plots.overlay(ax, image, heat, mode="bicubic")


def test_a_grid_draws_colours_as_they_are():
    figure = plots.attention_grid(photographs(2), {"colours": COLOURED[:2]}, **HALF)
    assert len(figure.axes) == 4  # two photographs, two maps of colours, and no bar
    for ax, colours in zip(figure.axes[2:], COLOURED, strict=False):
        assert np.array_equal(ax.images[0].get_array(), colours)
        assert ax.images[0].get_extent() == [0, 224, 224, 0]


def test_rows_of_images_are_drawn_as_they_are():
    images = torch.rand(3, 3, 8, 8)
    figure = plots.image_rows({"a": images, "b": images[:1]}, {"a": ["one", "two"], "b": ["three"]})
    drawn = [ax.images[0].get_array() if ax.images else None for ax in figure.axes]
    for array, image in zip(drawn, (*images, images[0]), strict=False):
        np.testing.assert_allclose(array, image.permute(1, 2, 0).numpy(), atol=1e-6)
    assert drawn[4:] == [None, None], "a shorter row ends with empty cells"
    assert [ax.get_title() for ax in figure.axes] == ["one", "two", "", "three", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["a", "", "", "b", "", ""]
    for titles in (["one"] * 4, {"c": ["one"]}):
        with pytest.raises(BadParameter, match="titles"):
            plots.image_rows({"a": images}, titles)


def test_bars_and_curves_show_the_numbers():
    values, spread = table(TASKS[:2], METHODS[:2])
    values.iloc[0, 1] = math.nan
    figure = plots.bars(values, spread)
    expected = {f"{values.iloc[i, j]:.1f} ± {spread.iloc[i, j]:.1f}" for i, j in ((0, 0), (1, 0), (1, 1))}
    assert {t.get_text() for t in figure.axes[0].texts} == expected
    with pytest.raises(BadParameter):
        plots.bars(values, spread.iloc[:1])
    frame = pd.DataFrame({"epoch": [2, 4, 6], "loss": [3.0, 2.0, 1.0]})
    (line,) = plots.curves({"SA²VP": frame}).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[2, 3], [4, 2], [6, 1]])
    (line,) = plots.curves({"SA²VP": {"loss": np.array([[1.0, 2.0], [3.0, 6.0]])}}).axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [2, 4])
    with pytest.raises(BadParameter):
        plots.curves({"SA²VP": {}})
    (line,) = plots.radar({"x": {"a": 10.0, "b": 20.0, "c": 30.0}}, 0, 40).axes[0].lines
    assert line.get_ydata().tolist() == [10, 20, 30, 10]  # closed


def test_a_diagram_joins_its_nodes_and_names_the_kinds_that_it_has():
    figure = plots.diagram(NODES, ARROWS)
    (ax,) = figure.axes
    at = {text.get_text(): text.get_position() for text in ax.texts if text.get_text()}
    assert at == {label: (x, y) for label, (x, y, _) in NODES.items()}
    joined = {(arrow.xyann, arrow.xy) for arrow in ax.texts if isinstance(arrow, Annotation)}
    assert joined == {(at[start], at[end]) for start, end in ARROWS}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["frozen", "trained", "operation"]
    with pytest.raises(BadParameter, match="frosted"):
        plots.diagram({"a": (1, 1, "frosted")}, [])


def test_a_confusion_matrix_shows_shares_of_the_true_class():
    figure = plots.confusion([0, 0, 0, 1], {"A": [0, 0, 2, 1]}, ["one", "two", "three"])
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[200 / 3, 0, 100 / 3], [0, 100, 0], [0, 0, 0]])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["100", "33", "67"]
    assert figure.axes[0].get_xlabel() == "predicted" and figure.axes[0].get_ylabel() == "true class"
    named = plots.confusion([0, 1], {"A": [0, 1], "B": [1, 0]}, ["water", "road"])
    assert [label.get_text() for label in named.axes[0].get_yticklabels()] == ["water", "road"]
    assert [label.get_text() for label in named.axes[1].get_xticklabels()] == ["water", "road"]


def test_a_heat_table_shows_its_numbers_and_frames():
    values = pd.DataFrame([[10, 90.4], [np.nan, 50]], index=["row 1", "row 2"], columns=["hat", "bag"])
    figure = plots.heat_table(values, "mA (%)", (0, 100), {"bag": (0, 1)})
    ax, bar = figure.axes
    assert [text.get_text() for text in ax.texts] == ["10", "90", "–", "50"]
    assert [text.get_color() for text in ax.texts] == ["white", "black", "black", "white"]
    assert ax.images[0].get_clim() == bar.get_ylim() == (0, 100) and bar.get_ylabel() == "mA (%)"
    (frame,) = ax.patches
    assert frame.get_xy() == (0.53, -0.5) and frame.get_height() == 2


def test_boxes_are_drawn_at_their_positions():
    image = np.zeros((20, 30, 3), np.uint8)
    drawn = plots.boxed(image, {"white": (4, 5, 10, 8), "red": (6, 7, 4, 4)}, scale=2)
    assert drawn.shape == (40, 60, 3)
    rows, columns = np.nonzero((drawn == 255).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 26, 8, 28)
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[14, 12] and not red[18, 16]
    ax = plt.subplots()[1]
    plots.boxes(ax, image, {"white": (4, 5, 10, 8)})
    assert ax.patches[0].get_bbox().bounds == (3.5, 4.5, 10, 8)
    assert ax.get_xlim() == (-0.5, 29.5) and ax.get_ylim() == (19.5, -0.5)


def test_wrong_numbers_of_images_are_refused():
    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(BadParameter, match="2 titles"):
        plots.show_images(images, ["a", "b"])
    with pytest.raises(BadParameter, match="VPT: 2 maps"):
        plots.attention_grid(images, {"VPT": torch.rand(2, 4, 4)})


def test_tsne_keeps_clusters_apart_and_repeats():
    centres = torch.eye(3, 8) * 20
    labels = torch.arange(60) % 3
    features = centres[labels] + torch.randn(60, 8)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    points = plots.tsne(features, labels, axes[0], seed=1, names=["disc", "cross", "bar"])
    again = plots.tsne(features, labels, axes[1], seed=1)
    np.testing.assert_array_equal(points, again)
    means = np.stack([points[labels == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(points[:, None] - means, axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest, labels.numpy())
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["disc", "cross", "bar"]
    assert overlapping_text(figure) == []
    panels = plots.tsne_panels({"a": features, "b": -features}, labels, ["disc", "cross", "bar"], seed=1).axes
    assert [ax.get_title() for ax in panels] == ["a", "b"] and [bool(ax.get_legend()) for ax in panels] == [False, True]
    assert sum(len(drawn.get_offsets()) for drawn in panels[0].collections) == 60
    assert overlapping_text(panels[0].figure) == []
