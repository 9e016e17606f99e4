"""Images of pedestrians with attributes, in the original files and splits of the sets.

    sets = splits("par/pa100k", "data", square_transform(224))
    image, labels = sets["test"][0]        # float32 (3, 224, 224), float32 (26,) of 0 and 1
    sets["trainval"].ratio                 # (26,) the share of images with each attribute
    sets["trainval"].sentences             # the sentences that CLIP encodes

Opening a set reads its annotation; an image is decoded on access. `root` is the data folder (`data`).
`attributes_sets` describes the sets. Labels are 1 where the annotation is 1, and 0 elsewhere: in WIDER -1 is "absent"
and 0 "unclear". In the RAP sets "unclear" is 2 and remains 2, as in the code of PromptPAR.

A new set needs a `DataSet` with task "attributes" in `DATASETS`, and files like PA100K's or `labels.csv`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import CorruptFile, check_choice
from ..ops import unpickle
from ..ops.config import configure
from . import DataSet, Status, find, own_set
from .attributes_sets import ANNOTATIONS, COLUMNS, IMAGES, SENTENCES, WIDER_FILES, ZERO_SHOT, ZERO_SHOT_FILES
from .classification import Images, _inside, _normalised, _to_tensor, check_listed

SPLITS = ("train", "val", "trainval", "test")
Transform = Callable[[Image.Image], torch.Tensor]


class Listing:
    """An annotation: images (n), labels (n, A) of 0, 1 and 2 (unclear), names of attributes (A), members of splits."""

    def __init__(
        self,
        file: Path,
        pictures: Sequence[str],
        labels: np.ndarray,
        names: Sequence[str],
        splits: Mapping[str, np.ndarray],
    ):
        self.file, self.pictures, self.names = file, list(pictures), list(names)
        self.labels = np.asarray(labels).clip(0).astype(np.float32)
        if (wrong := self.labels[~np.isin(self.labels, (0, 1, 2))]).size:
            raise CorruptFile(file, f"a label is {wrong[0]:g}: 1, 0 (absent) and 2 (unclear) are expected")
        if self.labels.ndim != 2 or self.labels.shape != (len(self.pictures), len(self.names)):
            raise CorruptFile(
                file, f"labels {self.labels.shape} for {len(self.pictures)} images and {len(self.names)} attributes"
            )
        self.splits = {split: self._indices(split, chosen) for split, chosen in splits.items()}
        if {"train", "val"} <= self.splits.keys():
            self.splits["trainval"] = np.concatenate([self.splits["train"], self.splits["val"]])
        learned = "trainval" if "trainval" in self.splits else "train"
        if common := np.intersect1d(self.splits[learned], self.splits["test"]).size:
            raise CorruptFile(file, f"{common} images are in the training split and in the test split")

    def _indices(self, split: str, chosen: np.ndarray) -> np.ndarray:
        found = np.asarray(chosen)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.number) or not (found == found.astype(np.int64)).all():
            raise CorruptFile(self.file, f"the split '{split}' is no list of image numbers")
        found = found.astype(np.int64)
        if not found.size or found.min() < 0 or found.max() >= len(self.pictures):
            raise CorruptFile(
                self.file, f"the split '{split}' is empty, or goes beyond the {len(self.pictures)} images"
            )
        return found


class Pedestrians(Images):
    """Images with attributes, decoded on access: `pedestrians[i]` is (float32 (3, H, W), float32 (A,)).

    Attributes:
        labels: (n, A), float32: 1 present, 0 absent, 2 unclear (RAP).
        names: the attribute names of the annotation.
        sentences: the attributes as the sentences that CLIP encodes.
        ratio: (A,) the mean label of each attribute, for the loss: the share of images with the attribute.

    Raises (on indexing) as `classification.Images`.
    """

    def __init__(
        self,
        dataset: DataSet,
        root: Path,
        sources: Sequence[str] | np.ndarray,
        labels: np.ndarray,
        names: Sequence[str],
        sentences: Sequence[str],
        transform: Transform | None,
    ):
        super().__init__(dataset, root, sources, labels, len(names), transform, names)
        truth = torch.from_numpy(labels)
        self.labels, self.ratio = truth, truth.mean(0)
        self.names, self.sentences = tuple(names), tuple(sentences)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.transform or _to_tensor)(self.picture(index)), self.labels[index]


# --- public functions --------------------------------------------------------------------------------------------


def splits(name: str, root: str | Path, transform: Transform | None = None) -> dict[str, Pedestrians]:
    """Every split of a set.

    Args:
        name: "par/peta", "par/pa100k", "par/rapv1", "par/rapv2", "par/wider", "par-zs/peta", "par-zs/rap", or another
            name of `DATASETS` whose task is "attributes".
        root: the data folder; searched for `DATASETS[name].folders`.
        transform: from a PIL image (RGB) to a tensor (3, H, W), see `square_transform`; None scales to 0..1 and keeps
            the size. To set another one for a split: `sets["trainval"].transform = ...`.

    Returns:
        "trainval", which papers train on, and "test"; "train" and "val" too where the set has them.

    Raises:
        BadParameter: unknown name.
        MissingData: the folder, a file or images are missing, or their number differs from the published one.
        CorruptFile: an annotation that is truncated, or has unexpected fields, sizes or values.
    """
    dataset = find(name, "attributes")
    return _pedestrians(dataset, Path(root), transform)


def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Pedestrians:
    """One split of a set; otherwise as `splits`. Raises `BadParameter` for a split that the set does not have."""
    found = splits(name, root, transform)
    check_choice("split", split, found)
    return found[split]


def own_folder(root: str | Path, transform: Transform | None = None) -> dict[str, Pedestrians]:
    """Your own images, as `splits` gives them: `root`/labels.csv lists the split and the attributes of each image.

        image,split,A pedestrian wearing a hat,A pedestrian with a backpack
        anna/0001.jpg,train,1,0

    The headers of the attribute columns are the sentences. Splits are train, val (may be absent) and test.

    Raises as `splits`.
    """
    root = Path(root)
    own = own_set(
        root,
        "attributes",
        'labels.csv    "image,split,<a sentence for each attribute>", then a line for each image: its path\n'
        "              below this folder; train, val or test; 0 or 1 for each attribute",
    )
    return _pedestrians(own, root, transform)


class PadToSquare:
    """Scales an image to `size` rows and centres it on a black square, as the authors of PromptPAR do.

    Resized bilinearly without antialiasing, as OpenCV does. The result may be one or two pixels narrower than high,
    like theirs. An image that would be wider than high is not padded (the resize that follows changes its aspect
    ratio).

    Args:
        antialias: resize with antialiasing, by Pillow.
    """

    def __init__(self, size: int, antialias: bool = False):
        self.size, self.antialias = size, antialias

    def __call__(self, picture: Image.Image) -> Image.Image:
        wide = picture.width / (picture.height / self.size)
        if wide > self.size:
            return picture
        width, edge = max(1, int(wide)), int((self.size - wide) / 2)
        if self.antialias:
            resized = picture.resize((width, self.size), Image.Resampling.BILINEAR)
        else:
            pixels = F.pil_to_tensor(picture.convert("RGB"))
            resized = F.to_pil_image(F.resize(pixels, [self.size, width], antialias=False))
        square = Image.new("RGB", (width + 2 * edge, self.size))
        square.paste(resized, (edge, 0))
        return square


def square_transform(size: int = 224, train: bool = False, antialias: bool = False) -> v2.Transform:
    """PromptPAR's transform: padded to a square, resized (bilinear), normalised by 0.5, not by CLIP's statistics.

    Args:
        antialias: see `PadToSquare`.
        train: adds 10 pixels of black padding, a random crop of `size`, and a flip with probability 0.5.

    Returns:
        From a PIL image to a float32 tensor (3, size, size).
    """
    cut = [v2.Pad(10), v2.RandomCrop(size), v2.RandomHorizontalFlip(0.5)] if train else []
    halves = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    steps = [PadToSquare(size, antialias), v2.Resize((size, size)), *cut, *_normalised(halves)]
    arguments = {"size": size, "train": train, "antialias": antialias}
    return configure(v2.Compose(steps), arguments, square_transform)


# --- called by `companion.data` ----------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: annotations are read, no image is opened."""
    listing = _read(dataset, root)
    base = _base(dataset, root, listing)
    chosen = np.unique(np.concatenate([*listing.splits.values()]))
    wanted = {f"{base}/{listing.pictures[i]}" for i in chosen}
    check_listed(dataset, root, wanted)
    return Status("present", f"{len(wanted):,} images in {base}, {len(listing.names)} attributes")


