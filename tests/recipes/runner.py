"""Our recipes against cases recorded from the authors' training and evaluation code.

A case is a folder `<root>/<paper>/<case>/` with

    case.json           kind, source (repository, commit, lines), how ("ran" | "read"), settings, expected, tolerance
    data.safetensors    inputs `in.*` and recorded outputs `out.*`; absent if case.json holds everything

The cases of the checkout are in `tests/recipes`. For each paper, `tests/recipes/<slug>_cases.py` has `KINDS`: it maps
the beginning of a case's name to a function that calls the functions of the `paper` profile and returns a `Row` for
each recorded quantity.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from companion.errors import CompanionError, CorruptFile, MissingData, check_choice
from companion.io.files import read_json
from companion.io.papers import slugs


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All of case.json."""
        return read_json(self.folder / "case.json")

    @property
    def settings(self) -> Any:
        return self.facts["settings"]

    @property
    def expected(self) -> Any:
        return self.facts["expected"]

    @functools.cached_property
    def data(self) -> dict[str, Tensor]:
        """The tensors `in.*` and `out.*`; empty if there is no file."""
        path = self.folder / "data.safetensors"
        if not path.exists():
            return {}
        try:
            return load_file(path)
        except Exception as error:
            raise CorruptFile(path, str(error)) from error


@dataclasses.dataclass(frozen=True)
class Row:
    """One recorded quantity and ours.

    Attributes:
        what: a key of `expected` or a tensor `out.*`, optionally followed by " " and a detail.
        departs: the reason for an intended difference; then the values must differ.
    """

    what: str
    expected: str
    ours: str
    agrees: bool
    departs: str = ""

    @property
    def passes(self) -> bool:
        """Whether ours agrees, or differs on purpose."""
        return self.agrees != bool(self.departs)


def same(what: str, expected: Any, ours: Any, departs: str = "") -> Row:
    """A row of values that must be equal; arrays and tuples count as lists, the keys of a mapping as text."""
    expected, ours = _plain(expected), _plain(ours)
    return Row(what, _short(expected), _short(ours), expected == ours, departs)


def near(
    what: str, expected: Any, ours: Any, *, relative: float = 0.0, absolute: float = 0.0, departs: str = ""
) -> Row:
    """A row of numbers of one shape: |ours - expected| <= absolute + relative |expected|, elementwise; nan equals
    nan."""
    theirs, own = (np.asarray(_plain(x), np.float64) for x in (expected, ours))
    if theirs.shape != own.shape:
        return Row(what, f"shape {theirs.shape}", f"shape {own.shape}", False, departs)
    agrees = bool(np.allclose(own, theirs, rtol=relative, atol=absolute, equal_nan=True))
    if theirs.size == 1:
        return Row(what, f"{theirs.item():.7g}", f"{own.item():.7g}", agrees, departs)
    gap = np.nanmax(np.abs(own - theirs), initial=0.0)
    return Row(what, f"{theirs.size} numbers", f"largest difference {gap:.1e}", agrees, departs)


def equal(expected: Mapping[str, Any], ours: Mapping[str, Any], start: str = "") -> list[Row]:
    """A row for each of ours, which must be equal to the recorded one of its name; `start` is put before the name."""
    return [same(start + name, expected[name], value) for name, value in ours.items()]


def close(expected: Mapping[str, Any], ours: Mapping[str, Any], start: str = "", **room: float) -> list[Row]:
    """A row for each of ours, which must be `near` the recorded one of its name; `start` is put before the name."""
    return [near(start + name, expected[name], value, **room) for name, value in ours.items()]


