"""Failures on users' machines: kill -9 at random moments, a full disk, damaged files."""

import multiprocessing
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from companion.errors import CompanionError
from tests import robust_runs
from tests.conftest import ROOT
from tests.robust_files import FILES, UNSEEN, made
from tests.robust_odd import ODD
from tests.robust_runs import KINDS

KILLS = 20
BEGUN_ANEW = ("pocket pictures",)  # a set is there as a whole or not at all
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.robust_runs"])  # a process then starts in no time, without this one's threads

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def begin(kind: str, folder: Path) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    process = SPAWN.Process(target=robust_runs.work, args=(kind, str(folder), str(folder.with_suffix(".out"))))
    process.start()
    return process


def finish(kind: str, folder: Path) -> str:
    """Run to the end; the digest of what came out."""
    process = begin(kind, folder)
    process.join(120)
    assert process.exitcode == 0
    return folder.with_suffix(".out").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_nothing_is_lost(kind, tmp_path):
    finish(kind, tmp_path / "first")  # the first process of all loads what those after it share
    start = time.monotonic()
    whole = finish(kind, tmp_path / "whole")
    seconds = time.monotonic() - start
    rng, kills, ends = np.random.default_rng(len(kind)), 0, 0
    folder = tmp_path / "run0"
    while kills < KILLS:
        process = begin(kind, folder)
        process.join(rng.uniform(0.05, 0.6) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:  # it ended before it was killed: check, and start from scratch
            assert process.exitcode == 0
            assert folder.with_suffix(".out").read_text(encoding="utf-8") == whole
            ends += 1
            folder = tmp_path / f"run{ends}"
    assert finish(kind, folder) == whole
    # no process lived for more than 0.6 of a run: without checkpoints none would have finished
    assert ends > 0 or kind in BEGUN_ANEW


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_said_and_what_was_done_is_kept(kind, tmp_path, disk):
    whole = finish(kind, tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    ballast, folder = disk / "ballast", disk / "run"
    folder.mkdir()
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - needed // 2 // 4096 * 4096))
    process = SPAWN.Process(target=fills, args=(kind, str(folder), str(tmp_path / "said")))
    process.start()
    process.join(120)
    expected = r"CannotWrite: cannot write .*: no space is left|CompanionError: the teachers' tokens take .* are free"
    assert re.match(expected, (tmp_path / "said").read_text(encoding="utf-8"))
    assert not [path for path in folder.rglob(".*") if path.is_file()], "a temporary file was left"
    ballast.unlink()
    assert finish(kind, folder) == whole


def fills(kind: str, folder: str, said: str) -> None:
    try:
        KINDS[kind](Path(folder))
        text = "it ended well"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    Path(said).write_text(text, encoding="utf-8")


DAMAGES = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) * 2 // 3],
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "noise": lambda whole: np.random.default_rng(0).bytes(len(whole)),
    "a page that says 404": lambda whole: b"<!DOCTYPE html>\n<html><title>404</title><body>Not Found</body></html>\n",
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(name, tmp_path):
    """Never another error than ours, and the file in its message."""
    file, read = made(name, tmp_path)
    read()
    whole = file.read_bytes()
    for damage, change in DAMAGES.items():
        if UNSEEN.get(name) == damage:
            continue
        file.write_bytes(change(whole))
        with pytest.raises(CompanionError) as raised:
            read()
            pytest.fail(f"{damage}: was read")
        assert file.name in str(raised.value), damage
    file.write_bytes(whole)
    read()


def test_the_readme_says_how_much_was_tried(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    pattern = r"(?s)kills (\d+) kinds of run (\d+) times each .*?(\d+) damaged files of (\d+) kinds.*?(\d+) odd inputs"
    assert (said := re.search(pattern, text)) is not None
    counts = [len(KINDS), KILLS, len(FILES) * len(DAMAGES) - len(UNSEEN), len(FILES), len(ODD)]
    assert [int(n) for n in said.groups()] == counts
