"""Downstream data of pre-trained ViTs: image classification, instance and semantic segmentation.

    load("pretraining/imagenet-1k", "data", "test")[0]      # float32 (3, H, W), int
    load("pretraining/coco", "data", "train")[0]            # uint8 (3, H, W), {"boxes", "labels", "masks", ...}
    load("pretraining/ade20k", "data", "test")[0]           # uint8 (3, H, W), int64 (H, W), 255: ignored

Opening a set lists its files or reads its annotations; an image is decoded on access. `root` is the data folder;
`pretraining_sets.yaml` describes the sets. `pictures` reads a folder of your own, without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor

from ..errors import BadParameter, CorruptFile, check_choice
from . import DataSet, check_listed, decoding, find, own_set, tables
from .classification import Images, _class_folders, images_of_classes
from .detection import Boxes, read_annotations

IMAGENET, COCO, ADE20K = "pretraining/imagenet-1k", "pretraining/coco", "pretraining/ade20k"
SPLITS = {"train": "train", "test": "val"}  # ours -> the sets' own: papers test on their validation splits
IGNORED = 255


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

    The files of the labels, `marked`, count from 1, with 0 for pixels without a class (`reduce_zero_label` of mmseg).
    """

    each = ("sources", "labels", "marked")

    def __init__(self, dataset: DataSet, root: Path, sources: list[str], marked: list[str], classes: int):
        super().__init__(dataset, root, sources, range(len(sources)), classes)
        self.marked = marked

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, path = torch.from_numpy(self.pixels(index)[0]).permute(2, 0, 1), self.marked[index]
        with decoding.opened(path) as file:
            stored = torch.from_numpy(np.array(file)).long()
        if stored.shape != image.shape[1:] or stored.max() > self.classes:
            expected = f"0 to {self.classes} a pixel and the size of its image, {tuple(image.shape[1:])}, are expected"
            raise CorruptFile(path, f"{expected}; it is {tuple(stored.shape)}, up to {stored.max()}")
        return image, torch.where(stored == 0, IGNORED, stored - 1)


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
    folder, part = dataset.folder(root), SPLITS[split]
    if name == IMAGENET:
        names = _class_folders(folder / part) if (folder / part).is_dir() else []
        if len(names) != dataset.classes:
            what = f"{folder / part} has {len(names)} class folders, {dataset.classes} are expected"
            raise dataset.missing(root, what)
        samples = images_of_classes(folder / part, names)
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        found: Any = Images(dataset, root, paths, labels, len(names), transform, names)
    elif name == COCO:
        file = tables.existing(dataset, root, folder / f"annotations/instances_{part}2017.json")
        truth = read_annotations(file)
        if len(truth["categories"]) != dataset.classes:
            raise CorruptFile(file, f"{len(truth['categories'])} categories, {dataset.classes} are expected")
        found = Instances(dataset, root, file, folder / f"{part}2017", truth)
    else:
        place = {"train": "training", "test": "validation"}[split]
        paths = [path for path, _ in images_of_classes(folder / "images", [place])]
        marked = [str(folder / "annotations" / place / f"{Path(path).stem}.png") for path in paths]
        check_listed(dataset, root, marked)
        found = Scenes(dataset, root, paths, marked, dataset.classes)
    tables.check_count(dataset, root, len(found), dataset.sizes.get(split), f"images for '{split}' in {folder}")
    return found


def pictures(root: str | Path) -> Images:
    """Your own images without labels: all below `root`, at any depth, or below `root`/train where there is one.

    An item is (float32 (3, H, W) in [0, 1], 0). Hidden files and folders are ignored. Raises as `load`.
    """
    root = Path(root)
    own = own_set(
        root, "pretraining", "*.jpg    or any other image, in folders of any depth; train/ alone where there is one"
    )
    folder = root / "train" if (root / "train").is_dir() else root
    found = [path for path, _ in images_of_classes(folder, [""])]
    if not found:
        raise own.missing(root, f"there are no images in {folder}")
    return Images(own, root, found, [0] * len(found), 1)
