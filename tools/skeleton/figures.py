"""NAME's figures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...viz import plots
from .model import NAME


def shown(models: Mapping[str, NAME], images: Tensor) -> Figure:
    """TODO what the method looks at; the probability of the predicted class, for models by name."""
    with torch.no_grad():
        sure = {name: model(images).softmax(1).amax(1).sort().values for name, model in models.items()}
    found = {name: {"probability of the predicted class": pd.Series(p.numpy())} for name, p in sure.items()}
    return plots.curves(found, x="image")
