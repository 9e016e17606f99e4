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

from companion import data
from companion.data import DATASETS, attributes_sets
from companion.data.attributes import SPLITS, PadToSquare, load, own_folder, splits, square_transform
from companion.errors import BadParameter, CorruptFile, MissingData
from tests.data.conftest import expect, refused

SETS = ["par/peta", "par/pa100k", "par/rapv1", "par/rapv2", "par/wider", "par-zs/peta", "par-zs/rap"]


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


@pytest.fixture
def easydict(monkeypatch):
    """A package `easydict` to pickle with; it is gone when the file is read."""
    module = ModuleType("easydict")
    module.EasyDict = EasyDict
    monkeypatch.setattr(EasyDict, "__module__", "easydict")
    monkeypatch.setitem(sys.modules, "easydict", module)
    return monkeypatch


def new_split(folder: Path, monkeypatch, name: str = "dataset_zs_run0.pkl", **changes) -> Path:
    parts = {"train": [0, 1, 2], "val": [3], "test": [7, 6, 5], "trainval": [0, 1, 2, 3]}
    parts = {split: np.array(numbers) for split, numbers in parts.items()} | changes
    content = EasyDict(description="zs", image_name=["a"], partition=EasyDict(**parts), weight_train=[])
    (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.delitem(sys.modules, "easydict")
    return folder / name


MAKERS = {"par/peta": peta, "par/pa100k": pa100k, "par/rapv1": rapv1, "par/rapv2": rapv2, "par/wider": wider}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in SETS:
        expect(monkeypatch, name, sizes={})


def shades(found) -> list[int]:
    return [int(np.asarray(found.picture(i))[0, 0, 0]) for i in range(len(found))]


def test_every_attribute_of_the_register_has_a_sentence_and_a_column():
    assert [name for name in DATASETS if name.startswith(("par/", "par-zs/"))] == SETS
    for name in SETS:
        count = DATASETS[name].classes
        assert len(attributes_sets.SENTENCES[name]) == len({*attributes_sets.COLUMNS[name]}) == count
    assert len(attributes_sets.PHRASES["par/rapv1"]) == 51


def test_sentences_are_the_authors():
    words = attributes_sets.SENTENCES
    assert words["par/peta"][0] == "A pedestrian wearing a hat" and words["par/peta"][-1] == "A male pedestrian"
    assert words["par/peta"][10] == "A pedestrian in a short-sleeved top"
    assert words["par/pa100k"][15] == "A pedestrian in stride upper wear"
    assert words["par/rapv1"][8] == "A clerk" and words["par/rapv2"][44] == "An employee"
    assert words["par/wider"][3] == " pedestrian wearing a hat"
    assert set(words["par/rapv2"]) - set(words["par-zs/rap"]) == {"A pedestrian between the ages of 46 and 60"}
    assert all(s == " ".join(s.split()) for n, many in words.items() if n != "par/wider" for s in many)
    assert attributes_sets.PHRASES["par/rapv1"][-2:] == ("action carry arm", "action carry hand")


@pytest.mark.parametrize("name", ["par/peta", "par/rapv2"])
def test_sets_with_a_validation_split(name, tmp_path):
    MAKERS[name](tmp_path)
    found = splits(name, tmp_path)
    assert [shades(found[split]) for split in SPLITS] == [[1, 3, 5], [0, 2], [1, 3, 5, 0, 2], [4, 6, 7]]
    columns = attributes_sets.COLUMNS[name]
    where = list(columns) if name == "par/peta" else [151 - i for i in columns]
    test = found["test"]
    assert test.names == tuple(f"raw {i}" for i in where)
    np.testing.assert_array_equal(test.labels, raw(8, 152)[[4, 6, 7]][:, where])
    assert test.sentences == attributes_sets.SENTENCES[name]
    torch.testing.assert_close(found["trainval"].ratio, found["trainval"].labels.mean(0))
    image, labels = test[0]
    assert image.shape == (3, 24, 10) and image.dtype == labels.dtype == torch.float32
    assert load(name, tmp_path, "val").labels.shape == (2, len(columns))
    assert data.status(name, tmp_path).state == "present"
    assert "8 images" in data.status(name, tmp_path).detail


def test_pa100k(tmp_path):
    pa100k(tmp_path)
    found = splits("par/pa100k", tmp_path)
    assert [shades(found[split]) for split in SPLITS] == [[0, 1, 2, 3], [4], [0, 1, 2, 3, 4], [5, 6, 7]]
    np.testing.assert_array_equal(found["test"].labels, raw(8, 26)[5:])
    refused(BadParameter, "'train', 'val', 'trainval', 'test'", load, "par/pa100k", tmp_path, "all")
    found = load("par/pa100k", tmp_path, "train", square_transform(32, train=True))
    images, labels = next(iter(DataLoader(found, 4, num_workers=1)))
    assert images.shape == (4, 3, 32, 32) and labels.shape == (4, 26)


def test_other_spellings_of_folders(tmp_path):
    pa100k(tmp_path, "PA-100K", "release_data/release_data")
    assert len(load("par/pa100k", tmp_path, "trainval")) == 5
    peta(tmp_path, "Pad_datasets")
    assert shades(load("par/peta", tmp_path, "test")) == [4, 6, 7]


def test_rapv1_has_no_validation_split_and_unclear_labels_stay(tmp_path):
    rapv1(tmp_path)
    found = splits("par/rapv1", tmp_path)
    assert {split: shades(part) for split, part in found.items()} == {"trainval": [1, 3, 5, 0, 2], "test": [4, 6, 7]}
    assert found["trainval"].labels[3, 0] == 2
    np.testing.assert_array_equal(found["test"].labels, raw(8, 51)[[4, 6, 7]])
    refused(BadParameter, "'trainval', 'test'", load, "par/rapv1", tmp_path, "train")


def test_wider_counts_what_nobody_could_tell_as_not_there(tmp_path):
    wider(tmp_path)
    found = splits("par/wider", tmp_path)
    assert {split: shades(part) for split, part in found.items()} == {"trainval": [0, 1, 2, 3, 4], "test": [5, 6, 7]}
    assert found["test"].labels[0, :4].tolist() == [1, 0, 0, 1]  # of 1, -1, 0, 1
    assert found["test"].names[0] == "raw 0"


@pytest.mark.parametrize("file", attributes_sets.ZERO_SHOT_FILES)
@pytest.mark.parametrize(("name", "own"), attributes_sets.ZERO_SHOT.items())
def test_zero_shot_splits_are_read_without_the_package_that_wrote_them(name, own, file, tmp_path, easydict):
    folder = MAKERS[own](tmp_path)
    refused(MissingData, r"dataset_zs_run0\.pkl is not there", splits, name, tmp_path)
    new_split(folder, easydict, file)
    found = splits(name, tmp_path)
    assert [shades(found[split]) for split in SPLITS] == [[0, 1, 2], [3], [0, 1, 2, 3], [7, 6, 5]]
    kept = [i for i, s in enumerate(attributes_sets.SENTENCES[own]) if s in attributes_sets.SENTENCES[name]]
    np.testing.assert_array_equal(found["test"].labels, raw_of(own, tmp_path)[[7, 6, 5]][:, kept])


def raw_of(name: str, root: Path) -> np.ndarray:
    """All labels of a set by number of image."""
    found = np.zeros((8, DATASETS[name].classes))
    for part in splits(name, root).values():
        found[shades(part)] = part.labels
    return found


def test_padding_keeps_the_shape_of_a_person():
    tall = Image.new("RGB", (50, 100), (255, 255, 255))
    padded = np.asarray(PadToSquare(224)(tall))
    assert padded.shape == (224, 224, 3)
    assert (padded[:, :56] == 0).all() and (padded[:, 168:] == 0).all() and (padded[:, 56:168] == 255).all()
    wide = Image.new("RGB", (90, 60))
    assert PadToSquare(224)(wide).size == (90, 60)  # squeezed by the resize that follows
    narrow = PadToSquare(224)(Image.new("RGB", (131, 391), (255, 255, 255)))
    assert narrow.size == (223, 224)  # as the authors': bars of a whole number of pixels on both sides
    fine = Image.fromarray(np.indices((400, 100)).sum(0).__mod__(2).astype(np.uint8) * 255)
    rough, smooth = (np.asarray(PadToSquare(200, antialias)(fine)).std() for antialias in (False, True))
    assert rough != smooth  # the pattern of single pixels is averaged only with antialiasing
    square = Image.new("RGB", (224, 224), (9, 9, 9))
    assert np.array_equal(np.asarray(PadToSquare(224)(square)), np.asarray(square))


def test_transforms_normalise_by_a_half_and_vary_only_in_training():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 30, 3), dtype=np.uint8))
    test, train = square_transform(48), square_transform(48, train=True)
    assert torch.equal(test(picture), test(picture)) and test(picture).shape == (3, 48, 48)
    assert test(picture).min() == -1 and test(picture).max() <= 1  # black bars are -1
    assert len({train(picture).sum().item() for _ in range(8)}) > 1


