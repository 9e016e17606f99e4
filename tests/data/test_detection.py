"""Readers of COCO's and LVIS' files, the splits of open-vocabulary detection, and errors of broken files."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.data import detection
from companion.data.detection import OV_COCO_BASE, OV_COCO_NOVEL, load, ov_coco, ov_lvis, own_folder, splits
from companion.data.detection_sets import COCO_BASE, COCO_NOVEL
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.evaluation.parity import folder as fixtures
from companion.ops.files import read_json, write_json
from tests.data.conftest import expect, picture, refused

SIZE = (12, 8)  # width, height


def box(number: int, image: int | str, category: int, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": [1, 2, 4, 3], "area": 12} | more


picture = partial(picture, value=90, size=SIZE)


def image(number: int | str, **more) -> dict:
    return {"id": number, "width": SIZE[0], "height": SIZE[1], "file_name": f"{number}.jpg"} | more


def coco_categories() -> list[dict]:
    return read_json(fixtures() / "sic_cads" / "eval_ov_coco" / "gt.json")["categories"]


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


def test_the_split_of_coco_is_that_of_the_papers():
    index = {c["id"]: i for i, c in enumerate(sorted(coco_categories(), key=lambda c: c["id"]))}
    named = {c["name"]: c["id"] for c in coco_categories()}
    assert len(OV_COCO_BASE) == 48 and len(OV_COCO_NOVEL) == 17 and not set(OV_COCO_BASE) & set(OV_COCO_NOVEL)
    assert all(named[name] == i for name, i in {**COCO_BASE, **COCO_NOVEL}.items())
    case = read_json(fixtures() / "sic_cads" / "mlr_losses" / "case.json")["config"]
    assert [index[i] for i in OV_COCO_BASE] == case["base_class_indices"]
    assert {index[i] for i in named.values()} - {index[i] for i in OV_COCO_BASE} == set(case["novel_class_indices"])


def test_ov_coco(coco):
    sets = splits("detection/ov-coco", coco)
    train, test = sets["train"], sets["test"]
    assert train.image_ids == (1,) and test.image_ids == (1, 2)
    assert len(train.class_names) == 80 and train.classes == 80
    assert train.positives.nonzero().tolist() == [[0, 0]]
    assert test.positives.sum(1).tolist() == [2, 1]
    assert train.unseen.sum() == 32 and test.mask(test.novel).sum() == 17
    pixels, target = test[0]
    assert pixels.shape == (3, 8, 12) and pixels.dtype == torch.uint8
    assert target.boxes.tolist() == [[1, 2, 5, 5]] * 2 and target.crowd.tolist() == [False, True]
    assert [test.class_names[i] for i in target.labels] == ["person", "cat"] and target.image_id == 1
    # images of rare classes are repeated: a person is on half of the images, a cat on both
    np.testing.assert_allclose(detection.repeat_factors(test, 0.001), [1, 1])
    np.testing.assert_allclose(detection.repeat_factors(test, 2), [2, np.sqrt(2)])
    refused(BadParameter, "split", load, "detection/ov-coco", coco, "val")
    refused(BadParameter, "split", ov_coco, {}, "val")


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
    sets = splits("detection/ov-lvis", tmp_path)
    assert len(sets["train"].truth["annotations"]) == 1 and len(sets["test"].truth["annotations"]) == 2
    assert sets["train"].base == (1, 3) and sets["train"].novel == (2,)
    assert sets["test"].unseen.tolist() == [False, True, False]
    assert sets["test"][0][0].shape == (3, 8, 12)
    assert data.status("detection/ov-lvis", tmp_path).state == "present"
    write_json(tmp_path / "lvis" / "lvis_v1_train.json", lvis_file(frequency="often"))
    refused(CorruptFile, "'frequency' is 'often'", load, "detection/ov-lvis", tmp_path, "train")
    refused(BadParameter, "split", ov_lvis, lvis_file(), "val")


def test_foreign_vocabularies(tmp_path, sizes):
    sizes("detection/objects365", sizes={"test": 1}, classes=2)
    sizes("detection/openimages", classes=2)
    o365 = tmp_path / "objects365"
    categories = [{"id": 2, "name": "Sneakers"}, {"id": 1, "name": "Persn"}]
    found = {"images": [image(7, file_name="images/v1/patch0/7.jpg")], "categories": categories}
    write_json(o365 / "annotations" / "zhiyuan_objv2_val.json", found | {"annotations": [box(1, 7, 2)]})
    picture(o365 / "val" / "images" / "v1" / "patch0" / "7.jpg")
    plain = load("detection/objects365", tmp_path, "test")
    assert plain.class_names == ("Persn", "Sneakers") and plain.base == plain.novel == ()
    (o365 / "Objects365_names_fix.csv").write_text("1,Persn,Person\n2,Sneakers,Sneakers\n")
    assert load("detection/objects365", tmp_path, "test").class_names == ("Person", "Sneakers")
    (o365 / "Objects365_names_fix.csv").write_text("Persn;Person\n")
    refused(CorruptFile, "names_fix", load, "detection/objects365", tmp_path, "test")

    oid = {"images": [image("00fe", file_name="0/00fe.jpg")], "annotations": [box(1, "00fe", 1)]}
    file = tmp_path / "oid" / "annotations" / "oid_challenge_2019_val_expanded.json"
    write_json(file, oid | {"categories": categories})
    picture(tmp_path / "oid" / "images" / "0" / "00fe.jpg")
    assert load("detection/openimages", tmp_path, "test")[0][1].image_id == "00fe"


def test_caption_labels_are_whole_words_of_any_synonym():
    dog = {"id": 2, "name": "hot_dog", "synonyms": ["hot_dog", "frank"]}
    categories = [{"id": 1, "name": "cat"}, dog, {"id": 3, "name": "car_(vehicle)"}]
    said = [(1, "A cat on a carpet"), (2, "Two"), (2, "frank people"), (3, "catalogue of cars"), (4, "a hot dog")]
    said += [(5, "cat"), (6, "a car, a cat."), (7, "the Car"), (8, "a cat sat")]
    annotations = [{"image_id": i, "caption": text} for i, text in said]
    captions = {"images": [{"id": i} for i in range(1, 10)], "annotations": annotations}
    found = detection.caption_labels(captions, categories)
    labels = {entry["id"]: entry["pos_category_ids"] for entry in found["images"]}
    assert labels == {1: [1], 2: [2], 4: [2], 7: [3], 8: [1]}


def test_coco_has_the_synonyms_of_lvis():
    found = {c["name"]: c["synonyms"] for c in detection.with_synonyms(coco_categories())}
    assert len(found) == 80 and {"man", "woman"} <= set(found["person"]) and found["hot dog"] == ["sausage"]
    counts = [[c["frequency"] for c in detection.lvis_categories()].count(letter) for letter in "fcr"]
    assert counts == [405, 461, 337]


def test_labels_without_boxes_are_positives(tmp_path):
    found = {"images": [image(1, pos_category_ids=[5])], "categories": [{"id": 5, "name": "a"}, {"id": 8, "name": "b"}]}
    write_json(tmp_path / "labels.json", found)
    picture(tmp_path / "1.jpg")
    mine = own_folder(tmp_path / "labels.json", tmp_path, novel=["b"])
    assert mine.positives.tolist() == [[True, False]] and mine.novel == (8,) and mine.base == (5,)
    assert mine[0][1].boxes.shape == (0, 4)
    refused(BadParameter, "novel", own_folder, tmp_path / "labels.json", tmp_path, novel=["c"])
    refused(MissingData, "nothing", own_folder, tmp_path / "nothing.json", tmp_path)


def test_pictures_that_are_broken_or_missing(coco, sizes):
    assert data.status("detection/ov-coco", coco).state == "present"
    test = load("detection/ov-coco", coco, "test")
    folder, file = coco / "coco" / "val2017", coco / "coco" / "val2017" / "1.jpg"
    file.write_bytes(file.read_bytes()[:200])
    refused(CorruptFile, r"1\.jpg", lambda: test[0])
    Image.new("RGB", (5, 5)).save(file)
    refused(CorruptFile, "its annotation has", lambda: test[0])
    (folder / "2.jpg").unlink()
    found = data.status("detection/ov-coco", coco)
    assert found.state == "incomplete" and "2.jpg" in found.detail
    file.unlink()
    refused(MissingData, r"1\.jpg", lambda: test[0])
    refused(MissingData, r"1\.jpg, which is not in", load, "detection/ov-coco", coco, "test")
    sizes("detection/ov-coco", sizes={"train": 4, "test": 5_000})
    refused(MissingData, "4 images, 5,000 are expected", load, "detection/ov-coco", coco, "test")
    (coco / "coco" / "annotations" / "instances_val2017.json").unlink()
    assert "instances_val2017.json" in data.status("detection/ov-coco", coco).detail


def test_a_photograph_that_lies_on_its_side_is_as_its_annotation_says(coco):
    """Some tools annotate a camera's image as it is stored, others as it is seen."""
    test = load("detection/ov-coco", coco, "test")
    entry, file = test.truth["images"][0], coco / "coco" / "val2017" / "1.jpg"
    width, height = entry["width"], entry["height"]
    assert width != height
    stored = Image.new("RGB", (height, width))
    stored.paste((255, 0, 0), (0, 0, height, width // 2))  # above in the file, and to the right when it is seen
    exif = stored.getexif()
    exif[274] = 6
    stored.save(file, exif=exif, quality=95)
    seen, _ = test[0]
    assert seen.shape == (3, height, width) and seen[0, :, -1].min() > 200 and seen[0, :, 0].max() < 50
    entry["width"], entry["height"] = height, width
    lying, _ = test[0]
    assert lying.shape == (3, width, height) and lying[0, 0].min() > 200 and lying[0, -1].max() < 50


def change(where: str, number: int = 0, **fields):
    def apply(found: dict) -> None:
        found[where][number] |= fields

    return apply


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (change("annotations", 1, category_id=12), r"annotations\[1\]: 'category_id' is 12"),
        (change("annotations", 2, category_id=None), r"annotations\[2\]: 'category_id' is None"),
        (change("annotations", image_id=99), r"annotations\[0\]: 'image_id' is 99"),
        (change("annotations", bbox=[1, 2, 3]), "'bbox' is"),
        (change("annotations", bbox=[1, 2, -3, 4]), "'bbox' is"),
        (change("annotations", bbox=[1, 2, 3, float("nan")]), "'bbox' is"),
        (change("annotations", bbox="1 2 3 4"), "'bbox' is"),
        (change("images", width="12"), r"images\[0\]: 'width' is '12'"),
        (change("images", height=0), r"images\[0\]: 'height' is 0"),
        (change("images", 1, id=1), r"images\[1\]: id 1 stands there twice"),
        (change("images", file_name="../../etc/passwd"), "leaves the data set's folder"),
        (change("images", file_name=None), "'file_name' is None"),
        (change("images", neg_category_ids=[12]), "'neg_category_ids' has"),
        (change("images", neg_category_ids=[[1]]), "'neg_category_ids' has"),
        (change("images", neg_category_ids=None), r"images\[0\]: 'neg_category_ids' is None"),
        (change("images", not_exhaustive_category_ids=5), "'not_exhaustive_category_ids' is 5"),
        (change("categories", name=3), r"categories\[0\]: 'name' is 3"),
        (change("categories", 1, id=1), "id 1 stands there twice"),
        (lambda found: found.pop("categories"), "no list 'categories'"),
        (lambda found: found["images"].clear() or found["annotations"].clear(), "no images"),
    ],
)
def test_broken_annotations(coco, broken, said):
    file = coco / "coco" / "annotations" / "instances_val2017.json"
    found = read_json(file)
    broken(found)
    write_json(file, found)
    with pytest.raises(CorruptFile, match=said) as caught:
        load("detection/ov-coco", coco, "test")
    assert caught.value.path == file
    assert data.status("detection/ov-coco", coco).state == "incomplete"


def test_other_broken_files(coco):
    file = coco / "coco" / "annotations" / "instances_val2017.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    refused(CorruptFile, "not JSON", detection.read_annotations, file)
    file.write_text("[]")
    refused(CorruptFile, "an object", detection.read_annotations, file)
    shifted = json.loads(whole)
    for category in shifted["categories"]:
        category["id"] = 1 + category["id"]
    shifted["annotations"] = []
    file.write_text(json.dumps(shifted))
    refused(CorruptFile, "COCO's ids", load, "detection/ov-coco", coco, "test")
    file.write_text(json.dumps(json.loads(whole) | {"categories": coco_categories()[:79]}))
    refused(CompanionError, r"79 categories|which no category is", load, "detection/ov-coco", coco, "test")
