"""The readers of remote-sensing and medical sets, on tiny trees in the layouts of the authors and of the archives."""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from companion import data
from companion.data import DATASETS, domains
from companion.data.domains import load, own, splits
from companion.data.fewshot import base_to_novel
from companion.errors import CompanionError, CorruptFile, MissingData
from tests.data.conftest import expect, items, picture, refused, unreadable

SETS = list(domains.CLASSES)
BTMRI = "medical/btmri"


def tree(folder: Path, classes, each: int = 4, ending: str = "jpg") -> Path:
    """`each` images in each class folder; every image is 10 x its class + its number bright (modulo 250)."""
    for label, name in enumerate(classes):
        for number in range(each):
            picture(folder / name / f"{number}.{ending}", (10 * label + number) % 250)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in SETS:
        expect(monkeypatch, name, sizes={})


@pytest.fixture
def btmri(tmp_path) -> Path:
    """The folder of a small "medical/btmri" below tmp_path, as the authors keep it: 10 images per class."""
    tree(tmp_path / "medical/BTMRI/BTMRI", sorted(domains.CLASSES[BTMRI]), 10)
    return tmp_path / "medical/BTMRI"


def listed(folder: Path, classes: dict[str, str], **changes) -> Path:
    """A list of splits, 2 + 1 + 1 images of each class; `changes` replace one of its lists."""
    content = {}
    for part, images in {"train": (7, 3), "val": (1,), "test": (0,)}.items():
        content[part] = [[f"{k}/{n}.jpg", i, v] for i, (k, v) in enumerate(classes.items()) for n in images]
    folder.write_text(json.dumps(content | changes))
    return folder


RELEASED = {
    "remote/mlrsnet": ("Images", "jpg", {}),
    "remote/patternnet": ("PatternNet/images", "jpg", {"swimmimg_pool": "swimming_pool"}),
    "remote/aid": ("", "jpg", {"Dense Residential": "DenseResidential"}),
    "remote/ucm": ("UCMerced_LandUse/Images", "tif", {}),
    "remote/whurs19": ("", "jpg", {"Commerical": "Commercial"}),
    "remote/nwpu": ("NWPU-RESISC45", "jpg", {}),
    "remote/rsscn7": ("", "jpg", {}),
    "medical/chmnist": ("Kather_texture_2016_image_tiles_5000", "tif", {}),
}


@pytest.mark.parametrize("name", SETS)
def test_the_authors_layout_and_that_of_the_archive_give_the_same_labels_and_splits(name, tmp_path):
    folder, own = DATASETS[name].folders
    classes, words = sorted(domains.CLASSES[name]), domains.CLASSES[name]
    tree(tmp_path / folder / own, classes)
    sets = splits(name, tmp_path)
    parts = {part: items(images) for part, images in sets.items()}
    assert {part: len(found) / len(classes) for part, found in parts.items()} == dict(train=2, val=1, test=1, all=4)
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == sorted(parts["all"])
    assert len({source for part in domains.SPLITS[:3] for source in sets[part].sources}) == 4 * len(classes)
    assert all((value - 10 * label) % 250 < 4 for value, label in parts["all"])
    assert sets["train"].class_names == tuple(words[key] for key in classes)
    assert data.status(name, tmp_path).state == "present"
    tree(tmp_path / "beside" / own / own, classes)  # directly in the data folder, as theirs
    assert items(load(name, tmp_path / "beside", "test")) == parts["test"]
    if name in RELEASED:
        place, ending, renamed = RELEASED[name]
        renamed = renamed or {new: old for old, new in domains.RELEASED_AS.get(name, {}).items()}
        tree(tmp_path / "archive" / folder / place, [renamed.get(key, key) for key in classes], 4, ending)
        found = splits(name, tmp_path / "archive")
        assert {part: items(images) for part, images in found.items()} == parts


