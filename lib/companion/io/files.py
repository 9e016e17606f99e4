"""Reads and writes files such that a killed run leaves no partial file, and no file can execute code."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from ..errors import BadParameter, CannotWrite, CorruptFile

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = 1 << 16  # bytes free: torch does not report why it could not write


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; renamed to `path` when the block succeeds, removed when it fails.

    What a killed process of this machine left is removed first. Raises `CannotWrite`: the disk became full, or the
    folder may not be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in _left(path):
            left.unlink(missing_ok=True)
        temporary = path.with_name(f"{_mark(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}")
        temporary.touch(exist_ok=False)  # with the user's default permissions, which a file of mkstemp has not
        yield temporary
        temporary.replace(path)
    except Exception as error:
        _if_unwritable(path, error)
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`, which replaces it when the block succeeds, and is removed when it fails.

    Raises `CannotWrite`: the disk became full, or the folder around it may not be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in _left(folder):
            with contextlib.suppress(OSError):  # of a kill between the two renames: the only copy
                (left / f"{folder.name}.before").rename(folder)
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(f"{folder.suffix}", f"{_mark(folder)}{os.getpid()}-", folder.parent) as name:
            new = Path(name) / folder.name
            new.mkdir()
            yield new
            # renamed, not deleted: another run may be reading it, and a kill must leave all of it or nothing
            with contextlib.suppress(FileNotFoundError):
                folder.replace(Path(name) / f"{folder.name}.before")
            new.replace(folder)
    except Exception as error:
        _if_unwritable(folder, error)
        raise


def _mark(path: Path) -> str:
    """How the temporary names of this machine for `path` begin; the number of their process follows."""
    return f".{path.stem}-{platform.node()}-"


def _left(path: Path) -> list[Path]:
    """The temporary files or folders next to `path` of processes of this machine that have ended."""
    found = (left for left in path.parent.iterdir() if left.name.startswith(_mark(path)) and left.suffix == path.suffix)
    numbers = ((left, left.name.removeprefix(_mark(path)).partition("-")[0]) for left in found)
    return [left for left, number in numbers if number.isdecimal() and not psutil.pid_exists(int(number))]


@contextlib.contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Raise `CannotWrite` when the block fails because the disk is full."""
    try:
        yield
    except Exception as error:
        _if_unwritable(path, error)
        raise


def _if_unwritable(path: Path, error: Exception) -> None:
    """Raise `CannotWrite` when `error` was caused by a full disk, or by a folder that may not be written."""
    of = Path(getattr(error, "filename", None) or "").absolute()  # of a read-only file that the block reads it is not
    if (
        isinstance(error, OSError)
        and error.errno in DENIED
        and (of in path.absolute().parents or of.name.startswith(_mark(path)))
    ):
        raise CannotWrite(path) from error
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
    # safetensors has it in its message; torch has neither message nor errno
    number = getattr(error, "errno", None)
    if number in NO_SPACE or "os error 28" in str(error) or (number is None and free < FULL):
        raise CannotWrite(path, free) from error


def write_between(path: str | Path, mark: str, text: str) -> None:
    """Replace the text between the lines `<!-- mark -->` and `<!-- /mark -->` of a Markdown file."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, found, rest = Path(path).read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise CorruptFile(path, f"no lines {begin.strip()} and {end}")
    with atomic(path) as temporary:
        temporary.write_text(f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `CorruptFile` with the path when it is not JSON, or missing."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # may begin with a byte order mark
    except FileNotFoundError as error:
        raise CorruptFile(path, "there is no such file") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise CorruptFile(path, f"not JSON ({error})") from error


def check_folder(name: str, folder: str | Path) -> None:
    """Raise `BadParameter` unless `folder` can be written to or created: before an hour of work, not after it."""
    above = next(f for f in (Path(folder).absolute(), *Path(folder).absolute().parents) if f.exists())
    try:  # permissions are not sufficient: nothing can be written to /proc
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        accepted = "a folder that you may write to, or a new one in such a folder"
        raise BadParameter(name, str(folder), accepted) from error


def sha256(*paths: str | Path) -> str:
    """One SHA-256 over the names and contents of `paths`, in the order given."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
