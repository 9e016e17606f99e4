"""Image classification: FGVC (5 sets), VTAB-1k (19 tasks), HTA (10 sets), and a user's own folder.

    train = load("vtab/cifar100", "data", "trainval", resize_transform(backbones.input_of(model)))
    image, label = train[0]         # float32 (3, 224, 224), int in 0..train.classes - 1

Opening a set reads its lists only; an image is decoded on access. `root` is the data folder (`data`).

`classification_sets` describes the sets: format, splits, sizes, licences. torchvision's readers are used where they
exist (DTD, GTSRB, Food-101, CIFAR, SVHN); it opens CIFAR's pickles only when their MD5 is the published one.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import re
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import scipy.io
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets as tv
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from ..errors import BadParameter, CompanionError, CorruptFile, MissingData, check_choice
from ..ops.config import configure
from ..ops.files import atomic_folder, read_json, write_json
from . import DataSet, Parts, Status, decoding, downloading, find, own_set
from .classification_sets import IMAGES, OFFICIAL

SPLITS = ("train", "val", "trainval", "test")
_LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
NOT_VPT = "lists-not-vpt"  # the folder of `official_lists`, below that of the set
Listed = tuple[Path, "Sequence[str] | np.ndarray", list[int]]  # the list that was read, the images, their labels


# --- public functions --------------------------------------------------------------------------------------------


class Images(Parts, Dataset):
    """Labelled images that are decoded on access: `images[i]` is (float32 tensor (3, H, W), int).

    Args:
        dataset: the set they belong to; gives the name and the error message for a missing file.
        root: the data folder.
        sources: paths, or a uint8 array (n, H, W, 3).
        labels: one of 0..classes - 1 for each.
        classes: number of classes.
        transform: from a PIL image (RGB) to a tensor; None scales to 0..1 and keeps the size.
        class_names: names by label, where the layout has them.

    Raises (on indexing):
        MissingData: the file is listed but missing.
        CorruptFile: the file is truncated, no image, or has no full scale (see `decoding`); its path is in the message.
    """

    each: ClassVar[tuple[str, ...]] = ("sources", "labels")

    def __init__(
        self,
        dataset: DataSet,
        root: Path,
        sources: Sequence[str] | np.ndarray,
        labels: Sequence[Any] | np.ndarray,
        classes: int,
        transform: Callable[[Image.Image], torch.Tensor] | None = None,
        class_names: Sequence[str] = (),
    ):
        self.dataset, self.root, self.name = dataset, root, dataset.name
        self.sources, self.labels = sources, labels
        self.classes, self.class_names = classes, tuple(class_names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """The image as stored, in RGB, before the transform.

        A user's own image is rotated by its EXIF orientation; those of the public sets are not, as in the papers' code.
        """
        return self._read(index, decoding.picture)

    def pixels(self, index: int) -> tuple[np.ndarray, dict]:
        """The pixels of `picture`, uint8 (H, W, 3), and its file's `info` by PIL, such as EXIF."""
        return self._read(index, lambda image: (decoding.pixels(image), image.info))

    def _read(self, index: int, decode: Callable[[Image.Image], Any]) -> Any:
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return decode(Image.fromarray(source))
        try:
            with decoding.opened(source) as image:
                if self.dataset.group == "own" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    found = decoding.pixels(image)  # PIL rotates a TIFF when it decodes it, and drops the orientation
                    return decode(Image.fromarray(decoding.upright(found, {"exif": image.getexif().tobytes()})))
                return decode(image)
        except FileNotFoundError:
            raise self.dataset.missing(self.root, f"{source} is listed but not there") from None

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        picture = self.picture(index)
        return (self.transform or _to_tensor)(picture), int(self.labels[index])


def load(
    name: str, root: str | Path, split: str, transform: Callable[[Image.Image], torch.Tensor] | None = None
) -> Images:
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
    if not isinstance(sources, np.ndarray):
        for path in (sources[0], sources[-1]):  # check two files only: opening must stay instant
            if not Path(path).is_file():
                raise dataset.missing(root, f"{listing.name} is there, but the image {path} is not")
    found = Images(dataset, root, sources, labels, dataset.classes, transform)
    if listing.parent.name == NOT_VPT:
        found.name = f"{name} (lists not VPT's)"
        told = "are not VPT's: do not compare results on them with published ones"
        warnings.warn(f"{name}: the lists of {listing.parent} {told}", stacklevel=2)
    return found


