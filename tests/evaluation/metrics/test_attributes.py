"""Attribute scores: the threshold, names. The authors' numbers are a recorded case (tests/parity/promptpar)."""

import numpy as np

from companion.evaluation.metrics.attributes import decode, evaluate
from tests.models.common import refuses


def test_scores_by_hand_and_a_probability_at_the_threshold_is_negative():
    y, p = np.array([[1, 0], [0, 0]]), np.array([[0.45, 0.1], [0.1, 0.6]])
    assert evaluate(y, p).totals["Rec"] == 0 and evaluate(y, p, 0.449).totals["Rec"] == 50
    table = evaluate(y, p, 0.4).per_attribute(["hat", "bag"])
    assert table.to_dict("list") == {"attribute": ["hat", "bag"], "positives": [50, 0], "mA": [100, 25], "F1": [100, 0]}


def test_predicted_attributes_are_named_the_most_probable_first():
    found = decode(np.array([[0.88, 0.05, 0.9], [0.1, 0.1, 0.1]]), ["hat", "bag", "boots"])
    assert [list(row.items()) for row in found] == [[("boots", 0.9), ("hat", 0.88)], []]
    assert decode(np.array([[0.45, 0.5]]), ["hat", "bag"], 0.45) == [{"bag": 0.5}], "more than the threshold"


def test_what_cannot_be_scored_is_refused():
    y = np.zeros((1, 2))
    refuses(
        (lambda: evaluate(np.zeros((2, 3)), np.zeros((3, 2))), r"\(2, 3\)"),
        (lambda: evaluate(y, np.array([[3.0, -1.0]])), "3 at"),
        (lambda: evaluate(y, np.array([[0.5, np.nan]])), "nan"),
        (lambda: evaluate(y, y).per_attribute(["hat"]), "2"),
        (lambda: decode(y, ["hat"]), "1"),
    )
