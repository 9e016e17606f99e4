"""What a notebook shows and leaves behind: checked parameters, tables next to the published ones, claims, the record.

report.opening("sa2vp")                                          # what was found, by the committed study
run = report.start("sa2vp", globals())                           # checks the parameters of the notebook
run.table("study", frame)                                        # shows it, writes tables/study.csv
run.figure("rollout", figure)                                    # shows it, writes figures/rollout.png
print(run.claim("identity", *within({"logits": difference}, 1e-5)))    # judged and worded by evaluation.claims
run.close()                                                      # writes claims.json and run.json
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib
import io
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import PIL.Image
from filelock import FileLock, Timeout
from IPython import get_ipython
from IPython.display import HTML, Image, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .. import data
from ..errors import BadParameter, check_choice
from ..evaluation.ablations import read, stale
from ..evaluation.claims import SPREAD, SYNTHETIC, counts, evidence, judge, judge_measured
from ..io import record
from ..io.files import atomic, check_folder, sha256, write_json
from ..io.papers import convert, paper, rules, slugs, threads
from ..training.hardware import Hardware
from ..viz import plots
from ..viz.tables import show_table
from . import needs

FEW_COLOURS = 40_000  # bytes of a PNG above which the notebook shows it in 256 colours
PHOTOGRAPHIC = 120_000  # and above which it shows it at 100 dots an inch
DPI = 200  # of figures, unless the notebook's matplotlib settings have another `savefig.dpi`
LOUD = {"holds": "holds", "fails": "FAILS", "not run": "not run"}


def opening(slug: str) -> None:
    """Show what was found, with the values measured in the committed study, and a figure of the methods compared.

    The findings are those of the paper's YAML: a `text`, and for a synthetic result its `claim` and the `status` that
    the text was written for; a study that gives another status is shown to turn it.
    """
    facts, folder = paper(slug), record.root() / "reports" / "pocket" / slug
    rows, claims = read(folder), {claim["id"]: claim for claim in facts["claims"]}
    spread = f"{_unit(facts)} over seeds [95 % t interval], and the smallest"
    lines = [f"**What we found.** Leads are in {spread}; a dot is a seed.\n"]
    panels: dict[tuple[str, str], dict[str, None]] = {}
    for finding in facts["findings"]:
        text = finding["text"]
        if "claim" in finding:
            claim = claims[finding["claim"]]
            wins, value, seeds = judge(claim, rows)
            status = "holds" if wins else "fails"
            lead = value.removesuffix(SPREAD)
            if status != finding["status"]:
                text += " **TURNED by this study, the sentence is no longer true:**"
            text += f" *The claim {LOUD[status]} on synthetic data, {len(seeds)} seeds: {lead}.*"
            for panel in itertools.product(claim["tasks"], claim.get("metrics", [rows.attrs["metric"]])):
                panels[panel] = panels.get(panel, {}) | {claim[r]: None for r in ("better", "worse") if r in claim}
        lines.append(f"- {text}")
    display(Markdown("\n".join(lines)))
    show(plots.scores(rows, panels))


def _unit(facts: Mapping) -> str:
    """The unit of the leads of a paper's synthetic results."""
    decibel = any("PSNR" in claim.get("metrics", ()) for claim in facts["claims"])
    return f"points of the metric{' (PSNR: dB)' if decibel else ''}, mean ± standard deviation"


def show(figure: Figure) -> None:
    """Show a figure as `Run.figure` does, without writing it: for figures that are drawn before the run starts."""
    display(_image(figure)[0])


