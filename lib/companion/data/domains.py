"""Images of other domains, remote sensing and medicine, in class folders with a split into train, val and test.

    sets = splits("remote/aid", "data", clip_transform(backbones.input_of(clip)))
    image, label = sets["test"][0]      # float32 (3, 224, 224), int
    sets["test"].class_names            # the class names of the prompts, by label

Opening a set lists its folders; an image is decoded on access. `root` is the data folder (`data`).
`domains_sets` describes the sets; `fewshot` builds the protocols of prompt learning from the result of `splits`.

A set is a folder with one folder per class, and optionally a list of its splits next to it:

    {"train": [[path below the parent of the class folders, label, class name], ...], "val": [...], "test": [...]}

Labels follow the sorted names of the folders (upper case before lower case), as in the authors' code, for any spelling
on disk, so that the same classes are "base" everywhere. Without a list each class is split by a fixed shuffle. A new
set needs a `DataSet` with task "domains" in `DATASETS`, and `split.json` by its class folders (in `images/` or
directly).
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..errors import CompanionError, CorruptFile, check_choice
from ..ops.config import configure
from ..ops.files import read_json
from . import DataSet, Status, downloading, find, own_set
from .classification import (
    Images,
    _class_folders,
    _inside,
    _normalised,
    check_listed,
    class_folders,
    image_folder,
    images_of_classes,
    warn_of,
)
from .domains_sets import CLASSES, RELEASED_AS, TORCHGEO, WHOLE_SET_NAMES, image_folders, split_file, split_sizes

SPLITS = ("train", "val", "test", "all")
_PARTS = SPLITS[:3]
CROP = (0.08, 1.0)  # range of the cropped area of a training image
Samples = list[tuple[str, int]]  # path below the parent of the class folders, label
Transform = Callable[[Image.Image], torch.Tensor]


# --- public functions --------------------------------------------------------------------------------------------


def splits(name: str, root: str | Path, transform: Transform | None = None) -> dict[str, Images]:
    """Every split of a set.

    Args:
        name: "remote/aid", "medical/chmnist", ...: a name of `DATASETS` whose task is "domains".
        root: the data folder; searched for `DATASETS[name].folders`.
        transform: from a PIL image (RGB) to a tensor (3, H, W), see `clip_transform`; None scales to 0..1 and keeps the
            size. To set another one for a split: `sets["train"].transform = ...`.

    Returns:
        {"train", "val", "test", "all"}; "all" is every image, the test set of domain generalisation, for which three
        sets name a class differently (`domains_sets.WHOLE_SET_NAMES`). Each is a data set of (float32 tensor (3, H, W),
        int) with `.labels`, `.classes`, `.class_names` and `.name`.

    Raises:
        BadParameter: unknown name.
        MissingData: the folder, a class folder or images are missing, or their number differs from the published one.
        CorruptFile: a malformed entry of the list of splits; a folder that is no class of the set.
    """
    dataset = find(name, "domains")
    return _images(dataset, Path(root), transform)


def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Images:
    """One split of a set, "train", "val", "test" or "all"; otherwise as `splits`."""
    check_choice("split", split, SPLITS)
    return splits(name, root, transform)[split]


def own_folder(root: str | Path, transform: Transform | None = None) -> dict[str, Images]:
    """Your own images, as `splits` gives them: <class>/*.jpg below `root` or `root`/images.

    `root`/split.json is read if it exists, otherwise each class is split. Images in train/<class>/ and test/<class>/
    keep their split; without val/<class>/ a part of train is used. Folders are found as by
    `classification.class_folders`.

    Raises as `splits`.
    """
    root, skipped = Path(root), Counter[str]()
    own = own_set(
        root,
        "domains",
        '<class>/*.jpg    or images/<class>/*.jpg\nsplit.json       optional: {"train": [[path, label, class '
        'name], ...], "val": ..., "test": ...}\nor\n{train,val,test}/<class>/*.jpg    val split from train where there '
        "is none",
    )
    if (root / split_file(own.name)).is_file():
        return _images(own, root, transform)
    place, folders = class_folders(own, root, skipped)
    if not folders:
        return _images(own, place, transform)
    sets = image_folder(root, transform=transform)
    if "test" not in sets:
        raise own.missing(root, f"there is no folder {root / 'test'}")
    known, test = sets.pop("trainval"), sets["test"]
    sources, labels = [*known.sources, *test.sources], [*known.labels, *test.labels]
    return sets | {"all": Images(own, root, sources, labels, test.classes, transform, test.class_names)}


def clip_transform(input, train: bool = False) -> v2.Transform:
    """CLIP's transform, as used in prompt-learning papers (bicubic throughout).

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.
        train: a random crop of 8 to 100 % of the area, resized, flipped with probability 0.5; otherwise a resize of the
            short side and a centre crop.

    Returns:
        From a PIL image to a float32 tensor (3, size, size).
    """
    bicubic = v2.InterpolationMode.BICUBIC
    cut = (
        [v2.RandomResizedCrop(input.size, scale=CROP, interpolation=bicubic), v2.RandomHorizontalFlip(0.5)]
        if train
        else [v2.Resize(input.size, interpolation=bicubic), v2.CenterCrop(input.size)]
    )
    return configure(v2.Compose([*cut, *_normalised(input)]), {"input": input, "train": train}, clip_transform)


# --- called by `companion.data` ----------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: folders and lists are read, no image is opened."""
    _, parts = _read(dataset, root)
    base, _ = _place(dataset, root)
    wanted = {f"{base}/{path}" for part in _PARTS for path, _ in parts[part]}
    listing = split_file(dataset.name)
    listing = listing if (dataset.folder(root) / listing).is_file() else ""
    check_listed(dataset, root, wanted, listing)
    how = f"split by {listing}" if listing else "split with a fixed seed"
    return Status("present", f"{len(wanted):,} images in {base}, {how}")


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`. torchgeo downloads into a hidden folder, which is moved when complete."""
    try:
        from torchgeo import datasets as torchgeo
    except ImportError:
        raise CompanionError(
            f"torchgeo, which downloads {dataset.title}, is not installed. Either "
            "`pip install torchgeo` and fetch again, or get the images by hand and put them into "
            f"{dataset.folder(root)}"
        ) from None
    folder = dataset.folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with downloading(dataset, folder, progress), tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as new:
        getattr(torchgeo, TORCHGEO[dataset.name])(new, download=True, checksum=True)
        for archive in Path(new).glob("*.zip"):
            archive.unlink()
        # files of an incomplete copy are replaced, none of the user's others is removed
        shutil.copytree(new, folder, dirs_exist_ok=True, copy_function=shutil.move)


# --- implementation ----------------------------------------------------------------------------------------------


def _images(dataset: DataSet, root: Path, transform: Transform | None) -> dict[str, Images]:
    names, parts = _read(dataset, root)
    base, _ = _place(dataset, root)
    for part in _PARTS:
        for path, _ in (parts[part][0], parts[part][-1]):  # check two files only: opening must stay fast
            if not (base / path).is_file():
                raise dataset.missing(root, f"{split_file(dataset.name)} lists {path}, but {base / path} is not there")
    parts["all"] = sorted((sample for part in _PARTS for sample in parts[part]), key=lambda s: (s[1], s[0]))
    renamed = WHOLE_SET_NAMES.get(dataset.name, {})
    found = {}
    for part, samples in parts.items():
        called = [renamed.get(name, name) for name in names] if part == "all" else names
        paths, labels = [f"{base}/{path}" for path, _ in samples], [label for _, label in samples]
        found[part] = Images(dataset, root, paths, labels, len(names), transform, called)
    return found


def _read(dataset: DataSet, root: Path) -> tuple[list[str], dict[str, Samples]]:
    """Class names by label, and the samples of train, val and test: from the list or a new split."""
    folder = dataset.folder(root)
    if not folder.is_dir():
        raise dataset.missing(root)
    listing = folder / split_file(dataset.name)
    if listing.is_file():
        names, parts = _listed(dataset, listing)
    elif dataset.group == "own" or dataset.name in CLASSES:
        names, parts = _cut(dataset, root)
    else:  # a generated set has a fixed split, which a new split would not reproduce
        raise dataset.missing(root, f"{listing} is not there")
    counts = {part: len(samples) for part, samples in parts.items()}
    counts["all"] = sum(counts.values())
    for split, count in counts.items():
        if count != (expected := dataset.sizes.get(split, count)):
            raise dataset.missing(root, f"{folder} has {count:,} images for '{split}', {expected:,} are expected")
    return names, parts


def _place(dataset: DataSet, root: Path) -> tuple[Path, list[Path]]:
    """The folder that listed paths start from, and the folders that hold class folders: usually the same one."""
    folder, known = dataset.folder(root), CLASSES.get(dataset.name)
    for place in image_folders(dataset.name):
        holders = [folder / part for part in place.split("+")]
        if all(
            holder.is_dir() and any(known is None or _class(dataset, name) for name in _class_folders(holder))
            for holder in holders
        ):
            return (holders[0] if len(holders) == 1 else folder), holders
    raise dataset.missing(root, f"{folder} has no class folders")


def _class(dataset: DataSet, folder: str) -> str | None:
    """The class of a folder, by the name in the authors' code; None when the set has no such class."""
    folder = RELEASED_AS.get(dataset.name, {}).get(folder, folder)
    known = CLASSES[dataset.name]
    return folder if folder in known else next((name for name in known if _plain(name) == _plain(folder)), None)


def _plain(name: str) -> str:
    """A folder's name without case, blanks, underscores and the two misspellings of the authors' lists."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.replace("swimmimg", "swimming").replace("commerical", "commercial")


def _cut(dataset: DataSet, root: Path) -> tuple[list[str], dict[str, Samples]]:
    """Split each class by its own fixed shuffle, so that adding or removing a class does not change the others."""
    base, holders = _place(dataset, root)
    folders = sorted({name for holder in holders for name in _class_folders(holder)} - {"split_fewshot"})
    official = CLASSES.get(dataset.name)
    known = official or {folder: folder for folder in folders}
    class_of = {folder: _class(dataset, folder) if official else folder for folder in folders}
    if unknown := [folder for folder in folders if class_of[folder] is None]:
        raise CorruptFile(base, f"it has folders that are no class of {dataset.title}: {', '.join(unknown)}")
    if absent := sorted(set(known) - set(class_of.values())):
        raise dataset.missing(root, f"{len(absent)} of {len(known)} class folders below {base}: {', '.join(absent)}")

    names: list[str] = []
    parts: dict[str, Samples] = {part: [] for part in _PARTS}
    skipped: Counter[str] = Counter()
    for label, key in enumerate(sorted(known)):
        own = [folder for folder in folders if class_of[folder] == key]
        spelled = RELEASED_AS.get(dataset.name, {}).get(own[0], own[0])
        names.append(known.get(spelled, spelled))
        paths = sorted(
            Path(path).relative_to(base).as_posix()
            for holder in holders
            for path, _ in images_of_classes(holder, dict.fromkeys(own, label), skipped)
        )
        sizes = split_sizes(len(paths))
        if not all(sizes.values()):
            few = f"{len(paths)} images, too few for train, val and test" if paths else "no images"
            raise dataset.missing(root, f"the class folder {own[0]} below {base} has {few}")
        shuffled = np.random.default_rng(zlib.crc32(key.encode())).permutation(paths).tolist()
        start = 0
        for part, size in sizes.items():
            parts[part] += [(path, label) for path in shuffled[start : start + size]]
            start += size
    if official is None:
        warn_of(base, skipped)
    return names, parts


def _listed(dataset: DataSet, listing: Path) -> tuple[list[str], dict[str, Samples]]:
    """A list of splits with every entry checked: format, path inside the folder, one class per folder, no image
    twice."""
    content = read_json(listing)
    if not isinstance(content, Mapping) or not all(isinstance(content.get(part), list) for part in _PARTS):
        raise CorruptFile(listing, "expected a dict with the lists 'train', 'val' and 'test'")
    names: dict[int, str] = {}
    of_folder: dict[str, int] = {}
    seen: dict[str, str] = {}
    parts: dict[str, Samples] = {}
    for part in _PARTS:
        if not content[part]:
            raise CorruptFile(listing, f"'{part}' is empty")
        parts[part] = []
        for number, entry in enumerate(content[part], 1):
            where = f"'{part}', entry {number}"
            path, label, name = _entry(listing, where, entry)
            _inside(listing, where, path)
            if dataset.classes and label >= dataset.classes:
                raise CorruptFile(listing, f"{where}: label {label} is not in 0..{dataset.classes - 1}")
            if (before := names.setdefault(label, name)) != name:
                raise CorruptFile(listing, f"{where}: label {label} is {name!r} here, and {before!r} further up")
            folder = path.rpartition("/")[0]
            if (other := of_folder.setdefault(folder, label)) != label:
                raise CorruptFile(listing, f"{where}: {path} has label {label}, others of its folder have {other}")
            if path in seen:
                raise CorruptFile(listing, f"{where}: {path} is already in '{seen[path]}'")
            seen[path] = part
            parts[part].append((path, label))
    classes = dataset.classes or max(names) + 1
    if absent := sorted(set(range(classes)) - set(names)):
        raise CorruptFile(listing, f"no image has the label {absent[0]}, and there are {classes} classes")
    return [names[label] for label in range(classes)], parts


def _entry(listing: Path, where: str, entry: object) -> tuple[str, int, str]:
    """[path, label, class name]; as in the authors' reader, a label may be a string."""
    match entry:
        case [str(path), int(label) | str(label), str(name)] if (
            path and name and not isinstance(label, bool) and re.fullmatch(r"[0-9]{1,9}", str(label))
        ):
            return path, int(label), name
    raise CorruptFile(listing, f"{where}: expected [path, label, class name], found {str(entry)[:80]}")
