"""Decodes image files to pixels; the only module that interprets their value range.

    with opened(path) as image:
        pixels(image)              uint8 (H, W, 3)
    unit(path)                     float32 (H, W) in 0 to 1, at full bit depth; DICOM too

PIL identifies a file; torchvision decodes plain JPEGs and PNGs, PIL all others, tifffile the TIFFs that PIL does not
read or reads wrongly, pydicom DICOM. Full scale is 255 for 8 bits, 65535 for 16, or given by `BitsPerSample` of a TIFF
and `BitsStored` of a DICOM, 1 for floats; for 32-bit integers it is the smaller of 255 and 65535 that covers the
values. Values without a full scale - NaN, negative values, floats above 1, 12 bits stored as 16 - raise an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import error as StructError
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image, read_file

from ..errors import BadParameter, CorruptFile, extra

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif")  # endings of image files; of a GIF the first frame is read
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, StructError, Image.DecompressionBombError)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_BITS, _WHITE, _FORMAT = 258, 262, 339  # TIFF's tags BitsPerSample, PhotometricInterpretation, SampleFormat


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Context manager: an open image file; errors while decoding it in the block become errors of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFile: it is truncated, no image, a stack of several, or has values without a full scale.
    """
    try:
        image: Image.Image
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            if Path(path).suffix.lower() not in (".tif", ".tiff"):
                raise
            image = Image.fromarray(_eight(*_tiff(path)))
        with image:
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                first = image.size
                image.seek(1)
                if image.size == first:  # smaller further pages are previews
                    raise ValueError("it is a stack of several images: save the one that is meant as a file of its own")
                image.seek(0)
            yield image
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise CorruptFile(path, str(error)) from error


def deep(image: Image.Image) -> bool:
    """Whether an open file has values that exceed 8 bits."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        return max(tags.get(_BITS, (1,))) > 8 or 2 in tags.get(_FORMAT, (1,))
    if image.mode[0] in "IF" or image.format != "PNG" or image.mode not in ("RGB", "RGBA", "LA"):
        return image.mode[0] in "IF"
    with Path(getattr(image, "filename", "")).open("rb") as file:  # PIL keeps the upper 8 bits without a warning
        return file.read(25)[24:] == b"\x10"


def pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    """The pixels of an image that was opened from a path: uint8 (H, W, 3), or (H, W) for the mode "L".

    For 8 bits bit-identical to `image.convert(mode)`; torchvision's libjpeg-turbo and libpng take about 0.75 and 0.5 of
    PIL's time. Raises PIL's errors, and `ValueError`: no full scale.
    """
    if deep(image):
        return np.array(Image.fromarray(_eight(*_values(image))).convert(mode))
    fast = image.mode in ("L", mode) and "transparency" not in image.info and not getattr(image, "decoderconfig", ())
    if fast and image.format in ("JPEG", "PNG"):
        try:
            data = read_file(getattr(image, "filename", ""))
            found = decode_image(data, ImageReadMode.RGB if mode == "RGB" else ImageReadMode.GRAY)
        except RuntimeError:
            pass  # damaged, or unusual: PIL reads it, or raises the error
        else:
            if found.element_size() == 1 and found.shape[1:] == image.size[::-1]:
                return np.ascontiguousarray(found.permute(1, 2, 0).numpy()) if mode == "RGB" else found[0].numpy()
    return np.array(image.convert(mode))


def picture(image: Image.Image, rotated: bool = False) -> Image.Image:
    """An image that was opened from a path as RGB; with `rotated` upright, see `upright`."""
    found = pixels(image)
    return Image.fromarray(upright(found, image) if rotated else found)


def in_memory(image: Image.Image) -> Image.Image:
    """An image that need not have a file as RGB, upright: what `picture` gives for its file.

    Raises `BadParameter`: no full scale.
    """
    found = Image.fromarray(_scaled(image, _eight)) if image.mode[0] in "IF" else image
    return Image.fromarray(upright(np.asarray(found.convert("RGB")), image))


def unit_in_memory(image: Image.Image) -> np.ndarray:
    """An image that need not have a file as float32 (H, W) in 0 to 1, as by `unit`.

    Raises `BadParameter`: no full scale.
    """
    return _scaled(image, _unit) if image.mode[0] in "IF" else np.asarray(image.convert("L"), np.float32) / 255


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) of an image that is decoded, rotated by its EXIF orientation, which PIL drops where it has
    rotated a TIFF itself."""
    if (orientation := image.getexif().get(ExifTags.Base.Orientation, 1)) == 1:
        return pixels
    stored = Image.fromarray(pixels)
    stored.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(stored))


