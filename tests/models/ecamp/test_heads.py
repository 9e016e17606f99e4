"""The heads of ECAMP's encoder: what they train, boxes, the authors' names, and the metrics of radiology."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.evaluation.metrics import radiology
from companion.models.ecamp import detection
from companion.models.ecamp.heads import PatchMap, Segmenter, classifier
from tests.models.common import draw, refuses


def vit(size: int | tuple[int, int], patch: int, **changes) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(size, patch, embed_dim=12, depth=1, num_heads=2, num_classes=0, **changes).eval()


@pytest.mark.parametrize(("size", "patch"), [(28, 14), (42, 14), (64, 32), (8, 1), ((32, 72), 8), (32, 16)])
@torch.no_grad()
def test_logits_have_the_size_of_the_images_whatever_the_patch(size, patch):
    encoder = vit(size, patch, reg_tokens=2)
    images = draw(1, 3, *encoder.patch_embed.img_size)
    assert Segmenter(encoder).eval()(images).shape == (1, 1, *images.shape[2:])


@torch.no_grad()
def test_a_map_lies_as_the_image():
    """Of 4 x 9 patches; a map changes most where the image does."""
    module, images = PatchMap(vit((32, 72), 8)).eval(), torch.zeros(1, 3, 32, 72)
    changed = images.clone()
    changed[:, :, 16:24, 56:64] = 1
    difference = (module(changed) - module(images)).norm(dim=1)[0]
    assert difference.shape == (4, 9) and divmod(int(difference.argmax()), 9) == (2, 7)


def test_a_grid_that_cannot_be_halved_has_no_detector():
    refuses(*((lambda s=s: detection.Detector(vit(s, 8)), "patches") for s in (24, (32, 48), (16, 64))))
    refuses((lambda: Segmenter(vit(32, 8), 3), "outputs"))


@torch.no_grad()
def test_a_classifier_reads_the_mean_of_the_patches_alone():
    model, images = classifier(vit(32, 8, reg_tokens=2, pool_include_prefix=True), 2).eval(), draw(2, 3, 32, 32)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), model.fc_norm(tokens[:, 3:].mean(1)))


def test_a_classifier_predicts_by_its_own_method_and_so_does_its_copy():
    model = classifier(vit(32, 8), 2).eval()
    image = Image.new("L", (32, 32), 90)
    found = model.predict([image], ["effusion", "mass"])
    assert set(found[0]) == {"effusion", "mass"}
    twin = copy.deepcopy(model)
    torch.nn.init.constant_(twin.head.bias, 9)
    assert twin.predict([image], ["effusion", "mass"]) != found == model.predict([image], ["effusion", "mass"])


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