def _image(figure: Figure) -> tuple[Image, bytes]:
    """The figure as the notebook shows it, and its PNG at full resolution; the figure is closed."""

    def drawn(dpi: float) -> PIL.Image.Image:
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
        return PIL.Image.open(raw).convert("RGB")  # no alpha channel

    def png(pixels: PIL.Image.Image, optimize: bool = False) -> bytes:
        packed = io.BytesIO()
        pixels.save(packed, format="png", optimize=optimize)
        return packed.getvalue()

    dpi = plt.rcParams["savefig.dpi"]
    pixels = drawn(DPI if dpi == "figure" else dpi)
    full = shown = png(pixels)
    if len(full) > FEW_COLOURS:  # committed notebooks must stay small
        few = drawn(100) if len(full) > PHOTOGRAPHIC else pixels
        settled = few.width * few.height // 100  # k-means stops when fewer pixels change
        few = few.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=settled, dither=PIL.Image.Dither.NONE)
        shown = png(few, optimize=True)
    plt.close(figure)
    return Image(shown, width=round(100 * figure.get_figwidth())), full


def start(slug: str, namespace: Mapping[str, Any]) -> Run:
    """Check the notebook's parameters and return the `Run` that keeps its results.

    Args:
        namespace: the notebook's `globals()`, or any values by name: those that are parameters of `slug` are read.

    A dry run writes into the folder `dry_run` below that of the run.

    Raises:
        BadParameter: a value that is not accepted, or papermill injected an unknown parameter, of which it only warns;
            another run is writing into the same folder.
        MissingData, MissingWeights, CorruptFile: at the `paper` profile, of what the run reads before its first step.
        CompanionError: there is less memory or disk than that step takes.
    """
    known = rules(slug)
    for name in sorted(_injected() - known.keys()):
        raise BadParameter("parameter", name, sorted(known.keys() & namespace.keys()))
    values = {name: convert(name, namespace[name], rule) for name, rule in known.items() if name in namespace}
    if values.get("study") and values.get("profile") == "paper":
        raise BadParameter("study", True, "False with profile = 'paper': the study is at pocket scale")
    if values.get("dry_run") and values.get("profile") == "pocket":
        raise BadParameter("dry_run", True, "False with profile = 'pocket', which is quick as it is")
    if values.get("profile") == "paper" and not values.get("dry_run"):
        _look(slug, values)
    run = Run(slug, SimpleNamespace(**values))
    if values.get("data_root") == "":
        run.parameters.data_root = os.path.relpath(run.root / "data")
    if values.get("profile") == "paper":  # before anything is trained at pocket scale
        recipe = importlib.import_module(f"companion.models.{slug}.recipe")
        try:
            recipe.prepare(run.parameters, run.out)
            needs.check(slug, run.parameters, run.out)
        except BaseException:
            run.release()
            raise
    return run


def _look(slug: str, values: Mapping[str, Any]) -> None:
    """Raise `MissingData` where nothing is there of a data set that a parameter names: before weights are opened."""
    root = Path(values.get("data_root") or record.root() / "data")
    own = [data.own_set(root, "own", "your own files")] if "folder" in values.values() else []
    for dataset in [*own, *map(data.find, sets_read(slug, values))]:
        if not dataset.marked(dataset.folder(root)):
            raise dataset.missing(root)


def sets_read(slug: str, values: Mapping[str, Any]) -> list[str]:
    """The names of the data sets that the parameters of a run name."""
    found = []
    for name, rule in rules(slug).items():
        chosen = str(values.get(name) or rule.get("usual", {}).get(values.get("task"), ""))
        found += [part for part in chosen.split(", ") if rule["type"] in ("choice", "list") and part in data.DATASETS]
    return found


def _injected() -> set[str]:
    """The names that papermill's cell "# Parameters" assigns, where a notebook is run by it."""
    shell = get_ipython()
    cells = [] if shell is None else shell.user_ns.get("In", [])
    injected = [ast.parse(cell) for cell in cells if cell.startswith("# Parameters\n")]
    targets = (t for tree in injected for node in tree.body if isinstance(node, ast.Assign) for t in node.targets)
    return {target.id for target in targets if isinstance(target, ast.Name)}


