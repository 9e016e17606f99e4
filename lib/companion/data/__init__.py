"""Readers of the real data sets in their original layouts, one file per task, and the register of the sets.

`DATASETS` holds a `DataSet` for each name ("fgvc/cub200", "vtab/cifar100", ...); `status` checks whether it is on this
machine, `fetch` downloads it if it is free and has a checksum, `table` lists all of them in rows. The module of a task
has `load`, `status` and, for free sets, `fetch`; `<task>_sets.yaml` holds the facts. No module here depends on a model
or a paper.

`tables` reads lists and CSV files; `inside` and `check_listed` check the files that they name.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import http.client
import importlib
import io
import os
import re
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import yaml

from ..errors import BadParameter, CompanionError, CorruptFile, MissingData


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
        folders: the folders searched below the data root; the first is the usual spelling.
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

    def folder(self, root: str | Path) -> Path:
        """The first of `folders` that exists below `root`; the usual spelling when none does."""
        candidates = [Path(root) / folder for folder in self.folders]
        return next((folder for folder in candidates if folder.is_dir()), candidates[0])

    def missing(self, root: str | Path, detail: str = "") -> MissingData:
        """The error that lists what is missing below `root`, what was expected and where to get it."""
        also = f" (also accepted: {', '.join(self.folders[1:])})" if self.folders[1:] else ""
        layout = "\n".join([f"{self.folders[0]}/{also}", *("    " + line for line in self.layout.splitlines())])
        return MissingData(self.title, self.folder(root), layout, self.where, self.licence, detail)

    @property
    def where(self) -> str:
        """`source`, with the day on which its links were last known to work."""
        return dated(self.source, self.checked)


LINKS = "Links are not checked, except where it says on which day they worked."


def dated(source: str, checked: datetime.date | None) -> str:
    """A source, and the day on which its links were last known to work, if that was checked."""
    return f"{source} (worked on {checked})" if checked else source


def own_set(root: str | Path, task: str, layout: str, classes: int = 0) -> DataSet:
    """A user's folder as a data set of `task`."""
    name, title, source = Path(root).resolve().name, "images of your own", "your own images"
    return DataSet(name, title, "own", task, classes, {}, (".",), layout, source, "yours", "")


@dataclass(frozen=True)
class Status:
    """Whether a data set is on this machine, and a description of what is missing."""

    state: Literal["present", "missing", "incomplete"]
    detail: str


DATASETS: dict[str, DataSet] = {}
SECONDS = 20  # timeout of a host's answer
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


def status(name: str, root: str | Path) -> Status:
    """Look for a data set below `root`: checks lists, their lengths, and that each listed image exists (opens no
    image).

    Raises `BadParameter` for an unknown name, and nothing else.
    """
    dataset, root = find(name), Path(root)
    folder = dataset.folder(root)
    if not folder.is_dir():
        return Status("missing", f"no folder {folder}")
    try:
        reader = _reader(dataset)
        return reader.status(dataset, root) if hasattr(reader, "status") else complete(dataset, root)
    except CompanionError as error:
        return Status("incomplete", getattr(error, "detail", "") or str(error))


def complete(dataset: DataSet, root: Path) -> Status:
    """ "present", with the images of each split; raises `MissingData`, `CorruptFile`: something is wrong."""
    counts = []
    for split, items in _splits(dataset, root):
        check_listed(dataset, root, map(str, _files(items)))
        counts.append(f"{len(items):,} in {split}")
    return Status("present", f"images in {dataset.folder(root)}: {', '.join(counts)}")


