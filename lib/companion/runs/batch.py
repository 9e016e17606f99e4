"""Grids of runs from one file: paper x data set x seed, on this machine's GPUs or a cluster's nodes.

snakemake --cores all --configfile grid.yaml        # see site/docs/gpu.md

    profile: paper
    parameters: {data_root: /data}                    # of every run
    runs:
    - {paper: sa2vp, dataset: [vtab/svhn, vtab/dtd], seed: [0, 1, 2]}
    - {paper: bat, seed: 0, resources: {gpu: 1, runtime: 600}}

A list is an axis of the grid. Each run has its own folder, `reports/<profile>/<paper>/<run>/`; a failure does not stop
the others. pandas and papermill are imported where they are used, so that the Snakefile loads fast.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import BadParameter, Whole, check_choice, typed
from ..io.files import atomic, read_json

FIELDS = ("paper", "name", "resources")  # of an entry of `runs`; all others are parameters of its notebook
RESOURCES = ("gpu", "threads", "mem_mb", "runtime")
CONFIG = ("profile", "parameters", "runs", "papers", "parts", "slides")  # the fields of Snakemake's configuration
PROFILES = ("pocket", "paper")
NAME = re.compile(r"[\w.=,+-]+")


def check(config: Mapping) -> None:
    """Raise `BadParameter` when Snakemake's configuration has an unknown field or profile."""
    for name in config:
        check_choice("field of the configuration", name, CONFIG)
    if (profile := config.get("profile", "pocket")) not in PROFILES:
        raise BadParameter("profile", profile, PROFILES)


def expand(config: Mapping, papers: Collection[str]) -> dict[str, dict]:
    """The runs of a grid by their folder, `<paper>/<run>`: their parameters and resources.

    A run is named by its values on the axes, such as `dataset=vtab-svhn,seed=0`, after the `name` of its entry if it
    has one, or "run" if it has neither.

    Args:
        papers: those that have a notebook.

    Raises:
        BadParameter: an unknown field, paper, parameter or resource, a value that the paper does not accept, an empty
            axis, or two runs with one name.
    """
    from ..io.papers import convert, rules

    found, runs = dict[str, dict](), config.get("runs")
    if not isinstance(runs, list) or not all(isinstance(entry, Mapping) for entry in runs):
        raise BadParameter("runs", runs, "a list of {paper: ..., parameter: value or [values], ...}")
    for entry in runs:
        paper = entry.get("paper")
        check_choice("paper of a run", paper, papers)
        given = {**(config.get("parameters") or {}), **entry}
        given = {name: value for name, value in given.items() if name not in FIELDS}
        known, resources = rules(paper), entry.get("resources") or {}
        for name in given:  # papermill would pass it on, and the notebook would run with its default
            check_choice(f"parameter of a run of {paper}", name, [n for n in known if n not in ("profile", "out")])
        for name, value in resources.items():
            if name not in RESOURCES or type(value) is not int or value < (name != "gpu"):
                accepted = f"whole numbers for {', '.join(RESOURCES)}"
                raise BadParameter(f"resources of a run of {paper}", f"{name}: {value}", accepted)
        axes = {name: entry[name] for name in entry if name in given and isinstance(entry[name], list)}
        if empty := [name for name, values in axes.items() if not values]:
            raise BadParameter(f"{empty[0]} of a run of {paper}", [], "a value, or a list of some")
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            parts = [*filter(None, [entry.get("name")]), *(f"{name}={value}" for name, value in chosen.items())]
            name = ",".join(parts).replace("/", "-").replace(" ", "+") or "run"
            if not NAME.fullmatch(name):
                raise BadParameter(f"value of a run of {paper}", name, "letters, digits, blanks and / . - _")
            if (folder := f"{paper}/{name}") in found:
                raise BadParameter("run", folder, "runs of different names: give what differs as an axis, [value]")
            for name, value in (given | chosen).items():
                convert(name, value, known[name])
            found[folder] = {"parameters": given | chosen, "resources": dict(resources)}
    return found


def of_table(slug: str, table: str, data_root: str | Path, dry_run: bool = False) -> dict:
    """Snakemake's configuration that measures a published table: the runs that fill it, and no others.

    Args:
        table: an id of the paper's `tables`, or of its `runs`.
        dry_run: rehearse them, in folders of their own.

    Raises `BadParameter`: no run fills such a table.
    """
    from ..io.papers import paper
    from . import needs

    every = [run for run in paper(slug)["runs"] if "parameters" in run]
    check_choice("table", table, dict.fromkeys(name for run in every for name in [*run["tables"], run["id"]]))
    where = paper(slug)["results"].get("cells", {}).get(table, {}).get("where", {})
    runs, root = [], Path(data_root).resolve()
    for run in every:
        if table in (*run["tables"], run["id"]):
            given: dict = {"dataset": needs.sets(run["data"]), **run["parameters"]}
            for name, value in given.items():
                if isinstance(value, list) and name in where:  # a run's grid may fill several tables, each a part of it
                    wanted = where[name] if isinstance(where[name], list) else [where[name]]
                    value = [x for x in value if x in wanted]
                filled = [str(x).format(data_root=root) for x in (value if isinstance(value, list) else [value])]
                given[name] = filled if isinstance(value, list) else filled[0]
            # a day at least: hours are those of the fastest GPU that was assumed, and of no failure
            minutes = 24 * 60 + round(60 * 3 * needs.hours(run, needs.GPUS["A100"][0])[0])
            rehearsed = {"dry_run": [True]} if dry_run else {}
            runs.append({"paper": slug, "name": run["id"], **rehearsed, **given, "resources": {"runtime": minutes}})
    return {"profile": "paper", "parameters": {"data_root": str(root)}, "runs": runs}


