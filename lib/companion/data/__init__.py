"""Readers of the real data sets in their original layouts, one file per task, and the register of the sets.

`DATASETS` holds a `DataSet` for each name ("fgvc/cub200", "vtab/cifar100", ...); `status` checks whether it is on this
machine, `fetch` downloads it if it is free and has a checksum, `table` lists all of them in rows. The module of a task
has `load`, for free sets `fetch`, `splits` where all splits are read at once, and `parts` where a set has more than its
splits; `<task>_sets.yaml` holds the facts. No module here depends on a model or a paper.

Own data: `own(root, ...)` of a task's module gives the set of each split by name, "train", and "val" and "test" where
the folder has them; `classification` and `domains` take those that class folders lack from train. Its arguments are the
folder, what the folder does not say (such as class names), and the transform; `own_set` makes the `DataSet` of such a
folder.

A set is found by the names that mark its folder (`DataSet.folder`), and a file in it by `at`, both in upper or lower
case. `folders` has what readers ask of folders and splits. `tables` reads lists and CSV files; `inside` and
`check_listed` check the files that they name, `check_own` those of own data. `once` makes a function that parses a
file again only when the file has changed.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, Self, TypeVar

import numpy as np
import yaml

from ..errors import BadParameter, CompanionError, MissingData, Whole, check_choice, typed
from .folders import SPELLED, at, below, by_folder, check_apart, check_copies, entries, told


@dataclass(frozen=True)
class DataSet:
    """A data set as its reader expects it on disk.

    Attributes:
        name: "group/set"; the name that every function here takes.
        title: the display name.
        group: the benchmark, as in the papers' tables.
        task: the module of this package that reads it.
        classes: number of classes; 0 where the lists name them, or where there are none.
        sizes: images (for tracking: sequences) in each split, as published; a different number raises an error.
        splits: their names, where `sizes` names others.
        usual: of splits without a published number that of the copies that are known; a different one is told.
        folders: the folders searched below the data root; the first is the usual spelling.
        marks: files or folders, or patterns of them, of which the set's folder holds at least one.
        archive: the archive that is wanted, by name and number of files.
        layout: the files expected below the folder, one per line.
        source: where to get it.
        checked: the day on which the links of `source` were last known to work; None: not checked.
        licence: its licence, or the access conditions.
        citation: the work to cite.
        fetchable: whether `fetch` can download it.
    """

    name: str
    title: str
    group: str
    task: str
    classes: int
    sizes: Mapping[str, int]
    folders: tuple[str, ...]
    layout: str
    source: str
    licence: str
    citation: str
    fetchable: bool = False
    checked: datetime.date | None = None
    marks: tuple[str, ...] = ()
    archive: str = ""
    splits: tuple[str, ...] = ()
    usual: Mapping[str, int] = field(default_factory=dict)

    def folder(self, root: str | Path) -> Path:
        """The set's folder: the first of `folders` below `root` that holds one of `marks`, or else the first folder one
        or two levels below that does; if there is none the first that exists, or the usual spelling. An archive of
        several sets may have been unpacked in a folder of its own name: `vtab-1k/vtab-1k`."""
        doubled = [f"{name.partition('/')[0]}/{name}" for name in self.folders if "/" in name]
        places = [place for name in (*self.folders, *doubled) if (place := at(Path(root), name)).is_dir()]
        nested = (folder for place in places for folder in below(place))
        marked = (folder for folder in itertools.chain(places, nested) if self.marked(folder))
        return next(marked, places[0] if places else Path(root) / self.folders[0])

    def marked(self, folder: Path) -> bool:
        """Whether a folder holds one of `marks`; without marks, whether it exists."""
        if not self.marks:
            return folder.is_dir()
        return any(next(folder.glob(m), None) if "*" in m else at(folder, m).exists() for m in self.marks)

    def missing(self, root: str | Path, detail: str = "") -> MissingData:
        """The error that lists what is missing below `root`, what is there, what was expected and where to get it."""
        also = f" (also accepted: {', '.join(self.folders[1:])})" if self.folders[1:] else ""
        layout = "\n".join([f"{self.folders[0]}/{also}", *("    " + line for line in self.layout.splitlines())])
        folder = self.folder(root)
        here = folder if folder.is_dir() else Path(root)
        there = f"{here} holds {told(entries(here))}" if here.is_dir() else ""
        return MissingData(self.title, folder, layout, self.where, self.licence, detail, there, self.archive)

    @property
    def where(self) -> str:
        """`source`, with the day on which its links were last known to work."""
        return dated(self.source, self.checked)


LINKS = "Links are not checked, except where it says on which day they worked."


def dated(source: str, checked: datetime.date | None) -> str:
    """A source, and the day on which its links were last known to work, if that was checked."""
    return f"{source} (worked on {checked})" if checked else source


def own_set(root: str | Path, task: str, layout: str, classes: int = 0) -> DataSet:
    """A user's folder as a data set of `task`. Raises `BadParameter`: no path, or an empty one."""
    if root == "":
        raise BadParameter("root", root, "the path of a folder")
    name, title, source = Path(root).resolve().name, "images of your own", "your own images"
    return DataSet(name, title, "own", task, classes, {}, (".",), layout, source, "yours", "")


