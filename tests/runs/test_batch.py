"""Grids of runs: expansion of a file, assignment of GPUs, summary of failed runs."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from companion.errors import BadParameter
from companion.io.papers import paper, slugs
from companion.runs import batch, needs

PAPERS = ("bat", "sa2vp")
HOLDS = """
import sys, time
from pathlib import Path
from companion.runs.batch import devices
with devices(int(sys.argv[2]), Path(sys.argv[1]), poll=0.05) as GPUs:
    began = time.time()
    time.sleep(0.3)
    print(*GPUs, began, time.time())
"""


def test_lists_are_axes_and_name_the_runs() -> None:
    axes = {"paper": "sa2vp", "dataset": ["vtab/svhn", "vtab/dtd"], "seed": [0, 1]}
    runs = [axes, {"paper": "bat", "resources": {"gpu": 2}}]
    found = batch.expand({"parameters": {"data_root": "/data", "seed": 9}, "runs": runs}, PAPERS)
    names = [f"sa2vp/dataset=vtab-{name},seed={seed}" for name in ("svhn", "dtd") for seed in (0, 1)]
    assert list(found) == [*names, "bat/run"]
    parameters = {"data_root": "/data", "seed": 1, "dataset": "vtab/dtd"}
    assert found["sa2vp/dataset=vtab-dtd,seed=1"] == {"parameters": parameters, "resources": {}}
    assert found["bat/run"] == {"parameters": {"data_root": "/data", "seed": 9}, "resources": {"gpu": 2}}


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        ([{"paper": "vit"}], "'bat', 'sa2vp'"),
        ([{"paper": "bat", "seed": 0}, {"paper": "bat", "seed": 1}], "bat/run"),
        ([{"paper": "bat", "weights": ["a;b"]}], "a;b"),
        ([{"paper": "sa2vp", "dataset": "svhn"}], "'vtab/svhn', 'hta/svhn'"),
        ([{"paper": "bat", "datset": ["a"]}], "'dataset'"),
        ([{"paper": "bat", "resources": {"gpus": 2}}], "gpus: 2"),
        (None, "None"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(runs: list[dict] | None, named: str) -> None:
    with pytest.raises(BadParameter, match=re.escape(named)):
        batch.expand({"runs": runs}, PAPERS)


@pytest.mark.parametrize("slug", slugs())
def test_every_published_table_is_a_grid_that_its_notebook_accepts(slug: str) -> None:
    """Runs of one paper never share a folder, nor do a run and its rehearsal."""
    folders: dict[str, dict] = {}
    for run in paper(slug)["runs"]:
        for table in [*run["tables"], run["id"]] if "parameters" in run else ():
            real, rehearsed = (batch.expand(batch.of_table(slug, table, "/d", dry), [slug]) for dry in (False, True))
            assert real and len(real) == len(rehearsed) and not real.keys() & rehearsed.keys()
            assert all(facts["parameters"]["data_root"] == "/d" for facts in real.values())
            for folder, facts in real.items():
                assert folders.setdefault(folder, facts) == facts
    with pytest.raises(BadParameter, match=table):
        batch.of_table(slug, "no table", "/d")


@pytest.mark.parametrize(
    ("slug", "table"), [(slug, t) for slug in slugs() for t in paper(slug)["results"].get("cells", {})]
)
def test_a_table_queues_what_its_cells_show_and_nothing_else(slug: str, table: str) -> None:
    """Data sets of another table (VTAB's other groups), another task or protocol."""
    facts = paper(slug)
    where = facts["results"]["cells"][table].get("where", {})
    queued = [run["parameters"] for run in batch.expand(batch.of_table(slug, table, "/d"), [slug]).values()]
    for name, wanted in where.items():
        found = {run[name] for run in queued if name in run}
        assert found <= {*(wanted if isinstance(wanted, list) else [wanted])}, name
    every = [run for run in facts["runs"] if table in run["tables"]]
    asked = {data for run in every for data in needs.sets(run["data"])} if "dataset" in where else set()
    named = where.get("dataset", [])
    assert {run["dataset"] for run in queued} >= asked & {*(named if isinstance(named, list) else [named])}


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,7")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def start(folder: Path, count: int, code: str = HOLDS) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, folder, str(count)], stdout=subprocess.PIPE, text=True)


def test_no_gpu_is_given_to_two_runs_at_a_time(tmp_path: Path) -> None:
    """The GPUs of each process, and the interval in which it held them."""
    counts = [2, 2, 1, 3]
    started = [start(tmp_path, count) for count in counts]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    held = [(set(cards), float(began), float(ended)) for *cards, began, ended in said]
    assert [len(cards) for cards, _, _ in held] == counts
    for i, (cards, began, ended) in enumerate(held):
        assert cards <= {"0", "1", "7"}
        for others, began_too, ended_too in held[:i]:
            assert not cards & others or ended <= began_too or ended_too <= began


def test_a_killed_run_releases_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    process = start(tmp_path, 1, HOLDS.replace("time.sleep(0.3)", "print('held', flush=True); time.sleep(100)"))
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with batch.devices(1, tmp_path, poll=0.05) as cards:  # waits for ever if the lock outlives its process
        assert cards == ["3"]


def test_a_scheduler_assigns_its_own_gpus_and_an_allocation_of_several_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadParameter, match="0 to 3"), batch.devices(4, tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # as after `salloc --gres=gpu:3`
    with batch.devices(1, tmp_path) as one, batch.devices(2, tmp_path) as others:
        assert one == ["0"] and others == ["1", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with batch.devices(1, tmp_path) as cards:
        assert cards == []


def test_a_gpu_that_is_hidden_is_none_and_a_run_without_one_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, found in (("-1", []), ("", []), ("0,-1,2", ["0"]), ("GPU-1a,1", ["GPU-1a", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert batch.gpus() == found
    monkeypatch.setattr("papermill.cli.papermill", lambda words: None)
    batch.main(["0", "in.ipynb", "out.ipynb"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_summary_tells_done_failed_and_not_run_and_gathers_what_was_measured(tmp_path: Path) -> None:
    reports, logs = tmp_path / "reports", tmp_path / "logs"
    for run, accuracy in (("seed=0", "81.5"), ("seed=1", "82.5")):
        folder = reports / "sa2vp" / run
        folder.mkdir(parents=True)
        (folder / "sa2vp.ipynb").write_text("{}")
        facts = {"seconds": 61.5, "peak_memory_mb": 900, "device": "CPU"}
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "measured.csv").write_text(f"method,accuracy\nSA2VP,{accuracy}\n")
    (logs / "bat").mkdir(parents=True)
    for name in ("run", "killed"):
        (logs / "bat" / f"{name}.log").write_text("started\nDeadKernelError: Kernel died\n")
    error = {"output_type": "error", "ename": "MissingData", "evalue": "'rgbt/lasher'\n more"}
    (logs / "bat" / "run.ipynb").write_text(json.dumps({"cells": [{"outputs": [error]}]}))
    single = reports / "sa2vp" / "measured.csv"
    single.write_text("method,accuracy\nVPT-deep,70.0\n")
    runs = ("sa2vp/seed=0", "sa2vp/seed=1", "bat/run", "bat/killed", "bat/other")
    text = batch.summarise(runs, reports, logs)
    assert single.read_text() == "method,accuracy\nVPT-deep,70.0\n", "what a run without a grid measured stays"
    assert text.startswith("2 done, 2 failed, 1 not run")
    with (reports / "summary.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["state"] for row in written] == ["done", "done", "failed", "failed", "not run"]
    assert written[0]["seconds"] == "61.5" and written[2]["reason"] == "MissingData: 'rgbt/lasher'"
    assert written[3]["reason"] == "DeadKernelError: Kernel died"
    assert (reports / "sa2vp" / "grid.csv").read_text().split() == ["method,accuracy", "SA2VP,81.5", "SA2VP,82.5"]
