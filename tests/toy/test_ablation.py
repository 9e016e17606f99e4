"""A study resumes, accepts rows of other code only if they are reproduced, and selects without the test split."""

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
from companion.training import fit as loop
from tests.conftest import kill_when
from tests.small import few_images

STUDIES = [slug for slug in slugs() if (Path(study.__file__).parent / "ablations" / f"{slug}.py").exists()]


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


def test_every_rate_is_tried_once_and_the_best_tested_with_every_seed(fake, tmp_path):
    rows = study.run("fake", tmp_path / "out", tmp_path, workers=1)
    assert len(fake.calls) == 2 * 3 * 2 + 2 * 3 == len(rows)
    assert ablations.selected(rows) == {("t", "a"): 0.2, ("t", "b"): 0.2}
    assert {c[3] for c in fake.calls if c[0] == "test"} == {0.2}
    table = ablations.summary(rows).set_index("method")
    assert table.loc["a", "mean"] - table.loc["b", "mean"] == pytest.approx(1)
    assert table["count"].tolist() == [3, 3] and table["std"].tolist() == pytest.approx([1, 1])


def test_a_study_may_judge_by_another_measure_and_hold_what_is_not_trained(fake, tmp_path):
    fake.METRIC, fake.UNTRAINED = "SR", ["b"]
    train = fake.train

    def measured(*job):
        row = train(*job)
        return {"SR": -row.pop("accuracy"), "PR": 1.0} | row

    fake.train, fake.best = measured, 0.35
    rows = study.run("fake", tmp_path / "out", tmp_path, workers=1)
    assert len(fake.calls) == 2 * 4 + 2 * 3
    assert ablations.selected(rows) == {("t", "a"): 0.05}  # SR is best where the accuracy is worst
    table = ablations.summary(ablations.read(tmp_path / "out")).set_index("method")
    assert table.loc["a", "mean"] == pytest.approx(-9) and pd.isna(table.loc["b", "learning_rate"])
    assert ablations.summary(rows, "PR")["mean"].tolist() == [1, 1]


