"""Paper results are judged by our measurements on real data as soon as they exist; exact claims by differences."""

import math

import pandas as pd
import pytest

from companion.evaluation.claims import PAPER, evidence, judge_measured, within
from companion.ops import report
from companion.ops.papers import paper, slugs

REACHED = {"of": ["ours", "mA"], "at_least": 88.0}
AHEAD = {"of": ["ours", "mA"], "over": ["baseline", "mA"], "by": 1.5}
OURS, BASELINE = ("ours", "mA"), ("baseline", "mA")


@pytest.mark.parametrize(
    ("conditions", "cells", "expected"),
    [
        ([REACHED], {OURS: 88.0}, True),
        ([REACHED], {OURS: 87.9}, False),
        ([REACHED], {("ours", "F1"): 99.0}, None),
        ([AHEAD], {OURS: 2.0, BASELINE: 0.5}, True),
        ([AHEAD], {OURS: 2.0, BASELINE: 0.6}, False),
        ([AHEAD | {"by": 0}], {OURS: 2.0, BASELINE: 2.0}, False),
        ([AHEAD | {"by": 0.3}], {OURS: 88.3, BASELINE: 88.0}, True),
        ([REACHED, AHEAD], {OURS: 89.0}, None),  # not all is measured
        ([REACHED, AHEAD], {OURS: 87.0}, False),  # one that is not met refutes
    ],
)
def test_conditions(conditions, cells, expected):
    holds, value = judge_measured(conditions, cells)
    assert holds is expected
    absent = OURS not in cells or (BASELINE not in cells and AHEAD in conditions)
    assert ("not run" in value) == absent


def test_nan_is_no_measurement():
    assert judge_measured([REACHED], {OURS: math.nan}) == (None, "ours, mA: not run")
    assert judge_measured([AHEAD], {OURS: 2.0, BASELINE: math.nan}) == (None, "baseline, mA: not run")


@pytest.mark.parametrize(
    ("value", "tolerance", "holds", "text"),
    [
        (3.2e-7, 1e-5, True, "A: at most 1e-6 (asked: at most 1e-5)"),
        (1e-5, 1e-5, True, "A: at most 1e-5 (asked: at most 1e-5)"),
        (0.0, 1e-5, True, "A: at most 1e-6 (asked: at most 1e-5)"),  # the same text as on a machine where it is 3.2e-7
        (0.0, 0, True, "A: exactly 0 (asked: exactly 0)"),
        (1.04e-5, 1e-5, False, "A: 1e-05, TOO LARGE (asked: at most 1e-5)"),
        (1e-12, 0, False, "A: 1e-12, TOO LARGE (asked: exactly 0)"),
        (math.nan, 1e-5, False, "A: nan, TOO LARGE (asked: at most 1e-5)"),
    ],
)
def test_differences_hold_within_the_tolerance_and_are_written_without_noise(value, tolerance, holds, text):
    assert within({"A": value}, tolerance) == (holds, text)
    assert within({"B": 0.0, "A": value}, tolerance)[0] is holds  # one that is too large is enough
    assert not within({}, tolerance)[0]


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (60.0, "Learning rate of theirs: 0.1 (60.0 on validation; at 1: 40.0)."),
        (70.0, "theirs: a: 0.1 (60.0 on validation; at 1: 40.0); b: 0.1 (70.0 on validation; at 1: 40.0)."),
    ],
)
def test_a_learning_rate_that_all_tasks_share_is_named_once(second, text):
    """One model and one score for several tasks is one selection, not several that agree."""
    scores = {("a", 0.1): 60.0, ("a", 1.0): 40.0, ("b", 0.1): second, ("b", 1.0): 40.0}
    selection = [
        {"stage": "select", "task": task, "method": "theirs", "learning_rate": rate, "seed": 0, "accuracy": score}
        for (task, rate), score in scores.items()
    ]
    claim = {"tasks": ["a", "b"], "better": "ours", "worse": "theirs"}
    assert evidence(claim, {"a": "made", "b": "drawn"}, pd.DataFrame(selection)).endswith(text)


def made_up(claim: dict) -> dict[tuple[str, str], float]:
    """Measurements that just meet all conditions of a claim."""
    cells = {tuple(c["of"]): c["at_least"] for c in claim["measured"] if "at_least" in c}
    for c in claim["measured"]:
        if "over" in c:
            first, second = tuple(c["of"]), tuple(c["over"])
            value = cells.setdefault(first, 50.0)
            cells[second] = min(cells.get(second, 100.0), value - c["by"] - 1e-6)
    return cells


@pytest.mark.parametrize("slug", slugs())
def test_every_paper_result_holds_or_fails_by_what_was_measured(slug, tmp_path):
    def status(cells):
        run = report.start(slug, profile="pocket", out=str(tmp_path))
        run.claims_from_measured(cells)
        return {row["id"]: row["status"] for row in run.ledger()}

    for claim in paper(slug)["claims"]:
        if claim["kind"] != PAPER:
            continue
        # a claim that cannot be judged has a reason
        assert ("measured" in claim) != bool(claim.get("cannot_be_judged")), claim["id"]
        if "measured" in claim:
            cells = made_up(claim)
            assert status(cells)[claim["id"]] == "holds"
            for condition in claim["measured"]:
                assert status(cells | {tuple(condition["of"]): -1.0})[claim["id"]] == "fails"
            assert status({})[claim["id"]] == "not run"
