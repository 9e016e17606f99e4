"""Whole slides: two readers that agree, tiles by spacing, features that survive a kill, pyramids, heatmaps."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from companion.data.slides import read_features
from companion.errors import CorruptFile
from companion.models import hvit
from companion.models.hvit import features, heatmaps, slides
from companion.models.hvit.slides import PANDA, Slide, Tiling
from companion.training.checkpoints import checkpoint_key
from tests.models.common import refuses

SMALL = Tiling(region=128, mpp=0.5, downsample=16, otsu=False, median=3, close=2, area=0.01, least=0.1)


def drawn(width: int = 1024, height: int = 768, seed: int = 0) -> np.ndarray:
    """Two pieces of pink tissue with noise on white."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 255, np.uint8)
    y, x = np.mgrid[:height, :width]
    for cx, cy, rx, ry in ((0.3, 0.4, 0.2, 0.3), (0.75, 0.6, 0.12, 0.25)):
        inside = ((x / width - cx) / rx) ** 2 + ((y / height - cy) / ry) ** 2 < 1
        image[inside] = np.clip(rng.normal((200, 120, 170), 20, (inside.sum(), 3)), 0, 255)
    return image


def written(path: Path, image: np.ndarray, mpp: float | None = 0.5, **options) -> Path:
    return slides.write_pyramid(path, lambda y0, y1: image[y0:y1], image.shape[1::-1], mpp, **options)


def mean_colour(regions: torch.Tensor) -> torch.Tensor:
    return regions.mean((2, 3))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return drawn()


@pytest.fixture(scope="module")
def path(tmp_path_factory, image) -> Path:
    return written(tmp_path_factory.mktemp("slides") / "slide.tiff", image)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", slides.BACKENDS)
def test_both_readers_give_the_pixels_and_refuse_a_truncated_file(path, image, backend, tmp_path):
    with Slide(path, backend=backend) as slide:
        assert slide.backend == backend and slide.size == (1024, 768)
        assert slide.levels == [(1024, 768), (256, 192), (64, 48)] and slide.downsamples == [1, 4, 16]
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        np.testing.assert_array_equal(slide.read(100, 60, 0, 300, 200), image[60:260, 100:400])
        np.testing.assert_array_equal(slide.read(64, 32, 1, 50, 40), slides.reduce(image, 4)[8:48, 16:66])
        around = np.pad(image, ((200, 5000), (200, 5000), (0, 0)), constant_values=255)  # outside there is white
        for x, y in ((-40, -30), (900, 700), (5000, 5000)):
            np.testing.assert_array_equal(slide.read(x, y, 0, 200, 200), around[y + 200 :, x + 200 :][:200, :200])
    (tmp_path / "cut.tiff").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=r"cut\.tiff"), Slide(tmp_path / "cut.tiff", backend=backend) as slide:
        for level, size in enumerate(slide.levels):
            slide.read(0, 0, level, *size)


def test_a_missing_reader_and_an_untiled_file_are_read_by_the_other(path, tmp_path, image, monkeypatch):
    tifffile.imwrite(tmp_path / "untiled.tiff", image, photometric="rgb")
    with Slide(tmp_path / "untiled.tiff", mpp=0.5) as slide:
        assert slide.backend == "tiffslide"
        np.testing.assert_array_equal(slide.read(10, 20, 0, 30, 40), image[20:60, 10:40])
    real = slides.importlib.util.find_spec
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None if name == "openslide" else real(name))
    with Slide(path) as slide:
        assert slide.backend == "tiffslide"


