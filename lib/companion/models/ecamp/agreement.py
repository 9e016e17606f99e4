"""Evaluates the rules of `distil` on real reports: their statements compared with the headings assigned by coders.

A report is positive for an entity when its statement is "There is X." or "There may be X.". The headings are a
reference, not ground truth: coders omit old or unimportant findings, and may use another heading.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...data.openi import Report
from ...io.papers import paper
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

    Columns: entity; coded, positive, negated (reports); precision and recall in percent (NaN if there are none).
    """
    positive, negated = rows.stated.isin(["is", "may be"]), rows.stated == "is no"
    counts = pd.DataFrame({"coded": rows.coded, "positive": positive, "negated": negated, "hit": positive & rows.coded})
    counts = counts.groupby(rows.entity).sum().sort_values("coded", ascending=False, kind="stable")
    counts.loc["all"] = counts.sum()
    hit = 100 * counts.pop("hit")
    return counts.assign(precision=hit / counts.positive, recall=hit / counts.coded).reset_index()
