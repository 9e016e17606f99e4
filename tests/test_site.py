"""The site, built from a small generated report and from the real one, opened in a real browser without a network."""

import functools
import http.server
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from companion.evaluation.claims import KINDS
from companion.io.papers import slugs
from companion.runs import needs
from companion.runs.pack import FILES
from companion.viz.tables import show_table
from companion.viz.widgets import explorer
from tests.runs.common import contribution, small_checkout

CLAIMS = yaml.safe_load(r"""
- {id: params, text: 'trains $2 \times d$ parameters', kind: implementation check, status: holds, value: 11, seeds: [0]}
- {id: beats, text: 'A | B: a_1 < b_1 & <i>more</i> [*]', kind: synthetic result, status: fails, seeds: [0, 1, 2],
   value: {a: 0.51234, b: 0.6}, why: the margin is within the spread}
- {id: full, text: 90.1 on the real data, kind: paper result, status: not run, value: null, seeds: [],
   why: needs the real data}
""")
# what a class, a data set or a row of others may be called: nothing of it is a role, a formula, HTML or a table
HOSTILE = (
    "{download}`/etc/hostname` <script>alert(1)</script> $\\alpha$ | [a](b) **b** _c_ ~~d~~ {{ e }} &amp; ::: '\"\\"
)
MADE_UP = ("index.html", "notebooks/sa2vp.html")  # pages of the site of made-up reports that the real one has not


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reports with one run in it."""
    folder = tmp_path_factory.mktemp("reports") / "sa2vp"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "accuracy.csv").write_text("method,digits,a|b\nlinear,0.61,<b>\nvpt,0.72,\n", encoding="utf-8")
    (folder / "claims.json").write_text(json.dumps(CLAIMS), encoding="utf-8")
    record = {"slug": "sa2vp", "profile": "pocket", "seconds": 12.345, "study": {"stale": True}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "interactive(children=())"}
    outputs = [
        new_output("display_data", data=view),
        new_output("stream", name="stdout", text="a very long line " * 30 + "\n"),
        new_output("display_data", data={"text/html": show_table(pd.DataFrame({HOSTILE: [HOSTILE]}), 1, HOSTILE).data}),
        new_output(
            "display_data",
            data={"text/html": explorer([np.zeros((8, 8, 3))] * 2, {HOSTILE: ["a", HOSTILE]}, HOSTILE).data},
        ),
    ]
    cells = [
        new_markdown_cell(
            "# A\n\nSee [another](pocket.ipynb). Its loss is\n\n$$\\boldsymbol{L} = \\sum_i \\lVert x_i \\rVert^2$$"
        ),
        new_code_cell("widget()", outputs=outputs, execution_count=1),
        new_code_cell('run.claim("params", holds=True)', execution_count=2),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.write(notebook, folder / "sa2vp.ipynb")
    return folder.parent


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout to which two people have contributed a row each; the second passed no check."""
    folder = small_checkout(tmp_path_factory.mktemp("checkout") / "small")
    place = folder / "reports/contributed/sa2vp"
    contribution(place / "2026-01-01-a", "A. Person", "Tesla T4", 0, 80)
    contribution(place / "2026-01-01-b `b`", HOSTILE, HOSTILE, 1, -10)
    row = f'"SA²VP, {HOSTILE}'.replace('"', '""')[1:] + '"'
    measured = place / "2026-01-01-b `b`" / "measured.csv"
    measured.write_text(measured.read_text(encoding="utf-8").replace("SA²VP", row), encoding="utf-8")
    return folder


class Site:
    def __init__(self, real: bool, reports: Path, folder: Path, url: str):
        self.real, self.reports, self.folder, self.url = real, reports, folder, url
        pages = (path.relative_to(folder) for path in folder.rglob("*.html"))
        pages = (page.as_posix() for page in pages if page.parts[0] != "_static")
        # the pages that are not made of reports are the same in both sites
        of_reports = ("index.html", "ledger.html", "notebooks/")
        self.pages = sorted(page for page in pages if real or page.startswith(of_reports))
        # the pages of the API reference are alike, and the largest
        self.few = [page for page in self.pages if not page.startswith("api/") or page == "api/companion.viz.html"]


