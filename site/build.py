"""Build the site from a folder of reports: pages that are written by hand, executed notebooks, and tables of records.

    python site/build.py --reports build/reports/pocket --out reports/site

The Markdown pages are Jinja templates, which name what is filled in. Sphinx needs all sources in one tree, so they are
first written to a temporary folder; the finished site is renamed to `--out`, which is never incomplete.
"""

from __future__ import annotations

import argparse
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import nbformat
import pandas as pd
import PIL.Image
import yaml
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

from companion import data
from companion.cli import commands
from companion.evaluation import ablations
from companion.evaluation.claims import SPREAD, SYNTHETIC, counts
from companion.evaluation.tables import Results, published_table
from companion.io import record
from companion.io.files import read_json
from companion.io.papers import FINDINGS, findings, paper, slugs
from companion.io.provenance import code_hash, sources
from companion.runs import needs
from companion.runs.pack import FILES
from companion.viz.tables import escape

HERE = Path(__file__).parent
ROOT = HERE.parent
CARD = 560  # pixels of a card's figure
LARGE = 100_000  # bytes of a figure above which it is a JPEG
DRAWS = re.compile(r"run\.(figure|table|claims_from)|widgets\.|plots\.|SVG\(|report\.opening|heat_table")
WORKS = re.compile(r"\bfit\(|^(def|class) |recipe\.run\(|run\.claim\(|companion\.save|\.start\(", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path, required=True, help="folder with one folder a notebook")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished site")
    arguments = parser.parse_args()
    reports, out = arguments.reports, arguments.out.resolve()
    runs = {path.stem: path.parent for path in sorted(reports.glob("*/*.ipynb")) if path.parent.name == path.stem}
    if not runs:
        parser.error(f"no executed notebook in {reports}: its folders are <slug>/<slug>.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent) as temporary:
        source, built = Path(temporary, "source"), Path(temporary, "site")
        shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("*.py", "*.yaml", "static", "__pycache__"))
        for slug in slugs():  # the rows of the studies, also of papers that were not run
            keep(study(slug, reports) / "study.csv", slug, source)
        for one in contributed():
            shutil.copytree(one["folder"], source / one["files"])
        for slug, folder in runs.items():
            write_notebook(folder, source / "notebooks" / f"{slug}.ipynb", runs)
            write_card(slug, source / "notebooks" / "figures")
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        environment.globals.update(facts(runs, reports))
        environment.filters |= {"cell": cell, "escape": escape}
        for path in source.rglob("*.md"):
            text = environment.from_string(path.read_text(encoding="utf-8")).render()
            path.write_text(without_missing(text, "notebooks/", runs), encoding="utf-8")
        options = ["-q", "-j", "auto", "-W", "--keep-going", "-c", str(HERE), "-d", f"{temporary}/trees"]
        if code := sphinx([*options, str(source), str(built)]):
            raise SystemExit(code)
        if out.exists():
            out.rename(Path(temporary, "old"))
        built.rename(out)


# --- notebooks ---


def without_missing(text: str, folder: str, runs: Iterable[str]) -> str:
    """Markdown without links to notebooks that were not run: `make reports PAPERS=...` runs some of them."""
    link = rf"\[([^\]]+)\]\((?:\.\./)?{folder}(?!(?:{'|'.join(runs)})\.ipynb)[\w-]+\.ipynb[^)]*\)"
    return re.sub(link, r"\1", text)


def write_notebook(folder: Path, target: Path, runs: Iterable[str]) -> None:
    """Copy an executed notebook without live widgets and injected parameters; add how to run it, anchors of claims and
    links to files; fold code that only draws, and show figures as sharp as the run's own."""
    slug = folder.name
    notebook = nbformat.read(folder / f"{slug}.ipynb", as_version=4)
    notebook.metadata.pop("widgets", None)
    waiting, cells = [(claim["id"], claim["kind"]) for claim in ledger(folder)], []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell.source = cell.source.replace(f"../lib/companion/models/{slug}/findings.yaml", f"#findings-{slug}")
        if cell.cell_type == "markdown":  # files of the checkout are no pages
            cell.source = re.sub(r"\[([^\]]+)\]\(\.\./lib/[^)]*\)", r"\1", cell.source)
            cell.source = without_missing(cell.source, "", runs)
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
    nbformat.write(notebook, target)


