"""Ablation studies, which judge the papers' synthetic results under one protocol.

1. Every method is trained in full with every learning rate of the study's grid on each of three selection seeds, and
   scored on validation images. The test split cannot be read in this stage, see `ablations.reader`.
2. Where a method does best, by its mean over the selection seeds, at an end of the grid, the grid is extended there by
   one step for all methods, once.
3. Each method is then trained with its best learning rate (the smaller one in ties) and tested on each of five other
   seeds (three on real data), which were not used while datasets, methods and grids were designed. Each seed has its
   own data.

Rows are appended to a CSV, so that a stopped study can be resumed; a record next to it names the code, versions and
machine.

A module of `toy.ablations` describes one study: its METHODS, TASKS (task -> its methods), LEARNING_RATES (ascending),
BUDGET (the same for every trained method), optionally its own SELECTION_SEEDS, `prepare(root, seed)` that writes the
data of a seed, and `train(method, task, learning_rate, seed, root, split)` that returns a row with its METRIC in
percent ("accuracy" by default), the "loss" and other measures. Methods in its UNTRAINED are only
tested, with learning rate 0.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import inspect
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

from ..errors import BadParameter, CompanionError, check_choice
from ..evaluation.ablations import KEYS, frame, read, selected
from ..ops.files import atomic, read_json, write_json
from ..ops.progress import progress
from ..ops.provenance import code_hash, sources
from ..ops.record import versions
from .ablations import SEEDS, SELECTION_SEEDS, selecting

RECHECKED = 3  # number of rows to rerun after a change of the code


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
        root: folder of the synthetic images.
        workers: processes, each with one thread; all cores by default.
        seeds: those to test; all by default, none to select learning rates only.
        start: folder of a study whose selected learning rates are reused.

    Raises `BadParameter`: the current code does not reproduce the rows of the file; move it away to start from scratch.
    """
    module = importlib.import_module(f"companion.toy.ablations.{paper}")
    workers = workers or os.cpu_count() or 1
    folder = Path(folder)
    if start and not (folder / "study.csv").exists():
        read(start)
        for name in ("study.csv", "study.json"):
            with atomic(folder / name) as temporary:
                shutil.copyfile(Path(start) / name, temporary)
    record = folder / "study.json"
    facts = _facts(paper, module, _seeds(module) if seeds is None else list(seeds)) | {"workers": workers}
    for seed in (*facts["selection_seeds"], *facts["seeds"]):
        module.prepare(root, seed)
    pairs = [(task, method) for task, methods in module.TASKS.items() for method in methods]
    untrained, metric = getattr(module, "UNTRAINED", ()), getattr(module, "METRIC", "accuracy")
    rows: list[dict] = []
    if (folder / "study.csv").exists():
        rows = [row for row in read(folder).to_dict("records") if (row["task"], row["method"]) in pairs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _quiet) as pool:
        if rows:
            facts |= _recheck(pool, paper, rows, root, folder, metric, facts["code"])
        grid = facts["learning_rates"]
        for stage in ("select", "select wider", "test"):
            if stage != "test":
                if stage == "select wider" and rows:
                    facts["widened"] = wider(frame(rows, metric), grid)
                rates = [*grid, *facts["widened"]]
                trained = [(t, m) for t, m in pairs if m not in untrained]
                jobs = [(t, m, lr, seed) for seed in facts["selection_seeds"] for lr in rates for t, m in trained]
            else:
                best = {pair: 0.0 for pair in pairs} | selected(frame(rows, metric))
                # a larger grid may select another learning rate than the tested one
                chosen = {(*pair, rate) for pair, rate in best.items()}
                rows = [
                    r for r in rows if r["stage"] == "select" or (r["task"], r["method"], r["learning_rate"]) in chosen
                ]
                jobs = [(t, m, best[t, m], seed) for seed in facts["seeds"] for t, m in pairs]
            stage = stage.partition(" ")[0]
            done = {tuple(row[k] for k in KEYS[1:]) for row in rows if row["stage"] == stage}
            todo = [job for job in jobs if job not in done]
            futures = {pool.submit(_job, paper, stage, *job, str(root)) for job in todo}
            text = "selecting learning rates" if stage == "select" else "training and testing"
            for future in progress(as_completed(futures), text, len(jobs), len(jobs) - len(todo)):
                rows.append(future.result())
                write_json(record, facts)
                _write(folder / "study.csv", rows)
    write_json(record, facts | {"seconds_of_cpu": round(sum(row["seconds"] for row in rows))})
    return read(folder)


def wider(rows: pd.DataFrame, grid: Sequence[float]) -> list[float]:
    """One more learning rate at each end of the grid, by its ratio, where a method does best at that end.

    Args:
        rows: of the selection with `grid`, with or without the learning rates that this function returned before.
        grid: learning rates, ascending.
    """
    first = rows[rows.learning_rate.isin(grid)]
    first.attrs = rows.attrs
    best, found = set(selected(first).values()), []
    for end, neighbour in ((grid[0], grid[1]), (grid[-1], grid[-2])):
        if end in best:
            found.append(float(f"{end * end / neighbour:.2g}"))
    return found