HEADER = "image,split,A person with a hat,A person with a bag"


def own(root: Path, *lines: str, header: str = HEADER) -> Path:
    pictures(root / "anna", [f"{i}.jpg" for i in range(6)])
    (root / "labels.csv").write_text("\n".join([header, *lines]) + "\n")
    return root


def test_own_pictures_are_upright_and_listed_once(tmp_path):
    own(tmp_path, "anna/0.jpg,train,1,0", "anna/4.jpg,test,1,1")
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees, as in EXIF of phones
    Image.new("RGB", (24, 10), (9, 9, 9)).save(tmp_path / "anna/0.jpg", exif=turned)
    assert own_folder(tmp_path)["trainval"].picture(0).size == (10, 24)
    own(tmp_path, "anna/0.jpg,train,1,0", "anna/4.jpg,test,1,1", "anna/0.jpg,test,1,0")
    refused(CorruptFile, r"line 4: anna/0\.jpg is in line 2", own_folder, tmp_path)


def test_own_folder(tmp_path):
    own(tmp_path, "anna/0.jpg,train,1,0", "anna/1.jpg,train,0,0", "anna/4.jpg,test,1,1", "anna/3.jpg,val,0,1")
    found = own_folder(tmp_path)
    assert {split: len(part) for split, part in found.items()} == {"train": 2, "val": 1, "trainval": 3, "test": 1}
    assert found["test"].sentences == ("A person with a hat", "A person with a bag")
    assert found["train"].ratio.tolist() == [0.5, 0] and found["test"].labels.tolist() == [[1, 1]]
    own(tmp_path, "anna/0.jpg,train,1,0", "anna/4.jpg,test,1,1")
    assert {split: len(part) for split, part in own_folder(tmp_path).items()} == {"trainval": 1, "test": 1}
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00a")
    refused(CorruptFile, "CSV", own_folder, tmp_path)
    (tmp_path / "labels.csv").unlink()
    refused(MissingData, r"labels\.csv is not there", own_folder, tmp_path)


