"""The pre-trainings of the paper's ablation: ECAMP without one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .model import ECAMP, Batch, Bert, Computed, Fusion


class NoSuperResolution(ECAMP):
    def __init__(self, **options: Any):
        super().__init__(**options)
        del self.super_resolution

    def resolve(self, pixels: Tensor, batch: Batch) -> Computed:
        return pixels.new_zeros(()), {}


class PatchFusion(Fusion):
    """Each word attends to the patches; their mean is left out."""

    def __init__(self, sizes: Bert):
        super().__init__(sizes)
        del self.mean

    def context(self, a: Tensor, z: Tensor) -> Computed:
        return self.cross(a, z), {}


class MeanFusion(Fusion):
    """All words receive the mean of the patches; none attends to them."""

    def __init__(self, sizes: Bert):
        super().__init__(sizes)
        del self.cross

    def context(self, a: Tensor, z: Tensor) -> Computed:
        return self.mean(z.mean(1, keepdim=True)).expand_as(a), {}


class PatchAttention(ECAMP):
    fusion = PatchFusion


class MeanToken(ECAMP):
    fusion = MeanFusion


METHODS: dict[str, tuple[Callable[..., ECAMP], dict[str, Any]]] = {
    "ECAMP": (ECAMP.build, {}),
    "ECAMP, no super-resolution": (NoSuperResolution.build, {}),
    "ECAMP, no re-balancing": (ECAMP.build, {"rebalance": False}),
    "ECAMP, no distillation": (ECAMP.build, {"splice_share": 0.0}),
    "ECAMP, descriptors hidden": (ECAMP.build, {"masking": "intended"}),
    "ECAMP, whole image": (partial(ECAMP.build, window=None), {}),
    "ECAMP, mean token": (MeanToken.build, {}),
    "ECAMP, patch attention": (PatchAttention.build, {}),
}
"""By name: a function like `ECAMP.build`, and the arguments of `text.ReportPairs`."""
