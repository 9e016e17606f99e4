"""Fixtures shared by several test files: the repository's root, a notebook's parameters, a real browser, killed
trainings."""

import ast
import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

FRESH = multiprocessing.get_context("forkserver")
"""Processes that start in no time, without this one's threads, and have imported other packages but nothing of ours."""
FRESH.set_forkserver_preload(["torch", "timm", "open_clip", "lightning_fabric", "matplotlib.pyplot"])

_Result = TypeVar("_Result")

SPREAD = {"test_ablation.py", "test_notebooks.py", "test_parity.py", "test_recipes.py"}
SPREAD |= {"test_rehearsal.py", "test_simulated.py", "test_snakefile.py"}
"""Files of long independent tests: side by side, their tests go to whatever process is free."""
LONGEST = ("test_site.py", "test_two_processes.py", "test_jupyterlab.py", "test_robustness.py", *sorted(SPREAD))
"""Files whose tests are begun first, so that no process is left with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file stay in one process, which its fixtures are made in once, except those of `SPREAD`."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.path.name not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(ROOT).as_posix()))


@pytest.fixture(autouse=True, scope="module")
def no_figures_left() -> Iterator[None]:
    """Figures that a file's tests leave open are closed before the next file's tests run in this process."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def random_numbers_of_a_test_depend_on_no_other_test() -> None:
    """PyTorch's generator, which the weights of a small model are drawn from."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def asked_outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which tests/offline logs who asked for another machine, here or in a process that a test starts."""
    os.environ["OFFLINE_LOG"] = str(log := tmp_path_factory.mktemp("offline") / "log")
    return log


@pytest.fixture(autouse=True)
def nothing_asked_for_the_network(asked_outside: Path) -> Iterator[None]:
    """An attempt fails its test, also where the code hides the error and goes on."""
    yield
    if asked_outside.exists():
        hosts = asked_outside.read_text(encoding="utf-8").split()
        asked_outside.unlink()
        pytest.fail(f"asked for the network: {', '.join(dict.fromkeys(hosts))}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


def fresh(function: Callable[..., _Result], *args: object) -> _Result:
    """What a function of a test file returns, or raises, in a process of `FRESH`."""
    with ProcessPoolExecutor(1, FRESH) as pool:
        return pool.submit(function, *args).result()


def cores() -> int:
    """Those that this process may use, where the system tells them apart."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parameters(slug: str, **changes: object) -> SimpleNamespace:
    """The default parameters of a paper's notebook (its cell tagged `parameters`), with `changes`."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{slug}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assignments = ast.parse(cell.source).body
    defaults = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in assignments}
    if unknown := changes.keys() - defaults.keys():
        raise TypeError(f"notebooks/{slug}.ipynb has no parameter {', '.join(sorted(unknown))}")
    return SimpleNamespace(**defaults | changes)


def kill_when(
    process: subprocess.Popen, reached: Callable[[], object], sent: int = signal.SIGKILL, seconds: float = 240
) -> None:
    """kill -9, or another signal, once `reached` is true, within `seconds`; fails if the process has ended by then."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, "the process ended before it was killed"
        assert time.monotonic() < deadline, f"not reached in {seconds} seconds"
        time.sleep(0.02)
    process.send_signal(sent)
    process.wait(timeout=30)


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> Iterator[None]:
    """Within the block the function `owner.name` works `calls` times; then it raises KeyboardInterrupt, as it must."""
    function, done = getattr(owner, name), []

    def stopping(*args: object, **options: object) -> object:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return function(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stopping)
        yield


@pytest.fixture(scope="module")  # Playwright allows one driver at a time, and a test file may start its own
def browser() -> Iterator[object]:
    """A headless Chromium driven by Playwright; the test is skipped where none is installed."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on PATH: install Debian's `chromium` package to run the browser tests")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()
