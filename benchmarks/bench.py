"""Benchmark harness, on one thread: runs steps in turn, compares medians, measures peak memory separately, updates the
README's table.

Nothing here is a test: only ratios of times within one run are meaningful.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from companion.io import record
from companion.io.files import read_json, write_between, write_json
from companion.io.papers import slugs
from companion.io.provenance import code_hash, sources

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reports" / "bench"

Step = Callable[[], None]
Maker = Callable[[], Step]  # builds the step to time; a module-level function, so that another process can call it


def times(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over `rounds`, run in turn after one warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _memory(maker: Maker) -> int:
    torch.set_num_threads(1)
    step = maker()
    step()
    step()
    return record.peak_memory_mb()


def memory(makers: dict[str, Maker]) -> dict[str, int]:
    """Peak memory in MB of two runs of each step, each in its own process."""
    peaks = {}
    for name, maker in makers.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(_memory, (maker,))
    return peaks


def run(
    paper: str, what: str, makers: dict[str, Maker], pairs: Iterable[tuple[str, str, str]], rounds: int = 5
) -> None:
    """Time `makers` on one thread; print and store `pairs` (label, ours, reference) as ratios.

    Results go to `reports/bench/<paper>.json` and into the README's table.
    """
    torch.set_num_threads(1)
    seconds, rows = times({name: maker() for name, maker in makers.items()}, rounds), []
    peaks = memory(makers)
    for name in makers:
        print(f"{name:55} {seconds[name]:7.3f} s  {peaks[name]:6d} MB", flush=True)
    for label, ours, reference in pairs:
        rows.append(
            {
                "what": label,
                "time_ratio": round(seconds[ours] / seconds[reference], 3),
                "memory_ratio": round(peaks[ours] / peaks[reference], 3),
                "seconds": round(seconds[ours], 3),
            }
        )
        print(f"{label}: time x {rows[-1]['time_ratio']}, memory x {rows[-1]['memory_ratio']}", flush=True)
    facts = {
        "paper": paper,
        "what": what,
        "rows": rows,
        "versions": record.versions(),
        "commit": record.commit(),
        "code": code_hash(sources(Path(__file__).with_name(f"{paper}.py"))),
        "device": record.device(),
        "rounds": rounds,
    }
    write_json(RESULTS / f"{paper}.json", facts)
    update_readme()


def update_readme() -> None:
    """Write the first ratio of each paper between the two marks of the README."""
    lines = ["| paper | ours against | time | peak memory |", "| --- | --- | ---: | ---: |"]
    for slug in slugs():
        facts = read_json(RESULTS / f"{slug}.json")
        row = facts["rows"][0]
        ratios = f"{row['time_ratio']:.2f}× | {row['memory_ratio']:.2f}×"
        lines.append(f"| `{facts['paper']}` | {row['what']} | {ratios} |")
    write_between(ROOT / "README.md", "benchmarks", "\n".join(lines))
