"""Build the site from a folder of reports: pages that are written by hand, executed notebooks, and tables of records.

    python site/build.py --reports build/reports/pocket --out reports/site

Sphinx needs all sources in one tree, so they are first copied or written to a temporary folder; the finished site is
renamed to `--out`, which is never incomplete.
"""

from __future__ import annotations

import argparse
import html
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from base64 import b64encode
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
from companion.ops import needs
from companion.ops.files import read_json
from companion.ops.papers import FINDINGS, findings, paper, slugs
from companion.ops.provenance import code_hash, sources

HERE = Path(__file__).parent
ROOT = HERE.parent
CARD = 560  # pixels of a card's figure
LARGE = 100_000  # bytes of a figure above which it is a JPEG
DRAWS = re.compile(r"run\.(figure|table|claims_from)|widgets\.|plots\.|SVG\(|report\.opening|heat_table")
WORKS = re.compile(r"\bfit\(|^(def|class) |recipe\.run\(|run\.claim\(|companion\.save|\.start\(", re.MULTILINE)
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
        for slug in slugs():  # the rows of the studies, also of papers that were not run
            keep(study(slug, arguments.reports) / "study.csv", slug, source)
        for slug, folder in runs.items():
            write_notebook(folder, claims[slug], source / "notebooks" / f"{slug}.ipynb")
        every = [claim for several in claims.values() for claim in several]
        kinds = [found["kind"] for slug in slugs() for found in findings(slug)]
        facts = {
            "{papers}": cards(runs, claims, source / "notebooks" / "figures"),
            "{claims}": "; ".join(f"{kind}s: {said}" for kind, said in counts(every).items()),
            "{study rows}": f"{sum(len(ablations.read(study(slug, arguments.reports))) for slug in slugs()):,}",
        } | {f"{{{kind}s}}": str(kinds.count(kind)) for kind in FINDINGS}
        for name, folder in (("model", "parity"), ("recipe", "recipes")):
            facts[f"{{{name} cases}}"] = str(len(list((ROOT / "tests" / folder).glob("*/*/case.json"))))
        pages = {name: write(claims, arguments.reports) for name, write in PAGES.items()}
        pages = {f"{name}.md": text for name, text in pages.items()}
        for path in (source / name for name in ("index.md", *pages)):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            for name, said in facts.items():
                text = text.replace(name, said)
            path.write_text(text + pages.get(path.name, ""), encoding="utf-8")
        commands_page(source / "docs" / "commands.md")
        for path in source.rglob("*.md"):  # `make reports PAPERS=...` runs some of the notebooks
            text = path.read_text(encoding="utf-8")
            missing = re.compile(rf"\[([^\]]+)\]\((?:\.\./)?notebooks/(?!(?:{'|'.join(runs)})\.ipynb)[^)]*\)")
            path.write_text(missing.sub(r"\1", text), encoding="utf-8")
        options = ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", f"{temporary}/trees"]
        if code := sphinx([*options, str(source), str(built)]):
            raise SystemExit(code)
        if out.exists():
            out.rename(Path(temporary, "old"))
        built.rename(out)


# --- notebooks ---


def write_notebook(folder: Path, claims: list[dict], target: Path) -> None:
    """Copy an executed notebook without live widgets and injected parameters; add how to run it, anchors of claims and
    links to files; fold code that only draws, and show figures as sharp as the run's own."""
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
            if DRAWS.search(cell.source) and not WORKS.search(cell.source):
                cell.metadata["tags"] = [*tags, "hide-input"]
            sharpen(cell, folder / "figures")
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
    source = target.parent.parent
    kept = [keep(file, slug, source) for file in files if file.exists()]
    if (source / "files" / slug / slug / "study.csv").exists():
        kept.append(f"{{download}}`study.csv: the rows of the ablations <../files/{slug}/{slug}/study.csv>`")
    cells.append(new_markdown_cell("## Files of this run\n\n" + "\n".join(f"- {link}" for link in kept)))
    committed = ROOT / "notebooks" / f"{slug}.ipynb"
    link = keep(committed if committed.exists() else folder / f"{slug}.ipynb", slug, source)
    text = f"{link}: open it in JupyterLab (`make lab`) or [on Colab](../docs/install.md#on-colab)."
    cells.insert(1, new_markdown_cell(text))
    notebook.cells = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    for figure in (ROOT / "notebooks" / "figures").glob(f"{slug}.*"):
        (target.parent / "figures").mkdir(exist_ok=True)
        shutil.copy(figure, target.parent / "figures")
    nbformat.write(notebook, target)


