"""The classification readers: small sets in the real layouts, by file and label; broken lists; downloads."""

import hashlib
import json
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from torch.utils.data import DataLoader

from companion import data
from companion.data import classification
from companion.data.classification import SPLITS, crop_transform, load, own, resize_transform
from companion.errors import CompanionError, CorruptFile, MissingData
from tests.data.conftest import expect, items, picture, refused, unreadable, values

INPUT = SimpleNamespace(size=28, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
LISTS = {"train": "train800", "val": "val200", "trainval": "train800val200", "test": "test"}
LABELS = {"train": [0, 1, 2], "val": [2, 0], "trainval": [0, 1, 2, 2, 0], "test": [1, 1, 0, 2]}


def shrink(monkeypatch, name: str, classes: int | None, train: int, val: int, test: int) -> None:
    """Let `name` expect a set of this size."""
    sizes = {"train": train, "val": val, "trainval": train + val, "test": test}
    expect(monkeypatch, name, classes=classes, sizes=sizes)


def read(name: str, root: Path) -> list[list[tuple[int, int]]]:
    """Brightness and label of each image of train, val, trainval and test."""
    return [items(load(name, root, split)) for split in SPLITS]


def vtab(root: Path, folder: str = "vtab-1k/cifar") -> Path:
    """VTAB-1k's layout; image values are 10 x the index in the list, + 1 / 2 / 3 for val / trainval / test."""
    for offset, (split, answers) in enumerate(LABELS.items()):
        rows = [f"images/{split}/{index}.png {label}\n" for index, label in enumerate(answers)]
        for index, row in enumerate(rows):
            picture(root / folder / row.split()[0], 10 * index + offset)
        (root / folder / f"{LISTS[split]}.txt").write_text("".join(rows))
    return root / folder


@pytest.fixture
def small_vtab(tmp_path, monkeypatch) -> Path:
    """The folder of a small "vtab/cifar100" below tmp_path."""
    shrink(monkeypatch, "vtab/cifar100", 3, 3, 2, 4)
    return vtab(tmp_path)


FGVC = {
    "cub200": ("CUB_200_2011", "images/001.Albatross/a{}.jpg", "001.Albatross/a{}.jpg"),
    "nabirds": ("nabirds", "images/0295/{}.jpg", "0295/{}.jpg"),
    "flowers102": ("OxfordFlower", "jpg/image_{}.jpg", "jpg/image_{}.jpg"),
    "dogs120": ("dogs", "Images/n02-Chihuahua/n{}.jpg", "n02-Chihuahua/n{}.jpg"),
    "cars196": ("cars", "cars_train/{}.jpg", "cars_train/{}.jpg"),
}
IDS = {"train": [1, 3, 2], "val": [3, 1], "test": [2, 2, 1, 3]}


def fgvc(root: Path, key: str, folder: str = "", ids: dict[str, list] = IDS) -> Path:
    usual, path, listed = FGVC[key]
    folder = root / "fgvc" / (folder or usual)
    number = 0
    for split, answers in ids.items():
        listing = {}
        for class_id in answers:
            picture(folder / path.format(number), number)
            listing[listed.format(number)] = class_id
            number += 1
        (folder / f"{split}.json").write_text(json.dumps(listing))
    return folder


def dtd(root: Path, *_) -> Path:
    base = root / "hta/dtd"
    (base / "labels").mkdir(parents=True)
    lists = {"train": "zigzag/a banded/b zigzag/c", "val": "banded/d zigzag/e", "test": "banded/f zigzag/g"}
    for number, (split, names) in enumerate(lists.items()):
        (base / f"labels/{split}1.txt").write_text("".join(f"{name}.png\n" for name in names.split()))
        for index, name in enumerate(names.split()):
            picture(base / "images" / f"{name}.png", 10 * number + index)
    return base


def food101(root: Path, *_) -> Path:
    folder = root / "hta/food-101"
    (folder / "meta").mkdir(parents=True)
    for split, first, count in (("train", 0, 5), ("test", 100, 2)):
        listing = {name: [f"{name}/{split}{i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        for value, path in enumerate(listing["apple_pie"] + listing["waffles"], first):
            picture(folder / "images" / f"{path}.jpg", value)
        (folder / f"meta/{split}.json").write_text(json.dumps(listing))
    return folder


def gtsrb(root: Path, *_) -> Path:
    folder = root / "hta/gtsrb"
    for index in range(10):
        picture(folder / f"GTSRB/Training/{index // 5:05d}/{index:05d}.ppm", index)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index, label in enumerate([0, 0, 1, 1]):
        picture(folder / f"GTSRB/Final_Test/Images/{index:05d}.ppm", 100 + index)
        rows.append(f"{index:05d}.ppm;12;10;1;1;9;9;{label}")
    (folder / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return folder


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(root: Path, monkeypatch, key: str = "cifar10") -> Path:
    """Ten training images of brightness 0..9, and 4 test images; in two classes, of CIFAR-10 in two batches."""
    reader, names = getattr(torchvision.datasets, key.upper()), ("data_batch_1", "data_batch_2", "test_batch")
    if key == "cifar100":
        names = ("train", "train", "test")
    (folder := root / "hta" / reader.base_folder).mkdir(parents=True)
    batches: dict[str, list[int]] = {name: [] for name in names}
    for name, numbers in zip(names, (range(5), range(5, 10), range(100, 104)), strict=True):
        batches[name] += numbers
    labels = "labels" if key == "cifar10" else "fine_labels"
    contents = {
        name: {"data": np.repeat(np.uint8(numbers)[:, None], 3072, 1), labels: [n % 2 for n in numbers]}
        for name, numbers in batches.items()
    } | {reader.meta["filename"]: {reader.meta["key"]: ["a", "b"]}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    *train, test, meta = ([name, md5(folder / name)] for name in contents)
    monkeypatch.setattr(reader, "train_list", train)
    monkeypatch.setattr(reader, "test_list", [test])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": meta[1]})
    return folder


def svhn(root: Path, monkeypatch) -> Path:
    """10 training and 4 test images; SVHN writes the digit 0 as 10."""
    folder = root / "hta/svhn"
    folder.mkdir(parents=True)
    listing = {}
    for split, numbers in (("train", np.arange(10)), ("test", np.arange(100, 104))):
        pixels = np.broadcast_to(numbers.astype(np.uint8), (32, 32, 3, len(numbers)))
        labels = np.where(numbers % 2, 1, 10).astype(np.uint8)[:, None]
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": labels})
        listing[split] = ["unused", f"{split}_32x32.mat", md5(folder / f"{split}_32x32.mat")]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listing)
    return folder


def test_vtab(tmp_path, monkeypatch):
    name = "vtab/cifar100"
    shrink(monkeypatch, name, 3, 3, 2, 4)
    folder = vtab(tmp_path)
    expected = [
        [(10 * i + offset, label) for i, label in enumerate(labels)] for offset, labels in enumerate(LABELS.values())
    ]
    assert read(name, tmp_path) == expected and load(name, tmp_path, "test").classes == 3
    images = load(name, str(tmp_path), "test", resize_transform(INPUT))
    batch, labels = next(iter(DataLoader(images, batch_size=4, num_workers=1)))  # with a worker process
    assert batch.shape == (4, 3, 28, 28) and labels.tolist() == [1, 1, 0, 2] and labels.dtype == torch.int64
    images.transform = crop_transform(INPUT, train=True)
    assert images[0][0].shape == (3, 28, 28)
    assert data.fetch(name, tmp_path) == folder  # what is present is left alone
    images = load(name, tmp_path, "train")  # opening looks at the first and last image only
    (folder / "images/train/1.png").write_text("<!DOCTYPE html>")
    refused(CorruptFile, r"train/1\.png.*listed in train800\.txt", lambda: images[1])
    (folder / "images/train/1.png").unlink()
    refused(MissingData, r"train/1\.png is listed in train800\.txt", lambda: images[1])
    refused(MissingData, r"listed images of train800\.txt", data.present, name, tmp_path, "train")
    assert "train/1.png" in data.status(name, tmp_path).detail
    (folder / "images/train/0.png").unlink()
    refused(MissingData, r"train/0\.png", load, name, tmp_path, "train")
    rows = (folder / "train800.txt").read_text()
    bad = "1.png", "1.png -1", "1.png 1.0", " 1", "1.png 3", "../../1.png 1", "/etc/1.png 1", "C:\\1.png 1"
    contents: dict[str | bytes, str] = {rows.replace("images/train/1.png 1", row): "line 2" for row in bad}
    unreadable(folder / "train800.txt", lambda: load(name, tmp_path, "train"), contents | {b"\xff\xfe\x00": ""})


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "") for name in ("fgvc/cub200", "fgvc/flowers102", "fgvc/dogs120", "fgvc/cars196", "hta/cub200")),
        ("fgvc/dogs120", "Stanford-dogs"),  # as the readme spells them
    ],
)
def test_fgvc(name, folder, tmp_path, monkeypatch):
    shrink(monkeypatch, name, 3, 3, 2, 4)
    fgvc(tmp_path, name.partition("/")[2], folder)
    train, val, test = [(0, 0), (1, 2), (2, 1)], [(3, 2), (4, 0)], [(5, 1), (6, 1), (7, 0), (8, 2)]
    assert read(name, tmp_path) == [train, val, train + val, test]
    assert data.status(name, tmp_path).state == "present"


