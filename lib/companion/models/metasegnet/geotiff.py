"""Maps of land cover for a GIS, predicted by windows: an image of any size in bounded memory.

    label(network, "area.tif", "cover.tif", palette)        one image
    for path, zone in maps("my_area", checkpoint=FILE):     a folder, each image with the text of its climate zone

A map is a GeoTIFF with the georeference of its image and a colour for each class; `maps` writes a small PNG in these
colours next to it, since viewers without palettes show class numbers as black.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data import landcover
from ...data.rasters import Raster, pixels, quiet
from ...errors import BadParameter
from ...io.files import atomic
from ...training.hardware import Hardware, evaluating
from . import networks
from .climate import PROMPTS, Prompts
from .inference import Predict, augmented, bands

NODATA = 255  # of a map, where the image has no data
BLOCK = 512  # side of a map's tiles
PREVIEW = 2048  # longest side of a preview in pixels


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
                classes = logits.argmax(0).to(torch.uint8).cpu().numpy()  # (rows, W)
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


def maps(
    folder: str | Path,
    out: str | Path = "",
    *,
    checkpoint: str,
    method: str = "MetaSegNet",
    prompts: str = "",
    data_root: str = "data",
    accelerator: str = "auto",
    augmentation: str = "none",
    tile: int = 1024,
    overlap: int = 256,
) -> Iterator[tuple[Path, str | None]]:
    """Segment the images of your own folder (see `landcover.own`, with its `classes.txt`), one after the other.

    Args:
        out: folder of the maps <image>.tif and their previews <image>.png; empty: `<folder>/maps`.
        checkpoint: weights that a training saved; `method`: that of the training.
        prompts: file of the texts; empty for the included one.
        data_root: BERT is in <data_root>/weights.
        augmentation, tile, overlap: see `inference`.

    Yields:
        The path of each map and the climate zone of its text.

    Raises `BadParameter`: a map would overwrite an image or its labels.
    """
    data, texts = landcover.own(folder, landcover.read_classes(folder)), Prompts.read(prompts or PROMPTS)
    targets = [Path(out or Path(folder) / "maps") / f"{picture.image.stem}.tif" for picture in data.pictures]
    inputs = {path.resolve() for picture in data.pictures for path in (picture.image, picture.label) if path}
    written = [file for target in targets for file in (target, target.with_suffix(".png"))]
    if taken := [file for file in written if file.resolve() in inputs]:
        raise BadParameter("out", str(out), f"another folder: a map or its preview would overwrite {taken[0]}")
    model = networks.network(method, texts, len(data.classes), data_root=data_root, checkpoint=checkpoint)
    zones = data.zones()
    prompted = networks.texts(texts, method, zones, own=data.texts())
    with evaluating(Hardware(accelerator), model) as device:
        for i, (picture, target) in enumerate(zip(data.pictures, targets, strict=True)):
            ids = () if prompted is None else (model.ids([prompted[i]]).to(device),)

            def network(x: Tensor, ids: tuple[Tensor, ...] = ids) -> Tensor:
                return augmented(lambda view: model(view, *ids), x.to(device), augmentation)

            tiles = {"tile": tile, "overlap": overlap, "batch": 1}
            label(network, picture.image, target, data.palette, data.classes, **tiles)
            preview(target)
            yield target, zones[i]
