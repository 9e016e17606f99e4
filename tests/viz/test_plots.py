"""Figures show the numbers they are given; the notebooks draw each of them."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from companion.viz import plots
from tests.models.common import refuses


def images_of(figure):
    return [np.asarray(ax.images[0].get_array()) if ax.images else None for ax in figure.axes]


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def test_heat_lies_over_the_denormalised_image():
    image = torch.rand(3, 20, 30)
    normalised = (image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    look = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    shown = plots.denormalise(normalised, **look)
    np.testing.assert_allclose(shown, image.permute(1, 2, 0).numpy(), atol=1e-6)
    _, ax = plt.subplots()
    heat = torch.arange(6.0).view(2, 3)
    drawn = plots.overlay(ax, normalised, heat, mode="nearest", **look)
    np.testing.assert_allclose(ax.images[0].get_array(), shown @ [0.299, 0.587, 0.114], atol=1e-6)
    np.testing.assert_array_equal(drawn.get_array(), heat.numpy())
    assert drawn.get_extent() == [-0.5, 29.5, 19.5, -0.5] and drawn.get_clim() == (0, 5)
    assert plots.overlay(ax, image, heat, limits=(0, 10)).get_clim() == (0, 10)


def test_grids_place_each_image_and_map_in_its_row_and_column():
    images, heat, colours = (
        torch.rand(2, 3, 8, 8),
        torch.rand(2, 4, 4),
        np.random.default_rng(0).uniform(size=(2, 4, 4, 3)),
    )
    figure = plots.attention_grid(images, {"heat": heat, "colours": colours}, shared=True)
    for ax, expected in zip(figure.axes, (*images.permute(0, 2, 3, 1).numpy(), *heat.numpy(), *colours), strict=False):
        np.testing.assert_allclose(ax.images[-1].get_array(), expected, atol=1e-6)
    assert {ax.images[-1].get_clim() for ax in figure.axes[2:4]} == {(heat.min().item(), heat.max().item())}
    rows = plots.image_rows({"a": images, "b": images[:1]}, {"a": ["one", "two"], "b": ["three"]})
    assert [array is None for array in images_of(rows)] == [False, False, False, True]
    assert [ax.get_title() for ax in rows.axes] == ["one", "two", "three", ""]
    np.testing.assert_allclose(images_of(plots.show_images(images))[1], images[1].permute(1, 2, 0).numpy(), atol=1e-6)
    refuses(
        (lambda: plots.attention_grid(images, {"VPT": heat[:1]}), "VPT"),
        (lambda: plots.show_images(images, ["a"]), "1 titles"),
        (lambda: plots.image_rows({"a": images}, {"c": ["one"]}), "'c'"),
    )


def test_bars_curves_and_radars_show_the_numbers():
    values = pd.DataFrame([[90.0, math.nan], [50.0, 60.0]], index=["x", "y"], columns=["VPT", "SA²VP"])
    spread = pd.DataFrame([[1.0, math.nan], [2.0, 3.0]], index=values.index, columns=values.columns)
    figure = plots.bars(values, spread)
    assert texts_of(figure.axes[0]) == ["90.0 ± 1.0", "50.0 ± 2.0", "60.0 ± 3.0"]
    refuses((lambda: plots.bars(values, spread.iloc[:1]), "error"))
    seeds = {"epoch": [2, 4, 6], "loss": np.array([[3.0, 2.0, 1.0], [5.0, 2.0, 1.0]])}
    (line,) = plots.curves({"SA²VP": seeds}).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[2, 4], [4, 2], [6, 1]])
    (line,) = plots.radar({"x": {"a": 10.0, "b": 20.0, "c": 30.0}}, 0, 40).axes[0].lines
    assert line.get_ydata().tolist() == [10, 20, 30, 10]  # closed


def test_a_confusion_matrix_shows_shares_of_the_true_class():
    figure = plots.confusion([0, 0, 0, 1], {"A": [0, 0, 2, 1]}, ["one", "two", "three"])
    np.testing.assert_allclose(images_of(figure)[0], [[200 / 3, 0, 100 / 3], [0, 100, 0], [0, 0, 0]])
    assert texts_of(figure.axes[0]) == ["67", "33", "100"]


def test_a_heat_table_shows_its_numbers_and_frames():
    values = pd.DataFrame([[10, 90.4], [np.nan, 50]], index=["row 1", "row 2"], columns=["hat", "bag"])
    ax, bar = plots.heat_table(values, "mA (%)", (0, 100), {"bag": (0, 1)}).axes
    assert texts_of(ax) == ["10", "90", "–", "50"] and ax.images[0].get_clim() == bar.get_ylim() == (0, 100)
    assert ax.patches[0].get_xy() == (0.53, -0.5) and ax.patches[0].get_height() == 2


def test_boxes_are_drawn_at_their_pixels():
    scale = 2
    drawn = plots.boxed(np.zeros((20, 30, 3), np.uint8), {"white": (4, 5, 10, 8)}, scale=scale)
    rows, columns = np.nonzero((drawn == 255).all(-1))
    assert drawn.shape == (20 * scale, 30 * scale, 3)
    assert np.array([rows.min(), rows.max(), columns.min(), columns.max()]).tolist() == [
        5 * scale, 13 * scale, 4 * scale, 14 * scale
    ]  # fmt: skip


def test_names_of_classes_are_no_formulas():
    figure = plots.heat_table(pd.DataFrame({"U$ A$": [1.0], r"$\frac": [2.0]}, index=["a$_b$"]), "%", (0, 3))
    figure.canvas.draw()
    shown = {text.get_text() for ax in figure.axes for text in (*ax.get_xticklabels(), *ax.get_yticklabels())}
    assert {"U$ A$", r"$\frac", "a$_b$"} <= shown
