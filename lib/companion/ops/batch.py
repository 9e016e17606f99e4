"""Grids of runs from one file: paper x data set x seed, on this machine's GPUs or a cluster's nodes.

snakemake --cores all --configfile grid.yaml        # see site/docs/gpu.md

    profile: paper
    parameters: {data_root: /data}                    # of every run
    runs:
    - {paper: sa2vp, dataset: [vtab/svhn, vtab/dtd], seed: [0, 1, 2]}
    - {paper: bat, seed: 0, resources: {gpu: 1, runtime: 600}}

A list is an axis of the grid. Each run has its own folder, `reports/<profile>/<paper>/<run>/`; a failure is recorded in
`failed.json` and does not stop the others. pandas and papermill are imported where they are used, so that the Snakefile
loads fast.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import BadParameter, check_choice
from .files import atomic, read_json, write_json

FIELDS = ("paper", "name", "resources")  # fields of an entry of `runs`; all others are parameters of its notebook
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


def expand(config: Mapping, papers: Mapping[str, Collection[str]]) -> dict[str, dict]:
    """The runs of a grid by their folder, `<paper>/<run>`: their parameters and resources.

    A run is named by its values on the axes, such as `dataset=vtab-svhn,seed=0`, after the `name` of its entry if it
    has one, or "run" if it has neither.

    Args:
        papers: the parameters that each notebook has.

    Raises:
        BadParameter: an unknown field, paper, parameter or resource, a value that the paper does not accept, an empty
            axis, or two runs with one name.
    """
    from .papers import convert, rules

    common, found = config.get("parameters") or {}, {}
    if not isinstance(common, Mapping):
        raise BadParameter("parameters of a grid", common, "name: value, of every run")
    if not isinstance(config["runs"], list) or not all(isinstance(entry, Mapping) for entry in config["runs"]):
        raise BadParameter("runs", config["runs"], "a list of {paper: ..., parameter: value or [values], ...}")
    for entry in config["runs"]:
        paper = entry.get("paper")
        check_choice("paper of a run", paper, papers)
        own = {name: value for name, value in entry.items() if name not in FIELDS}
        # papermill would pass it on, and the notebook would run with its default
        accepted = [name for name in papers[paper] if name not in ("profile", "out")]
        for name in {**common, **own}:
            check_choice(f"parameter of a run of {paper}", name, accepted)
        known, resources = rules(paper), entry.get("resources") or {}
        for name, value in resources.items():
            if name not in RESOURCES or type(value) is not int or value < (name != "gpu"):
                said = f"whole numbers for {', '.join(RESOURCES)}"
                raise BadParameter(f"resources of a run of {paper}", f"{name}: {value}", said)
        axes = {name: values for name, values in own.items() if isinstance(values, list)}
        if empty := [name for name, values in axes.items() if not values]:
            raise BadParameter(f"{empty[0]} of a run of {paper}", [], "a value, or a list of some")
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            parts = [*filter(None, [entry.get("name")]), *(f"{name}={value}" for name, value in chosen.items())]
            said = ",".join(parts).replace("/", "-").replace(" ", "+")
            folder = f"{paper}/{said or 'run'}"
            if not NAME.fullmatch(said or "run"):
                raise BadParameter(f"value of a run of {paper}", said, "letters, digits, blanks and / . - _")
            if folder in found:
                raise BadParameter("run", folder, "runs of different names: give what differs as an axis, [value]")
            for name, value in {**common, **own, **chosen}.items():
                if name in known:
                    convert(name, value, known[name])
            found[folder] = {"parameters": {**common, **own, **chosen}, "resources": dict(resources)}
    return found


def of_table(slug: str, table: str, data_root: str | Path, dry_run: bool = False) -> dict:
    """Snakemake's configuration that measures a published table: every run that fills it, with its seeds.

    Args:
        table: an id of the paper's `tables`, or of its `runs`.
        dry_run: rehearse them, in folders of their own.

    Raises `BadParameter`: no run fills such a table.
    """
    from . import needs
    from .papers import paper

    every = [run for run in paper(slug)["runs"] if "parameters" in run]
    check_choice("table", table, dict.fromkeys(name for run in every for name in [*run["tables"], run["id"]]))
    runs, root = [], Path(data_root).resolve()
    for run in every:
        if table in (*run["tables"], run["id"]):
            given: dict = {"dataset": needs.sets(run["data"]), **run["parameters"]}
            for name, value in given.items():
                filled = [str(x).format(data_root=root) for x in (value if isinstance(value, list) else [value])]
                given[name] = filled if isinstance(value, list) else filled[0]
            # a day at least: hours are those of the fastest GPU that was assumed, and of no failure
            minutes = 24 * 60 + round(60 * 3 * needs.hours(run, needs.GPUS["A100"][0])[0])
            rehearsed = {"dry_run": [True]} if dry_run else {}
            runs.append({"paper": slug, "name": run["id"], **rehearsed, **given, "resources": {"runtime": minutes}})
    return {"profile": "paper", "parameters": {"data_root": str(root)}, "runs": runs}


def parameters(notebook: str | Path) -> list[str]:
    """The names set by the cell tagged `parameters`."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    lines = [node for text in tagged for node in ast.parse(text).body]
    targets = [node.targets[0] for node in lines if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@contextlib.contextmanager
def devices(count: int, folder: Path, poll: float = 1.0) -> Iterator[list[str]]:
    """Context manager: reserve `count` of this machine's GPUs, and hide all others from the run.

    The GPUs are those of CUDA_VISIBLE_DEVICES, or all that `nvidia-smi` lists. One lock file per machine and GPU in
    `folder` prevents other runs of the same checkout from using it; a killed run releases its own. A SLURM job that
    sees no more than `count` has its own from the scheduler; of an allocation with more they are reserved.

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
        while len(reserved) < count:
            with FileLock(folder / "dealing.lock"):  # one run reserves at a time: two runs of two GPUs cannot deadlock
                for gpu in found:
                    lock = FileLock(folder / f"{re.sub(r'[^0-9A-Za-z-]', '_', gpu)}.lock", blocking=False)
                    with contextlib.suppress(Timeout):
                        held.enter_context(lock)
                        reserved.append(gpu)
                    if len(reserved) == count:
                        break
                else:
                    held.close()
                    reserved.clear()
            if not reserved:
                time.sleep(poll)
        yield reserved


def gpus() -> list[str]:
    """The GPUs of this machine: those of CUDA_VISIBLE_DEVICES, or all that `nvidia-smi` lists."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    try:
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def execute(notebook: Path, out: Path, profile: str, parameters: Mapping, gpu: int, draft: Path) -> dict:
    """Run one notebook into `out`; return {}, or for a failure {"reason", "seconds", "memory_mb"}.

    The executed copy is `out`/<paper>.ipynb only if every cell ran; otherwise the partial copy stays in `draft`.
    """
    import papermill
    from papermill.exceptions import PapermillException, PapermillExecutionError

    began, failure = time.monotonic(), ""
    (out / "failed.json").unlink(missing_ok=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        with devices(gpu, Path("build/devices")) as cards:
            if cards:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
            given = dict(parameters) | {"profile": profile, "out": str(out)}
            papermill.execute_notebook(notebook, draft, given, kernel_name="python3", progress_bar=False)
    except PapermillExecutionError as error:
        failure = f"{error.ename}: {error.evalue}"
    except (PapermillException, BadParameter) as error:
        failure = str(error)
    except RuntimeError as error:  # nbclient's, when the kernel died
        failure = f"{type(error).__name__}: {error}"
    if not failure:
        out.mkdir(parents=True, exist_ok=True)
        draft.replace(out / notebook.name)
        return {}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    facts = {"reason": failure.strip(), "seconds": round(time.monotonic() - began, 1), "memory_mb": round(peak)}
    write_json(out / "failed.json", facts)
    return facts


def summarise(runs: Iterable[str], reports: Path) -> str:
    """Write `reports`/summary.csv, one row per run with its seconds, memory and, for a failure, the reason.

    The results of runs on real data (their `measured.csv`) are collected in one file per paper, `<paper>/grid.csv`; the
    `measured.csv` next to it belongs to runs without a grid. Dry runs are collected in `<paper>/dry_runs.csv`. Returns
    the summary as text for a terminal.
    """
    import pandas as pd

    rows: list[tuple] = []
    measured: dict[str, list[pd.DataFrame]] = {}
    for name in runs:
        paper, run = name.split("/")
        folder, state = reports / name, "not run"
        facts: dict = {}
        if (folder / "failed.json").exists():
            state, facts = "failed", read_json(folder / "failed.json")
        elif (folder / f"{paper}.ipynb").exists():
            state, facts = "done", read_json(folder / "run.json") if (folder / "run.json").exists() else {}
            for below, gathered in (("", "grid"), ("dry_run", "dry_runs")):
                if (folder / below / "measured.csv").exists():
                    rows_of_run = pd.read_csv(folder / below / "measured.csv", dtype=str)
                    measured.setdefault(f"{paper}/{gathered}.csv", []).append(rows_of_run)
        memory, reason = facts.get("memory_mb", facts.get("peak_memory_mb")), facts.get("reason", "").partition("\n")[0]
        rows.append((paper, run, state, facts.get("seconds"), memory, facts.get("device"), reason))
    summary = pd.DataFrame(rows, columns=["paper", "run", "state", "seconds", "memory_mb", "device", "reason"])
    tables = {file: pd.concat(parts) for file, parts in measured.items()}
    for path, table in ({"summary.csv": summary} | tables).items():
        with atomic(reports / path) as temporary:
            table.to_csv(temporary, index=False)
    counts = ", ".join(f"{number} {state}" for state, number in summary.state.value_counts().items())
    return f"{counts}; {reports}/summary.csv\n{summary.to_string(index=False, na_rep='')}"


def main(words: list[str] | None = None) -> int:
    """`python -m companion.ops.batch NOTEBOOK OUT ...`: one run, as started by the Snakefile; returns 1 when the run
    failed."""
    parser = argparse.ArgumentParser(prog="companion.ops.batch", description=main.__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--parameters", type=json.loads, default={}, help="a JSON object")
    parser.add_argument("--gpu", type=int, default=0, help="GPUs of this run")
    parser.add_argument("--draft", type=Path, required=True, help="path of the notebook while it runs")
    given = parser.parse_args(words)
    failed = execute(given.notebook, given.out, given.profile, given.parameters, given.gpu, given.draft)
    if failed:
        print(failed["reason"])
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
