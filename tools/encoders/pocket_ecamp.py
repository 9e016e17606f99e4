"""The toy ECAMP: the ablation's model, trained for twice as many steps, 1,200. About 6 minutes on one core."""

from __future__ import annotations

import tempfile
from functools import partial

from companion.models.ecamp import model as ecamp
from companion.toy.ablations import ecamp as study
from companion.toy.ablations import study_root
from companion.toy.datasets import chests
from companion.toy.encoders.chest_ecamp import METHOD, NAME, SEED

from . import ship


def train(root: str, epochs: float, learning_rate: float, seed: int) -> ecamp.ECAMP:
    """The model, pre-trained from scratch on chests that are written below `root`."""
    chests.write(study_root(root, seed), seed)
    model = study.build(METHOD, seed, len(study.vocabulary(root, seed)))
    study.train_model(model, study.pairs(METHOD, root, seed), learning_rate, seed, epochs, NAME)
    return model


def measure(root: str, model: ecamp.ECAMP) -> dict[str, float]:
    """The share, in percent, of a masked finding's attention inside the lesion's box."""
    test, words = study.part(root, SEED, "test"), study.vocabulary(root, SEED)
    name = "attention in box, hidden"
    return {name: study.lesion_share(model, test, words)[name]}


if __name__ == "__main__":
    recipe = {"epochs": 19.36, "learning_rate": 4e-3, "seed": SEED}
    with tempfile.TemporaryDirectory() as root:
        ship(NAME, partial(train, root), partial(measure, root), recipe, world=chests.VERSION)
