"""What is tried at the edge of an argument, by its kind, and what may come of it: a right result, or an error of ours
that names the argument."""

import inspect
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.errors import CompanionError

WIDTHS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
WIDTHS += (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Edge:
    """A function, arguments that it accepts, and by argument the kinds of edges that it accepts too."""

    call: Callable
    given: Mapping[str, Any]
    accepts: Mapping[str, str] = field(default_factory=dict)
    of: Callable | None = None  # the function whose arguments all must be here; None: `call`
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by argument its edges, if not `edges`
    draws: bool = False  # random numbers
    parts: frozenset[str] = frozenset()  # arguments that are models, which other tests exchange

    def unknown(self) -> set[str]:
        """Arguments of the function that nobody has tried."""
        found = inspect.signature(self.of or self.call).parameters.values()
        return {p.name for p in found if p.default is p.empty or self.of} - self.given.keys() - self.parts

    def tried(self) -> Iterator[tuple[str, str, Any]]:
        """Argument, kind of edge and value."""
        for name, value in self.given.items():
            for kind, other in self.others[name].items() if name in self.others else edges(value):
                yield name, kind, other


def edges(value: Any) -> Iterator[tuple[str, Any]]:
    """The edges of a flag, a number, a name, a path, None, a list or mapping, or of an array or tensor of numbers."""
    if isinstance(value, bool):
        yield from {repr(x): x for x in ("x", "", 2, None)}.items()
        return
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        yield from {"twice": [*value, value[0]], "spaced": [*value, f" {value[0]} "], "blank": [*value, ""]}.items()
        yield from {"text": value[0], "set": {*value}, "number": 3, "nothing": None, "row less": value[:-1]}.items()
        return
    if isinstance(value, list | tuple | dict):
        kind, entries = type(value), list(value.items() if isinstance(value, dict) else value)
        yield from {"empty": kind(), "nothing": None, "text": "x", "number": 3}.items()
        yield from {"more": kind([*entries, *entries[-1:]]), "less": kind(entries[:-1])}.items()
        for x in (0, -1, 2.5, math.nan, "", None):
            yield f"first {x!r}", kind([(x, entries[0][1]) if kind is dict else x, *entries[1:]])
            if kind is dict:
                yield f"of first {x!r}", {**value, entries[0][0]: x}
        return
    if isinstance(value, int | float):
        yield from {repr(x): x for x in (0, -1, 1, 2.5, math.nan, math.inf, "x", None)}.items()
        return
    if isinstance(value, str):
        yield from {repr(x): x for x in ("", f" {value}", value.upper(), 1, None, [])}.items()
        return
    if value is None or isinstance(value, Path):
        yield from {repr(x): x for x in (0, "", [], {}, Path("/dev/null"))}.items()
        return
    array, tensor = isinstance(value, np.ndarray), torch.as_tensor(value)

    def back(changed: Tensor) -> Any:
        return changed.numpy() if array else changed

    for number in (math.nan, math.inf, -math.inf, -1, 0.5, 255, 1e9):
        changed = tensor.double().clone()
        changed.view(-1)[0] = number
        yield f"{number:g}", back(changed)
    yield "row more", back(torch.cat([tensor, tensor[-1:]]))
    yield "row less", back(tensor[:-1])
    yield "empty", back(tensor[:0])
    yield "axis less", back(tensor[0])
    yield "axis more", back(tensor[None])
    if tensor.ndim > 1:
        yield "column more", back(torch.cat([tensor, tensor[..., -1:]], -1))
        yield "column less", back(tensor[..., :-1])
        yield "turned", back(tensor.transpose(0, -1).contiguous())
    yield "nothing", None
    yield "text", "x"


def same(value: Any) -> Iterator[Any]:
    """The same numbers, otherwise written: as other types of tensors, arrays and lists."""
    tensor = torch.as_tensor(value)
    for dtype in WIDTHS:
        changed = tensor.to(dtype)
        if changed.to(tensor.dtype).equal(tensor):
            yield changed if isinstance(value, Tensor) else changed.double().numpy()
    yield tensor.numpy()
    yield tensor
    yield tensor.tolist()


def state(draws: bool = False) -> dict[str, Any]:
    """What a call must leave as it is, in this process; of the random numbers those that it may not draw."""
    found: dict[str, Any] = {"grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled()}
    found |= {"autocast": torch.is_autocast_enabled("cpu"), "dtype": torch.get_default_dtype()}
    found |= {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.benchmark}
    found |= {"deterministic": torch.are_deterministic_algorithms_enabled(), "environment": dict(os.environ)}
    found |= {"filters": len(warnings.filters), "NumPy errors": np.geterr(), "logging": logging.root.handlers.copy()}
    found |= {name: logging.getLogger(name).level for name in ("", "lightning_fabric", "torch", "PIL")}
    if not draws:
        found |= {"torch": torch.get_rng_state().tolist(), "Python": random.getstate()}
        found["NumPy"] = [*np.random.get_state()[1]]  # noqa: NPY002
    return found


def check(edge: Edge, *, numbers: Callable[[Any], Tensor]) -> int:
    """Try all edges; how many were tried.

    Args:
        numbers: of a result, which are not to be NaN unless the plain arguments give NaN there.
    """
    assert not edge.unknown(), f"no edge of {edge.unknown()} was tried"
    plain, count, before = numbers(edge.call(**edge.given)), 0, state(edge.draws)
    for name, kind, value in edge.tried():
        count += 1
        accepted = kind in edge.accepts.get(name, "").split(", ")
        try:
            found = edge.call(**{**edge.given, name: value})
        except CompanionError as error:
            assert not accepted, f"{name}: {kind} is refused: {error}"
            found = None
        except Exception as error:
            raise AssertionError(f"{name}: {kind} ends with {error!r}") from error
        after = state(edge.draws)
        assert after == before, f"{name}: {kind} changes {[key for key in after if after[key] != before.get(key)]}"
        if found is not None:
            assert accepted, f"{name}: {kind} gives {found}"
            assert not numbers(found).isnan().any(), f"{name}: {kind} gives {found}"
    for name, value in edge.given.items():
        if name in edge.others:
            continue
        for other in same(value) if isinstance(value, np.ndarray | Tensor) else ():
            count += 1
            found = numbers(edge.call(**{**edge.given, name: other}))
            assert found.allclose(plain, rtol=1e-5, atol=1e-6), (
                f"{name} as {getattr(other, 'dtype', list)} of {type(other)} gives {found}"
            )
    return count
