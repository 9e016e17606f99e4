"""Check the form of the rows that others measured: `python -m tools.contributed`, in `make lint` and in a pull request.

Each is a folder `reports/contributed/<paper>/<date>-<name>` of three small text files, as `companion pack` writes it.
Prints each fault as `path:line: key or column: what is wrong; accepted: ...`; returns 1 if there is any. What the
check cannot see stands in `site/docs/gpu.md`.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from companion.errors import BadParameter
from companion.evaluation.tables import Results
from companion.io import papers
from companion.runs.pack import FILES, FOLDERS, NAMED, PLAIN, of_run
from companion.runs.report import sets_read
from tools.facts import ROOT, Facts, Fault, unknown

LARGEST = 200_000  # bytes of a file
NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,20})?(e[+-]?[0-9]{1,2})?")
PERCENT = (0, 100)
SCORES = {
    "kappa": (-100, 100),
    "fold": (-100, 100),
    "PSNR": PERCENT,
    "SSIM": (-1, 1),
    "LPIPS": (0, 2),
    "FID": (0, 1000),
}
NAMES = re.compile(f"({PLAIN}|[+=%]){{0,100}}")  # of methods and variants, as recipes write them


def check(folder: Path) -> Iterator[str]:
    """The faults of a contribution, one line of text each. The name of the folder above it is the paper's."""
    slug, name, faults = folder.parent.name, folder.name, list[str]()
    if slug not in papers.slugs() or not re.fullmatch(r"\d{4}-\d\d-\d\d-[A-Za-z0-9_.-]{1,60}", name, re.ASCII):
        yield f"{folder}: no place of a contribution; accepted: reports/contributed/<paper>/<date>-<name>"
        return
    there = [*folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []
    if sorted(file.name for file in there) != sorted(FILES):
        faults.append(f"{folder}: holds {', '.join(sorted(f.name for f in there)) or 'nothing'}; accepted: {FILES}")
    for file in there:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
            faults.append(f"{file}: a link, no file or too large; accepted: a text file of at most {LARGEST:,} bytes")
    yield from faults
    if faults:
        return
    facts = Facts(folder / "run.json", "contribution", strict_json)
    lines = [*facts.told(lambda content: about(content, slug, name))]
    yield from lines
    if not lines:
        yield from rows(folder / "measured.csv", facts.content)
        yield from losses(folder / "history.csv")


def strict_json(text: str) -> dict[str, Any]:
    """A JSON object without NaN and Infinity. Raises `ValueError`."""

    def number(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    found = json.loads(text, parse_constant=number)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def about(facts: Mapping[str, Any], slug: str, name: str) -> Iterator[Fault]:
    """What a schema cannot say of run.json: the paper, the day, the commit, the parameters and the data sets."""
    yield from unknown(("slug",), [facts["slug"]], [slug], "paper of this folder")
    try:
        past = datetime.date.fromisoformat(facts["date"]) <= datetime.date.today() and name.startswith(facts["date"])
    except ValueError:
        past = False
    if not past:
        yield ("date",), f"{facts['date']!r}", ["a day until today, with which the folder's name begins"]
    git = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", facts["commit"], "HEAD"]
    if subprocess.run(git, capture_output=True).returncode:
        known = "a commit of the main branch (in a shallow clone first `git fetch --unshallow`)"
        yield ("commit",), facts["commit"], [known]
    given = facts["parameters"]
    rules = {key: rule for key, rule in papers.rules(slug).items() if key not in FOLDERS}
    yield from unknown(("parameters",), given, rules, f"parameter of {slug}")
    for key, rule in rules.items():
        if key not in given:
            yield ("parameters",), f"{key} is missing", [papers.accepted(rule)]
            continue
        try:
            papers.convert(key, given[key], rule)
        except BadParameter as error:
            yield ("parameters", key), repr(error.value), [papers.accepted(rule)]
        if rule["type"] == "text" and not re.fullmatch(PLAIN + "{0,100}", str(given[key])):
            yield ("parameters", key), "other characters", ["letters, digits, blanks and . , - _ ( ) /"]
    for key, wanted in (("profile", "paper"), ("dry_run", False)):
        yield from unknown(("parameters", key), [given.get(key)], [wanted], "run whose rows count")
    yield from unknown(("items",), facts["items"], sets_read(slug, given), "data set of the parameters")


def table(file: Path, kind: str) -> Iterator[tuple[int, dict[str, str]] | str]:
    """The rows of a CSV file with their lines; a fault where it is none."""
    line = 1
    try:
        reader = csv.reader(io.StringIO(file.read_bytes().decode("utf-8"), newline=""), strict=True)
        head = next(reader, [])
        if len({*head}) < len(head):
            yield f"{file}:1: a column is there twice; accepted: each once"
            return
        for cells in reader:
            line = reader.line_num
            if len(cells) != len(head):
                yield f"{file}:{line}: {len(cells)} cells; accepted: {len(head)}, one for each column"
            else:
                yield line, dict(zip(head, cells, strict=True))
        if line == 1 and kind == "rows":
            yield f"{file}:1: no row; accepted: one or more"
    except (csv.Error, UnicodeDecodeError) as error:
        yield f"{file}:{line}: {error}; accepted: CSV in UTF-8"


def number(text: str, low: float, high: float) -> bool:
    """Whether text is a number in plain digits from `low` to `high`."""
    return bool(NUMBER.fullmatch(text)) and low <= float(text) <= high


def rows(file: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """The faults of measured.csv: columns, names, scores, and rows that are there twice."""
    slug, given, seen = facts["slug"], facts["parameters"], set[tuple[str, ...]]()
    results, rules = Results.of(slug), papers.rules(slug)
    for entry in table(file, "rows"):
        if isinstance(entry, str):
            yield entry
            continue
        line, row = entry
        scores = {name: row[name] for name in results.values if row.get(name)}
        if not {*results.keys} <= row.keys() <= {*results.keys, *results.values} or not scores:
            columns = f"{', '.join(results.keys)}, and of {', '.join(results.values)} one or more"
            yield f"{file}:{line}: columns {', '.join(row)}; accepted: {columns}, and nothing else"
            return
        for name in results.keys:
            try:
                papers.convert(name, row[name].partition(", ")[0], rules.get(name, {"type": "text"}))
                known = bool(NAMES.fullmatch(row[name]))
            except BadParameter:
                known = False
            if not known:
                accepted = papers.accepted(rules[name]) if name in rules else "letters, digits and . , - _ ( ) / + = %"
                yield f"{file}:{line}: {name}: {row[name]!r}; accepted: {accepted}"
        if not of_run(row, given):
            yield f"{file}:{line}: of another run; accepted: the {', '.join(NAMED)} of run.json"
        for name, score in scores.items():
            low, high = SCORES.get(name, PERCENT)
            if not number(score, low, high):
                yield f"{file}:{line}: {name}: {score!r}; accepted: a number from {low} to {high}"
        if (key := tuple(row[name] for name in results.keys)) in seen:
            yield f"{file}:{line}: the same row a second time; accepted: each once"
        seen.add(key)


def losses(file: Path) -> Iterator[str]:
    """The faults of history.csv: columns, numbers, and the order of the steps."""
    before: tuple[float, float] = (-1, -1)
    for entry in table(file, "losses"):
        if isinstance(entry, str):
            yield entry
            continue
        line, row = entry
        if not {"training", "step"} < row.keys() or not all(re.fullmatch(PLAIN + "{1,40}", name) for name in row):
            yield f"{file}:1: columns {', '.join(row)}; accepted: training, step, and the losses"
            return
        wrong = [
            name for name, text in row.items() if not number(text, -1e9, 1e9) and (text or name in ("step", "training"))
        ]
        for name in wrong:
            yield f"{file}:{line}: {name}: {row[name]!r}; accepted: a finite number"
        if not wrong:
            now = (float(row["training"]), float(row["step"]))
            if now <= before:
                yield f"{file}:{line}: step: not after that of the line before; accepted: steps in order, by training"
            before = now


def main() -> int:
    """Print the faults of all contributions; 1 if there is any."""
    place = ROOT / "reports" / "contributed"
    found = [line for folder in sorted(place.glob("*/*")) for line in check(folder)]
    found += [f"{file}: no folder of a paper" for file in sorted(place.glob("*")) if file.name not in papers.slugs()]
    print("\n".join(found) or "the contributed rows have their form")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
