"""python -m tests.parity PAPER: our model, or with --recipe our training and evaluation, against the authors'.

Prints each case and the first output that differs; returns 1 when one does. `companion parity` is this program.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys

import torch

from companion.errors import BadParameter, CompanionError, CorruptFile, check_choice
from companion.io.files import atomic
from tests.recipes import runner as recipes

from . import runner


def main() -> int:
    parser = argparse.ArgumentParser(prog="companion parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("paper")
    parser.add_argument("--recipe", action="store_true", help="schedules, labels, metrics, ... instead of the model")
    parser.add_argument("--checkpoint", help="weights that should give the recorded outputs, under the authors' names")
    parser.add_argument("--fixtures", help="folder <paper>/<case>/ (default: the project's)")
    parser.add_argument("--case", help="run this case only")
    parser.add_argument("--but", action="append", default=[], help="leave out this case")
    parser.add_argument("--csv", help="also write case, outputs and those that agree to this file")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    if given.accelerator == "cuda" and not torch.cuda.is_available():
        raise BadParameter("--accelerator", "cuda", "cpu: there is no GPU here")
    cases = list((recipes if given.recipe else runner).cases(given.paper, given.fixtures))
    names = [case.name for case in cases]
    for name in [*filter(None, [given.case]), *given.but]:
        check_choice("--case" if name == given.case else "--but", name, names)
    cases = [case for case in cases if case.name not in given.but and given.case in (None, case.name)]
    if given.recipe:
        return sum([_recipe(given.paper, case) for case in cases]) > 0
    if given.checkpoint:
        cases = _with_checkpoint(given.paper, cases, given.checkpoint)
    found = []
    for case in cases:
        differences = runner.compare(case, given.accelerator)
        wrong, worst = [d for d in differences if not d.agrees], max(differences, key=lambda d: d.error)
        found.append((case.name, len(differences), len(differences) - len(wrong)))
        if wrong:
            said = f"DIFFERS; first at {wrong[0].output} ({wrong[0].error:.1e} of its largest magnitude), "
            print(f"{case.name}: {said}{len(wrong)} of {len(differences)} outputs", flush=True)
        else:
            said = f"{len(differences)} outputs, worst {worst.error:.1e} at {worst.output}"
            print(f"{case.name}: agrees; {said}", flush=True)
    if given.csv:
        with atomic(given.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("case", "outputs", "agree"), *found])
    return any(outputs != agree for _, outputs, agree in found)


def _with_checkpoint(paper: str, cases: list[runner.Case], path: str) -> list[runner.Case]:
    """The cases whose model has the tensors of a file, with these in place of the filled ones."""
    print(f"reading {path}", flush=True)  # files of gigabytes, read for a minute
    state = runner.checkpoint(paper, path)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    # the authors may store frozen copies next to them
    found = [runner.Case(c.folder, state) for c in cases if c.names and c.names.items() <= shapes.items()]
    if not found:
        first = next((f"{name} {tuple(shape)}" for name, shape in shapes.items()), "none")
        detail = f"no case of {paper} has its tensor names and shapes, the first: {first}"
        raise CorruptFile(path, detail)
    return found


def _recipe(paper: str, case: recipes.Case) -> bool:
    """Print each recorded quantity of a case, the authors' value and ours; whether one differs."""
    os.environ["COMPANION_PROGRESS"] = "off"  # of the trainings in a case
    rows = recipes.check(paper, case)
    print(f"{case.name} ({case.facts['kind']}, {case.facts['how']})")
    cells = [[text[:60] for text in (row.what, row.expected, row.ours)] for row in rows]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, texts in zip(rows, cells, strict=True):
        verdict = f"departs: {row.departs}" if row.departs and row.passes else "" if row.passes else "DIFFERS"
        columns = zip(texts, wide, strict=True)
        print("  " + "  ".join(f"{text:{width}}" for text, width in columns) + f"  {verdict}".rstrip(), flush=True)
    return not all(row.passes for row in rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        print(f"companion: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadParameter) else 1)
