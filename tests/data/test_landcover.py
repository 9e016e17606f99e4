"""Land cover in its real layouts: codes, windows, padding, locations and zones, xBD compiled in, user images."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from companion import climate, data
from companion.data import landcover
from companion.data.landcover_sets import CLASSES, LOVEDA, OEM, POTSDAM, POTSDAM_TILES, TO_LOVEDA, XBD
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.geotiff import Raster
from tests.data.conftest import expect, refused
from tests.test_geotiff import CORNER, UTM, noise, written

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
    top = earth(tmp_path)
    train, test = landcover.load(OEM, tmp_path, "train"), landcover.load(OEM, tmp_path, "test")
    assert train.classes[0] == "bareland" and train.classes[7] == "building" and train.ignore == 8
    image, found = train[0]
    raw = labels(8)[0]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(noise(seed=1)))
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), np.where(raw == 0, 8, raw.astype(int) - 1))
    assert [p.region for p in train.pictures] == ["tokyo", "el_rodeo"]  # the number follows the last underscore
    assert (test[0][1] == 8).all()  # held back: nothing to learn or to score
    assert train.zones() == ["Cfa", "Aw"]
    turned = landcover.load(OEM, tmp_path, "train", transform=lambda image, mask: (image.flip(-1), mask.flip(-1)))[0]
    assert all(torch.equal(a.flip(-1), b) and type(b) is torch.Tensor for a, b in zip(train[0], turned, strict=True))
    assert data.status(OEM, tmp_path) == data.Status("present", "2 train, 2 val, 2 test")
    written(top / "tokyo" / "labels" / "tokyo_1.tif", np.full((1, 70, 90), 9, np.uint8), **NOWHERE)
    refused(CorruptFile, r"tokyo_1\.tif.*code 9", lambda: train[0])
    written(top / "tokyo" / "labels" / "tokyo_1.tif", labels(8, 60, 60), **NOWHERE)
    refused(CorruptFile, r"tokyo_1\.tif.*60", lambda: train[0])
    (top / "tokyo" / "labels" / "tokyo_1.tif").unlink()
    refused(MissingData, r"1 labels of 'train', the first: tokyo_1\.tif", landcover.load, OEM, tmp_path, "train")
    (top / "train.txt").write_text("images/tokyo_1.tif\n")
    refused(CorruptFile, r"train\.txt", landcover.load, OEM, tmp_path, "train")


def test_a_table_with_the_pictures_counts_before_their_georeference_and_that_before_the_table_of_regions(tmp_path):
    top = earth(tmp_path, ("tokyo", "here_now", "far"), crs=UTM, transform=CORNER)
    assert landcover.load(OEM, tmp_path, "train").zones() == ["Cfb"] * 3  # in the Potsdam of the georeference
    (top / "places.csv").write_text("region,latitude,longitude,zone\ntokyo,,,Aw\nhere_now,35.7,139.7,\n")
    assert landcover.load(OEM, tmp_path, "train").zones() == ["Aw", "Cfb", "Cfb"]
    (top / "places.csv").write_text("region,latitude,longitude\ntokyo,139.7,35.7\n")
    refused(CorruptFile, r"tokyo.*latitude", landcover.load, OEM, tmp_path, "train")
    (top / "places.csv").write_text("town\ntokyo\n")
    refused(CorruptFile, "region", landcover.load, OEM, tmp_path, "train")


def test_the_table_of_97_regions():
    places = landcover.read_places()
    assert len(places) == 97 and set(XBD) <= set(places)
    zones = {name: climate.zone(p.latitude, p.longitude, landcover.COAST) for name, p in places.items()}
    assert {name for name, zone in zones.items() if zone is None} == {"lohur", "rosario", "santiago", "western"}
    known = {"adelaide": "Csb", "palu": "Af", "mexico_city": "Cwb", "gorakhpur": "Cwa", "tokyo": "Cfa", "paris": "Cfb"}
    assert {name: zones[name] for name in known} == known
    # three islands are too small for the map; their zone is not known either
    assert {name for name, zone in zones.items() if zone == climate.OCEAN} == {"leilane_estates", "mahe", "tonga"}
    assert len(set(zones.values()) - {None, climate.OCEAN}) == 15


def test_loveda(tmp_path, monkeypatch):
    top = loveda(tmp_path, monkeypatch)
    train = landcover.load(LOVEDA, tmp_path, "train")
    assert train.classes == ["background", "building", "road", "water", "barren", "forest", "agriculture"]
    raw = labels(7, 64, 64, 0)[0]
    assert np.array_equal(train[0][1].numpy(), np.where(raw == 0, 7, raw.astype(int) - 1)) and train.ignore == 7
    assert [p.region for p in train.pictures] == ["rural", "urban"] and train.zones() == ["Cfa", "Cfa"]
    assert (landcover.load(LOVEDA, tmp_path, "test")[1][1] == 7).all()
    assert data.status(LOVEDA, tmp_path).state == "present"
    assert set(TO_LOVEDA) == set(CLASSES[OEM]) and set(TO_LOVEDA.values()) == set(CLASSES[LOVEDA])
    path = top / "Train" / "Rural" / "images_png" / "0.png"
    path.write_bytes(path.read_bytes()[:4000])
    refused(CorruptFile, r"Rural.images_png.0\.png", lambda: train[0])
    path.unlink()
    refused(MissingData, "1 images, 2 are expected", landcover.load, LOVEDA, tmp_path, "train")


def test_loveda_and_torchgeo_give_the_same(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchgeo.datasets", reason="torchgeo, an optional package, is not installed")
    top = loveda(tmp_path, monkeypatch)
    theirs, ours = datasets.LoveDA(str(top), "train"), landcover.load(LOVEDA, tmp_path, "train")
    assert len(theirs) == len(ours)
    for i in range(len(ours)):
        image, found = ours[i]
        assert torch.equal(theirs[i]["image"], image.float())
        raw = theirs[i]["mask"].long()
        assert torch.equal(found, torch.where(raw == 0, 7, raw - 1))  # 0 is no data there, regardless of its names


@pytest.mark.parametrize(("geoseg", "bands"), [(False, "RGB"), (False, "RGBIR"), (True, "RGB")])
def test_potsdam(tmp_path, geoseg, bands):
    truth = potsdam(tmp_path, geoseg=geoseg, bands=bands)
    train, test = (landcover.load(POTSDAM, tmp_path, split, size=40) for split in ("train", "test"))
    assert len(train) == 24 * 4 and len(test) == 14 * 4
    assert train.left_out == (5,) and train.classes[5] == "clutter" and train.ignore == 6
    for found, name, ids in ((train, "2_11", truth["2_11"]), (test, "2_14", truth["2_14 eroded"])):
        image, first = found[4]  # the second tile's first window: 20 x 20 of it, the rest is padding
        assert found.picture(4).image.stem == f"top_potsdam_{name}_{bands}"
        assert np.array_equal(first[20:, 20:].numpy(), ids[:20, :20])
        assert (first[:20] == 6).all() and (first[:, :20] == 6).all()  # ignored; in GeoSeg's tool impervious surface
        assert not image[:, :20].any()
        assert torch.equal(image[:, 20:, 20:], torch.from_numpy(noise(60, 60, 1)[:, :20, :20]))
    mirrored = landcover.load(POTSDAM, tmp_path, "train", size=40, mirrored=True, padding="impervious")
    assert len(mirrored) == 3 * len(train) and mirrored.picture(17) is mirrored.pictures[1]
    for index, flipped in ((16, truth["2_11"][:, ::-1]), (20, truth["2_11"][::-1])):
        labels_ = mirrored[index][1]
        assert np.array_equal(labels_[20:, 20:].numpy(), flipped[:20, :20]) and not labels_[:20].any()
    assert torch.equal(mirrored[19][0], torch.from_numpy(noise(60, 60, 1)[:, 20:, ::-1][:, :, 20:].copy()))
    assert set(train.zones()) == set(test.zones()) == {"Cfb"}
    assert data.status(POTSDAM, tmp_path) == data.Status("present", "24 train, 14 test")
    if not geoseg:
        full = landcover.load(POTSDAM, tmp_path, "test", size=60, labels="full")
        assert np.array_equal(full[1][1].numpy(), truth["2_14"])
    refused(BadParameter, "split", landcover.load, POTSDAM, tmp_path, "val")


def test_potsdam_and_torchgeo_give_the_same(tmp_path):
    datasets = pytest.importorskip("torchgeo.datasets", reason="torchgeo, an optional package, is not installed")
    potsdam(tmp_path, bands="RGBIR")
    top = data.find(POTSDAM).folder(tmp_path)
    for path in (top / "5_Labels_all").iterdir():
        path.rename(top / path.name)  # where torchgeo unpacks them
    theirs = datasets.Potsdam2D(str(top), "train")
    ours = landcover.load(POTSDAM, tmp_path, "train", size=60)
    assert len(theirs) == len(ours) == 24
    order = {Path(row["image"]).name: i for i, row in enumerate(theirs.files)}
    for i in (0, 7, 23):
        image, found = ours[i]
        sample = theirs[order[ours.picture(i).image.name]]
        assert torch.equal(sample["image"][:3], image.float())
        assert torch.equal((sample["mask"] - 1) % 6, found)  # clutter is their first class and our last


def test_potsdam_of_a_strange_colour(tmp_path):
    potsdam(tmp_path)
    top = data.find(POTSDAM).folder(tmp_path)
    ids = np.zeros((60, 60), int)
    shade = np.clip(painted(ids).astype(int) - 3, 0, 255).astype(np.uint8)  # as one of the released tiles has it
    written(top / "5_Labels_all" / "top_potsdam_2_10_label.tif", shade)
    train = landcover.load(POTSDAM, tmp_path, "train", size=60)
    assert (train[0][1] == 0).all()
    shade[1] = 0  # magenta
    written(top / "5_Labels_all" / "top_potsdam_2_10_label.tif", shade)
    refused(CorruptFile, "2_10_label", lambda: train[0])
    (top / "5_Labels_all" / "top_potsdam_2_10_label.tif").unlink()
    refused(MissingData, "2_10_label", landcover.load, POTSDAM, tmp_path, "train")
    assert data.status(POTSDAM, tmp_path).state == "incomplete"


def test_geosegs_patches_are_padded_with_ignore(tmp_path):
    top = data.find(POTSDAM).folder(tmp_path)
    image, ids = noise(64, 64), np.random.default_rng(0).integers(0, 7, (64, 64), dtype=np.uint8)
    image[:, :50], image[:, :, :40], ids[:50], ids[:, :40] = 0, 0, 0, 0  # as its tool pads: black, and class 0
    image[:, 60], ids[60] = 0, 3  # a shadow is no padding
    for split in ("train", "test"):
        written(top / split / "images_1024" / "top_potsdam_2_10_0_5.tif", image, **NOWHERE)
        png(top / split / "masks_1024" / "top_potsdam_2_10_0_5.png", ids)
    train = landcover.load(POTSDAM, tmp_path, "train", size=64)
    found = train[0][1].numpy()
    assert np.array_equal(found[50:, 40:], ids[50:, 40:]) and (found[:50] == 6).all() and (found[:, :40] == 6).all()
    theirs = landcover.load(POTSDAM, tmp_path, "train", size=64, mirrored=True, padding="impervious")
    assert len(theirs) == 1 and np.array_equal(theirs[0][1].numpy(), ids)  # its patches are mirrored already
    refused(BadParameter, "labels", landcover.load, POTSDAM, tmp_path, "train", labels="eroded")
    (top / "train" / "masks_1024" / "top_potsdam_2_10_0_5.png").unlink()
    refused(MissingData, r"2_10_0_5\.png", landcover.load, POTSDAM, tmp_path, "train")


def test_bad_parameters(tmp_path):
    earth(tmp_path)
    for split, options in (
        ("all", {}),
        ("train", {"labels": "eroded"}),
        ("train", {"size": 0}),
        ("train", {"mirrored": True}),
        ("train", {"padding": "black"}),
    ):
        refused(BadParameter, next(iter(options), "split"), landcover.load, OEM, tmp_path, split, **options)


def test_missing_xbd_is_named_and_compiled(tmp_path):
    top = earth(tmp_path, ("tokyo", "el_rodeo", "palu"), crs=UTM, transform=CORNER)
    for region in ("el_rodeo", "palu"):
        for path in (top / region / "images").iterdir():
            path.unlink()
    refused(MissingData, r"el_rodeo, palu \(compile xBD's in", landcover.load, OEM, tmp_path, "train")
    rest = landcover.load(OEM, tmp_path, "train", without_xbd=True)
    assert rest.absent == ["el_rodeo", "palu"] and [p.region for p in rest.pictures] == ["tokyo"]
    refused(MissingData, r"xbd_files\.csv", landcover.compile_xbd, tmp_path, tmp_path / "xbd")
    numbered = [(region, i) for region in ("el_rodeo", "palu") for i in (1, 2, 3)]
    pairs = [(f"{region}_{i:08d}_pre_disaster.png", f"{region}_{i}.tif") for region, i in numbered]
    (top / "xbd_files.csv").write_text("".join(f"{theirs},{name}\n" for theirs, name in pairs))
    for i, (theirs, _) in enumerate(pairs[:5]):
        png(tmp_path / "xbd" / "tier1" / "images" / theirs, noise(seed=i))
    refused(MissingData, r"1 of 6 images of xBD.*palu_00000003", landcover.compile_xbd, tmp_path, tmp_path / "xbd")
    png(tmp_path / "xbd" / "hold" / "images" / pairs[5][0], noise(seed=5))
    assert landcover.compile_xbd(tmp_path, tmp_path / "xbd") == 1  # those that were there went in before
    train = landcover.load(OEM, tmp_path, "train")
    assert len(train) == 3 and torch.equal(train[1][0], torch.from_numpy(noise(seed=0)))
    with Raster(top / "el_rodeo" / "images" / "el_rodeo_1.tif") as raster:
        assert raster.transform == CORNER and raster.place is not None  # the label's
    (top / "el_rodeo" / "images" / "el_rodeo_1.tif").unlink()
    png(tmp_path / "xbd" / "tier1" / "images" / pairs[0][0], noise(30, 30))
    refused(CorruptFile, "30", landcover.compile_xbd, tmp_path, tmp_path / "xbd")
    (top / "xbd_files.csv").write_text("a.png b.tif\n")
    refused(CorruptFile, "pair", landcover.compile_xbd, tmp_path, tmp_path / "xbd")
    assert not [p for p in top.rglob(".*")]


def test_fetching(tmp_path, monkeypatch):
    source = loveda(tmp_path / "elsewhere", monkeypatch)

    def download(url, root, filename, md5, remove_finished):
        assert url.endswith(filename) and len(md5) == 32
        part = filename.removesuffix(".zip")
        if part == "Test" and failures:
            raise failures.pop()
        for path in (source / part).rglob("*.png"):
            target = Path(root) / part / path.relative_to(source / part)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())

    failures = [zipfile.BadZipFile("not a zip"), OSError("no route to host")]
    monkeypatch.setattr(landcover, "download_and_extract_archive", download)
    for said in ("no route", "not a zip"):
        refused(CompanionError, said, data.fetch, LOVEDA, tmp_path / "data")
        folder = data.find(LOVEDA).folder(tmp_path / "data")
        assert sorted(path.name for path in folder.iterdir()) == ["Train", "Val"]  # whole ones stay, nothing half
    assert data.fetch(LOVEDA, tmp_path / "data") == folder


def test_ones_own(tmp_path):
    written(tmp_path / "images" / "a b.tif", noise())
    written(tmp_path / "labels" / "a b.tif", labels(3))
    png(tmp_path / "images" / "c.png", noise(seed=2))
    found = landcover.own(tmp_path, ["field", "wood"])
    assert len(found) == 2 and found.zones() == ["Cfb", None] and found.texts() == [None, None]
    assert np.array_equal(found[0][1].numpy(), np.minimum(labels(3)[0], 2))  # 2 and 3 are no class: ignored
    assert (found[1][1] == 2).all() and len(set(found.palette)) == 2
    (tmp_path / "places.csv").write_text('image,latitude,longitude,text\nc,-3.1,-60.0,"a clearing, red earth"\n')
    (tmp_path / "val.txt").write_text("a b.tif\n")
    found = landcover.own(tmp_path, {"field": (1, 2, 3)}, size=50)
    assert len(found) == 8 and found.zones()[4:] == ["Af"] * 4 and found.palette == [(1, 2, 3)]
    assert found.texts()[3:5] == [None, "a clearing, red earth"]
    (tmp_path / "places.csv").write_text("image,zone\nboxtif,Af\na.png,Af\n")  # an ending starts with a dot
    assert set(landcover.read_places(tmp_path / "places.csv")) == {"boxtif", "a"}
    (tmp_path / "places.csv").write_text('image,latitude,longitude,text\nc,-3.1,-60.0,"a clearing, red earth"\n')
    assert [tuple(found[i][1].shape) for i in range(4)] == [(50, 50), (50, 40), (20, 50), (20, 40)]  # not padded
    assert len(landcover.own(tmp_path, ["field"], "val")) == 1
    image = noise()
    image[:, :, :30] = 0
    written(tmp_path / "images" / "a b.tif", image, nodata=0)
    ids = landcover.own(tmp_path, ["field", "wood"])[0][1]
    assert (ids[:, :30] == 2).all() and not (ids[:, 30:] == 2).all()
    refused(MissingData, r"test\.txt", landcover.own, tmp_path, ["field"], "test")
    (tmp_path / "test.txt").write_text("d.tif\n")
    refused(MissingData, r"d\.tif", landcover.own, tmp_path, ["field"], "test")
    refused(MissingData, "no images", landcover.own, tmp_path / "labels", ["field"])
    refused(BadParameter, "classes", landcover.own, tmp_path, [])
    png(tmp_path / "images" / "a b.png", noise())  # a preview of the same image: one map would replace the other
    refused(CorruptFile, "a b.*same name", landcover.own, tmp_path, ["field"])


def test_names_of_ones_own_classes(tmp_path):
    refused(CorruptFile, r"classes\.txt", landcover.read_classes, tmp_path)
    (tmp_path / "classes.txt").write_text("open field 75 181 73\nzone 2\n\nwater\n")
    found = landcover.read_classes(tmp_path)
    assert list(found) == ["open field", "zone 2", "water"] and found["open field"] == (75, 181, 73)
    for text in ("field 75 181 300\nwater", "field\nfield", "field"):
        (tmp_path / "classes.txt").write_text(text)
        refused(CorruptFile, r"classes\.txt", landcover.read_classes, tmp_path)


def test_a_part_of_a_set(tmp_path):
    earth(tmp_path, ("tokyo", "el_rodeo", "kyoto"))
    for size, times in ((None, 1), (50, 4)):
        whole = landcover.load(OEM, tmp_path, "train", size=size)
        part = whole.where([zone != "Cfa" for zone in whole.zones()])
        assert part.zones() == ["Aw"] * times and len(whole) == 3 * times
        assert torch.equal(part[0][0], whole[times][0]) and part.picture(0).region == "el_rodeo"
        refused(BadParameter, "keep", whole.where, [False] * len(whole))
