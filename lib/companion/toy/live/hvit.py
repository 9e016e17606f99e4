"""H-ViT: what the notebook trains live, on the synthetic slides or with the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ...models.hvit import recipe
from ...training.fit import History
from ..ablations import hvit as ablation

TASK = "place"


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    data, test = (ablation.embeddings(root, p.seed, TASK, split) for split in ("trainval", "test"))
    chosen = {method: learning_rates[TASK, method] for method in ablation.MAIN}

    def train(method: str, fold: int, **changes: Any) -> tuple[nn.Module, History]:
        model = ablation.build(method, p.seed)
        return model, ablation.train_model(model, method, data, chosen[method], p.seed, **changes)

    return recipe.Setting(
        title=f"synthetic slides, {TASK}",
        folds=[(data, None)],
        test=test,
        learning_rates=chosen,
        train=train,
        grades=lambda model, method, part: ablation.grades(model, method, part.tensors[0]),
    )
