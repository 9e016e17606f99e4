"""A study resumes, keeps rows of other code only if they are reproduced, and selects without the test split."""

import importlib
import math
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest

from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.evaluation import ablations
from companion.evaluation.claims import CHECK, SYNTHETIC
from companion.ops import record
from companion.ops.files import read_json
from companion.ops.papers import paper, slugs
from companion.toy import ablation as study
from companion.toy.ablations import SEEDS, SELECTION_SEEDS, reader, selecting
from companion.toy.datasets import chests, landcover, slides
from companion.training import fit as loop
from tests.conftest import kill_when
from tests.small import few_images

STUDIES = [slug for slug in slugs() if (Path(study.__file__).parent / "ablations" / f"{slug}.py").exists()]
REPORTS = record.root() / "reports" / "pocket"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A study of two methods that takes no time; `calls` lists what was trained."""
    module = types.ModuleType("companion.toy.ablations.fake")
    module.__file__ = str(tmp_path / "fake.py")
    module.code = "one"
    for part in (study, ablations):
        monkeypatch.setattr(part, "sources", lambda path: [])
        monkeypatch.setattr(part, "code_hash", lambda paths: module.code)
    module.METHODS, module.TASKS = {"a": None, "b": None}, {"t": ["a", "b"]}
    module.LEARNING_RATES, module.SEEDS, module.SELECTION_SEEDS = [0.1, 0.2, 0.4], [0, 1, 2], [8, 9]
    module.calls, module.offset, module.best, module.loss = [], 0.0, 0.2, 1.0
    module.prepare, module.BUDGET = lambda root, seed: None, "one step"

    def train(method, task, rate, seed, root, split):
        module.calls.append((split, task, method, rate, seed))
        score = 10 * (1 - abs(rate - module.best)) + (method == "a") + seed + module.offset
        return {"accuracy": score, "loss": module.loss}

    module.train = train
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda workers, context, start: ThreadPoolExecutor(1))
    return module


def ran(folder, **options):
    return study.run("fake", folder, folder, workers=1, **options)


def test_every_rate_is_tried_once_and_the_best_tested_with_every_seed(fake, tmp_path):
    rows = ran(tmp_path)
    expected = [("select", "t", m, rate, seed) for seed in (8, 9) for rate in (0.1, 0.2, 0.4) for m in "ab"]
    expected += [("test", "t", m, 0.2, seed) for seed in (0, 1, 2) for m in "ab"]
    assert sorted(fake.calls) == sorted(expected) and len(rows) == len(expected)
    table = ablations.summary(rows).set_index("method")
    assert table.loc["a"].tolist() == pytest.approx(["t", 12, 1, 3, 0.2]) and table.loc["b", "mean"] == 11
    facts = read_json(tmp_path / "study.json")
    assert (facts["code"], facts["seeds"], facts["selection_seeds"], facts["widened"]) == ("one", [0, 1, 2], [8, 9], [])


def test_a_study_may_judge_by_another_measure_and_test_what_is_not_trained(fake, tmp_path):
    fake.METRIC, fake.UNTRAINED, train = "SR", ["b"], fake.train

    def measured(*job):
        row = train(*job)
        return {"SR": -row.pop("accuracy"), "PR": 1.0} | row

    fake.train, fake.best = measured, 0.35
    rows = ran(tmp_path)
    assert len(fake.calls) == 2 * 4 + 2 * 3
    assert ablations.selected(rows) == {("t", "a"): 0.05}  # SR is best where the accuracy is worst
    table = ablations.summary(ablations.read(tmp_path)).set_index("method")
    assert table.loc["a", "mean"] == pytest.approx(-9) and pd.isna(table.loc["b", "learning_rate"])
    assert ablations.summary(rows, "PR")["mean"].tolist() == [1, 1]


def test_a_stopped_study_resumes_and_a_damaged_one_is_refused(fake, tmp_path):
    whole = ran(tmp_path)
    file = tmp_path / "study.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    fake.calls.clear()
    again = ran(tmp_path)
    assert len(fake.calls) == 18 - 3
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))
    file.write_text("a,b\n1,2\n")
    with pytest.raises(CorruptFile, match=r"study\.csv"):
        ablations.read(tmp_path)


KILLED = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from companion.toy import ablation as study

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), study._quiet) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_the_workers_of_a_killed_study_end(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    with (tmp_path / "pid").open("w") as out:
        process = subprocess.Popen([sys.executable, str(tmp_path / "killed.py")], stdout=out, env=dict(os.environ))
    kill_when(process, lambda: (tmp_path / "pid").read_text().endswith("\n"))
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("best", "widened", "chosen"),
    [(0.2, [], 0.2), (0.0, [0.05], 0.05), (0.9, [0.8], 0.8), (1.6, [0.8], 0.8)],  # once: 1.6 is not reached
)
def test_a_choice_at_an_end_widens_the_grid_once_for_all_methods(fake, tmp_path, best, widened, chosen):
    fake.best = best
    for _ in range(2):  # the second time nothing is left to do
        rows = ran(tmp_path)
        tried = rows[rows.stage == "select"].groupby(["method", "learning_rate"]).seed.apply(sorted)
        assert tried.to_dict() == {(m, rate): [8, 9] for m in "ab" for rate in (0.1, 0.2, 0.4, *widened)}
        assert set(ablations.selected(rows).values()) == set(rows[rows.stage == "test"].learning_rate) == {chosen}
        assert read_json(tmp_path / "study.json")["widened"] == widened
    assert len(fake.calls) == len(rows)


def test_a_rate_is_selected_by_its_mean_over_seeds_and_the_smaller_one_in_ties():
    def chosen(*scores):
        rows = [
            {"stage": "select", "task": "t", "method": m, "learning_rate": rate, "seed": i, "accuracy": float(x)}
            for m, rate, *each in scores
            for i, x in enumerate(each)
        ]
        found = pd.DataFrame([*rows, rows[0] | {"stage": "test", "accuracy": 99.0}])
        return ablations.selected(found), ablations.at_ends(found)

    assert chosen(("a", 0.1, 50, 49), ("a", 0.3, 49, 51))[0] == {("t", "a"): 0.3}
    assert chosen(("a", 0.3, 50), ("a", 0.1, 50))[0] == {("t", "a"): 0.1}
    found, ends = chosen(("a", 1, 2), ("a", 2, 1), ("a", 3, 1), ("b", 1, 1), ("b", 2, 2), ("b", 3, 1))
    assert found == {("t", "a"): 1, ("t", "b"): 2} and ends == [("t", "a")]


def test_the_test_split_cannot_be_read_while_learning_rates_are_selected(fake, tmp_path):
    @reader(4)
    def images(root, seed, split):
        return split

    train = fake.train
    fake.train = lambda *job: {"read": images("", 0, fake.asked)} | train(*job)
    fake.asked = "val"
    ran(tmp_path / "right", seeds=[])
    assert images("", 0, split="test") == "test"  # also where it is cached
    fake.asked = "test"
    with pytest.raises(CompanionError, match="images"):
        ran(tmp_path / "wrong")


def test_rows_of_other_code_are_kept_if_some_are_reproduced(fake, tmp_path):
    ran(tmp_path)
    fake.code = "two"
    fake.calls.clear()
    for _ in range(2):  # once for a version of the code
        ran(tmp_path)
        assert len(fake.calls) == study.RECHECKED and not ablations.stale("fake", tmp_path)
        facts = read_json(tmp_path / "study.json")
        again = facts["rechecked"]
        assert (facts["code"], again["code"], again["rows"], again["of"]) == ("one", "two", 3, 18)
    fake.code = "three"
    assert ablations.stale("fake", tmp_path)
    # another metric, or the same one of another training
    for fake.offset, fake.loss in ((1.0, 1.0), (0.0, 0.999)):
        with pytest.raises(BadParameter, match=r"study\.csv"):
            ran(tmp_path)


def test_seeds_run_apart_and_merged_are_the_study(fake, tmp_path):
    whole = ran(tmp_path / "whole")
    fake.calls.clear()
    ran(tmp_path / "rates", seeds=[])
    parts = [tmp_path / f"seed{seed}" for seed in fake.SEEDS]
    for part, seed in zip(parts, fake.SEEDS, strict=True):
        ran(part, seeds=[seed], start=tmp_path / "rates")
    assert len(fake.calls) == len(whole), "rates were selected once"
    merged = study.merge("fake", parts, tmp_path / "merged")
    pd.testing.assert_frame_equal(merged.drop(columns="seconds"), whole.drop(columns="seconds"))
    assert not ablations.stale("fake", tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "study.json")["seeds"] == fake.SEEDS
    with pytest.raises(BadParameter, match=r"\('t', 'b', 0\)"):
        study.merge("fake", parts[1:], tmp_path / "less")
    fake.code = "two"
    with pytest.raises(BadParameter, match="seed0"):
        study.merge("fake", parts, tmp_path / "less")
    assert not (tmp_path / "less").exists()


# --- the ten studies --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Every training of `fit` ends after two steps, on few images."""

    def fit(model, loss, data, *, epochs, batch, **settings):
        settings |= {"schedule": None}
        return loop.fit(model, loss, data, epochs=2 / (len(data) // batch), batch=batch, **settings)

    few_images(monkeypatch)
    monkeypatch.setattr(chests, "COUNTS", {"train": 160, "val": 40, "test": 40})
    monkeypatch.setattr(landcover, "COUNTS", {"train": 4, "val": 1, "test": 1})
    monkeypatch.setattr(slides, "COUNTS", {"train": 12, "val": 3, "test": 3})
    modules = {slug: importlib.import_module(f"companion.toy.ablations.{slug}") for slug in STUDIES}
    monkeypatch.setattr(modules["ecamp"], "PROBES", dict.fromkeys(modules["ecamp"].PROBES, 1))
    monkeypatch.setattr(modules["hvit"], "BATCH", 6)
    for name, module in list(sys.modules.items()):
        if name.startswith("companion.") and getattr(module, "fit", None) is loop.fit and module is not loop:
            monkeypatch.setattr(module, "fit", fit)
    return modules


@pytest.mark.parametrize("slug", STUDIES)
def test_a_study_selects_without_the_test_split_and_its_rows_have_the_committed_columns(
    slug, quick, tmp_path, monkeypatch
):
    module = quick[slug]
    task = next(task for task in reversed(module.TASKS) if task != "detector from scratch")
    method = [m for m in module.TASKS[task] if m not in getattr(module, "UNTRAINED", ())][-1]
    monkeypatch.setattr(module, "TASKS", {task: [method]})
    module.prepare(tmp_path, 100)
    job, metric = (method, task, module.LEARNING_RATES[1], 100, str(tmp_path)), getattr(module, "METRIC", "accuracy")
    with selecting():
        assert math.isfinite(module.train(*job, "select")[metric])
        with pytest.raises(CompanionError):
            module.train(*job, "test")
    row = module.train(*job, "test")
    committed = ablations.read(REPORTS / slug).query("stage == 'test' and task == @task and method == @method")
    columns = set(committed.dropna(axis=1)) - {*ablations.KEYS, "seconds"}
    assert {*row, *getattr(module, "SITUATIONS", ())} == columns  # of BAT not all are in two videos


@pytest.mark.parametrize("slug", STUDIES)
def test_the_committed_study_is_that_of_the_code_and_tested_on_seeds_not_used_before(slug):
    module = importlib.import_module(f"companion.toy.ablations.{slug}")
    facts, rows = read_json(REPORTS / slug / "study.json"), ablations.read(REPORTS / slug)
    chosen, tested = (set(rows[rows.stage == stage].seed) for stage in ("select", "test"))
    assert sorted(tested) == facts["seeds"] == getattr(module, "SEEDS", SEEDS) and min(tested) >= 200 > max(chosen)
    assert sorted(chosen) == facts["selection_seeds"] == getattr(module, "SELECTION_SEEDS", SELECTION_SEEDS)
    assert set(paper(slug)["data_built_for"]) == set(module.TASKS)
    names = {task: set(methods) for task, methods in module.TASKS.items()}
    assert {task: set(own.method) for task, own in rows[rows.stage == "test"].groupby("task")} == names
    for claim in paper(slug)["claims"]:
        for task in claim["tasks"] if claim["kind"] == SYNTHETIC else ():
            assert {claim["better"], claim.get("worse", claim["better"])} <= names[task], claim["id"]


@pytest.mark.parametrize("slug", STUDIES)
def test_the_committed_record_states_the_outcome_of_every_claim(slug):
    """Checks hold, every synthetic result was judged on all seeds, and one that fails gives its reason."""
    ledger, seeds = read_json(REPORTS / slug / "claims.json"), read_json(REPORTS / slug / "study.json")["seeds"]
    assert [claim["id"] for claim in ledger] == [claim["id"] for claim in paper(slug)["claims"]]
    for claim in ledger:
        if claim["kind"] == SYNTHETIC:
            assert claim["status"] in ("holds", "fails") and claim["seeds"] == seeds, claim["id"]
            assert bool(claim["why"]) == (claim["status"] == "fails"), claim["id"]
        else:
            assert claim["status"] == ("holds" if claim["kind"] == CHECK else "not run"), claim["id"]
