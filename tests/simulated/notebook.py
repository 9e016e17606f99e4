"""Run the code cells of a notebook on the simulated GPU: `python -m tests.simulated.notebook SLUG OUT [name=value]`.

Every training of `fit` ends after twelve steps, and Fabric gets the GPU also where the pocket settings ask for the CPU.
Figures are made, but not drawn. Writes OUT/found.json: the cells that failed, and what each optimiser's step waited
for. A mix of devices fails as on a GPU; a cell after one that failed runs all the same, so that one run shows
everything. A dry run has the small models of `tests.papers` and the miniature of the paper's first run.
"""

from __future__ import annotations

import ast
import builtins
import copy
import io
import json
import linecache
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import nbformat
import PIL.Image
import pytest
from matplotlib.figure import Figure

from tests.simulated import simdevice

STEPS = 12
ROOT = Path(__file__).resolve().parents[2]


def execute(source: str, name: str, space: dict) -> None:
    """A cell as Jupyter runs it: what its last line gives is displayed."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    tree, last = ast.parse(source, name), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, name, "exec"), space)
    if last is not None:
        display(eval(compile(last, name, "eval"), space))


def display(*objects: object, **_: object) -> None:
    """Made, not shown: figures, tables and widgets must be made without an error."""
    for thing in objects:
        for way in ("_repr_html_", "_repr_mimebundle_"):
            if callable(getattr(thing, way, None)):
                getattr(thing, way)()
                break
        else:
            repr(thing)


def force(precision: str) -> list[tuple[float, float]]:
    """Fabric gets the GPU, and a precision unless it is "", whatever was asked for; no training is longer than STEPS.

    Returns a list that receives the first loss of each training in half precision, and the same in float32.
    """
    import lightning_fabric

    from companion.training import fit as module
    from companion.training.hardware import Hardware
    from companion.training.schedules import Schedule

    launch, train, losses = lightning_fabric.Fabric, module.fit, []

    def fit(model, loss, data, *, epochs, batch, schedule=None, **settings):  # type: ignore[no-untyped-def]
        per_epoch = max(1, len(data) // batch)
        whole = schedule or module.scheduled()

        def begun(of: Schedule) -> Schedule:
            return lambda lr, steps, each: of(lr, max(1, round(epochs * per_epoch)), each)[:steps]

        settings["schedule"] = {k: begun(v) for k, v in whole.items()} if isinstance(whole, dict) else begun(whole)
        hardware = settings.get("hardware", Hardware())
        settings["hardware"] = replace(hardware, precision=precision or hardware.precision)
        half = settings["hardware"].precision != "32-true"
        if half:
            using.append("32-true")
            alone = settings | {"callbacks": (), "checkpoint": None, "hardware": replace(hardware, precision="32-true")}
            state = copy.deepcopy(model.state_dict())  # not a copy of the model: a loss may hold its parameters
            (full,) = train(model, loss, data, epochs=1 / per_epoch, batch=batch, **alone)
            model.load_state_dict(state)
            using.pop()
        history = train(model, loss, data, epochs=min(epochs, STEPS / per_epoch), batch=batch, **settings)
        if half:
            losses.append((history[0]["loss"], full["loss"]))
        return history

    using = [precision]
    lightning_fabric.Fabric = lambda precision, **settings: launch(
        **settings | {"accelerator": "cuda", "precision": using[-1] or precision}
    )
    module.fit = fit
    return losses


def leave_figures_undrawn() -> None:
    """An image of a figure is one pixel: all that a device can spoil is in it before it is drawn."""
    pixel = io.BytesIO()
    PIL.Image.new("RGB", (1, 1)).save(pixel, "png")
    Figure.savefig = lambda figure, file, **_: file.write(pixel.getvalue())  # type: ignore[method-assign]
    Figure.draw_without_rendering = lambda figure: None  # type: ignore[method-assign]


def main(slug: str, out: Path, changes: dict[str, object]) -> None:
    """Run the notebook and write `found.json`."""
    os.environ |= {"MPLBACKEND": "Agg", "COMPANION_PROGRESS": "off"}
    import torch

    torch.set_num_threads(1)
    sim = simdevice.install()
    losses = force(changes.pop("force", "32-true"))
    from tests.papers.common import hooks
    from tests.rehearsal.common import prepare  # after both: it imports the recipes, and with them `fit`

    if changes.get("dry_run"):
        changes |= prepare(slug, hooks(slug).RUNS[0], out / "data", pytest.MonkeyPatch())[1]
    import matplotlib.pyplot as plt

    leave_figures_undrawn()
    builtins.display = display  # type: ignore[attr-defined]
    space: dict = {"__name__": "__main__", "get_ipython": lambda: None}
    failures = []
    cells = [
        c for c in nbformat.read(ROOT / "notebooks" / f"{slug}.ipynb", as_version=4).cells if c.cell_type == "code"
    ]
    for i, cell in enumerate(cells):
        try:
            execute(cell.source, f"<cell {i} of {slug}>", space)
        except Exception as error:
            failures.append({"cell": i, "error": "".join(traceback.format_exception(error))[-4000:]})
        if "parameters" in cell.metadata.get("tags", ()):
            space |= {"out": str(out), "accelerator": "cuda"} | changes
        plt.close("all")
    trainings = [
        {"where": place, "steps": steps, "waits": [[times, *what] for what, times in waits.items()]}
        for place, steps, waits in sim.trainings()
    ]
    found = {"failures": failures, "trainings": trainings, "losses": losses}
    (out / "found.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    slug, out, *changes = sys.argv[1:]
    main(slug, Path(out), {k: ast.literal_eval(v) for k, _, v in (change.partition("=") for change in changes)})
