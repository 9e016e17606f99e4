"""Evaluates the rules of `distil` on real reports: their statements compared with the headings assigned by coders.

A report is positive for an entity when its statement is "There is X." or "There may be X.". The headings are a
reference, not ground truth: coders omit old or unimportant findings, and may use another heading.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...data.openi import Report
from .distil import FORM, Rules, entities_in

# The MeSH headings of entities of the released list. Chosen by name, before any result was seen; entities without a
# heading (aorta, silhouette, contour ...) are left out.
HEADINGS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("Pulmonary Atelectasis",),
    "calcification": ("Calcinosis",),
    "cardiomegaly": ("Cardiomegaly",),
    "catheter": ("Catheters, Indwelling",),
    "chf": ("Heart Failure",),
    "congestion": ("Pulmonary Congestion",),
    "consolidation": ("Consolidation",),
    "COPD": ("Pulmonary Disease, Chronic Obstructive",),
    "deformity": ("Deformity",),
    "edema": ("Pulmonary Edema",),
    "effusion": ("Pleural Effusion", "Pericardial Effusion", "Hydropneumothorax"),
    "emphysema": ("Pulmonary Emphysema", "Emphysema", "Subcutaneous Emphysema"),
    "fibrosis": ("Pulmonary Fibrosis", "Fibrosis"),
    "fracture": ("Fractures, Bone",),
    "granuloma": ("Granuloma", "Calcified Granuloma", "Granulomatous Disease"),
    "hernia": ("Hernia, Hiatal",),
    "infiltrate": ("Infiltrate",),
    "mass": ("Mass",),
    "nodule": ("Nodule",),
    "opacity": ("Opacity",),
    "pneumonia": ("Pneumonia",),
    "pneumothorax": ("Pneumothorax", "Hydropneumothorax"),
    "thickening": ("Thickening",),
}


def statements(reports: Sequence[Report]) -> pd.DataFrame:
    """The rules' statement on each entity of `HEADINGS` in each report, one row per pair.

    Columns: report, entity, `stated` ("is", "may be", "is no", or "" if the report does not name it), `coded` (whether
    it has a heading).
    """
    rules, rows = Rules(), []
    for report in reports:
        stated = {}
        for entity in entities_in(report.text, tuple(HEADINGS)):
            match = FORM.match(rules(report.text, [entity]))
            assert match is not None
            stated[entity] = match[1]
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
    rows = rows.assign(positive=rows.stated.isin(["is", "may be"]), negated=rows.stated == "is no")
    both = rows.assign(hit=rows.positive & rows.coded, wrong=rows.negated & rows.coded)
    counted = both.groupby("entity")[["coded", "positive", "negated", "hit", "wrong"]].sum()
    counted = counted.sort_values("coded", ascending=False, kind="stable")
    counted.loc["all"] = counted.sum()
    table = counted[["coded", "positive", "negated"]].copy()
    table["precision"] = 100 * counted.hit / counted.positive.where(counted.positive > 0)
    table["recall"] = 100 * counted.hit / counted.coded.where(counted.coded > 0)
    table["negated, yet coded"] = 100 * counted.wrong / counted.negated.where(counted.negated > 0)
    return table.reset_index()


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
