"""The student of two real encoders: crops, tokens, agreement, and a training of a few steps."""

import pytest
import torch

from companion.errors import MissingWeights
from companion.toy.datasets import scenes
from companion.toy.encoders import photo_student


def test_crops_are_of_the_photographs_that_are_not_held_out(monkeypatch):
    loaded = []
    for name, photograph in scenes.PHOTOGRAPHS.items():
        load = lambda name=name, load=photograph.load: (loaded.append(name), load())[1]  # noqa: E731
        monkeypatch.setitem(scenes.PHOTOGRAPHS, name, scenes.Photograph(load))
    before = torch.get_rng_state()
    found = photo_student.crops(30, 3)
    assert set(loaded) == set(scenes.PHOTOGRAPHS) - set(photo_student.HELD_OUT) and len(loaded) > 8
    assert found.shape == (30, 3, 256, 256) and 0 <= found.min() < 0.1 and 0.9 < found.max() <= 1
    assert torch.equal(found, photo_student.crops(30, 3)) and not torch.equal(found, photo_student.crops(30, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_agreement_ignores_rotation_and_scale_and_notices_shuffled_positions():
    torch.manual_seed(0)
    a = torch.randn(2, 16, 8)
    rotated = 5 * a @ torch.linalg.qr(torch.randn(8, 8))[0] + 3
    torch.testing.assert_close(photo_student.agreement(a, rotated), torch.ones(2, 16))
    assert photo_student.agreement(a, a[:, torch.randperm(16)]).mean() < 0.5
    assert photo_student.agreement(a, torch.randn(2, 16, 5)).shape == (2, 16)


def test_a_few_steps_lower_the_loss_for_teachers_of_unlike_widths(monkeypatch):
    images = photo_student.crops(8, 0)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images, photo_student.GRID).flatten(2).mT
    targets = {"one": torch.cat([pooled.mean(1, keepdim=True), pooled], 1), "other": torch.randn(8, 257, 5)}
    trained, history = photo_student.train(images, targets, 0, epochs=6)
    assert history[-1]["loss"] < history[0]["loss"] and not trained.training
    scores = photo_student.measure(trained, images, targets, {"one": targets["one"][:4]})
    assert scores["one"].keys() == {"agreement", "R2"} and abs(scores["one"]["agreement"]) <= 1


def test_the_shipped_student_is_the_one_on_its_card():
    shipped, fresh = photo_student.load(), photo_student.student()
    assert repr(shipped) == repr(fresh)
    first, again = shipped.state_dict(), fresh.state_dict()
    assert torch.allclose(first["pos_embed"], again["pos_embed"], atol=1e-3)
    assert not torch.allclose(first["blocks.0.attn.qkv.weight"], again["blocks.0.attn.qkv.weight"], atol=1e-2)


def test_tokens_of_the_real_encoders():
    try:
        teachers = photo_student.teachers()
    except MissingWeights:
        pytest.skip("the extra `real` is not installed")
    images = photo_student.held_out()[:2]
    vit = teachers["ViT-S/14"]
    found = {name: photo_student.tokens(name, encoder, images) for name, encoder in teachers.items()}
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "ViT-S/14": (2, 257, 384),
        "EfficientNet-Lite0": (2, 257, 112),
    }
    with torch.no_grad():  # before the final norm; the patches follow the [CLS] token
        x = photo_student.resized(images, 224)
        x = (x - torch.tensor(vit.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(vit.pretrained_cfg["std"]).view(
            3, 1, 1
        )
        torch.testing.assert_close(vit.norm(found["ViT-S/14"]), vit.forward_features(x), rtol=1e-3, atol=1e-3)
    patches = found["EfficientNet-Lite0"]
    torch.testing.assert_close(patches[:, 0], patches[:, 1:].mean(1))
