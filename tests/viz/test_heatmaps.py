"""Alignment of maps of shifted windows, and colours of scores; see also H-ViT's tests."""

import numpy as np

from companion.viz import heatmaps


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
