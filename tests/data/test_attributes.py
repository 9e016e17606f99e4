"""The readers of pedestrian attribute sets, on tiny fakes in the layouts of the archives and of the authors."""

import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from companion import data
from companion.data import attributes
from companion.data.attributes import load, own, splits
from companion.errors import CorruptFile, MissingData
from tests.data.conftest import expect, picture, refused, unreadable, values


def cells(values, column: bool = True) -> np.ndarray:
    found = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        found[i, 0] = value
    return found if column else found.T


def pictures(folder: Path, names) -> None:
    """A grey image for each name, as bright as its index in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (10, 24), (i, i, i)).save(folder / name)


def raw(count: int, columns: int) -> np.ndarray:
    """Labels in which every column and every row is identifiable."""
    return ((np.arange(count)[:, None] + np.arange(columns)[None] * 7) % 5 == 0).astype(np.uint8)


TRAIN, VAL, TEST = np.array([[2], [4], [6]]), np.array([[1], [3]]), np.array([[5], [7], [8]])  # from 1, as MATLAB


def peta(root: Path, images: str = "images", **changes) -> Path:
    folder = root / "par/PETA"
    pictures(folder / images, [f"{i:05}.png" for i in range(1, 9)])
    labels = np.concatenate([np.full((8, 4), 9, np.uint8), raw(8, 105)], 1)
    parts = [{"train": TRAIN, "val": VAL, "test": TEST}] + [{"train": VAL, "val": TRAIN, "test": TEST}] * 4
    fields = {"data": labels, "attribute": cells([f"raw {i}" for i in range(105)]), "views": 0, "splits": cells(parts)}
    savemat(folder / "PETA.mat", {"peta": fields | changes})
    return folder


def pa100k(root: Path, folder: str = "par/PA100k", images: str = "data", **changes) -> Path:
    names = [f"{i:06}.jpg" for i in range(1, 9)]
    pictures(root / folder / images, names)
    parts = {"train": slice(0, 4), "val": slice(4, 5), "test": slice(5, 8)}
    fields = {f"{p}_images_name": cells(names[chosen]) for p, chosen in parts.items()}
    fields |= {f"{p}_label": raw(8, 26)[chosen] for p, chosen in parts.items()}
    fields |= {"attributes": cells([f"raw {i}" for i in range(26)])}
    changed = {k: v for k, v in (fields | changes).items() if v is not None}
    savemat(root / folder / "annotation.mat", changed)
    return root / folder


def rapv1(root: Path) -> Path:
    folder = root / "par/RAPV1"
    names = [f"CAM01_{i}.png" for i in range(8)]
    pictures(folder / "RAP_dataset", names)
    (folder / "RAP_annotation").mkdir()
    labels = raw(8, 92)
    labels[0, 0] = 2  # unclear
    parts = [{"train_index": np.concatenate([TRAIN, VAL]).T, "test_index": TEST.T}] * 5
    fields = {"partition": cells(parts), "label": labels, "chinese": 0}
    fields |= {"english": cells([f"raw {i}" for i in range(92)]), "position": 0, "imagesname": cells(names)}
    savemat(folder / "RAP_annotation/RAP_annotation.mat", {"RAP_annotation": fields})
    return folder


def rapv2(root: Path) -> Path:
    folder = root / "par/RAPV2"
    names = [f"CAM02_{i}.png" for i in range(8)]
    pictures(folder / "RAP_dataset", names)
    (folder / "RAP_annotation").mkdir()
    part = {"train_index": TRAIN.T, "val_index": VAL.T, "test_index": TEST.T}
    selected = np.arange(152, 98, -1)[None]  # backwards, so that an order that is forgotten is seen
    fields = {"name": cells(names), "attribute": cells([f"raw {i}" for i in range(152)]), "data": raw(8, 152)}
    fields |= {"selected_attribute": selected, "partition_attribute": cells([part] * 5, column=False)}
    savemat(folder / "RAP_annotation/RAP_annotation.mat", {"RAP_annotation": fields})
    return folder


def wider(root: Path) -> Path:
    folder = root / "par/WIDER"
    (folder / "Annotations").mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(8)]
    pictures(folder / "split_image", names)
    rows = [[(-1, 0, 1)[(i + j) % 3] for j in range(14)] for i in range(8)]
    write = {"attr_name": [f"raw {i}" for i in range(14)]}
    for split, chosen in {"trainval": slice(0, 5), "test": slice(5, 8)}.items():
        write |= {f"{split}_name": names[chosen], f"{split}_gt_label": [str(row) for row in rows[chosen]]}
    for name, lines in write.items():
        (folder / "Annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


class EasyDict(dict):
    """As easydict's: what is an item is an attribute too, and both are pickled."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update(items)


