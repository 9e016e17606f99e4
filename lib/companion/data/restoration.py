"""Images with captions, and degraded copies with restoration prompts: the data of TIP.

    images = load("restoration/coco", "data", "train")        or own_folder("mine")
    image, caption = images[0]                                float32 (3, H, W) in [0, 1], str
    train = Degraded(images, 512)
    train[0]                                                    Sample(clean, degraded, semantic, restoration, ops)
    test = Degraded(images, 512, **TASKS["parameterised"])    deterministic

Opening a set reads its lists only; an image is decoded, and degraded, on access. `root` is the data folder;
`restoration_sets` describes the sets.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import resize, to_dtype

from ..errors import BadParameter, CorruptFile, check_choice
from ..ops.files import read_json
from . import DataSet, Status, decoding, downloading, find, own_set
from .classification import Images, _absent, _inside, check_listed
from .degradations import BLIND, Op, RealESRGAN, Recipe, blind, degrade, prompt
from .restoration_sets import CAPTIONS, DIV2K, DIV2K_URL, FOLDERS, OWN


class Captioned(Images):
    """Images with captions: `images[i]` is (float32 (3, H, W) in [0, 1], the caption, "" where there is none).

    Attributes:
        captions: of the N images.

    Photographs are rotated upright by their EXIF orientation.

    Raises (on indexing) as `classification.Images`.
    """

    def __init__(self, dataset: DataSet, root: Path, sources: Sequence[str], captions: Sequence[str]):
        super().__init__(dataset, root, sources, range(len(sources)), 0)
        self.captions = tuple(captions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = torch.from_numpy(decoding.upright(*self.pixels(index))).permute(2, 0, 1)
        return to_dtype(image, torch.float32, scale=True), self.captions[index]


# --- public functions -------------------------------------------------------------------------------------------------


def load(name: str, root: str | Path, split: str) -> Captioned:
    """One split of a set: "train" and "test" of "restoration/coco" and "restoration/div2k"; the pocket set has "val"
    too.

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

    Raises:
        MissingData: no such folder, no images, or an image with a caption is missing.
        CorruptFile: a malformed line of `captions.jsonl`.
    """
    folder = Path(folder)
    own = own_set(folder, "restoration", OWN + "\nor images alone, without captions")
    sources, captions = _own(own, folder, folder)
    check_listed(own, folder, sources)
    return Captioned(own, folder, sources, captions)


class Sample(NamedTuple):
    """A clean image, its degraded copy, and the two prompts."""

    clean: Tensor  # (3, S, S) in [0, 1]
    degraded: Tensor  # (3, S, S) in [0, 1]
    semantic: str  # c_s: the caption, or ""
    restoration: str  # c_r: what was done, or BLIND
    ops: tuple[Op, ...] | None  # the degradations; None for Real-ESRGAN's, which has no prompt


TASKS: dict[str, dict[str, Any]] = {
    "parameterised": {"share_blind": 0.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False, "flip": False},
    "real-esrgan": {"share_blind": 1.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False, "flip": False},
}
"""Arguments of `Degraded` for a test: every sample has its true texts and is the same every time (ours)."""


class Degraded(Dataset):
    """Square images and degraded copies: `samples[i]` is a `Sample`.

    The figure has two random choices: whether c_r describes the degradations or is `BLIND`, and whether c_s is the
    caption or empty; it does not give their probabilities. All numbers here are ours (section 5); a sample depends on
    `seed` and its index.

    Args:
        pictures: images with captions, such as `Captioned`.
        size: S. An image's shorter side is resized to S, then a square is cropped: at random if `fresh` is set,
            otherwise the centre. So the caption still describes most of the crop.
        recipe: of the parameterised pipeline.
        settings: of Real-ESRGAN's.
        share_blind: share of samples degraded by Real-ESRGAN's pipeline; their c_r is `BLIND`.
        blind_prompt: probability that c_r of another sample is also `BLIND`.
        no_caption: probability that c_s is empty.
        fresh: a new draw each time a sample is loaded, from torch's random state, which `fit.fit` sets by seed, epoch
            and index.
        flip: horizontal flip with probability 0.5.
        seed: of all random draws.
        back, edge: see `degradations.degrade`.
    """

    def __init__(
        self,
        pictures: Dataset,
        size: int,
        recipe: Recipe | None = None,
        settings: RealESRGAN | None = None,
        *,
        share_blind: float = 0.5,
        blind_prompt: float = 0.5,
        no_caption: float = 0.3,
        fresh: bool = True,
        flip: bool = True,
        seed: int = 0,
        back: str = "op",
        edge: str = "replicate",
    ):
        for name, value in (("share_blind", share_blind), ("blind_prompt", blind_prompt), ("no_caption", no_caption)):
            if not 0 <= value <= 1:
                raise BadParameter(name, value, "a probability, 0 to 1")
        if size < 1:
            raise BadParameter("size", size, "1 pixel or more")
        self.pictures, self.size, self.recipe, self.settings = pictures, size, recipe or Recipe(), settings
        self.share_blind, self.blind_prompt, self.no_caption = share_blind, blind_prompt, no_caption
        self.fresh, self.flip, self.seed, self.back, self.edge = fresh, flip, seed, back, edge

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture, caption = self.pictures[index]
        numbers = (self.seed, index, *([int(torch.randint(2**31, ()))] if self.fresh else []))
        # all numbers are always drawn: one probability must not change the draws of another
        where, turned, is_blind, unnamed, untold = np.random.default_rng([4, *numbers]).random(5)
        clean = _square(picture, self.size, where if self.fresh else 0.5)
        if self.flip and turned < 0.5:
            clean = clean.flip(-1)
        if is_blind < self.share_blind:
            ops, degraded, restoration = None, blind(clean, numbers, self.settings), BLIND
        else:
            ops = self.recipe.draw(numbers)
            degraded = degrade(clean, ops, numbers, back=self.back, edge=self.edge)
            restoration = BLIND if unnamed < self.blind_prompt else prompt(ops)
        return Sample(clean, degraded, "" if untold < self.no_caption else caption, restoration, ops)


TEXTS = (
    "own",
    "no text",
    "semantic only",
    "restoration only",
    "blind prompt",
    "wrong semantic prompt",
    "wrong restoration prompt",
    "prompts swapped",
)


def texts(samples: Sequence[Sample], kind: str = "own") -> tuple[list[str], list[str]]:
    """The two prompts of each sample, for the UNet and for the adaptor, by kind of test.

    "own": c_s and c_r. "no text": "" and `BLIND`. "semantic only", also called "blind prompt": c_s and `BLIND`.
    "restoration only": "" and c_r. "wrong ...": that of the next sample with a different one. "prompts swapped": c_r to
    the UNet, c_s to the adaptor.

    Raises `BadParameter` for another kind, or where no sample has another text.
    """
    check_choice("texts", kind, TEXTS)
    semantic, restoration = [s.semantic for s in samples], [s.restoration for s in samples]

    def other(given: list[str]) -> list[str]:
        if len(set(given)) < 2:
            raise BadParameter("samples", f"{len(given)} with the same text", f"some with another, for {kind!r}")
        return [next(t for t in (*given[i:], *given[:i]) if t != given[i]) for i in range(len(given))]

    none, blind_only = [""] * len(samples), [BLIND] * len(samples)
    return {
        "own": lambda: (semantic, restoration),
        "no text": lambda: (none, blind_only),
        "semantic only": lambda: (semantic, blind_only),
        "restoration only": lambda: (none, restoration),
        "blind prompt": lambda: (semantic, blind_only),
        "wrong semantic prompt": lambda: (other(semantic), restoration),
        "wrong restoration prompt": lambda: (semantic, other(restoration)),
        "prompts swapped": lambda: (restoration, semantic),
    }[kind]()


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
    if dataset.name == "pocket/restoration":
        return _own(dataset, root, pictures)
    file = folder / CAPTIONS[split]
    if not file.is_file():
        raise dataset.missing(root, f"{file} is not there")
    found = read_captions(file)
    if (known := dataset.sizes[split]) != len(found):
        raise dataset.missing(root, f"{file} has {len(found):,} images, {known:,} are expected")
    return [f"{pictures}/{name}" for name in found], list(found.values())


def _own(dataset: DataSet, root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Paths and captions of a folder in the companion's layout, or of a folder of images alone."""
    if not folder.is_dir():
        raise dataset.missing(root, f"no folder {folder}")
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        place = folder / "images" if (folder / "images").is_dir() else folder
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
        sources.append(f"{folder}/images/{_inside(listing, f'line {number}', file)}")
        captions.append(" ".join(caption.split()))
    if not sources:
        raise CorruptFile(listing, "no images in it")
    return sources, captions


def _square(picture: Tensor, size: int, where: float) -> Tensor:
    """(3, size, size): the shorter side resized to `size`, then cropped at `where`, 0 to 1, along the longer side."""
    height, width = picture.shape[-2:]
    if min(height, width) != size:
        by = size / min(height, width)
        wanted = [max(size, round(height * by)), max(size, round(width * by))]
        picture = resize(picture, wanted, interpolation=3, antialias=True).clamp(0, 1)
        height, width = wanted
    top, left = round(where * (height - size)), round(where * (width - size))
    return picture[:, top : top + size, left : left + size].contiguous()
