"""What a paper lacks is named: the files that are found by its slug, and the hooks of the tests."""

import re

import pytest

from companion.io.papers import slugs
from tests.conftest import ROOT
from tests.papers.common import hooks

FILES = ["lib/companion/toy/{}.py", "notebooks/{}.ipynb", "benchmarks/{}.py", "tests/papers/{}.py", "tests/models/{}"]
FILES += ["reports/bench/{}.json", "reports/pocket/{}"]
FILES += [
    f"lib/companion/models/{{}}/{name}" for name in ("recipe.py", "findings.yaml", "threads.yaml", "architecture.svg")
]
HOOKS = ("small", "TRAININGS", "EXAMPLE", "write", "RUNS", "FAULTS")
ROWS = {  # files that all papers share: where each has a row
    "README.md": r"notebooks/{}\.ipynb",
    "site/docs/own_data.md": r"(?m)^## `{}`",
}


@pytest.mark.parametrize("slug", slugs())
def test_nothing_is_missing(slug):
    missing = [path for path in (file.format(slug) for file in FILES) if not (ROOT / path).exists()]
    if f"tests/papers/{slug}.py" not in missing:
        missing += [f"tests/papers/{slug}.py: {name}" for name in HOOKS if not hasattr(hooks(slug), name)]
    for file, row in ROWS.items():
        if not re.search(row.format(slug), (ROOT / file).read_text(encoding="utf-8")):
            missing.append(f"{file}: a row of {slug}")
    assert not missing, "\n".join(["", *missing])
