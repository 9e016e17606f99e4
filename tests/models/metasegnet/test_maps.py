"""Maps of land cover: georeference, no-data, colour tables, broken images, large images in bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from companion import cli
from companion.data.rasters import Raster, pixels
from companion.errors import CorruptFile
from companion.models.metasegnet import maps, segment
from companion.models.metasegnet.maps import NODATA
from tests.data.test_rasters import CORNER, UTM, noise, written
from tests.models.common import refuses

PALETTE = [(128, 0, 0), (0, 255, 36), (0, 69, 255)]


def brightest(images: torch.Tensor) -> torch.Tensor:
    """A network that looks at single pixels: the class is the strongest colour."""
    return images


def test_a_map_lies_where_its_image_lies(tmp_path):
    image = noise()
    image[:, :20, :30] = 7
    source = written(tmp_path / "a.tif", image, nodata=7)
    tiles = {"tile": 32, "overlap": 8}
    out = maps.label(brightest, source, tmp_path / "out" / "map.tif", PALETTE, ["red", "green", "blue"], **tiles)
    assert [p.name for p in out.parent.iterdir()] == ["map.tif"]  # nothing temporary, nothing next to it
    with rasterio.open(out) as found, rasterio.open(source) as given:
        assert (found.crs, found.transform, found.shape) == (given.crs, given.transform, given.shape)
        assert found.nodata == NODATA and found.profile["tiled"] and found.tags()["CLASS_2"] == "blue"
        assert found.colormap(1)[1] == (0, 255, 36, 255) and found.colormap(1)[NODATA][3] == 0
        classes = found.read(1)
        hidden = found.dataset_mask() == 0
    assert hidden[:20, :30].all() and (classes[hidden] == NODATA).all() and hidden.sum() < 700
    whole = segment(brightest, pixels(image), **tiles).numpy()
    assert np.array_equal(classes[~hidden], whole[~hidden])
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    with Raster(maps.label(brightest, tmp_path / "a.png", tmp_path / "map.tif", PALETTE, **tiles)) as raster:
        assert raster.place is None and raster.size == (70, 90) and raster._file.colormap(1)[0][:3] == PALETTE[0]


def test_a_preview_shows_the_classes_in_their_colours_at_a_bounded_size(tmp_path, monkeypatch):
    image = noise()
    image[:, :20, :30] = 7
    source = written(tmp_path / "a.tif", image, nodata=7)
    out = maps.label(brightest, source, tmp_path / "map.tif", PALETTE, tile=32, overlap=8)
    with rasterio.open(out) as found:
        classes = found.read(1)
    with Image.open(maps.preview(out)) as shown:
        pixels = np.asarray(shown.convert("RGBA"))
    hidden = classes == NODATA
    assert np.array_equal(pixels[~hidden][:, :3], np.array(PALETTE)[classes[~hidden]])
    assert (pixels[hidden][:, 3] == 0).all() and (pixels[~hidden][:, 3] == 255).all() and hidden.any()
    monkeypatch.setattr(maps, "PREVIEW", 45)
    with Image.open(maps.preview(out)) as shown:
        assert shown.size == (45, 35)


def test_masks_are_listed_with_values_classes_and_shares(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("field 1 2 3\nwood 4 5 6\nwater\n")
    for name in ("a", "b"):
        written(tmp_path / "images" / f"{name}.tif", noise(40, 10))
    command = ["landcover", str(tmp_path), "--check"]
    assert cli.main(command) == 1 and "0 of 2 images" in capsys.readouterr().out
    ids = np.repeat(np.array([0, 0, 1, 255], np.uint8), 10)[None, :, None].repeat(10, 2)
    written(tmp_path / "labels" / "a.tif", ids)
    assert cli.main(command) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    for row in (["0", "50.00%", "field"], ["1", "25.00%", "wood"], ["255", "25.00%", "ignored"]):
        assert row in rows
    assert ["no", "pixel:", "water"] in rows
    written(tmp_path / "labels" / "a.tif", np.full((1, 40, 10), 3, np.uint8))  # counted from 1, one class
    assert cli.main(command) == 1
    painted = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[np.arange(400).reshape(40, 10) % 2].transpose(2, 0, 1)
    written(tmp_path / "labels" / "a.tif", painted)
    capsys.readouterr()
    assert cli.main(command) == 0 and "1, 2, 3    50.00%  field" in capsys.readouterr().out
    written(tmp_path / "labels" / "a.tif", painted + 1)
    assert cli.main(command) == 1 and "a.tif" in capsys.readouterr().err
    assert cli.main(["landcover", str(tmp_path / "none"), "--check"]) == 2


def test_no_half_map_is_left(tmp_path):
    cut = written(tmp_path / "cut.tif", noise(400, 400))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    refuses((lambda: maps.label(brightest, cut, tmp_path / "map.tif", PALETTE), "cut.tif"), error=CorruptFile)
    assert not list(tmp_path.glob("*map*"))


LARGE = """
import sys, torch
from companion.io import record
from companion.models.metasegnet import MetaSegNet, maps
torch.set_num_threads(1)
net = MetaSegNet.build(8, size="pocket").eval()
maps.label(net, sys.argv[1], sys.argv[2], [(i, i, i) for i in range(8)], tile=512, overlap=64)
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
