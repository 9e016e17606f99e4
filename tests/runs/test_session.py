"""The cell for Colab and Kaggle of notebooks/README.md: a session that is lost at any moment changes no result."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from companion.runs.pack import pack
from tests.conftest import ROOT

CELL = re.search(r"```ipython\n(.*?)```", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"), re.S)[1]
RUN = """
from companion.models.sa2vp import recipe
from companion.runs import report
run = report.start("sa2vp", globals())
recipe.run(run.parameters, run.out)
run.close()
"""
# in the kernel: small models, the miniature of the data, a checkpoint after each step, and the steps counted
START = """
from pathlib import Path
import pytest
from companion.training import checkpoints, fit
from companion.runs import needs
from tests.rehearsal.common import prepare

def counted(*given, backward=fit._backward):
    with Path({folder!r}, "steps").open("a") as file:
        file.write(".")
    return backward(*given)

checkpoints.LONGEST, fit._backward = 0, counted
needs.check = lambda *given: None  # of the full size
prepare("sa2vp", {{"dataset": "fgvc/flowers102"}}, Path({folder!r}, "data"), pytest.MonkeyPatch())
"""


def begin(folder: Path) -> subprocess.Popen:
    """A session that runs the cell in a checkout whose notebook has nothing but the run."""
    (code := folder / "code").mkdir(parents=True, exist_ok=True)
    if not (code / "lib").exists():
        for name in ("lib", "pyproject.toml"):
            (code / name).symlink_to(ROOT / name)
        notebook = nbformat.read(ROOT / "notebooks" / "sa2vp.ipynb", as_version=4)
        parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        notebook.cells = [*parameters, nbformat.v4.new_code_cell(RUN)]
        (code / "notebooks").mkdir()
        nbformat.write(notebook, code / "notebooks" / "sa2vp.ipynb")
        (start := folder / "ipython/profile_default/startup").mkdir(parents=True)
        (start / "small.py").write_text(START.format(folder=str(folder)), encoding="utf-8")
        text = CELL.replace("/kaggle/working", str(folder)).replace('""', '"-p batch 2 -p accelerator cpu"')
        lines = [line for line in text.splitlines() if not line.startswith(("%pip", "!companion fetch"))]
        (folder / "cell.ipy").write_text("\n".join(lines), encoding="utf-8")
        (folder / "session").mkdir()
    words = [sys.executable, "-m", "IPython", "--profile-dir", str(folder / "session"), str(folder / "cell.ipy")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHONPATH": f"{ROOT}/lib:{ROOT}", "IPYTHONDIR": str(folder / "ipython")}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(words, env=os.environ | given, stdout=output, stderr=subprocess.STDOUT)


def lose(session: subprocess.Popen, reached: Callable[[], object]) -> None:
    """kill -9 of all processes of a session once `reached` is true."""
    deadline = time.monotonic() + 240
    while not reached():
        assert session.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
        time.sleep(0.02)
    processes = psutil.Process(session.pid).children(recursive=True)
    assert processes, "nothing was running"
    for process in [psutil.Process(session.pid), *processes]:
        process.kill()
    psutil.wait_procs(processes, 60)
    session.wait(60)


def results(folder: Path) -> list[bytes]:
    """The measured rows and the trained weights."""
    files = [*folder.glob("runs/*/measured.csv"), *folder.glob("runs/*/trained/*.safetensors")]
    assert len(files) == 2, (folder / "output").read_text(encoding="utf-8")
    return [file.read_bytes() for file in files]


def steps(folder: Path) -> int:
    return (folder / "steps").stat().st_size if (folder / "steps").exists() else 0


@pytest.mark.slow
def test_a_cell_whose_session_is_lost_resumes_to_the_same_rows(tmp_path):
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    begin(whole).wait(240)
    moments = [
        lambda: [*lost.glob("runs/*")],  # before the notebook is run
        lambda: steps(lost) > 4,
        lambda: steps(lost) > steps(whole) // 2,
        lambda: [*lost.glob("runs/*/trained/*.safetensors")],  # before the test
    ]
    for reached in moments:
        lose(begin(lost), reached)
    begin(lost).wait(240)
    assert results(lost) == results(whole)
    assert steps(whole) <= steps(lost) <= steps(whole) + len(moments)  # what was saved is not trained again
    for folder in (whole, lost):
        (out,) = folder.glob("runs/*")
        pack(out, folder / "packed")
    for name in ("measured.csv", "history.csv"):
        assert (whole / "packed" / name).read_bytes() == (lost / "packed" / name).read_bytes()