def test_means_of_squares_and_what_was_not_scanned_are_rounded(path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (10, 7, 3)).astype(np.uint8)
    expected = [[np.floor(image[y : y + 4, x : x + 4].mean((0, 1)) + 0.5) for x in (0, 4)] for y in (0, 4, 8)]
    np.testing.assert_array_equal(slides.reduce(image, 4), expected)
    # half transparent over white
    colour, alpha = np.mgrid[:256:5, :256:5].astype(np.uint8)
    drawn = np.stack([colour, colour // 2, 255 - colour, alpha], 2)
    with Slide(path) as slide:
        monkeypatch.setattr(slide, "_slide", SimpleNamespace(read_region=lambda *place: drawn, close=lambda: None))
        found = slide.read(0, 0, 0, *alpha.shape)
    share = drawn[..., 3:] / 255
    np.testing.assert_array_equal(found, np.floor(drawn[..., :3] * share + 255 * (1 - share) + 0.5))


def test_a_file_without_a_small_level_is_reduced_band_by_band(tmp_path, image, monkeypatch):
    monkeypatch.setattr(slides, "LARGEST_THUMBNAIL", 100_000)
    with Slide(written(tmp_path / "one.tiff", image, downsamples=(1,))) as slide:
        rgb, downsample = slide.thumbnail(16)
    assert downsample == 16
    np.testing.assert_array_equal(rgb, slides.reduce(image, 16))


# --- tiles: the tiling itself is HS2P's in tests/recipes/hvit/preprocess_tiling ---------------------------------------


def test_regions_at_the_edge_holes_and_small_pieces():
    ring = np.zeros((96, 128), np.uint8)
    ring[8:96, 8:128] = 255
    ring[30:70, 40:100] = 0

    def found(**changes):
        tiling = dataclasses.replace(SMALL, **{"area": 1, "hole_area": 1} | changes)
        return slides.find_tiles(ring, 8, (1024, 768), 256, tiling, 64)

    everything, shares, _ = found()
    assert len(everything) == 11  # of 12 one lies in the hole
    inside, _, _ = found(padding=False)
    assert len(inside) == 5 and (inside.max(0) + 256 <= [1024, 768]).all()
    # a hole is no tissue of the mask in any case: leaving it out takes its rim away, no more
    _, without, _ = found(drop_holes=True)
    assert (without <= shares).all() and 0 < (shares - without).max() < 0.1
    # the area of a piece is that of its outline, 162 patches of 8 x 8 pixels of the mask, without its hole of 39
    assert [len(found(area=area)[0]) for area in (120, 140)] == [11, 0]


def test_the_spacing_decides_the_level(path, tmp_path, image):
    with Slide(path) as slide:
        tiles = slides.tile(slide, dataclasses.replace(SMALL, downsample=4))
        assert [f"{x}_{y}" for x, y in tiles.coords] == sorted(f"{x}_{y}" for x, y in tiles.coords)
        for (x, y), share in zip(tiles.coords, tiles.shares, strict=True):
            assert abs((slide.region(x, y, tiles) != 255).any(-1).mean() - share) < 0.1 <= share
        half = slides.tile(slide, dataclasses.replace(SMALL, mpp=2.0, region=32))
        assert (half.level, half.pixels, half.step) == (1, 32, 128)
        resampled = slides.tile(slide, dataclasses.replace(SMALL, mpp=0.9, region=66, resample=True))
        assert (resampled.level, resampled.pixels) == (0, 119)  # 118.8
        assert slide.region(*resampled.coords[0], resampled).shape == (66, 66, 3)
        # the least area is in patches of the level that is read: the smaller piece has 1.1 of level 0, 0.07 of level 1
        for mpp, region, pieces in ((0.5, 128, {0, 1}), (2.0, 32, {0})):
            tiling = dataclasses.replace(SMALL, mpp=mpp, region=region, area=0.1)
            assert set(slides.tile(slide, tiling).contours) == pieces
        mask = np.zeros((48, 64), bool)  # given instead of found
        mask[16:32, 8:24] = True
        corners = sorted(map(tuple, slides.tile(slide, SMALL, mask).coords))
        assert corners == [(128, 256), (128, 384), (256, 256), (256, 384)]
        refuses(
            (lambda: slides.tile(slide, dataclasses.replace(SMALL, mpp=1.0)), r"mpp = 1\.0.*0\.5, 2, 8"),
            (lambda: slides.tile(slide, SMALL, mask[:20]), "mask = "),
        )
    with Slide(path, mpp=0.45) as slide:  # near enough: read as it is
        assert slides.tile(slide, SMALL).step == 128
    bare = written(tmp_path / "bare.tiff", image, mpp=None)
    with Slide(bare) as slide:
        refuses((lambda: slides.tile(slide, SMALL), r"mpp.*bare\.tiff"), (lambda: Slide(bare, mpp=0), "mpp = 0"))
    with Slide(bare, mpp=0.5) as slide:
        assert len(slides.tile(slide, SMALL))


def test_regions_are_compressed_as_hs2p_stores_them(path, image, tmp_path):
    assert PANDA.jpeg and not SMALL.jpeg
    with Slide(path) as slide:
        found, raw = (slides.tile(slide, dataclasses.replace(SMALL, jpeg=jpeg)) for jpeg in (True, False))
        x, y = found.coords[0]
        found, raw = slide.region(x, y, found), slide.region(x, y, raw)
    np.testing.assert_array_equal(raw, image[y : y + 128, x : x + 128])
    Image.fromarray(raw).save(tmp_path / "region.jpg")
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "region.jpg")))
    assert (found != raw).any()