def lines(what: str, expected: Mapping[str, Any], ours: Sequence[str], departs: str = "") -> Row:
    """A row of text lines that are recorded by their `count` and `sha256_of_lines`, joined by newlines."""
    digest = hashlib.sha256("\n".join(ours).encode()).hexdigest()
    agrees = (len(ours), digest) == (expected["count"], expected["sha256_of_lines"])
    # where the hashes differ, the recorded first and last lines show the difference
    for name, place in (("first", 0), ("last", -len(expected.get("last", [])))):
        for i, line in enumerate(expected.get(name, [])):
            if not agrees and (place + i >= len(ours) or ours[place + i] != line):
                shown = ours[place + i] if place + i < len(ours) else "nothing"
                return Row(what, _short(line), _short(shown), agrees, departs)
    return Row(what, f"{expected['count']} lines", f"{len(ours)} lines" + ", the same" * agrees, agrees, departs)


def parameters(what: str, expected: Mapping[str, Mapping], ours: Mapping[str, Tensor], relative: float) -> list[Row]:
    """A row for each recorded parameter: its shape, sum and sum of squares.

    The sum of squares may differ by `relative`, the sum by that fraction of sqrt(count * sum of squares).

    Args:
        ours: by the authors' names.
    """
    rows = []
    for name, facts in expected.items():
        value = ours[name].detach().to("cpu", torch.float64)
        shape = facts.get("shape", list(value.shape))
        total, squares = float(value.sum()), float((value**2).sum())
        room = relative * (value.numel() * facts["sum_of_squares"]) ** 0.5
        agrees = (
            list(value.shape) == list(shape)
            and abs(total - facts["sum"]) <= room
            and abs(squares - facts["sum_of_squares"]) <= relative * abs(facts["sum_of_squares"])
        )
        theirs = f"sum {facts['sum']:.6g}, of squares {facts['sum_of_squares']:.6g}"
        rows.append(Row(f"{what} {name}", theirs, f"sum {total:.6g}, of squares {squares:.6g}", agrees))
    return rows


class InOrder(Dataset):
    """Items in the recorded order, for any index that `fit` passes; with `Hardware.workers` = 0.

    Args:
        items: over all epochs, one image each.
        length: images per epoch.
    """

    def __init__(self, items: Iterable[tuple], length: int):
        self.items, self.length = iter(items), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, _: int) -> tuple:
        return next(self.items)


def folder() -> Path:
    """The folder of the cases."""
    return Path(__file__).parent


def papers() -> list[str]:
    """The slugs that have recipe cases."""
    return sorted(path.stem.removesuffix("_cases") for path in folder().glob("*_cases.py"))


def cases(paper: str, root: str | Path | None = None) -> Iterator[Case]:
    """The cases of a paper in `root` (default: those of the checkout), and those in `RECIPES_EXTRA`.

    Raises:
        BadParameter: no such paper.
        MissingData: no case was found.
    """
    check_choice("paper", paper, slugs())
    roots = [Path(root) if root else folder()]
    if extra := os.environ.get("RECIPES_EXTRA"):
        roots.append(Path(extra))
    found = [path.parent for one in roots for path in sorted((one / paper).glob("*/case.json"))]
    if not found:
        layout = f"{paper}/<case>/case.json\n{paper}/<case>/data.safetensors"
        source = "the project's repository, folder tests/recipes"
        raise MissingData("recipe cases", roots[0], layout, source, "recorded from the authors' code")
    yield from map(Case, found)


def check(paper: str, case: Case) -> list[Row]:
    """A row for each recorded quantity of a case.

    Raises:
        BadParameter: `KINDS` has no function for a case of this name.
        CompanionError: a recorded quantity has no row.
    """
    kinds = importlib.import_module(f"tests.recipes.{paper}_cases").KINDS
    start = next((start for start in kinds if case.name.startswith(start)), None)
    check_choice("case", case.name if start is None else start, list(kinds))
    rows = kinds[str(start)](case)
    recorded = [*case.expected, *(name for name in case.data if name.startswith("out."))]
    unchecked = [name for name in recorded if not any(f"{row.what} ".startswith(f"{name} ") for row in rows)]
    if unchecked:
        raise CompanionError(f"recipe of {paper}: {case.name} has quantities that are not computed: {unchecked}")
    return rows


def _plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, also within lists and mappings."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any, width: int = 60) -> str:
    """A value as text that fits in a table."""
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"
