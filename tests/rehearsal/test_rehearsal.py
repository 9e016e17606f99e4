"""Every run of every paper as a dry run on a miniature of its data; copies that cannot be used are refused."""

import pytest

from companion.io.papers import slugs
from tests.conftest import parameters
from tests.papers.common import hooks, shrink
from tests.rehearsal import common

RUNS = [(slug, run) for slug in slugs() for run in hooks(slug).RUNS]
FAULTS = [(slug, name) for slug in slugs() for name in hooks(slug).FAULTS]


@pytest.mark.parametrize(("slug", "run"), RUNS, ids=[" ".join(map(str, [slug, *run.values()])) for slug, run in RUNS])
def test_run(slug, run, tmp_path, monkeypatch):
    rows = common.rehearse(slug, run, tmp_path, monkeypatch)
    if len(rows):
        assert rows.dry_run.all()
    else:  # of a pre-training the weights alone
        assert list((tmp_path / "out" / "trained").iterdir())


@pytest.mark.parametrize(("slug", "name"), FAULTS)
def test_fault(slug, name, tmp_path, monkeypatch):
    common.refused(slug, hooks(slug).FAULTS[name], tmp_path, monkeypatch)


@pytest.mark.parametrize("slug", slugs())
def test_without_data(slug, tmp_path, monkeypatch):
    """Generated items, and rows all the same."""
    recipe = shrink(slug, monkeypatch)
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": str(tmp_path / "nowhere")}
    recipe.run(parameters(slug, **usual), tmp_path)
    assert recipe.RESULTS.measured(tmp_path / "measured.csv").dry_run.all()


@pytest.mark.parametrize("slug", slugs())
def test_all_data_sets_are_rehearsed(slug):
    unknown = common.unknown(slug)
    assert not unknown, f"RUNS in tests/papers/{slug}.py has no run of {unknown}, which `runs` in paper.yaml names"