def new_split(folder: Path, name: str = "dataset_zs_run0.pkl", **changes) -> Path:
    """Pickled with a package `easydict`, which is gone when the file is read."""
    parts = {"train": [0, 1, 2], "val": [3], "test": [7, 6, 5], "trainval": [0, 1, 2, 3]}
    parts = {split: np.array(numbers) for split, numbers in parts.items()} | changes
    content = EasyDict(description="zs", image_name=["a"], partition=EasyDict(**parts), weight_train=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module := ModuleType("easydict"))
        patch.setattr(EasyDict, "__module__", "easydict")
        module.EasyDict = EasyDict
        (folder / name).write_bytes(pickle.dumps(content))
    return folder / name


MAKERS = {"par/peta": peta, "par/pa100k": pa100k, "par/rapv1": rapv1, "par/rapv2": rapv2}
WIDE = {"par/rapv2": lambda columns: [151 - i for i in columns]}  # the selection runs backwards


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in (*MAKERS, "par/wider", *attributes.ZERO_SHOT):
        expect(monkeypatch, name, sizes={})


def images_of(found: dict) -> dict[str, list[int]]:
    return {split: values(part) for split, part in found.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_labels_and_splits_of_matlab_files(name, tmp_path):
    MAKERS[name](tmp_path)
    found = splits(name, tmp_path)
    train, val, test = ([0, 1, 2, 3], [4], [5, 6, 7]) if name == "par/pa100k" else ([1, 3, 5], [0, 2], [4, 6, 7])
    expected = {"train": train, "val": val, "trainval": train + val, "test": test}
    if name == "par/rapv1":  # has no validation split, and unclear labels stay
        expected = {split: expected[split] for split in ("trainval", "test")}
        assert found["trainval"].labels[3, 0] == 2
    assert images_of(found) == expected
    columns = WIDE.get(name, list)(attributes.COLUMNS[name])
    assert found["test"].names == tuple(f"raw {i}" for i in columns)
    np.testing.assert_array_equal(found["test"].labels, raw(8, 152)[test][:, columns])
    assert found["test"].sentences == attributes.SENTENCES[name]
    transform = v2.Compose([v2.ToImage(), v2.Resize((32, 32))])
    images, labels = next(iter(DataLoader(load(name, tmp_path, "test", transform), 3)))
    assert images.shape == (3, 3, 32, 32) and torch.equal(labels, found["test"].labels)
    assert data.status(name, tmp_path).state == "present"


def test_unclear_labels_of_wider_count_as_absent(tmp_path):
    folder = wider(tmp_path) / "Annotations"
    found = splits("par/wider", tmp_path)
    assert images_of(found) == {"trainval": [0, 1, 2, 3, 4], "test": [5, 6, 7]}
    assert found["test"].labels[0, :4].tolist() == [1, 0, 0, 1]  # of 1, -1, 0, 1
    labels = (folder / "test_gt_label.txt").read_text()
    contents = {labels.replace("[1, -1,", wrong, 1): "14 numbers" for wrong in ("[1,", "[1, x,")}
    contents[labels.partition("\n")[0]] = "3 images"
    unreadable(folder / "test_gt_label.txt", lambda: splits("par/wider", tmp_path), contents)


@pytest.mark.parametrize("file", attributes.ZERO_SHOT_FILES)
@pytest.mark.parametrize(("name", "own"), attributes.ZERO_SHOT.items())
def test_zero_shot_splits_are_read_without_the_package_that_wrote_them(name, own, file, tmp_path):
    folder = MAKERS[own](tmp_path)
    refused(MissingData, r"dataset_zs_run0\.pkl", splits, name, tmp_path)
    new_split(folder, file)
    found = splits(name, tmp_path)
    assert images_of(found) == {"train": [0, 1, 2], "val": [3], "trainval": [0, 1, 2, 3], "test": [7, 6, 5]}
    columns = WIDE.get(own, list)(attributes.COLUMNS[name])
    np.testing.assert_array_equal(found["test"].labels, raw(8, 152)[[7, 6, 5]][:, columns])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(Evil.marker),))


