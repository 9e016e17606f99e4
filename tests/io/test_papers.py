"""Parameters are converted by their rules in paper.yaml, and the rules match the code."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from companion.data import DATASETS
from companion.errors import BadParameter
from companion.io.papers import FINDINGS, convert, findings, paper, slugs
from companion.models.metasegnet import Prompts
from companion.runs.report import start
from tests.conftest import ROOT
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


def sets(task):
    """The names of a task's real data sets."""
    return [name for name, found in DATASETS.items() if found.task == task and found.group != "pocket"]


def of(slug, module, name):
    return [*getattr(import_module(f"companion.models.{slug}.{module}"), name)]


TASKS = {"dplq": "domains", "ecamp": "xrays", "hvit": "slides", "metasegnet": "landcover", "promptpar": "attributes"}
TASKS |= {"sa2vp": "classification", "tip": "restoration"}
UNUSED = {"landcover/uavid"}  # sets with a reader and without published settings of a paper here
IN_CODE = {(slug, "dataset"): [*({*sets(task)} - UNUSED), "folder"] for slug, task in TASKS.items()} | {
    ("bat", "dataset"): sets("tracking"),
    ("dmt", "dataset"): ["", *sets("pretraining"), "folder"],
    ("sic_cads", "dataset"): sets("detection"),
    ("dplq", "targets"): sets("domains"),
    ("dplq", "protocol"): ["base to novel", *of("dplq", "recipe", "TRANSFERS")],
    ("hvit", "position"): [kind for kind in of("hvit", "model", "POSITIONS") if not kind.startswith("2d")],
    ("metasegnet", "prompt"): of("metasegnet", "prompts", "PLAIN") + of("metasegnet", "prompts", "EXCHANGED"),
    ("metasegnet", "augmentation"): ["recipe", *of("metasegnet", "maps", "AUGMENTATIONS")],
    ("metasegnet", "held_out"): ["", *Prompts.read().zones],
}
NAMED = """bat method recipe METHODS, dmt teachers official RELEASED, dmt losses recipe LOSSES, dmt task recipe USUAL,
hvit head model HEADS,
metasegnet method prompts LEVELS, promptpar method recipe METHODS,
tip method recipe METHODS"""
IN_CODE |= {(slug, name): of(slug, *where) for slug, name, *where in map(str.split, NAMED.split(","))}


@pytest.mark.parametrize(("slug", "name"), IN_CODE)
def test_accepted_values_are_those_of_the_code(slug, name):
    assert sorted(paper(slug)["parameters"][name]["choices"]) == sorted(IN_CODE[slug, name])


@pytest.mark.parametrize("slug", slugs())
def test_findings_name_recorded_cases(slug):
    recorded = {path.name for root in ("parity", "recipes") for path in (ROOT / "tests" / root / slug).glob("*/")}
    for row in findings(slug):
        assert row["kind"] in FINDINGS and row["topic"] and row["code"] and row["here"], row
        assert not row["case"] or row["case"] in recorded, row


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
def test_a_protocol_names_what_the_recipe_has(slug):
    assert all(import_module(f"companion.models.{slug}.recipe").protocol().values())
