"""The pre-trainings of the ablations: ECAMP without one of its parts, and MRM-like, on which it builds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .model import ECAMP, Bert, Fusion


class PatchFusion(Fusion):
    """Each word attends to the patches; their mean is left out."""

    def __init__(self, sizes: Bert):
        super().__init__(sizes)
        del self.mean

    def context(self, a: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.cross(a, z), {}


class MeanFusion(Fusion):
    """All words receive the mean of the patches; none attends to them."""

    def __init__(self, sizes: Bert):
        super().__init__(sizes)
        del self.cross

    def context(self, a: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mean(z.mean(1, keepdim=True)).expand_as(a), {}


class PooledFusion(nn.Module):
    """The mean of the patches is added to the embedded words, without a layer."""

    def __init__(self, sizes: Bert):
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + z.mean(1, keepdim=True), {}


class PatchAttention(ECAMP):
    fusion = PatchFusion


class MeanToken(ECAMP):
    fusion = MeanFusion


class MRMLike(ECAMP):
    fusion = PooledFusion


METHODS: dict[str, tuple[type[ECAMP], dict[str, Any], dict[str, Any]]] = {
    "MIM only": (ECAMP, {"text": None, "super_resolution": False}, {}),
    "MRM-like": (MRMLike, {"super_resolution": False}, {"masking": "mrm", "rebalance": False, "splice_share": 0.0}),
    "ECAMP": (ECAMP, {}, {}),
    "ECAMP, no super-resolution": (ECAMP, {"super_resolution": False}, {}),
    "ECAMP, no re-balancing": (ECAMP, {}, {"rebalance": False}),
    "ECAMP, no distillation": (ECAMP, {}, {"splice_share": 0.0}),
    "ECAMP, descriptors hidden": (ECAMP, {}, {"masking": "intended"}),
    "ECAMP, whole image": (ECAMP, {"window": None}, {}),
    "ECAMP, mean token": (MeanToken, {}, {}),
    "ECAMP, patch attention": (PatchAttention, {}, {}),
}
"""By name: the model's class, its arguments that differ, and those of `text.Pairs`."""
