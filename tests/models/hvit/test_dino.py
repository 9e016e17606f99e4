"""DINO and iBOT: the loss by hand, the EMA teacher, schedules, crops, pre-training.

The loss on patches and the head are recorded cases of DMT and H-ViT.
"""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from companion.models.dmt.vit import build
from companion.models.hvit import dino
from companion.models.hvit.model import PatchEncoder, RegionEncoder
from companion.models.hvit.pretrain import pretrain
from companion.training.callbacks import Callback
from companion.training.fit import fit
from companion.training.hardware import CPU, Hardware
from companion.training.schedules import adamw, schedule
from tests.conftest import interrupted
from tests.models.common import refuses

SMALL = dict(epochs=3, batch=8, lr=1e-3, warmup=1, outputs=32, hidden=32, bottleneck=16, hardware=CPU)


def level(kind: str):
    """An encoder of H-ViT, its images, and their crops."""
    torch.manual_seed(0)
    if kind == "patch":
        views = dino.ImageViews((28, 12), small=2, mean=(0.5,) * 3, std=(0.5,) * 3)
        return PatchEncoder(32, 4, 24, 2, 3, mlp_ratio=2, std=None), torch.randint(256, (16, 3, 32, 32)).byte(), views
    return (
        RegionEncoder(4, 24, 24, 2, 3, mlp_ratio=2, std=None, drop_path=0.1),
        torch.randn(16, 24, 4, 4),
        dino.GridViews(4, 3),
    )


def ibot(**options) -> dino.SelfDistillation:
    torch.manual_seed(0)
    encoder = build("pocket teacher", positions="learned", masked=options.pop("masked", True))
    return dino.SelfDistillation(encoder, 40, 64, 16, **{"patch_weight": 1.0, "norm_last_layer": True} | options)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Watch(Callback):
    """Collects what `read` returns after each step."""

    def __init__(self, read):
        self.read, self.seen = read, []

    def on_step_end(self, loop):
        self.seen.append(self.read(loop))


def train(model, images, *callbacks, steps=2, optimizer=None, hardware=CPU):
    options = dict(epochs=steps, batch=len(images), optimizer=optimizer or adamw(1e-3), hardware=hardware)
    mirrored = lambda model, batch: model([batch[0], batch[0].flip(-1)])  # noqa: E731
    return fit(model, mirrored, TensorDataset(images), callbacks=callbacks, schedule=schedule("constant", 0), **options)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0, 2])
