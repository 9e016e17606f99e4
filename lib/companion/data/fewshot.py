"""Protocols of prompt learning: few-shot training, then tests on new classes, other sets or other domains.

    sets = domains.splits("remote/aid", "data", transform)          # or classification.own(...)
    protocol = base_to_novel(sets, shots=16, seed=1)
    protocol.train                                                  # 16 images of each base class
    protocol.tests["novel"].class_names                             # the names of the novel classes
    harmonic_mean(base_accuracy, novel_accuracy)

A data set returns (image, label) and has the labels as `.labels` and the class names by label as `.class_names`: those
of `domains` and of `classification.own`. No image is opened here.

The protocols are those of CoOp and CoCoOp (Zhou et al., IJCV and CVPR 2022) as in the code of DPLQ (Cao et al., CVPR
2024): a class with fewer images than shots contributes all of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from ..errors import Amount, BadParameter, Count, Whole, check_names, check_range, typed
from . import Parts

VALIDATION_SHOTS = 4  # images of a class for validation, at most
Splits = Mapping[str, Any]


class Part(Parts, Dataset):
    """A subset of a data set with its own labels: `part[i]` is (image, int in 0..classes - 1).

    Attributes:
        dataset, indices: the full data set and the selected images.
        labels: one for each image.
        class_names: the names by label; `classes` is their number.
        name: the data set's name, where it has one.
    """

    each = ("indices", "labels")

    def __init__(self, dataset: Dataset, indices: Sequence[int], labels: Sequence[int], class_names: Sequence[str]):
        self.dataset, self.indices, self.labels = dataset, list(indices), list(labels)
        self.class_names, self.classes = tuple(class_names), len(class_names)
        self.name = getattr(dataset, "name", type(dataset).__name__)

    @property
    def sources(self) -> list[str]:
        """The paths of the images, of a data set that has `sources`."""
        return [self.dataset.sources[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.dataset[self.indices[index]][0], self.labels[index]


@dataclass(frozen=True)
class Protocol:
    """Training, validation and test sets of a protocol.

    Attributes:
        train: the shots of each training class.
        val: other images of each of these classes: `VALIDATION_SHOTS`, or fewer when there are fewer shots or images.
        tests: the test sets by name. Each has its own `.class_names` for the prompts.
    """

    train: Part
    val: Part
    tests: dict[str, Dataset]


# --- sampling ----------------------------------------------------------------------------------------------------


@typed
def few_shot(dataset: Any, shots: Count, seed: Whole) -> Part:
    """`shots` images of each class, or all where there are fewer, without replacement, in the order of the data set.

    A class's draw depends on the seed, the class's name and its images only. Classes can be selected before or after,
    and with the same seed fewer shots are a subset of more shots.

    Raises:
        BadParameter: shots below 1, or a class without images (it is named).
    """
    labels, names = _described(dataset)
    chosen = []
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if not members.size:
            raise BadParameter("shots", shots, f"up to 0, as many images as '{name}' has")
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen += rng.permutation(members)[:shots].tolist()
    chosen.sort()
    return Part(dataset, chosen, labels[chosen].tolist(), names)


def halves(class_names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Base and novel classes: the first half in the order of the labels (rounded up), and the rest.

    Raises `BadParameter`: fewer than two classes, or no different names.
    """
    check_names(class_names)
    if len(class_names) < 2:
        raise BadParameter("class_names", list(class_names), "two classes or more, to have base and novel ones")
    middle = math.ceil(len(class_names) / 2)
    return tuple(class_names[:middle]), tuple(class_names[middle:])


@typed
def select(dataset: Any, classes: Sequence[int]) -> Part:
    """The images of some classes, renumbered in the given order.

    Raises `BadParameter`: no labels of the data set, or one of them twice.
    """
    labels, names = _described(dataset)
    for label in classes:
        check_range("classes", label, 0, len(names) - 1, whole=True)
    check_names([names[label] for label in classes])
    number = {label: new for new, label in enumerate(classes)}
    indices = np.flatnonzero(np.isin(labels, list(number))).tolist()
    return Part(dataset, indices, [number[labels[index]] for index in indices], [names[label] for label in number])


# --- protocols ---------------------------------------------------------------------------------------------------


