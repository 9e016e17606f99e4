"""Failures on users' machines: kill -9 at random moments, a full disk, damaged files."""

import os
import re
import shutil
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from companion.errors import CompanionError
from tests import robust_runs
from tests.conftest import FRESH, ROOT
from tests.robust_files import FILES, UNSEEN, made
from tests.robust_runs import KINDS

KILLS = 5
SMOKE = ("checkpoint of a training", "safetensors", "pickle", "COCO annotations", "X-ray", "rows of a study")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def begin(kind: str, folder: Path) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    folder.with_suffix(".steps").unlink(missing_ok=True)
    process = FRESH.Process(target=robust_runs.work, args=(kind, str(folder)))
    process.start()
    return process


def steps(folder: Path) -> int:
    """Steps of the last process on a folder so far."""
    file = folder.with_suffix(".steps")
    return file.stat().st_size if file.exists() else 0


def finish(kind: str, folder: Path) -> str:
    """Run to the end; the digest of what came out, or the error."""
    begin(kind, folder).join(240)
    return folder.with_suffix(".out").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_nothing_is_lost(kind, tmp_path):
    whole, folder = finish(kind, tmp_path / "whole"), tmp_path / "run"
    all_steps, rng = steps(tmp_path / "whole"), np.random.default_rng(len(kind))
    for after in [*rng.integers(1, max(all_steps // 8, 2), KILLS - 1), all_steps // 2]:
        process = begin(kind, folder)
        while process.is_alive() and steps(folder) < after:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
    assert finish(kind, folder) == whole
    assert steps(folder) < all_steps


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 MB in a folder; the test is skipped where one cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    words = [mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_named_and_what_was_done_is_kept(kind, tmp_path, disk):
    whole, folder = finish(kind, tmp_path / "whole"), disk / "run"
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - needed // 2 // 4096 * 4096))
    link = tmp_path / "link"  # the result and the steps are written outside of the full disk
    folder.mkdir()
    link.symlink_to(folder)
    assert finish(kind, link).startswith(("CannotWrite", "CompanionError"))
    assert not [path for path in folder.rglob(".*") if path.is_file()], "a temporary file was left"
    ballast.unlink()
    assert finish(kind, link) == whole


DAMAGES = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) * 2 // 3],
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "noise": lambda whole: np.random.default_rng(0).bytes(len(whole)),
    "a page instead": lambda whole: b"<!DOCTYPE html>\n<html><title>404</title><body>Not Found</body></html>\n",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SMOKE)) for n in FILES])
def test_a_damaged_file_is_named(name, tmp_path):
    """Never another error than ours, and the file in its message."""
    file, read = made(name, tmp_path)
    read()
    whole = file.read_bytes()
    for damage in DAMAGES.keys() - {UNSEEN.get(name)}:
        file.write_bytes(DAMAGES[damage](whole))
        with pytest.raises(CompanionError, match=re.escape(file.name)):
            read()
            pytest.fail(f"{damage}: was read")
    file.write_bytes(whole)
    read()
