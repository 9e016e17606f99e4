"""The facts of the papers: all references resolve."""

import pytest

from companion.data import DATASETS
from companion.evaluation.tables import published_table
from companion.io.papers import paper, slugs
from tests.conftest import parameters


@pytest.mark.parametrize("slug", slugs())
def test_the_facts_name_what_there_is(slug):
    facts = paper(slug)
    tables, claims = ([part["id"] for part in facts[kind]] for kind in ("tables", "claims"))
    assert len(set(tables)) == len(tables) and len(set(claims)) == len(claims)
    assert all(published_table(slug, name).attrs["provenance"] for name in tables)
    weights = {part["name"] for part in facts["weights"]}
    for run in facts["runs"]:
        assert set(run["tables"]) <= set(tables) and set(run["weights"]) <= weights
        assert [n for n in DATASETS if n == run["data"] or (run["data"].endswith("/") and n.startswith(run["data"]))]
    assert set(facts["parameters"]) <= set(vars(parameters(slug)))
