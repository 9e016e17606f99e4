"""Images with captions, the data of image restoration.

    images = load("restoration/coco", "data", "train")        or own("mine")["train"]
    image, caption = images[0]                                float32 (3, H, W) in [0, 1], str
    high, caption, low = own("pairs")["train"][0]               your own images of low and high quality

Opening a set reads its lists only; an image is decoded on access. `root` is the data folder; `restoration_sets.yaml`
describes the sets. TIP degrades them, see `models.tip.degradations`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import to_dtype

from ..errors import CorruptFile, check_choice, typed
from ..io.files import read_json
from . import DataSet, check_listed, check_own, facts, find, once, own_set, tables
from .coco import CAPTION, check_fields
from .decoding import check_proportions
from .downloads import fetched
from .folders import at, entries, inside
from .images import Files, images_below

_FACTS = facts("restoration")
FOLDERS: dict[str, dict[str, str]] = _FACTS["FOLDERS"]
"""The folder of each split below the set's."""
DIV2K: dict[str, tuple[range, str]] = {
    split: (range(first, last + 1), md5) for split, ((first, last), md5) in _FACTS["DIV2K"].items()
}
"""Numbers of the images, and the MD5 of the archive."""


class Captioned(Files):
    """Images with captions: `images[i]` is (float32 (3, H, W) in [0, 1], the caption, "" where there is none).

    Attributes:
        captions: of the N images.

    Photographs are rotated upright by their EXIF orientation.

    Raises (on indexing) as `images.Files`.
    """

    each: ClassVar[tuple[str, ...]] = ("sources", "captions")

    def __init__(self, dataset: DataSet, root: Path, sources: Sequence[str], captions: Sequence[str]):
        super().__init__(dataset, root, sources)
        self.captions = tuple(captions)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image = torch.from_numpy(self.pixels(index)[1]).permute(2, 0, 1)
        return to_dtype(image, torch.float32, scale=True), self.captions[index]


class QualityPairs(Captioned):
    """Pairs of one scene: `pairs[i]` is (high quality (3, H, W), caption, low quality (3, h, w)), both in [0, 1].

    Raises (on indexing) as `images.Files`; also `CorruptFile`: the two have other proportions.
    """

    each = (*Captioned.each, "low")

    def __init__(
        self, dataset: DataSet, root: Path, sources: Sequence[str], captions: Sequence[str], low: Sequence[str]
    ):
        super().__init__(dataset, root, sources, captions)
        self.low = Captioned(dataset, root, low, captions)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        high, caption = super().__getitem__(index)
        low = self.low[index][0]
        check_proportions(self.low.sources[index], low, high)
        return high, caption, low


# --- public functions -------------------------------------------------------------------------------------------------


@typed
def load(name: str, root: str | Path, split: str) -> Captioned:
    """One split of a set: "train" and "test" of "restoration/coco" and "restoration/div2k".

    Raises:
        BadParameter: unknown name or split.
        MissingData: the folder, the captions or images are missing, or not as many as published.
        CorruptFile: captions that are truncated, or have a wrong or missing field, which is named.
    """
    dataset, root = find(name, "restoration"), Path(root)
    check_choice("split", split, FOLDERS[dataset.name])
    sources, captions, listing = _read(dataset, root, split)
    check_listed(dataset, root, (sources[0], sources[-1]), listing)  # two files only: opening must stay instant
    found = Captioned(dataset, root, sources, captions)
    found.listing = listing
    return found


@typed
def own(root: str | Path) -> dict[str, Captioned]:
    """Your own images, see `companion.data`: "train", of `images/` and `captions.jsonl` next to it, or of a folder of
    images alone, without captions.

    With `high/` and `low/` instead of `images/`, whose files have the same names, they are `QualityPairs`; a name in
    `low/` may end in the scale: 0001x4.png.

    Raises:
        MissingData: no such folder, no images, an image with a caption is missing, or one of a pair.
        CorruptFile: a malformed line of `captions.jsonl`, or an image that is in it, or in `low/`, twice.
    """
    layout = f"{_FACTS['OWN']}\nor images alone, without captions; or high/ and low/ with the same file names"
    dataset, root = own_set(root, "restoration", layout), Path(root)
    kinds = [kind for kind in ("high", "low") if (root / kind).is_dir()]
    if len(kinds) == 1:
        raise dataset.missing(root, f"{root} has {kinds[0]}/ alone: pairs need high/ and low/")
    sources, captions = _own(dataset, root, kinds[0] if kinds else "images")
    low = _low(root / "low", sources) if kinds else []
    for paths in (sources, low):
        check_own(dataset, root, {"train": paths})
    args = dataset, root, sources, captions
    return {"train": QualityPairs(*args, low) if kinds else Captioned(*args)}


