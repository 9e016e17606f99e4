"""DINO and iBOT: losses by hand, the EMA teacher, schedules, resuming, crops, released names, bad input."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter
from companion.models.dmt.vit import ViT, build
from companion.models.hvit.model import PatchEncoder, RegionEncoder
from companion.models.layers import dino
from companion.training.callbacks import Callback
from companion.training.checkpoints import Checkpoint
from companion.training.fit import CPU, Hardware, fit
from companion.training.schedules import adamw, schedule
from tests.conftest import interrupted
from tests.models.common import refuses

SMALL = dict(epochs=3, batch=8, lr=1e-3, warmup=1, outputs=32, hidden=32, bottleneck=16, hardware=CPU)
UNUSED = {"student.encoder.norm.bias"}  # where the gradient vanishes for some batches


def level(kind: str):
    """An encoder of H-ViT, its images, and their crops."""
    torch.manual_seed(0)
    if kind == "patch":
        views = dino.ImageViews((28, 12), small=2, mean=(0.5,) * 3, std=(0.5,) * 3)
        return PatchEncoder(32, 4, 24, 2, 3, 2, std=None), torch.randint(256, (16, 3, 32, 32)).byte(), views
    return RegionEncoder(4, 24, 24, 2, 3, 2, std=None, drop_path=0.1), torch.randn(16, 24, 4, 4), dino.GridViews(4, 3)


def ibot(**options) -> dino.SelfDistillation:
    torch.manual_seed(0)
    encoder = build("pocket teacher", positions="learned", masked=options.pop("masked", True))
    torch.manual_seed(1)
    options = {"patch_weight": 1.0, "norm_last_layer": True} | options
    return dino.SelfDistillation(encoder, 40, 64, 16, **options)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def crops(images, small=2):
    torch.manual_seed(3)
    return dino.ImageViews((32, 16), small=small)(images)


def mirrored(model, batch):
    return model([batch[0], batch[0].flip(-1)])


def train(model, images, *callbacks, steps=2, **options):
    options = dict(epochs=steps, batch=len(images), optimizer=adamw(1e-3), hardware=CPU) | options
    options |= {"callbacks": callbacks, "schedule": schedule("constant", 0)}
    return fit(model, options.pop("loss", mirrored), TensorDataset(images), **options)


def test_class_loss_by_hand_and_its_centre():
    loss = dino.Loss(4)
    student, teacher = torch.randn(3 * 2, 4), torch.randn(2 * 2, 4)
    p = (teacher / 0.04).softmax(-1).chunk(2)
    q = (student / 0.1).log_softmax(-1).chunk(3)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = torch.stack([-(p[i] * q[j]).sum(-1).mean() for i, j in pairs]).mean()
    torch.testing.assert_close(loss.eval()(student, teacher, 3), expected)
    assert not loss.centre.any()
    torch.testing.assert_close(loss.train()(student, teacher, 3), expected)
    torch.testing.assert_close(loss.centre, 0.1 * teacher.mean(0, keepdim=True))


def test_patch_loss_by_hand_and_its_centre():
    torch.manual_seed(0)
    loss = dino.Loss(6, teacher=0.05)
    loss.patch_centre = torch.randn(1, 1, 6)
    student, teacher, masks = torch.randn(4, 9, 6), torch.randn(4, 9, 6), torch.rand(4, 9) > 0.5
    masks[0] = False  # an image without a masked patch counts as 0
    centre = loss.patch_centre.clone()
    found = loss.patches(student, teacher, masks)
    expected = 0
    for b in range(1, 4):
        each = [
            -(((teacher[b, n] - centre[0, 0]) / 0.05).softmax(0) * (student[b, n] / 0.1).log_softmax(0)).sum()
            for n in masks[b].nonzero()[:, 0]
        ]
        expected += torch.stack(each).mean() / 4
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.allclose(loss.patch_centre, 0.9 * centre + 0.1 * teacher.mean((0, 1)))


@pytest.mark.parametrize("small", [0, 2])
def test_ibot_trains_the_student_alone(images, small):
    model = ibot().train()
    losses = model(crops(images, small))
    assert torch.allclose(losses["loss"], losses["class loss"] + losses["patch loss"]) and 0 < losses["entropy"] <= 1
    losses["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} - trained <= UNUSED
    assert all(n.startswith("student.") for n, _ in model.named_parameters()) and not model.teacher.training


def test_dino_is_ibot_without_patches(images):
    model = ibot(masked=False, patch_weight=0).train()
    views = crops(images)
    head, encoder = model.student["head"], model.student["encoder"]
    student = torch.cat([head(encoder(x)[:, 0]) for x in views])
    losses = model(views)
    assert torch.allclose(losses["loss"], dino.Loss(40)(student, student[:16], 4), rtol=1e-5)
    assert losses.keys() == {"loss", "entropy"}


def test_given_masks_are_used(images):
    model, masks, seen = ibot().eval(), torch.zeros(16, 16, dtype=torch.bool), []
    masks[:, :5] = True
    hook = model.student["encoder"].register_forward_pre_hook
    hook(lambda m, a, k: seen.append(k.get("masked")), with_kwargs=True)
    model(crops(images), masks)
    assert torch.equal(seen[0], masks) and seen[1] is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_follows_once_a_step_after_the_student(images, accumulate):
    model, rows = ibot(), []
    first = model.teacher["encoder"].norm.weight.clone()

    class Watch(Callback):
        def on_step_end(self, loop):
            rows.append((model.student["encoder"].norm.weight.detach().clone(), model.teacher["encoder"].norm.weight))

    train(model, images, Watch(), model.ema(2, 0.5), steps=2, hardware=Hardware("cpu", accumulate=accumulate))
    expected = 0.5 * first + 0.5 * rows[0][0]  # the momentum is that of the step: 0.5, then 0.75
    torch.testing.assert_close(model.teacher["encoder"].norm.weight, 0.75 * expected + 0.25 * rows[1][0])
    encoder = model.export()
    assert isinstance(encoder, ViT) and torch.equal(encoder(images), model.teacher["encoder"](images))
    assert list(encoder.parameters()) and not encoder.training


def test_weight_decay_follows_its_schedule_and_vectors_have_none(images):
    seen = []

    class Watch(Callback):
        def on_step_end(self, loop):
            seen.append([group["weight_decay"] for group in loop.optimizer.param_groups])

    train(ibot(), images, dino.WeightDecay(0.04, 0.4), Watch(), steps=4, optimizer=adamw(1e-3, 0.04))
    assert [row[1] for row in seen] == [0.0] * 4
    assert [row[0] for row in seen] == pytest.approx(list(dino.cosine(0.04, 0.4, 4, 1)))
    seen.clear()
    train(ibot(), images, dino.WeightDecay(0.0, 0.4), Watch(), steps=4, optimizer=adamw(1e-3, 0.0))
    assert [row[1] for row in seen] == [0.0] * 4
    assert [row[0] for row in seen] == pytest.approx(list(dino.cosine(0.0, 0.4, 4, 1)))
    momentum = [dino.half_cosine(0.99, 1.0, step, 100) for step in (0, 50, 100, 120)]
    assert momentum == pytest.approx([0.99, 0.995, 1, 1])


def test_the_last_layer_is_frozen_in_the_first_epochs(images):
    model, seen = ibot(), []
    head = model.student["head"]

    class Watch(Callback):
        def on_step_end(self, loop):
            seen.append(head.direction.detach().clone())

    train(model, images, dino.FreezeLastLayer(head, 2), Watch(), steps=3)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("kind", ["patch", "region"])
def test_pretraining_of_either_level(kind):
    encoder, images, views = level(kind)
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    teacher, history = dino.pretrain(encoder, images, views, **SMALL)
    assert len(history) == 6 and all(math.isfinite(row["loss"]) for row in history)
    assert all(0 <= row["entropy"] <= 1.0001 for row in history)
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items()), "the caller's encoder is unchanged"
    assert not any(torch.equal(t, before[n]) for n, t in teacher.state_dict().items()) and not teacher.training
    assert [row["lr"] for row in history] == pytest.approx(list(dino.cosine(1e-3, 1e-6, 3, 2, 1)))


@pytest.mark.parametrize("kind", ["patch", "region"])
def test_a_killed_pretraining_resumes_to_the_same_bits(kind, tmp_path, monkeypatch):
    encoder, images, views = level(kind)
    whole, history = dino.pretrain(encoder, images, views, **SMALL)
    options = SMALL | {"checkpoint": Checkpoint(tmp_path / "dino.pt", 3)}
    with interrupted(monkeypatch, dino.SelfDistillation, "forward", 4):
        dino.pretrain(encoder, images, views, **options)
    resumed, again = dino.pretrain(encoder, images, views, **options)
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bfloat16(images):
    losses = [
        [row["loss"] for row in train(ibot(), images, hardware=Hardware("cpu", precision=precision))]
        for precision in ("32-true", "bf16-mixed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_bad_encoders_and_settings():
    encoder, images, views = level("region")
    refuses(
        (lambda: dino.pretrain(encoder, images, views, **SMALL | {"batch": 17}), "batch"),
        (lambda: dino.pretrain(encoder, images, views, **SMALL | {"batch": 0}), "batch"),
        (lambda: dino.pretrain(encoder, images, views, **SMALL | {"warmup": 4}), "warmup"),
        (lambda: dino.pretrain(encoder.requires_grad_(False), images, views, **SMALL), "frozen"),
        (lambda: dino.SelfDistillation(nn.Linear(2, 2)), "width"),
        (lambda: ibot(masked=False), "masked_embed"),
        (lambda: ibot(mask_ratio=0), "mask_ratio"),
    )


def test_views():
    views = dino.ImageViews((28, 12), small=3)(torch.rand(4, 3, 32, 32))
    assert [tuple(c.shape) for c in views] == [(4, 3, 28, 28)] * 2 + [(4, 3, 12, 12)] * 3
    grids = torch.arange(64.0).reshape(1, 1, 8, 8).expand(5, 1, 8, 8)
    views = dino.GridViews(8)
    assert views.sides == [7, 7] + [3] * 8
    assert dino.GridViews(16).sides[::9] == [14, 6] and dino.GridViews(4).sides[::9] == [3, 1]
    flips = set()
    for crop in views(grids):
        right, down = crop[:, 0, 0, 1] - crop[:, 0, 0, 0], crop[:, 0, 1, 0] - crop[:, 0, 0, 0]
        assert (down == 8).all() and (right.abs() == 1).all(), "flipped left to right or not, and nothing else"
        flips |= set(right.tolist())
    assert flips == {-1.0, 1.0}
    with pytest.raises(BadParameter, match="8"):
        views(grids[..., :7])


def test_heads_under_the_authors_names():
    head = dino.Head(8, 16, 12, 6)
    state = head.state_dict()
    official = {o: state[n] for n, o in head.official_names().items()}
    again = dino.Head.from_official(official)
    x = torch.randn(3, 8)
    assert torch.equal(head(x), again(x))
    del official["mlp.2.bias"]
    with pytest.raises(BadCheckpoint, match=r"mlp\.2\.bias"):
        dino.Head.from_official(official)
    with pytest.raises(BadCheckpoint, match=r"last_layer\.weight_g"):
        dino.Head.from_official({})
