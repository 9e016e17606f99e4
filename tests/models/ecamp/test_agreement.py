"""Precision, recall and misses of the rules, by counting on reports that are made up."""

import math

import pytest

from companion.data.openi import Report
from companion.models.ecamp import agreement
from companion.models.ecamp.distil import ENTITIES

REPORTS = [
    Report("1", "There is a small effusion. No edema.", frozenset({"Pleural Effusion"})),
    Report("2", "No effusion. There may be edema.", frozenset({"Pleural Effusion", "Pulmonary Edema"})),
    Report("3", "Effusions on both sides.", frozenset({"normal"})),
    Report("4", "Fluid in the pleura.", frozenset({"Hydropneumothorax"})),
]


def test_entities_are_of_the_released_list():
    assert set(agreement.HEADINGS) <= set(ENTITIES)


def test_statements_precision_recall_and_misses():
    rows = agreement.statements(REPORTS)
    assert len(rows) == len(REPORTS) * len(agreement.HEADINGS)
    stated = rows.set_index(["report", "entity"]).stated
    assert list(stated[:, "effusion"]) == ["is", "is no", "is", ""]
    assert list(stated[:, "edema"]) == ["is no", "may be", "", ""]
    table = agreement.agreement(rows).set_index("entity")
    assert list(table.loc["effusion", ["coded", "positive", "negated"]]) == [3, 2, 1]
    assert table.precision["effusion"] == 50 and table.recall["effusion"] == pytest.approx(100 / 3)
    assert table["negated, yet coded"]["effusion"] == 100 and table["negated, yet coded"]["edema"] == 0
    assert table.precision["edema"] == table.recall["edema"] == 100
    assert math.isnan(table.precision["hernia"]) and math.isnan(table.recall["hernia"])
    assert table.index[0] == "effusion" and table.index[-1] == "all"
    assert list(table.loc["all", ["coded", "positive", "negated"]]) == [5, 3, 2]  # the last is hydropneumothorax, twice
    missed = agreement.misses(rows).set_index("entity")
    assert missed.loc["effusion"].to_dict() == {"not named": 1, "negated": 1}
    assert missed.loc["pneumothorax"].to_dict() == {"not named": 1, "negated": 0}
    assert list(missed.index) == ["effusion", "pneumothorax"]
