"""Our models against outputs recorded from the authors' code.

A fixture is a folder `<fixtures>/<paper>/<case>/` with

    names.json           the official tensors, if a case has any: name -> shape; their values come from `fill`
    case.json            configuration, inputs (key -> shape, values from `fill`), what was recorded
    outputs.safetensors  outputs of the official code

For each paper the module `models.<slug>.parity` has one function `outputs(case) -> {name: tensor}` that
loads the official names through the model's own `from_official` and returns the recorded quantities in the order of the
forward pass; "loss" and "grad:<official name>" (a gradient, or its norm) may be among them. If the recorded quantities
are not simply the file's, the module also has a function `recorded(case)`; and `read(path)` if the authors' checkpoints
are not one state dict.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from companion.errors import BadCheckpoint, BadParameter, CompanionError, CorruptFile, MissingData, check_choice
from companion.ops.files import read_json
from companion.ops.papers import MODELS
from . import fill

TOLERANCE = 1e-4  # of the largest magnitude of an output
TOLERANCE_GRADIENT = 1e-3  # of a gradient's norm


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case. `given`, if set, replaces the filled weights: a checkpoint to check."""

    folder: Path
    given: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def facts(self) -> dict:
        return read_json(self.folder / "case.json")

    @functools.cached_property
    def names(self) -> dict[str, Any]:
        """The official tensors: name -> shape; for several networks, one dict each."""
        return read_json(self.folder / "names.json")

    @property
    def seed(self) -> int:
        """The seed of weights and inputs, under any of its names in the cases.

        Raises `CorruptFile` when they differ.
        """
        found = {self.facts[name] for name in ("seed", "weights_seed", "inputs_seed") if name in self.facts}
        if len(found) > 1:
            raise CorruptFile(self.folder / "case.json", f"one seed, not {sorted(found)}")
        return found.pop() if found else 0

    @functools.cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The official state dict. BatchNorm's integer counters are zero."""
        if self.given is not None:
            return self.given
        counters = {n for n in self.names if n.endswith("num_batches_tracked")}
        filled = fill.state_dict({n: s for n, s in self.names.items() if n not in counters}, self.seed)
        return {n: torch.tensor(0) if n in counters else torch.as_tensor(filled[n]) for n in self.names}

    def input(self, key: str) -> Tensor:
        """An input by its key in case.json, which has its shape: a list, under "shape", or "(2, 3)" in a sentence."""
        shape = self.facts["inputs"][key]
        if isinstance(shape, str):
            shape = [int(n) for n in re.findall(r"\(((?:\d+,?)+)\)", shape.replace(" ", ""))[0].rstrip(",").split(",")]
        return self.values(f"input:{key}", *(shape["shape"] if isinstance(shape, dict) else shape))

    def values(self, name: str, *shape: int) -> Tensor:
        """Values of `fill` by name and shape, on torch's default device."""
        return torch.from_numpy(fill.values(name, shape, self.seed)).to(torch.get_default_device())

    @functools.cached_property
    def recorded(self) -> dict[str, Tensor]:
        """The outputs of the authors' code and stored inputs; losses and gradient norms if case.json has them."""
        try:
            stored = load_file(self.folder / "outputs.safetensors")
            recorded = {name: value.to(torch.get_default_device()) for name, value in stored.items()}
        except Exception as error:
            raise CorruptFile(self.folder / "outputs.safetensors", str(error)) from error
        losses = [v for k, v in self.facts.items() if k.startswith("loss") and isinstance(v, float)]
        if losses:
            recorded["loss"] = torch.tensor(losses[0])
        for name, norm in self.facts.get("grad_l2", {}).items():
            recorded[f"grad:{name}"] = torch.tensor(norm)
        return recorded


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output: the largest difference relative to the largest recorded magnitude, and whether it is small enough."""

    output: str
    error: float
    agrees: bool


def folder() -> Path:
    """The folder of the fixtures: `tests/parity` of the checkout that this package is installed from."""
    return Path(__file__).parent


def papers() -> list[str]:
    """The slugs that can be checked."""
    return sorted(p.parent.name for p in MODELS.glob("*/parity.py"))


def cases(paper: str, fixtures: str | Path | None = None) -> Iterator[Case]:
    """The fixtures of a paper in `fixtures` (default: those of the checkout), and those in `PARITY_EXTRA`.

    Raises:
        BadParameter: no such paper.
        MissingData: no fixture was found.
    """
    check_choice("paper", paper, papers())
    roots = [Path(fixtures) if fixtures else folder()]
    if extra := os.environ.get("PARITY_EXTRA"):
        roots.append(Path(extra))
    found = [case for root in roots for case in sorted((root / paper).glob("*/outputs.safetensors"))]
    if not found:
        layout = f"{paper}/<case>/names.json\n{paper}/<case>/case.json\n{paper}/<case>/outputs.safetensors"
        raise MissingData(
            "parity fixtures",
            roots[0],
            layout,
            "the project's repository, folder tests/parity",
            "recorded outputs of the authors' code",
        )
    yield from (Case(path.parent) for path in found)


def checkpoint(paper: str, path: str | Path) -> Mapping[str, Tensor]:
    """The official tensors in a checkpoint file of `paper`. Raises `CorruptFile` if it cannot be read."""
    from companion.backbones import read_state  # imported here: no other command needs it

    module = importlib.import_module(f"tests.parity.{paper}")
    return module.read(path) if hasattr(module, "read") else read_state(path)


def run(
    kinds: Mapping[str, Callable[[Case], dict[str, Tensor]]], case: Case, kind: str | None = None
) -> dict[str, Tensor]:
    """The quantities of `case` by the function of `kinds` whose key begins `kind`, by default the case's name.

    Raises `BadParameter` when there is none.
    """
    kind = case.name if kind is None else kind
    for start, outputs in kinds.items():
        if kind.startswith(start):
            return outputs(case)
    raise BadParameter("case", kind, list(kinds))


def compare(paper: str, case: Case, device: str = "cpu") -> list[Difference]:
    """Every recorded output of `case` against ours, computed on `device`, in the order of the forward pass."""
    module = importlib.import_module(f"tests.parity.{paper}")
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = {name: value.cpu() for name, value in module.outputs(case).items()}
    all_recorded = module.recorded(case) if hasattr(module, "recorded") else case.recorded
    unchecked = all_recorded.keys() - ours.keys()
    if unchecked:
        raise CompanionError(f"parity of {paper}: {case.name} has outputs that are not computed: {sorted(unchecked)}")
    differences = []
    for name, value in ours.items():
        if name not in all_recorded:
            continue
        recorded, value = all_recorded[name].to("cpu", torch.float64), value.detach().to(torch.float64)
        if value.numel() != recorded.numel():
            raise BadCheckpoint(
                f"{paper}/{case.name}", shapes=[f"{name} {tuple(value.shape)}, recorded {tuple(recorded.shape)}"]
            )
        error = float((value.reshape(recorded.shape) - recorded).abs().max() / recorded.abs().max().clamp_min(1e-12))
        limit = TOLERANCE_GRADIENT if name.startswith("grad") else TOLERANCE
        differences.append(Difference(name, error, error <= limit))
    return differences
