"""Our models against outputs recorded from the authors' code.

A case is a folder `<root>/<paper>/<case>/` with

    names.json           the official tensors, if a case has any: name -> shape; their values come from `fill`
    case.json            how our code is called, and where each recorded output is read (below)
    outputs.safetensors  outputs of the official code, and stored inputs

`case.json` has

    about     repository, commit, class and notes of the recording
    seed      of the filled weights and inputs
    fixed     tensors of the state dict that are not filled: name -> values
    inputs    name -> {"shape": [...], "fill": name (of the input by default), "apply": [...]}, {"value": ...} or
              {"stored": name in outputs.safetensors}
    double    true: ours is computed in float64. A ReLU that is at rounding distance of its kink may fall on either side
              in float32, by processor, and changes a gradient by thousandths
    recorded  numbers that are not in outputs.safetensors: name -> value
    steps     one after the other, each with a "name" for its result: a call of our code, {"call":
              "models.bat.model:hann", "args": [...], "kwargs": {...}}; {"watch": "$model.norm"}, the list of a module's
              outputs from here on; {"backward": "$loss", "of": "$model"}, gradients by official name; {"apply": [...],
              "of": "$x", "at": [...]}
    outputs   recorded name -> where our value is: "$out.tokens", or {"of": "$out.tokens", "at": [":1", [0, 5], "::4"],
              "apply": ["mean"]}; "grad:*" with {"each": "$grad"} stands for all entries of a dictionary
    code      instead of steps and outputs, the function of tests/parity/<paper>.py that computes the outputs

A reference `$name.part.0` is an input, a step's result or "state", the official state dict, and a key, index or
attribute of it. `at` has an entry an axis: a slice as text, an index or a list of indices. `apply` lists methods of a
tensor: "sigmoid" or ["mul", 2]. Calls are of the package (`companion.` is left out), of torch and of timm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from companion.backbones import read_state
from companion.errors import BadCheckpoint, BadParameter, CompanionError, CorruptFile, MissingData, check_choice
from companion.io.files import read_json
from companion.io.papers import slugs

from . import fill

ROOT = Path(__file__).parent
MOVED = {
    "companion.data.attributes:square_transform": "companion.models.promptpar.transforms:square_transform",
    "companion.data.landcover_transforms": "companion.models.metasegnet.augmentation",
    "companion.data.tracking:box_in_crop": "companion.models.bat.crops:box_in_crop",
    "companion.data.tracking:clip_box": "companion.models.bat.crops:clip_box",
    "companion.data.tracking:crop": "companion.models.bat.crops:crop",
    "companion.data.xrays:squeeze_transform": "companion.models.ecamp.transforms:squeeze_transform",
    "companion.data.xrays:test_transform": "companion.models.ecamp.transforms:test_transform",
    "companion.models.bat.loss": "companion.models.bat.model",
    "companion.models.dmt.downstream:test_transform": "companion.models.dmt.vit:test_transform",
    "companion.models.dmt.teachers": "companion.models.dmt.official",
    "companion.models.layers.coop": "companion.models.dplq.baselines",
    "companion.models.layers.dino": "companion.models.hvit.dino",
    "companion.models.hvit.model:predict": "companion.models.hvit.model:graded",
    "companion.models.hvit.recipe:quadratic_kappa": "companion.evaluation.metrics:quadratic_kappa",
    "companion.models.layers.quaternion": "companion.models.dplq.quaternion",
    "companion.models.layers.vpt:FineTuning": "companion.models.layers.classifying:FineTuning",
    "companion.models.layers.vpt:LinearProbe": "companion.models.layers.classifying:LinearProbe",
    "companion.models.sa2vp.baselines:FineTuning": "companion.models.layers.classifying:FineTuning",
    "companion.models.sa2vp.baselines:LinearProbe": "companion.models.layers.classifying:LinearProbe",
    "companion.models.layers.vpt": "companion.models.sa2vp.baselines",
    "companion.models.metasegnet.inference": "companion.models.metasegnet.maps",
    "companion.models.metasegnet.losses": "companion.models.metasegnet.model",
    "companion.models.sic_cads.model:_tower": "companion.models.sic_cads.official:tower",
    "companion.models.tip.text": "companion.models.tip.pipeline",
    # MoCo v3's heads and loss, which train a toy encoder alone
    "companion.models.dmt.teachers:contrastive_loss": "tools.encoders.pocket_teachers:contrastive_loss",
    "companion.models.dmt.teachers:mlp": "tools.encoders.pocket_teachers:mlp",
}
"""Modules and functions by the names that recorded cases have, and where they are today."""
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

    @property
    def paper(self) -> str:
        return self.folder.parent.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """case.json, in the form above."""
        return read_json(self.folder / "case.json")

    @functools.cached_property
    def names(self) -> dict[str, Any]:
        """The official tensors: name -> shape; for several networks, one dict each."""
        return read_json(self.folder / "names.json")

    @property
    def seed(self) -> int:
        return self.facts["seed"]

    @functools.cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The official state dict. BatchNorm's integer counters are zero."""
        if self.given is not None:
            return self.given
        counters = {n for n in self.names if n.endswith("num_batches_tracked")}
        filled = fill.state_dict({n: s for n, s in self.names.items() if n not in counters}, self.seed)
        state = {n: torch.tensor(0) if n in counters else torch.as_tensor(filled[n]) for n in self.names}
        return state | {name: torch.tensor(value) for name, value in self.facts.get("fixed", {}).items()}

    def input(self, name: str) -> Tensor:
        """An input by its name."""
        facts = self.facts["inputs"][name]
        if "value" in facts:
            return _applied(torch.tensor(facts["value"]), facts)
        if "stored" in facts:
            return _applied(self.stored[facts["stored"]], facts)
        return _applied(self.values(facts.get("fill", f"input:{name}"), *facts["shape"]), facts)

    def values(self, name: str, *shape: int) -> Tensor:
        """Values of `fill` by name and shape, on torch's default device."""
        return torch.from_numpy(fill.values(name, shape, self.seed)).to(torch.get_default_device())

    @functools.cached_property
    def stored(self) -> dict[str, Tensor]:
        """All tensors of the file."""
        try:
            stored = load_file(self.folder / "outputs.safetensors")
        except Exception as error:
            raise CorruptFile(self.folder / "outputs.safetensors", str(error)) from error
        return {name: value.to(torch.get_default_device()) for name, value in stored.items()}

    @functools.cached_property
    def recorded(self) -> dict[str, Tensor]:
        """The outputs of the authors' code: tensors of the file but for inputs, and numbers of case.json."""
        inputs = {facts["stored"] for facts in self.facts["inputs"].values() if "stored" in facts}
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.facts["recorded"].items()}
        return {name: value for name, value in self.stored.items() if name not in inputs} | numbers


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of a case, by our code."""
    if code := case.facts.get("code"):
        return getattr(importlib.import_module(f"tests.parity.{case.paper}"), code)(case)
    values: dict[str, Any] = {}
    double = case.facts.get("double", False)

    def precise(value: Any) -> Any:
        return value.double() if double and isinstance(value, Tensor) and value.is_floating_point() else value

    def look(reference: Any) -> Any:
        """The value of a reference; of a list or mapping, those of its entries; anything else is itself."""
        if isinstance(reference, list):
            return [look(entry) for entry in reference]
        if isinstance(reference, dict):
            return {key: look(entry) for key, entry in reference.items()}
        if not isinstance(reference, str) or not reference.startswith("$"):
            return reference
        name, _, rest = reference[1:].partition(".")
        if name not in values:
            values[name] = tree_map(precise, case.state if name == "state" else case.input(name))
        return _part(values[name], rest)

    def read(tap: str | dict[str, Any]) -> Any:
        return look(tap) if isinstance(tap, str) else _applied(look(tap["of"]), tap)

    steps = case.facts["steps"]
    with torch.set_grad_enabled(any("backward" in step for step in steps)), contextlib.ExitStack() as after:
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        for step in steps:
            if "call" in step:
                given, named = look(step.get("args", [])), look(step.get("kwargs", {}))
                # metrics, and maps that figures read, are on the CPU
                if step["call"].startswith(("evaluation.", "torch:index_select")):
                    given = [value.cpu() if isinstance(value, Tensor) else value for value in given]
                value = _called(step["call"], look)(*given, **named)
            elif "watch" in step:
                value = []
                look(step["watch"]).register_forward_hook(lambda _, __, out, seen=value: seen.append(out))
            elif "backward" in step:
                value = _gradients(look(step["backward"]), look(step["of"]))
            else:
                value = read(step)
            values[step["name"]] = value
        found = {}
        for name, tap in case.facts["outputs"].items():
            if isinstance(tap, dict) and "each" in tap:
                found |= {name.replace("*", key): _applied(value, tap) for key, value in look(tap["each"]).items()}
            else:
                found[name] = read(tap)
    return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in found.items()}


def _called(target: str, look: Any) -> Any:
    """The function, class or method that a step calls."""
    if target.startswith("$"):
        return look(target)
    path = target if target.startswith(("torch", "timm")) else f"companion.{target}"
    module, _, name = MOVED.get(path, path).partition(":")
    module = MOVED.get(module, module)
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _part(value: Any, path: str) -> Any:
    """A part of a value by keys, indices and attributes between dots; a key may have dots itself."""
    if not path:
        return value
    if isinstance(value, Mapping):
        key = next((key for key in sorted(map(str, value), reverse=True) if f"{path}.".startswith(f"{key}.")), "")
        if not key:
            raise BadParameter("case.json", path, list(value))
        return _part(value[key if key in value else int(key)], path[len(key) + 1 :])
    name, _, rest = path.partition(".")
    indexed = isinstance(value, list | tuple | Tensor | nn.Sequential | nn.ModuleList) and name.lstrip("-").isdigit()
    return _part(value[int(name)] if indexed else getattr(value, name), rest)


def _applied(value: Any, facts: Mapping[str, Any]) -> Any:
    """The part `at` of a tensor, after the methods `apply`."""
    for i, index in enumerate(facts.get("at", [])):  # one axis after the other: two lists are not paired
        if isinstance(index, str):
            index = slice(*(int(number) if number else None for number in index.split(":")))
        value = value[(slice(None),) * (i - _axes_lost(facts["at"][:i])) + (index,)]
    for method in facts.get("apply", []):
        name, *arguments = [method] if isinstance(method, str) else method
        value = getattr(value, name)(*arguments)
    return value


def _axes_lost(indices: list) -> int:
    """How many axes plain numbers have removed."""
    return sum(isinstance(index, int) for index in indices)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradients of `loss` by the authors' names of the trained tensors, or by ours where a part has none."""
    loss.backward()
    official = model.official_names() if hasattr(model, "official_names") else {}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {str(official.get(name, name)): gradient for name, gradient in found.items()}


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output: the largest difference relative to the largest recorded magnitude, and whether it is small enough."""

    output: str
    error: float
    agrees: bool


def papers() -> list[str]:
    """The slugs that can be checked."""
    return sorted({path.parent.parent.name for path in ROOT.glob("*/*/outputs.safetensors")})


def cases(paper: str, fixtures: str | Path | None = None) -> Iterator[Case]:
    """The cases of a paper in `fixtures` (default: those of the checkout), and those in `PARITY_EXTRA`.

    Raises:
        BadParameter: no such paper.
        MissingData: no case was found.
    """
    check_choice("paper", paper, slugs())
    roots = [Path(fixtures) if fixtures else ROOT]
    if extra := os.environ.get("PARITY_EXTRA"):
        roots.append(Path(extra))
    found = [case for root in roots for case in sorted((root / paper).glob("*/outputs.safetensors"))]
    if not found:
        layout = f"{paper}/<case>/names.json\n{paper}/<case>/case.json\n{paper}/<case>/outputs.safetensors"
        source = "the project's repository, folder tests/parity"
        raise MissingData("parity cases", roots[0], layout, source, "recorded outputs of the authors' code")
    yield from (Case(path.parent) for path in found)


def checkpoint(paper: str, path: str | Path) -> Mapping[str, Tensor]:
    """The official tensors in a checkpoint file of `paper`. Raises `CorruptFile` if it cannot be read."""
    module = importlib.import_module(f"tests.parity.{paper}") if (ROOT / f"{paper}.py").exists() else None
    return getattr(module, "read", read_state)(path)


def compare(case: Case, device: str = "cpu") -> list[Difference]:
    """Every recorded output of `case` against ours, computed on `device`, in the order of case.json."""
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = {name: value.cpu() for name, value in outputs(case).items()}
        all_recorded = case.recorded
    if unchecked := all_recorded.keys() - ours.keys():
        raise CompanionError(f"{case.paper}/{case.name} has outputs that are not computed: {sorted(unchecked)}")
    differences = []
    for name, value in ours.items():
        if name not in all_recorded:
            continue
        recorded, value = all_recorded[name].to("cpu", torch.float64), value.detach().to(torch.float64)
        if value.numel() != recorded.numel():
            shapes = [f"{name} {tuple(value.shape)}, recorded {tuple(recorded.shape)}"]
            raise BadCheckpoint(f"{case.paper}/{case.name}", shapes=shapes)
        error = float((value.reshape(recorded.shape) - recorded).abs().max() / recorded.abs().max().clamp_min(1e-12))
        limit = TOLERANCE_GRADIENT if name.startswith("grad") else TOLERANCE
        differences.append(Difference(name, error, error <= limit))
    return differences
