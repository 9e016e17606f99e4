"""Attribute scores: the authors' numbers, the threshold, names."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from companion.evaluation.metrics.attributes import decode, evaluate
from tests.parity.runner import ROOT as PARITY
from companion.ops.files import read_json
from tests.models.common import refuses

CASE = PARITY / "promptpar" / "metrics"


@pytest.mark.parametrize("threshold", [0.45, 0.5])
def test_the_authors_numbers(threshold):
    """The case has a row without positives, one without predictions, an attribute without positives, and a label -1."""
    stored, theirs = load_file(CASE / "outputs.safetensors"), read_json(CASE / "case.json")["results"][str(threshold)]
    names = ["ma", *(f"instance_{name}" for name in ("acc", "prec", "recall", "f1"))]
    names += ["f1_of_mean_precision_and_recall (Rethinking_of_PAR)"]
    scores = evaluate(stored["gt"], stored["probs"], threshold)
    ours = [scores.totals[name] for name in ("mA", "Acc", "Prec", "Rec", "F1", "F1 of means")]
    assert ours == pytest.approx([100 * theirs[name] for name in names], rel=1e-12)


def test_scores_by_hand_and_a_probability_at_the_threshold_is_negative():
    y, p = np.array([[1, 0], [0, 0]]), np.array([[0.45, 0.1], [0.1, 0.6]])
    assert evaluate(y, p).totals["Rec"] == 0 and evaluate(y, p, 0.449).totals["Rec"] == 50
    table = evaluate(y, p, 0.4).per_attribute(["hat", "bag"])
    assert table.to_dict("list") == {"attribute": ["hat", "bag"], "positives": [50, 0], "mA": [100, 25], "F1": [100, 0]}


def test_predicted_attributes_are_named_the_most_probable_first():
    found = decode(np.array([[0.88, 0.05, 0.9], [0.1, 0.1, 0.1]]), ["hat", "bag", "boots"])
    assert [list(row.items()) for row in found] == [[("boots", 0.9), ("hat", 0.88)], []]


def test_what_cannot_be_scored_is_refused():
    y = np.zeros((1, 2))
    refuses(
        (lambda: evaluate(np.zeros((2, 3)), np.zeros((3, 2))), r"\(2, 3\)"),
        (lambda: evaluate(y, np.array([[3.0, -1.0]])), "-1 to 3"),
        (lambda: evaluate(y, np.array([[0.5, np.nan]])), "nan"),
        (lambda: evaluate(y, y).per_attribute(["hat"]), "2"),
        (lambda: decode(y, ["hat"]), "1"),
    )
