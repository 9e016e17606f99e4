"""The input of the small ViT and CLIP, which `encoders.build` loads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pixels(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 images (32, 32, 3) as the (n, 3, 32, 32) float input of the small encoders, in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - 0.5) / 0.5
