"""Tables as HTML."""

from __future__ import annotations

import html
import math
import re

import pandas as pd
from IPython.display import HTML
from pandas.api.types import is_bool_dtype, is_numeric_dtype


def escape(text: object) -> str:
    """Text on one line as HTML and Markdown show it verbatim: for what comes from a file outside of the library, such
    as class names, names of data sets and measured rows."""
    plain = html.escape(" ".join(str(text).split()))
    return re.sub(r"[\\`*_{}\[\]|$~]", lambda found: f"&#{ord(found[0])};", plain)


def show_table(frame: pd.DataFrame, digits: int = 2, title: str = "") -> HTML:
    """A table as plain HTML with its title above: the same text for the same numbers with any version of pandas.

    Title, names and cells are shown verbatim, but underscores of column names become spaces; numbers from 10,000 on
    have separators; a line does not break at ±. A frame without rows says "none".
    """

    def text(value: object) -> str:
        return escape(value).replace(" ± ", "&nbsp;±&nbsp;")

    def cell(value: object) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'<td style="text-align: right">{_number(value, digits)}</td>'
        return f'<td style="text-align: left">{"–" if value is None else text(value)}</td>'

    def head(name: object, kind: object) -> str:
        side = "right" if is_numeric_dtype(kind) and not is_bool_dtype(kind) else "left"
        return f'<th scope="col" style="text-align: {side}">{text(str(name).replace("_", " "))}</th>'

    header = "".join(map(head, frame.columns, frame.dtypes))
    rows = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in frame.itertuples(index=False))
    rows = rows or f'<tr><td colspan="{len(frame.columns)}" style="text-align: left">none</td></tr>\n'
    caption = f'<caption style="caption-side: top; text-align: left"><b>{text(title)}</b></caption>\n' if title else ""
    table = f'<table class="dataframe">\n{caption}<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'
    return HTML(f'<div style="overflow-x: auto">{table}</div>')


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    separator = "," if abs(value) >= 10_000 else ""  # a year has none
    shown = f"{value:{separator}}" if isinstance(value, int) else f"{value:{separator}.{digits}f}"
    return shown.removeprefix("-") if not float(shown.replace(",", "")) else shown  # no -0.00
