"""Small synthetic datasets, written in the layouts of the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import CompanionError
from ...ops.files import atomic_folder, read_json, write_json


def write_once(
    folder: Path,
    record: Mapping[str, object],
    files: int,
    write: Callable[[Path], Mapping[str, object] | None],
    name: str | None = None,
) -> Path:
    """Write a dataset into `folder`, unless it is there in full; return `folder`.

    A reader never meets half a dataset: it is written next to `folder` first. A folder that lacks a file, that holds an
    empty one, or whose record is another is written again.

    Args:
        record: what makes the dataset: seed, version, counts. Written as JSON.
        files: number of files in the finished folder, the record included.
        write: fills an empty folder; returns further entries of the record's file, if any.
        name: of the record's file; None: the folder's, with ".json".
    """
    name = name or f"{folder.name}.json"
    try:
        found = read_json(folder / name)
        whole = sum(path.is_file() and path.stat().st_size > 0 for path in folder.rglob("[!.]*")) == files
        if whole and isinstance(found, dict) and record == {key: found.get(key) for key in record}:
            return folder
    except (OSError, CompanionError):
        pass
    with atomic_folder(folder) as new:
        write_json(new / name, dict(record) | dict(write(new) or {}))
    return folder
