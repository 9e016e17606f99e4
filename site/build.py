"""Build the site from a folder of reports: the ten papers, the claims ledger, each executed notebook and its record.

    python site/build.py --reports build/reports/pocket --out reports/site

Sphinx needs all sources in one tree, so they are first written to a temporary folder; the finished site is renamed to
`--out`, which is never incomplete.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import yaml
from sphinx.cmd.build import main as sphinx

import companion
from companion import data
from companion.cli import commands
from companion.evaluation import ablations
from companion.evaluation.claims import CHECK, KINDS, PAPER, SPREAD, SYNTHETIC, counts
from companion.ops.papers import FINDINGS, findings, slugs
from companion.ops.papers import paper as facts_of
from companion.ops.provenance import code_hash, sources

HERE = Path(__file__).parent
PAPERS = Path(companion.__file__).parent / "models"
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDE = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n"  # of pages whose tables need the width
DOCS = [HERE / "docs" / f"{name}.md" for name in ("install", "gpu", "evidence", "layout")]
# photographs.jpg is the first figure of SA²VP's notebook at 160 dpi
PHOTOGRAPHS = (
    "Photographs through a real ViT-S/14 (DINOv2's architecture, fine-tuned for saliency): attention of the [CLS] "
    "token and principal components of the patch tokens"
)
STATUS = {"holds": "✓ holds", "fails": "✗ fails", "not run": "– not run"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path, required=True, help="folder with one folder a notebook")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished site")
    arguments = parser.parse_args()
    if not list(arguments.reports.glob("*/*.ipynb")):
        parser.error(f"no executed notebook in {arguments.reports}: its folders are <slug>/<slug>.ipynb")
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent) as temporary:
        source, built = Path(temporary, "source"), Path(temporary, "site")
        write_sources(arguments.reports, source)
        code = sphinx(
            ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", f"{temporary}/trees", str(source), str(built)]
        )
        if code:
            raise SystemExit(code)
        if out.exists():
            out.rename(Path(temporary, "old"))
        built.rename(out)


def write_sources(reports: Path, source: Path) -> None:
    """Write the pages that Sphinx reads: `index`, `notebooks/<slug>`, `records/<slug>`, `api/<part>` and others."""
    papers = load_papers()
    runs = {folder.name: load_run(folder) for folder in sorted(reports.glob("*")) if folder.is_dir()}
    runs = {slug: run for slug, run in runs.items() if run["notebook"].exists()}
    for slug, run in runs.items():
        page(source / "records" / f"{slug}.md", record(slug, run))
        write_notebook(slug, run, source / "notebooks")
    page(source / "data.md", data_page())
    page(source / "comparisons.md", comparison_page(papers, runs, reports))
    page(source / "findings.md", findings_page(papers, runs))
    page(source / "speed.md", speed_page(papers, HERE.parent / "reports"))
    for name, text in api_pages(papers).items():
        page(source / "api" / f"{name}.md", text)
    page(source / "index.md", front_page(papers, runs))
    shutil.copyfile(HERE / "photographs.jpg", source / "photographs.jpg")
    page(source / "ledger.md", ledger_page(papers, runs))
    for path in DOCS:
        page(source / "docs" / path.name, path.read_text(encoding="utf-8"))
    page(source / "docs" / "commands.md", commands_page())


def load_papers() -> dict[str, dict]:
    """The ten papers by slug, in the order of their arXiv numbers."""
    return {slug: facts_of(slug) for slug in sorted(slugs(), key=lambda slug: facts_of(slug)["arxiv"])}


def load_run(folder: Path) -> dict:
    """The outputs of one run: the notebook's path, its claims, its record and its tables."""

    def read(name: str, default: object) -> object:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else default

    return {
        "notebook": folder / f"{folder.name}.ipynb",
        "claims": read("claims.json", []),
        "record": read("run.json", {}),
        "tables": sorted((folder / "tables").glob("*.csv")),
    }


