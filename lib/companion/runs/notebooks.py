"""Run notebooks in place and write their committed records: `python -m companion.runs.notebooks notebooks/*.ipynb`.

A notebook is rewritten only if its run was clean: every cell ran, nothing was written to stderr, no output contains a
path of this machine, and the file is smaller than `LIMIT`. Its tables, claims and run record then replace those in
`reports/pocket/<slug>/`, its figure named `figure` in the paper's YAML becomes `notebooks/figures/<slug>.jpg`, which
first screens and `notebooks/README.md` show, and the README's tables and its figure, `notebooks/figures/all.jpg`, are
updated. With `--check` nothing is run: the notebooks on disk must follow these rules.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import matplotlib
import nbformat
import yaml
from nbclient.exceptions import DeadKernelError
from papermill import PapermillExecutionError, execute_notebook
from PIL import Image, ImageDraw, ImageFont

from ..errors import CompanionError, CorruptFile, check_choice
from ..evaluation.claims import KINDS, counts
from ..io.files import atomic, read_json, write_between
from ..io.papers import convert, paper, rules, slugs
from ..io.record import root
from . import needs

WIDE = 1600  # pixels of a figure of a first screen
LIMIT = 1_000_000  # bytes; GitHub does not render larger notebooks
COLUMNS = 88  # of a line of code in a notebook
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
ABSOLUTE_PATH = re.compile(r"""(?:^|(?<=[\s'"(]))(?:/[\w.~-]+/[\w./~-]+|[A-Za-z]:\\[\w.\\-]+)""", re.MULTILINE)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class BadNotebook(CompanionError):
    """A notebook must not be committed; the message lists the reasons."""

    def __init__(self, path: str | Path, problems: list[str]):
        super().__init__("\n  ".join([f"{path} is not fit to be committed:", *problems]))


def refresh(path: str | Path) -> None:
    """Run the notebook at `path` with its default parameters and write it back without volatile metadata.

    Raises `BadNotebook`, and leaves the file unchanged, when a cell fails or the result breaks a rule of `problems`.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        try:
            execute_notebook(path, draft, kernel_name="python3", cwd=path.parent, progress_bar=False)
        except (PapermillExecutionError, DeadKernelError) as error:
            raise BadNotebook(path, str(error).strip().splitlines()) from error
        notebook = _read(draft)
    strip(notebook)
    if found := problems(notebook):
        raise BadNotebook(path, found)
    with atomic(path) as temporary:
        nbformat.write(notebook, temporary)


def check(path: str | Path) -> None:
    """Raise `BadNotebook` when the notebook at `path` breaks a rule of `problems`, has metadata that `strip` removes,
    or has other parameters than the rules of its paper."""
    notebook = _read(path)
    found, stripped = problems(notebook), copy.deepcopy(notebook)
    strip(stripped)
    if Path(path).stem in slugs() and not found:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        found = _defaults(Path(path).stem, cell.source)
    if stripped != notebook:
        found.append("it holds metadata of one run: `make notebooks` writes the committed outputs")
    if found:
        raise BadNotebook(path, found)


def _read(path: str | Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise BadNotebook(path, [f"it cannot be read: {str(error).splitlines()[0]}"]) from error


def strip(notebook: nbformat.NotebookNode) -> None:
    """Remove in place what differs between runs or machines: metadata except tags and widths of images, and live
    widgets' ids.
    """
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "metadata" in output:
                widths = {k: {"width": m["width"]} for k, m in output.metadata.items() if "image/" in k}
                output.metadata = nbformat.from_dict(widths)


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """The problems of an executed notebook, one sentence each; empty when it may be committed."""
    found = []
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged `parameters`, not one")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        where = f"cell {number}"
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"{where} was not run")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"{where} failed: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"{where} wrote to stderr: {output.text.strip()[:200]}")
            data = output.get("data", {})
            for text in (output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))):
                found += [f"{where} shows an absolute path: {path}" for path in ABSOLUTE_PATH.findall(text)]
    size = len(nbformat.writes(notebook).encode())
    if size >= LIMIT:
        found.append(f"it has {size:,} bytes; the limit is {LIMIT:,}")
    return found


def parameters_cell(known: Mapping[str, Mapping]) -> str:
    """The source of a notebook's cell `parameters` by its rules: each name, an accepted value, and its help."""
    usual = {"switch": False, "text": ""}
    lines = []
    for name, rule in known.items():
        value = rule.get("choices", [usual.get(rule["type"], 0 if "zero" in rule else rule.get("low", 0))])[0]
        line = f"{name} = {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value}"
        beside = f"{line}  # {rule['help']}"
        above = [f"# {part}" for part in textwrap.wrap(rule["help"], COLUMNS - 2)]
        lines += [beside] if len(beside) <= COLUMNS else [*above, line]
    return "\n".join(lines)


def _defaults(slug: str, source: str) -> list[str]:
    """What is wrong with the names and the defaults of the cell `parameters`."""
    known = rules(slug)
    try:
        given = {n.targets[0].id: ast.literal_eval(n.value) for n in cast(Any, ast.parse(source).body)}
        for name, value in given.items():
            check_choice("parameter", name, known)
            convert(name, value, known[name])
        wrong = ", ".join(f"no {name}" for name in known if name not in given)
    except (AttributeError, SyntaxError, ValueError) as error:  # no `name = literal`, or `BadParameter`
        wrong = str(error)
    return [f"the cell `parameters`: {wrong}; generated, it is\n{parameters_cell(known)}"] if wrong else []


def write_figure(figure: Path, slug: str) -> None:
    """Write a figure of a run as that of the paper's first screen, at most `WIDE` pixels wide."""
    with Image.open(figure) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDE, WIDE), Image.Resampling.LANCZOS)
    with atomic(root() / "notebooks" / "figures" / f"{slug}.jpg") as temporary:
        small.save(temporary, "jpeg", quality=85, optimize=True)


def montage(gap: int = 48, line: int = 48) -> Image.Image:
    """The README's figure: parts of the papers' figures by the rows of `figures/all.yaml`, each as wide as `WIDE`.

    Captions have `line` pixels below each row.
    """
    figures = root() / "notebooks" / "figures"
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 22)
    whole, top = Image.new("RGB", (WIDE, 4 * WIDE), "white"), 0
    for row in yaml.safe_load((figures / "all.yaml").read_text(encoding="utf-8")):
        parts = {slug: Image.open(figures / f"{slug}.jpg").crop(row[slug]["part"]) for slug in row}
        room = WIDE - gap * (len(row) - 1)
        height, left = round(room / sum(part.width / part.height for part in parts.values())), 0
        for slug, part in parts.items():
            width = round(height * part.width / part.height)
            whole.paste(part.resize((width, height), Image.Resampling.LANCZOS), (left, top))
            ImageDraw.Draw(whole).text((left, top + height + 6), row[slug]["caption"], fill="#333333", font=font)
            left += width + gap
        top += height + line
    return whole.crop((0, 0, WIDE, top))


