"""MetaSegNet's figures show the values that they are given."""

import numpy as np
import torch
from matplotlib.colors import to_rgb

from companion.models.metasegnet import figures
from companion.toy.live.metasegnet import CLASSES


def test_pixels_have_the_colours_of_their_class_or_of_the_only_network_that_is_correct():
    classes = figures.painted(np.array([[0, 7, 8]]), CLASSES)[:, 0].T
    expected = [to_rgb(CLASSES["bareland"]), to_rgb(CLASSES["building"]), (0, 0, 0)]  # 8 is no class
    torch.testing.assert_close(classes, torch.tensor(expected))
    predicted = {"MetaSegNet": torch.tensor([[0, 1, 0, 0]]), "unimodal": torch.tensor([[0, 0, 2, 0]])}
    found = figures.differing(torch.tensor([[0, 1, 2, 3]]), predicted)[:, 0].T
    own = [to_rgb(figures.ONLY[name]) for name in predicted]
    torch.testing.assert_close(found, torch.tensor([(0.93,) * 3, *own, (0.93,) * 3]))


def test_attention_of_classes_is_shown_relative_to_their_mean():
    values = np.array([[60.0, 40.0], [20.0, 80.0]])
    figure = figures.classes_and_words({"a": (["one", "two"], values)}, ["x", "y"])
    assert np.allclose(figure.axes[0].images[0].get_array(), [[20, -20], [-20, 20]])
