"""The tables that notebooks make of a study's rows."""

import numpy as np
import pandas as pd
import pytest

from companion.evaluation import ablations

SCORES = {("t", "a"): (50.0, 54.0), ("t", "b"): (51.0, 49.0), ("u", "a"): (10.0, 30.0)}


@pytest.fixture
def rows():
    """Two tasks; method b was not trained, and has no metric "PR"."""
    found = [
        {"stage": "test", "task": task, "method": method, "seed": seed, "SR": score, "PR": score / 2 + 0 * seed}
        for (task, method), scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    found += [{"stage": "select", "task": t, "method": "a", "seed": 9, "SR": 90.0, "PR": 90.0} for t in "tu"]
    frame = ablations.frame(found, "SR").assign(learning_rate=0.01)
    frame.loc[frame.method == "b", "PR"] = np.nan
    return frame


def test_spreads_are_means_and_deviations_over_test_seeds(rows):
    table = ablations.spreads(rows, ["SR", "PR"]).set_index(["task", "method"])
    assert table.loc[("t", "a")].to_dict() == {"SR": "52.0 ± 2.8", "PR": "26.0 ± 1.4", "learning rate": "0.01"}
    assert table.loc[("t", "b")].to_dict() == {"SR": "50.0 ± 1.4", "PR": "–", "learning rate": "–"}
    assert len(table) == 3


def test_spreads_count_the_seeds_that_a_method_wins(rows):
    table = ablations.spreads(rows[rows.task == "t"], ["SR"], against="a").set_index("method")
    assert table["lead of a, SR"].to_dict() == {"a": "", "b": "+2.0 ± 4.2"}
    assert table["seeds won"].to_dict() == {"a": "", "b": "1 of 2"}


def test_bar_tables_have_a_row_for_each_group(rows):
    means, deviations = ablations.bar_tables(rows, {"first": ("t", "SR"), "second": ("t", "PR")}, ["b", "a"])
    assert list(means.columns) == ["b", "a"] == list(deviations.columns)
    assert (
        means.loc["first"].tolist() == [50, 52] and means.loc["second", "a"] == 26 and pd.isna(means.loc["second", "b"])
    )
    assert deviations.loc["first", "a"] == pytest.approx(np.std(SCORES["t", "a"], ddof=1))
