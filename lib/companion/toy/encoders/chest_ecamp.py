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
from ..datasets import chests as pocket
from . import card

NAME = "pocket_ecamp"
METHOD, LR, EPOCHS, WORDS = "ECAMP", 4e-3, 19.36, 18  # 1,200 steps
SEED = 200  # of its chests and of its training; ablations and notebook have other ones


def build() -> ecamp.ECAMP:
    """The shipped model in eval mode; its vocabulary are the words of `chests` in alphabetical order.

    Raises:
        MissingWeights, CorruptFile: the shipped file is missing, or not the one of its model card.
    """
    model = study.build(METHOD, 0, WORDS)
    model.load_state_dict(backbones.read_state(encoders.weights_file(NAME)))
    return model.eval()


def train(root: str | Path, epochs: float = EPOCHS, seed: int = SEED) -> ecamp.ECAMP:
    """Pre-train it from scratch on chests that are written below `root`; returned in eval mode."""
    pocket.write(study.study_root(root, seed), seed)
    model = study.build(METHOD, seed, len(study.vocabulary(root, seed)))
    study.train_model(model, study.pairs(METHOD, str(root), seed), LR, seed, epochs, NAME)
    return model


def measure(model: ecamp.ECAMP, root: str | Path, seed: int = SEED) -> dict[str, float]:
    """The ablation's measures of a model on test chests of `seed`, which are written below `root`."""
    pocket.write(study.study_root(root, seed), seed)
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
        seconds = round(time.monotonic() - start)
        quality = {"ECAMP": measure(model, root), "untrained": measure(study.build(METHOD, SEED, WORDS).eval(), root)}
    head = {
        "library_name": "companion",
        "data": "phantom chests with reports, all drawn (companion.toy.datasets.chests)",
        "attribution": "none: nothing but drawings and their descriptions",
        "command": "python -m companion.toy.encoders.chest_ecamp",
        "recipe": study.RECIPE | {"epochs": EPOCHS, "learning_rate": LR, "seed": SEED},
        "world": pocket.VERSION,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return card.ship(Path(folder) / f"{NAME}.safetensors", model.state_dict(), head, quality, _CARD)


_CARD = """
# pocket_ecamp

ECAMP (Wang, Yao et al., MedIA 2025) of a size for images of 64x64 pixels: encoder of 3 blocks, width 96, on 32x32
pixels with patches of 4; image decoder of one block, width 48; fusion layer and one BERT layer, width 96, 18 words.
Pre-trained on 2,000 phantom chests and their reports, which `companion.toy.datasets.chests` draws and writes.

`companion.toy.encoders.chest_ecamp.build()` gives it.

**Measured** on 800 chests drawn from another stream: see `quality` above, in percent. `AUROC n`: a logistic regression
on the mean patch token and n labels. `Dice`: lesions segmented from frozen patch tokens. `side gain`, `finding gain`:
by how much the loss on the hidden word is lower with the right image than with another. `attention lead`: by how much
the share of the finding's attention inside the lesion's box exceeds the box's share of the image, for the word as it
can be read and hidden: only a hidden word has a reason to look. The losses are in hundredths of a nat. Beside it stands
the same model before training.

**Limits.** It knows four findings of a drawn world and eighteen words, and nothing of real radiographs.
"""


if __name__ == "__main__":
    card.command(ship, seed=None)
