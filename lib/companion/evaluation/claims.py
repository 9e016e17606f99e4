"""Judges claims: synthetic results by the rows of a study, paper results by measurements, checks by a tolerance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import SupportsFloat

import numpy as np
import pandas as pd
import scipy.stats

from ..errors import BadParameter
from .ablations import means, selected

CHECK, SYNTHETIC, PAPER = KINDS = ("implementation check", "synthetic result", "paper result")
"""The kinds of claims: about our code; about methods on synthetic data; about the paper, on its data. They are never
summed up."""
SPREAD = " points (mean ± standard deviation of the lead [95 % t interval of the mean], smallest lead of a seed)"
"""Unit of the leads that `judge` writes."""
ROUNDING = 1e-9  # points: 88.3 - 88.0 is a little less than 0.3


def check_range(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Print whether `value` lies in [low, high], without the value, which varies between machines."""
    bounds = (
        f"at least {low:g}" if high == math.inf else f"at most {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
    )
    print(f"{name}: {'as expected' if low <= value <= high else 'NOT as expected'} ({bounds})")


def within(differences: Mapping[str, SupportsFloat], tolerance: float = 0.0) -> tuple[bool, str]:
    """Whether all differences are at most `tolerance`, and their sizes as text: the arguments of `Run.claim`.

    A difference within the tolerance is rounding noise, which varies between machines: the text states whether a tenth
    of the tolerance bounds it too. A larger one is written in full; nan is too large.

    Args:
        differences: by name, 0 or more.
        tolerance: a power of ten, at least thirty times the noise; 0: the values must be equal.
    """

    def bound(value: float) -> str:
        return f"at most {np.format_float_scientific(value, 0, exp_digits=1, trim='-')}" if value else "exactly 0"

    parts, found = [], {name: float(value) for name, value in differences.items()}
    for name, value in found.items():
        inside = bound(tolerance / 10 if value <= tolerance / 10 else tolerance)
        parts.append(f"{name}: {inside if value <= tolerance else f'{value:.2g}, TOO LARGE'}")
    holds = bool(found) and all(value <= tolerance for value in found.values())
    return holds, f"{'; '.join(parts)} (asked: {bound(tolerance)})"


