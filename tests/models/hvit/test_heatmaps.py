"""Heatmaps: ranks, weighed levels, maps on their regions, alignment of shifted windows, colours."""

import numpy as np
import pytest

from companion.errors import BadParameter
from companion.models.hvit import figures, heatmaps
from companion.models.hvit.slides import Tiles


def test_ranks_are_shares_of_what_is_lower_and_maps_of_patches_are_laid_row_by_row():
    assert heatmaps.ranks(np.array([[3.0, 1.0], [2.0, 3.0]])).tolist() == [[0.5, 0.0], [0.25, 0.5]]
    assert heatmaps.ranks(np.array([0.1, 0.7, 0.2]), axes=1).tolist() == [0, 2 / 3, 1 / 3]
    attention = np.random.default_rng(0).random((4, 2, 3, 3))
    laid = heatmaps.patch_map(attention)
    assert laid.shape == (2, 6, 6)
    np.testing.assert_array_equal(laid[1, :3, 3:], heatmaps.ranks(attention[1, 1]))
    assert heatmaps.region_map(attention[:2, 0], 6).shape == (2, 6, 6)
    with pytest.raises(BadParameter, match="7"):
        heatmaps.region_map(attention[0], 7)


def test_factorised_maps_weigh_the_levels():
    """Scores that are the same everywhere stay so; with the released weights Global's shrink unless gamma is 0.5."""
    patch, region = np.random.default_rng(0).random((2, 8, 8))
    for gamma, expected in ((0.5, (patch + region + 0.3) / 3), (0.0, patch)):
        for found in (
            heatmaps.factorised(patch, region, 0.3, gamma, "local"),
            heatmaps.granular([patch], [region], 0.3, 2, gamma, "local"),
        ):
            np.testing.assert_allclose(found, expected)
    flat = [np.full((8, 8), 0.6)] * 4
    for quirks, expected in ((False, 0.6), (True, 0.6 * 1.3 / 1.7)):
        found = heatmaps.granular(flat[:2], flat, 0.6, 1, 0.3, "global", official_quirks=quirks)
        np.testing.assert_allclose(found, expected)


def test_overlapping_maps_are_averaged():
    maps = [((0, 0), np.full((4, 4), 0.2)), ((16, 0), np.full((4, 4), 0.8)), ((-8, 24), np.full((4, 4), 0.4))]
    scores, there = heatmaps.stitch(maps, (8, 10), 8)
    assert scores[0].tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0, 0, 0, 0])  # overlaps are averaged
    assert there[:, 9].sum() == 0 and there[3, 0] and scores[3, 0] == pytest.approx(0.3)


def test_maps_lie_on_their_regions():
    corners = np.array([[8, 4], [40, 4], [8, 36]])
    tiles = Tiles(corners, np.ones(3), np.zeros(3), step=32, level=0, pixels=32, region=32)
    maps = np.arange(3 * 4).reshape(3, 2, 2) / 12
    found = figures.stitched(maps, tiles, (80, 90))
    assert found.shape == (80, 90) and np.isnan(found[:4]).all() and np.isnan(found[36:68, 40:]).all()
    for (x, y), values in zip(corners, maps, strict=True):
        np.testing.assert_allclose(found[y : y + 32, x : x + 32][::31, ::31], values, atol=1e-6)
    half = figures.stitched(np.stack([maps] * 3, -1), tiles, (40, 45), 2)
    np.testing.assert_allclose(half[2:18:15, 4:20:15, 1], maps[0], atol=1e-6)


def test_the_map_of_a_shifted_window_is_laid_where_it_belongs():
    """The first pixel of a window that is 2 further right and down lies at (2, 2)."""
    empty, shifted = np.zeros((8, 8)), np.zeros((8, 8))
    shifted[0, 0], shifted[0, 3] = 1.0, 0.5
    found = heatmaps.granular([empty, shifted], [empty, empty], 0.0, step=2, gamma=0.5)
    assert np.argwhere(found).tolist() == [[2, 2], [2, 5]]
    # of the two maps of one level of three, all of the same weight
    assert np.isclose(found[2, 2], 1 / 2 / 3) and np.isclose(found[2, 5], 0.5 / 2 / 3)


def test_scores_at_the_threshold_are_coloured():
    tissue, scores = np.full((1, 3, 3), 200, np.uint8), np.array([[0.4, 0.5, 0.6]])
    coloured = heatmaps.overlay(tissue, scores, np.ones((1, 3), bool), threshold=0.5)
    assert (coloured != tissue).any(-1).tolist() == [[False, True, True]]
