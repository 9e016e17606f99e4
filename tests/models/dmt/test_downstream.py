"""Downstream tasks of a pre-trained ViT: features, layer decay, losses, crops, pyramids, detections, windows."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.models.dmt import downstream as down
from companion.models.dmt import vit as vits
from companion.models.dmt.vit import MEAN, STD, build
from companion.training import fit, hardware

CPU = {"hardware": hardware.CPU}


def vit(**options):
    torch.manual_seed(0)
    return build("pocket", **options).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("where", "make"),
    [("", lambda: down.classifier(vit(), 5)), ("backbone.vit.", lambda: down.detector(vit(), 2, size=32))],
)
def test_learning_rates_fall_downwards(where, make):
    model, rates = make(), np.linspace(1, 0.5, 10)
    r = {"batch": 4, "layer_decay": 0.65, "weight_decay": 0.3}
    options = down.layer_decayed(r, rates, where, range(8), hardware.CPU)
    assert options["epochs"] == 5
    group_of = {id(p): group for group in options["optimizer"](model).param_groups for p in group["params"]}
    layers = dict.fromkeys(("cls_token", "pos_embed", "patch_embed.proj.weight"), 0)
    layers |= {"blocks.0.mlp.fc1.weight": 1, "blocks.1.norm1.bias": 2}
    outside = "head.weight" if not where else "roi_heads.box_predictor.bbox_pred.weight"
    layers = {f"{where}{name}": layer for name, layer in layers.items()} | {outside: 3}
    for name, layer in layers.items():
        group = group_of[id(model.get_parameter(name))]
        np.testing.assert_allclose(options["schedule"](group["lr"], 10, 1), rates * 0.65 ** (3 - layer))
        plain = name.endswith(("cls_token", "pos_embed", "bias"))
        assert group["weight_decay"] == (0 if plain else 0.3), name
    assert group_of.keys() == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_classifier_sees_what_the_encoder_saw(images):
    encoder = vit(positions="learned", masked=True)
    model = down.classifier(encoder, 5).eval()
    expected = F.layer_norm(encoder.hidden(images)[0][:, 1:].mean(1), (32,), eps=1e-6)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-4)
    assert model(images).shape == (4, 5) and all(p.requires_grad for p in model.parameters())
    assert model.masked_embed is None and model.head.weight.abs().max() < 1e-3


def test_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    x, y, other = torch.randn(40, 6) * 3 + 1, torch.randint(3, (40,)), torch.randn(9, 6)
    scaled = [(t - x.mean(0)) / x.std(0, correction=0) for t in (x, other)]
    theirs = Ridge(30.0).fit(scaled[0].numpy(), F.one_hot(y, 3).numpy()).predict(scaled[1].numpy())
    np.testing.assert_allclose(down.ridge(x, y, 3, other), theirs, atol=1e-4)


def test_transforms():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    cut = picture.resize((51, 37), Image.Resampling.BICUBIC).crop((10, 2, 42, 34))  # 37 = 32 x 256 / 224
    expected = (np.asarray(cut) / 255 - MEAN) / STD
    np.testing.assert_allclose(vits.test_transform(32)(picture), expected.transpose(2, 0, 1), atol=1e-5)


def squares(count=8, side=64):
    """Images with a bright square each, class 1 red and class 2 green, as `pretraining.Instances` has them."""
    items = []
    for i, (y, x) in enumerate(np.random.default_rng(0).integers(4, side - 28, (count, 2)).tolist()):
        image, mask = torch.full((3, side, side), 60, dtype=torch.uint8), torch.zeros(1, side, side, dtype=torch.uint8)
        image[i % 2, y : y + 24, x : x + 24], mask[0, y : y + 24, x : x + 24] = 250, 1
        boxes = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        items.append((image, {"boxes": boxes, "labels": torch.tensor([1 + i % 2]), "masks": mask, "image_id": i + 1}))
    return items


def test_every_operation_of_the_augmentation_takes_its_smallest_and_its_largest_magnitude():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    (drawn,) = (step for step in down.train_transform(32).transforms if hasattr(step, "ops"))
    for operation in drawn.ops:
        operation.prob, operation.magnitude_std = 1, 0
        for operation.magnitude in (0, 10):
            assert operation(image).size == image.size
        if "Posterize" in operation.name:
            assert not np.asarray(operation(image)).any(), "0 bits are black, with any Pillow"


def test_the_pyramid_has_five_scales_of_a_copy_that_trains_its_table_too(images):
    encoder = vit(masked=True)
    pyramid = down.SimplePyramid(encoder, 0.1).eval()
    assert pyramid.vit.pos_embed.requires_grad and not encoder.pos_embed.requires_grad
    assert pyramid.vit.masked_embed is None and pyramid.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    shapes = {name: tuple(m.shape) for name, m in pyramid(images).items()}
    sides = zip(["0", "1", "2", "3", "pool"], (16, 8, 4, 2, 1), strict=True)
    assert shapes == {name: (4, 256, side, side) for name, side in sides}
    same = pyramid.maps(images)[2]
    assert torch.equal(same[0, :, 1, 2], encoder.hidden(images)[0][0, 1 + 4 + 2])


def unjittered(items, size=64):
    """`Crops` that leave images as they are."""
    crops = down.Crops(items, size)
    crops.transform = v2.SanitizeBoundingBoxes()
    return crops


def test_crops_stack_and_unpack(monkeypatch):
    monkeypatch.setattr(down.Crops, "MOST", 1)
    image, target = squares()[1]
    two = {"boxes": torch.tensor([[0.0, 0, 8, 8], [20, 30, 50, 40]]), "labels": torch.tensor([1, 2])}
    two |= {"masks": torch.zeros(2, 64, 64, dtype=torch.uint8)}
    two["masks"][0, :8, :8] = two["masks"][1, 30:40, 20:50] = 1
    _, boxes, labels, _ = unjittered([(image, target | two)])[0]
    assert boxes.tolist() == [[20, 30, 50, 40]] and labels.tolist() == [2]  # the smallest are left out
    seen = []

    def model(images, targets):
        seen.extend(targets)
        return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}

    data = unjittered(squares())
    stacked = tuple(torch.stack(parts) for parts in zip(data[0], data[1], strict=True))
    assert down.detection_loss(model, stacked) == 3
    for i, target in enumerate(seen):
        assert all(torch.equal(target[name], squares()[i][1][name]) for name in ("masks", "boxes", "labels"))


def test_an_image_without_instances_is_trained_on_too():
    items = [(image, {k: v[:0] for k, v in target.items() if k != "image_id"}) for image, target in squares(2)]
    batch = tuple(map(torch.stack, zip(*unjittered(items), strict=True)))
    model = down.detector(vit(image=64), 2, size=64).train()
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))  # 8 x the strides
    total = down.detection_loss(model, batch)
    total.backward()
    assert total > 0 and all(p.grad.any() for p in model.roi_heads.box_predictor.cls_score.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_detections_are_rows_of_coco_in_the_order_of_the_images(batch):
    class Found(nn.Module):
        """A box as high as the image, of class 2, and a mask of its upper half."""

        def forward(self, images):
            assert len({image.shape for image in images}) == 1, "the ViT would process padding"
            assert sum(masks() is not None for masks in earlier) <= 1, "the last masks of the batch before, at most"
            found = []
            for image in images:
                height, masks = image.shape[1], torch.zeros(1, 1, *image.shape[1:])
                masks[:, :, : height // 2] = 0.6
                boxes = torch.tensor([[3.0, 5, 13, height]])
                found.append({"boxes": boxes, "labels": torch.tensor([2]), "scores": image.max()[None], "masks": masks})
                earlier.append(weakref.ref(masks))
            return found

    earlier = []
    items = [(image[:, : 64 - 8 * (i % 3 == 1)], target) for i, (image, target) in enumerate(squares(5))]
    rows = down.detections(Found(), items, [7, 9], batch=batch, **CPU)
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5] and {row["category_id"] for row in rows} == {9}
    assert [row["bbox"] for row in rows] == [[3, 5, 10, height - 5] for height in (64, 56, 64, 64, 56)]
    assert rows[0]["score"] == pytest.approx(250 / 255) and rows[1]["segmentation"]["size"] == [56, 64]
    from faster_coco_eval.core import mask as rle

    assert [int(rle.area(row["segmentation"])) for row in rows[:2]] == [32 * 64, 28 * 64]


def test_a_segmenter_gives_logits_of_every_pixel_and_its_loss_passes_over_ignored_ones(images):
    model, truth = down.Segmenter(vit(depth=4), 3, layers=(0, 1, 2, 3), drop_path=0.0), torch.randint(3, (4, 32, 32))
    assert model.eval()(images).shape == (4, 3, 32, 32)
    torch.manual_seed(0)
    logits = model.train()(images)
    assert [x.shape for x in logits] == [(4, 3, 32, 32)] * 2
    truth[:, 16:] = 255
    expected = [F.cross_entropy(x[:, :, :16], truth[:, :16]) for x in logits]
    torch.manual_seed(0)
    loss = down.segmentation_loss(model, (images, truth))
    torch.testing.assert_close(loss, expected[0] + 0.4 * expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 50, 71)])
def test_sliding_covers_everything_once_over(shape):
    image, seen = torch.rand(shape), []

    def double(x):
        seen.append(x.shape)
        return x[:, :2] * 2

    torch.testing.assert_close(down.slide(double, image, 32), image[:2] * 2)
    assert seen == [({32: 1, 50: 2}[shape[1]] * {32: 1, 71: 3}[shape[2]], 3, 32, 32)]


def test_features_are_those_of_an_encoder_that_stays_as_it_was(images):
    encoder = vit().train()
    features = fit.outputs_of(down.Features(encoder), TensorDataset(images), **CPU)
    torch.testing.assert_close(features, encoder.eval().features(images), atol=1e-5, rtol=1e-4)
