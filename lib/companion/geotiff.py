"""Georeferenced images: read by windows, segmented by windows, and written as maps for a GIS.

    with Raster("area.tif") as area:
        area.size, area.place                    (H, W); latitude and longitude of its centre, or None
        area.read(0, 0, 512, 512)                uint8 (3, 512, 512), only this window is decoded
    label(tiles, "area.tif", "cover.tif", palette)
        tiles = functools.partial(metasegnet.bands, network, tile=512); any size in bounded memory

Formats are those of GDAL: GeoTIFF, and PNG or JPEG with a world file (.pgw, .jgw) and a .prj file for the coordinate
system, which a world file does not contain. rasterio includes GDAL: `pip install -e ".[landcover]"`. PNG and JPEG are
decoded whole, by Pillow, since GDAL returns noise for the missing part of a truncated PNG.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import decoding
from .errors import BadParameter, CompanionError, CorruptFile
from .ops.files import atomic

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in GeoSeg
NODATA = 255  # of a written map, where the image has no data
BLOCK = 512  # side of a written map's tiles
CACHE_MB = 256  # of GDAL's decoded blocks; its default is a fraction of the machine's memory


def _rasterio():
    try:
        import rasterio
    except ImportError as error:
        raise CompanionError("GeoTIFFs need rasterio, which is not installed: pip install -e '.[landcover]'") from error
    return rasterio


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """GDAL with a bounded cache, without sidecar files and without warnings about images without a georeference."""
    rasterio = _rasterio()
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_PAM_ENABLED="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


class Raster:
    """An image on disk.

    Attributes:
        path, size: (H, W) in pixels.
        crs: its coordinate system (`rasterio.crs.CRS`), None when it is unknown.
        transform: from (column, row) to coordinates (`affine.Affine`); the identity without a georeference.

    Args:
        crs: for a file without one, such as a PNG with a world file: any value accepted by rasterio ("EPSG:32633").

    Raises:
        CorruptFile: it is missing, or not an image that GDAL reads.
        CompanionError: rasterio is not installed.
    """

    def __init__(self, path: str | Path, crs: object = None):
        rasterio, self.path = _rasterio(), Path(path)
        with quiet():
            try:
                self._file = rasterio.open(self.path)
            except rasterio.errors.RasterioError as error:
                raise CorruptFile(path, f"no image that GDAL reads ({error})") from error
            self.size, self.transform = (self._file.height, self._file.width), self._file.transform
            self.crs = self._file.crs or self._sidecar_crs() or (rasterio.crs.CRS.from_user_input(crs) if crs else None)
        self._whole: np.ndarray | None = None  # a decoded PNG or JPEG, (H, W) or (H, W, bands)

    def _sidecar_crs(self):
        """The coordinate system in a .prj file with the image's name."""
        rasterio, path = _rasterio(), self.path.with_suffix(".prj")
        if not path.is_file():
            return None
        try:
            return rasterio.crs.CRS.from_wkt(path.read_text(encoding="utf-8-sig"))
        except (rasterio.errors.CRSError, UnicodeDecodeError) as error:
            raise CorruptFile(path, f"no coordinate system ({error})") from error

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def bands(self) -> int:
        """Number of bands."""
        return self._file.count

    @property
    def place(self) -> tuple[float, float] | None:
        """Latitude and longitude of the centre in degrees; None without a georeference."""
        if self.crs is None or self.transform.is_identity:
            return None
        rasterio = _rasterio()
        from rasterio.warp import transform

        height, width = self.size
        x, y = rasterio.transform.xy(self.transform, height / 2, width / 2, offset="ul")
        (longitude,), (latitude,) = transform(self.crs, "EPSG:4326", [x], [y])
        return (latitude, longitude) if math.isfinite(latitude) and math.isfinite(longitude) else None

    def raw(
        self, bands: Sequence[int], top: int = 0, left: int = 0, rows: int | None = None, columns: int | None = None
    ) -> np.ndarray:
        """A window of some bands, counted from 1, uint8 (bands, rows, columns); by default the whole image.

        Raises `CorruptFile`: fewer bands, another type than uint8, or a window that cannot be decoded."""
        rasterio = _rasterio()
        if self._file.count < max(bands):
            way = " (grey: gdal_translate -b 1 -b 1 -b 1; a palette: -expand rgb)" if max(bands) == 3 else ""
            raise CorruptFile(self.path, f"it has {self._file.count} band(s), {max(bands)} are needed{way}")
        if (kind := self._file.dtypes[bands[0] - 1]) != "uint8":
            raise CorruptFile(self.path, f"its pixels are {kind}; uint8 is needed (gdal_translate -ot Byte -scale)")
        rows, columns = rows or self.size[0] - top, columns or self.size[1] - left
        if self._file.driver != "GTiff":
            part = np.atleast_3d(self._decoded())[top : top + rows, left : left + columns]
            return np.stack([part[..., band - 1] for band in bands])
        with quiet():
            try:
                return self._file.read(list(bands), window=rasterio.windows.Window(left, top, columns, rows))
            except rasterio.errors.RasterioError as error:
                raise CorruptFile(self.path, f"rows {top} to {top + rows} cannot be decoded ({error})") from error

    def _decoded(self) -> np.ndarray:
        if self._whole is None:
            with decoding.opened(self.path) as image:
                # GDAL converts CMYK to RGB, too
                mode = "RGB" if image.mode == "CMYK" else image.mode
                self._whole = decoding.pixels(image, mode) if mode in ("RGB", "L") else np.asarray(image)
        return self._whole

    def read(self, *window: int) -> np.ndarray:
        """Red, green and blue, uint8 (3, rows, columns), of a window (top, left, rows, columns) inside the image, or of
        the whole image; further bands (infrared) are not read. Raises as `raw`."""
        return self.raw((1, 2, 3), *window)

    def valid(self, top: int, left: int, rows: int, columns: int) -> np.ndarray:
        """True where a window has data, (rows, columns), by the file's no-data value, mask or transparency.

        A fourth band is transparency if the file declares it so, otherwise infrared."""
        rasterio = _rasterio()
        if all(rasterio.enums.MaskFlags.all_valid in flags for flags in self._file.mask_flag_enums):
            return np.ones((rows, columns), bool)
        with quiet():
            return self._file.dataset_mask(window=rasterio.windows.Window(left, top, columns, rows)) > 0

    @property
    def colours(self) -> dict[int, tuple[int, ...]]:
        """The colour table of a map, or an empty one."""
        try:
            return self._file.colormap(1)
        except ValueError:
            return {}


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
    rasterio = _rasterio()
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
    with atomic(path) as temporary, quiet():
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


