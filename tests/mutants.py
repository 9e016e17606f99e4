"""Mutation testing: puts each fault of mutants_*.yaml into a copy of the library and runs the tests named.

    python -m tests.mutants [--only models/bat] [--workers 2]

A fault is a piece of text that occurs once in its file, and its replacement. It is caught when one of the tests fails.
Prints one line per fault, then the number caught; fails when fewer than 95 % were. The tests are those of `make test`,
chosen by hand for each fault, and run without the slow ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = sorted(Path(__file__).parent.glob("mutants_*.yaml"))
AIM = 0.95
TIMEOUT = 600  # seconds for the tests of one fault
# each run of pytest is forked from a process that has imported the large packages, which takes longer than most tests
os.environ["OMP_NUM_THREADS"] = "1"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "torchvision",
        "timm",
        "open_clip",
        "lightning_fabric",
        "pandas",
        "sklearn.metrics",
        "skimage.io",
    ]
)


class Fault(NamedTuple):
    """A fault, as the lists have it.

    Attributes:
        file: below lib/companion.
        find, replace: text that occurs once, and what stands there instead.
        tests: arguments of pytest, as one line.
    """

    file: str
    find: str
    replace: str
    tests: str

    def put_in(self, lib: Path) -> None:
        """Change the file in a copy of the library. Raises `ValueError` when the text does not occur exactly once."""
        path = lib / "companion" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.find) != 1 or self.find == self.replace:
            raise ValueError(f"{self.file}: {self.find!r} occurs {text.count(self.find)} times, not once")
        path.write_text(text.replace(self.find, self.replace), encoding="utf-8")


def faults() -> list[Fault]:
    """All faults, in the order of the lists: mappings from tests to [file, find, replace] of several faults."""
    found = []
    for path in FAULTS:
        for tests, rows in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            found += [Fault(*row, tests=tests) for row in rows]
    return found


def _pytest(tests: str, lib: str, log: str) -> NoReturn:
    """Run tests in this process, with the library in `lib`, and end it with their exit code; they print into `log`."""
    paths = [lib, str(ROOT), str(ROOT / "tests" / "offline")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "COMPANION_PROGRESS": "off"}
    sys.path[:0] = paths
    os.chdir(ROOT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    runpy.run_path(str(ROOT / "tests" / "offline" / "sitecustomize.py"))
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()]))


def fails(tests: str, lib: Path) -> bool:
    """Whether one of the tests fails with the library in `lib`."""
    log = lib.parent / "pytest.log"
    log.unlink(missing_ok=True)
    process = SERVER.Process(target=_pytest, args=(tests, str(lib), str(log)))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        return True  # a fault that hangs is noticed
    if process.exitcode not in (0, 1, 2):  # passed, failed, an error while tests were collected
        raise RuntimeError(f"{tests}: pytest ended with {process.exitcode}\n{log.read_text()[-2000:]}")
    return process.exitcode != 0


def noticed(fault: Fault, lib: Path) -> bool:
    """Whether a test fails with the fault in; the copy `lib` is put right again."""
    path = lib / "companion" / fault.file
    whole = path.read_bytes()
    fault.put_in(lib)
    try:
        return fails(fault.tests, lib)
    finally:
        path.write_bytes(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose file contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    chosen = [fault for fault in faults() if given.only in fault.file]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(given.workers):
            lib = Path(temporary, str(i), "lib")
            shutil.copytree(ROOT / "lib", lib, ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("tests", "notebooks", "reports", "pyproject.toml"):  # the library finds them next to itself
                (lib.parent / name).symlink_to(ROOT / name)
            copies.put(lib)

        def in_a_copy(check: Callable[..., bool], what: Fault | str) -> bool:
            lib = copies.get()
            try:
                return check(what, lib)
            finally:
                copies.put(lib)

        with ThreadPoolExecutor(given.workers) as pool:
            every = list(dict.fromkeys(fault.tests for fault in chosen))
            broken = [
                tests for tests, fail in zip(every, pool.map(partial(in_a_copy, fails), every), strict=True) if fail
            ]
            if broken:  # they would notice anything
                raise SystemExit("these tests fail without a fault:\n" + "\n".join(broken))
            found = []
            for fault, seen in zip(chosen, pool.map(partial(in_a_copy, noticed), chosen), strict=True):
                found.append(seen)
                change = f"{fault.find.strip()!r} -> {fault.replace.strip()!r}"
                print(f"{'noticed' if seen else 'NOT    '}  {fault.file}: {change}", flush=True)
    print(f"{sum(found)} of {len(found)} faults noticed")
    return int(sum(found) < AIM * len(found))


if __name__ == "__main__":
    raise SystemExit(main())
