"""Tables of published and measured numbers, and the rows of measured results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import BadParameter, check_choice
from ..io.files import atomic
from ..io.papers import paper


def published_table(slug: str, table: str) -> pd.DataFrame:
    """A published table of the paper's YAML: one row per method, in the paper's columns; missing values are NaN.

    Its title, source and unit, and the group of each row, are in `.attrs`. Raises `BadParameter` for an unknown table.
    """
    tables = {t["id"]: t for t in paper(slug)["tables"]}
    check_choice("table", table, tables)
    facts = tables[table]
    rows = [{"method": row["method"]} | {c: row["values"].get(c) for c in facts["columns"]} for row in facts["rows"]]
    frame = pd.DataFrame(rows, columns=["method", *facts["columns"]])
    frame[facts["columns"]] = frame[facts["columns"]].apply(pd.to_numeric)
    frame.attrs = {k: facts.get(k, "") for k in ("id", "title", "unit", "metric", "provenance", "status")}
    frame.attrs["groups"] = [row.get("group", "") for row in facts["rows"]]
    return frame


def compare_published(frame: pd.DataFrame, measured: Mapping[tuple[str, str], float] = {}) -> pd.DataFrame:
    """Each published number and, after the slash, our measurement: "88.3 / 87.9" or "88.3 / not run".

    A row without measurements shows its published numbers and "not run" once, in the last column. A measured method
    that is not in the published table gets its own row.

    Args:
        measured: by (method, column), on real data at the `paper` profile, never at toy scale.
    """
    columns = [c for c in frame.columns if c != "method"]
    rows = []
    for method in dict.fromkeys([*frame.method, *(m for m, _ in measured)]):
        same = frame[frame.method == method]
        ours = {c: measured[method, c] for c in columns if (method, c) in measured}
        row = {"method": method}
        for column in columns:
            value = same[column].iloc[0] if len(same) else math.nan
            row[column] = "–" if pd.isna(value) else f"{value:g}"
            if ours:
                row[column] += f" / {ours[column]:.2f}" if column in ours else " / not run"
        row["measured here"] = f"{len(ours)} of {len(columns)}" if ours else "not run"
        rows.append(row)
    return pd.DataFrame(rows)


def with_measured(slug: str, cells: Mapping[str, Mapping[tuple[str, str], float]]) -> dict[str, pd.DataFrame]:
    """Published tables by title, each cell with the published value and ours, `cells` by the table's id."""
    frames = {name: published_table(slug, name) for name in cells}
    return {frame.attrs["title"]: compare_published(frame, cells[name]) for name, frame in frames.items()}


