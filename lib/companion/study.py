"""A study: what a paper's directional claims are judged by.

Every method gets its learning rate from one grid, chosen on validation pictures, and is then trained on all training
pictures and tested once a seed. Rows are kept in a CSV as they come, so that a study that was stopped goes on where it
was; a record beside it says which code, versions and machine made them.

A module of `companion.studies` describes one: its METHODS, TASKS (task -> the methods run on it), RATES, SEEDS and
SELECTION_SEED, `prepare(root)` that writes the data, and `train(method, task, rate, seed, root, split)` that returns a
row with its METRIC in percent ("accuracy" unless the module says otherwise), the "loss", and whatever else is measured.
Methods in its UNTRAINED have nothing to choose: they are tested only, with rate 0.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import random
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch

from .errors import BadParameter, CompanionError, CorruptFile
from .files import atomic, read_json, write_json
from .progress import progress
from .provenance import code_hash, sources
from .record import versions

RECHECKED = 3  # rows run again when the code has changed since they were made
KEYS = ["stage", "task", "method", "rate", "seed"]


def run(
    paper: str,
    folder: str | Path,
    root: str | Path,
    workers: int | None = None,
    seeds: Sequence[int] | None = None,
    start: str | Path | None = None,
) -> pd.DataFrame:
    """Run or finish the study of `paper`; write `folder`/study.csv and study.json; return its rows.

    Args:
        root: where the pocket pictures are written.
        workers: processes, each on one thread; all cores by default.
        seeds: those to test; all by default, none for the choice of learning rates alone.
        start: folder of a study whose choice of learning rates is taken over.

    Raises:
        BadParameter: the rows of the file are not what today's code gives: move it away to start anew.
    """
    module = importlib.import_module(f"companion.studies.{paper}")
    workers = workers or os.cpu_count() or 1
    folder = Path(folder)
    if start and not (folder / "study.csv").exists():
        read(start)
        for name in ("study.csv", "study.json"):
            with atomic(folder / name) as temporary:
                shutil.copyfile(Path(start) / name, temporary)
    record = folder / "study.json"
    code = code_hash(sources(module.__file__))
    module.prepare(root)
    pairs = [(task, method) for task, methods in module.TASKS.items() for method in methods]
    untrained, metric = getattr(module, "UNTRAINED", ()), getattr(module, "METRIC", "accuracy")
    rows: list[dict] = []
    if (folder / "study.csv").exists():
        rows = [row for row in read(folder).to_dict("records") if (row["task"], row["method"]) in pairs]
    facts = _facts(paper, module, module.SEEDS if seeds is None else list(seeds)) | {"workers": workers}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _quiet) as pool:
        if rows and read_json(record).get("code") != code:
            _recheck(pool, paper, rows, root, folder, metric)
        for stage in ("select", "test"):
            if stage == "select":
                trained = [(t, m) for t, m in pairs if m not in untrained]
                jobs = [(t, m, rate, module.SELECTION_SEED) for rate in module.RATES for t, m in trained]
            else:
                best = {pair: 0.0 for pair in pairs} | selected(_frame(rows, metric))
                # a larger grid may choose another rate than the one that was tested
                chosen = {(*pair, rate) for pair, rate in best.items()}
                rows = [r for r in rows if r["stage"] == "select" or (r["task"], r["method"], r["rate"]) in chosen]
                jobs = [(t, m, best[t, m], seed) for seed in facts["seeds"] for t, m in pairs]
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


def merge(paper: str, parts: Sequence[str | Path], folder: str | Path) -> pd.DataFrame:
    """Write to `folder` the study whose seeds were run apart, each in one of the folders `parts`; return its rows.

    Raises:
        BadParameter: a part is of other code than today's, or rows are missing.
    """
    module = importlib.import_module(f"companion.studies.{paper}")
    facts = _facts(paper, module, module.SEEDS)
    rows: dict[tuple, dict] = {}
    for part in parts:
        new = read(part)
        if read_json(Path(part) / "study.json").get("code") != facts["code"]:
            raise BadParameter("part of a study", str(part), "one that today's code made")
        rows |= {tuple(row[k] for k in KEYS): row for row in new.to_dict("records")}
    pairs = {(task, method, seed) for task in module.TASKS for method in module.TASKS[task] for seed in module.SEEDS}
    if lacking := sorted(pairs - {(t, m, seed) for stage, t, m, _, seed in rows if stage == "test"}):
        raise BadParameter("parts of a study", list(map(str, parts)), f"parts that hold all tests; missing: {lacking}")
    seconds = round(sum(row["seconds"] for row in rows.values()))
    _write(Path(folder) / "study.csv", list(rows.values()))
    write_json(Path(folder) / "study.json", facts | {"workers": len(parts), "seconds_of_cpu": seconds})
    return read(folder)


def _facts(paper: str, module: ModuleType, seeds: list[int]) -> dict:
    """The record of a study."""
    return {
        "paper": paper, "code": code_hash(sources(module.__file__)), "rates": module.RATES, "seeds": seeds,
        "selection_seed": module.SELECTION_SEED, "methods": list(module.METHODS), "tasks": module.TASKS,
        "metric": getattr(module, "METRIC", "accuracy"), "versions": versions(), "machine": platform.machine(),
        "threads_each": 1,
    }  # fmt: skip


def _quiet() -> None:
    """A worker has one thread, leaves it to the study to show progress, and ends when the study is killed."""
    torch.set_num_threads(1)
    os.environ["COMPANION_PROGRESS"] = "off"
    threading.Thread(target=_end_with_study, daemon=True).start()


def _end_with_study() -> None:
    """Otherwise a worker would train on what is queued, and then wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _recheck(pool: Executor, paper: str, rows: list[dict], root: str | Path, folder: Path, metric: str) -> None:
    """Rows of other code are kept when some of them, drawn at random and run again, come out the same."""
    drawn = random.sample(rows, min(RECHECKED, len(rows)))
    futures = [pool.submit(_job, paper, *(row[k] for k in KEYS), str(root)) for row in drawn]
    for row, future in zip(drawn, futures, strict=True):
        again = future.result()
        if again[metric] != row[metric] or again["loss"] != row["loss"]:
            what = f"{row['stage']} of {row['method']} on {row['task']}: {again[metric]}, not {row[metric]}"
            accepted = f"rows that today's code gives too ({what}); move it away to start anew"
            raise BadParameter("study", str(folder / "study.csv"), accepted)