# --- implementation ----------------------------------------------------------------------------------------------


def _pedestrians(dataset: DataSet, root: Path, transform: Transform | None) -> dict[str, Pedestrians]:
    listing = _read(dataset, root)
    base = _base(dataset, root, listing)
    sentences, found = SENTENCES.get(dataset.name, listing.names), {}
    for split in SPLITS:
        if split in listing.splits:
            chosen = listing.splits[split]
            sources, labels = [f"{base}/{listing.pictures[i]}" for i in chosen], listing.labels[chosen]
            found[split] = Pedestrians(dataset, root, sources, labels, listing.names, sentences, transform)
    return found


def _base(dataset: DataSet, root: Path, listing: Listing) -> Path:
    """The folder of the images: the first known one that has the first and the last image."""
    folder = dataset.folder(root)
    places = IMAGES.get(ZERO_SHOT.get(dataset.name, dataset.name), ("data", ""))
    ends = [listing.pictures[listing.splits["test"][i]] for i in (0, -1)]
    for place in places:
        if all((folder / place / name).is_file() for name in ends):
            return folder / place
    absent = next((name for name in ends if not any((folder / place / name).is_file() for place in places)), ends[0])
    where = " or ".join(str(folder / place) for place in places)
    raise dataset.missing(root, f"{listing.file.name} lists {absent}, which is not in {where}")


