"""DMT (a reconstruction): losses by hand, scales of teachers, fusion, views, variants."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from companion.models.dmt import DMT, Teachers, build
from companion.models.dmt import model as dmt
from companion.training.checkpoints import trained_state
from tests.models.common import refuses


def teachers(count=3, **options):
    torch.manual_seed(1)
    tables = {"MAE": "mae", "MoCo v3": "mocov3", "iBOT": "learned"}
    models = {name: build("pocket teacher", positions=kind) for name, kind in list(tables.items())[:count]}
    return Teachers(models, **options)


def model(count=3, *, taught_by=None, student=None, **options):
    torch.manual_seed(2)
    student, taught_by = student or build("pocket"), teachers(count) if taught_by is None else taught_by
    torch.manual_seed(3)
    return DMT(student, taught_by, **{"mask_ratio": 0.5, "decoder": "pocket", **options})


def two_widths():
    torch.manual_seed(5)
    return Teachers({"narrow": build("pocket", width=32), "wide": build("pocket", width=64)})


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(1))


def test_the_losses_are_weighted_and_relations_are_those_of_visible_tokens(images, noise):
    """The token and map losses themselves are written out in test_recipe.py."""
    distil = model(token_weight=0.7, map_weight=1.3, relation_weight=0.9)
    losses, keep = distil(images, noise=noise), noise.argsort(1)[:, :8]
    at = torch.cat([torch.zeros(4, 1, dtype=torch.long), 1 + keep], 1)[None, :, None, :, None]
    own, _ = distil.student.last_block(images, keep)
    for teacher, found in zip(distil.teachers.models.values(), losses.relation, strict=True):
        seen = teacher.last_block(images)[0].take_along_dim(at, 3)
        torch.testing.assert_close(found, sum(dmt.relation_loss(own, seen)), rtol=1e-4, atol=1e-6)
    expected = (0.7 * losses.token + 1.3 * losses.map + 0.9 * losses.relation).mean()
    torch.testing.assert_close(losses.total, expected)
    named = dmt.loss(lambda images, output: losses, (images,))
    assert named["loss"] == losses.total and named["token loss"] == losses.token.mean().detach()


@pytest.mark.parametrize("norm", ["ln", "channel"])
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
def test_a_teachers_scale_does_not_matter(norm, fusion, images, noise):
    distil = model(target_norm=norm, fusion=fusion)
    output = distil.teachers(images)
    scaled = [output.tokens[0] * 1000, *output.tokens[1:]]
    one, other = distil(images, output, noise), distil(images, scaled, noise)
    torch.testing.assert_close(one.total, other.total, rtol=1e-3, atol=0)
    plain = model(target_norm="none", fusion=fusion)
    assert abs(plain(images, scaled, noise).total / plain(images, output, noise).total - 1) > 0.05


def test_statistics_of_a_channel_are_those_of_the_batch_or_running_ones():
    torch.manual_seed(0)
    running, tokens = dmt.TargetNorm(8, "channel", "running"), 3 + torch.randn(64, 5, 8) * torch.arange(1, 9)
    for batch in tokens.split(8):
        running.train()(batch)
    plain, near = F.layer_norm(tokens, (8,), eps=1e-6), {"atol": 1e-4, "rtol": 1e-4}
    expected = (plain - plain.mean((0, 1))) / plain.std((0, 1), correction=0)
    torch.testing.assert_close(dmt.TargetNorm(8)(tokens), expected, **near)
    torch.testing.assert_close(running.eval()(tokens[:1]), expected[:1], **near)  # nothing depends on other images
    assert set(running.state_dict()) == {"mean", "square", "batches"} and not dmt.TargetNorm(8).state_dict()


@pytest.mark.parametrize("view", dmt.VIEWS)
def test_one_teacher_makes_all_fusions_the_same(view, images, noise):
    totals = [model(taught_by=teachers(1, view=view), fusion=f)(images, noise=noise).total for f in dmt.FUSIONS]
    torch.testing.assert_close(totals, [totals[0]] * 3)


def test_fused_targets_of_teachers_of_other_widths_keep_their_angles(images):
    mixed = two_widths()
    narrow, wide = model(taught_by=mixed, fusion="mean", target_norm="ln").targets(mixed(images).tokens)
    assert narrow.shape == wide.shape == (4, 17, 64)
    plain = F.normalize(F.layer_norm(mixed(images).tokens[0], (32,), eps=1e-6), dim=-1)
    narrow = F.normalize(narrow, dim=-1)
    torch.testing.assert_close(narrow @ narrow.mT, plain @ plain.mT, atol=1e-5, rtol=1e-4)


def test_the_gate_weighs_teachers_by_their_agreement():
    # cosines with the student 1, 0, 0.71; mean ones with the other two teachers 0.35, 0.35, 0.71; temperature 0.1
    targets = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    weights = torch.tensor([np.exp(10 * 0.5**1.5), 1, np.exp(5)]).float()
    expected = (weights[:, None] / weights.sum() * targets).sum(0)
    torch.testing.assert_close(dmt.gated_target(targets[:, None, None], torch.tensor([[[7.0, 0.0]]]))[0, 0], expected)
    torch.testing.assert_close(dmt.mean_target(targets[:, None, None])[0, 0], torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("view", dmt.VIEWS)
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
@pytest.mark.parametrize("relation", [0, 1])
def test_every_variant_trains_the_student_and_its_heads(view, fusion, relation, images):
    distil = model(taught_by=teachers(view=view), fusion=fusion, relation_weight=relation)
    losses = distil(images)
    losses.total.backward()
    assert losses.relation.shape == (3,) and losses.relation.all() == relation
    assert losses.token.shape == losses.map.shape == ((3,) if fusion == "separate" else (1,))
    trained = {name for name, p in distil.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == set(trained_state(distil))
    tables = {"student.pos_embed", "decoder.pos_embed"}
    assert trained == {n for n, _ in distil.named_parameters() if n not in tables and not n.startswith("teachers.")}


def test_what_weighs_nothing_is_not_built_and_the_student_is_exported(images):
    assert model(token_weight=0).adapters is None
    only = model(map_weight=0)
    assert only.decoder is None and only.map_heads is None
    losses = only(images)
    torch.testing.assert_close(losses.total, losses.token.mean())
    exported = only.eval().export()
    assert torch.equal(exported(images), only.student(images)) and exported is not only.student


def test_teachers_are_frozen_copies_that_run_once_without_autograd(images):
    own = {"MAE": build("pocket teacher"), "iBOT": build("pocket teacher")}
    distil, calls = model(taught_by=Teachers(own)), []
    for name, teacher in distil.teachers.models.items():
        teacher.blocks[0].register_forward_hook(lambda m, i, o, name=name: calls.append((name, o.requires_grad)))
    distil.train()
    assert distil.student.training and not distil.teachers.models["MAE"].training
    assert own["MAE"].training and own["MAE"].norm.weight.requires_grad, "the caller's teachers are unchanged"
    distil(images)
    assert calls == [("MAE", False), ("iBOT", False)]


def test_teachers_see_the_patches_of_their_view(images, noise):
    counts = {view: teachers(view=view).counts(16, 8) for view in dmt.VIEWS}
    assert counts == {"full": [16, 16, 16], "same": [8, 8, 8], "lighter": [11, 13, 16]}
    some, order = teachers(view="lighter"), noise.argsort(1)
    found = some(images, order, 8).tokens
    for teacher, tokens, count in zip(some.models.values(), found, counts["lighter"], strict=True):
        torch.testing.assert_close(tokens, teacher.hidden(images, keep=order[:, :count])[0])


def test_what_does_not_fit_together_is_refused(images):
    other = build("pocket", last_heads=2)
    refuses(
        (lambda: model(fusion="sum"), "gate"),
        (lambda: model(taught_by=(48, 48, 48), relation_weight=1), "relation_weight"),
        (lambda: model(student=other, relation_weight=1), "last_heads"),
        (lambda: model().targets(model().teachers(images).tokens[:2]), "48"),
        (lambda: Teachers({"a": build("pocket"), "b": build("pocket", image=64)}), "64"),
    )
