"""GeoTIFF in and out: windows, locations, no-data, colour tables, broken files, large images in bounded memory."""

import functools
import re
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
from companion.errors import CorruptFile
from companion.geotiff import NODATA, Raster
from companion.models.metasegnet.model import bands, segment
from tests.models.common import refuses

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


def test_windows_and_the_location(tmp_path):
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
        assert raster.crs is None and raster.place is None  # a world file has no coordinate system
    with Raster(tmp_path / "a.png", UTM) as raster:
        given = raster.place
    (tmp_path / "a.prj").write_text(rasterio.crs.CRS.from_string(UTM).to_wkt())
    with Raster(tmp_path / "a.png") as raster:
        assert raster.place == given and given[0] == pytest.approx(52.4, abs=0.1)
    (tmp_path / "a.prj").write_text("nowhere")
    refuses((lambda: Raster(tmp_path / "a.png"), r"a\.prj"), error=CorruptFile)


def test_a_photograph_in_four_inks_has_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (220, 0, 0)).convert("CMYK").save(tmp_path / "inks.jpg", quality=100)
    with Raster(tmp_path / "inks.jpg") as image:
        assert np.abs(image.read().astype(int).mean((1, 2)) - [220, 0, 0]).max() < 8


def test_a_map_lies_where_its_image_lies(tmp_path):
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
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    with Raster(geotiff.label(tiles, tmp_path / "a.png", tmp_path / "map.tif", PALETTE)) as raster:
        assert raster.place is None and raster.size == (70, 90) and raster.colours[0][:3] == PALETTE[0]


def test_what_cannot_be_read_is_refused_and_no_half_map_is_left(tmp_path):
    def labelled(source):
        return lambda: geotiff.label(functools.partial(bands, brightest), source, tmp_path / "map.tif", PALETTE)

    (tmp_path / "text.tif").write_text("no image")
    sources = [tmp_path / "nowhere.tif", tmp_path / "text.tif", written(tmp_path / "grey.tif", noise()[:1])]
    sources += [
        written(tmp_path / "deep.tif", noise().astype(np.uint16)),
        written(tmp_path / "cut.tif", noise(400, 400)),
    ]
    for suffix in ("png", "jpg"):
        Image.fromarray(noise(400, 400).transpose(1, 2, 0)).save(tmp_path / f"cut.{suffix}")
        sources.append(tmp_path / f"cut.{suffix}")
    for cut in sources[-3:]:
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    refuses(*((labelled(source), re.escape(source.name)) for source in sources), error=CorruptFile)
    with Raster(tmp_path / "deep.tif") as raster:
        for rows, palette, name in (([], [], "palette"), ([(0, np.zeros((3, 90), np.uint8))], PALETTE, "rows")):
            refuses((lambda: geotiff.write_map(tmp_path / "map.tif", rows, raster, palette), name))  # noqa: B023
    assert not list(tmp_path.glob("*map*"))


LARGE = """
import functools, sys, torch
from companion import geotiff
from companion.ops import record
from companion.models.metasegnet.model import MetaSegNet, bands
torch.set_num_threads(1)
net = MetaSegNet.build(8, size="pocket").eval()
tiles = functools.partial(bands, net, tile=512, overlap=64)
geotiff.label(tiles, sys.argv[1], sys.argv[2], [(i, i, i) for i in range(8)])
print(record.peak_memory_mb())
"""


@pytest.mark.slow
def test_a_large_image_is_labelled_in_less_than_2_gb(tmp_path):
    (height, width), source = (6_500, 9_000), tmp_path / "large.tif"
    profile = dict(driver="GTiff", height=height, width=width, count=3, dtype="uint8", crs=UTM, transform=CORNER)
    with rasterio.open(source, "w", **profile) as file:
        for top in range(0, height, 500):
            file.write(noise(500, width), window=rasterio.windows.Window(0, top, width, 500))
    run = [sys.executable, "-c", LARGE, str(source), str(tmp_path / "map.tif")]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) < 2_000
    with Raster(tmp_path / "map.tif") as raster:
        assert raster.size == (height, width) and raster.transform == CORNER
        assert raster.raw((1,), 0, 0, 50, width).max() < 8 and raster.raw((1,), height - 50, 0).max() < 8
