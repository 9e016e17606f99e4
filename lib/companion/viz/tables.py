"""Tables as HTML."""

from __future__ import annotations

import html
import math
import re

import pandas as pd
from IPython.display import HTML


def show_table(frame: pd.DataFrame, digits: int = 2, title: str = "") -> HTML:
    """A table as plain HTML with its title above: the same text for the same numbers with any version of pandas.

    What stands between backticks, in title, names and cells, becomes code; underscores of other column names become
    spaces; numbers from 10,000 on have separators.
    """

    def text(value: object) -> str:
        return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(str(value)))

    def cell(value: object) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'<td style="text-align: right">{_number(value, digits)}</td>'
        return f'<td style="text-align: left">{"–" if value is None else text(value)}</td>'

    names = (text(name if "`" in str(name) else str(name).replace("_", " ")) for name in frame.columns)
    header = "".join(f'<th scope="col" style="text-align: left">{name}</th>' for name in names)
    rows = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in frame.itertuples(index=False))
    caption = f'<caption style="caption-side: top; text-align: left"><b>{text(title)}</b></caption>\n' if title else ""
    table = f'<table class="dataframe">\n{caption}<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'
    return HTML(f'<div style="overflow-x: auto">{table}</div>')


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    separator = "," if abs(value) >= 10_000 else ""  # a year has none
    shown = f"{value:{separator}}" if isinstance(value, int) else f"{value:{separator}.{digits}f}"
    return shown.removeprefix("-") if not float(shown.replace(",", "")) else shown  # no -0.00
