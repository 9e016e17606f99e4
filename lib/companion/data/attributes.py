"""Images of pedestrians with attributes, in the original files and splits of the sets.

    sets = splits("par/pa100k", "data", transform)
    image, labels = sets["test"][0]        # float32 (3, 224, 224), float32 (26,) of 0 and 1
    sets["trainval"].ratio                 # (26,) the share of images with each attribute
    sets["trainval"].sentences             # the sentences that CLIP encodes

Opening a set reads its annotation; an image is decoded on access. `root` is the data folder (`data`).
`attributes_sets.yaml` describes the sets. Labels are 1 where the annotation is 1, and 0 elsewhere: in WIDER -1 is
"absent" and 0 "unclear". In the RAP sets "unclear" is 2 and remains 2, as in the code of PromptPAR.

A new set needs a `DataSet` with its `splits` and task "attributes" in `DATASETS`, and files like PA100K's or
`labels.csv`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.io import loadmat

from ..errors import CorruptFile, check_choice, check_names, typed
from ..io import unpickle
from . import DataSet, check_own, facts, find, once, own_set, tables
from .decoding import SUFFIXES
from .folders import at, entries, inside, of_file, told
from .images import Images, Transform, to_tensor

SPLITS = ("train", "val", "trainval", "test")
_FACTS = facts("attributes")
SENTENCES: dict[str, tuple[str, ...]] = _FACTS["SENTENCES"]
"""The sentence of each attribute, in label order, as the authors' preparation has them, slips included."""
PHRASES: dict[str, tuple[str, ...]] = _FACTS["PHRASES"]
"""For RAPv1 the authors' script passes CLIP these phrases, and stores the sentences too; which of the two the paper
used was not found. `SENTENCES` has the sentences, as for all other sets and as in the abstract."""
COLUMNS: dict[str, tuple[int, ...]] = _FACTS["COLUMNS"]
"""The scored columns of the raw labels, in label order: of PETA after its first four, of RAPv2 among the 54 that its
annotation selects."""
ZERO_SHOT: dict[str, str] = _FACTS["ZERO_SHOT"]
"""The sets that are another set with a new split."""
ZERO_SHOT_FILES: tuple[str, ...] = _FACTS["ZERO_SHOT_FILES"]
"""The files of the new split: Rethinking_of_PAR's, or the one that PromptPAR's script makes of it."""


class Listing(NamedTuple):
    """An annotation: images (n), labels (n, A) of 0, 1 and 2 (unclear), names of attributes (A), members of splits."""

    file: Path
    pictures: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]
    splits: Mapping[str, np.ndarray]

    def checked(self) -> Listing:
        """With "trainval", and labels of absent attributes 0. Raises `CorruptFile`: labels or splits do not fit."""
        with of_file(self.file):
            check_names(self.names)
        labels, pictures = np.asarray(self.labels).clip(0).astype(np.float32), [*map(str, self.pictures)]
        if (wrong := labels[~np.isin(labels, (0, 1, 2))]).size:
            raise CorruptFile(self.file, f"a label is {wrong[0]:g}: 1, 0 (absent) and 2 (unclear) are expected")
        if labels.shape != (len(pictures), len(self.names)):
            what = f"labels {labels.shape} for {len(pictures)} images and {len(self.names)} attributes"
            raise CorruptFile(self.file, what)
        for number, picture in enumerate(pictures, 1):
            inside(self.file, f"image {number}", picture)
        splits = {}
        for split, chosen in self.splits.items():
            found = np.asarray(chosen)
            known = found.ndim == 1 and found.size and found.dtype.kind in "iu"
            if not (known and 0 <= found.min() <= found.max() < len(pictures)):
                raise CorruptFile(self.file, f"the split '{split}' is no list of numbers of the {len(pictures)} images")
            splits[split] = found.astype(np.int64)
        if "train" in splits:
            splits["trainval"] = np.concatenate([splits[split] for split in ("train", "val") if split in splits])
        if common := np.intersect1d(splits["trainval"], splits["test"]).size:
            raise CorruptFile(self.file, f"{common} images are in the training split and in the test split")
        return self._replace(pictures=pictures, labels=labels, names=[*map(str, self.names)], splits=splits)