def test_released_folders_get_the_authors_words_and_other_spellings_keep_theirs(tmp_path):
    tree(tmp_path / "remote/RSSCN7", domains.RELEASED_AS["remote/rsscn7"])
    words = ("Field", "Forest", "Grass", "Industrial Area", "Parking", "Residential Area", "River or Lake")
    assert load("remote/rsscn7", tmp_path, "test").class_names == words
    assert load("remote/rsscn7", tmp_path, "all").class_names[-1] == "River Lake"  # as for domain generalisation
    keys = [key.replace("Dense Residential", "DenseResidential") for key in domains.CLASSES["remote/aid"]]
    tree(tmp_path / "remote/AID", keys)
    names = load("remote/aid", tmp_path, "test").class_names
    assert "DenseResidential" in names and "Dense Residential Area" not in names and "Center Area" in names


def test_both_folders_of_the_brain_tumour_archive_are_one_set(tmp_path):
    classes = sorted(domains.CLASSES[BTMRI])
    tree(tmp_path / "medical/BTMRI/Training", classes, 6)
    tree(tmp_path / "medical/BTMRI/Testing", classes[1:], 4)
    assert Counter(load(BTMRI, tmp_path, "all").labels) == {0: 6, 1: 10, 2: 10, 3: 10}


@pytest.mark.parametrize(
    ("count", "expected"), [(10, (5, 2, 3)), (5, (2, 1, 2)), (7, (4, 1, 2)), (625, (312, 125, 188))]
)
def test_sizes_of_splits_round_as_the_authors(count, expected):
    assert tuple(domains.split_sizes(count).values()) == expected


def test_the_shuffle_of_each_class_is_pinned_and_independent_of_the_others(btmri, tmp_path):
    order = ",".join(str(Path(s).relative_to(btmri / "BTMRI")) for s in load(BTMRI, tmp_path, "test").sources)
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == "8f13bdcf69c6461f"
    before = [s for s in load(BTMRI, tmp_path, "train").sources if "pituitary" not in s]
    for name in ("BTMRI/glioma/._0.jpg", "BTMRI/glioma/Thumbs.db", "BTMRI/.cache/x.jpg", "split_fewshot/a"):
        (btmri / name).parent.mkdir(exist_ok=True)
        (btmri / name).write_bytes(b"nothing")  # hidden files and other files are no images
    picture(btmri / "BTMRI/pituitary/x.jpg")
    assert len(load(BTMRI, tmp_path, "all")) == 41
    assert before == [s for s in load(BTMRI, tmp_path, "train").sources if "pituitary" not in s]


def test_a_list_of_splits_is_followed(btmri, tmp_path):
    listing, classes = btmri / "split_cao_BTMRI.json", domains.CLASSES[BTMRI]
    listed(listing, classes)
    sets = splits(BTMRI, tmp_path)
    assert items(sets["train"]) == [(10 * label + n, label) for label in range(4) for n in (7, 3)]
    assert items(sets["test"]) == [(10 * label, label) for label in range(4)] and len(sets["all"]) == 16
    assert sets["val"].class_names == ("glioma", "meningioma", "no brain tumor", "pituitary")
    (btmri / "BTMRI/glioma/7.jpg").unlink()  # the first and the last image are looked at when a set is opened
    refused(MissingData, r"glioma/7\.jpg", load, BTMRI, tmp_path, "train")
    for entry in (
        ["glioma/0.jpg", True, "glioma"],
        ["glioma/0.jpg", 0],
        ["glioma/0.jpg", 0, "tumour"],
        ["glioma/0.jpg", 1, "meningioma"],
        ["../../../secret.jpg", 0, "glioma"],
    ):
        listed(listing, classes, test=[["pituitary/0.jpg", 3, "pituitary"], entry])
        refused(CorruptFile, "'test', entry 2", load, BTMRI, tmp_path, "train")
    one = '{"train": [["a/1.jpg", 0, "a"]], "val": [["b/1.jpg", 2, "b"]], "test": [["b/2.jpg", 2, "b"]]}'
    unreadable(listing, lambda: splits(BTMRI, tmp_path), {one: "1"})


