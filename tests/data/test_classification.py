"""The classification readers, on fake data in the real layouts: a few tiny images, sizes made to fit."""

import hashlib
import io
import json
import pickle
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from companion import data
from companion.data import DATASETS, classification
from companion.data.classification import crop_transform, image_folder, in_memory, load, resize_transform
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from tests.data.conftest import expect, picture, refused, values

INPUT = SimpleNamespace(size=28, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))


def shrink(monkeypatch, name: str, classes: int | None, train: int, val: int, test: int) -> None:
    """Let `name` expect a set of this size."""
    sizes = {"train": train, "val": val, "trainval": train + val, "test": test}
    expect(monkeypatch, name, classes=classes, sizes=sizes)


LABELS = {"train800": [0, 1, 2], "val200": [2, 0], "train800val200": [0, 1, 2, 2, 0], "test": [1, 1, 0, 2]}


def vtab(root: Path, folder: str = "vtab-1k/cifar") -> Path:
    """VTAB-1k's layout; image values are 10 x the index in the list, + 1 / 2 / 3 for val / trainval / test."""
    for offset, (split, answers) in enumerate(LABELS.items()):
        paths = [f"images/{split}/{index:06d}.png" for index in range(len(answers))]
        for index, path in enumerate(paths):
            picture(root / folder / path, 10 * index + offset)
        lines = (f"{path} {label}\n" for path, label in zip(paths, answers, strict=True))
        (root / folder / f"{split}.txt").write_text("".join(lines))
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


def dtd(root: Path, folder: str = "hta/dtd") -> Path:
    """Two classes, 3 + 2 + 2 images."""
    base = root / folder / "dtd"
    (base / "labels").mkdir(parents=True)
    lists = {"train": "zigzag/a banded/b zigzag/c", "val": "banded/d zigzag/e", "test": "banded/f zigzag/g"}
    for number, (split, names) in enumerate((split, text.split()) for split, text in lists.items()):
        (base / f"labels/{split}1.txt").write_text("".join(f"{name}.png\n" for name in names))
        for index, name in enumerate(names):
            picture(base / "images" / f"{name}.png", 10 * number + index)
    return root / folder


def food101(root: Path) -> Path:
    """Two classes with 10 training and 2 test images each."""
    folder = root / "hta/food-101"
    (folder / "meta").mkdir(parents=True)
    value = 0
    for split, count in (("train", 10), ("test", 2)):
        listing = {}
        for name in ("apple_pie", "waffles"):
            listing[name] = [f"{name}/{split}{index}" for index in range(count)]
            for path in listing[name]:
                picture(folder / "images" / f"{path}.jpg", value)
                value += 1
        (folder / f"meta/{split}.json").write_text(json.dumps(listing))
    return folder


def gtsrb(root: Path) -> Path:
    """Two classes with 5 training images each, 3 test images."""
    folder = root / "hta/gtsrb"
    for index in range(10):
        picture(folder / f"GTSRB/Training/{index // 5:05d}/{index:05d}.ppm", index)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index, label in enumerate([1, 0, 1]):
        picture(folder / f"GTSRB/Final_Test/Images/{index:05d}.ppm", 100 + index)
        rows.append(f"{index:05d}.ppm;12;10;1;1;9;9;{label}")
    (folder / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return folder


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar10(root: Path, monkeypatch) -> Path:
    """Two batches of 5 training images of brightness 0..9, labels 0 1 2 0 1 ..., and 4 test images."""
    folder = root / "hta/cifar-10-batches-py"
    folder.mkdir(parents=True)

    def batch(name: str, numbers: range) -> list[str]:
        pixels = np.repeat(np.array(numbers, dtype=np.uint8)[:, None], 3072, axis=1)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [n % 3 for n in numbers]}))
        return [name, md5(folder / name)]

    train = [batch("data_batch_1", range(5)), batch("data_batch_2", range(5, 10))]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [batch("test_batch", range(100, 104))])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return folder


def svhn(root: Path, monkeypatch) -> Path:
    """10 training and 4 test images; SVHN writes the digit 0 as 10."""
    folder = root / "hta/svhn"
    folder.mkdir(parents=True)
    listing = {}
    for split, count in (("train", 10), ("test", 4)):
        pixels = np.broadcast_to(np.arange(count, dtype=np.uint8), (32, 32, 3, count))
        labels = np.array([[10 if n % 3 == 0 else n % 3] for n in range(count)], dtype=np.uint8)
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": labels})
        listing[split] = ["unused", f"{split}_32x32.mat", md5(folder / f"{split}_32x32.mat")]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listing)
    return folder


