"""Training and evaluation of the toy ECAMP: the ablation's model, trained for twice as many steps.

    python -m companion.toy.encoders.chest_ecamp      (some minutes on one core, see `seconds` in the model card)

Words attend to the image only late in training. The notebook trains its live models for some hundred steps, and shows
the attention maps of this one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ... import backbones
from ...models.ecamp import model as ecamp
from .. import encoders
from ..ablations import ecamp as study
from ..ablations import study_root
from ..datasets import chests as pocket
from . import card

NAME = "pocket_ecamp"
METHOD, LR, EPOCHS, WORDS = "ECAMP", 4e-3, 19.36, 18  # 1,200 steps
SEED = 200  # seed of its chests and of its training; ablations and notebook use others


def build() -> ecamp.ECAMP:
    """The shipped model in eval mode; its vocabulary is the words of `chests` in alphabetical order.

    Raises `MissingWeights`, `CorruptFile`: the shipped file is missing, or not the one of its model card.
    """
    model = study.build(METHOD, 0, WORDS)
    model.load_state_dict(backbones.read_state(encoders.weights_file(NAME)))
    return model.eval()


def train(root: str | Path, epochs: float = EPOCHS, seed: int = SEED) -> ecamp.ECAMP:
    """Pre-train it from scratch on chests that are written below `root`; returned in eval mode."""
    pocket.write(study_root(root, seed), seed)
    model = study.build(METHOD, seed, len(study.vocabulary(root, seed)))
    study.train_model(model, study.pairs(METHOD, str(root), seed), LR, seed, epochs, NAME)
    return model


def measure(model: ecamp.ECAMP, root: str | Path, seed: int = SEED) -> dict[str, float]:
    """The ablation's measures of a model on test chests of `seed`, which are written below `root`."""
    pocket.write(study_root(root, seed), seed)
    known, test = (study.part(str(root), seed, split) for split in ("train", "test"))
    words = study.vocabulary(root, seed)
    found = study.probes(METHOD, model, known, test) | {"Dice": study.dice(model, known, test, seed)}
    found |= study.words(model, test, words) | study.lesion_share(model, test, words)
    return {name: round(value, 2) for name, value in found.items()}


def ship(folder: str | Path = encoders.WEIGHTS) -> Path:
    """Train, measure, and write the weights and their model card."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        model = train(root)
        seconds = time.monotonic() - start
        quality = {"ECAMP": measure(model, root), "untrained": measure(study.build(METHOD, SEED, WORDS).eval(), root)}
    recipe = study.RECIPE | {"epochs": EPOCHS, "learning_rate": LR, "seed": SEED}
    return card.save(folder, NAME, model.state_dict(), quality, recipe, seconds, world=pocket.VERSION)


if __name__ == "__main__":
    card.command(ship, seed=None)
