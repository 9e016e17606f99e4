"""Readers of COCO's and LVIS' files, and errors of broken files; captions and repeat factors: see tests/recipes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.data.coco import read_annotations
from companion.data.detection import caption_labels, load, own
from companion.errors import BadParameter, CorruptFile, MissingData
from companion.io.files import read_json, write_json
from tests.data.conftest import expect, picture, refused, unreadable
from tests.parity.runner import ROOT as FIXTURES

SIZE = (12, 8)  # width, height


def box(number: int, image: int | str, category: int, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": [1, 2, 4, 3], "area": 12} | more


picture = partial(picture, value=90, size=SIZE)


def image(number: int | str, **more) -> dict:
    return {"id": number, "width": SIZE[0], "height": SIZE[1], "file_name": f"{number}.jpg"} | more


def coco_categories() -> list[dict]:
    return read_json(FIXTURES / "sic_cads" / "eval_ov_coco" / "gt.json")["categories"]


@pytest.fixture
def sizes(monkeypatch):
    return partial(expect, monkeypatch)


@pytest.fixture
def coco(tmp_path, sizes) -> Path:
    """Four images per split: of a person, a cat, a hair drier, and of nothing."""
    sizes("detection/ov-coco", sizes={"train": 4, "test": 4})
    for split in ("train", "val"):
        boxes = [box(1, 1, 1), box(2, 1, 17, iscrowd=1), box(3, 2, 17), box(4, 3, 89)]
        found = {"images": [image(i) for i in (1, 2, 3, 4)], "annotations": boxes, "categories": coco_categories()}
        write_json(tmp_path / "coco" / "annotations" / f"instances_{split}2017.json", found)
        for i in (1, 2, 3, 4):
            picture(tmp_path / "coco" / f"{split}2017" / f"{i}.jpg")
    return tmp_path


def test_ov_coco(coco):
    train, test = (load("detection/ov-coco", coco, split) for split in ("train", "test"))
    assert train.image_ids == (1,) and test.image_ids == (1, 2) and len(train.class_names) == train.classes == 80
    assert train.positives.nonzero().tolist() == [[0, 0]]
    assert [[test.class_names[i] for i in row.nonzero()] for row in test.positives] == [["person", "cat"], ["cat"]]
    assert train.unseen.sum() == 32 and test.mask(test.novel).sum() == 17
    pixels, target = test[0]
    assert pixels.shape == (3, 8, 12) and pixels.dtype == torch.uint8
    assert target.boxes.tolist() == [[1, 2, 5, 5]] * 2 and target.crowd.tolist() == [False, True]
    assert [test.class_names[i] for i in target.labels] == ["person", "cat"] and target.image_id == 1


@pytest.mark.parametrize("name", [int, "image {}".format])
@pytest.mark.parametrize("odd", [False, True])  # numbers as pandas writes them, and NaN, which JSON does not have
def test_annotations_are_arrays_and_come_back_as_rows_of_the_file(name, odd, tmp_path):
    shapes = {"size": [8, 12], "counts": [5, 3, 88]}, [[1.5, 2, 4, 2, 4, 5]]
    boxes = [box(7, name(2), 3, iscrowd=1, segmentation=shapes[0]), box(5, name(1), 3, segmentation=shapes[1])]
    boxes.append(box(6, name(1), 4, bbox=[0.25, 0.5, 1.125, 2], iscrowd=None, area=float("nan") if odd else None))
    images = [image(name(i), neg_category_ids=[4]) for i in (1, 2, 3)]
    found = {"images": images, "annotations": boxes, "categories": [{"id": 4, "name": "b"}, {"id": 3, "name": "a"}]}
    text = json.dumps(found | {"info": {}})
    file = tmp_path / "annotations.json"
    file.write_text(text.replace('"category_id": 3', '"category_id": 3.0') if odd else text)
    for each in images:
        picture(tmp_path / each["file_name"])
    mine = own(tmp_path)["train"]
    fields = "id", "image_id", "category_id", "bbox"
    plain = [{field: boxes[i][field] for field in fields} | {"iscrowd": int(i == 0)} for i in (1, 2, 0)]
    areas = [{"area": 12}, {}, {"area": 12}]
    rows = [row | area for row, area in zip(plain, areas, strict=True)]
    assert mine.truth == {"images": images, "annotations": rows, "categories": found["categories"]}
    assert [mine.target(i).labels.tolist() for i in range(3)] == [[0, 1], [0], []]
    part = mine.part([2, 1])
    assert part.truth["annotations"] == rows[2:] and part.target(1).crowd.tolist() == [True]
    assert not mine.annotations.text and mine.annotations.boxes.dtype == np.float64
    shaped = read_annotations(file, shapes=True)["annotations"]
    assert [shaped.shape(i) for i in range(3)] == [*shapes, None] and shaped.images.tolist() == [1, 0, 0]


def lvis_file(**change) -> dict:
    told = (1, "a_b", "f"), (2, "c", "r"), (3, "d", "c")
    categories = [{"id": i, "name": name, "frequency": often} | change for i, name, often in told]
    where = "http://images.cocodataset.org/val2017/000000000001.jpg"
    images = [{"id": 1, "width": 12, "height": 8, "coco_url": where, "neg_category_ids": [3]}]
    return {"images": images, "annotations": [box(1, 1, 1), box(2, 1, 2)], "categories": categories}


def test_ov_lvis(tmp_path, sizes):
    sizes("detection/ov-lvis", sizes={"train": 1, "test": 1}, classes=3)
    for split in ("train", "val"):
        write_json(tmp_path / "lvis" / f"lvis_v1_{split}.json", lvis_file())
    picture(tmp_path / "coco" / "val2017" / "000000000001.jpg")
    train, test = (load("detection/ov-lvis", tmp_path, split) for split in ("train", "test"))
    assert train[0][1].labels.tolist() == [0] and test[0][1].labels.tolist() == [0, 1]
    assert train.base == (1, 3) and train.novel == (2,) and test.unseen.tolist() == [False, True, False]
    write_json(tmp_path / "lvis" / "lvis_v1_train.json", lvis_file(frequency="often"))
    refused(CorruptFile, "often", load, "detection/ov-lvis", tmp_path, "train")


def test_the_names_of_objects365_are_mended_by_a_table(tmp_path, sizes):
    sizes("detection/objects365", sizes={"test": 1}, classes=2)
    categories = [{"id": 2, "name": "Sneakers"}, {"id": 1, "name": "Persn"}]
    found = {"images": [image(7, file_name="images/v1/7.jpg")], "annotations": [], "categories": categories}
    root = tmp_path / "objects365"
    write_json(root / "annotations" / "zhiyuan_objv2_val.json", found)
    picture(root / "val" / "images" / "v1" / "7.jpg")
    plain = load("detection/objects365", tmp_path, "test")
    assert plain.class_names == ("Persn", "Sneakers") and plain.base == plain.novel == ()
    table = root / "Objects365_names_fix.csv"
    table.write_text("1,Persn,Person\n2,Sneakers,Sneakers\n")
    assert load("detection/objects365", tmp_path, "test").class_names == ("Person", "Sneakers")
    unreadable(table, lambda: load("detection/objects365", tmp_path, "test"), {"Persn;Person\n": ""})


def test_own_folder_with_labels_without_boxes(tmp_path):
    found = {"images": [image(1, pos_category_ids=[5])], "categories": [{"id": 5, "name": "a"}, {"id": 8, "name": "b"}]}
    write_json(tmp_path / "annotations.json", found)
    picture(tmp_path / "1.jpg")
    mine = own(tmp_path, ["b"])["train"]
    assert mine.positives.tolist() == [[True, False]] and mine.novel == (8,) and mine.base == (5,)
    assert mine[0][1].boxes.shape == (0, 4)
    refused(BadParameter, "'c'", own, tmp_path, ["c"])


def test_images_that_are_broken_or_missing(coco, sizes):
    name = "detection/ov-coco"
    assert data.status(name, coco, "train", "test").state == "present"
    assert "captions_train2017.json" in data.status(name, coco).lacking["captions"]
    test, file = load(name, coco, "test"), coco / "coco" / "val2017" / "1.jpg"
    Image.new("RGB", (5, 5)).save(file)
    refused(CorruptFile, r"1\.jpg.*5, 5", lambda: test[0])
    write_json(coco / "coco/annotations/captions_train2017.json", {"images": [image(1)], "annotations": []})
    refused(MissingData, "no image for 'captions'", load, name, coco, "captions")
    file.with_name("2.jpg").unlink()
    refused(MissingData, r"2\.jpg", load, name, coco, "test")
    sizes(name, sizes={"train": 4, "test": 5_000})
    refused(MissingData, "4 images .*5,000", load, name, coco, "test")


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),  # red is above in the file; the rows or columns of the result that are red
    [
        (6, SIZE, (slice(None), -1)),
        (6, SIZE[::-1], (0, slice(None))),
        (3, SIZE[::-1], (-1, slice(None))),
        (1, SIZE[::-1], (0, slice(None))),
    ],
)
def test_a_rotated_photograph_is_read_as_its_annotation_describes_it(coco, mine, orientation, size, red):
    """Some tools annotate a camera's image as it is stored, others upright; upright where both have one size."""
    file = coco / "coco" / "annotations" / "instances_val2017.json"
    found = read_json(file)
    found["images"][0] |= dict(zip(("width", "height"), size, strict=True))
    write_json(file, found)
    folder = coco / "coco" / "val2017"
    stored = Image.new("RGB", SIZE[::-1])
    stored.paste((255, 0, 0), (0, 0, 8, 6))
    exif = stored.getexif()
    exif[274] = orientation
    stored.save(folder / "1.jpg", exif=exif, quality=95)
    write_json(folder / "annotations.json", found)
    pixels, _ = (own(folder)["train"] if mine else load("detection/ov-coco", coco, "test"))[0]
    assert pixels.shape == (3, *size[::-1])
    opposite = tuple(-1 - one if isinstance(one, int) else one for one in red)
    assert pixels[0][red].min() > 200 and pixels[0][opposite].max() < 50


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"annotations": [{"image_id": 1}]}, "annotations[0]: 'caption'"),
        ({"annotations": [{"image_id": 1, "caption": None}]}, "annotations[0]: 'caption'"),
        ({"annotations": [["a"]]}, "annotations[0]"),
        ({"images": [{"file_name": "a.jpg"}]}, "images[0]: 'id'"),
        ({"images": None}, "'images'"),
    ],
)
def test_malformed_captions_are_named(changes, named):
    captions = {"images": [image(1)], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    categories = [{"id": 17, "name": "cat"}]
    assert caption_labels(captions, categories)["images"][0]["pos_category_ids"] == [17]
    for error, file in ((CorruptFile, "captions.json"), (BadParameter, None)):
        with pytest.raises(error) as raised:
            caption_labels(captions | changes, categories, file)
        assert named in str(raised.value) and (file or "captions") in str(raised.value)


def test_broken_annotations_are_named(coco):
    """Boxes: see tests/test_odd_files.py."""
    file = coco / "coco" / "annotations" / "instances_val2017.json"
    whole = file.read_text()

    def changed(part: str, number: int, **fields: object) -> str:
        found = json.loads(whole)
        found[part][number] |= fields
        return json.dumps(found)

    contents = {
        changed("images", 0, height=0): "images[0]: 'height'",
        changed("images", 1, id=1): "images[1]: id 1",
        changed("images", 0, file_name="../../etc/passwd"): "images[0]",
        changed("images", 0, neg_category_ids=[12]): "images[0]",
        changed("annotations", 0, image_id=99): "annotations[0]",
        changed("annotations", 2, category_id=10**30): "annotations[2]: 'category_id'",
        changed("annotations", 2, bbox=[1, 2, 4, -3]): "annotations[2]: 'bbox'",
        changed("annotations", 1, iscrowd="0"): "annotations[1].iscrowd",
        changed("categories", 1, id=1): "categories[1]",
        changed("categories", 0, id=100).replace('"category_id": 1,', '"category_id": 17,'): "person",
        whole[: len(whole) // 2]: "",
    }
    unreadable(file, lambda: load("detection/ov-coco", coco, "test"), contents)
    file.unlink()
    assert "instances_val2017.json" in data.status("detection/ov-coco", coco).detail
