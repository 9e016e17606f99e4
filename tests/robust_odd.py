"""Unusual user files, each read correctly or refused by name: for test_odd_files.py.

A case of `ODD` is (a reader called with an empty folder, the expected value, or for a refusal a pattern).
"""

import itertools
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
import rasterio
import tifffile
import torch
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from safetensors.torch import save_file

from companion import backbones, climate, detectors
from companion.data import (
    attributes,
    classification,
    detection,
    domains,
    landcover,
    pretraining,
    restoration,
    slides,
    tracking,
    xrays,
)
from companion.evaluation.metrics.detection import evaluate
from companion.models.dmt.teachers import read as read_teacher
from companion.ops.files import read_json
from companion.tracking import Files

Read = Callable[[Path], object]
ODD: dict[str, tuple[Read, object]] = {}
BOM = "\ufeff"
DEEP = "[" * 100_000


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


# --- images of every depth, by three readers --------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT, SIXTEEN = np.rint(RAMP * 255).astype(np.uint8), np.rint(RAMP * 65535).astype(np.uint16)
TWELVE = np.rint(RAMP * 4095).astype(np.uint16)


def rgb(values: np.ndarray, alpha: bool = False) -> np.ndarray:
    return np.stack([values] * (4 if alpha else 3), -1)


def tiff(values: np.ndarray, **options) -> Callable[[Path], object]:
    return lambda path: tifffile.imwrite(path, values, **{"photometric": "minisblack"} | options)


def pil(values: np.ndarray, mode: str | None = None, **options) -> Callable[[Path], object]:
    image = Image.fromarray(values)
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def opencv(values: np.ndarray) -> Callable[[Path], object]:
    return lambda path: cv2.imwrite(str(path), values)


def holed(value: float) -> np.ndarray:
    found = RAMP.astype(np.float32)
    found[3, 3] = value
    return found


def pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        for values in (SIXTEEN, SIXTEEN[::2, ::2]):
            file.write(values, photometric="minisblack")


