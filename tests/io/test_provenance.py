"""The files that a notebook depends on, in a small package made for the test, and their hash."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion.io import provenance


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .saving import save\n",
        "errors.py": "",
        "saving.py": "from .models import one\n",
        "backbones.py": "from .errors import X\nNAMES = ('vit', 'vit_sets.yaml')\n",
        "training/fit.py": "import torch\nfrom .. import errors\n",
        "models/__init__.py": "",
        "models/one.py": "from ..backbones import build\n",
        "models/two.py": "def late():\n    import companion.training.fit\n",
        "toy/__init__.py": "",
        "toy/encoders/weights/vit.safetensors": "w",
        "toy/encoders/weights/vit.md": "a model card",
        "toy/encoders/weights/tracker.safetensors": "w",
        "data/vit_sets.yaml": "sets: []",
        "data/other_sets.yaml": "sets: []",
        "models/nb/paper.yaml": "title: x",
        "models/nb/findings.yaml": "[]",
        "models/nb/threads.yaml": "lower: []",
    }
    for name, text in files.items():
        path = tmp_path / "companion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "companion"


def notebook(folder: Path, *cells: str, name: str = "nb") -> Path:
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *map(new_code_cell, cells)]), path)
    return path


def names(path: Path, package: Path) -> set[str]:
    return {file.relative_to(package).as_posix() for file in provenance.sources(path, package)}


TWO = {"__init__.py", "models/__init__.py", "models/two.py", "training/fit.py", "errors.py"}


def test_imports_of_every_form_are_followed(package: Path, tmp_path: Path) -> None:
    path = notebook(tmp_path, "%matplotlib inline\nfrom companion.models import two\n!ls", "if True:\n    import numpy")
    assert names(path, package) == {*TWO, *(f"models/nb/{name}.yaml" for name in ("paper", "findings", "threads"))}
    assert names(package / "models" / "two.py", package) == TWO  # a module counts itself


def test_what_the_package_imports_on_first_access_counts_where_it_is_named(package: Path, tmp_path: Path) -> None:
    late = {"saving.py", "models/one.py"}
    for cell in ("import companion", "import companion\ncompanion.save(1)", "from companion import save"):
        assert names(notebook(tmp_path, cell), package) & late == (late if "save" in cell else set())


def test_pocket_weights_and_sets_count_where_they_are_named(package: Path, tmp_path: Path) -> None:
    found = names(notebook(tmp_path, "import companion.models.one as m", name="other"), package)
    assert {name for name in found if not name.endswith(".py")} == {
        "toy/encoders/weights/vit.safetensors",
        "data/vit_sets.yaml",
    }


def test_hash_ignores_what_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.py"

    def hashed(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return provenance.code_hash([path])

    before = hashed('def f():\n    """Old."""\n    return "# kept"\n')
    assert hashed('"""New."""\n\n\ndef f():\n    """Élan,\n    new."""  # why\n\n    return (\n"# kept")\n') == before
    assert hashed('def f():\n    """Old."""\n    return "# other"\n') != before
    assert hashed('def f():\n    """Old."""\nreturn_ = "# kept"\n') != before
    (tmp_path / "a.bin").write_bytes(b"# a")
    before = provenance.code_hash([tmp_path / "a.bin"])
    (tmp_path / "a.bin").write_bytes(b"# b")
    assert provenance.code_hash([tmp_path / "a.bin"]) != before


def test_needs_only_the_standard_library() -> None:
    """The Snakefile imports it for every run: it must not bring torch in."""
    code = "import sys, companion.io.provenance; print({'torch', 'numpy', 'yaml', 'nbformat'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
