"""A finished run of the `paper` profile as a contribution: a folder of three small text files.

`run.json` says how it was made, `measured.csv` has its rows, `history.csv` the losses of its trainings, thinned. A
person reviews them. `python -m tools.facts` checks their form; nothing shows that the run took place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .. import __version__, data
from ..errors import BadParameter, CorruptFile
from ..evaluation.tables import Results
from ..io.files import atomic_folder, read_json, write_json
from ..io.papers import rules

FILES = ("run.json", "measured.csv", "history.csv")
ROWS = 1000  # of all histories together
PLAIN = r"[\w .,()/-]"  # the characters of free text
FOLDERS = ("data_root", "out")  # parameters that are left out
NAMED = ("task", "dataset", "method", "backbone", "seed")  # parameters that stand in the measured rows as they are


def pack(run: str | Path, into: str | Path, by: str = "") -> str:
    """Write the contribution of a run, and return a message with its rows.

    Args:
        run: the run's `out`, with run.json and measured.csv.
        into: the new folder, `reports/contributed/<paper>/<date>-<name>`.
        by: who measured it, shown with its rows; "": nobody is named.

    Raises:
        BadParameter: `by` cannot be shown, or the run is a dry run or not of the `paper` profile.
        CorruptFile: a file of the run is missing or unreadable, or has no row of the run.
    """
    run, into = Path(run), Path(into)
    if not re.fullmatch(PLAIN + "{0,60}", by):
        raise BadParameter("by", by, "at most 60 letters, digits, blanks and . , - _ ( ) /")
    facts = read_json(run / "run.json")
    given = facts.get("parameters", {}) if isinstance(facts, dict) else {}
    if given.get("profile") != "paper" or given.get("dry_run") or "items" not in facts:
        raise BadParameter("run", str(run), "a run of the `paper` profile that ended with `run.close()`, no dry run")
    results = Results.of(facts["slug"])
    measured = run / "measured.csv"
    if not measured.is_file():
        raise CorruptFile(measured, "there is no such file: the run measured nothing")
    rows = pd.read_csv(measured, dtype=str)  # as they were written
    rows = rows[[column for column in (*results.keys, *results.values) if column in rows]]
    rows = rows[[of_run(row, given) for row in rows.to_dict("records")]]
    if rows.empty:
        raise CorruptFile(measured, f"no row has the run's {', '.join(NAMED)}")
    text = {name for name, rule in rules(facts["slug"]).items() if rule["type"] == "text"}
    shown = {
        "slug": facts["slug"],
        "by": by,
        "date": facts["date"],
        "version": __version__,
        "commit": facts["commit"],
        "device": plain(facts["device"]),
        "seconds": facts["seconds"],
        "versions": {name: plain(version) for name, version in facts["versions"].items()},
        # of a file its name
        "parameters": {
            name: plain(re.split(r"[\\/]", value)[-1]) if name in text else value
            for name, value in given.items()
            if name not in FOLDERS
        },
        "items": facts["items"],
    }
    histories = [pd.read_csv(file, dtype=str) for file in sorted((run / "checkpoints").glob("*.csv"))]
    thinned = [h.iloc[data.spaced(len(h), ROWS // len(histories))] for h in histories]
    thinned = [h.assign(training=number) for number, h in enumerate(thinned)]
    history = pd.concat(thinned) if thinned else pd.DataFrame(columns=["training", "step"])
    first = [name for name in ("training", "step") if name in history]
    with atomic_folder(into) as folder:
        write_json(folder / "run.json", shown)
        rows.to_csv(folder / "measured.csv", index=False)
        history[[*first, *history.columns.difference(first)]].to_csv(folder / "history.csv", index=False)
    return f"{into}: {len(rows)} rows of {facts['slug']}, {len(histories)} trainings"


def of_run(row: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a measured row is of the run with these parameters: several runs may have written into one folder."""
    named = [key for key in NAMED if key in row and given.get(key, "") != ""]
    return all(f"{row[key]} ".startswith((f"{given[key]} ", f"{given[key]}, ")) for key in named)


def plain(text: str) -> str:
    """Text with "_" in place of each character that free text of a contribution has not."""
    return "".join(letter if re.match(PLAIN, letter) else "_" for letter in text)
