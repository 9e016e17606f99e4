"""Build the site from a folder of reports: pages that are written by hand, executed notebooks, and tables of records.

    python site/build.py --reports build/reports/pocket --out reports/site

Sphinx needs all sources in one tree, so they are first copied or written to a temporary folder; the finished site is
renamed to `--out`, which is never incomplete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
import PIL.Image
import yaml
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

from companion import data
from companion.cli import commands
from companion.evaluation import ablations
from companion.evaluation.claims import CHECK, KINDS, PAPER, SPREAD, SYNTHETIC, counts
from companion.ops.files import read_json
from companion.ops.papers import FINDINGS, findings, paper, slugs
from companion.ops.provenance import code_hash, sources

HERE = Path(__file__).parent
ROOT = HERE.parent
CARD = 480  # pixels of a card's figure
WIDGET = "application/vnd.jupyter.widget-view+json"
STATUS = {"holds": "✓ holds", "fails": "✗ fails", "not run": "– not run"}
KIND = {
    CHECK: "Tests that our code computes what it should: a count, an equivalence, a recorded output. They do not show "
    "whether a method is good.",
    SYNTHETIC: "Whether one method beats another on small data made for the purpose, with every test seed. The lead is "
    "in points of the metric (PSNR: dB), mean ± standard deviation over seeds [95 % t interval of the mean], and the "
    "smallest lead of a seed. The evidence gives the purpose of the data, whether they favour the method, how many "
    "parameters each trains, and the baseline's score at neighbouring learning rates.",
    PAPER: "What the paper reports on its data. They need that data and a GPU, and are judged as soon as a run has "
    "measured them.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path, required=True, help="folder with one folder a notebook")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished site")
    arguments = parser.parse_args()
    runs = {
        path.stem: path.parent for path in sorted(arguments.reports.glob("*/*.ipynb")) if path.parent.name == path.stem
    }
    if not runs:
        parser.error(f"no executed notebook in {arguments.reports}: its folders are <slug>/<slug>.ipynb")
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent) as temporary:
        source, built = Path(temporary, "source"), Path(temporary, "site")
        shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("*.py", "*.yaml", "static", "__pycache__"))
        claims = {
            slug: read_json(folder / "claims.json") if (folder / "claims.json").exists() else []
            for slug, folder in runs.items()
        }
        for slug, folder in runs.items():
            write_notebook(folder, claims[slug], source / "notebooks" / f"{slug}.ipynb")
        every = [claim for several in claims.values() for claim in several]
        kinds = [found["kind"] for slug in slugs() for found in findings(slug)]
        facts = {
            "{papers}": cards(runs, claims, source / "notebooks" / "figures"),
            "{claims}": "; ".join(f"{kind}s: {said}" for kind, said in counts(every).items()),
        } | {f"{{{kind}s}}": str(kinds.count(kind)) for kind in FINDINGS}
        pages = {name: write(claims, arguments.reports) for name, write in PAGES.items()}
        pages = {f"{name}.md": text for name, text in pages.items()}
        for path in (source / name for name in ("index.md", *pages)):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            for name, said in facts.items():
                text = text.replace(name, said)
            path.write_text(text + pages.get(path.name, ""), encoding="utf-8")
        commands_page(source / "docs" / "commands.md")
        for path in source.glob("docs/*.md"):  # `make reports PAPERS=...` runs some of the notebooks
            text = path.read_text(encoding="utf-8")
            missing = re.compile(rf"\[([^\]]+)\]\(\.\./notebooks/(?!(?:{'|'.join(runs)})\.ipynb)[^)]*\)")
            path.write_text(missing.sub(r"\1", text), encoding="utf-8")
        options = ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", f"{temporary}/trees"]
        if code := sphinx([*options, str(source), str(built)]):
            raise SystemExit(code)
        if out.exists():
            out.rename(Path(temporary, "old"))
        built.rename(out)


# --- notebooks ---


def write_notebook(folder: Path, claims: list[dict], target: Path) -> None:
    """Copy an executed notebook without live widgets and injected parameters; add anchors of claims, links to files."""
    slug = folder.name
    notebook = nbformat.read(folder / f"{slug}.ipynb", as_version=4)
    notebook.metadata.pop("widgets", None)
    waiting, cells = [(claim["id"], claim["kind"]) for claim in claims], []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell.source = cell.source.replace(f"../lib/companion/models/{slug}/findings.yaml", f"#findings-{slug}")
        if cell.cell_type == "markdown":  # files of the checkout are no pages
            cell.source = re.sub(r"\[([^\]]+)\]\(\.\./lib/[^)]*\)", r"\1", cell.source)
        if cell.cell_type == "code":
            cell.outputs = [shown for shown in map(still, cell.outputs) if shown]
            closes = "run.close()" in cell.source
            here = [
                (name, kind)
                for name, kind in waiting
                if closes or f'"{name}"' in cell.source or (kind == SYNTHETIC and "claims_from_study" in cell.source)
            ]
            waiting = [claim for claim in waiting if claim not in here]
            cells += [new_markdown_cell(f"({anchor(slug, name)})=") for name, _ in here]
        cells.append(cell)
    cells += [new_markdown_cell(f"({anchor(slug, name)})=") for name, _ in waiting]
    files = [folder / "run.json", folder / "claims.json", *sorted((folder / "tables").glob("*.csv"))]
    study = ROOT / "reports" / "pocket" / slug / "study.csv"
    lines = []
    for file in [*(file for file in files if file.exists()), *([study] if study.exists() else [])]:
        copy = target.parent.parent / "files" / slug / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        lines.append(f"- {{download}}`{file.name} <../files/{slug}/{file.name}>`")
    cells.append(new_markdown_cell("## Files of this run\n\n" + "\n".join(lines)))
    notebook.cells = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    for figure in (ROOT / "notebooks" / "figures").glob(f"{slug}.*"):
        (target.parent / "figures").mkdir(exist_ok=True)
        shutil.copy(figure, target.parent / "figures")
    nbformat.write(notebook, target)


def still(output: dict) -> dict | None:
    """The output without its live widget (None: it had nothing else), its wide tables reachable by keyboard."""
    shown = output.get("data", {})
    if WIDGET in shown:
        del shown[WIDGET]
        shown.pop("text/plain", None)  # "interactive(children=..." is of no use to a reader
        if not shown:
            return None
    if "text/html" in shown:
        scrolls = '<div style="overflow-x: auto">'
        shown["text/html"] = shown["text/html"].replace(scrolls, scrolls[:-1] + ' tabindex="0">')
    return output


# --- tables ---


def cards(runs: Mapping[str, Path], claims: Mapping[str, list[dict]], figures: Path) -> str:
    """The gallery of the front page: of each paper a figure, one finding, and how many of its claims hold."""
    lines = [":::::{grid} 1 2 3 3", ":gutter: 3", ""]
    for slug in sorted(slugs(), key=lambda slug: paper(slug)["arxiv"]):
        facts, record = paper(slug), runs.get(slug, HERE) / "run.json"
        lines += [f"::::{{grid-item-card}} {facts['name']}"]
        if slug in runs:
            lines += [f":link: notebooks/{slug}", ":link-type: doc"]
        if (figures / f"{slug}.jpg").exists():
            with PIL.Image.open(figures / f"{slug}.jpg") as figure:
                figure.thumbnail((CARD, CARD), PIL.Image.Resampling.LANCZOS)
                figure.save(figures / f"{slug}-card.jpg", quality=80, optimize=True)
            lines += [
                f":img-top: notebooks/figures/{slug}-card.jpg",
                f":img-alt: a figure of {facts['name']}'s notebook",
            ]
        lines += ["", f"{cell(facts['task'])}{' (a reconstruction)' if facts.get('reconstruction') else ''}", ""]
        lines += [f"In the released code: {cell(facts['headline'])}.", "", ":::{card-footer}"]
        if record.exists() and read_json(record).get("study", {}).get("stale"):
            lines += ["**Its study is older than its code.**", ""]
        lines += [f"{kind.capitalize()}s: {said}<br>" for kind, said in counts(claims.get(slug, [])).items()]
        lines += [":::", "::::", ""]
    return "\n".join([*lines, ":::::", ""])


def ledger(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """All claims with their status, by kind."""
    parts = []
    every = [(slug, claim) for slug in slugs() for claim in claims.get(slug, [])]
    for kind in KINDS:
        rows = []
        for slug, claim in (pair for pair in every if pair[1]["kind"] == kind):
            status = f'<span class="status {claim["status"].replace(" ", "-")}">{STATUS[claim["status"]]}</span>'
            why = f"<br>{cell(claim['why'])}" if claim.get("why") else ""
            row = [
                f"[{paper(slug)['name']}](notebooks/{slug}.ipynb)",
                f"[{cell(claim['text'])}](#{anchor(slug, claim['id'])})",
                status + why,
                cell(str(claim.get("value") or "–")).removesuffix(SPREAD),
            ]
            rows.append(row + ([cell(claim.get("evidence") or "–")] if kind == SYNTHETIC else []))
        head = ["Paper", "Claim", "Status", "Measured", *(["Evidence"] if kind == SYNTHETIC else [])]
        said = counts([claim for _, claim in every])[kind]
        parts.append(f"## {kind.capitalize()}s: {said}\n\n{KIND[kind]}\n")
        parts.append(table("ledger", head, rows) if rows else "No notebook has been run yet.\n")
    return "\n".join(parts)


def findings_page(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """What the authors' code does that their papers do not state, by paper, faults first."""
    parts = []
    for slug in slugs():
        code = paper(slug)["code"]
        parts.append(f"(findings-{slug})=\n## {paper(slug)['name']}\n")
        parts.append(f"Code: {cell(code['repository'])}; commit: {cell(code['commit'])}.\n")
        rows = [
            [
                f"**{cell(row['topic'])}**<br>*{row['kind']}*",
                "<br>".join([cell(row["code"]), *(f"`{place}`" for place in row["where"])]),
                "<br>".join(filter(None, [cell(row["effect"]), f"case `{row['case']}`" if row["case"] else ""])),
                cell(row["here"]),
            ]
            for row in sorted(findings(slug), key=lambda row: FINDINGS.index(row["kind"]))
        ]
        parts.append(table("findings", ["Topic", "The released code", "Effect", "Here"], rows))
    return "\n".join(parts)