def pixels(raw: np.ndarray) -> Tensor:
    """Network input, float32, normalised with `MEAN` and `STD`, of pixels uint8 (..., 3, H, W)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(raw).float() / 255 - mean) / std


def label(
    tiles: Callable[..., Iterable],
    path: str | Path,
    out: str | Path,
    palette: Sequence[Sequence[int]],
    names: Sequence[str] = (),
    crs: object = None,
) -> Path:
    """Predict the class of each pixel of an image of any size, and write the map with `write_map`.

    The image is read and the map is written by windows: memory grows with the image's width only.

    Args:
        tiles: (source, size) -> bands from top to bottom with `top` and `logits` (C, n, W); `source` is a function
            (top, left, rows, columns) -> normalised float32 (3, rows, columns).
            `functools.partial(metasegnet.bands, network)` is one.
        crs: see `Raster`.

    Raises `CorruptFile`: the image cannot be read.
    """
    with Raster(path, crs) as raster:

        def rows() -> Iterator[tuple[int, np.ndarray]]:
            for part in tiles(lambda *window: pixels(raster.read(*window)), raster.size):
                classes = part.logits.argmax(0).to(torch.uint8).cpu().numpy()
                there = raster.valid(part.top, 0, *classes.shape)
                yield part.top, np.where(there, classes, np.uint8(NODATA))

        return write_map(out, rows(), raster, palette, names)
