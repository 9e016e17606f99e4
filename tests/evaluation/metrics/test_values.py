"""Values that no metric scores: not finite, outside the classes, of another shape."""

import math

import pytest
import torch

from companion.errors import BadParameter
from companion.evaluation.metrics import accuracy, attributes, detection, landcover, radiology, restoration
from companion.models.hvit import model as hvit
from companion.models.hvit import recipe

LABELS = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])
SCORES = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.6], [0.2, 0.3]])
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
GRADES = torch.tensor([0, 1, 2, 5])
BOXES, FOUND = torch.tensor([[[0, 0.5, 0.5, 0.25, 0.25]]]), torch.tensor([[84, 84, 140, 140, 0.9, 0.9, 0]])
NAN, INF = math.nan, math.inf


METRICS = {  # a call, a truth and a prediction that it accepts, first values of either that it does not
    "attributes": (lambda t, p: attributes.evaluate(t.numpy(), p), LABELS, SCORES, [], [NAN, 1.5]),
    "recognition": (lambda t, p: detection.recognition_ap(t.numpy(), p.numpy()), LABELS, SCORES, [-1, 2], [NAN, INF]),
    "AUROC": (radiology.mean_auroc, LABELS, SCORES, [-1, 2], [NAN, INF]),
    "dice": (lambda t, p: radiology.dice(p, t), LABELS, SCORES, [-1, 255], [NAN, -3.0]),
    "mAP": (lambda t, p: radiology.mean_precision([p], t, 224), BOXES, FOUND, [NAN], [NAN]),
    "land": (lambda t, p: landcover.confusion(t, p, 6), GRADES, GRADES, [], [-1, 6, 0.5]),
    "kappa": (recipe.quadratic_kappa, GRADES, GRADES, [-1], [-1, NAN, 0.5]),
    "PSNR": (lambda t, p: restoration.psnr(p, t), IMAGES, IMAGES * 0.9, [], [NAN, INF]),
    "SSIM": (lambda t, p: restoration.ssim(p, t), IMAGES, IMAGES * 0.9, [], [NAN, INF]),
    "accuracy": (accuracy, LABELS[:, 0], SCORES, [-1, 2], [NAN, INF]),
}


@pytest.mark.parametrize("name", METRICS)
def test_values_that_are_no_scores_or_labels_are_refused(name):
    metric, truth, predicted, *wrong = METRICS[name]
    metric(truth, predicted)
    cases = [] if name == "mAP" else [(truth, predicted[:-1])]
    cases += [] if name in ("mAP", "land", "dice") else [(truth[:0], predicted[:0])]
    cases += [] if name in ("mAP", "land", "dice", "AUROC") else [(truth[0], predicted[0])]
    for i, values in enumerate(wrong):
        for value in values:
            pair = [truth.clone(), predicted.clone()]
            pair[i] = pair[i].float() if isinstance(value, float) else pair[i]
            pair[i].view(-1)[0] = value
            cases.append(pair)
    for pair in cases:
        with pytest.raises(BadParameter):
            metric(*pair)


def test_a_spare_column_of_scores_is_refused():
    with pytest.raises(BadParameter):
        radiology.mean_auroc(LABELS, torch.cat([SCORES, SCORES], 1))
    with pytest.raises(BadParameter):  # it would be broadcast
        radiology.dice(SCORES[:1], LABELS)


@pytest.mark.parametrize("head", hvit.HEADS)
def test_an_output_that_is_not_finite_has_no_grade(head):
    outputs = torch.zeros(2, 6)
    outputs[0] = NAN
    with pytest.raises(BadParameter):
        hvit.graded(head, outputs)
