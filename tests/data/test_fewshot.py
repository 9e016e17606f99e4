"""The protocols of prompt learning, on data sets of plain labels and on torchvision's ImageFolder."""

import hashlib
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from companion.data.fewshot import (
    base_to_novel,
    cross_dataset,
    domain_generalisation,
    few_shot,
    halves,
    harmonic_mean,
    select,
)
from companion.errors import BadParameter
from tests.data.conftest import refused

NAMES = ("bog", "city", "dune", "farm", "ice")


class Plain(Dataset):
    """Images that hold their own number, the first `each` of each class, then the next."""

    def __init__(self, each: int, class_names=NAMES, start: int = 0):
        self.class_names, self.start = class_names, start
        self.labels = [label for label in range(len(class_names)) for _ in range(each)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor(float(self.start + index)), self.labels[index]


def made(each: int = 20, class_names=NAMES, start: int = 0) -> dict[str, Dataset]:
    """A set of `each` training images per class, half as many for val and test."""
    counts = {"train": each, "val": each // 2, "test": each // 2}
    return {split: Plain(n, class_names, start + 1000 * i) for i, (split, n) in enumerate(counts.items())}


def numbers(dataset: Dataset) -> list[int]:
    return [int(dataset[i][0]) for i in range(len(dataset))]


def test_few_shot_draws_so_many_of_each_class_by_its_seed():
    full, few = Plain(20), few_shot(Plain(20), 4, seed=1)
    assert Counter(few.labels) == dict.fromkeys(range(5), 4) and few.class_names == NAMES and few.classes == 5
    assert len(set(numbers(few))) == len(few) == 20  # without replacement
    assert [few[i][1] for i in range(20)] == few.labels == [full.labels[number] for number in numbers(few)]
    assert few_shot(full, 4, 1).indices == few.indices != few_shot(full, 4, 2).indices
    # fewer shots are a subset of more
    assert set(few_shot(full, 2, 3).indices) < set(few_shot(full, 4, 3).indices) < set(few_shot(full, 16, 3).indices)
    # if another NumPy drew otherwise, results would no longer be on the same training images
    order = ",".join(map(str, few_shot(Plain(50), 16, 1).indices))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == "6093f0b7e308b518"
    assert few_shot(Plain(4), 5, 0).indices == list(range(20))  # as the authors: all where there are too few


def test_selected_classes_are_renumbered():
    first, then = select(few_shot(Plain(20), 4, 1), [3, 4]), few_shot(select(Plain(20), [3, 4]), 4, 1)
    assert numbers(first) == numbers(then) and first.labels == then.labels  # in either order
    part = select(Plain(2), [4, 1])
    assert part.class_names == ("ice", "city") and part.classes == 2
    assert list(zip(numbers(part), part.labels, strict=True)) == [(2, 1), (3, 1), (8, 0), (9, 0)]


def test_base_to_novel():
    sets = made()
    protocol = base_to_novel(sets, shots=8, seed=2)
    base, novel = protocol.tests["base"], protocol.tests["novel"]
    assert protocol.train.class_names == protocol.val.class_names == base.class_names == ("bog", "city", "dune")
    assert novel.class_names == ("farm", "ice")
    counts = [Counter(part.labels) for part in (protocol.train, protocol.val, base, novel)]
    assert counts == [dict.fromkeys(range(n), each) for n, each in ((3, 8), (3, 4), (3, 10), (2, 10))]
    assert numbers(base) + numbers(novel) == numbers(sets["test"])
    assert set(numbers(protocol.val)) < set(numbers(sets["val"]))
    assert Counter(base_to_novel(sets, shots=2).val.labels) == dict.fromkeys(range(3), 2)  # no more than in training
    few = base_to_novel(sets | {"val": Plain(3)}, shots=8)
    assert Counter(few.val.labels) == dict.fromkeys(range(3), 3)
    assert halves(["a", "b"]) == (("a",), ("b",))


def test_transfer_to_other_sets():
    source, target, whole = made(), made(6, ("x", "y"), start=10_000), Plain(9, ("x", "y"))
    crossed = cross_dataset(source, {"b": target, "c": target}, shots=16, seed=1)
    assert Counter(crossed.train.labels) == dict.fromkeys(range(5), 16)
    assert list(crossed.tests) == ["source", "b", "c"]
    assert crossed.tests["source"] is source["test"] and crossed.tests["b"] is target["test"]
    general = domain_generalisation(source, {"b": target, "c": {"all": whole}}, shots=16, seed=1)
    found = general.tests["b"]  # all images
    assert numbers(found) == numbers(target["train"]) + numbers(target["val"]) + numbers(target["test"])
    assert found.class_names == ("x", "y") and [found[i][1] for i in range(24)] == found.labels
    assert Counter(found.labels) == {0: 12, 1: 12} and general.tests["c"] is whole
    assert general.train.indices == crossed.train.indices


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: few_shot(Plain(20), 0, 1), "shots"),
        (lambda: few_shot(Plain(0), 1, 0), "bog"),
        (lambda: base_to_novel(made() | {"test": select(made()["test"], [0, 1, 2])}), "classes"),
        (lambda: cross_dataset(made(), {"source": made()}), "'source'"),
        (lambda: domain_generalisation(made(), {"b": made() | {"test": Plain(4, ("x", "y"))}}), "class_names"),
    ],
)
def test_sets_that_do_not_fit_a_protocol(call, value):
    refused(BadParameter, value, call)


def test_harmonic_mean():
    assert harmonic_mean(60, 40) == pytest.approx(48) and harmonic_mean(0.5, 0.5) == 0.5
    assert harmonic_mean(0, 0) == harmonic_mean(80, 0) == harmonic_mean(0, 80) == 0
