"""Boxes scored as COCO and LVIS do, by group, and image-level recognition; bad inputs. The numbers: test_parity."""

import copy
import json
import math

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask

from companion.errors import BadParameter, CorruptFile
from companion.evaluation.metrics import detection
from companion.evaluation.metrics.detection import evaluate, recognition_ap
from companion.evaluation.parity import folder

BOX = [10, 10, 20, 20]


def truth(**image_fields) -> dict:
    """Two images, three classes, of which the third is on none."""
    classes, box = ((3, "a", "f"), (5, "b", "r"), (9, "c", "c")), {"bbox": BOX, "area": 400, "iscrowd": 0}
    return {
        "images": [{"id": i, "width": 100, "height": 100, **image_fields} for i in (1, 2)],
        "categories": [{"id": c, "name": n, "frequency": f} for c, n, f in classes],
        "annotations": [{"id": i, "image_id": i, "category_id": c, **box} for i, c in ((1, 3), (2, 5))],
    }


def row(image: int, category: int, score: float = 0.9, box=BOX) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_a_hit_a_miss_and_a_class_without_boxes():
    scores = evaluate(truth(), [row(1, 3), row(1, 5)], groups={"base": [3], "novel": [5], "none": [9]})
    assert scores.names == ("a", "b", "c") and scores.categories == (3, 5, 9)
    np.testing.assert_allclose(scores.ap50, [100, 0, math.nan])
    assert scores.totals["AP50"] == 50 and scores.totals["AR@100"] == 50
    table = scores.by_group().set_index("group")
    assert table.loc["base", "AP50"] == 100 and table.loc["novel", "AP"] == 0
    assert math.isnan(table.loc["none", "AP50"]) and table.loc["none", "classes"] == 0
    assert table.loc["all", "classes"] == 2
    nothing = evaluate(truth(), [])
    assert nothing.totals["AP50"] == 0 and math.isnan(nothing.ap50[2])


@pytest.mark.parametrize("style", ["coco", "lvis"])
def test_classes_in_blocks_are_scored_as_together(monkeypatch, style):
    rng = np.random.default_rng(0)
    near = (BOX + rng.uniform(-5, 5, (60, 4))).tolist()
    found = [row(1 + i % 2, (3, 5, 9)[i % 3], float(rng.random()), box) for i, box in enumerate(near)]
    known = truth(neg_category_ids=[3, 5, 9])
    whole = evaluate(known, found, style=style)
    monkeypatch.setattr(detection, "BLOCK", 2)  # a class at a time
    apart = evaluate(known, found, style=style)
    np.testing.assert_equal([apart.ap, apart.ap50, apart.totals], [whole.ap, whole.ap50, whole.totals])
    assert 0 < whole.totals["AP50"] < 100


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equal_scores_count_in_the_order_of_image_ids_whatever_that_of_the_file(kind):
    """As in pycocotools: its numbers are those of the library on the file itself, to the last digit."""
    rng, images = np.random.default_rng(0), (7 * np.random.default_rng(1).permutation(np.arange(1, 31))).tolist()
    known, found = truth() | {"annotations": []}, []
    known["images"] = [{"id": i, "width": 100, "height": 100} for i in images]
    for i, image in enumerate(images, 1):
        for shown, boxes in ((True, known["annotations"]), (False, found)):
            x, y, w, h = BOX + rng.uniform(-3, 3, 4)
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            run = mask.frPyObjects(outline, 100, 100)[0]
            boxes.append(row(image, 3, float(rng.integers(1, 4)) / 4, (x, y, w, h)) | {"id": i, "segmentation": run})
            if shown:
                boxes[-1] |= {"segmentation": outline, "area": w * h, "iscrowd": 0}
    gt = COCO(copy.deepcopy(known))
    run = COCOeval_faster(gt, gt.loadRes(copy.deepcopy(found)), kind, print_function=lambda *_: None)
    run.evaluate(), run.accumulate(), run.summarize()
    totals = evaluate(known, found, kind=kind).totals
    ours = [totals[name] for name in ("AP", "AP50", "AP75", "APs")]
    np.testing.assert_allclose(ours, [100 * run.stats[i] for i in range(4)], rtol=1e-14)
    assert 0 < ours[0] < 100


def test_overlap_decides():
    near = [12, 10, 20, 20]  # overlap 18 / 22
    scores = evaluate(truth(), [row(1, 3, box=near)])
    assert math.isclose(scores.ap50[0], 100) and math.isclose(scores.ap[0], 70)  # 0.5 to 0.8


def test_lvis_drops_what_nobody_checked():
    wrong = [row(1, 3), row(2, 5), row(2, 3, 0.99)]  # the last: a class that image 2 does not show
    assert evaluate(truth(), wrong).ap50[0] == pytest.approx(50)
    assert evaluate(truth(), wrong, style="lvis").ap50[0] == pytest.approx(100)
    assert evaluate(truth(neg_category_ids=[3]), wrong, style="lvis").ap50[0] == pytest.approx(50)
    more = [row(1, 3), row(1, 3, 0.99, [60, 60, 20, 20])]
    lenient = evaluate(truth(not_exhaustive_category_ids=[3]), more, style="lvis")
    assert lenient.ap50[0] == pytest.approx(100) and evaluate(truth(), more, style="lvis").ap50[0] == pytest.approx(50)
    assert lenient.totals["APf"] == lenient.ap[0] and math.isnan(lenient.totals["APc"])


