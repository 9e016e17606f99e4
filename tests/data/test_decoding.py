"""Decoded pixels equal PIL's bit for bit, with any decoder. Files of more than 8 bits: tests/test_odd_files.py."""

import io

import numpy as np
import pytest
from PIL import Image

from companion.data.decoding import pixels, unit, upright

NOISE = np.random.default_rng(0).integers(256, size=(45, 67, 4), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[..., :3]).resize((131, 77), Image.Resampling.BICUBIC))
COLOUR, GREY = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH).convert("L")
FILES = {f"{s}.jpg": (COLOUR, {"quality": 95 - 20 * s, "subsampling": s}) for s in (0, 1, 2)}
FILES |= {f"grey.{end}": (GREY, {}) for end in ("jpg", "png", "bmp")}
FILES |= {"cmyk.jpg": (COLOUR.convert("CMYK"), {}), "rgb.png": (COLOUR, {}), "alpha.png": (Image.fromarray(NOISE), {})}
FILES |= {"palette.png": (COLOUR.quantize(17), {}), "bits.png": (GREY.convert("1"), {})}
FILES |= {"few.png": (GREY.quantize(9).convert("L"), {"bits": 4}), "named.png": (COLOUR, {"transparency": (9, 9, 9)})}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pils(tmp_path, name, mode):
    image, options = FILES[name]
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened, Image.open(tmp_path / name) as again:
        found = pixels(opened, mode)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, np.asarray(again.convert(mode)))


def test_a_large_jpeg_is_decoded_at_half_of_its_size_where_that_is_enough(tmp_path):
    COLOUR.convert("L").resize((400, 300), Image.Resampling.BICUBIC).save(path := tmp_path / "a.jpg", quality=95)
    whole = unit(path)
    np.testing.assert_array_equal(whole, np.asarray(Image.open(path), np.float32) / 255)
    np.testing.assert_array_equal(unit(path, shortest=151), whole)
    half = unit(path, shortest=150)
    assert half.shape == (150, 200) and unit(path, True, 75).shape == (75, 100, 3)
    np.testing.assert_allclose(half, whole.reshape(150, 2, 200, 2).mean((1, 3)), atol=3 / 255)


def test_upright_is_as_pil_rotates():
    for orientation, expected in {1: SMOOTH, 3: SMOOTH[::-1, ::-1], 6: np.rot90(SMOOTH, -1)}.items():
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        COLOUR.save(file, "PNG", exif=exif)
        with Image.open(file) as image:
            np.testing.assert_array_equal(upright(np.asarray(image), image), expected)
    np.testing.assert_array_equal(upright(SMOOTH, COLOUR), SMOOTH)
