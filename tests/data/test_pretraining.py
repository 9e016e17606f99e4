"""Readers of ImageNet-1k, COCO's instances and ADE20K in their layouts, and errors of broken files."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.data.pretraining import instances, load, pictures, scenes
from companion.data.pretraining_sets import ADE20K, COCO, IMAGENET
from companion.errors import BadParameter, CorruptFile, MissingData
from companion.ops.files import write_json
from tests.data.conftest import expect, picture, refused

picture = partial(picture, size=(12, 8))


def labels(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def small(monkeypatch):
    for name, classes in ((IMAGENET, 2), (COCO, 2), (ADE20K, 150)):
        expect(monkeypatch, name, sizes={"train": 2, "test": 1}, classes=classes)


@pytest.fixture
def imagenet(tmp_path, small):
    for split, name in [("train", "n01"), ("train", "n02"), ("val", "n02")]:
        picture(tmp_path / "imagenet" / split / name / f"{name}_1.JPEG")
    (tmp_path / "imagenet" / "val" / "n01").mkdir()
    return tmp_path


def annotation(number, image, category, segmentation, box=(1, 2, 4, 3), **more):
    ids = {"id": number, "image_id": image, "category_id": category}
    return ids | {"bbox": list(box), "area": 12, "iscrowd": 0, "segmentation": segmentation} | more


def annotated(file, images, annotations):
    listed = [{"id": i, "file_name": f"{i}.jpg", "width": 12, "height": 8} for i in images]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    write_json(file, {"images": listed, "annotations": annotations, "categories": categories})


SQUARE = [[1, 2, 5, 2, 5, 5, 1, 5]]


@pytest.fixture
def coco(tmp_path, small):
    runs = {"size": [8, 12], "counts": [0, 8, 88]}  # the first column
    for split, images in (("train", [1, 2]), ("val", [3])):
        found = [
            annotation(1, images[0], 7, SQUARE),
            annotation(2, images[0], 3, runs, (0, 0, 1, 8)),
            annotation(3, images[0], 3, runs, iscrowd=1),
            annotation(4, images[0], 3, SQUARE, (1, 2, 0, 3)),
        ]
        for i in images:
            picture(tmp_path / "coco" / f"{split}2017" / f"{i}.jpg")
        annotated(tmp_path / "coco" / "annotations" / f"instances_{split}2017.json", images, found)
    return tmp_path


@pytest.fixture
def ade(tmp_path, small):
    for split, names in (("training", "ab"), ("validation", "c")):
        for name in names:
            picture(tmp_path / "ade/ADEChallengeData2016/images" / split / f"{name}.jpg")
            truth = np.zeros((8, 12))
            truth[0], truth[1] = 1, 150
            labels(tmp_path / "ade/ADEChallengeData2016/annotations" / split / f"{name}.png", truth)
    return tmp_path


def test_imagenet(imagenet):
    train, test = (load(IMAGENET, imagenet, split) for split in ("train", "test"))
    assert len(train) == 2 and train.labels == [0, 1] and test.labels == [1]
    assert train.class_names == ("n01", "n02")
    image, label = train[0]
    assert image.shape == (3, 8, 12) and image.dtype == torch.float32 and label == 0
    small = load(IMAGENET, imagenet, "train", lambda picture: torch.tensor(picture.size))
    assert small[0][0].tolist() == [12, 8]
    assert data.status(IMAGENET, imagenet).state == "present"
    refused(BadParameter, "split", load, IMAGENET, imagenet, "val")
    refused(BadParameter, "transform", load, COCO, imagenet, "train", lambda x: x)


def test_coco(coco):
    train = load(COCO, coco, "train")
    image, target = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 12)
    # neither the crowd nor the box without width; labels count from 1, in the order of category ids
    assert target["labels"].tolist() == [2, 1] and target["boxes"].tolist() == [[1, 2, 5, 5], [0, 0, 1, 8]]
    assert target["masks"].shape == (2, 8, 12) and target["masks"].dtype == torch.uint8
    assert target["masks"][0].sum() == 12 and target["masks"][0, 2:5, 1:5].all()
    assert target["masks"][1, :, 0].all() and target["masks"][1].sum() == 8
    _, none = train[1]
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, 8, 12)
    assert data.status(COCO, coco).state == "present"
    (coco / "coco/train2017/2.jpg").unlink()
    assert "2.jpg" in data.status(COCO, coco).detail


def test_ade20k(ade):
    train = load(ADE20K, ade, "train")
    image, truth = train[0]
    assert len(train) == 2 and image.shape == (3, 8, 12) and truth.dtype == torch.int64
    assert truth[0].eq(0).all() and truth[1].eq(149).all() and truth[2:].eq(255).all()
    assert data.status(ADE20K, ade).state == "present"


def test_own_folders(coco, ade):
    folder = coco / "coco"
    assert len(instances(folder / "annotations/instances_val2017.json", folder / "val2017")) == 1
    own = scenes(ade / "ade/ADEChallengeData2016", "validation", 150)
    assert own[0][1].unique().tolist() == [0, 149, 255]
    refused(MissingData, "own", instances, folder / "none.json", folder)
    refused(MissingData, r"images/test", scenes, ade / "ade/ADEChallengeData2016", "test", 150)


def test_own_images_of_all_formats_that_are_decoded(tmp_path):
    for name in ("a.jpg", "b.gif", "c.avif", "._a.jpg"):
        picture(tmp_path / name)
    assert [Path(path).name for path in pictures(tmp_path).sources] == ["a.jpg", "b.gif", "c.avif"]
    assert pictures(tmp_path)[1][0].shape == (3, 8, 12)


def test_incomplete_sets(imagenet, coco, ade, monkeypatch):
    for name in (IMAGENET, COCO, ADE20K):
        with monkeypatch.context() as patch:
            expect(patch, name, sizes={"train": 3, "test": 1})
            refused(MissingData, "3 are expected", load, name, imagenet, "train")
            assert data.status(name, imagenet).state == "incomplete"
    for name in (IMAGENET, COCO):
        expect(monkeypatch, name, classes=3)
    assert "2 categories, 3 are expected" in data.status(COCO, coco).detail
    refused(MissingData, "2 class folders, 3 are expected", load, IMAGENET, imagenet, "train")
    (ade / "ade/ADEChallengeData2016/annotations/training/b.png").unlink()
    refused(MissingData, r"1 of 2 images have no labels.*b\.png", load, ADE20K, ade, "train")
    (coco / "coco/annotations/instances_val2017.json").unlink()
    refused(MissingData, "instances_val2017", load, COCO, coco, "test")


def test_broken_files(imagenet, coco, ade):
    path = imagenet / "imagenet/train/n01/n01_1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    refused(CorruptFile, r"n01_1\.JPEG", lambda: load(IMAGENET, imagenet, "train")[0])
    marked = ade / "ade/ADEChallengeData2016/annotations/training/a.png"
    wrong = {"up to 151": np.full((8, 12), 151), "one label": np.zeros((8, 12, 3)), "its image": np.zeros((8, 11))}
    for word, array in wrong.items():
        labels(marked, array)
        refused(CorruptFile, rf"a\.png.*{word}", lambda: load(ADE20K, ade, "train")[0])
    marked.write_bytes(b"no picture")
    refused(CorruptFile, r"a\.png", lambda: load(ADE20K, ade, "train")[0])
    file = coco / "coco/annotations/instances_train2017.json"
    for shape in ("somewhere", {"size": [8, 12]}, {"size": [8, 13], "counts": [0, 104]}):
        annotated(file, (1, 2), [annotation(5, 1, 3, shape)])
        refused(CorruptFile, r"instances_train2017\.json: annotation 5", lambda: load(COCO, coco, "train")[0])
    file.write_text("{")
    assert data.status(COCO, coco).state == "incomplete"
    refused(CorruptFile, r"instances_train2017\.json", load, COCO, coco, "train")
