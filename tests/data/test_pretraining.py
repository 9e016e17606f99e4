"""Readers of ImageNet-1k, COCO's instances and ADE20K in their layouts, and errors of broken files."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from companion.data import status
from companion.data.pretraining import ADE20K, COCO, IMAGENET, load, own
from companion.errors import CorruptFile, MissingData
from companion.io.files import read_json, write_json
from tests.data.conftest import expect, picture, refused

picture = partial(picture, size=(12, 8))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Four training images and a test image, of ImageNet two; two classes, of ADE20K all."""
    for name, classes in ((IMAGENET, 2), (COCO, 2), (ADE20K, 150)):
        expect(patch, name, sizes={"train": 4, "test": 1 + (name == IMAGENET)}, classes=classes)


def imagenet(root: Path) -> None:
    for split, name, count in [("train", "n01", 2), ("train", "n02", 2), ("val", "n01", 1), ("val", "n02", 1)]:
        for i in range(count):
            picture(root / "imagenet" / split / name / f"{name}_{i}.JPEG")


def test_imagenet(tmp_path, monkeypatch):
    imagenet(tmp_path)
    train, test = (load(IMAGENET, tmp_path, split) for split in ("train", "test"))
    assert train.labels == [0, 0, 1, 1] and test.labels == [0, 1] and train.class_names == ("n01", "n02")
    assert train[0][0].shape == (3, 8, 12) and train[0][0].dtype == torch.float32
    small = load(IMAGENET, tmp_path, "train", lambda picture: torch.tensor(picture.size))
    assert small[0][0].tolist() == [12, 8]
    expect(monkeypatch, IMAGENET, classes=3)
    refused(MissingData, "2 class folders, 3", load, IMAGENET, tmp_path, "train")


def flat(root: Path) -> Path:
    """The images of ImageNet's val in one folder."""
    place = root / "imagenet/val"
    for path in [*place.glob("*/*")]:
        path.rename(place / path.name)
        path.parent.rmdir()
    return place


def test_imagenets_own_list_of_a_flat_folder_counts_by_another_order_of_the_classes(tmp_path):
    imagenet(tmp_path)
    place, numbers = flat(tmp_path), {"n01": 2, "n02": 1, "n00": 3}
    for number, name in enumerate(("n02_0", "n01_0"), 1):
        (place / f"{name}.JPEG").rename(place / f"ILSVRC2012_val_{number:08d}.JPEG")
    (kit := tmp_path / "imagenet/ILSVRC2012_devkit_t12/data").mkdir(parents=True)
    (truth := kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    refused(CorruptFile, "meta.mat", load, IMAGENET, tmp_path, "test")
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "num_children")]
    rows = [(number, wnid, int(wnid == "n00")) for wnid, number in numbers.items()]
    scipy.io.savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    test = load(IMAGENET, tmp_path, "test")
    assert [Path(path).stem[-1] for path in test.sources] == ["2", "1"] and test.labels == [0, 1]
    assert test.class_names == ("n01", "n02")
    truth.write_text("1\n3\n")
    refused(CorruptFile, "2 classes, found", load, IMAGENET, tmp_path, "test")
    (kit / "meta.mat").write_bytes(b"none")
    refused(CorruptFile, "meta.mat: not ImageNet's", load, IMAGENET, tmp_path, "test")


def annotation(number, image, category, segmentation, box=(1, 2, 4, 3), **more):
    ids = {"id": number, "image_id": image, "category_id": category}
    return ids | {"bbox": list(box), "area": 12, "iscrowd": 0, "segmentation": segmentation} | more


def coco(root: Path) -> None:
    """In the first image of a split polygons, run lengths, a crowd and a box without width; in others nothing."""
    square, runs = [[1, 2, 5, 2, 5, 5, 1, 5]], {"size": [8, 12], "counts": [0, 8, 88]}  # the second: the first column
    for split, numbers in (("train", [1, 2, 4, 5]), ("val", [3])):
        found = [
            annotation(1, numbers[0], 7, square),
            annotation(2, numbers[0], 3, runs, (0, 0, 1, 8)),
            annotation(3, numbers[0], 3, runs, iscrowd=1),
            annotation(4, numbers[0], 3, square, (1, 2, 0, 3)),
        ]
        listed = [{"id": i, "file_name": f"{i}.jpg", "width": 12, "height": 8} for i in numbers]
        categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        for i in numbers:
            picture(root / "coco" / f"{split}2017" / f"{i}.jpg")
        content = {"images": listed, "annotations": found, "categories": categories}
        write_json(root / f"coco/annotations/instances_{split}2017.json", content)


def test_coco(tmp_path):
    coco(tmp_path)
    train = load(COCO, tmp_path, "train")
    image, target = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 12)
    # neither the crowd nor the box without width; labels count from 1, in the order of category ids
    assert target["labels"].tolist() == [2, 1] and target["boxes"].tolist() == [[1, 2, 5, 5], [0, 0, 1, 8]]
    expected = torch.zeros(2, 8, 12, dtype=torch.uint8)
    expected[0, 2:5, 1:5] = expected[1, :, 0] = 1
    assert torch.equal(target["masks"], expected)
    assert train[1][1]["boxes"].shape == (0, 4) and train[1][1]["masks"].shape == (0, 8, 12)
    file = tmp_path / "coco/annotations/instances_val2017.json"
    shape = {"size": [8, 13], "counts": [0, 104]}
    write_json(file, read_json(file) | {"annotations": [annotation(5, 3, 3, shape)]})
    refused(CorruptFile, r"instances_val2017\.json: annotation 5", lambda: load(COCO, tmp_path, "test")[0])


def ade20k(root: Path) -> Path:
    """The first line has the first class, the second the last one."""
    folder, truth = root / "ade/ADEChallengeData2016", np.zeros((8, 12), np.uint8)
    truth[0], truth[1] = 1, 150
    for split, names in (("training", "abde"), ("validation", "c")):
        (folder / "annotations" / split).mkdir(parents=True)
        for name in names:
            picture(folder / "images" / split / f"{name}.jpg")
            Image.fromarray(truth).save(folder / "annotations" / split / f"{name}.png")
    return folder


def test_ade20k(tmp_path):
    folder = ade20k(tmp_path)
    train = load(ADE20K, tmp_path, "train")
    image, found = train[0]
    assert "labels" not in status(ADE20K, tmp_path).detail  # which are no classes of images
    assert len(train) == 4 and image.shape == (3, 8, 12) and found.dtype == torch.int64
    assert found[:, 0].tolist() == [0, 149, *[255] * 6]
    (folder / "annotations/training/a.png").unlink()
    refused(MissingData, r"1 of 4 .*a\.png", load, ADE20K, tmp_path, "train")


def test_own_images_of_all_formats_that_are_decoded(tmp_path):
    for name in ("a.jpg", "b.gif", "c.avif", "._a.jpg"):
        picture(tmp_path / name)
    found = own(tmp_path)["train"]
    assert [path.rpartition("/")[2] for path in found.sources] == ["a.jpg", "b.gif", "c.avif"]
    assert found[1][0].shape == (3, 8, 12)
