"""The readers of remote-sensing and medical sets, on tiny trees in the layouts of the authors and of the archives."""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from companion import data
from companion.data import DATASETS, domains, domains_sets
from companion.data.domains import clip_transform, load, own_folder, splits
from companion.data.fewshot import base_to_novel, halves
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from tests.data.conftest import expect, picture, refused, values

SETS = list(domains_sets.CLASSES)
INPUT = SimpleNamespace(size=28, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))


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
    tree(tmp_path / "medical/BTMRI/BTMRI", sorted(domains_sets.CLASSES["medical/btmri"]), 10)
    return tmp_path / "medical/BTMRI"


def listed(folder: Path, **changes) -> Path:
    """A list of splits for `btmri`, 2 + 1 + 1 images of each class; `changes` replace one of its lists."""
    names = list(domains_sets.CLASSES["medical/btmri"].items())
    content = {}
    for part, images in {"train": (7, 3), "val": (1,), "test": (0,)}.items():
        content[part] = [[f"{key}/{n}.jpg", label, name] for label, (key, name) in enumerate(names) for n in images]
    path = folder / "split_cao_BTMRI.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_every_class_of_the_register_has_a_word():
    assert [name for name in DATASETS if name.partition("/")[0] in ("remote", "medical")] == SETS
    for name in SETS:
        assert DATASETS[name].classes == len(domains_sets.CLASSES[name])
        assert all(word and not word.startswith(" ") for word in domains_sets.CLASSES[name].values())


def test_prompts_are_the_authors_words():
    words = domains_sets.CLASSES
    for name, key, word in [
        ("remote/mlrsnet", "harbor&port", "harbor and port"),
        ("remote/patternnet", "intersection", "inter section"),
        ("remote/aid", "Dense Residential", "Dense Residential Area"),
        ("remote/rsscn7", "RiverLake", "River or Lake"),
        ("remote/whurs19", "Commerical", "Commerical Area"),
        ("remote/nwpu", "thermal_power_station", "thermal power station"),
        ("medical/btmri", "notumor", "no brain tumor"),
    ]:
        assert words[name][key] == word
    assert set(words["remote/rsicd"]) - set(words["remote/aid"]) == {"Playfields"}
    for name, renamed in domains_sets.WHOLE_SET_NAMES.items():
        assert set(renamed) <= set(words[name].values())


@pytest.mark.parametrize("below", ["{folder}", "{own}"])
@pytest.mark.parametrize("name", SETS)
def test_the_authors_layout(name, below, tmp_path):
    folder, own = DATASETS[name].folders  # below the domain's folder, or directly in the data folder as theirs
    classes = sorted(domains_sets.CLASSES[name])
    tree(tmp_path / below.format(folder=folder, own=own) / own, classes, each=4)
    sets = splits(name, tmp_path)
    assert {p: len(s) / len(classes) for p, s in sets.items()} == {"train": 2, "val": 1, "test": 1, "all": 4}
    assert sets["train"].class_names == tuple(domains_sets.CLASSES[name][key] for key in classes)
    assert sets["train"].classes == len(classes) and sets["train"].name == name
    for images in sets.values():
        assert [Path(source).parent.name for source in images.sources] == [classes[label] for label in images.labels]
    together = [source for part in ("train", "val", "test") for source in sets[part].sources]
    assert sorted(together) == sorted(sets["all"].sources) and len(set(together)) == len(together)
    assert data.status(name, tmp_path).state == "present"


