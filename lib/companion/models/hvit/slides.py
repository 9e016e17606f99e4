"""Whole slides: image pyramids, tissue detection, regions at given microns per pixel.

    with Slide("slide.tiff") as slide:
        tiles = tile(slide, PANDA)                       # regions with tissue, in the order of their file names
        region = tiles.read(slide, *tiles.coords[0])      # uint8 (2048, 2048, 3)

`data.pyramids` reads slides; OpenCV comes with the extra `slides`. Tiling follows HS2P at f51b276, which H-ViT's
authors use: the same tissue, the same regions. Memory holds a thumbnail and one region, for slides of any size.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from ...data import decoding
from ...data.pyramids import Slide
from ...errors import BadParameter, MissingData, check_choice, extra
from ...io.files import atomic

NORMALISATIONS = {
    "unit": (0.0, 1.0),  # only scaled to [0, 1], as in the authors' extraction of PANDA
    "half": (0.5, 0.5),  # HIPT's
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
MASKS = (".png", ".tif", ".tiff")  # endings of tissue masks
PREVIEW = 1600  # longest side of a preview, in pixels


# --- tissue and tiles -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Settings of the tiling. The defaults are HS2P's; `PANDA` has the authors' for that set.

    Attributes:
        region: side of a region in pixels at `mpp`.
        mpp: requested microns per pixel. The nearest level is read unchanged (0.45 remains 0.45), or resampled to `mpp`
            with `resample`.
        tolerance: maximum relative difference of the nearest level from `mpp` without resampling.
        downsample: tissue is detected in the level nearest to it; in PANDA's files that is 16, their last.
        saturation, otsu: threshold on the saturation (0 to 255), or Otsu's threshold instead.
        median, close: sizes in pixels of the median blur before it and of the closing after it.
        area, hole_area: least area of tissue, and of a hole, in patches of 256 px at the level that is read.
        drop_holes: exclude holes from the tissue, at most `holes` per contour. The released code intends this but draws
            them at the coordinates of another level.
        least: minimum share of tissue in a region.
        padding: keep regions that extend beyond the slide.
        jpeg: compress each region as JPEG before it is encoded: HS2P writes regions to disk at PIL's default quality
            (its `source/utils.py`, line 193), and H-ViT's authors encode those files.
    """

    region: int = 2048
    mpp: float = 0.5
    resample: bool = False
    tolerance: float = 0.25
    downsample: float = 64
    saturation: int = 8
    otsu: bool = False
    median: int = 7
    close: int = 4
    area: float = 16
    hole_area: float = 4
    holes: int = 8
    drop_holes: bool = False
    least: float = 0.1
    padding: bool = True
    jpeg: bool = False

    def __post_init__(self) -> None:
        fits = {"region": self.region > 0, "mpp": 0 < self.mpp < math.inf, "downsample": self.downsample > 0}
        fits |= {"median": self.median % 2 == 1 <= self.median, "close": self.close >= 0}
        for name in [name for name, good in fits.items() if not good]:
            raise BadParameter(name, getattr(self, name), "more than 0; `median` odd, `close` 0 or more")


PANDA = Tiling(otsu=True, close=10, area=4, hole_area=2, jpeg=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """The regions of a slide with tissue, in the order of their file names x_y, which all arrays share.

    Attributes:
        coords: (M, 2) int64, x and y of the upper left corners in pixels of level 0.
        shares: (M,) share of tissue, to 3 decimals.
        contours: (M,) the piece of tissue of each region.
        step: side of a region in pixels of level 0.
        level, pixels: the level that is read, and the side in its pixels.
        region: the side after resampling.
        jpeg: as in `Tiling`.
    """

    coords: np.ndarray
    shares: np.ndarray
    contours: np.ndarray
    step: int
    level: int
    pixels: int
    region: int
    jpeg: bool = False

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, slide: Slide, x: int, y: int) -> np.ndarray:
        """The region with its corner at (x, y): uint8 (region, region, 3)."""
        pixels = slide.read(int(x), int(y), self.level, self.pixels, self.pixels)
        if self.pixels != self.region:
            size = (self.region, self.region)
            pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        if not self.jpeg:
            return pixels
        compressed = io.BytesIO()
        Image.fromarray(pixels).save(compressed, "JPEG")  # at PIL's default quality
        return np.array(Image.open(compressed))  # a copy: torch warns of arrays that cannot be written