def official_lists(name: str, root: str | Path) -> Path:
    """The folder of new lists {train,val,test}.json of an FGVC set, in VPT's format, made from its official split.

    Training images are held out for validation, as many as VPT holds out, about a tenth, stratified by class, with seed
    0; Oxford Flowers has an official validation split. They are not the images that VPT chose. The folder is `NOT_VPT`
    below that of the set; `load` reads it where VPT's lists are missing. Its files are replaced.

    The official split is in the files `classification_sets.OFFICIAL`, in the folder of the set or one below it; of
    Stanford Cars, `cars_annos.mat` names images as car_ims/000001.jpg.

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
    if not folder.is_dir():
        raise dataset.missing(root)
    files = []
    for file in OFFICIAL[key]:
        places = [path for path in (folder / file, *folder.glob(f"*/{file}")) if path.is_file()]
        files.append(_existing(dataset, root, (places or [folder / file])[0]))
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
        if len(listed) != dataset.sizes[split]:
            what = f"{files[-1].name} gives {len(listed)} images for '{split}', {dataset.sizes[split]} expected"
            raise dataset.missing(root, what)
    with atomic_folder(folder / NOT_VPT) as new:
        for split, listed in lists.items():
            write_json(new / f"{split}.json", listed)
    return folder / NOT_VPT


def _official(key: str, files: Sequence[Path]) -> Iterator[tuple[str, int, str]]:
    """Path, class id and split of each image of an FGVC set, from its files `OFFICIAL`."""
    if key in ("cub200", "nabirds"):
        tables = [dict(line.split(maxsplit=1) for line in path.read_text("utf-8").splitlines()) for path in files]
        paths, ids, learned = tables
        for image, path in paths.items():
            yield path.strip(), int(ids[image]), {"1": "train", "0": "test"}[learned[image].strip()]
        return
    found = [scipy.io.loadmat(path, simplify_cells=True) for path in files]
    if key == "flowers102":
        for split, part in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            for number in found[1][part]:
                yield f"jpg/image_{number:05d}.jpg", found[0]["labels"][number - 1], split
    elif key == "dogs120":
        for split, listed in zip(("train", "test"), found, strict=True):
            for path, class_id in zip(listed["file_list"], listed["labels"], strict=True):
                yield path, class_id, split
    else:
        for image in found[0]["annotations"]:
            yield image["relative_im_path"], image["class"], "test" if image["test"] else "train"


def resize_transform(input) -> v2.Transform:
    """VTAB-1k's transform, for training and test alike: resize to (size, size), ignoring the aspect ratio, then
    normalise.

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.

    Returns:
        From a PIL image to a float32 tensor (3, size, size).
    """
    steps = [v2.Resize((input.size, input.size)), *_normalised(input)]
    return configure(v2.Compose(steps), {"input": input}, resize_transform)


def crop_transform(input, train: bool) -> v2.Transform:
    """FGVC's transform: resize the short side to size * 256 / 224, then crop to `size`; random crop and flip in
    training.

    Args:
        input: anything with .size, .mean and .std, such as `backbones.input_of(model)`.
        train: random crop and horizontal flip; otherwise the centre.

    Returns:
        From a PIL image to a float32 tensor (3, size, size).
    """
    cut = [v2.RandomCrop(input.size), v2.RandomHorizontalFlip(0.5)] if train else [v2.CenterCrop(input.size)]
    steps = [v2.Resize(round(input.size * 256 / 224)), *cut, *_normalised(input)]
    return configure(v2.Compose(steps), {"input": input, "train": train}, crop_transform)


class InMemory(TensorDataset):
    """Images (n, 3, H, W) float32 and labels (n,) int64 in memory, with `.classes` and `.name` of the source."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: int, name: str):
        super().__init__(images, labels)
        self.classes, self.name = classes, name


