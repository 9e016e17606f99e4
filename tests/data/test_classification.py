"""The classification readers: small sets in the real layouts, by file and label; broken lists; downloads."""

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
from torch.utils.data import DataLoader

from companion import cli, data
from companion.data import classification
from companion.data.classification import SPLITS, crop_transform, image_folder, in_memory, load, resize_transform
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
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
    base = root / "hta/dtd/dtd"
    (base / "labels").mkdir(parents=True)
    lists = {"train": "zigzag/a banded/b zigzag/c", "val": "banded/d zigzag/e", "test": "banded/f zigzag/g"}
    for number, (split, names) in enumerate(lists.items()):
        (base / f"labels/{split}1.txt").write_text("".join(f"{name}.png\n" for name in names.split()))
        for index, name in enumerate(names.split()):
            picture(base / "images" / f"{name}.png", 10 * number + index)
    return root / "hta/dtd"


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


def cifar10(root: Path, monkeypatch) -> Path:
    """Two batches of 5 training images of brightness 0..9, and 4 test images."""
    folder = root / "hta/cifar-10-batches-py"
    folder.mkdir(parents=True)

    def batch(name: str, numbers: range) -> list[str]:
        pixels = np.repeat(np.array(numbers, dtype=np.uint8)[:, None], 3072, axis=1)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [n % 2 for n in numbers]}))
        return [name, md5(folder / name)]

    train = [batch("data_batch_1", range(5)), batch("data_batch_2", range(5, 10))]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [batch("test_batch", range(100, 104))])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
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
    name, folder = "vtab/cifar100", "vtab-1k/cifar"
    shrink(monkeypatch, name, 3, 3, 2, 4)
    vtab(tmp_path, folder)
    expected = [
        [(10 * i + offset, label) for i, label in enumerate(labels)] for offset, labels in enumerate(LABELS.values())
    ]
    assert read(name, tmp_path) == expected and load(name, tmp_path, "test").classes == 3
    assert data.status(name, tmp_path).state == "present"
    images = load(name, str(tmp_path), "test", resize_transform(INPUT))
    batch, labels = next(iter(DataLoader(images, batch_size=4, num_workers=1)))  # with a worker process
    assert batch.shape == (4, 3, 28, 28) and labels.tolist() == [1, 1, 0, 2] and labels.dtype == torch.int64
    assert data.fetch(name, tmp_path) == tmp_path / folder  # what is present is left alone


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "") for name in ("fgvc/cub200", "fgvc/flowers102", "fgvc/dogs120", "fgvc/cars196", "hta/cub200")),
        ("fgvc/dogs120", "Stanford-dogs"),  # as the readme spells them
        ("fgvc/cars196", "Stanford-cars"),
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
    fgvc(tmp_path, "cub200", ids={split: [f"{i:03d}" for i in ids] for split, ids in IDS.items()})
    assert list(load("fgvc/cub200", tmp_path, "test").labels) == [1, 1, 0, 2]
    ids = {"train": [1010, 295, 700], "val": [1010, 295], "test": [700, 700, 295, 1010]}
    folder = fgvc(tmp_path, "nabirds", ids=ids)
    assert [list(load("fgvc/nabirds", tmp_path, split).labels) for split in ids] == [[2, 0, 1], [2, 0], [1, 1, 0, 2]]
    unreadable(folder / "val.json", lambda: load("fgvc/nabirds", tmp_path, "val"), {'{"a.jpg": 7}': "7"})


OFFICIAL_LABELS = [1 + (i % 3 == 0) for i in range(70)]  # of 60 images for training and 10 for testing


def birds(folder: Path, ids: list[str]) -> list[str]:
    paths = [f"{label:03d}.Bird/{image}.jpg" for image, label in enumerate(OFFICIAL_LABELS)]
    learned = [int(image < 60) for image in range(70)]
    for name, column in (("images", paths), ("image_class_labels", OFFICIAL_LABELS), ("train_test_split", learned)):
        rows = [f"{image} {value}\n" for image, value in zip(ids, column, strict=True)]
        (folder / f"{name}.txt").write_text("".join(rows))
    return paths


def cub(folder: Path) -> list[str]:
    return birds(folder, [str(i) for i in range(1, 71)])


def nabirds(folder: Path) -> list[str]:
    return birds(folder, [f"0010a930-{i:04x}" for i in range(70)])


def flowers(folder: Path) -> list[str]:
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([OFFICIAL_LABELS])})
    numbers = np.arange(1, 71)[None]
    parts = {"trnid": numbers[:, :54], "valid": numbers[:, 54:60], "tstid": numbers[:, 60:]}
    scipy.io.savemat(folder / "setid.mat", parts)
    return [f"jpg/image_{i:05d}.jpg" for i in range(1, 71)]