@once
def read_captions(path: str | Path) -> Mapping[str, str]:
    """File name to caption, the first by id that has a word, from a file of COCO's captions, in the order of the
    images' ids.

    Raises `CorruptFile` with the path and the field.
    """
    path, found = Path(path), read_json(path)
    try:
        check_fields(found["annotations"], "annotations[{}]", CAPTION, partial(CorruptFile, path))
        files = {image["id"]: inside(path, f"image {image['id']}", image["file_name"]) for image in found["images"]}
        rows = sorted(found["annotations"], key=lambda row: row["id"], reverse=True)
        rows.sort(key=lambda row: bool(row["caption"].split()))
        first = {row["image_id"]: " ".join(row["caption"].split()) for row in rows}
        named = {files[image]: first.pop(image, "") for image in sorted(files)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(path, f"not in COCO's format for captions ({error!r})") from error
    if first or not files:
        raise CorruptFile(path, f"no image has the ids {[*first][:9]}" if first else "no images")
    return MappingProxyType(named)


# --- called by `companion.data` ---------------------------------------------------------------------------------------


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`: the archives of DIV2K that are not there, each verified."""
    for split, (numbers, md5) in DIV2K.items():
        name = FOLDERS[dataset.name][split]
        if not all((_place(dataset.folder(root), name) / f"{i:04d}.png").is_file() for i in numbers):
            with fetched(dataset, root, progress) as new:
                download_and_extract_archive(f"{_FACTS['DIV2K_URL']}{name}.zip", str(new), md5=md5)


# --- implementation ---------------------------------------------------------------------------------------------------


def _place(folder: Path, name: str) -> Path:
    """A split's folder, also in `images/`, or in one of its own name, as some archives unpack."""
    place = at(folder, name, f"images/{name}")
    return inner if (inner := at(place, name)).is_dir() else place


def _read(dataset: DataSet, root: Path, split: str) -> tuple[list[str], list[str], str]:
    """Paths and captions of a split, and the name of their file."""
    folder = dataset.folder(root)
    place = _place(folder, FOLDERS[dataset.name][split])
    if dataset.name == "restoration/div2k":
        return [f"{place}/{number:04d}.png" for number in DIV2K[split][0]], [""] * len(DIV2K[split][0]), ""
    named = _FACTS["CAPTIONS"][split]
    file = tables.existing(dataset, root, at(folder, named, Path(named).name))
    found = read_captions(file)
    tables.check_count(dataset, root, len(found), dataset.sizes[split], f"images in {file}")
    return [f"{place}/{name}" for name in found], list(found.values()), file.name


def _low(folder: Path, high: Sequence[str]) -> list[str]:
    """The files of low quality of images of high quality: of the same name, or with the scale at its end."""
    there, scaled = set(entries(folder)), defaultdict[str, list[str]](list)
    for name in sorted(there):
        scaled[re.sub(r"x[0-9]$", "", Path(name).stem)].append(name)
    names = [Path(path).name for path in high]
    found = {name: [name] if name in there else scaled.get(Path(name).stem, [name]) for name in names}
    for name, same in found.items():
        if len(same) > 1:
            raise CorruptFile(folder, f"{' and '.join(same)} are both of {name}: keep one of them")
    return [f"{folder}/{found[name][0]}" for name in names]


def _own(own: DataSet, folder: Path, images: str) -> tuple[list[str], list[str]]:
    """Paths and captions of a folder in the companion's layout, or of a folder of images alone."""
    if not folder.is_dir():
        raise own.missing(folder, f"no folder {folder}")
    listing = at(folder, "captions.jsonl")
    if not listing.is_file():
        place = folder / images if (folder / images).is_dir() else folder
        found = [path for path in images_below(place) if Path(path).parent == place]
        if not found:
            raise own.missing(folder, f"no images in {place}")
        return found, [""] * len(found)
    sources, captions = [], []
    for number, line in enumerate(tables.read_text(listing).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            sources.append(f"{folder}/{images}/{inside(listing, f'line {number}', row['file'])}")
            captions.append(" ".join(row["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = '{"file": "1.png", "caption": "a zebra"}'
            raise CorruptFile(listing, f"line {number}: expected {wanted}, found {line[:80]!r}") from None
    if not sources:
        raise CorruptFile(listing, "no images in it")
    return sources, captions
