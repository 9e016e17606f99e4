"""Prediction: test-time augmentation as in the author's code, and images of any size by overlapping tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadParameter, check_choice

SCALES = (0.75, 1.0, 1.25, 1.5)
AUGMENTATIONS = {  # flips left-right, flips upside down, scales; no rotations, despite the name "d4"
    "none": ((False,), (False,), (1.0,)),
    "lr": ((False, True), (False, True), (1.0,)),
    "d4": ((False, True), (False, True), SCALES),  # on Potsdam
    "d4 loveda": ((False, True), (False,), SCALES),
}
Predict = Callable[[Tensor], Tensor]
"""A network: images (b, 3, h, w), normalised, to logits (b, C, h, w)."""
Read = Callable[[int, int, int, int], Tensor]
"""Top, left, height and width to that window of an image, (3, height, width)."""


def views(kind: str) -> list[tuple[bool, bool, float]]:
    """The views of a test-time augmentation, 1, 4, 16 or 8: (flipped left-right, flipped upside down, scale)."""
    check_choice("kind", kind, AUGMENTATIONS)
    return list(itertools.product(*AUGMENTATIONS[kind]))


def augmented(predict: Predict, images: Tensor, kind: str = "lr") -> Tensor:
    """The mean of the logits (B, C, H, W) over the `views` of images (B, 3, H, W).

    Images and logits are scaled bicubically."""
    size, total, every = images.shape[-2:], 0, views(kind)
    for left_right, upside_down, scale in every:
        dims = [dim for dim, flipped in ((-1, left_right), (-2, upside_down)) if flipped]
        x = images.flip(dims)
        if scale != 1:
            x = F.interpolate(x, [int(n * scale) for n in size], mode="bicubic", align_corners=False)
        logits = predict(x)
        if scale != 1:
            logits = F.interpolate(logits, tuple(size), mode="bicubic", align_corners=False)
        total = total + logits.flip(dims)
    return total / len(every)


def _starts(length: int, tile: int, step: int) -> list[int]:
    """First pixels of the tiles along one axis; the last tile ends with the image."""
    return [*range(0, max(length - tile, 0), step), max(length - tile, 0)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights of a tile along one axis: rising over the overlap, 1 inside, falling again."""
    position = torch.arange(1.0, length + 1)
    return torch.minimum(position, position.flip(0)).div(overlap + 1).clamp_max(1)


@torch.no_grad()
def bands(
    predict: Predict, read: Read, size: tuple[int, int], *, tile: int = 512, overlap: int = 128, batch: int = 4
) -> Iterator[tuple[int, Tensor]]:
    """Logits of an image of any size from overlapping, blended tiles: (top, (C, rows, W)), from top to bottom.

    Only the rows that further tiles overlap are in memory: it grows with the image's width, not with its height. The
    logits of an image not larger than a tile are those of `predict`.

    Args:
        read: reads a window of the image of `size` (H, W).
        tile: side in pixels.
        overlap: pixels that neighbours share, less than a tile; the last tile of a row or column shares more.
        batch: tiles at once.
    """
    if not 0 <= overlap < tile:
        raise BadParameter("overlap", overlap, f"0 to {tile - 1}, less than a tile")
    height, width = size
    rows, columns = min(tile, height), min(tile, width)
    tops, lefts = _starts(height, tile, tile - overlap), _starts(width, tile, tile - overlap)
    weight = _ramp(rows, overlap)[:, None] * _ramp(columns, overlap)
    total, done, base = torch.empty(0), torch.empty(0), 0  # sums of logits and of weights, from row `base` on
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for i in range(0, len(lefts), batch):
            some = lefts[i : i + batch]
            logits = predict(torch.stack([read(top, left, rows, columns) for left in some]))  # (b, C, rows, columns)
            if not total.numel():
                total = logits.new_zeros(logits.shape[1], rows, width)
                done, weight = logits.new_zeros(rows, width), weight.to(logits)
            for left, one in zip(some, logits, strict=True):
                total[:, :, left : left + columns] += one * weight
                done[:, left : left + columns] += weight
        finished = following - base
        yield base, total[:, :finished] / done[:finished]
        base += finished
        total, done = (F.pad(t[..., finished:, :], (0, 0, 0, finished)) for t in (total, done))


def reader(image: Tensor) -> Read:
    """Reads windows of an image (3, H, W) in memory."""
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def segment(predict: Predict, image: Tensor, **options: int) -> Tensor:
    """The most likely class of each pixel, (H, W) uint8, of an image (3, H, W) of any size; options as `bands`."""
    height, width = image.shape[-2:]
    parts = bands(predict, reader(image), (height, width), **options)
    return torch.cat([logits.argmax(0).to(torch.uint8).cpu() for _, logits in parts])