class Pedestrians(Images):
    """Images with attributes, decoded on access: `pedestrians[i]` is (float32 (3, H, W), float32 (A,)).

    Attributes:
        labels: (n, A), float32: 1 present, 0 absent, 2 unclear (RAP).
        names: the attribute names of the annotation.
        sentences: the attributes as the sentences that CLIP encodes.
        ratio: (A,) the mean label of each attribute, for the loss: the share of images with the attribute.
        listing: the name of the annotation; empty without one.

    Raises (on indexing) as `images.Files`.
    """

    listing = ""

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
        return (self.transform or to_tensor)(self.picture(index)), self.labels[index]


# --- public functions --------------------------------------------------------------------------------------------


@typed
def splits(name: str, root: str | Path, transform: Transform | None = None) -> dict[str, Pedestrians]:
    """Every split of a set.

    Args:
        name: "par/peta", "par/pa100k", "par/rapv1", "par/rapv2", "par/wider", "par-zs/peta", "par-zs/rap", or another
            name of `DATASETS` whose task is "attributes".
        root: the data folder; searched for `DATASETS[name].folders`.
        transform: from a PIL image (RGB) to a tensor (3, H, W), such as PromptPAR's `square_transform`; None scales
            to 0..1 and keeps the size. To set another one for a split: `sets["trainval"].transform = ...`.

    Returns:
        "trainval", which papers train on, and "test"; "train" and "val" too where the set has them.

    Raises:
        BadParameter: unknown name.
        MissingData: the folder, a file or images are missing, or their number differs from the published one.
        CorruptFile: an annotation that is truncated, or has unexpected fields, sizes or values.
    """
    dataset = find(name, "attributes")
    return _pedestrians(dataset, Path(root), transform)


@typed
def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Pedestrians:
    """One split of a set; otherwise as `splits`. Raises `BadParameter` for a split that the set does not have."""
    found = splits(name, root, transform)
    check_choice("split", split, found)
    return found[split]


@typed
def own(root: str | Path, transform: Transform | None = None) -> dict[str, Pedestrians]:
    """Your own images, as `splits` gives them: `root`/labels.csv lists the split and the attributes of each image.

        image,split,A pedestrian wearing a hat,A pedestrian with a backpack
        anna/0001.jpg,train,1,0

    The headers of the attribute columns are the sentences. Splits are train, val (may be absent) and test, in upper or
    lower case; an attribute may also be 1.0 and 0.0, or True and False.

    Raises as `splits`.
    """
    layout = (
        'labels.csv    "image,split,<a sentence for each attribute>", then a line for each image: its path\n'
        "              below this folder; train, val or test; 0 or 1, or False or True, for each attribute"
    )
    dataset, root = own_set(root, "attributes", layout), Path(root)
    sets = _pedestrians(dataset, root, transform)
    check_own(dataset, root, {split: found.sources for split, found in sets.items()}, "labels.csv")
    return sets


# --- implementation ----------------------------------------------------------------------------------------------


def _pedestrians(dataset: DataSet, root: Path, transform: Transform | None) -> dict[str, Pedestrians]:
    """The splits of a set, checked against the published numbers."""
    folder, own = dataset.folder(root), ZERO_SHOT.get(dataset.name, dataset.name)
    if own == "par/wider":
        listing = _wider(dataset, root)
    elif at(folder, "labels.csv").is_file() or dataset.group == "own":
        listing = _csv(dataset, root)
    else:
        listing = _mat(dataset, root, own)
    listing = listing.checked()
    for split, known in dataset.sizes.items():
        count = len(listing.splits.get(split, ()))
        tables.check_count(dataset, root, count, known, f"images for '{split}' in {listing.file}")
    places = [at(folder, place) for place in _FACTS["IMAGES"].get(own, ("data", ""))]
    ends = [listing.pictures[listing.splits["test"][i]] for i in (0, -1)]
    base = next((place for place in places if all(map(os.path.isfile, _sources(place, ends)))), None)
    if base is None:
        where = "; ".join(f"{place} ({told(entries(place), 3)})" if place.is_dir() else str(place) for place in places)
        raise dataset.missing(root, f"{listing.file.name} lists {' and '.join(ends)}, not both of which are in {where}")
    files = _sources(base, listing.pictures)
    sentences, found = SENTENCES.get(dataset.name, listing.names), {}
    for split in (split for split in SPLITS if split in listing.splits):
        chosen = listing.splits[split]
        sources, labels = [files[i] for i in chosen], listing.labels[chosen]
        found[split] = Pedestrians(dataset, root, sources, labels, listing.names, sentences, transform)
        found[split].listing = listing.file.name
    return found


