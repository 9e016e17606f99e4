"""Text files of a data set: lists of names and CSV tables, in UTF-8 with or without a byte order mark.

Each reader raises `CorruptFile`, with the line where there is one: the file is missing or not such a text.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType

from ..errors import CorruptFile
from . import DataSet, once
from .folders import at, doubled


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


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[io.TextIOWrapper]:
    """The file, to read in the block; line ends inside the cells of a table stay."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise CorruptFile(path, "there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(path, f"no text in UTF-8 ({error})") from error


def read_text(path: str | Path) -> str:
    """The whole text, its lines ended by a line feed."""
    with _opened(path) as file:
        text = file.read()
    if "\0" in text:
        raise CorruptFile(path, f"line {text[: text.index(chr(0))].count(chr(10)) + 1}: {_NO_TEXT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # not by `splitlines`, which splits captions too


_NO_TEXT = "no text, it has a byte of 0"


@once
def lines(path: str | Path) -> tuple[str, ...]:
    """The lines that are not blank, without blanks around them."""
    return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())


def is_name(name: str) -> bool:
    """Whether `name` is that of a file in a folder: no path, and not hidden."""
    return bool(name) and name.isprintable() and not name.startswith(".") and not {"/", "\\"} & {*name}


def names(path: str | Path) -> list[str]:
    """The different names of files or folders in a list, one a line; none may lead out of the searched folder."""
    found = [*lines(path)]
    wrong = [name for name in found if not is_name(name)] + doubled(found)
    if wrong or not found:
        raise CorruptFile(path, f"expected different names, one a line, and at least one: {wrong[:1]}")
    return found


@once
def rows(path: str | Path, *columns: str, delimiter: str = ",") -> tuple[tuple[int, MappingProxyType[str, str]], ...]:
    """The rows of a CSV with a header: line number, and cell by column. Lines with # above the header are comments.

    Raises also: a column of `columns` is missing, two have one name, in upper or lower case, a row has more or fewer
    cells than the header, or there is none.
    """
    return tuple((line, MappingProxyType(row)) for line, row in stream(path, *columns, delimiter=delimiter))


def stream(path: str | Path, *columns: str, delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """As `rows`, but one by one, for long tables of which few columns are read."""
    with _opened(path) as file:
        lines, above = _without_zeros(path, file), 0
        while (first := next(lines, "")).startswith("#"):
            above += 1
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
        try:
            names = next(reader)
            if absent := [column for column in columns if column not in names]:
                raise CorruptFile(path, f"has no column {', '.join(absent)}; its columns are {names}")
            alike = doubled(name.strip().lower() for name in names if name)
            if twice := [name for name in names if name.strip().lower() in alike]:
                raise CorruptFile(path, f"two columns are called {twice[0]!r}")
            row = None
            for row in filter(None, reader):
                if len(row) != len(names):
                    raise CorruptFile(path, f"line {above + reader.line_num}: {len(names)} cells are expected")
                yield above + reader.line_num, dict(zip(names, row, strict=True))
            if row is None:
                raise CorruptFile(path, "it has no rows")
        except csv.Error as error:
            raise CorruptFile(path, f"no table ({error})") from error


def _without_zeros(path: str | Path, file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise CorruptFile(path, f"line {number}: {_NO_TEXT}")
        yield line


@once
def columns(path: str | Path, *names: str) -> tuple[tuple[str, ...], ...]:
    """The cells of each column of a CSV with a header. Raises as `rows`."""
    found: list[list[str]] = [[] for _ in names]
    for _, row in stream(path, *names):
        for column, name in zip(found, names, strict=True):
            column.append(row[name])
    return tuple(map(tuple, found))
