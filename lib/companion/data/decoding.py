"""Pixels of image files: PIL says what a file is, torchvision decodes plain JPEGs and PNGs, PIL all others."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image, read_file

SMALL = 2**15  # pixels of a PNG that PIL decodes as fast


def pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    """The pixels of an image file that was opened by its path: uint8 (H, W, 3), or (H, W) for the mode "L".

    Those of `image.convert(mode)` to the bit; torchvision's calls of libjpeg-turbo and libpng take about 0.75 and 0.5
    of PIL's time. Raises what PIL raises.
    """
    if image.format in ("JPEG", "PNG") and image.mode in ("L", mode) and "transparency" not in image.info:
        try:
            data = read_file(getattr(image, "filename", ""))
            found = decode_image(data, ImageReadMode.RGB if mode == "RGB" else ImageReadMode.GRAY)
        except RuntimeError:
            pass  # damaged, or too unusual: PIL reads it, or says what is wrong
        else:
            if found.element_size() == 1 and found.shape[1:] == image.size[::-1]:
                return np.ascontiguousarray(found.permute(1, 2, 0).numpy()) if mode == "RGB" else found[0].numpy()
    return np.array(image.convert(mode))


def picture(image: Image.Image) -> Image.Image:
    """An image file that was opened by its path as an RGB image, by the faster decoder of its kind and size."""
    if image.format == "PNG" and image.width * image.height > SMALL:
        return Image.fromarray(pixels(image))
    return image.convert("RGB")


def upright(pixels: np.ndarray, info: dict[Any, Any]) -> np.ndarray:
    """Pixels (H, W, 3) turned as EXIF in `info`, a PIL image's, says that the camera was held."""
    if not any(kind in str(key).lower() for key in info for kind in ("exif", "xmp")):
        return pixels
    image = Image.fromarray(pixels)
    image.info = info
    return np.array(ImageOps.exif_transpose(image))