def test_vtab_lists(small_vtab, tmp_path):
    for offset, (split, labels) in enumerate(zip(classification.SPLITS, LABELS.values(), strict=True)):
        images = load("vtab/cifar100", tmp_path, split)
        assert (images.name, images.classes, list(images.labels)) == ("vtab/cifar100", 3, labels)
        assert values(images) == [10 * index + offset for index in range(len(labels))]
    refused(BadParameter, "'train', 'val', 'trainval', 'test'", load, "vtab/cifar100", tmp_path, "training")
    image, label = load("vtab/cifar100", str(tmp_path), "val", resize_transform(INPUT))[1]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32 and (type(label), label) == (int, 0)
    plain, _ = load("vtab/cifar100", tmp_path, "val")[1]
    assert plain.shape == (3, 10, 12) and torch.all(plain == torch.tensor(11 / 255))
    assert data.status("vtab/cifar100", tmp_path).state == "present"
    images = load("vtab/cifar100", tmp_path, "test", resize_transform(INPUT))
    batch, labels = next(iter(DataLoader(images, batch_size=4, num_workers=1)))  # with a worker process
    assert batch.shape == (4, 3, 28, 28) and labels.tolist() == [1, 1, 0, 2] and labels.dtype == torch.int64
    assert data.fetch("vtab/cifar100", tmp_path) == small_vtab  # what is present is left alone


def test_pocket_textures_take_the_number_of_classes_from_the_lists(tmp_path, monkeypatch):
    shrink(monkeypatch, "pocket/textures", None, 3, 2, 4)
    vtab(tmp_path, "pocket/textures")
    assert load("pocket/textures", tmp_path, "test").classes == 3


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "") for name in ("fgvc/cub200", "fgvc/flowers102", "fgvc/dogs120", "fgvc/cars196", "hta/cub200")),
        ("fgvc/dogs120", "Stanford-dogs"),  # as the readme spells them
        ("fgvc/cars196", "Stanford-cars"),
    ],
)
def test_fgvc_lists(name, folder, tmp_path, monkeypatch):
    shrink(monkeypatch, name, 3, 3, 2, 4)
    fgvc(tmp_path, name.partition("/")[2], folder)
    read = {split: load(name, tmp_path, split) for split in classification.SPLITS}
    assert list(read["train"].labels) == [0, 2, 1]
    assert list(read["trainval"].labels) == [0, 2, 1, 2, 0]
    assert values(read["trainval"]) == [0, 1, 2, 3, 4]
    assert values(read["test"]) == [5, 6, 7, 8]
    assert data.status(name, tmp_path).state == "present"


def test_class_ids_of_cub_and_nabirds(tmp_path, monkeypatch):
    """CUB's may be written as text; NABirds' are numbered in their sorted order over all splits."""
    for name in ("fgvc/cub200", "fgvc/nabirds"):
        shrink(monkeypatch, name, 3, 3, 2, 4)
    fgvc(tmp_path, "cub200", ids={split: [f"{i:03d}" for i in ids] for split, ids in IDS.items()})
    assert list(load("fgvc/cub200", tmp_path, "test").labels) == [1, 1, 0, 2]
    fgvc(tmp_path, "nabirds", ids={"train": [1010, 295, 700], "val": [1010, 295], "test": [700, 700, 295, 1010]})
    # a split without some class must keep the numbers of the others
    for split, labels in {"train": [2, 0, 1], "val": [2, 0], "test": [1, 1, 0, 2]}.items():
        assert list(load("fgvc/nabirds", tmp_path, split).labels) == labels


def test_hta_dtd_uses_its_first_list(tmp_path, monkeypatch):
    shrink(monkeypatch, "hta/dtd", 2, 3, 2, 2)
    dtd(tmp_path)
    read = {split: load("hta/dtd", tmp_path, split) for split in ("train", "trainval", "test")}
    assert [values(part) for part in read.values()] == [[0, 1, 2], [0, 1, 2, 10, 11], [20, 21]]
    assert list(read["train"].labels) == [1, 0, 1]
    assert data.status("hta/dtd", tmp_path).state == "present"


