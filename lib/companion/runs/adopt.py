"""Archives of runs that others made: checked line by line, kept in `reports/contributed/<slug>/`, shown in the ledger.

The archives themselves are kept, so no row replaces another: a cell shows mean, spread and number of its runs.

What the checks show is that the parts of an archive agree with each other, with the code, and with what is known of the
data. They do not show that somebody ran it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import math
import re
import statistics
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from .. import data
from ..errors import BadParameter, CorruptFile, check_choice
from ..evaluation.claims import judge_measured
from ..evaluation.tables import Results, published_table
from ..io import record
from ..io.files import atomic, read_json
from ..io.papers import convert, paper, rules, slugs
from ..io.provenance import code_hash, sources
from . import needs
from .archives import BY, ROWS, Archive, anonymous, cells, of_run, read, sets_read

DEVICE = re.compile(r"[\w ()./,+-]{1,100}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def adopt(file: str | Path, only_check: bool = False) -> str:
    """Check an archive of `companion pack`, copy it to `reports/contributed/`, and return what was found.

    Raises `CorruptFile`: with a line for each thing that does not hold; or the same run is there already.
    """
    archive = read(file)
    notes = check(archive)
    place = record.root() / "reports" / "contributed" / archive.slug / f"{archive.evidence[:12]}.zip"
    for other in contributed(archive.slug):
        if other.evidence == archive.evidence and other.file.resolve() != archive.file.resolve():
            raise CorruptFile(archive.file, f"the same run as {other.file}")
    if not only_check and place.resolve() != archive.file.resolve():
        with atomic(place) as temporary:
            temporary.write_bytes(archive.file.read_bytes())
    said = "holds together" if only_check else f"adopted: {place.relative_to(record.root())}"
    scores = cells(Results.of(archive.slug), archive.rows)
    shown = dict.fromkeys(f"  {row}, {column}: {value:.2f}" for (_, row, column), value in scores.items())
    return "\n".join([f"{archive.file}: {said}", *shown, *(f"  shown with its rows: {note}" for note in notes)])


def contributed(slug: str) -> list[Archive]:
    """The archives of a paper in `reports/contributed/`, by name."""
    return [read(file) for file in sorted((record.root() / "reports" / "contributed" / slug).glob("*.zip"))]


# --- what must hold ---------------------------------------------------------------------------------------------------

Found = Iterator[tuple[bool, str]]  # whether it is a reason to refuse, and the line


def check(archive: Archive) -> list[str]:
    """What is to be shown with the rows of an archive: another copy of the data, code of another commit.

    Raises `CorruptFile`: with a line for each thing that does not hold.
    """
    if archive.slug not in slugs():
        raise CorruptFile(archive.file, f"of {archive.slug!r}, which is none of {', '.join(slugs())}")
    found = list(_said(archive))
    if not found:  # all else is read by the parameters
        found = [line for part in (_code, _data, _history, _scores) for line in part(archive)]
    if wrong := [line for refused, line in found if refused]:
        raise CorruptFile(archive.file, "\n  ".join(["", *wrong]))
    return [line for _, line in found]


def _said(archive: Archive) -> Found:
    """The parameters, who and when."""
    facts, known = archive.facts, rules(archive.slug)
    given = facts["parameters"]
    for name, value in given.items():
        try:
            check_choice("parameter", name, known)
            convert(name, value, known[name])
        except BadParameter as error:
            yield True, f"parameters: {error}"
    if given.get("profile") != "paper" or given.get("dry_run"):
        yield True, "parameters: not of the `paper` profile, or of a dry run, whose numbers mean nothing"
    if not BY.fullmatch(facts["by"]):
        yield True, "by: has other characters than letters, digits, blanks and . - _ @"
    if not DEVICE.fullmatch(facts["device"]):  # it is shown on the site
        yield True, "device: has other characters than the names of processors have"
    try:
        if datetime.date.fromisoformat(facts["date"]) > datetime.date.today():
            raise ValueError("it is to come")
    except ValueError as error:
        yield True, f"date: no day until today ({error})"


def _code(archive: Archive) -> Found:
    """The code is that of this checkout, or of one of its commits; the notebook is the one of that commit."""
    facts, name = archive.facts, f"notebooks/{archive.slug}.ipynb"
    if not (record.root() / name).is_file():
        yield (
            True,
            f"code: there is no {name} here to compare it with: call `companion adopt` in the project's checkout",
        )
        return
    with _checkout(facts["code"], facts["commit"], name) as (root, which):
        if root is None:
            made = facts["commit"] or "no commit"
            yield True, f"code: {facts['code'][:12] or 'unknown'}, of {made}, is not that of a commit of this checkout"
            return
        if which:
            yield False, f"code of {which}"
        wanted, ran = anonymous(_cells_of(read_json(root / name))), _cells_of(archive.notebook)
        if archive.notebook and [text for text in ran if not text.startswith("# Parameters\n")] != wanted:
            yield True, f"notebook.ipynb: its code is not that of {name}"


def _cells_of(notebook: Mapping) -> list[str]:
    cells = notebook.get("cells", [])
    return ["".join(cell.get("source", "")) for cell in cells if cell.get("cell_type") == "code"]


@contextlib.contextmanager
def _checkout(code: str, commit: str, name: str) -> Iterator[tuple[Path | None, str]]:
    """The folder of a checkout whose notebook has that code hash, and its commit in words ("": this one); None where
    there is none."""
    root = record.root()
    if code_hash([root / name, *sources(root / name)]) == code:
        yield root, ""
        return

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        at, packed = (
            Path(folder),
            git("archive", "--format=zip", commit, "lib", name) if COMMIT.fullmatch(commit) else b"",
        )
        if packed:
            with zipfile.ZipFile(io.BytesIO(packed)) as files:  # of this checkout
                files.extractall(at)
            package = at / "lib" / "companion"
            if code_hash([at / name, *sources(at / name, package)], package) == code:
                tag = git("describe", "--tags", "--exact-match", commit).decode().strip()
                yield at, f"release {tag}" if tag else f"commit {commit[:10]}"
                return
        yield None, ""


def _data(archive: Archive) -> Found:
    """The sets are those of the parameters, of the published sizes, and the copy of the rows before."""
    facts = archive.facts
    if (wanted := {*sets_read(archive.slug, facts["parameters"])}) != facts["data"].keys():
        there = ", ".join(facts["data"]) or "no set"
        yield True, f"data: of {there}; the parameters name {', '.join(sorted(wanted)) or 'none'}"
        return
    before = [other.facts["data"] for other in contributed(archive.slug) if other.evidence != archive.evidence]
    for name, splits in facts["data"].items():
        for split, items in data.find(name).sizes.items():
            if splits.get(split, {}).get("items", items) != items or not splits:
                there = splits.get(split, {}).get("items")
                yield True, f"data: {name} has {there} items in {split}, and {items:,} were published"
        copies = [sets[name] for sets in before if name in sets]
        if copies and splits not in copies:
            yield False, f"another copy of {name} than that of the rows before: names, labels or content differ"


def _history(archive: Archive) -> Found:
    """The steps are in order, as many as the published training has, their losses numbers, the last as measured."""
    facts, histories = archive.facts, archive.histories
    run = needs.run_of(archive.slug, SimpleNamespace(**facts["parameters"]))
    if len(facts["steps"]) != len(histories):
        yield True, f"history: of {len(histories)} trainings, and run.json tells of {len(facts['steps'])}"
        return
    for number, (steps, rows) in enumerate(zip(facts["steps"], histories, strict=True)):
        numbers = rows.apply(pd.to_numeric, errors="coerce")
        ordered = "step" in rows and numbers["step"].is_monotonic_increasing and numbers["step"].is_unique
        if (
            not ordered
            or len(rows) != min(steps, ROWS)
            or numbers["step"].iloc[-1] - numbers["step"].iloc[0] != steps - 1
        ):
            yield True, f"history/{number}.csv: not the thinned history of {steps} steps"
        elif not numbers.map(math.isfinite).all(axis=None):
            yield True, f"history/{number}.csv: a loss or a learning rate that is no number"
    longest = max(facts["steps"], default=0)
    if run and (expected := _steps(facts, run)) and not expected / 2 <= longest <= expected * 2:
        yield True, f"history: {longest} steps, and the published training has about {expected:,.0f}"
    measured = archive.rows
    losses = measured["score"][measured["metric"] == "last loss"] if "metric" in measured else ()
    ends = [float(rows["loss"].iloc[-1]) for rows in histories if "loss" in rows]
    for loss in losses:
        if not any(math.isclose(loss, end, rel_tol=1e-3) for end in ends):
            yield True, f"measured.csv: a last loss of {loss:g}, and the histories end with {ends}"


def _steps(facts: Mapping, run: Mapping) -> float:
    """The steps of the published training of a run, about; 0 where they are not known: `images` of a run are those of
    all its trainings, and a test of given weights trains none."""
    batch, given = needs.step_images(facts["slug"], run), facts["parameters"].get("checkpoint")
    splits: Mapping[str, Mapping] = next(iter(facts["data"].values()), {})
    items = next((splits[name]["items"] for name in ("trainval", "train") if name in splits), 0)
    return 0 if "images" in run or given or not batch else run["epochs"] * max(items / batch, 1)


def _scores(archive: Archive) -> Found:
    """The scores are of this run, fill published cells, are possible, and not too good."""
    results, rows = Results.of(archive.slug), archive.rows
    values = [value for value in results.values if value in rows]
    if missing := {*results.keys} - {*rows.columns}:
        yield True, f"measured.csv: no column {', '.join(sorted(missing))}"
        return
    scores = rows[values].apply(pd.to_numeric, errors="coerce")
    if (
        not values
        or not scores.map(math.isfinite).any(axis=1).all()
        or (scores.isna() & rows[values].notna()).any(axis=None)
    ):
        yield True, "measured.csv: a row without a score, or a score that is no number"
        return
    if "dry_run" in rows or rows.duplicated(list(results.keys)).any():
        yield True, "measured.csv: rows of a dry run, or a row twice"
    if len(of_run(results, rows, archive.facts["parameters"])) < len(rows):
        yield True, "measured.csv: rows of other parameters than those of run.json"
    found = cells(results, rows)
    if not found:
        yield True, "measured.csv: no row fills a published table or judges a claim"
    for (table, row, column), score in found.items():
        frame = published_table(archive.slug, table) if table else pd.DataFrame()
        if frame.attrs.get("unit") != "percent" or column not in frame:
            continue
        best, least = frame[column].max(), _least(archive, frame.attrs["metric"])
        if not least <= score <= 100:
            yield True, f"{row}, {column}: {score:g} %; possible are {least:.3g}, of a constant prediction, to 100"
        elif score > (100 + best) / 2:
            yield (
                True,
                f"{row}, {column}: {score:g} % is too good: less than half of the errors of the best, {best:g} %",
            )


def _least(archive: Archive, metric: str) -> float:
    """Percent that a constant prediction reaches at least, where the score is an accuracy and the classes are known."""
    tests = [splits.get("test", {}).get("labels") for splits in archive.facts["data"].values()]
    shares = [100 * min(filter(None, labels)) / sum(labels) for labels in tests if labels and any(labels)]
    return min(shares, default=0) if metric.endswith("accuracy") else 0


# --- what the ledger shows --------------------------------------------------------------------------------------------


def measured_cells(slug: str) -> list[dict[str, Any]]:
    """The published cells that contributed runs fill: `table`, `row`, `column`, the `published` number, the runs'
    `values`, their `mean` and `spread` (None for one run), and of the runs `gpus`, `by`, `dates` and `notes`."""
    results, found = Results.of(slug), dict[tuple[str, str, str], dict[str, Any]]()
    for archive in contributed(slug):
        try:
            notes = check(archive)
        except CorruptFile as error:  # it was adopted: its commit may be missing in a copy without history
            notes = [f"not checked here: {' '.join(error.reason.replace('`', '').split())}"]
        for (table, row, column), value in cells(results, archive.rows).items():
            if not table:
                continue
            frame = published_table(slug, table).set_index("method")
            published = frame[column].get(row) if column in frame else None
            new = {"table": frame.attrs["title"], "row": row, "column": column, "published": published}
            new |= {"values": [], "gpus": [], "by": [], "dates": [], "notes": []}
            cell = found.setdefault((table, row, column), new)
            facts = archive.facts
            cell["values"].append(value)
            cell["gpus"].append(facts["device"])
            cell["by"] += [facts["by"]] if facts["by"] else []
            cell["dates"].append(facts["date"])
            cell["notes"] += notes
    for cell in found.values():
        values = cell["values"]
        cell |= {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}
        cell |= {key: list(dict.fromkeys(cell[key])) for key in ("gpus", "by", "dates", "notes")}
    return list(found.values())


def judged(slug: str) -> dict[str, str]:
    """What contributed runs say of the claims that they judge, by id: whether it holds, of how many runs and GPUs, and
    the measurements. A cell is the mean over its runs."""
    results, archives = Results.of(slug), contributed(slug)
    if not archives:
        return {}
    recipe = importlib.import_module(f"companion.models.{slug}.recipe")
    rows = pd.concat([archive.rows for archive in archives])
    scores = [value for value in results.values if value in rows]
    means = rows.groupby(list(results.keys), dropna=False, as_index=False)[scores].mean()
    claimed, found = results.claimed(means), dict[str, str]()
    for name in {spec["by"] for spec in paper(slug).get("computed", ()) if "of" not in spec}:
        claimed |= getattr(recipe, name)(means)
    for claim in paper(slug)["claims"]:
        named = [c[key] for c in claim.get("measured", []) for key in ("of", "over") if key in c]
        if not {tuple(cell) for cell in named} & claimed.keys():
            continue
        holds, said = judge_measured(claim["measured"], claimed)
        methods = {method for method, _ in named}
        part = [one for one in archives if methods & {row for _, row, _ in cells(results, one.rows)}]
        status = {True: "holds", False: "fails", None: "not all of it was measured"}[holds]
        gpus = len({one.facts["device"] for one in part})
        found[claim["id"]] = f"{status} (n = {len(part)}, {gpus} GPU{'s' * (gpus > 1)}, contributed): {said}"
    return found
