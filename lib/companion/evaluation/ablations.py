"""What an ablation study compares; its committed rows: reading, selected learning rates, means over seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import CorruptFile
from ..io.files import read_json
from ..io.provenance import PACKAGE, code_hash, sources
from ..training.fit import History

KEYS = ["stage", "task", "method", "learning_rate", "seed"]
SELECTION_SEEDS = (100, 101, 102)
SEEDS = tuple(range(200, 210))


@dataclass(frozen=True)
class Study:
    """What one ablation compares, and how a row is made: the STUDY of `toy.<paper>`, or of `studies.<paper>_real`.

    Attributes:
        tasks: the methods of each task.
        learning_rates: the grid, ascending.
        budget: of every trained method, as text.
        data: from task, seed and split ("train", "val", "trainval", "test") to that data.
        fit: from method, task, data, learning rate and seed to the trained model and the history.
        score: from model, task and data to the metrics in percent, rounded.
        metric: that selects the learning rate.
        untrained: methods that are only tested, with learning rate 0.
        selection_seeds, seeds: those to select with and those to test on.
    """

    tasks: Mapping[str, Sequence[str]]
    learning_rates: Sequence[float]
    budget: str
    data: Callable[[str, int, str], Any]
    fit: Callable[[str, str, Any, float, int], tuple[Any, History]]
    score: Callable[[Any, str, Any], Mapping[str, float]]
    metric: str = "accuracy"
    untrained: Sequence[str] = ()
    selection_seeds: Sequence[int] = SELECTION_SEEDS
    seeds: Sequence[int] = SEEDS

    def row(self, stage: str, task: str, method: str, learning_rate: float, seed: int) -> dict:
        """One row: trained on "train" and scored on "val" at the stage "select", on "trainval" and "test" at "test"."""
        start = time.process_time()
        learn, held_out = ("train", "val") if stage == "select" else ("trainval", "test")
        model, history = self.fit(method, task, self.data(task, seed, learn), learning_rate, seed)
        scores = self.score(model, task, self.data(task, seed, held_out))
        last = round(float(np.mean([step["loss"] for step in history[-20:]])), 4) if history else 0.0
        row: dict[str, Any] = {
            "stage": stage,
            "task": task,
            "method": method,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if history else 0
        return row | dict(scores) | {"loss": last, "trained": trained, "seconds": round(time.process_time() - start, 1)}


def source(name: str) -> Path:
    """The module of a study: `toy.<paper>`, or `studies.<paper>_real` on real images."""
    return PACKAGE / ("studies" if name.endswith("_real") else "toy") / f"{name}.py"


def frame(rows: list[dict] | pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows as a table whose `.attrs["metric"]` names the metric used to select learning rates."""
    found = pd.DataFrame(rows)
    found.attrs["metric"] = metric
    return found


def read(folder: str | Path) -> pd.DataFrame:
    """The rows of a study, as returned by `frame`. Raises `CorruptFile` when the file is missing or is not a study."""
    path, record = Path(folder) / "study.csv", Path(folder) / "study.json"
    metric = read_json(record).get("metric", "accuracy") if record.exists() else "accuracy"
    if not path.exists():
        raise CorruptFile(path, "there is no such study")
    try:
        rows = pd.read_csv(path)
        if rows[[*KEYS, metric]].isna().any(axis=None):
            raise ValueError("an incomplete row")
        pd.to_numeric(rows[metric])
    except (KeyError, ValueError) as error:
        raise CorruptFile(path, f"not the rows of a study ({error})") from error
    return frame(rows, metric)


def means(rows: pd.DataFrame) -> pd.Series:
    """The mean score on validation over the selection seeds, in any order, by task, method and learning rate."""
    metric = rows.attrs.get("metric", "accuracy")
    chosen = rows[rows.stage == "select"]
    scores = chosen.groupby(["task", "method", "learning_rate"], sort=False)[metric]
    return scores.agg(lambda values: math.fsum(values) / len(values))


