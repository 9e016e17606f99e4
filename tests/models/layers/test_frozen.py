"""The frozen copy: its own flags and structure, the tensors of the module."""

import torch
from torch import nn

from companion.models.layers.frozen import frozen_copy


def test_the_copy_is_frozen_shares_memory_and_leaves_the_module_as_it_was():
    first = nn.Linear(4, 4)
    module = nn.Sequential(first, nn.BatchNorm1d(4), first).train()  # with a weight shared by two modules
    twin = frozen_copy(module)
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert twin[0] is twin[2] is not first
    for name, tensor in module.state_dict().items():
        assert twin.state_dict()[name].data_ptr() == tensor.data_ptr()
    twin[1] = nn.Identity()
    assert isinstance(module[1], nn.BatchNorm1d)
    x = torch.randn(3, 4)
    module.eval()
    assert torch.equal(frozen_copy(module)(x), module(x))
