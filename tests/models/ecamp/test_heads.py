"""The heads of ECAMP's encoder: what they train, boxes, the authors' names, and the metrics of radiology."""

import numpy as np
import pytest
import torch

from companion.evaluation.metrics import radiology
from companion.models.ecamp import detection
from tests.models.common import refuses


def test_a_box_whose_centre_is_on_the_border_belongs_to_the_last_cell():
    anchors, box = torch.ones(3, 2) * 20, torch.tensor([[[0, 1.0, 0.5, 0.1, 0.1]]])
    head = torch.full((1, 18, 7, 7), -12.0)
    side = np.log(22.4 / 20)  # the first anchor, at its cell's right edge
    head.view(3, 6, 7, 7)[0, :, 3, 6] = torch.tensor([12, 0, side, side, 12, 12])
    total, x, y, *rest = detection.yolo_loss(head, box, anchors, 224)
    assert x < 1e-6 and max(rest) < 1e-4
    assert y.item() == pytest.approx(np.log(2) / (3 * 49), rel=1e-4)  # half a cell down, the limit of the encoding
    assert total.item() == pytest.approx(2.5 * y.item(), abs=2e-4)


def test_dice_of_both_protocols_and_mean_auroc():
    labels = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    assert radiology.mean_auroc(labels, labels) == 100
    refuses((lambda: radiology.mean_auroc(np.array([[0, 1], [1, 1]]), np.zeros((2, 2))), "1"))
    truth, probability = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    truth[0, :2] = 1
    probability[0, 1:3] = 0.9
    probability[1, 0, 0] = 0.9  # a false alarm
    probability[2, 0, 0] = 0.5  # not above the threshold
    assert radiology.dice(probability, truth).tolist() == [0.5, 0, 1]
    np.testing.assert_equal(radiology.dice(probability, truth, "plain").tolist(), [0.5] + 2 * [np.nan])


def test_mean_precision_of_both_protocols():
    """One hit, one miss, one false alarm on a healthy image: as released only the hit counts."""
    boxes = torch.zeros(3, 10, 5)
    boxes[:2, 0] = torch.tensor([0, 0.5, 0.5, 0.25, 0.25])
    hit = torch.tensor([[84, 84, 140, 140, 0.9, 0.9, 0]])
    found = [hit, hit[:0], torch.tensor([[0.0, 0, 50, 50, 0.95, 0.9, 0]])]
    assert radiology.mean_precision(found, boxes, 224) == pytest.approx(100)
    assert radiology.mean_precision(found, boxes, 224, "plain") == pytest.approx(25, abs=0.5)
    missed = [hit[:0]] * 3
    assert radiology.mean_precision(missed, boxes, 224, "plain") == 0
    assert radiology.mean_precision(missed, boxes * 0, 224, "plain") == -100