def test_class_folders_that_are_short_or_strange_are_named(btmri, tmp_path):
    for number in range(2, 10):
        (btmri / f"BTMRI/notumor/{number}.jpg").unlink()
    refused(MissingData, "notumor .* 2 images", splits, BTMRI, tmp_path)
    (btmri / "BTMRI/glioma").rename(btmri / "BTMRI/cats")
    refused(CorruptFile, "cats", splits, BTMRI, tmp_path)


def test_own_folder(tmp_path):
    tree(tmp_path / "images", ("Bear", "cat", "owl"), 10)
    sets = own(tmp_path)
    assert sets["test"].class_names == ("Bear", "cat", "owl") and sets["test"].name == tmp_path.name
    assert {part: len(images) for part, images in sets.items()} == {"train": 15, "val": 6, "test": 9, "all": 30}
    assert base_to_novel(sets, shots=5).tests["novel"].class_names == ("owl",)
    listed(tmp_path / "split.json", {name: f"a {name}" for name in ("cat", "Bear")})
    assert own(tmp_path)["val"].class_names == ("a cat", "a Bear")
    for part, each in (("train", 5), ("val", 2), ("test", 3)):
        tree(tmp_path / "split" / part, ("Bear", "cat", "owl"), each)
        for path in (tmp_path / "split" / part).rglob("*.jpg"):  # no copies of those of another split
            path.write_bytes(path.read_bytes() + part.encode())
    sets = own(tmp_path / "split")
    assert items(sets["val"]) == [(0, 0), (1, 0), (10, 1), (11, 1), (20, 2), (21, 2)]
    assert items(sets["all"]) == items(sets["train"]) + items(sets["val"]) + items(sets["test"])


def test_a_generated_set_has_its_own_list(tmp_path, monkeypatch):
    changes = {"name": "pocket/far", "group": "pocket", "classes": 2, "folders": ("pocket/far",), "sizes": {"train": 4}}
    monkeypatch.setitem(DATASETS, "pocket/far", dataclasses.replace(DATASETS["remote/ucm"], **changes))
    tree(tmp_path / "pocket/far/images", ("moon", "sun"), 8)
    refused(MissingData, r"split\.json", splits, "pocket/far", tmp_path)  # its splits are not for us to invent
    listed(tmp_path / "pocket/far/split.json", {"moon": "moon", "sun": "sun"})
    assert items(load("pocket/far", tmp_path, "train")) == [(7, 0), (3, 0), (17, 1), (13, 1)]


def test_fetch_through_torchgeo(tmp_path, monkeypatch):
    name = next(iter(domains.TORCHGEO))
    calls, failures = [], [OSError("no route")]

    def download(root, download=False, checksum=False):
        calls.append((download, checksum))
        (Path(root) / "archive.zip").write_bytes(b"zip")
        if failures:
            raise failures.pop()
        tree(Path(root) / RELEASED[name][0], domains.CLASSES[name])

    package = ModuleType("torchgeo")
    package.datasets = SimpleNamespace(**{domains.TORCHGEO[name]: download})
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    refused(CompanionError, "no route", data.fetch, name, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    folder = data.fetch(name, tmp_path, progress=False)
    assert calls == [(True, True)] * 2 and data.status(name, tmp_path).state == "present"
    assert not list(folder.glob("*.zip")) and not list(tmp_path.glob(".fetch-*"))


def test_how_many_images_are_usual_is_told_where_no_number_is_published(tmp_path):
    tree(tmp_path / "remote/WHURS19", domains.CLASSES["remote/whurs19"])
    assert "all: 76, labels 0 to 18 (1,005 are usual)" in data.status("remote/whurs19", tmp_path).detail