def papers_table() -> str:
    """The notebook with its method, and one finding of each paper, as a Markdown table."""
    lines = ["| notebook | what we found |", "| --- | --- |"]
    for slug in slugs():
        facts = paper(slug)
        method = facts["method"] + (", **reconstruction**" if facts.get("reconstruction") else "")
        link = f"[paper](https://arxiv.org/abs/{facts['arxiv']})"
        lines.append(f"| [`{slug}`](notebooks/{slug}.ipynb): {method} ({link}) | {facts['headline']} |")
    return "\n".join(lines)


def references() -> str:
    """The papers as the last part of `CITATION.cff`."""
    lines = ["references:"]
    for slug in slugs():
        facts = paper(slug)
        lines += [
            "  - type: article",
            f'    title: "{facts["title"]}"',
            f"    year: 20{facts['arxiv'][:2]}",
            "    authors:",
        ]
        for family, given in (name.split(", ") for name in facts["authors"]):
            lines.append(f"      - {{given-names: {given}, family-names: {family}}}")
        lines += ["    identifiers:", "      - type: other", f"        value: arXiv:{facts['arxiv']}"]
    return "\n".join(lines) + "\n"


def index_table() -> str:
    """The notebooks of the papers with figure, question, seconds and needs, as the table of `notebooks/README.md`."""
    lines = ["| | notebook | here | the paper's tables |", "| --- | --- | --- | --- |"]
    for slug in slugs():
        facts, seconds = paper(slug), record_of(slug, "run")["seconds"]
        figure = f'<img src="figures/{slug}.jpg" alt="a figure of the notebook" width="240">'
        lines.append(
            f"| {figure} | **[{facts['name']}]({slug}.ipynb)** {facts['question']} | {round(seconds)} s, no data, no "
            f"GPU | {needs.summary(slug)} |"
        )
    return "\n".join(lines)


def claims_table() -> str:
    """How many claims of each kind hold in the committed records, per paper and in total, and the seeds of the
    study."""
    ledgers, lines = {slug: record_of(slug, "claims") for slug in slugs()}, []
    for slug, ledger in ledgers.items():
        study = record_of(slug, "study")
        seeds = "; ".join(span(study[key]) for key in ("selection_seeds", "seeds"))
        lines.append(f"| `{slug}` | {' | '.join(counts(ledger).values())} | {seeds} |")
    head = f"| paper | {' | '.join(f'{kind}s' for kind in KINDS)} | seeds of selection; of the test |"
    everything = counts([claim for ledger in ledgers.values() for claim in ledger])
    last = f"| **all** | {' | '.join(everything.values())} | |"
    return "\n".join([head, "| --- " * (2 + len(KINDS)) + "|", *lines, last])