@pytest.mark.parametrize(("name", "make", "train"), [("hta/food101", food101, 20), ("hta/gtsrb", gtsrb, 10)])
def test_hta_sets_sorted_by_class_are_shuffled_once_and_cut(name, make, train, tmp_path, monkeypatch):
    cut = int(0.8 * train)
    shrink(monkeypatch, name, 2, cut, train - cut, {"hta/food101": 4, "hta/gtsrb": 3}[name])
    make(tmp_path)
    read = {split: load(name, tmp_path, split) for split in classification.SPLITS}
    assert values(read["trainval"]) == values(read["train"]) + values(read["val"])
    assert sorted(values(read["trainval"])) == list(range(train))
    assert values(read["train"]) != sorted(values(read["train"]))
    assert list(read["val"].sources) == list(load(name, tmp_path, "val").sources)
    for split in ("train", "val"):  # labels moved with their images
        assert list(read[split].labels) == [value // (train // 2) for value in values(read[split])]
    assert list(read["test"].labels) == ([0, 0, 1, 1] if name == "hta/food101" else [1, 0, 1])
    assert data.status(name, tmp_path).state == "present"


@pytest.mark.parametrize(
    ("key", "length", "digest"), [("food101", 75750, "3eb9d1a3e6977fa8"), ("gtsrb", 26640, "964f8fdebc48f7b2")]
)
def test_the_seeded_cut_of_the_real_sets_is_pinned(key, length, digest):
    """If another NumPy drew another order, results would no longer be on the same validation images."""
    order = ",".join(map(str, classification._order(key, length)))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("name", "make"), [("hta/cifar10", cifar10), ("hta/svhn", svhn)])
def test_hta_arrays_are_cut_in_file_order(name, make, tmp_path, monkeypatch):
    shrink(monkeypatch, name, 3, 8, 2, 4)
    make(tmp_path, monkeypatch)
    read = {split: load(name, tmp_path, split) for split in classification.SPLITS}
    assert values(read["train"]) == list(range(8)) and values(read["val"]) == [8, 9]
    assert values(read["trainval"]) == list(range(10))
    assert list(read["trainval"].labels) == [n % 3 for n in range(10)]
    assert len(read["test"]) == 4 and read["test"][0][0].shape == (3, 32, 32)
    assert data.status(name, tmp_path).state == "present"


def test_images_or_a_list_missing(small_vtab, tmp_path):
    (small_vtab / "images/train800/000001.png").unlink()
    images = load("vtab/cifar100", tmp_path, "train")  # opening looks at the first and last image only
    refused(MissingData, r"000001\.png is listed but not there", lambda: images[1])
    said = f"1 of 14 listed images are not there, the first: {small_vtab / 'images/train800/000001.png'}"
    assert data.status("vtab/cifar100", tmp_path) == data.Status("incomplete", said)
    (small_vtab / "images/train800/000000.png").unlink()
    with pytest.raises(MissingData, match=r"train800\.txt is there, but the image .*000000\.png is not"):
        load("vtab/cifar100", tmp_path, "train")
    (small_vtab / "test.txt").unlink()
    refused(MissingData, r"test\.txt is not there", load, "vtab/cifar100", tmp_path, "test")
    assert len(load("vtab/cifar100", tmp_path, "val")) == 2
    assert data.status("vtab/cifar100", tmp_path).state == "incomplete"


@pytest.mark.parametrize("lines", [2, 4])
def test_list_of_another_length(lines, small_vtab, tmp_path):
    rows = (small_vtab / "train800.txt").read_text().splitlines(keepends=True)
    (small_vtab / "train800.txt").write_text("".join((rows * 2)[:lines]))
    with pytest.raises(MissingData, match=rf"train800\.txt gives {lines} images for 'train', 3 expected"):
        load("vtab/cifar100", tmp_path, "train")
    found = data.status("vtab/cifar100", tmp_path)
    assert found.state == "incomplete" and f"gives {lines} images" in found.detail


@pytest.mark.parametrize(
    ("split", "ids", "error", "said"),
    [
        ("train", [295, 295, 700], MissingData, "names 2 classes, 3 expected"),
        ("val", [1, 7], CorruptFile, r"the class 7 is not a class of train\.json"),
    ],
)
def test_nabirds_with_other_classes(split, ids, error, said, tmp_path, monkeypatch):
    shrink(monkeypatch, "fgvc/nabirds", 3, 3, 2, 4)
    fgvc(tmp_path, "nabirds", ids={**IDS, split: ids})
    refused(error, said, load, "fgvc/nabirds", tmp_path, split)