def dogs(folder: Path) -> list[str]:
    paths = [f"n02-Dog/n02_{i}.jpg" for i in range(70)]
    for split, part in (("train", slice(60)), ("test", slice(60, 70))):
        columns = {"file_list": np.array(paths, dtype=object)[part, None]}
        columns["labels"] = np.array(OFFICIAL_LABELS)[part, None]
        scipy.io.savemat(folder / f"{split}_list.mat", columns)
    return paths


def cars(folder: Path) -> list[str]:
    paths = [f"car_ims/{i:06d}.jpg" for i in range(1, 71)]
    fields = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
    rows = [(path, 1, OFFICIAL_LABELS[i], int(i >= 60)) for i, path in enumerate(paths)]
    (folder / "devkit").mkdir()
    scipy.io.savemat(folder / "devkit" / "cars_annos.mat", {"annotations": np.array([rows], dtype=fields)})
    return paths


@pytest.mark.parametrize(("key", "make"), [*zip(FGVC, (cub, nabirds, flowers, dogs, cars), strict=True)])
def test_lists_from_the_official_split_are_stratified_and_named_as_not_vpts(key, make, tmp_path, monkeypatch):
    name, images = f"fgvc/{key}", classification.IMAGES[key]
    shrink(monkeypatch, name, 2, 54, 6, 10)
    folder = tmp_path / "fgvc" / FGVC[key][0]
    folder.mkdir(parents=True)
    paths = make(folder)
    for i, path in enumerate(paths):
        picture(folder / images / path, i)
    refused(MissingData, "train.json", load, name, tmp_path, "train")
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
    before = [(out / f"{split}.json").read_bytes() for split in lists]
    classification.official_lists(name, tmp_path)
    assert [(out / f"{split}.json").read_bytes() for split in lists] == before
    with pytest.warns(UserWarning, match="not VPT's"):
        found = load(name, tmp_path, "test")
    assert "not VPT's" in found.name and items(found) == [(60 + i, OFFICIAL_LABELS[60 + i] - 1) for i in range(10)]
    assert data.status(name, tmp_path).state == "present" and "not VPT's" in data.status(name, tmp_path).detail
    for split in ("train", "val", "test"):  # VPT's lists come first
        (folder / f"{split}.json").write_bytes((out / f"{split}.json").read_bytes())
    assert load(name, tmp_path, "test").name == name and "VPT" not in data.status(name, tmp_path).detail
    (folder / "val.json").unlink()  # and are not mixed with others
    refused(MissingData, "val.json", load, name, tmp_path, "val")


def test_official_splits_that_are_short_or_damaged_are_refused(tmp_path, monkeypatch):
    for name in ("vtab/dtd", "hta/dtd"):
        refused(BadParameter, "fgvc/cub200", classification.official_lists, name, tmp_path)
    refused(MissingData, "CUB_200_2011", classification.official_lists, "fgvc/cub200", tmp_path)
    shrink(monkeypatch, "fgvc/cub200", 2, 54, 6, 10)
    folder = tmp_path / "fgvc/CUB_200_2011"
    folder.mkdir(parents=True)
    refused(MissingData, "images.txt", classification.official_lists, "fgvc/cub200", tmp_path)
    cub(folder)
    whole = (folder / "images.txt").read_text()
    (folder / "images.txt").write_text(whole[: whole.index("70 ")])
    refused(MissingData, "9 images for 'test', 10", classification.official_lists, "fgvc/cub200", tmp_path)
    for damaged in ("71 a.jpg\n", "1\n", "\xff"):
        (folder / "images.txt").write_text(damaged, encoding="latin-1")
        refused(CorruptFile, r"images\.txt", classification.official_lists, "fgvc/cub200", tmp_path)
    shrink(monkeypatch, "fgvc/dogs120", 2, 54, 6, 10)
    folder = tmp_path / "fgvc/dogs"
    folder.mkdir(parents=True)
    dogs(folder)
    (folder / "train_list.mat").write_bytes((folder / "train_list.mat").read_bytes()[:100])
    refused(CorruptFile, r"train_list\.mat", classification.official_lists, "fgvc/dogs120", tmp_path)
    assert not list(tmp_path.rglob(classification.NOT_VPT))


