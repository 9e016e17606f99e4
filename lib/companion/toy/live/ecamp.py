"""ECAMP's notebook: the toy setting of the `pocket` profile, or that of the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ...models.ecamp import recipe
from ...models.ecamp.model import ECAMP
from ...models.ecamp.recipe import Setting
from ...training.fit import History
from ..ablations import ecamp as study
from ..ablations import study_root
from ..datasets import chests

TASK, LIVE = "chests", ("MIM only", "ECAMP")
STEPS = 150  # enough to see the losses fall; the ablations take four times as many


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The pre-training of the notebook's checked parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    chests.write(study_root(root, p.seed), p.seed)
    chosen = {method: learning_rates[TASK, method] for method in LIVE}
    epochs = STEPS / (chests.COUNTS["train"] // study.RECIPE["batch"])

    def learn(model: ECAMP, method: str) -> History:
        return study.train_model(model, study.pairs(method, root, p.seed), chosen[method], p.seed, epochs, method)

    return Setting(
        title="toy chests",
        learning_rates=chosen,
        pairs=functools.partial(study.pairs, root=root, seed=p.seed),
        build=functools.partial(study.build, seed=p.seed, words=len(study.vocabulary(root, p.seed))),
        learn=learn,
    )