def interval(leads: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Student's t confidence interval of a mean lead, with coverage `share` for normally distributed leads.

    Args:
        leads: of one method over the other, one per seed, two at least; both were tested on that seed's data.
    """
    mean, error = np.mean(leads), np.std(leads, ddof=1) / math.sqrt(len(leads))
    half = scipy.stats.t.ppf((1 + share) / 2, len(leads) - 1) * error
    return float(mean - half), float(mean + half)


def judge(claim: Mapping, rows: pd.DataFrame) -> tuple[bool, str, list[int]]:
    """Whether a synthetic result holds, the measured leads as text, and the test seeds.

    It holds when `better` beats `worse` on every task with every seed: a mean over few seeds is weak evidence.
    Without `worse`, `better` alone must be above zero: for metrics that are differences already.

    Args:
        claim: an entry of the paper's YAML with `better`, `tasks`, and optionally `worse` and `metrics`.
        rows: of `evaluation.ablations.read`.

    Raises `BadParameter`: the methods were not tested once on each seed of these tasks, two or more.
    """
    tested = rows[(rows.stage == "test") & rows.task.isin(claim["tasks"])]
    usual, seeds = rows.attrs.get("metric", "accuracy"), sorted(set(map(int, tested.seed)))

    def scores(task: str, method: str, metric: str) -> pd.Series:
        own = tested[(tested.task == task) & (tested.method == method)].set_index("seed").sort_index()
        found = own.reindex(columns=[metric])[metric].dropna()
        if [*found.index] != seeds or len(seeds) < 2:
            accepted = f"one for each of the seeds {seeds}, two or more"
            raise BadParameter("rows", f"{method} on {task}: {metric} of the seeds {[*found.index]}", accepted)
        return found

    parts, wins = [], True
    for task, metric in itertools.product(claim["tasks"], claim.get("metrics", [usual])):
        lead = scores(task, claim["better"], metric)
        if "worse" in claim:
            lead = lead - scores(task, claim["worse"], metric)
        what = task if metric == "accuracy" else f"{task} {metric}"
        low, high = interval(lead.to_numpy())
        spread = f"{lead.mean():+.1f} ± {lead.std():.1f} [{low:+.1f}, {high:+.1f}], least {lead.min():+.1f}"
        parts.append(f"{what} {spread}")
        wins &= bool((lead > 0).all())
    return wins, "; ".join(parts) + SPREAD, seeds


def evidence(claim: Mapping, data: Mapping[str, str], rows: pd.DataFrame) -> str:
    """Evidence of a synthetic result: data, the favoured method, trainable parameters, the baseline's learning rates.

    Args:
        claim: of the paper's YAML, with `favours: true` if the data were built so that the better method can win, and
            optionally `limits`, the reason why it is weak evidence.
        data: `data_built_for` of the YAML: the purpose of each task's data.
        rows: of `evaluation.ablations.read`.
    """
    parts = [f"{task}: {data[task]}" for task in claim["tasks"]]
    parts.append("The data favour the method by construction" if claim.get("favours") else "Not built for the method")
    if "limits" in claim:
        parts.append(claim["limits"])
    roles = [claim[role] for role in ("better", "worse") if role in claim]
    tested = rows[(rows.stage == "test") & rows.task.isin(claim["tasks"])]
    if "trained" in rows:
        each = tested.groupby("method").trained.max()
        parts.append("Trainable parameters: " + ", ".join(f"{name} {each[name]:,.0f}" for name in roles))
    if "worse" in claim:
        found: dict[str, list[str]] = {}  # one score for all tasks is printed once
        for task in claim["tasks"]:
            if text := rates(rows, task, claim["worse"]):
                found.setdefault(text, []).append(task)
        if found:
            texts = [text if len(found) == 1 else f"{', '.join(on)}: {text}" for text, on in found.items()]
            parts.append(f"Learning rate of {claim['worse']}: " + "; ".join(texts))
    return ". ".join(parts) + "."


def rates(rows: pd.DataFrame, task: str, method: str) -> str:
    """The learning rate selected for a method, its neighbours in the grid, and their scores on validation, as text.

    Empty for a method that has no learning rate of its own.
    """
    best = selected(rows).get((task, method))
    if best is None:
        return ""
    found = means(rows).reset_index(name="score")
    own = found[(found.task == task) & (found.method == method)]
    scores = own.set_index("learning_rate").score.sort_index()
    at = scores.index.get_loc(best)
    beside = [f"{rate:g}: {scores[rate]:.1f}" for rate in scores.index[max(at - 1, 0) : at + 2] if rate != best]
    return f"{best:g} ({scores[best]:.1f} on validation; at {', '.join(beside)})"


def counts(ledger: Iterable[Mapping]) -> dict[str, str]:
    """How many claims of each of `KINDS` hold, as text such as "4 of 6 hold, 1 not run"."""
    found = {}
    for kind in KINDS:
        states = [claim["status"] for claim in ledger if claim["kind"] == kind]
        judged = len(states) - states.count("not run")
        parts = [f"{states.count('holds')} of {judged} hold"] if judged else []
        if states.count("not run"):
            parts.append(f"{states.count('not run')} not run")
        found[kind] = ", ".join(parts) or "none"
    return found


def judge_measured(conditions: Iterable[Mapping], cells: Mapping[tuple[str, str], float]) -> tuple[bool | None, str]:
    """Whether a paper result holds by our measurements on real data, and the measurements as text.

    One unmet condition refutes the claim; it holds when all are met, and is None (not judged) while a measurement is
    missing or NaN.

    Args:
        conditions: `measured` of a claim in the paper's YAML. Each has `of`, [method, column]; either `at_least`, or
            `over`, [method, column], and `by`, the smallest lead in points (0: any lead).
        cells: measurements by (method, column), such as those of `tables.Results.claimed`.
    """
    parts, met, missing = [], True, False
    for condition in conditions:
        names = [tuple(condition[key]) for key in ("of", "over") if key in condition]
        absent = [", ".join(name) for name in names if math.isnan(cells.get(name, math.nan))]
        if absent:
            missing = True
            parts.append(f"{' and '.join(absent)}: not run")
            continue
        value, text = cells[names[0]], f"{', '.join(names[0])} {cells[names[0]]:.2f}"
        if "over" in condition:
            lead, least = value - cells[names[1]], condition["by"]
            met &= lead > ROUNDING and lead >= least - ROUNDING
            parts.append(f"{text}, {lead:+.2f} over {', '.join(names[1])} (asked: {least:+g})")
        else:
            met &= value >= condition["at_least"] - ROUNDING
            parts.append(f"{text} (asked: {condition['at_least']:g})")
    return (False if not met else None if missing else True), "; ".join(parts)