def in_memory(dataset: Images) -> InMemory:
    """Decode every image once, for sets that are read many times with a deterministic transform.

    Raises `BadParameter` when the transform is random (every epoch would use the same draw) and `CompanionError` when
    the tensors do not fit in the free memory.
    """
    random = [type(step).__name__ for step in getattr(dataset.transform, "transforms", [dataset.transform])]
    if any(step.startswith("Random") for step in random):
        raise BadParameter("transform", " > ".join(random), "one without random steps, such as resize_transform(input)")
    if not len(dataset):
        raise BadParameter("dataset", dataset.name, "one with at least one image")
    first, _ = dataset[0]
    size, free = len(dataset) * first.numel() * 4, psutil.virtual_memory().available
    if size > free:
        raise CompanionError(
            f"'{dataset.name}' takes {size / 1e9:.1f} GB decoded and {free / 1e9:.1f} GB are free: read it from disk"
        )
    images = torch.empty((len(dataset), *first.shape), dtype=torch.float32)
    for index in range(len(dataset)):
        image, _ = dataset[index]
        if image.shape != first.shape:
            shapes = f"{tuple(first.shape)} and {tuple(image.shape)}"
            raise BadParameter("transform", shapes, "one that gives every image the same size")
        images[index] = image
    return InMemory(images, torch.tensor(np.asarray(dataset.labels), dtype=torch.int64), dataset.classes, dataset.name)


_OWN_LAYOUT = """{train,val,test}/<class>/<image>.jpg    val split from train where there is none
or
<class>/<image>.jpg                     split into train and val"""
SPELLED = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
"""How the folder of a split may be called, in upper or lower case."""


def image_folder(
    root: str | Path,
    val_fraction: float = 0.2,
    seed: int = 0,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
) -> dict[str, Images]:
    """Your own images, one folder per class.

    Args:
        root: holds {train,val,test}/<class>/*.jpg, or <class>/*.jpg directly, see `class_folders`. Images are files
            that end in one of `decoding.SUFFIXES`; hidden folders and files are ignored.
        val_fraction: the share of each class that goes to val, where there is no val folder. A class with a single
            image stays in train.
        seed: of that split; the same seed and the same files give the same split.
        transform: as in `load`; to set another one for a split: `sets["train"].transform = ...`.

    Returns:
        {"train", "val", "trainval"} and "test" where there is a test folder. `.class_names` are the folders, sorted.
        A warning counts the files and folders that are not read.

    Raises:
        BadParameter: val_fraction outside 0..1.
        MissingData: no such folder, fewer than two class folders, or one without images.
        CorruptFile: val or test has a class that train lacks, or a split has two folders.
    """
    if not 0 < val_fraction < 1:
        raise BadParameter("val_fraction", val_fraction, "a number between 0 and 1, both left out")
    root = Path(root)
    own, skipped = own_set(root, "classification", _OWN_LAYOUT), Counter[str]()
    place, folders = class_folders(own, root, skipped)
    first = folders.get("train", place / "train") if folders else place
    if not first.is_dir():
        raise own.missing(root, f"there is no folder {first}")
    names = _class_folders(first)
    if len(names) < 2:
        raise own.missing(root, f"{first} has {'one class folder alone' if names else 'no class folders'}")
    number = {name: label for label, name in enumerate(names)}

    samples = {}
    for split, folder in (folders or {"train": place}).items():
        if unknown := sorted(set(_class_folders(folder)) - set(names)):
            raise CorruptFile(folder, f"it has classes that {first} lacks: {', '.join(unknown)}")
        samples[split] = images_of_classes(folder, number, skipped)
        if not samples[split]:
            raise own.missing(root, f"there are no images in {folder}")
    empty = set(number.values()) - {label for _, label in samples["train"]}
    if empty:
        raise own.missing(root, f"there are no images in {first / names[min(empty)]}")
    if "val" not in samples:
        rest, held = _stratified([label for _, label in samples["train"]], val_fraction, seed)
        samples["train"], samples["val"] = [[samples["train"][i] for i in part] for part in (rest, held)]
    samples = {
        "train": samples["train"],
        "val": samples["val"],
        "trainval": samples["train"] + samples["val"],
    } | samples
    warn_of(root, skipped)
    return {
        split: Images(own, root, [p for p, _ in pairs], [y for _, y in pairs], len(names), transform, names)
        for split, pairs in samples.items()
    }