def keep(file: Path, slug: str, source: Path) -> str:
    """Copy a file of a paper to the site's sources; return a link for a notebook's page, which downloads it."""
    copy = source / "files" / slug / file.parent.name / file.name  # a study and a table may have one name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)
    return f"{{download}}`{file.name} <../files/{slug}/{file.parent.name}/{file.name}>`"


def sharpen(cell: dict, figures: Path) -> None:
    """Replace a cell's figures, of which a notebook holds small copies with few colours, by those of the run."""
    shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    files = [figures / f"{name}.png" for name in re.findall(r'run\.figure\(\s*"(\w+)"', cell.source)]
    if len(files) != len(shown):  # a figure in a loop
        return
    for output, file in zip(shown, files, strict=True):
        if file.exists():
            kind, pixels = "image/png", file.read_bytes()
            if len(pixels) > LARGE:
                kind, packed = "image/jpeg", io.BytesIO()
                with PIL.Image.open(file) as figure:
                    figure.convert("RGB").save(packed, "jpeg", quality=82, optimize=True)
                pixels = packed.getvalue()
            del output["data"]["image/png"]
            output["data"][kind] = b64encode(pixels).decode()
            output["metadata"][kind] = output["metadata"].pop("image/png", {})  # its width


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
    lines = [":::::{grid} 1 2 2 2", ":gutter: 3", ":class-container: gallery", ""]
    for slug in sorted(slugs(), key=lambda slug: paper(slug)["arxiv"]):
        facts, record = paper(slug), runs.get(slug, HERE) / "run.json"
        made = " (a reconstruction)" if facts.get("reconstruction") else ""
        lines += [f"::::{{grid-item-card}} {facts['name']}"]
        if slug in runs:
            lines += [f":link: notebooks/{slug}", ":link-type: doc"]
        if (figures / f"{slug}.jpg").exists():
            with PIL.Image.open(figures / f"{slug}.jpg") as figure:
                figure.thumbnail((CARD, CARD), PIL.Image.Resampling.LANCZOS)
                figure.save(figures / f"{slug}-card.jpg", quality=76, optimize=True)
            lines += [
                f":img-top: notebooks/figures/{slug}-card.jpg",
                f":img-alt: a figure of {facts['name']}'s notebook",
            ]
        headline = cell(facts["headline"])
        lines += [
            "",
            f"*{cell(facts['task'])}{made}*",
            "",
            f"{headline[0].upper()}{headline[1:]}.",
            "",
            ":::{card-footer}",
        ]
        if record.exists() and read_json(record).get("study", {}).get("stale"):
            lines += ["**Its study is older than its code.**", ""]
        seconds = f"CPU: {read_json(record)['seconds']:.0f} s" if record.exists() else "not run"
        hours = f"A100: {needs.longest(slug)[2]:.1f} h (estimate)"
        lines += [f'<span class="runs">{seconds}</span> <span class="runs">{hours}</span>', ""]
        lines += ["; ".join(f"{kind}s: {said}" for kind, said in counts(claims.get(slug, [])).items()) + "."]
        lines += [":::", "::::", ""]
    return "\n".join([*lines, ":::::", ""])