@pytest.mark.parametrize(
    ("make", "name", "gone"),
    [
        (dtd, "hta/dtd", "dtd/labels/val1.txt"),
        (food101, "hta/food101", "meta/train.json"),
        (gtsrb, "hta/gtsrb", "GT-final_test.csv"),
    ],
)
def test_hta_lists_missing(make, name, gone, tmp_path):
    folder = make(tmp_path)
    (folder / gone).unlink()
    found = data.status(name, tmp_path)
    assert found.state == "incomplete" and f"{gone} is not there" in found.detail
    if make is gtsrb:
        for path in (folder / "GTSRB/Training/00001").iterdir():
            path.unlink()
        refused(MissingData, "00001", load, "hta/gtsrb", tmp_path, "train")


def test_hta_archive_missing_or_damaged(tmp_path, monkeypatch):
    shrink(monkeypatch, "hta/cifar10", 3, 8, 2, 4)
    folder = cifar10(tmp_path, monkeypatch)
    batch = folder / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:-5])
    refused(CorruptFile, r"data_batch_2: it has not the published MD5", load, "hta/cifar10", tmp_path, "train")
    assert data.status("hta/cifar10", tmp_path).state == "incomplete"
    batch.unlink()
    refused(MissingData, r"data_batch_2 is not there", load, "hta/cifar10", tmp_path, "test")
    assert "data_batch_2 is not there" in data.status("hta/cifar10", tmp_path).detail


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image at all"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "ppm"])
def test_image_truncated_or_no_image(damage, suffix, small_vtab, tmp_path):
    path = small_vtab / f"images/train800/x.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(damage(path.read_bytes()))
    listing = small_vtab / "train800.txt"
    listing.write_text(listing.read_text().replace("000001.png", path.name))
    images = load("vtab/cifar100", tmp_path, "train")
    refused(CorruptFile, rf"images/train800/x\.{suffix}", lambda: images[1])


FORM = "expected 'relative/path label'"
OUTSIDE = ("../../", "images/../../../", "/etc/", "C:\\", "images\\..\\..\\")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *((f"1.png{label}", FORM) for label in ("", " one", " -1", " 1.0", " " + "9" * 5000)),
        *((row, FORM) for row in ("", " 1")),
        ("images/train800/000001.png 3", "label 3 is not in 0..2"),
        *((f"{path}secret.png 1", "leaves the data set's folder") for path in OUTSIDE),
    ],
)
def test_list_lines_that_are_refused(row, reason, small_vtab, tmp_path):
    listing = small_vtab / "train800.txt"
    rows = listing.read_text().splitlines()
    listing.write_text("\n".join([rows[0], row, rows[2]]) + "\n")
    with pytest.raises(CorruptFile) as error:
        load("vtab/cifar100", tmp_path, "train")
    assert all(part in str(error.value) for part in (str(listing), "line 2: ", reason))
    assert data.status("vtab/cifar100", tmp_path).state == "incomplete"


def test_list_paths_may_hold_spaces_and_dots(small_vtab, tmp_path):
    picture(small_vtab / "images/a b/..c.png", 77)
    listing = small_vtab / "train800.txt"
    listing.write_text(listing.read_text().replace("images/train800/000001.png", "images/a b/..c.png"))
    assert values(load("vtab/cifar100", tmp_path, "train")) == [0, 77, 20]
    listing.write_bytes(b"\xff\xfe\x00")
    refused(CorruptFile, r"train800\.txt: not text", load, "vtab/cifar100", tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a.jpg": 1,\n "b.jpg": }', r"not JSON .*line 2"),
        ("[1, 2, 3]", "expected a dict from paths to class ids"),
        ('{"a.jpg": "one"}', "'a.jpg': the class id 'one' is no whole number"),
        ('{"a.jpg": 1.5}', "the class id 1.5 is no whole number"),
        ('{"a.jpg": true}', "the class id True is no whole number"),
        ('{"a.jpg": 0}', "'a.jpg': the class 0 is not in 1..3"),
        ('{"a.jpg": 4}', "'a.jpg': the class 4 is not in 1..3"),
        ('{"../../a.jpg": 1}', "leaves the data set's folder"),
    ],
)
def test_json_lists_that_are_refused(content, reason, tmp_path, monkeypatch):
    shrink(monkeypatch, "fgvc/cars196", 3, 3, 2, 4)
    folder = fgvc(tmp_path, "cars196")
    (folder / "val.json").write_text(content)
    with pytest.raises(CorruptFile, match=reason) as error:
        load("fgvc/cars196", tmp_path, "trainval")
    assert error.value.path == folder / "val.json"
    assert data.status("fgvc/cars196", tmp_path).state == "incomplete"


