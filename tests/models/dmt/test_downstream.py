"""Downstream tasks of a pre-trained ViT: features, layer decay, losses, crops, pyramids, detections, windows."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadParameter
from companion.models.dmt import downstream as down
from companion.models.dmt.downstream import Crops, SceneCrops, Segmenter
from companion.models.dmt.vit import build
from companion.training import fit
from companion.training.schedules import sgd
from tests.models.common import numbers

CPU = {"hardware": fit.CPU}


def vit(**options):
    torch.manual_seed(0)
    return build("pocket", **options).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("where", "make"),
    [("", lambda: down.classifier(vit(), 5)), ("backbone.vit.", lambda: down.detector(vit(), 2, size=32, channels=16))],
)
def test_learning_rates_fall_downwards(where, make):
    model, rates = make(), np.linspace(1, 0.5, 10)
    found = down.layer_decayed(rates, where, 0.65, 0.3)
    own = {id(p): group for group in found["optimizer"](model).param_groups for p in group["params"]}
    layers = dict.fromkeys(("cls_token", "pos_embed", "patch_embed.proj.weight"), 0)
    layers |= {"blocks.0.mlp.fc1.weight": 1, "blocks.1.norm1.bias": 2}
    outside = "head.weight" if not where else "roi_heads.box_predictor.bbox_pred.weight"
    layers = {f"{where}{name}": layer for name, layer in layers.items()} | {outside: 3}
    for name, layer in layers.items():
        group = own[id(model.get_parameter(name))]
        np.testing.assert_allclose(found["schedule"](group["lr"], 10, 1), rates * 0.65 ** (3 - layer))
        plain = name.endswith(("cls_token", "pos_embed", "bias"))
        assert group["weight_decay"] == (0 if plain else 0.3), name
    assert own.keys() == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("positions", "last_heads"), [("mocov3", 8), ("learned", None)])
def test_a_classifier_sees_what_the_encoder_saw(positions, last_heads, images):
    encoder = vit(positions=positions, masked=True, last_heads=last_heads)
    model = down.classifier(encoder, 5).eval()
    expected = F.layer_norm(encoder.hidden(images)[0][:, 1:].mean(1), (32,), eps=1e-6)
    found = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert model(images).shape == (4, 5) and all(p.requires_grad for p in model.parameters())
    assert model.head.weight.abs().max() < 1e-3


def test_parameters_of_the_fine_tuned_models_are_the_usual_ones():
    for size, count in (("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)):
        with torch.device("meta"):
            assert numbers(down.classifier(build(size), 1000)) == count


def test_mixing_repeats_and_leaves_its_input_alone(images):
    model, labels, loss = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), torch.arange(4), down.mixed_loss(5)
    before, found = images.clone(), []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        found.append(loss(model, (images, labels)))
    assert found[0] == found[1] and not torch.isclose(found[0], found[2]) and torch.equal(images, before)
    expected = F.cross_entropy(model(images[:3]), labels[:3], label_smoothing=0.1)  # pairs need an even number
    torch.testing.assert_close(loss(model, (images[:3], labels[:3])), expected)


def test_probes_learn_from_the_features_of_an_encoder_that_stays_as_it_was():
    images, labels, encoder = torch.rand(32, 3, 32, 32), torch.arange(32) % 2, vit()
    images[:, 0] += labels[:, None, None]  # the colour is the class
    features = fit.predict(down.Features(encoder.train()), TensorDataset(images), **CPU)
    torch.testing.assert_close(features, encoder.features(images), atol=1e-5, rtol=1e-4)
    assert encoder.training
    head, data = down.linear(64, 2), TensorDataset(features, labels)
    fit.fit(head, down.classification_loss, data, epochs=10, batch=16, optimizer=sgd(0.1), **CPU)
    for outputs in (head(features), down.ridge(features, labels, 2, features)):
        assert (outputs.argmax(1) == labels).float().mean() > 0.8


def test_fine_tuning_has_maes_learning_rates_and_drop_path():
    data = TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)
    model, rows = down.fine_tune(vit(), 2, data, epochs=5, batch=4, warmup=0.3, **CPU)
    assert len(rows) == 10 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert max(row["lr"] for row in rows) == pytest.approx(5e-4 * 4 / 256 * 0.65**3)  # of the lowest layer
    assert [row["lr"] for row in rows].index(max(row["lr"] for row in rows)) == 2


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
    expected = (np.asarray(cut) / 255 - down.MEAN) / down.STD
    np.testing.assert_allclose(down.test_transform(32)(picture), expected.transpose(2, 0, 1), atol=1e-5)
    assert down.train_transform(32)(picture).shape == (3, 32, 32)


def squares(count=8, side=64):
    """Images with a bright square each, class 1 red and class 2 green, as `pretraining.Instances` has them."""
    items = []
    for i, (y, x) in enumerate(np.random.default_rng(0).integers(4, side - 28, (count, 2)).tolist()):
        image, mask = torch.full((3, side, side), 60, dtype=torch.uint8), torch.zeros(1, side, side, dtype=torch.uint8)
        image[i % 2, y : y + 24, x : x + 24], mask[0, y : y + 24, x : x + 24] = 250, 1
        boxes = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        items.append((image, {"boxes": boxes, "labels": torch.tensor([1 + i % 2]), "masks": mask, "image_id": i + 1}))
    return items


def test_the_pyramid_has_five_scales_on_a_copy_that_trains_its_table_too(images):
    encoder = vit(masked=True)
    model = down.like(encoder, 0.1)
    assert model.pos_embed.requires_grad and not encoder.pos_embed.requires_grad
    assert torch.equal(model.norm.weight, encoder.norm.weight) and model.masked_embed is None
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    maps = down.SimplePyramid(vit(), 16)(images)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        name: (4, 16, side, side) for name, side in zip(["0", "1", "2", "3", "pool"], (16, 8, 4, 2, 1), strict=True)
    }
    pooled = down._maps(vit(), images, (-1,))[0]
    assert torch.equal(pooled[0, :, 1, 2], vit().hidden(images)[0][0, 1 + 4 + 2])


def test_crops_stack_and_unpack():
    data = Crops(squares(), 64, most=3, jitter=None)
    image, boxes, labels, bits = data[1]
    assert image.shape == (3, 64, 64) and image.max() <= 1 and labels.tolist() == [2, 0, 0]
    assert boxes[0].tolist() == squares()[1][1]["boxes"][0].tolist() and bits.shape == (3, 512)
    image, target = squares()[1]
    two = {"boxes": torch.tensor([[0.0, 0, 8, 8], [20, 30, 50, 40]]), "labels": torch.tensor([1, 2])}
    two |= {"masks": torch.zeros(2, 64, 64, dtype=torch.uint8)}
    two["masks"][0, :8, :8] = two["masks"][1, 30:40, 20:50] = 1
    _, boxes, labels, _ = Crops([(image, target | two)], 64, most=1, jitter=None)[0]
    assert boxes.tolist() == [[20, 30, 50, 40]] and labels.tolist() == [2]  # the smallest are left out
    seen = []

    def model(images, targets):
        seen.extend(targets)
        return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}

    stacked = tuple(torch.stack(parts) for parts in zip(data[0], data[1], strict=True))
    assert down.detection_loss(model, stacked) == 3
    for i, target in enumerate(seen):
        assert all(torch.equal(target[name], squares()[i][1][name]) for name in ("masks", "boxes", "labels"))


def test_an_image_without_instances_is_trained_on_too():
    items = [(image, {k: v[:0] for k, v in target.items() if k != "image_id"}) for image, target in squares(2)]
    batch = tuple(map(torch.stack, zip(*Crops(items, 64, most=2, jitter=None), strict=True)))
    few = {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
    model = down.detector(vit(image=64), 2, size=64, channels=16, drop_path=0.0, anchor=4.0, **few).train()
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))  # 4 x the strides
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 64, 64)}
    torch.manual_seed(0)
    losses = model(list(batch[0]), [nothing, nothing])
    assert {name for name, loss in losses.items() if loss > 0} == {"loss_classifier", "loss_objectness"}
    torch.manual_seed(0)
    total = down.detection_loss(model, batch)
    torch.testing.assert_close(total, losses["loss_classifier"] + losses["loss_objectness"])
    total.backward()
    assert all(p.grad.any() for p in model.roi_heads.box_predictor.cls_score.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_detections_are_rows_of_coco_in_the_order_of_the_images(batch):
    class Found(nn.Module):
        """A box as high as the image, of class 2, and a mask of its upper half."""

        def forward(self, images):
            assert len({image.shape for image in images}) == 1, "the ViT would process padding"
            found = []
            for image in images:
                height, masks = image.shape[1], torch.zeros(1, 1, *image.shape[1:])
                masks[:, :, : height // 2] = 0.6
                boxes = torch.tensor([[3.0, 5, 13, height]])
                found.append({"boxes": boxes, "labels": torch.tensor([2]), "scores": image.max()[None], "masks": masks})
            return found

    items = [(image[:, : 64 - 8 * (i % 3 == 1)], target) for i, (image, target) in enumerate(squares(5))]
    rows = down.detections(Found(), items, [7, 9], batch=batch, **CPU)
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5] and {row["category_id"] for row in rows} == {9}
    assert [row["bbox"] for row in rows] == [[3, 5, 10, height - 5] for height in (64, 56, 64, 64, 56)]
    assert rows[0]["score"] == pytest.approx(250 / 255) and rows[1]["segmentation"]["size"] == [56, 64]
    from faster_coco_eval.core import mask as rle

    assert [int(rle.area(row["segmentation"])) for row in rows[:2]] == [32 * 64, 28 * 64]


def small_segmenter(**options):
    torch.manual_seed(0)
    usual = {"layers": (0, 1, 2, 3), "auxiliary": 8, "drop_path": 0.0, "pools": (1, 2)}
    return Segmenter(vit(depth=4), 3, **usual | options)


def test_a_segmenter_gives_logits_of_every_pixel(images):
    model = small_segmenter().eval()
    assert model(images).shape == (4, 3, 32, 32)
    assert [x.shape for x in model.train()(images)] == [(4, 3, 32, 32)] * 2
    assert small_segmenter(auxiliary=0).train()(images).shape == (4, 3, 32, 32)
    with pytest.raises(BadParameter, match="11"):
        small_segmenter(layers=(3, 5, 7, 11))


def test_the_loss_passes_over_what_counts_for_nothing(images):
    model, truth = small_segmenter().train(), torch.randint(3, (4, 32, 32))
    truth[:, 16:] = 255
    expected = [F.cross_entropy(x[:, :, :16], truth[:, :16]) for x in model(images)]
    found = down.segmentation_loss(model, (images, truth))
    torch.testing.assert_close(found, expected[0] + 0.4 * expected[1], atol=1e-5, rtol=1e-5)


def test_scene_crops():
    image, truth = torch.full((3, 40, 48), 40, dtype=torch.uint8), torch.zeros(40, 48, dtype=torch.long)
    image[:, :, 20:], truth[:, 20:] = 220, 1  # the bright side is class 1
    truth[:2] = 255
    torch.manual_seed(0)
    for size in (32, 64):
        crop, labels = SceneCrops([(image, truth)], size)[0]
        assert crop.shape == (3, size, size) and crop.dtype == torch.float32
        assert labels.dtype == torch.long and set(labels.unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 50, 71), (3, 20, 90)])
def test_sliding_covers_everything_once_over(shape):
    image, seen = torch.rand(shape), []

    def double(x):
        seen.append(x.shape)
        return x[:, :2] * 2

    torch.testing.assert_close(down.slide(double, image, 32, 21), image[:2] * 2)
    assert seen == [({32: 1, 50: 2, 20: 1}[shape[1]] * {32: 1, 71: 3, 90: 4}[shape[2]], 3, 32, 32)]