def ledger(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """All claims: by paper and kind; then by kind with the leads of each seed; then by kind and status."""
    every = [(slug, claim) for slug in slugs() for claim in claims.get(slug, [])]
    rows = [
        [f"[{paper(slug)['name']}](#ledger-{slug})", *counts(claims[slug]).values()]
        for slug in slugs()
        if slug in claims
    ]
    parts = [table("overview", ["Paper", *(f"{kind.capitalize()}s" for kind in KINDS)], rows)]
    links = " · ".join(f"[{kind}s](#ledger-{kind.split()[0]})" for kind in KINDS)
    parts.append(f"By kind and status: {links}. By paper: {', '.join(row[0] for row in rows)}.\n")
    for kind in KINDS:
        ours = [pair for pair in every if pair[1]["kind"] == kind]
        said = counts([claim for _, claim in ours])[kind]
        parts.append(f"(ledger-{kind.split()[0]})=\n## {kind.capitalize()}s: {said}\n\n{KIND[kind]}\n")
        if kind == SYNTHETIC:
            parts += [leads(slug, claims[slug], study(slug, reports)) for slug in slugs() if claims.get(slug)]
        for status in STATUS:
            rows = [claim_row(slug, claim) for slug, claim in ours if claim["status"] == status]
            head = ["Paper", "Claim", "Status", "Measured", *(["Evidence"] if kind == SYNTHETIC else [])]
            if rows:
                parts.append(f"### {kind.capitalize()}s: {len(rows)} {status.removesuffix('s')}\n")
                parts.append(table("ledger", head, rows))
        parts += [] if ours else ["No notebook has been run yet.\n"]
    parts.append("## By paper\n")
    for slug in slugs():
        if slug in claims:
            lines = "\n".join("- " + " ".join(claim_row(slug, claim)[2:0:-1]) for claim in claims[slug])
            parts.append(f"(ledger-{slug})=\n### {paper(slug)['name']}\n\n{lines}\n")
    return "\n".join(parts)


def claim_row(slug: str, claim: Mapping) -> list[str]:
    """The cells of a claim: paper; text, linked to its cell; status, reason; value, linked to its record; evidence."""
    status = f'<span class="status {claim["status"].replace(" ", "-")}">{STATUS[claim["status"]]}</span>'
    why = f"<br>{cell(claim['why'])}" if claim.get("why") else ""
    value = cell(str(claim.get("value") or "–")).removesuffix(SPREAD)
    record = f"<br>{{download}}`record <files/{slug}/{slug}/claims.json>`"
    rows = [f"<br>{{download}}`rows <files/{slug}/{slug}/study.csv>`", cell(claim.get("evidence") or "–")]
    return [
        f"[{paper(slug)['name']}](notebooks/{slug}.ipynb)",
        f"[{cell(claim['text'])}](#{anchor(slug, claim['id'])})",
        status + why,
        value + (record if claim["kind"] != SYNTHETIC else rows[0]),
        *(rows[1:] if claim["kind"] == SYNTHETIC else []),
    ]


def leads(slug: str, claims: Iterable[Mapping], folder: Path) -> str:
    """The lead of each test seed for each synthetic result of a paper, the largest mean first."""
    rows = ablations.read(folder)
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
    facts, found = {claim["id"]: claim for claim in paper(slug)["claims"]}, []
    for claim in claims:
        fact = facts.get(claim["id"], {})
        if claim["kind"] != SYNTHETIC or "better" not in fact:
            continue
        for task, metric in itertools.product(fact["tasks"], fact.get("metrics", [rows.attrs["metric"]])):
            lead = tested.loc[(task, fact["better"]), metric]
            lead = lead - tested.loc[(task, fact["worse"]), metric] if "worse" in fact else lead
            pair = f"{fact['better']} − {fact['worse']}" if "worse" in fact else fact["better"]
            link = f"notebooks/{slug}.html#{anchor(slug, claim['id'])}"
            label = f'<a href="{link}">{html.escape(pair)}</a><br>{html.escape(task)}, {metric}'
            found.append((label, list(lead), f"{STATUS[claim['status']]}"))
    return f"**{paper(slug)['name']}**\n\n{dots(found, line=0.0)}" if found else ""


def dots(rows: Iterable[tuple[str, list[float], str]], line: float | None = None) -> str:
    """A plot as an HTML table, without scripts: label, a dot for each value and a bar at the mean, text; ranked.

    Args:
        line: a value that is in the range, and marked.
    """
    rows = sorted(rows, key=lambda row: -sum(row[1]) / len(row[1]))
    values = [value for _, several, _ in rows for value in several] + [line] * (line is not None)
    low, high = min(values), max(values)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

    def at(value: float, mark: str) -> str:
        return f'<i class="{mark}" style="left:{100 * (value - low) / (high - low or 1):.1f}%"></i>'

    lines = []
    for label, several, text in rows:
        mean = sum(several) / len(several)
        marks = (
            (at(line, "line") if line is not None else "")
            + "".join(at(value, "dot") for value in several)
            + at(mean, "mean")
        )
        said = ", ".join(f"{value:.3g}" for value in several)
        track = f'<span class="track" role="img" aria-label="{said}; mean {mean:.3g}">{marks}</span>'
        lines.append(f'<tr><th scope="row">{label}</th><td>{track}</td><td>{mean:.3g} {text}</td></tr>')
    axis = (
        f'<tr class="axis"><td></td><td><span>{min(values):.3g}</span><span>{max(values):.3g}</span></td><td></td></tr>'
    )
    return f'<table class="dots"><tbody>{"".join(lines)}{axis}</tbody></table>\n'


def study(slug: str, reports: Path) -> Path:
    """The folder of a paper's study: of these reports where they have one, else the committed one."""
    return reports / slug if (reports / slug / "study.csv").exists() else ROOT / "reports" / "pocket" / slug


def findings_page(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """What the authors' code does that their papers do not state: by paper and kind."""
    groups = {
        (slug, kind): [row for row in findings(slug) if row["kind"] == kind] for slug in slugs() for kind in FINDINGS
    }
    overview = [
        [f"[{paper(slug)['name']}](#findings-{slug})"]
        + [f"[{len(groups[slug, kind])}](#findings-{slug}-{kind})" if groups[slug, kind] else "–" for kind in FINDINGS]
        for slug in slugs()
    ]
    parts = [table("overview", ["Paper", *(f"{kind.capitalize()}s" for kind in FINDINGS)], overview)]
    for slug in slugs():
        code = paper(slug)["code"]
        parts.append(f"(findings-{slug})=\n## {paper(slug)['name']}\n")
        parts.append(f"Code: {cell(code['repository'])}; commit: {cell(code['commit'])}.\n")
        for kind in FINDINGS:
            rows = [
                [
                    f"**{cell(row['topic'])}**",
                    "<br>".join([cell(row["code"]), *(f"`{place}`" for place in row["where"])]),
                    "<br>".join(filter(None, [cell(row["effect"]), f"case `{row['case']}`" if row["case"] else ""])),
                    cell(row["here"]),
                ]
                for row in groups[slug, kind]
            ]
            if rows:
                parts.append(
                    f"(findings-{slug}-{kind})=\n### {paper(slug)['name']}: {len(rows)} {kind}{'s' * (len(rows) > 1)}\n"
                )
                parts.append(table("findings", ["Topic", "The released code", "Effect", "Here"], rows))
    return "\n".join(parts)


def comparisons(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """The methods that answer the same question in several papers: the scores of each seed, then means in a table."""
    parts = []
    for question in yaml.safe_load((HERE / "comparisons.yaml").read_text(encoding="utf-8")):
        columns, plots = {}, []
        for column in question["columns"]:
            slug, task = column["paper"], column["task"]
            rows = ablations.read(study(slug, reports))
            metric, tested = rows.attrs["metric"], rows[(rows.stage == "test") & (rows.task == task)]
            seeds = {name: list(scores) for name, scores in tested.groupby("method")[metric]}
            names = [name for name in column["methods"] if name != "-"]
            if gone := set(names) - set(seeds):
                raise SystemExit(f"comparisons.yaml: the study of {slug} has no {gone} in {task}")
            means = ablations.summary(tested).set_index("method")
            said = {name: "{mean:.1f} ± {std:.1f}".format(**means.loc[name]) for name in names}
            head = f"{paper(slug)['name']}, {task}: {metric}"
            plots.append(f"**{head}** ({{download}}`rows <files/{slug}/{slug}/study.csv>`)\n")
            plots.append(dots([(html.escape(name), seeds[name], f"± {means.loc[name]['std']:.2g}") for name in names]))
            columns[head] = [f"{said[name]}<br>{cell(name)}" if name in said else "–" for name in column["methods"]]
        rows = [[cell(name), *values] for name, *values in zip(question["rows"], *columns.values(), strict=True)]
        parts.append(f"## {question['title']}\n\n{question['text']}\n")
        parts += plots
        parts.append(table("comparison", ["Methods", *columns], rows))
    return "\n".join(parts)


def data_page(claims: Mapping[str, list[dict]], reports: Path) -> str:
    """All data sets that have a reader: size, licence, source, and the folder that is searched."""
    parts = []
    sets = [found for found in data.DATASETS.values() if not found.name.startswith("pocket/")]
    used = [(name, slug) for slug in slugs() for run in paper(slug)["runs"] for name in needs.sets(run["data"])]
    rows = []
    for task in dict.fromkeys(found.task for found in sets):
        alike = [found for found in sets if found.task == task]
        readers = dict.fromkeys(slug for name, slug in used if name in {found.name for found in alike})
        links = ", ".join(f"[{paper(slug)['name']}](notebooks/{slug}.ipynb)" for slug in readers)
        heading = re.sub(r"[^\w\- ]", "", task.lower()).replace(" ", "-")
        names = f"[{task.capitalize()}](#{heading})"
        rows.append([names, str(len(alike)), str(sum(found.fetchable for found in alike)), links or "–"])
    parts.append(table("overview", ["Task", "Sets", "Free download", "Notebooks"], rows))
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
    files, plot = sorted((ROOT / "reports" / "bench").glob("*.json")), []
    for file in files:
        first = read_json(file)["rows"][0]
        name, link = html.escape(paper(file.stem)["name"]), f"#speed-{file.stem.replace('_', '-')}"
        label = f'<a href="{link}">{name}</a><br>{html.escape(first["what"])}'
        plot.append((label, [first["time_ratio"]], f"x, {first['seconds']:.3g} s"))
    parts = ["## Time against the baseline\n\nOne thread; left of the line ours is faster.\n", dots(plot, line=1.0)]
    notes = yaml.safe_load((HERE / "speed.yaml").read_text(encoding="utf-8"))
    for file in files:
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
            f"(speed-{file.stem})=\n## {paper(file.stem)['name']}\n\n{cell(facts['what'])}. {cell(facts['device'])}, "
            f"torch {facts['versions']['torch']}{older}.\n"
        )
        parts.append(table("bench", ["Ours / against", "Threads", "Time", "Memory", "Seconds of ours"], rows))
        parts.append(notes.get(facts["paper"], "") + "\n")
    gpus = sorted((ROOT / "reports" / "gpu").glob("*.json"))
    parts.append("" if gpus else "## On a GPU\n\nNothing was measured on a GPU so far.\n")
    parts.append(
        "## Estimates for a GPU, not measured\n\nThe longest run of each paper's tables, as `companion doctor` "
    )
    parts[-1] += (
        f"estimates it: memory at the published batch size, time from FLOPs at {needs.SHARE:.0%} of the peak.\n"
    )
    parts.append(needs.table() + "\n")
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
