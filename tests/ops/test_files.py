"""Files and folders are replaced atomically, also while another process reads them."""

import os
from pathlib import Path

import pytest

from companion.ops.files import atomic, atomic_folder


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
