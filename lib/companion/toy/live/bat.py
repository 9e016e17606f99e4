"""BAT: what the notebook trains and tracks live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from torch import nn

from ...data import tracking as data
from ...models.bat import recipe
from ...training.fit import CPU, History
from ..ablations import bat as ablation
from ..ablations import study_root
from ..datasets import tracking as toy

METHODS = ("RGB only", "thermal only", "sum of features", "mean of features", "higher peak", "BAT")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters; at `pocket` the videos are written below `out`."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    toy.write(study_root(root, p.seed), p.seed)
    videos = data.load("pocket/rgbt", study_root(root, p.seed), "test")

    def train(method: str) -> tuple[nn.Module, History]:
        model = ablation.build(method, p.seed)
        if method in ablation.UNTRAINED:
            return model.eval(), []
        pairs = ablation.pairs(root, p.seed, "trainval")
        return model, ablation.train_model(model, method, pairs, learning_rates["videos", method], p.seed)

    def track(method: str, model: nn.Module) -> dict[str, np.ndarray]:
        return recipe.follow_in_memory(model, videos, method, CPU)

    return recipe.Setting("pocket videos", videos, METHODS, train, track, "lasher", ablation.PIXELS)
