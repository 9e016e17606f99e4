"""What a notebook shows and leaves behind: checked parameters, tables beside the published ones, claims, the record.

run = report.start("sa2vp", profile=profile, seed=seed, ...)     # validates, prints what this run will do
run.table("study", frame)                                        # shows it, writes tables/study.csv
run.figure("rollout", figure)                                    # shows it, writes figures/rollout.png
run.claim("identity", difference == 0, f"largest difference {difference:g}")
run.close()                                                      # shows the ledger, writes claims.json and run.json
"""

from __future__ import annotations

import html
import io
import itertools
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import PIL.Image
import yaml
from IPython.display import HTML, Image, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from . import record, study
from .errors import BadParameter
from .files import atomic, read_json, sha256, write_json
from .provenance import code_hash, sources

PAPERS = Path(__file__).parent / "papers"

# What every notebook takes. A paper's own parameters stand in its YAML, in the same form.
COMMON = {
    "profile": {"type": "choice", "choices": ["pocket", "paper"], "help": "pocket (laptop) or paper (as published)"},
    "dry_run": {"type": "switch", "help": "paper profile: two steps on generated data"},
    "study": {"type": "switch", "help": "run all baselines, learning rates and seeds of the study (resumes)"},
    "seed": {"type": "integer", "low": 0, "high": 2**31 - 1, "help": "seed of the live run"},
    "data_root": {"type": "text", "help": "folder of the data sets"},
    "weights": {"type": "text", "help": "file of the backbone's weights; empty: the cache"},
    "out": {"type": "text", "help": "where results go; empty: runs/<profile>/<paper>"},
    "accelerator": {"type": "choice", "choices": ["auto", "cpu", "cuda", "mps"], "help": "where it runs"},
    "devices": {"type": "integer", "low": 1, "high": 1024, "help": "how many of them"},
    "precision": {"type": "choice", "choices": ["32-true", "16-mixed", "bf16-mixed"], "help": "arithmetic"},
}  # fmt: skip
PHOTOGRAPHIC = 40_000  # bytes of a PNG above which the notebook shows it in 256 colours
LOUD = {"holds": "holds", "fails": "FAILS", "not run": "not run"}


@cache
def paper(slug: str) -> dict:
    """The facts of a paper, `papers/<slug>.yaml`. Raises `BadParameter` for an unknown slug."""
    known = sorted(p.stem for p in PAPERS.glob("*.yaml") if p.stem != "index")
    if slug not in known:
        raise BadParameter("paper", slug, known)
    return yaml.safe_load((PAPERS / f"{slug}.yaml").read_text(encoding="utf-8"))


def convert(name: str, value: object, rule: Mapping) -> object:
    """A parameter as its rule wants it: papermill passes `-p dry_run false` as the text "false", which is true.

    Raises:
        BadParameter: with the accepted values.
    """
    kind, text = rule["type"], str(value).strip()
    if kind == "switch":
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise BadParameter(name, value, (True, False))
    if kind == "choice":
        known = {str(choice): choice for choice in rule["choices"]}  # papermill passes `-p release 2025` as a number
        if text not in known:
            raise BadParameter(name, value, rule["choices"])
        return known[text]
    if kind in ("integer", "number"):
        low, high = rule.get("low", -math.inf), rule.get("high", math.inf)
        accepted = f"{'a whole number' if kind == 'integer' else 'a number'} from {low:.10g} to {high:.10g}"
        try:
            number = int(text) if kind == "integer" else float(text)
        except ValueError as error:
            raise BadParameter(name, value, accepted) from error
        if isinstance(value, bool) or not (low <= number <= high or (rule.get("zero") and number == 0)):
            raise BadParameter(name, value, accepted)
        return number
    if not isinstance(value, str):
        raise BadParameter(name, value, "text, in quotes (papermill keeps a number as text with -r)")
    return text


