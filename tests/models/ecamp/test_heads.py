"""The heads of ECAMP's encoder: what they train, boxes, the authors' names, and the metrics of radiology."""

import numpy as np
import pytest
import torch

from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.metrics import radiology
from companion.models.ecamp import detection, heads
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.detection import Detector
from companion.models.ecamp.heads import Segmenter
from tests.models.common import misfits, refuses, ungraded


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ecamp.build("pocket").encoder


def test_heads_train_what_they_say(encoder):
    images, boxes = torch.randn(2, 3, 32, 32), torch.zeros(2, 10, 5)
    boxes[0, 0] = torch.tensor([0, 0.5, 0.4, 0.3, 0.2])
    for frozen in (True, False):
        model = Segmenter(encoder, outputs=2, frozen=frozen)
        below = {n for n, _ in model.named_parameters() if n.startswith("map.encoder.")}
        heads.segmentation_loss(model(images), torch.rand(2, 2, 32, 32)).backward()
        assert ungraded(model) == (below if frozen else set())
    model = Detector(encoder, channels=(64, 32, 16), expansion=4)
    found = model(images)
    assert [tuple(x.shape) for x in found] == [(2, 18, 4, 4), (2, 18, 8, 8), (2, 18, 16, 16)]
    detection.detection_loss(found, boxes, 32).backward()
    assert ungraded(model) == below
    model = heads.classifier(encoder, 4, probe=True)
    heads.classification_loss(model(images), torch.tensor([0, 3])).backward()
    assert {n for n, _ in model.named_parameters()} - ungraded(model) == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in encoder.blocks.parameters()), "the one that was copied is as it was"


def test_official_names_come_back(encoder):
    for model in (
        Segmenter(encoder),
        Segmenter(encoder, outputs=2),
        Detector(encoder, expansion=8, channels=(64, 32, 16)),
    ):
        state = model.to_official()
        again = type(model).from_official(state, heads=4)
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
        for name in ("encoder.seg_head.bias", "embedding1.conv_out.bias"):
            if name in state:
                state["typo"] = state.pop(name)
                assert misfits(type(model).from_official, state) == ([name], ["typo"], [])
    refuses(
        (lambda: Segmenter.from_official({"patch_embed.proj.weight": torch.zeros(1)}), r"blocks\.0"),
        (lambda: Detector.from_official({}), r"layer1\.conv1"),
        (lambda: heads.classifier_from_official({}), r"head\.weight"),
        error=BadCheckpoint,
    )


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
    assert radiology.mean_auroc(labels[:, 0], 1 - labels[:, 0]) == 0
    with pytest.raises(BadParameter, match="1"):
        radiology.mean_auroc(np.array([[0, 1], [1, 1]]), np.zeros((2, 2)))
    truth, probability = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    truth[0, :2] = 1
    probability[0, 1:3] = 0.9
    probability[1, 0, 0] = 0.9  # a false alarm
    probability[2, 0, 0] = 0.5  # not above the threshold
    assert radiology.dice(probability, truth).tolist() == [0.5, 0, 1, 1]
    np.testing.assert_equal(radiology.dice(probability, truth, "plain").tolist(), [0.5] + 3 * [np.nan])


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