RELEASED = {
    "remote/mlrsnet": ("Images", "jpg", {}),
    "remote/patternnet": ("PatternNet/images", "jpg", {"swimmimg_pool": "swimming_pool"}),
    "remote/rsscn7": ("", "jpg", {new: old for old, new in domains_sets.RELEASED_AS["remote/rsscn7"].items()}),
    "remote/aid": ("", "jpg", {"Dense Residential": "DenseResidential"}),
    "remote/ucm": ("UCMerced_LandUse/Images", "tif", {}),
    "remote/whurs19": ("", "jpg", {"Commerical": "Commercial"}),
    "remote/nwpu": ("NWPU-RESISC45", "jpg", {}),
    "medical/chmnist": (
        "Kather_texture_2016_image_tiles_5000",
        "tif",
        {new: old for old, new in domains_sets.RELEASED_AS["medical/chmnist"].items()},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_archives_layout_gives_the_same_labels(name, tmp_path):
    place, ending, renamed = RELEASED[name]
    classes = sorted(domains_sets.CLASSES[name])
    tree(tmp_path / DATASETS[name].folders[0] / place, [renamed.get(key, key) for key in classes], 4, ending)
    tree(tmp_path / "authors" / DATASETS[name].folders[1] / DATASETS[name].folders[1], classes, 4, ending)
    released, authors = splits(name, tmp_path), splits(name, tmp_path / "authors")
    for part in domains.SPLITS:
        assert list(released[part].labels) == list(authors[part].labels)
        assert values(released[part]) == values(authors[part])  # the split does not depend on the layout
    assert data.status(name, tmp_path).state == "present"


def test_released_folders_get_the_authors_words_and_other_spellings_keep_theirs(tmp_path):
    tree(tmp_path / "remote/RSSCN7", domains_sets.RELEASED_AS["remote/rsscn7"])
    words = ("Field", "Forest", "Grass", "Industrial Area", "Parking", "Residential Area", "River or Lake")
    assert load("remote/rsscn7", tmp_path, "test").class_names == words
    assert load("remote/rsscn7", tmp_path, "all").class_names[-1] == "River Lake"  # as for domain generalisation
    keys = [key.replace("Dense Residential", "DenseResidential") for key in domains_sets.CLASSES["remote/aid"]]
    tree(tmp_path / "remote/AID", keys)
    names = load("remote/aid", tmp_path, "test").class_names
    assert "DenseResidential" in names and "Dense Residential Area" not in names and "Center Area" in names


def test_both_folders_of_the_brain_tumour_archive_are_one_set(tmp_path):
    classes = sorted(domains_sets.CLASSES["medical/btmri"])
    tree(tmp_path / "medical/BTMRI/Training", classes, 6)
    tree(tmp_path / "medical/BTMRI/Testing", classes[1:], 4)
    images = load("medical/btmri", tmp_path, "all")
    assert Counter(images.labels) == {0: 6, 1: 10, 2: 10, 3: 10}
    assert {Path(source).parts[-3] for source in images.sources} == {"Training", "Testing"}
    assert data.status("medical/btmri", tmp_path).state == "present"


def test_capitals_come_first_in_the_order_of_classes(tmp_path):
    """As Python sorts and so the authors' code: "Normal" is a base class, "footballField" a novel one."""
    tree(tmp_path / "CCBTM/CCBTM", domains_sets.CLASSES["medical/ccbtm"])
    assert load("medical/ccbtm", tmp_path, "test").class_names[0] == "normal"
    tree(tmp_path / "WHURS19/WHURS19", domains_sets.CLASSES["remote/whurs19"])
    names = load("remote/whurs19", tmp_path, "test").class_names
    assert names[-2:] == ("Football Field", "Railway Station")
    assert "Football Field" in halves(names)[1]


@pytest.mark.parametrize(
    ("count", "expected"), [(10, (5, 2, 3)), (5, (2, 1, 2)), (7, (4, 1, 2)), (625, (312, 125, 188))]
)
def test_cut_sizes_round_as_the_authors(count, expected):
    assert tuple(domains_sets.split_sizes(count).values()) == expected


def test_cut_is_per_class_shuffled_and_the_same_every_time(btmri, tmp_path):
    sets = splits("medical/btmri", tmp_path)
    image, label = load("medical/btmri", str(tmp_path), "train", clip_transform(INPUT))[0]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32 and type(label) is int
    assert sets["train"][0][0].shape == (3, 10, 12)
    refused(BadParameter, "'train', 'val', 'test', 'all'", load, "medical/btmri", tmp_path, "trainval")
    for part, size in {"train": 5, "val": 2, "test": 3}.items():
        assert Counter(sets[part].labels) == dict.fromkeys(range(4), size)
        assert list(sets[part].sources) == list(load("medical/btmri", tmp_path, part).sources)
    drawn = [[Path(s).name for s in sets["train"].sources if f"/{name}/" in s] for name in ("glioma", "pituitary")]
    assert drawn[0] != sorted(drawn[0]) and drawn[0] != drawn[1]
    for name in ("BTMRI/glioma/._0.jpg", "BTMRI/glioma/Thumbs.db", "BTMRI/readme.txt", "BTMRI/.cache/x.jpg"):
        (btmri / name).parent.mkdir(exist_ok=True)
        (btmri / name).write_bytes(b"nothing")  # hidden files and other files are no images
    (btmri / "split_fewshot").mkdir()  # the authors' code leaves it there
    assert len(load("medical/btmri", tmp_path, "all")) == 40
    picture(btmri / "BTMRI/pituitary/x.jpg")  # an image more changes nothing in the other classes
    before, after = (
        [s for s in images.sources if "pituitary" not in s]
        for images in (sets["train"], load("medical/btmri", tmp_path, "train"))
    )
    assert before == after


def test_the_cut_is_pinned(tmp_path):
    """If another NumPy drew another order, results would no longer be on the same test images."""
    base = tree(tmp_path / "medical/BTMRI/BTMRI", sorted(domains_sets.CLASSES["medical/btmri"]), 20)
    order = ",".join(str(Path(s).relative_to(base)) for s in load("medical/btmri", tmp_path, "test").sources)
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == "2f2a93532d3c216a"


def test_a_list_of_splits_is_followed(btmri, tmp_path):
    listed(btmri)
    sets = splits("medical/btmri", tmp_path)
    assert [Path(s).name for s in sets["train"].sources] == ["7.jpg", "3.jpg"] * 4
    assert list(sets["train"].labels) == [0, 0, 1, 1, 2, 2, 3, 3] and list(sets["test"].labels) == [0, 1, 2, 3]
    assert values(sets["test"]) == [0, 10, 20, 30]
    assert sets["val"].class_names == ("glioma", "meningioma", "no brain tumor", "pituitary")
    assert len(sets["all"]) == 16
    assert "split by split_cao_BTMRI.json" in data.status("medical/btmri", tmp_path).detail
    listed(btmri, val=[["glioma/1.jpg", "0", "glioma"]])  # a label as text
    assert list(load("medical/btmri", tmp_path, "val").labels) == [0]
    assert domains_sets.split_file("remote/nwpu") == "split_cao_NWPU.json"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (["glioma/0.jpg", 0], "expected [path, label, class name], found ['glioma/0.jpg', 0]"),
        *(
            (entry, "expected [path, label, class name]")
            for entry in ("glioma/0.jpg", {"path": "x"}, ["", 0, "glioma"])
        ),
        *((["glioma/0.jpg", k, "glioma"], "expected [path, label, class name]") for k in ("zero", -1, True, 0.5)),
        (["glioma/0.jpg", 0, None], "expected [path, label, class name]"),
        (["glioma/0.jpg", 4, "glioma"], "label 4 is not in 0..3"),
        (["glioma/0.jpg", 0, "tumour"], "label 0 is 'tumour' here, and 'glioma' further up"),
        (["glioma/0.jpg", 1, "meningioma"], "glioma/0.jpg has label 1, others of its folder have 0"),
        (["glioma/7.jpg", 0, "glioma"], "glioma/7.jpg is already in 'train'"),
        (["../../../secret.jpg", 0, "glioma"], "leaves the data set's folder"),
        (["/etc/secret.jpg", 0, "glioma"], "leaves the data set's folder"),
    ],
)
def test_entries_that_are_refused(entry, reason, btmri, tmp_path):
    path = listed(btmri, test=[["pituitary/0.jpg", 3, "pituitary"], entry])
    with pytest.raises(CorruptFile) as error:
        load("medical/btmri", tmp_path, "train")
    assert error.value.path == path
    assert "'test', entry 2: " in str(error.value) and reason in str(error.value)
    assert data.status("medical/btmri", tmp_path).state == "incomplete"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a dict with the lists 'train', 'val' and 'test'"),
        ('{"train": [], "val": []}', "expected a dict with the lists"),
        ('{"train": 1, "val": [], "test": []}', "expected a dict with the lists"),
        ('{"train": [["a/1.jpg", 0, "a"]], "val": [], "test": [["a/2.jpg", 0, "a"]]}', "'val' is empty"),
        (
            '{"train": [["a/1.jpg", 0, "a"]], "val": [["b/1.jpg", 2, "b"]], "test": [["b/2.jpg", 2, "b"]]}',
            "no image has the label 1, and there are 4 classes",
        ),
    ],
)
def test_lists_that_are_refused(content, reason, btmri, tmp_path):
    (btmri / "split_cao_BTMRI.json").write_text(content)
    with pytest.raises(CorruptFile) as error:
        splits("medical/btmri", tmp_path)
    assert error.value.path == btmri / "split_cao_BTMRI.json" and reason in str(error.value)