def front_page(papers: dict[str, dict], runs: dict[str, dict]) -> str:
    rows, all_claims = [], []
    for slug, paper in papers.items():
        claims = runs[slug]["claims"] if slug in runs else []
        all_claims += claims
        found = counts(claims)
        if slug in runs and runs[slug]["record"].get("study", {}).get("stale"):
            found[SYNTHETIC] += "; **its study is older than its code**"
        name = f"[{paper['name']}](notebooks/{slug}.ipynb)" if slug in runs else paper["name"]
        title = f"[{cell(paper['title'])}](https://arxiv.org/abs/{paper['arxiv']}), {cell(paper['venue'])}"
        if paper.get("reconstruction"):
            title += " (a reconstruction: neither the full text nor official code was available)"
        state = f"[runs](records/{slug}.md)" if slug in runs else "not yet built"
        rows.append([name, title, cell(paper["task"]), cell(paper["headline"]), state, *found.values()])
    extra = [slug for slug in runs if slug not in papers]
    return "\n".join(
        [
            WIDE,
            "# Ten papers, each as a notebook that runs",
            f"![{PHOTOGRAPHS}](photographs.jpg)\n",
            f"*{PHOTOGRAPHS}.*\n",
            "Published numbers are quoted with their source; every other number on this site was measured by the "
            "notebook it stands in, on small data made for the purpose (the `pocket` profile) or, where stated, on "
            "real images. They show whether a paper's mechanism works; they are not the paper's numbers.\n",
            "## The papers\n",
            table(
                "papers",
                ["Paper", "Title", "Task", "What we found", "State", *(f"{kind}s".capitalize() for kind in KINDS)],
                rows,
            ),
            f"All papers: {'; '.join(f'{kind}s: {found}' for kind, found in counts(all_claims).items())}. Each claim, "
            "with its evidence, is in [the ledger of claims](ledger.md).\n",
            toctree("Documentation", [(None, f"docs/{path.stem}") for path in DOCS] + [(None, "docs/commands")]),
            toctree("Overviews", [(None, name) for name in ("ledger", "findings", "comparisons", "data", "speed")]),
            toctree("Papers", [(papers[slug]["name"], f"notebooks/{slug}") for slug in papers if slug in runs]),
            toctree("How it was made", [(None, f"notebooks/{slug}") for slug in extra]),
            toctree(
                "API reference",
                [(None, "api/index"), *((title, f"api/{name}") for name, title in api_menu(papers).items())],
            ),
            toctree("Run records", [(papers.get(slug, {}).get("name", slug), f"records/{slug}") for slug in runs]),
        ]
    )


def commands_page() -> str:
    """The help of the `companion` command and of each of its commands."""
    parts = ["# The `companion` command"]
    os.environ["COLUMNS"] = "100"  # of argparse's help
    for name, parser in commands().items():
        parts.append(f"## `{name}`\n\n```text\n{parser.format_help().strip()}\n```\n")
    return "\n".join(parts)


