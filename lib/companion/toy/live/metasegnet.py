"""MetaSegNet's notebook: the toy setting of the `pocket` profile, or that of the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from torch.utils.data import TensorDataset

from ...models.metasegnet import recipe
from ...models.metasegnet.model import MetaSegNet
from ...models.metasegnet.recipe import Setting, Test
from ...training.fit import History
from ..ablations import metasegnet as study
from ..ablations import study_root
from ..datasets import landcover

LIVE = ("unimodal", "MetaSegNet")


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The training and the tests of the notebook's checked parameters."""
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    landcover.write(study_root(root, p.seed), p.seed)
    train, test = (study.part(root, p.seed, split) for split in ("train", "test"))
    train, chosen = train.of(study.seen(p.seed)), {method: learning_rates["seen", method] for method in LIVE}

    def learn(model: MetaSegNet, method: str) -> History:
        return study.train_model(method, model, train, chosen[method], p.seed)

    def texts(method: str, zones: Sequence[str], kind: str = "", own: object = None) -> list[str] | None:
        if method == "unimodal":
            return None
        return study.texts(tuple(zones), kind or study.level(method), p.seed)

    def tested(zones: Sequence[str]) -> Test:
        part = test.of(zones)
        data = TensorDataset(part.images, part.labels)
        return Test(data, list(part.zones), list(landcover.CLASSES), batch=study.TEST_BATCH)

    return Setting(
        title=f"toy land cover, zone {study.left_out(p.seed)} left out",
        learning_rates=chosen,
        tests={"seen": tested(study.seen(p.seed)), "left out": tested((study.left_out(p.seed),))},
        texts=texts,
        build=functools.partial(study.build, seed=p.seed),
        learn=learn,
    )
