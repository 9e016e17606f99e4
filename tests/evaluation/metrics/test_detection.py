"""Boxes scored by the rules of COCO and LVIS, by group; malformed inputs. The recorded numbers: test_parity."""

import json
import math

import numpy as np
import pytest

from companion.errors import CorruptFile
from companion.evaluation.metrics import detection
from companion.evaluation.metrics.detection import evaluate
from tests.models.common import refuses
from tests.parity.runner import ROOT as PARITY

BOX = [10, 10, 20, 20]


def truth(**image_fields) -> dict:
    """Two images, three classes, of which the third is on none."""
    classes, box = ((3, "a", "f"), (5, "b", "r"), (9, "c", "c")), {"bbox": BOX, "area": 400, "iscrowd": 0}
    return {
        "images": [{"id": i, "width": 100, "height": 100, **image_fields} for i in (1, 2)],
        "categories": [{"id": c, "name": n, "frequency": f} for c, n, f in classes],
        "annotations": [{"id": i, "image_id": i, "category_id": c, **box} for i, c in ((1, 3), (2, 5))],
    }


def row(image: int | str, category: int, score: float = 0.9, box=BOX) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_a_hit_a_miss_and_a_class_without_boxes():
    found = [row(1, 3, box=[12, 10, 20, 20]), row(1, 5)]  # an overlap of 18 / 22: a hit up to 0.8
    scores = evaluate(truth(), found)
    assert scores.names == ("a", "b", "c") and scores.categories == (3, 5, 9)
    np.testing.assert_allclose([scores.ap50, scores.ap], [[100, 0, math.nan], [70, 0, math.nan]])
    assert scores.totals["AP50"] == scores.totals["AP75"] == 50 and scores.totals["AR@100"] == pytest.approx(35)
    assert [scores.mean(group) for group in ([3], [5], [3, 5])] == [100, 0, 50] and math.isnan(scores.mean([9]))
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


def test_equal_scores_count_in_the_order_of_image_ids_whatever_that_of_the_file():
    """As in pycocotools: of two equal scores that of the image with the smaller id comes first."""
    found, totals = [row(1, 3, 0.5), row(2, 3, 0.5)], []
    for order in (1, -1):
        known = truth()
        known["images"] = known["images"][::order]
        totals += [evaluate(known, rows).ap50[0] for rows in (found, found[::-1])]
    assert totals == [100] * 4


RIGHT, SECOND = row(1, 3), row(2, 5)
ELSEWHERE = row(2, 3, 0.99)  # of a class that image 2 does not show
FOUR_BETTER = [row(1, 3, 0.1), *(row(1, 3, 0.9, [50 + i, 50, 9, 9]) for i in range(4))]


@pytest.mark.parametrize(
    ("fields", "rows", "options", "ap50"),
    [
        ({}, [RIGHT, SECOND, ELSEWHERE], {}, 50),
        ({}, [RIGHT, SECOND, ELSEWHERE], {"style": "lvis"}, 100),  # nobody checked whether it shows it
        ({"neg_category_ids": [3]}, [RIGHT, SECOND, ELSEWHERE], {"style": "lvis"}, 50),
        ({}, [RIGHT, row(1, 3, 0.99, [60, 60, 20, 20])], {"style": "lvis"}, 50),
        ({"not_exhaustive_category_ids": [3]}, [RIGHT, row(1, 3, 0.99, [60, 60, 20, 20])], {"style": "lvis"}, 100),
        ({}, FOUR_BETTER, {}, 20),
        ({}, FOUR_BETTER, {"top": 4}, 0),
        # the best of a class in COCO, of an image in LVIS
        ({}, [row(1, 3, 0.1), row(1, 5)], {"top": 1}, 100),
        ({"neg_category_ids": [5]}, [row(1, 3, 0.1), row(1, 5)], {"top": 1, "style": "lvis"}, 0),
    ],
)
def test_rows_that_count(fields, rows, options, ap50):
    scores = evaluate(truth(**fields), rows, **options)
    assert scores.ap50[0] == pytest.approx(ap50)
    if options.get("style") == "lvis":
        assert scores.totals["APf"] == scores.ap[0] and math.isnan(scores.totals["APc"])


@pytest.mark.parametrize("shape", [None, [[10, 10, 40, 10, 10, 40]], {"size": [100, 100], "counts": [1010, 100, 8890]}])
def test_an_area_that_is_not_given_is_that_of_the_shape_or_of_the_box(shape):
    """A triangle of 30 by 30 and runs of 100 pixels are small objects in a box of medium size."""
    given = truth()
    for annotation in given["annotations"]:
        annotation |= {"bbox": [10, 10, 40, 40]}
        del annotation["area"]
        annotation |= {"segmentation": shape} if shape else {}
    totals = evaluate(given, [row(i, c, box=[10, 10, 40, 40]) for i, c in ((1, 3), (2, 5))]).totals
    size, other = ("APs", "APm") if shape else ("APm", "APs")
    assert totals[size] == 100 and math.isnan(totals[other])
    assert all("area" not in annotation for annotation in given["annotations"])


def test_ids_of_boxes_do_not_matter_and_images_may_have_names():
    """Tools count from 0, files that were put together hold an id twice; the matching takes 0 for "not found"."""
    given, names = truth(), {1: "00fe", 2: "b"}
    for image in given["images"]:
        image["id"] = names[image["id"]]
    for annotation in given["annotations"]:
        annotation |= {"image_id": names[annotation["image_id"]], "id": 0}
    before = json.dumps(given)
    scores = evaluate(given, [row("00fe", 3), row("b", 5)])
    assert scores.totals["AP50"] == scores.totals["AP"] == 100 and json.dumps(given) == before


def test_files_are_read_and_malformed_inputs_refused(tmp_path):
    case, cut = PARITY / "sic_cads" / "eval_ov_coco", tmp_path / "dets.json"
    whole = json.loads((case / "dets.json").read_text())
    assert evaluate(case / "gt.json", case / "dets.json").totals == evaluate(case / "gt.json", whole).totals
    cut.write_text(json.dumps(whole)[:-20])

    def broken(part: str, field: str, **change):
        given = truth()
        given[part][-1].pop(field)
        given[part][-1] |= change
        return lambda: evaluate(given, [RIGHT], style="lvis")

    refuses(
        (lambda: evaluate(case / "gt.json", cut), "dets.json"),
        (broken("annotations", "bbox"), "'bbox'"),
        (broken("categories", "frequency"), "'frequency'"),
        (broken("annotations", "image_id", image_id=7), "7"),
        (broken("annotations", "category_id", category_id=77), "77"),
        error=CorruptFile,
    )
    refuses(
        (lambda: evaluate(truth(), [row(7, 3)]), "7"),
        (lambda: evaluate(truth(), [RIGHT], kind="segm"), "segmentation"),
        (lambda: evaluate(truth(), [RIGHT], top=0), "top"),
    )