def tissue_mask(rgb: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Tissue mask of a thumbnail uint8 (h, w, 3): uint8 (h, w), 0 or 255."""
    cv2 = _opencv()
    saturation = cv2.medianBlur(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV)[..., 1], tiling.median)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if tiling.otsu else 0)
    _, mask = cv2.threshold(saturation, 0 if tiling.otsu else tiling.saturation, 255, kind)
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((tiling.close, tiling.close), np.uint8))


def read_mask(folder: str | Path, slide: Slide, downsample: float) -> np.ndarray:
    """The tissue mask of a slide from a folder of masks: uint8 (h, w), 0 or 255. Black, 0, is background; every other
    value is tissue.

    Args:
        folder: of `<slide id>.png`, `.tif` or `.tiff`, in the proportions of the slide; a TIFF may be a pyramid.
        downsample: of the level that is read of a pyramid, against the slide.

    Raises:
        MissingData: the slide has no mask.
        CorruptFile: a mask that cannot be read.
    """
    files = [Path(folder) / f"{slide.path.stem}{ending}" for ending in MASKS]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        layout, source = "<slide id>.png    or .tif, .tiff", "your masks"
        raise MissingData("tissue masks of slides", folder, layout, source, "yours", f"{files[0]}, or .tif, .tiff")
    if file.suffix.lower() == ".png":
        with decoding.opened(file) as image:
            pixels = np.array(image.convert("RGB"))
    else:
        with Slide(file) as pyramid:
            pixels, _ = pyramid.thumbnail(downsample * pyramid.size[0] / slide.size[0])
    return np.where(pixels.any(-1), 255, 0).astype(np.uint8)


def axis_factors(size: tuple[int, int], mask: np.ndarray) -> tuple[float, float]:
    """Level-0 pixels per pixel of a mask (h, w) that covers a slide of `size` (width, height): along x, along y."""
    return size[0] / mask.shape[1], size[1] / mask.shape[0]


def find_tiles(
    mask: np.ndarray,
    downsample: float | tuple[float, float],
    size: tuple[int, int],
    step: int,
    tiling: Tiling,
    unit: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regions with tissue, in the order found: coordinates (M, 2), shares and contours (M,).

    Each piece of tissue has its own grid, which starts at the upper left of its bounding box, columns first; two grids
    may overlap. As in HS2P, contours are scaled to level 0 and back with truncation: where a side of the slide is not a
    multiple of the mask's downsample, a piece loses a row or a column of the mask.

    Args:
        mask: uint8 (h, w), see `tissue_mask`.
        downsample: level-0 pixels per pixel of the mask, for both axes or (x, y).
        size: (width, height) of the slide.
        step: side of a region in pixels of level 0.
        unit: side in level-0 pixels of the patch that is the unit of areas.
    """
    cv2 = _opencv()
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = np.empty(0) if hierarchy is None else hierarchy[0, :, 3]  # a contour with a parent is a hole in it
    across, down = (downsample, downsample) if isinstance(downsample, int | float) else downsample
    reference = int(unit**2 / (across * down))
    side = max(int(step / across), 1)
    regions, piece = [], 0
    for i in np.flatnonzero(parents == -1):
        contour, holes = contours[i], [contours[j] for j in np.flatnonzero(parents == i)]
        areas = [cv2.contourArea(hole) for hole in holes]
        if cv2.contourArea(contour) - sum(areas) <= tiling.area * reference:
            continue
        outline = (contour * (across, down)).astype(np.int32)  # at level 0
        inside = np.zeros_like(mask)
        cv2.drawContours(inside, [(outline * (1 / across, 1 / down)).astype(np.int32)], 0, 255, -1)
        if tiling.drop_holes:
            largest = sorted(zip(areas, range(len(holes)), strict=True), reverse=True)[: tiling.holes]
            dropped = [holes[j] for area, j in largest if area > tiling.hole_area * reference]
            cv2.drawContours(inside, dropped, -1, 0, -1)
        tissue = (mask > 0) & (inside > 0)
        left, top, width, height = cv2.boundingRect(outline)
        for x, y in itertools.product(range(left, left + width, step), range(top, top + height, step)):
            if not tiling.padding and (x + step > size[0] or y + step > size[1]):
                continue
            column, row = int(x / across), int(y / across)  # by a single factor, as in HS2P
            share = round(float(tissue[row : row + side, column : column + side].sum() / side**2), 3)
            if share >= tiling.least:
                regions.append((x, y, share, piece))
        piece += 1
    columns = np.array(regions, float).reshape(-1, 4)
    return columns[:, :2].astype(np.int64), columns[:, 2], columns[:, 3].astype(np.int64)


def file_order(coords: np.ndarray) -> np.ndarray:
    """Indices that sort regions by their file names x_y, "1024_512" before "752_5840"; duplicates removed."""
    return np.unique([f"{x}_{y}" for x, y in coords.tolist()], return_index=True)[1]


def tile(slide: Slide, tiling: Tiling, mask: np.ndarray | None = None) -> Tiles:
    """The regions of a slide with tissue; empty when there is none.

    Args:
        mask: tissue mask (h, w) of any size that covers the slide; replaces detection by colour.

    Raises `BadParameter`: the file states no microns per pixel, or has no level near the requested one.
    """
    level = slide.level(tiling.mpp / slide.mpp)
    mpp = slide.mpp * slide.downsamples[level]
    if not tiling.resample and abs(mpp / tiling.mpp - 1) > tiling.tolerance:
        have = ", ".join(f"{slide.mpp * d:.3g}" for d in slide.downsamples if d < math.inf)
        raise BadParameter(
            "mpp", tiling.mpp, f"one near those of {slide.path} ({have}); or --resample (`resample = True`)"
        )
    pixels = round(tiling.region * tiling.mpp / mpp) if tiling.resample else tiling.region
    if mask is None:
        mask = tissue_mask(slide.thumbnail(tiling.downsample)[0], tiling)
    else:
        if mask.ndim != 2 or abs(slide.size[1] / mask.shape[0] / (slide.size[0] / mask.shape[1]) - 1) > 0.05:
            raise BadParameter("mask", mask.shape, f"(h, w) in the proportions of {slide.path}, {slide.size[::-1]}")
        mask = np.where(mask > 0, 255, 0).astype(np.uint8)
    step = int(pixels * slide.downsamples[level])
    unit = 256 * pixels / tiling.region * slide.downsamples[level]
    coords, shares, contours = find_tiles(mask, axis_factors(slide.size, mask), slide.size, step, tiling, unit)
    order = file_order(coords)
    return Tiles(coords[order], shares[order], contours[order], step, level, pixels, tiling.region, tiling.jpeg)


def _opencv():
    with extra("slides"):
        import cv2
    return cv2


def tensor(pixels: np.ndarray, normalise: str = "unit", device: str | torch.device = "cpu") -> Tensor:
    """Regions uint8 (..., R, R, 3) as float32 (..., 3, R, R) on `device`, by one of `NORMALISATIONS`."""
    check_choice("normalise", normalise, NORMALISATIONS)
    mean, std = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1).to(device) for v in NORMALISATIONS[normalise])
    whole = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    return (whole.movedim(-1, -3).float() / 255 - mean) / std


# --- writing ----------------------------------------------------------------------------------------------------------


def write_preview(path: str | Path, slide: Slide, tiles: Tiles, mask: np.ndarray) -> None:
    """Write a thumbnail as PNG: tissue outlined in orange, regions framed in blue, what is in no region faded.

    Args:
        mask: see `tissue_mask`.
    """
    image = Image.fromarray(slide.thumbnail(max(slide.size) / PREVIEW)[0])
    image.thumbnail((PREVIEW, PREVIEW))
    scale, used = image.width / slide.size[0], Image.new("L", image.size, 110)
    frames = [(x, y, x + tiles.step * scale, y + tiles.step * scale) for x, y in (tiles.coords * scale).tolist()]
    for frame in frames:
        ImageDraw.Draw(used).rectangle(frame, fill=255)
    image = Image.composite(image, Image.new("RGB", image.size, "white"), used)
    tissue = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
    image.paste((255, 130, 0), mask=ImageChops.subtract(tissue, tissue.filter(ImageFilter.MinFilter(5))))
    for frame in frames:
        ImageDraw.Draw(image).rectangle(frame, outline=(0, 60, 255), width=2)
    with atomic(path) as temporary:
        image.save(temporary)