def ledger_page(papers: dict[str, dict], runs: dict[str, dict]) -> str:
    """All claims of all papers with their status, by kind."""
    parts = [
        WIDE,
        "# The ledger of claims",
        "The claims of each paper, and whether they hold in these runs. The three kinds answer different questions and "
        "are never summed up. A claim that fails is shown as failing.\n",
    ]
    about = {
        CHECK: "Tests that our code computes what it should: a count, an equivalence, a recorded output. They do not "
        "show whether a method is good.",
        SYNTHETIC: "Whether one method beats another on small data made for the purpose, with every test seed, five "
        "or ten. The lead is in points of the metric (PSNR: dB), mean ± standard deviation over seeds [95 % t interval "
        "of the mean], and the smallest lead of a seed. The evidence gives the purpose of the data, whether they "
        "favour the method, how many parameters each trains, and the baseline's score at neighbouring learning rates.",
        PAPER: "What the paper reports on its data. They need that data and a GPU, and are judged as soon as a run "
        "has measured them.",
    }
    for kind in KINDS:
        rows = []
        for slug, run in runs.items():
            for claim in run["claims"]:
                if claim["kind"] == kind and slug in papers:
                    rows.append(
                        [
                            f"[{papers[slug]['name']}](notebooks/{slug}.ipynb)",
                            f"[{cell(claim['text'])}](#{anchor(slug, claim['id'])})",
                            badge(claim["status"]) + (f"<br>{cell(claim['why'])}" if claim.get("why") else ""),
                            cell(show(claim.get("value")).removesuffix(SPREAD)),
                            *([cell(show(claim.get("evidence")))] if kind == SYNTHETIC else []),
                            f"[record](records/{slug}.md)",
                        ]
                    )
        head = ["Paper", "Claim", "Status", "Measured", *(["Evidence"] if kind == SYNTHETIC else []), "Run"]
        found = counts([claim for run in runs.values() for claim in run["claims"]])[kind]
        parts += [f"## {kind.capitalize()}s: {found}\n", about[kind] + "\n"]
        parts.append(table("ledger", head, rows) if rows else "No notebook has been run yet.\n")
    return "\n".join(parts)


def comparison_page(papers: dict[str, dict], runs: dict[str, dict], reports: Path) -> str:
    """The methods that answer the same question in several papers, from the rows of their studies."""
    parts = [
        WIDE,
        "# The same question in several papers",
        "Each column is one task of one paper's toy-scale study, in that study's metric, in percent (PSNR in dB): the "
        "mean over its seeds and the standard deviation. Rows compare within a column; columns differ in task, data "
        "and metric. The learning rate of every method was chosen on validation images.\n",
    ]
    for question in yaml.safe_load((HERE / "comparisons.yaml").read_text(encoding="utf-8")):
        head, columns = [], []
        for column in question["columns"]:
            folder = study_folder(reports, column["paper"])
            if column["paper"] not in runs or not (folder / "study.csv").exists():
                continue
            rows = ablations.read(folder)
            found = ablations.summary(rows).set_index(["task", "method"])
            known = [name for name in column["methods"] if name != "-" and (column["task"], name) not in found.index]
            if known:
                raise SystemExit(f"comparisons.yaml: {folder / 'study.csv'} has no {known} on {column['task']!r}")
            head.append(
                f"[{papers[column['paper']]['name']}](notebooks/{column['paper']}.ipynb), {column['task']}: "
                f"{rows.attrs['metric']}"
            )
            cells = [found.loc[(column["task"], name)] if name != "-" else None for name in column["methods"]]
            columns.append(
                [
                    "–" if c is None else f"{c['mean']:.1f} ± {c['std']:.1f}<br>{cell(name)}"
                    for name, c in zip(column["methods"], cells, strict=True)
                ]
            )
        if columns:
            rows = [[cell(name), *values] for name, *values in zip(question["rows"], *columns, strict=True)]
            parts += [
                f"## {question['title']}\n",
                question["text"].strip() + "\n",
                table("comparison", ["Methods", *head], rows),
            ]
    return "\n".join(parts)


def api_menu(papers: dict[str, dict]) -> dict[str, str]:
    """The pages of the API reference and their titles in the menu."""
    parts = ("layers", "training", "data", "evaluation", "viz", "ops")
    return {slug: paper["name"] for slug, paper in papers.items()} | {p: p for p in parts} | {"tools": "field tools"}


