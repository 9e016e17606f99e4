"""A study resumes, keeps rows of other code only if they are reproduced, and selects without the test split."""

import importlib
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion.errors import BadParameter, CorruptFile
from companion.evaluation import ablations
from companion.evaluation.ablations import KEYS
from companion.evaluation.claims import CHECK, SYNTHETIC
from companion.io import record
from companion.io.files import read_json
from companion.io.papers import paper, slugs
from companion.studies import study
from tests.conftest import ROOT, kill_when

STUDIES = [slug for slug in slugs() if study.source(slug).exists()]
REPORTS = record.root() / "reports" / "pocket"


class Fake(types.ModuleType):
    """A study of two methods that takes no time; `calls` lists what was trained."""

    def __init__(self, path):
        super().__init__("companion.toy.fake")
        self.__file__ = str(path)
        self.code, self.calls, self.offset, self.loss, self.options = "one", [], 0.0, 1.0, {}
        self.best = {"a": 0.2, "b": 0.2}

    @property
    def STUDY(self):
        return study.Study(
            tasks={"t": ["a", "b"]},
            learning_rates=[0.1, 0.2, 0.4],
            budget="one step",
            data=lambda task, seed, split: (split, seed),
            fit=self.fit,
            score=self.score,
            selection_seeds=[8, 9],
            seeds=[0, 1, 2],
            **self.options,
        )

    def fit(self, method, task, data, rate, seed):
        model = nn.Linear(1, 1)
        model.job = (data[0], task, method, rate, seed)
        return model, [{"loss": self.loss}]

    def score(self, model, task, data):
        split, _, method, rate, seed = model.job
        assert (split, data[0]) in (("train", "val"), ("trainval", "test")) and data[1] == seed
        self.calls.append(model.job)
        return {"accuracy": 10 * (1 - abs(rate - self.best[method])) + (method == "a") + seed + self.offset}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    module = Fake(tmp_path / "fake.py")
    for part in (study, ablations):
        monkeypatch.setattr(part, "sources", lambda path: [])
        monkeypatch.setattr(part, "code_hash", lambda paths: module.code)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda workers, context, start: ThreadPoolExecutor(1))
    return module


def ran(folder, **options):
    return study.run("fake", folder, workers=1, **options)


def test_every_rate_is_tried_once_and_the_best_tested_with_every_seed(fake, tmp_path):
    rows = ran(tmp_path)
    expected = [("train", "t", m, rate, seed) for seed in (8, 9) for rate in (0.1, 0.2, 0.4) for m in "ab"]
    expected += [("trainval", "t", m, 0.2, seed) for seed in (0, 1, 2) for m in "ab"]
    assert sorted(fake.calls) == sorted(expected) and len(rows) == len(expected)
    table = ablations.summary(rows).set_index("method")
    assert table.loc["a"].tolist() == pytest.approx(["t", 12, 1, 3, 0.2]) and table.loc["b", "mean"] == 11
    facts = read_json(tmp_path / "study.json")
    assert (facts["code"], facts["seeds"], facts["selection_seeds"], facts["widened"]) == ("one", [0, 1, 2], [8, 9], [])
    assert set(rows.trained) == {2}


def test_a_study_may_judge_by_another_metric_and_test_what_is_not_trained(fake, tmp_path):
    fake.options, fake.best["a"] = {"metric": "SR", "untrained": ["b"]}, 0.35
    score = fake.score
    fake.score = lambda *given: {"SR": -score(*given)["accuracy"], "PR": 1.0}
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
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from companion.studies import study

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), study._quiet) as pool, study._ends(pool):
        print(pool.submit(os.getpid).result(), flush=True)
        [row.result() for row in [pool.submit(time.sleep, 600) for _ in range(9)]]
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_is_killed_or_stopped_by_ctrl_c_ends_with_its_workers(tmp_path, sent):
    (tmp_path / "killed.py").write_text(KILLED)
    with (tmp_path / "pid").open("w") as out:
        process = subprocess.Popen([sys.executable, str(tmp_path / "killed.py")], stdout=out, env=dict(os.environ))
    kill_when(process, lambda: (tmp_path / "pid").read_text().endswith("\n"), sent)
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("best", "widened", "chosen"),
    [(0.2, [], 0.2), (0.0, [0.05], 0.05), (0.9, [0.8], 0.8), (1.6, [0.8], 0.8)],  # once: 1.6 is not reached
)
def test_a_choice_at_an_end_widens_the_grid_of_that_method_once(fake, tmp_path, best, widened, chosen):
    fake.best["a"] = best
    for _ in range(2):  # the second time nothing is left to do
        rows = ran(tmp_path)
        tried = rows[rows.stage == "select"].groupby(["method", "learning_rate"]).seed.apply(sorted)
        rates = {"a": (0.1, 0.2, 0.4, *widened), "b": (0.1, 0.2, 0.4)}
        assert tried.to_dict() == {(m, rate): [8, 9] for m in "ab" for rate in rates[m]}
        assert ablations.selected(rows) == {("t", "a"): chosen, ("t", "b"): 0.2}
        assert set(rows[(rows.stage == "test") & (rows.method == "a")].learning_rate) == {chosen}
        assert read_json(tmp_path / "study.json")["widened"] == widened
    assert len(fake.calls) == len(rows)


