"""OpenEarthMap's images that must be compiled from xBD, which is distributed apart."""

from __future__ import annotations

from pathlib import Path

from ..errors import CorruptFile, extra
from ..io.files import atomic
from . import find, tables
from .rasters import Raster, quiet


def compile_xbd(root: str | Path, xbd: str | Path) -> int:
    """Put xBD's images into OpenEarthMap, as GeoTIFF with the georeference of their labels; returns how many were new.

    `xbd_files.csv` pairs the names; region names may contain underscores, so they end at the last one. (OpenEarthMap's
    script, in the version that we read, takes the part before the FIRST one as the folder, does not find it, and skips
    el_rodeo, mexico_city and similar names without a warning.) Existing files are not overwritten. Each file is written
    under a temporary name, so a killed run can be resumed.

    Args:
        root: the data folder. xbd: a folder below which xBD's `*_pre_disaster.png` are, at any depth.

    Raises:
        MissingData: some of xBD's images are missing; the existing ones have been compiled.
        CorruptFile: the list or an image cannot be read, or an image's size differs from its label's.
    """
    with extra("landcover"):
        import rasterio

    dataset, done, lost = find("landcover/openearthmap"), 0, []
    listing = tables.existing(dataset, root, dataset.folder(root) / "xbd_files.csv")
    there = {path.name: path for path in Path(xbd).rglob("*_pre_disaster.png")}
    pairs = [line.split(",") for line in tables.lines(listing)]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise CorruptFile(listing, f"{wrong[0]} is not a pair of names")
    for theirs, name in pairs:
        region = listing.with_name(name.rpartition("_")[0])
        label, out = region / "labels" / name, region / "images" / name
        if out.is_file():
            continue
        if theirs not in there:
            lost.append(theirs)
            continue
        with Raster(there[theirs]) as source:
            image, (height, width) = source.read(), source.size
        profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": height, "width": width}
        profile |= {"compress": "deflate", "photometric": "RGB"}
        if label.is_file():  # those of the test split are withheld
            with Raster(label) as truth:
                if truth.size != source.size:
                    raise CorruptFile(there[theirs], f"it is {source.size}, its label {truth.size}")
                profile |= {"crs": truth.crs, "transform": truth.transform}
        with atomic(out) as temporary, quiet(), rasterio.open(temporary, "w", **profile) as file:
            file.write(image)
        done += 1
    if lost:
        raise dataset.missing(root, f"{len(lost)} of {len(pairs)} images of xBD are not below {xbd}, such as {lost[0]}")
    return done