def api_pages(papers: dict[str, dict]) -> dict[str, str]:
    """The API reference: one page for each paper and each other part of the package, from the docstrings."""
    package, pages = PAPERS.parent, {}
    menu = api_menu(papers)
    for name, title in menu.items():
        folder = PAPERS / name if (PAPERS / name).is_dir() else package / name
        files = sorted(package.glob("[a-z]*.py") if name == "tools" else folder.rglob("*.py"))
        parts = [f"# {title[0].upper()}{title[1:]}: API\n"]
        for file in files:
            if (file.stem in ("parity", "cli") and name != "evaluation") or file.stem.endswith("_sets"):
                continue
            module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            options = "   :members:\n   :ignore-module-all:"  # an imported name is documented where it is defined
            parts.append(f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}\n```\n")
        pages[name] = "\n".join(parts)
    listed = "\n".join(f"- [{title}]({name}.md)" for name, title in menu.items())
    text = "From the docstrings of the package, in the order of the source. Names that start with `_` are internal.\n"
    return pages | {"index": f"# API reference\n\n{text}\n{listed}\n"}


def study_folder(reports: Path, slug: str) -> Path:
    """The folder of a paper's study: the run's own when it has one, else the committed one."""
    own = reports / slug
    return own if (own / "study.csv").exists() else HERE.parent / "reports" / "pocket" / slug


def data_page() -> str:
    """All data sets that have a reader: size, licence, source, and the folder that is searched."""
    parts = [
        WIDE,
        "# Data sets",
        "Every set that a notebook can read at the `paper` profile, in the layout its reader expects below the data "
        "root. `companion data --data-root DIR` lists which are present; `companion fetch` downloads those marked with "
        "it. No data is copied here. Licences are quoted from the source; *none found*: the source states none.\n",
    ]
    tasks: dict[str, list[data.DataSet]] = {}
    for found in data.DATASETS.values():
        if not found.name.startswith("pocket/"):
            tasks.setdefault(found.task, []).append(found)
    for task, sets in tasks.items():
        parts.append(f"## {task.capitalize()}\n")
        rows = [
            [
                f"`{found.name}`",
                f"{cell(found.title)}<br>Cite: {cell(found.citation)}",
                sizes(found),
                cell(found.licence),
                cell(found.source) + (" (`companion fetch`)" if found.fetchable else ""),
            ]
            for found in sets
        ]
        parts.append(table("data", ["Name", "Data set", "Size", "Licence", "Where to get it"], rows))
        layouts: dict[str, list[data.DataSet]] = {}
        for found in sets:
            layouts.setdefault(found.layout, []).append(found)
        for layout, alike in layouts.items():
            folders = ", ".join(f"`{found.folders[0]}/`" for found in alike)
            parts.append(f"Layout in {folders}:\n\n```text\n{layout.strip()}\n```\n")
    return "\n".join(parts)


def sizes(found: data.DataSet) -> str:
    """The splits of a data set, one per line, "train 1,000"."""
    return "<br>".join(f"{cell(split)}&nbsp;{count:,}" for split, count in found.sizes.items()) or "as found"


def findings_page(papers: dict[str, dict], runs: dict[str, dict]) -> str:
    """What the authors' code does that their papers do not state, by paper, faults first."""
    found = {slug: findings(slug) for slug in papers}
    count = {kind: sum(row["kind"] == kind for rows in found.values() for row in rows) for kind in FINDINGS}
    parts = [
        WIDE,
        "# Findings in the released code\n",
        f"What the authors' code does and the paper does not state, read and run at the commit named: {count['fault']} "
        f"faults (unintended behaviour: a crash, a wrong label, a line that never runs), {count['surprise']} surprises "
        f"(legal, but not what a reader expects) and {count['recipe']} settings of training and evaluation that only "
        "the code states. Line numbers are of that commit. An effect is a number that we measured, in the recorded "
        "case, test or notebook named; where there is none, the effect was not measured. Released research code is "
        "rare and these authors released theirs: each line is meant to help whoever builds on it.\n",
    ]
    for slug, rows in found.items():
        code = papers[slug].get("code", {})
        notebook = f" ([notebook](notebooks/{slug}.ipynb))" if slug in runs else ""
        parts.append(f"(findings-{slug})=\n## {papers[slug]['name']}\n")
        parts.append(f"Code: {cell(code['repository'])}; commit: {cell(code['commit'])}.{notebook}\n")
        cells = [
            [
                f"**{cell(row['topic'])}**<br>*{row['kind']}*",
                "<br>".join([cell(row["code"]), *(f"`{place}`" for place in row["where"])]),
                "<br>".join(filter(None, [cell(row["effect"]), f"case `{row['case']}`" if row["case"] else ""])),
                cell(row["here"]),
            ]
            for row in sorted(rows, key=lambda row: FINDINGS.index(row["kind"]))
        ]
        parts.append(table("findings", ["Topic", "The released code", "Effect", "Here"], cells))
    return "\n".join(parts)


def speed_page(papers: dict[str, dict], reports: Path) -> str:
    """The ratios of the benchmarks, and the measurements on GPUs where there are any."""
    parts = [
        "# Speed",
        "Each row is one run on one machine: our time and peak memory divided by those of the baseline after the "
        "slash, most often the plain backbone passes that the method cannot avoid. Below 1 ours is faster, or smaller. "
        "`make bench` measures them; on a machine other than the one named only the ratio of a row is meaningful.\n",
    ]
    notes = yaml.safe_load((HERE / "speed.yaml").read_text(encoding="utf-8"))
    for file in sorted((reports / "bench").glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        name = papers.get(facts["paper"], {}).get("name", facts["paper"])
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
        script = HERE.parent / "benchmarks" / file.with_suffix(".py").name
        older = "" if facts.get("code") == code_hash(sources(script)) else "; **by older code than today's**"
        torch = facts["versions"]["torch"]
        parts += [
            f"## {name}\n",
            f"{cell(facts['what'])}. {cell(facts['device'])}, torch {torch}{older}.\n",
            table("bench", ["Ours / against", "Threads", "Time", "Memory", "Seconds of ours"], rows),
            notes.get(facts["paper"], "").strip() + "\n",
        ]
    cards = sorted((reports / "gpu").glob("*.json"))
    if not cards:
        parts.append("## On a GPU\n\nNothing was measured on a GPU so far.\n")
    for file in cards:
        facts = json.loads(file.read_text(encoding="utf-8"))
        parts.append(f"## {facts['gpu']}\n\n`make gpu`, torch {facts['versions']['torch']}.\n")
        columns = ["precision", "batch", "images_a_second", "peak_memory_gb", "share_of_peak"]
        rows, checks = [], []
        for key, value in facts.items():
            if key.startswith("training of ") and isinstance(value, dict):
                rows.append([cell(key.removeprefix("training of ")), *(cell(show(value.get(c, ""))) for c in columns)])
            elif key.startswith(("training of ", "parity of ", "tests")):
                text = max(value.values(), key=float) if isinstance(value, dict) else value
                checks.append([cell(key), cell(show(text))])
        heads = ["Full-size training step", "Precision", "Batch", "Images/s", "Peak memory (GB)", "Share of the peak"]
        parts += [table("bench", heads, rows), table("record", ["Check", "Result"], checks)]
    return "\n".join(parts)


def record(slug: str, run: dict) -> str:
    """The page of one run: its record, its claims, and every table it wrote."""
    parts = [
        f"# The run of {slug}",
        "The record that the run wrote: code, versions, machine and parameters behind the numbers on "
        f"[its page](../notebooks/{slug}.ipynb).\n",
    ]
    plain = {key: value for key, value in run["record"].items() if not isinstance(value, dict)}
    groups = {key: value for key, value in run["record"].items() if isinstance(value, dict)}
    for title, values in {"": plain, **groups}.items():
        if values:
            parts.append(f"## {title.replace('_', ' ').capitalize()}\n" if title else "")
            rows = [[cell(key.replace("_", " ")), cell(show(value))] for key, value in values.items()]
            parts.append(table("record", ["What", "Value"], rows))
    if run["claims"]:
        rows = [[cell(c["text"]), badge(c["status"]), cell(show(c.get("value")))] for c in run["claims"]]
        parts += ["## Claims\n", table("claims", ["Claim", "Status", "Value"], rows)]
    for file in run["tables"]:
        with file.open(encoding="utf-8", newline="") as lines:
            head, *rows = csv.reader(lines)
        parts += [f"## Table: {file.stem}\n", table("csv", map(cell, head), [[cell(v) for v in row] for row in rows])]
    return "\n".join(parts)


def write_notebook(slug: str, run: dict, folder: Path) -> None:
    """Copy the executed notebook: no live widgets, an anchor for each claim, the appendix folded, a list of tables."""
    notebook = nbformat.read(run["notebook"], as_version=4)
    notebook.metadata.pop("widgets", None)
    waiting = [claim["id"] for claim in run["claims"]]
    cells, appendix = [], False
    for part in notebook.cells:
        appendix |= part.cell_type == "markdown" and part.source.startswith("## Appendix")
        part.source = part.source.replace(f"../lib/companion/models/{slug}/findings.yaml", f"#findings-{slug}")
        if part.cell_type == "code":
            if appendix:  # diagnostics for specialists, opened by a click
                part.metadata["tags"] = [*part.metadata.get("tags", ()), "hide-cell"]
            part.outputs = [reachable(o) for o in map(without_widget, part.outputs) if o is not None]
            here = [claim for claim in waiting if re.search(rf"""["']{re.escape(claim)}["']""", part.source)]
            if "run.close()" in part.source:  # those judged by a loop: they link to the table of claims
                here = waiting
            waiting = [claim for claim in waiting if claim not in here]
            cells += [target(slug, claim) for claim in here]
        cells.append(part)
    cells += [target(slug, claim) for claim in waiting]  # judged in a loop: they link to the claims table at the end
    files = [f"- {{download}}`{file.name} <../tables/{slug}/{file.name}>`" for file in run["tables"]]
    cells.append(
        nbformat.v4.new_markdown_cell(
            f"## Files of this run\n\n[The run record](../records/{slug}.md) shows the parameters, versions, time and "
            "memory, and every table in full.\n\n" + "\n".join(files)
        )
    )
    notebook.cells = cells
    for file in run["tables"]:
        copy = folder.parent / "tables" / slug / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{slug}.ipynb")


def without_widget(output: dict) -> dict | None:
    """The output without its live widget, or None when it had nothing else."""
    data = output.get("data", {})
    if WIDGET not in data:
        return output
    del data[WIDGET]
    data.pop("text/plain", None)  # "interactive(children=..." is of no use to a reader
    return output if data else None


def reachable(output: dict) -> dict:
    """The output with its wide tables reachable by keyboard: a scrolling element must be focusable."""
    data = output.get("data", {})
    if "text/html" in data:
        scrolls = '<div style="overflow-x: auto">'
        data["text/html"] = data["text/html"].replace(scrolls, scrolls[:-1] + ' tabindex="0">')
    return output


def target(slug: str, claim: str) -> dict:
    return nbformat.v4.new_markdown_cell(f"({anchor(slug, claim)})=")


def anchor(slug: str, claim: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"claim {slug} {claim}".lower()).strip("-")


def badge(status: str) -> str:
    return f'<span class="status {status.replace(" ", "-")}">{STATUS[status]}</span>'


def show(value: object) -> str:
    """A value of a record as readable text."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return str(value)


def cell(text: str) -> str:
    """Plain text escaped for a Markdown table, except formulas between dollar signs."""
    parts = re.split(r"(\$[^$]+\$)", " ".join(text.split()))  # every second part is a formula
    parts[::2] = [re.sub(r"([\\`*_\[\]<&])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


def table(name: str, head: list[str], rows: list[list[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return f":::{{table}}\n:class: {name}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n:::\n"


def toctree(caption: str, entries: list[tuple[str | None, str]]) -> str:
    if not entries:
        return ""
    lines = [f"{title} <{place}>" if title else place for title, place in entries]
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(lines) + "\n```\n"


def page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