def check(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> bool:
    """Print whether `value` lies in [low, high], and not the value, which differs between machines; return it."""
    inside = low <= value <= high
    bounds = (
        f"at least {low:g}" if high == math.inf else f"at most {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
    )
    print(f"{name}: {'as expected' if inside else 'NOT as expected'} ({bounds})")
    return inside


def show(frame: pd.DataFrame, digits: int = 2, title: str = "") -> HTML:
    """A table as plain HTML, its title above it: the same text for the same numbers over versions of pandas."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            text = "–" if math.isnan(value) else f"{value:.{digits}f}"
        else:
            text = "–" if value is None else str(value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        style = "text-align: right" if number else "text-align: left"
        return f'<td style="{style}">{html.escape(text)}</td>'

    header = "".join(f'<th scope="col" style="text-align: left">{html.escape(str(c))}</th>' for c in frame.columns)
    rows = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in frame.itertuples(index=False))
    caption = (
        f'<caption style="caption-side: top; text-align: left"><b>{html.escape(title)}</b></caption>\n' if title else ""
    )
    table = f'<table class="dataframe">\n{caption}<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'
    return HTML(f'<div style="overflow-x: auto">{table}</div>')


def published(slug: str, table: str) -> pd.DataFrame:
    """A published table of the paper's YAML: one row a method, in the paper's columns; what was not found is NaN.

    Its title, source and unit are in `.attrs`. Raises `BadParameter` for an unknown table.
    """
    tables = {t["id"]: t for t in paper(slug)["tables"]}
    if table not in tables:
        raise BadParameter("table", table, list(tables))
    facts = tables[table]
    rows = [{"method": row["method"]} | {c: row["values"].get(c) for c in facts["columns"]} for row in facts["rows"]]
    frame = pd.DataFrame(rows, columns=["method", *facts["columns"]])
    frame[facts["columns"]] = frame[facts["columns"]].apply(pd.to_numeric)
    frame.attrs = {k: facts.get(k, "") for k in ("id", "title", "unit", "metric", "provenance", "status")}
    return frame


def beside(frame: pd.DataFrame, measured: Mapping[tuple[str, str], float] = {}) -> pd.DataFrame:
    """Each published number with the one measured here behind it, "88.3 / 87.9" or "88.3 / not run".

    A row of which nothing was measured keeps its published numbers, and says "not run" once, in the last column.
    `measured` is by (method, column). Only real data at the paper profile belongs here, never a pocket number. A method
    that was measured and is not in the published table gets a row of its own.
    """
    columns = [c for c in frame.columns if c != "method"]
    rows = []
    for method in dict.fromkeys([*frame.method, *(m for m, _ in measured)]):
        same = frame[frame.method == method]
        ours = {c: measured[method, c] for c in columns if (method, c) in measured}
        row = {"method": method}
        for column in columns:
            value = same[column].iloc[0] if len(same) else math.nan
            row[column] = "–" if pd.isna(value) else f"{value:g}"
            if ours:
                row[column] += f" / {ours[column]:.2f}" if column in ours else " / not run"
        row["measured here"] = f"{len(ours)} of {len(columns)}" if ours else "not run"
        rows.append(row)
    return pd.DataFrame(rows)


def gather(
    path: str | Path, keys: Sequence[str], values: Sequence[str], new: Iterable[Mapping[str, object]] = ()
) -> pd.DataFrame:
    """The real results in the CSV `path`: `values`, a row for each combination of `keys`; `new` rows are added, or
    replace theirs."""
    path, added = Path(path), pd.DataFrame(list(new))
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*keys, *values])
    if len(added):
        rows = added if rows.empty else pd.concat([rows, added]).drop_duplicates(list(keys), keep="last")
        with atomic(path) as temporary:
            rows.to_csv(temporary, index=False)
    return rows


def interval(leads: np.ndarray, share: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """The interval that holds `share` of the means of seeds drawn again with replacement (paired bootstrap).

    Args:
        leads: of one method over the other, one a seed: both saw that seed's data.
    """
    drawn = np.random.default_rng(0).integers(len(leads), size=(draws, len(leads)))
    low, high = np.quantile(leads[drawn].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def start(slug: str, **parameters: object) -> Run:
    """Check the notebook's parameters, print what the run will do, and return the `Run` that keeps its results.

    Raises:
        BadParameter: an unknown parameter, or a value that is not accepted.
    """
    rules = COMMON | (paper(slug).get("parameters", {}) if (PAPERS / f"{slug}.yaml").exists() else {})
    values = {}
    for name, value in parameters.items():
        if name not in rules:
            raise BadParameter("parameter", name, sorted(rules))
        values[name] = convert(name, value, rules[name])
    if values.get("study") and values.get("profile") == "paper":
        raise BadParameter("study", True, "False with profile = 'paper': the study is at pocket scale")
    if values.get("dry_run") and values.get("profile") == "pocket":
        raise BadParameter("dry_run", True, "False with profile = 'pocket', which is quick as it is")
    run = Run(slug, SimpleNamespace(**values))
    above = next(folder for folder in (run.out, *run.out.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # before an hour of training, not after it
        raise BadParameter("out", str(run.out), "a folder that you may write to, or a new one in such a folder")
    plan = pd.DataFrame([(n, "(empty)" if v == "" else str(v), rules[n]["help"]) for n, v in values.items()],
                        columns=["parameter", "value", "meaning"])  # fmt: skip
    display(show(plan))
    # JupyterLab runs a notebook in its own folder, the shell's commands (`companion fetch`) in the checkout's
    below = run.root / values.get("data_root", "")
    if values.get("data_root") and not Path(values["data_root"]).exists() and below.exists():
        run.parameters.data_root = os.path.relpath(below)
    return run


class Run:
    """The results of one notebook run, written below `out` as they come. Made by `start`."""

    def __init__(self, slug: str, parameters: SimpleNamespace):
        self.slug, self.parameters = slug, parameters
        profile = getattr(parameters, "profile", "pocket")
        given = getattr(parameters, "out", "")
        self.root = record.root()
        base = self.root if Path.cwd().is_relative_to(self.root) else Path.cwd()
        self.out = base / (given or Path("runs") / profile / slug)
        self.claims: dict[str, dict] = {}
        self._files: list[Path] = []
        self._began = time.monotonic()

    def table(self, name: str, frame: pd.DataFrame, digits: int = 2, title: str = "") -> HTML:
        """Write `tables/<name>.csv` and return the table to show."""
        path = self.out / "tables" / f"{name}.csv"
        with atomic(path) as temporary:
            frame.to_csv(temporary, index=False)
        self._files.append(path)
        return show(frame, digits, title)

    def figure(self, name: str, figure: Figure) -> None:
        """Write `figures/<name>.png` and show it."""
        drawn, buffer = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png")
        plt.close(figure)
        # no alpha channel and a better packing: a committed notebook has to count its bytes
        picture = PIL.Image.open(drawn).convert("RGB")
        picture.save(buffer, format="png", optimize=True)
        shown = buffer
        if buffer.tell() > PHOTOGRAPHIC:  # the file keeps all of them
            shown = io.BytesIO()
            few = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=4, dither=PIL.Image.Dither.NONE)
            few.save(shown, format="png", optimize=True)
        path = self.out / "figures" / f"{name}.png"
        with atomic(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
        self._files.append(path)
        display(Image(shown.getvalue()))

    def study(self) -> Path:
        """The folder of the study: this run's when it has one, else the one that is kept in `reports/pocket`."""
        own = self.out
        return own if (own / "study.csv").exists() else self.root / "reports" / "pocket" / self.slug

    def claim(self, name: str, holds: bool | None, value: str, seeds: Iterable[int] = (), why: str = "") -> None:
        """Enter a claim of the paper's YAML: whether it holds here (None: not run), what was measured, and why.

        Raises:
            BadParameter: no such claim.
        """
        known = [c["id"] for c in paper(self.slug).get("claims", [])]
        if name not in known:
            raise BadParameter("claim", name, known)
        status = "not run" if holds is None else "holds" if holds else "fails"
        self.claims[name] = {"status": status, "value": value, "seeds": list(seeds), "why": why}

    def claims_from_study(self, rows: pd.DataFrame, why: Mapping[str, str] = {}) -> None:
        """Enter every directional claim that names `better`, `worse` and `tasks`, and maybe `metrics` of the study.

        It holds when the one beats the other on every task with every seed: with few seeds a mean alone says little.
        Without `worse`, `better` alone has to be above zero: for metrics that are a lead already.
        The value says the lead's mean and standard deviation over the seeds, and how far the mean itself may be off.
        `why` gives the reason, by claim, where one was found for a claim that fails.
        """
        tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
        usual = rows.attrs.get("metric", "accuracy")
        for claim in paper(self.slug)["claims"]:
            if claim["kind"] != "directional":
                continue
            parts, wins, seeds = [], True, set()
            for task, metric in itertools.product(claim["tasks"], claim.get("metrics", [usual])):
                lead = tested.loc[(task, claim["better"]), metric]
                if "worse" in claim:
                    lead = lead - tested.loc[(task, claim["worse"]), metric]
                what = task if metric == "accuracy" else f"{task} {metric}"
                low, high = interval(lead.to_numpy())
                parts.append(f"{what} {lead.mean():+.1f} ± {lead.std():.1f} [{low:+.1f}, {high:+.1f}]")
                wins &= bool((lead > 0).all())
                seeds |= set(map(int, lead.index))
            value = "; ".join(parts) + " points (mean ± standard deviation of the lead [95 % interval of the mean])"
            self.claim(claim["id"], wins, value, sorted(seeds), "" if wins else why.get(claim["id"], ""))

    def ledger(self) -> list[dict]:
        """All claims of the paper with what this run says of each."""
        blank = {"status": "not run", "value": "", "seeds": [], "why": ""}
        claims = paper(self.slug).get("claims", []) if (PAPERS / f"{self.slug}.yaml").exists() else []
        return [{k: c[k] for k in ("id", "text", "kind")} | self.claims.get(c["id"], blank) for c in claims]

    def close(self) -> HTML:
        """Write `claims.json` and `run.json`; return the ledger to show."""
        ledger, given = self.ledger(), vars(self.parameters)
        write_json(self.out / "claims.json", ledger)
        self._files.append(self.out / "claims.json")
        if (self.out / "measured.csv").exists():
            self._files.append(self.out / "measured.csv")
        notebook = self.root / "notebooks" / f"{self.slug}.ipynb"
        facts = {
            "slug": self.slug,
            "profile": given.get("profile", "pocket"),
            "parameters": {k: v for k, v in given.items() if k != "out"},
            "seeds": [given["seed"]] if "seed" in given else [],
            "versions": record.versions(),
            "commit": record.commit(),
            "code": code_hash([notebook, *sources(notebook)]) if notebook.exists() else "",
            "device": record.device(),
            "seconds": round(time.monotonic() - self._began, 1),
            "peak_memory_mb": record.peak_memory_mb(),
            "outputs": {str(p.relative_to(self.out)): sha256(p) for p in sorted(set(self._files))},
        }
        folder = self.study()
        if (folder / "study.json").exists():
            facts["study"] = {"sha256": sha256(folder / "study.csv"), "stale": study.stale(self.slug, folder)}
        write_json(self.out / "run.json", facts)
        rows = [
            {
                "claim": c["text"],
                "kind": c["kind"],
                "here": LOUD[c["status"]],
                "measured": c["value"] + (f" — {c['why']}" if c["why"] else ""),
                "seeds": ", ".join(map(str, c["seeds"])),
            }
            for c in ledger
        ]
        return show(pd.DataFrame(rows, columns=["claim", "kind", "here", "measured", "seeds"]))


def study_notice(slug: str, folder: Path) -> str:
    """Where the study's numbers come from, which learning rates lie at an end of the grid, and whether its code has
    changed since."""
    facts, rows = read_json(folder / "study.json"), study.read(folder)
    minutes = round(facts.get("seconds_of_cpu", 0) / 60)
    text = f"Study: seeds {facts['seeds']}, learning rates {facts['rates']}, {minutes} minutes of one core."
    several = len(facts["tasks"]) > 1
    ends = [f"{method} ({task})" if several else method for task, method in study.at_ends(rows)]
    text += f" At an end of the grid: {', '.join(ends) or 'none'}."
    return text + (
        " It is OLDER than today's code: run the notebook with study = True." if study.stale(slug, folder) else ""
    )