@pytest.mark.parametrize(
    ("make", "name", "listing", "content"),
    [
        (dtd, "hta/dtd", "dtd/labels/test1.txt", "banded/f.png\nno slash\n"),
        (dtd, "hta/dtd", "dtd/labels/test1.txt", "banded/f.png\n../g.png\n"),
        (food101, "hta/food101", "meta/test.json", "{"),
        (food101, "hta/food101", "meta/test.json", "[]"),
        (food101, "hta/food101", "meta/test.json", '{"waffles": ["../../../secret"]}'),
        (food101, "hta/food101", "meta/test.json", '{"a": ["a/1"], "b": ["b/1"], "c": ["c/1"]}'),
        (gtsrb, "hta/gtsrb", "GT-final_test.csv", "Filename;Width\n00000.ppm;12\n"),
        (gtsrb, "hta/gtsrb", "GT-final_test.csv", "Filename;ClassId\n00000.ppm;x\n"),
        (gtsrb, "hta/gtsrb", "GT-final_test.csv", "Filename;ClassId\n00000.ppm;2\n"),
        (gtsrb, "hta/gtsrb", "GT-final_test.csv", "Filename;ClassId\n../../../x.ppm;1\n"),
    ],
)
def test_hta_lists_that_are_refused(make, name, listing, content, tmp_path, monkeypatch):
    shrink(monkeypatch, name, 2, 8, 2, 2)
    folder = make(tmp_path)
    (folder / listing).write_text(content)
    with pytest.raises(CorruptFile) as error:
        load(name, tmp_path, "test")
    assert error.value.path == folder / listing


def test_transforms_are_those_of_the_released_code():
    """Against torchvision's first transforms, written as the authors have them, at 224 with mean = std = 0.5."""
    given = SimpleNamespace(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 255, (301, 402, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels)
    last = [v1.ToTensor(), v1.Normalize((0.5,) * 3, (0.5,) * 3)]
    vtab_theirs = v1.Compose([v1.Resize((224, 224)), *last])
    fgvc_theirs = v1.Compose([v1.Resize(256), v1.CenterCrop(224), *last])
    fgvc_train = v1.Compose([v1.Resize(256), v1.RandomCrop(224), v1.RandomHorizontalFlip(0.5), *last])
    torch.testing.assert_close(resize_transform(given)(photograph), vtab_theirs(photograph))
    torch.testing.assert_close(crop_transform(given, train=False)(photograph), fgvc_theirs(photograph))
    for seed in range(4):
        torch.manual_seed(seed)
        ours = crop_transform(given, train=True)(photograph)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, fgvc_train(photograph))
    for train in (True, False):  # at another size the crop keeps its proportion
        assert crop_transform(INPUT, train)(photograph).shape == (3, 28, 28)
    assert crop_transform(INPUT, train=False).transforms[0].size == [32]


def test_in_memory_decodes_once(small_vtab, tmp_path, monkeypatch):
    images = load("vtab/cifar100", tmp_path, "test", resize_transform(INPUT))
    kept = in_memory(images)
    assert (kept.name, kept.classes, len(kept)) == ("vtab/cifar100", 3, 4)
    stacked, labels = kept.tensors
    assert stacked.dtype == torch.float32 and labels.dtype == torch.int64 and labels.tolist() == [1, 1, 0, 2]
    expected = [images[index][0] for index in range(4)]
    monkeypatch.setattr(Image, "open", None)
    for _ in range(2):
        batch = next(iter(DataLoader(kept, batch_size=4)))[0]
        torch.testing.assert_close(batch, torch.stack(expected))


