"""Every paper's recipe against cases recorded from its authors' code; `RECIPES_EXTRA=<folder>` adds cases."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from companion.errors import BadParameter, CompanionError, MissingData
from companion.evaluation import recipe_parity
from companion.evaluation.recipe_parity import Case, Row, lines, near, same
from companion.ops.papers import slugs
from tests.conftest import ROOT

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
    for paper in recipe_parity.papers():
        for case in recipe_parity.cases(paper):
            marks = [pytest.mark.slow, pytest.mark.large] if (paper, case.name) in FULL_SIZE else []
            yield pytest.param(paper, case, id=f"{paper}-{case.name}", marks=marks)


@pytest.mark.parametrize(("paper", "case"), list(_cases()))
def test_same_as_the_authors_code(paper, case):
    rows = recipe_parity.check(paper, case)
    assert rows and [row for row in rows if not row.passes] == []


def test_every_recorded_case_has_a_paper_that_checks_it():
    assert {path.parent.parent.name for path in recipe_parity.folder().glob("*/*/case.json")} == set(
        recipe_parity.papers()
    )


@pytest.mark.parametrize("slug", slugs())
def test_the_site_counts_the_cases(slug):
    def count(root: str, pattern: str) -> str:
        return str(len(list((ROOT / "tests" / root / slug).glob(pattern))) or "–")

    counted = (
        count("parity", "*/outputs.safetensors"),
        count("recipes", "*/case.json"),
        count("recipes", "trajectory*"),
    )
    page = (ROOT / "site" / "docs" / "evidence.md").read_text(encoding="utf-8")
    line = re.search(rf"^\| \[`{slug}`\].*$", page, re.M)
    assert line and f"| {' / '.join(counted[:2])} / " in line[0]
    if counted[2] != "–":  # without recorded cases it is a test of its own
        assert f" / {counted[2]}" in line[0]


def test_rows():
    assert same("a", [1, 2.5], (1, np.float64(2.5))).agrees and not same("a", [1], [1, 1]).agrees
    assert near("a", [1.0, float("nan")], torch.tensor([1.001, float("nan")]), relative=2e-3).agrees
    assert not near("a", 1.0, 1.001, absolute=1e-4).agrees and not near("a", [1.0], [1.0, 1.0], absolute=9).agrees
    recorded = {"count": 2, "sha256_of_lines": "", "first": ["x"], "last": ["z"]}
    assert not lines("a", recorded, ["x", "y"]).agrees and lines("a", recorded, ["x", "y"]).ours == "y"
    assert Row("a", "1", "2", agrees=False, departs="a crash").passes
    assert not Row("a", "1", "1", agrees=True, departs="but it does not differ").passes


def test_parameters_are_compared_by_their_sums():
    value = torch.tensor([[3.0, -1.0]])
    facts = {"w": {"shape": [1, 2], "sum": 2.0, "sum_of_squares": 10.0}}
    (row,) = recipe_parity.parameters("after", facts, {"w": value}, 1e-3)
    assert row.passes and row.what == "after w"
    for changed in (-value, 1.01 * value, value.T):
        assert not recipe_parity.parameters("after", facts, {"w": changed}, 1e-3)[0].passes


def test_extra_cases_are_checked_too(tmp_path, monkeypatch):
    shutil.copytree(recipe_parity.folder() / "bat" / "metric_gtot", tmp_path / "bat" / "metric_gtot_2")
    monkeypatch.setenv("RECIPES_EXTRA", str(tmp_path))
    found = {case.name: case for case in recipe_parity.cases("bat")}
    assert all(row.passes for row in recipe_parity.check("bat", found["metric_gtot_2"]))
    changed = tmp_path / "bat" / "metric_gtot_2" / "case.json"
    facts = json.loads(changed.read_text())
    facts["expected"]["totals"]["MPR"] += 1
    changed.write_text(json.dumps(facts))
    assert any(not row.passes for row in recipe_parity.check("bat", Case(changed.parent)))
    facts["expected"]["something"] = 1
    changed.write_text(json.dumps(facts))
    with pytest.raises(CompanionError, match="something"):
        recipe_parity.check("bat", Case(changed.parent))


def test_missing_cases(tmp_path):
    with pytest.raises(BadParameter, match="bat"):
        list(recipe_parity.cases("nothing"))
    with pytest.raises(MissingData, match=r"case\.json"):
        list(recipe_parity.cases("bat", tmp_path))
