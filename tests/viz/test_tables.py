"""Tables as the notebooks show them."""

import math
import re

import pandas as pd
import pytest

from companion.viz.tables import show_table


def test_text_is_escaped_and_gaps_are_dashes():
    text = show_table(pd.DataFrame({"a<b": ["<script>", None], "x": [math.nan, 1.239]})).data
    assert "&lt;script&gt;" in text and "a&lt;b" in text and text.count("–") == 2 and "1.24" in text
    assert "<script>" not in text and "caption" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2023, "2023"),
        (315264, "315,264"),
        (-12345.678, "-12,345.68"),
        (9999.5, "9999.50"),
        (-0.001, "0.00"),
        (0, "0"),
        (True, "True"),
        ("12345", "12345"),
    ],
)
def test_numbers(value, shown):
    assert re.findall("<td[^>]*>(.*?)</td>", show_table(pd.DataFrame({"x": [value]})).data) == [shown]


def test_names_are_words_and_backticks_code():
    table = show_table(pd.DataFrame({"mean_of_3": ["`a_b` | c"], "`d_e`": [1]}), title="of `lr` & more").data
    assert re.findall("<th [^>]*>(.*?)</th>", table) == ["mean of 3", "<code>d_e</code>"]
    assert '<td style="text-align: left"><code>a_b</code> | c</td>' in table
    assert "<b>of <code>lr</code> &amp; more</b>" in table
