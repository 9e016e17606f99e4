"""Copies of the data sets as people have them: with a folder more, a link, other letters, files of operating systems;
and those that the papers' `COPIES` describe, such as Kaggle's. Each has the same items in the same order, or an error
with the next step. `ALONE` are parts of a set that a run needs alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from companion import data
from companion.data import folders
from companion.errors import CompanionError
from companion.io.papers import slugs
from tests.conftest import parameters
from tests.papers.common import hooks, of_all
from tests.rehearsal import common

SETS = {run["dataset"]: slug for slug in slugs() for run in hooks(slug).RUNS if run["dataset"] in data.DATASETS}
ALONE = [(slug, name) for slug, parts in of_all("ALONE").items() for name in parts]
COPIES = [(slug, name) for slug, copies in of_all("COPIES").items() for name in copies]


def content(name: str, root: Path) -> dict[str, list]:
    """By split, the name of each item's file, without its ending, and its label."""
    found = {}
    for split, read in data.parts(data.find(name)).items():
        items = read(root)
        files = [Path(file).stem for file in data._files(items)] or [getattr(item, "name", "") for item in items]
        labels = getattr(items, "positives", getattr(items, "labels", ""))
        found[split] = [len(items), *files, str(labels)]
    return found


def one_more(folder: Path) -> None:
    shutil.move(folder, aside := folder.with_name("aside"))
    shutil.move(aside, folder / "unpacked")


def two_more(folder: Path) -> None:
    one_more(folder)
    one_more(folder)


def linked(folder: Path) -> None:
    shutil.move(folder, aside := folder.with_name("disk"))
    folder.symlink_to(aside, target_is_directory=True)


def lower(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.lower()))


def added(folder: Path) -> None:
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        (place / "__MACOSX").mkdir()
        (place / "__MACOSX" / "._1.jpg").write_bytes(b"\0")
        for name in (".DS_Store", "Thumbs.db", "._1.jpg"):
            (place / name).write_bytes(b"\0")


WAYS: list[Callable[[Path], None]] = [lower, added, one_more, two_more, linked]
FIRST = {data.find(name).task: name for name in reversed(SETS)}
# each alone where all readers of a task are alike, all but one after the other elsewhere
PAIRS = [(name, [way]) for name in FIRST.values() for way in WAYS]
PAIRS += [(name, [lower, added, two_more, linked]) for name in SETS if name not in FIRST.values()]


@pytest.mark.parametrize(("name", "ways"), PAIRS, ids=lambda of: of if isinstance(of, str) else of[0].__name__)
def test_a_set_is_found(name, ways, tmp_path, monkeypatch):
    common.prepare(SETS[name], {"dataset": name}, tmp_path, monkeypatch)
    as_published = content(name, tmp_path)
    for way in ways:
        way(data.find(name).folder(tmp_path))
    assert content(name, tmp_path) == as_published
    found = data.status(name, tmp_path)
    assert found.state == "present", found.detail


@pytest.mark.parametrize(("slug", "name"), COPIES)
def test_a_copy(slug, name, tmp_path, monkeypatch):
    """Read as published, or refused with words that say what to do."""
    copy = hooks(slug).COPIES[name]
    common.prepare(slug, copy.run, tmp_path, monkeypatch)
    as_published = content(copy.run["dataset"], tmp_path)
    copy.damage(tmp_path)
    if not copy.words:
        assert content(copy.run["dataset"], tmp_path) == as_published
        found = data.status(copy.run["dataset"], tmp_path)  # which looks for all files
        assert found.state == "present", found.detail
        return
    with pytest.raises(CompanionError, match=copy.words):
        content(copy.run["dataset"], tmp_path)
        data.present(copy.run["dataset"], tmp_path)


@pytest.mark.parametrize(("slug", "name"), ALONE)
def test_a_run_needs_what_it_reads(slug, name, tmp_path, monkeypatch):
    """A part of a set on which nothing is missing for this run."""
    copy = hooks(slug).ALONE[name]
    recipe, changes = common.prepare(slug, copy.run, tmp_path / "data", monkeypatch)
    copy.damage(tmp_path / "data")
    assert data.status(copy.run["dataset"], tmp_path / "data").state == "incomplete"
    recipe.run(parameters(slug, accelerator="cpu", **changes), tmp_path / "out")


def test_a_folder_of_many_is_not_searched(tmp_path, monkeypatch):
    """A folder of class folders may hold a million files."""
    looked = []
    monkeypatch.setattr(data.os, "scandir", lambda place, scan=os.scandir: looked.append(place) or scan(place))
    for i in range(folders.MANY + 1):
        (tmp_path / "hta/dtd" / str(i) / "labels").mkdir(parents=True)
    assert data.status("hta/dtd", tmp_path).state == "incomplete"
    assert {Path(place) for place in looked} <= {tmp_path, tmp_path / "hta", tmp_path / "hta/dtd"}
