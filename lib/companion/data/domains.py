"""Images of other domains, remote sensing and medicine, in class folders with a split into train, val and test.

    sets = splits("remote/aid", "data", clip_transform(backbones.input_of(clip)))
    image, label = sets["test"][0]      # float32 (3, 224, 224), int
    sets["test"].class_names            # the class names of the prompts, by label

Opening a set lists its folders; an image is decoded on access. `root` is the data folder (`data`).
`domains_sets.yaml` describes the sets; `fewshot` builds the protocols of prompt learning from the result of `splits`.

A set is a folder with one folder per class, and optionally a list of its splits next to it:

    {"train": [[path below the parent of the class folders, label, class name], ...], "val": [...], "test": [...]}

Labels follow the sorted names of the folders (upper case before lower case), as in the authors' code, for any spelling
on disk, so that the same classes are "base" everywhere. Without a list each class is split by a fixed shuffle. A new
set needs a `DataSet` with task "domains" in `DATASETS`, and `split.json` by its class folders (in `images/` or
directly).
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torchvision.transforms import v2

from ..errors import CompanionError, CorruptFile, check_choice, check_names, typed
from ..io.config import configure
from ..io.files import read_json
from . import DataSet, check_listed, check_own, classification, facts, find, once, own_set, tables
from .downloads import fetched
from .folders import SPELLED, at, below, entries, inside, of_file
from .images import Images, Transform, as_rgb, class_folders, images_of_classes, normalised, warn_of

SPLITS = ("train", "val", "test", "all")
_PARTS = SPLITS[:3]
CROP = (0.08, 1.0)  # range of the cropped area of a training image
Samples = list[tuple[str, int]]  # path below the parent of the class folders, label
_FACTS = facts("domains")
CLASSES: dict[str, Mapping[str, str]] = _FACTS["CLASSES"]
"""For each set: folder -> name in the prompt, as in the authors' loaders (caoql98/DPLQ, datasets/<set>.py)."""
WHOLE_SET_NAMES: dict[str, dict[str, str]] = _FACTS["WHOLE_SET_NAMES"]
"""Where the loaders of a whole set (datasets/<set>v2.py, used for domain generalisation) name a class otherwise."""
RELEASED_AS: dict[str, dict[str, str]] = _FACTS["RELEASED_AS"]
"""Class folders of the released archives that the authors renamed."""
TORCHGEO: dict[str, str] = _FACTS["TORCHGEO"]
"""The class of torchgeo that downloads a set."""


# --- public functions --------------------------------------------------------------------------------------------


@typed
def splits(name: str, root: str | Path, transform: Transform | None = None) -> dict[str, Images]:
    """Every split of a set.

    Args:
        name: "remote/aid", "medical/chmnist", ...: a name of `DATASETS` whose task is "domains".
        root: the data folder; searched for `DATASETS[name].folders`.
        transform: from a PIL image (RGB) to a tensor (3, H, W), see `clip_transform`; None scales to 0..1 and keeps the
            size. To set another one for a split: `sets["train"].transform = ...`.

    Returns:
        {"train", "val", "test", "all"}; "all" is every image, the test set of domain generalisation, for which three
        sets name a class differently (`WHOLE_SET_NAMES`). Each is a data set of (float32 tensor (3, H, W),
        int) with `.labels`, `.classes`, `.class_names` and `.name`.

    Raises:
        BadParameter: unknown name.
        MissingData: the folder, a class folder or images are missing, or their number differs from the published one.
        CorruptFile: a malformed entry of the list of splits; a folder that is no class of the set.
    """
    dataset = find(name, "domains")
    return _images(dataset, Path(root), transform)


@typed
def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Images:
    """One split of a set, "train", "val", "test" or "all"; otherwise as `splits`."""
    check_choice("split", split, SPLITS)
    return splits(name, root, transform)[split]


@typed
def own(root: str | Path, transform: Transform | None = None) -> dict[str, Images]:
    """Your own images, as `splits` gives them: <class>/*.jpg below `root` or `root`/images.

    `root`/split.json is read if it exists, otherwise each class is split. Images in train/<class>/ and test/<class>/
    keep their split; without val/<class>/ a part of train is used. Folders are found as by `images.class_folders`.

    Raises as `splits`.
    """
    layout = (
        '<class>/*.jpg    or images/<class>/*.jpg\nsplit.json       optional: {"train": [[path, label, class '
        'name], ...], "val": ..., "test": ...}\nor\n{train,val,test}/<class>/*.jpg    val split from train where there '
        "is none"
    )
    dataset, root = own_set(root, "domains", layout), Path(root)
    if at(root, "split.json").is_file():
        sets = _images(dataset, root, transform)
        check_own(dataset, root, {split: found.sources for split, found in sets.items()}, "split.json")
        return sets
    place, folders = class_folders(dataset, root)
    if not folders:
        return _images(dataset, place, transform)
    sets = classification.own(root, transform)
    if "test" not in sets:
        raise dataset.missing(root, f"there is no folder {root / 'test'}")
    known, test = sets.pop("trainval"), sets["test"]
    sources, labels = [*known.sources, *test.sources], [*known.labels, *test.labels]
    return sets | {"all": Images(dataset, root, sources, labels, test.classes, transform, test.class_names)}


