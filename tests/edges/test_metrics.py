"""Every argument of every metric at its edge, and metrics against other libraries on random inputs with ties."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor
from torchvision.ops import box_iou

from companion.evaluation import metrics
from companion.evaluation.metrics import attributes, detection, landcover, radiology, restoration, tracking
from companion.models.hvit import model as hvit
from tests.edges.common import Edge, check

LABELS = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])
SCORES = torch.tensor([[0.125, 0.875], [0.75, 0.25], [0.75, 0.625], [0.25, 0.375]])
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
GRADES = torch.tensor([0, 1, 2, 5])
TRUE, FOUND = torch.tensor([[[0, 0.5, 0.5, 0.25, 0.25]]]), torch.tensor([[84, 84, 140, 140, 0.875, 0.875, 0]])
COUNTS = torch.tensor([[5, 1, 0], [2, 7, 0], [0, 0, 3]])
BOXES = np.array([[10, 10, 20, 20], [12, 10, 20, 20], [14, 10, 20, 22.0]])
ANYWHERE = "-1, 0.5, 255, 1e+09"  # of a score that is only ranked


@dataclass
class Video:
    boxes: np.ndarray
    boxes_infrared: np.ndarray
    absent: np.ndarray
    name: str = "a"
    attributes: frozenset[str] = frozenset({"LI"})

    def __len__(self) -> int:
        return len(self.boxes)


def tracked(rules: str) -> Edge:
    def call(results, boxes, absent, pixels, infrared=None):
        return tracking.evaluate({"a": results}, [Video(boxes, infrared, absent)], rules, pixels).totals

    anywhere = "-1, 0.5, 255, 1e+09"
    accepts = {"results": f"{anywhere}, row more", "boxes": anywhere, "pixels": "0, 1, 2.5, None", "absent": ""}
    arrays = {"results": BOXES + 1, "boxes": BOXES, "absent": np.array([False, False, True])}
    if rules in ("rgbt234", "gtot"):  # the others do not read the second stream
        arrays["infrared"], accepts["infrared"] = BOXES, anywhere
    return Edge(call, arrays | {"pixels": 5}, accepts)


EDGES = {
    "accuracy": Edge(
        metrics.accuracy, {"labels": LABELS[:, 0], "outputs": SCORES}, {"outputs": f"{ANYWHERE}, column more"}
    ),
    "attributes": Edge(
        lambda labels, probabilities, threshold: attributes.evaluate(labels, probabilities, threshold).totals,
        {"labels": LABELS, "probabilities": SCORES, "threshold": 0.45},
        {"labels": "-1, 255, 1e+09", "probabilities": "0.5", "threshold": "0, 1"},
        attributes.evaluate,
    ),
    "decode": Edge(
        lambda probabilities, names, threshold: [len(attributes.decode(probabilities, ["a", "b"], threshold))],
        {"probabilities": SCORES, "names": 1, "threshold": 0.45},
        {
            "probabilities": "0.5, row more, row less, empty",
            "threshold": "0, 1",
            "names": "0, -1, 1, 2.5, nan, inf, 'x', None",
        },
        attributes.decode,
    ),
    "recognition": Edge(detection.recognition_ap, {"labels": LABELS, "scores": SCORES}, {"scores": ANYWHERE}),
    "AUROC": Edge(radiology.mean_auroc, {"labels": LABELS, "scores": SCORES}, {"scores": ANYWHERE}),
    "dice": Edge(
        lambda probability, truth: radiology.dice(probability, truth),
        {"probability": SCORES, "truth": LABELS},
        {"probability": "0.5", "truth": "0.5"},
    ),
    "mAP": Edge(
        lambda found, boxes, size: radiology.mean_precision([found], boxes, size),
        {"found": FOUND, "boxes": TRUE, "size": 224},
        {"found": f"{ANYWHERE}, row more, row less, empty", "boxes": "0.5, 255, 1e+09", "size": "1, 2.5"},
    ),
    "confusion": Edge(
        landcover.confusion, {"truth": GRADES, "predicted": GRADES, "classes": 6}, {"truth": "-1, 255, 1e+09"}
    ),
    "land": Edge(
        lambda matrix: landcover.scores(matrix)[2:], {"matrix": COUNTS}, {"matrix": "0.5, 255, 1e+09, turned"}
    ),
    "PSNR": Edge(restoration.psnr, {"restored": IMAGES * 0.5, "clean": IMAGES}, {"restored": "0.5", "clean": "0.5"}),
    "SSIM": Edge(restoration.ssim, {"restored": IMAGES * 0.5, "clean": IMAGES}, {"restored": "0.5", "clean": "0.5"}),
    "kappa": Edge(
        metrics.quadratic_kappa, {"truth": GRADES, "predicted": GRADES}, {"truth": "255", "predicted": "255"}
    ),
    **{
        f"grades, {head}": Edge(
            functools.partial(hvit.graded, head),
            {"outputs": torch.randn(2, 5), "classes": 6},
            {"outputs": f"{ANYWHERE}, row more, row less, column more, column less, turned", "classes": "2.5"},
        )
        for head in hvit.HEADS
    },
    **{
        f"probabilities, {head}": Edge(
            functools.partial(hvit.probabilities, head),
            {"outputs": torch.randn(2, 5)},
            {"outputs": f"{ANYWHERE}, row more, row less, column more, column less, turned"},
        )
        for head in hvit.HEADS
        if head != "regression"
    },
    "vote": Edge(
        lambda grades: [hvit.vote(grades)],
        {"grades": torch.tensor([1, 1, 2])},
        {"grades": "255, 1e+09, row more, row less"},
    ),
    "overlap": Edge(
        tracking.iou,
        {"first": BOXES, "second": BOXES + 1},
        dict.fromkeys(("first", "second"), f"{ANYWHERE}, axis less, axis more"),
    ),
    "distance": Edge(
        lambda first, second: tracking.centre_distance(first, second, normalised=True),
        {"first": BOXES, "second": BOXES + 1},
        dict.fromkeys(("first", "second"), f"{ANYWHERE}, axis less, axis more"),
    ),
    **{f"tracking, {rules}": tracked(rules) for rules in tracking.RULES},
}


def numbers(found: object) -> Tensor:
    values = found.values() if isinstance(found, dict) else found
    return torch.as_tensor(np.array([*values]) if isinstance(found, dict | list | tuple) else values).double()


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    assert check(EDGES[name], numbers=numbers)


# --- against other libraries ------------------------------------------------------------------------------------------

TIES = st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Labels 0 or 1, each class with both, and scores with ties, (n, C)."""
    images, classes = draw(st.integers(2, 12)), draw(st.integers(2, 4))
    labels = draw(st.lists(st.lists(st.integers(0, 1), min_size=classes, max_size=classes), min_size=images))
    scores = draw(
        st.lists(st.lists(TIES, min_size=classes, max_size=classes), min_size=len(labels), max_size=len(labels))
    )
    both = torch.eye(2, dtype=torch.long)[:, :1].expand(2, classes)
    return torch.cat([both, torch.tensor(labels)]), torch.cat(
        [torch.rand(2, classes).round(decimals=2), torch.tensor(scores)]
    )


