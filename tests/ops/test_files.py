"""Files are replaced atomically, also while another process reads them."""

import os
from pathlib import Path

import pytest

from companion.errors import CorruptFile
from companion.ops.files import atomic, atomic_folder, read_json, sha256


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as new:
        (new / "a.txt").write_text(text)


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


def test_a_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a")
    two.write_text("a")
    assert sha256(one) != sha256(two) and sha256(one, two) != sha256(two, one)
    before = sha256(one)
    one.write_text("b")
    assert sha256(one) != before


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fill(folder, "first")
    reader = os.open(folder, os.O_RDONLY)  # of another run
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as new:
        (new / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert (folder / "a.txt").read_text() == "first"
    fill(folder, "second")
    assert (folder / "a.txt").read_text() == "second"
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_replaced_is_moved_away_before_it_is_deleted(tmp_path: Path, monkeypatch) -> None:
    """A run killed while it replaces a folder must not leave half of the old one under the name."""
    folder = tmp_path / "data"
    fill(folder, "first")
    seen = []
    delete = os.unlink

    def watched(path, *words, **named):
        seen.append(folder.is_dir() and (folder / "a.txt").read_text())
        delete(path, *words, **named)

    monkeypatch.setattr(os, "unlink", watched)
    fill(folder, "second")
    assert seen and set(seen) == {"second"}


def test_a_json_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"x\.json: there is no such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CorruptFile, match="not JSON"):
        read_json(tmp_path / "x.json")
