"""TIP's figures show the values that they are given."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

from companion.models.tip import figures

TRACE = [
    {"step": step, "t": t, "site": site, "gamma": 10.0**i + step, "beta": 0.1 * (i + 1) + step}
    for step, t in enumerate((999, 599, 199))
    for i, site in enumerate(("skip 0", "skip 1", "middle"))
]


def test_maps_show_the_magnitudes_of_the_sites_that_are_fused():
    gamma, beta, *_ = figures.adaptor_maps(TRACE).axes
    np.testing.assert_allclose(gamma.images[0].get_array(), [[10.0**i + step for step in range(3)] for i in range(3)])
    np.testing.assert_allclose(beta.images[0].get_array()[2], [0.3, 1.3, 2.3])
    (beta, _) = figures.adaptor_maps([row | {"gamma": None} for row in TRACE]).axes  # a plain ControlNet
    np.testing.assert_allclose(beta.images[0].get_array()[2], [0.3, 1.3, 2.3])