# --- features ---------------------------------------------------------------------------------------------------------


def test_pixels_are_normalised():
    pixels = np.full((2, 4, 4, 3), 255, np.uint8)
    assert (slides.tensor(pixels) == 1).all() and slides.tensor(pixels).shape == (2, 3, 4, 4)
    assert (slides.tensor(pixels, "half") == 1).all() and (slides.tensor(0 * pixels, "half") == -1).all()
    assert slides.tensor(pixels, "imagenet")[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)


def test_features_are_those_of_each_region_for_any_batch(path, tmp_path):
    torch.manual_seed(0)
    model = hvit.build("pocket", patches=4).eval()
    with Slide(path) as slide, torch.no_grad():
        tiles = slides.tile(slide, SMALL)
        regions = [slides.tensor(slide.region(x, y, tiles), "half") for x, y in tiles.coords]
        expected = torch.cat([model.embed_patches(x[None]) for x in regions])
    assert expected.shape == (len(tiles), 16, 48)
    for batch in (1, 3):
        options = dict(tiling=SMALL, batch=batch, encoder=model.patch, normalise="half")
        out = features.extract(path, model.embed_patches, tmp_path / f"{batch}.h5", **options)
        found = read_features(out)
        torch.testing.assert_close(found["features"], expected, atol=1e-5, rtol=1e-5)
        assert (found["coords"].numpy() == tiles.coords).all() and not list(tmp_path.glob("*.parts"))
        assert json.loads(found["settings"])["encoder"] == checkpoint_key(encoder=model.patch)


