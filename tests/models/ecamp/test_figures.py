"""ECAMP's figures show the numbers that they are given, in the right panel."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from companion.models.ecamp import Batch, figures
from companion.models.ecamp import model as ecamp
from companion.toy.datasets import chests

IMAGES = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[8, 16, 24, 40], [0, 0, 64, 64], [1, 2, 3, 4], [10, 10, 20, 30]])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn_box(patch):
    """Left, top, right, bottom of a rectangle in pixels, the last two exclusive."""
    x, y = patch.get_xy()
    return [x + 0.5, y + 0.5, x + patch.get_width() + 0.5, y + patch.get_height() + 0.5]


@pytest.fixture(scope="module")
def traced():
    """A pocket model, a batch of two pairs, and its trace."""
    torch.manual_seed(0)
    model, words = ecamp.build("pocket", words=40).eval(), torch.randint(5, 40, (2, 20))
    window = torch.tensor([[0, 1], [2, 2]])
    batch = Batch(
        torch.randn(2, 3, 64, 64), words, words, torch.ones(2, 20), torch.ones(2, 20), torch.rand(2, 64), window
    )
    trace = {}
    with torch.no_grad():
        model(batch, trace)
    return model, batch, trace


def test_the_architecture_shows_a_quarter_of_the_patches():
    image = np.full((64, 64), 0.25)
    figure = figures.architecture(image)
    (shown,) = [found for found in figure.axes[0].artists if hasattr(found, "offsetbox")]
    pixels = np.asarray(shown.offsetbox.get_data())
    assert (pixels == 0.25).mean() == 0.25 and len(figure.axes[0].texts) > 9
    labels = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"({number})" in labels for number in (1, 2, 3, 4, 5, 7, 8)), "the equations of the notebook"


def test_bars_of_the_words_have_the_colour_of_their_role():
    roles = ["boiler-plate", "other", "descriptor", "entity"]
    figure = figures.weights(["there", "is", "small", "nodule"], [0.05, 0.1, 2.5, 1], roles, "t")
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in figure.axes[0].patches}
    assert [bars[i].get_height() for i in range(4)] == [0.05, 0.1, 2.5, 1]
    assert [to_hex(bars[i].get_facecolor()) for i in range(4)] == [figures.ROLES[r].lower() for r in roles]


def test_images_have_the_box_of_their_lesion():
    figure = figures.images(IMAGES[:3], BOXES, ["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", ""]
    assert [drawn_box(ax.patches[0]) for ax in figure.axes[:3]] == BOXES[:3].tolist() and not figure.axes[3].patches
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, (chests.MEAN + chests.STD * IMAGES[1, 0]).clamp(0, 1), atol=1e-6)


def test_reconstructions_are_those_of_the_model(traced):
    model, batch, trace = traced
    rows = figures.reconstructed(model, batch, trace)
    assert list(rows) == ["visible patches", "reconstruction", "super-resolved", "original"]
    visible, seen = rows["visible patches"], ~rows["visible patches"].isnan()
    assert seen.float().mean() == 0.25 and torch.equal(visible[seen], trace["low"][seen])
    assert torch.equal(ecamp.patchify(rows["reconstruction"], 4), trace["pixels"])
    figure = figures.reconstructions(model, batch, trace, ["one", "two"], 0.5, 0.15)
    panels = np.array(figure.axes).reshape(4, 2)
    # windows of 6 patches of 8 pixels, whose corners are row and column
    assert [drawn_box(ax.patches[0]) for ax in panels[2]] == [[8, 0, 56, 48], [16, 16, 64, 64]]
    assert not any(ax.patches for ax in panels[[0, 1, 3]].flat)
    hidden = panels[0, 0].images[0].get_array()[~seen[0, 0].numpy()]
    np.testing.assert_allclose(hidden, 0.89, atol=1e-5)


def test_variants_show_what_they_have(traced):
    _, batch, _ = traced
    for options, expected in (
        ({"text": False, "super_resolution": False}, ["visible patches", "reconstruction", "original"]),
        ({"predict": "high-res", "super_resolution": False}, ["visible patches", "original"]),
    ):
        model, trace = ecamp.build("pocket", **options), {}
        model(batch, trace)
        assert list(figures.reconstructed(model, batch, trace)) == expected
    figure = figures.reconstructions(model, batch, trace, ["one", "two"], 0.5, 0.15)
    assert len(figure.axes) == 4


def test_super_resolution_maps_share_a_colour_bar():
    target, output = torch.tensor([-1.0, -1, 2]), torch.tensor([0.0, 0, 1])
    figure = figures.super_resolution(target, output, torch.full((8, 8), 3.0), torch.full((8, 8), 1.0))
    counts = figure.axes[0].collections[0].get_array()
    assert counts.sum() == 3 and counts.max() == 2
    errors = [ax.images[0] for ax in figure.axes[1:3]]
    assert [float(image.get_array().mean()) for image in errors] == [3, 1]
    assert {image.get_clim() for image in errors} == {(0, 4)} and len(figure.axes) == 5


def test_probabilities_of_words_by_image():
    chance = {"own": torch.eye(4)[:, :3], "another": torch.full((4, 3), 0.25)}
    figure = figures.word_probabilities(IMAGES, list("abcd"), ["x", "y", "z"], chance)
    lower = np.array(figure.axes).reshape(2, 4)[1]
    own, other = lower[1].containers
    assert [bar.get_width() for bar in own] == [0, 1, 0] and [bar.get_width() for bar in other] == [0.25] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["own image", "another image"]
    assert lower[0].get_ylim()[0] > lower[0].get_ylim()[1], "the first word is on top"


def test_attention_has_a_row_each_and_the_boxes():
    maps = {"masked": torch.rand(4, 8, 8), "visible": torch.rand(4, 8, 8)}
    figure = figures.attention(IMAGES, BOXES, maps, list("abcd"))
    panels = np.array(figure.axes[:12]).reshape(3, 4)
    for i, column in enumerate(panels.T):
        assert [drawn_box(ax.patches[0]) for ax in column] == [BOXES[i].tolist()] * 3
        np.testing.assert_allclose(column[2].images[-1].get_array(), maps["visible"][i], rtol=1e-6)
    assert [ax.get_title() for ax in panels[0]] == list("abcd") and len(figure.axes) == 13


def test_the_map_of_a_word_is_in_percent():
    heat = torch.rand(8, 8)
    figure = figures.word_map(IMAGES[0], BOXES[0], heat, "a report")
    np.testing.assert_allclose(figure.axes[1].images[-1].get_array(), 100 * heat, rtol=1e-6)
    assert [drawn_box(ax.patches[0]) for ax in figure.axes[:2]] == [BOXES[0].tolist()] * 2
