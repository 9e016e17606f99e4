"""Land cover in its real layouts: codes, windows, padding, locations and zones, xBD compiled in, user images."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from companion import data
from companion.data import climate, landcover
from companion.data.landcover import CLASSES, LOVEDA, OEM, POTSDAM, POTSDAM_TILES, TO_LOVEDA, UAVID, XBD
from companion.data.rasters import Raster
from companion.data.xbd import compile_xbd
from companion.errors import BadParameter, CorruptFile, MissingData
from tests.data.conftest import expect, refused
from tests.data.test_rasters import CORNER, UTM, noise, written

NOWHERE = {"crs": None, "transform": rasterio.transform.Affine.identity()}


def labels(top: int, height: int = 70, width: int = 90, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top + 1, (1, height, width), dtype=np.uint8)


def earth(root: Path, regions=("tokyo", "el_rodeo"), count: int = 3, **profile) -> Path:
    """OpenEarthMap with three images per region, one in each split; the test's label is held back."""
    top, lists = data.find(OEM).folder(root), {split: [] for split in landcover.SPLITS}
    for region in regions:
        for i, split in zip(range(1, count + 1), lists, strict=False):
            name = f"{region}_{i}.tif"
            written(top / region / "images" / name, noise(seed=i), **(NOWHERE | profile))
            if split != "test":
                written(top / region / "labels" / name, labels(8, seed=i), **(NOWHERE | profile))
            lists[split].append(name)
    for split, names in lists.items():
        (top / f"{split}.txt").write_text("\n".join(names) + "\n")
    return top


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(path)
    return path


def loveda(root: Path, monkeypatch) -> Path:
    top = data.find(LOVEDA).folder(root)
    for split in landcover.SPLITS:
        for i, scene in enumerate(("Rural", "Urban")):
            png(top / split.capitalize() / scene / "images_png" / f"{i}.png", noise(64, 64, i))
            if split != "test":
                png(top / split.capitalize() / scene / "masks_png" / f"{i}.png", labels(7, 64, 64, i)[0])
    expect(monkeypatch, LOVEDA, sizes=dict.fromkeys(landcover.SPLITS, 2))
    return top


def painted(ids: np.ndarray) -> np.ndarray:
    """Potsdam's labels as colours; 6 is black."""
    return np.array([*CLASSES[POTSDAM].values(), (0, 0, 0)], np.uint8)[ids].transpose(2, 0, 1)


def potsdam(root: Path, side: int = 60, geoseg: bool = False, bands: str = "RGB") -> dict[str, np.ndarray]:
    """All 38 tiles, small; returns the labels of each, with a black border in the eroded version."""
    top, truth = data.find(POTSDAM).folder(root), {}
    for split, tiles in POTSDAM_TILES.items():
        images = top / (f"{split}_images" if geoseg else {"RGB": "2_Ortho_RGB", "RGBIR": "4_Ortho_RGBIR"}[bands])
        for i, tile in enumerate(tiles):
            image = noise(side, side, i)
            image = np.concatenate([image, image[:1]]) if bands == "RGBIR" else image
            written(images / f"top_potsdam_{tile}_{bands}.tif", image, photometric="MINISBLACK")
            ids = np.random.default_rng(i).integers(0, 6, (side, side))
            eroded = ids.copy()
            eroded[::7] = 6
            truth[tile], truth[f"{tile} eroded"] = ids, eroded
            folders = ("train_masks", "test_masks_eroded") if geoseg else ("5_Labels_all", "5_Labels_all_noBoundary")
            for folder, found, ending in zip(folders, (ids, eroded), ("label", "label_noBoundary"), strict=True):
                if not geoseg or folder.startswith(split):
                    written(top / folder / f"top_potsdam_{tile}_{ending}.tif", painted(found))
    return truth


def test_openearthmap(tmp_path):
    earth(tmp_path)
    train, test = landcover.load(OEM, tmp_path, "train"), landcover.load(OEM, tmp_path, "test")
    image, found = train[0]
    raw = labels(8)[0]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(noise(seed=1)))
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), np.where(raw == 0, 8, raw.astype(int) - 1))
    assert [p.region for p in train.pictures] == ["tokyo", "el_rodeo"]  # the number follows the last underscore
    assert (test[0][1] == 8).all() and train.ignore == 8  # held back: nothing to learn or to score


def test_zones_of_a_table_count_before_the_georeference_and_that_before_the_regions(tmp_path):
    top = earth(tmp_path, ("tokyo", "here_now", "far"), crs=UTM, transform=CORNER)
    assert landcover.load(OEM, tmp_path, "train").zones() == ["Cfb"] * 3  # in the Potsdam of the georeference
    (top / "places.csv").write_text("region,latitude,longitude,zone\ntokyo,,,Aw\nhere_now,35.7,139.7,\n")
    assert landcover.load(OEM, tmp_path, "train").zones() == ["Aw", "Cfb", "Cfb"]


