"""Run notebooks in place and keep of them what belongs in git: `python -m companion.ops.notebooks notebooks/*.ipynb`.

A notebook is rewritten only when its run was clean: every cell ran, nothing was written to stderr, no output names a
folder of this machine, and the file stays below `LIMIT`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from ..errors import CompanionError
from .files import atomic

LIMIT = 1_000_000  # bytes; GitHub shows no larger notebook
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
ABSOLUTE_PATH = re.compile(r"""(?:^|(?<=[\s'"(]))(?:/[\w.~-]+/[\w./~-]+|[A-Za-z]:\\[\w.\\-]+)""", re.MULTILINE)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class BadNotebook(CompanionError):
    """A notebook is not fit to be committed; the message lists why."""

    def __init__(self, path: str | Path, problems: list[str]):
        self.path, self.problems = Path(path), problems
        super().__init__(f"{path} is not fit to be committed:\n" + "\n".join(f"  {problem}" for problem in problems))


def refresh(path: str | Path) -> None:
    """Run the notebook at `path` with its default parameters and write it back without what churns.

    Raises `BadNotebook`, and leaves the file as it was, when a cell fails or the result breaks a rule of `problems`.
    """
    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise BadNotebook(path, [f"it cannot be read: {str(error).splitlines()[0]}"]) from error
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, resources={"metadata": {"path": path.parent}}
    )
    client.record_timing = False
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        raise BadNotebook(path, str(error).splitlines()) from error
    strip(notebook)
    if found := problems(notebook):
        raise BadNotebook(path, found)
    with atomic(path) as temporary:
        nbformat.write(notebook, temporary)


def strip(notebook: nbformat.NotebookNode) -> None:
    """Remove in place what differs from run to run or machine to machine: metadata but tags, and live widgets' ids."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with an executed notebook, one sentence each; empty when it may be committed."""
    found = []
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged `parameters`, not one")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not called python3")
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


def main(paths: list[str]) -> int:
    os.environ["COMPANION_PROGRESS"] = "off"  # a bar in a committed output would churn
    failed = 0
    for path in paths:
        start = time.monotonic()
        print(f"{path}: started", flush=True)
        try:
            refresh(path)
        except BadNotebook as error:
            failed += 1
            print(error, file=sys.stderr)
        else:
            print(f"{path}: done in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