def class_folders(own: DataSet, root: Path, skipped: Counter[str]) -> tuple[Path, dict[str, Path]]:
    """The folder of the class folders, and by split the folder that holds its class folders; {} without splits.

    A folder whose only content is one folder with subfolders is entered. The folder of a split has a name of `SPELLED`
    and contains class folders; otherwise it is a class. Anything next to splits is counted in `skipped`.

    Raises:
        MissingData: there is no such folder, or its splits have no class folders.
        CorruptFile: two folders for one split.
    """
    if not root.is_dir():
        raise own.missing(root, f"there is no folder {root}")
    place = root
    while True:
        there, folders = _class_folders(place), dict[str, Path]()
        split_of = {n: s for n in there for s, spelled in SPELLED.items() if n.lower() in spelled}
        for name, split in split_of.items():
            if not _class_folders(place / name):
                continue
            if split in folders:
                raise CorruptFile(place, f"{folders[split].name} and {name} are both '{split}': keep one of them")
            folders[split] = place / name
        if there and not folders and len(split_of) == len(there):
            raise own.missing(root, f"{' and '.join(str(place / name) for name in there)}: no class folders in it")
        if folders or len(there) != 1 or not _class_folders(place / there[0]):
            break
        place = place / there[0]
    for name in there:
        if folders and place / name not in folders.values():
            skipped[f"folder {name} next to {', '.join(folder.name for folder in folders.values())}"] += 1
    for holder in folders.values() or (place,):
        outside = [p for p in holder.iterdir() if p.name.lower().endswith(decoding.SUFFIXES) and p.is_file()]
        skipped[f"image(s) outside of the class folders in {holder.name}"] += len(outside)
    return place, {split: folders[split] for split in SPELLED if split in folders}


def images_of_classes(folder: Path, number: Mapping[str, int], skipped: Counter[str]) -> list[tuple[str, int]]:
    """Paths and labels of the images in the class folders `number`, in the order of torchvision's `make_dataset`.

    Hidden files and folders are ignored; other files are counted in `skipped`, by ending.
    """
    found = []
    for name, label in sorted(number.items()):
        top = f"{folder}/{name}"
        for place, _, files in sorted(os.walk(top, followlinks=True)):
            if "/." in place.removeprefix(top):
                continue
            for file in sorted(files):
                if file.lower().endswith(decoding.SUFFIXES) and not file.startswith("."):
                    found.append((f"{place}/{file}", label))
                elif not file.startswith("."):
                    skipped[f"{Path(file).suffix.lower() or file} file(s)"] += 1
    return found


def warn_of(root: Path, skipped: Counter[str]) -> None:
    """Warn of the files and folders that a reader skipped."""
    if told := [f"{count} {what}" for what, count in skipped.most_common() if count]:
        warnings.warn(f"{root}: not read: {', '.join(told[:8])}", stacklevel=3)


# --- called by `companion.data` ----------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`. CIFAR and SVHN are checked by MD5, the others by their lists and file names."""
    folder = dataset.folder(root)
    problems: list[str] = []
    wanted: set[str] = set()
    archives = _archives(dataset, folder)
    for path, md5 in archives:
        if not path.is_file():
            problems.append(f"{path.name} is not there")
        elif not check_integrity(path, md5):
            problems.append(f"{path.name} has not the published MD5: download it again")
    if not archives:
        for split in SPLITS:
            try:
                wanted.update(_read(dataset, root, split)[1])
            except MissingData as error:
                problems.append(error.detail)
            except CorruptFile as error:
                problems.append(str(error))
        try:
            check_listed(dataset, root, wanted)
        except MissingData as error:
            problems.append(error.detail)
    if problems:
        return Status("incomplete", "; ".join(dict.fromkeys(problems)))
    images = dataset.sizes["trainval"] + dataset.sizes["test"]
    lists = "" if _lists(folder) == folder else "; the lists are not VPT's"
    return Status("present", f"{images:,} images in {folder}{lists}")


