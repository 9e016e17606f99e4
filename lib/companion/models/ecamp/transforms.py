"""What is done to an image before ECAMP's ViT (section 5): pre-training, and the downstream tasks as released.

From a PIL image or a grey tensor (1, H, W), uint8 or 0 to 1, to (3, S, S); `MaskTransform` takes RIGA's
colours (3, H, W) too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.images import as_float
from ...errors import Count, typed
from ...evaluation.metrics import checked
from ...io.config import configure

MEAN, STD = 0.4722, 0.3028  # of grey values downstream, as released
PRETRAIN_MEAN, PRETRAIN_STD = 0.4721, 0.3037
PRETRAIN_CROP = 0.2, 1.0  # of the image
SHORTEST = round(448 / (PRETRAIN_CROP[0] * 3 / 4) ** 0.5)  # of an image, so that its smallest crop is not enlarged


def _clipped(image: Tensor) -> Tensor:
    """Clipped to 0..1: bicubic interpolation overshoots at sharp edges; the authors' 8-bit images are clipped too."""
    return image.clamp(0, 1)


def _three(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)


def _coloured(mean: float, std: float) -> list:
    return [v2.Normalize([mean], [std]), v2.Lambda(_three)]


@typed
def pretrain_transform(size: Count = 448) -> v2.Transform:
    """A crop of 20 to 100 %, bicubic, flipped with probability 0.5; as released, "left" and "right" in the reports are
    not changed."""
    cut = v2.RandomResizedCrop(size, scale=PRETRAIN_CROP, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([as_float, cut, _clipped, v2.RandomHorizontalFlip(), *_coloured(PRETRAIN_MEAN, PRETRAIN_STD)])


@typed
def train_transform(size: Count = 224) -> v2.Transform:
    """Classification: a crop of 8 to 100 %, bilinear, flipped with probability 0.5."""
    return v2.Compose([as_float, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_coloured(MEAN, STD)])


@typed
def test_transform(size: Count = 224) -> v2.Transform:
    """Classification: the short side resized to `size`, then a centre crop."""
    steps = [as_float, v2.Resize(size), v2.CenterCrop(size), *_coloured(MEAN, STD)]
    return configure(v2.Compose(steps), {"size": size}, test_transform)


@typed
def squeeze_transform(size: Count = 224, antialias: bool = False) -> v2.Transform:
    """Detection: resized to a square, ignoring the aspect ratio; deterministic.

    Args:
        antialias: as released, False: OpenCV's bilinear interpolation uses four pixels at any reduction.
    """
    steps = [as_float, v2.Resize((size, size), antialias=antialias), *_coloured(MEAN, STD)]
    return configure(v2.Compose(steps), {"size": size, "antialias": antialias}, squeeze_transform)


class MaskTransform:
    """Segmentation: image and mask to a square; in training scaled by up to 10 % and rotated by up to 10 degrees, with
    probability 0.5.

    As released, on SIIM the mask is not warped with its image, and RSNA's masks are resized by nearest neighbour; all
    others by the mean over the covered pixels, which gives soft borders.

    Args:
        dataset: the name of the set.
        train: warp at random.
        size: of the square.
    """

    @typed
    def __init__(self, dataset: str, train: bool, size: Count = 224):
        nearest = dataset == "xrays/rsna"
        self.size, self.train, self.warp_mask = size, train, dataset != "xrays/siim"
        self.warp = v2.RandomApply([v2.RandomAffine(10, scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)])
        self.resize_image = squeeze_transform(size)
        self.reduce = _nearest if nearest else _area
        self.enlarge = v2.InterpolationMode.NEAREST if nearest else v2.InterpolationMode.BILINEAR

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """From (1 or 3, H, W) and (k, H', W'), each value 0 to 1, to (3, S, S) and (k, S, S)."""
        mask = checked("mask", mask, axes=3, low=0, high=1).float()
        if self.train and self.warp_mask:
            if image.shape[-2:] != mask.shape[-2:]:
                mask = v2.functional.resize(mask, image.shape[-2:], self.enlarge)
            image, warped = self.warp(tv_tensors.Image(image), tv_tensors.Mask(mask))
            image, mask = image.as_subclass(Tensor), warped.as_subclass(Tensor)
        elif self.train:
            image = self.warp(image)
        return self.resize_image(image), self.reduce(mask, self.size)


def _nearest(mask: Tensor, size: int) -> Tensor:
    return F.interpolate(mask[None], (size, size), mode="nearest")[0]


def _area(mask: Tensor, size: int) -> Tensor:
    """Each pixel's mean over the covered part of the mask, as OpenCV's INTER_AREA."""
    rows, columns = (_shares(n, size) for n in mask.shape[-2:])
    return rows @ mask @ columns.T


@functools.lru_cache(8)  # a set's images have few sizes, and an entry has a megabyte
def _shares(given: int, size: int) -> Tensor:
    """(size, given): the weight of each of `given` pixels in the mean of each of `size` equal intervals."""
    edges = torch.arange(size + 1, dtype=torch.float64)[:, None] * given / size
    pixel = torch.arange(given)
    inside = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
    return (inside.clamp_min(0) * size / given).float()
