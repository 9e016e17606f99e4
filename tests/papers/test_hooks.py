"""What a paper lacks is named: the files that are found by its slug, the tests' hooks, tests of its parameters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from companion.io.files import read_json
from companion.io.papers import slugs
from tests.conftest import ROOT, parameters
from tests.papers.common import hooks

FILES = ["lib/companion/toy/{}.py", "notebooks/{}.ipynb", "benchmarks/{}.py", "tests/papers/{}.py", "tests/models/{}"]
FILES += ["reports/bench/{}.json", "reports/pocket/{}", "site/docs/own_data/{}.md"]
FILES += [
    f"lib/companion/models/{{}}/{name}" for name in ("recipe.py", "findings.yaml", "threads.yaml", "architecture.svg")
]
HOOKS = ("small", "TRAININGS", "EXAMPLE", "write", "RUNS", "FAULTS")


@pytest.mark.parametrize("slug", slugs())
def test_nothing_is_missing(slug):
    missing = [path for path in (file.format(slug) for file in FILES) if not (ROOT / path).exists()]
    if f"tests/papers/{slug}.py" not in missing:
        missing += [f"tests/papers/{slug}.py: {name}" for name in HOOKS if not getattr(hooks(slug), name, None)]
        missing += [f"tests/papers/{slug}.py: MODELS"] if not hasattr(hooks(slug), "MODELS") else []
    if f"notebooks/{slug}.ipynb" not in (ROOT / "README.md").read_text(encoding="utf-8"):
        missing.append(f"README.md: a row of {slug}, which `make notebooks` writes")
    assert not missing, "\n".join(["", *missing])


def given(path: Path) -> Iterator[tuple[object, ast.expr]]:
    """The keyword arguments and the dictionaries' entries in a test file: name and value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield from ((keyword.arg, keyword.value) for keyword in node.keywords)
        elif isinstance(node, ast.Dict):
            yield from ((getattr(key, "value", None), v) for key, v in zip(node.keys, node.values, strict=True))


@pytest.mark.parametrize("slug", slugs())
def test_a_test_sets_each_parameter_to_another_value_than_its_default(slug):
    """One of the paper's own, or one that is for all papers."""
    defaults = vars(parameters(slug))
    files = [ROOT / f"tests/papers/{slug}.py", *(ROOT / f"tests/models/{slug}").glob("*.py"), *ROOT.glob("tests/*.py")]
    files += [path for folder in ("rehearsal", "simulated", "training") for path in ROOT.glob(f"tests/{folder}/*.py")]
    found = [entry for path in files for entry in given(path) if entry[0] in defaults]
    set_ = {name for name, value in found if not (isinstance(value, ast.Constant) and value.value == defaults[name])}
    assert not (never := defaults.keys() - set_), f"{slug}: no test sets {', '.join(sorted(never))}"


def test_recorded_cases_are_of_a_paper_and_whole():
    for case in [*ROOT.glob("tests/parity/*/*/case.json"), *ROOT.glob("tests/recipes/*/*/case.json")]:
        assert case.parts[-3] in slugs(), f"{case}: {case.parts[-3]} is no paper"
        compared = case.parts[-4] == "parity" and "inputs" in read_json(case)  # all others have a test of their own
        assert not compared or (case.parent / "outputs.safetensors").exists(), f"{case.parent} has no outputs"