def test_an_extraction_that_is_stopped_resumes_to_the_same_features(path, tmp_path):
    whole = read_features(features.extract(path, mean_colour, tmp_path / "whole.h5", tiling=SMALL, batch=2))
    out, calls = tmp_path / "stopped.h5", []

    def counted(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mean_colour(x)

    with pytest.raises(KeyboardInterrupt):
        features.extract(path, counted, out, tiling=SMALL, batch=2)
    assert not out.exists() and len(list(tmp_path.glob("stopped.h5.parts/[0-9]*"))) == 3
    refuses((lambda: features.extract(path, mean_colour, out, tiling=SMALL, batch=2, normalise="half"), "normalise"))
    found = read_features(features.extract(path, counted, out, tiling=SMALL, batch=2))
    assert len(calls) == -(-len(whole["coords"]) // 2) + 1  # the batch that was stopped is counted twice
    assert torch.equal(found["features"], whole["features"]) and torch.equal(found["coords"], whole["coords"])
    assert not out.with_name("stopped.h5.parts").exists()


def test_features_of_other_encoders_or_settings_are_not_mixed(path, tmp_path):
    one, six = (hvit.PatchEncoder(64, 16, dim=12, depth=1, heads=heads) for heads in (1, 6))
    six.load_state_dict(one.state_dict())
    other = hvit.PatchEncoder(64, 16, dim=12, depth=1, heads=1)
    out = features.extract(path, mean_colour, tmp_path / "a.h5", tiling=SMALL, encoder=one)
    before = out.read_bytes()
    assert features.extract(path, None, out, tiling=SMALL, encoder=one) == out  # there already: nothing is encoded

    def again(**changes):
        return lambda: features.extract(path, mean_colour, out, **{"tiling": SMALL, "encoder": one} | changes)

    refuses(
        (again(encoder=other), f"encoder.*{checkpoint_key(encoder=one)}"),
        (again(encoder=six), "heads"),
        (again(mpp=0.501), "slide_mpp"),
        (again(tiling=dataclasses.replace(SMALL, jpeg=True)), "jpeg"),
    )
    assert out.read_bytes() == before


def test_a_slide_without_tissue_has_no_features_and_a_damaged_one_no_file(path, tmp_path):
    white = written(tmp_path / "white.tiff", np.full((512, 512, 3), 255, np.uint8))
    read = read_features(features.extract(white, mean_colour, tmp_path / "white.h5", tiling=SMALL))
    assert len(read["features"]) == len(read["coords"]) == 0
    whole = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:  # a tile in the middle of the tissue, overwritten
        page = file.pages[0]
        start, length = page.dataoffsets[4 * 1 + 1], page.databytecounts[4 * 1 + 1]
    whole[start : start + length] = b"\xff" * length
    damaged = tmp_path / "damaged.tiff"
    damaged.write_bytes(whole)
    out = tmp_path / "damaged.h5"
    refuses((lambda: features.extract(damaged, mean_colour, out, tiling=SMALL), r"damaged\.tiff"), error=CorruptFile)
    assert not out.exists()


LARGE = """
import sys, torch
from companion.models import hvit
from companion.models.hvit import features, slides
from companion.ops import record
torch.set_num_threads(1)
model = hvit.build("pocket", patches=4).eval()
tiling = slides.Tiling(region=1024, mpp=0.5, otsu=True, area=4)
features.extract(sys.argv[1], model.embed_patches, sys.argv[2], tiling=tiling, encoder=model.patch)
print(record.peak_memory_mb())  # getrusage would count the test process, which may be large
"""


@pytest.mark.slow
def test_a_slide_of_50_000_pixels_a_side_is_written_tiled_and_encoded_in_less_than_2_gb(tmp_path):
    side, path = 50_000, tmp_path / "large.tiff"
    block = np.random.default_rng(0).normal((200, 120, 170), 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)

    def rows(y0, y1):
        strip = np.full((y1 - y0, side, 3), 255, np.uint8)
        a, b = max(y0, 10_000), min(y1, 20_000)
        if a < b:
            strip[a - y0 : b - y0, 6_000:18_000] = block[np.arange(a, b) % 256][:, np.arange(12_000) % 256]
        return strip

    slides.write_pyramid(path, rows, (side, side), 0.5, (1, 4, 16, 64))
    words = [sys.executable, "-c", LARGE, str(path), str(tmp_path / "large.h5")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2_000
    assert len(read_features(tmp_path / "large.h5")["coords"]) > 100


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1030, 515)])
def test_pyramids_of_odd_sizes(tmp_path, size):
    image = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    with tifffile.TiffFile(written(tmp_path / "odd.tiff", image)) as file:
        below = slides.reduce(image, 4)
        for page, expected in zip(file.pages, (image, below, slides.reduce(below, 4)), strict=True):
            np.testing.assert_array_equal(page.asarray(), expected)
        assert [page.subfiletype for page in file.pages] == [0, 1, 1]


def test_heatmaps_lie_on_the_slide(path, tmp_path, image):
    with Slide(path) as slide:
        tiles = slides.tile(slide, SMALL)
        maps = [np.full((8, 8), 0.99 if i == 0 else 0.0) for i in range(len(tiles))]
        files = heatmaps.write_heatmap(slide, tiles, maps, tmp_path / "map", downsample=4)
        few = heatmaps.write_heatmap(slide, tiles, maps, tmp_path / "few", downsample=16, threshold=0.5)
        with pytest.raises(ValueError):  # a map is missing
            heatmaps.write_heatmap(slide, tiles, maps[:-1], tmp_path / "none")
        assert not list(tmp_path.glob("none*"))
    picture = np.asarray(Image.open(files["png"]))
    assert picture.shape == (192, 256, 3)
    with Slide(files["tiff"], backend="openslide") as map_:
        assert map_.size == (256, 192) and map_.mpp == pytest.approx(2.0, rel=1e-3) and len(map_.levels) == 3
        np.testing.assert_array_equal(map_.read(0, 0, 0, 256, 192), picture)
    hot, cold = (picture[y : y + 32, x : x + 32].mean((0, 1)) for x, y in tiles.coords[[0, -1]] // 4)
    assert hot[0] > hot[2] and cold[2] > cold[0]  # red where it is high, blue where it is low
    # below the threshold the tissue stays as it is
    assert (np.asarray(Image.open(few["png"]))[-1] == slides.reduce(image, 16)[-1]).all()