def merge(paper: str, parts: Sequence[str | Path], folder: str | Path) -> pd.DataFrame:
    """Merge a study whose seeds were run separately, in the folders `parts`, into `folder`; return its rows.

    Raises `BadParameter`: a part was produced by other code than the current one, or rows are missing.
    """
    module = importlib.import_module(f"companion.toy.ablations.{paper}")
    facts = _facts(paper, module, _seeds(module))
    rows: dict[tuple, dict] = {}
    for part in parts:
        new = read(part)
        if read_json(Path(part) / "study.json").get("code") != facts["code"]:
            raise BadParameter("part of a study", str(part), "one produced by the current code")
        rows |= {tuple(row[k] for k in KEYS): row for row in new.to_dict("records")}
    pairs = {(task, method, seed) for task in module.TASKS for method in module.TASKS[task] for seed in facts["seeds"]}
    if lacking := sorted(pairs - {(t, m, seed) for stage, t, m, _, seed in rows if stage == "test"}):
        raise BadParameter(
            "parts of a study", list(map(str, parts)), f"parts that contain all tests; missing: {lacking}"
        )
    facts["widened"] = read_json(Path(parts[0]) / "study.json")["widened"]
    seconds = round(sum(row["seconds"] for row in rows.values()))
    _write(Path(folder) / "study.csv", list(rows.values()))
    write_json(Path(folder) / "study.json", facts | {"workers": len(parts), "seconds_of_cpu": seconds})
    return read(folder)


def _seeds(module: ModuleType) -> list[int]:
    """The test seeds of a study."""
    return getattr(module, "SEEDS", SEEDS)


def _facts(paper: str, module: ModuleType, seeds: list[int]) -> dict:
    """The record of a study."""
    return {
        "paper": paper,
        "code": code_hash(sources(inspect.getfile(module))),
        "learning_rates": module.LEARNING_RATES,
        "widened": [],
        "seeds": seeds,
        "selection_seeds": getattr(module, "SELECTION_SEEDS", SELECTION_SEEDS),
        "methods": list(module.METHODS),
        "tasks": module.TASKS,
        "metric": getattr(module, "METRIC", "accuracy"),
        "budget": module.BUDGET,
        "versions": versions(),
        "machine": platform.machine(),
        "threads_each": 1,
    }


def _quiet() -> None:
    """Set up a worker: one thread, no progress bar, ends when the study is killed."""
    torch.set_num_threads(1)
    os.environ["COMPANION_PROGRESS"] = "off"
    threading.Thread(target=_end_with_study, daemon=True).start()


def _end_with_study() -> None:
    """Without this a worker would train the queued rows and then wait forever."""
    if study := multiprocessing.parent_process():
        study.join()
    os._exit(1)


def _recheck(
    pool: Executor, paper: str, rows: list[dict], root: str | Path, folder: Path, metric: str, code: str
) -> dict:
    """The record's entries on existing rows: the code that produced them, and the rows that the current code
    reproduced.

    Rows of other code remain valid if some of them, drawn at random and rerun, give the same results.
    """
    known = read_json(folder / "study.json")
    facts = {key: known[key] for key in ("code", "rechecked") if key in known}
    if code in (known.get("code"), known.get("rechecked", {}).get("code")):
        return facts
    drawn = random.sample(rows, min(RECHECKED, len(rows)))
    futures = [pool.submit(_job, paper, *[*(row[k] for k in KEYS), str(root)]) for row in drawn]
    for row, future in zip(drawn, futures, strict=True):
        again = future.result()
        if again[metric] != row[metric] or again["loss"] != row["loss"]:
            what = f"{row['stage']} of {row['method']} on {row['task']}: {again[metric]}, not {row[metric]}"
            accepted = f"rows that the current code reproduces ({what}); move it away to start from scratch"
            raise BadParameter("study", str(folder / "study.csv"), accepted)
    today = datetime.date.today().isoformat()
    return facts | {"rechecked": {"code": code, "date": today, "rows": len(drawn), "of": len(rows)}}


def _job(paper: str, stage: str, task: str, method: str, rate: float, seed: int, root: str) -> dict:
    start = time.process_time()
    module = importlib.import_module(f"companion.toy.ablations.{paper}")
    with selecting() if stage == "select" else contextlib.nullcontext():
        result = module.train(method, task, rate, seed, root, stage)
    row = {"stage": stage, "task": task, "method": method, "learning_rate": rate, "seed": seed}
    return row | result | {"seconds": round(time.process_time() - start, 1)}


def _write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).sort_values(KEYS, kind="stable")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def main(words: list[str] | None = None) -> int:
    """`python -m companion.toy.ablation PAPER FOLDER`: run a study or a part of it, or merge its parts (`make
    study`)."""
    parser = argparse.ArgumentParser(prog="companion.toy.ablation", description=main.__doc__)
    parser.add_argument("paper")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the synthetic images (default: FOLDER/data)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seeds", type=int, nargs="*", help="those to test; none to select learning rates only")
    parser.add_argument("--start", type=Path, help="folder of the study whose learning rates are reused")
    parser.add_argument("--merge", type=Path, nargs="+", help="merge the parts in these folders instead of running")
    given = parser.parse_args(words)
    known = sorted(p.stem for p in (Path(__file__).parent / "ablations").glob("[a-z]*.py"))
    try:
        check_choice("paper", given.paper, known)
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
