"""What PromptPAR's notebook trains live at the `pocket` profile."""

import numpy as np
import pytest
import torch

from companion.toy.ablations import promptpar as ablation
from companion.toy.datasets import pedestrians as toy
from companion.toy.live import promptpar as live
from tests.conftest import parameters

RATES = dict.fromkeys((("street", method) for method in live.METHODS), 3e-2)


def test_the_live_run_is_the_row_of_the_ablations(tmp_path, monkeypatch):
    """The same images, initialisation and steps as the row with this seed and learning rate."""
    found = live.setting(parameters("promptpar", seed=3), tmp_path, RATES)
    assert found.methods == live.METHODS and found.names == toy.ATTRIBUTES
    assert {part: len(data) for part, data in found.parts.items()} == {"train": 700, "test": 600}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["seed3"]
    monkeypatch.setattr(ablation, "EPOCHS", 2)
    model, history = found.train("PromptPAR")
    row = ablation.train("PromptPAR", "street", 3e-2, 3, str(tmp_path / "data"))
    scores = found.scores(model)
    assert {name: round(value, 2) for name, value in scores.totals.items()} == {n: row[n] for n in scores.totals}
    assert len(history) == 42 and model.count() == row["trained"]
    images, truth = found.first("test", 5)
    assert images.shape == (5, 3, 64, 32) and torch.equal(truth, found.parts["test"].tensors[1][:5])
    assert model.maps(images).regions.shape == (5, 5, 8, 4)


def test_live_methods_are_in_the_ablations_and_learn(tmp_path, monkeypatch):
    assert set(live.METHODS) <= set(ablation.METHODS) and live.TASK in ablation.TASKS
    found = live.setting(parameters("promptpar"), tmp_path, RATES)
    monkeypatch.setattr(ablation, "EPOCHS", 6)
    losses = [row["loss"] for row in found.train("heads only")[1]]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    with pytest.raises(KeyError):
        live.setting(parameters("promptpar"), tmp_path, {}).train("heads only")
