"""H-ViT's figures are legible, and its maps lie where their regions do."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion.models.hvit import figures
from companion.slides import Tiles
from companion.toy.datasets import slides as synthetic
from tests.viz.test_plots import overlapping_text, visible_texts

CORNERS = np.array([[8, 4], [40, 4], [8, 36]])
TILES = Tiles(CORNERS, np.ones(3), np.zeros(3), step=32, level=0, pixels=32, region=32)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def drawn():
    return synthetic.draw(np.random.default_rng(5), "place", 3, "test")


def level_maps():
    tissue = np.random.default_rng(0).integers(0, 255, (80, 90, 3)).astype(np.uint8)
    maps = {"patch level": figures.stitched(np.random.default_rng(1).random((3, 8, 8)), TILES, (80, 90))}
    maps = {"tissue": tissue} | maps | {"patch tokens, PCA": np.stack([maps["patch level"]] * 3, -1)}
    cores = {(8, 4): True, (40, 4): False, (8, 36): None}
    return figures.level_maps({"Global": (tissue, maps), "Local": (tissue, maps)}, cores=cores, side=32)


FIGURES = {
    "architecture": lambda: figures.architecture(drawn().image, drawn().corners, synthetic.REGION),
    "slide": lambda: figures.slide_and_regions(
        drawn().image, None, {"core region": drawn().image[:128, :128]}, "synthetic slide, grade 3"
    ),
    "losses": lambda: figures.losses(
        {"classification": [4, 4, 0.1], "regression": [9, 4, 1], "ordinal": [3, 2, 1], "corn": [3, 1, 1]},
        np.linspace(-1, 6, 9),
        np.linspace(-1, 6, 9).round(),
        2,
    ),
    "tiling": lambda: figures.tiling(drawn().image, drawn().image[..., 0], drawn().image[..., 0], CORNERS, 32),
    "levels": level_maps,
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_text_is_legible(name):
    figure = FIGURES[name]()
    assert overlapping_text(figure) == []
    assert min(text.get_fontsize() for text in visible_texts(figure)) >= 8


def test_maps_lie_on_their_regions():
    maps = np.arange(3 * 4).reshape(3, 2, 2) / 12
    found = figures.stitched(maps, TILES, (80, 90))
    assert found.shape == (80, 90) and np.isnan(found[:4]).all() and np.isnan(found[36:68, 40:]).all()
    for (x, y), values in zip(CORNERS, maps, strict=True):
        corners = found[y : y + 32, x : x + 32][::31, ::31]
        np.testing.assert_allclose(corners, values, atol=1e-6)
    half = figures.stitched(np.stack([maps] * 3, -1), TILES, (40, 45), 2)
    assert half.shape == (40, 45, 3)
    np.testing.assert_allclose(half[2:18:15, 4:20:15, 1], maps[0], atol=1e-6)


def test_core_regions_have_full_frames_and_rim_regions_dotted_ones():
    ax = plt.subplots()[1]
    figures.outline(ax, {(8, 4): True, (40, 4): False, (8, 36): None}, 32, 2.0)
    frames = [(patch.get_xy(), patch.get_width(), patch.get_linestyle()) for patch in ax.patches]
    assert frames == [((4, 2), 16, "-"), ((20, 2), 16, ":")]


def test_the_colour_bar_of_maps_spans_their_range():
    figure = level_maps()
    *panels, bar = figure.axes
    assert bar.get_ylim() == (0, 1) and bar.get_ylabel() == "rank"
    heat = [image for ax in panels for image in ax.images if image.get_array().dtype.kind == "f"]
    assert heat and all(image.get_clim() == (0, 1) for image in heat if image.get_array().ndim == 2)
