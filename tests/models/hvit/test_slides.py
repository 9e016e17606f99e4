"""Whole slides: two readers that agree, tiles by spacing, features that survive a kill, heatmaps."""

import dataclasses
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from companion.data import pyramids
from companion.data.pyramids import Slide
from companion.data.slides import read_features
from companion.errors import CorruptFile, MissingData
from companion.models import hvit
from companion.models.hvit import features, heatmaps, slides
from companion.models.hvit.slides import PANDA, Tiling
from companion.training.checkpoints import checkpoint_key
from tests.conftest import interrupted
from tests.data.test_pyramids import drawn, written
from tests.models.common import refuses

SMALL = Tiling(region=128, mpp=0.5, downsample=16, otsu=False, median=3, close=2, area=0.01, least=0.1)
MEAN = {"tiling": SMALL, "encoder": "mean"}


def never(regions):
    raise AssertionError("encoded")


def mean_colour(regions: torch.Tensor) -> torch.Tensor:
    return regions.mean((2, 3))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return drawn()


@pytest.fixture(scope="module")
def path(tmp_path_factory, image) -> Path:
    return written(tmp_path_factory.mktemp("slides") / "slide.tiff", image)


# --- tiles: the tiling itself is HS2P's in tests/recipes/hvit/preprocess_tiling ---------------------------------------


def test_holes_are_dropped_on_request():
    """They are no tissue of the mask in any case: leaving them out takes their rims away, no more."""
    ring = np.full((96, 128), 255, np.uint8)
    ring[30:70, 40:100] = 0
    tiling = dataclasses.replace(SMALL, area=1, hole_area=1)
    (_, shares, _), (_, without, _) = (
        slides.find_tiles(ring, 8, (1024, 768), 256, dataclasses.replace(tiling, drop_holes=drop), 64)
        for drop in (False, True)
    )
    assert (without <= shares).all() and 0 < (shares - without).max() < 0.1


def test_the_spacing_decides_the_level(path, tmp_path, image):
    with Slide(path) as slide:
        tiles = slides.tile(slide, dataclasses.replace(SMALL, downsample=4))
        assert [f"{x}_{y}" for x, y in tiles.coords] == sorted(f"{x}_{y}" for x, y in tiles.coords)
        resampled = slides.tile(slide, dataclasses.replace(SMALL, mpp=0.9, region=66, resample=True))
        assert (resampled.level, resampled.pixels) == (0, 119)  # 118.8
        assert resampled.read(slide, *resampled.coords[0]).shape == (66, 66, 3)
        # the least area is in patches of the level that is read: the smaller piece has 1.1 of level 0, 0.07 of level 1
        for mpp, region, pieces, read in ((0.5, 128, {0, 1}, (0, 128, 128)), (2.0, 32, {0}, (1, 32, 128))):
            found = slides.tile(slide, dataclasses.replace(SMALL, mpp=mpp, region=region, area=0.1))
            assert set(found.contours) == pieces and (found.level, found.pixels, found.step) == read
        refuses((lambda: slides.tile(slide, dataclasses.replace(SMALL, mpp=1.0)), r"mpp = 1\.0.*0\.5, 2, 8"))
    for name, wrong in {"region": 0, "mpp": 0, "downsample": 0, "median": 2, "close": -1}.items():
        refuses((lambda change={name: wrong}: Tiling(**change), name))
    with Slide(written(tmp_path / "40x.tiff", image, 0.25, downsamples=(1, 4, 16))) as slide:
        refuses((lambda: slides.tile(slide, SMALL), "--resample"))
        found = slides.tile(slide, dataclasses.replace(SMALL, resample=True))
        assert (found.level, found.pixels) == (0, 256)
    with Slide(written(tmp_path / "screen.tiff", image, 25400 / 72)) as slide:
        refuses((lambda: slides.tile(slide, dataclasses.replace(SMALL, resample=True)), "mpp = 35.*screen.tiff.*--mpp"))
    bare = written(tmp_path / "bare.tiff", image, mpp=None)
    with Slide(bare) as slide:
        refuses((lambda: slides.tile(slide, SMALL), r"mpp.*bare\.tiff"), (lambda: Slide(bare, mpp=0), "mpp = 0"))
    with Slide(bare, mpp=0.45) as slide:  # near enough: read as it is
        assert slides.tile(slide, SMALL).step == 128