def test_in_memory_refuses_what_it_cannot_keep(small_vtab, tmp_path, monkeypatch):
    with pytest.raises(BadParameter, match="RandomCrop"):
        in_memory(load("vtab/cifar100", tmp_path, "test", crop_transform(INPUT, train=True)))
    picture(small_vtab / "images/test/000002.png", 5, size=(9, 9))
    with pytest.raises(BadParameter, match=r"\(3, 10, 12\) and \(3, 9, 9\).*same size"):
        in_memory(load("vtab/cifar100", tmp_path, "test"))
    monkeypatch.setattr(classification.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    refused(CompanionError, "read it from disk", in_memory, load("vtab/cifar100", tmp_path, "train"))


def test_opening_a_long_list_does_not_look_at_every_file(tmp_path, monkeypatch):
    shrink(monkeypatch, "vtab/dsprites_location", 16, 800, 200, 73728)
    folder = tmp_path / "vtab-1k/dsprites_loc"
    picture(folder / "first.png", 1)
    rows = ["first.png 0", *(f"images/{i}.png {i % 16}" for i in range(73726)), "first.png 15"]
    (folder / "test.txt").write_text("\n".join(rows) + "\n")
    images = load("vtab/dsprites_location", tmp_path, "test")
    assert len(images) == 73728 and images[-1][1] == 15


def own(root: Path, counts: dict[str, int], first: int = 0) -> None:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index:02d}.jpg", first + index)


def test_image_folder_without_splits_is_cut_by_class(tmp_path):
    own(tmp_path, {"cat": 10, "dog": 20, "single": 1})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    sets = image_folder(tmp_path, val_fraction=0.2, seed=3, transform=resize_transform(INPUT))
    assert set(sets) == {"train", "val", "trainval"}
    train, val = sets["train"], sets["val"]
    assert train.class_names == ("cat", "dog", "single") and train.classes == 3
    assert [val.labels.count(label) for label in range(3)] == [2, 4, 0]
    assert not set(train.sources) & set(val.sources)
    assert len(train) + len(val) == len(sets["trainval"]) == 31
    assert train[0][0].shape == (3, 28, 28)
    again, other = (image_folder(tmp_path, val_fraction=0.2, seed=seed)["val"] for seed in (3, 4))
    assert again.sources == val.sources != other.sources


def test_image_folder_with_splits(tmp_path):
    for first, split in enumerate(("train", "val", "test")):
        own(tmp_path / split, {"a": 2, "b": 1}, first=50 * first)
    sets = image_folder(tmp_path)
    assert set(sets) == {"train", "val", "trainval", "test"}
    assert list(sets["test"].labels) == [0, 0, 1] and values(sets["test"]) == [100, 101, 100]
    assert values(sets["val"]) == [50, 51, 50]
    (tmp_path / "val/a").rename(tmp_path / "val/c")
    refused(CorruptFile, "lacks: c", image_folder, tmp_path)
    own(tmp_path / "classes", {"car": 3, "train": 3})  # a class may be called train; hidden files are no images
    (tmp_path / "classes/car/._00.jpg").write_bytes(b"left by a Mac")
    sets = image_folder(tmp_path / "classes")
    assert sets["train"].class_names == ("car", "train") and len(sets["trainval"]) == 6


def test_image_folder_bad_input(tmp_path):
    refused(MissingData, r"<class>/<image>\.jpg", image_folder, tmp_path / "nowhere")
    refused(MissingData, "no class folders", image_folder, tmp_path)
    own(tmp_path, {"cat": 3})
    (tmp_path / "dog").mkdir()
    refused(MissingData, r"no images in .*dog", image_folder, tmp_path)
    for fraction in (0, 1, -0.5):
        refused(BadParameter, "val_fraction", image_folder, tmp_path, val_fraction=fraction)
    own(tmp_path / "parted/test", {"cat": 3})
    refused(MissingData, r"no folder .*train", image_folder, tmp_path / "parted")


