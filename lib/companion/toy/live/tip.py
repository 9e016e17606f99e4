"""TIP: the setting of the notebook at the `pocket` profile."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ...models.tip import recipe
from ...models.tip.pipeline import TIPPipeline
from ...models.tip.recipe import Setting
from ...training.fit import History
from ..ablations import study_root
from ..ablations import tip as study
from ..datasets import restoration as pocket

METHODS = ("TIP", "plain ControlNet")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting of the notebook's parameters: the study's synthetic images and trainings, or `recipe.setting`.

    The test is the study's "parameterised" one. Size, sampling steps, base model and dataset are fixed.
    """
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    pocket.write(study_root(root, p.seed), p.seed)
    images, chosen = study.part(root, p.seed, "train"), {m: learning_rates["parameterised", m] for m in METHODS}

    def train(pipe: TIPPipeline, method: str) -> History:
        return study.train_model(pipe, study.samples(method, images, p.seed), chosen[method], p.seed, method)

    return Setting(
        title="synthetic images",
        learning_rates=chosen,
        build=functools.partial(study.build, seed=p.seed),
        train=train,
        test=study.tested(root, p.seed, "test", "parameterised")[0],
        restore=functools.partial(study.restore, seed=p.seed, guidance=p.guidance, scale=p.scale),
    )
