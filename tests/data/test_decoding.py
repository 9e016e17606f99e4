"""Decoded pixels equal PIL's bit for bit, with any decoder."""

import io

import numpy as np
import pytest
from PIL import Image

from companion.data.decoding import pixels, upright

NOISE = np.random.default_rng(0).integers(256, size=(45, 67, 4), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[..., :3]).resize((131, 77), Image.Resampling.BICUBIC))


def files() -> dict[str, tuple[Image.Image, dict]]:
    """Images by file name, with the options of `save`."""
    rgb, grey = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH).convert("L")
    found = {f"{s}.jpg": (rgb, {"quality": 95 - 20 * s, "subsampling": s}) for s in (0, 1, 2)}
    found |= {f"grey.{end}": (grey, {}) for end in ("jpg", "png", "bmp")}
    found |= {"progressive.jpg": (rgb, {"progressive": True}), "cmyk.jpg": (rgb.convert("CMYK"), {})}
    found |= {"rgb.png": (rgb, {}), "rgb.webp": (rgb, {"lossless": True}), "alpha.png": (Image.fromarray(NOISE), {})}
    found |= {"palette.png": (rgb.quantize(17), {}), "bits.png": (grey.convert("1"), {})}
    found |= {"few.png": (grey.quantize(9).convert("L"), {"bits": 4}), "named.png": (rgb, {"transparency": (9, 9, 9)})}
    return found


@pytest.mark.parametrize("name", files())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pils(tmp_path, name, mode):
    image, options = files()[name]
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened, Image.open(tmp_path / name) as again:
        found = pixels(opened, mode)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, np.asarray(again.convert(mode)))


@pytest.mark.parametrize("end", ["jpg", "png"])
def test_half_a_file_is_refused_as_pil_does(tmp_path, end):
    Image.fromarray(SMOOTH).save(tmp_path / f"a.{end}")
    whole = (tmp_path / f"a.{end}").read_bytes()
    (tmp_path / f"a.{end}").write_bytes(whole[: len(whole) // 2])
    with Image.open(tmp_path / f"a.{end}") as image, pytest.raises((OSError, SyntaxError)):
        pixels(image)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_upright_is_as_pil_turns(orientation):
    exif, file = Image.Exif(), io.BytesIO()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(SMOOTH).save(file, "PNG", **({"exif": exif} if orientation else {}))
    with Image.open(file) as image:
        found = upright(np.asarray(image), image.info)
    expected = {3: SMOOTH[::-1, ::-1], 6: np.rot90(SMOOTH, -1)}.get(orientation, SMOOTH)
    np.testing.assert_array_equal(found, expected)