@pytest.mark.parametrize(
    ("lines", "header", "error", "message"),
    [
        (["anna/0.jpg,train,1,0"], HEADER, CorruptFile, "no image is in test"),
        (["anna/0.jpg,train,1"], HEADER, CorruptFile, "line 2: expected a path"),
        (["anna/0.jpg,learn,1,0"], HEADER, CorruptFile, "line 2"),
        (["anna/0.jpg,train,1,0", "anna/1.jpg,test,yes,0"], HEADER, CorruptFile, "line 3.*yes"),
        (["../0.jpg,train,1,0"], HEADER, CorruptFile, "leaves the data set's folder"),
        (["x"], "file,part", CorruptFile, "header"),
        (["anna/0.jpg,train,1,0", "anna/9.jpg,test,1,1"], HEADER, MissingData, r"anna/9\.jpg"),
    ],
)
def test_own_lists_that_cannot_be_read(lines, header, error, message, tmp_path):
    refused(error, message, own_folder, own(tmp_path, *lines, header=header))


def test_missing_pictures(tmp_path):
    folder = pa100k(tmp_path)
    (folder / "data/000007.jpg").unlink()
    assert data.status("par/pa100k", tmp_path).detail.startswith("1 of 8 listed images are not there")
    refused(MissingData, r"000007\.jpg is listed but not there", lambda: load("par/pa100k", tmp_path, "test")[1])
    (folder / "data/000008.jpg").unlink()
    refused(MissingData, r"lists 000008\.jpg, which is not in .*data or .*Pad_datasets", splits, "par/pa100k", tmp_path)


