"""Parameters are converted by their rules in paper.yaml; a file of facts that cannot be read is named."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from companion.errors import BadParameter, CorruptFile
from companion.io import papers
from companion.io.papers import convert, slugs
from companion.runs.report import start
from tests.models.common import refuses

LETTERS = ["a", "b"]


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ({"type": "switch"}, "false", False),
        ({"type": "switch"}, "True", True),
        ({"type": "integer", "low": 1, "high": 9}, 1, 1),
        ({"type": "integer", "low": 1, "high": 9}, "9", 9),
        ({"type": "integer", "low": 1, "zero": True}, 0, 0),
        ({"type": "number", "low": 0}, "1e-4", 1e-4),
        ({"type": "choice", "choices": ["2023", "2025"]}, 2025, "2025"),
        ({"type": "choice", "choices": [1024, 2048]}, "2048", 2048),
        ({"type": "text", "examples": ["a"]}, " b ", "b"),
        ({"type": "list", "choices": LETTERS}, "b,a ", "b, a"),
        ({"type": "list", "choices": LETTERS}, "", ""),
    ],
)
def test_parameters_are_converted(rule, value, expected):
    assert convert("name", value, rule) == expected


def test_a_parameter_that_is_not_accepted_is_refused_with_the_accepted_values():
    refuses(
        (lambda: convert("name", "maybe", {"type": "switch"}), "name = 'maybe'.*True, False"),
        (lambda: convert("name", "1.5", {"type": "integer", "low": 0, "high": 9}), "0 to 9"),
        (lambda: convert("name", 10, {"type": "integer", "low": 0, "high": 9}), "0 to 9"),
        (lambda: convert("name", "nan", {"type": "number", "low": 0}), "nan"),
        (lambda: convert("name", "c", {"type": "choice", "choices": LETTERS}), "'a', 'b'"),
        (lambda: convert("name", "a, c", {"type": "list", "choices": LETTERS}), "name = 'c'.*'a', 'b'"),
        (lambda: start("sa2vp", {"profile": "paper", "dataset": "nowhere"}), "dataset = 'nowhere'.*'fgvc/cub200'"),
        (lambda: start("sa2vp", {"profile": "paper", "study": True}), "profile"),
    )


def test_an_unknown_name_that_papermill_injected_is_refused(tmp_path, monkeypatch):
    """papermill itself warns only, and the notebook would run with the default."""
    given = {"profile": "pocket", "dataset": "vtab/dtd", "out": str(tmp_path / "out")}
    for name in ("dataset", "datset"):
        shell = SimpleNamespace(user_ns={"In": ["", "import companion\nx = 1", f'# Parameters\n{name} = "vtab/dtd"\n']})
        monkeypatch.setattr("companion.runs.report.get_ipython", lambda shell=shell: shell)
        if name == "dataset":
            start("sa2vp", given)
    with pytest.raises(BadParameter, match="'datset'"):
        start("sa2vp", given)


@pytest.mark.parametrize("slug", slugs())
def test_a_protocol_has_the_rows_that_a_reader_compares(slug):
    found = import_module(f"companion.models.{slug}.recipe").protocol()
    assert all(found.values()) and {"seeds", "precision"} <= found.keys()


@pytest.mark.parametrize("text", ["- a list", "name: [not closed", ""])
def test_facts_that_are_no_mapping_are_refused_with_their_file(text, tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "MODELS", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "paper.yaml").write_text(text)
    with pytest.raises(CorruptFile, match=r"own/paper\.yaml"):
        papers.paper("own")
