"""What a paper lacks is named: the files that are found by its slug, and the hooks of the tests."""

import pytest

from companion.io.files import read_json
from companion.io.papers import slugs
from tests.conftest import ROOT
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


def test_recorded_cases_are_of_a_paper_and_whole():
    for case in [*ROOT.glob("tests/parity/*/*/case.json"), *ROOT.glob("tests/recipes/*/*/case.json")]:
        assert case.parts[-3] in slugs(), f"{case}: {case.parts[-3]} is no paper"
        compared = case.parts[-4] == "parity" and "inputs" in read_json(case)  # all others have a test of their own
        assert not compared or (case.parent / "outputs.safetensors").exists(), f"{case.parent} has no outputs"
