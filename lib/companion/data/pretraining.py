"""Downstream data of pre-trained ViTs: image classification, instance and semantic segmentation.

    load("pretraining/imagenet-1k", "data", "test")[0]      # float32 (3, H, W), int
    load("pretraining/coco", "data", "train")[0]            # uint8 (3, H, W), {"boxes", "labels", "masks", ...}
    load("pretraining/ade20k", "data", "test")[0]           # uint8 (3, H, W), int64 (H, W), 255: ignored

Opening a set lists its files or reads its annotations; an image is decoded on access. `root` is the data
folder; `pretraining_sets` describes the sets. `instances` and `scenes` read your own folders in the same formats,
`pictures` one without labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import BadParameter, CorruptFile, check_choice
from . import DataSet, Status, decoding, find, own_set
from .classification import Images, _absent, _class_folders, check_listed
from .detection import Boxes, read_annotations
from .pretraining_sets import COCO, IMAGENET

SPLITS = {"train": "train", "test": "val"}  # ours -> the sets' own: papers test on their validation splits
IGNORED = 255
_PICTURES = (".jpg", ".jpeg", ".png")


class Instances(Boxes):
    """Images with boxes and masks: `instances[i]` is (uint8 (3, H, W), target), as expected by torchvision's Mask
    R-CNN.

    A target has "boxes" (n, 4) float32 xyxy, "labels" (n,) int64 counted from 1 (0 is the background), "masks"
    (n, H, W) uint8, and "image_id". Crowds, and boxes without width or height, are left out.

    Attributes:
        file: the annotations, in addition to the attributes of `Boxes`.
    """

    def __init__(self, dataset: DataSet, root: Path, file: Path, folder: Path, truth: Mapping):
        super().__init__(dataset, root, folder, truth, [category["id"] for category in truth["categories"]], ())
        self.file = file

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = super().__getitem__(index)
        rows = self._rows[target.image_id]
        sides = target.boxes[:, 2:] - target.boxes[:, :2]
        kept = [i for i in range(len(rows)) if not target.crowd[i] and (sides[i] > 0).all()]
        masks = [self._mask(rows[i], *image.shape[1:]) for i in kept]
        empty = torch.zeros((0, *image.shape[1:]), dtype=torch.uint8)
        return image, {
            "boxes": target.boxes[kept],
            "labels": target.labels[kept] + 1,
            "masks": torch.stack(masks) if masks else empty,
            "image_id": target.image_id,
        }

    def _mask(self, row: Mapping, height: int, width: int) -> Tensor:
        """One instance's mask: polygons, or run lengths."""
        shape: Any = row.get("segmentation")
        try:
            if isinstance(shape, list):
                parts = rle.merge(rle.frPyObjects(shape, height, width))
            else:
                parts = rle.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
            found = torch.from_numpy(np.ascontiguousarray(rle.decode(parts)))
        except Exception as error:  # the C extension raises many kinds of errors
            what = f"annotation {row.get('id')}: 'segmentation' is no polygon and no run lengths ({error})"
            raise CorruptFile(self.file, what) from error
        if found.shape != (height, width):
            sizes = f"its mask is {tuple(found.shape)}, its image {(height, width)}"
            raise CorruptFile(self.file, f"annotation {row.get('id')}: {sizes}")
        return found


