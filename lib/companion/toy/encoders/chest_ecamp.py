"""The toy ECAMP: the ablation's model, trained for twice as many steps.

Words attend to the image only late in training. The notebook trains its live models for some hundred steps, and shows
the attention maps of this one.
"""

from __future__ import annotations

from ... import backbones
from ...models.ecamp import model as ecamp
from .. import encoders
from ..ablations import ecamp as study

NAME = "pocket_ecamp"
METHOD, WORDS = "ECAMP", 18
SEED = 200  # seed of its chests and of its training; ablations and notebook use others


def build() -> ecamp.ECAMP:
    """The shipped model in eval mode; its vocabulary is the words of `chests` in alphabetical order.

    Raises `MissingWeights`, `CorruptFile`: the shipped file is missing, or not the one of its model card.
    """
    model = study.build(METHOD, 0, WORDS)
    model.load_state_dict(backbones.read_state(encoders.weights_file(NAME)))
    return model.eval()
