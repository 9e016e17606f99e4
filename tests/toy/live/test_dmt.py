"""DMT's live training on the synthetic collages is the ablation's."""

from __future__ import annotations

import pytest
import torch

from companion.toy.ablations import dmt as study
from companion.toy.datasets import collage
from companion.toy.live import dmt as live
from tests.conftest import parameters

LEARNING_RATES = {(study.TASK, method): 1e-3 for method in study.METHODS}


@pytest.fixture
def few(monkeypatch):
    """Few collages, few steps."""
    monkeypatch.setattr(collage, "COUNTS", {"train": 160, "val": 20, "test": 30})
    monkeypatch.setattr(live, "STEPS", 3)
    study.part.cache_clear()
    yield
    study.part.cache_clear()


def test_the_setting_is_the_ablations(tmp_path, few):
    found = live.setting(parameters("dmt", seed=3), tmp_path, LEARNING_RATES)
    assert found.learning_rates == dict.fromkeys(live.METHODS, 1e-3) and found.trained is None
    for method in found.learning_rates:
        model = found.build(method)
        history = found.learn(model, method)
        assert len(history) == 3 and len(model.widths) == len(study.STUDENTS[method][0])
        assert history[0]["loss"] == pytest.approx(history[0]["token loss"] + history[0]["map loss"], rel=1e-5)
        again = found.build(method)
        assert found.learn(again, method) == history, "the same seed gives the same bits"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
