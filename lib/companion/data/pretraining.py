"""Downstream data of pre-trained ViTs: image classification, instance and semantic segmentation.

    load("pretraining/imagenet-1k", "data", "test")[0]      # float32 (3, H, W), int
    load("pretraining/coco", "data", "train")[0]            # uint8 (3, H, W), {"boxes", "labels", "masks", ...}
    load("pretraining/ade20k", "data", "test")[0]           # uint8 (3, H, W), int64 (H, W), 255: ignored

Opening a set lists its files or reads its annotations; an image is decoded on access. `root` is the data folder;
`pretraining_sets.yaml` describes the sets. `own` reads a folder of your own, without labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadParameter, CorruptFile, check_choice, extra, typed
from . import DataSet, check_listed, check_own, decoding, find, own_set, tables
from .detection import Boxes, _of_file
from .folders import at, below, entries, spelled
from .images import Files, Images, Transform, images_below, images_of_classes

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
        rows = self._rows(index)
        sides = target.boxes[:, 2:] - target.boxes[:, :2]
        kept = [i for i in range(len(rows)) if not target.crowd[i] and (sides[i] > 0).all()]
        masks = [self._mask(i, *image.shape[1:]) for i in rows[kept]]
        empty = torch.zeros((0, *image.shape[1:]), dtype=torch.uint8)
        return image, {
            "boxes": target.boxes[kept],
            "labels": target.labels[kept] + 1,
            "masks": torch.stack(masks) if masks else empty,
            "image_id": target.image_id,
        }

    def _mask(self, row: int, height: int, width: int) -> Tensor:
        """The mask of an annotation: polygons, or run lengths."""
        with extra("detection"):
            from faster_coco_eval.core import mask as rle
        number = self.annotations.ids[row]
        try:
            shape = self.annotations.shape(row)
            if isinstance(shape, list):
                parts = rle.merge(rle.frPyObjects(shape, height, width))
            else:
                parts = rle.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
            found = torch.from_numpy(np.ascontiguousarray(rle.decode(parts)))
        except Exception as error:  # the C extension raises many kinds of errors
            what = f"annotation {number}: 'segmentation' is no polygon and no run lengths ({error})"
            raise CorruptFile(self.file, what) from error
        if found.shape != (height, width):
            sizes = f"its mask is {tuple(found.shape)}, its image {(height, width)}"
            raise CorruptFile(self.file, f"annotation {number}: {sizes}")
        return found


class Scenes(Files):
    """Images with a class for each pixel: `scenes[i]` is (uint8 (3, H, W), int64 (H, W)), 255 where ignored.

    The files of the labels, `marked`, count from 1, with 0 for pixels without a class (`reduce_zero_label` of mmseg).
    """

    each = ("sources", "marked")

    def __init__(self, dataset: DataSet, root: Path, sources: list[str], marked: list[str], classes: int):
        super().__init__(dataset, root, sources)
        self.marked, self.classes = marked, classes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, path = torch.from_numpy(self.pixels(index)[0]).permute(2, 0, 1), self.marked[index]
        with decoding.opened(path) as file:
            stored = torch.from_numpy(np.array(file)).long()
        if stored.shape != image.shape[1:] or stored.max() > self.classes:
            expected = f"0 to {self.classes} a pixel and the size of its image, {tuple(image.shape[1:])}, are expected"
            raise CorruptFile(path, f"{expected}; it is {tuple(stored.shape)}, up to {stored.max()}")
        return image, torch.where(stored == 0, IGNORED, stored - 1)


# --- public functions -------------------------------------------------------------------------------------------------


@typed
def load(name: str, root: str | Path, split: str, transform: Transform | None = None) -> Images | Instances | Scenes:
    """One split, "train" or "test" (the sets' val), of one of the three sets.

    Args:
        transform: for ImageNet: from a PIL image (RGB) to a tensor.

    Raises:
        BadParameter: unknown name or split, or a transform for another set than ImageNet.
        MissingData: the folder, a file or images are missing, or not as many as published.
        CorruptFile: malformed annotations, or a list of other classes.
    """
    dataset, root = find(name, "pretraining"), Path(root)
    check_choice("split", split, SPLITS)
    if transform is not None and name != IMAGENET:
        raise BadParameter("transform", transform, f"None: {name} has boxes or labels that would have to change too")
    folder, part = dataset.folder(root), SPLITS[split]
    if name == IMAGENET:
        listing, samples, names = _imagenet(dataset, root, part)
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        found: Any = Images(dataset, root, paths, labels, dataset.classes, transform, names)
        found.listing = listing
    elif name == COCO:
        truths = f"annotations/instances_{part}2017.json", f"instances_{part}2017.json"
        file = tables.existing(dataset, root, at(folder, *truths))
        truth = _of_file(file, shapes=True)
        if len(truth["categories"]) != dataset.classes:
            raise CorruptFile(file, f"{len(truth['categories'])} categories, {dataset.classes} are expected")
        found = Instances(dataset, root, file, at(folder, f"{part}2017", f"images/{part}2017"), truth)
    else:
        place = {"train": "training", "test": "validation"}[split]
        images, masks = (at(folder, f"{kind}/{place}") for kind in ("images", "annotations"))
        paths = images_below(images) if images.is_dir() else []
        marked = [f"{masks}/{path.rpartition('/')[2].rpartition('.')[0]}.png" for path in paths]
        check_listed(dataset, root, marked)
        found = Scenes(dataset, root, paths, marked, dataset.classes)
    tables.check_count(dataset, root, len(found), dataset.sizes.get(split), f"images for '{split}' in {folder}")
    return found


@typed
def own(root: str | Path, transform: Transform | None = None) -> dict[str, Files]:
    """Your own images without labels, see `companion.data`: "train", all below `root`, at any depth, or below
    `root`/train where there is one.

    An item is (float32 (3, H, W) in [0, 1],). Hidden files and folders are ignored. Raises as `load`.
    """
    layout = "*.jpg    or any other image, in folders of any depth; train/ alone where there is one"
    dataset, root = own_set(root, "pretraining", layout), Path(root)
    folder = root / spelled(root, entries(root, folders=True)).get("train", "")
    if not (found := images_below(folder)):
        raise dataset.missing(root, f"there are no images in {folder}")
    check_own(dataset, root, {"train": found})
    return {"train": Files(dataset, root, found, transform)}


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def _imagenet(dataset: DataSet, root: Path, part: str) -> tuple[str, list[tuple[str, int]], list[str]]:
    """The name of a list, "" without one; paths and labels; the class folders, sorted, by which labels are numbered."""
    folder = dataset.folder(root)
    places = {name: at(folder, name, f"ILSVRC/Data/CLS-LOC/{name}", f"Data/CLS-LOC/{name}") for name in ("train", part)}
    known = {name: entries(place, folders=True) for name, place in places.items()}
    place, names, listing, labels = places[part], known[part], Path(), dict[str, int]()
    learned = known["train"] if len(known["train"]) == dataset.classes else []
    flat = [] if names else [name for name in entries(place) if name.lower().endswith(decoding.SUFFIXES)]
    if flat and part == "val":
        listing, labels, names = _truth(dataset, [folder, place.parent, *below(folder)])
    if flat and not labels:
        lists = f" or put LOC_val_solution.csv of Kaggle, or val.txt of Caffe, into {folder}" * (part == "val")
        raise dataset.missing(root, f"{len(flat):,} images lie flat in {place}: sort them into class folders{lists}")
    if not flat and len(names) != dataset.classes:
        raise dataset.missing(root, f"{place} has {len(names)} class folders, {dataset.classes} are expected")
    if names and learned and names != learned:
        raise CorruptFile(listing if flat else place, f"its classes are not those of {places['train']}")
    if not flat:
        return "", images_of_classes(place, names), names
    ending = {Path(name).stem: name for name in flat}
    if absent := sorted(labels.keys() - ending.keys()):
        raise dataset.missing(root, f"{len(absent):,} images of {listing} are not in {place}, the first: {absent[0]}")
    samples = sorted((label, f"{place}/{ending[stem]}") for stem, label in labels.items())
    return listing.name, [(path, label) for label, path in samples], names or learned


def _truth(dataset: DataSet, places: Sequence[Path]) -> tuple[Path, dict[str, int], list[str]]:
    """The list of the classes of ImageNet's validation images, its labels by the stem of an image, and the classes by
    label, which a list of numbers does not name. {} without a list.

    `ILSVRC2012_validation_ground_truth.txt` counts the classes in another order, which `meta.mat` next to it names.
    """
    names = "LOC_val_solution.csv", "val.txt", "ILSVRC2012_validation_ground_truth.txt"
    found = (path for name in names for place in places if (path := at(place, name)).is_file())
    if not (listing := next(found, None)):
        return Path(), {}, []
    if listing.suffix == ".csv":
        rows = tables.rows(listing, "ImageId", "PredictionString")
        pairs = [(row["ImageId"], (row["PredictionString"].split() or [""])[0]) for _, row in rows]
    elif listing.name.lower() == "val.txt":
        pairs = [(Path(row.split()[0]).stem, row.split()[-1]) for row in tables.lines(listing)]
    else:
        wnids = _wnids(listing)
        numbers = enumerate(tables.lines(listing), 1)
        pairs = [(f"ILSVRC2012_val_{i:08d}", wnids.get(number, "")) for i, number in numbers]
    classes, labels = sorted({label for _, label in pairs}), dict(pairs)
    if classes and all(label.isdecimal() for label in classes):
        numbered, classes = {label: int(label) for label in classes}, []
    else:
        numbered = {label: number for number, label in enumerate(classes)}
    if sorted(numbered.values()) != [*range(dataset.classes)] or "" in numbered or len(labels) != len(pairs):
        told = f"an image a line, once, with a WordNet id or a number from 0: {dataset.classes} classes"
        raise CorruptFile(listing, f"expected {told}, found {len(numbered)} in {len(labels)} of {len(pairs)} lines")
    return listing, {stem: numbered[label] for stem, label in labels.items()}, classes


def _wnids(listing: Path) -> dict[str, str]:
    """The WordNet id of each number in ImageNet's own list, by `meta.mat` next to it."""
    from scipy.io import loadmat  # few use this file

    if not (file := at(listing.parent, "meta.mat")).is_file():
        raise CorruptFile(listing, "its numbers of classes need meta.mat of the same archive next to it")
    try:
        rows = loadmat(file, simplify_cells=True)["synsets"]
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if row["num_children"] == 0}
    except Exception as error:  # a damaged .mat can raise anything
        raise CorruptFile(file, f"not ImageNet's ({type(error).__name__}: {error})") from error