@dataclass(frozen=True)
class Status:
    """What of a data set is on this machine.

    Attributes:
        folder: where it was found, or is expected.
        ready: by split, its items in words.
        lacking: by split, what is missing or wrong; "set" where nothing marks the folder. Both are empty without one.
    """

    folder: Path
    ready: Mapping[str, str]
    lacking: Mapping[str, str]

    @property
    def state(self) -> Literal["present", "missing", "incomplete"]:
        """Whether all that was looked for is there, nothing, or a part."""
        return "incomplete" if self.lacking else "present" if self.ready else "missing"

    @property
    def lines(self) -> list[str]:
        """A line for each split, what is lacking first."""
        lacking = [f"{split}: {line}" for split, line in self.lacking.items()]
        ready = [f"{split}: ready: {line}" for split, line in self.ready.items()]
        return [*lacking, *ready] or [f"nothing of it in {self.folder}"]

    @property
    def detail(self) -> str:
        """What is lacking; of a set that is present what there is."""
        return "; ".join(f"{split}: {line}" for split, line in (self.lacking or self.ready).items()) or self.lines[0]


DATASETS: dict[str, DataSet] = {}
_HERE = Path(__file__).parent
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml parses ten times faster


def find(name: str, task: str | None = None) -> DataSet:
    """The data set called `name`, of `task` when that is given.

    Raises `BadParameter` when there is none.
    """
    names = [known for known, dataset in DATASETS.items() if task in (None, dataset.task)]
    if name in names:
        return DATASETS[name]
    raise BadParameter("data set", name, names)


def _reader(dataset: DataSet):
    return importlib.import_module(f".{dataset.task}", __name__)


@typed
def status(name: str, root: str | Path, *splits: str, decode: bool = False) -> Status:
    """Look for a data set below `root`: checks lists, their lengths, and that each listed file exists.

    Args:
        splits: those to look for; all that the set has, and what is read with them, if none is given.
        decode: read one item of each too; otherwise no image is opened.

    Raises `BadParameter` for an unknown name or split, and nothing else.
    """
    dataset, root = find(name), Path(root)
    folder, ready, lacking = dataset.folder(root), dict[str, str](), dict[str, str]()
    known = parts(dataset)
    if not dataset.marked(folder):
        others = {place for other in DATASETS.values() if other.marks != dataset.marks for place in other.folders}
        if entries(folder) and not others & {*dataset.folders}:  # the folder of COCO is also that of other sets
            wanted = f"none of {', '.join(dataset.marks)} is in it, nor in a folder one or two levels below"
            lacking["set"] = f"{folder} holds {told(entries(folder))}: {wanted}"
        return Status(folder, ready, lacking)
    for split in splits or known:
        check_choice(f"split of {name}", split, known)
        try:
            read = known[split](root)
            check_listed(dataset, root, map(str, _files(read)), getattr(read, "listing", ""))
            ready[split] = _line(dataset, split, read, decode)
        except CompanionError as error:
            lacking[split] = getattr(error, "detail", "") or str(error)
    return Status(folder, ready, lacking)


def parts(dataset: DataSet) -> dict[str, Callable[[Path], Any]]:
    """What a set has, by name: its splits, and of some sets more; a function from the data root gives the items."""
    reader, names = _reader(dataset), dataset.splits or tuple(dataset.sizes) or ("train", "val", "test")
    if hasattr(reader, "parts"):
        return reader.parts(dataset)
    if hasattr(reader, "splits"):
        every = functools.cache(functools.partial(reader.splits, dataset.name))

        def one(root: Path, split: str) -> Any:
            return every(root)[split]

        return {split: functools.partial(one, split=split) for split in names}
    return {split: functools.partial(reader.load, dataset.name, split=split) for split in names}