class Run:
    """The results of one notebook run, written below `out` as they come; the folder is locked until `close`.

    Raises `BadParameter`: another process has locked the folder, or nothing can be written there.
    """

    def __init__(self, slug: str, parameters: SimpleNamespace):
        self.slug, self.parameters = slug, parameters
        profile = getattr(parameters, "profile", "pocket")
        given = getattr(parameters, "out", "")
        self.root = record.root()
        base = self.root if Path.cwd().is_relative_to(self.root) else Path.cwd()
        usual = base / (os.environ.get("COMPANION_RUNS") or "runs") / profile / slug
        self.out = Path.cwd() / given if given else usual  # like `data_root`, from the working directory
        self.dry_run = getattr(parameters, "dry_run", False)
        if self.dry_run:
            self.out /= "dry_run"
        self.claims: dict[str, dict] = {}
        self._files: list[Path] = []
        self._began = time.monotonic()
        check_folder("out", self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        # of this process: a notebook that is run again in its kernel goes on
        self._lock = FileLock(self.out / ".lock", blocking=False, is_singleton=True)
        try:
            self._lock.acquire()
        except Timeout:
            accepted = "another folder, or later: a run that has not ended writes into this one"
            raise BadParameter("out", str(self.out), accepted) from None
        if self.dry_run and (self.out / "run.json").exists():  # it was finished; one that was killed resumes
            for path in self.out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()

    def release(self) -> None:
        """Unlock the folder; remove it when it is empty."""
        (self.out / ".lock").unlink(missing_ok=True)
        self._lock.release(force=True)
        with contextlib.suppress(OSError):
            self.out.rmdir()

    def table(self, name: str, frame: pd.DataFrame, digits: int = 2, title: str = "") -> HTML:
        """Write `tables/<name>.csv` and return the table to show."""
        title += " (dry run: the numbers mean nothing)" if self.dry_run else ""
        path = self.out / "tables" / f"{name}.csv"
        with atomic(path) as temporary:
            frame.to_csv(temporary, index=False)
        self._files.append(path)
        return show_table(frame, digits, title)

    def figure(self, name: str, figure: Figure) -> None:
        """Write `figures/<name>.png` and show it."""
        shown, png = _image(figure)
        path = self.out / "figures" / f"{name}.png"
        with atomic(path) as temporary:
            temporary.write_bytes(png)
        self._files.append(path)
        display(shown)

    def study(self) -> Path:
        """The folder of the study: this run's when it has one, else the one in `reports/pocket`."""
        own = self.out
        return own if (own / "study.csv").exists() else self.root / "reports" / "pocket" / self.slug

    def claim(
        self, name: str, holds: bool | None, value: str, seeds: Iterable[int] = (), why: str = "", evidence: str = ""
    ) -> str:
        """Enter a claim of the paper's YAML: whether it holds here (None: not run), what was measured, and why.

        `evidence` is what the measurement rests on.

        Returns the line to print. Raises `BadParameter`: no such claim.
        """
        check_choice("claim", name, [claim["id"] for claim in paper(self.slug)["claims"]])
        status = "not run" if holds is None else "holds" if holds else "fails"
        self.claims[name] = {"status": status, "value": value, "seeds": list(seeds), "why": why, "evidence": evidence}
        return f"{name} {status}: {value}"

    def claims_from_study(self, rows: pd.DataFrame) -> HTML:
        """Judge every synthetic result by the rows of an ablation, see `evaluation.claims.judge`; return their table.

        A claim that fails is given its `why` of the paper's YAML, the reason that was found.
        """
        facts = paper(self.slug)
        for claim in facts["claims"]:
            if claim["kind"] == SYNTHETIC:
                wins, value, seeds = judge(claim, rows)
                found = evidence(claim, facts["data_built_for"], rows)
                self.claim(claim["id"], wins, value, seeds, "" if wins else claim.get("why", ""), found)
        ledger = [claim for claim in self.ledger() if claim["kind"] == SYNTHETIC]
        title = f"{SYNTHETIC}s: {counts(ledger)[SYNTHETIC]}".capitalize()
        if seeds := sorted({seed for claim in ledger for seed in claim["seeds"]}):
            title += f"; leads in {_unit(facts)} over seeds {', '.join(map(str, seeds))} [95 % t interval]"
        rows_shown = [
            {
                "claim": claim["text"],
                "here": LOUD[claim["status"]],
                "measured": claim["value"].removesuffix(SPREAD) + (f" — {claim['why']}" if claim["why"] else ""),
                "evidence": claim["evidence"],
            }
            for claim in ledger
        ]
        return show_table(pd.DataFrame(rows_shown), title=title)

    def claims_from_measured(self, cells: Mapping[tuple[str, str], float]) -> None:
        """Judge the paper's results by ours on real data, see `evaluation.claims.judge_measured`.

        A claim that nothing was measured for stays "not run".
        """
        for claim in paper(self.slug)["claims"]:
            names = {tuple(c[key]) for c in claim.get("measured", []) for key in ("of", "over") if key in c}
            if names & cells.keys():
                evidence = "a dry run: it means nothing" if self.dry_run else ""
                self.claim(claim["id"], *judge_measured(claim["measured"], cells), evidence=evidence)

    def ledger(self) -> list[dict]:
        """All claims of the paper with this run's verdict on each."""
        blank = {"status": "not run", "value": "", "seeds": [], "evidence": ""}
        claims = paper(self.slug)["claims"] if self.slug in slugs() else []
        return [
            {key: claim[key] for key in ("id", "text", "kind")}
            | self.claims.get(claim["id"], blank | {"why": claim.get("cannot_be_judged", "")})
            for claim in claims
        ]

    def lower(self) -> Markdown:
        """The table of the paper's `threads.yaml` for a number below the published one: causes, and what to set."""
        asked = threads(self.slug)
        lines = ["| what you see | asked, and answered | likely cause | what to set |", "| --- | --- | --- | --- |"]
        for row in asked["lower"]:
            told = []
            for name in row.get("threads", ()):
                repository, _, number = name.partition("#")
                link = f"[{repository.split('/')[1]} {number}](https://github.com/{repository}/issues/{number})"
                thread = asked["threads"][name]
                told.append(f"{link} ({thread['state']}): {thread['answered'] or 'no answer'}")
            cause = "our guess: " * row.get("guess", False) + row["cause"]
            lines.append(f"| {row['see']} | {'<br>'.join(told) or '–'} | {cause} | {row['set']} |")
        read = sorted({str(thread["read"]) for thread in asked["threads"].values()})
        said = f" Threads are as read on {', '.join(read)}." if read else ""
        return Markdown("\n".join([*lines, "", f"No cause was tested on the real data here.{said}"]))

    def close(self) -> HTML:
        """Write `claims.json`, the ledger, and `run.json`; return how many claims of each kind hold."""
        ledger, given = self.ledger(), vars(self.parameters)
        write_json(self.out / "claims.json", ledger)
        self._files.append(self.out / "claims.json")
        if (self.out / "measured.csv").exists():
            self._files.append(self.out / "measured.csv")
        facts = {
            "slug": self.slug,
            "profile": given.get("profile", "pocket"),
            "run": self.out.name if self.out.parent.name == self.slug else "",  # of a grid
            "parameters": {k: v for k, v in given.items() if k != "out"},
            "seeds": [given["seed"]] if "seed" in given else [],
            "versions": record.versions(),
            "commit": record.commit(),
            "device": record.device(given.get("accelerator", "auto"), given.get("devices", 1)),
            "seconds": round(time.monotonic() - self._began, 1),
            "peak_memory_mb": record.peak_memory_mb(),
            "outputs": {str(p.relative_to(self.out)): sha256(p) for p in sorted(set(self._files))},
        }
        if "precision" in given:  # which is "paper" among the parameters
            facts["precision"] = Hardware.of(self.parameters, self.slug).precision
        if given.get("profile") == "paper" and not self.dry_run:
            facts["date"] = datetime.date.today().isoformat()
            facts["items"] = {name: data.counts(name, given["data_root"]) for name in sets_read(self.slug, given)}
        folder = self.study()
        if (folder / "study.json").exists():
            facts["study"] = {"sha256": sha256(folder / "study.csv"), "stale": stale(self.slug, folder)}
        write_json(self.out / "run.json", facts)
        self.release()
        return HTML("<br>".join(f"{kind}s: {said}".capitalize() for kind, said in counts(ledger).items()))
