"""Checked parameters, tables with results that were not run, claims and the record."""

import io
import json
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from companion.errors import BadParameter, CompanionError
from companion.evaluation import ablations
from companion.evaluation.ablations import notice
from companion.evaluation.claims import CHECK, PAPER, SPREAD, SYNTHETIC, check_range, interval
from companion.evaluation.tables import compare_published, published_table, upsert_rows
from companion.ops import record, report
from companion.ops.files import sha256
from companion.ops.papers import paper, slugs


@pytest.fixture
def run(tmp_path):
    plt.switch_backend("agg")
    hardware = {"accelerator": "cpu", "devices": 1, "precision": "paper"}
    return report.start("sa2vp", profile="pocket", dry_run=False, seed=3, out=str(tmp_path / "out"), **hardware)


@pytest.mark.parametrize("slug", [slug for slug in slugs() if "findings" in paper(slug)])
def test_the_opening_says_what_the_study_found(slug, monkeypatch):
    """Text, verdict and lead of each finding; a study with another verdict asks for another text."""
    facts, shown = paper(slug), []
    monkeypatch.setattr(report, "display", shown.append)
    before = plt.get_fignums()
    report.opening(slug)
    text, figure = shown
    assert len(facts["findings"]) >= 3
    assert all(finding["text"] in text.data for finding in facts["findings"])
    assert [f.get("status") for f in facts["findings"]] != ["holds"] * len(facts["findings"]), "only what held is told"
    assert Image.open(io.BytesIO(figure.data)).width > figure.width and plt.get_fignums() == before
    claimed = next(finding for finding in facts["findings"] if "claim" in finding)
    other = {"holds": "fails", "fails": "holds"}[claimed["status"]]
    monkeypatch.setattr(report, "paper", lambda slug: facts | {"findings": [claimed | {"status": other}]})
    with pytest.raises(CompanionError, match=claimed["claim"]):
        report.opening(slug)


def test_start_refuses_what_does_not_go_together():
    paper, dry, wrong = {"profile": "paper", "study": True}, {"profile": "pocket", "dry_run": "true"}, {"sedd": 1}
    for parameters, said in ((paper, "profile"), (dry, "quick as it is"), (wrong, "sedd")):
        with pytest.raises(BadParameter, match=said):
            report.start("sa2vp", **parameters)


def test_an_unknown_name_that_papermill_injected_is_refused(tmp_path, monkeypatch):
    """papermill itself warns only, and the notebook would run with the default."""
    given = {"profile": "pocket", "dataset": "vtab/dtd", "out": str(tmp_path / "out")}
    for cell, accepted in (('# Parameters\ndataset = "vtab/dtd"\n', True), ('# Parameters\ndatset = "x"\n', False)):
        shell = SimpleNamespace(user_ns={"In": ["", "import companion\nx = 1", cell]})
        monkeypatch.setattr(report, "get_ipython", lambda shell=shell: shell)
        if accepted:
            report.start("sa2vp", **given)
            continue
        with pytest.raises(BadParameter, match=r"parameter = 'datset' is not accepted. Accepted: 'dataset', 'out'"):
            report.start("sa2vp", **given)


def test_a_place_where_nothing_can_be_written_is_told_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError))
    for out in ("file", "file/below", "new"):
        with pytest.raises(BadParameter, match="a folder that you may write to"):
            report.start("sa2vp", profile="pocket", out=str(tmp_path / out))


def test_a_run_from_another_folder_writes_there_and_finds_the_study(tmp_path, monkeypatch):
    checkout = record.root()
    monkeypatch.chdir(tmp_path)
    run = report.start("sa2vp", profile="pocket", out="mine")
    assert run.out == tmp_path / "mine"
    assert run.study() == checkout / "reports" / "pocket" / "sa2vp"
    assert record.commit()