def _read(dataset: DataSet, root: Path) -> Listing:
    """The annotation of a set, checked against the published numbers."""
    folder, own = dataset.folder(root), ZERO_SHOT.get(dataset.name, dataset.name)
    if not folder.is_dir():
        raise dataset.missing(root)
    readers = {"par/peta": _peta, "par/rapv1": _rapv1, "par/rapv2": _rapv2, "par/wider": _wider}
    if own in readers:
        listing = readers[own](dataset, root)
    elif (folder / "labels.csv").is_file() or dataset.group == "own":
        listing = _csv(dataset, root)
    else:
        listing = _pa100k(dataset, root)
    for split, count in dataset.sizes.items():
        found = len(listing.splits.get(split, ()))
        if found != count:
            raise dataset.missing(root, f"{listing.file} has {found:,} images for '{split}', {count:,} are expected")
    return listing


def _file(dataset: DataSet, root: Path, name: str) -> Path:
    path = dataset.folder(root) / name
    if not path.is_file():
        raise dataset.missing(root, f"{path} is not there")
    return path


def _mat(dataset: DataSet, root: Path, read: Callable[[dict], tuple], file: str = "") -> Listing:
    """A MATLAB file through `read`, from its variables to (images, labels, names, splits)."""
    path = _file(dataset, root, file or ANNOTATIONS[ZERO_SHOT.get(dataset.name, dataset.name)])
    try:
        variables = loadmat(path)
    except Exception as error:  # a damaged file can raise anything
        raise CorruptFile(path, f"not a MATLAB file ({type(error).__name__}: {error})") from error
    try:
        pictures, labels, names, chosen = read(variables)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        known = ", ".join(name for name in variables if not name.startswith("__"))
        raise CorruptFile(
            path, f"its fields are not those of {dataset.title} ({type(error).__name__}: {error}); it has: {known}"
        ) from error
    if dataset.name in ZERO_SHOT:
        chosen = _new_split(dataset, root)
    for number, picture in enumerate(pictures, 1):
        _inside(path, f"image {number}", picture)
    return Listing(path, pictures, labels, names, chosen)


def _words(cells: np.ndarray) -> list[str]:
    """The strings in a cell array of MATLAB, one row or one column."""
    return [str(cell[0]) for cell in cells.ravel()]


def _numbers(field: np.ndarray) -> np.ndarray:
    """Image numbers, from 1 in MATLAB, from 0 here."""
    return np.asarray(field).ravel().astype(np.int64) - 1


def _peta(dataset: DataSet, root: Path) -> Listing:
    def read(variables: dict) -> tuple:
        labels, names, _, partitions = (variables["peta"][0, 0][i] for i in range(4))
        labels, columns = labels[:, 4:], list(COLUMNS[dataset.name])
        names = np.array(_words(names))
        first = partitions.ravel()[0][0, 0]
        chosen = {split: _numbers(first[i]) for i, split in enumerate(("train", "val", "test"))}
        pictures = [f"{number:05}.png" for number in range(1, len(labels) + 1)]
        return pictures, labels[:, columns], names[columns], chosen

    return _mat(dataset, root, read)


def _pa100k(dataset: DataSet, root: Path) -> Listing:
    def read(variables: dict) -> tuple:
        pictures: list[str] = []
        labels, chosen = [], {}
        for split in ("train", "val", "test"):
            listed = _words(variables[f"{split}_images_name"])
            chosen[split] = np.arange(len(pictures), len(pictures) + len(listed))
            pictures += listed
            labels.append(variables[f"{split}_label"])
        return pictures, np.concatenate(labels), _words(variables["attributes"]), chosen

    return _mat(dataset, root, read, ANNOTATIONS["par/pa100k"])


def _rapv1(dataset: DataSet, root: Path) -> Listing:
    def read(variables: dict) -> tuple:
        fields, columns = variables["RAP_annotation"][0, 0], list(COLUMNS[dataset.name])
        first = fields[0].ravel()[0][0, 0]
        chosen = {split: _numbers(first[i]) for i, split in enumerate(("trainval", "test"))}
        names = np.array(_words(fields[3]))
        return _words(fields[5]), fields[1][:, columns], names[columns], chosen

    return _mat(dataset, root, read)


