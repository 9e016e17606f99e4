"""The committed notebooks follow the rules, run without a network; records written by `make notebooks`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion.io.files import write_json
from companion.io.papers import rules, slugs
from companion.runs import needs, notebooks
from tests.conftest import ROOT

COMMITTED = [ROOT / "notebooks" / f"{name}.ipynb" for name in (*slugs(), "pocket")]
OFFLINE = str(ROOT / "tests" / "offline")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_is_fit_to_read_and_its_parameters_are_literals_with_a_comment(path: Path) -> None:
    notebooks.check(path)
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    above = ""  # a long comment stands on the lines before
    for line in cell.source.splitlines():
        assignment, _, comment = line.partition("#")
        if assignment.strip():
            name, _, literal = assignment.partition("=")
            assert name.strip().isidentifier() and (comment or above).strip(), line
            ast.literal_eval(literal.strip())
        above = "" if assignment.strip() else comment


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": OFFLINE, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_block_blocks_and_lets_this_machine_through(tmp_path: Path) -> None:
    log = tmp_path / "attempts"
    local = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()"
    )
    assert python(local, OFFLINE_LOG=str(log)).returncode == 0
    assert not log.exists()
    for code in (
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import urllib.request; urllib.request.urlopen('http://example.org', timeout=1)",
    ):
        done = python(code, OFFLINE_LOG=str(log))
        assert done.returncode != 0
    assert log.read_text().split() == ["192.0.2.1", "example.org"]


def test_the_tables_of_the_pages_are_those_of_the_records_and_each_paper_has_its_figure() -> None:
    tables = {"papers": notebooks.papers_table(), "runs": needs.table(), "claims": notebooks.claims_table()}
    pages = {"README.md": tables, "notebooks/README.md": {"notebooks": notebooks.index_table()}}
    for page, tables in (pages | {"site/docs/evidence.md": {"evidence": notebooks.evidence_table()}}).items():
        written = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->" in written for mark, text in tables.items()), page
    for slug in slugs():
        assert (ROOT / "notebooks" / "figures" / f"{slug}.jpg").is_file()


def write(path: Path, *sources: str) -> Path:
    own = path.stem in slugs()
    parameters = new_code_cell(notebooks.parameters_cell(rules(path.stem)) if own else "seed = 0  # of everything")
    parameters.metadata["tags"] = ["parameters"]
    cells = [new_markdown_cell("# Title"), parameters, *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "other", "display_name": "x"}}), path)
    return path


def test_refresh_runs_and_strips(tmp_path: Path) -> None:
    image = "from IPython.display import Image\nImage(bytes(8), format='png', width=4, metadata={'own': 1})"
    path = write(tmp_path / "a.ipynb", "print(seed + 41)", "import ipywidgets\nipywidgets.IntSlider()", image)
    notebooks.refresh(path)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[2].outputs[0].text == "41\n"
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}
    assert notebook.cells[4].outputs[0].metadata == {"image/png": {"width": 4}}
    text = path.read_text(encoding="utf-8")
    assert "widget-view" not in text and "iopub" not in text
    notebooks.refresh(path)
    assert path.read_text(encoding="utf-8") == text, "a second run changes nothing"


def test_the_committed_record_is_that_of_the_refreshed_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run before it in `runs/` has no part in it; a notebook that fails changes no record."""
    (tmp_path / "lib" / "companion").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs" / "pocket" / "sa2vp").mkdir(parents=True)
    (tmp_path / "runs" / "pocket" / "sa2vp" / "study.csv").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("COMPANION_PROGRESS", "COMPANION_RUNS"):
        monkeypatch.setenv(name, "")
    report = (
        "import pandas as pd\nfrom companion.runs import report\nrun = report.start('sa2vp', globals())\n"
        "run.table('own', pd.DataFrame({'a': [1]}))\nprint(run.study().relative_to(run.root))\nrun.close();"
    )
    path = write(tmp_path / "notebooks" / "sa2vp.ipynb", report)
    with pytest.raises(notebooks.BadNotebook):
        notebooks.check(path)
    assert notebooks.main([str(path)]) == 0, capsys.readouterr()
    notebooks.check(path)
    assert "reports/pocket/sa2vp\n" in [o.get("text") for o in nbformat.read(path, as_version=4).cells[2].outputs]
    record = tmp_path / "reports" / "pocket" / "sa2vp"
    assert sorted(p.name for p in record.iterdir()) == ["claims.json", "run.json", "tables"]
    assert (record / "tables" / "own.csv").read_text() == "a\n1\n"
    before = (record / "run.json").read_bytes()
    path = write(path, report, "raise ValueError('the reason')")
    assert notebooks.main([str(path)]) == 1 and "the reason" in capsys.readouterr().err
    assert (record / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("raise ValueError('the reason')", "the reason"),
        ("import sys\nprint('careful', file=sys.stderr)", "careful"),
        ("import os\nprint('in', os.path.join(os.sep, 'home', 'someone', 'x'))", "/home/someone/x"),
        ("print('x' * 1_100_000)", f"{notebooks.LIMIT:,}"),
    ],
)
def test_a_notebook_that_must_not_be_committed_stays_as_it_was(tmp_path: Path, source: str, named: str) -> None:
    path = write(tmp_path / "a.ipynb", source)
    before = path.read_bytes()
    with pytest.raises(notebooks.BadNotebook, match=named):
        notebooks.refresh(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("width = 0", "widht = 0", "'widht'.*'width'"),
        ("width = 0", "", "no width;"),
        ("scale = 0", "scale = -1", "scale = -1"),
        ("seed = 0", "seed = len('')", "parameters"),
    ],
)
def test_parameters_of_a_notebook_are_those_of_its_paper(tmp_path: Path, old: str, new: str, named: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "sa2vp.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, tmp_path / "sa2vp.ipynb")
    with pytest.raises(notebooks.BadNotebook, match=named):
        notebooks.check(tmp_path / "sa2vp.ipynb")


def test_a_run_replaces_the_files_of_the_run_before_and_leaves_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "root", lambda: tmp_path)
    kept = tmp_path / "reports" / "pocket" / "bat"
    for i, names in enumerate((("claims.json", "old.csv"), ("claims.json", "new.csv"))):
        (out := tmp_path / f"run{i}").mkdir()
        for name in names:
            (out / name).write_text(f"{name} of run {i}")
        write_json(out / "run.json", {"outputs": dict.fromkeys(names, "")})
        notebooks.keep(out, "bat")
        (kept / "study.csv").write_text("a study")
    assert {path.name for path in kept.iterdir()} == {"claims.json", "new.csv", "run.json", "study.csv"}
    assert (kept / "claims.json").read_text() == "claims.json of run 1"
