"""State dicts under official names: round trips, stacks, concatenations, and a complete list of mismatches."""

import torch
from torch import nn

from companion.models.layers.state_dicts import depth, load_official, official_state
from tests.models.common import misfits


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.qkv = nn.Linear(4, 12, bias=False)


NAMES = {
    "norm.weight": "n.w",
    "norm.bias": "n.b",
    "norm.running_mean": "n.mean",
    "norm.running_var": "n.var",
    "norm.num_batches_tracked": "n.num_batches_tracked",
    "stack": ["a", "b"],
    "qkv.weight": ["q", "k", "v"],
}


def test_round_trip_of_names_stacks_and_concatenations():
    model, other = Model(), Model()
    state = official_state(model.state_dict(), NAMES)
    assert torch.equal(state["b"], model.stack[1]) and torch.equal(state["k"], model.qkv.weight[4:8])
    load_official(other, state, NAMES, "a model")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_all_misfits_are_listed_and_nothing_is_loaded():
    model = Model()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, official_state(Model().state_dict(), NAMES)
    del state["n.w"], state["b"]
    state |= {"k": torch.zeros(4, 5), "other": torch.zeros(1), "frozen.x": torch.zeros(1)}
    found = misfits(load_official, model, state, NAMES, "a model", ignored=("frozen.",))
    assert found == (["b", "n.w"], ["other"], ["k (4, 5), expected (4, 4)"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_optional_names_may_be_missing():
    model, state = Model(), official_state(Model().state_dict(), NAMES)
    del state["n.num_batches_tracked"]
    assert misfits(load_official, model, state, NAMES, "a model") == (["n.num_batches_tracked"], [], [])
    load_official(model, state, NAMES, "a model", optional=("num_batches_tracked",))
    assert torch.equal(model.qkv.weight[8:], state["v"])
    assert depth(["blocks.0.a", "blocks.0.b", "blocks.11.a", "head.0.a"], "blocks.") == 2
