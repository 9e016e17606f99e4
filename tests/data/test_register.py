"""Every set of the register: the error of a missing set names its source, that of a wrong name the known ones."""

import importlib

import pytest

from companion import data
from companion.data import DATASETS, classification, xrays
from companion.errors import BadParameter, MissingData
from tests.data.conftest import refused

SPLITS = ("train", "val", "trainval", "test", "all")
TASKS = sorted({dataset.task for dataset in DATASETS.values()})
# of each group: how many sets, and the sums of their classes and of their images (sequences) in each split, as counted
# in public copies and in the authors' loaders
NUMBERS = {
    "FGVC": (5, 1173, 46079, 6028, 52107, 53197, 0),
    "VTAB-1k Natural": (7, 795, 5600, 1400, 7000, 75564, 0),
    "VTAB-1k Specialized": (4, 62, 3200, 800, 4000, 87138, 0),
    "VTAB-1k Structured": (8, 83, 6400, 1600, 8000, 225202, 0),
    "HTA": (10, 1288, 261147, 62223, 323370, 130948, 0),
    "Remote sensing": (8, 237, 33400, 13360, 0, 20040, 185961),
    "Medical": (3, 16, 2496, 1000, 0, 1504, 5000),
    "Open-vocabulary detection": (4, 2148, 218457, 0, 0, 104809, 0),
    "Pedestrian attributes": (7, 268, 168760, 37340, 267698, 80924, 0),
    "Pre-trained encoders": (3, 1230, 1419664, 0, 0, 57000, 0),
    "RGB-T tracking": (3, 0, 882, 97, 979, 529, 0),
    "RGB-E tracking": (1, 0, 0, 0, 0, 320, 0),
    "landcover": (3, 21, 2546, 1669, 0, 1810, 0),
    "restoration by text": (2, 0, 119087, 0, 0, 5100, 0),
    "slides": (1, 6, 10616, 0, 0, 0, 0),
    "xrays": (8, 38, 231875, 29083, 0, 50404, 0),
    "fundus": (4, 35, 9139, 1322, 0, 2551, 0),
    "pocket": (12, 47, 3200, 800, 4000, 2297, 0),
}


def load(name: str, root) -> object:
    reader = importlib.import_module(f"companion.data.{DATASETS[name].task}")
    if name in ("xrays/mimic-cxr", "xrays/openi"):
        return xrays.reports(name, root)
    if hasattr(reader, "splits"):
        return reader.splits(name, root)
    return reader.load(name, root, "test" if name in ("rgbt/rgbt234", "rgbt/gtot", "slides/panda") else "train")


def test_the_register_holds_the_numbers_of_the_papers():
    for group, numbers in NUMBERS.items():
        sets = [dataset for dataset in DATASETS.values() if dataset.group == group]
        rows = [(s.classes or 0, *(s.sizes.get(p, 0) for p in SPLITS)) for s in sets]
        assert (len(sets), *map(sum, zip(*rows, strict=True))) == numbers, group
    assert {dataset.group for dataset in DATASETS.values()} == set(NUMBERS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_set_that_is_not_there_says_where_it_is_looked_for_and_where_to_get_it(name, tmp_path):
    found = DATASETS[name]
    with pytest.raises(MissingData) as error:
        load(name, tmp_path)
    wanted = str(tmp_path / found.folders[0]), *found.folders[1:], *found.layout.splitlines(), found.source
    assert all(part in str(error.value) for part in (*wanted, found.licence)) and found.citation
    assert data.status(name, tmp_path).state == "missing"
    if not found.fetchable:
        refused(MissingData, "cannot be downloaded for you", data.fetch, name, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / found.folders[0]).mkdir(parents=True)
    with pytest.raises(MissingData):
        load(name, tmp_path)
    # the folder of COCO is also that of other sets: there is no sign that this one was started
    begun = found.task not in ("detection", "restoration")
    assert data.status(name, tmp_path).state == ("incomplete" if begun else "missing")


@pytest.mark.parametrize("task", TASKS)
def test_a_name_that_is_none_of_the_tasks_lists_them(task, tmp_path):
    own = next(name for name, dataset in DATASETS.items() if dataset.task == task)
    other = next(name for name, dataset in DATASETS.items() if dataset.task != task)
    for name in ("no/set", other):
        with pytest.raises(BadParameter, match=f"Accepted: .*'{own}'"):
            importlib.import_module(f"companion.data.{task}").load(name, tmp_path, "train")


def test_names_that_do_not_exist_list_the_nearest_first(tmp_path):
    for call in (data.status, data.fetch, lambda name, root: classification.load(name, root, "train")):
        refused(BadParameter, r"Accepted: 'fgvc/cub200', 'hta/cub200'", call, "cub200", tmp_path)


def test_table_has_a_row_for_each_set(tmp_path):
    rows = {row["name"]: row for row in data.table(tmp_path)}
    assert list(rows) == list(DATASETS)
    assert rows["fgvc/nabirds"]["state"] == "missing" and "accepted" in rows["fgvc/nabirds"]["licence"]
    assert all(set(row) == {"name", "title", "state", "detail", "licence", "source"} for row in rows.values())
    assert all(text for row in rows.values() for text in row.values())