def test_class_folders_that_are_missing_or_strange_are_named(btmri, tmp_path):
    (tmp_path / "remote/AID/something").mkdir(parents=True)
    refused(MissingData, "has no class folders", splits, "remote/aid", tmp_path)
    for number in range(2, 10):
        (btmri / f"BTMRI/notumor/{number}.jpg").unlink()
    with pytest.raises(MissingData, match=r"notumor below .* has 2 images, too few for train, val and test"):
        splits("medical/btmri", tmp_path)
    for path in (btmri / "BTMRI/glioma").iterdir():
        path.unlink()
    refused(MissingData, r"the class folder glioma below .*BTMRI has no images", splits, "medical/btmri", tmp_path)
    (btmri / "BTMRI/glioma").rmdir()
    refused(MissingData, r"1 of 4 class folders below .*: glioma", splits, "medical/btmri", tmp_path)
    assert "1 of 4 class folders" in data.status("medical/btmri", tmp_path).detail
    picture(btmri / "BTMRI/cats/0.jpg")
    refused(CorruptFile, r"no class of Brain tumour MRI \(BTMRI\): cats", splits, "medical/btmri", tmp_path)


def test_another_number_of_images_than_is_known(btmri, tmp_path, monkeypatch):
    sizes = {"train": 20, "val": 8, "test": 12, "all": 40}
    expect(monkeypatch, "medical/btmri", sizes=sizes)
    assert len(load("medical/btmri", tmp_path, "train")) == 20
    (btmri / "BTMRI/glioma/0.jpg").unlink()
    refused(MissingData, r"has \d+ images for '\w+', \d+ are expected", splits, "medical/btmri", tmp_path)
    assert "are expected" in data.status("medical/btmri", tmp_path).detail


