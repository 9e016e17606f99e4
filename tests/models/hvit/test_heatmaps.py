"""Heatmaps: ranks, weighed levels, maps on their regions, alignment of shifted windows."""

import numpy as np
import torch

from companion.models import hvit
from companion.models.hvit import heatmaps
from companion.models.hvit.model import probabilities
from companion.models.hvit.slides import Tiles
from tests.models.common import refuses


def test_ranks_are_shares_of_what_is_lower_and_maps_of_patches_are_laid_row_by_row():
    assert heatmaps.ranks(np.array([[3.0, 1.0], [2.0, 3.0]])).tolist() == [[0.5, 0.0], [0.25, 0.5]]
    assert heatmaps.ranks(np.array([0.1, 0.7, 0.2]), axes=1).tolist() == [0, 2 / 3, 1 / 3]
    attention = np.random.default_rng(0).random((4, 2, 3, 3))
    laid = heatmaps.patch_map(attention)
    assert laid.shape == (2, 6, 6)
    np.testing.assert_array_equal(laid[1, :3, 3:], heatmaps.ranks(attention[1, 1]))
    assert heatmaps.region_map(attention[:2, 0], 6).shape == (2, 6, 6)


def test_factorised_maps_weigh_the_levels():
    patch, region = np.random.default_rng(0).random((2, 8, 8))
    for gamma, expected in ((0.5, (patch + region + 0.3) / 3), (0.0, patch)):
        np.testing.assert_allclose(heatmaps.factorised(patch, region, 0.3, gamma, "local"), expected)


def test_probabilities_sum_to_one_and_belong_to_the_prediction():
    outputs = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    for head in ("classification", "ordinal", "coral", "corn"):
        found, grades = probabilities(head, outputs), hvit.graded(head, outputs, 5)
        torch.testing.assert_close(found.sum(1), torch.ones(200))
        assert found.min() >= 0 and found.shape == (200, 4 if head == "classification" else 5)
        # an ordinal head's prediction is the median, a classifier's the mode
        median = (found.cumsum(1) < 0.5).sum(1)
        assert torch.equal(grades, found.argmax(1) if head == "classification" else median), head
    refuses((lambda: probabilities("regression", outputs), "regression"))


def placed(*corners: tuple[int, int]) -> Tiles:
    count = len(corners)
    return Tiles(np.array(corners), np.ones(count), np.zeros(count), step=32, level=0, pixels=32, region=32)


def test_maps_lie_on_their_regions():
    corners = (8, 4), (40, 4), (8, 36)
    maps = np.arange(3 * 4).reshape(3, 2, 2) / 12
    found = heatmaps.stitched(maps, placed(*corners), (80, 90))
    assert found.shape == (80, 90) and np.isnan(found[:4]).all() and np.isnan(found[36:68, 40:]).all()
    for (x, y), values in zip(corners, maps, strict=True):
        np.testing.assert_allclose(found[y : y + 32, x : x + 32][::31, ::31], values, atol=1e-6)
    half = heatmaps.stitched(np.stack([maps] * 3, -1), placed(*corners), (40, 45), 2)
    np.testing.assert_allclose(half[2:18:15, 4:20:15, 1], maps[0], atol=1e-6)


def test_overlapping_maps_are_averaged_and_cropped():
    maps = np.full((3, 1, 1), [[[0.2]], [[0.8]], [[0.4]]])
    scores = heatmaps.stitched(maps, placed((0, 0), (16, 0), (-8, 24)), (8, 10), 8)
    assert scores[0, :6].tolist() == np.float32([0.2, 0.2, 0.5, 0.5, 0.8, 0.8]).tolist()
    assert np.isnan(scores[:, 6:]).all() and np.isclose(scores[3, 0], 0.3)