def test_class_ids_of_cub_are_text_and_those_of_nabirds_are_sorted_over_all_splits(tmp_path, monkeypatch):
    for name in ("fgvc/cub200", "fgvc/nabirds"):
        shrink(monkeypatch, name, 3, 3, 2, 4)
    folder = fgvc(tmp_path, "cub200", ids={split: [f"{i:03d}" for i in ids] for split, ids in IDS.items()})
    assert list(load("fgvc/cub200", tmp_path, "test").labels) == [1, 1, 0, 2]
    contents = {f'{{"a.jpg": {label}}}': "" for label in ('"one"', "1.5", "true")}
    contents |= {f'{{"a.jpg": {label}}}': "a.jpg" for label in (0, 4)} | {'{"../a.jpg": 1}': "../a.jpg", "[1]": ""}
    unreadable(folder / "val.json", lambda: load("fgvc/cub200", tmp_path, "trainval"), contents)
    ids = {"train": [1010, 295, 700], "val": [1010, 295], "test": [700, 700, 295, 1010]}
    folder = fgvc(tmp_path, "nabirds", ids=ids)
    assert [list(load("fgvc/nabirds", tmp_path, split).labels) for split in ids] == [[2, 0, 1], [2, 0], [1, 1, 0, 2]]
    unreadable(folder / "val.json", lambda: load("fgvc/nabirds", tmp_path, "val"), {'{"a.jpg": 7}': "a.jpg"})