def ledger(folder: Path) -> list[dict]:
    """The claims of a run; none for a notebook without claims."""
    return read_json(folder / "claims.json") if (folder / "claims.json").exists() else []


def write_card(slug: str, target: Path) -> None:
    """Copy the figure of a notebook's first screen, and a small one for its card on the front page."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "notebooks" / "figures").glob(f"{slug}.jpg"):
        shutil.copy(file, target)
        with PIL.Image.open(file) as figure:
            figure.thumbnail((CARD, CARD), PIL.Image.Resampling.LANCZOS)
            figure.save(target / f"{slug}-card.jpg", quality=76, optimize=True)


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


# --- what the pages are filled with ---


def facts(runs: Mapping[str, Path], reports: Path) -> dict[str, Any]:
    """The names that the templates use."""
    os.environ["COLUMNS"] = "100"  # of argparse's help
    papers: list[dict] = []
    for slug in slugs():
        folder = runs.get(slug, HERE)
        run = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
        figure = slug in runs and (ROOT / "notebooks" / "figures" / f"{slug}.jpg").exists()
        papers.append(paper(slug) | {"slug": slug, "run": run, "figure": figure, "ledger": None})
        if slug in runs:
            papers[-1]["ledger"] = ledger(folder)
    kinds = Counter(found["kind"] for slug in slugs() for found in findings(slug))
    tasks: dict[str, list[data.DataSet]] = {}
    for found in data.DATASETS.values():
        if found.group != "pocket":
            tasks.setdefault(found.task, []).append(found)
    bench = {file.stem: read_json(file) for file in sorted((ROOT / "reports" / "bench").glob("*.json"))}
    for slug, measured in bench.items():
        code = code_hash(sources(ROOT / "benchmarks" / f"{slug}.py"))
        measured["older"] = measured.get("code") != code
    files, feeding, scale = (bench.pop(name) for name in ("readers", "feeding", "scale"))
    return {
        "papers": papers,
        "everything": [claim for one in papers for claim in one["ledger"] or []],
        "study_rows": sum(len(ablations.read(study(slug, reports))) for slug in slugs()),
        "cases": lambda folder: len(list((ROOT / "tests" / folder).glob("*/*/case.json"))),
        "kinds": {kind: kinds[kind] for kind in FINDINGS},
        "tasks": tasks,
        "bench": bench,
        "ratios": [ratio(slug, measured["rows"][0]) for slug, measured in bench.items()],
        "files": files,
        "feeding": feeding,
        "scale": scale,
        "reading": [
            (html.escape(row["what"].removesuffix(" / ImageFolder")), [row["time_ratio"]], f"x, {row['fps']:,.0f}/s")
            for row in files["rows"]
        ],
        "notes": yaml.safe_load((HERE / "speed.yaml").read_text(encoding="utf-8")),
        "gpus": [read_json(file) for file in sorted((ROOT / "reports" / "gpu").glob("*.json"))],
        "share": needs.SHARE,
        "shown": needs.SHOWN,
        "rows": [row for slug in slugs() for row in needs.rows(slug)],
        "titles": {(slug, run["id"]): run["title"] for slug in slugs() for run in paper(slug)["runs"]},
        "inf": math.inf,
        "session": (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8").partition("<!-- session -->")[2],
        "estimates": needs.table,
        "gigabytes": {gpu: needs.GPUS[gpu][3] for gpu in needs.SHOWN},
        "contributed": contributed(),
        "FILES": FILES,
        "longest": needs.longest,
        "comparisons": lambda: comparisons(reports),
        "leads": lambda one, shown: leads(one, shown, study(one["slug"], reports)),
        "measured": lambda claim: escape(str(claim.get("value") or "–").removesuffix(SPREAD)),
        "json": json.dumps,
        "disk": needs.disk,
    } | {
        f.__name__: f
        for f in (access, anchor, cell, command, commands, counts, dots, filled, findings, given, paper, readers, timed)
    }


def readers(sets: Iterable[data.DataSet]) -> str:
    """Links to the notebooks whose runs read some of these sets."""
    names = {found.name for found in sets}
    reading = [slug for slug in slugs() for run in paper(slug)["runs"] if names & {*needs.sets(run["data"])}]
    return ", ".join(f"[{paper(slug)['name']}](notebooks/{slug}.ipynb)" for slug in dict.fromkeys(reading))


def ratio(slug: str, row: Mapping) -> tuple[str, list[float], str]:
    """A row of `dots`: the time of a method by that of its baseline."""
    link = f'<a href="#speed-{slug.replace("_", "-")}">{html.escape(paper(slug)["name"])}</a>'
    return f"{link}<br>{html.escape(row['what'])}", [row["time_ratio"]], f"x, {row['seconds']:.3g} s"


def comparisons(reports: Path) -> list[dict]:
    """The methods that answer the same question in several papers: of each column the seeds' scores and the cells."""
    questions = yaml.safe_load((HERE / "comparisons.yaml").read_text(encoding="utf-8"))
    for column in itertools.chain(*(question["columns"] for question in questions)):
        rows = ablations.read(study(column["paper"], reports))
        metric, tested = rows.attrs["metric"], rows[(rows.stage == "test") & (rows.task == column["task"])]
        seeds = {name: list(scores) for name, scores in tested.groupby("method")[metric]}
        if gone := set(column["methods"]) - seeds.keys() - {"-"}:
            raise SystemExit(f"comparisons.yaml: the study of {column['paper']} has no {gone} in {column['task']}")
        means = ablations.summary(tested).set_index("method")
        column["head"] = f"{paper(column['paper'])['name']}, {column['task']}: {metric}"
        column["seeds"], column["cells"] = [], []
        for name in column["methods"]:
            if name == "-":
                column["cells"].append("–")
                continue
            column["seeds"].append((html.escape(name), seeds[name], f"± {means.loc[name]['std']:.1f}"))
            column["cells"].append("{mean:.1f} ± {std:.1f}".format(**means.loc[name]) + f"<br>{cell(name)}")
    return questions