def test_zero_shot_splits_that_are_refused(tmp_path):
    folder = peta(tmp_path)
    parts = {split: [np.array(numbers)] for split, numbers in {"train": [0, 1], "val": [2], "test": [3]}.items()}
    path = new_split(folder, **parts)  # of several partitions the first is used
    assert values(load("par-zs/peta", tmp_path, "train")) == [0, 1]
    Evil.marker = str(tmp_path / "ran")
    for part in {"train": Evil()}, {"val": ["a"]}, {"test": [8]}:
        path.write_bytes(pickle.dumps({"partition": {"train": [0], "val": [1], "test": [2]} | part}))
        refused(CorruptFile, "PETA", splits, "par-zs/peta", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_own_folder(tmp_path):
    for i in range(5):
        picture(tmp_path / "anna" / f"{i}.jpg", i)
    listing, header = tmp_path / "labels.csv", "\ufeffimage,split,A hat,A bag\n"
    rows = "anna/0.jpg,train,1,0\nanna/1.jpg,train,0,0\nanna/4.jpg,test,1,1\n"
    listing.write_text(f"{header}{rows}anna/3.jpg,val,0,1\n", encoding="utf-8")
    found = own(tmp_path)
    assert images_of(found) == {"train": [0, 1], "val": [3], "trainval": [0, 1, 3], "test": [4]}
    assert found["train"].sentences == ("A hat", "A bag") and found["test"].labels.tolist() == [[1, 1]]
    assert found["train"].ratio.tolist() == [0.5, 0]
    listing.write_text(header + rows, encoding="utf-8")
    assert images_of(own(tmp_path)) == {"train": [0, 1], "trainval": [0, 1], "test": [4]}
    ends = "anna/2.jpg,val,2,0", "anna/2.jpg,val,nan,0", "anna/2.jpg,val,1", "anna/2.jpg,holdout,1,0"
    contents = {f"{header}{rows}{end}": "line 5" for end in (*ends, "anna/0.jpg,test,1,1", "./anna/0.jpg,test,1,1")}
    contents |= {
        f"{header}{rows}../2.jpg,test,1,1": "../2.jpg",
        f"{header}anna/0.jpg,train,1,0\n": "test",
        b"\xff\xfe\x00a": "",
        "file,part\nx,y": "no column image",
        "image,split,A hat,A hat\nanna/0.jpg,train,1,0\nanna/4.jpg,test,1,1\n": "'A hat'",
    }
    unreadable(listing, lambda: own(tmp_path), contents)
    for split in ("train", "test"):
        listing.write_text(f"{header}{rows}anna/9.jpg,{split},1,1", encoding="utf-8")
        refused(MissingData, r"anna/9\.jpg", own, tmp_path)


@pytest.mark.parametrize(("absent", "present"), [("0", "1"), ("0.0", "1.0"), ("False", "True"), ("FALSE", "TRUE")])
def test_a_table_of_pandas_is_read(absent, present, tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.jpg", i)
    rows = f"image,split,A hat\n0.jpg,Train,{absent}\n1.jpg,TEST,{present}\n"
    (tmp_path / "labels.csv").write_text(rows, encoding="utf-8")
    assert {name: data.labels.tolist() for name, data in own(tmp_path).items()} == {
        "train": [[0]],
        "trainval": [[0]],
        "test": [[1]],
    }
    for row, value in (("2.jpg,test,maybe", "line 4: 'A hat' is 'maybe'"), ("2.jpg,dev,1", "'dev'")):
        unreadable(tmp_path / "labels.csv", lambda: own(tmp_path), {f"{rows}{row}": value})
    index = "".join(f"{i},{row}\n" for i, row in zip(("", 7, 8), rows.splitlines(), strict=True))
    unreadable(tmp_path / "labels.csv", lambda: own(tmp_path), {index: "line 2: '' is '7'"})


def test_missing_images(tmp_path):
    folder = pa100k(tmp_path, "PA-100K", "release_data/release_data")  # other spellings
    (folder / "release_data/release_data/000007.jpg").unlink()
    assert "1 of 3" in data.status("par/pa100k", tmp_path).detail
    refused(MissingData, r"000007\.jpg", lambda: load("par/pa100k", tmp_path, "test")[1])


@pytest.mark.parametrize(
    ("make", "changes", "value"),
    [
        (pa100k, {"test_label": np.zeros((2, 26))}, "8 images"),
        (pa100k, {"test_images_name": cells(["../a.jpg", "b.jpg", "c.jpg"])}, "image 6"),
        (peta, {"splits": cells([{"train": TRAIN, "val": VAL, "test": TEST + 1}])}, "test"),
        (peta, {"splits": cells([{"train": TRAIN, "val": TEST, "test": TEST}])}, "3 images"),
    ],
)
def test_fields_that_contradict_each_other(make, changes, value, tmp_path):
    make(tmp_path, **changes)
    refused(CorruptFile, value, splits, "par/peta" if make is peta else "par/pa100k", tmp_path)
