"""Dry runs of the `paper` profile on miniatures of the data sets, in their layouts, with the small models of
`tests.papers`.

`tests/papers/<slug>.py` has the runs of a paper: `write` makes the miniature of a data set, `RUNS` are the
parameters of all runs, of which the first is that of the notebook's tests, and `FAULTS` what may be wrong with a copy.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from torch import nn
from torch.utils.data import DataLoader

from companion import backbones
from companion.errors import CompanionError
from companion.io.papers import paper
from companion.runs import needs
from companion.runs.pack import of_run
from tests.conftest import parameters
from tests.papers.common import Fault, hooks, shrink

opened = Counter[str]()
LISTS = (".json", ".csv", ".txt", ".mat")
AGAIN = r"_32x32\.mat$"  # images in one file


def count(event: str, args: tuple) -> None:
    if event == "open" and str(args[0]).endswith(LISTS):
        opened[str(args[0])] += 1


sys.addaudithook(count)


def prepare(slug: str, run: Mapping[str, object], root: Path, patch: pytest.MonkeyPatch) -> tuple[ModuleType, dict]:
    """The recipe with small models, and the parameters of a dry run; the data are written below `root`."""
    recipe = shrink(slug, patch)
    root.mkdir(parents=True, exist_ok=True)
    hooks(slug).write(run["dataset"], root, patch)
    return recipe, dict(run) | {"profile": "paper", "dry_run": True, "data_root": str(root)}


def rehearse(slug: str, run: Mapping[str, object], folder: Path, patch: pytest.MonkeyPatch) -> pd.DataFrame:
    """The measured rows of a dry run on the CPU, in a folder of its own.

    Each list is read once, each backbone built once. What a loader reads can be pickled, for processes that are
    spawned, as on macOS.
    """
    recipe, changes = prepare(slug, run, folder / "data", patch)

    class Sent(DataLoader):
        def __init__(self, data, *args, **options):  # type: ignore[no-untyped-def]
            pickle.dumps((data, options.get("collate_fn")))
            super().__init__(data, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("companion.") and hasattr(module, "DataLoader"):
            patch.setattr(module, "DataLoader", Sent)
    build, built = backbones.build, Counter[str]()

    def counted(name: str, *args: object, **options: object) -> nn.Module:
        built[name] += 1
        return build(name, *args, **options)

    patch.setattr(backbones, "build", counted)
    opened.clear()
    recipe.run(given := parameters(slug, accelerator="cpu", **changes), folder / "out")
    read = {name: count for name, count in opened.items() if name.startswith(f"{folder}/data/")}
    assert not {name for name, count in read.items() if count > 1 and not re.search(AGAIN, name)}, read
    assert not built or max(built.values()) == 1, built
    rows = recipe.RESULTS.measured(folder / "out" / "measured.csv")
    assert all(of_run(row, vars(given)) for row in rows.to_dict("records")), "they are found by the parameters"
    return rows


def refused(slug: str, fault: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """What opens a dry run on the damaged miniature, and computes nothing, ends with an error that names the file."""
    recipe, changes = prepare(slug, fault.run, folder / "data", patch)
    path = fault.damage(folder / "data")
    with pytest.raises(CompanionError, match=fault.words) as error:
        recipe.prepare(parameters(slug, accelerator="cpu", **changes), folder / "out")
    assert path.name in str(error.value), error.value


def unknown(slug: str) -> set[str]:
    """Data sets of the paper's runs that no rehearsal reads."""
    wanted = {name for run in paper(slug)["runs"] for name in needs.sets(run["data"])}
    return wanted - {SimpleNamespace(**run).dataset for run in hooks(slug).RUNS}
