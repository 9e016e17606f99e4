"""Attribute scores: the authors' numbers, the definitions one image at a time, edge cases, bad inputs."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from companion.errors import BadParameter
from companion.evaluation.metrics.attributes import decode, evaluate
from companion.evaluation.parity import folder
from companion.ops.files import read_json

CASE = folder() / "promptpar" / "metrics"


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return load_file(CASE / "outputs.safetensors")


@pytest.mark.parametrize("threshold", [0.45, 0.5])
def test_the_authors_numbers(stored, threshold):
    """A row without positives, one without predictions, an attribute without positives, and a label of -1 are in it."""
    scores = evaluate(stored["gt"], stored["probs"], threshold)
    theirs = read_json(CASE / "case.json")["results"][str(threshold)]
    names = ["ma", *(f"instance_{name}" for name in ("acc", "prec", "recall", "f1"))]
    names += ["f1_of_mean_precision_and_recall (Rethinking_of_PAR)"]
    assert list(scores.totals) == ["mA", "Acc", "Prec", "Rec", "F1", "F1 of means"]
    assert list(scores.totals.values()) == pytest.approx([100 * theirs[name] for name in names], rel=1e-12)
    np.testing.assert_allclose(scores.balanced, 100 * stored[f"label_ma_{threshold}"], rtol=1e-12)
    np.testing.assert_allclose(scores.f1, 100 * stored[f"label_f1_{threshold}"], rtol=1e-12, atol=1e-12)


def test_perfect_and_empty_predictions():
    y = np.array([[1, 0], [0, 1]])
    assert set(evaluate(y, y.astype(float)).totals.values()) == {100.0}
    always = np.array([[1, 0, 1], [0, 1, 1]])
    assert evaluate(always, always.astype(float)).balanced.tolist() == [100, 100, 50]
    nothing = evaluate(always, np.zeros((2, 3)))
    assert nothing.balanced.tolist() == [50, 50, 0]
    assert {nothing.totals[k] for k in ("Acc", "Prec", "Rec", "F1", "F1 of means")} == {0.0}


def test_the_threshold_is_exclusive():
    y, p = np.array([[1, 0], [0, 0]]), np.array([[0.45, 0.1], [0.1, 0.2]])
    assert evaluate(y, p).totals["Rec"] == 0
    assert evaluate(y, p, 0.449).totals["Rec"] == 50  # the second image has none to recall


def test_decode_names_the_predicted_attributes():
    found = decode(np.array([[0.88, 0.05, 0.5], [0.1, 0.1, 0.1]]), ["hat", "bag", "boots"])
    assert [list(row) for row in found] == [["hat", "boots"], []] and found[0]["hat"] == 0.88
    assert decode(np.array([[0.6, 0.9]]), ["hat", "bag"], 0.5) == [{"bag": 0.9, "hat": 0.6}]
    with pytest.raises(BadParameter, match="one for each attribute"):
        decode(np.array([[0.88, 0.05]]), ["hat"])


def test_a_row_for_each_attribute():
    y, p = np.array([[1, 0], [0, 0]]), np.array([[0.9, 0.1], [0.1, 0.6]])
    table = evaluate(y, p).per_attribute(["hat", "bag"])
    assert table.to_dict("list") == {"attribute": ["hat", "bag"], "positives": [50, 0], "mA": [100, 25], "F1": [100, 0]}
    with pytest.raises(BadParameter, match="2, one for each attribute"):
        evaluate(y, p).per_attribute(["hat"])


@pytest.mark.parametrize(
    ("labels", "probabilities", "threshold", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), 0.5, r"\(2, 3\)"),
        (np.zeros(3), np.zeros(3), 0.5, "images by attributes"),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0.5, "images by attributes"),
        (np.zeros((1, 2)), np.array([[3.0, -1.0]]), 0.5, "sigmoid"),
        (np.zeros((1, 2)), np.array([[0.5, np.nan]]), 0.5, "sigmoid"),
        (np.zeros((1, 2)), np.zeros((1, 2)), 1.0, "threshold"),
    ],
)
def test_what_cannot_be_scored(labels, probabilities, threshold, message):
    with pytest.raises(BadParameter, match=message):
        evaluate(labels, probabilities, threshold)