def test_the_table_of_97_regions():
    places = climate.read_places()
    assert len(places) == 97 and set(XBD) <= set(places)
    zones = {name: climate.zone(p.latitude, p.longitude, landcover.COAST) for name, p in places.items()}
    assert {name for name, zone in zones.items() if zone is None} == {"lohur", "rosario", "santiago", "western"}
    known = {"adelaide": "Csb", "palu": "Af", "mexico_city": "Cwb", "gorakhpur": "Cwa", "tokyo": "Cfa", "paris": "Cfb"}
    assert {name: zones[name] for name in known} == known


def test_loveda(tmp_path, monkeypatch):
    loveda(tmp_path, monkeypatch)
    train = landcover.load(LOVEDA, tmp_path, "train")
    raw = labels(7, 64, 64, 0)[0]
    assert np.array_equal(train[0][1].numpy(), np.where(raw == 0, 7, raw.astype(int) - 1))
    assert [p.region for p in train.pictures] == ["rural", "urban"] and train.zones() == ["Cfa", "Cfa"]
    assert set(TO_LOVEDA) == set(CLASSES[OEM]) and set(TO_LOVEDA.values()) == set(CLASSES[LOVEDA])


@pytest.mark.parametrize(("geoseg", "bands"), [(False, "RGB"), (False, "RGBIR"), (True, "RGB")])
def test_potsdam(tmp_path, geoseg, bands):
    """Mirrored windows and the padding's label: see tests/recipes."""
    truth = potsdam(tmp_path, geoseg=geoseg, bands=bands)
    for split, count, ids in (("train", 24, truth["2_11"]), ("test", 14, truth["2_14 eroded"])):
        found = landcover.load(POTSDAM, tmp_path, split, size=40)
        image, first = found[4]  # the second tile's first window: 20 x 20 of it, the rest is padding
        assert len(found) == count * 4 and set(found.zones()) == {"Cfb"}
        assert np.array_equal(first[20:, 20:].numpy(), ids[:20, :20]) and (first[:20] == 6).all()
        assert torch.equal(image[:, 20:, 20:], torch.from_numpy(noise(60, 60, 1)[:, :20, :20]))
    assert data.status(POTSDAM, tmp_path).ready == {"train": "24, 6 classes", "test": "14, 6 classes"}
    if not geoseg:
        full = landcover.load(POTSDAM, tmp_path, "test", size=60, labels="full")
        assert np.array_equal(full[1][1].numpy(), truth["2_14"])


def uavid(root: Path, monkeypatch) -> Path:
    """UAVid with one sequence of one small frame in each split, and three in training."""
    top = data.find(UAVID).folder(root)
    sequences = {"train": ("seq1", "seq10", "seq2"), "val": ("seq16",), "test": ("seq21",)}
    palette = np.array([*CLASSES[UAVID].values()], np.uint8)
    for split, names in sequences.items():
        for i, name in enumerate(names):
            png(top / f"uavid_{split}" / name / "Images" / "000000.png", noise(60, 80, i))
            if split != "test":
                ids = labels(7, 60, 80, i)[0]
                png(top / f"uavid_{split}" / name / "Labels" / "000000.png", palette[ids].transpose(2, 0, 1))
    expect(monkeypatch, UAVID, sizes={split: len(names) for split, names in sequences.items()})
    return top


def test_uavid(tmp_path, monkeypatch):
    uavid(tmp_path, monkeypatch)
    train = landcover.load(UAVID, tmp_path, "train", size=50)
    assert len(train) == 3 * 4 and train.zones() == [None] * 12
    assert [picture.region for picture in train.pictures] == ["seq1", "seq2", "seq10"]
    image, found = train[0]
    assert np.array_equal(found.numpy(), labels(7, 60, 80, 0)[0, :50, :50])  # black is clutter, not ignored
    assert torch.equal(image, torch.from_numpy(noise(60, 80, 0)[:, :50, :50]))
    assert (train[1][1][:, 30:] == 8).all() and (landcover.load(UAVID, tmp_path, "test", size=50)[0][1] == 8).all()


def test_values_on_disk_and_the_labels_they_mean(tmp_path, monkeypatch):
    uavid(tmp_path, monkeypatch)
    monkeypatch.setattr(landcover, "TILE", 32)  # by windows
    found = landcover.label_values(landcover.load(UAVID, tmp_path, "train"))
    assert {colour: label for colour, label in found} == {c: i for i, c in enumerate(CLASSES[UAVID].values())}
    assert sum(found.values()) == 3 * 60 * 80


