"""Readers of radiographs: each layout, masks, boxes, reports. Depths and DICOM: tests/test_odd_files.py."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import DATASETS, landcover, xrays
from companion.data.xrays import load, reports, rle_mask
from companion.errors import BadParameter, CorruptFile, MissingData
from tests.data.conftest import picture, refused, unreadable


@pytest.fixture
def any_length(monkeypatch):
    """Lists of any length are taken: the real ones are thousands of lines long."""
    monkeypatch.setattr(xrays, "SIZES", {key: {} for key in xrays.SIZES})


picture = partial(picture, size=(20, 16), mode="L")


def table(path, columns, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_runs_as_siim_has_them(monkeypatch):
    assert not rle_mask("-1").any() and rle_mask("-1").shape == (1024, 1024)
    monkeypatch.setattr(xrays, "RUN_SIDE", 5)
    expected = np.zeros(25, bool)
    expected[[2, 3, 4, 9]] = True  # the second run begins 4 after the end of the first
    assert (rle_mask("2 3 4 1") == expected.reshape(5, 5).T).all()
    for text in ("1", "a b", "24 5", "-3 2", f"{2**63 - 1} {2**63 - 1} 2 2"):
        with pytest.raises(ValueError):
            rle_mask(text)


@pytest.mark.parametrize("name", ["xrays/chestx-ray14", "xrays/chexpert", "xrays/rsna", "fundus/odir", "fundus/mured"])
def test_labels_of_several_classes(name, tmp_path, any_length):
    classes, folder = DATASETS[name].classes, tmp_path / name
    lines = [" ".join([f"images/{i}.png", *(str(int(c == i)) for c in range(classes))]) + " \n" for i in range(2)]
    picture(folder / "images" / "0.png")
    for file, count in {"train_list_1": 1, "train_list_10": 10, "train_list": 2}.items():
        (folder / f"{file}.txt").write_text("".join(lines[:2] * count))
    assert [len(load(name, tmp_path, "train", share=share)) for share in xrays.SHARES] == [2, 20, 4]
    images = load(name, tmp_path, "train", share="1")
    assert images.paths == ["images/0.png", "images/1.png"] and torch.equal(images.labels, torch.eye(2, classes))
    image, labels = images[0]
    assert image.shape == (1, 16, 20) and image.mean().item() == pytest.approx(100 / 255)
    assert labels.dtype == torch.float32
    refused(MissingData, r"images/1\.png", lambda: images[1])


def test_boxes_and_their_masks(tmp_path, any_length):
    folder = tmp_path / "xrays" / "rsna"
    picture(folder / "a.png", size=(1024, 1024))
    (folder / "b.dcm").write_bytes((folder / "a.png").read_bytes())
    boxes = "[[256.0, 512.0, 512.0, 1024.0], [0.0, 0.0, 128.0, 128.0]]"
    table(folder / "test_list.csv", ("image_path", "bbox"), ("a.png", boxes), ("b.png", "[[0.0, 0.0, 0.0, 0.0]]"))
    images = load("xrays/rsna", tmp_path, "test", task="detection")
    image, boxes = images[0]
    assert image.shape == (1, 1024, 1024) and boxes.shape == (10, 5) and not boxes[2:].any()
    assert boxes[:2].tolist() == [[0, 0.375, 0.75, 0.25, 0.5], [0, 0.0625, 0.0625, 0.125, 0.125]]
    boxes *= 0
    assert images[0][1].any()  # asked for again it is the same
    refused(CorruptFile, r"b\.dcm", lambda: images[1])  # listed as PNG, there as DICOM
    _, mask = load("xrays/rsna", tmp_path, "test", task="segmentation")[0]
    expected = torch.zeros(1, 1024, 1024)
    expected[0, 512:, 256:512] = expected[0, :128, :128] = 1
    assert torch.equal(mask, expected)


def test_masks_of_runs(tmp_path, any_length, monkeypatch):
    folder = tmp_path / "xrays" / "siim"
    rows = [("p1", "0 1024"), ("p1", "2048 1024"), ("p2", "1048575 1"), *((f"n{i}", "-1") for i in range(5))]
    for file in ("train_list_10", "val_list", "test_list"):
        table(folder / f"{file}.csv", ("ImageId", "EncodedPixels"), *rows)
    picture(folder / "train" / "images" / "1024" / "dicom" / "p1.png")
    monkeypatch.setitem(xrays.SIZES, ("xrays/siim", "segmentation"), {"10": 7})  # before the draw
    images, other = (load("xrays/siim", tmp_path, "train", share="10", seed=seed) for seed in (0, 1))
    names = [path.rpartition("/")[2] for path in images.paths]
    assert names == ["p1.png", "p2.png", "n2.png", "n4.png"]  # two with a mask, and two of the five without
    assert images.paths[:2] == other.paths[:2] and images.paths != other.paths
    assert torch.nonzero(images[0][1].sum((0, 1))).flatten().tolist() == [0, 2]  # two columns
    # only the training list is balanced: a score counts all images
    assert [len(load("xrays/siim", tmp_path, split)) for split in ("val", "test")] == [7, 7]


def test_disc_and_cup(tmp_path, any_length):
    folder = tmp_path / "fundus" / "riga"
    values = np.zeros((64, 64), np.uint8)
    values[16:48, 16:48], values[24:40, 24:40] = 128, 255
    picture(folder / "a.tif", (90, 60, 30), size=(64, 64), mode="RGB")
    Image.fromarray(values).save(folder / "b.tif")
    table(folder / "test_list.csv", ("img_path", "mask_path"), ("a.tif", "b.tif"))
    image, mask = load("fundus/riga", tmp_path, "test")[0]
    assert torch.equal(mask, torch.from_numpy(np.stack([values > 0, values == 255])).float())
    assert (image[:, 0, 0] * 255).round().tolist() == [90, 60, 30]  # colours stay
    # what rounds to 0 of 255 is no disc, what rounds to 255 is cup
    shares = torch.tensor([0.4, 0.6, 254.4, 254.6])[None, None] / 255
    assert xrays._disc_and_cup(shares).tolist() == [[[0, 1, 1, 1]], [[0, 0, 0, 1]]]


def test_chestmnist(tmp_path, any_length, monkeypatch):
    monkeypatch.setitem(xrays.SIZES, ("xrays/chestmnist", "classification"), {"100": 200})
    file = tmp_path / "xrays" / "chestmnist" / "chestmnist_224.npz"
    file.parent.mkdir(parents=True)
    labels = np.zeros((200, 14), np.uint8)
    labels[100, 3] = labels[50, 5] = 1
    np.savez(file, train_images=np.full((200, 8, 8), 51, np.uint8), train_labels=labels)
    images = load("xrays/chestmnist", tmp_path, "train", share="1")
    assert len(images) == 2 and images[0][0].mean() == pytest.approx(0.2)
    assert images.labels.nonzero().tolist() == [[1, 3]], "every hundredth image, each with its own labels"
    assert len(load("xrays/chestmnist", tmp_path, "train", share="10")) == 20
    unreadable(file, lambda: load("xrays/chestmnist", tmp_path, "train"), {b"PK": ""})


def test_reports(tmp_path, monkeypatch):
    folder = tmp_path / "xrays" / "mimic-cxr"
    paths = [f"files/p10/p1000/s{study}/{i}.jpg" for study, i in ((77, 0), (77, 1), (88, 2))]
    for path in paths:
        picture(folder / path)
    texts, said = ["Edema.", 'A "mass",\nnone.', "X"], ["There is edema.", "There is edema.", "There is no mass."]
    xrays.write_reports(folder / xrays.REPORTS[1], paths, texts, said)
    found = reports("xrays/mimic-cxr", tmp_path)
    assert found.texts == texts and found.windows is None and found.images[2].shape == (1, 16, 20)
    assert found.statements == said
    with monkeypatch.context() as patch:  # files where the list has them are looked for in no other folder
        patch.setattr(xrays, "at", lambda *_: pytest.fail("searched"))
        assert found.images.sources == [f"{folder}/{path}" for path in paths]
    windows = folder / xrays.WINDOWS[0]
    table(windows, ("label_i", "label_j"), (0, 1), (2, 2), (1, 1))
    assert reports("xrays/mimic-cxr", tmp_path).windows.tolist() == [[0, 1], [2, 2], [1, 1]]
    unreadable(windows, lambda: reports("xrays/mimic-cxr", tmp_path), {"label_i,label_j\n0,1\n": "1 windows for 3"})
    refused(BadParameter, "texts|statements", xrays.write_reports, tmp_path / "y.csv", ["a"], ["t"], [])


def openi(folder: Path) -> None:
    """Three patients, of whom one has no report, and one a lateral image."""
    rows = [("1", "The heart is large. ", "Cardiomegaly."), ("2", "", ""), ("3", "", "No mass.")]
    table(folder / "indiana_reports.csv", ("uid", "findings", "impression"), *rows)
    views = [("1", "1_a.png", "Frontal"), ("1", "1_b.png", "Lateral"), *((i, f"{i}.png", "Frontal") for i in "23")]
    table(folder / "indiana_projections.csv", ("uid", "filename", "projection"), *views)
    for name in ("1_a.png", "3.png"):
        picture(folder / "images" / "images_normalized" / name)


def test_openi(tmp_path):
    openi(tmp_path / "xrays" / "openi")
    found = reports("xrays/openi", tmp_path)
    assert found.texts == ["The heart is large. Cardiomegaly.", "No mass."] and found.statements is None
    assert found.images[1].shape == (1, 16, 20)


def test_own_folder(tmp_path):
    """Labels and boxes: see tests/test_odd_files.py."""
    for i in range(2):
        picture(tmp_path / f"bücher {i}.png")
        picture(tmp_path / "masks" / f"{i}.png", 255 * i)
    (tmp_path / "train_list.txt").write_text(" bücher 0.png  0 1\nbücher 1.png 1 0\n", encoding="utf-8")
    masks = ((f"bücher {i}.png", f"masks/{i}.png") for i in range(2))
    table(tmp_path / "val_list.csv", ("img_path", "mask_path"), *masks)
    (tmp_path / "pretrain.csv").write_text("\ufeffimg_path,report\nbücher 0.png,No mass.\n", encoding="utf-8")
    train = xrays.own(tmp_path, ["mass", "edema"])["train"]
    assert train.labels.tolist() == [[0, 1], [1, 0]] and train[0][0].shape == (1, 16, 20)
    picture(tmp_path / "c.png")
    table(tmp_path / "train_list.csv", ("img_path", "mask_path"), ("c.png", "masks/0.png"))
    masked = xrays.own(tmp_path, task="segmentation")["val"]
    assert [mask.mean().item() for _, mask in masked] == [0, 1] and masked.part([1])[0][1].all()
    picture(tmp_path / "masks" / "1.png", 1)
    assert masked[1][1].unique().tolist() == [1]
    picture(tmp_path / "masks" / "1.png", 2)
    refused(CorruptFile, r"masks/1\.png", lambda: masked[1])
    found = xrays.own(tmp_path, task="pre-training")["train"]
    assert found.texts == ["No mass."] and found.statements is None
    table(tmp_path / "pretrain.csv", ("img_path", "report"), (tmp_path / "c.png", "No mass."))
    assert xrays.own(tmp_path, task="pre-training")["train"].images.paths == ["c.png"]
    table(tmp_path / "pretrain.csv", ("img_path", "report"), (tmp_path / ".." / "c.png", "No mass."))
    refused(CorruptFile, r"pretrain\.csv", xrays.own, tmp_path, task="pre-training")
    refused(BadParameter, "classes", xrays.own, tmp_path)
    (tmp_path / "train_list.txt").unlink()
    refused(MissingData, r"train_list\.txt", xrays.own, tmp_path, ["mass", "edema"])
    for classes in ("mass", ["mass", "mass"]):
        refused(BadParameter, "mass", xrays.own, tmp_path, classes)
        refused(BadParameter, "mass", landcover.own, tmp_path, classes)
