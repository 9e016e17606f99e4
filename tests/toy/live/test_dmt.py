"""DMT at pocket scale: what the notebook trains live is the study's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from companion.models.dmt import recipe as runs
from companion.toy.ablations import dmt as study
from companion.toy.datasets import collage

LEARNING_RATES = {(study.TASK, method): 1e-3 for method in study.METHODS}


@pytest.fixture
def few(monkeypatch):
    """Few collages, few steps."""
    monkeypatch.setattr(collage, "COUNTS", {"train": 160, "val": 20, "test": 30})
    monkeypatch.setattr(runs, "LIVE_STEPS", 3)
    study.part.cache_clear()
    yield
    study.part.cache_clear()


def test_the_pocket_setting_is_the_studys(tmp_path, few):
    found = runs.setting(SimpleNamespace(profile="pocket", seed=3), tmp_path, LEARNING_RATES)
    assert found.methods == runs.LIVE and found.rates == dict.fromkeys(runs.LIVE, 1e-3)
    assert {split: len(part.images) for split, part in found.parts.items()} == {"train": 160, "test": 30}
    assert found.teachers.names == study.taught.TEACHERS
    for method in found.methods:
        model, terms = found.build(method), []
        history = found.learn(model, method, terms)
        heads = len(study.STUDENTS[method][0])
        assert len(history) == len(terms) == 3 and history[-1]["loss"] == pytest.approx(terms[-1][0])
        assert all(len(row) == 1 + 3 * heads for row in terms)
        again = found.build(method)
        assert found.learn(again, method) == history, "the same seed gives the same bits"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
