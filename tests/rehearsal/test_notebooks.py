"""A notebook as a dry run of the `paper` profile by papermill; test_simulated.py has all of them, on the GPU."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from companion.io.files import read_json
from tests.conftest import ROOT
from tests.papers.common import hooks

START = """
from pathlib import Path
import pytest
from tests.papers.common import hooks
from tests.rehearsal.common import prepare
prepare({slug!r}, hooks({slug!r}).RUNS[0], Path({root!r}), pytest.MonkeyPatch())
"""


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["hvit"])
def test_notebook(slug, tmp_path):
    """To measured rows and judged claims; the kernel starts with small models, and writes the data."""
    (start := tmp_path / "ipython/profile_default/startup").mkdir(parents=True)
    (start / "small.py").write_text(START.format(slug=slug, root=str(tmp_path / "data")))
    words = [sys.executable, "-m", "papermill", f"notebooks/{slug}.ipynb", str(tmp_path / "out.ipynb"), "-k", "python3"]
    run = hooks(slug).RUNS[0] | {"profile": "paper", "dry_run": True, "accelerator": "cpu"}
    run |= {"data_root": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    words += [word for name, value in run.items() for word in ("-p", name, str(value))]
    given = {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "run" / "dry_run"
    assert pd.read_csv(folder / "measured.csv").dry_run.all()
    assert read_json(folder / "run.json")["parameters"]["dry_run"]
    results = [claim for claim in read_json(folder / "claims.json") if claim["kind"] == "paper result"]
    assert results and all(c["status"] == "not run" or "dry run" in c["evidence"] for c in results)
