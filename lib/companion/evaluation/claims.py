"""Judging claims: directional ones by the test rows of an ablation study, differences by a tolerance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import SupportsFloat

import numpy as np
import pandas as pd


def check_range(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether `value` lies in [low, high]; also printed, without the value, which varies between machines."""
    inside = low <= value <= high
    bounds = (
        f"at least {low:g}" if high == math.inf else f"at most {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
    )
    print(f"{name}: {'as expected' if inside else 'NOT as expected'} ({bounds})")
    return inside


def within(differences: Mapping[str, SupportsFloat], tolerance: float = 0.0) -> tuple[bool, str]:
    """Whether all differences are at most `tolerance`, and how large each is, as text: as `Run.claim` takes them.

    A difference within the tolerance is rounding noise, which varies between machines: the text says whether a tenth of
    the tolerance bounds it too. A larger one is written as it is; nan is too large.

    Args:
        differences: by name, 0 or more.
        tolerance: a power of ten, at least thirty times the noise; 0: what is compared must be equal.
    """

    def bound(value: float) -> str:
        return f"at most {np.format_float_scientific(value, 0, exp_digits=1, trim='-')}" if value else "exactly 0"

    parts, found = [], {name: float(value) for name, value in differences.items()}
    for name, value in found.items():
        inside = bound(tolerance / 10 if value <= tolerance / 10 else tolerance)
        parts.append(f"{name}: {inside if value <= tolerance else f'{value:.2g}, TOO LARGE'}")
    holds = bool(found) and all(value <= tolerance for value in found.values())
    return holds, f"{'; '.join(parts)} (asked: {bound(tolerance)})"


def interval(leads: np.ndarray, share: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """The paired bootstrap interval of a mean lead: it holds `share` of the means of resampled seeds.

    Args:
        leads: of one method over the other, one a seed; both were tested on that seed's data.
    """
    drawn = np.random.default_rng(0).integers(len(leads), size=(draws, len(leads)))
    low, high = np.quantile(leads[drawn].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def judge(claim: Mapping, rows: pd.DataFrame) -> tuple[bool, str, list[int]]:
    """Whether a directional claim holds, the measured leads as text, and the test seeds.

    It holds when `better` beats `worse` on every task with every seed: a mean over few seeds is weak evidence.
    Without `worse`, `better` alone has to be above zero: for metrics that are a lead already.

    Args:
        claim: an entry of the paper's YAML with `better`, `tasks`, and maybe `worse` and `metrics`.
        rows: of `evaluation.ablations.read`.
    """
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
    usual = rows.attrs.get("metric", "accuracy")
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
    return wins, value, sorted(seeds)


def judge_measured(conditions: Iterable[Mapping], cells: Mapping[tuple[str, str], float]) -> tuple[bool | None, str]:
    """Whether a paper result holds by our measurements on real data, and what was measured, as text.

    One condition that is not met refutes the claim; it holds when all are met, and is None, not judged, as long as a
    measurement is missing.

    Args:
        conditions: `measured` of a claim in the paper's YAML. Each has `of`, [method, column]; either `at_least`, or
            `over`, [method, column], and `by`, the smallest lead in points (0: any lead).
        cells: by (method, column), of `claim_cells` of the paper's recipe.
    """
    parts, met, missing = [], True, False
    for condition in conditions:
        names = [tuple(condition[key]) for key in ("of", "over") if key in condition]
        absent = [", ".join(name) for name in names if name not in cells]
        if absent:
            missing = True
            parts.append(f"{' and '.join(absent)}: not run")
            continue
        value, text = cells[names[0]], f"{', '.join(names[0])} {cells[names[0]]:.2f}"
        if "over" in condition:
            lead, least = value - cells[names[1]], condition["by"]
            met &= lead > 0 and lead >= least
            parts.append(f"{text}, {lead:+.2f} over {', '.join(names[1])} (asked: {least:+g})")
        else:
            met &= value >= condition["at_least"]
            parts.append(f"{text} (asked: {condition['at_least']:g})")
    return (False if not met else None if missing else True), "; ".join(parts)