def _job(paper: str, stage: str, task: str, method: str, rate: float, seed: int, root: str) -> dict:
    start = time.process_time()
    module = importlib.import_module(f"companion.studies.{paper}")
    result = module.train(method, task, rate, seed, root, "select" if stage == "select" else "test")
    row = {"stage": stage, "task": task, "method": method, "rate": rate, "seed": seed}
    return row | result | {"seconds": round(time.process_time() - start, 1)}


def _write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).sort_values(KEYS, kind="stable")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def _frame(rows: list[dict] | pd.DataFrame, metric: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    frame.attrs["metric"] = metric
    return frame


def read(folder: str | Path) -> pd.DataFrame:
    """The rows of a study; `.attrs["metric"]` names what it chose by. Raises `CorruptFile` when they are not that."""
    path, record = Path(folder) / "study.csv", Path(folder) / "study.json"
    metric = read_json(record).get("metric", "accuracy") if record.exists() else "accuracy"
    if not path.exists():
        raise CorruptFile(path, "there is no such study")
    try:
        rows = pd.read_csv(path)
        if rows[[*KEYS, metric]].isna().any(axis=None):
            raise ValueError("a row is not whole")
        pd.to_numeric(rows[metric])
    except (KeyError, ValueError) as error:
        raise CorruptFile(path, f"not the rows of a study ({error})") from error
    return _frame(rows, metric)


def selected(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The learning rate of each trained (task, method): the best on validation, the smaller of two that tie."""
    metric = rows.attrs.get("metric", "accuracy")
    chosen = rows[rows.stage == "select"].sort_values([metric, "rate"], ascending=[False, True])
    first = chosen.groupby(["task", "method"], sort=False).first()
    return first["rate"].to_dict()


def at_ends(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The (task, method) whose learning rate is the smallest or largest of the grid: a wider one might do better."""
    rates = rows.rate[rows.stage == "select"]
    return sorted(pair for pair, rate in selected(rows).items() if rate in (rates.min(), rates.max()))


def summary(rows: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and number of seeds by task and method on test data, and the learning rate.

    `metric` is a column of the study; without it the one that the study chose by.
    """
    tested = rows[rows.stage == "test"]
    measured = tested.groupby(["task", "method"], sort=False)[metric or rows.attrs.get("metric", "accuracy")]
    table = measured.agg(["mean", "std", "count"]).reset_index()
    best = selected(rows)
    table["rate"] = [best.get(key, float("nan")) for key in zip(table.task, table.method, strict=True)]
    return table


def stale(paper: str, folder: str | Path) -> bool:
    """Whether the study was made by other code than today's."""
    module = Path(__file__).parent / "studies" / f"{paper}.py"
    return read_json(Path(folder) / "study.json").get("code") != code_hash(sources(module))


def main(words: list[str] | None = None) -> int:
    """`python -m companion.study PAPER FOLDER`: a study, one part of it, or its parts put together (`make study`)."""
    parser = argparse.ArgumentParser(prog="companion.study", description=main.__doc__)
    parser.add_argument("paper")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="where the pocket pictures are written (default: FOLDER/data)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seeds", type=int, nargs="*", help="those to test; none for learning rates alone")
    parser.add_argument("--start", type=Path, help="folder of the study whose learning rates are taken over")
    parser.add_argument("--merge", type=Path, nargs="+", help="folders of the parts, instead of running anything")
    given = parser.parse_args(words)
    known = sorted(p.stem for p in (Path(__file__).parent / "studies").glob("[a-z]*.py"))
    try:
        if given.paper not in known:
            raise BadParameter("paper", given.paper, known)
        if given.merge:
            merge(given.paper, given.merge, given.folder)
        else:
            run(given.paper, given.folder, given.data or given.folder / "data", given.workers, given.seeds, given.start)
    except CompanionError as error:
        print(f"companion: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