def fetch(dataset: DataSet, root: Path, progress: bool) -> None:
    """See `companion.data.fetch`. Everything is downloaded to a hidden folder, which is moved when complete."""
    folder = dataset.folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with (
        downloading(dataset, folder, progress),
        tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as name,
        _unpacked_below_their_folder(),
    ):
        new = _download(dataset, Path(name))
        for archive in new.iterdir():
            if archive.suffix in (".gz", ".tgz", ".zip"):
                archive.unlink()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # an incomplete copy: files are replaced, none of the user's others is removed
            shutil.copytree(new, folder, dirs_exist_ok=True, copy_function=shutil.move)
        else:
            new.rename(folder)


# --- implementation ----------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[0-9]{1,9}")
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), torch.float32, scale=True)


def _normalised(input) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(input.mean), list(input.std))]


def _read(dataset: DataSet, root: Path, split: str) -> Listed:
    """The list of a split, its images and labels, all validated except the images themselves."""
    group, _, key = dataset.name.partition("/")
    if not dataset.folder(root).is_dir():
        raise dataset.missing(root)
    if group == "vtab":
        listing, sources, labels = _read_lines(dataset, root, split)
    elif key in IMAGES:
        listing, sources, labels = _read_json(dataset, root, split)
    else:
        listing, sources, labels = _read_torchvision(dataset, root, split)
    if len(labels) != dataset.sizes[split]:
        raise dataset.missing(
            root, f"{listing.name} gives {len(labels)} images for '{split}', {dataset.sizes[split]} expected"
        )
    return listing, sources, labels


def _existing(dataset: DataSet, root: Path, path: Path) -> Path:
    if not path.exists():
        raise dataset.missing(root, f"{path} is not there")
    return path


def _inside(listing: Path, where: str, path: str) -> str:
    """`path` if it is below the data set's folder: a downloaded list must not make us read other files."""
    if _OUTSIDE.search(path):
        raise CorruptFile(listing, f"{where}: the path {path!r} leaves the data set's folder")
    return path


def _read_lines(dataset: DataSet, root: Path, split: str) -> Listed:
    """VTAB-1k's lists: lines "relative/path label", labels from 0."""
    folder = dataset.folder(root)
    listing = _existing(dataset, root, folder / _LISTS[split])
    try:
        rows = listing.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CorruptFile(listing, f"not text ({error})") from error
    sources, labels = [], []
    for line, row in enumerate(rows, 1):
        path, _, label = row.rpartition(" ")
        if not (path and _NUMBER.fullmatch(label)):
            raise CorruptFile(listing, f"line {line}: expected 'relative/path label', found {row[:80]!r}")
        if dataset.classes and int(label) >= dataset.classes:
            raise CorruptFile(listing, f"line {line}: label {label} is not in 0..{dataset.classes - 1}")
        sources.append(f"{folder}/{_inside(listing, f'line {line}', path)}")
        labels.append(int(label))
    return listing, sources, labels


def _both(read: Callable[[DataSet, Path, str], Listed], dataset: DataSet, root: Path) -> Listed:
    """The lists "train" and "val" concatenated."""
    listing, first, labels = read(dataset, root, "train")
    _, second, more = read(dataset, root, "val")
    return listing, [*first, *second], [*labels, *more]


def _read_json(dataset: DataSet, root: Path, split: str) -> Listed:
    """FGVC's lists: a dict "path" -> class id."""
    folder, key = dataset.folder(root), dataset.name.partition("/")[2]
    if split == "trainval":
        return _both(_read_json, dataset, root)
    lists = _lists(folder)
    listing = _existing(dataset, root, lists / f"{split}.json")
    if key == "nabirds":  # raw ids, renumbered in sorted order over the training list so that all splits agree
        known: Sequence[int] = sorted(set(_class_ids(_existing(dataset, root, lists / "train.json")).values()))
        if len(known) != dataset.classes:
            raise dataset.missing(root, f"train.json names {len(known)} classes, {dataset.classes} expected")
        accepted = "a class of train.json"
    else:
        known = range(1, dataset.classes + 1)
        accepted = f"in 1..{dataset.classes}"
    number = {class_id: label for label, class_id in enumerate(known)}
    sources, labels = [], []
    for path, class_id in _class_ids(listing).items():
        if class_id not in number:
            raise CorruptFile(listing, f"{path!r}: the class {class_id} is not {accepted}")
        sources.append(f"{folder}/{IMAGES[key]}{_inside(listing, 'entry', path)}")
        labels.append(number[class_id])
    return listing, sources, labels


