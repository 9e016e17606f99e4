"""Odd files of users: each is read right, or refused with an error that names it.

A case of `ODD` is a reader, called with an empty folder, and what it returns; a string for a refusal: a value that the
message contains besides the file.
"""

import itertools
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.uid import SecondaryCaptureImageStorage
from rasterio.transform import Affine
from safetensors.torch import save_file

from companion import backbones
from companion.data import (
    classification,
    coco,
    decoding,
    detection,
    domains,
    landcover,
    pretraining,
    slides,
    tracking,
    xrays,
)
from companion.errors import CompanionError
from companion.io.files import read_json
from companion.models.sic_cads import detectors
from tests.data.test_rasters import written

ODD: dict[str, tuple[Callable[[Path], object], object]] = {}
BOM, DEEP, HUGE = "\ufeff", "[" * 100_000, "9" * 400


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def odd(kind: str, file: str, read: Callable, cases: dict, *refused: tuple[str, ...]) -> None:
    """Add cases of `read(folder)` with a text `file`: what is read by content, and the contents refused for a value."""

    def written_first(content: str, folder: Path) -> object:
        text(folder / file, content)
        return read(folder)

    found = cases | {content: value for value, *contents in refused for content in contents}
    for content, expected in found.items():
        ODD[f"{kind}: {content[:60]!r}, {len(content)}"] = partial(written_first, content), expected


# --- images of every depth, by four readers ---------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT, TWELVE, SIXTEEN = (np.rint(RAMP * (2**bits - 1)).astype(np.uint16) for bits in (8, 12, 16))
EIGHT = EIGHT.astype(np.uint8)
CT = TWELVE.astype(np.int16) - 1024


def rgb(values: np.ndarray, bands: int = 3) -> np.ndarray:
    return np.stack([values] * bands, -1)


def saved(values: np.ndarray, **options) -> Callable:
    def write(path: Path) -> None:
        if path.suffix == ".tif" and "exif" not in options:
            colours = "rgb" if values.shape[-1] == 3 else "minisblack"
            tifffile.imwrite(path, values, **{"photometric": colours} | options)
        elif values.ndim == 3 and values.dtype == np.uint16:
            cv2.imwrite(str(path), values)
        else:
            Image.fromarray(values).save(path, **options)

    return write