OFFICIAL_LABELS = [1 + (i % 3 == 0) for i in range(70)]  # of 60 images for training and 10 for testing


def official(folder: Path, key: str, cars: str = "car_ims") -> list[str]:
    """The files of the official split; returns the paths of the images. With `cars` = "cars_train" those of Stanford
    Cars are as in torchvision."""
    labels, numbers = np.array(OFFICIAL_LABELS), np.arange(1, 71)
    if key in ("cub200", "nabirds"):
        paths = [f"{label:03d}.Bird/{image}.jpg" for image, label in enumerate(OFFICIAL_LABELS)]
        ids = numbers if key == "cub200" else [f"0010a930-{i:04x}" for i in range(70)]
        columns = {"images": paths, "image_class_labels": labels, "train_test_split": np.int64(numbers <= 60)}
        for name, column in columns.items():
            rows = [f"{image} {value}\n" for image, value in zip(ids, column, strict=True)]
            (folder / f"{name}.txt").write_text("".join(rows))
        return paths
    if key == "flowers102":
        parts = {"trnid": numbers[:54], "valid": numbers[54:60], "tstid": numbers[60:]}
        files = {"imagelabels": {"labels": labels}, "setid": parts}
        paths = [f"jpg/image_{i:05d}.jpg" for i in numbers]
    elif key == "dogs120":
        paths = [f"n02-Dog/n02_{i}.jpg" for i in numbers]
        listed = np.array(paths, dtype=object)[:, None]
        parts = {"train": slice(60), "test": slice(60, 70)}
        files = {f"{s}_list": {"file_list": listed[part], "labels": labels[part, None]} for s, part in parts.items()}
    elif cars == "cars_train":
        paths = [f"cars_train/{i:05d}.jpg" for i in range(1, 61)] + [f"cars_test/{i:05d}.jpg" for i in range(1, 11)]
        fields = [(name, object) for name in ("bbox_x1", "class", "fname")]
        rows = [(1, OFFICIAL_LABELS[i], path.partition("/")[2]) for i, path in enumerate(paths)]
        names = {"devkit/cars_train_annos": rows[:60], "cars_test_annos_withlabels": rows[60:]}
        files = {name: {"annotations": np.array([part], dtype=fields)} for name, part in names.items()}
    else:
        paths = [f"car_ims/{i:06d}.jpg" for i in numbers]
        fields = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
        rows = [(path, 1, OFFICIAL_LABELS[i], int(i >= 60)) for i, path in enumerate(paths)]
        files = {"devkit/cars_annos": {"annotations": np.array([rows], dtype=fields)}}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        scipy.io.savemat(folder / f"{name}.mat", content)
    return paths