@pytest.fixture(scope="session")
def committed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reports with the committed notebooks and their records."""
    folder = tmp_path_factory.mktemp("committed") / "pocket"
    shutil.copytree(root / "reports" / "pocket", folder)
    for notebook in (root / "notebooks").glob("*.ipynb"):
        (folder / notebook.stem).mkdir(exist_ok=True)
        shutil.copy(notebook, folder / notebook.stem)
    return folder


@pytest.fixture(scope="session")
def sites(
    request: pytest.FixtureRequest,
    root: Path,
    made_up: Path,
    committed: Path,
    checkout: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Site]:
    """Each of the two sites, built once, behind a server on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    @functools.cache
    def made(kind: str) -> Site:
        reports = made_up if kind == "made-up" else committed
        out = tmp_path_factory.mktemp("built") / "site"
        out.mkdir()
        (out / "stale.html").write_text("built before", encoding="utf-8")
        done = build(root, reports, out, api=kind == "real", cwd=root if kind == "real" else checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(out)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        request.addfinalizer(server.shutdown)
        return Site(kind == "real", reports, out, f"http://127.0.0.1:{server.server_address[1]}")

    return made


@pytest.fixture(params=["made-up", pytest.param("real", marks=pytest.mark.slow)])
def site(request: pytest.FixtureRequest, sites: Callable[[str], Site]) -> Site:
    return sites(request.param)


class Links(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attributes if name in ("href", "src") and value]
        self.ids |= {value for name, value in attributes if name in ("id", "name") and value}


# the API reference takes most of the time of a build; without it the front page lists a page that is not there
WITHOUT_API = """
import runpy, sys
site = runpy.run_path(sys.argv.pop(1))
shared = site["main"].__globals__
sphinx = shared["sphinx"]
shared["sphinx"] = lambda words: sphinx([*(w for w in words if w != "-W"), "-D", "exclude_patterns=api/*,files"])
site["main"]()
"""


def build(
    root: Path, reports: Path, out: Path, api: bool = True, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `site/build.py`, without `api` without the API reference; `cwd` has the contributed rows."""
    program = [] if api else ["-c", WITHOUT_API]
    command = [sys.executable, *program, root / "site" / "build.py", "--reports", reports, "--out", out]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_links_resolve_and_no_page_loads_anything_from_elsewhere(site: Site) -> None:
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*src="(?:https?:)?//|<link[^>]*href="(?:https?:)?//""")
    pages = {page: Links(site.folder / page) for page in site.pages}
    broken = [page for page in pages if loads.search((site.folder / page).read_text(encoding="utf-8"))]
    for page, links in pages.items():
        for link in links.targets:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            path = (site.folder / page).parent / unquote(parts.path) if parts.path else site.folder / page
            path = path / "index.html" if path.is_dir() else path
            inside = path.resolve().relative_to(site.folder.resolve()).as_posix()
            if not path.exists() or (inside in pages and parts.fragment and parts.fragment not in pages[inside].ids):
                broken.append(f"{page}: {link}")
    assert not broken
    assert not (site.folder / "stale.html").exists() and [f.name for f in site.folder.parent.iterdir()] == ["site"]


def test_claims_that_are_not_run_lead_to_the_rows_of_their_paper_by_hours_on_a_t4(site: Site) -> None:
    claims = [claim for file in site.reports.glob("*/claims.json") for claim in json.loads(file.read_text("utf-8"))]
    gpus = site.folder / "gpus.html"
    linked = [link for link in Links(site.folder / "ledger.html").targets if link.startswith("gpus.html#")]
    assert len(linked) == sum(claim["status"] == "not run" for claim in claims) > 0
    assert {link.partition("#")[2] for link in linked} <= Links(gpus).ids
    rows = {row.anchor: row for slug in slugs() for row in needs.rows(slug)}
    shown = re.findall(r'<span id="(gpus-[^"]+)"', gpus.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(rows)
    hours = [rows[name].t4 for name in shown]
    assert hours == sorted(hours) and {0 < h < math.inf for h in hours} == {True, False}
    first = [(rows[name].slug, rows[name].run["id"]) for name in shown]
    for at, name in enumerate(shown):  # no row comes before the run that it needs
        if "after" in rows[name].run:
            assert (rows[name].slug, rows[name].run["after"]) in first[:at]


@pytest.mark.browser
def test_pages_in_a_browser(site: Site, browser: object) -> None:
    """No error, no formula that is not drawn, no sideways scrolling, and no serious accessibility fault, in both colour
    schemes; of the API reference, one page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context()
    faults = []
    context.on("response", lambda answer: answer.status >= 400 and faults.append(f"{answer.url}: {answer.status}"))
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("requestfailed", lambda request: faults.append(f"{request.url}: {request.failure}"))
    page = context.new_page()
    for name in site.few:
        page.goto(f"{site.url}/{name}", wait_until="networkidle")
        page.add_style_tag(content="* { transition: none !important }")
        for width, scheme in ((390, "dark"), (1280, "light")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                faults.append(f"{name}: wider than {width} px")
            options = {"preload": False} | ({"runOnly": ["color-contrast"]} if scheme == "dark" else {})
            found = axe.run(page, options=options).response["violations"] if site.real or name in MADE_UP else ()
            faults += [f"{name}: {one['id']}" for one in found if one["impact"] in ("serious", "critical")]
        if page.locator("mjx-merror, [data-mml-node=merror]").count():
            faults.append(f"{name}: a formula")
    context.close()
    assert not faults


@pytest.mark.browser
@pytest.mark.slow
def test_the_controls_of_every_widget_change_its_image(sites: Callable[[str], Site], browser: object) -> None:
    site = sites("real")
    dead, seen, page = [], set(), browser.new_page()
    for name in (name for name in site.pages if name.startswith("notebooks/")):
        page.goto(f"{site.url}/{name}", wait_until="load")
        for widget in page.locator(".companion-explorer").all():
            seen.add(name)
            for control in widget.locator("input, select").all():
                before = widget.locator("img").first.get_attribute("src")
                if control.evaluate("e => e.tagName") == "SELECT":
                    control.select_option(index=control.locator("option").count() - 1)
                else:
                    control.fill(control.get_attribute("max"))
                if widget.locator("img").first.get_attribute("src") == before:
                    dead.append(f"{name}: {control.evaluate('e => e.outerHTML')[:80]} does nothing")
    page.close()
    assert not dead and len(seen) > 5


@pytest.mark.browser
def test_ledger_is_the_claims_and_its_text_is_escaped(site: Site, browser: object) -> None:
    claims = [claim for file in site.reports.glob("*/claims.json") for claim in json.loads(file.read_text("utf-8"))]
    with browser.new_page() as page:
        page.goto(f"{site.url}/ledger.html")
        rows = "tables => tables.map(t => [...t.querySelectorAll('tbody .status')].map(s => s.innerText.slice(2)))"
        tables = page.locator("table.ledger").evaluate_all(rows)
        kinds = [[c["status"] for c in claims if c["kind"] == kind] for kind in KINDS]
        assert tables == [[s] * said.count(s) for said in kinds for s in ("holds", "fails", "not run") if s in said]
        assert site.real or "A | B: a_1 < b_1 & <i>more</i> [*]" in page.inner_text("article")


def test_contributed_rows_stand_apart_from_the_claims(sites: Callable[[str], Site]) -> None:
    site = sites("made-up")
    text = (site.folder / "ledger.html").read_text(encoding="utf-8")
    (table,) = re.findall(r"<table class=[^>]*contributed.*?</table>", text, re.S)
    assert re.search(r"SA2VP, svhn.*?80.00.*?A. Person; Tesla T4; 2026-01-01", table, re.S)
    links = [link for link in Links(site.folder / "ledger.html").targets if link.endswith(FILES)]
    assert len(links) == 2 * len(FILES) and all((site.folder / link).is_file() for link in links)
    rows = (site.folder / "gpus.html").read_text(encoding="utf-8")
    assert rows.count("measured: 0.8 h on Tesla T4; 0.8 h on ") == 1


class Text(HTMLParser):
    """The text of a page, each piece of white space as one blank."""

    def __init__(self, path: Path):
        super().__init__()
        self.pieces: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.all = " ".join("".join(self.pieces).split())

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def test_text_of_others_is_shown_verbatim_and_adds_no_file(sites: Callable[[str], Site]) -> None:
    """Names of classes and data sets in a notebook's tables and controls; who measured, on which GPU, and which row."""
    site = sites("made-up")
    notebook, rows = (Text(site.folder / page).all for page in ("notebooks/sa2vp.html", "ledger.html"))
    # caption, head and cell; the widget's title, control, its first image and its last choice
    assert notebook.count(HOSTILE.replace("_c_", "c")) == 1 and notebook.count(HOSTILE) >= 5
    assert rows.count(HOSTILE) == 3
    assert HOSTILE in Text(site.folder / "gpus.html").all
    for page in site.folder.rglob("*.html"):
        assert "<script>alert(1)" not in page.read_text(encoding="utf-8")
    assert not [*site.folder.rglob("hostname*")]


def test_without_reports_the_site_stays_as_it_was(root: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "before.html").touch()
    result = build(root, tmp_path / "misspelt", tmp_path / "site")
    assert result.returncode == 2 and str(tmp_path / "misspelt") in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["site", "before.html"]
