"""What a run of a notebook leaves: tables, figures, claims and the record; and the committed studies."""

import json
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from companion.errors import CompanionError, MissingData
from companion.evaluation import ablations
from companion.evaluation.claims import PAPER, SYNTHETIC, counts
from companion.evaluation.tables import Results, compare_published, published_table
from companion.io import record
from companion.io.files import sha256
from companion.io.papers import paper, rules, slugs
from companion.runs import needs, report
from companion.runs.pack import pack
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers import bat
from tests.papers.common import shrink


@pytest.fixture
def run(tmp_path):
    plt.switch_backend("agg")
    hardware = {"accelerator": "cpu", "devices": 1, "precision": "paper"}
    values = {"profile": "pocket", "dry_run": False, "seed": 3, "out": str(tmp_path / "out"), "another": run}
    return report.start("sa2vp", values | hardware)


def test_a_run_leaves_tables_figures_claims_and_a_record(run):
    run.table("t", pd.DataFrame({"a": [1.0]}))
    run.figure("f", plt.figure(figsize=(1, 1)))
    run.claim("identity", True, "0", [3])
    run.claim("locality", False, "7 tokens", why="because")
    run.claim("full-hta", None, "")
    assert "Implementation checks: 1 of 2 hold" in run.close().data
    claims = {c["id"]: c for c in json.loads((run.out / "claims.json").read_text())}
    assert claims.keys() == {claim["id"] for claim in paper("sa2vp")["claims"]}
    for name, status in (("identity", "holds"), ("locality", "fails"), ("full-hta", "not run"), ("reuse", "not run")):
        assert claims[name]["status"] == status
    assert counts(claims.values())[PAPER] == f"{sum(c['kind'] == PAPER for c in claims.values())} not run"
    facts = json.loads((run.out / "run.json").read_text())
    given = {"profile": "pocket", "dry_run": False, "seed": 3, "accelerator": "cpu", "devices": 1, "precision": "paper"}
    assert facts["parameters"] == given and facts["precision"] == "32-true" and facts["seeds"] == [3]
    assert facts["versions"]["torch"] and facts["peak_memory_mb"] > 0
    assert set(facts["outputs"]) == {"tables/t.csv", "figures/f.png", "claims.json"}
    assert all(sha256(run.out / name) == value for name, value in facts["outputs"].items())
    assert not list(run.out.rglob(".*")), "a temporary file was left"
    refuses((lambda: run.claim("nonsense", True, ""), "'nonsense'.*'identity'"))


