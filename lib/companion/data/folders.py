"""Folders, lists of files and the splits that they name: what the readers of all data sets share."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import BadParameter, CorruptFile

_T = TypeVar("_T")
ADDED = ("__MACOSX", "Thumbs.db", "desktop.ini")  # to copies, by operating systems
MANY = 64  # folders in one
HIDDEN = re.compile(r"/(\.|__MACOSX/)")  # in a path: a file or folder that is not read
SPELLED = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
"""How the folder or list of a split may be called, in upper or lower case."""
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")


def entries(folder: Path, folders: bool = False) -> list[str]:
    """The names in a folder, or those of its folders, sorted, without hidden ones and those that operating systems add;
    of no folder none."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if not folders or entry.is_dir()]
    return sorted(name for name in names if not name.startswith(".") and name not in ADDED)


def spelled(folder: Path, names: Iterable[str], ending: str = "") -> dict[str, str]:
    """By split which of `names`, in a folder, is called as in `SPELLED`, with `ending`. Raises `CorruptFile`: two are
    called as one split."""
    splits = {f"{name}{ending}": split for split, known in SPELLED.items() for name in known}
    found: dict[str, str] = {}
    for name in (name for name in names if name.lower() in splits):
        if (before := found.setdefault(split := splits[name.lower()], name)) != name:
            raise CorruptFile(folder, f"{before} and {name} are both '{split}': keep one of them")
    return {split: found[split] for split in SPELLED if split in found}


def told(names: Sequence[str], most: int = 8) -> str:
    """Names in one line, of many the first and their number."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "") or "nothing"


def below(folder: Path) -> Iterator[Path]:
    """The folders in a folder, then those in them; a folder of more than `MANY` is one of classes or videos, and is not
    entered."""
    level = [folder]
    for _ in range(2):
        inner = ([place / name for name in entries(place, folders=True)] for place in level)
        level = [path for paths in inner if len(paths) <= MANY for path in paths]
        yield from level


def at(folder: Path, *names: str) -> Path:
    """The first of `names` that exists below `folder`, also in another spelling of upper and lower case, or with its
    first folder twice, as some programs unpack an archive; else the first, where it would be."""
    twice = (f"{name.partition('/')[0]}/{name}" for name in names if "/" in name)
    for name in (*names, *twice):
        if (found := folder / name).exists():
            return found
        place = folder
        for part in Path(name).parts:
            alike = [part] if (place / part).exists() else [n for n in entries(place) if n.lower() == part.lower()]
            place = place / (alike[0] if len(alike) == 1 else part)
        if place.exists():
            return place
    return folder / names[0]


def inside(listing: Path, where: str, path: str, folder: Path | None = None) -> str:
    """`path` if it is below the data set's folder: a downloaded list must not make us read other files. Of an absolute
    path below `folder`, the part below it."""
    odd = path.startswith(("/", "\\")) or ".." in path or ":" in path or "\0" in path
    if odd and _OUTSIDE.search(path):  # which is ten times slower
        if folder and Path(path).is_relative_to(folder.absolute()):
            return inside(listing, where, Path(path).relative_to(folder.absolute()).as_posix())
        raise CorruptFile(listing, f"{where}: the path {path!r} leaves the data set's folder")
    return path


def doubled(names: Iterable[_T]) -> list[_T]:
    """Those of the names that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


@contextlib.contextmanager
def of_file(path: Path) -> Iterator[None]:
    """What is no right parameter in the block is an error of the file that it was read from."""
    try:
        yield
    except BadParameter as error:
        raise CorruptFile(path, str(error)) from error


def check_apart(splits: Mapping[str, Iterable[str]]) -> None:
    """Raise `CorruptFile` unless each file is in one split and there once, however its path is written or linked."""
    seen: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> name -> split
    for split, paths in splits.items():
        for folder, names in by_folder(map(os.fspath, paths)).items():
            links: set[str] = set()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder or ".") as there:
                links = {entry.name for entry in there if entry.is_symlink()}
            files = {os.path.realpath(folder): [name for name in names if name not in links] if links else names}
            for name in links.intersection(names):
                above, linked = os.path.split(os.path.realpath(f"{folder}/{name}"))
                files[above] = [*files.get(above, ()), linked]
            for place, here in files.items():
                known = seen[place]
                if len({*here}) < len(here) or not known.keys().isdisjoint(here):
                    name = next(name for i, name in enumerate(here) if name in known or name in here[:i])
                    other = known.get(name, split)
                    where = f"'{other}' and '{split}'" if other != split else f"'{split}', twice"
                    what = f"it is in the splits {where}: a test on it would mean nothing"
                    raise CorruptFile(f"{folder}/{name}", what)
                known.update(dict.fromkeys(here, split))


def check_copies(splits: Mapping[str, Iterable[str]]) -> None:
    """Raise `CorruptFile` where a file is the same, to the byte, as that of its name in another split's folder of the
    same name."""
    places: dict[str, str] = {}  # name of the folder and the file -> its path
    for paths in splits.values():
        found = by_folder(map(os.fspath, paths)).items()
        named = {f"{folder.rpartition('/')[2]}/{name}": f"{folder}/{name}" for folder, names in found for name in names}
        for path, other in ((named[key], places[key]) for key in sorted(named.keys() & places.keys())):
            with contextlib.suppress(FileNotFoundError):  # of a link, which is named when it is read
                if filecmp.cmp(path, other, shallow=False):
                    what = f"{other}, in another split, is a copy of it: a test on it would mean nothing"
                    raise CorruptFile(path, what)
        places |= named


def by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """The names of files by folder: one look at a folder is faster than one at each file."""
    found = defaultdict(list)
    for path in paths:
        folder, _, name = path.rpartition("/")
        found[folder].append(name)
    return found