@pytest.mark.parametrize(("key", "images_in"), [*((key, "car_ims") for key in FGVC), ("cars196", "cars_train")])
def test_lists_from_the_official_split_are_stratified_and_named_as_not_vpts(key, images_in, tmp_path, monkeypatch):
    name, images = f"fgvc/{key}", classification.IMAGES[key]
    shrink(monkeypatch, name, 2, 54, 6, 10)
    folder = tmp_path / "fgvc" / FGVC[key][0]
    folder.mkdir(parents=True)
    paths = official(folder, key, images_in)
    for i, path in enumerate(paths):
        picture(folder / images / path, i)
    refused(MissingData, r"train.json .*official_lists\('fgvc", load, name, tmp_path, "train")
    out = classification.official_lists(name, tmp_path)
    lists = {split: json.loads((out / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    labels = dict(zip(paths, OFFICIAL_LABELS, strict=True))
    assert {**lists["train"], **lists["val"]} == {path: labels[path] for path in paths[:60]}
    assert lists["test"] == {path: labels[path] for path in paths[60:]} and len(lists["val"]) == 6
    if key == "flowers102":
        assert list(lists["val"]) == paths[54:60]
    else:
        assert sorted(lists["val"].values()) == [1, 1, 1, 1, 2, 2]  # as the classes are in training
    assert not lists["train"].keys() & lists["val"].keys()
    with pytest.warns(UserWarning, match="not VPT's"):
        found = load(name, tmp_path, "test")
    assert "not VPT's" in found.name and items(found) == [(60 + i, OFFICIAL_LABELS[60 + i] - 1) for i in range(10)]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_bytes((out / f"{split}.json").read_bytes())
    assert load(name, tmp_path, "test").name == name  # VPT's lists come first
    refused(MissingData, "val.json", load, name, tmp_path, "val")  # and are not mixed with others


def test_official_splits_that_are_short_or_damaged_are_refused(tmp_path, monkeypatch):
    shrink(monkeypatch, "fgvc/cub200", 2, 54, 6, 10)
    (folder := tmp_path / "fgvc/CUB_200_2011").mkdir(parents=True)
    refused(MissingData, "images.txt", classification.official_lists, "fgvc/cub200", tmp_path)
    official(folder, "cub200")
    whole = (folder / "images.txt").read_text()
    (folder / "images.txt").write_text(whole[: whole.index("70 ")])
    refused(MissingData, "9 images for 'test' .* 10 are", classification.official_lists, "fgvc/cub200", tmp_path)
    (folder / "images.txt").write_text("71 a.jpg\n")
    refused(CorruptFile, r"images\.txt", classification.official_lists, "fgvc/cub200", tmp_path)
    assert not list(tmp_path.rglob(classification.NOT_VPT))


ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]  # of the ten training images
HTA = {
    "hta/dtd": (dtd, [(0, 1), (1, 0), (2, 1)], [(10, 0), (11, 1)], [(20, 0), (21, 1)]),
    **{
        name: (make, [(i, i // 5) for i in ORDER[:8]], [(8, 1), (1, 0)], [(100 + i, i // 2) for i in range(4)])
        for name, make in {"hta/food101": food101, "hta/gtsrb": gtsrb}.items()
    },
    **{
        name: (make, [(i, i % 2) for i in range(8)], [(8, 0), (9, 1)], [(100 + i, i % 2) for i in range(4)])
        for name, make in {"hta/cifar10": cifar, "hta/svhn": svhn}.items()
    },
}


@pytest.mark.parametrize("name", HTA)
def test_hta_is_split_in_file_order_or_shuffled_once_where_it_is_sorted_by_class(name, tmp_path, monkeypatch):
    make, train, val, test = HTA[name]
    shrink(monkeypatch, name, 2, len(train), len(val), len(test))
    folder = make(tmp_path, monkeypatch)
    if name in ("hta/dtd", "hta/gtsrb", "hta/food101"):  # as torchvision numbers and orders them
        reader, place = classification._TORCHVISION[name]
        (beside := tmp_path / "torchvision" / place).parent.mkdir(parents=True)
        beside.symlink_to(folder)
        for split, items_of in {"train": sorted(train + val) if name != "hta/dtd" else train, "test": test}.items():
            theirs = reader(tmp_path / "torchvision", split=split)
            values_of = [(int(np.asarray(picture)[0, 0, 0]), label) for picture, label in theirs]
            assert values_of == items_of
    assert read(name, tmp_path) == [train, val, train + val, test]
    assert data.status(name, tmp_path).state == "present"
    if name == "hta/gtsrb":
        contents = {f"Filename;ClassId\n{row}\n": "" for row in ("0;x", "0;2", "../x;1")}
        unreadable(folder / "GT-final_test.csv", lambda: load(name, tmp_path, "test"), contents)
    if name == "hta/cifar10":  # of another MD5
        (folder / "data_batch_2").write_bytes(b"")
        refused(MissingData, "MD5", load, name, tmp_path, "train")
        assert data.status(name, tmp_path).state == "incomplete"
        assert items(load(name, tmp_path, "test")) == test  # which is whole


@pytest.mark.parametrize(("length", "digest"), [(75750, "3eb9d1a3e6977fa8"), (26640, "964f8fdebc48f7b2")])
def test_the_shuffle_of_food101_and_gtsrb_is_pinned(length, digest):
    order = ",".join(map(str, classification._shuffled(length)))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == digest


def classes_of(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index:02d}.jpg", index)


def test_image_folder_without_splits_is_split_by_class(tmp_path):
    classes_of(tmp_path, {"cat": 10, "dog": 20, "single": 1})
    sets = own(tmp_path, val_fraction=0.2, seed=3)
    train, val = sets["train"], sets["val"]
    assert train.class_names == ("cat", "dog", "single") and set(sets) == {"train", "val", "trainval"}
    assert items(val) == [(6, 0), (9, 0), (3, 1), (4, 1), (5, 1), (7, 1)]
    everything = [(i, label) for label, count in enumerate((10, 20, 1)) for i in range(count)]
    assert items(train) == [item for item in everything if item not in items(val)]
    assert items(sets["trainval"]) == items(train) + items(val)
    assert own(tmp_path, seed=4)["val"].sources != val.sources


@pytest.mark.parametrize("root", [".", "", "link"])
def test_files_that_are_not_read_are_counted_without_hidden_ones(root, tmp_path, monkeypatch):
    classes_of(tmp_path / "own", {"cat": 3, "dog": 3})
    for name in ("notes.txt", "cat/more/a.TXT", "cat/LICENSE", ".git/a.txt", "__MACOSX/a.txt", "dog/._a.txt"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).touch()
    (tmp_path / "own/dog/gone.txt").symlink_to("nowhere")
    (tmp_path / "own/dog/again.png").symlink_to(tmp_path / "own/cat/0.png")
    (tmp_path / "link").symlink_to("own")
    monkeypatch.chdir(tmp_path / "own" if root == "." else tmp_path)
    monkeypatch.delattr(Path, "rglob")  # a million files are not a million objects
    with pytest.warns(UserWarning, match=r"not read: 2 \.txt file\(s\), 1 LICENSE file\(s\)$"):
        assert len(own(root or tmp_path / "own")["trainval"]) == 7


@pytest.mark.parametrize("name", ["../../outside.txt", "/outside.txt", "dtd/link"])
def test_an_archive_with_a_member_outside_of_its_folder_is_refused(name, served, tmp_path, monkeypatch):
    folder, server = served
    archive, member = folder / "dtd-r1.0.1.tar.gz", tarfile.TarInfo(name)
    if name.endswith("link"):
        member.type, member.linkname = tarfile.SYMTYPE, "../../../../outside.txt"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member)
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{server}/{archive.name}")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(archive))
    with pytest.raises(CompanionError):
        data.fetch("hta/dtd", tmp_path / "data", progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink() or "outside" in path.name]


def test_fetch_downloads_verifies_and_unpacks(served, tmp_path, monkeypatch):
    shrink(monkeypatch, "hta/dtd", 2, 3, 2, 2)
    (folder, server), root = served, tmp_path / "data"
    archive = folder / "dtd-r1.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(dtd(tmp_path / "made"), "dtd")
    whole = archive.read_bytes()
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{server}/{archive.name}")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(archive))
    archive.write_bytes(whole[:-20])
    refused(CompanionError, "DTD|Textures", data.fetch, "hta/dtd", root, progress=False)
    assert not [path for path in root.rglob("*") if path.is_file()]
    archive.write_bytes(whole)
    assert data.fetch("hta/dtd", root, progress=False) == root / "hta/dtd"
    assert data.status("hta/dtd", root).state == "present"
    assert [path.name for path in root.iterdir()] == ["hta"] and not list(root.rglob("*.gz"))
    # an incomplete copy is completed, and other files are not removed
    (root / "hta/dtd/images/banded/f.png").unlink()
    (root / "hta/dtd/notes.txt").write_text("mine")
    data.fetch("hta/dtd", root, progress=False)
    assert values(load("hta/dtd", root, "test")) == [20, 21] and (root / "hta/dtd/notes.txt").read_text() == "mine"