def _lists(folder: Path) -> Path:
    """The folder of an FGVC set's lists: VPT's, or those of `official_lists` where none of VPT's is there."""
    vpts = any((folder / f"{split}.json").is_file() for split in ("train", "val", "test"))
    return folder if vpts or not (folder / NOT_VPT).is_dir() else folder / NOT_VPT


def _class_ids(listing: Path) -> dict[str, int]:
    content = read_json(listing)
    if not isinstance(content, Mapping):
        raise CorruptFile(listing, "expected a dict from paths to class ids")
    for path, class_id in content.items():
        # CUB's ids are text ("001")
        if not (type(class_id) is int or (isinstance(class_id, str) and _NUMBER.fullmatch(class_id))):
            raise CorruptFile(listing, f"{path!r}: the class id {class_id!r} is no whole number")
    return {path: int(class_id) for path, class_id in content.items()}


def _read_torchvision(dataset: DataSet, root: Path, split: str) -> Listed:
    """HTA's sets in torchvision's layouts, by torchvision's readers; train and val are split from its training set."""
    folder, key = dataset.folder(root), dataset.name.partition("/")[2]
    for path, _ in _archives(dataset, folder):
        _existing(dataset, root, path)
    official = "test" if split == "test" else "train"
    if key == "dtd" and split == "trainval":
        return _both(_read_torchvision, dataset, root)
    if key in ("cifar10", "cifar100", "svhn"):
        found: Listed = (folder, *_arrays(dataset, folder, official))
    else:
        found = _paths(dataset, root, split if key == "dtd" else official)
    listing, sources, labels = found
    if key == "dtd" or split == "test":
        return found
    order, cut = _order(key, len(labels)), int(0.8 * len(labels))
    part = {"train": order[:cut], "val": order[cut:], "trainval": order}[split]
    labels = [labels[i] for i in part]
    if isinstance(sources, np.ndarray):  # in file order, so a slice: no copy of the array
        start = 0 if split != "val" else cut
        return listing, sources[start : start + len(part)], labels
    return listing, [sources[i] for i in part], labels


def _order(key: str, length: int) -> list[int]:
    """The order that is split 80 / 20: the file order, or for sets sorted by class one fixed shuffle of it."""
    if key in ("food101", "gtsrb"):
        return np.random.default_rng(0).permutation(length).tolist()
    return list(range(length))


def _archives(dataset: DataSet, folder: Path) -> list[tuple[Path, str]]:
    """The files of CIFAR and SVHN with their MD5, as torchvision has them; empty for the other sets."""
    key = dataset.name.removeprefix("hta/")
    if key in ("cifar10", "cifar100"):
        reader = tv.CIFAR10 if key == "cifar10" else tv.CIFAR100
        named = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    elif key == "svhn":
        named = [tv.SVHN.split_list[split][1:] for split in ("train", "test")]
    else:
        named = []
    return [(folder / name, md5) for name, md5 in named]


def _arrays(dataset: DataSet, folder: Path, official: str) -> tuple[np.ndarray, list[int]]:
    """CIFAR or SVHN: images (n, 32, 32, 3) uint8 and labels."""
    try:
        if folder.name == "svhn":
            reader = tv.SVHN(folder, split=official)
            return reader.data.transpose(0, 2, 3, 1), reader.labels.tolist()
        reader = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[dataset.name.partition("/")[2]]
        reader = reader(folder.parent, train=official == "train")
        return reader.data, list(reader.targets)
    except RuntimeError as error:
        broken = [path for path, md5 in _archives(dataset, folder) if not check_integrity(path, md5)]
        if not broken:
            raise
        raise CorruptFile(broken[0], "it has not the published MD5: download it again") from error