def run_group(words: Sequence[str], folder: Path) -> int:
    """The exit code of a command that is run in `folder`, in a process group of its own.

    A signal that ends this process goes to all of that group: to Snakemake, and to its jobs, whose kernels end with
    them.
    """
    process = subprocess.Popen(words, cwd=folder, process_group=0)
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {end: signal.signal(end, lambda number, _: os.killpg(process.pid, number)) for end in ends}
    try:
        return process.wait()
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


@contextlib.contextmanager
@typed
def devices(count: Whole, folder: Path, poll: float = 1.0) -> Iterator[list[str]]:
    """Context manager: reserve `count` of this machine's GPUs.

    One lock file per machine and GPU in `folder` keeps other runs of the same checkout from it; the system releases
    those of a killed run. In a SLURM job that sees no more than `count` none is reserved: they are its own.

    Raises `BadParameter`: the machine has fewer GPUs.
    """
    found = gpus() if count else []
    if not count or ("SLURM_JOB_ID" in os.environ and len(found) <= count):
        yield []
        return
    if len(found) < count:
        raise BadParameter("gpu", count, f"0 to {len(found)}, the GPUs of this machine")
    folder = folder / platform.node()  # machines that share a checkout have a GPU 0 each
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        reserved: list[str] = []
        with FileLock(folder / "choosing.lock"):  # one run chooses at a time: two runs of two GPUs cannot deadlock
            for gpu in itertools.cycle(found):
                if gpu not in reserved:
                    try:
                        held.enter_context(FileLock(folder / f"{gpu.replace('/', '_')}.lock", blocking=False))
                        reserved.append(gpu)
                    except Timeout:
                        time.sleep(poll / len(found))
                if len(reserved) == count:
                    break
        yield reserved


def gpus() -> list[str]:
    """The GPUs of this machine: those of CUDA_VISIBLE_DEVICES, or all that `nvidia-smi` lists."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [*itertools.takewhile(lambda gpu: gpu not in ("", "-1"), visible.split(","))]  # as CUDA reads it
    try:
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def summarise(runs: Iterable[str], reports: Path, logs: Path) -> str:
    """Write `reports`/summary.csv, one row per run with its seconds and memory or, for a failure, the reason.

    The results of runs on real data (their `measured.csv`) are collected in one file per paper, `<paper>/grid.csv`; the
    `measured.csv` next to it belongs to runs without a grid. Dry runs are collected in `<paper>/dry_runs.csv`. Returns
    the summary as text for a terminal.

    Args:
        logs: with `<paper>/<run>.log` of each run that was started, and the notebook as far as it ran.
    """
    import pandas as pd

    rows: list[tuple] = []
    tables: dict[str, list[pd.DataFrame]] = {}
    for name in runs:
        paper, run = name.split("/")
        folder, log, facts = reports / name, logs / f"{name}.log", dict[str, Any]()
        if (folder / f"{paper}.ipynb").exists():
            state, reason = "done", ""
            facts = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
            for below, gathered in (("", "grid"), ("dry_run", "dry_runs")):
                if (measured := folder / below / "measured.csv").exists():
                    tables.setdefault(f"{paper}/{gathered}.csv", []).append(pd.read_csv(measured, dtype=str))
        else:
            state, reason = ("failed", _reason(log)) if log.exists() else ("not run", "")
        rows.append((paper, run, state, facts.get("seconds"), facts.get("peak_memory_mb"), facts.get("device"), reason))
    summary = pd.DataFrame(rows, columns=["paper", "run", "state", "seconds", "memory_mb", "device", "reason"])
    for path, parts in ({"summary.csv": [summary]} | tables).items():
        with atomic(reports / path) as temporary:
            pd.concat(parts).to_csv(temporary, index=False)
    counts = ", ".join(f"{number} {state}" for state, number in summary.state.value_counts().items())
    return f"{counts}; {reports}/summary.csv\n{summary.to_string(index=False, na_rep='')}"


def _reason(log: Path) -> str:
    """The error of the cell that failed, else the last line of the log (the kernel died, no GPU)."""
    draft = log.with_suffix(".ipynb")
    cells = read_json(draft)["cells"] if draft.exists() else []
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
    return (errors or log.read_text(encoding="utf-8").strip().splitlines()[-1:] or [""])[0].partition("\n")[0]


def main(words: list[str]) -> None:
    """`python -m companion.runs.batch N ...`: papermill with the other arguments, on N of this machine's GPUs."""
    from papermill.cli import papermill

    try:
        with devices(int(words[0]), Path("build/devices")) as reserved:
            if reserved or words[0] == "0":
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(reserved)
            papermill(words[1:])
    except BadParameter as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
