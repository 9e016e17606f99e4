"""Write the files of a new paper: `python -m tools.new_paper adaptformer --like sa2vp`.

Facts are marked TODO where they are to be written, which `python -m tools.facts` names by file, line and key; functions
raise `NotImplementedError`. Parameters, results, precision, diagram, and miniatures of the data sets are those of the
paper it is like.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
import yaml

from companion.errors import BadParameter, CompanionError, check_choice
from companion.io import papers
from companion.runs import notebooks

ROOT = Path(__file__).parents[1]
FINDINGS = "- {topic: TODO, kind: surprise, code: TODO, here: TODO}\n"
MODEL = '''"""{slug}: TODO."""

from __future__ import annotations

from torch import Tensor, nn


class Model(nn.Module):
    """TODO."""

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError("models/{slug}/model.py: Model.forward")
'''
FUNCTION = '''"""{slug}: TODO."""

from __future__ import annotations

from typing import Any


def {name}(*args: Any, **options: Any) -> Any:
    """TODO."""
    raise NotImplementedError("{file}: {name}")
'''
HOOKS = '''"""{slug}: TODO."""

from __future__ import annotations

from tests.papers.common import Training
from tests.papers.{like} import EXAMPLE, FAULTS, RUNS, small, write

__all__ = ["EXAMPLE", "FAULTS", "RUNS", "small", "write"]

TRAININGS: dict[str, Training] = {{}}
'''
PAGE = "# `{slug}`: TODO\n\n*TODO → TODO.*\n\n```python\n# TODO\n```\n"
FUNCTIONS = {  # what is to be written first in each file
    "lib/companion/models/{}/official.py": "from_official",
    "lib/companion/models/{}/recipe.py": "run",
    "lib/companion/models/{}/figures.py": "first",
    "lib/companion/toy/{}.py": "train",
    "benchmarks/{}.py": "ours",
    "tests/models/{}/test_model.py": "test_model",
}


class Flow(yaml.SafeDumper):
    """Writes lists of plain values on a line."""

    def represent_sequence(self, tag: str, sequence: Iterable, flow_style: bool | None = None) -> yaml.SequenceNode:
        """The node of a list."""
        plain = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def facts(slug: str, like: Mapping) -> dict[str, object]:
    """The content of `paper.yaml`, with those facts of a paper that it shares with a new one."""
    todo = dict.fromkeys(("name", "title", "venue"), "TODO")
    row = {"id": "TODO", "title": "TODO", "metric": "TODO", "unit": "TODO", "columns": ["TODO"], "rows": []}
    texts = dict.fromkeys(("method", "headline", "question", "figure"), "TODO")
    return {
        "slug": slug,
        **todo,
        "arxiv": "TODO",
        "authors": ["TODO, TODO"],
        "task": like["task"],
        "code": {"repositories": {}, "licence": "TODO"},
        "precision": like["precision"],
        "parameters": like["parameters"],
        **texts,
        "data_built_for": {"TODO": "TODO"},
        "findings": [{"text": "TODO"} for _ in range(3)],
        "claims": [{"id": "parity", "kind": "implementation check", "text": "TODO"}],
        "evidence": dict.fromkeys(("subject", "runs", "data"), "TODO"),
        "weights": [],
        "runs": [],
        "results": {key: like["results"][key] for key in ("keys", "values")},
        "protocol": {"TODO": "TODO"},
        "not_found": ["TODO"],
        "tables": [row | {"provenance": "TODO"}],
    }


def notebook(slug: str, like: str) -> nbformat.NotebookNode:
    """The cells that every paper's notebook has."""
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    opening = f'from companion.runs import report\n\nreport.opening("{slug}")'
    output = {"tags": ["nbval-ignore-output"]}
    cells = [text("# TODO"), code(opening, metadata=output), text("> **Data.** TODO")]
    cells += [code(notebooks.parameters_cell(like), metadata={"tags": ["parameters"]})]
    cells += [code(f'run = report.start("{slug}", globals())\np = run.parameters'), text("## Method\n\nTODO")]
    cells += [text("## Take-aways and limits\n\nTODO"), code("run.close()", metadata=output)]
    for number, cell in enumerate(cells):
        cell["id"] = f"{number:02}"
    metadata = {"kernelspec": notebooks.KERNEL, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write(slug: str, like: str, root: Path = ROOT) -> list[Path]:
    """The files written below `root`. Raises `BadParameter` for a slug that exists or is no name."""
    check_choice("like", like, papers.slugs())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug) or slug in papers.slugs():
        raise BadParameter("slug", slug, "a new name of a-z, 0-9 and _")
    folder = f"lib/companion/models/{slug}"
    files = {
        file.format(slug): FUNCTION.format(slug=slug, file=file.format(slug), name=n) for file, n in FUNCTIONS.items()
    }
    files |= {
        f"{folder}/paper.yaml": yaml.dump(
            facts(slug, papers.paper(like)), Dumper=Flow, sort_keys=False, allow_unicode=True, width=120
        ),
        f"{folder}/findings.yaml": FINDINGS,
        f"{folder}/threads.yaml": "threads: {}\nlower:\n- {see: TODO, cause: TODO, set: TODO}\n",
        f"{folder}/architecture.svg": Path(papers.diagram(like)).read_text(encoding="utf-8"),
        f"{folder}/model.py": MODEL.format(slug=slug),
        f"{folder}/__init__.py": f'"""{slug}: TODO."""\n\nfrom .model import Model\n\n__all__ = ["Model"]\n',
        f"site/docs/own_data/{slug}.md": PAGE.format(slug=slug),
        f"tests/papers/{slug}.py": HOOKS.format(slug=slug, like=like),
        f"notebooks/{slug}.ipynb": nbformat.writes(notebook(slug, like)) + "\n",
    }
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    return [root / file for file in files]


def main() -> int:
    """Write the files of a paper and print their names; 1 where the slug is refused."""
    parser = argparse.ArgumentParser(prog="tools.new_paper", description=main.__doc__)
    parser.add_argument("slug")
    parser.add_argument("--like", required=True, help="a paper whose parameters and data sets it shares")
    given = parser.parse_args()
    try:
        print(*write(given.slug, given.like), "python -m tools.facts names what is left to write", sep="\n")
    except CompanionError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
