"""The outputs recorded from the authors' code, compared with ours by the program of the checkout, `tests/parity`.

The cases and what compares them are no part of the package: a wheel has neither. `companion parity` and the notebooks
start that program in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..errors import CompanionError, MissingData, check_choice
from ..io import record
from ..io.papers import slugs


def program(words: Sequence[str]) -> list[str]:
    """The command line of `tests/parity` with these arguments, to be run in the checkout's folder, `record.root()`.

    Raises `MissingData`: there is no checkout.
    """
    where = record.root()
    if not (where / "tests" / "parity" / "__main__.py").exists():
        source = "the project's repository: clone it, and work in its folder"
        raise MissingData(
            "recorded cases", where, "tests/parity/<paper>/<case>/", source, "see the files", "a wheel has none"
        )
    return [sys.executable, "-m", "tests.parity", *words]


def agreement(slug: str, but: Sequence[str] = ()) -> pd.DataFrame:
    """How many recorded outputs of each case of a paper ours equal: the columns "case", "outputs" and "agree".

    Without a checkout there are no cases: it says so, and the table is empty.

    Args:
        but: the cases to leave out, such as those of full-size models.
    """
    check_choice("paper", slug, slugs())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.csv"
        try:
            command = program([slug, "--csv", str(file), *(word for name in but for word in ("--but", name))])
        except MissingData as error:
            print(f"not run here: {error}")
            return pd.DataFrame({"case": [], "outputs": [], "agree": []}, dtype=int)
        done = subprocess.run(command, cwd=record.root(), capture_output=True, text=True)
        if not file.exists():
            raise CompanionError(f"the comparison with the recorded cases of {slug} failed:\n{done.stderr[-2000:]}")
        return pd.read_csv(file)