def selected(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The learning rate of each trained (task, method): the best by `means`, the smallest of those that are equal
    to nine decimals."""
    found = means(rows).round(9).reset_index(name="score")
    found = found.sort_values(["score", "learning_rate"], ascending=[False, True])
    return found.groupby(["task", "method"], sort=False).learning_rate.first().to_dict()


def at_ends(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The (task, method) whose learning rate is the smallest or largest of the grid: a wider grid might do better."""
    rates = rows.learning_rate[rows.stage == "select"]
    return sorted(pair for pair, rate in selected(rows).items() if rate in (rates.min(), rates.max()))


def summary(rows: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and number of seeds by task and method on test data, and the learning rate.

    Args:
        metric: a column of the study; None: the metric used to select learning rates.
    """
    tested = rows[rows.stage == "test"]
    measured = tested.groupby(["task", "method"], sort=False)[metric or rows.attrs.get("metric", "accuracy")]
    table = measured.agg(["mean", "std", "count"]).reset_index()
    best = selected(rows)
    table["learning_rate"] = [best.get(key, float("nan")) for key in zip(table.task, table.method, strict=True)]
    return table


def spreads(rows: pd.DataFrame, metrics: Sequence[str], against: str = "") -> pd.DataFrame:
    """Mean ± standard deviation of each metric over the test seeds as text, a row for each task and method.

    Args:
        against: a method; its leads in the first metric and the seeds that it wins are two more columns.
    """
    parts = {metric: summary(rows, metric).set_index(["task", "method"]) for metric in metrics}
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()[metrics[0]]
    table = []
    for (task, method), first in parts[metrics[0]].iterrows():
        row = {"task": task, "method": method}
        row |= {metric: _spread(part.loc[(task, method)]) for metric, part in parts.items()}
        if against:
            lead = tested.loc[task, against] - tested.loc[task, method]
            own = method == against
            row[f"lead of {against}, {metrics[0]}"] = "" if own else f"{lead.mean():+.1f} ± {lead.std():.1f}"
            row["seeds won"] = "" if own else f"{(lead > 0).sum()} of {len(lead)}"
        rate = first["learning_rate"]
        table.append(row | {"learning rate": "–" if pd.isna(rate) else f"{rate:g}"})
    return pd.DataFrame(table)


def _spread(found: pd.Series) -> str:
    return "–" if pd.isna(found["mean"]) else f"{found['mean']:.1f} ± {found['std']:.1f}"


def bar_tables(
    rows: pd.DataFrame, groups: Mapping[str, tuple[str, str]], methods: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means and standard deviations over the test seeds, as `viz.plots.bars` draws them.

    Args:
        groups: label of a row -> task, metric.
        methods: the columns.
    """
    found = {
        label: summary(rows[rows.task == task], metric).set_index("method") for label, (task, metric) in groups.items()
    }
    mean, std = (pd.DataFrame({label: part[kind] for label, part in found.items()}).T for kind in ("mean", "std"))
    return mean[list(methods)], std[list(methods)]


def stale(paper: str, folder: str | Path) -> bool:
    """Whether the current code neither produced the rows of the study nor reproduced some of them."""
    facts = read_json(Path(folder) / "study.json")
    today = code_hash(sources(source(paper)))
    return today not in (facts.get("code"), facts.get("rechecked", {}).get("code"))


def notice(slug: str, folder: Path) -> str:
    """How a study was run: its seeds and grid, the methods that do best at an end of the grid, and the code version."""
    facts, rows = read_json(folder / "study.json"), read(folder)
    minutes, wider = round(facts.get("seconds_of_cpu", 0) / 60), facts["widened"]
    text = (
        f"Study: {facts['budget']} for every trained method; learning rates {facts['learning_rates']}, selected on "
        f"seeds {facts['selection_seeds']} (validation), {f'extended once by {wider}' if wider else 'not extended'}; "
        f"tested on seeds {facts['seeds']}; {minutes} minutes on one core."
    )
    several = len(facts["tasks"]) > 1
    ends = [f"{method} ({task})" if several else method for task, method in at_ends(rows)]
    text += f" Best at an end of the grid: {', '.join(ends) or 'none'}."
    if again := facts.get("rechecked"):
        text += f" Rerun with later code on {again['date']}: {again['rows']} of {again['of']} rows, with equal results"
        here = again.get("equal_here")
        text += f" ({here} of them compared with the earlier code on another processor)." if here else "."
    if not stale(slug, folder):
        return text
    again = f"run python -m companion.studies.study {slug} (see its module)"
    return f"{text} It is OLDER than the current code: {again}."