def test_data_below_the_checkout_are_found_from_the_folder_of_the_notebooks(tmp_path, monkeypatch):
    def found(name):
        return report.start("sa2vp", profile="pocket", data_root=name).parameters.data_root

    for folder in ("notebooks", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert (found("data"), found("none")) == ("../data", "none")
    (tmp_path / "notebooks" / "data").mkdir()
    assert found("data") == "data"


def test_check_prints_the_verdict_and_not_the_value(capsys):
    assert check_range("accuracy", 0.123456, 0.1, 0.2)
    assert check_range("ends", 0.1, 0.1, 0.2) and check_range("ends", 0.2, 0.1, 0.2)
    assert not check_range("accuracy", 0.9, high=0.2)
    printed = capsys.readouterr().out
    assert "accuracy: as expected (0.1 to 0.2)" in printed and "NOT as expected (at most 0.2)" in printed
    assert "0.123456" not in printed


def test_published_numbers_have_a_source_and_gaps_stay_gaps():
    for table in paper("sa2vp")["tables"]:
        frame = published_table("sa2vp", table["id"])
        assert frame.attrs["provenance"], table["id"]
        assert len(frame) == len(table["rows"])
    frame = published_table("sa2vp", "sa2vp_vitb_group_means")
    assert frame.hta.isna().sum() == 2 and frame.vtab_structured.tolist() == [60.8] * 3
    with pytest.raises(BadParameter, match="vitb_fgvc_per_task"):
        published_table("sa2vp", "nothing")


@pytest.mark.parametrize("part", ["natural", "specialized", "structured"])
def test_means_of_published_tables_are_those_of_their_cells(part):
    """A slip in copying a number would show here."""
    frame = published_table("sa2vp", f"vitb_vtab_{part}_per_task").set_index("method")
    off = (frame.drop(columns="mean").mean(axis=1) - frame["mean"]).abs()
    assert (off < 0.06).all(), off


def test_beside_says_what_was_not_run():
    frame = pd.DataFrame({"method": ["A", "B"], "x": [1.0, np.nan], "y": [2.0, 3.0]})
    cells = compare_published(frame, {("A", "x"): 2.345, ("C", "x"): 3.0}).set_index("method")
    assert cells.x.to_dict() == {"A": "1 / 2.35", "B": "–", "C": "– / 3.00"}
    assert cells.y.to_dict() == {"A": "2 / not run", "B": "3", "C": "– / not run"}
    assert cells["measured here"].to_dict() == {"A": "1 of 2", "B": "not run", "C": "1 of 2"}


def test_a_run_leaves_tables_figures_claims_and_a_record(run):
    run.table("t", pd.DataFrame({"a": [1.0]}))
    run.figure("f", plt.figure(figsize=(1, 1)))
    run.claim("identity", True, "0", [3])
    assert run.claim("locality", False, "7 tokens", why="because") == "locality fails: 7 tokens"
    run.claim("full-hta", None, "")
    shown = run.close().data
    assert "FAILS" in shown and "because" in shown
    claims = {c["id"]: c for c in json.loads((run.out / "claims.json").read_text())}
    for name, status in (("identity", "holds"), ("locality", "fails"), ("full-hta", "not run"), ("reuse", "not run")):
        assert claims[name]["status"] == status
    assert len(claims) == len(paper("sa2vp")["claims"])
    facts = json.loads((run.out / "run.json").read_text())
    given = {"profile": "pocket", "dry_run": False, "seed": 3, "accelerator": "cpu", "devices": 1, "precision": "paper"}
    assert facts["parameters"] == given and facts["precision"] == "32-true"
    assert facts["seeds"] == [3] and facts["versions"]["torch"] and facts["peak_memory_mb"] > 0
    assert set(facts["outputs"]) == {"tables/t.csv", "figures/f.png", "claims.json"}
    assert all(sha256(run.out / name) == value for name, value in facts["outputs"].items())
    assert not list(run.out.rglob(".*")), "a temporary file was left"
    assert run.study() == run.root / "reports" / "pocket" / "sa2vp", "this run has no study of its own"
    (run.out / "study.csv").touch()
    assert run.study() == run.out
    with pytest.raises(BadParameter, match="identity"):
        run.claim("nonsense", True, "")


def rows(lead: list[float]) -> pd.DataFrame:
    found = [
        {"stage": "test", "task": task, "method": claim[role], "seed": seed, "learning_rate": 0.3}
        | {"accuracy": 50 + by * (role == "better")}
        for claim in paper("sa2vp")["claims"]
        if claim["kind"] == SYNTHETIC
        for task in claim["tasks"]
        for seed, by in enumerate(lead)
        for role in ("better", "worse")
    ]
    return pd.DataFrame(found).drop_duplicates(["task", "method", "seed"])


def test_a_synthetic_result_needs_every_seed(run):
    run.claims_from_study(rows([5, 3, 4]), {"aligned": "reason"})
    assert run.claims["aligned"]["status"] == "holds" and run.claims["aligned"]["seeds"] == [0, 1, 2]
    assert run.claims["aligned"]["value"].startswith("where +4.0 ± 1.0")
    assert run.claims["aligned"]["why"] == "", "a claim that holds needs no reason"
    run.claims_from_study(pd.concat([rows([-5, -3, -4]).assign(stage="select"), rows([5, 3, 4])]))
    assert run.claims["aligned"]["status"] == "holds", "what was measured on validation does not count"
    for lead in ([5, -1, 4], [5, 0, 4]):  # a tie is no lead
        run.claims_from_study(rows(lead), {"aligned": "reason"})
        assert run.claims["aligned"]["status"] == "fails" and run.claims["aligned"]["why"] == "reason"


def test_the_interval_of_a_mean_lead_holds_the_true_mean_as_often_as_it_says():
    assert interval(np.array([3.0, 1.0, 2.0, 6.0, 3.0])) == pytest.approx((0.6768, 5.3232), abs=1e-3)
    found = [interval(leads, 0.8) for leads in np.random.default_rng(0).normal(2, 3, (4000, 5))]
    assert np.mean([low < 2 < high for low, high in found]) == pytest.approx(0.8, abs=0.02)


def test_a_synthetic_result_says_what_it_rests_on(run):
    """The data and whom they favour, trained parameters, and the baseline's learning rate with its neighbours."""
    measured = rows([5, 3, 4]).assign(learning_rate=0.3, trained=7)
    scores = {0.1: (60, 62), 0.3: (70, 72), 1.0: (50, 40), 3.0: (90, 10)}
    selection = [
        {"stage": "select", "task": "where", "method": "SA²VP, global attention", "learning_rate": rate}
        | {"accuracy": float(value), "seed": seed, "trained": 7}
        for rate, values in scores.items()
        for seed, value in enumerate(values)
    ]
    run.claims_from_study(pd.concat([measured, pd.DataFrame(selection)]))
    said = run.claims["aligned"]["evidence"]
    assert said.startswith("where: synthetic scenes, built so that") and "favour the method by construction" in said
    assert "Trainable parameters: SA²VP 7, SA²VP, global attention 7" in said
    assert said.endswith("attention: 0.3 (71.0 on validation; at 0.1: 61.0, 1: 45.0).")
    assert "Weak evidence" in run.claims["real"]["evidence"]
    assert "Not built for the method" in run.claims["aligned-real"]["evidence"]


def test_the_three_kinds_of_claims_are_counted_apart(run):
    run.claim("identity", True, "0")
    run.claim("locality", False, "7 tokens")
    of = {kind: [c for c in paper("sa2vp")["claims"] if c["kind"] == kind] for kind in (CHECK, SYNTHETIC, PAPER)}
    for claim in of[SYNTHETIC]:
        run.claim(claim["id"], claim["id"] != "real", f"place +1.0 ± 0.2 [+0.8, +1.2]{SPREAD}", seeds=[200, 201])
    shown = run.close().data
    assert f"<b>Implementation checks: 1 of 2 hold, {len(of[CHECK]) - 2} not run</b>" in shown
    assert f"<b>Synthetic results: {len(of[SYNTHETIC]) - 1} of {len(of[SYNTHETIC])} hold; leads in points" in shown
    assert "over seeds 200, 201 [95 % t interval]</b>" in shown and ">place +1.0 ± 0.2 [+0.8, +1.2]<" in shown
    assert f"<b>Paper results: {len(of[PAPER])} not run</b>" in shown


def test_photographs_in_a_notebook_have_fewer_colours_and_pixels_than_their_file(run, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display", shown.append)
    pixels = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    for name, image in (("photo", pixels), ("flat", pixels * 0)):
        figure = plt.figure(figsize=(3, 2))
        figure.figimage(image)
        run.figure(name, figure)
    photo, flat = (Image.open(io.BytesIO(picture.data)) for picture in shown)
    assert (photo.mode, photo.size) == ("P", (300, 200)) and (flat.mode, flat.size) == ("RGB", (600, 400))
    file = Image.open(run.out / "figures" / "photo.png")
    assert (file.mode, file.size) == ("RGB", (600, 400))


def test_figures_have_200_dots_an_inch_unless_the_style_of_the_notebook_has_fewer(run, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display", shown.append)
    for dpi, width in (("figure", 600), (100, 300)):
        with plt.rc_context({"savefig.dpi": dpi}):
            run.figure("f", plt.figure(figsize=(3, 2), dpi=100))
        assert Image.open(io.BytesIO(shown[-1].data)).width == width and shown[-1].width == 300
        assert Image.open(run.out / "figures" / "f.png").width == width


@pytest.fixture
def judged(run, monkeypatch):
    """The claim about method a (and b) on rows of these measures, as a study's are."""

    def judge(claim, measured):
        claim = {"id": "own", "kind": SYNTHETIC, "text": "", "tasks": ["t"], "better": "a"} | claim
        facts = {"claims": [claim], "data_built_for": {task: "" for task in claim["tasks"]}}
        monkeypatch.setattr(report, "paper", lambda slug: facts)
        rows = [
            {"stage": "test", "task": "t", "method": method, "seed": seed, "learning_rate": 0.3} | row
            for method, rows in measured.items()
            for seed, row in enumerate(rows)
        ]
        run.claims_from_study(ablations.frame(rows, next(iter(measured["a"][0]))))
        return run.claims["own"]["status"], run.claims["own"]["value"]

    return judge


def test_a_claim_may_be_judged_by_other_measures(judged):
    measured = {"a": [{"SR": 51.0, "dark": dark} for dark in (9.0, 8.0, 7.0)], "b": [{"SR": 50.0, "dark": 9.0}] * 3}
    status, value = judged({"worse": "b", "metrics": ["SR", "dark"]}, measured)
    assert status == "fails"
    assert value.startswith("t SR +1.0 ± 0.0 [+1.0, +1.0]; t dark -1.0 ± 1.0 [-3.5, +1.5] points")


@pytest.mark.parametrize(("gains", "status"), [((2.0, 1.0, 3.0), "holds"), ((2.0, -1.0, 5.0), "fails")])
def test_a_measure_that_is_a_lead_is_compared_with_zero(judged, gains, status):
    found, value = judged({"metrics": ["gain"]}, {"a": [{"gain": gain} for gain in gains]})
    assert found == status and value.startswith("t gain +2.0 ±")


STUDIES = [f"{p.parents[1].name}/{p.parent.name}" for p in sorted((record.root() / "reports").glob("*/*/study.csv"))]


@pytest.mark.parametrize("study", STUDIES)
def test_the_study_kept_in_the_repository_is_whole(run, study):
    """Every method was tested with all seeds, and every learning rate was chosen on validation."""
    folder, (data, _, slug) = run.root / "reports" / study, study.partition("/")
    found = ablations.read(folder)
    facts = json.loads((folder / "study.json").read_text())
    tested, chosen = found[found.stage == "test"], ablations.selected(found)
    assert len(facts["seeds"]) >= (3 if data == "real" else 5)
    pairs = {(task, method) for task, methods in facts["tasks"].items() for method in methods}
    seeds = tested.groupby(["task", "method"]).seed.apply(sorted)
    assert set(seeds.index) == pairs and all(found == sorted(facts["seeds"]) for found in seeds)
    rates = found[found.stage == "select"].groupby(["task", "method"]).learning_rate
    assert (rates.nunique() == len(facts["learning_rates"] + facts["widened"])).all()
    assert all(chosen.get((row.task, row.method), 0) == row.learning_rate for row in tested.itertuples())
    assert not set(facts["selection_seeds"]) & set(facts["seeds"])
    if data == "pocket":
        claims = [c for c in paper(slug)["claims"] if c["kind"] == SYNTHETIC]
        assert {c[role] for c in claims for role in ("better", "worse") if role in c} <= set(tested.method)


def test_results_gather_in_a_file_by_their_keys(tmp_path):
    path, keys, values = tmp_path / "measured.csv", ["method", "seed"], ["accuracy"]
    empty = upsert_rows(path, keys, values)
    assert list(empty.columns) == [*keys, *values] and empty.empty and not path.exists()
    upsert_rows(path, keys, values, [{"method": "a", "seed": 0, "accuracy": 1.0}])
    upsert_rows(path, keys, values, [{"method": "a", "seed": 1, "accuracy": 2.0}])
    rows = upsert_rows(path, keys, values, [{"method": "a", "seed": 0, "accuracy": 3.0}])
    assert sorted(rows.accuracy) == [2.0, 3.0] and len(upsert_rows(path, keys, values)) == 2


def test_the_study_notice_names_choices_at_an_end_of_the_grid(tmp_path):
    best = [("inside", rate, float(rate == 2)) for rate in (1, 2, 3)]
    best += [("outside", rate, float(rate == 3)) for rate in (1, 2, 3)]
    rows = pd.DataFrame(best, columns=["method", "learning_rate", "accuracy"]).assign(stage="select", task="t", seed=0)
    rows.to_csv(tmp_path / "study.csv", index=False)
    facts = {"seeds": [0], "selection_seeds": [9], "learning_rates": [1, 2, 3], "widened": []}
    facts |= {"tasks": {"t": ["inside", "outside"]}, "budget": "5 epochs"}
    (tmp_path / "study.json").write_text(json.dumps(facts | {"seconds_of_cpu": 125, "code": "?"}))
    said = notice("sa2vp", tmp_path)
    assert said.startswith("Study: 5 epochs for every trained method; learning rates [1, 2, 3], selected on seeds [9]")
    assert "2 minutes on one core. Best at an end of the grid: outside. It is OLDER" in said
    assert said.endswith("run the notebook with study = True.")
    assert "companion.toy.ablation hvit_real" in notice("hvit_real", tmp_path)
