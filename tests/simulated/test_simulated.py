"""On the simulated GPU: training, and the papers' notebooks, without a mix of devices or a wait that is not listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from companion.io.papers import paper, slugs
from tests.conftest import ROOT
from tests.papers.common import hooks
from tests.parity import runner

ABLE = sys.platform == "linux" and torch.version.cuda is None and torch.version.hip is None
pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(not ABLE, reason="the simulated GPU needs a CPU build of PyTorch on Linux"),
]


FAST = "refuses or gradients_are or step_waits or where_it_is or moves"


@pytest.mark.parametrize("chosen", [FAST, pytest.param("", marks=pytest.mark.slow)])
def test_training(chosen):
    """The tests of on_gpu.py, a few of them in `make test`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        "tests/simulated/on_gpu.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:]


def run(slug: str, out: Path, *changes: str) -> dict:
    """What `tests.simulated.notebook` found, in a process of its own."""
    command = [sys.executable, "-m", "tests.simulated.notebook", slug, str(out), *changes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text(encoding="utf-8"))


def waits(found: dict) -> dict[str, int]:
    """The most waits of a step, by file, over all trainings; of a single step nothing is known but its set-up."""
    most: dict[str, int] = {}
    for training in (training for training in found["trainings"] if training["steps"] > 1):
        each: dict[str, int] = {}
        for times, _, where in training["waits"]:
            file = where.partition(":")[0]
            each[file] = each.get(file, 0) + times
        most |= {file: max(times, most.get(file, 0)) for file, times in each.items()}
    return most


def assert_half_is_near(found: dict) -> None:
    """The first losses of trainings in half precision, next to those in float32."""
    for half, full in found["losses"]:
        assert abs(half - full) <= 0.05 * abs(full)


HALF = ("dplq", "dmt", "sic_cads")


@pytest.mark.slow
@pytest.mark.parametrize("slug", slugs())
def test_notebook(slug, tmp_path):
    """All cells, and a dry run of the paper profile with small models, at the precision of the authors.

    Of the papers in HALF every training and evaluation is under bf16 autocast, its first step in float32 too.

    A CPU's float16 is forty times slower than float32: except for two papers, bfloat16 replaces it.
    """
    authors = paper(slug)["precision"]
    precision = "bf16-mixed" if authors == "16-mixed" and slug not in ("sa2vp", "promptpar") else "paper"
    force = "bf16-mixed" if slug in HALF else ""
    found = run(slug, tmp_path, "profile='paper'", "dry_run=True", f"force={force!r}", f"precision={precision!r}")
    assert not found["failures"], found["failures"][0]["error"]
    assert max(training["steps"] for training in found["trainings"]) > 2
    allowed = {"training/recipe.py": 1} | getattr(hooks(slug), "WAITS", {})  # a dry run measures a step
    too_many = {file: n for file, n in waits(found).items() if n > allowed.get(file, 0)}
    assert not too_many, too_many
    assert bool(found["losses"]) == (authors != "32-true")
    assert_half_is_near(found)


SPEED = """
import sys
sys.path.insert(0, "benchmarks")
from tests.simulated import simdevice
simdevice.install()
import gpu
gpu.STEPS, gpu.WARM = 3, 1
gpu.TRAININGS["bat"] = gpu.TRAININGS["bat"]._replace(batch=4)
found = gpu.speed("bat", small=True)
assert found["batch"] == 4 and found["precision"] == "32-true", found
assert abs(found["seconds_a_step"] * found["images_a_second"] - 4) < 0.1 and found["tflop_a_step"] > 0, found
"""
PARITY = """
import math
import sys
sys.path.insert(0, "benchmarks")
from tests.simulated import simdevice
simdevice.install()
from gpu import TOLERANCES
from tests.papers.common import hooks
from tests.parity import runner
for case in runner.cases(sys.argv[1]):
    named = (case.folder / "names.json").exists()
    shapes = case.names.values() if named else ()
    numbers = sum(math.prod(shape) for shape in shapes if isinstance(shape, list))
    if numbers < 5e6:
        worst = max(runner.compare(case, "cuda"), key=lambda d: d.error)
        assert worst.error < TOLERANCES.get(case.name, 1e-3), (case.name, worst)
"""


@pytest.mark.slow
def test_make_gpu():
    """What `make gpu` measures, but for what only a GPU has: memory, and a peak."""
    done = subprocess.run([sys.executable, "-c", SPEED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("slug", runner.papers())
def test_parity(slug):
    """The smaller recorded cases, computed on the GPU."""
    done = subprocess.run([sys.executable, "-c", PARITY, slug], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


FILES = ["training/test_precision.py", "models/hvit/test_slides.py", "models/bat/test_tracking.py"]
FILES += ["models/sic_cads/test_detectors.py", "models/hvit/test_dino.py", "models/dmt/test_cache.py"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_tests_of_the_library(file):
    """Trainings and evaluations of other tests, on the GPU; `plugin.SKIPPED` lists those that only hold on a CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.simulated.plugin"]
    command += ["-m", "not slow", f"tests/{file}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