def leads(one: Mapping, shown: Mapping[str, str], folder: Path) -> list[tuple[str, list[float], str]]:
    """Rows of `dots`: the lead of each test seed for each synthetic result of a paper."""
    rows = ablations.read(folder)
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
    claims, found = {claim["id"]: claim for claim in one["claims"]}, []
    for judged in one["ledger"]:
        claim = claims.get(judged["id"], {})
        if judged["kind"] != SYNTHETIC or "better" not in claim:
            continue
        methods = [claim[role] for role in ("better", "worse") if role in claim]
        for task, metric in itertools.product(claim["tasks"], claim.get("metrics", [rows.attrs["metric"]])):
            first, *second = (tested.loc[(task, method), metric] for method in methods)
            link = f"notebooks/{one['slug']}.html#{anchor(one['slug'], claim['id'])}"
            label = f'<a href="{link}">{html.escape(" − ".join(methods))}</a><br>{html.escape(task)}, {metric}'
            found.append((label, list(first - second[0] if second else first), shown[judged["status"]]))
    return found


def dots(rows: Iterable[tuple[str, Sequence[float], str]], line: float | None = None) -> str:
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
        shown = f"{mean:.1f}" if abs(mean) >= 10 else f"{mean:.2f}"
        marks = (
            (at(line, "line") if line is not None else "")
            + "".join(at(value, "dot") for value in several)
            + at(mean, "mean")
        )
        said = ", ".join(f"{value:.3g}" for value in several)
        track = f'<span class="track" role="img" aria-label="{said}; mean {shown}">{marks}</span>'
        lines.append(f'<tr><th scope="row">{label}</th><td>{track}</td><td>{shown} {text}</td></tr>')
    axis = (
        f'<tr class="axis"><td></td><td><span>{min(values):.3g}</span><span>{max(values):.3g}</span></td><td></td></tr>'
    )
    return f'<table class="dots"><tbody>{"".join(lines)}{axis}</tbody></table>\n'


