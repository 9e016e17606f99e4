"""Image files of a data set, decoded on access: without labels, and with a class for each; folders of classes."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import make_dataset
from torchvision.transforms import v2

from ..errors import BadParameter, CorruptFile, Count, Positive, typed
from . import DataSet, Parts, decoding
from .folders import HIDDEN, SPELLED, entries, spelled

Transform = Callable[[Image.Image], torch.Tensor]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """An image of any mode as float32 (3, H, W) in 0 to 1."""
    return as_float(v2.functional.pil_to_tensor(as_rgb(picture)))


def as_rgb(picture: Any) -> Any:
    """A PIL image in RGB, the first step of a transform (a palette's indices and 16 bits are no colours); or a uint8
    tensor (..., 3, H, W), also of one with grey values. Raises `BadParameter`: another tensor, or no full scale."""
    if isinstance(picture, torch.Tensor):
        if picture.dtype != torch.uint8 or picture.ndim < 3 or picture.shape[-3] not in (1, 3):
            given = f"{picture.dtype} of {tuple(picture.shape)}"
            raise BadParameter("images", given, "a PIL image, or a uint8 tensor (1 or 3, H, W)")
        return picture.expand(*picture.shape[:-3], 3, -1, -1)
    pil = isinstance(picture, Image.Image) and picture.mode != "RGB"
    return decoding.in_memory(picture) if pil else picture


def as_float(images: torch.Tensor | Image.Image) -> torch.Tensor:
    """Images as float32 in 0 to 1; a PIL image as grey (1, H, W). Raises `BadParameter`: neither uint8 nor floats in
    that range, beyond which interpolation may reach."""
    if isinstance(images, Image.Image):
        return torch.from_numpy(decoding.unit_in_memory(images).copy())[None]
    found = v2.functional.to_dtype(images, torch.float32, scale=True)
    low, high = map(float, found.aminmax())
    if (images.dtype != torch.uint8 and not images.is_floating_point()) or not (low >= -1 and high <= 2):  # NaN is not
        raise BadParameter("images", f"{images.dtype}, {low:g} to {high:g}", "uint8, or floats in [0, 1]")
    return found


def normalised(input) -> list[v2.Transform]:
    """The steps from a PIL image to a tensor, normalised by `input.mean` and `input.std`. Raises `BadParameter`: these
    or `input.size` are no numbers of a transform."""
    return _steps(*(getattr(input, name, None) for name in ("size", "mean", "std")))  # type: ignore[arg-type]


@typed
def _steps(
    size: Count, mean: tuple[float, float, float], std: tuple[Positive, Positive, Positive]
) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


class Files(Parts, Dataset):
    """Images that are decoded on access: `files[i]` begins with a float32 tensor (3, H, W).

    Args:
        dataset: the set they belong to; gives the name and the error message for a missing file.
        root: the data folder.
        sources: paths, or a uint8 array (n, H, W, 3).
        transform: from a PIL image (RGB) to a tensor; None scales to 0..1 and keeps the size.

    Attributes:
        listing: the name of the list that has the images, for messages; "" where they are all in a folder.

    Raises (on indexing):
        MissingData: the file is listed but missing.
        CorruptFile: the file is truncated, no image, or has no full scale (see `decoding`); its path is in the message.
    """

    each: ClassVar[tuple[str, ...]] = ("sources",)
    listing = ""

    def __init__(
        self, dataset: DataSet, root: Path, sources: Sequence[str] | np.ndarray, transform: Transform | None = None
    ):
        self.dataset, self.root, self.name = dataset, root, dataset.name
        self.sources, self.transform = sources, transform

    def __len__(self) -> int:
        return len(self.sources)

    def picture(self, index: int) -> Image.Image:
        """The image in RGB, before the transform.

        A user's own image is rotated by its EXIF orientation; those of the public sets are not, as in the papers' code.
        """
        return self._read(index, functools.partial(decoding.picture, rotated=self.dataset.group == "own"))

    def pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The pixels as stored and upright, by EXIF, each uint8 (H, W, 3)."""
        return self._read(index, lambda image: (stored := decoding.pixels(image), decoding.upright(stored, image)))

    def _read(self, index: int, decode: Callable[[Image.Image], Any]) -> Any:
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return decode(Image.fromarray(source))
        try:
            with decoding.opened(source) as image:
                return decode(image)
        except FileNotFoundError:
            by = f" in {self.listing}" if self.listing else ""
            raise self.dataset.missing(self.root, f"{source} is listed{by} but not there") from None
        except CorruptFile as error:
            if not self.listing:
                raise
            raise CorruptFile(error.path, f"{error.reason}; it is listed in {self.listing}") from error

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return ((self.transform or to_tensor)(self.picture(index)),)


class Images(Files):
    """Labelled images: `images[i]` is (float32 tensor (3, H, W), int).

    Args:
        labels: one of 0..classes - 1 for each.
        classes: number of classes.
        class_names: names by label, where the layout has them.
        dataset, root, sources, transform: see `Files`.
    """

    each = ("sources", "labels")

    def __init__(
        self,
        dataset: DataSet,
        root: Path,
        sources: Sequence[str] | np.ndarray,
        labels: Sequence[Any] | np.ndarray,
        classes: int,
        transform: Transform | None = None,
        class_names: Sequence[str] = (),
    ):
        super().__init__(dataset, root, sources, transform)
        self.labels, self.classes, self.class_names = labels, classes, tuple(class_names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return *super().__getitem__(index), int(self.labels[index])


def class_folders(own: DataSet, root: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the class folders, and by split the folder that holds its class folders; {} without splits.

    A folder whose only content is one folder with subfolders is entered. The folder of a split has a name of `SPELLED`
    and contains class folders; otherwise it is a class.

    Raises:
        MissingData: there is no such folder, or its splits have no class folders.
        CorruptFile: two folders for one split.
    """
    if not root.is_dir():
        raise own.missing(root, f"there is no folder {root}")
    place = root
    while True:
        there = entries(place, folders=True)
        folders = spelled(place, (name for name in there if entries(place / name, folders=True)))
        if there and not folders and {name.lower() for name in there} <= {*itertools.chain(*SPELLED.values())}:
            raise own.missing(root, f"{' and '.join(str(place / name) for name in there)}: no class folders in it")
        if folders or len(there) != 1 or not entries(place / there[0], folders=True):
            return place, {split: place / name for split, name in folders.items()}
        place = place / there[0]


def images_of_classes(folder: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Paths and labels of the images in the class folders `names`, at any depth; hidden files and folders are not read.

    The name "" is `folder` itself.
    """
    start = len(str(folder))

    def is_image(path: str) -> bool:
        return path.lower().endswith(decoding.SUFFIXES) and not HIDDEN.search(path, start)

    number = {name: label for label, name in enumerate(names)}
    return make_dataset(folder, number, is_valid_file=is_image, allow_empty=True)


def images_below(folder: Path) -> list[str]:
    """The paths of all images in a folder, at any depth, sorted; hidden files and folders are not read."""
    return [path for path, _ in images_of_classes(folder, [""])]


def warn_of(root: Path, read: Iterable[str]) -> None:
    """Warn of the files below `root` that were not read, hidden ones left out."""
    skipped = (".", "__MACOSX")
    known, unread = {path.removeprefix("./") for path in read}, Counter[str]()
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(skipped)]
        prefix = str(Path(place, "_"))[:-1]  # also of "."
        others = (Path(place, n) for n in files if f"{prefix}{n}" not in known and not n.startswith(skipped))
        unread.update(path.suffix.lower() or path.name for path in others if path.is_file())
    if unread:
        told = ", ".join(f"{count} {kind} file(s)" for kind, count in unread.most_common())
        warnings.warn(f"{root}: not read: {told}", stacklevel=4)
