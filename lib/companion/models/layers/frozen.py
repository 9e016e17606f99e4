"""Frozen copies of backbones, so that the caller's model is never changed, and what is computed of frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .precision import without_autocast

Module = TypeVar("Module", bound=nn.Module)
Value = TypeVar("Value")
# of each module by name: the tensors of which a value was computed. Apart from the module, of which copies are made
_SOURCES: WeakKeyDictionary[nn.Module, dict[str, list[Any]]] = WeakKeyDictionary()


def frozen_copy(module: Module) -> Module:
    """A copy of a module in eval mode whose parameters need no gradient; the module itself keeps its flags and mode.

    The copy has its own structure and shares the memory of the tensors, until `.to` moves or converts one of the two:
    move the module before it is copied. Use `copy.deepcopy` for a trainable copy instead: an optimiser step would
    change the tensors of both.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared | {id(b): b.detach() for b in module.buffers()}).eval()


def current(module: nn.Module, name: str, sources: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
    """A value that is computed of tensors, and computed again where these are others, were moved, or have changed.

    Changes in place are those that PyTorch counts, as by an optimiser or `load_state_dict`, not those of `.data`. A
    program of `torch.compile` or `torch.export` has the last value.

    Args:
        name: of the value; a tensor is a buffer of the module, not in its state dict, which its files have.
        compute: without arguments; it runs without autograd and without autocast.
    """
    values = module._buffers if name in module._buffers else vars(module)
    if name in values and torch.compiler.is_compiling():
        return values[name]
    # a weak reference: the address of a storage that is no more may be that of another one
    tensors = list(sources)
    stamp = [(StorageWeakRef(x.untyped_storage()), 0 if x.is_inference() else x._version) for x in tensors]
    stamps = _SOURCES.setdefault(module, {})
    if name not in values or stamps.get(name) != stamp:
        with torch.inference_mode(False), torch.no_grad(), without_autocast(tensors[0].device):
            value = compute()
        if isinstance(value, Tensor):
            values = module._buffers
            module._non_persistent_buffers_set.add(name)
        values[name], stamps[name] = value, stamp
    return values[name]
