"""Georeferenced images, read by windows.

    with Raster("area.tif") as area:
        area.size, area.place                    (H, W); latitude and longitude of its centre, or None
        area.read(0, 0, 512, 512)                uint8 (3, 512, 512), only this window is decoded

Formats are those of GDAL: GeoTIFF, and PNG or JPEG with a world file (.pgw, .jgw) and a .prj file for the coordinate
system, which a world file does not contain. rasterio includes GDAL: `pip install -e ".[landcover]"`. PNG and JPEG are
decoded whole, by Pillow, since GDAL returns noise for the missing part of a truncated PNG.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptFile, extra
from . import decoding

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in GeoSeg
CACHE_MB = 256  # of GDAL's decoded blocks; its default is a fraction of the machine's memory


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """rasterio, with a bounded cache, no sidecar files and no warnings about images without a georeference."""
    with extra("landcover"):
        import rasterio
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_PAM_ENABLED="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield rasterio


class Raster:
    """An image on disk.

    Attributes:
        path, size: (H, W) in pixels.
        crs: its coordinate system (`rasterio.crs.CRS`), None when it is unknown.
        transform: from (column, row) to coordinates (`affine.Affine`); the identity without a georeference.

    Raises:
        CorruptFile: it is missing, or not an image that GDAL reads.
        CompanionError: rasterio is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with quiet() as rasterio:
            try:
                self._file = rasterio.open(self.path)
            except rasterio.errors.RasterioError as error:
                raise CorruptFile(path, f"no image that GDAL reads ({error})") from error
            self.size, self.transform, self.crs = self._file.shape, self._file.transform, self._file.crs
            beside = self.path.with_suffix(".prj")
            try:
                if self.crs is None and beside.is_file():
                    self.crs = rasterio.crs.CRS.from_wkt(beside.read_text(encoding="utf-8-sig"))
            except (rasterio.errors.CRSError, UnicodeDecodeError) as error:
                raise CorruptFile(beside, f"no coordinate system ({error})") from error
        self._whole: np.ndarray | None = None  # a decoded PNG or JPEG, (H, W) or (H, W, bands)

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
        from rasterio.transform import xy
        from rasterio.warp import transform

        x, y = xy(self.transform, self.size[0] / 2, self.size[1] / 2, offset="ul")
        (longitude,), (latitude,) = transform(self.crs, "EPSG:4326", [x], [y])
        return (latitude, longitude) if math.isfinite(latitude) and math.isfinite(longitude) else None

    def raw(
        self, bands: Sequence[int], top: int = 0, left: int = 0, rows: int | None = None, columns: int | None = None
    ) -> np.ndarray:
        """A window of some bands, counted from 1, uint8 (bands, rows, columns); by default the whole image.

        A single band, of class numbers, may have another integer type.

        Raises `CorruptFile`: fewer bands, another type than uint8, class numbers outside 0 to 255, or a window that
        cannot be decoded."""
        if self._file.count < max(bands):
            way = " (grey: gdal_translate -b 1 -b 1 -b 1; a palette: -expand rgb)" if max(bands) == 3 else ""
            raise CorruptFile(self.path, f"it has {self._file.count} band(s), {max(bands)} are needed{way}")
        kind = np.dtype(self._file.dtypes[bands[0] - 1])
        if kind != np.uint8 and (max(bands) > 1 or kind.kind not in "iu"):
            way = " (gdal_translate -ot Byte -scale)" if max(bands) > 1 else ""
            raise CorruptFile(self.path, f"its pixels are {kind}; uint8 is needed{way}")
        rows, columns = rows or self.size[0] - top, columns or self.size[1] - left
        if self._file.driver != "GTiff":
            part = np.atleast_3d(self._decoded())[top : top + rows, left : left + columns]
            found = np.stack([part[..., band - 1] for band in bands])
        else:
            with quiet() as rasterio:
                try:
                    found = self._file.read(list(bands), window=((top, top + rows), (left, left + columns)))
                except rasterio.errors.RasterioError as error:
                    raise CorruptFile(self.path, f"rows {top} to {top + rows} cannot be decoded ({error})") from error
        if kind != np.uint8 and not 0 <= found.min() <= found.max() <= 255:
            raise CorruptFile(self.path, f"its values are {found.min()} to {found.max()}; 0 to 255 are needed")
        return found.astype(np.uint8, copy=False)

    def _decoded(self) -> np.ndarray:
        if self._whole is None:
            with decoding.opened(self.path) as image:
                # GDAL converts CMYK to RGB, too
                mode = "RGB" if image.mode == "CMYK" else image.mode
                stored = image.tile[0][3] if image.format == "PNG" else mode  # type: ignore[attr-defined]
                self._whole = decoding.pixels(image, mode) if mode in ("RGB", "L") else np.asarray(image)
                if factor := {"L;2": 85, "L;4": 17}.get(stored):  # by which PIL scales the codes
                    self._whole = self._whole // factor
        return self._whole

    def read(self, *window: int) -> np.ndarray:
        """Red, green and blue, uint8 (3, rows, columns), of a window (top, left, rows, columns) inside the image, or of
        the whole image; further bands (infrared) are not read. Raises as `raw`."""
        return self.raw((1, 2, 3), *window)

    def valid(self, top: int, left: int, rows: int, columns: int) -> np.ndarray:
        """True where a window has data, (rows, columns), by the file's no-data value, mask or transparency.

        A fourth band is transparency if the file declares it so, otherwise infrared."""
        with quiet() as rasterio:
            if all(rasterio.enums.MaskFlags.all_valid in flags for flags in self._file.mask_flag_enums):
                return np.ones((rows, columns), bool)
            return self._file.dataset_mask(window=((top, top + rows), (left, left + columns))) > 0


def pixels(raw: np.ndarray) -> Tensor:
    """Network input, float32, normalised with `MEAN` and `STD`, of pixels uint8 (..., 3, H, W)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(raw).float() / 255 - mean) / std