def _sources(base: Path, pictures: Sequence[str]) -> list[str]:
    """The files of listed images; of one that is not there the only other one, not listed, with another ending."""
    listed = [f"{base}/{picture}" for picture in pictures]
    known = {*listed}
    there = functools.cache(lambda folder: frozenset(entries(Path(folder))))

    @functools.cache
    def by_stem(folder: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in there(folder):
            stem, dot, end = name.rpartition(".")
            if (dot + end).lower() in SUFFIXES:
                found.setdefault(f"{folder}/{stem}", []).append(f"{folder}/{name}")
        return found

    files = []
    for path in listed:
        folder, _, name = path.rpartition("/")
        alike = [] if name in there(folder) else by_stem(folder).get(path.rpartition(".")[0], [])
        files.append(alike[0] if len(alike) == 1 and alike[0] not in known else path)
    return files


def _mat(dataset: DataSet, root: Path, own: str) -> Listing:
    """A MATLAB file in the layout of the set `own`."""
    layout = own if own in _LAYOUTS else "par/pa100k"
    path = tables.existing(dataset, root, at(dataset.folder(root), _FACTS["ANNOTATIONS"][layout]))
    content = _content(path)
    try:
        found = Listing(path, *_LAYOUTS[layout](content, [*COLUMNS.get(dataset.name, ())]))
    except Exception as error:
        what = f"its fields are not those of {dataset.title} ({error!r}){_whose(content)}. Get it: {dataset.where}"
        raise CorruptFile(path, what) from error
    return found._replace(splits=_new_split(dataset, root)) if dataset.name in ZERO_SHOT else found


@once
def _content(path: Path) -> Mapping[str, Any]:  # `Listing.checked` copies what it takes
    try:
        return MappingProxyType(loadmat(path, simplify_cells=True))
    except NotImplementedError as error:
        what = "it is in MATLAB's format 7.3 (HDF5), the released one is not: take that, or save it with -v7"
        raise CorruptFile(path, what) from error
    except Exception as error:  # a damaged file can raise anything
        what = f"truncated, or no MATLAB file: it has {path.stat().st_size:,} bytes ({error!r}); download it again"
        raise CorruptFile(path, what) from error


def _whose(content: Mapping) -> str:
    """The set whose fields those of a MATLAB file are, in words."""
    for name, read in _LAYOUTS.items():
        with contextlib.suppress(Exception):
            read(content, [*COLUMNS[name]])
            return f", but those of {find(name).title}"
    return ""


Fields = tuple[list[str], np.ndarray, Sequence[str], dict[str, np.ndarray]]  # those of a `Listing` after the file


def _partition(parts: Any, *splits: str) -> dict[str, np.ndarray]:
    """The first of several partitions: image numbers, which are counted from 1 in MATLAB."""
    first = parts[0] if isinstance(parts, list) else parts
    return {
        split: np.atleast_1d(chosen).astype(np.int64) - 1 for split, chosen in zip(splits, first.values(), strict=False)
    }


def _peta(content: Mapping, columns: list[int]) -> Fields:
    labels, names, _, parts = [*content["peta"].values()][:4]
    pictures = [f"{number:05}.png" for number in range(1, len(labels) + 1)]
    return pictures, labels[:, 4:][:, columns], names[columns], _partition(parts, "train", "val", "test")


def _pa100k(content: Mapping, _: list[int]) -> Fields:
    pictures: list[str] = []
    labels, chosen = [], {}
    for split in ("train", "val", "test"):
        listed = np.atleast_1d(content[f"{split}_images_name"]).tolist()
        chosen[split] = np.arange(len(pictures), len(pictures) + len(listed))
        pictures += listed
        labels.append(np.atleast_2d(content[f"{split}_label"]))
    return pictures, np.concatenate(labels), content["attributes"], chosen


def _rapv1(content: Mapping, columns: list[int]) -> Fields:
    parts, labels, _, names, _, pictures = [*content["RAP_annotation"].values()][:6]
    return pictures.tolist(), labels[:, columns], names[columns], _partition(parts, "trainval", "test")


def _rapv2(content: Mapping, columns: list[int]) -> Fields:
    found = content["RAP_annotation"]
    columns = found["selected_attribute"][columns] - 1
    parts = _partition(found["partition_attribute"], "train", "val", "test")
    return found["name"].tolist(), found["data"][:, columns], found["attribute"][columns], parts


_LAYOUTS = {"par/peta": _peta, "par/pa100k": _pa100k, "par/rapv1": _rapv1, "par/rapv2": _rapv2}


def _wider(dataset: DataSet, root: Path) -> Listing:
    folder, files = dataset.folder(root), _FACTS["WIDER_FILES"]
    names_file = tables.existing(dataset, root, at(folder, files["names"]))
    pictures: list[str] = []
    names, labels, chosen = tables.lines(names_file), [], {}
    for split in ("trainval", "test"):
        listed, given = (tables.existing(dataset, root, at(folder, name)) for name in files[split])
        rows = tables.lines(listed)
        try:
            values = np.loadtxt([line.strip("[]") for line in tables.lines(given)], int, delimiter=",", ndmin=2)
        except ValueError as error:
            raise CorruptFile(given, f"expected {len(names)} numbers a line ({error})") from error
        if values.shape != (len(rows), len(names)):
            raise CorruptFile(given, f"labels {values.shape} for {len(rows)} images and {len(names)} attributes")
        chosen[split] = np.arange(len(pictures), len(pictures) + len(rows))
        pictures += rows
        labels.append(values)
    return Listing(names_file, pictures, np.concatenate(labels), names, chosen)


class _Unpickler(unpickle.Unpickler):
    """The safe reader of pickles, which reads easydict's EasyDict as a dict."""

    def find_class(self, module: str, name: str) -> object:
        return type(name, (dict,), {}) if module == "easydict" else super().find_class(module, name)


def _new_split(dataset: DataSet, root: Path) -> dict[str, np.ndarray]:
    """The partition in the pickle of a zero-shot split: image numbers, from 0; of several partitions the first."""
    path = tables.existing(dataset, root, *(dataset.folder(root) / name for name in ZERO_SHOT_FILES))
    try:
        with path.open("rb") as file:
            parts = _Unpickler(file).load()["partition"]
        chosen = {split: parts[split] for split in ("train", "val", "test")}
    except Exception as error:  # a damaged pickle can raise anything
        what = f"expected a pickled dict with partition.train, partition.val and partition.test ({error!r})"
        raise CorruptFile(path, what) from error
    return {split: np.asarray(p[0] if isinstance(p, list) and np.ndim(p[0]) else p) for split, p in chosen.items()}


_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}  # as pandas writes integers, floats and flags