def look(name: str, root: str | Path) -> Status:
    """`status`, and of a set that is present the counts of each split, the range of its labels, and one item, decoded.

    Raises as `status`.
    """
    found, dataset, rows = status(name, root), find(name), []
    if found.state != "present":
        return found
    try:
        for split, items in _splits(dataset, Path(root)):
            row = f"{split} {len(items):,}"
            labels = np.asarray(getattr(items, "labels", ()))
            if getattr(items, "classes", 0) and labels.size and labels.dtype.kind in "iuf":
                row += f", labels {labels.min():g} to {labels.max():g}"
            if len(items):
                item = items[len(items) // 2]
                first = item.frame(0) if hasattr(item, "frame") else item[0] if isinstance(item, tuple) else item
                if shape := getattr(first, "shape", ()):
                    row += f", an item of {' x '.join(map(str, shape))}"
            rows.append(row)
    except CompanionError as error:
        return Status("incomplete", getattr(error, "detail", "") or str(error))
    return Status("present", "; ".join(rows) or found.detail)


def _splits(dataset: DataSet, root: Path) -> Iterator[tuple[str, Any]]:
    """The splits that a set has, by name, one after the other."""
    reader = _reader(dataset)
    for split in dict.fromkeys([*dataset.sizes, "train", "val", "test"]):
        with contextlib.suppress(BadParameter):  # a split that this set does not have
            yield split, reader.load(dataset.name, root, split)


def present(name: str, root: str | Path) -> bool:
    """Whether a dry run reads a data set below `root`: any of its folders is there; "folder" is `root` itself.

    Raises `MissingData`: it is there, but not all of it.
    """
    if name == "folder":
        return Path(root).is_dir()
    found = status(name, root)
    if found.state == "incomplete":
        raise find(name).missing(root, found.detail)
    return found.state == "present"


def few(splits: Mapping[str, Any], count: int) -> dict[str, Any]:
    """At most `count` items of each split, evenly spaced over it, for a dry run. Each was read once.

    Raises `CorruptFile`: an image that cannot be read, or that is in "train" and in "test".
    """
    learned = set(map(os.path.normpath, _files(splits["train"]))) if "train" in splits else set()
    for name in _files(splits.get("test", ())):
        if os.path.normpath(name) in learned:
            raise CorruptFile(name, "it is in the splits 'train' and 'test': a test on it would mean nothing")
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


class Parts:
    """A data set of which some items can be taken.

    Attributes:
        each: names of its attributes that have an entry for each item.
    """

    each: ClassVar[tuple[str, ...]]

    def part(self, rows: Sequence[int]) -> Self:
        """The items of these numbers; all else is that of the whole set, such as the classes."""
        found = copy.copy(self)
        for name in self.each:
            values = getattr(self, name)
            if isinstance(values, Parts):
                setattr(found, name, values.part(rows))
            elif values is not None:
                listed = isinstance(values, list | tuple | range)
                setattr(found, name, [values[i] for i in rows] if listed else values[list(rows)])
        return found


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


@contextlib.contextmanager
def downloading(dataset: DataSet, folder: Path, progress: bool) -> Iterator[None]:
    """Context of a download to `folder`: no progress bars unless `progress`; a failure raises `CompanionError` with
    advice, as does an archive with a member outside of its folder.

    A host that does not answer within `SECONDS` counts as a failure; the system's own timeout is minutes.
    """
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # the default from Python 3.14 on
    try:
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            yield
    except (OSError, http.client.HTTPException, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise CompanionError(
            f"{dataset.title} could not be downloaded ({getattr(error, 'reason', error)}). No partial file was "
            f"saved. On a machine with a network run `companion fetch` again, or copy a finished {folder} here."
        ) from None
    finally:
        socket.setdefaulttimeout(waited)
        tarfile.TarFile.extraction_filter = None


@contextlib.contextmanager
def fetched(dataset: DataSet, root: Path, progress: bool) -> Iterator[Path]:
    """Context of a download, see `downloading`: a hidden folder, whose content is moved to the set's folder at the end.

    Archives in it are removed. In an incomplete copy files are replaced; none of the user's others is removed.
    """
    folder = dataset.folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with downloading(dataset, folder, progress), tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as name:
        (new := Path(name) / folder.name).mkdir()
        yield new
        for archive in (path for path in new.iterdir() if path.suffix in (".gz", ".tgz", ".zip")):
            archive.unlink()
        shutil.copytree(new, folder, dirs_exist_ok=True, copy_function=shutil.move)


# --- for the readers --------------------------------------------------------------------------------------------------

_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")


def inside(listing: Path, where: str, path: str) -> str:
    """`path` if it is below the data set's folder: a downloaded list must not make us read other files."""
    if _OUTSIDE.search(path):
        raise CorruptFile(listing, f"{where}: the path {path!r} leaves the data set's folder")
    return path


def check_listed(dataset: DataSet, root: Path, paths: Iterable[str], listing: str = "") -> None:
    """Raise `MissingData`, with the first missing one, unless all `paths` of a list, of that name, are on disk."""
    wanted, names = set(paths), defaultdict(set)
    for path in wanted:
        folder, _, name = path.rpartition("/")
        names[folder].add(name)
    absent = []
    for folder, expected in names.items():  # one listing of each folder is faster than a look at each file
        there = {entry.name for entry in os.scandir(folder)} if Path(folder).is_dir() else set()
        absent += [f"{folder}/{name}" for name in expected - there]
    if absent:
        by = f" of {listing}" if listing else ""
        what = f"{len(absent)} of {len(wanted)} listed images{by} are not there, the first: {min(absent)}"
        raise dataset.missing(root, what)


# --- the register -----------------------------------------------------------------------------------------------------


def table(root: str | Path) -> list[dict[str, str]]:
    """One row for each data set: name, title, state, detail, licence, source."""
    return [
        {"name": name, "title": dataset.title, "licence": dataset.licence, "source": dataset.where}
        | vars(status(name, root))
        for name, dataset in DATASETS.items()
    ]


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