def _rapv2(dataset: DataSet, root: Path) -> Listing:
    def read(variables: dict) -> tuple:
        fields = variables["RAP_annotation"][0, 0]
        columns = _numbers(fields["selected_attribute"])[list(COLUMNS[dataset.name])]
        first = fields["partition_attribute"].ravel()[0][0, 0]
        chosen = {split: _numbers(_unwrapped(first[f"{split}_index"])) for split in ("train", "val", "test")}
        names = np.array(_words(fields["attribute"]))
        return _words(fields["name"]), fields["data"][:, columns], names[columns], chosen

    return _mat(dataset, root, read)


def _unwrapped(field: np.ndarray) -> np.ndarray:
    """A numeric field, which MATLAB may have wrapped in a cell."""
    return field.ravel()[0] if field.dtype == object else field


def _wider(dataset: DataSet, root: Path) -> Listing:
    names_file = _file(dataset, root, WIDER_FILES["names"])
    names, pictures, labels, chosen = _lines(names_file), [], [], {}
    for split in ("trainval", "test"):
        listed, given = (_file(dataset, root, name) for name in WIDER_FILES[split])
        rows, values = _lines(listed), _lines(given)
        if len(rows) != len(values):
            raise CorruptFile(given, f"{len(values)} lines, and {listed.name} has {len(rows)} images")
        for number, row in enumerate(rows, 1):
            pictures.append(_inside(listed, f"line {number}", row))
        for number, value in enumerate(values, 1):
            if not re.fullmatch(r"\[?\s*-?\d+(\s*,\s*-?\d+)*\s*]?", value) or value.count(",") != len(names) - 1:
                raise CorruptFile(given, f"line {number}: expected {len(names)} numbers, found {value[:80]!r}")
            labels.append([int(x) for x in value.strip("[] ").split(",")])
        chosen[split] = np.arange(len(pictures) - len(rows), len(pictures))
    return Listing(names_file, pictures, np.array(labels), names, chosen)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CorruptFile(path, f"not a text file ({error})") from error
    return [line.strip() for line in lines if line.strip()]


class _Record(dict):
    """Replaces easydict's EasyDict by a dict without attributes: anything the pickle sets besides items is ignored."""

    def __setstate__(self, _: object) -> None: ...


class _Unpickler(unpickle.Unpickler):
    """The safe reader of pickles, extended by EasyDict."""

    def find_class(self, module: str, name: str) -> object:
        return _Record if (module, name) == ("easydict", "EasyDict") else super().find_class(module, name)


def _new_split(dataset: DataSet, root: Path) -> dict[str, np.ndarray]:
    """The partition in the pickle of a zero-shot split: image numbers, from 0."""
    folder = dataset.folder(root)
    path = next((folder / name for name in ZERO_SHOT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise dataset.missing(root, f"{folder / ZERO_SHOT_FILES[0]} is not there")
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptFile(path, f"not a pickle ({type(error).__name__}: {error})") from error
    parts = found.get("partition") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not {"train", "val", "test"} <= parts.keys():
        raise CorruptFile(path, "expected a dict with partition.train, partition.val and partition.test")
    chosen = {split: parts[split] for split in ("train", "val", "test")}
    # several partitions form a list, of which the first is used
    return {split: np.asarray(p[0] if isinstance(p, list) and np.ndim(p[0]) else p) for split, p in chosen.items()}


def _csv(dataset: DataSet, root: Path) -> Listing:
    path = _file(dataset, root, "labels.csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorruptFile(path, f"not a CSV file ({error})") from error
    if header[:2] != ["image", "split"] or len(header) < 3:
        raise CorruptFile(path, f"expected the header 'image,split,<attributes>', found {','.join(header)[:80]!r}")
    pictures: list[str] = []
    labels = []
    chosen: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    lines: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != len(header) or row[1] not in chosen or not {*row[2:]} <= {"0", "1"}:
            expected = f"a path, {', '.join(chosen)}, and 0 or 1 for each of {len(header) - 2} attributes"
            raise CorruptFile(path, f"line {number}: expected {expected}, found {','.join(row)[:80]!r}")
        if (first := lines.setdefault(row[0], number)) != number:
            raise CorruptFile(path, f"line {number}: {row[0]} is in line {first} already")
        chosen[row[1]].append(len(pictures))
        pictures.append(_inside(path, f"line {number}", row[0]))
        labels.append([int(x) for x in row[2:]])
    if not chosen["val"]:
        chosen["trainval"] = chosen.pop("train")
        del chosen["val"]
    if empty := [split for split, members in chosen.items() if not members]:
        raise CorruptFile(path, f"no image is in {' or '.join(empty)}")
    return Listing(path, pictures, np.array(labels), header[2:], {s: np.array(m) for s, m in chosen.items()})