def test_rows_of_a_rate_that_no_method_asks_for_any_more_are_dropped(fake, tmp_path):
    whole, file = ran(tmp_path), tmp_path / "study.csv"
    extra = whole[(whole.stage == "select") & (whole.learning_rate == 0.4)].assign(learning_rate=0.8, accuracy=1.0)
    pd.concat([whole, extra]).to_csv(file, index=False)
    pd.testing.assert_frame_equal(ran(tmp_path).drop(columns="seconds"), whole.drop(columns="seconds"))


def test_a_rate_is_selected_by_its_mean_over_seeds_and_the_smaller_one_in_ties():
    def chosen(*scores):
        rows = [
            {"stage": "select", "task": "t", "method": m, "learning_rate": rate, "seed": i, "accuracy": float(x)}
            for m, rate, *each in scores
            for i, x in enumerate(each)
        ]
        table = pd.DataFrame([*rows, rows[0] | {"stage": "test", "accuracy": 99.0}])
        return ablations.selected(table), ablations.at_ends(table)

    assert chosen(("a", 0.1, 50, 49), ("a", 0.3, 49, 51))[0] == {("t", "a"): 0.3}
    assert chosen(("a", 0.3, 50), ("a", 0.1, 50))[0] == {("t", "a"): 0.1}
    best, ends = chosen(("a", 1, 2), ("a", 2, 1), ("a", 3, 1), ("b", 1, 1), ("b", 2, 2), ("b", 3, 1))
    assert best == {("t", "a"): 1, ("t", "b"): 2} and ends == [("t", "a")]


def test_rows_of_other_code_are_kept_if_some_are_reproduced(fake, tmp_path, monkeypatch):
    ran(tmp_path)
    fake.code = "two"
    fake.calls.clear()
    for _ in range(2):  # once for a version of the code
        ran(tmp_path)
        assert sorted(m for _, _, m, *_ in fake.calls) == ["a", "b"] and not ablations.stale("fake", tmp_path)
        facts = read_json(tmp_path / "study.json")
        again = facts["rechecked"]
        assert (facts["code"], again["code"], again["rows"], again["of"]) == ("one", "two", 2, 18)
    fake.code = "three"
    assert ablations.stale("fake", tmp_path)
    # another metric, or the same one of another training
    for fake.offset, fake.loss in ((1.0, 1.0), (0.0, 0.999)):
        with pytest.raises(BadParameter, match=r"study\.csv"):
            ran(tmp_path)
    # on another processor the code that made the rows may give what the current one gives
    monkeypatch.setattr(study, "_by", lambda before, paper, row, known: study._job(paper, *(row[k] for k in KEYS)))
    ran(tmp_path, before=tmp_path)
    assert read_json(tmp_path / "study.json")["rechecked"]["equal_here"] == 2 and not ablations.stale("fake", tmp_path)


def test_a_checkout_of_other_code_than_that_of_the_rows_is_refused():
    row = dict(zip(KEYS, ("select", "count", "Local", 0.1, 100), strict=True))
    with pytest.raises(BadParameter, match="before"):
        study._by(ROOT, "hvit", row, ("another", None))


# --- the committed studies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", STUDIES)
def test_the_committed_study_is_that_of_the_code_and_tested_on_seeds_not_used_before(slug):
    module = importlib.import_module(f"companion.toy.{slug}").STUDY
    facts, rows = read_json(REPORTS / slug / "study.json"), ablations.read(REPORTS / slug)
    chosen, tested = (set(rows[rows.stage == stage].seed) for stage in ("select", "test"))
    assert sorted(tested) == facts["seeds"] == list(module.seeds)[: len(tested)], "the first seeds, whatever they give"
    assert len(tested) >= 5 and max(chosen) < 200
    assert facts["budget"] == module.budget
    assert sorted(chosen) == facts["selection_seeds"] == list(module.selection_seeds)
    names = {task: set(methods) for task, methods in module.tasks.items()}
    assert {task: set(own.method) for task, own in rows[rows.stage == "test"].groupby("task")} == names


@pytest.mark.parametrize("slug", STUDIES)
def test_the_best_method_of_a_classification_task_beats_a_constant_prediction(slug):
    """By ten points: at chance level no method can lead another."""
    own, rows = importlib.import_module(f"companion.toy.{slug}").STUDY, ablations.read(REPORTS / slug)
    tested = rows[rows.stage == "test"]
    for task in own.tasks if own.metric == "accuracy" else ():
        held_out = own.data(task, own.seeds[0], "test")
        labels = held_out.tensors[1] if isinstance(held_out, TensorDataset) else torch.zeros(())
        if labels.ndim == 1 and not labels.is_floating_point():
            constant = 100 * float(labels.bincount().max()) / len(labels)
            best = tested[tested.task == task].groupby("method")[own.metric].mean().max()
            assert best > constant + 10, f"{slug}, {task}: {best:.1f} % at best, a constant reaches {constant:.1f} %"


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
