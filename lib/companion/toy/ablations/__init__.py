"""Ablation studies on the synthetic datasets, one module a paper; `toy.ablation` runs them."""

from __future__ import annotations

from pathlib import Path


def study_root(root: str | Path, seed: int) -> Path:
    """The data root of a seed of a study: each seed has images of its own, so that the std holds their variation."""
    return Path(root) / f"seed{seed}"
