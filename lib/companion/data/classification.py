"""Image classification: FGVC (5 sets), VTAB-1k (19 tasks), HTA (10 sets), and a user's own folder.

    train = load("vtab/cifar100", "data", "trainval", resize_transform(backbones.input_of(model)))
    image, label = train[0]         # float32 (3, 224, 224), int in 0..train.classes - 1

Opening a set reads its lists only; an image is decoded on access. `root` is the data folder (`data`).

`classification_sets.yaml` describes the sets: format, splits, sizes, licences. torchvision reads CIFAR and SVHN; it
opens CIFAR's pickles only when their MD5 is the published one.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from torchvision import datasets as tv
from torchvision.transforms import v2

from ..errors import BadParameter, CorruptFile, Range, Whole, check_choice, typed
from ..io.config import configure
from ..io.files import atomic_folder, read_json, write_json
from . import DataSet, check_listed, check_own, facts, find, once, own_set, tables
from .downloads import fetched
from .folders import at, below, entries, inside
from .images import Images, Transform, as_rgb, class_folders, images_of_classes, normalised, warn_of

SPLITS = ("train", "val", "trainval", "test")
_LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
IMAGES: dict[str, str] = facts("classification")["IMAGES"]
"""Where the images of an FGVC set are below its folder."""
OFFICIAL: dict[str, tuple[str, ...]] = {
    "cub200": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
    "nabirds": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
    "flowers102": ("imagelabels.mat", "setid.mat"),
    "dogs120": ("train_list.mat", "test_list.mat"),
    "cars196": ("cars_annos.mat",),
}
"""The files of an FGVC set that hold its official split and labels."""
CARS = ("cars_train_annos.mat", "cars_test_annos_withlabels.mat")
"""Those of Stanford Cars as it is in torchvision and at Kaggle, with images in `cars_train` and `cars_test`."""
NOT_VPT = "lists-not-vpt"  # the folder of `official_lists`, below that of the set
Listed = tuple[Path, Any, list[int]]  # the list that was read, paths or an array (n, H, W, 3), labels
Rows = tuple[Path, Path, Sequence[str], list[int]]  # a list, the folder that its paths start from, these, labels from 0


# --- public functions --------------------------------------------------------------------------------------------


@typed
def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Images:
    """One split of a data set.

    Args:
        name: a name of `DATASETS`, such as "fgvc/cub200", "vtab/cifar100", "hta/dtd".
        root: the data folder; searched for `DATASETS[name].folders`.
        split: "train", "val", "trainval" (both: the 1,000 images of VTAB-1k) or "test".
        transform: from a PIL image (RGB) to a tensor (3, H, W); see `resize_transform` and `crop_transform`.

    Returns:
        A data set of (float32 tensor (3, H, W), int), with `.classes` and `.name`. With the lists of `official_lists`,
        which are read where VPT's are missing, the name says so, and a warning.

    Raises:
        BadParameter: unknown name or split.
        MissingData: the folder, a list or images are missing, or the length of a list differs from the published one.
        CorruptFile: a malformed list (the line is named); a label out of range; a path that leaves the folder.
    """
    dataset, root = find(name, "classification"), Path(root)
    check_choice("split", split, SPLITS)
    listing, sources, labels = _read(dataset, root, split)
    if not isinstance(sources, np.ndarray):  # two files only: opening must stay instant
        check_listed(dataset, root, (sources[0], sources[-1]), listing.name)
    found = Images(dataset, root, sources, labels, dataset.classes, transform)
    found.listing = listing.name
    if listing.parent.name == NOT_VPT:
        found.name = f"{name} (lists not VPT's)"
        told = "are not VPT's: do not compare results on them with published ones"
        warnings.warn(f"{name}: the lists of {listing.parent} {told}", stacklevel=3)
    return found


@typed
def official_lists(name: str, root: str | Path) -> Path:
    """The folder of new lists {train,val,test}.json of an FGVC set, in VPT's format, made from its official split.

    Training images are held out for validation, as many as VPT holds out, about a tenth, stratified by class, with seed
    0; Oxford Flowers has an official validation split. They are not the images that VPT chose. The folder is `NOT_VPT`
    below that of the set; `load` reads it where VPT's lists are missing. Its files are replaced.

    The official split is in the files `OFFICIAL`, in the folder of the set or up to two below it. Of Stanford Cars
    `cars_annos.mat` names images as car_ims/000001.jpg, as VPT's lists do. Those in cars_train and cars_test have other
    numbers; with these two folders alone the files are `CARS`.

    Raises:
        BadParameter: not a set of FGVC.
        MissingData: the folder or a file is missing, or the number of images in a split is not the published one.
        CorruptFile: a file cannot be read as the official split.
    """
    from sklearn.model_selection import train_test_split

    dataset, root = find(name, "classification"), Path(root)
    folder, key = dataset.folder(root), name.partition("/")[2]
    if key not in IMAGES or name.startswith("vtab/"):
        raise BadParameter("data set", name, [f"fgvc/{key}" for key in IMAGES])
    names, places = OFFICIAL[key], [folder, *below(folder)]
    if key == "cars196" and at(folder, "cars_train").is_dir() and not at(folder, "car_ims").is_dir():
        names = CARS
    files = [tables.existing(dataset, root, *(place / file for place in places)) for file in names]
    lists = dict[str, dict[str, int]](train={}, val={}, test={})
    try:
        for path, class_id, split in _official(key, files):
            lists[split][str(path)] = int(class_id)
        if not lists["val"] and len(lists["train"]) == dataset.sizes["trainval"]:
            paths, ids = list(lists["train"]), list(lists["train"].values())
            held = train_test_split(paths, test_size=dataset.sizes["val"], stratify=ids, random_state=0)[1]
            lists["val"] = {path: lists["train"].pop(path) for path in sorted(held)}
    except Exception as error:  # a damaged .mat can raise anything
        told = f"not the official split ({type(error).__name__}: {error})"
        raise CorruptFile(files[0], told) from error
    for split, listed in lists.items():
        what = f"images for '{split}' in {files[-1]}"
        tables.check_count(dataset, root, len(listed), dataset.sizes[split], what)
    with atomic_folder(folder / NOT_VPT) as new:
        for split, listed in lists.items():
            write_json(new / f"{split}.json", listed)
    return folder / NOT_VPT


def _official(key: str, files: Sequence[Path]) -> Iterator[tuple[str, int, str]]:
    """Path, class id and split of each image of an FGVC set, from its files `OFFICIAL`."""
    if key in ("cub200", "nabirds"):
        paths, ids, learned = (dict(line.split() for line in tables.lines(path)) for path in files)
        for image, path in paths.items():
            yield path, int(ids[image]), {"1": "train", "0": "test"}[learned[image]]
        return
    from scipy.io import loadmat  # few use these files

    found = [loadmat(path, simplify_cells=True) for path in files]
    if key == "flowers102":
        for split, part in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            for number in found[1][part]:
                yield f"jpg/image_{number:05d}.jpg", found[0]["labels"][number - 1], split
    elif key == "dogs120":
        for split, listed in zip(("train", "test"), found, strict=True):
            for path, class_id in zip(listed["file_list"], listed["labels"], strict=True):
                yield path, class_id, split
    elif len(found) == 1:
        for image in found[0]["annotations"]:
            yield image["relative_im_path"], image["class"], "test" if image["test"] else "train"
    else:
        for split, listed in zip(("train", "test"), found, strict=True):
            for image in listed["annotations"]:
                yield f"cars_{split}/{image['fname']}", image["class"], split


@typed
def resize_transform(input) -> v2.Transform:
    """VTAB-1k's transform, for training and test alike: resize to (size, size), ignoring the aspect ratio, then
    normalise.

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.

    Returns:
        From a PIL image or a uint8 tensor (3, H, W) to a float32 tensor (3, size, size).
    """
    after = normalised(input)
    steps = [as_rgb, v2.Resize((input.size, input.size)), *after]
    return configure(v2.Compose(steps), {"input": input}, resize_transform)


@typed
def crop_transform(input, train: bool) -> v2.Transform:
    """FGVC's transform: resize the short side to size * 256 / 224, then crop to `size`; random crop and flip in
    training.

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.
        train: random crop and horizontal flip; otherwise the centre.

    Returns:
        From a PIL image or a uint8 tensor (3, H, W) to a float32 tensor (3, size, size).
    """
    after = normalised(input)
    cut = [v2.RandomCrop(input.size), v2.RandomHorizontalFlip(0.5)] if train else [v2.CenterCrop(input.size)]
    steps = [as_rgb, v2.Resize(round(input.size * 256 / 224)), *cut, *after]
    return configure(v2.Compose(steps), {"input": input, "train": train}, crop_transform)


_OWN_LAYOUT = """{train,val,test}/<class>/<image>.jpg    val split from train where there is none
or
<class>/<image>.jpg                     split into train and val"""


@typed
def own(
    root: str | Path,
    transform: Transform | None = None,
    *,
    val_fraction: Annotated[float, Range(0, 1, "()")] = 0.2,
    seed: Whole = 0,
) -> dict[str, Images]:
    """Your own images, one folder per class, by split, see `companion.data`: also "trainval".

    Args:
        root: holds {train,val,test}/<class>/*.jpg, or <class>/*.jpg directly, see `images.class_folders`. Images are
            files that end in one of `decoding.SUFFIXES`; hidden folders and files are ignored.
        val_fraction: the share of each class that goes to val, where there is no val folder. A class with a single
            image stays in train.
        seed: of that split; the same seed and the same files give the same split.

    `.class_names` are the folders, sorted. A warning counts the files and folders that are not read.

    Raises:
        BadParameter: val_fraction outside 0..1.
        MissingData: no such folder, fewer than two class folders, or one without images.
        CorruptFile: val or test has a class that train lacks, or a split has two folders.
    """
    dataset, root = own_set(root, "classification", _OWN_LAYOUT), Path(root)
    place, folders = class_folders(dataset, root)
    folders = folders or {"train": place}
    first = folders.get("train", place / "train")
    names = entries(first, folders=True)
    if len(names) < 2:
        raise dataset.missing(root, f"{first} has {len(names)} class folders")
    samples: dict[str, list[tuple[str, int]]] = {}
    for split, folder in folders.items():
        if unknown := sorted(set(entries(folder, folders=True)) - set(names)):
            raise CorruptFile(folder, f"it has classes that {first} lacks: {', '.join(unknown)}")
        samples[split] = images_of_classes(folder, names)
        absent = sorted(set(range(len(names))) - {label for _, label in samples[split]})
        if absent and (split == "train" or len(absent) == len(names)):
            raise dataset.missing(root, f"there are no images in {folder / names[absent[0]]}")
    warn_of(root, [path for pairs in samples.values() for path, _ in pairs])
    if "val" not in samples:
        labels = np.array([label for _, label in samples["train"]])
        samples["train"], samples["val"] = (
            [samples["train"][i] for i in part] for part in _stratified(labels, val_fraction, seed)
        )
    check_own(dataset, root, {split: [path for path, _ in pairs] for split, pairs in samples.items()})
    samples["trainval"] = samples["train"] + samples["val"]
    return {
        split: Images(dataset, root, [p for p, _ in pairs], [y for _, y in pairs], len(names), transform, names)
        for split, pairs in ((split, samples[split]) for split in SPLITS if split in samples)
    }


# --- called by `companion.data` ----------------------------------------------------------------------------------


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`: torchvision downloads, verifies and unpacks."""
    with fetched(dataset, root, progress) as new:
        if dataset.name.endswith("flowers102"):
            for split in ("train", "val", "test"):
                read = tv.Flowers102(new.parent, split=split, download=True)
                pairs = zip(read._image_files, read._labels, strict=True)
                write_json(new / f"{split}.json", {f"jpg/{path.name}": label + 1 for path, label in pairs})
            (new.parent / "flowers-102/jpg").rename(new / "jpg")
            return
        splits = [{"split": split} for split in ("train", "test")]
        download, place = _TORCHVISION[dataset.name]
        for options in splits if dataset.name in ("hta/gtsrb", "hta/svhn") else ({},):
            download(new, download=True, **options)
        for path in [*(new / place).iterdir()] if place else ():
            path.rename(new / path.name)
        if place:
            shutil.rmtree(new / Path(place).parts[0])


# --- implementation ----------------------------------------------------------------------------------------------

_TORCHVISION: dict[str, tuple[type, str]] = {
    "hta/dtd": (tv.DTD, "dtd/dtd"),
    "hta/food101": (tv.Food101, "food-101"),
    "hta/gtsrb": (tv.GTSRB, "gtsrb"),
    "hta/cifar10": (tv.CIFAR10, tv.CIFAR10.base_folder),
    "hta/cifar100": (tv.CIFAR100, tv.CIFAR100.base_folder),
    "hta/svhn": (tv.SVHN, ""),
}
"""The class of torchvision that downloads a set, and where it puts the set's folder."""


def _read(dataset: DataSet, root: Path, split: str) -> Listed:
    """The list of a split, its images and labels, all validated except the images themselves."""
    group, _, key = dataset.name.partition("/")
    if group == "vtab":
        found = _checked(dataset, *_vtab(tables.existing(dataset, root, dataset.folder(root) / _LISTS[split])))
    elif key in IMAGES or key == "dtd":  # with a validation list
        read = _fgvc if key in IMAGES else _dtd
        parts = [_checked(dataset, *read(dataset, root, s)) for s in (SPLITS[:2] if split == "trainval" else (split,))]
        listing = parts[0][0].with_name(" or ".join(part[0].name for part in parts))
        found = listing, [x for part in parts for x in part[1]], [y for part in parts for y in part[2]]
    else:
        found = _shared_out(dataset, root, split)
    tables.check_count(dataset, root, len(found[2]), dataset.sizes[split], f"images for '{split}' in {found[0]}")
    return found


def _checked(dataset: DataSet, listing: Path, base: Path, paths: Sequence[str], labels: list[int]) -> Listed:
    """Full paths; every entry of a list is below the folder and there once, and its label is one of the set's.

    A listed folder that is in one of the same name, as some archives unpack, is found there.
    """
    seen = set[str]()
    for number, (path, label) in enumerate(zip(paths, labels, strict=True), 1):
        inside(listing, f"line {number}", path)
        if not 0 <= label < dataset.classes:
            raise CorruptFile(listing, f"line {number}: the class of {path!r} is none of the {dataset.classes} classes")
        if path in seen:
            raise CorruptFile(listing, f"line {number}: {path!r} is further up too")
        seen.add(path)
    tops = {path.partition("/")[0] for path in paths}
    above = {top: f"{base}/{top}" if (base / top / top).is_dir() else str(base) for top in tops}
    return listing, [f"{above[path.partition('/')[0]]}/{path}" for path in paths], labels


def _vtab(listing: Path) -> Rows:
    """VTAB-1k's lists: lines "relative/path label", labels from 0."""
    paths, labels = [], []
    for number, line in enumerate(tables.lines(listing), 1):
        row = re.fullmatch(r"(.+?)\s+([0-9]{1,9})", line)
        if not row:
            raise CorruptFile(listing, f"line {number}: expected 'relative/path label', found {line[:80]!r}")
        paths.append(row[1])
        labels.append(int(row[2]))
    return listing, listing.parent, paths, labels


def _fgvc(dataset: DataSet, root: Path, split: str) -> Rows:
    """FGVC's lists, VPT's or else those of `official_lists`: a dict "path" -> class id, from 1; NABirds has raw ids,
    numbered in their order in training."""
    folder, key = dataset.folder(root), dataset.name.partition("/")[2]
    vpts = any((folder / f"{split}.json").is_file() for split in ("train", "val", "test"))
    lists = folder if vpts or not (folder / NOT_VPT).is_dir() else folder / NOT_VPT
    if not any(at(lists, f"{name}.json").is_file() for name in SPLITS):
        others = f"companion.data.classification.official_lists({dataset.name!r}, {str(root)!r})"
        raise dataset.missing(root, f"{split}.json and all other lists: get VPT's, or make others by {others}")
    listing = tables.existing(dataset, root, lists / f"{split}.json")
    known: Iterable[int] = range(1, dataset.classes + 1)
    if key == "nabirds":
        known = sorted(set(_class_ids(tables.existing(dataset, root, lists / "train.json")).values()))
        if len(known) != dataset.classes:
            raise dataset.missing(root, f"train.json names {len(known)} classes, {dataset.classes} expected")
    number, ids = {class_id: label for label, class_id in enumerate(known)}, _class_ids(listing)
    base = at(folder, IMAGES[key]) if IMAGES[key] else folder
    return listing, base, list(ids), [number.get(class_id, -1) for class_id in ids.values()]


@once
def _class_ids(listing: Path) -> Mapping[str, int]:
    try:  # as text, as CUB's are ("001"): a float or a bool is no class
        return MappingProxyType({path: int(str(class_id)) for path, class_id in read_json(listing).items()})
    except (ValueError, AttributeError) as error:
        raise CorruptFile(listing, f"expected a dict from paths to class ids ({error})") from error


def _shared_out(dataset: DataSet, root: Path, split: str) -> Listed:
    """An official test set; or "train" and "val", 80 and 20 % of the official training set, or both."""
    official = "test" if split == "test" else "train"
    if dataset.name in ("hta/food101", "hta/gtsrb"):
        read = _food101 if dataset.name == "hta/food101" else _gtsrb
        listing, sources, labels = _checked(dataset, *read(dataset, root, official))
        order = range(len(labels)) if split == "test" else _shuffled(len(labels))
        sources, labels = [sources[i] for i in order], [labels[i] for i in order]
    else:
        listing, sources, labels = _arrays(dataset, root, official)
    whole = dataset.sizes["test" if split == "test" else "trainval"]
    tables.check_count(dataset, root, len(labels), whole, f"images for '{official}' in {listing}")
    cut = int(0.8 * len(labels))
    part = {"train": slice(cut), "val": slice(cut, None)}.get(split, slice(None))
    return listing, sources[part], labels[part]


def _shuffled(length: int) -> list[int]:
    """The one shuffle of a set that is sorted by class: train and val are taken from the same order."""
    return np.random.default_rng(0).permutation(length).tolist()


def _arrays(dataset: DataSet, root: Path, official: str) -> Listed:
    """CIFAR or SVHN: images (n, 32, 32, 3) uint8 and labels."""
    folder, (reader, place) = dataset.folder(root), _TORCHVISION[dataset.name]
    try:
        if not place:
            digits = reader(folder, split=official)
            return folder, digits.data.transpose(0, 2, 3, 1), digits.labels.tolist()
        # the folder has a name of its own, and the split is read where the other one is not there
        unread = "test_list" if official == "train" else "train_list"
        here = type(reader.__name__, (reader,), {"base_folder": str(folder.absolute()), unread: []})
        read = here(folder, train=official == "train")
        return folder, read.data, read.targets
    except RuntimeError as error:
        told = f"a file of {folder} is missing, or has not the published MD5: download it again"
        raise dataset.missing(root, told) from error


def _dtd(dataset: DataSet, root: Path, split: str) -> Rows:
    """DTD's first list of a split: lines "class/image"."""
    folder = dataset.folder(root)
    listing = tables.existing(dataset, root, at(folder, f"labels/{split}1.txt"))
    paths = tables.lines(listing)
    return listing, at(folder, "images"), paths, _numbered(dataset, listing, [p.rpartition("/")[0] for p in paths])


def _food101(dataset: DataSet, root: Path, split: str) -> Rows:
    """Food-101's list of a split: a dict from a class to paths without their ending."""
    folder = dataset.folder(root)
    listing = tables.existing(dataset, root, at(folder, f"meta/{split}.json"))
    rows = _by_class(listing)
    return listing, at(folder, "images"), [path for _, path in rows], _numbered(dataset, listing, [n for n, _ in rows])


@once
def _by_class(listing: Path) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((name, f"{path}.jpg") for name, paths in read_json(listing).items() for path in paths)
    except (TypeError, AttributeError) as error:
        raise CorruptFile(listing, f"expected a dict from classes to lists of paths ({error})") from error


def _gtsrb(dataset: DataSet, root: Path, split: str) -> Rows:
    """GTSRB: class folders for training, the rows of a CSV for the test."""
    folder = dataset.folder(root)
    if split == "train":
        place = at(folder, "GTSRB/Training", "Training", "GTSRB/Final_Training/Images", "Final_Training/Images")
        names = entries(place, folders=True)
        tables.check_count(dataset, root, len(names), dataset.classes, f"class folders in {place}")
        found = images_of_classes(place, names)
        return place, place, [path.removeprefix(f"{place}/") for path, _ in found], [label for _, label in found]
    places = [folder, at(folder, "GTSRB"), at(folder, "GTSRB/Final_Test"), at(folder, "Final_Test")]
    listing = tables.existing(dataset, root, *(place / "GT-final_test.csv" for place in places))
    rows = tables.rows(listing, "Filename", "ClassId", delimiter=";")
    try:
        labels = [int(row["ClassId"]) for _, row in rows]
    except ValueError as error:
        raise CorruptFile(listing, f"a ClassId is no number ({error})") from error
    images = at(folder, "GTSRB/Final_Test/Images", "Final_Test/Images")
    return listing, images, [row["Filename"] for _, row in rows], labels


def _numbered(dataset: DataSet, listing: Path, names: Sequence[str]) -> list[int]:
    """The labels of classes, by their sorted names."""
    number = {name: label for label, name in enumerate(sorted(set(names)))}
    if len(number) != dataset.classes:
        raise CorruptFile(listing, f"it has {len(number)} classes, {dataset.classes} are expected")
    return [number[name] for name in names]


def _stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rest and of the held-out share of each class, both in their first order."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
