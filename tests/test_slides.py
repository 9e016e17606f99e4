"""Whole slides: two readers that agree, tiles by spacing, features that survive a kill, pyramids, heatmaps."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from companion import slides
from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.models import hvit
from companion.slides import PANDA, Slide, Tiling
from companion.training.checkpoints import checkpoint_key
from tests.conftest import kill_when
from tests.data.conftest import refused

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


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return drawn()


@pytest.fixture(scope="module")
def path(tmp_path_factory, image) -> Path:
    return written(tmp_path_factory.mktemp("slides") / "slide.tiff", image)


def mean_colour(regions: torch.Tensor) -> torch.Tensor:
    return regions.mean((2, 3))


@pytest.mark.parametrize("backend", slides.BACKENDS)
def test_both_readers_give_the_pixels(path, image, backend):
    with Slide(path, backend=backend) as slide:
        assert slide.backend == backend and slide.size == (1024, 768)
        assert slide.levels == [(1024, 768), (256, 192), (64, 48)]
        assert slide.downsamples == [1, 4, 16]
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        np.testing.assert_array_equal(slide.read(100, 60, 0, 300, 200), image[60:260, 100:400])
        np.testing.assert_array_equal(slide.read(64, 32, 1, 50, 40), slides.reduce(image, 4)[8:48, 16:66])
        around = np.pad(image, ((200, 5000), (200, 5000), (0, 0)), constant_values=255)  # outside there is white
        for x, y in ((-40, -30), (900, 700), (5000, 5000)):
            np.testing.assert_array_equal(slide.read(x, y, 0, 200, 200), around[y + 200 :, x + 200 :][:200, :200])


def test_the_reader_can_be_missing(path, monkeypatch):
    real = slides.importlib.util.find_spec
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None if name == "openslide" else real(name))
    with Slide(path) as slide:
        assert slide.backend == "tiffslide"
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None)
    refused(CompanionError, "slides", Slide, path)
    refused(CompanionError, "OpenCV", slides.tissue_mask, np.zeros((4, 4, 3), np.uint8), SMALL)


def test_what_one_reader_refuses_the_other_reads(tmp_path, image):
    tifffile.imwrite(tmp_path / "untiled.tiff", image, photometric="rgb")
    with Slide(tmp_path / "untiled.tiff", mpp=0.5) as slide:
        assert slide.backend == "tiffslide"
        np.testing.assert_array_equal(slide.read(10, 20, 0, 30, 40), image[20:60, 10:40])


def test_no_microns_per_pixel(tmp_path, image):
    path = written(tmp_path / "bare.tiff", image, mpp=None)
    with Slide(path) as slide, pytest.raises(BadParameter, match=r"mpp.*bare\.tiff"):
        slides.tile(slide, SMALL)
    with Slide(path, mpp=0.5) as slide:
        assert len(slides.tile(slide, SMALL))
    for mpp in (0, float("nan")):
        refused(BadParameter, "mpp", Slide, path, mpp=mpp)


def test_files_that_are_no_slides(tmp_path, path):
    (tmp_path / "text.tiff").write_text("not a slide")
    for name, said in (("nowhere.tiff", "no such file"), ("text.tiff", r"text\.tiff")):
        refused(CorruptFile, said, Slide, tmp_path / name)
    refused(BadParameter, "openslide", Slide, path, backend="asap")


@pytest.mark.parametrize("backend", slides.BACKENDS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_slide(tmp_path, path, backend, share):
    """It is refused when it is opened, or where the data ends: never read as something else."""
    whole = path.read_bytes()
    (tmp_path / "cut.tiff").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CorruptFile, match=r"cut\.tiff"), Slide(tmp_path / "cut.tiff", backend=backend) as slide:
        for level, size in enumerate(slide.levels):
            slide.read(0, 0, level, *size)


def test_a_thumbnail_where_the_file_has_no_small_level(tmp_path, image, monkeypatch):
    path = written(tmp_path / "one.tiff", image, downsamples=(1,))
    monkeypatch.setattr(slides, "LARGEST_THUMBNAIL", 100_000)
    with Slide(path) as slide:
        rgb, downsample = slide.thumbnail(16)
    assert downsample == 16
    np.testing.assert_array_equal(rgb, slides.reduce(image, 16))


def test_tiles_hold_the_tissue(path, image):
    with Slide(path) as slide:
        tiles = slides.tile(slide, dataclasses.replace(SMALL, downsample=4))
        assert (tiles.step, tiles.level, tiles.pixels) == (128, 0, 128)
        assert [f"{x}_{y}" for x, y in tiles.coords] == sorted(f"{x}_{y}" for x, y in tiles.coords)
        assert set(tiles.contours) == {0, 1}
        covered = np.zeros(image.shape[:2], bool)
        for (x, y), share in zip(tiles.coords, tiles.shares, strict=True):
            region = slide.region(x, y, tiles)
            assert region.shape == (128, 128, 3)
            assert abs((region != 255).any(-1).mean() - share) < 0.1 and share >= 0.1
            covered[y : y + 128, x : x + 128] = True
        assert covered[(image != 255).any(-1)].mean() > 0.97


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


def test_tissue_of_another_piece_does_not_count():
    """Two squares of 16 pixels, both in the first region: each has the share of its own piece."""
    mask = np.zeros((64, 64), np.uint8)
    mask[8:24, 8:24] = mask[8:24, 28:44] = 255
    _, shares, pieces = slides.find_tiles(mask, 1, (64, 64), 32, dataclasses.replace(SMALL, least=0.0), 1)
    assert sorted(pieces) == [0, 1] and shares.tolist() == [16**2 / 32**2] * 2
    _, shares, _ = slides.find_tiles(mask, 1, (64, 64), 32, dataclasses.replace(SMALL, least=0.25), 1)
    assert len(shares) == 2, "a share of exactly the least is enough"


def test_order_is_that_of_file_names():
    coords = np.array([[752, 5840], [1024, 512], [1024, 1024], [752, 5840], [100, 0], [1000, 0]])
    ordered = coords[slides.file_order(coords)].tolist()
    assert ordered == [[1000, 0], [100, 0], [1024, 1024], [1024, 512], [752, 5840]]


def test_spacing_decides_the_level(path):
    with Slide(path) as slide:
        half = slides.tile(slide, dataclasses.replace(SMALL, mpp=2.0, region=32))
        assert (half.level, half.pixels, half.step) == (1, 32, 128)
        refused(BadParameter, r"0\.5, 2, 8", slides.tile, slide, dataclasses.replace(SMALL, mpp=1.0))
        resampled = slides.tile(slide, dataclasses.replace(SMALL, mpp=0.9, region=66, resample=True))
        assert (resampled.level, resampled.pixels) == (0, 119)  # 118.8
        assert slide.region(*resampled.coords[0], resampled).shape == (66, 66, 3)
        # the least area is in patches of the level that is read: the smaller piece has 1.1 of level 0, 0.07 of level 1
        for mpp, region, pieces in ((0.5, 128, {0, 1}), (2.0, 32, {0})):
            tiling = dataclasses.replace(SMALL, mpp=mpp, region=region, area=0.1)
            assert set(slides.tile(slide, tiling).contours) == pieces
    with Slide(path, mpp=0.45) as slide:  # near enough: read as it is
        assert slides.tile(slide, SMALL).step == 128


def test_a_slide_without_tissue(tmp_path):
    path = written(tmp_path / "white.tiff", np.full((512, 512, 3), 255, np.uint8))
    read = slides.read_features(slides.extract(path, mean_colour, tmp_path / "white.h5", tiling=SMALL))
    assert len(read["features"]) == len(read["coords"]) == 0


def test_padding_and_holes(path):
    ring = np.zeros((96, 128), np.uint8)
    ring[8:96, 8:128] = 255
    ring[30:70, 40:100] = 0
    plain = dataclasses.replace(SMALL, area=1, hole_area=1)
    args = (ring, 8, (1024, 768), 256)
    everything, shares, _ = slides.find_tiles(*args, plain, 64)
    assert len(everything) == 11  # of 12 one lies in the hole
    inside, _, _ = slides.find_tiles(*args, dataclasses.replace(plain, padding=False), 64)
    assert len(inside) == 5 and (inside.max(0) + 256 <= [1024, 768]).all()
    # a hole is no tissue of the mask in any case: leaving it out takes its rim away, no more
    _, without, _ = slides.find_tiles(*args, dataclasses.replace(plain, drop_holes=True), 64)
    assert (without <= shares).all() and 0 < (shares - without).max() < 0.1
    # the area of a piece is that of its outline, 162 patches of 8 x 8 pixels of the mask, without its hole of 39
    for area, count in ((120, 11), (140, 0)):
        assert len(slides.find_tiles(*args, dataclasses.replace(plain, area=area), 64)[0]) == count


def test_tissue_can_be_given(path):
    mask = np.zeros((48, 64), bool)
    mask[16:32, 8:24] = True
    with Slide(path) as slide:
        tiles = slides.tile(slide, SMALL, mask)
        assert sorted(map(tuple, tiles.coords)) == [(128, 256), (128, 384), (256, 256), (256, 384)]
        refused(BadParameter, "proportions", slides.tile, slide, SMALL, mask[:20])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"region": 0}, "region"), ({"mpp": -1}, "mpp"), ({"median": 4}, "odd"), ({"least": 2}, "0 to 1")],
)
def test_bad_tilings(change, named):
    refused(BadParameter, named, dataclasses.replace, PANDA, **change)


def test_features_are_the_same_for_any_batch(path, tmp_path):
    torch.manual_seed(0)
    model = hvit.build("pocket", patches=4).eval()
    read = []
    for batch in (1, 3, 50):
        options = dict(tiling=SMALL, batch=batch, encoder=model.patch, normalise="half")
        out = slides.extract(path, model.embed_patches, tmp_path / f"{batch}.h5", **options)
        assert not list(tmp_path.glob("*.parts"))
        read.append(slides.read_features(out))
    with Slide(path) as slide:
        tiles = slides.tile(slide, SMALL)
        x = slides.tensor(slide.region(*tiles.coords[4], tiles), "half")
    for found in read:
        assert found["features"].shape == (len(tiles), 16, 48)
        torch.testing.assert_close(found["features"], read[0]["features"], atol=1e-5, rtol=1e-5)
        assert (found["coords"].numpy() == tiles.coords).all()
        with torch.no_grad():
            torch.testing.assert_close(found["features"][4], model.embed_patches(x[None])[0], atol=1e-5, rtol=1e-5)
    assert json.loads(read[0]["settings"])["encoder"] == checkpoint_key(encoder=model.patch)


def test_normalisations():
    pixels = np.full((2, 4, 4, 3), 255, np.uint8)
    assert (slides.tensor(pixels) == 1).all() and slides.tensor(pixels).shape == (2, 3, 4, 4)
    assert (slides.tensor(pixels, "half") == 1).all() and (slides.tensor(0 * pixels, "half") == -1).all()
    assert slides.tensor(pixels, "imagenet")[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)
    refused(BadParameter, "imagenet", slides.tensor, pixels, "none")


def test_stopped_in_the_middle_and_resumed(path, tmp_path):
    """No file of features is there, and the next run ends with the same one."""
    whole = slides.read_features(slides.extract(path, mean_colour, tmp_path / "whole.h5", tiling=SMALL, batch=2))
    out, calls = tmp_path / "stopped.h5", []

    def counted(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mean_colour(x)

    with pytest.raises(KeyboardInterrupt):
        slides.extract(path, counted, out, tiling=SMALL, batch=2)
    assert not out.exists() and parts_of(out) == 3
    with pytest.raises(BadParameter, match="normalise"):  # not with other settings
        slides.extract(path, mean_colour, out, tiling=SMALL, batch=2, normalise="half")
    found = slides.read_features(slides.extract(path, counted, out, tiling=SMALL, batch=2))
    assert len(calls) == -(-len(whole["coords"]) // 2) + 1  # the batch that was stopped is counted twice
    assert torch.equal(found["features"], whole["features"]) and torch.equal(found["coords"], whole["coords"])
    assert not out.with_name("stopped.h5.parts").exists()


def parts_of(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.parts").glob("[0-9]*.safetensors")))


LARGE = """
import sys, torch
from companion import slides
from companion.models import hvit
from companion.ops import record
torch.set_num_threads(1)
torch.manual_seed(0)
model = hvit.build("pocket", patches=4).eval()
tiling = slides.Tiling(region=1024, mpp=0.5, otsu=True, area=4)
slides.extract({path!r}, model.embed_patches, sys.argv[1], tiling=tiling, encoder=model.patch)
print(record.peak_memory_mb())  # getrusage would count the test process, which may be large
"""


@pytest.mark.slow
def test_a_slide_of_50_000_pixels_a_side(tmp_path):
    """Written, tiled and encoded in less than 2 GB; killed in the middle, it ends with the same features."""
    side, path = 50_000, tmp_path / "large.tiff"
    block = np.random.default_rng(0).normal((200, 120, 170), 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)

    def rows(y0, y1):
        strip = np.full((y1 - y0, side, 3), 255, np.uint8)
        for left, top, width, height in ((6_000, 10_000, 9_000, 8_000), (30_000, 25_000, 7_000, 12_000)):
            a, b = max(y0, top), min(y1, top + height)
            if a < b:
                strip[a - y0 : b - y0, left : left + width] = block[np.arange(a, b) % 256][:, np.arange(width) % 256]
        return strip

    slides.write_pyramid(path, rows, (side, side), 0.5, (1, 4, 16, 64))
    code = LARGE.format(path=str(path))

    def run(out):
        return subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)

    whole = run(tmp_path / "whole.h5")
    peak, _ = whole.communicate()
    assert whole.returncode == 0 and int(peak.split()[-1]) < 2_000
    out = tmp_path / "killed.h5"
    kill_when(run(out), lambda: parts_of(out) >= 20, 300)
    assert not out.exists()
    assert run(out).communicate() and out.is_file()
    found, again = (slides.read_features(file) for file in (tmp_path / "whole.h5", out))
    assert len(found["coords"]) > 100 and torch.equal(found["features"], again["features"])


def test_features_of_two_encoders_are_not_mixed(path, tmp_path):
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    out = slides.extract(path, mean_colour, tmp_path / "a.h5", tiling=SMALL, encoder=one)
    before = out.read_bytes()
    assert slides.extract(path, None, out, tiling=SMALL, encoder=one) == out  # there already: nothing is encoded
    with pytest.raises(BadParameter, match=f"encoder.*{checkpoint_key(encoder=one)}"):
        slides.extract(path, mean_colour, out, tiling=SMALL, encoder=two)
    assert out.read_bytes() == before
    refused(BadParameter, "batch", slides.extract, path, mean_colour, out, tiling=SMALL, batch=0)


def test_features_of_other_heads_or_another_scale_are_not_mixed(path, tmp_path):
    one, six = (hvit.PatchEncoder(64, 16, dim=12, depth=1, heads=heads) for heads in (1, 6))
    six.load_state_dict(one.state_dict())
    out = slides.extract(path, mean_colour, tmp_path / "a.h5", tiling=SMALL, encoder=one)
    refused(BadParameter, "heads", slides.extract, path, mean_colour, out, tiling=SMALL, encoder=six)
    refused(BadParameter, "slide_mpp", slides.extract, path, mean_colour, out, tiling=SMALL, encoder=one, mpp=0.501)
    with h5py.File(out, "r+") as file:
        settings = json.loads(file.attrs["settings"])
        del settings["heads"], settings["slide_mpp"]  # a file of an earlier version
        file.attrs["settings"] = json.dumps(settings)
    assert slides.extract(path, mean_colour, out, tiling=SMALL, encoder=six) == out


def test_a_damaged_slide_leaves_no_features(path, tmp_path):
    whole = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:  # a tile in the middle of the tissue, overwritten
        page = file.pages[0]
        start, length = page.dataoffsets[4 * 1 + 1], page.databytecounts[4 * 1 + 1]
    whole[start : start + length] = b"\xff" * length
    (tmp_path / "damaged.tiff").write_bytes(whole)
    with pytest.raises(CorruptFile, match=r"damaged\.tiff: level 0"):
        slides.extract(tmp_path / "damaged.tiff", mean_colour, tmp_path / "damaged.h5", tiling=SMALL)
    assert not (tmp_path / "damaged.h5").exists()


def test_files_that_are_no_features(tmp_path, path):
    out = slides.extract(path, mean_colour, tmp_path / "a.h5", tiling=SMALL)
    (tmp_path / "cut.h5").write_bytes(out.read_bytes()[:-200])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros(3)
    for name in ("nowhere", "cut", "other"):
        refused(CorruptFile, rf"{name}\.h5", slides.read_features, tmp_path / f"{name}.h5")


@pytest.mark.parametrize("size", [(1, 1), (255, 257), (1030, 515)])
def test_pyramids_of_odd_sizes(tmp_path, size):
    image = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path = written(tmp_path / "odd.tiff", image)
    with tifffile.TiffFile(path) as file:
        below = slides.reduce(image, 4)
        for page, expected in zip(file.pages, (image, below, slides.reduce(below, 4)), strict=True):
            np.testing.assert_array_equal(page.asarray(), expected)
        assert [page.subfiletype for page in file.pages] == [0, 1, 1]


def test_a_pyramid_that_fails_leaves_nothing(tmp_path):
    def rows(y0: int, y1: int) -> np.ndarray:
        if y0:
            raise RuntimeError("no more")
        return np.zeros((y1 - y0, 300, 3), np.uint8)

    refused(RuntimeError, "no more", slides.write_pyramid, tmp_path / "a.tiff", rows, (300, 3000), 0.5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadParameter, match="multiple"):
        slides.write_pyramid(tmp_path / "a.tiff", rows, (300, 300), 0.5, downsamples=(1, 4, 6))


def test_heatmaps_lie_on_the_slide(path, tmp_path, image, monkeypatch):
    with Slide(path) as slide:
        tiles = slides.tile(slide, SMALL)
        maps = [np.full((8, 8), 0.99 if i == 0 else 0.0) for i in range(len(tiles))]
        files = slides.write_heatmap(slide, tiles, maps, tmp_path / "map", downsample=4)
        few = slides.write_heatmap(slide, tiles, maps, tmp_path / "few", downsample=16, threshold=0.5)
        refused(ValueError, "shorter", slides.write_heatmap, slide, tiles, maps[:-1], tmp_path / "none")
        monkeypatch.setattr(slides, "LARGEST_THUMBNAIL", 1000)
        refused(BadParameter, "downsample", slides.write_heatmap, slide, tiles, [], tmp_path / "none", downsample=1)
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


def test_regions_as_jpeg(path, image, tmp_path):
    """As HS2P stores regions on disk; it is in the settings of the features' file; earlier files are raw."""
    tiling = dataclasses.replace(SMALL, jpeg=True)
    assert PANDA.jpeg and not SMALL.jpeg
    with Slide(path) as slide:
        tiles = slides.tile(slide, tiling)
        x, y = tiles.coords[0]
        found, raw = slide.region(x, y, tiles), slide.region(x, y, slides.tile(slide, SMALL))
    np.testing.assert_array_equal(raw, image[y : y + 128, x : x + 128])
    Image.fromarray(raw).save(tmp_path / "region.jpg")
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "region.jpg")))
    assert (found != raw).any()
    features = slides.extract(path, mean_colour, tmp_path / "features.h5", tiling=tiling)
    refused(BadParameter, "jpeg", slides.extract, path, mean_colour, features, tiling=SMALL)
    old = slides.extract(path, mean_colour, tmp_path / "old.h5", tiling=SMALL)
    with h5py.File(old, "r+") as file:
        settings = json.loads(file.attrs["settings"])
        del settings["jpeg"]
        file.attrs["settings"] = json.dumps(settings)
    assert slides.extract(path, mean_colour, old, tiling=SMALL) == old
    refused(BadParameter, "jpeg", slides.extract, path, mean_colour, old, tiling=tiling)


def test_outlines_lose_pixels_where_a_side_is_no_multiple(path):
    """As in HS2P: to level 0 and back with truncation. A square of the mask loses its last rows and columns."""
    mask = np.zeros((65, 65), np.uint8)
    mask[8:40, 8:40] = 255
    tiling = dataclasses.replace(SMALL, least=0.0)
    _, whole, _ = slides.find_tiles(mask, 16, (1040, 1040), 1024, tiling, 16)
    _, less, _ = slides.find_tiles(mask, (1039 / 65, 1039 / 65), (1039, 1039), 1024, tiling, 16)
    assert whole[0] == round(32**2 / 64**2, 3) and less[0] == pytest.approx(31**2 / 64**2, abs=6e-4)