@typed
def base_to_novel(splits: Splits, shots: Count = 16, seed: Whole = 1) -> Protocol:
    """Train on the base classes of a set; test on its base and on its novel classes separately.

    Args:
        splits: "train", "val" and "test" of the set.
        shots: training images of each class, at most.
        seed: of the draw.

    Returns:
        tests are "base" and "novel".

    Raises:
        BadParameter: a split is missing, the splits differ in their classes, there are fewer than two classes, a class
            has no images to train on or to validate, or the base or novel classes have none to test.
    """
    _, names = _checked(splits)
    base = range(len(halves(names)[0]))
    novel = range(len(base), len(names))
    tests = {"base": select(splits["test"], base), "novel": select(splits["test"], novel)}
    if empty := [name for name, part in tests.items() if not len(part)]:
        raise BadParameter("splits", f"a test split without images of the {empty[0]} classes", "one with both halves")
    return Protocol(
        train=few_shot(select(splits["train"], base), shots, seed),
        val=few_shot(select(splits["val"], base), min(shots, VALIDATION_SHOTS), seed),
        tests=tests,
    )


@typed
def cross_dataset(source: Splits, targets: Mapping[str, Splits], shots: Count = 16, seed: Whole = 1) -> Protocol:
    """Train on all classes of one set; test on the test split of the others, with their own classes.

    Args:
        source: "train", "val" and "test" of the set trained on.
        targets: the same splits of the other sets, by name.
        shots: training images of each class.
        seed: of the draw.

    Returns:
        tests are "source" and each target.

    Raises `BadParameter`: as `base_to_novel`; no targets, or one called "source".
    """
    return _transfer(source, {name: _checked(splits)[0]["test"] for name, splits in targets.items()}, shots, seed)


@typed
def domain_generalisation(
    source: Splits, targets: Mapping[str, Splits], shots: Count = 16, seed: Whole = 1
) -> Protocol:
    """As `cross_dataset`, but tested on ALL images of the other sets, which were never trained on.

    A target's images are its "all" if it has one, otherwise its "train", "val" and "test" together. (The model is that
    of `cross_dataset` with the same source, shots and seed.)
    """
    return _transfer(source, {name: _whole(splits) for name, splits in targets.items()}, shots, seed)


@typed
def harmonic_mean(base: Amount, novel: Amount) -> float:
    """2 b n / (b + n), in the unit of the two accuracies; 0 when one of them is 0.

    Raises `BadParameter`: an accuracy that is no number of 0 or more.
    """
    return 2 * base * novel / (base + novel) if base and novel else 0.0


# --- implementation ----------------------------------------------------------------------------------------------


def _described(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Labels and class names of a data set. Raises `BadParameter`: it has not a class for each image."""
    names = list(getattr(dataset, "class_names", ()))
    labels = np.asarray(getattr(dataset, "labels", ()))
    if not names or labels.ndim != 1 or not {*labels.tolist()} <= {*range(len(names))}:
        raise BadParameter("dataset", type(dataset).__name__, "images with one class each, as `domains.splits` gives")
    return labels.astype(np.int64), names


def _checked(splits: Splits) -> tuple[Splits, list[str]]:
    """The splits and their class names; checks that train, val and test exist with the same classes."""
    if absent := [split for split in ("train", "val", "test") if split not in splits]:
        raise BadParameter("splits", list(splits), f"'train', 'val' and 'test' ({', '.join(absent)} missing)")
    names = [_described(splits[split])[1] for split in ("train", "val", "test")]
    if not names[0] == names[1] == names[2]:
        raise BadParameter("splits", "train, val and test with different class_names", "the same classes in each")
    return splits, names[0]


def _whole(splits: Splits) -> Dataset:
    if "all" in splits:
        return splits["all"]
    _, names = _checked(splits)
    parts = [splits[split] for split in ("train", "val", "test")]
    labels = np.concatenate([_described(part)[0] for part in parts]).tolist()
    whole = Part(ConcatDataset(parts), range(len(labels)), labels, names)
    whole.name = getattr(parts[0], "name", whole.name)
    return whole


def _transfer(source: Splits, tests: dict[str, Dataset], shots: int, seed: int) -> Protocol:
    _checked(source)
    if not tests or "source" in tests:
        raise BadParameter("targets", list(tests), "at least one set, none called 'source'")
    return Protocol(
        train=few_shot(source["train"], shots, seed),
        val=few_shot(source["val"], min(shots, VALIDATION_SHOTS), seed),
        tests={"source": source["test"], **tests},
    )