def test_listed_images_missing(btmri, tmp_path):
    listed(btmri)
    (btmri / "BTMRI/glioma/3.jpg").unlink()
    images = load("medical/btmri", tmp_path, "train")  # opening looks at the first and last of each split only
    refused(MissingData, r"3\.jpg is listed but not there", lambda: images[1])
    found = data.status("medical/btmri", tmp_path)
    assert found.state == "incomplete" and "1 of 16 listed images are not there" in found.detail
    (btmri / "BTMRI/glioma/7.jpg").unlink()
    with pytest.raises(MissingData, match=r"split_cao_BTMRI\.json lists glioma/7\.jpg, but .* is not there"):
        load("medical/btmri", tmp_path, "train")


@pytest.mark.parametrize("place", ["", "images"])
def test_own_folder(place, tmp_path):
    tree(tmp_path / place, ("owl", "Bear", "cat"), 10)
    sets = own_folder(tmp_path, clip_transform(INPUT))
    assert sets["test"].class_names == ("Bear", "cat", "owl") and sets["test"].name == tmp_path.name
    assert {part: len(images) for part, images in sets.items()} == {"train": 15, "val": 6, "test": 9, "all": 30}
    assert sets["test"][0][0].shape == (3, 28, 28)
    assert base_to_novel(sets, shots=5).tests["novel"].class_names == ("owl",)


def test_own_folder_with_its_list(tmp_path):
    tree(tmp_path, ("b", "a"), 3)
    refused(MissingData, "images of your own", own_folder, tmp_path / "nowhere")
    content = {
        part: [[f"{name}/{number}.jpg", label, f"a {name}"] for label, name in enumerate("ba")]
        for number, part in enumerate(("train", "val", "test"))
    }
    (tmp_path / "split.json").write_text(json.dumps(content))
    sets = own_folder(tmp_path)
    assert sets["val"].class_names == ("a b", "a a") and values(sets["val"]) == [1, 11]


def test_own_folder_that_is_split_already(tmp_path):
    for part, each in (("train", 5), ("val", 2), ("test", 3)):
        tree(tmp_path / part, ("owl", "Bear", "cat"), each)
    sets = own_folder(tmp_path, clip_transform(INPUT))
    assert {part: len(images) for part, images in sets.items()} == {"train": 15, "val": 6, "test": 9, "all": 24 + 6}
    assert {images.class_names for images in sets.values()} == {("Bear", "cat", "owl")}
    assert sets["all"][29][1] == 2 and sets["all"][29][0].shape == (3, 28, 28)
    assert base_to_novel(sets, shots=5).tests["novel"].class_names == ("owl",)
    for path in (tmp_path / "test").rglob("*.jpg"):
        path.unlink()
    refused(MissingData, "no images in", own_folder, tmp_path)
    (tmp_path / "test").rename(tmp_path / "unused")
    refused(MissingData, r"there is no folder .*test", own_folder, tmp_path)
    (tmp_path / "empty").mkdir()
    refused(MissingData, "has no class folders", own_folder, tmp_path / "empty")