WHITE, COLOUR = {"photometric": "miniswhite"}, {"photometric": "rgb"}
SCALE = "full scale is 1"
FLIPPED = RAMP[::-1, ::-1]  # EXIF's orientation 3
IMAGES: dict[str, tuple[Callable[[Path], object], object]] = {
    "float32 to 1.tif": (tiff(RAMP.astype(np.float32)), RAMP),
    "float32 to 255.tif": (tiff((RAMP * 255).astype(np.float32)), RAMP),
    "float32 to 65535.tif": (tiff((RAMP * 65535).astype(np.float32)), RAMP),
    "float16.tif": (tiff(RAMP.astype(np.float16)), RAMP),
    "float64.tif": (tiff(RAMP), RAMP),
    "float32 of colours.tif": (tiff(rgb(RAMP).astype(np.float32), **COLOUR), RAMP),
    "int32 to 255.tif": (tiff(EIGHT.astype(np.int32)), RAMP),
    "int32 to 65535.tif": (tiff(SIXTEEN.astype(np.int32)), RAMP),
    "uint32.tif": (tiff(SIXTEEN.astype(np.uint32)), RAMP),
    "int16.tif": (tiff((SIXTEEN // 2).astype(np.int16)), RAMP),
    "int8.tif": (tiff((EIGHT // 2).astype(np.int8)), RAMP),
    "uint16.tif": (tiff(SIXTEEN), RAMP),
    "uint16 of colours.tif": (tiff(rgb(SIXTEEN), **COLOUR), RAMP),
    "uint16 of planes.tif": (
        tiff(np.moveaxis(rgb(SIXTEEN), -1, 0), planarconfig="separate", **COLOUR), RAMP),
    "uint16, 0 is white.tif": (tiff(65535 - SIXTEEN, **WHITE), RAMP),
    "uint8, 0 is white.tif": (tiff(255 - EIGHT, **WHITE), RAMP),
    "uint16, smaller pages.tif": (pyramid, RAMP),
    "uint8 of colours.tif": (tiff(rgb(EIGHT), **COLOUR), RAMP),
    "uint16.png": (pil(SIXTEEN), RAMP),
    "uint16 of colours.png": (opencv(rgb(SIXTEEN)), RAMP),
    "uint16 with alpha.png": (opencv(rgb(SIXTEEN, True)), RAMP),
    "uint16.pgm": (pil(SIXTEEN), RAMP),
    "grey and alpha.png": (pil(np.stack([EIGHT, EIGHT // 2 + 128], -1)), RAMP),
    "palette.png": (pil(EIGHT, "P"), RAMP),
    "one bit.png": (pil(RAMP > 0.5), RAMP > 0.5),
    "first of several.gif": (pil(EIGHT, save_all=True, append_images=[Image.fromarray(255 - EIGHT)]), RAMP),
    "lossless.avif": (pil(rgb(EIGHT), quality=100, subsampling="4:4:4"), RAMP),
    "lossless.webp": (pil(rgb(EIGHT), lossless=True), RAMP),
    "four inks.tif": (pil(rgb(EIGHT), "CMYK"), RAMP),
    "12 bits in 16.png": (pil(TWELVE), SCALE),
    "12 bits in 16.tif": (tiff(TWELVE), SCALE),
    "12 bits in 16, colours.png": (opencv(rgb(TWELVE)), SCALE),
    "12 bits in 16, colours.tif": (tiff(rgb(TWELVE), **COLOUR), SCALE),
    "12 bits in int16.tif": (tiff(TWELVE.astype(np.int16)), SCALE),
    "8 bits in 16.png": (pil(EIGHT.astype(np.uint16)), SCALE),
    "float32 to 1000.tif": (tiff((RAMP * 1000).astype(np.float32)), SCALE),
    "float32 to 1e6.tif": (tiff((RAMP * 1e6).astype(np.float32)), SCALE),
    "float32 below 0.tif": (tiff((RAMP - 0.5).astype(np.float32)), "from -0.5 to 0.5"),
    "int16 below 0.tif": (tiff(SIXTEEN.astype(np.int32).astype(np.int16)), "values go from -"),
    "uint32 too large.tif": (tiff(SIXTEEN.astype(np.uint32) * 100), SCALE),
    "NaN.tif": (tiff(holed(np.nan)), "NaN or infinite"),
    "infinite.tif": (tiff(holed(np.inf)), "NaN or infinite"),
    "complex.tif": (tiff(RAMP.astype(np.complex64)), "its pixels are complex64"),
    "stack.tif": (tiff(np.stack([EIGHT] * 3)), "a stack of several images"),
    "stack of 16 bits.tif": (tiff(np.stack([SIXTEEN] * 3)), "a stack of several images"),
    "a table.png": (lambda path: text(path, "a,b\n1,2\n"), "cannot identify image file"),
    "a table.tif": (lambda path: text(path, "a,b\n1,2\n"), "no TIFF that can be decoded"),
}  # fmt: skip


def of_folder(write: Callable, name: str, folder: Path) -> np.ndarray:
    for group in "ab":
        (folder / group).mkdir()
        write(folder / group / name)
    return np.asarray(classification.image_folder(folder)["train"].picture(0))[..., 1] / 255


def of_radiograph(write: Callable, name: str, folder: Path, colour: bool) -> np.ndarray:
    write(folder / name)
    found = xrays.read_image(folder / name, colour)
    return found[..., 1] if colour else found


def of_video(write: Callable, name: str, folder: Path) -> np.ndarray:
    write(folder / name)
    return tracking.read_frame(folder / name, folder / name)[..., 4] / 255


for name, (write, expected) in IMAGES.items():
    ODD[f"own image: {name}"] = partial(of_folder, write, name), expected
    ODD[f"radiograph: {name}"] = partial(of_radiograph, write, name, colour=False), expected
    if "colours" in name or isinstance(expected, str):
        ODD[f"fundus image: {name}"] = partial(of_radiograph, write, name, colour=True), expected
    refused = any(word in name for word in ("int16", "int8.", "int32", "float", " 16", "NaN", "inf", "complex"))
    ODD[f"frame: {name}"] = (
        partial(of_video, write, name),
        "stack|not of 8 bits|pixels are|NaN" if refused else expected,
    )


def turned(folder: Path, write: Callable, name: str) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 3
    return of_folder(partial(write, exif=exif), name, folder)


for name, values in {"8 bits.png": EIGHT, "16 bits.png": SIXTEEN, "8 bits.tif": EIGHT, "16 bits.tif": SIXTEEN}.items():
    upside = partial(turned, write=lambda path, exif, values=values: Image.fromarray(values).save(path, exif=exif))
    ODD[f"own image on its head: {name}"] = partial(upside, name=name), FLIPPED

# --- DICOM ------------------------------------------------------------------------------------------------------------

LUT = np.arange(256, dtype=np.uint8)
PALETTE: dict[str, object] = {
    f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 8] for colour in ("Red", "Green", "Blue")
}
PALETTE |= {f"{colour}PaletteColorLookupTableData": LUT[::-1].tobytes() for colour in ("Red", "Green", "Blue")}


def dicom(values: np.ndarray, folder: Path, kind: str = "MONOCHROME2", bits: int = 16, **more: object) -> np.ndarray:
    file, colour = pydicom.Dataset(), values.shape[-1] == 3
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = values.shape[-3:-1] if colour else values.shape[-2:]
    file.SamplesPerPixel, file.BitsAllocated = (3 if colour else 1), values.dtype.itemsize * 8
    file.BitsStored, file.HighBit, file.PhotometricInterpretation = bits, bits - 1, kind
    file.PixelRepresentation = int(values.dtype.kind == "i")
    if colour:
        file.PlanarConfiguration = 0
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    file.save_as(folder / "a.dcm", enforce_file_format=True)
    return xrays.read_image(folder / "a.dcm")


def table(entries: list[int], bits: int) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), 0, bits])
    item.add_new("LUTData", "US", entries)
    return pydicom.Sequence([item])


def windowed(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """DICOM's linear window, PS3.3 C.11.2.1.2."""
    return np.clip((values.astype(float) - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


CT = TWELVE.astype(np.int16) - 1024
WINDOW = {"WindowCenter": 1000, "WindowWidth": 1500}
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}
YBR = np.stack([EIGHT, np.full_like(EIGHT, 128), np.full_like(EIGHT, 128)], -1)
for name, (values, options, expected) in {
    "12 bits": (TWELVE, {"bits": 12}, RAMP),
    "12 bits, white is less": (4095 - TWELVE, {"bits": 12, "kind": "MONOCHROME1"}, RAMP),
    "16 bits": (SIXTEEN, {}, RAMP),
    "8 bits": (EIGHT, {"bits": 8}, RAMP),
    "palette": (EIGHT, {"bits": 8, "kind": "PALETTE COLOR", **PALETTE}, 1 - RAMP),
    "colours": (rgb(EIGHT), {"bits": 8, "kind": "RGB"}, RAMP),
    "YBR": (YBR, {"bits": 8, "kind": "YBR_FULL"}, RAMP),
    "window": (TWELVE, WINDOW, windowed(TWELVE, 1000, 1500)),
    "window, white is less": (TWELVE, {**WINDOW, "kind": "MONOCHROME1"}, 1 - windowed(TWELVE, 1000, 1500)),
    "several windows": (
        TWELVE, {"WindowCenter": [1000, 40], "WindowWidth": [1500, 400]}, windowed(TWELVE, 1000, 1500)),
    "window of 8 bits": (EIGHT, {"bits": 8, "WindowCenter": 64, "WindowWidth": 100}, windowed(EIGHT, 64, 100)),
    "window of Hounsfield units": (
        TWELVE, {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400}, windowed(TWELVE.astype(int) - 1024, 40, 400)),
    "window of signed values": (CT, {"WindowCenter": 40, "WindowWidth": 400}, windowed(CT, 40, 400)),
    "VOI LUT": (EIGHT.astype(np.uint16), {"VOILUTSequence": table([255 - i for i in range(256)], 8)}, 1 - RAMP),
    "12 bits said to be 16": (TWELVE, {}, "fill little of the 16 bits"),
    "signed 16 bits without a window": (CT, {}, "fill little of the 16 bits"),
    "window of width 0": (TWELVE, {"WindowCenter": 40, "WindowWidth": 0}, "Window Width must be"),
    "window that is none": (TWELVE, {**WINDOW, "VOILUTFunction": "CUBIC"}, "VOI LUT Function"),
    "palette without tables": (EIGHT, {"bits": 8, "kind": "PALETTE COLOR"}, "not a readable DICOM"),
    "grey frames": (np.stack([EIGHT] * 4), {"bits": 8, "NumberOfFrames": 4}, "4 frames"),
    "frames of colours": (np.stack([rgb(EIGHT)] * 2), {"bits": 8, "kind": "RGB", "NumberOfFrames": 2}, "2 frames"),
    "pixels that are missing": (EIGHT, {"bits": 8, "Rows": 64}, "not a readable DICOM"),
    "modality LUT alone": (
        EIGHT.astype(np.uint16), {"ModalityLUTSequence": table(list(range(256)), 8)}, "modality LUT without a window"),
}.items():  # fmt: skip
    ODD[f"DICOM: {name}"] = partial(dicom, values, **options), expected

# --- class folders ----------------------------------------------------------------------------------------------------


def laid_out(read: Callable, names: list[str], folder: Path) -> tuple[tuple[str, ...], dict[str, int], str]:
    """Class names, images by split, and what is warned of."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix in (".png", ".gif", ".avif"):
            Image.new("RGB", (4, 4)).save(folder / name)
        else:
            (folder / name).write_text("")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read(folder)
    counts = {split: len(images) for split, images in found.items() if split not in ("trainval", "all")}
    return found["train"].class_names, counts, " ".join(str(warning.message).partition(": ")[2] for warning in said)


def files(*folders: str, count: int = 5, ending: str = "png") -> list[str]:
    return [f"{folder}/{i}.{ending}" for folder in folders for i in range(count)]


def parts(*spelled: str, above: str = "", classes: str = "ab") -> list[str]:
    return files(*(f"{above}{split}/{name}" for split in spelled for name in classes))


AB, CUT = ("a", "b"), {"train": 8, "val": 2}
SPLIT, WHOLE = {"train": 8, "val": 2, "test": 10}, {"train": 10, "val": 10, "test": 10}
FOLDERS: dict[str, tuple[list[str], object]] = {
    "classes": (files("a", "b"), (AB, CUT, "")),
    "Train, Test": (parts("Train", "Test"), (AB, SPLIT, "")),
    "training, testing": (parts("training", "testing"), (AB, SPLIT, "")),
    "train, valid, test": (parts("train", "valid", "test"), (AB, WHOLE, "")),
    "training, validation, testing": (parts("training", "validation", "testing"), (AB, WHOLE, "")),
    "TRAIN, DEV, TEST": (parts("TRAIN", "DEV", "TEST"), (AB, WHOLE, "")),
    "a wrapper": (files("flower_photos/a", "flower_photos/b"), (AB, CUT, "")),
    "two wrappers": (files("x/y/a", "x/y/b"), (AB, CUT, "")),
    "a wrapper of splits": (parts("Train", "val", "test", above="set/"), (AB, WHOLE, "")),
    "a wrapper and what a Mac leaves": (files("x/a", "x/b", "__MACOSX/x/a"), (AB, CUT, "")),
    "a class called test": (files("test", "car"), (("car", "test"), CUT, "")),
    "GIF and AVIF": (files("a", ending="gif") + files("b", ending="avif"), (AB, CUT, "")),
    "capitals": ([*files("a", "b"), "a/X.JPG"], "cannot identify|X.JPG"),
    "folders in a class": (files("a/x", "a/y", "b", count=5), (AB, {"train": 12, "val": 3}, "")),
    "checkpoints of a notebook": ([*files("a", "b"), "a/.ipynb_checkpoints/0.png"], (AB, CUT, "")),
    "hidden files": ([*files("a", "b"), "a/._0.png", ".DS_Store"], (AB, CUT, "")),
    "files that are no images": (
        [*files("a", "b"), "a/x.heic", "a/y.heic", "b/z.txt"], (AB, CUT, "not read: 2 .heic file(s), 1 .txt file(s)")),
    "an image outside": ([*files("a", "b"), "x.png"], (AB, CUT, "not read: 1 image(s) outside of the class folders")),
    "a folder next to splits": (
        [*parts("train", "test"), *files("extra")], (AB, SPLIT, "not read: 1 folder extra next to test, train")),
    "a test without classes": (
        [*parts("train"), *files("test")], (AB, CUT, "not read: 1 folder test next to train")),
    "two of one split": (parts("train", "val", "valid"), "val and valid are both 'val'"),
    "train and Train": (parts("train", "Training"), "are both 'train'"),
    "splits without classes": (files("train", "test"), "no class folders in it"),
    "one class": (files("a"), "one class folder alone"),
    "one class of a wrapper": (files("x/a"), "one class folder alone"),
    "no train": (parts("val", "test"), "there is no folder"),
    "a class that train lacks": ([*parts("train"), *files("val/c")], "classes that .* lacks: c"),
    "an empty class": ([*files("a"), "b/x.txt"], "no images in .*b"),
    "images alone": (["0.png", "1.png"], "no class folders"),
    "nothing": ([], "no class folders"),
}  # fmt: skip
for name, (names, expected) in FOLDERS.items():
    if "capitals" not in name:
        ODD[f"class folders: {name}"] = partial(laid_out, classification.image_folder, names), expected

THREE = {"train": 4, "val": 2, "test": 4}  # as the protocol of prompt learning splits five images per class
for name in ("a wrapper", "two wrappers", "a wrapper and what a Mac leaves", "GIF and AVIF", "hidden files"):
    ODD[f"domain: {name}"] = partial(laid_out, domains.own_folder, FOLDERS[name][0]), (AB, THREE, "")
for name in ("Train, Test", "train, valid, test", "a wrapper of splits", "two of one split", "a test without classes"):
    wanted = "no folder .*test" if "without" in name else FOLDERS[name][1]
    ODD[f"domain: {name}"] = partial(laid_out, domains.own_folder, FOLDERS[name][0]), wanted
ODD["class folders: no such folder"] = lambda folder: classification.image_folder(folder / "x"), "there is no folder"
ODD["images: none"] = pretraining.pictures, "no images"


# --- slides -----------------------------------------------------------------------------------------------------------


def graded(labels: list[str], folder: Path, head: str = "slide_id,label") -> list[int]:
    for i in range(len(labels)):
        (folder / f"s{i}.svs").touch()
    text(folder / "labels.csv", "\n".join([head, *(f"s{i}.svs,{label}" for i, label in enumerate(labels))]))
    return [item.grade for item in slides.folder(folder)]


for labels, expected in (
    (["0", "1"], [0, 1]), (["1", "0", "1"], [1, 0, 1]), (["1", "3"], [1, 3]), (["0.0", "1.0"], [0, 1]),
    (["tumour", "benign"], [1, 0]), ([" 1", "0 "], [1, 0]), ([*map(str, range(8))], [*range(8)]),
    (["", "0"], "line 2: the slide 's0.svs' has no class"), (["0", "nan"], "line 3.*no class"),
    (["0", "NA"], "line 3.*no class"), (["None", "1"], "line 2.*no class"), (["0", "-1"], "the classes are -1, 0"),
    (["0", "99999999999"], "99999999999"), (["0", "1.5"], "1.5"), (["0", "inf"], "inf"), (["0", "1e400"], "1e400"),
    (["0", "7"], "without a gap"), (["1", "tumour"], "the classes are 1, tumour"),
):  # fmt: skip
    ODD[f"classes of slides: {labels}"] = partial(graded, labels), expected
ODD["classes of slides: with a mark"] = partial(graded, ["0", "1"], head=BOM + "slide_id,label"), [0, 1]
ODD["classes of slides: another column"] = partial(graded, ["0"], head="slide,label"), "no column 'slide_id'"


def unlabelled(names: list[str], folder: Path) -> list[str]:
    for name in names:
        text(folder / name, "")
    return list(slides.unlabelled(folder))


ODD["slides without classes"] = partial(unlabelled, ["b.svs", "x/a.ndpi", ".c.svs", "d.txt"]), ["b", "a"]
ODD["slides without classes: one name"] = partial(unlabelled, ["a.svs", "x/a.tiff"]), "the slide is there twice"
ODD["slides without classes: none"] = partial(unlabelled, ["a.txt"]), "no slide: no file that ends in"
ODD["slides without classes, to train on"] = (
    lambda folder: unlabelled(["a.svs"], folder) and slides.folder(folder), "no file gives the class")  # fmt: skip

# --- radiographs ------------------------------------------------------------------------------------------------------


def boxed(cell: str, folder: Path, task: str = "detection") -> list:
    text(folder / "train_list.csv", f'image_path,bbox\na.png,"{cell}"\n')
    found = xrays.load(xrays.own(folder), folder, "train", task=task)
    return found.boxes[0][found.boxes[0].any(1)].tolist()


ONE = [[0.0, 0.25, 0.25, 0.25, 0.25]]
for cell, expected in (
    ("[[128, 128, 384, 384]]", ONE), ("[128, 128, 384, 384]", ONE), ("[[128.0, 128, 384, 384], [0, 0, 0, 0]]", ONE),
    ("[]", []), ("[[0, 0, 0, 0]]", []), ("[[500, 500, 100, 200]]", "line 2.*500.*x1 < x2"),
    ("[[10, 10, 10, 20]]", "x1 < x2"), ("[[-5, 0, 10, 10]]", "line 2.*-5"), ("[[0, 0, 10, 2000]]", "2000.*1024 pixels"),
    ("[[0, 0, 1e999, 10]]", "inf"), ("[[0, 0, nan, 10]]", "line 2: not a list"),
    ("[1, 2, 3, 4, 5, 6, 7, 8]", "not a list"),
    ("[[1, 2, 3]]", "not a list"), ("[[1, 2, 3, 4], [5, 6]]", "not a list"), ("", "not a list"),
    ("{1: 2}", "not a list"),
    ("[['a', 'b', 'c', 'd']]", "not a list"), (f"[[0, 0, {'9' * 400}, 10]]", "line 2"), (f"{'[' * 3000}", "not a list"),
    (str([[i, i, i + 9, i + 9] for i in range(11)]), "11 boxes; at most 10"), ("[[0, 0, 10, None]]", "line 2"),
):  # fmt: skip
    ODD[f"box of a chest: {cell[:40]}"] = partial(boxed, cell), expected


def listed(content: str, folder: Path) -> list:
    text(folder / "train_list.txt", content)
    found = xrays.load(xrays.own(folder, ["x", "y"]), folder, "train")
    return [found.paths, found.labels.tolist()]


for name, content, expected in (
    ("with a mark", f"{BOM}a.png 0 1\n", [["a.png"], [[0.0, 1.0]]]),
    ("a blank", "a b.png 0 1\n", [["a b.png"], [[0, 1]]]),
    ("a label of 2", "a.png 0 2\n", "line 1 is not a path"), ("one label", "a.png 1\n", "line 1"),
    ("three labels", "a.png 0 1 1\n", "line 1"), ("commas", "a.png,0,1\n", "line 1"),
    ("NaN", "a.png 0 nan\n", "line 1"),
    ("nothing", "\n", "lists no image"), ("bytes of 0", "a.png\0 0 x\n", "line 1"),
):  # fmt: skip
    ODD[f"labels of chests: {name}"] = partial(listed, content), expected

# --- land cover -------------------------------------------------------------------------------------------------------

CLASSES = {"field": (10, 20, 30), "wood": (40, 50, 60)}
IDS = (np.arange(64).reshape(8, 8) % 3).astype(np.uint8)
PAINTED = np.array([*CLASSES.values(), (0, 0, 0)], np.uint8)[IDS]


def raster(path: Path, values: np.ndarray) -> None:
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"driver": "GTiff", "count": len(values), "height": 8, "width": 8, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", **facts) as file:
            file.write(values)


def land(folder: Path, places: str = "", label: str = "x.tif", truth: np.ndarray = IDS) -> landcover.LandCover:
    raster(folder / "images" / "x.tif", rgb(EIGHT[:8, :8]))
    raster(folder / "labels" / label, truth)
    if places:
        text(folder / "places.csv", places)
    return landcover.own(folder, CLASSES)


def grey(folder: Path) -> landcover.LandCover:
    raster(folder / "images" / "x.tif", EIGHT[:8, :8])
    return landcover.own(folder, CLASSES)


for name, options, expected in (
    ("numbers", {}, IDS), ("colours", {"truth": PAINTED}, IDS), ("x_mask.tif", {"label": "x_mask.tif"}, IDS),
    ("x_label.tif", {"label": "x_label.tif"}, IDS),
    ("colours and alpha", {"truth": np.concatenate([PAINTED, PAINTED[..., :1]], 2)}, IDS),
    ("beyond the classes", {"truth": np.where(IDS == 2, 255, IDS).astype(np.uint8)}, IDS),
    ("other colours", {"truth": PAINTED + 1}, r"colour \(11, 21, 31\), which no class has"),
    ("numbers in three bands", {"truth": rgb(IDS)}, r"colour \(1, 1, 1\), which no class has"),
    ("another name", {"label": "y.tif"}, "y.tif: it labels no image"),
    ("X.tif", {"label": "X.tif"}, "it labels no image"),
    ("16 bits", {"truth": IDS.astype(np.uint16)}, "its pixels are uint16"),
    ("floats", {"truth": IDS.astype(np.float32)}, "its pixels are float32"),
):  # fmt: skip
    ODD[f"labels of land: {name}"] = lambda folder, options=options: land(folder, **options)[0][1].numpy(), expected
ODD["images of land: grey"] = lambda folder: grey(folder)[0], "x.tif: it has 1 band"
ODD["images of land: none"] = lambda folder: landcover.own(folder, CLASSES), "no images in images/"
for name, places, expected in (
    ("a name", "image,latitude,longitude\nx,-3.1,-60.0\n", ["Af"]),
    ("a file", "image,latitude,longitude\nx.tif,-3.1,-60.0\n", ["Af"]),
    ("with a mark", f"{BOM}image,latitude,longitude\nx,-3.1,-60.0\n", ["Af"]),
    ("a zone", "image,zone\nx,Cfb\n", ["Cfb"]),
    ("a text", "image,text\nx,red earth\n", [None]), ("nothing said", "image,latitude,longitude\nx,,\n", [None]),
    ("lat, lon", "image,lat,lon\nx,-3.1,-60.0\n", "its columns are image, lat, lon"),
    ("latitude alone", "image,latitude\nx,1\n", "its columns are"),
    ("NaN", "image,latitude,longitude\nx,nan,1\n", "x: latitude nan"),
    ("infinite", "image,latitude,longitude\nx,inf,1\n", "x: latitude"),
    ("an unknown zone", "image,zone\nx,Xyz\n", "x: zone = 'Xyz'"),
    ("not on the globe", "image,latitude,longitude\nx,139,35\n", "latitude = 139"),
    ("another image", "image,latitude,longitude\ny,-3.1,-60.0\n", "no image of images/ is called 'y'"),
    ("no image", "name,zone\nx,Cfb\n", "the column region"),
    ("fewer columns", "image,latitude,longitude\nx,1\n", "3 columns"),
    ("a comma", "image,latitude,longitude\nx,'1,5',2\n", "3 columns"),
):  # fmt: skip
    ODD[f"places of land: {name}"] = lambda folder, places=places: land(folder, places).zones(), expected


def classes_of_land(content: str, folder: Path) -> list[str]:
    return list(landcover.read_classes(text(folder / "classes.txt", content).parent))


for name, content, expected in (
    ("with a mark", f"{BOM}field\nwood\n", ["field", "wood"]), ("one", "field\n", "two classes"),
    ("twice", "field\nfield\n", "not a new name"),
    ("a colour of 300", "field 300 0 0\nwood\n", "'field 300 0 0'"), ("nothing", "", "two classes"),
):  # fmt: skip
    ODD[f"classes of land: {name}"] = partial(classes_of_land, content), expected
ODD["classes of land: no such folder"] = (
    lambda folder: landcover.read_classes(folder / "x"),
    "x: there is no such folder",
)

# --- COCO's files -----------------------------------------------------------------------------------------------------

ANNOTATION = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
COCO = {"images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}], "annotations": [ANNOTATION]}
COCO |= {"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]}
HUGE = "9" * 400


def annotated(content: str, folder: Path) -> object:
    return detection.read_annotations(text(folder / "a.json", content))["annotations"][0]["bbox"]


def with_box(box: str) -> str:
    return json.dumps(COCO).replace("[1, 1, 4, 4]", box)


for name, content, expected in (
    ("with a mark", BOM + json.dumps(COCO), [1, 1, 4, 4]), ("whole", json.dumps(COCO), [1, 1, 4, 4]),
    ("nested", DEEP, "a.json: not JSON"),
    ("nested objects", '{"a":' * 100_000, "a.json: not JSON"),
    *((f"box {box[:30]}", with_box(box), r"annotations\[0\]: 'bbox'") for box in (
        "[1, 1, 4, 1e308]", "[1e308, 1, 4, 4]", f"[1, 1, {HUGE}, 4]", f"[-{HUGE}, 1, 4, 4]", "[1, 1, NaN, 4]",
        "[1, 1, Infinity, 4]", "[1, 1, -4, 4]", "[1, 1, 4]", "[1, 1, 4, 4, 4]", '["1", 1, 4, 4]', "[true, 1, 4, 4]",
        "[null, 1, 4, 4]", "null",
        '"1 1 4 4"', "{}", "[]",
    )),
    ("an image that is none", json.dumps(COCO | {"images": [[1]]}), r"images\[0\]"),
    ("an annotation that is none", json.dumps(COCO | {"annotations": ["a"]}), r"annotations\[0\]"),
    ("a category that is none", json.dumps(COCO | {"categories": [None]}), r"categories\[0\]"),
    ("no images", json.dumps(COCO | {"images": [], "annotations": []}), "no images"),
    ("a list", "[]", "an object was expected"),
    ("an id of 1.5", json.dumps(COCO).replace('"id": 3', '"id": 3.5'), r"categories\[0\]: 'id'"),
    ("a side of NaN", json.dumps(COCO).replace('"width": 8', '"width": NaN'), r"images\[0\]: 'width'"),
    ("UTF-16", json.dumps(COCO).encode("utf-16").decode("latin-1"), "not JSON"),
):  # fmt: skip
    ODD[f"annotations: {name}"] = partial(annotated, content), expected


def base_of(folder: Path) -> list[tuple[int, ...]]:
    twice = [{"id": i, "name": n} for i, n in ((3, "cat"), (4, "cat"), (5, "dog"), (6, "dog"))]
    found = detection.own_folder(text(folder / "a.json", json.dumps(COCO | {"categories": twice})), folder, ["dog"])
    return [found.base, found.novel]


ODD["annotations: two categories of one name"] = base_of, [(3, 4), (5, 6)]
ROW = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "score": 0.5}
RESULTS = {
    "a box of NaN": ROW | {"bbox": [1, 1, float("nan"), 4]}, "a box of three numbers": ROW | {"bbox": [1, 1, 4]},
    "an infinite box": ROW | {"bbox": [1, 1, 4, float("inf")]}, "a negative width": ROW | {"bbox": [1, 1, -4, 4]},
    "a huge box": ROW | {"bbox": [1, 1, int(HUGE), 4]}, "a text as box": ROW | {"bbox": "1 1 4 4"},
    "no box": ROW | {"bbox": None},
    "a score of NaN": ROW | {"score": float("nan")}, "an infinite score": ROW | {"score": float("inf")},
    "a text as score": ROW | {"score": "0.5"}, "no score": {k: v for k, v in ROW.items() if k != "score"},
    "a score that is true": ROW | {"score": True}, "a text as category": ROW | {"category_id": "cat"},
    "an image that is a list": ROW | {"image_id": [1]}, "a row that is a list": [1, 3],
}  # fmt: skip


def results_of_file(rows: list, folder: Path) -> object:
    return detectors.read_results(text(folder / "r.json", json.dumps(rows)))


for name, row in RESULTS.items():
    ODD[f"results: {name}"] = lambda folder, row=row: evaluate(COCO, [ROW, row]), "row 1"
    ODD[f"results of a file: {name}"] = partial(results_of_file, [ROW, row]), r"r\.json: row 1"
ODD["results: another image"] = lambda folder: evaluate(COCO, [ROW | {"image_id": 9}]), "image_id"
ODD["results: an object"] = lambda folder: evaluate(COCO, {"a": 1}), "a list of objects"
ODD["results: right"] = lambda folder: evaluate(COCO, [ROW]).totals["AP"], 100.0
ODD["results: as masks"] = lambda folder: evaluate(COCO, [ROW], kind="segm"), "segmentation"

# --- weights ----------------------------------------------------------------------------------------------------------

GOOD = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}
MASKED = {"index": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)}


def stored(state: object, ending: str, folder: Path, read: Callable = backbones.read_state) -> list[str]:
    path = folder / f"w{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    return sorted(read(path))


for ending, (name, state, expected) in itertools.product(
    (".safetensors", ".pth"),
    (
        ("right", GOOD, sorted(GOOD)), ("half", {n: t.half() for n, t in GOOD.items()}, sorted(GOOD)),
        ("of DataParallel", {f"module.{n}": t for n, t in GOOD.items()}, sorted(GOOD)),
        ("an index and a mask", GOOD | MASKED, sorted([*GOOD, *MASKED])),
        ("NaN", GOOD | {"a.weight": torch.tensor([[1, float("nan")]])}, "'a.weight' has 1 values that are NaN"),
        ("int8", GOOD | {"a.weight": torch.ones(2, 2, dtype=torch.int8)}, "'a.weight' is torch.int8"),
        ("bool", GOOD | {"a.bias": torch.ones(2, dtype=torch.bool)}, "'a.bias' is torch.bool"),
        ("int64", GOOD | {"a.weight": torch.ones(2, 2, dtype=torch.int64)}, "'a.weight' is torch.int64"),
    ),
):  # fmt: skip
    ODD[f"weights, {ending}: {name}"] = partial(stored, state, ending), expected
BAD_TEACHER = {"teacher": GOOD | {"a.bias": torch.tensor([float("nan")])}}
ODD["weights of a teacher: NaN"] = partial(stored, BAD_TEACHER, ".pth", read=read_teacher), "'a.bias' has 1 values"
for name, held in {
    "a list": [1, 2],
    "a number": 3,
    "a model's text": {"model": "x"},
    "a tensor": torch.ones(2),
}.items():
    ODD[f"weights, .pth: {name}"] = partial(stored, held, ".pth"), "something else than named tensors"

# --- videos, captions, attributes, JSON -------------------------------------------------------------------------------


def video(counts: tuple[int, int], folder: Path) -> int:
    for name, count in zip(("v", "i"), counts, strict=True):
        writer = cv2.VideoWriter(str(folder / f"{name}.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (16, 16))
        for _ in range(count):
            writer.write(np.zeros((16, 16, 3), np.uint8))
        writer.release()
    return len(Files(folder / "v.avi", folder / "i.avi"))


ODD["videos of 5 and 3 frames"] = partial(video, (5, 3)), "ends early.*5 and .*3 frames"
ODD["videos of 20 and 19 frames"] = partial(video, (20, 19)), 19
ODD["videos of 5 and 5 frames"] = partial(video, (5, 5)), 5


def captioned(content: str, folder: Path) -> list:
    (folder / "images").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images" / "a.png")
    text(folder / "captions.jsonl", content)
    return restoration.own_folder(folder)[0][1]


for name, content, expected in (
    ("with a mark", BOM + '{"file": "a.png", "caption": "a  zebra"}', "a zebra"),
    ("no caption", '{"file": "a.png"}', "line 1: expected"),
    ("a number", '{"file": "a.png", "caption": 3}', "line 1"), ("nested", DEEP, "line 1"), ("a list", "[]", "line 1"),
    ("outside", '{"file": "../a.png", "caption": "x"}', "leaves the data set's folder"),
    ("nothing", "\n", "no images in it"),
):  # fmt: skip
    ODD[f"captions: {name}"] = partial(captioned, content), expected if name != "with a mark" else (expected,)


def attributed(content: str, folder: Path) -> list:
    for name in "ab":
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    text(folder / "labels.csv", content)
    return attributes.own_folder(folder)["test"].labels.tolist()


HEAD = "image,split,hat\na.png,train,1\n"
for name, content, expected in (
    ("with a mark", f"{BOM}{HEAD}b.png,test,0\n", [[0]]), ("a value of 2", f"{HEAD}b.png,test,2\n", "line 3"),
    ("NaN", f"{HEAD}b.png,test,nan\n", "line 3"),
    ("another split", f"{HEAD}b.png,holdout,1\n", "line 3: expected a path, train, val, test"),
    ("twice", f"{HEAD}a.png,test,1\n", "line 3: a.png is in line 2"),
    ("no test", HEAD, "no image is in test"), ("missing image", f"{HEAD}c.png,test,1\n", "c.png"),
    ("outside", f"{HEAD}../b.png,test,1\n", "leaves"),
):  # fmt: skip
    ODD[f"attributes: {name}"] = partial(attributed, content), expected
for name, content, expected in (
    ("with a mark", BOM + "[1]", [1]), ("nested", DEEP, "j.json: not JSON"),
    ("a number of 5,000 digits", "9" * 5000, "j.json: not JSON"),
    ("nothing", "", "j.json: not JSON"), ("two", "[1] [2]", "j.json: not JSON"),
):  # fmt: skip
    ODD[f"JSON: {name}"] = lambda folder, content=content: read_json(text(folder / "j.json", content)), expected


def zones_of(content: str, folder: Path) -> int:
    return len(climate.Prompts.read(text(folder / "p.yaml", content)).zones)


TEXTS = climate.PROMPTS.read_text(encoding="utf-8")
ODD["texts of zones: with a mark"] = partial(zones_of, BOM + TEXTS), len(climate.Prompts.read().zones)


def agrees(found: object, expected: object) -> bool:
    """Whether what was read is right: images to a level of 255, all else exactly, of a warning its beginning."""
    if isinstance(expected, np.ndarray):
        return np.shape(found) == expected.shape and np.abs(found - expected.astype(float)).max() < 1.01 / 255
    if isinstance(expected, tuple) and isinstance(found, tuple) and isinstance(expected[-1], str):
        return found[:-1] == expected[:-1] and bool(expected[-1]) == bool(found[-1]) and expected[-1] in found[-1]
    if isinstance(expected, tuple) and len(expected) == 1:
        return found == expected[0]
    return bool(found == expected)
