"""Judging claims: directional ones by the test rows of an ablation study, numbers by their bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

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
