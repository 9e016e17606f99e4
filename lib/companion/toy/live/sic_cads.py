"""SIC-CADS: what the notebook trains live, on the synthetic scenes or with the published settings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ...models.sic_cads import MLR, recipe
from ...training.fit import History
from ..ablations import sic_cads as ablation
from ..ablations import study_root
from ..datasets import detection as synthetic
from ..encoders import detector as encoders

TASK, METHOD = "shipped", "SIC-CADS"


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> recipe.Setting:
    """The setting of the notebook's parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root, learning_rate = str(out / "data"), learning_rates[TASK, METHOD]
    synthetic.write(study_root(root, p.seed), p.seed)
    clip, detector = ablation.foundation(TASK, p.seed)
    text = encoders.texts(clip)

    def train(model: MLR, **changes: Any) -> History:
        data = ablation.training_data(model, *ablation.images_of(root, p.seed, "train"))
        return ablation.train_model(model, data, learning_rate, p.seed, **changes)

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, probabilities = detector(ablation.pixels(image[None]), text)
        return boxes[0], probabilities[0]

    return recipe.Setting(
        title="synthetic scenes",
        test=ablation.images_of(root, p.seed, "test")[0],
        build=functools.partial(ablation.build, TASK, p.seed),
        train=train,
        detect=detect,
        branch=p.branch,
        gamma=p.gamma or ablation.GAMMA,
        threshold=ablation.THRESHOLD,
        nms=ablation.NMS,
        top=ablation.TOP,
    )
