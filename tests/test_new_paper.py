"""The files of a new paper are complete, and what is left to write is named."""

import ast
import subprocess
import sys

import pytest

from companion.errors import BadParameter
from tests.papers.test_hooks import FILES
from tools import facts, new_paper


def test_what_is_left_is_named(tmp_path):
    files = new_paper.write("another_paper", "AnotherPaper", "sa2vp", tmp_path)
    measured = ("reports/",)  # by the study and the benchmark
    assert all((tmp_path / file.format("another_paper")).exists() for file in FILES if not file.startswith(measured))
    for file in files:
        if file.suffix == ".py":
            ast.parse(file.read_text(encoding="utf-8"))
    folder = tmp_path / "lib/companion/models/another_paper"
    named = [line.split(": ")[:2] for line in facts.check_paper(folder)]
    for name in ("paper", "findings", "threads"):
        file = folder / f"{name}.yaml"
        rows = file.read_text(encoding="utf-8").splitlines()
        left = {f"{file}:{number}" for number, row in enumerate(rows, 1) if "TODO" in row}
        assert left and left <= {place for place, _ in named}
    assert "authors.0" in [key for _, key in named]


@pytest.mark.parametrize("slug", ["sa2vp", "Adapt-Former", "../x"])
def test_slugs_that_are_refused(slug, tmp_path):
    with pytest.raises(BadParameter, match="slug"):
        new_paper.write(slug, "AdaptFormer", "sa2vp", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "config"), [(".py", "pyproject.toml"), (".ipynb", "notebooks/ruff.toml")])
def test_the_files_are_as_lint_wants_them(kind, config, tmp_path):
    written = new_paper.write("another_paper", "AnotherPaper", "sa2vp", tmp_path)
    files = [path for path in written if path.suffix == kind]
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--config", new_paper.ROOT / config, *files]
        done = subprocess.run(command, capture_output=True, text=True)
        assert files and not done.returncode, done.stdout
