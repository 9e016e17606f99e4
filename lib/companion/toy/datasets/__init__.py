"""Small synthetic datasets in the layouts of the real ones."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import CompanionError, CorruptFile
from ...ops.files import atomic_folder, read_json, write_json


def write_once(
    folder: Path,
    record: Mapping[str, object],
    files: int,
    write: Callable[[Path], Mapping[str, object] | None],
    name: str | None = None,
) -> Path:
    """Write a dataset into `folder`, unless it is complete there; return `folder`.

    The dataset is written to a temporary folder and moved, so readers never find an incomplete one. A folder with a
    missing or empty file, or with another record, is rewritten.

    Args:
        record: the parameters of the dataset: seed, version, counts. Written as JSON.
        files: number of files in the finished folder, including the record.
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


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV file with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def read_image(path: Path) -> np.ndarray:
    """The pixels of an image file. Raises `CorruptFile` when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptFile(path, f"not an image ({error})") from error
