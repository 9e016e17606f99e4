"""The house style is local to its figures, and its colours are stable and distinct."""

from importlib import import_module

import matplotlib.pyplot as plt
import numpy as np
import skimage.color

from companion.ops.papers import slugs
from companion.toy.encoders.teachers import TEACHERS
from companion.viz import plots
from companion.viz.style import _COLOUR_OF, COLOURS, method_colours, style


def test_style_stays_inside():
    before = dict(plt.rcParams)
    plots.curves({"a": {"loss": [1, 2]}})
    assert dict(plt.rcParams) == before
    with style():
        assert plt.rcParams["axes.spines.top"] is False
    assert dict(plt.rcParams) == before


def test_colours_differ_for_colour_blind_readers():
    """Simulated deuteranopia (Machado et al. 2009, severity 1): every two colours stay apart."""
    deuteranopia = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    )
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ deuteranopia.T, 0, 1)
    lab = skimage.color.rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 10


def test_a_method_has_one_colour_in_every_figure():
    alone, together = method_colours(["BAT", "RGB only"]), method_colours(["a variant", "RGB only", "BAT", "another"])
    assert {name: together[name] for name in alone} == alone
    assert len(set(together.values())) == 4
    figure = plots.curves({"a variant": {"loss": [1, 2]}, "BAT": {"loss": [2, 1]}})
    assert figure.axes[0].lines[1].get_color() == alone["BAT"]
    known = {name for slug in slugs() for name in import_module(f"companion.toy.ablations.{slug}").METHODS}
    assert set(_COLOUR_OF) <= known | set(TEACHERS)
