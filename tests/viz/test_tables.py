"""Tables as the notebooks show them."""

import html
import math
import re

import pandas as pd

from companion.viz.tables import show_table


def cells(*values: object) -> list[str]:
    return re.findall("<td[^>]*>(.*?)</td>", show_table(pd.DataFrame({"x": pd.Series(values, dtype=object)})).data)


def test_numbers_have_separators_and_no_noise():
    shown = {2023: "2023", 315264: "315,264", -12345.678: "-12,345.68", 9999.5: "9999.50", -0.001: "0.00"}
    assert cells(*shown) == list(shown.values())
    assert cells(True, "12345", None, math.nan) == ["True", "12345", "–", "–"]


def test_text_is_shown_verbatim():
    table = show_table(pd.DataFrame({"mean_of_3": ["`a_b` | c", "<script>"]}), title="of `lr` & more").data
    assert ">mean of 3</th>" in table and "<script>" not in table and "`" not in table and "|" not in table
    assert all(shown in html.unescape(table) for shown in ("`a_b` | c", "<script>", "<b>of `lr` & more</b>"))


def test_headers_stand_above_their_numbers():
    frame = pd.DataFrame({"n": [1, 2], "ok": [True, False], "spread": ["1.0 ± 0.1", "2.0 ± 0.2"]})
    sides = re.findall(r"<th [^>]*text-align: (\w+)\">", show_table(frame).data)
    assert sides == ["right", "left", "left"] and "1.0&nbsp;±&nbsp;0.1" in show_table(frame).data


def test_a_table_without_rows_says_so():
    assert len(cells()) == 1