def test_only_the_best_rows_count():
    rows = [row(1, 3, 0.1), *(row(1, 3, 0.9, [50 + i, 50, 9, 9]) for i in range(4))]
    assert evaluate(truth(), rows).ap50[0] > 0
    assert evaluate(truth(), rows, top=4).ap50[0] == 0
    # of an image over all classes in LVIS, of each class in COCO
    others = [row(1, 3, 0.1), row(1, 5, 0.9)]
    assert evaluate(truth(), others, top=1).ap50[0] == 100
    assert evaluate(truth(neg_category_ids=[5]), others, style="lvis", top=1).ap50[0] == 0


def test_pictures_may_have_names_for_ids():
    given, names = truth(), {1: "00fe", 2: "b"}
    for entry in given["images"]:
        entry["id"] = names[entry["id"]]
    for entry in given["annotations"]:
        entry["image_id"] = names[entry["image_id"]]
    rows = [row("00fe", 3), row("b", 5)]
    assert evaluate(given, rows).totals["AP50"] == 100
    assert given["annotations"][0] == {**truth()["annotations"][0], "image_id": "00fe"} and rows[0] == row("00fe", 3)


@pytest.mark.parametrize("ids", [(0, 1), (7, 7), None])
def test_ids_of_boxes_do_not_matter(ids):
    """Tools count from 0, files that were put together hold an id twice; the matching takes 0 for "not found"."""
    given = truth()
    for i, annotation in enumerate(given["annotations"]):
        del annotation["id"]
        annotation |= {"id": ids[i]} if ids else {}
    before = json.dumps(given)
    scores = evaluate(given, [row(1, 3), row(2, 5)])
    assert scores.totals["AP50"] == scores.totals["AP"] == 100
    assert json.dumps(given) == before
    lvis = truth(neg_category_ids=[], not_exhaustive_category_ids=[])
    lvis["annotations"] = given["annotations"]
    assert evaluate(lvis, [row(1, 3), row(2, 5)], style="lvis").totals["AP50"] == 100


def test_masks():
    given, square = truth(), np.zeros((100, 100), dtype=np.uint8, order="F")
    for entry in given["annotations"]:
        entry["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
    square[10:30, 10:30] = 1
    rle = {"size": [100, 100], "counts": mask.encode(square)["counts"].decode()}
    assert evaluate(given, [row(1, 3) | {"segmentation": rle}], kind="segm").ap50[0] == pytest.approx(100)


def test_files_are_read(tmp_path):
    case = folder() / "sic_cads" / "eval_ov_coco"
    whole = json.loads((case / "dets.json").read_text())
    assert evaluate(case / "gt.json", case / "dets.json").totals == evaluate(case / "gt.json", whole).totals
    broken = tmp_path / "dets.json"
    for text, inputs, said in (
        (json.dumps(whole)[:-20], (case / "gt.json", broken), r"dets\.json"),
        ('{"images": []}', (broken, whole), "categories"),
        ("3", (case / "gt.json", broken), "list"),
    ):
        broken.write_text(text)
        with pytest.raises(CorruptFile, match=said):
            evaluate(*inputs)


@pytest.mark.parametrize(
    ("part", "field", "style", "said"),
    [
        ("images", None, "coco", "no images"),
        ("categories", None, "coco", "no categories"),
        ("images", "id", "coco", r"images\[0\]: 'id' is missing"),
        ("annotations", "bbox", "coco", r"annotations\[0\]: 'bbox' is missing"),
        ("annotations", "image_id", "coco", "'image_id' is missing"),
        ("categories", "frequency", "lvis", r"categories\[0\]: 'frequency' is missing"),
    ],
)
def test_broken_annotations(part, field, style, said):
    given = truth(neg_category_ids=[], not_exhaustive_category_ids=[])
    given[part].clear() if field is None else given[part][0].pop(field)
    with pytest.raises(CorruptFile, match=said):
        evaluate(given, [row(1, 3)], style=style)


def test_annotations_of_an_unknown_image():
    given = truth()
    given["annotations"][1]["image_id"] = 7
    with pytest.raises(CorruptFile, match=r"annotations\[1\]: 'image_id' is 7"):
        evaluate(given, [row(1, 3)])


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([row(7, 3)], {}, r"image_id \[7\]"),
        ([{"image_id": 1, "bbox": BOX}], {}, "row 0 without"),
        ([3], {}, "row 0 without"),
        ([row(1, 3)], {"style": "voc"}, "style"),
        ([row(1, 3)], {"kind": "keypoints"}, "kind"),
        ([row(1, 3)], {"kind": "segm"}, "segmentation"),
        ([row(1, 3)], {"groups": {"base": [3, 4]}}, r"groups\['base'\]"),
    ],
)
def test_bad_inputs(rows, options, said):
    with pytest.raises(BadParameter, match=said):
        evaluate(truth(), rows, **options)


def test_recognition_is_the_mean_precision_at_the_positives_ranks():
    labels = np.array([[1, 0], [0, 0], [1, 0]])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    ap = recognition_ap(labels, scores)
    assert math.isclose(ap[0], 100 * (1 + 2 / 3) / 2) and math.isnan(ap[1])
    with pytest.raises(BadParameter, match="shape"):
        recognition_ap(labels, scores[:2])
