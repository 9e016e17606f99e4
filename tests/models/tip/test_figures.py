"""TIP's figures are legible and show the values that they are given."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

from companion.models.tip import figures
from tests.viz.test_plots import overlapping_text, visible_texts

TRACE = [
    {"step": step, "t": t, "site": site, "gamma": 10.0**i + step, "beta": 0.1 * (i + 1) + step}
    for step, t in enumerate((999, 599, 199))
    for i, site in enumerate(("skip 0", "skip 1", "middle"))
]


@pytest.mark.parametrize("draw", [figures.architecture, lambda: figures.adaptor_maps(TRACE)])
def test_text_is_legible(draw):
    figure = draw()
    assert overlapping_text(figure) == []
    assert all(text.get_fontsize() >= 8 for text in visible_texts(figure))
    for text in visible_texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


def test_maps_show_the_magnitudes_with_a_colour_bar_each():
    gamma, beta, *bars = figures.adaptor_maps(TRACE).axes
    assert len(bars) == 2
    np.testing.assert_allclose(gamma.images[0].get_array(), [[10.0**i + step for step in range(3)] for i in range(3)])
    np.testing.assert_allclose(beta.images[0].get_array()[2], [0.3, 1.3, 2.3])
    assert [label.get_text() for label in gamma.get_yticklabels()] == ["skip 0", "skip 1", "middle"]
    assert [label.get_text() for label in gamma.get_xticklabels()] == ["999", "599", "199"]


def test_maps_of_the_baselines_have_the_sites_that_are_fused():
    """A plain ControlNet has no gamma at any site, one whose middle is added none there; the middle may be left out."""
    added = [row | {"gamma": None} for row in TRACE]
    beta, *bars = figures.adaptor_maps(added).axes
    assert len(bars) == 1 and len(beta.get_yticklabels()) == 3
    middle_added = [row | {"gamma": None if row["site"] == "middle" else row["gamma"]} for row in TRACE]
    gamma, beta, *_ = figures.adaptor_maps(middle_added).axes
    assert [label.get_text() for label in gamma.get_yticklabels()] == ["skip 0", "skip 1"]
    assert [label.get_text() for label in beta.get_yticklabels()] == ["skip 0", "skip 1", "middle"]
    gamma, *_ = figures.adaptor_maps([row for row in TRACE if row["site"] != "middle"]).axes
    assert [label.get_text() for label in gamma.get_yticklabels()] == ["skip 0", "skip 1"]
