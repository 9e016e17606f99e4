"""Images with captions, the data of image restoration.

    images = load("restoration/coco", "data", "train")        or own_folder("mine")
    image, caption = images[0]                                float32 (3, H, W) in [0, 1], str
    high, caption, low = own_folder("pairs")[0]               your own images of low and high quality

Opening a set reads its lists only; an image is decoded on access. `root` is the data folder; `restoration_sets`
describes the sets. TIP degrades them, see `models.tip.degradations`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import to_dtype

from ..errors import CorruptFile, check_choice
from ..ops.files import read_json
from . import DataSet, Status, decoding, downloading, find, own_set
from .classification import Images, _absent, _inside, check_listed
from .restoration_sets import CAPTIONS, DIV2K, DIV2K_URL, FOLDERS, OWN


class Captioned(Images):
    """Images with captions: `images[i]` is (float32 (3, H, W) in [0, 1], the caption, "" where there is none).

    Attributes:
        captions: of the N images.

    Photographs are rotated upright by their EXIF orientation.

    Raises (on indexing) as `classification.Images`.
    """

    each = ("sources", "labels", "captions")

    def __init__(self, dataset: DataSet, root: Path, sources: Sequence[str], captions: Sequence[str]):
        super().__init__(dataset, root, sources, range(len(sources)), 0)
        self.captions = tuple(captions)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image = torch.from_numpy(decoding.upright(*self.pixels(index))).permute(2, 0, 1)
        return to_dtype(image, torch.float32, scale=True), self.captions[index]


class Pairs(Captioned):
    """Pairs of one scene: `pairs[i]` is (high quality (3, H, W), caption, low quality (3, h, w)), both in [0, 1]."""

    def __init__(
        self, dataset: DataSet, root: Path, sources: Sequence[str], captions: Sequence[str], low: Sequence[str]
    ):
        super().__init__(dataset, root, sources, captions)
        self.low = Captioned(dataset, root, low, captions)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return *super().__getitem__(index), self.low[index][0]

    def part(self, rows: Sequence[int]) -> Self:
        """The pairs of these numbers."""
        found = super().part(rows)
        found.low = self.low.part(rows)
        return found


# --- public functions -------------------------------------------------------------------------------------------------


def load(name: str, root: str | Path, split: str) -> Captioned:
    """One split of a set: "train" and "test" of "restoration/coco" and "restoration/div2k".

    Raises:
        BadParameter: unknown name or split.
        MissingData: the folder, the captions or images are missing, or not as many as published.
        CorruptFile: captions that are truncated, or have a wrong or missing field, which is named.
    """
    dataset, root = find(name, "restoration"), Path(root)
    check_choice("split", split, FOLDERS[dataset.name])
    sources, captions = _read(dataset, root, split)
    for path in (sources[0], sources[-1]):  # check two files only: opening must stay instant
        if not Path(path).is_file():
            raise dataset.missing(root, f"the image {path} is not there")
    return Captioned(dataset, root, sources, captions)


def own_folder(folder: str | Path) -> Captioned:
    """Your own images: `images/` and `captions.jsonl` next to it, or a folder of images alone, without captions.

    With `high/` and `low/` instead of `images/`, whose files have the same names, they are `Pairs`.

    Raises:
        MissingData: no such folder, no images, an image with a caption is missing, or one of a pair.
        CorruptFile: a malformed line of `captions.jsonl`.
    """
    folder = Path(folder)
    layout = f"{OWN}\nor images alone, without captions; or high/ and low/ with the same file names"
    own = own_set(folder, "restoration", layout)
    kinds = [kind for kind in ("high", "low") if (folder / kind).is_dir()]
    if len(kinds) == 1:
        raise own.missing(folder, f"{folder} has {kinds[0]}/ alone: pairs need high/ and low/")
    sources, captions = _own(own, folder, folder, kinds[0] if kinds else "images")
    check_listed(own, folder, sources)
    if not kinds:
        return Captioned(own, folder, sources, captions)
    low = [f"{folder}/low/{Path(path).name}" for path in sources]
    check_listed(own, folder, low)
    return Pairs(own, folder, sources, captions, low)


def read_captions(path: str | Path) -> dict[str, str]:
    """File name to caption, the first by id, from a file of COCO's captions, in the order of the images' ids.

    Raises `CorruptFile` with the path, the entry and the field.
    """
    path, found = Path(path), read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(n), list) for n in ("images", "annotations")):
        raise CorruptFile(path, "not COCO's format: an object with the lists 'images' and 'annotations' was expected")

    def field(part: str, number: int, name: str, kind: type):
        entry = found[part][number]
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptFile(path, f"{part}[{number}]: '{name}' is {value!r}")
        return value

    files = {}
    for number in range(len(found["images"])):
        name = _inside(path, f"images[{number}]", field("images", number, "file_name", str))
        files[field("images", number, "id", int)] = name
    first: dict[int, tuple[int, str]] = {}
    for number in range(len(found["annotations"])):
        image, own = field("annotations", number, "image_id", int), field("annotations", number, "id", int)
        caption = " ".join(field("annotations", number, "caption", str).split())
        if image not in files:
            raise CorruptFile(path, f"annotations[{number}]: 'image_id' is {image}, which no image is")
        if image not in first or own < first[image][0]:
            first[image] = own, caption
    if not files:
        raise CorruptFile(path, "no images")
    return {files[image]: first[image][1] if image in first else "" for image in sorted(files)}


# --- called by `companion.data` ---------------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: captions are read, no image is opened."""
    folder, counts = dataset.folder(root), []
    if not any((folder / name).exists() for name in (*FOLDERS[dataset.name].values(), *_lists(dataset))):
        return Status("missing", f"no captions and no images in {folder}")
    for split in FOLDERS[dataset.name]:
        sources, _ = _read(dataset, root, split)
        check_listed(dataset, root, sources)
        counts.append(f"{len(sources):,} in {split}")
    return Status("present", f"images: {', '.join(counts)}")


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`: DIV2K, each archive verified, unpacked in a hidden folder and moved when complete."""
    folder = dataset.folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with downloading(dataset, folder, progress):
        for split, (_, md5) in DIV2K.items():
            name = FOLDERS[dataset.name][split]
            if not _absent({f"{folder}/{name}/{i:04d}.png" for i in DIV2K[split][0]}):
                continue
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as new:
                download_and_extract_archive(f"{DIV2K_URL}{name}.zip", new, md5=md5)
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copytree(Path(new) / name, folder / name, dirs_exist_ok=True, copy_function=shutil.move)


# --- implementation ---------------------------------------------------------------------------------------------------


def _lists(dataset: DataSet) -> list[str]:
    return list(CAPTIONS.values()) if dataset.name == "restoration/coco" else []


def _read(dataset: DataSet, root: Path, split: str) -> tuple[list[str], list[str]]:
    """Paths and captions of a split."""
    folder = dataset.folder(root)
    pictures = folder / FOLDERS[dataset.name][split]
    if not folder.is_dir():
        raise dataset.missing(root)
    if dataset.name == "restoration/div2k":
        return [f"{pictures}/{number:04d}.png" for number in DIV2K[split][0]], [""] * len(DIV2K[split][0])
    file = folder / CAPTIONS[split]
    if not file.is_file():
        raise dataset.missing(root, f"{file} is not there")
    found = read_captions(file)
    if (known := dataset.sizes[split]) != len(found):
        raise dataset.missing(root, f"{file} has {len(found):,} images, {known:,} are expected")
    return [f"{pictures}/{name}" for name in found], list(found.values())


def _own(dataset: DataSet, root: Path, folder: Path, images: str) -> tuple[list[str], list[str]]:
    """Paths and captions of a folder in the companion's layout, or of a folder of images alone."""
    if not folder.is_dir():
        raise dataset.missing(root, f"no folder {folder}")
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        place = folder / images if (folder / images).is_dir() else folder
        files = (path for path in place.iterdir() if path.suffix.lower() in decoding.SUFFIXES)
        found = sorted(str(path) for path in files if not path.name.startswith("."))
        if not found:
            raise dataset.missing(root, f"no images in {place}")
        return found, [""] * len(found)
    sources, captions = [], []
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CorruptFile(listing, f"not text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, caption = row["file"], row["caption"]
            if not isinstance(file, str) or not isinstance(caption, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = '{"file": "1.png", "caption": "a zebra"}'
            raise CorruptFile(listing, f"line {number}: expected {wanted}, found {line[:80]!r}") from None
        sources.append(f"{folder}/{images}/{_inside(listing, f'line {number}', file)}")
        captions.append(" ".join(caption.split()))
    if not sources:
        raise CorruptFile(listing, "no images in it")
    return sources, captions
