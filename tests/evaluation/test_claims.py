"""Claims are judged by measurements: on real data, on the seeds of a study, or by a tolerance."""

import math
import re

import pandas as pd
import pytest

from companion.evaluation.claims import (
    CHECK,
    PAPER,
    SYNTHETIC,
    counts,
    evidence,
    interval,
    judge,
    judge_measured,
    rates,
    within,
)
from tests.models.common import refuses

REACHED = {"of": ["ours", "mA"], "at_least": 88.0}
AHEAD = {"of": ["ours", "mA"], "over": ["baseline", "mA"], "by": 1.5}
OURS, BASELINE = ("ours", "mA"), ("baseline", "mA")


@pytest.mark.parametrize(
    ("conditions", "cells", "expected"),
    [
        ([REACHED], {OURS: 88.0}, True),
        ([REACHED], {OURS: 87.9}, False),
        ([REACHED], {("ours", "F1"): 99.0}, None),
        ([REACHED], {OURS: math.nan}, None),
        ([AHEAD], {OURS: 2.0, BASELINE: 0.5}, True),
        ([AHEAD], {OURS: 2.0, BASELINE: 0.6}, False),
        ([AHEAD], {OURS: 2.0, BASELINE: math.nan}, None),
        ([AHEAD | {"by": 0}], {OURS: 2.0, BASELINE: 2.0}, False),
        ([AHEAD | {"by": 0.3}], {OURS: 88.3, BASELINE: 88.0}, True),
        ([REACHED, AHEAD], {OURS: 89.0}, None),  # not all is measured
        ([REACHED, AHEAD], {OURS: 87.0}, False),  # one that is not met refutes
    ],
)
def test_a_paper_result_holds_fails_or_was_not_run(conditions, cells, expected):
    assert judge_measured(conditions, cells)[0] is expected


@pytest.mark.parametrize(
    ("value", "tolerance", "holds", "text"),
    [
        (3.2e-7, 1e-5, True, "A: at most 1e-6"),
        (0.0, 1e-5, True, "A: at most 1e-6"),  # the same text as on a machine where it is 3.2e-7
        (1e-5, 1e-5, True, "A: at most 1e-5"),
        (0.0, 0, True, "A: exactly 0"),
        (1.04e-5, 1e-5, False, "A: 1e-05"),
        (1e-12, 0, False, "A: 1e-12"),
        (math.nan, 1e-5, False, "A: nan"),
    ],
)
def test_differences_hold_within_the_tolerance_and_are_written_without_noise(value, tolerance, holds, text):
    found, written = within({"A": value}, tolerance)
    assert found is holds and written.startswith(text)
    assert within({"B": 0.0, "A": value}, tolerance)[0] is holds and not within({}, tolerance)[0]


def rows(stage: str, scores: dict[str, list[float]], rate: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"stage": stage, "task": "t", "method": method, "learning_rate": rate, "seed": seed, "accuracy": score}
            for method, values in scores.items()
            for seed, score in enumerate(values)
        ]
    )


@pytest.mark.parametrize(("leads", "holds"), [([5.0, 3, 4], True), ([5.0, -1, 4], False), ([5.0, 0, 4], False)])
def test_a_synthetic_result_needs_a_lead_on_every_test_seed(leads, holds):
    tested = rows("test", {"ours": [60 + lead for lead in leads], "theirs": [60.0] * 3})
    study = pd.concat([tested, rows("select", {"ours": [0.0] * 3, "theirs": [90.0] * 3})])
    claim = {"tasks": ["t"], "better": "ours", "worse": "theirs"}
    found, text, seeds = judge(claim, study)
    assert found is holds and seeds == [0, 1, 2]
    assert text.startswith(f"t {sum(leads) / 3:+.1f} ± ")
    assert judge({"tasks": ["t"], "better": "ours"}, tested)[0]  # a difference already: above zero


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        ([0], [0], "[0]"),
        ([0, 1, 2], [0, 1], "theirs on t"),
        ([0, 1], [0, 1, 2], "ours on t"),
        ([0, 1], [2, 3], "ours on t"),
        ([0, 1, 1], [0, 1], "[0, 1, 1]"),
        ([0, 1], [], "theirs on t"),
        ([], [], "ours on t"),
    ],
)
def test_a_synthetic_result_is_judged_on_a_full_table_alone(ours, theirs, named):
    found = [
        {"stage": "test", "task": "t", "method": method, "seed": seed, "accuracy": 60.0 + seed}
        for method, seeds in {"ours": ours, "theirs": theirs}.items()
        for seed in seeds
    ]
    study = pd.DataFrame(found, columns=["stage", "task", "method", "seed", "accuracy"])
    claim = {"tasks": ["t"], "better": "ours", "worse": "theirs"}
    refuses((lambda: judge(claim, study), re.escape(named)))
    whole = rows("test", {"ours": [61.0, 62.0], "theirs": [60.0, 60.0]})
    assert judge(claim, whole)[0]
    refuses(
        (lambda: judge(claim, whole.replace(61.0, math.nan)), "ours on t"),
        (lambda: judge(claim | {"metrics": ["kappa"]}, whole), "kappa"),
        (lambda: judge(claim | {"tasks": ["t", "u"]}, whole), "ours on u"),
    )


def test_the_interval_of_a_mean_lead_is_students():
    assert interval([3.0, 1.0, 2.0, 6.0, 3.0]) == pytest.approx((0.6768, 5.3232), abs=1e-3)


def test_a_selected_rate_is_named_with_its_neighbours_of_the_grid():
    grid = {0.1: 60.0, 0.3: 70.0, 1.0: 40.0, 3.0: 9.0}
    study = pd.concat([rows("select", {"ours": [score]}, rate) for rate, score in grid.items()])
    assert rates(study, "t", "ours") == "0.3 (70.0 on validation; at 0.1: 60.0, 1: 40.0)"
    assert rates(study, "t", "untrained") == ""


def test_the_evidence_of_a_claim_has_what_limits_it():
    grid = {0.1: 60.0, 0.3: 70.0}
    study = pd.concat(rows("select", {"ours": [9.0], "theirs": [score]}, rate) for rate, score in grid.items())
    study = pd.concat([study, rows("test", {"ours": [80.0], "theirs": [75.0]}, 0.3)]).assign(
        trained=[1234] * 4 + [5, 6]
    )
    claim, data = {"tasks": ["t"], "better": "ours", "worse": "theirs", "limits": "one image"}, {"t": "counting"}
    text = evidence(claim, data, study)
    for part in ("t: counting", "one image", "ours 5, theirs 6", "of theirs: 0.3 (70.0 "):
        assert part in text
    alone = evidence({"tasks": ["t"], "better": "ours", "favours": True}, data, study.drop(columns="trained"))
    assert "theirs" not in alone and "arameters" not in alone and "one image" not in alone
    assert ("favour the method" in alone, "favour the method" in text) == (True, False)


def test_claims_are_counted_by_kind():
    states = {CHECK: ["holds", "holds"], SYNTHETIC: ["fails", "holds", "not run"], PAPER: ["not run"]}
    ledger = [{"kind": kind, "status": status} for kind, found in states.items() for status in found]
    expected = {CHECK: "2 of 2 hold", SYNTHETIC: "1 of 2 hold, 1 not run", PAPER: "1 not run"}
    assert counts(ledger) == expected and counts(ledger[:2]) == expected | {SYNTHETIC: "none", PAPER: "none"}