class Scenes(Images):
    """Images with a class for each pixel: `scenes[i]` is (uint8 (3, H, W), int64 (H, W)), 255 where ignored.

    Stored labels count from 1, with 0 for pixels without a class (`reduce_zero_label` of mmseg).
    """

    def __init__(self, dataset: DataSet, root: Path, pictures: list[str], labels: list[str], classes: int):
        super().__init__(dataset, root, pictures, labels, classes)

    def truth(self, index: int) -> Tensor:
        """The labels alone."""
        path = self.labels[index]
        try:
            with decoding.opened(path) as image:
                stored = torch.from_numpy(np.array(image))
        except FileNotFoundError:
            raise self.dataset.missing(self.root, f"{path} is listed but not there") from None
        if stored.ndim != 2 or stored.max() > self.classes:
            found = f"{tuple(stored.shape)}, up to {int(stored.max())}"
            raise CorruptFile(path, f"one label of 0 to {self.classes} a pixel was expected, found {found}")
        stored = stored.long()
        return torch.where(stored == 0, IGNORED, stored - 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth = torch.from_numpy(self.pixels(index)[0]).permute(2, 0, 1), self.truth(index)
        if image.shape[1:] != truth.shape:
            size = f"{tuple(truth.shape)}, its image {tuple(image.shape[1:])}"
            raise CorruptFile(self.labels[index], f"the labels are {size}")
        return image, truth


# --- public functions -------------------------------------------------------------------------------------------------


def load(
    name: str, root: str | Path, split: str, transform: Callable[[Image.Image], Tensor] | None = None
) -> Images | Instances | Scenes:
    """One split, "train" or "test" (the sets' val), of one of the three sets.

    Args:
        transform: for ImageNet: from a PIL image (RGB) to a tensor.

    Raises:
        BadParameter: unknown name or split, or a transform for another set than ImageNet.
        MissingData: the folder, a file or images are missing, or not as many as published.
        CorruptFile: malformed annotations.
    """
    dataset, root = find(name, "pretraining"), Path(root)
    check_choice("split", split, SPLITS)
    if transform is not None and name != IMAGENET:
        raise BadParameter("transform", transform, f"None: {name} has boxes or labels that would have to change too")
    folder = dataset.folder(root)
    if not folder.is_dir():
        raise dataset.missing(root)
    if name == IMAGENET:
        found = _folders(dataset, root, folder / SPLITS[split], transform)
    elif name == COCO:
        file = folder / "annotations" / f"instances_{SPLITS[split]}2017.json"
        if not file.is_file():
            raise dataset.missing(root, f"{file} is not there")
        found = _instances(dataset, root, file, folder / f"{SPLITS[split]}2017")
    else:
        found = _scenes(dataset, root, folder, {"train": "training", "test": "validation"}[split])
    if len(found) != (known := dataset.sizes.get(split, len(found))):
        raise dataset.missing(root, f"{len(found):,} images for '{split}' in {folder}, {known:,} are expected")
    return found


def instances(annotations: str | Path, images: str | Path) -> Instances:
    """Your own images with boxes and masks: an annotation file in COCO's format, and the folder that its file names
    start from.

    Raises as `load`.
    """
    file, folder = Path(annotations), Path(images)
    own = own_set(folder, "pretraining", f"{file.name}    in COCO's format\n{folder.name}/    the images")
    if not file.is_file():
        raise own.missing(file.parent, f"{file} is not there")
    return _instances(own, file.parent, file, folder)


def pictures(root: str | Path) -> Images:
    """Your own images without labels: all below `root`, at any depth, or below `root`/train where there is one.

    An item is (float32 (3, H, W) in [0, 1], 0). Hidden files and folders are ignored. Raises as `load`.
    """
    root = Path(root)
    own = own_set(
        root, "pretraining", "*.jpg    or any other image, in folders of any depth; train/ alone where there is one"
    )
    folder, found = root / "train" if (root / "train").is_dir() else root, []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        there = sorted(n for n in names if n.lower().endswith(decoding.SUFFIXES) and not n.startswith("."))
        found += [f"{place}/{name}" for name in there]
    if not found:
        raise own.missing(root, f"there are no images in {folder}")
    return Images(own, root, found, [0] * len(found), 1)


def scenes(root: str | Path, split: str, classes: int) -> Scenes:
    """Your own images and labels, in ADE20K's layout: images/<split>/*.jpg or png, annotations/<split>/*.png.

    Raises as `load`.
    """
    root = Path(root)
    own = own_set(
        root, "pretraining", f"images/{split}/*.jpg\nannotations/{split}/*.png    labels from 1, 0 where none counts"
    )
    return _scenes(own, root, root, split, classes)


# --- called by `companion.data` ---------------------------------------------------------------------------------------


def status(dataset: DataSet, root: Path) -> Status:
    """See `companion.data.status`: files are listed and annotations read, no image is opened."""
    counts = []
    for split in SPLITS:
        found = load(dataset.name, root, split)
        if dataset.name == COCO:
            check_listed(dataset, root, map(str, found.sources))
        counts.append(f"{len(found):,} in {split}")
    return Status("present", f"images: {', '.join(counts)}")


# --- implementation ---------------------------------------------------------------------------------------------------


def _folders(dataset: DataSet, root: Path, folder: Path, transform: Callable | None) -> Images:
    if not folder.is_dir():
        raise dataset.missing(root, f"{folder} is not there")
    names = _class_folders(folder)
    if len(names) != dataset.classes:
        raise dataset.missing(root, f"{folder} has {len(names)} class folders, {dataset.classes} are expected")
    samples = make_dataset(str(folder), {name: i for i, name in enumerate(names)}, IMG_EXTENSIONS, allow_empty=True)
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    return Images(dataset, root, paths, labels, len(names), transform, names)


def _instances(dataset: DataSet, root: Path, file: Path, folder: Path) -> Instances:
    found = read_annotations(file)
    if dataset.classes and len(found["categories"]) != dataset.classes:
        raise CorruptFile(file, f"{len(found['categories'])} categories, {dataset.classes} are expected")
    if not folder.is_dir():
        raise dataset.missing(root, f"{folder} is not there")
    return Instances(dataset, root, file, folder, found)


def _scenes(dataset: DataSet, root: Path, folder: Path, split: str, classes: int = 0) -> Scenes:
    pictures, labels = folder / "images" / split, folder / "annotations" / split
    for place in (pictures, labels):
        if not place.is_dir():
            raise dataset.missing(root, f"{place} is not there")
    there = (entry.name for entry in os.scandir(pictures))
    names = sorted(name for name in there if name.lower().endswith(_PICTURES) and not name.startswith("."))
    if not names:
        raise dataset.missing(root, f"{pictures} has no images")
    marked = [f"{labels}/{Path(name).stem}.png" for name in names]
    if absent := _absent(set(marked)):
        raise dataset.missing(root, f"{len(absent)} of {len(names)} images have no labels, the first: {min(absent)}")
    return Scenes(dataset, root, [f"{pictures}/{name}" for name in names], marked, classes or dataset.classes)
