"""Converts recorded cases of version 2, which describe inputs and outputs in sentences, to the form that tests run.

    python -m tools.cases tests/parity            # every case below a folder, in place
    PARITY_EXTRA=<folder> pytest tests/parity     # cases of version 2 are converted when they are read

For each paper a module has `parity(old)` and, where a recipe case needs it, `recipe(facts, folder)`: they read what a
case of any sizes, data sets, seeds and splits says, and write it as data. `tests/parity/runner.py` has the form of a
parity case; a recipe case keeps its own, with numbers in place of sentences.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

FORM = 2


@dataclasses.dataclass(frozen=True)
class Old:
    """A parity case of version 2."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All of case.json."""
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @property
    def config(self) -> dict[str, Any]:
        return self.facts.get("config", {})

    @functools.cached_property
    def names(self) -> dict[str, Any]:
        """The shapes of the official tensors by name; {} where a case has none."""
        path = self.folder / "names.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @functools.cached_property
    def shapes(self) -> dict[str, list[int]]:
        """The shapes of the recorded tensors by name."""
        with safe_open(self.folder / "outputs.safetensors", "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no mapping

    @property
    def seed(self) -> int:
        """The seed of weights and inputs, under any of its names."""
        found = {self.facts[name] for name in ("seed", "weights_seed", "inputs_seed") if name in self.facts}
        if len(found) > 1:
            raise ValueError(f"{self.folder / 'case.json'}: one seed, not {sorted(found)}")
        return found.pop() if found else 0

    def shape(self, key: str) -> list[int]:
        """The shape of an input: a list, under "shape", or "(2, 3)" in a sentence."""
        said = self.facts["inputs"][key]
        said = said.get("shape", said.get("made")) if isinstance(said, dict) else said
        return numbers(said) if isinstance(said, str) else said

    def input(self, key: str, *apply: str | list, fill: str = "") -> dict[str, Any]:
        """An input of the new form, filled by its key unless `fill` names it, after the methods `apply`."""
        found: dict[str, Any] = {"shape": self.shape(key)}
        if fill:
            found["fill"] = fill
        if apply:
            found["apply"] = list(apply)
        return found

    @property
    def norms(self) -> dict[str, float]:
        """The numbers that case.json records: a loss and the norms of gradients."""
        losses = [value for name, value in self.facts.items() if name.startswith("loss") and isinstance(value, float)]
        found = {"loss": losses[0]} if losses else {}
        return found | {f"grad:{name}": norm for name, norm in self.facts.get("grad_l2", {}).items()}


def numbers(text: str) -> list[int]:
    """The whole numbers in the first brackets of a sentence that hold nothing else: "rows [0, 13]" or "(2, 3)"."""
    return [int(n) for n in re.findall(r"[(\[]((?:\s*\d+\s*,?)+)[)\]]", text)[0].strip(" ,").split(",")]


def call(name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A step that calls a function of the library, a class or a method."""
    return {"name": name, "call": target, "args": list(args), "kwargs": kwargs}


def tap(of: str, *at: Any, apply: tuple[str | list, ...] = ()) -> Any:
    """Where an output is read: a reference, its part and the methods applied to it."""
    return {"of": of} | ({"at": list(at)} if at else {}) | ({"apply": list(apply)} if apply else {})


def parity(paper: str, folder: Path) -> dict[str, Any]:
    """case.json of a parity case, in the form of `tests/parity/runner.py`."""
    old = Old(folder)
    made = importlib.import_module(f"tools.cases.{paper}").parity(old)
    translated = ("seed", "weights_seed", "inputs_seed", "inputs", "grad_l2", "trainable")
    about = {key: value for key, value in old.facts.items() if key not in translated}
    return {"form": FORM, "seed": old.seed, "inputs": {}, "recorded": old.norms} | made | {"about": about}


def recipe(paper: str, folder: Path) -> dict[str, Any]:
    """case.json of a recipe case, with numbers in place of sentences."""
    facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    try:
        convert = importlib.import_module(f"tools.cases.{paper}").recipe
    except (ModuleNotFoundError, AttributeError):
        return facts | {"form": FORM}
    return convert(facts, folder) | {"form": FORM}
