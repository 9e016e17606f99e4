"""State dicts under the authors' names: one loader for all papers, with a complete list of mismatches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BadCheckpoint
from ...saving import Pretrained

Names = Mapping[str, "str | list"]
"""Our tensor names to the official ones; to a (nested) list of them where ours holds several."""


def _part_shape(ours: Tensor, names: np.ndarray) -> tuple[int, ...]:
    """The shape of one official tensor of ours: ours is a stack of them, or they are concatenated along the first axis.

    A stack has the shape of the list of names in front.
    """
    if ours.shape[: names.ndim] == names.shape:
        return tuple(ours.shape[names.ndim :])
    return (ours.shape[0] // names.size, *ours.shape[1:])


def load_official(
    model: nn.Module,
    state: Mapping[str, Tensor],
    names: Names | None,
    what: str,
    ignored: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Copy a state dict into a model, strictly.

    Args:
        names: our tensor names to the official ones; None: they are the same.
        what: the model, for the error.
        ignored: official names that start with one of these are optional and not read.
        optional: official names that end with one of these may be missing: ours are unchanged.

    Raises `BadCheckpoint`: with every name that is missing, unknown or of another shape; nothing is loaded then.
    """
    ours = model.state_dict()
    named = names or dict(zip(ours, ours, strict=True))
    groups = {name: group for name, official in named.items() if (group := np.array(official)).size}
    wanted = {str(n) for group in groups.values() for n in group.ravel()}
    missing = {n for n in wanted - state.keys() if not n.endswith(optional)}
    unknown = {n for n in state.keys() - wanted if not n.startswith(ignored)}
    shapes, loaded = [], {}
    for name, group in groups.items():
        expected = _part_shape(ours[name], group)
        parts = {str(n): state[n] for n in group.ravel() if n in state}
        wrong = [f"{n} {tuple(t.shape)}, expected {expected}" for n, t in parts.items() if t.shape != expected]
        shapes += wrong
        if len(parts) == group.size and not wrong:
            loaded[name] = torch.stack([*parts.values()]).reshape(ours[name].shape)
    if missing or unknown or shapes:
        raise BadCheckpoint(what, missing, unknown, shapes)
    model.load_state_dict(loaded, strict=False)


def check_names(state: Mapping[str, Tensor], needed: Iterable[str], what: str) -> None:
    """Raise `BadCheckpoint` unless a state dict has the names from which the sizes of `what` are read."""
    if missing := set(needed) - state.keys():
        raise BadCheckpoint(what, missing)


def below(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a state dict whose names start with one of the prefixes, without it."""
    return {name.removeprefix(p): value for name, value in state.items() for p in prefixes if name.startswith(p)}


def official_state(ours: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Copies of our tensors by official name: the inverse of `load_official`."""
    state: dict[str, Tensor] = {}
    for name, official in names.items():
        group = np.array(official)
        if group.size:
            parts = ours[name].reshape(group.size, *_part_shape(ours[name], group))
            state |= {str(n): part.clone() for n, part in zip(group.ravel(), parts, strict=True)}
    return state


class OfficialModel(Pretrained, nn.Module):
    """A model whose tensors have names in the authors' code: ours after `rules`, see `renamed`, or `official_names`."""

    rules: Sequence[tuple[str, str | Callable]] = ()

    def official_names(self) -> Names:
        """Our tensor names to the authors'."""
        return renamed(self.state_dict(), self.rules)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names; the inverse of `from_official`."""
        return official_state(self.state_dict(), self.official_names())

    def loaded(self, state: Mapping[str, Tensor], what: str, ignored: tuple[str, ...] = ()) -> Self:
        """This model, in eval mode, with the tensors of a state dict under the authors' names; see `load_official`.

        The counters of batch norms, which nothing reads, may be missing.
        """
        load_official(self, state, self.official_names(), what, ignored, optional=("num_batches_tracked",))
        return self.eval()

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def renamed(names: Iterable[str], rules: Sequence[tuple[str, str | Callable]]) -> dict[str, str]:
    """Names mapped to new ones by replacing the patterns of `rules` in order."""
    return {name: reduce(lambda new, rule: re.sub(rule[0], rule[1], new), rules, name) for name in names}


def depth(names: Iterable[str], prefix: str) -> int:
    """The number of distinct entries after `prefix` in the names of a state dict: of blocks for "blocks."."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