def test_masks_replace_the_detection_by_colour(path, tmp_path):
    values = np.zeros((48, 64), np.uint8)
    values[16:32, 8:24] = 1  # nearly black in a viewer
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([0 * values, 0 * values, 100 * values], 2)).save(tmp_path / "colour.png")
    tifffile.imwrite(tmp_path / "plain.tif", values)
    with tifffile.TiffWriter(tmp_path / "pyramid.tiff") as pyramid:
        for level, at in enumerate((values.repeat(16, 0).repeat(16, 1), values)):
            pyramid.write(at, subfiletype=level, tile=(16, 16), compression="deflate", metadata=None)
    tifffile.imwrite(tmp_path / "two.tif", values > 0)
    for file in [*tmp_path.iterdir()]:
        (tmp_path / file.stem).mkdir()
        shutil.copy(file, tmp_path / file.stem / f"slide{file.suffix}")
        with Slide(path) as slide:
            mask = slides.read_mask(tmp_path / file.stem, slide, 16)
        np.testing.assert_array_equal(mask, 255 * values, err_msg=file.name)
    out = features.extract(path, mean_colour, tmp_path / "slide.h5", **MEAN, masks=tmp_path / "grey")
    corners = {(x, y) for x in (128, 256) for y in (256, 384)}
    assert set(map(tuple, read_features(out)["coords"].tolist())) == corners
    Image.fromarray(values[:20]).save(tmp_path / "slide.png")
    (tmp_path / "plain" / "slide.tif").write_bytes(b"no")
    (tmp_path / "none").mkdir()

    def masked(folder: str):
        return lambda: features.extract(path, mean_colour, out, **MEAN, masks=tmp_path / folder)

    refuses((masked("none"), r"none/slide\.png"), error=MissingData)
    refuses((masked("plain"), r"plain/slide\.tif"), error=CorruptFile)
    refuses((masked("."), r"mask = .*slide\.tiff"))


def test_a_preview_shows_what_is_taken_as_tissue(path, tmp_path, image):
    """Also of slides whose features are there already."""
    out = tmp_path / "slide.h5"
    features.extract(path, mean_colour, out, **MEAN)
    features.extract(path, never, out, **MEAN, preview=True)
    picture = np.asarray(Image.open(out.with_suffix(".png"))).astype(int)
    assert picture.shape == image.shape
    framed, outlined = ((picture == colour).all(-1) for colour in ((0, 60, 255), (255, 130, 0)))
    used = np.zeros(image.shape[:2], bool)
    for x, y in read_features(out)["coords"]:
        used[y : y + 129, x : x + 129] = True
        assert framed[y, x : x + 128].all() and framed[y : y + 128, x].all()
    plain = ~framed & ~outlined
    assert outlined.any() and np.array_equal(picture[used & plain], image[used & plain])
    assert picture[~used & plain].min() > 140  # faded


def test_regions_are_compressed_as_hs2p_stores_them(path, image, tmp_path):
    assert PANDA.jpeg and not SMALL.jpeg
    with Slide(path) as slide:
        found, raw = (slides.tile(slide, dataclasses.replace(SMALL, jpeg=jpeg)) for jpeg in (True, False))
        x, y = found.coords[0]
        found, raw = found.read(slide, x, y), raw.read(slide, x, y)
    np.testing.assert_array_equal(raw, image[y : y + 128, x : x + 128])
    Image.fromarray(raw).save(tmp_path / "region.jpg")
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "region.jpg")))
    assert (found != raw).any()


def test_tissue_is_detected_in_the_level_nearest_to_a_64th_as_in_the_authors_configuration_for_panda(tmp_path):
    image = np.full((1024, 2048, 3), 255, np.uint8)
    image[300:700, 400:1500] = (200, 60, 120)
    for levels, side in (((1, 4, 16), 16), ((1, 4, 16, 64), 64)):  # PANDA's, and one more
        found = []
        with Slide(pyramids.write_pyramid(tmp_path / f"{side}.tiff", image, 0.5, levels)) as slide:
            for mask in (None, slides.tissue_mask(slide.thumbnail(side)[0], PANDA)):
                found.append(slides.tile(slide, dataclasses.replace(PANDA, region=128, area=0.1), mask))
        np.testing.assert_array_equal(found[0].coords, found[1].coords)
        np.testing.assert_array_equal(found[0].shares, found[1].shares)