def _paths(dataset: DataSet, root: Path, split: str) -> Listed:
    """DTD, GTSRB or Food-101: paths and labels as torchvision reads its lists."""
    folder, key = dataset.folder(root), dataset.name.partition("/")[2]
    listing, images = {
        "dtd": (folder / f"dtd/labels/{split}1.txt", folder / "dtd/images"),
        "food101": (folder / f"meta/{split}.json", folder / "images"),
        "gtsrb": (
            (folder / "GTSRB/Training",) * 2
            if split == "train"
            else (folder / "GT-final_test.csv", folder / "GTSRB/Final_Test/Images")
        ),
    }[key]
    _existing(dataset, root, listing)
    _existing(dataset, root, images)
    reader = {"dtd": tv.DTD, "food101": tv.Food101, "gtsrb": tv.GTSRB}[key]
    try:
        read = reader(folder.parent, split=split)
    except FileNotFoundError as error:  # GTSRB: a class folder without images
        raise dataset.missing(root, str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise CorruptFile(listing, f"torchvision cannot read it ({type(error).__name__}: {error})") from error
    pairs = read._samples if key == "gtsrb" else zip(read._image_files, read._labels, strict=True)
    sources, labels = [], []
    for path, label in pairs:
        relative = str(path).removeprefix(f"{images}/")
        sources.append(f"{images}/{_inside(listing, 'entry', relative)}")
        labels.append(label)
        if not 0 <= label < dataset.classes:
            raise CorruptFile(listing, f"{relative!r}: label {label} is not in 0..{dataset.classes - 1}")
    return listing, sources, labels


def check_listed(dataset: DataSet, root: Path, paths: Iterable[str], listing: str = "") -> None:
    """Raise `MissingData`, with the first missing one, unless all `paths` of a list, of that name, are on disk."""
    wanted = set(paths)
    if absent := _absent(wanted):
        by = f" of {listing}" if listing else ""
        what = f"{len(absent)} of {len(wanted)} listed images{by} are not there, the first: {min(absent)}"
        raise dataset.missing(root, what)


def _absent(wanted: set[str]) -> list[str]:
    """Those of `wanted` that are not on disk, found with one listing of each folder."""
    names = defaultdict(set)
    for path in wanted:
        folder, _, name = path.rpartition("/")
        names[folder].add(name)
    absent = []
    for folder, expected in names.items():
        there = {entry.name for entry in os.scandir(folder)} if Path(folder).is_dir() else set()
        absent += [f"{folder}/{name}" for name in expected - there]
    return absent


def _class_folders(folder: Path) -> list[str]:
    found = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(name for name in found if not name.startswith((".", "__MACOSX")))


def _stratified(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rest and of the held-out share of each class, both in their first order."""
    rng, held, members = np.random.default_rng(seed), set(), defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    for label in sorted(members):
        count = min(max(round(fraction * len(members[label])), 1), len(members[label]) - 1)
        held.update(rng.permutation(members[label])[:count].tolist())
    return [i for i in range(len(labels)) if i not in held], sorted(held)


@contextlib.contextmanager
def _unpacked_below_their_folder() -> Iterator[None]:
    """Make tarfile refuse members that point outside; torchvision relies on Python, whose default did not."""
    before = tarfile.TarFile.__dict__.get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _download(dataset: DataSet, folder: Path) -> Path:
    """Let torchvision download, verify and unpack a set below `folder`; returns the folder to move."""
    key = dataset.name.partition("/")[2]
    name = Path(dataset.folders[0]).name
    if key == "flowers102":
        new = folder / "flowers-102"
        for split in ("train", "val", "test"):
            read = tv.Flowers102(folder, split=split, download=True)
            pairs = zip(read._image_files, read._labels, strict=True)
            write_json(new / f"{split}.json", {f"jpg/{path.name}": label + 1 for path, label in pairs})
        return new
    downloads = {
        "dtd": [functools.partial(tv.DTD, folder)],
        "food101": [functools.partial(tv.Food101, folder)],
        "gtsrb": [functools.partial(tv.GTSRB, folder, split=split) for split in ("train", "test")],
        "cifar10": [functools.partial(tv.CIFAR10, folder)],
        "cifar100": [functools.partial(tv.CIFAR100, folder)],
        "svhn": [functools.partial(tv.SVHN, folder / name, split=split) for split in ("train", "test")],
    }
    for download in downloads[key]:
        download(download=True)
    return folder / name