def test_a_stopped_study_goes_on(fake, tmp_path):
    study.run("fake", tmp_path / "out", tmp_path, workers=1)
    whole = (tmp_path / "out" / "study.csv").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out" / "study.csv").write_text("".join(lines[:4]))
    fake.calls.clear()
    study.run("fake", tmp_path / "out", tmp_path, workers=1)
    assert len(fake.calls) == 18 - 3
    again = pd.read_csv(tmp_path / "out" / "study.csv")
    read = ablations.read(tmp_path / "out")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), read.drop(columns="seconds"))
    assert len(again) == 18
    (tmp_path / "out" / "study.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CorruptFile, match=r"study\.csv"):
        ablations.read(tmp_path / "out")


KILLED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from companion.toy import ablation as study
from companion.toy.ablations import SEEDS, SELECTION_SEEDS, reader, selecting
from companion.training import fit as loop

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
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 30
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
        rows = study.run("fake", tmp_path / "out", tmp_path, workers=1)
        selected = rows[rows.stage == "select"]
        assert set(selected.learning_rate) == {0.1, 0.2, 0.4, *widened}
        assert all(sorted(own) == [8, 9] for _, own in selected.groupby(["method", "learning_rate"]).seed)
        assert set(ablations.selected(rows).values()) == set(rows[rows.stage == "test"].learning_rate) == {chosen}
        assert read_json(tmp_path / "out" / "study.json")["widened"] == widened
    assert len(fake.calls) == len(rows)


def test_a_rate_is_selected_by_its_mean_over_seeds():
    rows = rows_of({("t", "a", 0.1): 50, ("t", "a", 0.3): 49})
    rows += [row | {"seed": 1, "accuracy": 99 - row["accuracy"] + 0.5 * row["learning_rate"]} for row in rows]
    assert ablations.selected(pd.DataFrame(rows)) == {("t", "a"): 0.3}


def test_the_test_split_cannot_be_read_while_learning_rates_are_selected(fake, tmp_path):
    @reader(4)
    def images(root, seed, split):
        return split

    train = fake.train
    fake.train = lambda *job: {"read": images("", 0, fake.asked)} | train(*job)
    fake.asked = "val"
    study.run("fake", tmp_path / "right", tmp_path, workers=1, seeds=[])
    assert images("", 0, split="test") == "test"  # also where it is cached
    fake.asked = "test"
    with pytest.raises(CompanionError, match="without the test split"):
        study.run("fake", tmp_path / "wrong", tmp_path, workers=1)


@pytest.mark.parametrize("slug", STUDIES)
def test_no_study_reads_the_test_split_to_select(slug, tmp_path, monkeypatch):
    """A method of each study is trained for two steps, and scored as in the selection."""
    module = importlib.import_module(f"companion.toy.ablations.{slug}")
    task, methods = next(iter(module.TASKS.items()))
    method = next(m for m in methods if m not in getattr(module, "UNTRAINED", ()))
    few_steps(monkeypatch)
    few_images(monkeypatch)
    monkeypatch.setattr(module, "TASKS", {task: methods})
    if slug == "bat":
        monkeypatch.setattr(module, "PAIRS", 64)
    module.prepare(tmp_path, 100)
    metric = getattr(module, "METRIC", "accuracy")
    with selecting():
        row = module.train(method, task, module.LEARNING_RATES[1], 100, str(tmp_path), "select")
        assert math.isfinite(row[metric])
        with pytest.raises(CompanionError, match="without the test split"):
            module.train(method, task, module.LEARNING_RATES[1], 100, str(tmp_path), "test")


def few_steps(monkeypatch):
    """Every training of `fit` ends after two steps."""

    def fit(model, loss, data, *, epochs, batch, **settings):
        return loop.fit(
            model, loss, data, epochs=2 / (len(data) // batch), batch=batch, **settings | {"schedule": None}
        )

    for name, module in list(sys.modules.items()):
        if name.startswith("companion.") and getattr(module, "fit", None) is loop.fit and module is not loop:
            monkeypatch.setattr(module, "fit", fit)


def test_rows_of_other_code_are_checked_before_they_are_kept(fake, tmp_path):
    study.run("fake", tmp_path / "out", tmp_path, workers=1)
    fake.code = "two"
    fake.calls.clear()
    study.run("fake", tmp_path / "out", tmp_path, workers=1)
    assert len(fake.calls) == study.RECHECKED
    assert not ablations.stale("fake", tmp_path / "out")
    facts = read_json(tmp_path / "out" / "study.json")
    assert facts["code"] == "one"  # what made the rows
    assert facts["rechecked"]["code"] == "two" and (facts["rechecked"]["rows"], facts["rechecked"]["of"]) == (3, 18)
    fake.calls.clear()
    study.run("fake", tmp_path / "out", tmp_path, workers=1)
    assert not fake.calls and read_json(tmp_path / "out" / "study.json") == facts
    fake.code = "three"
    assert ablations.stale("fake", tmp_path / "out")
    # another metric, or the same one of another training
    for offset, loss in ((1.0, 1.0), (0.0, 0.999)):
        fake.offset, fake.loss = offset, loss
        with pytest.raises(BadParameter, match="move it away"):
            study.run("fake", tmp_path / "out", tmp_path, workers=1)


def test_seeds_run_apart_and_merged_are_the_study(fake, tmp_path):
    whole = study.run("fake", tmp_path / "whole", tmp_path, workers=1)
    fake.calls.clear()
    study.run("fake", tmp_path / "rates", tmp_path, workers=1, seeds=[])
    assert {call[0] for call in fake.calls} == {"select"}
    parts = [tmp_path / f"seed{seed}" for seed in fake.SEEDS]
    for part, seed in zip(parts, fake.SEEDS, strict=True):
        study.run("fake", part, tmp_path, workers=1, seeds=[seed], start=tmp_path / "rates")
    assert len(fake.calls) == len(whole), "rates were chosen once"
    merged = study.merge("fake", parts, tmp_path / "merged")
    pd.testing.assert_frame_equal(merged.drop(columns="seconds"), whole.drop(columns="seconds"))
    assert not ablations.stale("fake", tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "study.json")["seeds"] == fake.SEEDS

    with pytest.raises(BadParameter, match=r"missing: \[\('t', 'a', 0\), \('t', 'b', 0\)\]"):
        study.merge("fake", parts[1:], tmp_path / "less")
    fake.code = "two"
    with pytest.raises(BadParameter, match="the current code"):
        study.merge("fake", parts, tmp_path / "less")
    assert not (tmp_path / "less").exists()


def rows_of(found: dict[tuple[str, str, float], float], stage: str = "select") -> list[dict]:
    return [
        {"stage": stage, "task": task, "method": method, "learning_rate": rate, "seed": 0, "accuracy": float(accuracy)}
        for (task, method, rate), accuracy in found.items()
    ]


def test_ties_take_the_smaller_rate_and_a_choice_at_an_end_of_the_grid_is_named():
    rows = rows_of({("t", "a", 0.3): 50, ("t", "a", 0.1): 50})
    assert ablations.selected(pd.DataFrame(rows)) == {("t", "a"): 0.1}
    best = {("t", "low"): 1, ("t", "middle"): 2, ("u", "high"): 3}
    rows = rows_of({(*key, rate): rate == at for key, at in best.items() for rate in (1, 2, 3)})
    rows += rows_of({("t", "untrained", 0.0): 9}, "test")
    assert ablations.at_ends(pd.DataFrame(rows)) == [("t", "low"), ("u", "high")]


@pytest.mark.parametrize("slug", STUDIES)
def test_claims_name_methods_and_tasks_of_the_study(slug):
    module = importlib.import_module(f"companion.toy.ablations.{slug}")
    assert set(paper(slug)["data_built_for"]) == set(module.TASKS)
    for claim in paper(slug)["claims"]:
        if claim["kind"] == SYNTHETIC:
            for task in claim["tasks"]:
                assert {claim["better"], claim.get("worse", claim["better"])} <= set(module.TASKS[task]), claim["id"]


@pytest.mark.parametrize("slug", STUDIES)
def test_the_committed_study_was_tested_on_seeds_not_used_before(slug):
    module = importlib.import_module(f"companion.toy.ablations.{slug}")
    facts = read_json(record.root() / "reports" / "pocket" / slug / "study.json")
    assert facts["seeds"] == getattr(module, "SEEDS", SEEDS) and min(facts["seeds"]) >= 200
    assert facts["selection_seeds"] == getattr(module, "SELECTION_SEEDS", SELECTION_SEEDS)
    assert max(facts["selection_seeds"]) < 200 and len(facts["selection_seeds"]) == 3


@pytest.mark.parametrize("slug", STUDIES)
def test_the_committed_record_says_of_every_claim_what_came_out(slug):
    """Checks hold, every synthetic result was judged on all seeds, and one that fails gives its reason."""
    ledger = read_json(record.root() / "reports" / "pocket" / slug / "claims.json")
    seeds = read_json(record.root() / "reports" / "pocket" / slug / "study.json")["seeds"]
    assert [claim["id"] for claim in ledger] == [claim["id"] for claim in paper(slug)["claims"]]
    for claim in ledger:
        if claim["kind"] == SYNTHETIC:
            assert claim["status"] in ("holds", "fails"), claim["id"]
            assert claim["seeds"] == seeds and len(seeds) == 5
            assert bool(claim["why"]) == (claim["status"] == "fails"), claim["id"]
        else:
            assert claim["status"] == ("holds" if claim["kind"] == CHECK else "not run"), claim["id"]
