"""Slides as image pyramids: both libraries, damaged files, thumbnails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from companion.data import pyramids
from companion.data.pyramids import Slide
from companion.errors import CorruptFile


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
    return pyramids.write_pyramid(path, image, mpp, **options)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return drawn()


@pytest.fixture(scope="module")
def path(tmp_path_factory, image) -> Path:
    return written(tmp_path_factory.mktemp("slides") / "slide.tiff", image)


@pytest.mark.parametrize("backend", pyramids.BACKENDS)
def test_both_readers_give_the_pixels_and_refuse_a_truncated_file(path, image, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(pyramids, "BACKENDS", {backend: pyramids.BACKENDS[backend]})
    with Slide(path) as slide:
        assert slide.backend == backend and slide.size == (1024, 768)
        assert slide.levels == [(1024, 768), (256, 192), (64, 48)] and slide.downsamples == [1, 4, 16]
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        np.testing.assert_array_equal(slide.read(64, 32, 1, 50, 40), pyramids.reduce(image, 4)[8:48, 16:66])
        around = np.pad(image, ((200, 5000), (200, 5000), (0, 0)), constant_values=255)  # outside there is white
        for x, y in ((100, 60), (-40, -30), (900, 700), (5000, 5000)):
            np.testing.assert_array_equal(slide.read(x, y, 0, 200, 200), around[y + 200 :, x + 200 :][:200, :200])
    (tmp_path / "cut.tiff").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=r"cut\.tiff"), Slide(tmp_path / "cut.tiff") as slide:
        for level, size in enumerate(slide.levels):
            slide.read(0, 0, level, *size)


def test_a_missing_reader_and_an_untiled_file_are_read_by_the_other(path, tmp_path, image, monkeypatch):
    tifffile.imwrite(tmp_path / "untiled.tiff", image, photometric="rgb")
    with Slide(tmp_path / "untiled.tiff", mpp=0.5) as slide:
        assert slide.backend == "tiffslide"
        np.testing.assert_array_equal(slide.read(10, 20, 0, 30, 40), image[20:60, 10:40])
    monkeypatch.setitem(sys.modules, "openslide", None)
    with Slide(path) as slide:
        assert slide.backend == "tiffslide"


def test_another_image_of_the_file_is_not_a_level(path, tmp_path, image, monkeypatch):
    """A label that is tiled, and flagged as reduced, as the levels are."""
    other = tmp_path / "label.tiff"
    other.write_bytes(path.read_bytes())
    small = dict(append=True, tile=(256, 256), photometric="rgb", subfiletype=1, metadata=None)
    tifffile.imwrite(other, image[:40, :20], **small)
    monkeypatch.delitem(pyramids.BACKENDS, "tiffslide")
    with Slide(path) as slide, Slide(other) as labelled:
        assert len(labelled.levels) == 4
        for downsample in (1, 4, 16, 36, 64):
            assert labelled.level(downsample) == slide.level(downsample)


def test_what_was_not_scanned_is_white(path, monkeypatch):
    colour, alpha = np.mgrid[:256:5, :256:5].astype(np.uint8)
    drawn = np.stack([colour, colour // 2, 255 - colour, alpha], 2)
    with Slide(path) as slide:
        part = Image.fromarray(drawn)
        monkeypatch.setattr(slide, "_slide", SimpleNamespace(read_region=lambda *place: part, close=lambda: None))
        found = slide.read(0, 0, 0, *alpha.shape)
    share = drawn[..., 3:] / 255
    np.testing.assert_array_equal(found, np.floor(drawn[..., :3] * share + 255 * (1 - share) + 0.5))


def test_a_file_without_a_small_level_is_reduced_band_by_band(tmp_path, image, monkeypatch):
    monkeypatch.setattr(pyramids, "LARGEST_THUMBNAIL", 100_000)
    with Slide(written(tmp_path / "one.tiff", image, downsamples=(1,))) as slide:
        rgb, downsample = slide.thumbnail(16)
        found = []  # no more reduced than the limit asks for, also where a larger image is asked for
        count = image.size // 3
        for largest in (count, count - 1, count // 9 + 1, count // 10):
            monkeypatch.setattr(pyramids, "LARGEST_THUMBNAIL", largest)
            found.append(slide.thumbnail(1)[1])
    assert downsample == 16 and found == [1, 2, 3, 4]
    np.testing.assert_array_equal(rgb, pyramids.reduce(image, 16))
