"""Results of long passes on disk: what a killed run computes again, and files that are damaged or too large."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion.errors import CompanionError, CorruptFile
from companion.training import stored
from companion.training.fit import outputs_of
from companion.training.hardware import CPU
from tests.conftest import interrupted
from tests.models.common import refuses

IMAGES = TensorDataset(torch.rand(10, 3, generator=torch.Generator().manual_seed(0)))


class Counting(nn.Linear):
    """A layer that lists the sizes of its batches."""

    def __init__(self):
        super().__init__(3, 2)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_a_killed_prediction_computes_what_was_not_recorded(seconds, tmp_path, monkeypatch):
    model = Counting()
    expected = outputs_of(model, IMAGES, batch=3, hardware=CPU)
    model.batches.clear()
    monkeypatch.setattr(stored, "FLUSHED", seconds)
    with interrupted(monkeypatch, nn.Linear, "forward", 2):
        outputs_of(model, IMAGES, batch=3, hardware=CPU, folder=tmp_path / "f")
    model.batches.clear()
    found = outputs_of(model, IMAGES, batch=3, hardware=CPU, folder=tmp_path / "f")
    assert model.batches == ([3, 1] if seconds == 0 else [3, 3, 3, 1])
    assert torch.equal(found, expected)
    model.batches.clear()
    assert torch.equal(outputs_of(model, IMAGES, batch=3, hardware=CPU, folder=tmp_path / "f"), expected)
    assert not model.batches
    nn.Linear(2, 1)(found).sum().backward()  # may be trained on


def test_arrays_of_another_shape_too_large_or_damaged_are_refused(tmp_path, monkeypatch):
    def fill(*batches):
        return stored.fill(tmp_path / "a", 4, lambda done: [[rows] for rows in batches])

    with pytest.raises(ValueError, match="reshape"):
        fill(torch.zeros(2, 3), torch.zeros(2, 1))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
        refuses((lambda: fill(torch.zeros(2, 3)), "0.0 are free"), error=CompanionError)
    fill(torch.zeros(4, 3))
    (tmp_path / "a" / "cache.json").write_text('{"done": 2}')
    with monkeypatch.context() as patch:  # the rows that are there need no place
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * 3 * 4))
        fill(torch.ones(2, 3))
    assert np.load(tmp_path / "a" / "0.npy").sum() == 2 * 3
    (tmp_path / "a" / "cache.json").write_text('{"done": 2}')
    (tmp_path / "a" / "0.npy").write_bytes((tmp_path / "a" / "0.npy").read_bytes()[:140])
    refuses((lambda: fill(torch.zeros(2, 3)), r"0\.npy.*delete"), error=CorruptFile)  # not lengthened
    (tmp_path / "a" / "0.npy").write_bytes(b"web page")
    refuses((lambda: stored.opened(tmp_path / "a", 1), r"0\.npy.*delete"), error=CorruptFile)


def test_results_are_saved_some_at_a_time_and_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "EVERY", 4)
    computed = []

    def results(done, last=10):
        for i in range(done, last):
            computed.append(i)
            yield {"boxes": torch.full((i, 4), i), "sparse": torch.eye(3).to_sparse(), "names": ["a"] * i}
        if last < 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stored.saved(tmp_path / "s", 10, lambda done: results(done, 7)))
    computed.clear()
    found = list(stored.saved(tmp_path / "s", 10, results))
    assert computed == [4, 5, 6, 7, 8, 9]
    again = list(stored.saved(tmp_path / "s", 10, results))
    assert computed == [4, 5, 6, 7, 8, 9]
    for rows in (found, again):
        assert [len(row["boxes"]) for row in rows] == [*range(10)] == [len(row["names"]) for row in rows]
        assert torch.equal(sum(row["sparse"].to_dense() for row in rows), 10 * torch.eye(3))
    assert len(list(stored.saved(None, 10, results))) == 10
    last = tmp_path / "s" / "8.pt"
    refuses((lambda: list(stored.saved(tmp_path / "s", 9, results)), r"8\.pt.* 2 items.*delete"), error=CorruptFile)
    last.write_bytes(last.read_bytes()[:50])
    refuses((lambda: list(stored.saved(tmp_path / "s", 10, results)), r"8\.pt.*delete"), error=CorruptFile)
