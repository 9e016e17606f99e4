"""DMT (a reconstruction): losses by hand, invariances, gradients, variants, resuming, and bad input."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadParameter
from companion.models.dmt import DMT, Teachers, build
from companion.models.dmt import model as dmt
from companion.training.checkpoints import trained_state
from companion.training.fit import Hardware, fit
from companion.training.schedules import adamw, schedule
from tests.models.common import refuses


def teachers(count=3, **options):
    torch.manual_seed(1)
    tables = {"MAE": "mae", "MoCo v3": "mocov3", "iBOT": "learned"}
    models = {name: build("pocket teacher", positions=kind) for name, kind in list(tables.items())[:count]}
    return Teachers(models, **options)


def student(**options):
    torch.manual_seed(2)
    return build("pocket", **options)


def model(count=3, *, taught_by=None, **options):
    taught_by = taught_by or teachers(count)
    torch.manual_seed(3)
    return DMT(student(), taught_by, **{"mask_ratio": 0.5, "decoder": "pocket", **options})


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["ln", "channel"])
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
@pytest.mark.parametrize("scale", [0.01, 1000.0])
def test_a_teachers_scale_does_not_matter(norm, fusion, scale, images, noise):
    distil = model(target_norm=norm, fusion=fusion)
    output = distil.teachers(images)
    louder = [output.tokens[0] * scale, *output.tokens[1:]]
    one, other = distil(images, output, noise), distil(images, louder, noise)
    assert torch.allclose(one.total, other.total, rtol=1e-3)
    plain = model(target_norm="none", fusion=fusion)
    assert abs(plain(images, louder, noise).total / plain(images, output, noise).total - 1) > 0.05


def test_running_statistics_reach_those_of_the_data_and_are_used_in_eval(images):
    torch.manual_seed(0)
    norm, tokens = dmt.TargetNorm(8, "channel", "running"), 3 + torch.randn(64, 5, 8) * torch.arange(1, 9)
    norm.train()
    for batch in tokens.split(8):
        norm(batch)
    plain, whole = F.layer_norm(tokens, (8,), eps=1e-6), dmt.TargetNorm(8, "channel")(tokens)
    assert torch.allclose(whole.mean((0, 1)), torch.zeros(8), atol=1e-5)
    assert torch.allclose(whole.square().mean((0, 1)), torch.ones(8), atol=1e-3)
    assert torch.allclose(norm.mean, plain.mean((0, 1)), atol=1e-5)
    norm.eval()
    assert torch.equal(norm(tokens[:1]), norm(tokens)[:1])  # nothing depends on other images
    assert set(norm.state_dict()) == {"mean", "square", "batches"}
    assert not dmt.TargetNorm(8, "channel").state_dict()


def test_by_hand(images, noise):
    distil, trace = model(token_weight=0.7, map_weight=1.3, target_norm="ln"), {}
    losses = distil(images, noise=noise, trace=trace)
    keep = noise.argsort(1)[:, :8]
    z = distil.student(images, keep)
    expected = 0
    for k, teacher in enumerate(distil.teachers.models.values()):
        y = teacher.hidden(images)[0]
        t = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        at = torch.cat([t[:, :1], torch.stack([t[b, 1 + keep[b]] for b in range(4)])], 1)
        d = (distil.adapters[k](z) - at).abs()
        token = torch.where(d < 2, d**2 / 4, d - 1).mean()
        d = (trace["maps"][k] - t).abs()
        mapped = torch.where(d < 2, d**2 / 4, d - 1).mean()
        assert torch.allclose(losses.token[k], token, rtol=1e-4) and torch.allclose(losses.map[k], mapped, rtol=1e-4)
        expected += (0.7 * token + 1.3 * mapped) / 3
    assert torch.allclose(losses.total, expected, rtol=1e-4)
    named = dmt.loss(lambda images, output: losses, (images,))
    assert named["loss"] == losses.total and named["token loss"] == losses.token.mean().detach()


def test_relations_by_hand():
    torch.manual_seed(0)
    s, t = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 12)
    for i, loss in zip((0, 2), dmt.relation_loss(s, t), strict=True):
        j = 1 if i == 0 else 2
        p, q = (((x[i] @ x[j].mT) / x.shape[-1] ** 0.5).softmax(-1) for x in (t, s))
        assert torch.allclose(loss, (p * (p / q).log()).sum(-1).mean(), rtol=1e-4)


@pytest.mark.parametrize("view", dmt.VIEWS)
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
def test_one_teacher_makes_all_fusions_the_same(view, fusion, images, noise):
    one = model(taught_by=teachers(1, view=view))
    other = model(taught_by=teachers(1, view=view), fusion=fusion)
    assert torch.equal(one(images, noise=noise).total, other(images, noise=noise).total)


def test_identical_teachers_give_the_encoder_the_gradient_of_one(images, noise):
    single = model(1)
    same = Teachers({name: copy.deepcopy(single.teachers.models["MAE"]) for name in "abc"})
    three = model(taught_by=same)
    three.decoder.load_state_dict(single.decoder.state_dict())
    for heads, own in ((three.adapters, single.adapters), (three.map_heads, single.map_heads)):
        for head in heads:
            head.load_state_dict(own[0].state_dict())
    for each in (single, three):
        each(images, noise=noise).total.backward()
    for p, q in zip(single.student.parameters(), three.student.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7)


def test_fused_targets_of_teachers_of_other_widths(images, noise):
    torch.manual_seed(5)
    mixed = Teachers({"narrow": build("pocket", width=32), "wide": build("pocket", width=64)})
    distil = model(taught_by=mixed, fusion="mean", target_norm="ln")
    narrow, wide = distil.targets(distil.teachers(images))
    assert narrow.shape == wide.shape == (4, 17, 64)
    plain = F.layer_norm(mixed(images).tokens[0], (32,), eps=1e-6)
    narrow, plain = F.normalize(narrow, dim=-1), F.normalize(plain, dim=-1)
    assert torch.allclose(narrow @ narrow.mT, plain @ plain.mT, atol=1e-5), "the fixed matrix keeps angles"
    distil(images, noise=noise).total.backward()


def test_the_gate_prefers_the_teacher_that_the_student_agrees_with(images):
    distil = model(2, fusion="gate")
    a, b = torch.randn(2, 1, 3, 48)
    fused = distil.fuse([a + 0.5 * b, b + 0.5 * a], a)
    assert (F.cosine_similarity(fused, a + 0.5 * b, dim=-1) > F.cosine_similarity(fused, b + 0.5 * a, dim=-1)).all()
    # cosines with the student 1, 0, 0.71; mean ones with the other two teachers 0.35, 0.35, 0.71; temperature 0.1
    targets = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    weights = torch.tensor([np.exp(10 * 0.5**1.5), 1, np.exp(5)]).float()
    expected = (weights[:, None] / weights.sum() * targets).sum(0)
    torch.testing.assert_close(distil.fuse(targets[:, None, None], torch.tensor([[[7.0, 0.0]]]))[0, 0], expected)
    distil.fusion = "mean"
    assert torch.allclose(distil.fuse([a, b], a), (a + b) / 2)


@pytest.mark.parametrize(("view", "fusion", "relation"), [*itertools.product(dmt.VIEWS, dmt.FUSIONS, (0, 1))])
def test_every_variant_trains_the_student_and_its_heads(view, fusion, relation, images):
    distil = model(taught_by=teachers(view=view), fusion=fusion, relation_weight=relation)
    losses = distil(images)
    losses.total.backward()
    assert torch.isfinite(losses.total) and losses.relation.shape == (3,)
    assert losses.token.shape == losses.map.shape == ((3,) if fusion == "separate" else (1,))
    trained = {name for name, p in distil.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in distil.named_parameters() if p.requires_grad} == set(trained_state(distil))
    tables = {"student.pos_embed", "decoder.pos_embed"}
    assert trained == {n for n, _ in distil.named_parameters() if n not in tables and not n.startswith("teachers.")}


def test_what_weighs_nothing_is_not_built(images):
    assert model(token_weight=0).adapters is None
    only = model(map_weight=0)
    assert only.decoder is None and only.map_heads is None
    losses = only(images)
    assert torch.allclose(losses.total, losses.token.mean()) and not losses.map.any()
    exported = only.eval().export()
    assert set(exported.state_dict()) == set(student().state_dict())
    assert torch.equal(exported(images), only.student(images)) and exported is not only.student


def test_teachers_are_frozen_copies_that_run_once_without_autograd(images):
    own = {"MAE": build("pocket teacher"), "iBOT": build("pocket teacher")}
    distil = model(taught_by=Teachers(own))
    calls = []
    for name, teacher in distil.teachers.models.items():
        teacher.blocks[0].register_forward_hook(lambda m, i, o, name=name: calls.append((name, o.requires_grad)))
    distil.train()
    assert distil.student.training and not distil.teachers.models["MAE"].training
    assert own["MAE"].training and own["MAE"].norm.weight.requires_grad, "the caller's teachers are unchanged"
    distil(images)
    assert calls == [("MAE", False), ("iBOT", False)]


def test_lighter_views_are_supersets_and_grey_keeps_the_luma(images, noise):
    red = images.clone()
    red[:, 0] += 0.1
    red[:, 1] -= 0.1 * 0.299 / 0.587
    assert torch.allclose(dmt.grey(red), dmt.grey(images), atol=1e-6)
    some = teachers(view="lighter")
    assert some.counts(16, 8) == (11, 13, 16)
    assert [t.shape[1] for t in some(images, noise.argsort(1), 8).tokens] == [12, 14, 17]
    with pytest.raises(BadParameter, match="order"):
        some(images)


@pytest.mark.parametrize("fusion", dmt.FUSIONS)
def test_bfloat16(fusion, images):
    losses, options = [], {"epochs": 3, "batch": 4, "optimizer": adamw(1e-3), "schedule": schedule("cosine", 0)}
    for precision in ("32-true", "bf16-mixed"):
        distil, hardware = model(fusion=fusion, relation_weight=1), Hardware("cpu", precision=precision)
        rows = fit(distil, dmt.loss, TensorDataset(images), hardware=hardware, **options)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["mean", "gate"])
def test_fused_targets_are_in_float32_under_autocast(fusion, images, noise):
    torch.manual_seed(5)
    mixed = Teachers({"narrow": build("pocket", width=32), "wide": build("pocket", width=64)})
    distil = model(taught_by=mixed, fusion=fusion, target_norm="ln")
    output, predicted = mixed(images), torch.randn(4, 17, 64)
    exact = distil.targets(output)
    fused = distil.fuse(exact, predicted)
    with torch.autocast("cpu", torch.bfloat16):
        found = distil.targets(output)
        assert all(map(torch.equal, found, exact)) and torch.equal(distil.fuse(found, predicted), fused)


def test_gradient_checkpointing_recomputes_blocks_with_relations_too(images, noise):
    found = []
    for enable in (False, True):
        distil, calls = model(relation_weight=1).train(), []
        distil.student.set_grad_checkpointing(enable)
        distil.student.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        distil(images, noise=noise).total.backward()
        found.append([p.grad for p in distil.parameters() if p.requires_grad])
        assert len(calls) == 1 + enable
    assert all(map(torch.equal, *found))


def test_bad_options(images):
    distil = model()
    refuses(
        (lambda: dmt.TargetNorm(8, kind="x"), "target_norm"),
        (lambda: dmt.TargetNorm(8, statistics="x"), "statistics"),
        (lambda: distil.targets(distil.teachers(images).tokens[:2]), "teacher_output"),
        (lambda: model(fusion="sum"), "fusion"),
        (lambda: model(token_weight=0, map_weight=0), "token_weight"),
        (lambda: model(token_weight=-1), "token_weight"),
        (lambda: model(decoder="huge"), "decoder"),
        (lambda: model(taught_by=(48, 48, 48), relation_weight=1), "relation_weight"),
        (lambda: model(taught_by=(48, 48, 48))(images), "teacher_output"),
        (lambda: DMT(student(last_heads=2), teachers(), relation_weight=1, decoder="pocket"), "last_heads"),
        (lambda: DMT(student(image=64), teachers(), decoder="pocket"), "patches"),
        (lambda: DMT(student(), (), decoder="pocket"), "teachers"),
        (lambda: teachers(view="half"), "teacher_view"),
        (lambda: Teachers({"a": student(), "b": student(image=64)}), "grid"),
        (lambda: Teachers({}), "teachers"),
    )
