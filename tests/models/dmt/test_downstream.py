"""Downstream tasks of a pre-trained ViT: equal features, layer decay, losses, crops, results, and bad options."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadParameter
from companion.evaluation.metrics import detection as metric
from companion.models.dmt import downstream as down
from companion.models.dmt.downstream import Crops, SceneCrops, Segmenter
from companion.models.dmt.vit import POSITIONS, build
from companion.training import fit
from companion.training.checkpoints import Checkpoint
from tests.conftest import interrupted
from tests.models.common import numbers

CPU = {"hardware": fit.CPU}


def vit(**options):
    torch.manual_seed(0)
    return build("pocket", **options).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer_decay", [0.65, 1.0])
def test_learning_rates_fall_downwards(layer_decay):
    model = down.classifier(vit(), 5)
    found = down.layer_decayed(model, model, np.linspace(1, 0, 10), layer_decay, 0.3)
    scales = {name: schedule(0.0, 10, 1).max() for name, schedule in found["schedule"].items()}
    assert scales == {f"layer {i}": pytest.approx(layer_decay ** (3 - i)) for i in range(4)}
    groups = found["optimizer"](model).param_groups
    own = {id(p): group for group in groups for p in group["params"]}
    assert len(own) == len(list(model.parameters()))
    assert all(own[id(p)]["weight_decay"] == (0.3 if p.ndim >= 2 else 0) for p in model.parameters())
    layers = {name: own[id(p)]["name"] for name, p in model.named_parameters()}
    assert layers["cls_token"] == layers["pos_embed"] == layers["patch_embed.proj.weight"] == "layer 0"
    assert layers["blocks.0.mlp.fc1.weight"] == "layer 1"
    assert layers["head.weight"] == layers["fc_norm.bias"] == "layer 3"
    with pytest.raises(BadParameter, match="layer_decay"):
        down.layer_decayed(model, model, np.ones(10), 0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("last_heads", [None, 8])
def test_a_classifier_sees_what_the_encoder_saw(positions, last_heads, images):
    encoder = vit(positions=positions, masked=True, last_heads=last_heads)
    model = down.classifier(encoder, 5).eval()
    pooled = encoder.hidden(images)[0][:, 1:].mean(1)
    expected = F.layer_norm(pooled, (32,), eps=1e-6)
    assert torch.allclose(model.forward_head(model.forward_features(images), pre_logits=True), expected, atol=1e-5)
    assert model(images).shape == (4, 5) and all(p.requires_grad for p in model.parameters())
    assert model.head.weight.abs().max() < 1e-3


def test_parameters_of_the_fine_tuned_models_are_the_usual_ones():
    for size, count in (("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)):
        with torch.device("meta"):
            assert numbers(down.classifier(build(size), 1000)) == count


def test_mixing_is_timms_and_repeats(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    labels, loss = torch.tensor([0, 1, 2, 3]), down.mixed_loss(5)
    before, state = images.clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(4)
    first = loss(model, (images, labels))
    torch.manual_seed(4)
    assert torch.equal(loss(model, (images, labels)), first)
    assert torch.equal(images, before) and (np.random.get_state()[1] == state).all()  # noqa: NPY002
    plain = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    assert torch.allclose(down.mixed_loss(5, 0, 0)(model, (images, labels)), plain)
    assert torch.allclose(
        loss(model, (images[:3], labels[:3])), F.cross_entropy(model(images[:3]), labels[:3], label_smoothing=0.1)
    )


def easy(count=64):
    """Images whose colour is their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 32, 32, generator=generator)
    images[:, 0] += labels[:, None, None] * 1.0
    return images, labels


def test_fine_tuning_learns_and_resumes(tmp_path, monkeypatch):
    images, labels = easy()
    data, encoder = TensorDataset(images, labels), vit()
    settings = {"epochs": 8, "batch": 16, "lr": 3e-3, "mixup": 0.2, "cutmix": 0.2} | CPU

    def tune(**options):
        torch.manual_seed(0)
        return down.fine_tune(encoder, 2, data, **settings, **options)

    model, rows = tune()
    assert len(rows) == 32 and (model.eval()(images).argmax(1) == labels).float().mean() > 0.9
    checkpoint = Checkpoint(tmp_path / "k.pt", 8)
    with interrupted(monkeypatch, VisionTransformer, "forward", 19):
        tune(checkpoint=checkpoint)
    again, _ = tune(checkpoint=checkpoint)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_probes_leave_the_encoder_alone():
    images, labels = easy()
    encoder = vit().train()
    features = fit.predict(down.Features(encoder), TensorDataset(images), **CPU)
    assert features.shape == (64, 64) and torch.allclose(features, encoder.features(images), atol=1e-5)
    assert encoder.training, "the caller's encoder is unchanged"
    head, _ = down.probe(features, labels, 2, epochs=10, batch=16, **CPU)
    assert (head(features).argmax(1) == labels).float().mean() > 0.9
    outputs = down.ridge(features, labels, 2, features)
    assert (outputs.argmax(1) == labels).float().mean() > 0.9
    with pytest.raises(BadParameter, match="penalty"):
        down.ridge(features, labels, 2, features, penalty=0)