def comparisons(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """The methods that answer the same question in several papers, from the rows of their studies."""
    parts = []
    for question in yaml.safe_load((HERE / "comparisons.yaml").read_text(encoding="utf-8")):
        columns = {}
        for column in question["columns"]:
            own, slug, task = reports / column["paper"], column["paper"], column["task"]
            rows = ablations.read(own if (own / "study.csv").exists() else ROOT / "reports" / "pocket" / slug)
            means = ablations.summary(rows).set_index(["task", "method"])
            if gone := {(task, name) for name in column["methods"] if name != "-"} - set(means.index):
                raise SystemExit(f"comparisons.yaml: the study of {slug} has no {gone}")
            head = f"{paper(slug)['name']}, {task}: {rows.attrs['metric']}"
            columns[head] = [
                "–" if name == "-" else "{mean:.1f} ± {std:.1f}<br>".format(**means.loc[(task, name)]) + cell(name)
                for name in column["methods"]
            ]
        rows = [[cell(name), *values] for name, *values in zip(question["rows"], *columns.values(), strict=True)]
        parts.append(f"## {question['title']}\n\n{question['text']}\n")
        parts.append(table("comparison", ["Methods", *columns], rows))
    return "\n".join(parts)


def data_page(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """All data sets that have a reader: size, licence, source, and the folder that is searched."""
    parts = []
    sets = [found for found in data.DATASETS.values() if not found.name.startswith("pocket/")]
    for task in dict.fromkeys(found.task for found in sets):
        alike = [found for found in sets if found.task == task]
        rows = [
            [
                f"`{found.name}`",
                f"{cell(found.title)}<br>Cite: {cell(found.citation)}",
                "<br>".join(f"{cell(split)}&nbsp;{n:,}" for split, n in found.sizes.items()) or "as found",
                cell(found.licence),
                cell(found.where) + (" (`companion fetch`)" if found.fetchable else ""),
            ]
            for found in alike
        ]
        parts.append(f"## {task.capitalize()}\n")
        parts.append(table("data", ["Name", "Data set", "Size", "Licence", "Where to get it"], rows))
        for layout in dict.fromkeys(found.layout for found in alike):
            folders = ", ".join(f"`{found.folders[0]}/`" for found in alike if found.layout == layout)
            parts.append(f"Layout in {folders}:\n\n```text\n{layout.strip()}\n```\n")
    return "\n".join(parts)


def speed(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """The ratios of the benchmarks, and the measurements on GPUs where there are any."""
    parts = []
    notes = yaml.safe_load((HERE / "speed.yaml").read_text(encoding="utf-8"))
    for file in sorted((ROOT / "reports" / "bench").glob("*.json")):
        facts, today = read_json(file), code_hash(sources(ROOT / "benchmarks" / f"{file.stem}.py"))
        older = "" if facts.get("code") == today else "; **by older code than today's**"
        rows = [
            [
                cell(row["what"]),
                str(row["threads"]),
                f"{row['time_ratio']:.2f}",
                f"{row['memory_ratio']:.2f}",
                f"{row['seconds']:.3g}",
            ]
            for row in facts["rows"]
        ]
        parts.append(
            f"## {paper(file.stem)['name']}\n\n{cell(facts['what'])}. {cell(facts['device'])}, torch "
            f"{facts['versions']['torch']}{older}.\n"
        )
        parts.append(table("bench", ["Ours / against", "Threads", "Time", "Memory", "Seconds of ours"], rows))
        parts.append(notes.get(facts["paper"], "") + "\n")
    gpus = sorted((ROOT / "reports" / "gpu").glob("*.json"))
    parts.append("" if gpus else "## On a GPU\n\nNothing was measured on a GPU so far.\n")
    for file in gpus:
        facts = read_json(file)
        rows = [
            [cell(name), f"`{json.dumps(value)}`"] for name, value in facts.items() if name not in ("gpu", "versions")
        ]
        parts.append(f"## {facts['gpu']}\n\n`make gpu`, torch {facts['versions']['torch']}.\n")
        parts.append(table("record", ["Check", "Result"], rows))
    return "\n".join(parts)


def commands_page(path: Path) -> None:
    """Write the help of the `companion` command and of each of its commands."""
    os.environ["COLUMNS"] = "100"  # of argparse's help
    helps = (f"## `{name}`\n\n```text\n{parser.format_help().strip()}\n```\n" for name, parser in commands().items())
    path.write_text("\n".join(["# The `companion` command", *helps]), encoding="utf-8")


PAGES = {"ledger": ledger, "findings": findings_page, "comparisons": comparisons, "data": data_page, "speed": speed}


def anchor(slug: str, claim: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"claim {slug} {claim}".lower()).strip("-")


def cell(text: str) -> str:
    """Plain text escaped for a Markdown table, except code between backticks and formulas between dollar signs."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", " ".join(text.split()))  # every second part is one
    parts[::2] = [re.sub(r"([\\`*_\[\]<&])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


def table(name: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    return f":::{{table}}\n:class: {name}\n\n" + "\n".join(lines) + "\n:::\n"


if __name__ == "__main__":
    main()
