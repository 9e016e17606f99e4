"""Radiographs and fundus images of a list, decoded on access as one grey channel: alone, with labels, with masks."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CorruptFile, typed
from . import DataSet, Parts, decoding, facts
from .folders import at, inside

_PLACES: dict[str, tuple[str, ...]] = facts("xrays")["PLACES"]
Transform = Callable[[Tensor], Tensor]
PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of an image (1 or 3, H, W) and its mask (k, H', W')


class Radiographs(Parts, Dataset):
    """Images that are decoded on access: item i is the transformed image i, without a label.

    Args:
        dataset: the set they belong to, for the error message of a missing file.
        root: the data folder.
        paths: relative to the set's folder, or absolute and below it; see `sources`.
        transform: from a grey tensor (1, H, W); None: unchanged.
        listing: the list that names them.

    Raises `CorruptFile`: a path leaves the set's folder. On indexing:
        MissingData: listed but missing.
        CorruptFile: not readable; the path and the list are in the message.
    """

    each: ClassVar[tuple[str, ...]] = ("paths",)
    shortest = 0  # side that a JPEG keeps when it is decoded at less than its size; 0: always its size

    def __init__(
        self,
        dataset: DataSet,
        root: str | Path,
        paths: Sequence[str],
        transform: Callable | None = None,
        listing: Path | None = None,
    ):
        self.dataset, self.root, self.transform = dataset, Path(root), transform
        self.name, self.folder, self.listing = dataset.name, dataset.folder(root), listing.name if listing else ""
        self._nested: dict[Path, dict[str, str]] = {}
        by = listing or self.folder
        self.paths = [inside(by, f"image {number}", path, self.folder) for number, path in enumerate(paths, 1)]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def sources(self) -> list[str]:
        """The file of each image: where the list has it, or where another copy of the set has it (`PLACES`); a listed
        PNG or JPEG that exists as DICOM (.dcm) is found too. Of a missing one the listed path."""
        find_folder = functools.cache(functools.partial(at, self.folder))
        return [self._source(path, find_folder) for path in self.paths]

    def _source(self, path: str, find_folder: Callable[[str], Path]) -> str:
        if os.path.isfile(listed := f"{self.folder}/{path}"):  # noqa: PTH113  (400,000 files: as a rule one look each)
            return listed
        pattern, *places = _PLACES.get(self.name, ("^",))
        for place in (r"\g<0>", *places):
            where, name = os.path.split(re.sub(pattern, place, path, count=1))
            where, star, below = where.partition("/*")
            folder, names = find_folder(where), (name, f"{Path(name).stem}.dcm", f"{name}.dcm")
            if star and folder not in self._nested:
                self._nested[folder] = {file.name: str(file) for file in folder.glob(f"{star[1:]}{below}/*")}
            files = (self._nested[folder].get(each, "") if star else f"{folder}/{each}" for each in names)
            if found := next(filter(os.path.isfile, files), None):
                return found
        return listed

    def grey(self, i: int, colour: bool = False) -> Tensor:
        """(1, H, W) in 0 to 1, before the transform; with `colour` (3, H, W)."""
        path = self._source(self.paths[i], functools.partial(at, self.folder))
        by = f"listed in {self.listing or self.name}"
        try:
            values = torch.from_numpy(np.ascontiguousarray(decoding.unit(path, colour, self.shortest)))
        except FileNotFoundError:
            raise self.dataset.missing(self.root, f"{path} is {by}, but not there") from None
        except CorruptFile as error:
            raise CorruptFile(path, f"{error.reason} ({by})") from error
        return values.permute(2, 0, 1) if colour else values[None]

    def __getitem__(self, i: int) -> Any:
        image = self.grey(i)
        return self.transform(image) if self.transform else image


class Labelled(Radiographs):
    """Item i: (image, labels): float32 (classes,) of 0 and 1, or a class number for sets with one class per image."""

    each: ClassVar[tuple[str, ...]] = ("paths", "labels")

    def __init__(
        self, dataset: DataSet, root: str | Path, paths: Sequence[str], labels: Tensor, transform=None, listing=None
    ):
        super().__init__(dataset, root, paths, transform, listing)
        self.labels, self.classes = labels, dataset.classes

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        # a copy: the authors' loader divides the stored boxes by the image's side each time an item is loaded
        return super().__getitem__(i), self.labels[i].clone()


class Masked(Radiographs):
    """Item i: (image, mask (k, H', W') in 0 to 1), after the transform of both. `mask(rows[i])` reads it, at any size.

    `finish` makes the final mask from the transformed one. With `colour` images keep their three channels.
    """

    each = ("paths", "rows")
    paired = False  # masks have the proportions of their images; those of some sets are of a square

    @typed
    def __init__(
        self,
        dataset: DataSet,
        root: str | Path,
        paths: Sequence[str],
        mask: Callable[[int], Tensor],
        transform: PairTransform | None = None,
        finish: Transform | None = None,
        colour: bool = False,
        listing: Path | None = None,
    ):
        super().__init__(dataset, root, paths, transform, listing)
        self.mask, self.finish, self.colour, self.rows = mask, finish, colour, range(len(paths))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.grey(i, self.colour), self.mask(self.rows[i])
        if self.paired:
            decoding.check_proportions(self.paths[i], image, mask)
        if self.transform:
            image, mask = self.transform(image, mask)
        return image, self.finish(mask) if self.finish else mask


class Stacked(Labelled):
    """ChestMNIST: the images are one array."""

    each = ("paths", "labels", "pictures")
    sources = ()  # type: ignore[assignment]  # its paths are numbers, not files

    def __init__(self, dataset: DataSet, root: Path, pictures: np.ndarray, labels: Tensor, transform=None):
        super().__init__(dataset, root, [f"{i}" for i in range(len(pictures))], labels, transform)
        self.pictures = pictures

    def grey(self, i: int, colour: bool = False) -> Tensor:
        return torch.from_numpy(self.pictures[i].astype(np.float32) / 255)[None]
