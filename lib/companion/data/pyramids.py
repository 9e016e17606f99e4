"""Slides as image pyramids: read in rectangles, written as tiled TIFF.

    with Slide("slide.tiff") as slide:
        slide.read(0, 0, 1, 512, 512)                    # uint8 (512, 512, 3) of level 1

Slides are read by openslide, or by tiffslide where openslide is not installed or refuses a file; both come with the
extra `slides`. Memory holds what is read, for slides of any size.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from ..errors import BadParameter, CorruptFile, Count, Positive, Range, Whole, check_range, extra, typed
from ..io.files import atomic

BACKENDS = {"openslide": "OpenSlide", "tiffslide": "TiffSlide"}  # the class of each library that opens a slide
LARGEST_THUMBNAIL = 64_000_000  # pixels; a level with more is reduced band by band
LARGEST_MPP = 50  # microns per pixel of level 0


class Slide:
    """A slide's pyramid, read in rectangles. Pixels outside the slide, or not scanned, are white.

    Args:
        path: a file of any format that openslide or tiffslide reads.
        mpp: microns per pixel of level 0; overrides the file's value or supplies a missing one.

    Attributes:
        backend: the first of `BACKENDS` that is installed and opens the file.

    Raises `CorruptFile`: missing, truncated, of an unsupported format, or neither library is installed.
    """

    @typed
    def __init__(self, path: str | Path, mpp: Positive | None = None):
        self.path, self._mpp, reasons = Path(path), mpp, []
        for self.backend in BACKENDS:
            try:
                with extra("slides"):
                    library = importlib.import_module(self.backend)
                self._slide = getattr(library, BACKENDS[self.backend])(self.path)
                break
            except Exception as error:  # each library has its own errors, and damaged files raise others
                reasons.append(f"{self.backend}: {error}")
        else:
            raise CorruptFile(self.path, "; ".join(reasons))
        self.size: tuple[int, int] = tuple(self._slide.dimensions)
        self.levels: list[tuple[int, int]] = [tuple(size) for size in self._slide.level_dimensions]
        ratio = self.size[0] / self.size[1]
        # infinite for another image of the file, such as its label: never the nearest
        self.downsamples: list[float] = [
            float(d) if abs(wide / high / ratio - 1) < 0.05 + 1 / min(wide, high) else math.inf
            for d, (wide, high) in zip(self._slide.level_downsamples, self.levels, strict=True)
        ]

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self._slide.close()

    @property
    def mpp(self) -> float:
        """Microns per pixel of level 0, the mean of both axes.

        Raises `BadParameter`: it is unknown, or that of a screen (72 dots an inch are 353 microns).
        """
        stated = [float(self._slide.properties.get(f"{self.backend}.mpp-{axis}") or 0) for axis in "xy"]
        values = [value for value in stated if value > 0] if self._mpp is None else [self._mpp]
        if not values or not sum(values) / len(values) < LARGEST_MPP:
            how = "the option --mpp, or a row in the table of `companion slides --spacing`"
            known = "contains no scanner's" if values else "does not contain"
            accepted = f"the microns per pixel of level 0, which {self.path} {known}, below {LARGEST_MPP}: {how}"
            raise BadParameter("mpp", values[0] if values else None, accepted)
        return sum(values) / len(values)

    @typed
    def level(self, downsample: Positive) -> int:
        """The level whose downsample is nearest to `downsample`. Raises `BadParameter`: none above 0."""
        return int(np.abs(np.array(self.downsamples) - downsample).argmin())

    @typed
    def read(self, x: int, y: int, level: Whole, width: Count, height: Count) -> np.ndarray:
        """A rectangle of a level, its corner (x, y) in pixels of level 0: uint8 (height, width, 3).

        Raises `CorruptFile` when the file is damaged there, `BadParameter`: it has no such level.
        """
        check_range("level", level, 0, len(self.levels) - 1, whole=True)
        canvas = Image.new("RGB", (width, height), "white")
        scale, (wide, high) = self.downsamples[level], self.levels[level]
        left, top = int(x / scale), int(y / scale)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, wide), min(top + height, high)
        if x0 < x1 and y0 < y1:
            corner = (x if left >= 0 else 0, y if top >= 0 else 0)
            try:
                part = self._slide.read_region(corner, level, (x1 - x0, y1 - y0))
                opaque = "A" not in part.getbands() or part.getchannel("A").getextrema()[0] == 255
            except Exception as error:  # as above
                raise CorruptFile(self.path, f"level {level} at ({x}, {y}): {error}") from error
            # what was not scanned is transparent
            canvas.paste(part.convert("RGB") if opaque else part, (x0 - left, y0 - top), None if opaque else part)
        return np.array(canvas)

    @typed
    def thumbnail(self, downsample: Positive) -> tuple[np.ndarray, float]:
        """The level nearest to `downsample`, whole, and its downsample.

        A level of more than `LARGEST_THUMBNAIL` pixels, in a file without smaller ones, is reduced by an integer
        factor, band by band.
        """
        level = self.level(downsample)
        (wide, high), scale = self.levels[level], self.downsamples[level]
        if wide * high <= LARGEST_THUMBNAIL:
            return self.read(0, 0, level, wide, high), scale
        factor = max(int(downsample / scale), int(np.ceil((wide * high / LARGEST_THUMBNAIL) ** 0.5)), 2)
        bands = []
        for top in range(0, high, factor * 16):
            height = min(factor * 16, high - top)
            bands.append(reduce(self.read(0, int(top * scale), level, wide, height), factor))
        return np.concatenate(bands), scale * factor


@typed
def reduce(pixels: np.ndarray, factor: Count) -> np.ndarray:
    """The mean of each square of factor x factor pixels of (h, w, 3), uint8; at an edge, of the existing pixels."""
    return np.asarray(Image.fromarray(pixels).reduce(factor))


@typed
def write_pyramid(
    path: str | Path,
    image: np.ndarray,
    mpp: Positive | None,
    downsamples: Sequence[Count] = (1, 4, 16),
    tile: Annotated[int, Range(16)] = 256,
) -> Path:
    """Write an image uint8 (h, w, 3) as a tiled pyramidal TIFF that openslide and tiffslide open.

    Args:
        mpp: microns per pixel of the image, which is level 0; None writes none.
        downsamples: of the levels, 1 first, each a multiple of the previous one.
        tile: side of the file's tiles.
    """
    import tifffile

    image = np.asarray(image)
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise BadParameter("image", f"{image.shape} of {image.dtype}", "an array uint8 (h, w, 3)")
    if [*downsamples][:1] != [1] or any(b % a for a, b in itertools.pairwise(downsamples)):
        raise BadParameter("downsamples", downsamples, "1, then multiples of the one before")

    with atomic(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=image.nbytes > 2**31) as writer:
        for above, downsample in itertools.pairwise((1, *downsamples)):
            image = reduce(image, downsample // above)
            resolution: dict[str, Any] = (
                {"resolution": (1e4 / mpp / downsample,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
            )
            writer.write(
                image,
                tile=(tile, tile),
                photometric="rgb",
                compression="deflate",
                metadata=None,
                subfiletype=int(downsample > 1),  # without it openslide finds one level only
                **resolution,
            )
    return Path(path)
