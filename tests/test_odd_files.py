"""Unusual user files: each is read correctly, or refused by name and reason."""

import re

import pytest

from companion.errors import CompanionError
from tests.robust_odd import ODD, agrees


@pytest.mark.parametrize("name", ODD)
def test_it_is_read_right_or_refused(name, tmp_path):
    read, expected = ODD[name]
    if not isinstance(expected, str):
        found = read(tmp_path)
        assert agrees(found, expected), found
        return
    with pytest.raises(CompanionError) as raised:
        pytest.fail(f"was read: {read(tmp_path)}")
    said = str(raised.value)
    assert re.search(f"(?s){expected}", said) and (tmp_path.name in said or name.startswith("results: ")), said
