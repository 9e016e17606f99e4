"""Precision and recall of the rules, by counting on reports that are made up."""

import numpy as np

from companion.data.openi import Report
from companion.models.ecamp import agreement
from companion.models.ecamp.distil import ENTITIES

REPORTS = [
    Report("1", "There is a small effusion. No edema.", frozenset({"Pleural Effusion"})),
    Report("2", "No effusion. There may be edema.", frozenset({"Pleural Effusion", "Pulmonary Edema"})),
    Report("3", "Effusions on both sides.", frozenset({"normal"})),
    Report("4", "Fluid in the pleura.", frozenset({"Hydropneumothorax"})),
]


def test_statements_precision_and_recall():
    assert set(agreement.HEADINGS) <= set(ENTITIES)
    rows = agreement.statements(REPORTS)
    stated = rows.set_index(["report", "entity"]).stated
    assert list(stated[:, "effusion"]) == ["is", "is no", "is", ""]
    assert list(stated[:, "edema"]) == ["is no", "may be", "", ""]
    table = agreement.agreement(rows).set_index("entity")
    expected = {
        "effusion": [3, 2, 1, 50, 100 / 3],
        "edema": [1, 1, 1, 100, 100],
        "hernia": [0, 0, 0, np.nan, np.nan],
        "all": [5, 3, 2, 200 / 3, 40],  # hydropneumothorax counts twice
    }
    for entity, values in expected.items():
        np.testing.assert_allclose(table.loc[entity].astype(float), values)
    assert (table.index[0], table.index[-1]) == ("effusion", "all")
