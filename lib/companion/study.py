"""A study: what a paper's directional claims are judged by.

Every method gets its learning rate from one grid, chosen on validation pictures, and is then trained on all training
pictures and tested once a seed. Rows are kept in a CSV as they come, so that a study that was stopped goes on where it
was; a record beside it says which code, versions and machine made them.

A module of `companion.studies` describes one: its METHODS, TASKS (task -> the methods run on it), RATES, SEEDS and
SELECTION_SEED, `prepare(root)` that writes the pictures, and `train(method, task, rate, seed, root, split)` that
returns a row with "accuracy" in percent.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch

from .errors import BadParameter, CorruptFile
from .files import atomic, read_json, write_json
from .progress import progress
from .provenance import code_hash, sources
from .record import versions

KEYS = ["stage", "task", "method", "rate", "seed"]


def run(paper: str, folder: str | Path, root: str | Path, workers: int | None = None) -> pd.DataFrame:
    """Run or finish the study of `paper`; write `folder`/study.csv and study.json; return its rows.

    Args:
        root: where the pocket pictures are written.
        workers: processes, each on one thread; all cores by default.

    Raises:
        BadParameter: rows of the file were made by other code: move it away to start anew.
    """
    module = importlib.import_module(f"companion.studies.{paper}")
    workers = workers or os.cpu_count() or 1
    folder = Path(folder)
    record = folder / "study.json"
    code = code_hash(sources(module.__file__))
    rows: list[dict] = []
    if (folder / "study.csv").exists():
        rows = read(folder).to_dict("records")
        if read_json(record).get("code") != code:
            raise BadParameter("study", str(folder / "study.csv"), "a study of today's code: move the old one away")
    facts = {
        "paper": paper, "code": code, "rates": module.RATES, "seeds": module.SEEDS,
        "selection_seed": module.SELECTION_SEED, "methods": list(module.METHODS), "tasks": module.TASKS,
        "versions": versions(), "machine": platform.machine(), "workers": workers, "threads_each": 1,
    }  # fmt: skip
    module.prepare(root)

    pairs = [(task, method) for task, methods in module.TASKS.items() for method in methods]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for stage in ("select", "test"):
            if stage == "select":
                jobs = [(t, m, rate, module.SELECTION_SEED) for rate in module.RATES for t, m in pairs]
            else:
                best = selected(pd.DataFrame(rows))
                jobs = [(t, m, best[t, m], seed) for seed in module.SEEDS for t, m in pairs]
            done = {tuple(row[k] for k in KEYS[1:]) for row in rows if row["stage"] == stage}
            todo = [job for job in jobs if job not in done]
            futures = {pool.submit(_job, paper, stage, *job, str(root)) for job in todo}
            text = "choosing learning rates" if stage == "select" else "training and testing"
            for future in progress(as_completed(futures), text, len(jobs), len(jobs) - len(todo)):
                rows.append(future.result())
                write_json(record, facts)
                _write(folder / "study.csv", rows)
    write_json(record, facts | {"seconds_of_cpu": round(sum(row["seconds"] for row in rows))})
    return read(folder)


def _job(paper: str, stage: str, task: str, method: str, rate: float, seed: int, root: str) -> dict:
    start = time.process_time()
    os.environ["COMPANION_PROGRESS"] = "off"  # the study shows one line for all
    module = importlib.import_module(f"companion.studies.{paper}")
    result = module.train(method, task, rate, seed, root, "select" if stage == "select" else "test")
    row = {"stage": stage, "task": task, "method": method, "rate": rate, "seed": seed}
    return row | result | {"seconds": round(time.process_time() - start, 1)}


def _write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).sort_values(KEYS, kind="stable")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def read(folder: str | Path) -> pd.DataFrame:
    """The rows of a study. Raises `CorruptFile` when they are not that."""
    path = Path(folder) / "study.csv"
    try:
        rows = pd.read_csv(path)
        rows[[*KEYS, "accuracy"]]
    except (KeyError, ValueError) as error:
        raise CorruptFile(path, f"not the rows of a study ({error})") from error
    return rows


def selected(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The learning rate of each (task, method): the best on validation, the smaller of two that tie."""
    chosen = rows[rows.stage == "select"].sort_values(["accuracy", "rate"], ascending=[False, True])
    first = chosen.groupby(["task", "method"], sort=False).first()
    return first["rate"].to_dict()


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and number of seeds of the test accuracy by task and method, and its rate."""
    tested = rows[rows.stage == "test"]
    table = tested.groupby(["task", "method"], sort=False).accuracy.agg(["mean", "std", "count"]).reset_index()
    best = selected(rows)
    table["rate"] = [best[key] for key in zip(table.task, table.method, strict=True)]
    return table


def stale(paper: str, folder: str | Path) -> bool:
    """Whether the study was made by other code than today's."""
    module = Path(__file__).parent / "studies" / f"{paper}.py"
    return read_json(Path(folder) / "study.json").get("code") != code_hash(sources(module))