def _csv(dataset: DataSet, root: Path) -> Listing:
    path = tables.existing(dataset, root, dataset.folder(root) / "labels.csv")
    rows = tables.rows(path, "image", "split")
    names = [name for name in rows[0][1] if name not in ("image", "split")]
    pictures: dict[str, list[int]] = {}
    chosen: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    if not names:
        raise CorruptFile(path, "it has no column for an attribute")
    for line, row in rows:
        split, image = row["split"].lower(), posixpath.normpath(row["image"])
        if split not in chosen:
            raise CorruptFile(path, f"line {line}: the split is {row['split']!r}; {', '.join(chosen)} are expected")
        if image in pictures:
            raise CorruptFile(path, f"line {line}: {image!r} is further up too: each image has one line")
        if wrong := [name for name in names if row[name].lower() not in _VALUES]:
            way = f"{', '.join(_VALUES)} are expected: fill in the cell, or leave out the line or the column"
            raise CorruptFile(path, f"line {line}: {wrong[0]!r} is {row[wrong[0]]!r}; {way}")
        chosen[split].append(len(pictures))
        pictures[image] = [_VALUES[row[name].lower()] for name in names]
    chosen = {split: members for split, members in chosen.items() if members or split != "val"}
    if empty := [split for split, members in chosen.items() if not members]:
        raise CorruptFile(path, f"no image is in {' or '.join(empty)}")
    labels = np.array([*pictures.values()])
    return Listing(path, [*pictures], labels, names, {split: np.array(members) for split, members in chosen.items()})