@typed
def clip_transform(input, train: bool = False) -> v2.Transform:
    """CLIP's transform, as used in prompt-learning papers (bicubic throughout).

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.
        train: a random crop of 8 to 100 % of the area, resized, flipped with probability 0.5; otherwise a resize of the
            short side and a centre crop.

    Returns:
        From a PIL image or a uint8 tensor (3, H, W) to a float32 tensor (3, size, size).
    """
    after, bicubic = normalised(input), v2.InterpolationMode.BICUBIC
    cut = (
        [v2.RandomResizedCrop(input.size, scale=CROP, interpolation=bicubic), v2.RandomHorizontalFlip(0.5)]
        if train
        else [v2.Resize(input.size, interpolation=bicubic), v2.CenterCrop(input.size)]
    )
    return configure(v2.Compose([as_rgb, *cut, *after]), {"input": input, "train": train}, clip_transform)


# --- called by `companion.data` ----------------------------------------------------------------------------------


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`: torchgeo downloads and verifies."""
    try:
        from torchgeo import datasets as torchgeo
    except ImportError:
        raise CompanionError(
            f"torchgeo, which downloads {dataset.title}, is not installed. Either "
            "`pip install torchgeo` and fetch again, or get the images by hand and put them into "
            f"{dataset.folder(root)}"
        ) from None
    with fetched(dataset, root, progress) as new:
        getattr(torchgeo, TORCHGEO[dataset.name])(new, download=True, checksum=True)


# --- implementation ----------------------------------------------------------------------------------------------


def split_sizes(count: int) -> dict[str, int]:
    """How the images of one class are split: half for training, a fifth for validation, the rest for testing.

    Halves are rounded to even, as by Python's `round` (and in the authors' code).
    """
    train, val = round(0.5 * count), round(0.2 * count)
    return {"train": train, "val": val, "test": count - train - val}


def _images(dataset: DataSet, root: Path, transform: Transform | None) -> dict[str, Images]:
    """The splits, by the list of splits if there is one, or else cut with a fixed seed."""
    folder, known, authors = dataset.folder(root), dataset.name in CLASSES, dataset.folders[-1]
    base, holders = _place(dataset, root)
    name = f"split_cao_{'NWPU' if authors == 'nwpu' else authors}.json" if known else "split.json"
    nested = (base.parent, base) if known and base != folder else ()  # a list in there counts too
    listing = next((path for place in (folder, *nested) if (path := at(place, name)).is_file()), folder / name)
    if listing.is_file():
        names, listed = _listed(listing, dataset.classes)
    elif dataset.group == "own" or known:
        names, listed = _cut(dataset, root, base, holders)
    else:  # a generated set has a fixed split, which a new split would not reproduce
        raise dataset.missing(root, f"{listing} is not there")
    parts = {part: [(f"{base}/{path}", label) for path, label in samples] for part, samples in listed.items()}
    parts["all"] = sorted((sample for samples in parts.values() for sample in samples), key=lambda s: (s[1], s[0]))
    renamed, found = WHOLE_SET_NAMES.get(dataset.name, {}), {}
    for part, samples in {"all": parts["all"], **parts}.items():  # one image more is told of the whole set
        what = f"images for '{part}' in {folder}"
        tables.check_count(dataset, root, len(samples), dataset.sizes.get(part), what)
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        if listing.is_file():  # two files only: opening must stay fast
            check_listed(dataset, root, (paths[0], paths[-1]), listing.name)
        called = [renamed.get(name, name) for name in names] if part == "all" else names
        found[part] = Images(dataset, root, paths, labels, len(names), transform, called)
        found[part].listing = listing.name if listing.is_file() else ""
    return {part: found[part] for part in SPLITS}


def _place(dataset: DataSet, root: Path) -> tuple[Path, list[Path]]:
    """The folder that listed paths start from, and the folders that hold class folders: usually the same one.

    The most specific place is taken, in the set's folder or up to two levels below; "a+b" is one set whose classes are
    in both a and b.
    """
    folder, known = dataset.folder(root), dataset.name in CLASSES
    places = (*_FACTS["RELEASED_IN"].get(dataset.name, ()), dataset.folders[-1]) if known else ("images",)
    for nested in itertools.chain([folder], below(folder) if known else ()):
        for place in (*places, ""):
            holders = [at(nested, part) for part in place.split("+")]
            classes = [
                holder.is_dir() and any(not known or _class(dataset, name) for name in entries(holder, folders=True))
                for holder in holders
            ]
            if known and classes[0] and holders[0].name.lower() in itertools.chain(*SPELLED.values()) and not place:
                told = "is one split of a copy: the images of a class belong into one folder, see the layout"
                raise dataset.missing(root, f"{holders[0]} {told}")
            if all(classes):
                return (holders[0] if len(holders) == 1 else nested), holders
            if any(classes):  # a part of the set is no set
                raise dataset.missing(root, f"{holders[classes.index(False)]} has no class folders")
    raise dataset.missing(root, f"{folder} has no class folders")


def _class(dataset: DataSet, folder: str) -> str | None:
    """The class of a folder, by the name in the authors' code; None when the set has no such class."""
    folder = RELEASED_AS.get(dataset.name, {}).get(folder, folder)
    known = CLASSES.get(dataset.name, (folder,))
    return folder if folder in known else next((name for name in known if _plain(name) == _plain(folder)), None)


def _plain(name: str) -> str:
    """A folder's name without case, blanks, underscores and two misspellings: "commerical" of the authors' lists, and
    "swimmimg", which MLRSNet has too."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.replace("swimmimg", "swimming").replace("commerical", "commercial")


def _cut(dataset: DataSet, root: Path, base: Path, holders: list[Path]) -> tuple[list[str], dict[str, Samples]]:
    """Split each class by its own fixed shuffle, so that adding or removing a class does not change the others."""
    folders = sorted({name for holder in holders for name in entries(holder, folders=True)} - {"split_fewshot"})
    class_of = {folder: _class(dataset, folder) for folder in folders}
    known = CLASSES.get(dataset.name, {folder: folder for folder in folders})
    if unknown := [folder for folder in folders if class_of[folder] is None]:
        raise CorruptFile(base, f"it has folders that are no class of {dataset.title}: {', '.join(unknown)}")
    if absent := sorted(set(known) - set(class_of.values())):
        raise dataset.missing(root, f"{len(absent)} of {len(known)} class folders below {base}: {', '.join(absent)}")

    names: list[str] = []
    parts: dict[str, Samples] = {part: [] for part in _PARTS}
    read: list[str] = []
    for label, key in enumerate(sorted(known)):
        own = [folder for folder in folders if class_of[folder] == key]
        spelled = RELEASED_AS.get(dataset.name, {}).get(own[0], own[0])
        names.append(known.get(spelled, spelled))
        found = [path for holder in holders for path, _ in images_of_classes(holder, own)]
        read += found
        paths = sorted(path.removeprefix(f"{base}/") for path in found)
        sizes = split_sizes(len(paths))
        if not all(sizes.values()):
            few = f"{len(paths)} images, too few for train, val and test" if paths else "no images"
            raise dataset.missing(root, f"the class folder {own[0]} below {base} has {few}")
        shuffled = iter(np.random.default_rng(zlib.crc32(key.encode())).permutation(len(paths)))
        for part, size in sizes.items():
            parts[part] += [(paths[next(shuffled)], label) for _ in range(size)]
    if dataset.group == "own":
        warn_of(base, read)
    return names, parts


@once
def _listed(listing: Path, count: int) -> tuple[Sequence[str], Mapping[str, Sequence[tuple[str, int]]]]:
    """A list of splits with every entry checked: format, path inside the folder, one class per folder, no image
    twice."""
    content = read_json(listing)
    if not isinstance(content, Mapping) or not all(isinstance(content.get(p), list) and content[p] for p in _PARTS):
        raise CorruptFile(listing, "expected a dict with the lists 'train', 'val' and 'test', with images in each")
    seen: dict[tuple, object] = {}
    names: dict[int, str] = {}
    parts: dict[str, Samples] = {part: [] for part in _PARTS}
    for part in _PARTS:
        for place, entry in enumerate(content[part], 1):
            where = f"'{part}', entry {place}"
            match entry:  # as in the authors' reader, a label may be a string
                case [str(path), int() | str() as number, str(name)] if re.fullmatch(r"[0-9]{1,9}", str(number)):
                    label = int(number)
                case _:
                    wanted = f"expected [path, label, class name], found {str(entry)[:80]}"
                    raise CorruptFile(listing, f"{where}: {wanted}")
            inside(listing, where, path)
            if count and label >= count:
                raise CorruptFile(listing, f"{where}: label {label} is not in 0..{count - 1}")
            once = ("label", label, name), ("folder", path.rpartition("/")[0], label), ("image", path, where)
            for kind, key, value in once:  # of one class name, of one label, in one entry
                if (before := seen.setdefault((kind, key), value)) != value:
                    raise CorruptFile(listing, f"{where}: {kind} {key} is {value} here, and {before} further up")
            names[label] = name
            parts[part].append((path, label))
    classes = count or max(names) + 1
    if absent := sorted(set(range(classes)) - set(names)):
        raise CorruptFile(listing, f"no image has the label {absent[0]}, and there are {classes} classes")
    with of_file(listing):
        check_names(names.values())
    return tuple(names[i] for i in range(classes)), MappingProxyType({part: tuple(parts[part]) for part in parts})
