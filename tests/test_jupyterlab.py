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
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A copy of the checkout's notebooks, in which no cell has been run, and the address of a server over it."""
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(root / "pyproject.toml", folder)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    slider = "from companion.viz import widgets\nwidgets.live(lambda side: np.zeros((side, side, 3)), side=[8, 9, 10])"
    cells = [new_code_cell("import numpy as np"), new_code_cell(slider)]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "notebooks" / "small.ipynb")
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


def test_run_all(lab: tuple[Path, str], browser: object, root: Path) -> None:
    """All cells run without an error, the saved notebook has their outputs, and its widgets are visible."""
    folder, url = lab
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    try:
        page.goto(f"{url}lab/tree/notebooks/small.ipynb?token={TOKEN}", timeout=60_000)
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
            assert not failed.count(), f"a cell failed:\n{failed.first.inner_text()}"
            assert time.monotonic() < deadline, f"not finished in {MINUTES} minutes: {shown}"
        page.locator(".jp-OutputArea-output .jupyter-widgets").first.wait_for(timeout=20_000)
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-dirty", state="detached", timeout=20_000)
    except Exception:
        page.screenshot(path=root / "build" / "jupyterlab.png", full_page=True)
        raise
    finally:
        context.close()
    cells = nbformat.read(folder / "notebooks" / "small.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
