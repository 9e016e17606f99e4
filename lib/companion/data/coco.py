"""Files in COCO's format: annotations, checked and as arrays, and rows of results.

A class has an index, its rank among the categories sorted by id, and a category id.
"""

from __future__ import annotations

import functools
import itertools
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import numpy as np

from ..errors import BadParameter, CompanionError, CorruptFile
from ..io.files import read_json
from . import Parts

LARGEST = 1e9  # pixels of a box, far beyond any image: larger values overflow


class Row(msgspec.Struct, gc=False):
    """An entry of "annotations" as far as it is read; msgspec skips the rest of it, such as polygons."""

    image_id: int | float | str  # pandas writes 1.0
    category_id: int | float
    bbox: tuple[float, float, float, float]
    id: int | float | str | None = None
    area: float | None = None
    iscrowd: bool | float | None = None


class Shaped(Row, gc=False):
    """The same with its polygons or run lengths, not decoded."""

    segmentation: msgspec.Raw = msgspec.Raw(b"null")


Entry = TypeVar("Entry", bound=Row)


class Content(msgspec.Struct, Generic[Entry]):
    """A file in COCO's format."""

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[Entry] = []


@dataclass
class Annotations(Parts):
    """The n annotations of a file as arrays; Python objects of LVIS' take 8 GB, and as much in each loader's process.

    Attributes:
        images, labels: (n,) the number of the image, and of the class by category id.
        boxes: (n, 4) x, y, width, height.
        crowd, areas, ids: (n,); no area is NaN.
        shapes: (n, 2) begin and end of each segmentation in `text`, which has them only when they were asked for.
    """

    each: ClassVar[tuple[str, ...]] = ("images", "labels", "boxes", "crowd", "areas", "ids", "shapes")
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    shapes: np.ndarray
    text: bytes

    def shape(self, index: int) -> Any:
        """The segmentation of an annotation, polygons or run lengths; None where the file has none."""
        start, end = self.shapes[index]
        return msgspec.json.decode(self.text[start:end])


def read_annotations(given: str | Path | Mapping, shapes: bool = False) -> dict[str, Any]:
    """A file in COCO's or LVIS' format, or its content: "images" and "categories" as they are there, checked against
    `SCHEMA`, and "annotations" as `Annotations`, with segmentations only if `shapes`.

    LVIS' images have a `coco_url` instead of a `file_name`; its last two parts are used.

    Raises `CorruptFile` with the path, the entry and the field.
    """
    path = "annotations" if isinstance(given, Mapping) else given

    def wrong(detail: str) -> CorruptFile:
        return CorruptFile(path, f"not COCO's format: {detail}")

    def decoded(content: Any) -> Content:
        try:
            text = content if isinstance(content, bytes) else msgspec.json.encode(content)
            return msgspec.json.decode(text, type=Content[Shaped] if shapes else Content[Row])
        except (msgspec.ValidationError, OverflowError, UnicodeError) as error:
            raise wrong(str(error)) from error

    try:
        content = decoded(given if isinstance(given, Mapping) else Path(given).read_bytes().removeprefix(BOM_UTF8))
    except (msgspec.DecodeError, RecursionError, FileNotFoundError):  # named by line; or NaN, which Python's json reads
        content = decoded(read_json(path))
    found, known = {"images": content.images, "categories": content.categories}, dict[str, dict[object, int]]()
    for row in itertools.chain(content.images, content.categories):
        for name in NUMBERS:  # pandas writes 1.0
            if isinstance(value := row.get(name), float) and value.is_integer():
                row[name] = int(value)
    for image in content.images:
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    for part, fields in SCHEMA.items():
        if not found[part]:
            raise wrong(f"an empty list '{part}'")
        check_fields(found[part], part + "[{}]", fields, wrong)
        known[part] = {}
        for number, entry in enumerate(found[part]):
            if known[part].setdefault(entry["id"], number) != number:
                raise wrong(f"{part}[{number}]: id {entry['id']!r} stands there twice")
    for name in (f"{kind}_category_ids" for kind in ("pos", "neg", "not_exhaustive")):
        for number, image in enumerate(content.images):
            values = image.get(name, [])
            values = values if isinstance(values, list) else [values]
            if lost := [v for v in values if not is_id(v) or v not in known["categories"]]:
                raise wrong(f"images[{number}]: '{name}' is {lost[0]!r}, which is none of 'categories'")
    ranks = {category: i for i, category in enumerate(sorted(known["categories"]))}  # type: ignore[type-var]
    return {**found, "annotations": arrays(content.annotations, known["images"], ranks, wrong)}


