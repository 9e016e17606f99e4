"""Results that anybody measured: `pack` makes one small archive of a run, `read` reads one; `runs.adopt` checks it.

An archive is a zip of `run.json` (who, when, code, versions, GPU, parameters; fingerprints of data and weights; hashes
of the other files), `measured.csv`, `tables/`, `history/` (thinned) and the executed notebook without images. It holds
no path, no checkpoint and nothing that is run.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from .. import __version__, data
from ..errors import BadParameter, CorruptFile
from ..evaluation.tables import Results
from ..io.files import atomic, read_json, sha256
from ..io.papers import paper, rules
from . import needs

LARGEST, UNPACKED, FILES = 1_000_000, 20_000_000, 200  # bytes of an archive, bytes of its files, their number
ROWS = 200  # of a history
NAMES = re.compile(r"(run\.json|measured\.csv|notebook\.ipynb|tables/[\w-]+\.csv|history/\d+\.csv)")
# a path of any system with a folder in it; links and the names of data sets are none
PATHS = re.compile(r"(?<![\w:/.<\\])(?:file:/+|[A-Za-z]:[\\/]|~?/|\\\\)(?:[\w.@+~-]+[\\/])+[\w.@+~-]*")
NAMED = {"task", "dataset", "method", "backbone", "seed"}  # parameters that stand in the measured rows as they are
TEXT = ("text/plain", "text/markdown", "text/html")  # outputs of a notebook that are kept
BY = re.compile(r"[\w .@-]{0,60}")
FACTS: dict[str, type | tuple[type, ...]] = {
    "slug": str, "by": str, "date": str, "version": str, "commit": str, "code": str, "device": str, "versions": dict,
    "parameters": dict, "seconds": (int, float), "data": dict, "weights": dict, "steps": list, "files": dict,
}  # fmt: skip


# --- of a run ---------------------------------------------------------------------------------------------------------


def sets_read(slug: str, values: Mapping[str, Any]) -> list[str]:
    """The names of the data sets that the parameters of a run name."""
    found = []
    for name, rule in rules(slug).items():
        chosen = str(values.get(name) or rule.get("usual", {}).get(values.get("task"), ""))
        found += [part for part in chosen.split(", ") if rule["type"] in ("choice", "list") and part in data.DATASETS]
    return found


def fingerprints(slug: str, p: SimpleNamespace) -> dict[str, dict]:
    """What identifies the data and the weights that a run has read, for its record: `data` by set, see
    `data.fingerprint`, and `weights` by file name."""
    named = (value for name, value in vars(p).items() if rules(slug)[name]["type"] == "text" and name != "data_root")
    own = [Path(value) for value in named if value and Path(value).is_file()]
    run = needs.run_of(slug, p) or {"weights": []}
    listed = [entry for entry in paper(slug)["weights"] if entry["name"] in run["weights"] and "file" in entry]
    own += [file for entry in listed if (file := Path(p.data_root) / "weights" / entry["file"]).is_file()]
    return {
        "data": {name: data.fingerprint(name, p.data_root) for name in sets_read(slug, vars(p))},
        "weights": {file.name: sha256(file) for file in own},
    }


def pack(folder: str | Path, file: str | Path, by: str = "") -> str:
    """Write the archive of a run of the `paper` profile, and return a message with its size.

    Args:
        folder: the run's `out`, with run.json, measured.csv and, where it was executed there, `<slug>.ipynb`.
        by: who measured it, shown with its rows; "": nobody is named.

    Raises:
        BadParameter: a dry run, a name that cannot be shown, or no row that fills a published table or judges a claim.
        CorruptFile: a file of the run is missing, or is not the recorded one.
    """
    folder, file = Path(folder), Path(file)
    if not BY.fullmatch(by):
        raise BadParameter("by", by, "at most 60 letters, digits, blanks and . - _ @")
    facts = read_json(folder / "run.json")
    if isinstance(facts, dict) and dict(facts.get("parameters", {})).get("dry_run"):
        raise BadParameter("folder", str(folder), "a run that is no dry run, whose numbers mean nothing")
    wanted = {*FACTS, "outputs"} - {"by", "date", "version", "steps", "files"}
    if not isinstance(facts, dict) or wanted - facts.keys() or not isinstance(facts["outputs"], dict):
        reason = "not the record of a run of the `paper` profile that ended with `run.close()`"
        raise CorruptFile(folder / "run.json", reason)
    for name, hashed in facts["outputs"].items():
        if not (folder / name).is_file() or sha256(folder / name) != hashed:
            raise CorruptFile(folder / name, "missing, or changed since the run ended, by the hash in run.json")
    slug, files, steps = facts["slug"], dict[str, str](), []
    results = Results.of(slug)
    if not (folder / "measured.csv").is_file():
        raise CorruptFile(folder / "measured.csv", "there is no such file: the run measured nothing")
    rows = of_run(results, pd.read_csv(folder / "measured.csv"), facts["parameters"])
    if not cells(results, rows):
        accepted = f"a run with a row of a published table or claim: {', '.join(results.cells)}"
        raise BadParameter("folder", str(folder), accepted)
    files["measured.csv"] = anonymous(rows.to_csv(index=False))
    for table in sorted(folder.glob("tables/*.csv")):
        files[f"tables/{table.name}"] = anonymous(table.read_text(encoding="utf-8"))
    for number, history in enumerate(sorted((folder / "checkpoints").glob("*.csv"))):
        steps_of = pd.read_csv(history)
        steps.append(len(steps_of))
        files[f"history/{number}.csv"] = steps_of.iloc[data.spaced(len(steps_of), ROWS)].to_csv(index=False)
    if (folder / f"{slug}.ipynb").is_file():
        files["notebook.ipynb"] = json.dumps(anonymous(_bare(read_json(folder / f"{slug}.ipynb"))), ensure_ascii=False)
    kept = {name: facts[name] for name in FACTS if name in facts} | {"parameters": _shareable(slug, facts)}
    kept |= {"by": by, "date": datetime.date.today().isoformat(), "version": __version__, "steps": steps}
    kept |= {"files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}}
    record_text, content = json.dumps(anonymous(kept), indent=1, ensure_ascii=False), io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name, text in {"run.json": record_text, **files}.items():
            packed.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED, 9)
    if (size := len(content.getvalue())) > LARGEST:
        raise BadParameter("folder", str(folder), f"a run whose archive has at most {LARGEST:,} bytes; it has {size:,}")
    with atomic(file) as temporary:
        temporary.write_bytes(content.getvalue())
    without = "" if "notebook.ipynb" in files else f"; without the executed notebook: no {slug}.ipynb in the folder"
    return f"{file}: {len(rows)} rows, {len(files) + 1} files, {size:,} bytes{without}"


def of_run(results: Results, rows: pd.DataFrame, given: Mapping[str, Any]) -> pd.DataFrame:
    """The measured rows of the run with these parameters: several runs may have written into one folder."""

    def same(value: object, wanted: object) -> bool:
        text = str(value)
        return text == str(wanted) or text.startswith((f"{wanted}, ", f"{wanted} "))

    for key in sorted(NAMED.intersection(results.keys)):
        if given.get(key, "") != "" and key in rows:
            rows = rows[rows[key].map(functools.partial(same, wanted=given[key]))]
    return rows


def _shareable(slug: str, facts: Mapping) -> dict[str, Any]:
    """The parameters without folders: of a file its name."""
    known, given = rules(slug), {k: v for k, v in facts["parameters"].items() if k not in ("data_root", "out")}
    text = {name for name in given if known.get(name, {}).get("type") == "text"}
    return {k: re.split(r"[\\/]", str(v))[-1] if k in text else v for k, v in given.items()}


def anonymous(value: Any) -> Any:
    """Text, or JSON, with "(path)" in place of each path."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [anonymous(entry) for entry in value]
    return PATHS.sub("(path)", value) if isinstance(value, str) else value