def test_pictures_of_ones_own_are_turned_as_the_camera_says(small_vtab, tmp_path):
    own(tmp_path / "mine", {"cat": 2, "dog": 2})
    turned = Image.new("RGB", (12, 10))
    turned.getexif()[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "mine/cat/00.jpg", exif=turned.getexif())
    mine = image_folder(tmp_path / "mine")["trainval"]
    assert {mine.picture(i).size for i in range(4)} == {(10, 12), (12, 10)}
    public = load("vtab/cifar100", tmp_path, "train")
    turned.save(public.sources[0], exif=turned.getexif())
    assert public.picture(0).size == (12, 10)  # the papers' code does not look


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_become_eight(ending, tmp_path):
    own(tmp_path, {"cat": 2, "dog": 2})
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(tmp_path / f"cat/deep.{ending}")
    images = image_folder(tmp_path)["trainval"]
    (index,) = [i for i, path in enumerate(images.sources) if path.endswith(ending)]
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(np.asarray(images.picture(index)), expected)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [n for n, d in DATASETS.items() if d.task == "classification" and d.fetchable])
def test_fetch_offline_is_one_clear_error(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(CompanionError, match=r"could not be downloaded \(Name or service not known\)") as error:
        data.fetch(name, tmp_path / "data")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert list((tmp_path / "data").iterdir()) == []


@pytest.fixture
def served_dtd(served, tmp_path, monkeypatch) -> Path:
    """torchvision's DTD now comes from a server on this machine; returns the archive."""
    shrink(monkeypatch, "hta/dtd", 2, 3, 2, 2)
    folder, server = served
    archive = folder / "dtd-r1.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(dtd(tmp_path / "made") / "dtd", "dtd")
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{server}/{archive.name}")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(archive))
    return archive


@pytest.mark.parametrize("progress", [True, False])
def test_fetch_downloads_verifies_and_unpacks(progress, served_dtd, tmp_path, capfd):
    root = tmp_path / "data"
    assert data.fetch("hta/dtd", root, progress=progress) == root / "hta/dtd"
    assert data.status("hta/dtd", root).state == "present"
    assert values(load("hta/dtd", root, "test")) == [20, 21]
    assert [path.name for path in root.iterdir()] == ["hta"] and not list(root.rglob("*.gz"))
    assert bool(capfd.readouterr().err) == progress
    # an incomplete copy is completed, and other files are not removed
    (root / "hta/dtd/dtd/images/banded/f.png").unlink()
    (root / "hta/dtd/notes.txt").write_text("mine")
    data.fetch("hta/dtd", root, progress=False)
    assert data.status("hta/dtd", root).state == "present" and (root / "hta/dtd/notes.txt").read_text() == "mine"


def test_fetch_of_a_damaged_download_keeps_nothing(served_dtd, tmp_path):
    served_dtd.write_bytes(served_dtd.read_bytes()[:-20])
    refused(CompanionError, "could not be downloaded", data.fetch, "hta/dtd", tmp_path / "data", progress=False)
    assert files(tmp_path / "data") == []


def test_fetch_refuses_an_archive_that_writes_outside(served_dtd, tmp_path, monkeypatch):
    with tarfile.open(served_dtd, "w:gz") as tar:
        member = tarfile.TarInfo("../../../escaped.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(served_dtd))
    before = tarfile.TarFile.__dict__.get("extraction_filter")
    refused(CompanionError, "outside", data.fetch, "hta/dtd", tmp_path / "data", progress=False)
    assert files(tmp_path / "data") == [] and not list(tmp_path.rglob("escaped.txt"))
    assert tarfile.TarFile.__dict__.get("extraction_filter") is before


def test_fetch_writes_flowers_in_the_layout_of_fgvc(served, tmp_path, monkeypatch):
    shrink(monkeypatch, "fgvc/flowers102", 3, 3, 2, 4)
    made, (served, server) = tmp_path / "made", served
    for number in range(1, 10):
        picture(made / f"jpg/image_{number:05d}.jpg", number)
    with tarfile.open(served / "102flowers.tgz", "w:gz") as tar:
        tar.add(made / "jpg", "jpg")
    scipy.io.savemat(served / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3]])})
    splits = {"trnid": [[9, 1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7, 8]]}
    scipy.io.savemat(served / "setid.mat", {key: np.array(ids) for key, ids in splits.items()})
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    reader = torchvision.datasets.Flowers102
    monkeypatch.setattr(reader, "_download_url_prefix", f"{server}/")
    monkeypatch.setattr(reader, "_file_dict", {key: (name, md5(served / name)) for key, name in names.items()})
    data.fetch("fgvc/flowers102", tmp_path / "data", progress=False)
    train = load("fgvc/flowers102", tmp_path / "data", "train")
    assert values(train) == [9, 1, 2] and list(train.labels) == [2, 0, 1]
    assert values(load("fgvc/flowers102", tmp_path / "data", "test")) == [5, 6, 7, 8]
