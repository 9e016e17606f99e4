"""Text files of a data set: lists of names and CSV tables, in UTF-8 with or without a byte order mark.

Each reader raises `CorruptFile`, with the line where there is one: the file is missing or not such a text.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from ..errors import CorruptFile
from . import DataSet, at


def existing(dataset: DataSet, root: str | Path, *paths: Path) -> Path:
    """The first of `paths` that is a file, also in another spelling of upper and lower case. Raises `MissingData` of
    the set when none is."""
    for path in paths:
        if (found := at(path.parent, path.name)).is_file():
            return found
    others = f" (nor in {len(paths) - 3} other folders)" if len(paths) > 3 else ""
    raise dataset.missing(root, f"{' or '.join(map(str, paths[:3]))} is not there{others}")


def check_count(dataset: DataSet, root: str | Path, found: int, expected: int | None, what: str) -> None:
    """Raise `MissingData` unless as many were found as are published; None: any number."""
    if expected not in (None, found):
        raise dataset.missing(root, f"{found:,} {what}, {expected:,} are expected")


def read_text(path: str | Path) -> str:
    """The whole text; line ends inside the cells of a table stay."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError as error:
        raise CorruptFile(path, "there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(path, f"no text in UTF-8 ({error})") from error
    if "\0" in text:
        raise CorruptFile(path, f"line {text[: text.index(chr(0))].count(chr(10)) + 1}: no text, it has a byte of 0")
    return text


def lines(path: str | Path) -> list[str]:
    """The lines that are not blank, without blanks around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def is_name(name: str) -> bool:
    """Whether `name` is that of a file in a folder: no path, and not hidden."""
    return bool(name) and name.isprintable() and not name.startswith(".") and not {"/", "\\"} & {*name}


def names(path: str | Path) -> list[str]:
    """The names of files or folders in a list, one a line; none may lead out of the searched folder."""
    found = lines(path)
    wrong = [name for name in found if not is_name(name)]
    if wrong or not found:
        raise CorruptFile(path, f"expected names, one a line, and at least one: {wrong[:1]}")
    return found


def rows(path: str | Path, *columns: str, delimiter: str = ",") -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV with a header: line number, and cell by column. Lines with # above the header are comments.

    Raises also: a column of `columns` is missing, two have one name, or a row has more or fewer cells than the header.
    """
    text = list(io.StringIO(read_text(path), newline=""))
    above = next((i for i, line in enumerate(text) if not line.startswith("#")), 0)
    reader = csv.DictReader(text[above:], delimiter=delimiter)
    try:
        if absent := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise CorruptFile(path, f"has no column {', '.join(absent)}; its columns are {reader.fieldnames}")
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1 and name]:
            raise CorruptFile(path, f"two columns are called {twice[0]!r}")
        found = [(above + reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise CorruptFile(path, f"no table ({error})") from error
    for line, row in found:
        if None in row or None in row.values():
            raise CorruptFile(path, f"line {line}: {len(reader.fieldnames or ())} cells are expected")
    return found
