"""DMT (a reconstruction): scales of teachers, statistics of targets, what is trained. Its losses: test_recipe.py."""

import pytest
import torch
from torch.nn import functional as F

from companion.models.dmt import DMT, Teachers, build
from companion.models.dmt import model as dmt
from companion.training.checkpoints import trained_state
from tests.models.common import refuses


def teachers(count=3):
    torch.manual_seed(1)
    tables = {"MAE": "mae", "MoCo v3": "mocov3", "iBOT": "learned"}
    return Teachers({name: build("pocket teacher", positions=kind) for name, kind in list(tables.items())[:count]})


def model(count=3, **options):
    torch.manual_seed(2)
    return DMT(build("pocket"), teachers(count), **{"mask_ratio": 0.5, "decoder": "pocket", **options})


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_statistics_of_a_channel_are_those_of_the_batch_or_running_ones():
    torch.manual_seed(0)
    running, tokens = dmt.TargetNorm(8, "channel", "running"), 3 + torch.randn(64, 5, 8) * torch.arange(1, 9)
    for batch in tokens.split(8):
        running.train()(batch)
    plain, near = F.layer_norm(tokens, (8,), eps=1e-6), {"atol": 1e-4, "rtol": 1e-4}
    expected = (plain - plain.mean((0, 1))) / plain.std((0, 1), correction=0)
    torch.testing.assert_close(dmt.TargetNorm(8)(tokens), expected, **near)
    torch.testing.assert_close(running.eval()(tokens[:1]), expected[:1], **near)  # nothing depends on other images
    older, resumed = running.state_dict(), dmt.TargetNorm(8, "channel", "running").eval()
    older["square"] = older.pop("variance") + older["mean"].square()
    resumed.load_state_dict(older)
    torch.testing.assert_close(resumed(tokens), running(tokens))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_channel_of_large_and_even_values_has_a_standard_deviation_of_1_too(statistics):
    """As the outlier channels of ViTs, whose variance is a thousandth of their squared mean, or less."""
    torch.manual_seed(0)
    tokens, norm = torch.randn(8, 16, 768), dmt.TargetNorm(768, "channel", statistics)
    tokens[..., 5] += 300
    for _ in range(3):
        found = norm(tokens)
    torch.testing.assert_close(found.std((0, 1), correction=0), torch.ones(768), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("weights", [(0.7, 1.3), (1, 0), (0, 1)])
def test_losses_of_a_weight_train_the_student_and_their_modules(weights, images):
    distil = model(token_weight=weights[0], map_weight=weights[1])
    losses = distil(images)
    torch.testing.assert_close(losses.total, (weights[0] * losses.token + weights[1] * losses.map).mean())
    losses.total.backward()
    trained = {name for name, p in distil.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {n for n, _ in distil.named_parameters() if n.endswith("pos_embed") or n.startswith("teachers.")}
    assert trained == set(trained_state(distil)) == {n for n, _ in distil.named_parameters()} - frozen
    assert bool(distil.adapters) == bool(weights[0]) and (distil.decoder is not None) == bool(weights[1])


def test_teachers_are_frozen_copies_without_autograd_and_the_student_is_exported(images):
    own, calls = build("pocket teacher"), []
    distil = DMT(build("pocket"), Teachers({"MAE": own}), decoder="pocket").train()
    (teacher,) = distil.teachers.models.values()
    teacher.blocks[0].register_forward_hook(lambda m, i, o: calls.append(o.requires_grad))
    assert distil.student.training and not teacher.training
    assert own.training and own.norm.weight.requires_grad, "the caller's teacher is unchanged"
    distil(images)
    exported = distil.export()
    assert calls == [False] and exported is not distil.student and not exported.training
    assert torch.equal(exported(images), distil.eval().student(images))


def test_without_a_loss_nothing_is_trained():
    refuses((lambda: DMT(build("pocket"), [48], map_weight=0, token_weight=0, decoder="pocket"), "token_weight"))


def test_teachers_of_another_grid_are_refused(images):
    tokens = [torch.rand(4, 65, 48)]  # the token loss alone would compare other positions
    refuses((lambda: DMT(build("pocket"), [48], map_weight=0, decoder="pocket")(images, tokens), "65"))
