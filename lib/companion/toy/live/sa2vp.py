"""SA²VP: the live training of the notebook at toy scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ... import backbones
from ...models.sa2vp import recipe
from ...models.sa2vp.recipe import Setting
from .. import encoders
from ..ablations import sa2vp as study
from ..ablations import study_root
from ..datasets import classification as pocket

TASK, LIVE = "textures", ("linear probing", "VPT-deep", "SA²VP")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for: at toy scale, or the `paper` profile's."""
    if p.profile == "paper":
        return recipe.setting(p, out)
    root, classes = str(out / "data"), pocket.TASKS[TASK].classes
    pocket.write(study_root(root, p.seed), list(study.TASKS), p.seed)
    return Setting(
        title="which photograph a crop comes from (synthetic task)",
        train=study.images(TASK, root, p.seed, "trainval"),
        test=study.images(TASK, root, p.seed, "test"),
        classes=classes,
        input=backbones.input_of(encoders.build("pocket_vit", "random")),
        learning_rates={method: learning_rates[TASK, method] for method in LIVE},
        build=lambda method: study.build(method, len(classes), p.seed),
        options=study.OPTIONS | {"seed": p.seed},
    )