ROTATED = Image.Exif()
ROTATED[0x0112] = 3
FLOATS = {"float32 to 1.tif": RAMP.astype(np.float32), "float32 to 0.9.tif": (RAMP * 0.9).astype(np.float32)}
INTEGERS = {f"{kind}.tif": SIXTEEN.astype(kind) for kind in ("uint16", "int32", "uint32")}
RIGHT = FLOATS | INTEGERS | {"float64.tif": RAMP, "int16.tif": (SIXTEEN // 2).astype(np.int16), "16 bits.png": SIXTEEN}
RIGHT |= {"int32 to 255.tif": EIGHT.astype(np.int32), "8 bits and alpha.png": np.stack([EIGHT, EIGHT // 2 + 128], -1)}
RIGHT |= {f"colours of {name}": rgb(RIGHT[name]) for name in ("float32 to 1.tif", "uint16.tif", "16 bits.png")}
RIGHT |= {"16 bits and alpha.png": rgb(SIXTEEN, 4), "8 bits of colours.tif": rgb(EIGHT)}
IMAGES = {name: (saved(values), RAMP * (0.9 if "0.9" in name else 1)) for name, values in RIGHT.items()} | {
    "planes of 16 bits.tif": (saved(np.stack([SIXTEEN] * 3), planarconfig="separate", photometric="rgb"), RAMP),
    "white is 0.tif": (saved(65535 - SIXTEEN, photometric="miniswhite"), RAMP),
    "8 bits, white is 0.tif": (saved(255 - EIGHT, photometric="miniswhite"), RAMP),
    "8 bits.gif": (saved(EIGHT, save_all=True, append_images=[Image.fromarray(255 - EIGHT)]), RAMP),
}
REFUSED = {f"12 bits in 16.{end}": (TWELVE, "4095") for end in ("png", "tif")} | {
    **{f"colours of 12 bits in 16.{end}": (rgb(TWELVE), "4095") for end in ("png", "tif")},
    "8 bits in 16.png": (EIGHT.astype(np.uint16), "255"),
    **{f"float32 to {top}.tif": ((RAMP * top).astype(np.float32), str(top)) for top in (200, 255, 65535)},
    "float32 below 0.tif": ((RAMP - 0.5).astype(np.float32), "-0.5"),
    "uint32 to 6553500.tif": (SIXTEEN.astype(np.uint32) * 100, "e+06"),
    "NaN.tif": (np.where(np.eye(16) > 0, np.nan, RAMP), "NaN"),
    "infinite.tif": (np.where(np.eye(16) > 0, np.inf, RAMP), "infinite"),
    **{f"stack of {values.dtype}.tif": (np.stack([values] * 4), "") for values in (EIGHT, SIXTEEN)},
}
IMAGES |= {name: (saved(values), value) for name, (values, value) in REFUSED.items()}
READERS = {
    "own image": lambda path: np.asarray(classification.own(path.parents[1])["train"].picture(0))[..., 1] / 255,
    "radiograph": decoding.unit,
    "fundus image": lambda path: decoding.unit(path, True)[..., 1],
    "frame": lambda path: tracking.read_frame(path, path)[..., 4] / 255,
}


def image(read: Callable, write: Callable, name: str, folder: Path) -> np.ndarray:
    for group in "ab":
        (folder / group).mkdir()
        write(folder / group / name)
    return read(folder / "a" / name)


for (kind, read), (name, (write, expected)) in itertools.product(READERS.items(), IMAGES.items()):
    found = "" if kind == "frame" and not name.startswith("8 bits") else expected
    ODD[f"{kind}: {name}"] = partial(image, read, write, name), found
for name, values in (("8 bits.tif", EIGHT), ("16 bits.png", SIXTEEN)):
    upside_down = partial(image, READERS["own image"], saved(values, exif=ROTATED), name)
    ODD[f"upside down: {name}"] = upside_down, RAMP[::-1, ::-1]

# --- DICOM ------------------------------------------------------------------------------------------------------------


def dicom(values: np.ndarray, folder: Path, kind: str = "MONOCHROME2", bits: int = 16, **more: object) -> np.ndarray:
    file = pydicom.Dataset()
    file.SOPClassUID = SecondaryCaptureImageStorage
    file.set_pixel_data(values, kind, bits)
    for name, value in more.items():
        setattr(file, name, value)
    file.save_as(folder / "a.dcm", enforce_file_format=True)
    return decoding.unit(folder / "a.dcm")


def windowed(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """DICOM's linear window, PS3.3 C.11.2.1.2."""
    return np.clip((values.astype(float) - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


LESS, SOFT, TISSUE = {"kind": "MONOCHROME1"}, {"WindowCenter": 40, "WindowWidth": 400}, windowed(CT, 40, 400)
DICOM = {
    "12 bits": (TWELVE, {"bits": 12}, RAMP),
    "12 bits, white is less": (4095 - TWELVE, {"bits": 12, **LESS}, RAMP),
    "12 bits with a sign": (CT - 1024, {"bits": 12}, RAMP),
    "16 bits": (SIXTEEN, {}, RAMP),
    "colours": (rgb(EIGHT), {"bits": 8, "kind": "RGB"}, RAMP),
    "window, white is less": (CT, SOFT | LESS, 1 - TISSUE),
    "the first of two windows": (CT, {"WindowCenter": [40, 1000], "WindowWidth": [400, 1500]}, TISSUE),
    "window of Hounsfield units": (TWELVE, SOFT | {"RescaleSlope": 1, "RescaleIntercept": -1024}, TISSUE),
    "12 bits declared as 16": (TWELVE, {}, "4095"),
    "signed 16 bits without a window": (CT, {}, "-1024"),
    "frames": (np.stack([EIGHT] * 4), {"bits": 8}, "4 frames"),
    "too few pixels": (EIGHT, {"bits": 8, "Rows": 64}, ""),
}
ODD |= {f"DICOM: {name}": (partial(dicom, values, **more), found) for name, (values, more, found) in DICOM.items()}

# --- class folders ----------------------------------------------------------------------------------------------------


def laid_out(read: Callable, names: str, folder: Path) -> tuple[tuple[str, ...], list[int], list[str]]:
    """Class names, images by split, and what the warning counts; a name that ends in / holds five images."""
    for name, i in itertools.product(names.split(), range(5)):
        text(folder / (f"{name}{i}.png" if name.endswith("/") else name), name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read(folder)
    sizes = [len(found[split]) for split in ("train", "val", "test") if split in found]
    return found["train"].class_names, sizes, re.findall(r"\d+ \S+", " ".join(str(one.message) for one in caught))


AB, PLAIN = ("a", "b"), (("a", "b"), [8, 2], [])
THREE, WHOLE = (AB, [4, 2, 4], []), (AB, [10, 10, 10], [])  # domains are split as in prompt learning
FOLDERS: dict[str, object] = {
    "a/ b/": PLAIN,
    "Train/a/ Train/b/ Testing/a/ Testing/b/": (AB, [8, 2, 10], []),
    "TRAIN/a/ TRAIN/b/ validation/a/ validation/b/ test/a/ test/b/": WHOLE,
    "x/training/a/ x/training/b/ x/valid/a/ x/valid/b/ x/test/a/ x/test/b/": WHOLE,
    "x/y/a/ x/y/b/ __MACOSX/x/a/": PLAIN,
    "test/ car/": (("car", "test"), [8, 2], []),
    "a/x/ a/y/ b/": (AB, [12, 3], []),
    "a/ b/ a/.ipynb_checkpoints/0.png a/._0.png .DS_Store": PLAIN,
    "a/ b/ a/x.heic a/y.heic b/z.txt": (AB, [8, 2], ["2 .heic", "1 .txt"]),
    "a/ b/ x.png": (AB, [8, 2], ["1 .png"]),
    "train/a/ train/b/ test/a/ test/b/ extra/": (AB, [8, 2, 10], ["5 .png"]),
    "train/a/ val/a/ valid/a/": "valid",
    "train/ test/": "train",
    "x/a/": "",
    "val/a/ test/a/": "train",
    "train/a/ train/b/ val/c/": "c",
    "a/ b/x.txt": "b",
    "0.png": "",
}
DOMAINS = {name: THREE if found == PLAIN else found for name, found in FOLDERS.items() if found in (PLAIN, WHOLE)}
DOMAINS |= {"train/a/ val/a/ valid/a/": "valid", "train/a/ train/b/ test/": "test"}
for module, names in ((classification, FOLDERS), (domains, DOMAINS)):
    ODD |= {f"{module.__name__}: {name}": (partial(laid_out, module.own, name), found) for name, found in names.items()}
ODD["images: none"] = pretraining.own, ""

# --- tables of slides and radiographs ---------------------------------------------------------------------------------


def graded(folder: Path) -> list[int]:
    for i in range(2):
        (folder / f"s{i}.svs").touch()
    return [item.grade for item in slides.own(folder)["train"]]


def grades(*labels: str, head: str = "slide_id") -> str:
    return "\n".join([f"{head},label", *(f"s{i}.svs,{label}" for i, label in enumerate(labels))])


odd(
    "grades",
    "labels.csv",
    graded,
    {BOM + grades("1", "0"): [1, 0], grades("1", "3"): [1, 3], grades("0.0", " 1"): [0, 1], grades("b", "a"): [1, 0]},
    *((value, grades("0", value)) for value in ("-1", "99999999999", "1.5", "7", "tumour")),
    ("line 2", grades("", "0"), grades("nan", "0"), grades("NA", "0")),
    ("slide_id", grades("0", "1", head="slide")),
)


def boxed(folder: Path) -> list:
    (folder / "a.png").touch()
    found = xrays.own(folder, task="detection")["train"]
    return found.labels[0][found.labels[0].any(1)].tolist()


def boxes(*cells: str) -> list[str]:
    return [f'image_path,bbox\na.png,"{cell}"\n' for cell in cells]


ONE, MANY = "[[128, 128, 384, 384]]", str([[i, i, i + 9, i + 9] for i in range(11)])
SHORT = "[1, 2, 3, 4, 5, 6, 7, 8]", "[[1, 2, 3]]", "[[1, 2, 3, 4], [5, 6]]", "", "{1: 2}", "[[0, 0, nan, 10]]"
odd(
    "box of a chest",
    "train_list.csv",
    boxed,
    {content: [[0.0, 0.25, 0.25, 0.25, 0.25]] for content in boxes(ONE, ONE[1:-1], f"{ONE[:-1]}, [0, 0, 0, 0]]")},
    ("line 2", *boxes(*SHORT, "[" * 3000, f"[[0, 0, {HUGE}, 10]]", "[[-5, 0, 10, 10]]", "[[0, 0, 10, 2000]]")),
    ("500", *boxes("[[500, 500, 100, 200]]")),
    ("11", *boxes(MANY)),
)


def listed(folder: Path) -> list:
    (folder / "a b.png").touch()
    found = xrays.own(folder, ["x", "y"])["train"]
    return [found.paths, found.labels.tolist()]


BAD = [f"a.png{labels}\n" for labels in (" 0 2", " 1", " 0 1 1", " 0 nan", ",0,1", "\0 0 x")]
odd("labels of chests", "train_list.txt", listed, {f"{BOM}a b.png 0 1\n": [["a b.png"], [[0, 1]]]}, ("line 1", *BAD))

# --- land cover -------------------------------------------------------------------------------------------------------

CLASSES = {"field": (10, 20, 30), "wood": (40, 50, 60)}
IDS = (np.arange(64).reshape(8, 8) % 3).astype(np.uint8)
PAINTED = np.array([*CLASSES.values(), (0, 0, 0)], np.uint8)[IDS].transpose(2, 0, 1)


def land(folder: Path, truth: np.ndarray = IDS, label: str = "x.tif", bands: int = 3) -> landcover.LandCover:
    written(folder / "images" / "x.tif", np.stack([EIGHT[:8, :8]] * bands), crs=None, transform=Affine.identity())
    written(folder / "labels" / label, truth.reshape(-1, 8, 8), crs=None, transform=Affine.identity())
    return landcover.own(folder, CLASSES)["train"]


LAND = {
    "x_mask.tif": ({"label": "x_mask.tif"}, IDS),
    "colours and alpha": ({"truth": np.concatenate([PAINTED, PAINTED[:1]])}, IDS),
    "beyond the classes": ({"truth": IDS % 2 * 255}, IDS % 2 * 2),
    "other colours": ({"truth": PAINTED + 1}, "(11, 21, 31)"),
    "another name": ({"label": "y.tif"}, "y.tif"),
    "16 bits": ({"truth": IDS.astype(np.uint16)}, IDS),
    "32 bits": ({"truth": IDS.astype(np.int32) - 1}, "-1"),
    "grey image": ({"bands": 1}, "x.tif"),
}
for name, (options, expected) in LAND.items():
    ODD[f"labels of land: {name}"] = lambda folder, options=options: land(folder, **options)[0][1].numpy(), expected
HEAD = "image,latitude,longitude\n"
odd(
    "zones",
    "places.csv",
    lambda folder: tuple(land(folder).zones()),
    dict.fromkeys((f"{BOM}{HEAD}x,-3.1,-60\n", f"{HEAD}x.tif,-3.1,-60\n", "image,zone\nx,Af\n"), ("Af",)),
    ("", "image,lat,lon\nx,-3.1,-60\n", "image,latitude\nx,1\n", f"{HEAD}x,1\n"),
    *((value, f"{HEAD}x,{value},1\n") for value in ("nan", "139")),
    ("y", f"{HEAD}y,-3.1,-60\n"),
    ("Xyz", "image,zone\nx,Xyz\n"),
)
NAMED = {f"{BOM}field\nwood\n": [*CLASSES], "field 300 0 0\nwood\n": "300"}
odd(
    "classes",
    "classes.txt",
    lambda folder: [*landcover.read_classes(folder)],
    NAMED,
    ("", "field\n", "field\nfield\n", "a 1 2 3\nb 1 2 3\n"),
)

# --- COCO's files -----------------------------------------------------------------------------------------------------

ROW = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "score": 0.5}
COCO = {"images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}], "annotations": [ROW]}
COCO |= {"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]}
WHOLE_FILE, BOX = json.dumps(COCO), "[1, 1, 4, 4]"
WRONG = (
    f"[1, 1, {HUGE}, 4]",
    "[1, 1, NaN, 4]",
    "[1, 1, -4, 4]",
    "[1, 1, 4]",
    '["1", 1, 4, 4]',
    "[true, 1, 4, 4]",
    "null",
)
odd(
    "annotations",
    "a.json",
    lambda folder: coco.read_annotations(folder / "a.json")["annotations"].boxes[0].tolist(),
    {BOM + WHOLE_FILE: [1, 1, 4, 4], WHOLE_FILE.replace('"id": 3', '"id": 3.5'): "categories[0]"},
    ("", DEEP, '{"a":' * 100_000, "[]"),
    ("annotations[0]", *(WHOLE_FILE.replace(BOX, box) for box in (*WRONG, "[1, 1, 4, 1e308]"))),
    ("images[0]", WHOLE_FILE.replace('"width": 8', '"width": NaN')),
    *((f"{key}[0]", json.dumps(COCO | {key: [[1]]})) for key in COCO),
)
OUTSIDE = "[8, 1, 4, 4]", "[1, 8, 4, 4]", "[-4, 1, 4, 4]", "[1, -5, 4, 4]"
odd(
    "own annotations",
    "annotations.json",
    lambda folder: (folder / "a.png").touch() or detection.own(folder)["train"].base,
    {WHOLE_FILE: (3, 4), WHOLE_FILE.replace(BOX, "[-3, -3, 4, 4]"): (3, 4)},
    ("'cat'", WHOLE_FILE.replace("]}", ', {"id": 5, "name": "cat"}]}')),
    ("annotations[0]", *(WHOLE_FILE.replace(BOX, box) for box in OUTSIDE)),
)
RESULT = json.dumps([ROW, ROW])
odd(
    "results",
    "r.json",
    lambda folder: len(detectors.read_results(folder / "r.json")),
    {RESULT: 2},
    ("row 0", *(RESULT.replace(BOX, box) for box in WRONG), RESULT.replace('"image_id": 1', '"image_id": [1]')),
    ("row 1", *(RESULT.replace("0.5}]", f"{score}}}]") for score in ("NaN", '"0"', "true"))),
)

# --- weights, JSON ----------------------------------------------------------------------------------------------------


def weights(content: str, ending: str, folder: Path) -> list[str]:
    kind, value = content.split()
    tensor, path = torch.full((2,), float(value)).to(getattr(torch, kind)), folder / f"w.{ending}"
    state = {"module.a.weight": tensor, "module.index": torch.arange(3)}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    return sorted(backbones.read_state(path))


WEIGHTS = {"float16 1": ["a.weight", "index"], "float32 nan": "a.weight", "int8 1": "int8", "bool 1": "bool"}
for ending, (content, expected) in itertools.product(("safetensors", "pth"), WEIGHTS.items()):
    ODD[f"weights: {content}.{ending}"] = partial(weights, content, ending), expected
NO_JSON = "", DEEP, "", "9" * 5000, "[1] [2]"
odd("JSON", "j.json", lambda folder: read_json(folder / "j.json"), {f"{BOM}[1]": [1]}, NO_JSON)


@pytest.mark.parametrize("name", ODD)
def test_it_is_read_right_or_refused(name, tmp_path):
    read, expected = ODD[name]
    if isinstance(expected, str):
        with pytest.raises(CompanionError) as refusal:
            read(tmp_path)
        assert tmp_path.name in str(refusal.value) and expected in str(refusal.value)
    elif isinstance(expected, np.ndarray):  # to a level of 255
        np.testing.assert_allclose(read(tmp_path), expected.astype(float), rtol=0, atol=1.01 / 255)
    else:
        assert read(tmp_path) == expected
