"""Maps of land cover for a GIS, predicted by windows: an image of any size in bounded memory.

    label(network, "area.tif", "cover.tif", palette)        its map
    preview("cover.tif")                                    a small PNG, as viewers without palettes show it black
    segment(network, image)                                 of an image in memory

A map is a GeoTIFF with the georeference of its image and a colour for each class. `augmented` is the test-time
augmentation of the author's code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...data.rasters import Raster, pixels, quiet
from ...errors import BadParameter, check_choice
from ...io.files import atomic
from ..layers.windows import starts

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
NODATA = 255  # of a map, where the image has no data
BLOCK = 512  # side of a map's tiles
PREVIEW = 2048  # longest side of a preview in pixels


def augmented(predict: Predict, images: Tensor, kind: str = "lr") -> Tensor:
    """The mean of the logits (B, C, H, W) over the 1, 4, 16 or 8 views of images (B, 3, H, W) of `AUGMENTATIONS`.

    Images and logits are scaled bicubically."""
    check_choice("kind", kind, AUGMENTATIONS)
    size, total, every = images.shape[-2:], 0, list(itertools.product(*AUGMENTATIONS[kind]))
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
    tops, lefts = starts(height, tile, tile - overlap), starts(width, tile, tile - overlap)
    weight = _ramp(rows, overlap)[:, None] * _ramp(columns, overlap)
    total, base = torch.empty(0), 0  # sums of weighted logits and, last, of weights, from row `base` on
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for i in range(0, len(lefts), batch):
            some = lefts[i : i + batch]
            logits = predict(torch.stack([read(top, left, rows, columns) for left in some]))  # (b, C, rows, columns)
            if not total.numel():
                total, weight = logits.new_zeros(logits.shape[1] + 1, rows, width), weight.to(logits)
            for left, one in zip(some, logits, strict=True):
                total[:, :, left : left + columns] += torch.cat([one * weight, weight[None]])
        finished = following - base
        yield base, total[:-1, :finished] / total[-1, :finished]
        base += finished
        total = F.pad(total[:, finished:], (0, 0, 0, finished))


def reader(image: Tensor) -> Read:
    """Reads windows of an image (3, H, W) in memory."""
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def segment(predict: Predict, image: Tensor, **options: int) -> Tensor:
    """The most likely class of each pixel, (H, W) uint8, of an image (3, H, W) of any size; options as `bands`."""
    height, width = image.shape[-2:]
    parts = bands(predict, reader(image), (height, width), **options)
    return torch.cat([_numbers(logits) for _, logits in parts])


def _numbers(logits: Tensor) -> Tensor:
    """The class of each pixel, uint8 on the CPU, of logits (C, h, w)."""
    if len(logits) > NODATA:
        raise BadParameter("classes", len(logits), f"1 to {NODATA}: a map has 8 bits, and {NODATA} is no data")
    return logits.argmax(0).to(torch.uint8).cpu()


def label(
    network: Predict,
    path: str | Path,
    out: str | Path,
    palette: Sequence[Sequence[int]],
    names: Sequence[str] = (),
    **options: int,
) -> Path:
    """Predict the class of each pixel of an image of any size, and write the map as a tiled GeoTIFF with colours.

    The image is read and the map is written by windows: memory grows with the image's width only. The map is written
    under a temporary name and renamed; its no-data value `NODATA` is transparent.

    Args:
        network: images (b, 3, h, w), normalised, to logits (b, C, h, w).
        palette: red, green, blue, 0 to 255, of each class.
        names: of the classes, written as tags CLASS_0, CLASS_1, ...
        options: tile, overlap and batch of `bands`.

    Raises `CorruptFile`: the image cannot be read.
    """
    with Raster(path) as raster, atomic(out) as temporary, quiet() as rasterio:
        height, width = raster.size
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": NODATA, "crs": raster.crs}
        profile |= {"height": height, "width": width, "compress": "deflate", "BIGTIFF": "IF_SAFER"}
        profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
        if not raster.transform.is_identity:
            profile["transform"] = raster.transform
        with rasterio.open(temporary, "w", **profile) as file:
            colours = {i: (*colour, 255) for i, colour in enumerate(palette)}
            file.write_colormap(1, colours | {NODATA: (0, 0, 0, 0)})
            file.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(names)})
            for top, logits in bands(network, lambda *at: pixels(raster.read(*at)), raster.size, **options):
                classes = _numbers(logits).numpy()  # (rows, W)
                classes = np.where(raster.valid(top, 0, *classes.shape), classes, np.uint8(NODATA))
                file.write(classes, 1, window=rasterio.windows.Window(0, top, width, len(classes)))
    return Path(out)


def preview(path: str | Path) -> Path:
    """Write the preview <map>.png of a map: its classes in their colours, at most `PREVIEW` pixels a side.

    Pixels are skipped, not averaged; those without data are transparent. Returns its path."""
    out = Path(path).with_suffix(".png")
    with quiet() as rasterio, rasterio.open(path) as file, atomic(out) as temporary:
        step = max(1, max(file.shape) / PREVIEW)
        shape = tuple(max(1, round(side / step)) for side in file.shape)
        image = Image.fromarray(file.read(1, out_shape=shape))
        colours = file.colormap(1)
        image.putpalette([channel for i in range(256) for channel in colours[i][:3]])
        image.save(temporary, transparency=NODATA)
    return out
