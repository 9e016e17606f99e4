"""The house style stays inside its figures, and a method has one colour."""

import matplotlib.pyplot as plt

from companion.viz import plots
from companion.viz.style import method_colours, style


def test_the_style_is_set_inside_a_figure_only():
    before = dict(plt.rcParams)
    with style():
        assert not plt.rcParams["axes.spines.top"]
    figure = plots.curves({"a": {"loss": [1, 2]}})
    assert dict(plt.rcParams) == before and not figure.axes[0].spines["top"].get_visible()


def test_a_method_has_one_colour_in_every_figure():
    alone, together = method_colours(["BAT", "RGB only"]), method_colours(["a variant", "RGB only", "BAT", "another"])
    assert {name: together[name] for name in alone} == alone
    assert len(set(together.values())) == 4
    figure = plots.curves({"a variant": {"loss": [1, 2]}, "BAT": {"loss": [2, 1]}})
    assert figure.axes[0].lines[1].get_color() == alone["BAT"]
