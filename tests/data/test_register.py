"""Every set of the register: the error of a missing set names its source, that of a wrong name the known ones."""

import datetime
import importlib
import os
from pathlib import Path

import pytest

from companion import data
from companion.data import DATASETS, decoding, real, tables
from companion.data.folders import at
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.io.files import read_json
from tests.data.conftest import expect, refused

FETCHED = {
    "landcover/loveda": "landcover.download_and_extract_archive",
    "restoration/div2k": "restoration.download_and_extract_archive",
    "xrays/chestmnist": "xrays.download_url",
}


def load(name: str, root) -> object:
    return next(iter(data.parts(DATASETS[name]).values()))(root)


@pytest.mark.parametrize("name", FETCHED)
def test_a_download_that_fails_leaves_nothing(name, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(f"companion.data.{FETCHED[name]}", fails)
    refused(CompanionError, "no route", data.fetch, name, tmp_path, progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", DATASETS)
def test_the_error_of_a_missing_set_names_its_folder_source_and_licence(name, tmp_path):
    found = DATASETS[name]
    with pytest.raises(MissingData) as error:
        load(name, tmp_path)
    wanted = str(tmp_path / found.folders[0]), *found.folders[1:], found.source, found.licence
    assert all(part in str(error.value) for part in wanted) and data.status(name, tmp_path).state == "missing"
    if not found.fetchable:
        refused(MissingData, "missing", data.fetch, name, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / found.folders[0]).mkdir(parents=True)
    with pytest.raises(MissingData):
        load(name, tmp_path)
    assert data.status(name, tmp_path).state == "missing"
    (tmp_path / found.folders[0] / "other").mkdir()
    # the folder of COCO is also that of other sets: there is no sign that this one was started
    begun = "coco" not in found.folders
    assert data.status(name, tmp_path).state == ("incomplete" if begun else "missing")
    assert "holds other" in str(found.missing(tmp_path))


@pytest.mark.parametrize("task", sorted({dataset.task for dataset in DATASETS.values()}))
def test_the_error_of_an_unknown_name_lists_the_sets_of_the_task(task, tmp_path):
    own = next(name for name, dataset in DATASETS.items() if dataset.task == task)
    other = next(name for name, dataset in DATASETS.items() if dataset.task != task)
    for name in ("no/set", other):
        refused(BadParameter, own, importlib.import_module(f"companion.data.{task}").load, name, tmp_path, "train")


def test_the_day_on_which_links_worked_is_told_where_it_is_known(tmp_path, monkeypatch):
    expect(monkeypatch, "landcover/uavid", checked=datetime.date(2026, 3, 1))
    rows = {row["name"]: row for row in data.table(tmp_path)}
    assert rows["landcover/uavid"]["source"] == f"{DATASETS['landcover/uavid'].source} (worked on 2026-03-01)"
    assert rows.keys() == DATASETS.keys() and all(all(row.values()) for row in rows.values())


def test_real_sets_are_found_where_the_variable_points(tmp_path, root, monkeypatch):
    facts = {"title": "Cells", "layout": "cells/<name>.jpg", "source": "example.org", "licence": "CC0"}
    (tmp_path / "cells" / "images").mkdir(parents=True)
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    assert real.folder("cells/images", **facts) == real.folder("cells", **facts) == tmp_path / "cells"
    refused(MissingData, r"(?s)labels.csv.*COMPANION_REAL_DATA.*example.org", real.folder, "cells/labels.csv", **facts)
    monkeypatch.setenv("COMPANION_REAL_DATA", "")
    assert real.root() == root / "data"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\r\n<!DOCTYPE html><html><head><title>Quota exceeded", "web page"),
    ],
)
def test_what_a_download_left_in_place_of_a_file_is_named(content, words, tmp_path):
    for name, read in {
        "a.json": read_json,
        "a.csv": lambda path: tables.rows(path, "image"),
        "a.png": decoding.unit,
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(CorruptFile, words, read, tmp_path / name)


def test_a_file_is_parsed_again_only_when_it_has_changed(tmp_path, monkeypatch):
    parsed = []

    @data.once
    def read(path: Path, add: str = "") -> str:
        parsed.append(path)
        return path.read_text() + add

    (file := tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert [read(file), read(str(file)), read(file, "b"), read(file, add="b")] == ["a", "a", "ab", "ab"]
    assert read("a.txt") == "a" and len(parsed) == 4  # of each path and arguments
    file.write_text("longer")
    assert read(file) == read(file) == "longer" and len(parsed) == 5
    (tmp_path / "new.txt").write_text("newest")
    os.utime(tmp_path / "new.txt", ns=(0, file.stat().st_mtime_ns))
    (tmp_path / "new.txt").replace(file)  # of the same size and time
    assert read(file) == "newest"
    file.unlink()
    for _ in range(2):  # an error is not kept
        refused(FileNotFoundError, "a.txt", read, file)


def test_a_name_is_found_in_other_letters_and_below_a_folder_of_its_own_name(tmp_path):
    (tmp_path / "Train" / "Train" / "IMAGES").mkdir(parents=True)
    assert at(tmp_path, "val", "train/images") == tmp_path / "Train" / "Train" / "IMAGES"
    assert at(tmp_path, "train") == tmp_path / "Train"
    assert at(tmp_path, "none", "other") == tmp_path / "none"
