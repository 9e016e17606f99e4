"""MetaSegNet's figures are legible, and their colours are those of the classes and of the networks."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from companion.models.metasegnet import figures
from companion.toy.datasets import landcover
from companion.toy.live.metasegnet import CLASSES
from tests.viz.test_plots import overlapping_text, visible_texts

IMAGE, LABELS = landcover.pictures("Csa", 1, "train", 3)[0]
WORDS = ["climate", "zone", "unknown", "bare", "land", "is", "brown", "ploughed", "soil"]
ZONES = {zone: (entry.moisture, entry.style) for zone, entry in landcover.ZONES.items()}


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def attention(*shape):
    return torch.from_numpy(np.random.default_rng(0).dirichlet([0.3] * shape[-1], shape[:-1]))


def land_cover():
    rgb = torch.tensor(IMAGE / 255).permute(2, 0, 1)
    row = [rgb, LABELS, torch.tensor(LABELS), figures.differing(torch.tensor(LABELS), truths())]
    legend = CLASSES | {f"{name} alone correct": colour for name, colour in figures.ONLY.items()}
    return figures.land_cover({"BSh": row, "Csa, left out": row}, legend, ("image", "truth", "MetaSegNet", "one"))


def truths():
    return {name: torch.tensor(LABELS) for name in figures.ONLY}


FIGURES = {
    "architecture": lambda: figures.architecture(IMAGE, LABELS, CLASSES, "“climate zone Csa,\nbare land is …”"),
    "land cover": land_cover,
    "word maps": lambda: figures.word_maps(
        torch.tensor(IMAGE / 255).permute(2, 0, 1),
        {f"stage {k}": attention(32 >> k, 32 >> k, len(WORDS)) for k in range(1, 5)},
        WORDS,
        [0, 2, 4, 5, 7, 8],
    ),
    "classes and words": lambda: figures.classes_and_words(
        {f"{n}, stage 1": (WORDS, attention(8, len(WORDS)).numpy()) for n in ("MetaSegNet", "MiniLM text")}, [*CLASSES]
    ),
    "prompts": lambda: figures.prompt_components(
        {name: np.random.default_rng(1).normal(size=(9, 12)) for name in ("before", "after", "MiniLM")},
        ZONES,
        landcover.MOISTURES,
        "Csa",
    ),
    "gradients": lambda: figures.gradients({n: torch.rand(32, 32) for n in ("convolutions", "windows", "all")}, 13, 18),
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_text_is_legible(name):
    figure = FIGURES[name]()
    pairs = overlapping_text(figure)
    if name == "prompts":  # the labels of random points may cover each other
        pairs = [pair for pair in pairs if not set(pair) <= set(ZONES)]
    assert pairs == []
    assert min(text.get_fontsize() for text in visible_texts(figure)) >= 8


def test_labels_have_the_colours_of_their_classes():
    found = figures.painted(np.array([[0, 7, 8]]), CLASSES)
    expected = [to_rgb(CLASSES["bareland"]), to_rgb(CLASSES["building"]), (0, 0, 0)]
    assert torch.allclose(found[:, 0].T, torch.tensor(expected))
    image = torch.rand(3, 2, 2)
    assert figures.painted(image, CLASSES) is image


def test_a_pixel_has_the_colour_of_the_network_that_is_alone_correct():
    truth = torch.tensor([[0, 1, 2, 3]])
    predicted = {"MetaSegNet": torch.tensor([[0, 1, 0, 0]]), "unimodal": torch.tensor([[0, 0, 2, 0]])}
    found = figures.differing(truth, predicted)[:, 0].T
    own = {name: torch.tensor(to_rgb(colour)) for name, colour in figures.ONLY.items()}
    assert torch.allclose(found[1], own["MetaSegNet"]) and torch.allclose(found[2], own["unimodal"])
    assert torch.allclose(found[[0, 3]], torch.tensor(0.93))


def test_attention_of_classes_is_shown_relative_to_their_mean():
    values = np.array([[60.0, 40.0], [20.0, 80.0]])
    figure = figures.classes_and_words({"a": (["one", "two"], values)}, ["x", "y"])
    assert np.allclose(figure.axes[0].images[0].get_array(), [[20, -20], [-20, 20]])


def test_components_are_principal():
    vectors = np.zeros((9, 3))
    vectors[:, 1], vectors[:, 2] = np.arange(9.0), [0, 1] * 4 + [0]
    figure = figures.prompt_components({"a": vectors}, ZONES, landcover.MOISTURES, "Am")
    spread = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert np.isclose(np.ptp(spread[:, 0]), 8, atol=0.3) and "100 %" in figure.axes[0].get_xlabel()
