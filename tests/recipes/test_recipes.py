"""Every paper's recipe against cases recorded from its authors' code; `RECIPES_EXTRA=<folder>` adds cases."""

import json
import shutil

import pytest

from companion.errors import CompanionError
from tests.recipes import runner

FULL_SIZE: set[tuple[str, str]] = {
    ("dplq", "groups_base_to_novel"),
    ("ecamp", "trajectory_detection"),
    ("metasegnet", "trajectory_loveda"),
    ("metasegnet", "trajectory_potsdam"),
    ("promptpar", "groups_pa100k"),
    ("sa2vp", "trajectory_tiny_swin"),
}
"""Cases of full-size models, which run with the slow tests."""


def _cases():
    for paper in runner.papers():
        for case in runner.cases(paper):
            marks = [pytest.mark.slow, pytest.mark.large] if (paper, case.name) in FULL_SIZE else []
            yield pytest.param(paper, case, id=f"{paper}-{case.name}", marks=marks)


@pytest.mark.parametrize(("paper", "case"), list(_cases()))
def test_same_as_the_authors_code(paper, case):
    rows = runner.check(paper, case)
    assert rows and [row for row in rows if not row.passes] == []


def test_every_recorded_case_has_a_paper_that_checks_it():
    recorded = {path.parent.parent.name for path in runner.folder().glob("*/*/case.json")}
    assert recorded == set(runner.papers())


def test_extra_cases_are_checked_and_a_wrong_or_unchecked_value_is_found(tmp_path, monkeypatch):
    shutil.copytree(runner.folder() / "bat" / "metric_gtot", tmp_path / "bat" / "metric_gtot_2")
    monkeypatch.setenv("RECIPES_EXTRA", str(tmp_path))

    def check():
        (case,) = [case for case in runner.cases("bat") if case.name == "metric_gtot_2"]
        return runner.check("bat", case)

    assert all(row.passes for row in check())
    path = tmp_path / "bat" / "metric_gtot_2" / "case.json"
    facts = json.loads(path.read_text())
    facts["expected"]["totals"]["MPR"] += 1
    path.write_text(json.dumps(facts))
    assert [row.what for row in check() if not row.passes] == ["totals MPR"]
    facts["expected"]["something"] = 1
    path.write_text(json.dumps(facts))
    with pytest.raises(CompanionError, match="something"):
        check()