def _line(dataset: DataSet, split: str, items: Any, decode: bool) -> str:
    """A split in words: number of items, range of labels, one item, and what is special about this copy."""
    line, usual = f"{len(items):,}", dataset.usual.get(split)
    labels, classes = np.asarray(getattr(items, "labels", ())), getattr(items, "classes", 0)
    if classes and labels.size:
        line += f", labels {labels.min():g} to {labels.max():g}"
    elif classes:  # with boxes, or a label a pixel
        line += f", {classes if isinstance(classes, int) else len(classes)} classes"
    item: Any = items[len(items) // 2] if len(items) and (decode or isinstance(items, list)) else None
    if hasattr(item, "frame"):
        line += f" videos, {sum(map(len, items)):,} frame pairs"
    if decode and item is not None:
        first = item.frame(0) if hasattr(item, "frame") else item[0] if isinstance(item, tuple) else item
        if shape := getattr(first, "shape", ()):
            line += f", an item of {' x '.join(map(str, shape))}"
    if usual not in (None, len(items)):
        line += f" ({usual:,} are usual)"
    told = str(getattr(items, "name", "")).removeprefix(dataset.name).strip()
    return f"{line} {told}" if told.startswith("(") else line


@typed
def present(name: str, root: str | Path, *splits: str) -> bool:
    """Whether a dry run reads these splits of a data set below `root`, without any all of it: anything of the set is
    there; "folder" is `root` itself.

    Raises `MissingData`: it is there, but not all of it.
    """
    if name == "folder":
        return Path(root).is_dir()
    found = status(name, root, *splits)
    if found.state == "incomplete":
        raise find(name).missing(root, found.detail)
    return found.state == "present"


@typed
def few(splits: Mapping[str, Any], count: Whole) -> dict[str, Any]:
    """At most `count` items of each split, evenly spaced over it, for a dry run. Each was read once.

    Raises `CorruptFile`: an image that cannot be read, or that is in "train" and in "test".
    """
    check_apart({name: {*_files(splits[name])} for name in ("train", "test") if name in splits})
    found = {}
    for name, split in splits.items():
        found[name] = split.part(spaced(len(split), count))
        for i in range(len(found[name])):
            found[name][i]
    return found


def spaced(length: int, count: int) -> list[int]:
    """At most `count` of the numbers below `length`, evenly spaced, the first and the last among them."""
    count = min(count, length)
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


def _files(split: Any) -> list:
    """The files of a split's images; none for images in one array."""
    found = getattr(split, "sources", getattr(split, "paths", ()))
    return list(found) if all(isinstance(name, str | Path) for name in found) else []


@typed
def counts(name: str, root: str | Path) -> dict[str, int]:
    """The number of items of each split of a data set that is there."""
    found = dict[str, int]()
    for split, read in parts(find(name)).items():
        with contextlib.suppress(CompanionError, OSError):
            found[split] = len(read(Path(root)))
    return found


class Parts:
    """A data set of which some items can be taken.

    Attributes:
        each: names of its attributes that have an entry for each item.
    """

    each: ClassVar[tuple[str, ...]]

    def part(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The items of these numbers; all else is that of the whole set, such as the classes.

        Raises `BadParameter`: no numbers, such as True and False for each item."""
        chosen = np.asarray(rows)
        if chosen.ndim != 1 or (chosen.dtype.kind not in "iu" and chosen.size):
            raise BadParameter("rows", rows, "the numbers of the items")
        found = copy.copy(self)
        for name in self.each:
            values = getattr(self, name)
            if isinstance(values, Parts):
                setattr(found, name, values.part(rows))
            elif values is not None:
                listed = isinstance(values, list | tuple | range)
                setattr(found, name, [values[i] for i in rows] if listed else values[np.asarray(rows, int)])
        return found


@typed
def fetch(name: str, root: str | Path, progress: bool = True) -> Path:
    """Download a data set below `root`, verify its checksums and return its folder; an existing one is left unchanged.

    Args:
        name: a name of `DATASETS` with `fetchable` set.
        root: the data folder.
        progress: show a bar for each file.

    Raises:
        BadParameter: for an unknown name.
        MissingData: for a set that cannot be downloaded automatically; the message names its source.
        CompanionError: when the download fails; no partial file remains.
    """
    dataset = find(name)
    found = status(name, root)
    if found.state != "present":
        if not dataset.fetchable:
            raise dataset.missing(root, f"{found.detail}; it cannot be downloaded for you")
        _reader(dataset).fetch(dataset, Path(root), progress)
        found = status(name, root)
        if found.state != "present":
            raise dataset.missing(root, found.detail)
    return dataset.folder(root)


# --- for the readers --------------------------------------------------------------------------------------------------

_P = ParamSpec("_P")
_T = TypeVar("_T")


def once(read: Callable[Concatenate[Path, _P], _T], most: int = 16) -> Callable[Concatenate[str | Path, _P], _T]:
    """`read`, a function of a path and hashable arguments, which parses a file again only when the file has changed:
    its size, time or inode. The check before a run, `status` and `doctor` read the lists that the run reads too.

    Results are shared, so `read` must return what no caller can change: strings, tuples, a `MappingProxyType`,
    read-only arrays. Those of the last `most` files are kept; data sets hold the same strings. Errors are not kept.
    """
    kept = functools.lru_cache(most)(lambda _, path, *args, **options: read(Path(path), *args, **options))

    @functools.wraps(read)
    def reading(path: str | Path, /, *args: _P.args, **options: _P.kwargs) -> _T:
        try:
            found = os.stat(path)  # noqa: PTH116  (a string is a path too)
        except OSError:
            return read(Path(path), *args, **options)  # says what is missing
        stamp = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        return kept(stamp, str(path), *args, **options)  # type: ignore[arg-type]  # all are hashable

    return reading


def check_own(dataset: DataSet, root: Path, splits: Mapping[str, Any], listing: str = "") -> None:
    """Raise `MissingData` or `CorruptFile` unless each file of "train", "val" and "test" is there, and in one of them
    once, and not as a copy in another."""
    known = {split: splits[split] for split in SPELLED if split in splits}
    check_listed(dataset, root, itertools.chain(*known.values()), listing)
    check_apart(known)
    check_copies(known)


def check_listed(dataset: DataSet, root: Path, paths: Iterable[str], listing: str = "") -> None:
    """Raise `MissingData`, with the first missing one, unless all `paths` of a list, of that name, are on disk."""
    wanted, absent = set(paths), []
    for folder, expected in by_folder(wanted).items():
        try:
            there = os.listdir(folder)  # noqa: PTH208  (strings: some sets have a folder for every other image)
        except (FileNotFoundError, NotADirectoryError):
            there = []
        absent += [f"{folder}/{name}" for name in {*expected}.difference(there)]
    if absent:
        by = f" of {listing}" if listing else ""
        place = Path(one := min(absent)).parent
        near = f"its folder holds {told(entries(place), 3)}" if place.is_dir() else f"there is no folder {place}"
        what = f"{len(absent)} of {len(wanted)} listed images{by} are not there, the first: {one} ({near})"
        raise dataset.missing(root, what)


# --- the register -----------------------------------------------------------------------------------------------------


@typed
def table(root: str | Path) -> list[dict[str, str]]:
    """One row for each data set: name, title, state, detail, licence, source."""
    rows = []
    for name, dataset in DATASETS.items():
        found, facts = status(name, root), {"name": name, "title": dataset.title, "licence": dataset.licence}
        rows.append(facts | {"source": dataset.where, "state": found.state, "detail": "\n".join(found.lines)})
    return rows


def _tuples(value: object) -> Any:
    """YAML lists converted to tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.cache
def _read(task: str) -> dict:
    return _tuples(yaml.load((_HERE / f"{task}_sets.yaml").read_text(encoding="utf-8"), _LOADER))


def facts(task: str) -> dict:
    """Facts of a task's sets that its reader needs in addition to those of `DataSet`, from `<task>_sets.yaml`."""
    return _read(task)["facts"]


# Facts, not readers: a notebook depends on the readers that it imports, not on every task there is, and a new task
# makes no other paper's results stale.
for _file in sorted(_HERE.glob("*_sets.yaml")):
    _task = _file.stem.removesuffix("_sets")
    for _entry in _read(_task)["sets"]:
        DATASETS[_entry["name"]] = DataSet(**{"classes": 0, "sizes": {}, "task": _task} | _entry)
