"""Tables are read row by row, and a refusal names the line of the file."""

import pytest

from companion.data import tables
from companion.errors import CorruptFile
from tests.data.conftest import refused

TABLE = '\ufeff# a comment\nname,text\na,"two\nlines"\n\nb,c'


def test_rows_have_the_lines_of_the_file_and_are_read_one_by_one(tmp_path):
    (path := tmp_path / "a.csv").write_text(TABLE)
    first, second = {"name": "a", "text": "two\nlines"}, {"name": "b", "text": "c"}
    assert [*tables.rows(path, "text")] == [(4, first), (6, second)]
    assert tables.columns(path, "text", "name") == (("two\nlines", "c"), ("a", "b"))
    path.write_text(TABLE + "\n\0")
    found = tables.stream(path)
    assert next(found) == (4, first) and next(found) == (6, second)
    refused(CorruptFile, "line 7: no text, it has a byte of 0", next, found)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TABLE + ",d", "line 6: 2 cells"),
        (TABLE + "\nd", "line 7: 2 cells"),
        ("name,name\n", "two columns are called 'name'"),
        ("text\n", "has no column name; its columns are .'text'"),
        ("", "has no column name"),
        (b"name\n\xff", "no text in UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, words):
    (path := tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(CorruptFile, words, tables.columns, path, "name")
