"""Ablation studies, all under one protocol: `python -m companion.studies.study NAME FOLDER`.

1. Every trained method is trained with every learning rate of the grid on each of three selection seeds, and scored on
   validation data.
2. Where a method does best at an end of the grid, its grid is extended there by one step, once.
3. Each method is trained with its best learning rate (the smaller one in ties) and tested on ten other seeds, which
   were not used while data, methods and grids were designed. Each seed has its own data.

`Study.row` passes the splits, so that selection never sees test data. Rows are appended to FOLDER/study.csv, and a
stopped study resumes; study.json names the code, the versions and the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..errors import BadParameter, CompanionError, check_choice, typed
from ..evaluation.ablations import KEYS, Study, frame, read, selected, source
from ..io.files import atomic, read_json, write_json
from ..io.papers import slugs
from ..io.progress import progress
from ..io.provenance import PACKAGE, code_hash, sources
from ..io.record import versions


@typed
def load(name: str) -> Study:
    """The study of this name, `STUDY` of its module. Raises `BadParameter`: there is none."""
    module = ".".join(source(name).relative_to(PACKAGE.parent).with_suffix("").parts)
    try:
        return importlib.import_module(module).STUDY
    except ModuleNotFoundError:
        check_choice("study", name, [*slugs(), *(path.stem for path in Path(__file__).parent.glob("*_real.py"))])
        raise  # of a module that the study imports


def run(
    paper: str,
    folder: str | Path,
    workers: int | None = None,
    seeds: Sequence[int] | None = None,
    before: Path | None = None,
) -> pd.DataFrame:
    """Run or finish the study of a paper; write `folder`/study.csv and study.json; return its rows.

    Args:
        workers: processes, each with one thread; all cores by default.
        seeds: to test on; those of the study by default, none to select learning rates only.
        before: a checkout of the code that made the rows, for a recheck on another processor.

    Raises `BadParameter`: the current code does not reproduce the rows of the file; move it away to start from scratch.
    """
    study, folder, workers = load(paper), Path(folder), workers or os.cpu_count() or 1
    pairs = [(task, method) for task, methods in study.tasks.items() for method in methods]
    tested = list(study.seeds if seeds is None else seeds)
    facts = _facts(paper, study, tested) | {"workers": workers}
    rows = _rows(folder, pairs, {*study.selection_seeds, *study.seeds})
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _quiet) as pool, _ends(pool):
        if rows:
            facts |= _recheck(pool, paper, rows, folder, facts["code"], before)

        def work(stage: str, jobs: Sequence[tuple[str, str, float, int]]) -> None:
            done = {tuple(row[key] for key in KEYS[1:]) for row in rows if row["stage"] == stage}
            futures = [pool.submit(_job, paper, stage, *job) for job in jobs if job not in done]
            text = "selecting learning rates" if stage == "select" else "training and testing"
            for future in progress(as_completed(futures), text, len(jobs), len(jobs) - len(futures)):
                rows.append(future.result())
                write_json(folder / "study.json", facts)
                _write(folder / "study.csv", rows)

        trained = [(task, method) for task, method in pairs if method not in study.untrained]
        grid, seeds_of = list(study.learning_rates), study.selection_seeds
        work("select", [(*pair, rate, seed) for seed in seeds_of for rate in grid for pair in trained])
        more = wider(frame(rows, study.metric), grid)
        facts["widened"] = sorted({rate for rates in more.values() for rate in rates})
        rates = [*grid, *facts["widened"]]  # others: only a method of an earlier version asked for them
        rows = [row for row in rows if row["stage"] == "test" or row["learning_rate"] in rates]
        work("select", [(*pair, rate, seed) for seed in seeds_of for pair, ends in more.items() for rate in ends])
        best = dict.fromkeys(pairs, 0.0) | selected(frame(rows, study.metric))
        # a larger grid may select another learning rate than the tested one
        rows = [r for r in rows if r["stage"] == "select" or best[r["task"], r["method"]] == r["learning_rate"]]
        work("test", [(t, m, best[t, m], seed) for seed in tested for t, m in pairs])
    _write(folder / "study.csv", rows)
    write_json(folder / "study.json", facts | {"seconds_of_cpu": round(sum(row["seconds"] for row in rows))})
    return read(folder)


@contextlib.contextmanager
def _ends(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Context manager: an error or Ctrl-C in the block ends the pool at once, without the rows that are queued."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def wider(rows: pd.DataFrame, grid: Sequence[float]) -> dict[tuple[str, str], list[float]]:
    """One more learning rate, by the grid's ratio, for each (task, method) that does best at an end of the grid.

    Args:
        rows: of the selection with `grid`, with or without the learning rates that this function returned before.
        grid: learning rates, ascending.
    """
    within = rows[rows.learning_rate.isin(grid)]
    within.attrs = rows.attrs
    ends = {end: float(f"{end * end / neighbour:.2g}") for end, neighbour in (grid[:2], grid[:-3:-1])}
    return {pair: [ends[rate]] for pair, rate in selected(within).items() if rate in ends}


def _facts(paper: str, study: Study, seeds: Sequence[int]) -> dict:
    """The record of a study."""
    return {
        "paper": paper,
        "code": code_hash(sources(source(paper))),
        "learning_rates": list(study.learning_rates),
        "widened": [],
        "seeds": list(seeds),
        "selection_seeds": list(study.selection_seeds),
        "tasks": {task: list(methods) for task, methods in study.tasks.items()},
        "metric": study.metric,
        "budget": study.budget,
        "versions": versions(),
        "machine": platform.machine(),
        "threads_each": 1,
    }


def _rows(folder: Path, pairs: Sequence[tuple[str, str]], seeds: set[int]) -> list[dict]:
    """The rows of the file that belong to the study."""
    if not (folder / "study.csv").exists():
        return []
    rows = read(folder).to_dict("records")
    return [row for row in rows if (row["task"], row["method"]) in pairs and row["seed"] in seeds]


def _recheck(pool: Executor, paper: str, rows: list[dict], folder: Path, code: str, before: Path | None) -> dict:
    """The record's entries on existing rows: the code that produced them, and the rows that the current code
    reproduced.

    Rows of other code remain valid if one of each task and method, drawn by the hash of the code, is equal again. One
    that differs must be equal to that of the code `before` on this processor: another one rounds differently, which a
    training amplifies.
    """
    record = read_json(folder / "study.json")
    facts = {key: record[key] for key in ("code", "rechecked") if key in record}
    known = (record.get("code"), record.get("rechecked", {}).get("code"))
    if code in known:
        return facts
    shuffled = random.Random(code).sample(rows, len(rows))
    drawn = [*{(row["task"], row["method"]): row for row in shuffled}.values()]
    futures, here = [pool.submit(_job, paper, *(row[key] for key in KEYS)) for row in drawn], 0
    for row, future in zip(drawn, futures, strict=True):
        again = future.result()
        if not _same(again, row):
            here += 1
            reference = row if before is None else _by(before, paper, row, known)
            if not _same(again, reference):
                different = {key: (again[key], reference[key]) for key in again if again[key] != reference[key]}
                what = f"{row['stage']} of {row['method']} on {row['task']}: {different}"
                accepted = (
                    f"rows that the current code reproduces ({what}). On another processor than theirs give --before, "
                    "a checkout of the code that made them; or move them away to start from scratch"
                )
                raise BadParameter("study", str(folder / "study.csv"), accepted)
    today = datetime.date.today().isoformat()
    again = {"code": code, "date": today, "rows": len(drawn), "of": len(rows)}
    return facts | {"rechecked": again | ({"equal_here": here} if here else {})}


def _same(row: Mapping, other: Mapping) -> bool:
    """Whether two rows have the same results; the seconds are no result."""
    results = (key for key in row if key != "seconds")
    return all(row[key] == other[key] or (pd.isna(row[key]) and pd.isna(other[key])) for key in results)


BY = """
import json, sys, torch
try:
    from companion.studies import study
