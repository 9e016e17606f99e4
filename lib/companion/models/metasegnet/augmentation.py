"""Augmentation of land-cover images and labels: GeoSeg's recipe, with torchvision's transforms where available.

    train_transform(512, ignore=8)      a scale of 0.75 to 1.5, a crop with several classes, flips, normalised
    test_transform()                    normalised
    Mosaic(data, 0.25, data.zones())    a quarter of the items put together from four images OF ONE ZONE

No text would describe a mosaic of images from several zones. (GeoSeg, which is image-only, combines any four.) None of
these transforms changes colours much, because the text explains colour.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...data.landcover import Transform
from ...data.rasters import MEAN, STD
from ...errors import BadParameter, Count, Positive, Share, Whole, check_arguments, check_choice, typed
from .maps import SCALES

MOST, TRIES = 0.75, 11  # of `SmartCrop`


class Scale(v2.Transform):
    """Image and labels at a scale drawn uniformly from several; bicubic, and nearest for labels."""

    @typed
    def __init__(self, scales: Sequence[Positive] = SCALES):
        super().__init__()
        self.scales = tuple(scales)

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        return {"scale": self.scales[int(torch.randint(len(self.scales), ()))]}

    def transform(self, inpt: Tensor, params: dict[str, float]) -> Tensor:
        size = [max(1, int(side * params["scale"])) for side in inpt.shape[-2:]]
        if isinstance(inpt, tv_tensors.Mask):  # Pillow's, aligned to pixel centres like bicubic
            labels = F.resize(inpt.as_subclass(Tensor)[None], size, interpolation=F.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(labels[0], like=inpt)
        return F.resize(inpt, size, interpolation=F.InterpolationMode.BICUBIC, antialias=True)


class SmartCrop(torch.nn.Module):
    """A random square, redrawn until it has two classes or more and none has `MOST` of the labelled pixels.

    After `TRIES` the last one is used. An image that is too small is padded on both sides by (size - side) // 2 + 1
    black, ignored pixels, and then cropped at random.

    Args:
        every: labels of `ignore` count as a class in this condition, as in GeoSeg's DC-Swin on LoveDA.
    """

    @typed
    def __init__(self, size: Count, ignore: Whole, *, every: bool = False):
        super().__init__()
        self.size, self.ignore = size, ignore
        self.counted = ignore + every
        self.crop = v2.RandomCrop(size)

    def forward(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        # what is neither an Image nor its Mask would not be cropped
        check_arguments(SmartCrop.forward, {"image": image, "labels": labels})
        check_choice("image", image.dtype, (torch.uint8,))
        around = [max(0, self.size - side) and (self.size - side) // 2 + 1 for side in reversed(labels.shape)]
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: self.ignore}
        image, labels = v2.Pad(around, fill)(image, labels)
        for _ in range(TRIES):
            found = self.crop(image, labels)
            counts = torch.bincount(found[1].flatten(), minlength=self.ignore + 1)[: self.counted]
            if (counts > 0).sum() > 1 and counts.max() < MOST * counts.sum():
                break
        return found


class BrightnessContrast(v2.Transform):
    """Image uint8 to alpha x + 255 beta, truncated to integers: albumentations' random brightness and contrast.

    Args:
        limit: alpha is drawn from 1 - limit to 1 + limit, beta from -limit to limit.
    """

    _transformed_types = (tv_tensors.Image,)

    @typed
    def __init__(self, limit: Share):
        super().__init__()
        self.limit = limit

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        alpha, beta = torch.empty(2).uniform_(-self.limit, self.limit).tolist()
        return {"alpha": 1 + alpha, "beta": beta}

    def transform(self, inpt: Tensor, params: dict[str, float]) -> Tensor:
        changed = (inpt.float() * params["alpha"] + 255 * params["beta"]).clamp(0, 255)
        return tv_tensors.wrap(changed.to(torch.uint8), like=inpt)


def test_transform() -> Transform:
    """Image float32, normalised with ImageNet's mean and standard deviation; labels unchanged."""
    kinds = {tv_tensors.Image: torch.float32, "others": None}
    return v2.Compose([v2.ToDtype(kinds, scale=True), v2.Normalize(MEAN, STD)])


@typed
def train_transform(
    size: Count,
    ignore: Whole,
    *,
    flip: Share = 0.5,
    upside_down: Share = 0.5,
    brightness: Share = 0.0,
    every: bool = False,
) -> Transform:
    """A pair (Image uint8, Mask int64) to (float32 (3, size, size), int64 (size, size)).

    Args:
        flip, upside_down: probability of each flip.
        brightness: limit of `BrightnessContrast`, which has probability 0.25; GeoSeg has 0.25 on LoveDA.
        every: see `SmartCrop`.
    """
    crop = SmartCrop(size, ignore, every=every)
    steps = [Scale(), crop, v2.RandomHorizontalFlip(flip), v2.RandomVerticalFlip(upside_down)]
    if brightness:
        steps.append(v2.RandomApply([BrightnessContrast(brightness)], 0.25))
    return v2.Compose([*steps, test_transform()])


class Mosaic(Dataset):
    """Items of `data`, some of them mosaics of four images of one group: the item, and three drawn at random.

    The corner where they meet is in the middle half of each side; each quarter is a random crop of its image.

    Args:
        data: a `LandCover`, or a set with its `pair` and `ignore`; its own transform is not used; `transform`
            is applied after the mosaic.
        p: probability of a mosaic.
        groups: the group of each item, usually its climate zone.
    """

    @typed
    def __init__(self, data: Any, p: Share, groups: Sequence[Hashable], transform: Transform | None = None):
        if len(groups) != len(data):
            raise BadParameter("groups", f"{len(groups)} of them", f"{len(data)}, one for each item")
        self.data, self.p, self.transform = data, p, transform
        members: dict[Hashable, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        self.members = [members[group] for group in groups]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.data.pair(index)
        if torch.rand(()) < self.p:
            image, labels = self._mosaic(index, image, labels)
        if self.transform is not None:
            image, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def _mosaic(self, index: int, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape
        y, x = (int(torch.randint(side // 4, side - side // 4 + 1, ())) for side in (height, width))
        own = self.members[index]
        others = [own[int(torch.randint(len(own), ()))] for _ in range(3)]
        image, labels, pairs = image.clone(), labels.clone(), [(image, labels), *map(self.data.pair, others)]
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: self.data.ignore}
        quarters = itertools.product((slice(y), slice(y, None)), (slice(x), slice(x, None)))
        for (picture, truth), (rows, columns) in zip(pairs, quarters, strict=True):
            size = labels[rows, columns].shape
            if 0 in size:  # an image of one or two pixels
                continue
            crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
            image[:, rows, columns], labels[rows, columns] = crop(tv_tensors.Image(picture), tv_tensors.Mask(truth))
        return image, labels
