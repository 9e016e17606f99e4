"""Opens a notebook in JupyterLab and presses Run All: in a real Chromium, with a local server."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTES = 4
TOKEN = "only-for-this-test"  # the server lives for these tests and listens on this machine only


class Lab:
    """A JupyterLab server over a copy of the checkout's notebooks, with settings of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, text in (
            # cells out of sight have to be in the page too, or the test could not see them
            ("notebook-extension/tracker", '{"windowingMode": "none"}'),
            ("apputils-extension/notification", '{"fetchNews": "false"}'),
        ):
            file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True)
            file.write_text(text, encoding="utf-8")
        self.log = folder / "server.log"
        own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
        options = [
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            "--ServerApp.port=0",
            f"--IdentityProvider.token={TOKEN}",
            f"--ServerApp.root_dir={folder}",
            f"--LabApp.user_settings_dir={folder / 'settings'}",
            f"--LabApp.workspaces_dir={folder / 'workspaces'}",
        ]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                cwd=folder,
                env={**os.environ, **own, "JUPYTER_RUNTIME_DIR": str(folder / "runtime")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = self._address()

    def _address(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for file in (self.folder / "runtime").glob("jpserver-*.json"):
                if not file.stem.endswith("-open"):
                    return json.loads(file.read_text(encoding="utf-8"))["url"]
            time.sleep(0.2)
        raise AssertionError(f"JupyterLab did not start:\n{self.log.read_text(encoding='utf-8')[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()  # the server ends its kernels
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run_all(
    lab: Lab, browser: object, name: str, screenshot: Path, then: Callable[[object], None] = lambda page: None
) -> tuple[nbformat.NotebookNode, int]:
    """Open `notebooks/<name>`, run all cells, do `then` with the page, save; the saved notebook, and the number of
    widgets on the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    try:
        own = f"workspaces/{Path(name).stem}"  # else JupyterLab opens what the test before had open, too
        page.goto(f"{lab.url}lab/{own}/tree/notebooks/{name}?token={TOKEN}", timeout=60_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)  # a person sees it in the status bar
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
        knobs = page.locator(".jp-OutputArea-output :is(.jupyter-widgets, input[type=range], select)")
        visible = sum(knob.is_visible() for knob in knobs.all())
        then(page)
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-dirty", state="detached", timeout=20_000)
    except Exception:
        page.screenshot(path=screenshot, full_page=True)
        print(f"what the browser showed: {screenshot}")
        raise
    finally:
        context.close()
    return nbformat.read(lab.folder / "notebooks" / name, as_version=4), visible


def write(path: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory, browser: object) -> Iterator[Lab]:
    """A server over a copy in which no cell has been run yet."""
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(root / "pyproject.toml", folder)
    for study in (root / "reports" / "pocket").glob("*/study.*"):
        copy = folder / study.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(study, copy)
    for path in (root / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "notebooks" / path.name)
    server = Lab(folder)
    yield server
    server.stop()


def test_run_all(lab: Lab, browser: object, root: Path) -> None:
    """Of the notebook that takes the least time."""
    notebook, knobs = run_all(lab, browser, "sic_cads.ipynb", root / "build" / "jupyterlab-sic_cads.png")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and knobs >= 1
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_a_failing_cell_is_seen(lab: Lab, browser: object, tmp_path: Path) -> None:
    """`test_run_all` would notice: Run All of a notebook whose second cell fails."""
    write(lab.folder / "notebooks" / "bad.ipynb", "x = 1", "raise ValueError('the reason')", "x = 2")
    with pytest.raises(AssertionError, match="the reason"):
        run_all(lab, browser, "bad.ipynb", tmp_path / "bad.png")
    assert (tmp_path / "bad.png").stat().st_size > 0


DRAWN = """
from types import SimpleNamespace
import torch
from companion.toy.ablations import tip as study
from companion.toy.encoders import texture_prior
from companion.toy.live import tip as live
main = texture_prior.build(seed=0)
setting = SimpleNamespace(restore=lambda *args, **options: study.restore(*args, seed=0, **options))
for conv in main.adaptor.branch.controlnet_down_blocks:  # from zero it would leave every image as it is
    torch.nn.init.normal_(conv.weight, std=0.05)
"""


def test_a_picture_of_ones_own_is_dropped_into_tip(lab: Lab, browser: object, root: Path, tmp_path: Path) -> None:
    """The notebook's own cell with an adaptor drawn at random: a file, a text, a slider, a file that is none."""
    pytest.importorskip("diffusers")
    cells = nbformat.read(root / "notebooks" / "tip.ipynb", 4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    (box,) = (source for source in code if "upload_box" in source)
    write(lab.folder / "notebooks" / "drop.ipynb", DRAWN, box)
    Image.new("RGB", (90, 60), (200, 40, 40)).save(tmp_path / "mine.png")
    (tmp_path / "none.png").write_text("not a picture")

    def drop(page: object) -> None:
        shown = page.locator(".jupyter-widgets.widget-vbox .jp-OutputArea-output")

        def drawn(before: str = "") -> str:
            picture = shown.locator("img")
            picture.wait_for(timeout=60_000)
            deadline = time.monotonic() + 60
            while (found := picture.get_attribute("src")) == before:
                assert time.monotonic() < deadline, "the picture stays as it was"
                page.wait_for_timeout(200)
            return found

        def upload(name: str) -> None:
            with page.expect_file_chooser() as chooser:
                page.locator("button.jupyter-button", has_text="Upload").click()
            chooser.value.set_files(tmp_path / name)

        upload("mine.png")
        first = drawn()
        text = page.locator(".widget-text input").first
        text.fill("a photograph of a cat")
        text.press("Enter")
        second = drawn(first)
        slider = page.locator(".widget-slider .noUi-handle")
        slider.focus()
        slider.press("ArrowLeft")
        drawn(second)
        upload("none.png")
        shown.get_by_text("none.png: cannot identify image file").wait_for(timeout=60_000)
        page.screenshot(path=root / "build" / "jupyterlab-tip.png")

    run_all(lab, browser, "drop.ipynb", root / "build" / "jupyterlab-tip-failed.png", drop)
