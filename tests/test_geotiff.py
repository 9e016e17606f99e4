"""GeoTIFF in and out: windows, locations, no-data, colour tables, broken files, large images in bounded memory."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import Affine, from_origin

from companion import climate, geotiff
from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.geotiff import NODATA, Raster
from companion.models.metasegnet.model import bands, segment
from tests.data.conftest import refused

UTM = "EPSG:32633"  # zone 33 north: Potsdam
CORNER = from_origin(367_000, 5_806_000, 0.5, 0.5)
PALETTE = [(128, 0, 0), (0, 255, 36), (0, 69, 255)]


def noise(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def written(path: Path, image: np.ndarray, **profile) -> Path:
    count, height, width = image.shape
    facts = dict(driver="GTiff", count=count, height=height, width=width, dtype=image.dtype, crs=UTM, transform=CORNER)
    path.parent.mkdir(parents=True, exist_ok=True)
    with geotiff.quiet(), rasterio.open(path, "w", **facts | profile) as file:
        file.write(image)
    return path


def brightest(images: torch.Tensor) -> torch.Tensor:
    """A network that looks at single pixels: the class is the strongest colour."""
    return images


def test_windows_and_the_place(tmp_path):
    image = noise()
    with Raster(written(tmp_path / "a.tif", np.concatenate([image, image[:1]]), photometric="MINISBLACK")) as raster:
        assert raster.size == (70, 90) and np.array_equal(raster.read(), image)  # infrared is left alone
        assert np.array_equal(raster.read(10, 20, 30, 40), image[:, 10:40, 20:60])
        assert raster.valid(0, 0, 70, 90).all() and raster.colours == {}
        latitude, longitude = raster.place
    assert (round(latitude, 1), round(longitude, 1)) == (52.4, 13.0) and climate.zone(latitude, longitude) == "Cfb"
    with Raster(written(tmp_path / "b.tif", image, crs=None, transform=Affine.identity())) as raster:
        assert raster.place is None and raster.crs is None


def test_a_png_with_a_world_file(tmp_path):
    image = noise()
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n367000.25\n5805999.75\n")  # of the first pixel's middle
    with Raster(tmp_path / "a.png") as raster:
        assert np.array_equal(raster.read(), image) and raster.transform == CORNER
        assert raster.crs is None and raster.place is None  # a world file has no system of coordinates
    with Raster(tmp_path / "a.png", UTM) as raster:
        given = raster.place
    (tmp_path / "a.prj").write_text(rasterio.crs.CRS.from_string(UTM).to_wkt())
    with Raster(tmp_path / "a.png") as raster:
        assert raster.place == given and given[0] == pytest.approx(52.4, abs=0.1)
    (tmp_path / "a.prj").write_text("nowhere")
    refused(CorruptFile, r"a\.prj", Raster, tmp_path / "a.png")


def test_a_photograph_in_four_inks_has_its_colours(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 220
    Image.fromarray(red).convert("CMYK").save(tmp_path / "inks.jpg", quality=100)
    with geotiff.Raster(tmp_path / "inks.jpg") as image:
        assert np.abs(image.read().astype(int).mean((1, 2)) - [220, 0, 0]).max() < 8


def test_a_map_lies_where_its_picture_lies(tmp_path):
    image = noise()
    image[:, :20, :30] = 7
    source = written(tmp_path / "a.tif", image, nodata=7)
    tiles = functools.partial(bands, brightest, tile=32, overlap=8)
    out = geotiff.label(tiles, source, tmp_path / "out" / "map.tif", PALETTE, ["red", "green", "blue"])
    assert [p.name for p in out.parent.iterdir()] == ["map.tif"]  # nothing temporary, nothing next to it
    with rasterio.open(out) as found, rasterio.open(source) as given:
        assert (found.crs, found.transform, found.shape) == (given.crs, given.transform, given.shape)
        assert found.nodata == NODATA and found.profile["tiled"] and found.tags()["CLASS_2"] == "blue"
        assert found.colormap(1)[1] == (0, 255, 36, 255) and found.colormap(1)[NODATA][3] == 0
        classes = found.read(1)
        hidden = found.dataset_mask() == 0
    assert hidden[:20, :30].all() and (classes[hidden] == NODATA).all() and hidden.sum() < 700
    whole = segment(brightest, geotiff.pixels(image), tile=32, overlap=8).numpy()
    assert np.array_equal(classes[~hidden], whole[~hidden])


def test_a_picture_without_georeference_stays_without(tmp_path):
    Image.fromarray(noise().transpose(1, 2, 0)).save(tmp_path / "a.png")
    out = geotiff.label(functools.partial(bands, brightest), tmp_path / "a.png", tmp_path / "map.tif", PALETTE)
    with Raster(out) as raster:
        assert raster.place is None and raster.size == (70, 90) and raster.colours[0][:3] == PALETTE[0]


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "text.tif").write_text("no image")
    for name in ("nowhere", "text"):
        refused(CorruptFile, rf"{name}\.tif", Raster, tmp_path / f"{name}.tif")
    deep = written(tmp_path / "deep.tif", noise().astype(np.uint16))
    for path, said in ((written(tmp_path / "grey.tif", noise()[:1]), "1 band"), (deep, "uint16")):
        with Raster(path) as raster, pytest.raises(CorruptFile, match=said):
            raster.read()
    cuts = [written(tmp_path / "cut.tif", noise(400, 400)), tmp_path / "cut.png", tmp_path / "cut.jpg"]
    for cut in cuts:
        if cut != cuts[0]:
            Image.fromarray(noise(400, 400).transpose(1, 2, 0)).save(cut)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        with pytest.raises(CorruptFile, match="cut"):
            geotiff.label(functools.partial(bands, brightest), cut, tmp_path / "map.tif", PALETTE)
        assert not list(tmp_path.glob("*map*"))  # nothing half-written
    with Raster(deep) as raster:
        for rows, palette, said in (([], [], "palette"), ([(0, np.zeros((3, 90), np.uint8))], PALETTE, "rows")):
            refused(BadParameter, said, geotiff.write_map, tmp_path / "map.tif", rows, raster, palette)
    assert not list(tmp_path.glob("*map*"))


def test_without_rasterio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    refused(CompanionError, "landcover", Raster, tmp_path / "a.tif")


LARGE = """
import functools, sys, torch
from companion import geotiff
from companion.ops import record
from companion.models.metasegnet.model import MetaSegNet, bands
torch.set_num_threads(1)
torch.manual_seed(0)
net = MetaSegNet.build(8, size="pocket").eval()
tiles = functools.partial(bands, net, tile=512, overlap=64)
geotiff.label(tiles, sys.argv[1], sys.argv[2], [(i, i, i) for i in range(8)])
print(record.peak_memory_mb())
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6_000, 6_000), (6_500, 9_000)])
def test_a_large_picture_in_less_than_2_gb(tmp_path, size):
    height, width = size
    block, source = noise(500, width), tmp_path / "large.tif"
    profile = dict(driver="GTiff", height=height, width=width, count=3, dtype="uint8", crs=UTM, transform=CORNER)
    with rasterio.open(source, "w", **profile) as file:
        for top in range(0, height, 500):
            file.write(block, window=rasterio.windows.Window(0, top, width, 500))
    run = [sys.executable, "-c", LARGE, str(source), str(tmp_path / "map.tif")]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) < 2_000
    with Raster(tmp_path / "map.tif") as raster:
        assert raster.size == size and raster.transform == CORNER
        assert raster.raw((1,), 0, 0, 50, width).max() < 8 and raster.raw((1,), height - 50, 0).max() < 8