def test_a_run_from_another_folder_writes_there_and_finds_study_and_data(tmp_path, monkeypatch):
    checkout = record.root()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    run = report.start("sa2vp", {"profile": "pocket", "out": "mine"})
    assert run.out == tmp_path / "mine" and run.study() == checkout / "reports" / "pocket" / "sa2vp"
    run.out.mkdir(exist_ok=True)
    (run.out / "study.csv").touch()
    assert run.study() == run.out
    refuses(
        *(
            (lambda out=out: report.start("sa2vp", {"profile": "pocket", "out": out}), out)
            for out in ("file", "file/below")
        )
    )
    # from the folder of a checkout's notebooks; a given folder is left as it is
    for folder in ("notebooks", "data", "another/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "another"):  # of another project, which has no such library
        (folder / "pyproject.toml").write_text("")
    (tmp_path / "lib" / "companion").mkdir(parents=True)
    for folder, up in (("notebooks", ".."), ("another/notebooks", "../..")):
        here = tmp_path / folder
        monkeypatch.chdir(here)
        for name, found, out in (("", f"{up}/data", tmp_path / "runs/pocket/sa2vp"), ("mine", "mine", here / "mine")):
            run = report.start("sa2vp", {"profile": "pocket", "data_root": name, "out": name})
            assert (run.parameters.data_root, run.out) == (found, out)


@pytest.mark.parametrize("slug", slugs())
def test_a_run_on_real_data_looks_for_it_before_anything_else(slug, tmp_path, monkeypatch):
    shrink(slug, monkeypatch)
    monkeypatch.setattr(needs, "_free", lambda: 1e12)  # that of the full size is counted
    given = vars(parameters(slug, profile="paper", data_root=str(tmp_path / "none"), out=str(tmp_path / "out")))
    refuses((lambda: report.start(slug, given), "none"), error=MissingData)
    if "folder" in rules(slug)["dataset"]["choices"]:
        refuses((lambda: report.start(slug, given | {"dataset": "folder"}), "none"), error=MissingData)
    assert not (tmp_path / "out").exists()
    report.start(slug, given | {"dry_run": True})


def test_a_run_opens_data_and_asks_for_memory_and_disk_before_anything_else(tmp_path, monkeypatch):
    """A frame that is missing is known in the first cell; so is a step that does not fit, and a full disk."""
    bat.write("rgbt/lasher", tmp_path, monkeypatch)
    shrink("bat", monkeypatch)
    given = {"profile": "paper", "dry_run": True, "dataset": "rgbt/lasher", "data_root": str(tmp_path)}

    def start():
        return report.start("bat", vars(parameters("bat", accelerator="cpu", out=str(tmp_path / "o"), **given)))

    start().release()
    assert not any((tmp_path / "o").iterdir())
    (group := tmp_path / "group").mkdir()
    for name, value in {"max": 2 << 30, "current": 2 << 30}.items():
        (group / f"memory.{name}").write_text(f"{value}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file {1 << 29}\ninactive_file {1 << 29}\n")
    monkeypatch.setattr(needs, "CGROUP", group)
    refuses((start, r"4 images .* 1\.1 GB are free .*another machine"), error=CompanionError)
    monkeypatch.setattr(needs, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    refuses((start, "0.0 GB are free in"), error=CompanionError)
    next(tmp_path.rglob("TestingSet/*/*/infrared/i003.png")).unlink()
    refuses((start, "i004.png.* a frame is missing"), error=CompanionError)


def test_synthetic_results_are_judged_by_the_test_rows_of_a_study_in_each_metric(run, monkeypatch):
    claims = [
        {"id": "lead", "better": "a", "worse": "b", "metrics": ["SR", "dark"], "why": "a reason"},
        {"id": "gain", "better": "a", "metrics": ["gain"], "why": "a reason"},
    ]
    facts = {
        "claims": [{"kind": SYNTHETIC, "text": "", "tasks": ["t"]} | c for c in claims],
        "data_built_for": {"t": ""},
    }
    monkeypatch.setattr(report, "paper", lambda slug: facts)
    for dark, gain, expected in ((8.0, 1.0, "holds"), (9.0, 0.0, "fails")):  # a tie is no lead
        measured = [
            {"stage": stage, "task": "t", "method": method, "seed": seed, "learning_rate": 0.3, "gain": 1.0}
            | ({"SR": 51.0, "dark": 9.5} if method == "a" else {"SR": 50.0, "dark": 8.0})
            for stage in ("select", "test")
            for method in "ab"
            for seed in range(3)
        ]
        measured[-1] |= {"dark": dark + 0.5}
        measured[-4] |= {"gain": gain}
        run.claims_from_study(ablations.frame(measured, "SR"))
        for claim in run.claims.values():
            assert claim["status"] == expected and claim["seeds"] == [0, 1, 2]
            assert claim["why"] == ("a reason" if expected == "fails" else "")


STUDIES = [f"{p.parents[1].name}/{p.parent.name}" for p in sorted((record.root() / "reports").glob("*/*/study.csv"))]


@pytest.mark.parametrize("study", STUDIES)
def test_a_committed_study_is_whole(root, study):
    """Every method was tested with all seeds, and every learning rate was chosen on validation."""
    folder, (data, _, slug) = root / "reports" / study, study.partition("/")
    found = ablations.read(folder)
    facts = json.loads((folder / "study.json").read_text())
    tested, chosen = found[found.stage == "test"], ablations.selected(found)
    assert len(facts["seeds"]) >= (3 if data == "real" else 5)
    pairs = {(task, method) for task, methods in facts["tasks"].items() for method in methods}
    seeds = tested.groupby(["task", "method"]).seed.apply(sorted)
    assert set(seeds.index) == pairs and all(found == sorted(facts["seeds"]) for found in seeds)
    rates = found[found.stage == "select"].groupby(["task", "method"]).learning_rate.apply(set)
    grid = set(facts["learning_rates"])
    assert all(grid <= tried <= grid.union(facts["widened"]) for tried in rates)
    # a method that does best at an end of the grid has one learning rate beyond
    ends = {min(grid): min, max(grid): max}
    assert not [pair for pair, rate in chosen.items() if rate in ends and ends[rate](rates[pair]) == rate]
    assert all(chosen.get((row.task, row.method), 0) == row.learning_rate for row in tested.itertuples())
    assert not set(facts["selection_seeds"]) & set(facts["seeds"])
    if data == "pocket":
        claims = [c for c in paper(slug)["claims"] if c["kind"] == SYNTHETIC]
        assert {c[role] for c in claims for role in ("better", "worse") if role in c} <= set(tested.method)


def test_published_numbers_and_their_gaps_stand_next_to_ours():
    frame = published_table("sa2vp", "sa2vp_vitb_group_means")
    assert frame.hta.isna().sum() == 2 and frame.vtab_structured.tolist() == [60.8] * 3
    refuses((lambda: published_table("sa2vp", "nothing"), "vitb_fgvc_per_task"))
    for part in ("natural", "specialized", "structured"):  # a slip in copying a number would show here
        frame = published_table("sa2vp", f"vitb_vtab_{part}_per_task").set_index("method")
        assert ((frame.drop(columns="mean").mean(axis=1) - frame["mean"]).abs() < 0.06).all()
    frame = pd.DataFrame({"method": ["A", "B"], "x": [1.0, np.nan], "y": [2.0, 3.0]})
    cells = compare_published(frame, {("A", "x"): 2.345, ("C", "x"): 3.0}).set_index("method")
    assert cells.x.to_dict() == {"A": "1 / 2.35", "B": "–", "C": "– / 3.00"}
    assert cells.y.to_dict() == {"A": "2 / not run", "B": "3", "C": "– / not run"}
    assert cells["measured here"].to_dict() == {"A": "1 of 2", "B": "not run", "C": "1 of 2"}


def test_a_lower_number_has_what_a_thread_says_and_calls_the_rest_a_guess(run, monkeypatch):
    asked = {"state": "open", "read": "2026-12-02", "seen": "70 instead of 80", "answered": ""}
    rows = [
        {"see": "70", "threads": ["them/code#3", "them/code#4"], "cause": "another batch", "set": "`batch`"},
        {"see": "75", "cause": "another crop", "guess": True, "set": "`crop`"},
    ]
    told = {"them/code#3": asked, "them/code#4": asked | {"state": "closed", "answered": "the batch"}}
    monkeypatch.setattr(report, "threads", lambda slug: {"threads": told, "lower": rows})
    said = run.lower().data
    first, second = (line for line in said.splitlines() if line.startswith("| 7"))
    assert "(https://github.com/them/code/issues/3) (open)" in first and "(closed): the batch" in first
    assert "guess: another crop" in second and "guess" not in first and "2026-12-02" in said


def test_results_gather_in_a_file_by_their_keys(tmp_path):
    path, results = tmp_path / "measured.csv", Results("sa2vp", ["method", "seed"], ["accuracy"])
    empty = results.measured(path)
    assert list(empty.columns) == ["method", "seed", "accuracy"] and empty.empty and not path.exists()
    for seed, accuracy in ((0, 1.0), (1, 2.0), (0, 3.0)):
        results.measured(path, {"method": "a", "seed": seed, "accuracy": accuracy})
    rows = results.measured(path)
    assert dict(zip(rows.seed, rows.accuracy, strict=True)) == {0: 3.0, 1: 2.0}


def test_a_row_that_its_table_has_no_column_for_is_refused_and_kept(tmp_path):
    path, spec = tmp_path / "measured.csv", {"where": {"data": "vtab"}, "row": "{method}", "column": "{task}"}
    results = Results("sa2vp", ["method", "data", "task"], ["accuracy"], cells={"vitb_vtab_natural_per_task": spec})
    row = {"method": "a", "data": "vtab", "task": "svhn", "accuracy": 1.0}
    results.measured(path, row, row | {"data": "own", "task": "anything"})
    refuses(
        (lambda: results.measured(path, row | {"task": "vtab_natural"}), "vtab_natural.*'svhn'.*sa2vp/paper.yaml"),
        (lambda: results.measured(path, {"method": "a", "accuracy": 1.0}), "'data', 'task'"),
        (lambda: results.measured(path, {"method": "a", "data": "vtab", "task": "svhn", "acc": 1.0}), "'accuracy'"),
    )
    assert list(results.measured(path).task) == ["svhn", "anything", "vtab_natural"]


def test_the_notice_of_a_study_names_choices_at_an_end_of_the_grid(tmp_path):
    best = [(method, rate, float(rate == top)) for method, top in (("inside", 2), ("outside", 3)) for rate in (1, 2, 3)]
    rows = pd.DataFrame(best, columns=["method", "learning_rate", "accuracy"]).assign(stage="select", task="t", seed=0)
    rows.to_csv(tmp_path / "study.csv", index=False)
    facts = {"seeds": [0], "selection_seeds": [9], "learning_rates": [1, 2, 3], "widened": [], "seconds_of_cpu": 125}
    facts |= {"tasks": {"t": ["inside", "outside"]}, "budget": "5 epochs", "code": "?"}
    (tmp_path / "study.json").write_text(json.dumps(facts))
    notice = ablations.notice("sa2vp", tmp_path)
    assert "outside" in notice and "inside" not in notice and "2 minutes" in notice and "OLDER" in notice


def test_a_folder_belongs_to_one_process_at_a_time(run, tmp_path):
    """A run that has not ended keeps others out; the same kernel may begin again."""
    other = "from companion.runs import report; report.start('sa2vp', {'profile': 'pocket', 'out': 'OUT'})"
    other = other.replace("OUT", str(run.out))

    def elsewhere() -> str:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stderr

    assert f"out = '{run.out}'" in elsewhere() and "a run that has not ended" in elsewhere()
    report.start("sa2vp", {"profile": "pocket", "out": str(run.out)}).close()
    assert elsewhere() == ""


def test_a_dry_run_has_a_folder_of_its_own_which_a_killed_one_keeps_and_a_finished_one_loses(tmp_path, monkeypatch):
    values = {"profile": "paper", "dry_run": True, "out": str(tmp_path)}
    shrink("sa2vp", monkeypatch)
    monkeypatch.setattr(needs, "_free", lambda: 1e12)
    values = vars(parameters("sa2vp", **values, accelerator="cpu"))
    run = report.start("sa2vp", values)
    (run.out / "checkpoints").mkdir(exist_ok=True)
    run = report.start("sa2vp", values)
    assert run.out == tmp_path / "dry_run" and (run.out / "checkpoints").is_dir()
    assert "dry run" in run.table("t", pd.DataFrame({"a": [1.0]})).data
    run.claims_from_measured({("SA2VP", "vtab_natural"): 99.0, ("SA2VP", "hta"): 1.0})
    run.close()
    judged = [claim for claim in json.loads((run.out / "claims.json").read_text()) if claim["status"] != "not run"]
    assert judged and all("dry run" in claim["evidence"] for claim in judged)
    refuses((lambda: pack(run.out, run.out / "a"), "no dry run"))
    report.start("sa2vp", values)
    assert [path.name for path in run.out.iterdir()] == [".lock"]
