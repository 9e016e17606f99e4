"""Checkpoints and weights that a run keeps: found again by what was trained on what, and by nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion import backbones
from companion.training import checkpoints as kept
from companion.training.fit import fit


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
        return F.mse_loss(m(batch[0]), batch[1])

    def train(**options):
        one = model()
        fit(one, loss, data, epochs=3, batch=8, lr=1e-2, accelerator="cpu", checkpoint_every=2, **options)
        return one.state_dict()

    def where():
        return kept.checkpoint(tmp_path, "par/peta, seed 0", model(), ["a.png"], data.tensors[1])

    with pytest.raises(KeyboardInterrupt):
        train(**where())
    (file,) = tmp_path.iterdir()
    assert file == where()["checkpoint"] and file.name.startswith("par-peta, seed 0, ")
    again = train(**where())
    assert len(asked) == 8  # two of six were kept
    once_more = train(**where())
    assert len(asked) == 8
    whole = train()
    for found in (again, once_more):
        assert all(torch.equal(t, whole[n]) for n, t in found.items())


def test_other_weights_or_data_are_another_training(tmp_path):
    labels = torch.zeros(3)
    one = kept.checkpoint(tmp_path, "x", model(), ["a.png"], labels)
    assert kept.checkpoint(tmp_path, "x", model(), ["a.png"], labels.clone()) == one
    others = (model(1), ["a.png"], labels), (model(), ["b.png"], labels), (model(), ["a.png"], labels + 1)
    assert all(kept.checkpoint(tmp_path, "x", *other) != one for other in others)


def test_weights_are_whole_or_not_there(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    path = kept.save(tmp_path / "trained", "ViT-L/14", {"a": tensor.mT, "b": tensor, "also b": tensor})
    assert path.name == "ViT-L-14.safetensors"
    found = backbones.read_state(path)
    assert torch.equal(found["a"], tensor.mT) and torch.equal(found["also b"], found["b"])
    with pytest.raises(AttributeError):
        kept.save(tmp_path / "trained", "x", {"a": 1})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
