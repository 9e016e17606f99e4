"""State dicts under official names: round trips, stacks, concatenations, a full list of mismatches; frozen copies."""

import torch
from torch import nn

from companion.models.layers.frozen import frozen_copy
from companion.models.layers.state_dicts import depth, load_official, official_state
from tests.models.common import misfits


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.qkv = nn.Linear(4, 12, bias=False)


KINDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NAMES = {f"norm.{kind}": f"n.{kind}" for kind in KINDS} | {"stack": ["a", "b"], "qkv.weight": ["q", "k", "v"]}


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_round_trip_of_names_stacks_and_concatenations():
    model, other = Model(), Model()
    state = official_state(model.state_dict(), NAMES)
    assert torch.equal(state["b"], model.stack[1]) and torch.equal(state["k"], model.qkv.weight[4:8])
    del state["n.num_batches_tracked"]
    assert misfits(load_official, other, state, NAMES, "a model") == (["n.num_batches_tracked"], [], [])
    assert not same(model, other)
    load_official(other, state, NAMES, "a model", optional=("num_batches_tracked",))
    assert same(model, other)


def test_all_misfits_are_listed_and_nothing_is_loaded():
    model, state = Model(), official_state(Model().state_dict(), NAMES)
    before = frozen_copy(model).stack.clone()
    del state["n.weight"], state["b"]
    state |= {"k": torch.zeros(4, 5), "other": torch.zeros(1), "frozen.x": torch.zeros(1)}
    found = misfits(load_official, model, state, NAMES, "a model", ignored=("frozen.",))
    assert found == (["b", "n.weight"], ["other"], ["k (4, 5), expected (4, 4)"])
    assert torch.equal(model.stack, before)
    assert depth(["blocks.0.a", "blocks.0.b", "blocks.11.a", "head.0.a"], "blocks.") == 2


def test_a_frozen_copy_shares_memory_and_leaves_the_module_as_it_was():
    first = nn.Linear(4, 4)
    module = nn.Sequential(first, nn.BatchNorm1d(4), first).train()  # with a weight shared by two modules
    twin = frozen_copy(module)
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert twin[0] is twin[2] is not first
    state = module.state_dict()
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in twin.state_dict().items())