def unit(path: str | Path, colour: bool = False, shortest: int = 0) -> np.ndarray:
    """An image as float32 (H, W) in 0 to 1, at full bit depth; with `colour` (H, W, 3).

    A JPEG whose sides stay at least `shortest` is decoded at a half, quarter or eighth of its size; 0: at
    its own. A DICOM's colour space, and first window or VOI LUT are applied; MONOCHROME1 is inverted.

    Raises as `opened`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.suffix.lower() in (".dcm", ".dicom"):
        values = _dicom(path)
    else:
        with opened(path) as image:
            if image.format is None:  # a TIFF that PIL does not read
                values = _unit(*_tiff(path))
            elif deep(image):
                values = _unit(*_values(image))
            else:
                if shortest:
                    image.draft(None, (shortest, shortest))
                found = pixels(image, "RGB" if colour else "L")
                return np.divide(found, np.float32(255), dtype=np.float32)  # in one pass
    if colour:
        return values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
    return values @ _GREY if values.ndim == 3 else values


def check_proportions(path: str | Path, found: Any, other: Any) -> None:
    """Raise `CorruptFile` of a file unless its pixels, (..., H, W), have the proportions of those of its pair, to one
    pixel."""
    (high, wide), (height, width) = found.shape[-2:], other.shape[-2:]
    if abs(high * width - wide * height) > max(height, width):
        raise CorruptFile(path, f"it is {wide}x{high}, its pair {width}x{height}: other proportions")


# --- values and full scale --------------------------------------------------------------------------------------------


def _values(image: Image.Image) -> tuple[np.ndarray, int]:
    """The stored values of a file with more than 8 bits, (H, W) or (H, W, 3), and its declared bits (0: none)."""
    path = getattr(image, "filename", "")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(_BITS, (16,)))
        if image.mode[0] not in "IF":  # PIL keeps the upper bits of colours, and confuses those of separate planes
            return _tiff(path)
        values = np.asarray(image)
        if tags.get(_WHITE) == 0 and bits <= 16 and image.mode != "F":
            values = 2**bits - 1 - values
        return values, _declared(bits, 2 in tags.get(_FORMAT, (1,)))
    if image.mode[0] in "IF":
        return np.asarray(image), 0
    try:
        return decode_image(read_file(path), ImageReadMode.RGB).permute(1, 2, 0).numpy(), 0
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _scaled(image: Image.Image, scale: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    try:
        return scale(*_values(image))
    except ValueError as error:
        raise BadParameter("images", f"an image of mode {image.mode}", f"values with a full scale ({error})") from error


def _tiff(path: str | Path) -> tuple[np.ndarray, int]:
    import tifffile  # imported here because few files need it

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            values, bits = page.asarray(), page.bitspersample
            if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                values = np.moveaxis(values, 0, -1)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"no TIFF that can be decoded ({type(error).__name__}: {error})") from error
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] >= 3 else values[..., 0]
    if (values.ndim != 2 and values.shape[2:] != (3,)) or values.dtype.kind not in "uif":
        raise ValueError(f"its pixels are {values.dtype} {values.shape}; grey or red, green and blue are expected")
    return values, _declared(bits, values.dtype.kind == "i") if values.dtype.kind != "f" else 0


def _declared(bits: int, signed: bool) -> int:
    """The declared bits of a file's integers: none for 32; for 16 `_full_scale` decides."""
    return bits - signed if bits - signed < 16 else 0


def _full_scale(values: np.ndarray, bits: int) -> int:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has pixels that are NaN or infinite")
    if low < 0:
        raise ValueError(f"its values go from {low:g} to {high:g}: scale them to 0..1 (floats) or 0..65535")
    if bits:
        full = 2**bits - 1
    elif values.dtype.kind == "f":  # not guessed from an image's values: those of one series would be scaled apart
        full = 1
    else:
        full = 255 if values.dtype != np.uint16 and high <= 255 else 65535
    if high > full or (full > 4095 and 0 < high < 4096):
        raise ValueError(
            f"its values end at {high:g}, and full scale is 1 for floats, else 255 or 65535 (with 12 bits or less in "
            "16 an image would be nearly black): scale them to it, all images of a series alike"
        )
    return full


def _unit(values: np.ndarray, bits: int) -> np.ndarray:
    return values.astype(np.float32) / _full_scale(values, bits)


def _eight(values: np.ndarray, bits: int) -> np.ndarray:
    full = _full_scale(values, bits)
    if values.dtype.kind == "f":
        return np.rint(values.astype(np.float32) / full * 255).astype(np.uint8)
    return (values.astype(np.int64) * 256 // (full + 1)).astype(np.uint8)


def _dicom(path: Path) -> np.ndarray:
    """float32 (H, W) or (H, W, 3) in 0 to 1."""
    with extra("xrays"):
        import pydicom
        from pydicom.pixels import processing

    try:
        file = pydicom.dcmread(path)
        values, bits, kind = file.pixel_array, int(file.BitsStored), file.get("PhotometricInterpretation")
        frames = int(file.get("NumberOfFrames") or 1)
        if frames != 1 or kind == "PALETTE COLOR" or "ModalityLUTSequence" in file:
            what = f"{frames} frames, {kind}{', a modality LUT' * ('ModalityLUTSequence' in file)}"
            raise ValueError(f"it has {what}; one image, without a palette or a modality LUT, is expected")
        low, high = 0.0, 2.0**bits - 1
        if file.get("PixelRepresentation"):
            low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        if values.ndim == 2 and (file.get("VOILUTSequence") or file.get("WindowWidth")):
            values = processing.apply_rescale(values, file)
            slope, shift = (float(file.get(f"Rescale{name}") or of) for name, of in (("Slope", 1), ("Intercept", 0)))
            low, high = low * slope + shift, high * slope + shift
            if table := file.get("VOILUTSequence"):
                values = np.rint(values).astype(np.int64)
                low, high = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
            values = processing.apply_voi_lut(values, file)
        elif values.ndim == 2 and bits == 16 and 0 < int(values.max()) - int(values.min()) < 4096:
            raise ValueError(
                f"its values, {values.min()} to {values.max()}, fill little of the 16 bits stored, and it has no "
                "window (WindowCenter, WindowWidth) and no VOI LUT: the image would be a flat grey"
            )
        found = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
        if not (found.min() >= -1e-6 and found.max() <= 1 + 1e-6):  # NaN too
            raise ValueError(f"its pixels are {found.min():g} to {found.max():g} of the range that it declares")
        return 1 - found if kind == "MONOCHROME1" else found
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise CorruptFile(path, f"not a readable DICOM ({type(error).__name__}: {error})") from error
