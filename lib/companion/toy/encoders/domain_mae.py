"""The toy domain models, masked autoencoders that replace those of DPLQ, and a probe of their features.

Each reconstructs the masked half of unlabelled images of its domain, drawn over training tiles, without labels of
classes or sensors. Patches are 8 pixels wide, so that a few thousand steps suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor
from torch.nn import functional as F

from ... import backbones
from ...errors import BadParameter, check_choice
from ...models.dplq.model import MAEFeatures
from ...models.layers import mae
from .. import encoders

NAMES = {"remote": "pocket_mae_remote", "medical": "pocket_mae_medical"}
SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
DECODER = (48, 2, 4)  # width, depth, heads
MASKED = 0.5  # share of the patches


def load(domain: str, weights: str = "pocket") -> MAEFeatures:
    """The shipped domain model of "remote" or "medical" in eval mode, or with `weights` "random" an untrained one.

    Images are normalised for the small CLIP, to [-1, 1].

    Raises:
        BadParameter: another domain or other weights.
        MissingWeights, CorruptFile: the shipped file is missing, or not the one that its model card describes.
    """
    check_choice("domain", domain, NAMES)
    if weights == "random":
        options: dict[str, Any] = {"mask_ratio": MASKED, "normalise": False, "xavier": False}
        model = mae.MAE(mae.encoder(**SHAPE), DECODER, **options)
        for part in (model.encoder, model.decoder):  # of the shipped models: timm's table, MAE's in another order
            table = build_sincos2d_pos_embed(model.encoder.patch_embed.grid_size, part.pos_embed.shape[2])
            part.pos_embed.data = F.pad(table, (0, 0, 1, 0))[None]
        return MAEFeatures(model).eval()
    if weights != "pocket":
        raise BadParameter("weights", weights, ("pocket", "random"))
    state = backbones.read_state(encoders.weights_file(NAMES[domain]))
    return MAEFeatures(mae.MAE.from_official(state, SHAPE["num_heads"], DECODER[2]))


def probe(features: Tensor, sensors: np.ndarray, tested: Tensor, truth: np.ndarray) -> float:
    """Test accuracy of a logistic regression that predicts the sensor from features (n, F)."""
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000)).fit(features.numpy(), sensors)
    return float(reader.score(tested.numpy(), truth))