def _bare(notebook: Mapping) -> dict[str, Any]:
    """A notebook's cells with what they printed: no images, no widgets, no metadata."""
    cells = []
    for cell in notebook["cells"]:
        bare = {"cell_type": cell["cell_type"], "metadata": {}, "source": "".join(cell["source"])}
        if cell["cell_type"] == "code":
            bare |= {"execution_count": cell.get("execution_count"), "outputs": []}
            for output in cell["outputs"]:
                shown = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind in TEXT}
                drawn = {kind for kind in output.get("data", {}) if kind.startswith(("image/", "application/"))}
                if output["output_type"] == "stream":
                    stream = {"output_type": "stream", "name": output["name"], "text": "".join(output["text"])}
                    bare["outputs"].append(stream)
                elif shown and not drawn and not re.search("<(script|img)|base64", shown.get("text/html", "")):
                    bare["outputs"].append({"output_type": "display_data", "metadata": {}, "data": shown})
        cells.append(bare)
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


# --- of an archive ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive whose form is right.

    Attributes:
        facts: its run.json.
        rows: measured.
        histories: of its trainings.
        notebook: as executed; {} without one.
        evidence: a hash over what was measured, whoever sends it.
    """

    file: Path
    facts: dict[str, Any]
    rows: pd.DataFrame
    histories: list[pd.DataFrame]
    notebook: dict[str, Any]
    evidence: str

    @property
    def slug(self) -> str:
        """The paper."""
        return self.facts["slug"]


def read(file: str | Path) -> Archive:
    """Read an archive. Nothing is unpacked to the disk.

    Raises `CorruptFile`: it is none, is too large, holds other files than it may or than run.json lists, or one that
    is not strict JSON or CSV.
    """
    file = Path(file)

    def wrong(reason: str) -> CorruptFile:
        return CorruptFile(file, reason)

    if not file.is_file():
        raise wrong("there is no such file; `companion pack` writes one")
    if file.stat().st_size > LARGEST:
        raise wrong(f"{file.stat().st_size:,} bytes, and an archive has at most {LARGEST:,}")
    found = dict[str, str]()
    try:
        with zipfile.ZipFile(file) as packed:
            listed = packed.infolist()
            if len(listed) > FILES or sum(entry.file_size for entry in listed) > UNPACKED:
                raise wrong(f"more than {FILES} files, or {UNPACKED:,} bytes unpacked")
            for entry in listed:
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if not NAMES.fullmatch(entry.filename) or entry.filename in found or kind not in (0, stat.S_IFREG):
                    raise wrong(f"{entry.filename!r}: a link, a second one of that name, or no file of an archive")
                with packed.open(entry) as stream:
                    found[entry.filename] = stream.read(UNPACKED).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise wrong(f"no archive of `companion pack`, or a damaged one ({error})") from error
    if missing := {"run.json", "measured.csv"} - found.keys():
        raise wrong(f"without {' and '.join(sorted(missing))}")
    facts = _json(file, "run.json", found.pop("run.json"))
    for name, form in FACTS.items():
        if not isinstance(facts.get(name), form) or isinstance(facts.get(name), bool):
            raise wrong(f"run.json has no {name} of the right type")
    if extra := facts.keys() - FACTS.keys():
        raise wrong(f"run.json has {', '.join(sorted(extra))}, which no record has")
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in found.items()}
    for name in hashes.keys() | facts["files"].keys():
        if hashes.get(name) != facts["files"].get(name):
            raise wrong(f"{name} is missing, not listed in run.json, or not the file that was hashed there")
    notebook = _json(file, "notebook.ipynb", found["notebook.ipynb"]) if "notebook.ipynb" in found else {}
    if not _formed(facts, notebook):
        raise wrong("run.json or notebook.ipynb has an entry of another type than `companion pack` writes")
    for name, content in {**found, "run.json": facts, "notebook.ipynb": notebook}.items():
        if anonymous(content) != content:
            raise wrong(f"{name} holds a path, which `companion pack` removes")
    tables = {name: _csv(file, name, text) for name, text in found.items() if name.endswith(".csv")}
    histories = [tables[name] for name in sorted(tables, key=lambda name: (len(name), name)) if name[0] == "h"]
    evidence = "".join(hashes[name] for name in sorted(tables) if not name.startswith("tables/"))
    evidence += json.dumps([facts["slug"], facts["code"], facts["data"]], sort_keys=True)
    digest = hashlib.sha256(evidence.encode()).hexdigest()
    return Archive(file, facts, tables["measured.csv"], histories, notebook, digest)


def _formed(facts: Mapping, notebook: Mapping) -> bool:
    """Whether the entries of a record and of a notebook have the types that others rely on."""
    splits = [split for one in facts["data"].values() for split in (one.values() if isinstance(one, dict) else [one])]
    if not all(isinstance(split, dict) and isinstance(split.get("labels"), list) for split in splits):
        return False
    counts = [*facts["steps"], *(n for split in splits for n in [split.get("items"), *split["labels"]])]
    cells = notebook.get("cells", [])
    texts = [cell.get("source") for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else [None]
    whole = isinstance(cells, list) and len(texts) == len(cells) and all(isinstance(text, str) for text in texts)
    return whole and all(type(n) is int and n >= 0 for n in counts)


def _json(file: Path, name: str, text: str) -> dict[str, Any]:
    """A JSON object without NaN and without a key that stands twice. Raises `CorruptFile`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > len(dict(pairs)):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def number(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    try:
        found = json.loads(text, parse_constant=number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(file, f"{name} is not strict JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptFile(file, f"{name} is no JSON object")
    return found


def _csv(file: Path, name: str, text: str) -> pd.DataFrame:
    """A table whose rows have one cell for each of the columns. Raises `CorruptFile`."""
    try:
        head, *rows = csv.reader(io.StringIO(text), strict=True)
        if len({*head}) < len(head) or any(len(row) != len(head) for row in rows) or not rows:
            raise ValueError("a column stands twice, a row has other cells, or there is no row")
        return pd.read_csv(io.StringIO(text))
    except (csv.Error, ValueError) as error:
        raise CorruptFile(file, f"{name} is no strict CSV ({error})") from error


def cells(results: Results, rows: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """The cells (table, row, column) that measured rows fill; those that judge claims are of the table ""."""
    specs = [*results.cells.items(), *(("", spec) for spec in results.claims)]
    return {(table, *cell): value for table, spec in specs for cell, value in results.filled(rows, spec).items()}