VTAB_TESTS = {  # of the whole official sets
    "cifar100": 10000, "caltech101": 6084, "dtd": 1880, "flowers102": 6149, "pets": 3669, "svhn": 26032,
    "sun397": 21750, "patch_camelyon": 32768, "eurosat": 5400, "resisc45": 6300, "retinopathy": 42670,
    "clevr_count": 15000, "clevr_distance": 15000, "dmlab": 22735, "kitti_distance": 711,
    "dsprites_location": 73728, "dsprites_orientation": 73728, "smallnorb_azimuth": 12150,
    "smallnorb_elevation": 12150,
}  # fmt: skip


def test_a_copy_of_vtab_with_12_of_its_19_sets_is_told_as_such(tmp_path, monkeypatch, capsys):
    sizes = {name[5:]: found.sizes for name, found in data.DATASETS.items() if name.startswith("vtab/")}
    published = {"train": 800, "val": 200, "trainval": 1000}
    assert sizes == {name: published | {"test": count} for name, count in VTAB_TESTS.items()}
    for name in list(VTAB_TESTS)[:13]:
        shrink(monkeypatch, f"vtab/{name}", 3, 3, 2, 4)
        vtab(tmp_path, data.find(f"vtab/{name}").folders[0])
    short = data.find("vtab/eurosat").folder(tmp_path) / "test.txt"
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:3]))
    (data.find("vtab/clevr_count").folder(tmp_path) / "images/test/0.png").unlink()
    assert cli.main(["data", "--data-root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "test.txt gives 3 images for 'test', 4 expected" in said and "1 of 14 listed images are not there" in said
    row = next(row for row in said.splitlines() if "11 of 19 present" in row)
    for name, state in (("eurosat", "incomplete"), ("clevr_count", "incomplete"), ("dmlab", "missing")):
        assert f"vtab/{name} {state}" in row
    assert "vtab/svhn" not in row


ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]  # of the ten training images
HTA = {
    "hta/dtd": (dtd, [(0, 1), (1, 0), (2, 1)], [(10, 0), (11, 1)], [(20, 0), (21, 1)]),
    **{
        name: (make, [(i, i // 5) for i in ORDER[:8]], [(8, 1), (1, 0)], [(100 + i, i // 2) for i in range(4)])
        for name, make in {"hta/food101": food101, "hta/gtsrb": gtsrb}.items()
    },
    **{
        name: (make, [(i, i % 2) for i in range(8)], [(8, 0), (9, 1)], [(100 + i, i % 2) for i in range(4)])
        for name, make in {"hta/cifar10": cifar10, "hta/svhn": svhn}.items()
    },
}


@pytest.mark.parametrize("name", HTA)
def test_hta_is_split_in_file_order_or_shuffled_once_where_it_is_sorted_by_class(name, tmp_path, monkeypatch):
    make, train, val, test = HTA[name]
    shrink(monkeypatch, name, 2, len(train), len(val), len(test))
    folder = make(tmp_path, monkeypatch)
    assert read(name, tmp_path) == [train, val, train + val, test]
    assert data.status(name, tmp_path).state == "present"
    if name == "hta/gtsrb":
        contents = {f"Filename;ClassId\n{row}\n": "" for row in ("0;x", "0;2", "../x;1")}
        unreadable(folder / "GT-final_test.csv", lambda: load(name, tmp_path, "test"), contents)
    if name == "hta/cifar10":  # of another MD5
        (folder / "data_batch_2").write_bytes(b"")
        refused(CorruptFile, "data_batch_2", load, name, tmp_path, "train")
        assert data.status(name, tmp_path).state == "incomplete"


@pytest.mark.parametrize(
    ("key", "length", "digest"), [("food101", 75750, "3eb9d1a3e6977fa8"), ("gtsrb", 26640, "964f8fdebc48f7b2")]
)
def test_the_shuffle_of_the_real_sets_is_pinned(key, length, digest):
    order = ",".join(map(str, classification._order(key, length)))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == digest


def test_missing_files_are_named(small_vtab, tmp_path):
    (small_vtab / "images/train/1.png").unlink()
    images = load("vtab/cifar100", tmp_path, "train")  # opening looks at the first and last image only
    refused(MissingData, r"train/1\.png", lambda: images[1])
    assert "1 of 14" in data.status("vtab/cifar100", tmp_path).detail
    (small_vtab / "images/train/0.png").unlink()
    refused(MissingData, r"train/0\.png", load, "vtab/cifar100", tmp_path, "train")
    for rows in (2, 4):
        (small_vtab / "train800.txt").write_text("images/train/2.png 0\n" * rows)
        refused(MissingData, rf"train800\.txt.* {rows} .* 3 ", load, "vtab/cifar100", tmp_path, "train")


def test_broken_lists_and_images_are_named(small_vtab, tmp_path, monkeypatch):
    picture(small_vtab / "images/a b/..c.png", 77)
    listing = small_vtab / "train800.txt"
    rows = listing.read_text().replace("images/train/1.png", "images/a b/..c.png")
    listing.write_text(rows)
    images = load("vtab/cifar100", tmp_path, "train")
    assert values(images) == [0, 77, 20]
    (small_vtab / "images/a b/..c.png").write_bytes((small_vtab / "images/a b/..c.png").read_bytes()[:50])
    refused(CorruptFile, r"a b/\.\.c\.png", lambda: images[1])
    bad = "1.png", "1.png -1", "1.png 1.0", " 1", "1.png 3", "../../1.png 1", "/etc/1.png 1", "C:\\1.png 1"
    contents = {rows.replace("images/a b/..c.png 1", row): "line 2" for row in bad}
    unreadable(listing, lambda: load("vtab/cifar100", tmp_path, "train"), contents | {b"\xff\xfe\x00": ""})
    shrink(monkeypatch, "fgvc/cars196", 3, 3, 2, 4)
    contents = {f'{{"a.jpg": {label}}}': "a.jpg" for label in ('"one"', "1.5", "true", "0", "4")}
    contents |= {'{"../../a.jpg": 1}': "../../a.jpg", "[1, 2, 3]": ""}
    unreadable(fgvc(tmp_path, "cars196") / "val.json", lambda: load("fgvc/cars196", tmp_path, "trainval"), contents)


def test_in_memory_decodes_once(small_vtab, tmp_path, monkeypatch):
    images = load("vtab/cifar100", tmp_path, "test", resize_transform(INPUT))
    cached = in_memory(images)
    assert (cached.name, cached.classes, cached.tensors[1].tolist()) == ("vtab/cifar100", 3, [1, 1, 0, 2])
    assert torch.equal(cached.tensors[0], torch.stack([image for image, _ in images]))
    images.transform = crop_transform(INPUT, train=True)
    refused(BadParameter, "RandomCrop", in_memory, images)
    monkeypatch.setattr(classification.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    refused(CompanionError, "vtab/cifar100", in_memory, load("vtab/cifar100", tmp_path, "train"))


def own(root: Path, counts: dict[str, int], first: int = 0) -> None:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index:02d}.jpg", first + index)


def test_image_folder_without_splits_is_split_by_class(tmp_path):
    own(tmp_path, {"cat": 10, "dog": 20, "single": 1})
    sets = image_folder(tmp_path, val_fraction=0.2, seed=3)
    train, val = sets["train"], sets["val"]
    assert train.class_names == ("cat", "dog", "single") and set(sets) == {"train", "val", "trainval"}
    assert items(val) == [(6, 0), (9, 0), (3, 1), (4, 1), (5, 1), (7, 1)]
    everything = [(i, label) for label, count in enumerate((10, 20, 1)) for i in range(count)]
    assert items(train) == [item for item in everything if item not in items(val)]
    assert items(sets["trainval"]) == items(train) + items(val)
    assert image_folder(tmp_path, seed=4)["val"].sources != val.sources
    refused(BadParameter, "val_fraction", image_folder, tmp_path, val_fraction=1)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


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
    assert [path.name for path in root.iterdir()] == ["hta"] and not list(root.rglob("*.gz"))
    assert bool(capfd.readouterr().err) == progress
    # an incomplete copy is completed, and other files are not removed
    (root / "hta/dtd/dtd/images/banded/f.png").unlink()
    (root / "hta/dtd/notes.txt").write_text("mine")
    data.fetch("hta/dtd", root, progress=False)
    assert values(load("hta/dtd", root, "test")) == [20, 21] and (root / "hta/dtd/notes.txt").read_text() == "mine"


def test_a_failed_or_malicious_download_leaves_nothing(served_dtd, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    def fetch() -> None:
        refused(CompanionError, "DTD|Textures", data.fetch, "hta/dtd", tmp_path / "data", progress=False)
        assert files(tmp_path / "data") == []

    served_dtd.write_bytes(served_dtd.read_bytes()[:-20])
    fetch()
    with tarfile.open(served_dtd, "w:gz") as tar:
        member = tarfile.TarInfo("../../../escaped.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(served_dtd))
    before = tarfile.TarFile.__dict__.get("extraction_filter")
    fetch()
    assert not list(tmp_path.rglob("escaped.txt")) and tarfile.TarFile.__dict__.get("extraction_filter") is before
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    fetch()