@given(tables())
@settings(max_examples=60, deadline=None)
def test_scores_of_labels_equal_those_of_other_libraries(pair):
    labels, scores = pair
    count = labels.shape[1]
    area = tm.auroc(scores, labels, "multilabel", num_labels=count, average="macro")
    assert radiology.mean_auroc(labels, scores) == pytest.approx(100 * float(area), abs=1e-4)
    precise = sk.average_precision_score(labels.numpy(), scores.numpy(), average=None)
    np.testing.assert_allclose(detection.recognition_ap(labels, scores), 100 * precise)
    said, found = scores.numpy() > 0.45, attributes.evaluate(labels, scores).totals
    balanced = [sk.balanced_accuracy_score(labels[:, c], said[:, c]) for c in range(count)]
    assert found["mA"] == pytest.approx(100 * np.mean(balanced))
    options = {"average": "samples", "zero_division": 0}
    assert found["Acc"] == pytest.approx(100 * sk.jaccard_score(labels, said, **options))
    assert found["F1"] == pytest.approx(100 * sk.f1_score(labels, said, **options))
    first = scores.eq(scores.amax(1, keepdim=True)).int().argmax(1)  # of equal scores the first
    assert metrics.accuracy(labels[:, 0], scores) == pytest.approx(100 * sk.accuracy_score(labels[:, 0], first))
    one = radiology.dice(scores, labels, "plain").nanmean()
    assert float(one) == pytest.approx(sk.f1_score(labels[labels.any(1)], scores[labels.any(1)] > 0.5, **options))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_scores_of_classes_equal_those_of_other_libraries(rows):
    truth, predicted, ignored = map(np.array, zip(*rows, strict=True))
    kappa = sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(6))
    assert metrics.quadratic_kappa(torch.tensor(truth), torch.tensor(predicted)) == pytest.approx(np.nan_to_num(kappa))
    matrix = landcover.confusion(torch.tensor(np.where(ignored, 255, truth)), torch.tensor(predicted), 6)
    kept = ~ignored
    assert matrix.equal(
        torch.tensor(sk.confusion_matrix(truth[kept], predicted[kept], labels=range(6))) if kept.any() else matrix * 0
    )
    if kept.any():
        there = sorted({*truth[kept], *predicted[kept]})
        found = landcover.scores(matrix)
        options = {"labels": there, "average": "macro", "zero_division": 0}
        assert found.miou == pytest.approx(100 * sk.jaccard_score(truth[kept], predicted[kept], **options))
        assert found.mf1 == pytest.approx(100 * sk.f1_score(truth[kept], predicted[kept], **options))
        assert found.oa == pytest.approx(100 * sk.accuracy_score(truth[kept], predicted[kept]))


@given(st.lists(st.tuples(*[st.integers(1, 30)] * 8), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_overlaps_equal_those_of_torchvision(rows):
    one, two = np.array(rows, float)[:, :4], np.array(rows, float)[:, 4:]
    corners = [torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)) for boxes in (one, two)]
    np.testing.assert_allclose(tracking.iou(one, two), box_iou(*corners).diag())