@pytest.mark.parametrize("name", ["par/peta", "par/pa100k", "par/rapv1", "par/rapv2"])
def test_damaged_and_foreign_matlab_files(name, tmp_path):
    folder = MAKERS[name](tmp_path)
    path = folder / attributes_sets.ANNOTATIONS[name]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(CorruptFile, "not a MATLAB file", splits, name, tmp_path)
    assert data.status(name, tmp_path).state == "incomplete"
    savemat(path, {"other": np.zeros(3)})
    refused(CorruptFile, r"fields are not those of .* it has: other", splits, name, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_label": None}, "val_label"),
        ({"test_label": np.zeros((2, 26))}, "labels .* for 8 images"),
        ({"attributes": cells(["only one"])}, "1 attributes"),
        ({"test_images_name": cells(["../a.jpg", "b.jpg", "c.jpg"])}, "image 6.*leaves"),
    ],
)
def test_wrong_fields_of_pa100k(changes, message, tmp_path):
    pa100k(tmp_path, **changes)
    refused(CorruptFile, message, splits, "par/pa100k", tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"train": TRAIN, "val": VAL, "test": TEST + 1}, "goes beyond the 8 images"),
        ({"train": TRAIN - 2, "val": VAL, "test": TEST}, "goes beyond"),
        ({"train": TRAIN, "val": TEST, "test": TEST}, "3 images are in the training split and in the test split"),
    ],
)
def test_splits_that_cannot_be(part, message, tmp_path):
    peta(tmp_path, splits=cells([part] * 5))
    refused(CorruptFile, message, splits, "par/peta", tmp_path)


def test_wrong_lines_of_wider(tmp_path):
    folder = wider(tmp_path) / "Annotations"
    labels = (folder / "test_gt_label.txt").read_text()
    for wrong, message in (
        (labels.replace("[1, -1,", "[1,", 1), "line 1: expected 14 numbers"),
        (labels.replace("[1, -1,", "[1, x,", 1), "line 1"),
        ("\n".join(labels.splitlines()[:2]), "2 lines, and test_name.txt has 3 images"),
    ):
        (folder / "test_gt_label.txt").write_text(wrong)
        refused(CorruptFile, message, splits, "par/wider", tmp_path)
    (folder / "attr_name.txt").write_bytes(b"\xff\xfe")
    refused(CorruptFile, "not a text file", splits, "par/wider", tmp_path)


def test_new_splits_in_a_list_of_partitions_and_wrong_ones(tmp_path, easydict):
    folder = peta(tmp_path)
    parts = {split: [np.array(numbers)] for split, numbers in {"train": [0, 1], "val": [2], "test": [3]}.items()}
    with easydict.context() as patch:
        new_split(folder, patch, **parts)
        assert shades(load("par-zs/peta", tmp_path, "train")) == [0, 1]
    path = new_split(folder, easydict, test=np.array([8]))
    refused(CorruptFile, "goes beyond", splits, "par-zs/peta", tmp_path)
    for content, message in (
        (b"no", "not a pickle"),
        (pickle.dumps([1]), "partition.train"),
        (pickle.dumps({"partition": {"train": [0]}}), "partition.train"),
        (pickle.dumps({"partition": {"train": [0], "val": ["a"], "test": [2]}}), "no list of image numbers"),
    ):
        path.write_bytes(content)
        refused(CorruptFile, message, splits, "par-zs/peta", tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(Evil.marker),))


def test_nothing_in_a_pickle_runs(tmp_path):
    Evil.marker = str(tmp_path / "ran")
    partition = {"train": Evil(), "val": [1], "test": [2]}
    (peta(tmp_path) / "dataset_zs_run0.pkl").write_bytes(pickle.dumps({"partition": partition}))
    with pytest.raises(CorruptFile):
        splits("par-zs/peta", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_another_number_of_pictures_is_refused(tmp_path, monkeypatch):
    pa100k(tmp_path)
    expect(monkeypatch, "par/pa100k", sizes={"trainval": 90_000, "test": 10_000})
    refused(MissingData, "has 5 images for 'trainval', 90,000 are expected", splits, "par/pa100k", tmp_path)