def _where(rows: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that an entry of `Results.cells` or `Results.claims` is about."""
    for column, wanted in spec.get("where", {}).items():
        rows = rows[rows[column].isin(wanted if isinstance(wanted, list) else [wanted])]
    return rows


Cells = dict[tuple[str, str], float]  # a mean by (row, column) of a table


@dataclass(frozen=True)
class Results:
    """The measured rows of a paper, in one CSV, and the cells of tables and claims that they fill.

    `Results.of(slug)` reads it from `results` of models/<slug>/paper.yaml, whose entries are these:

    Attributes:
        keys: columns that identify a row; a row measured again replaces the old one.
        values: columns of scores.
        usual: values of columns that rows of older code lack.
        names: for a column, how its values, or what comes before their first ", ", are called in tables.
        cells: by table, which rows fill it (`where`: column -> value or values), and the names of row and column, as
            templates of a row's fields and `metric`, the score's name; `metrics`: score -> name, where they differ.
        claims: likewise, for the claims about results.
    """

    slug: str
    keys: Sequence[str]
    values: Sequence[str]
    usual: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, slug: str) -> Results:
        """The results of a paper, as its YAML describes them."""
        return cls(slug, **paper(slug)["results"])

    def label(self, method: str, changes: Mapping[str, object] = {}, **started: str) -> str:
        """The name of a measured method: with each of `changes` from the published setting that is true, and with the
        file that it started from where that is not the file of the published recipe.

        Args:
            started: by name of an entry of `weights` in the YAML, the file that the parameters give ("": the default).
                An entry with `replaces` stands for another file, of one of the names in `published`.
        """
        files = {entry["name"]: entry for entry in paper(self.slug)["weights"]}
        starts = []
        for name, given in started.items():
            entry, file = files[name], Path(given).name
            if "replaces" in entry and file not in entry.get("published", ()):
                starts.append(f"from {file or entry.get('id') or Path(entry['file']).parts[0]}")
        return ", ".join([method, *(change for change, applies in changes.items() if applies), *starts])

    def measured(self, path: str | Path, *new: Mapping[str, object], dry_run: bool = False) -> pd.DataFrame:
        """The rows in the CSV `path`, after `new` rows were added to it or replaced those with the same keys.

        Rows of a dry run say so in a column of that name.

        Raises `BadParameter`: a new row lacks a key or has no score; or `cells` assigns it to a table that has none of
        its columns, which is found after the row was written, so that it is not lost.
        """
        place = f"models/{self.slug}/paper.yaml, results"
        for row in new:
            if not {*self.keys} <= {*row} or {*self.values}.isdisjoint(row):
                raise BadParameter("row", row, f"one with {self.keys} and some of {self.values}: {place}")
        path, keys = Path(path), list(self.keys)
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*keys, *self.values])
        if new:
            added = pd.DataFrame([{"dry_run": True, **row} for row in new] if dry_run else list(new))
            rows = (added if rows.empty else pd.concat([rows, added])).drop_duplicates(keys, keep="last")
            with atomic(path) as temporary:
                rows.to_csv(temporary, index=False)
            for table, spec in self.cells.items():
                columns = [*published_table(self.slug, table)][1:]
                for row in _where(added, spec).to_dict("records"):
                    if {*columns}.isdisjoint(self.named(row, spec, "column").values()):
                        raise BadParameter("row", row, f"one with a column of {table}, {columns}: {place}, cells")
        for name, usual in self.usual.items():
            rows[name] = rows[name].fillna(usual) if name in rows else usual
        return rows.drop_duplicates([key for key in keys if key in rows], keep="last")

    def filled(self, rows: pd.DataFrame, spec: Mapping[str, Any]) -> Cells:
        """Means over the rows of one cell, which differ in their seed, by (row, column); an entry of `cells`."""
        found: dict[tuple[str, str], list[float]] = {}
        for row in _where(rows, spec).sort_values(list(self.keys)).to_dict("records"):
            of = self.named(row, spec, "row")
            for score, column in self.named(row, spec, "column").items():
                if not pd.isna(row.get(score)):
                    found.setdefault((of[score], column), []).append(float(row[score]))
        return {cell: math.fsum(scores) / len(scores) for cell, scores in found.items()}

    def named(self, row: Mapping[str, Any], spec: Mapping[str, Any], what: str) -> dict[str, str]:
        """The name of the "row" or "column" of a table, `what`, for each score of a measured row."""

        def shown(key: str, value: Any) -> Any:
            names = self.names.get(key, {})
            name, comma, rest = str(value).partition(", ")
            return names[value] if value in names else f"{names[name]}{comma}{rest}" if name in names else value

        facts = {key: shown(key, value) for key, value in row.items()}
        metrics = spec.get("metrics", {value: value for value in self.values})
        return {score: spec[what].format(**facts, metric=metric) for score, metric in metrics.items()}

    def claimed(self, rows: pd.DataFrame) -> Cells:
        """The measurements that judge the claims about results, by (row, column)."""
        return {cell: value for spec in self.claims for cell, value in self.filled(rows, spec).items()}

    def tables(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """The published tables by title, each cell with the published value and ours."""
        return with_measured(self.slug, {table: self.filled(rows, spec) for table, spec in self.cells.items()})
