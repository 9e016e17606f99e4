"""Opens a notebook in JupyterLab and presses Run All: in a real Chromium, with a local server."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.browser
MINUTES = 4
TOKEN = "only-for-this-test"  # the server lives for these tests and listens on this machine only
# cells out of sight have to be in the page too, or the test could not see them
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A copy of the checkout's notebooks, in which no cell has been run, and the address of a server over it."""
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(root / "pyproject.toml", folder)
    shutil.copytree(root / "reports" / "pocket", folder / "reports" / "pocket")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    small = new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("x + 1")], metadata={"kernelspec": kernel})
    for name, notebook in (("small", small), ("bat", nbformat.read(root / "notebooks" / "bat.ipynb", 4))):
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    for name, setting in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(setting), encoding="utf-8")
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    options = [
        *("--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"),
        *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"),
        *(f"--LabApp.{name}_dir={folder / name}" for name in ("user_settings", "workspaces")),
    ]
    (folder / "settings").rename(folder / "user_settings")
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env={**os.environ, **own, "JUPYTER_RUNTIME_DIR": str(folder / "runtime")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline, found = time.monotonic() + 60, []
    while not found:
        log = (folder / "server.log").read_text(encoding="utf-8")[-3000:]
        assert server.poll() is None and time.monotonic() < deadline, f"JupyterLab did not start:\n{log}"
        time.sleep(0.2)
        found = [f for f in (folder / "runtime").glob("jpserver-*.json") if not f.stem.endswith("-open")]
    yield folder, json.loads(found[0].read_text(encoding="utf-8"))["url"]
    server.terminate()  # the server ends its kernels
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.mark.parametrize(("name", "controls"), [("small", 0), pytest.param("bat", 1, marks=pytest.mark.slow)])
def test_run_all(lab: tuple[Path, str], browser: object, root: Path, name: str, controls: int) -> None:
    """All cells run without an error, the saved notebook has their outputs, and its widgets are visible."""
    folder, url = lab
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    try:
        # a workspace of its own: else JupyterLab opens what the test before had open, too
        page.goto(f"{url}lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={TOKEN}", timeout=60_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
        # JupyterLab shows a traceback and what was written to stderr in the same way; neither may be there
        failed = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
        deadline, shown = time.monotonic() + 60 * MINUTES, [""]
        while not all(re.fullmatch(r"\[\d+\]:", text.strip()) for text in shown):
            page.wait_for_timeout(500)
            shown = prompts.all_inner_texts()
            assert not failed.count(), f"a cell of {name} failed:\n{failed.first.inner_text()}"
            assert time.monotonic() < deadline, f"{name} did not finish in {MINUTES} minutes: {shown}"
        page.wait_for_timeout(1000)  # widgets draw themselves after their cell is done
        widgets = page.locator(".jp-OutputArea-output :is(.jupyter-widgets, input[type=range], select)")
        assert sum(widget.is_visible() for widget in widgets.all()) >= controls
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-dirty", state="detached", timeout=20_000)
    except Exception:
        page.screenshot(path=root / "build" / f"jupyterlab-{name}.png", full_page=True)
        raise
    finally:
        context.close()
    cells = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
