"""Maps of land cover for a GIS, predicted by windows: an image of any size in bounded memory.

    label(network, "area.tif", "cover.tif", palette)        one image
    for path, zone in maps("my_area", checkpoint=FILE):     a folder, each image with the text of its climate zone

A map is a GeoTIFF with the georeference of its image and a colour for each class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...data import landcover
from ...data.rasters import Raster, pixels, quiet
from ...errors import BadParameter
from ...ops.files import atomic
from ...training.fit import AUTO, Hardware, evaluating
from . import networks
from .climate import PROMPTS, Prompts
from .inference import Predict, augmented, bands
from .model import MetaSegNet

NODATA = 255  # of a map, where the image has no data
BLOCK = 512  # side of a map's tiles


def write_map(
    path: str | Path,
    rows: Iterable[tuple[int, np.ndarray]],
    like: Raster,
    palette: Sequence[Sequence[int]],
    names: Sequence[str] = (),
) -> Path:
    """Write a map of classes as a tiled GeoTIFF with a colour table and the georeference of an image.

    It is written under a temporary name and renamed. Its no-data value `NODATA` is transparent.

    Args:
        rows: (top, classes as uint8 (n, W)), which cover every row.
        palette: red, green, blue, 0 to 255, of each class.
        names: of the classes, written as tags CLASS_0, CLASS_1, ...
    """
    if not 1 <= len(palette) <= NODATA:
        raise BadParameter("palette", f"{len(palette)} colours", f"1 to {NODATA}")
    height, width = like.size
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": "uint8",
        "nodata": NODATA,
        "crs": like.crs,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
    }
    if not like.transform.is_identity:
        profile["transform"] = like.transform
    with atomic(path) as temporary, quiet() as rasterio:
        with rasterio.open(temporary, "w", **profile) as file:
            table: Mapping[int, tuple[int, ...]] = {i: (*colour, 255) for i, colour in enumerate(palette)}
            file.write_colormap(1, {**table, NODATA: (0, 0, 0, 0)})
            file.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(names)})
            done = 0
            for top, classes in rows:
                file.write(classes, 1, window=rasterio.windows.Window(0, top, width, len(classes)))
                done += len(classes)
        if done != height:
            raise BadParameter("rows", f"{done} of them", f"all {height} of {like.path}")
    return Path(path)


def label(
    network: Predict,
    path: str | Path,
    out: str | Path,
    palette: Sequence[Sequence[int]],
    names: Sequence[str] = (),
    crs: object = None,
    **options: int,
) -> Path:
    """Predict the class of each pixel of an image of any size, and write the map with `write_map`.

    The image is read and the map is written by windows: memory grows with the image's width only.

    Args:
        network: images (b, 3, h, w), normalised, to logits (b, C, h, w).
        crs: see `Raster`.
        options: tile, overlap and batch of `bands`.

    Raises `CorruptFile`: the image cannot be read.
    """
    with Raster(path, crs) as raster:

        def rows() -> Iterator[tuple[int, np.ndarray]]:
            for band in bands(network, lambda *window: pixels(raster.read(*window)), raster.size, **options):
                classes = band.logits.argmax(0).to(torch.uint8).cpu().numpy()
                there = raster.valid(band.top, 0, *classes.shape)
                yield band.top, np.where(there, classes, np.uint8(NODATA))

        return write_map(out, rows(), raster, palette, names)


def predict(
    model: MetaSegNet,
    data: landcover.LandCover,
    texts: Sequence[str] | None,
    out: str | Path,
    *,
    augmentation: str = "none",
    hardware: Hardware = AUTO,
    tile: int = 1024,
    overlap: int = 256,
) -> Iterator[Path]:
    """Maps of all images of a set, one after the other, as `<out>/<image>.tif`.

    Args:
        data: whole images, not windows.
        texts: one for each image.

    Raises `BadParameter`: windows, or a map would overwrite an image or its labels.
    """
    if data.windows is not None:
        raise BadParameter("data", f"windows of {data.size} pixels", "whole images (size = None)")
    targets = _targets(data, out)
    with evaluating(hardware, model) as device:
        for i, (picture, target) in enumerate(zip(data.pictures, targets, strict=True)):
            ids = () if texts is None else (model.ids([texts[i]]).to(device),)

            def network(x: Tensor, ids: tuple[Tensor, ...] = ids) -> Tensor:
                return augmented(lambda view: model(view, *ids), x.to(device), augmentation)

            options = {"tile": tile, "overlap": overlap, "batch": 1}
            yield label(network, picture.image, target, data.palette, data.classes, **options)


def _targets(data: landcover.LandCover, out: str | Path) -> list[Path]:
    """The file of each image's map."""
    targets = [Path(out) / f"{picture.image.stem}.tif" for picture in data.pictures]
    own = {path.resolve() for picture in data.pictures for path in (picture.image, picture.label) if path}
    if taken := [target for target in targets if target.resolve() in own]:
        raise BadParameter("out", str(out), f"another folder: a map would overwrite {taken[0]}")
    return targets


def maps(
    folder: str | Path,
    out: str | Path = "",
    *,
    checkpoint: str,
    method: str = "MetaSegNet",
    text_encoder: str = "bert",
    prompts: str = "",
    data_root: str = "data",
    accelerator: str = "auto",
    **options,
) -> Iterator[tuple[Path, str | None]]:
    """Segment the images of your own folder (see `landcover.own`, with its `classes.txt`), one after the other.

    Args:
        out: folder of the maps; empty: `<folder>/maps`.
        checkpoint: weights that a training saved; `method`, `text_encoder`: those of that training.
        prompts: file of the texts; empty for the included one.
        data_root: BERT is in <data_root>/weights.
        options: tile, overlap and augmentation of `predict`.

    Yields:
        The path of each map and the climate zone of its text.
    """
    data, texts = landcover.own(folder, landcover.read_classes(folder)), Prompts.read(prompts or PROMPTS)
    out = out or Path(folder) / "maps"
    _targets(data, out)  # checked before the network is built
    model = networks.network(
        method, texts, len(data.classes), text=text_encoder, data_root=data_root, checkpoint=checkpoint
    )
    zones = data.zones()
    given = networks.texts(texts, method, zones, own=data.texts())
    yield from zip(predict(model, data, given, out, hardware=Hardware(accelerator), **options), zones, strict=True)
