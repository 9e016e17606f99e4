"""The heads of ECAMP's encoder: counts, trainable parameters, losses, boxes, the authors' names, metrics, bad input."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.metrics import radiology
from companion.models.ecamp import heads
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.heads import Detector, Segmenter
from tests.models.common import misfits, numbers, refuses, ungraded


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ecamp.build("pocket").encoder


def test_parameters_are_the_released_ones():
    """Section 9."""
    with torch.device("meta"):
        vit = VisionTransformer(img_size=224, num_classes=0)
        for model, whole, trained in (
            (heads.classifier(vit, 14, drop_path=0.0), 85_809_422, 85_809_422),
            (heads.classifier(vit, 14, probe=True), 85_809_422, 10_766),
            (Segmenter(vit), 91_478_401, 5_681_281),
            (Segmenter(vit, outputs=2), 96_569_090, 10_771_970),  # RIGA
            (Detector(vit, expansion=4), 116_628_534, 30_831_414),
            (Detector(vit, expansion=8), 112_928_054, 27_130_934),
        ):
            assert (numbers(model), numbers(model, trained=True)) == (whole, trained)


def test_classifier_starts_from_the_encoder(encoder):
    model = heads.classifier(encoder, 4, drop_path=0.0).eval()
    images = torch.randn(2, 3, 32, 32)
    whole = ecamp.build("pocket").eval()
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.encoder.norm = torch.nn.Identity()  # it is dropped
    features = F.layer_norm(whole.forward_features(images)[:, 1:].mean(1), (96,), eps=1e-6)
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), features)
    assert model(images).shape == (2, 4) and model.head.weight.abs().max() < 1e-3


def test_heads_train_what_they_say(encoder):
    images = torch.randn(2, 3, 32, 32)
    for frozen in (True, False):
        model = Segmenter(encoder, outputs=2, frozen=frozen)
        heads.segmentation_loss(model(images), torch.rand(2, 2, 32, 32)).backward()
        below = {n for n, _ in model.named_parameters() if n.startswith("map.encoder.")}
        assert ungraded(model) == (below if frozen else set())
    assert all(p.requires_grad for p in encoder.blocks.parameters()), "the one that was copied is as it was"
    model = Detector(encoder, channels=(64, 32, 16), expansion=4)
    found, boxes = model(images), torch.zeros(2, 10, 5)
    assert [tuple(x.shape) for x in found] == [(2, 18, 4, 4), (2, 18, 8, 8), (2, 18, 16, 16)]
    boxes[0, 0] = torch.tensor([0, 0.5, 0.4, 0.3, 0.2])
    heads.detection_loss(found, boxes, 32).backward()
    assert below and ungraded(model) == {n for n, _ in model.named_parameters() if n.startswith("map.encoder.")}
    model = heads.classifier(encoder, 4, probe=True)
    heads.classification_loss(model(images), torch.tensor([0, 3])).backward()
    assert {n for n, _ in model.named_parameters()} - ungraded(model) == {"head.weight", "head.bias"}


def test_official_names_come_back(encoder):
    images = torch.randn(1, 3, 32, 32)
    for model in (Segmenter(encoder), Segmenter(encoder, outputs=2)):
        model.eval()
        state = model.to_official()
        assert any(n.startswith("decoder_cup." if len(model.decoders) == 2 else "decoder.decoder_1.") for n in state)
        assert torch.equal(Segmenter.from_official(state, heads=4)(images), model(images))
    model = Detector(encoder, expansion=8, channels=(64, 32, 16)).eval()
    again = Detector.from_official(model.to_official(), heads=4)
    assert all(torch.equal(a, b) for a, b in zip(again(images), model(images), strict=True))
    model = heads.classifier(encoder, 4).eval()
    again = heads.classifier_from_official(model.state_dict(), heads=4)
    assert torch.equal(again(images), model(images))


def test_checkpoints_that_do_not_fit(encoder):
    state = Segmenter(encoder).to_official()
    state["typo"] = state.pop("encoder.seg_head.bias")
    assert misfits(Segmenter.from_official, state) == (["encoder.seg_head.bias"], ["typo"], [])
    del state["decoder.decoder_2.0.weight"]
    refuses(
        (lambda: Segmenter.from_official(state), r"decoder_2\.0\.weight"),
        (lambda: Detector.from_official(state), r"layer1\.conv1"),
        (lambda: heads.classifier_from_official({}), r"head\.weight"),
        (lambda: heads.encoder_like({}), "pos_embed"),
        error=BadCheckpoint,
    )
    refuses((lambda: Segmenter(encoder, channels=(8,)), "2, which double"))


def test_classification_loss():
    logits = torch.randn(3, 4)
    kinds = torch.tensor([0, 3, 1])
    assert heads.classification_loss(logits, kinds) == F.cross_entropy(logits, kinds)
    many = torch.eye(4)[kinds].int()
    assert heads.classification_loss(logits, many) == F.binary_cross_entropy_with_logits(logits, many.float())


def test_boxes_that_fit_are_found_again():
    """A head whose output minimises the loss decodes to the true boxes."""
    anchors, boxes = torch.tensor([[60.0, 50], [84, 106], [200, 175]]), torch.zeros(1, 10, 5)
    boxes[0, 0] = torch.tensor([0, 0.3, 0.4, 0.25, 0.3])
    boxes[0, 1] = torch.tensor([0, 0.72, 0.55, 0.6, 0.5])
    head = torch.full((1, 18, 7, 7), -12.0)
    for box, anchor in ((boxes[0, 0], 0), (boxes[0, 1], 1)):
        centre = box[1:3] * 7
        i, j = centre.long().tolist()
        numbers = head[0].view(3, 6, 7, 7)[anchor, :, j, i]
        numbers[:2] = torch.logit(centre - centre.long())
        numbers[2:4] = (box[3:] * 224 / anchors[anchor]).log()
        numbers[4:] = 12
    total, x, y, w, h, confidence, kind = heads.yolo_loss(head, boxes, anchors, 224)
    assert w < 1e-10 and h < 1e-10 and confidence < 1e-4 and kind < 1e-4
    assert total.item() == pytest.approx((2.5 * (x + y) + confidence + kind).item(), abs=1e-6)
    (found,) = heads.suppress(heads.yolo_decode(head, anchors, 224))
    corners = torch.cat([boxes[0, :2, 1:3] - boxes[0, :2, 3:] / 2, boxes[0, :2, 1:3] + boxes[0, :2, 3:] / 2], 1) * 224
    order = found[:, 0].argsort()
    torch.testing.assert_close(found[order, :4], corners[corners[:, 0].argsort()], atol=1e-3, rtol=0)


def test_loss_without_boxes_asks_for_emptiness():
    head = torch.randn(2, 18, 7, 7)
    total, *rest = heads.yolo_loss(head, torch.zeros(2, 10, 5), torch.ones(3, 2), 224)
    logits = head.unflatten(1, (3, 6))[:, :, 4]
    torch.testing.assert_close(total, 0.5 * F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)))
    assert [x.item() for x in rest[:4]] == [0, 0, 0, 0]


def test_a_box_whose_centre_is_on_the_border_belongs_to_the_last_cell():
    anchors, box = torch.ones(3, 2) * 20, torch.tensor([[[0, 1.0, 0.5, 0.1, 0.1]]])
    head = torch.full((1, 18, 7, 7), -12.0)
    head.view(3, 6, 7, 7)[0, [0, 4, 5], 3, 6] = 12.0  # the first anchor, at its cell's right edge
    head.view(3, 6, 7, 7)[0, 1, 3, 6] = 0.0
    head.view(3, 6, 7, 7)[0, 2:4, 3, 6] = torch.tensor(22.4 / 20).log()
    total, x, y, *rest = heads.yolo_loss(head, box, anchors, 224)
    assert x < 1e-6 and max(rest) < 1e-4
    assert y.item() == pytest.approx(np.log(2) / (3 * 49), rel=1e-4)  # half a cell down, the limit of the encoding
    assert total.item() == pytest.approx(2.5 * y.item(), abs=2e-4)


def test_dice_of_both_protocols_and_mean_auroc():
    labels = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    assert radiology.mean_auroc(labels, labels) == 100
    assert radiology.mean_auroc(labels[:, 0], 1 - labels[:, 0]) == 0
    with pytest.raises(BadParameter, match=r"\[1\]"):
        radiology.mean_auroc(np.array([[0, 1], [1, 1]]), np.zeros((2, 2)))
    truth = torch.zeros(4, 4, 4)
    truth[0, :2] = 1
    probability = torch.zeros(4, 4, 4)
    probability[0, 1:3] = 0.9
    probability[1, 0, 0] = 0.9  # a false alarm
    probability[2, 0, 0] = 0.5  # not above the threshold
    assert radiology.dice(probability, truth).tolist() == [0.5, 0, 1, 1]
    plain = radiology.dice(probability, truth, "plain")
    assert plain[0] == 0.5 and plain[1:].isnan().all()
    with pytest.raises(BadParameter, match="plain"):
        radiology.dice(probability, truth, "other")


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
    with pytest.raises(BadParameter, match="released"):
        radiology.mean_precision(found, boxes, 224, "other")
