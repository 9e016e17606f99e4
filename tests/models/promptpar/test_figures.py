"""PromptPAR's figures are legible and show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox

from companion.models.promptpar import figures
from companion.models.promptpar.model import region_mask, strips
from companion.toy.datasets import pedestrians as synthetic
from tests.viz.test_plots import overlapping_text, visible_texts

SPANS = [(first / 8, after / 8) for first, after in strips(8, 4, 2)]
MASK = region_mask((8, 4), 10)
IMAGES = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
NAMES = list(synthetic.ATTRIBUTES)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def person() -> np.ndarray:
    return synthetic.draw(np.random.default_rng(4), synthetic.dressed(np.random.default_rng(8)), "test", "clear")


def region_maps():
    maps = torch.rand(5, 8, 4, generator=torch.Generator().manual_seed(1))
    return figures.region_maps(IMAGES[0], {"PromptPAR, not masked": maps, "PromptPAR": maps / 2}, "synthetic")


def attribute_maps():
    titles = ["present,\npredicted 0.93", "absent,\npredicted 0.12"]
    return figures.attribute_maps(IMAGES, torch.rand(2, 8, 4) / 32, torch.rand(2, 8, 4), titles)


FIGURES = {
    "architecture": lambda: figures.architecture(person(), SPANS),
    "mask": lambda: figures.mask(MASK, 15, "8 × 4 patches"),
    "strips": lambda: figures.strips({"intended": torch.ones(4, 14, 14) > 0, "released": torch.ones(4, 14, 14) < 0}),
    "weights": lambda: figures.weights_and_schedule(
        *(np.linspace(0, 1, 5) for _ in range(3)), {"heads": np.linspace(0, 8e-3, 9), "prompts": np.zeros(9)}
    ),
    "people": lambda: figures.people(
        IMAGES.repeat(4, 1, 1, 1), torch.ones(8, 12).tril(4), NAMES, "synthetic pedestrians"
    ),
    "region maps": region_maps,
    "attribute maps": attribute_maps,
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_text_is_legible(name):
    figure = FIGURES[name]()
    assert overlapping_text(figure) == []
    assert min(text.get_fontsize() for text in visible_texts(figure)) >= 8


def test_the_diagram_shows_the_strips_next_to_their_groups():
    (ax,) = FIGURES["architecture"]().axes
    boxes = [artist for artist in ax.artists if isinstance(artist, AnnotationBbox)]
    assert [len(box.offsetbox.get_data()) for box in boxes] == [64, 24, 32, 32, 24]
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    rows = [heights[name] for name in ("all\npatches", "strip 1", "strip 2", "strip 3", "strip 4")]
    assert [box.xybox[1] for box in boxes] == rows
    assert [heights[f"$LC_{r}, P_{r}$"] for r in range(1, 5)] == rows[1:]
    arrows = [(a.xyann[1], a.xy[1]) for a in ax.texts if hasattr(a, "xyann") and a.xy[0] == 2.3]
    assert arrows == [(row, row) for row in rows], "each arrow goes from a strip to its own group"


def test_the_mask_is_drawn_as_it_is():
    (ax,) = FIGURES["mask"]().axes
    assert np.array_equal(ax.images[0].get_array(), ~MASK.numpy())


def test_maps_of_all_methods_have_one_scale():
    *panels, bar = region_maps().axes
    heat = [ax.images[0] for ax in panels if ax.images[0].get_array().ndim == 2]
    assert len(panels) == 12 and len(heat) == 10
    assert {image.get_clim() for image in heat} == {bar.get_ylim()}
    first, last = heat[0].get_array(), heat[5].get_array()
    np.testing.assert_allclose(first, 2 * last, rtol=1e-6)  # methods from top to bottom, tokens from left to right


def test_attributes_are_named_only_where_they_are_few():
    few, many = FIGURES["people"](), figures.people(IMAGES, torch.ones(2, 20), [str(i) for i in range(20)], "many")
    assert few.axes[7].get_xlabel().split("\n") == NAMES
    assert many.axes[0].get_xlabel() == "20 attributes"
