"""DMT's collages, of which grey hides two factors, and its students."""

import numpy as np
import pytest
import torch

from companion.models.dmt import Teachers
from companion.toy import dmt as toy
from companion.toy.encoders import teachers
from tests.toy.common import pinned

SEED = 7


def test_collages_follow_the_seed_to_the_bit():
    splits = [toy.part(40, split, SEED) for split in toy.COUNTS]
    assert [pinned(*split) for split in splits] == ["594f26e8cde5", "edc0b79e4f9d", "674620450d8e"]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", {"train": 320, "val": 60, "test": 60})
    monkeypatch.setattr(toy, "STEPS", 1)
    for cached in (toy.load, toy.unlabelled):
        cached.cache_clear()
    yield
    for cached in (toy.load, toy.unlabelled):
        cached.cache_clear()


def test_all_students_start_alike_and_learn(few):
    images, tokens = toy.data(toy.TASK, SEED, "trainval")
    for stored, expected in zip(tokens.values(), Teachers(teachers.load())(images[:20]), strict=True):
        torch.testing.assert_close(stored[:20], expected, rtol=1e-4, atol=1e-4)
    first, models = toy.student(SEED).state_dict(), {}
    for method in toy.METHODS:
        models[method], history = toy.train(method, toy.TASK, (images, tokens), 4e-3, SEED)
        learned = not torch.equal(first["blocks.0.attn.qkv.weight"], models[method].student.blocks[0].attn.qkv.weight)
        assert learned == (method not in toy.UNTRAINED) == (len(history) == 1)
    assert [len(models[m].adapters) for m in ("DMT", "MoCo v3 + iBOT", "iBOT only")] == [3, 2, 1]
    assert models["LN targets"].target_norms[0].kind == "ln" and models["token loss only"].decoder is None
    scores = toy.score(models["untrained"], toy.TASK, toy.data(toy.TASK, SEED, "val"))
    assert all(torch.equal(first[name], value) for name, value in models["untrained"].student.state_dict().items())
    assert scores["mean"] == pytest.approx(np.mean([scores[name] for name in toy.FACTORS]), abs=0.02)


def test_a_perfect_feature_is_read_perfectly_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([torch.randint(n, (600,), generator=generator) for n in toy.FACTORS.values()], 1)
    hot = [torch.nn.functional.one_hot(factors[:, i], n) for i, n in enumerate(toy.FACTORS.values())]
    exact, noise = torch.cat(hot, 1).float(), torch.randn(600, 20, generator=generator)
    found = toy.probe(exact[:500], factors[:500], exact[500:], factors[500:], None)
    assert found == dict.fromkeys([*toy.FACTORS, "mean"], 100.0)
    chance = toy.probe(noise[:500], factors[:500], noise[500:], factors[500:])
    assert all(abs(chance[name] - 100 / n) < 12 for name, n in toy.FACTORS.items())