def test_a_set_made_here_can_be_registered(tmp_path, monkeypatch):
    changes = {"name": "pocket/far", "group": "pocket", "classes": 2, "folders": ("pocket/far",)}
    made = dataclasses.replace(DATASETS["remote/ucm"], sizes={"train": 4, "test": 2}, **changes)
    monkeypatch.setitem(DATASETS, "pocket/far", made)
    tree(tmp_path / "pocket/far/images", ("moon", "sun"), 4, "png")
    with pytest.raises(MissingData, match=r"split\.json is not there"):  # its splits are not for us to invent
        splits("pocket/far", tmp_path)
    assert data.status("pocket/far", tmp_path).state == "incomplete"
    content = {
        part: [[f"{name}/{n}.png", label, name] for label, name in enumerate(("moon", "sun")) for n in numbers]
        for part, numbers in {"train": (0, 1), "val": (2,), "test": (3,)}.items()
    }
    (tmp_path / "pocket/far/split.json").write_text(json.dumps(content))
    sets = splits("pocket/far", tmp_path)
    assert values(sets["train"]) == [0, 1, 10, 11] and sets["test"].class_names == ("moon", "sun")
    assert data.status("pocket/far", tmp_path).state == "present"
    (tmp_path / "pocket/far/split.json").write_text(json.dumps(content | {"test": content["test"][:1]}))
    refused(MissingData, "has 1 images for 'test', 2 are expected", splits, "pocket/far", tmp_path)


def test_transforms_are_clips():
    """Against torchvision's first transforms, written as CLIP and Dassl have them."""
    given = SimpleNamespace(size=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    pixels = np.random.default_rng(0).integers(0, 255, (301, 402, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels)
    last = [v1.ToTensor(), v1.Normalize(given.mean, given.std)]
    bicubic = v1.InterpolationMode.BICUBIC
    test = v1.Compose([v1.Resize(224, interpolation=bicubic), v1.CenterCrop(224), *last])
    cut = v1.RandomResizedCrop(224, scale=(0.08, 1), interpolation=bicubic)
    train = v1.Compose([cut, v1.RandomHorizontalFlip(), *last])
    torch.testing.assert_close(clip_transform(given)(photograph), test(photograph))
    for seed in range(4):
        torch.manual_seed(seed)
        ours = clip_transform(given, train=True)(photograph)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, train(photograph))


@pytest.fixture
def torchgeo(monkeypatch) -> SimpleNamespace:
    """A stand-in that unpacks what the archives hold; `fail` is raised instead when it is set."""
    control = SimpleNamespace(fail=None, calls=[])
    places = {"PatternNet": "PatternNet/images", "UCMerced": "UCMerced_LandUse/Images", "RESISC45": "NWPU-RESISC45"}

    def reader(class_name: str, name: str):
        def download(root, download=False, checksum=False):
            control.calls.append((class_name, download, checksum))
            (Path(root) / "archive.zip").write_bytes(b"zip")
            if control.fail:
                raise control.fail
            tree(Path(root) / places[class_name], domains_sets.CLASSES[name])

        return download

    package = ModuleType("torchgeo")
    package.datasets = SimpleNamespace(**{c: reader(c, name) for name, c in domains_sets.TORCHGEO.items()})
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    return control


@pytest.mark.parametrize("name", domains_sets.TORCHGEO)
def test_fetch_through_torchgeo(name, torchgeo, tmp_path):
    folder = data.fetch(name, tmp_path, progress=False)
    assert folder == tmp_path / DATASETS[name].folders[0]
    assert torchgeo.calls == [(domains_sets.TORCHGEO[name], True, True)]  # with its checksum
    assert data.status(name, tmp_path).state == "present"
    assert not list(folder.glob("*.zip")) and not list(tmp_path.glob(".fetch-*"))
    data.fetch(name, tmp_path, progress=False)
    assert len(torchgeo.calls) == 1  # what is there is left alone


def test_a_failed_download_leaves_nothing(torchgeo, tmp_path):
    for failure in (OSError("no route"), RuntimeError("File not found or corrupted.")):
        torchgeo.fail = failure
        with pytest.raises(CompanionError, match=rf"UC Merced land use could not be downloaded \({failure}\)"):
            data.fetch("remote/ucm", tmp_path, progress=False)
        assert not list(tmp_path.iterdir())


def test_without_torchgeo_fetch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    refused(CompanionError, "pip install torchgeo", data.fetch, "remote/nwpu", tmp_path)
    assert [name for name in SETS if DATASETS[name].fetchable] == list(domains_sets.TORCHGEO)
