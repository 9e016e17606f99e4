"""Every run of every paper as a dry run on a miniature of its data; copies that cannot be used are refused."""

import pytest

from companion.io.papers import paper, slugs
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
    """Generated items, and rows all the same, which name each file that stands for the one of the published recipe."""
    recipe = shrink(slug, monkeypatch)
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": str(tmp_path / "nowhere")}
    recipe.run(parameters(slug, **usual), tmp_path)
    rows = recipe.RESULTS.measured(tmp_path / "measured.csv")
    assert rows.dry_run.all()
    for entry in paper(slug)["weights"]:
        if "replaces" in entry:  # what the published recipe starts from is another file
            default = entry.get("id") or entry["file"].partition("/")[0]
            assert rows.method.str.endswith(f", from {default}").any()
            assert recipe.RESULTS.label("m", **{entry["name"]: "a/b.pth"}) == "m, from b.pth"
            for file in entry.get("published", ()):
                assert recipe.RESULTS.label("m", **{entry["name"]: f"a/{file}"}) == "m"


@pytest.mark.parametrize("slug", slugs())
def test_all_data_sets_are_rehearsed(slug):
    unknown = common.unknown(slug)
    assert not unknown, f"RUNS in tests/papers/{slug}.py has no run of {unknown}, which `runs` in paper.yaml names"