def test_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    x, y, other = torch.randn(40, 6) * 3 + 1, torch.randint(3, (40,)), torch.randn(9, 6)
    scaled = [(t - x.mean(0)) / x.std(0, correction=0) for t in (x, other)]
    theirs = Ridge(30.0).fit(scaled[0].numpy(), F.one_hot(y, 3).numpy()).predict(scaled[1].numpy())
    assert np.allclose(down.ridge(x, y, 3, other).numpy(), theirs, atol=1e-4)


def test_transforms():
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    for transform in (down.train_transform(32), down.test_transform(32)):
        assert transform(picture).shape == (3, 32, 32) and transform(picture).dtype == torch.float32
    assert torch.equal(down.test_transform(32)(picture), down.test_transform(32)(picture))


def squares(count=8, side=64):
    """Images with a bright square each, class 1 red and class 2 green, as `pretraining.Instances` has them."""
    items = []
    for i, (y, x) in enumerate(np.random.default_rng(0).integers(4, side - 28, (count, 2)).tolist()):
        image, mask = torch.full((3, side, side), 60, dtype=torch.uint8), torch.zeros(1, side, side, dtype=torch.uint8)
        image[i % 2, y : y + 24, x : x + 24], mask[0, y : y + 24, x : x + 24] = 250, 1
        boxes = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        labels = torch.tensor([1 + i % 2])
        items.append((image, {"boxes": boxes, "labels": labels, "masks": mask, "image_id": i + 1}))
    return items


def small_detector(**options):
    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 32}
    return down.detector(vit(image=64), 2, size=64, channels=16, drop_path=0.0, anchor=4.0, **few | options)


def test_the_pyramid_has_five_scales_on_a_copy_that_trains_its_table_too(images):
    encoder = vit(masked=True)
    model = down.like(encoder, 0.1)
    assert model.pos_embed.requires_grad and not encoder.pos_embed.requires_grad
    assert torch.equal(model.norm.weight, encoder.norm.weight) and model.masked_embed is None
    pyramid = down.SimplePyramid(vit(), 16)
    maps = pyramid(images)
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert [tuple(m.shape) for m in maps.values()] == [(4, 16, s, s) for s in (16, 8, 4, 2, 1)]
    pooled = down._maps(vit(), images, (-1,))[0]
    assert torch.equal(pooled[0, :, 1, 2], vit().hidden(images)[0][0, 1 + 4 + 2])
    with pytest.raises(BadParameter, match="factor"):
        down.SimplePyramid(vit(), 16, (8, 1))


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
    seen = {}

    def model(images, targets):
        seen.update(images=images, targets=targets)
        return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}

    stacked = tuple(torch.stack(parts) for parts in zip(data[0], data[1], strict=True))
    assert down.detection_loss(model, stacked) == 3
    for i, target in enumerate(seen["targets"]):
        assert all(torch.equal(target[name], squares()[i][1][name]) for name in ("masks", "boxes", "labels"))


def test_jittered_crops_have_the_size_and_keep_boxes_on_masks():
    data = Crops(squares(), 48, most=2)
    torch.manual_seed(0)
    for i in range(8):
        image, boxes, labels, bits = data[i]
        assert image.shape == (3, 48, 48)
        for box, mask in zip(boxes[labels > 0], bits[labels > 0], strict=True):
            there = torch.from_numpy(np.unpackbits(mask.numpy())[: 48 * 48].reshape(48, 48)).nonzero()
            edge = torch.cat([there.amin(0).flip(0), there.amax(0).flip(0) + 1])
            assert (edge - box).abs().max() <= 1.5
    with pytest.raises(BadParameter, match="size"):
        Crops(squares(), 32, jitter=None)[0]


def test_an_image_without_instances_is_trained_on_too():
    items = [(image, {k: v[:0] for k, v in target.items() if k != "image_id"}) for image, target in squares(2)]
    batch = tuple(map(torch.stack, zip(*Crops(items, 64, most=2, jitter=None), strict=True)))
    model, images = small_detector().train(), list(batch[0])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 64, 64)}
    torch.manual_seed(0)
    losses = model(images, [nothing, nothing])
    assert {name for name, loss in losses.items() if loss > 0} == {"loss_classifier", "loss_objectness"}
    torch.manual_seed(0)
    total = down.detection_loss(model, batch)
    torch.testing.assert_close(total, losses["loss_classifier"] + losses["loss_objectness"])
    total.backward()
    assert all(p.grad.any() for p in model.roi_heads.box_predictor.cls_score.parameters())


