"""The selected learning rates of a study, and the tables of its rows."""

import itertools

import numpy as np
import pandas as pd
import pytest

from companion.errors import CorruptFile
from companion.evaluation import ablations

SCORES = {("t", "a"): (50.0, 54.0), ("t", "b"): (51.0, 49.0), ("u", "a"): (10.0, 30.0)}


@pytest.fixture
def rows():
    """Two tasks; method b has no learning rate and no metric "PR"."""
    found = [
        {"stage": "test", "task": task, "method": method, "seed": seed, "SR": score, "PR": score / 2}
        for (task, method), scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    found += [{"stage": "select", "task": t, "method": "a", "seed": 9, "SR": 90.0, "PR": 90.0} for t in "tu"]
    frame = ablations.frame(found, "SR").assign(learning_rate=0.01)
    frame.loc[frame.method == "b", "PR"] = np.nan
    return frame


def test_the_rate_with_the_best_mean_on_validation_is_selected_and_the_smaller_one_in_ties():
    validation = {("mean", 0.1): (50, 48), ("mean", 0.3): (49, 50), ("tie", 0.3): (50, 50), ("tie", 0.1): (50, 50)}
    validation |= {("middle", rate): (rate == 0.2,) * 2 for rate in (0.1, 0.2, 0.3)}
    rows = pd.DataFrame(
        [
            {
                "stage": "select",
                "task": "t",
                "method": method,
                "learning_rate": rate,
                "seed": seed,
                "accuracy": float(x),
            }
            for (method, rate), scores in validation.items()
            for seed, x in enumerate(scores)
        ]
    )
    tested = rows.assign(stage="test", accuracy=100 - rows.accuracy)
    rows = pd.concat([rows, tested])
    assert ablations.selected(rows) == {("t", "mean"): 0.3, ("t", "tie"): 0.1, ("t", "middle"): 0.2}
    assert ablations.at_ends(rows) == [("t", "mean"), ("t", "tie")]


def test_the_order_of_the_seeds_selects_no_rate():
    """Ties in decimals that are none in floating point, in each order of the rows."""
    scores = {0.1: (74.28, 76.83, 55.35), 0.2: (68.82, 68.82, 68.82), 0.3: (55.35, 74.28, 76.83)}
    for order in itertools.permutations(range(3)):
        found = [
            {"stage": "select", "task": "t", "method": "a", "learning_rate": rate, "seed": seed, "accuracy": x[seed]}
            for rate, x in reversed(scores.items())
            for seed in order
        ]
        assert ablations.selected(pd.DataFrame(found)) == {("t", "a"): 0.1}


def test_spreads_are_means_and_standard_deviations_over_test_seeds(rows):
    table = ablations.spreads(rows, ["SR", "PR"]).set_index(["task", "method"])
    assert table.loc[("t", "a")].to_dict() == {"SR": "52.0 ± 2.8", "PR": "26.0 ± 1.4", "learning rate": "0.01"}
    assert table.loc[("t", "b")].to_dict() == {"SR": "50.0 ± 1.4", "PR": "–", "learning rate": "–"}
    leads = ablations.spreads(rows[rows.task == "t"], ["SR"], against="a").iloc[:, 3:5].to_numpy().tolist()
    assert leads == [["", ""], ["+2.0 ± 4.2", "1 of 2"]]


def test_bar_tables_have_a_row_for_each_group(rows):
    means, stds = ablations.bar_tables(rows, {"first": ("t", "SR"), "second": ("t", "PR")}, ["b", "a"])
    expected = pd.DataFrame([[50.0, 52.0], [np.nan, 26.0]], index=["first", "second"], columns=["b", "a"])
    pd.testing.assert_frame_equal(means, expected, check_names=False)
    assert stds.loc["first", "a"] == pytest.approx(np.std(SCORES["t", "a"], ddof=1))


def test_rows_are_read_and_an_incomplete_one_is_refused(rows, tmp_path):
    (tmp_path / "study.json").write_text('{"metric": "SR"}')
    rows.to_csv(tmp_path / "study.csv", index=False)
    found = ablations.read(tmp_path)
    assert len(found) == 8 and found.attrs["metric"] == "SR"
    rows.assign(SR=np.nan).to_csv(tmp_path / "study.csv", index=False)
    with pytest.raises(CorruptFile, match=r"study\.csv"):
        ablations.read(tmp_path)
