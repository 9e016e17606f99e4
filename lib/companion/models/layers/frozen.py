"""Frozen copies of backbones, so that the caller's model is never changed."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A copy of a module in eval mode whose parameters need no gradient; the module itself keeps its flags and mode.

    The copy has its own structure and shares the memory of the tensors, until `.to` moves or converts one of the two:
    move the module before it is copied. Use `copy.deepcopy` for a trainable copy instead: an optimiser step would
    change the tensors of both.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared | {id(b): b.detach() for b in module.buffers()}).eval()
