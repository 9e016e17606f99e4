"""Paper results are judged by our measurements on real data as soon as those are there."""

import pytest

from companion.evaluation.claims import PAPER, judge_measured
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
        ([REACHED, AHEAD], {OURS: 89.0}, None),  # not all is measured
        ([REACHED, AHEAD], {OURS: 87.0}, False),  # one that is not met refutes
    ],
)
def test_conditions(conditions, cells, expected):
    holds, value = judge_measured(conditions, cells)
    assert holds is expected
    absent = OURS not in cells or (BASELINE not in cells and AHEAD in conditions)
    assert ("not run" in value) == absent


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
        # what cannot be judged says why
        assert ("measured" in claim) != bool(claim.get("cannot_be_judged")), claim["id"]
        if "measured" in claim:
            cells = made_up(claim)
            assert status(cells)[claim["id"]] == "holds"
            for condition in claim["measured"]:
                assert status(cells | {tuple(condition["of"]): -1.0})[claim["id"]] == "fails"
            assert status({})[claim["id"]] == "not run"