def test_missing_xbd_is_named_and_compiled(tmp_path):
    top = earth(tmp_path, ("tokyo", "el_rodeo"), crs=UTM, transform=CORNER)
    names = [f"el_rodeo_{i}" for i in (1, 2, 3)]
    for name in names:
        (top / "el_rodeo" / "images" / f"{name}.tif").unlink()
    refused(MissingData, "el_rodeo", landcover.load, OEM, tmp_path, "train")
    rest = landcover.load(OEM, tmp_path, "train", without_xbd=True)
    assert rest.absent == ["el_rodeo"] and [p.region for p in rest.pictures] == ["tokyo"]
    (top / "xbd_files.csv").write_text("".join(f"{name}_pre_disaster.png,{name}.tif\n" for name in names))
    for i, name in enumerate(names):
        if i == 2:
            refused(MissingData, "1 of 3 .*el_rodeo_3", compile_xbd, tmp_path, tmp_path / "xbd")
        png(tmp_path / "xbd" / "tier1" / f"{name}_pre_disaster.png", noise(seed=i))
    assert compile_xbd(tmp_path, tmp_path / "xbd") == 1  # those that were there went in before
    train, rest = (landcover.load(OEM, tmp_path, "train", without_xbd=without) for without in (False, True))
    assert rest.absent == ["el_rodeo"] and [p.region for p in rest.pictures] == ["tokyo"]
    assert len(train) == 2 and torch.equal(train[1][0], torch.from_numpy(noise(seed=0)))
    with Raster(train.pictures[1].image) as raster:
        assert raster.transform == CORNER and raster.place is not None  # the label's


def test_own_images(tmp_path):
    """Other labels, tables and classes: see tests/test_odd_files.py."""
    image = noise()
    image[:, :, :30] = 0
    written(tmp_path / "images" / "a b.tif", image, nodata=0)
    written(tmp_path / "labels" / "a b.tif", labels(3))
    png(tmp_path / "images" / "c.png", noise(seed=2))
    (tmp_path / "places.csv").write_text('image,latitude,longitude,text\nc,-3.1,-60.0,"a clearing, red earth"\n')
    found = landcover.own(tmp_path, {"field": (1, 2, 3), "wood": (4, 5, 6)}, size=50)["train"]
    assert found.zones() == ["Cfb"] * 4 + ["Af"] * 4 and found.palette == [(1, 2, 3), (4, 5, 6)]
    assert found.texts()[3:5] == [None, "a clearing, red earth"]
    assert [tuple(found[i][1].shape) for i in range(4)] == [(50, 50), (50, 40), (20, 50), (20, 40)]  # not padded
    ids = np.minimum(labels(3)[0], 2)  # 2 and 3 are no class: ignored, as are pixels without data
    ids[:, :30] = 2
    assert np.array_equal(landcover.own(tmp_path, ["field", "wood"])["all"][0][1].numpy(), ids)
    (tmp_path / "val.txt").write_text("c.png\n")
    assert [p.region for p in landcover.own(tmp_path, ["field", "wood"])["val"].pictures] == ["c"]
    png(tmp_path / "images" / "a b.png", noise())  # a preview of the same image: one map would replace the other
    refused(CorruptFile, "a b", landcover.own, tmp_path, ["field", "wood"])


def test_masks_of_0_and_255(tmp_path):
    """255 is ignored, where a mask of one class against the rest usually means that class."""
    for name, codes in (("a", (0, 255)), ("b", (0,)), ("c", (255,))):
        png(tmp_path / "images" / f"{name}.png", noise())
        png(tmp_path / "labels" / f"{name}.png", np.resize(codes, (70, 90)).astype(np.uint8))
    with pytest.warns(UserWarning, match="labels/a.png.*'wood'.*1"):
        landcover.own(tmp_path, ["field", "wood"])
    png(tmp_path / "labels" / "b.png", np.ones((70, 90), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(landcover.own(tmp_path, ["field", "wood"])["all"]) == 3


def test_opening_decodes_no_whole_mask(tmp_path):
    """Of a mask of 400 MB, of which no pixel is stored."""
    shape = {"width": 20_000, "height": 20_000, "dtype": "uint8", "crs": UTM, "transform": CORNER}
    for folder, bands in (("images", 3), ("labels", 1)):
        (tmp_path / folder).mkdir()
        rasterio.open(tmp_path / folder / "a.tif", "w", count=bands, tiled=True, SPARSE_OK=True, **shape).close()
    tracemalloc.start()
    assert len(landcover.own(tmp_path, ["field", "wood"], size=1024)["train"]) == 20 * 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_part_of_a_set(tmp_path):
    earth(tmp_path, ("tokyo", "el_rodeo", "kyoto"))
    whole = landcover.load(OEM, tmp_path, "train", size=50)
    part = whole.where([zone != "Cfa" for zone in whole.zones()])
    assert part.zones() == ["Aw"] * 4 and len(whole) == 12
    assert torch.equal(part[0][0], whole[4][0]) and part.picture(0).region == "el_rodeo"
    refused(BadParameter, "keep", whole.where, [False] * len(whole))
    for options in ({"labels": "eroded"}, {"mirrored": True}):
        refused(BadParameter, next(iter(options)), landcover.load, OEM, tmp_path, "train", **options)
