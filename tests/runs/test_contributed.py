"""The workflow that checks the archives of a pull request, without GitHub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.runs.common import archive, small_checkout

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/contributed.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("also", ["", "lib/companion/more.py", "reports/contributed/sa2vp/again.zip"])
def test_the_workflow_says_of_a_pull_request_what_holds(also: str, tmp_path: Path) -> None:
    """The step of the workflow, on a pull request with one row, and with another file or the same row again."""

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always")
        return subprocess.run(
            ["git", *identity, *words], cwd=base, capture_output=True, text=True, check=True
        ).stdout.strip()

    base, out = small_checkout(tmp_path / "base"), tmp_path / "runner"
    out.mkdir()
    git("init", "-b", "main")
    if also.endswith(".zip"):
        archive(base / "reports/contributed/sa2vp/first.zip", by="A", device="Tesla T4", seed=0, accuracy=80)
    git("add", "-A")
    git("commit", "-m", "base")
    before = git("rev-parse", "HEAD")
    git("checkout", "-b", "row")
    name = also if also.endswith(".zip") else "reports/contributed/sa2vp/row.zip"
    archive(base / name, by="B", device="Tesla T4", seed=0, accuracy=80)
    if also.endswith(".py"):
        (base / also).write_text("raise SystemExit('run')\n")
    git("add", "-A")
    git("commit", "-m", "row")
    git("update-ref", "refs/pull/7/head", "HEAD")
    git("checkout", "main")
    git("remote", "add", "origin", str(base))
    (script,) = (step["run"] for step in WORKFLOW["jobs"]["check"]["steps"] if step.get("name") == "Check")
    env = {"NUMBER": "7", "BASE": before, "RUNNER_TEMP": str(out), "GITHUB_STEP_SUMMARY": str(out / "summary")}
    env |= {"GITHUB_ENV": str(out / "env"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": f"{ROOT / 'lib'}"}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=base, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (out / "summary").read_text()
    assert (out / "env").read_text() == f"status={int(bool(also))}\n", said
    assert {"": "holds together", ".py": "not an archive", ".zip": "the same run"}[Path(also).suffix] in said