except ImportError:  # of a checkout before version 4
    from companion.toy import study
torch.set_num_threads(1)
paper, key, known = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
if study._facts(paper, study.load(paper), [])["code"] not in known:
    sys.exit("its code is not that of the rows")
print(json.dumps(study.load(paper).row(*key)))
"""


def _by(before: Path, paper: str, row: Mapping, known: tuple) -> dict:
    """A row by the code of another checkout. Raises `BadParameter`: it is none of the code of the record."""
    words = [sys.executable, "-c", BY, paper, json.dumps([row[key] for key in KEYS]), json.dumps(known)]
    path = os.pathsep.join([str(before.resolve() / "lib"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise BadParameter("before", str(before), f"a checkout of the code that made the rows: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _job(paper: str, *key: Any) -> dict:
    return load(paper).row(*key)


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


def _write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).sort_values(KEYS, kind="stable")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def main(words: list[str] | None = None) -> int:
    """Run a study, or finish a stopped one."""
    parser = argparse.ArgumentParser(prog="companion.studies.study", description=main.__doc__)
    parser.add_argument("paper", metavar="name", help="a paper, or one of the studies on real images")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seeds", type=int, nargs="*", help="those to test; none to select learning rates only")
    parser.add_argument("--before", type=Path, help="on another processor: a checkout of the code that made the rows")
    arguments = parser.parse_args(words)
    try:
        named = [*slugs(), *(path.stem for path in (PACKAGE / "studies").glob("*_real.py"))]
        check_choice("name", arguments.paper, [name for name in named if source(name).exists()])
        run(**vars(arguments))
    except CompanionError as error:
        print(f"companion: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"companion: stopped; {arguments.folder} has the rows so far, and the same command goes on", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
