"""DMT: the live training of the notebook, on the synthetic dataset or by the `paper` profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...models.dmt import recipe
from ...models.dmt.model import DMT
from ...models.dmt.recipe import Setting
from ...training.fit import History
from ..ablations import dmt as study

METHODS = ("DMT", "iBOT only")  # three teachers, and the one whose student does best alone
STEPS = 250  # the losses are seen to fall; the ablation's students take twice as many


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting of the notebook's parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    study.write(root, p.seed)
    chosen = {method: learning_rates[study.TASK, method] for method in METHODS}

    def learn(model: DMT, method: str, **changes: Any) -> History:
        data = study.assemble(method, p.seed, root)[2]
        return study.fit_student(model, study.loss, data, method, chosen[method], p.seed, STEPS, **changes)

    return Setting("synthetic collages", chosen, lambda method: study.assemble(method, p.seed, root)[0], learn)
