"""Files and folders are replaced atomically, also while another process reads them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from companion.errors import CannotWrite
from companion.io.files import atomic, atomic_folder


def test_a_file_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    """Whoever has the old one open reads on in it; the new one is as readable as any other file."""
    path = tmp_path / "a.csv"
    path.write_text("first")
    mask = os.umask(0o027)
    try:
        with path.open() as reader:
            with atomic(path) as temporary:
                temporary.write_text("second")
            assert (reader.read(), path.read_text()) == ("first", "second")
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    finally:
        os.umask(mask)
    assert path.read_text() == "second" and [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_a_folder_that_may_not_be_written_is_named() -> None:
    """Root may write anywhere: as root the test writes as another user."""
    user, folder = os.geteuid(), Path(tempfile.mkdtemp())  # of all users, unlike pytest's
    folder.chmod(0o555)
    try:
        os.seteuid(user or 65534)
        for write in (atomic, atomic_folder):
            for path in (folder / "a.csv", folder / "b" / "c" / "a.csv"):
                with pytest.raises(CannotWrite, match=r"a\.csv"), write(path):
                    pytest.fail("it was written")
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        folder.rmdir()


KILLED = """
import os, sys
from pathlib import Path
from companion.io.files import atomic, atomic_folder

path, folder = Path(sys.argv[1], "a.csv"), Path(sys.argv[1], "data.v1")
with atomic_folder(folder) as new:
    (new / "b.txt").write_text("whole")
kept = atomic_folder(folder), atomic(path)
for made in kept:
    made.__enter__()
if sys.argv[2:]:  # between the two renames
    folder.rename(next(Path(sys.argv[1]).glob(".data-*")) / f"{folder.name}.before")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("words", [[], ["moved"]])
def test_what_a_killed_process_left_is_gone_after_the_next_one(tmp_path: Path, words: list[str]) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *words])
    assert len([*tmp_path.glob(".*")]) == 2
    with atomic(tmp_path / "b.csv") as other, atomic(tmp_path / "a.csv") as path, atomic(tmp_path / "a.csv") as twin:
        for file in (other, path, twin):
            file.write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "data.v1"):
        raise ZeroDivisionError
    assert (tmp_path / "data.v1" / "b.txt").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.csv", "data.v1"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    """The old one is moved away before it is deleted: a kill must not leave half of it under the name."""

    def fill(text: str) -> None:
        with atomic_folder(folder) as new:
            (new / "a.txt").write_text(text)
            if text == "half":
                raise ZeroDivisionError

    def watched(path, *words, **named):
        seen.add(folder.is_dir() and (folder / "a.txt").read_text())
        delete(path, *words, **named)

    folder, seen, delete = tmp_path / "data", set(), os.unlink
    fill("first")
    with pytest.raises(ZeroDivisionError):
        fill("half")
    assert (folder / "a.txt").read_text() == "first"
    monkeypatch.setattr(os, "unlink", watched)
    reader = os.open(folder, os.O_RDONLY)  # of another run
    fill("second")
    os.close(reader)
    assert (folder / "a.txt").read_text() == "second" and seen == {"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