def study(slug: str, reports: Path) -> Path:
    """The folder of a paper's study: of these reports where they have one, else the committed one."""
    return reports / slug if (reports / slug / "study.csv").exists() else ROOT / "reports" / "pocket" / slug


def anchor(slug: str, claim: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"claim {slug} {claim}".lower()).strip("-")


def command(row: needs.Row) -> str:
    """What makes all runs of an entry; features of slides are stored without a notebook."""
    if "parameters" in row.run:
        return f"companion run {row.slug} {row.run['id']} --data-root DATA"
    return f"companion slides {row.run['data']} --weights FILE --data-root DATA"


def given(row: needs.Row) -> str:
    """The parameters of a row's runs for papermill, with the values of each."""
    lines = []
    for name, values in ({"dataset": row.sets} | row.run.get("parameters", {})).items():
        texts = [str(value).format(data_root="DATA") for value in (values if isinstance(values, list) else [values])]
        lines.append(f"`-p {name}` " + ", ".join(f"`{shlex.quote(text)}`" for text in texts))
    return "<br>".join(lines)


def access(row: needs.Row) -> str:
    """How one comes by the data of a row, with their licences."""
    known = [data.DATASETS[name] for name in row.sets]
    free = sum(one.fetchable for one in known)
    some = "" if free in (0, len(known)) else f" ({free} of {len(known)})"
    how = f"free, `companion fetch {row.slug}`{some}" if free else "[by hand](data.md)"
    return f"{how}; licence: " + "; ".join(dict.fromkeys(cell(one.licence) for one in known))


def contributed() -> list[dict[str, Any]]:
    """The rows that others measured, in `reports/contributed`: of each its run.json, `folder`, `rows` of measured.csv,
    and the place of its `files` in the site's sources, which no text of others names."""
    folders = sorted({file.parent for file in record.root().glob(f"reports/contributed/*/*/{FILES[0]}")})
    return [
        read_json(folder / FILES[0])
        | {"folder": folder, "rows": pd.read_csv(folder / FILES[1]), "files": f"files/contributed/{number}"}
        for number, folder in enumerate(folders)
    ]


def filled(slug: str, one: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The cells of published tables that a contribution fills: table, row and column, published and measured score."""
    results, found = Results.of(slug), []
    for table, spec in results.cells.items():
        frame = published_table(slug, table)
        for (row, column), score in results.filled(one["rows"], spec).items():
            same = frame[frame.method == row]
            number = same[column].iloc[0] if len(same) and column in frame else math.nan
            name = f"{frame.attrs['title']}: {row}, {column}"
            found.append((name, "–" if pd.isna(number) else f"{number:g}", f"{score:.2f}"))
    return found


def timed(row: needs.Row) -> str:
    """What contributed runs of a row took, the whole notebook, next to the estimate."""
    own = [one for one in contributed() if one["slug"] == row.slug and {*one["items"]} & {*row.sets}]
    own = [one for one in own if needs.run_of(row.slug, SimpleNamespace(**one["parameters"])) == row.run]
    took = [f"{one['seconds'] / 3600:.1f} h on {one['device']}" for one in own]
    return "<br>measured: " + escape("; ".join(took)) if took else ""


def cell(text: str) -> str:
    """Plain text escaped for a Markdown table, except code between backticks and formulas between dollar signs."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", " ".join(text.split()))  # every second part is one
    parts[::2] = [re.sub(r"([\\`*_\[\]<&])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


if __name__ == "__main__":
    main()
