"""Real data sets are found where the variable says, and what is missing is named."""

import pytest

from companion.data import real
from companion.errors import MissingData

FACTS = {"title": "Cells, a part", "layout": "cells/<name>.jpg", "source": "example.org/cells", "licence": "CC0"}


def test_the_variable_names_the_folder(tmp_path, monkeypatch):
    (tmp_path / "cells" / "images").mkdir(parents=True)
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    assert real.folder("cells/images", **FACTS) == real.folder("cells", **FACTS) == tmp_path / "cells"


@pytest.mark.parametrize("value", ["", None])
def test_without_it_the_checkouts_data_are_searched(value, root, monkeypatch):
    monkeypatch.delenv("COMPANION_REAL_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("COMPANION_REAL_DATA", value)
    assert real.root() == root / "data"


def test_a_missing_part_is_named(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"(?s)Cells.*labels.csv.*COMPANION_REAL_DATA.*<name>.*example.org.*CC0"):
        real.folder("cells/labels.csv", **FACTS)
