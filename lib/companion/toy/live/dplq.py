"""DPLQ: the live training of the notebook at toy scale."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from torch.utils.data import TensorDataset

from ...models.dplq import recipe
from ...models.dplq.recipe import Setting
from ...models.layers.clip_prompting import PromptedCLIP
from ..ablations import dplq as study
from ..ablations import study_root
from ..datasets import domains as pocket

TASK, LIVE = "remote", ("zero-shot CLIP", "MaPLe", "DPLQ")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for: at toy scale, or the `paper` profile's."""
    if p.profile == "paper":
        return recipe.setting(p, out)
    root = str(out / "data")
    pocket.write(study_root(root, p.seed), TASK, p.seed)
    classes = {part: study.images(TASK, root, p.seed, part)[2] for part in ("train", "test base", "test novel")}

    def inputs(method: str, part: str) -> TensorDataset:
        return study.inputs(method, TASK, root, p.seed, part if part == "train" else f"test {part}")

    def build(method: str) -> PromptedCLIP:
        return study.build(method, classes["train"], p.seed, inputs(method, "train").tensors[-1].shape[-1])

    return Setting(
        title=f"{TASK} (synthetic), base to novel",
        classes=classes["train"],
        test_classes={half: classes[f"test {half}"] for half in ("base", "novel")},
        methods=LIVE,
        learning_rates={method: learning_rates[TASK, method] for method in LIVE if method not in study.UNTRAINED},
        build=build,
        inputs=inputs,
        optimizer=study.optimizer,
        options=study.TRAINING | {"seed": p.seed},
        accuracy=functools.partial(study.accuracy, seed=p.seed),
    )
