"""Write the files of a new paper: `python -m tools.new_paper adaptformer AdaptFormer --like sa2vp`.

The files of `tools/skeleton` train, test and show linear probing under the new name, from recipe to page: what the
paper adds takes its place. TODO marks what is to be written, which `python -m tools.facts` names by file and line. Data
sets, task, precision and backbones are those of the paper it is like.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from companion.errors import BadParameter, CompanionError, check_choice
from companion.io import papers
from companion.runs import notebooks

ROOT = Path(__file__).parents[1]
SKELETON = Path(__file__).parent / "skeleton"
MODEL = "lib/companion/models/{}"
PLACES = {  # of the files of the skeleton
    "model.py": f"{MODEL}/model.py",
    "official.py": f"{MODEL}/official.py",
    "recipe.py": f"{MODEL}/recipe.py",
    "figures.py": f"{MODEL}/figures.py",
    "init.py": f"{MODEL}/__init__.py",
    "findings.yaml": f"{MODEL}/findings.yaml",
    "threads.yaml": f"{MODEL}/threads.yaml",
    "toy.py": "lib/companion/toy/{}.py",
    "benchmark.py": "benchmarks/{}.py",
    "test_model.py": "tests/models/{}/test_model.py",
    "hooks.py": "tests/papers/{}.py",
    "own_data.md": "site/docs/own_data/{}.md",
}


class Flow(yaml.SafeDumper):
    """Writes lists of plain values on a line."""

    def represent_sequence(self, tag: str, sequence: Iterable, flow_style: bool | None = None) -> yaml.SequenceNode:
        """The node of a list."""
        plain = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def facts(slug: str, name: str, like: Mapping) -> dict[str, Any]:
    """The content of `paper.yaml`: what the skeleton computes, and TODO."""
    texts = dict.fromkeys(("method", "headline", "question"), "TODO")
    shared = {key: like["parameters"][key] for key in ("backbone", "dataset") if key in like["parameters"]}
    methods = {"type": "choice", "choices": [name, "linear probing", "full fine-tuning"]}
    methods |= {"choices_of": ["recipe:METHODS"], "help": "the method that the paper profile trains"}
    told = {
        "kind": "synthetic result",
        "text": "TODO",
        "tasks": ["textures"],
        "better": name,
        "worse": "linear probing",
    }
    published = {"id": "published", "title": "TODO", "metric": "top-1 accuracy", "unit": "percent", "columns": ["TODO"]}
    return {
        "slug": slug,
        "name": name,
        **dict.fromkeys(("title", "venue", "arxiv"), "TODO"),
        "authors": ["TODO, TODO"],
        "task": like["task"],
        "code": {"repositories": {}, "licence": "TODO"},
        "precision": like["precision"],
        "parameters": {"method": methods, **shared},
        **texts,
        "figure": "curves",
        "data_built_for": {"textures": "TODO"},
        "findings": [{"claim": "linear", "status": "fails", "text": "TODO"}, {"text": "TODO"}, {"text": "TODO"}],
        "claims": [{"id": "parity", "kind": "implementation check", "text": "TODO"}, {"id": "linear", **told}],
        "evidence": dict.fromkeys(("subject", "runs", "data"), "TODO"),
        "weights": like["weights"],
        "runs": [like["runs"][0] | {"title": "TODO", "tables": ["published"]}],
        "results": {"keys": ["backbone", "method", "dataset", "seed"], "values": ["accuracy"]},
        "not_found": ["TODO"],
        "tables": [published | {"rows": [], "provenance": "TODO"}],
    }


def notebook(text: str, parameters: str) -> nbformat.NotebookNode:
    """The notebook of a text whose cells begin with `# %%` and their kind or tag."""
    cells = []
    for number, (kind, source) in enumerate(re.findall(r"(?ms)^# %% ?([^\n]*)\n(.*?)(?=^# %%|\Z)", text)):
        source = source.strip().replace("PARAMETERS", parameters)
        if kind == "[markdown]":
            cells.append(nbformat.v4.new_markdown_cell(source))
        else:
            cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [kind]} if kind else {}))
        cells[-1]["id"] = f"{number:02}"
    metadata = {"kernelspec": notebooks.KERNEL, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write(slug: str, name: str, like: str, root: Path = ROOT) -> list[Path]:
    """The files written below `root`. Raises `BadParameter` for a slug that exists, or what is no name."""
    check_choice("like", like, papers.slugs())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug) or slug in papers.slugs():
        raise BadParameter("slug", slug, "a new name of a-z, 0-9 and _")
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name):
        raise BadParameter("name", name, "the name of a class, such as AdaptFormer")

    def filled(file: str) -> str:
        text = (SKELETON / file).read_text(encoding="utf-8")
        return text.replace("SLUG", slug).replace("NAME", name).replace("LIKE", like)

    found = facts(slug, name, papers.paper(like))
    cell = notebooks.parameters_cell(papers.rules("pocket") | found["parameters"])
    files = {place.format(slug): filled(file) for file, place in PLACES.items()}
    files |= {
        f"{MODEL}/paper.yaml".format(slug): yaml.dump(
            found, Dumper=Flow, sort_keys=False, allow_unicode=True, width=120
        ),
        f"{MODEL}/architecture.svg".format(slug): Path(papers.diagram(like)).read_text(encoding="utf-8"),
        f"notebooks/{slug}.ipynb": nbformat.writes(notebook(filled("notebook.txt"), cell)) + "\n",
    }
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    for kind, config in (
        (".py", "pyproject.toml"),
        (".ipynb", "notebooks/ruff.toml"),
    ):  # lines are as long as the names
        made = [root / file for file in files if file.endswith(kind)]
        for words in (("format",), ("check", "--fix")):
            subprocess.run(
                [sys.executable, "-m", "ruff", *words, "--quiet", "--config", ROOT / config, *made], check=True
            )
    return [root / file for file in files]


def main() -> int:
    """Write the files of a paper and print their names; 1 where a name is refused."""
    parser = argparse.ArgumentParser(prog="tools.new_paper", description=main.__doc__)
    parser.add_argument("slug")
    parser.add_argument("name", help="of the model's class, and of the paper in tables")
    parser.add_argument("--like", required=True, help="a paper whose data sets and backbones it shares")
    given = parser.parse_args()
    try:
        print(*write(given.slug, given.name, given.like), sep="\n")
        print("python -m tools.facts names what is left to write")
    except CompanionError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