# --- features ---------------------------------------------------------------------------------------------------------


def test_pixels_are_normalised():
    pixels = np.full((2, 4, 4, 3), 255, np.uint8)
    assert (slides.tensor(pixels) == 1).all() and slides.tensor(pixels).shape == (2, 3, 4, 4)
    assert (slides.tensor(pixels, "half") == 1).all() and (slides.tensor(0 * pixels, "half") == -1).all()
    assert slides.tensor(pixels, "imagenet")[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)


def test_an_extraction_that_is_stopped_resumes_to_the_same_features(path, tmp_path):
    whole = read_features(features.extract(path, mean_colour, tmp_path / "whole.h5", **MEAN, batch=2))
    out, calls = tmp_path / "stopped.h5", []

    def counted(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mean_colour(x)

    with pytest.raises(KeyboardInterrupt):
        features.extract(path, counted, out, **MEAN, batch=2)
    assert not out.exists() and len(list(tmp_path.glob("stopped.h5.parts/[0-9]*"))) == 3
    refuses((lambda: features.extract(path, mean_colour, out, **MEAN, batch=2, normalise="half"), "normalise"))
    found = read_features(features.extract(path, counted, out, **MEAN, batch=2))
    assert len(calls) == -(-len(whole["coords"]) // 2) + 1  # the batch that was stopped is counted twice
    assert torch.equal(found["features"], whole["features"]) and torch.equal(found["coords"], whole["coords"])
    assert not out.with_name("stopped.h5.parts").exists()


def test_parts_of_a_run_killed_at_its_end_are_removed(path, tmp_path, monkeypatch):
    out = tmp_path / "slide.h5"
    with interrupted(monkeypatch, shutil, "rmtree", 0):
        features.extract(path, mean_colour, out, **MEAN)
    assert [*tmp_path.glob("*.parts")]
    assert features.extract(path, mean_colour, out, **MEAN) == out and not [*tmp_path.glob("*.parts")]


def test_a_finished_slide_is_not_tiled_again(path, tmp_path, monkeypatch):
    mask = tmp_path / "masks" / f"{path.stem}.png"
    mask.parent.mkdir()
    out, masked = tmp_path / "a.h5", {"masks": mask.parent}
    features.extract(path, mean_colour, out, **MEAN, preview=True)
    with Slide(path) as slide:
        Image.fromarray(slides.tissue_mask(slide.thumbnail(SMALL.downsample)[0], SMALL)).save(mask)
    features.extract(path, mean_colour, tmp_path / "b.h5", **MEAN, **masked)
    with monkeypatch.context() as patch:
        for name in ("tile", "read_features"):
            patch.setattr(features, name, None, raising=False)
        assert features.extract(path, never, out, **MEAN, preview=True) == out
        refuses((lambda: features.extract(path, never, out, **MEAN, normalise="half"), "normalise"))
    assert features.extract(path, never, tmp_path / "b.h5", **MEAN, **masked)
    Image.fromarray(np.zeros((20, 25), np.uint8)).resize(Image.open(mask).size).save(mask)  # edited: other regions
    refuses((lambda: features.extract(path, never, tmp_path / "b.h5", **MEAN, **masked), "coords"))


def test_features_of_other_encoders_or_settings_are_not_mixed(path, tmp_path):
    one, six = (hvit.PatchEncoder(64, 16, dim=12, depth=1, heads=heads) for heads in (1, 6))
    six.load_state_dict(one.state_dict())
    other = hvit.PatchEncoder(64, 16, dim=12, depth=1, heads=1)
    out = features.extract(path, mean_colour, tmp_path / "a.h5", tiling=SMALL, encoder=one)
    before = out.read_bytes()
    assert features.extract(path, never, out, tiling=SMALL, encoder=one) == out  # there already: nothing is encoded
    nearby = dataclasses.replace(SMALL, downsample=15)  # tissue of the same level, so the same regions
    assert features.extract(path, never, out, tiling=nearby, encoder=one) == out

    def again(**changes):
        return lambda: features.extract(path, mean_colour, out, **{"tiling": SMALL, "encoder": one} | changes)

    refuses(
        (again(encoder=other), f"encoder.*{checkpoint_key(encoder=one)}"),
        (again(encoder=six), "heads"),
        (again(encoder="mean"), "encoder"),
        (lambda: features.extract(path, lambda x: x.mean((0, 2, 3)), tmp_path / "b.h5", **MEAN, batch=2), "encode"),
        (again(mpp=0.501), "slide_mpp"),
        (again(tiling=dataclasses.replace(SMALL, jpeg=True)), "jpeg"),
    )
    assert out.read_bytes() == before


def test_a_slide_without_tissue_has_no_features(tmp_path):
    white = written(tmp_path / "white.tiff", np.full((512, 512, 3), 255, np.uint8))
    read = read_features(features.extract(white, mean_colour, tmp_path / "white.h5", **MEAN))
    assert len(read["features"]) == len(read["coords"]) == 0


LARGE = """
import sys, torch
from companion.models import hvit
from companion.models.hvit import features, slides
from companion.io import record
torch.set_num_threads(1)
model = hvit.build("pocket", patches=4).eval()
tiling = slides.Tiling(region=1024, mpp=0.5, otsu=True, area=4)
features.extract(sys.argv[1], model.embed_patches, sys.argv[2], tiling=tiling, encoder=model.patch)
print(record.peak_memory_mb())  # getrusage would count the test process, which may be large
"""


@pytest.mark.slow
def test_a_slide_of_50_000_pixels_a_side_is_tiled_and_encoded_in_less_than_2_gb(tmp_path):
    side, path = 50_000, tmp_path / "large.tiff"
    block = np.random.default_rng(0).normal((200, 120, 170), 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)

    white, small = np.full_like(block, 255), np.full((-(-side // 64),) * 2 + (3,), 255, np.uint8)
    small[10_000 // 64 : 20_000 // 64, 6_000 // 64 : 18_000 // 64] = (200, 120, 170)
    corners = itertools.product(range(0, side, 256), repeat=2)
    blocks = (block if 6_000 < x < 18_000 and 10_000 < y < 20_000 else white for y, x in corners)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate", "metadata": None}
    options |= {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(blocks, shape=(side, side, 3), dtype=np.uint8, **options)
        writer.write(small, subfiletype=1, **options)
    words = [sys.executable, "-c", LARGE, str(path), str(tmp_path / "large.h5")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2_000
    assert len(read_features(tmp_path / "large.h5")["coords"]) > 100


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def test_heatmaps_lie_on_the_slide(path, tmp_path, image, monkeypatch):
    with Slide(path) as slide:
        tiles = slides.tile(slide, SMALL)
        maps = np.zeros((len(tiles), 8, 8))
        maps[0] = 0.99
        files = heatmaps.write_heatmap(slide, tiles, maps, tmp_path / "map", downsample=4)
        monkeypatch.setattr(heatmaps, "LARGEST_THUMBNAIL", 20_000)
        small = heatmaps.write_heatmap(slide, tiles, maps, tmp_path / "small", downsample=4)
    with Slide(small["tiff"]) as map_:
        assert map_.size == (128, 96) and map_.mpp == pytest.approx(4.0, rel=1e-3)
    picture = np.asarray(Image.open(files["png"]))
    with Slide(files["tiff"]) as map_:
        assert map_.size == (256, 192) and map_.mpp == pytest.approx(2.0, rel=1e-3) and len(map_.levels) == 3
        np.testing.assert_array_equal(map_.read(0, 0, 0, 256, 192), picture)
    hot, cold = (picture[y : y + 32, x : x + 32].mean((0, 1)) for x, y in tiles.coords[[0, -1]] // 4)
    assert hot[0] > hot[2] and cold[2] > cold[0]  # red where it is high, blue where it is low
    assert (picture[-1] == pyramids.reduce(image, 4)[-1]).all()  # elsewhere the tissue
