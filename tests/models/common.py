"""Helpers of several models' tests: refusals, mismatches, recomputed gradients, operations."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from companion.errors import BadCheckpoint, BadParameter
from companion.training.fit import _checkpoint_activations

# arguments of timm's ViT whose blocks compute more than a plain one, or less
BLOCKS = [{"init_values": 0.5}, {"qk_norm": True}, {"scale_attn_norm": True}, {"qkv_bias": False}]
BLOCKS = [b for b in BLOCKS if b.keys() <= signature(VisionTransformer).parameters.keys()]  # some releases lack one


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(model: nn.Module, trained: bool = False) -> int:
    """How many parameters a model has, or trains."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def refuses(*cases: tuple[Callable[[], object], str], error: type[Exception] = BadParameter) -> None:
    """Each call raises `error`, and the message matches the words next to it."""
    for call, words in cases:
        print(words)  # pytest shows it where a case fails
        with pytest.raises(error, match=words):
            call()


def misfits(load: Callable, *args: object, **options: object) -> tuple[list[str], list[str], list[str]]:
    """The names, missing, unknown and of another shape, that `load` lists when it refuses a checkpoint."""
    with pytest.raises(BadCheckpoint) as caught:
        load(*args, **options)
    return caught.value.missing, caught.value.unknown, caught.value.shapes


def assert_recomputed_gradients_are_equal(make: Callable[[], nn.Module], loss: Callable) -> None:
    """Checkpointing activations, as `fit` does, changes no bit of the gradients of `loss(model)`, dropout included, and
    stores at most two thirds of the activations."""
    found, stored = [], []
    for enable in (False, True):
        model = make().train()
        if enable:
            _checkpoint_activations(model)
        torch.manual_seed(0)
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}

        def store(x: torch.Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(store, lambda x: x):
            value = loss(model)
        stored.append(sum(sizes.values()))
        value.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert stored[1] < stored[0] * 2 / 3, stored


def _in_place(part: nn.Module, other: nn.Module) -> None:
    for own, given in zip(part.parameters(), other.parameters(), strict=True):
        own.copy_(given)


# to give a part of a model the weights of another one
EXCHANGES: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "loaded": lambda part, other: part.load_state_dict(other.state_dict()),
    "assigned": lambda part, other: part.load_state_dict(other.state_dict(), assign=True),
    "in place": _in_place,
}
