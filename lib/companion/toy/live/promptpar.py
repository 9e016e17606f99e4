"""PromptPAR: what the notebook trains live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ...models.promptpar import PromptPAR, recipe
from ...training.fit import History
from ..ablations import promptpar as ablation
from ..ablations import study_root
from ..datasets import pedestrians as toy

TASK, METHODS = "street", ("heads only", "PromptPAR, not masked", "PromptPAR")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters; at `pocket` the images are written below `out`."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    toy.write(study_root(root, p.seed), p.seed)
    parts = {name: ablation.images(root, p.seed, split) for name, split in (("train", "trainval"), ("test", "test"))}

    def train(method: str) -> tuple[PromptPAR, History]:
        model = ablation.build(method, p.seed)
        rate = learning_rates[TASK, method]
        return model, ablation.train_model(model, method, parts["train"], rate, p.seed)

    return recipe.Setting(
        title="pocket pedestrians",
        names=toy.ATTRIBUTES,
        parts=parts,
        methods=METHODS,
        build=functools.partial(ablation.build, seed=p.seed),
        train=train,
        probabilities=lambda model, data: ablation.probabilities(model, data.tensors[0]),
    )
