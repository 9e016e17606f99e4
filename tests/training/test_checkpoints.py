"""Checkpoints and weights of a run are identified by their training and data alone."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.training.checkpoints import Checkpoint, checkpoint_key, save
from tests.training.test_fit import run, same, squared


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_stopped_training_goes_on_and_a_finished_one_is_read(tmp_path):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    data, asked = TensorDataset(x, x[:, :2]), []

    def loss(m, batch):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return squared(m, batch)

    def train(checkpoint=None):
        one = model()
        run(one, loss, data, epochs=3, checkpoint=checkpoint)
        return one

    def where():
        facts = {"model": model(), "images": ["a.png"], "labels": data.tensors[1]}
        return Checkpoint.of(tmp_path, "par/peta, seed 0", every=2, **facts)

    with pytest.raises(KeyboardInterrupt):
        train(where())
    assert set(tmp_path.iterdir()) == {where().path, where().history}
    assert where().path.name.startswith("par-peta, seed 0, ")
    again, once_more = train(where()), train(where())
    assert len(asked) == 8  # two of six were saved, and then all
    whole = train()
    assert same(again, whole) and same(once_more, whole)


def test_a_key_is_the_same_for_the_same_facts_alone(tmp_path, monkeypatch):
    facts = {"model": model(), "images": ["a.png"], "labels": torch.zeros(3), "root": tmp_path / "data", "width": 8}
    one = checkpoint_key(**facts)
    assert checkpoint_key(**dict(reversed(facts.items()))) == one
    monkeypatch.chdir(tmp_path)  # a path is where it is, whatever folder the run was started in
    assert checkpoint_key(**facts | {"model": model(), "labels": torch.zeros(3), "root": Path("data")}) == one
    others = {"model": model(1), "images": ["b.png"], "labels": torch.ones(3), "root": tmp_path, "width": 8.5}
    assert len({one} | {checkpoint_key(**facts | {name: value}) for name, value in others.items()}) == 6
    assert checkpoint_key(**facts | {"labels": torch.zeros(3, dtype=torch.int32)}) != one
    with pytest.raises(TypeError, match="object"):
        checkpoint_key(fact=object())


def test_weights_are_whole_or_not_there(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    path = save(tmp_path / "trained", "ViT-L/14", {"a": tensor.mT, "b": tensor, "also b": tensor})
    assert path.name == "ViT-L-14.safetensors"
    found = backbones.read_state(path)
    assert torch.equal(found["a"], tensor.mT) and torch.equal(found["also b"], found["b"])
    with pytest.raises(AttributeError):
        save(tmp_path / "trained", "x", {"a": 1})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
