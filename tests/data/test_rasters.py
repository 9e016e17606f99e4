"""Images of GIS: windows, locations, no-data, world files, broken files."""

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine, from_origin

from companion.data.climate import zone
from companion.data.rasters import Raster, quiet
from companion.errors import CorruptFile
from tests.models.common import refuses

UTM = "EPSG:32633"  # zone 33 north: Potsdam
CORNER = from_origin(367_000, 5_806_000, 0.5, 0.5)


def noise(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def written(path: Path, image: np.ndarray, **profile) -> Path:
    count, height, width = image.shape
    facts = dict(driver="GTiff", count=count, height=height, width=width, dtype=image.dtype, crs=UTM, transform=CORNER)
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), rasterio.open(path, "w", **facts | profile) as file:
        file.write(image)
    return path


def test_windows_and_the_location(tmp_path):
    image = noise()
    with Raster(written(tmp_path / "a.tif", np.concatenate([image, image[:1]]), photometric="MINISBLACK")) as raster:
        assert raster.size == (70, 90) and np.array_equal(raster.read(), image)  # infrared is left alone
        assert np.array_equal(raster.read(10, 20, 30, 40), image[:, 10:40, 20:60])
        assert raster.valid(0, 0, 70, 90).all()
        latitude, longitude = raster.place
    assert (round(latitude, 1), round(longitude, 1)) == (52.4, 13.0) and zone(latitude, longitude) == "Cfb"
    with Raster(written(tmp_path / "b.tif", image, crs=None, transform=Affine.identity())) as raster:
        assert raster.place is None and raster.crs is None


def test_a_png_with_a_world_file(tmp_path):
    image = noise()
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n367000.25\n5805999.75\n")  # of the first pixel's middle
    with Raster(tmp_path / "a.png") as raster:
        assert np.array_equal(raster.read(), image) and raster.transform == CORNER
        assert raster.crs is None and raster.place is None  # a world file has no coordinate system
    (tmp_path / "a.prj").write_text(rasterio.crs.CRS.from_string(UTM).to_wkt())
    with Raster(tmp_path / "a.png") as raster:
        assert raster.place[0] == pytest.approx(52.4, abs=0.1)
    (tmp_path / "a.prj").write_text("nowhere")
    refuses((lambda: Raster(tmp_path / "a.png"), r"a\.prj"), error=CorruptFile)


def test_a_photograph_in_four_inks_has_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (220, 0, 0)).convert("CMYK").save(tmp_path / "inks.jpg", quality=100)
    with Raster(tmp_path / "inks.jpg") as image:
        assert np.abs(image.read().astype(int).mean((1, 2)) - [220, 0, 0]).max() < 8


@pytest.mark.parametrize("name", ["text.tif", "deep.tif", "cut.tif", "cut.png", "cut.jpg"])
def test_what_cannot_be_read_is_refused(tmp_path, name):
    path, image = tmp_path / name, noise(400, 400)
    if path.suffix == ".tif":
        written(path, image.astype(np.uint16) if name == "deep.tif" else image)
    else:
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    content = path.read_bytes()
    path.write_bytes({"text.tif": b"no image", "deep.tif": content}.get(name, content[: len(content) // 2]))
    refuses((lambda: Raster(path).read(), re.escape(name)), error=CorruptFile)


CODES = np.arange(60, dtype=np.uint8).reshape(6, 10) % 4


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_class_numbers_are_read_as_they_are_stored(tmp_path, bits, kind):
    codes, path = CODES % min(2**bits, 4), tmp_path / f"{bits}.{kind}"
    if kind == "tif":
        written(path, codes[None].astype({4: np.int32, 16: np.uint16}.get(bits, np.uint8)))
    else:
        profile = {"driver": "PNG"} | ({"nbits": bits} if bits < 8 else {})
        written(path, codes[None].astype(np.uint16 if bits == 16 else np.uint8), crs=None, **profile)
    with Raster(path) as raster:
        found = raster.raw((1,))
        assert found.dtype == np.uint8 and np.array_equal(found[0], codes)
        assert np.array_equal(raster.raw((1,), 2, 3, 4, 5)[0], codes[2:6, 3:8])


@pytest.mark.parametrize("wrong", [-1, 256])
def test_class_numbers_that_are_no_bytes_are_refused(tmp_path, wrong):
    path = written(tmp_path / "far.tif", np.where(CODES == 3, wrong, CODES.astype(np.int32))[None])
    refuses((lambda: Raster(path).raw((1,)), str(wrong)), error=CorruptFile)