def test_ibot_trains_the_student_alone(images, small):
    model = ibot().train()
    losses = model(dino.ImageViews((32, 16), small=small)(images))
    torch.testing.assert_close(losses["loss"], losses["class loss"] + losses["patch loss"])
    assert 0 < losses["entropy"] <= 1 and not model.teacher.training
    losses["loss"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # for some batches its gradient vanishes
    assert trained - reached <= {"student.encoder.norm.bias"} and all(n.startswith("student.") for n in reached)


def test_masks_hide_patches_of_the_large_crops_from_the_student(images):
    model, masks, seen = ibot().eval(), torch.zeros(16, 16, dtype=torch.bool), []
    masks[:, :5] = True
    hook = model.student["encoder"].register_forward_pre_hook
    hook(lambda m, a, k: seen.append(k.get("masked")), with_kwargs=True)
    views = dino.ImageViews((32, 16), small=2)(images)
    model(views, masks)
    model(views)
    assert torch.equal(seen[0], masks) and seen[1] is None and (seen[2].sum(1) == round(0.3 * 16)).all()
    assert ibot(masked=False, patch_weight=0)(views).keys() == {"loss", "entropy"}, "DINO"


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_follows_once_a_step_after_the_student(images, accumulate):
    model = ibot()
    weight = lambda part: part["encoder"].norm.weight.detach().clone()  # noqa: E731
    first, watch = weight(model.teacher), Watch(lambda _: weight(model.student))
    train(model, images, watch, model.ema(2, 0.5), hardware=Hardware("cpu", accumulate=accumulate))
    expected = 0.5 * first + 0.5 * watch.seen[0]  # the momentum is that of the step: 0.5, then 0.75
    torch.testing.assert_close(weight(model.teacher), 0.75 * expected + 0.25 * watch.seen[1])
    encoder = model.export()
    assert torch.equal(encoder(images), model.teacher["encoder"](images)) and not encoder.training


@pytest.mark.parametrize("start", [0.04, 0.0])
def test_weight_decay_follows_its_schedule_and_vectors_have_none(images, start):
    watch = Watch(lambda loop: [group["weight_decay"] for group in loop.optimizer.param_groups])
    train(ibot(), images, dino.WeightDecay(start, 0.4), watch, steps=4, optimizer=adamw(1e-3, start))
    matrices, vectors = zip(*watch.seen, strict=True)
    halves = [(1 - math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert vectors == (0.0,) * 4 and matrices == pytest.approx([start + (0.4 - start) * x for x in halves])
    momentum = [dino.half_cosine(0.99, 1.0, step, 100) for step in (0, 50, 100, 120)]
    assert momentum == pytest.approx([0.99, 0.995, 1, 1])


def test_the_last_layer_is_frozen_in_the_first_epochs(images):
    model = ibot()
    head = model.student["head"]
    watch = Watch(lambda _: head.direction.detach().clone())
    train(model, images, dino.FreezeLastLayer(head, 2), watch, steps=3)
    assert torch.equal(watch.seen[0], watch.seen[1]) and not torch.equal(watch.seen[1], watch.seen[2])


@pytest.mark.parametrize("kind", ["patch", "region"])
def test_pretraining_of_either_level(kind):
    encoder, images, views = level(kind)
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    teacher, history = pretrain(encoder, images, views, **SMALL)
    cosine = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [row["lr"] for row in history] == pytest.approx([0, 1e-3, *cosine])
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items()), "the caller's encoder is unchanged"
    assert not any(torch.equal(t, before[n]) for n, t in teacher.state_dict().items()) and not teacher.training


def test_crops_are_drawn_by_the_loaders_processes():
    (encoder, images, views), drawn = level("region"), []

    def watched(grids):
        drawn.append(len(grids))
        return views(grids)

    hardware = [Hardware("cpu", workers=workers) for workers in (0, 1)]
    (_, here), (_, elsewhere) = (pretrain(encoder, images, watched, **SMALL | {"hardware": on}) for on in hardware)
    assert here == elsewhere and drawn == [1] * 3 * len(images), "one by one, with workers in none of this process"


def test_a_training_is_not_resumed_with_other_crops(tmp_path):
    encoder, images, views = level("region")
    (_, first), (_, again), (_, other) = (
        pretrain(encoder, images, crops, **SMALL, out=tmp_path) for crops in (views, views, dino.GridViews(4, 2))
    )
    assert first == again != other


def test_a_killed_training_takes_the_steps_after_its_checkpoint_alone(tmp_path, monkeypatch):
    encoder, images, views = level("region")
    _, whole = pretrain(encoder, images, views, **SMALL)
    monkeypatch.setattr("companion.training.checkpoints.LONGEST", 0)
    with interrupted(monkeypatch, dino.SelfDistillation, "forward", 2):
        pretrain(encoder, images, views, **SMALL, out=tmp_path)
    steps, forward = [], dino.SelfDistillation.forward
    monkeypatch.setattr(dino.SelfDistillation, "forward", lambda *args: steps.append(1) or forward(*args))
    assert pretrain(encoder, images, views, **SMALL, out=tmp_path)[1] == whole and len(steps) == len(whole) - 2


def test_what_cannot_be_trained_is_refused():
    encoder, images, views = level("region")
    refuses(
        *(
            (lambda name=name, value=value: pretrain(encoder, images, views, **SMALL | {name: value}), f"= {value}")
            for name, value in (("batch", 17), ("batch", 0), ("momentum", 1.5))
        ),
        (lambda: dino.Loss(4, teacher=0.0), "0.0"),
        (lambda: dino.GridViews(4, shares=(1.5, 0.5)), "1.5"),
        (lambda: dino.ImageViews((28, 12))(torch.full((1, 3, 32, 32), 255.0)), "255"),
        (lambda: ibot()([torch.rand(2, 3, 32, 32)]), "crops"),
        (lambda: pretrain(encoder.requires_grad_(False), images, views, **SMALL), "encoder"),
    )


# --- crops ------------------------------------------------------------------------------------------------------------


def test_views():
    views = dino.ImageViews((28, 12), small=3)(torch.rand(4, 3, 32, 32))
    assert [tuple(c.shape) for c in views] == [(4, 3, 28, 28)] * 2 + [(4, 3, 12, 12)] * 3
    assert [dino.GridViews(side).sides[::9] for side in (4, 8, 16)] == [[3, 1], [7, 3], [14, 6]]
    grids, views = torch.arange(64.0).reshape(1, 1, 8, 8).expand(200, 1, 8, 8), dino.GridViews(8)
    for crop, side in zip(views(grids), [7, 7] + [3] * 8, strict=True):
        first = crop.amin((1, 2, 3), keepdim=True)
        assert {*(first // 8).flatten().tolist()} == {*(first % 8).flatten().tolist()} == {*range(8 - side + 1)}
        flipped = crop[..., :1, :1] > crop[..., :1, 1:2]
        plain = crop.flip(-1).where(flipped, crop) - first
        assert 0 < flipped.sum() < 200 and torch.equal(plain, grids[..., :side, :side])
    refuses((lambda: views(grids[..., :7]), "."))