@pytest.mark.slow
def test_a_detector_trains_whole_and_gives_results_that_can_be_scored():
    model, data = small_detector(), squares()
    crops = Crops(data, 64, most=2, jitter=None)
    batch = tuple(torch.stack(parts) for parts in zip(*(crops[i] for i in range(4)), strict=True))
    torch.manual_seed(0)
    down.detection_loss(model.train(), batch).backward()
    untrained = {n for n, p in model.named_parameters() if p.grad is None}
    assert untrained == {"backbone.vit.norm.weight", "backbone.vit.norm.bias"}
    decayed = down.layer_decayed(model, model.backbone.vit, np.full(50, 2e-3), 0.9, 1e-4)
    rows = fit.fit(model, down.detection_loss, crops, epochs=25, batch=4, **decayed, **CPU)
    assert rows[-1]["loss"] < rows[0]["loss"]
    found = down.detections(model, data, [7, 9])
    truth = {
        "images": [{"id": i + 1, "width": 64, "height": 64, "file_name": ""} for i in range(8)],
        "categories": [{"id": 7, "name": "red"}, {"id": 9, "name": "green"}],
        "annotations": [],
    }
    for i in range(8):
        x0, y0, x1, y1 = squares()[i][1]["boxes"][0].tolist()
        shape = {"bbox": [x0, y0, 24, 24], "area": 576, "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
        shape |= {"id": i + 1, "image_id": i + 1, "category_id": 7 + 2 * (i % 2), "iscrowd": 0}
        truth["annotations"].append(shape)
    scores = {kind: metric.evaluate(truth, found, kind=kind).totals["AP50"] for kind in metric.KINDS}
    assert scores["bbox"] > 20 and scores["segm"] > 10


def test_detections_of_several_images_at_once_are_those_of_one_by_one():
    items = [(image[:, : 64 - 8 * (i % 3 == 1)], target) for i, (image, target) in enumerate(squares())]
    model = small_detector().eval()
    model.roi_heads.score_thresh = 0.0
    one, several = (down.detections(model, items, [7, 9], batch=batch) for batch in (1, 3))
    assert [row["image_id"] for row in one] == [row["image_id"] for row in several]
    for name in ("score", "bbox"):
        np.testing.assert_allclose([r[name] for r in one], [r[name] for r in several], rtol=1e-4, atol=1e-3)


def small_segmenter(**options):
    torch.manual_seed(0)
    usual = {"layers": (0, 1, 2, 3), "channels": 16, "auxiliary": 8, "drop_path": 0.0, "pools": (1, 2)}
    return Segmenter(vit(depth=4), 3, **usual | options)


def test_a_segmenter_gives_logits_of_every_pixel(images):
    model = small_segmenter().eval()
    assert model(images).shape == (4, 3, 32, 32)
    scales = [tuple(s(torch.rand(2, 32, 4, 4)).shape[1:]) for s in model.scales]
    assert scales == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (32, 2, 2)]
    first, second = model.train()(images)
    assert first.shape == second.shape == (4, 3, 32, 32)
    assert small_segmenter(auxiliary=0).train()(images).shape == (4, 3, 32, 32)
    with pytest.raises(BadParameter, match="layers"):
        small_segmenter(layers=(3, 5, 7, 11))


def test_the_loss_passes_over_what_counts_for_nothing(images):
    model = small_segmenter().train()
    truth = torch.randint(3, (4, 32, 32))
    truth[:, 16:] = 255
    losses = [down.segmentation_loss(model, (images, t)) for t in (truth, truth.clone())]
    assert torch.allclose(*losses)
    logits = model(images)
    expected = [F.cross_entropy(x[:, :, :16], truth[:, :16]) for x in logits]
    assert torch.allclose(losses[0], expected[0] + 0.4 * expected[1], atol=1e-5)


def halves():
    """Images whose bright side is class 1; a frame counts for nothing."""
    items = []
    for left in range(10, 34, 3):
        image, truth = torch.full((3, 40, 48), 40, dtype=torch.uint8), torch.zeros(40, 48, dtype=torch.long)
        image[:, :, left:], truth[:, left:] = 220, 1
        truth[:2] = 255
        items.append((image, truth))
    return items


def test_scene_crops():
    data = SceneCrops(halves(), 32, short=40)
    torch.manual_seed(0)
    for i in range(8):
        image, truth = data[i]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert truth.shape == (32, 32) and truth.dtype == torch.long and set(truth.unique().tolist()) <= {0, 1, 255}
    image, truth = SceneCrops(halves(), 64, jitter=None)[0]
    assert (truth == 255).sum() == 64 * 64 - 38 * 48  # what was added and the frame
    bright = image[0] > 0
    assert (bright[truth == 1]).all() and not bright[truth == 0].any()


def test_a_segmenter_learns(tmp_path):
    model, data = small_segmenter(), SceneCrops(halves(), 32, jitter=None)
    decayed = down.layer_decayed(model, model.vit, np.full(30, 3e-3), 0.9, 1e-4)
    torch.manual_seed(0)
    fit.fit(model, down.segmentation_loss, data, epochs=15, batch=4, **decayed, **CPU)
    images, truth = (torch.stack(part) for part in zip(*(data[i] for i in range(8)), strict=True))
    assert (model.eval()(images).argmax(1) == truth)[truth != 255].float().mean() > 0.85


def test_sliding_covers_everything_once_over():
    class Own(nn.Module):
        def forward(self, x):
            return x[:, :2] * 2

    for shape in [(3, 32, 32), (3, 50, 71), (3, 20, 90)]:
        image = torch.rand(shape)
        assert torch.allclose(down.slide(Own(), image, 32, 21), image[:2] * 2, atol=1e-6)