def arrays(rows: Sequence[Any], images: Mapping, ranks: Mapping, wrong: Callable[[str], CompanionError]) -> Annotations:
    """The checked entries of "annotations" as arrays; `images`, `ranks`: number of an image or class by its id."""

    def array(values: Iterable, dtype: Any) -> np.ndarray:
        return np.fromiter(values, dtype, len(rows))

    def check(name: str, wrongs: np.ndarray, why: str) -> None:
        for number in np.flatnonzero(wrongs)[:1]:
            raise wrong(f"annotations[{number}]: '{name}' is {getattr(rows[number], name)!r}{why}")

    numbers = array((images.get(row.image_id, -1) for row in rows), np.int32)
    labels = array((ranks.get(row.category_id, -1) for row in rows), np.int32)
    boxes = array((row.bbox for row in rows), np.dtype((float, 4)))
    check("image_id", numbers < 0, ", which is none of 'images'")
    check("category_id", labels < 0, ", which is none of 'categories'")
    check("iscrowd", array((row.iscrowd not in (None, 0, 1) for row in rows), bool), ", neither 0 nor 1")
    check("area", array(((row.area or 0) < 0 for row in rows), bool), "")
    check("bbox", (np.abs(boxes) > LARGEST).any(1) | (boxes[:, 2:] < 0).any(1), "")
    text = b"".join(row.segmentation for row in rows if isinstance(row, Shaped))
    lengths = array((len(row.segmentation) if isinstance(row, Shaped) else 0 for row in rows), np.int64)
    return Annotations(
        images=numbers,
        labels=labels,
        boxes=boxes,
        crowd=array((bool(row.iscrowd) for row in rows), bool),
        areas=array((np.nan if row.area is None else row.area for row in rows), float),
        ids=np.array([row.id for row in rows]),
        shapes=np.stack([lengths.cumsum() - lengths, lengths.cumsum()], 1),
        text=text,
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_id(value: object) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_box(value: object) -> bool:
    """Whether `value` is [x, y, width, height] in pixels."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value)) and min(value[2:]) >= 0


def _is_file(value: object) -> bool:
    """Whether `value` is a path below the images' folder: a file must not make us read others."""
    path = PureWindowsPath(value if isinstance(value, str) else "..")  # its parts end at / too
    return not path.anchor and ".." not in path.parts


Fields = Mapping[str, Callable[[Any], bool]]
_SIDE: Fields = dict.fromkeys(("width", "height"), lambda value: _is_whole(value) and value > 0)
SCHEMA: dict[str, Fields] = {
    "categories": {"id": _is_whole, "name": lambda value: isinstance(value, str)},
    "images": {"id": is_id, "file_name": _is_file, **_SIDE},
}
"""The fields of each part of COCO's format that are read here, and what each must be."""
CAPTION: Fields = {"image_id": is_id, "caption": lambda value: isinstance(value, str)}
"""The fields of an annotation in a file of captions."""
NUMBERS = ("id", "width", "height")
SHAPES: dict[str, Fields] = {
    "bbox": {"bbox": is_box},
    "segm": {"segmentation": lambda value: isinstance(value, dict) and {"size", "counts"} <= value.keys()},
}
"""The shape in a row of COCO's result format, by the kind of results."""


def check_fields(rows: Sequence, place: str, fields: Fields, wrong: Callable[[str], CompanionError]) -> None:
    """Raise `wrong` of the first row without one of the fields, or with a value that a field cannot have.

    `place` names a row in the message, such as "images[{}]".
    """
    for number, row in enumerate(rows):
        for name, fits in fields.items():
            value = row.get(name) if isinstance(row, Mapping) else row
            if not isinstance(row, Mapping) or not fits(value):
                by = f" (id {row['id']})" if isinstance(row, Mapping) and "id" in row else ""
                raise wrong(f"{place.format(number)}: '{name}' is {str(value)[:80]!r}{by}")


def failure(name: str, wanted: str, file: str | Path | None, detail: str) -> CompanionError:
    return CorruptFile(file, detail) if file else BadParameter(name, detail, wanted)


def check_results(rows: object, file: str | Path | None = None, kind: str = "bbox") -> list[dict]:
    """`rows`, checked as results in COCO's format: image_id, category_id, score, and bbox or segmentation.

    Raises `CorruptFile` with the name of their `file`, `BadParameter` without one; row and field are named.
    """

    wrong = functools.partial(failure, "results", "rows of COCO's result format", file)
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise wrong("not COCO's result format: a list of objects was expected")
    fields = {"image_id": is_id, "category_id": _is_whole, "score": _is_number} | dict(SHAPES[kind])
    check_fields(rows, "row {}", fields, wrong)
    return [dict(row) for row in rows]