def evidence_table() -> str:
    """What runs of each paper, how many cases recorded from the authors' code it is compared with, and the data that
    its tables need."""
    lines = ["| paper | what runs | model / recipe / trajectories | needs real data |", "| --- | --- | --- | --- |"]
    for slug in slugs():
        facts = paper(slug)["evidence"]
        found = {kind: [*(root() / "tests" / kind / slug).glob("*/case.json")] for kind in ("parity", "recipes")}
        trajectories = [path for path in found["recipes"] if path.parent.name.startswith("trajectory")]
        cases = " / ".join(str(len(paths) or "–") for paths in [*found.values(), trajectories])
        more = f"; {facts['more']}" if "more" in facts else ""
        link = f"[`{slug}`](https://arxiv.org/abs/{paper(slug)['arxiv']}) {facts['subject']}"
        lines.append(f"| {link} | {facts['runs']} | {cases}{more} | {facts['data']} |")
    return "\n".join(lines)


def record_of(slug: str, name: str) -> Any:
    """A committed record of a paper: "run", "claims" or "study"."""
    return read_json(root() / "reports" / "pocket" / slug / f"{name}.json")


def span(seeds: list[int]) -> str:
    """`200 to 209` for two or more consecutive seeds, otherwise all of them."""
    first, last = seeds[0], seeds[-1]
    consecutive = first < last and seeds == list(range(first, last + 1))
    return f"{first} to {last}" if consecutive else ", ".join(map(str, seeds))


def own_table() -> str:
    """The examples on own data: what the user has, and what the trained model predicts, by the second paragraph of each
    page."""
    lines = ["| example | your data | what the trained model predicts |", "| --- | --- | --- |"]
    for slug in slugs():
        page = f"site/docs/own_data/{slug}.md"
        told = re.search(r"(?m)^\*(.+) → (.+)\.\*$", (root() / page).read_text(encoding="utf-8"))
        if told is None:
            raise CorruptFile(root() / page, "no line `*your data → what is predicted.*`")
        lines.append(f"| [`{slug}`]({page}) | {told[1]} | {told[2]} |")
    return "\n".join(lines)


def keep(out: Path, slug: str) -> None:
    """Replace the files of the run before in `reports/pocket/<slug>` by those of the folder `out`; a study stays."""
    target = root() / "reports" / "pocket" / slug
    before = read_json(target / "run.json")["outputs"] if (target / "run.json").exists() else {}
    new = [*read_json(out / "run.json")["outputs"], "run.json"]
    for name in new:
        with atomic(target / name) as temporary:
            shutil.copyfile(out / name, temporary)
    for name in before.keys() - {*new}:
        (target / name).unlink(missing_ok=True)


def write_tables() -> None:
    """Write what README, site and CITATION say of all papers, from their facts and records."""
    front, index = root() / "README.md", root() / "notebooks" / "README.md"
    tables = {
        "papers": (front, papers_table),
        "claims": (front, claims_table),
        "runs": (front, needs.table),
        "own": (front, own_table),
    }
    tables |= {"notebooks": (index, index_table), "evidence": (root() / "site/docs/evidence.md", evidence_table)}
    for mark, (path, table) in tables.items():
        if path.exists():
            write_between(path, mark, table())
    if (citation := root() / "CITATION.cff").exists():
        text = citation.read_text(encoding="utf-8").partition("references:\n")[0] + references()
        with atomic(citation) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if all((root() / "notebooks" / "figures" / f"{slug}.jpg").exists() for slug in slugs()):
        with atomic(root() / "notebooks" / "figures" / "all.jpg") as temporary:
            montage().save(temporary, "jpeg", quality=82, optimize=True)


def main(words: list[str] | None = None) -> int:
    """Refresh or check the given notebooks; return 1 when one of them must not be committed."""
    parser = argparse.ArgumentParser(prog="companion.runs.notebooks", description=main.__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="run nothing; check the notebooks on disk")
    given = parser.parse_args(words)
    failed = 0
    with tempfile.TemporaryDirectory() as runs:
        # a progress bar would change committed outputs; an earlier run's files must not enter a committed record
        os.environ.update(COMPANION_PROGRESS="off", COMPANION_RUNS=runs)
        for path in given.notebooks:
            try:
                if given.check:
                    check(path)
                    continue
                start = time.monotonic()
                print(f"{path}: started", flush=True)
                refresh(path)
                if (out := Path(runs, "pocket", path.stem)).exists():
                    name = paper(path.stem)["figure"] if path.stem in slugs() else ""
                    if (figure := out / "figures" / f"{name}.png").exists():
                        write_figure(figure, path.stem)
                    keep(out, path.stem)
                print(f"{path}: done in {time.monotonic() - start:.0f} s", flush=True)
            except CompanionError as error:
                failed += 1
                print(error, file=sys.stderr)
    if not given.check and not failed and any(p.resolve().parent == root() / "notebooks" for p in given.notebooks):
        try:
            write_tables()
        except CompanionError as error:  # a paper that was never run
            failed += 1
            print(error, file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
