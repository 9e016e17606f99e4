"""Evaluates the rules of `distil` on real reports: their statements compared with the headings assigned by coders.

A report is positive for an entity when its statement is "There is X." or "There may be X.". The headings are a
reference, not ground truth: coders omit old or unimportant findings, and may use another heading.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...data.openi import Report
from ...ops.papers import paper
from .distil import FORM, Rules, entities_in

HEADINGS: dict[str, list[str]] = paper("ecamp")["headings"]


def statements(reports: Sequence[Report]) -> pd.DataFrame:
    """The rules' statement on each entity of `HEADINGS` in each report, one row per pair.

    Columns: report, entity, `stated` ("is", "may be", "is no", or "" if the report does not name it), `coded` (whether
    it has a heading).
    """
    rules, rows = Rules(), []
    for report in reports:
        named = entities_in(report.text, [*HEADINGS])
        stated = {entity: FORM.findall(rules(report.text, [entity]))[0][0] for entity in named}
        rows += [(report.name, e, stated.get(e, ""), bool(report.headings & {*HEADINGS[e]})) for e in HEADINGS]
    return pd.DataFrame(rows, columns=["report", "entity", "stated", "coded"])


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Precision and recall of the statements by entity, the most often coded first, and all entities together in the
    last row.

    Args:
        rows: of `statements`.

    Columns: entity; coded, positive, negated (reports); precision, recall, and the fraction of negated ones that are
    coded, in percent (NaN if there are none).
    """
    positive, negated = rows.stated.isin(["is", "may be"]), rows.stated == "is no"
    counts = pd.DataFrame({"coded": rows.coded, "positive": positive, "negated": negated})
    counts = counts.assign(hit=positive & rows.coded, wrong=negated & rows.coded).groupby(rows.entity).sum()
    counts = counts.sort_values("coded", ascending=False, kind="stable")
    counts.loc["all"] = counts.sum()
    rates = {
        "precision": 100 * counts.hit / counts.positive,
        "recall": 100 * counts.hit / counts.coded,
        "negated, yet coded": 100 * counts.wrong / counts.negated,
    }
    return counts[["coded", "positive", "negated"]].assign(**rates).reset_index()


def misses(rows: pd.DataFrame) -> pd.DataFrame:
    """The reasons why coded entities are not stated as positive, by entity, the most frequent first.

    Columns: entity, `not named` (the report has no word of `ENTITIES` for it) and `negated` (its sentence has a
    negation, possibly of another finding), in reports.
    """
    missed = rows[rows.coded & ~rows.stated.isin(["is", "may be"])]
    names = {"": "not named", "is no": "negated"}
    table = pd.crosstab(missed.entity, missed.stated.map(names)).reindex(columns=[*names.values()], fill_value=0)
    order = table.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return table.loc[order].rename_axis(columns=None).reset_index()
