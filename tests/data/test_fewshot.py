"""The protocols of prompt learning, on data sets of plain labels and on torchvision's ImageFolder."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from companion.data import fewshot
from companion.data.classification import image_folder, in_memory
from companion.data.fewshot import base_to_novel, cross_dataset, domain_generalisation, few_shot, halves, select
from companion.errors import BadParameter
from tests.data.conftest import picture, refused

NAMES = ("bog", "city", "dune", "farm", "ice")


class Plain(Dataset):
    """Images that hold their own number, the first `each` of each class, then the next."""

    def __init__(self, each: int, class_names=NAMES, start: int = 0):
        self.class_names = class_names
        self.labels = [label for label in range(len(class_names)) for _ in range(each)]
        self.start = start

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor(float(self.start + index)), self.labels[index]


def made(each: int = 20, class_names=NAMES, start: int = 0) -> dict[str, Dataset]:
    """A set of `each` training images per class, half as many for val and test."""
    return {
        split: Plain(max(each // part, 1), class_names, start + 1000 * number)
        for number, (split, part) in enumerate({"train": 1, "val": 2, "test": 2}.items())
    }


def numbers(dataset: Dataset) -> set[float]:
    return {dataset[i][0].item() for i in range(len(dataset))}


def test_few_shot_draws_so_many_of_each_class():
    full = Plain(20)
    few = few_shot(full, 4, seed=1)
    assert Counter(few.labels) == dict.fromkeys(range(5), 4)
    assert few.class_names == NAMES and few.classes == 5 and len(few) == 20
    assert [few[i][1] for i in range(20)] == few.labels
    assert all(full.labels[int(few[i][0])] == few[i][1] for i in range(20))  # labels stay with their images
    assert len(numbers(few)) == 20  # without replacement


def test_few_shot_is_decided_by_its_seed_and_pinned():
    full = Plain(20)
    assert few_shot(full, 4, 1).indices == few_shot(full, 4, 1).indices != few_shot(full, 4, 2).indices
    # fewer shots are some of the more
    assert set(few_shot(full, 2, 3).indices) < set(few_shot(full, 4, 3).indices) < set(few_shot(full, 16, 3).indices)
    # if another NumPy drew otherwise, results would no longer be on the same training images
    order = ",".join(map(str, few_shot(Plain(50), 16, 1).indices))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == "6093f0b7e308b518"


def test_all_images_of_a_class_can_be_asked_for_and_no_more():
    assert few_shot(Plain(4), 4, 0).indices == list(range(20))
    assert few_shot(Plain(4), 5, 0).indices == list(range(20))  # as the authors: all where there are too few
    empty = Plain(4)
    empty.labels = [label for label in empty.labels if label != 2]
    refused(BadParameter, "up to 0, as many images as 'dune' has", few_shot, empty, 1, 0)


@pytest.mark.parametrize(("shots", "seed"), [(0, 1), (-1, 1), (1.5, 1), ("4", 1), (4, -1), (4, None)])
def test_shots_and_seeds_that_are_refused(shots, seed):
    refused(BadParameter, "a whole number from", few_shot, Plain(20), shots, seed)


def test_halves_give_the_odd_class_to_base():
    assert halves(NAMES) == (("bog", "city", "dune"), ("farm", "ice"))
    assert halves(["a", "b"]) == (("a",), ("b",))
    refused(BadParameter, "two classes or more", halves, ["a"])


def test_selected_classes_are_numbered_anew():
    for classes in ([5], [-1], [1, 1]):
        refused(BadParameter, r"different labels in 0\.\.4", select, Plain(2), classes)
    first, then = select(few_shot(Plain(20), 4, 1), [3, 4]), few_shot(select(Plain(20), [3, 4]), 4, 1)
    assert numbers(first) == numbers(then) and first.labels == then.labels  # in either order
    part = select(Plain(2), [4, 1])
    assert part.class_names == ("ice", "city") and part.classes == 2
    assert [(image.item(), label) for image, label in (part[i] for i in range(4))] == [(2, 1), (3, 1), (8, 0), (9, 0)]


def test_base_to_novel():
    sets = made()
    protocol = base_to_novel(sets, shots=8, seed=2)
    assert isinstance(protocol, fewshot.Protocol)
    assert protocol.train.class_names == protocol.val.class_names == ("bog", "city", "dune")
    assert Counter(protocol.train.labels) == dict.fromkeys(range(3), 8)
    assert Counter(protocol.val.labels) == dict.fromkeys(range(3), 4)  # four, as the shots are more
    base, novel = protocol.tests["base"], protocol.tests["novel"]
    assert base.class_names == protocol.train.class_names and novel.class_names == ("farm", "ice")
    assert Counter(base.labels) == dict.fromkeys(range(3), 10)
    assert Counter(novel.labels) == dict.fromkeys(range(2), 10)
    assert numbers(base) | numbers(novel) == numbers(sets["test"]) and not numbers(base) & numbers(novel)
    assert not numbers(protocol.train) & (numbers(protocol.val) | numbers(sets["test"]))


def test_both_halves_have_test_images():
    sets = made()
    sets["test"].labels = [label for label in sets["test"].labels if label < 3]
    refused(BadParameter, "without images of the novel classes", base_to_novel, sets)


def test_validation_has_no_more_shots_than_training_or_than_there_are_images():
    assert Counter(base_to_novel(made(), shots=2).val.labels) == dict.fromkeys(range(3), 2)
    few = made() | {"val": Plain(3)}
    assert Counter(base_to_novel(few, shots=8).val.labels) == dict.fromkeys(range(3), 3)
    few["val"].labels = [label for label in few["val"].labels if label != 1]
    refused(BadParameter, "up to 0, as many images as 'city' has", base_to_novel, few, shots=8)


def test_cross_dataset():
    source = made()
    targets = {"b": made(6, ("x", "y"), start=10_000), "c": made(4, ("u", "v", "w"), start=20_000)}
    protocol = cross_dataset(source, targets, shots=16, seed=1)
    assert Counter(protocol.train.labels) == dict.fromkeys(range(5), 16)
    assert list(protocol.tests) == ["source", "b", "c"]
    assert protocol.tests["source"] is source["test"] and protocol.tests["b"] is targets["b"]["test"]
    assert protocol.tests["c"].class_names == ("u", "v", "w")


def test_domain_generalisation_tests_on_whole_sets():
    source, target = made(), made(6, ("x", "y"), start=10_000)
    given = Plain(9, ("x", "y"))
    protocol = domain_generalisation(source, {"b": target, "c": {"all": given}}, shots=16, seed=1)
    whole = protocol.tests["b"]
    assert numbers(whole) == numbers(target["train"]) | numbers(target["val"]) | numbers(target["test"])
    assert whole.class_names == ("x", "y") and Counter(whole.labels) == {0: 12, 1: 12}
    assert [whole[i][1] for i in range(24)] == whole.labels
    assert protocol.tests["c"] is given
    assert protocol.train.indices == cross_dataset(source, {"b": target}, shots=16, seed=1).train.indices


@pytest.mark.parametrize("protocol", [cross_dataset, domain_generalisation])
@pytest.mark.parametrize("targets", [{}, {"source": made()}])
def test_targets_that_are_refused(protocol, targets):
    refused(BadParameter, "at least one set, none called 'source'", protocol, made(), targets)


@pytest.mark.parametrize(
    "call",
    [
        base_to_novel,
        lambda sets: cross_dataset(sets, {"b": made()}),
        lambda sets: cross_dataset(made(), {"b": sets}),
        lambda sets: domain_generalisation(made(), {"b": sets}),
    ],
)
def test_splits_that_do_not_serve(call):
    lacking = made()
    del lacking["val"], lacking["test"]
    refused(BadParameter, r"'train', 'val' and 'test' \(val, test missing\)", call, lacking)
    refused(BadParameter, "the same classes in each", call, made() | {"test": Plain(4, ("x", "y"))})


@pytest.fixture
def folder(tmp_path) -> Path:
    """{train,val,test}/<class>/*.png of three classes, six images each."""
    for split in ("train", "val", "test"):
        for label, name in enumerate(("ash", "elm", "oak")):
            for number in range(6):
                picture(tmp_path / split / name / f"{number}.png", 40 * label + number, size=(8, 8))
    return tmp_path


def test_torchvision_image_folders_serve(folder):
    protocol = base_to_novel({split: ImageFolder(folder / split) for split in ("train", "val", "test")}, shots=3)
    assert protocol.train.class_names == ("ash", "elm") and protocol.tests["novel"].class_names == ("oak",)
    image, label = protocol.tests["novel"][0]
    assert label == 0 and image.getpixel((0, 0)) == (80, 80, 80)


def test_the_readers_folders_serve_and_can_be_kept_in_memory(folder):
    sets = image_folder(folder)
    protocol = base_to_novel(sets, shots=3)
    assert protocol.train.name == sets["train"].name
    kept = in_memory(protocol.tests["novel"])
    assert kept.classes == 1 and kept.tensors[1].tolist() == [0] * 6
    images, labels = next(iter(DataLoader(protocol.train, batch_size=6)))
    assert images.shape == (6, 3, 8, 8) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(domain_generalisation(sets, {"again": sets}, shots=3).tests["again"]) == 3 * 3 * 6
    sets["train"].transform = lambda picture: torch.zeros(1)
    assert protocol.train.dataset.transform is sets["train"].transform and protocol.train[0][0].shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None, "class_names": NAMES}, r"one with \.labels"),
        ({"class_names": None}, r"\.class_names"),
        ({"class_names": None, "classes": 5}, r"\.class_names"),
        ({"class_names": "bog"}, r"\.class_names"),
        ({"labels": [0, 7]}, r"labels = '0\.\.7' is not accepted\. Accepted: 0\.\.4"),
        ({"labels": [-1, 0]}, r"labels = '-1\.\.0'"),
    ],
)
def test_data_sets_that_do_not_say_what_is_in_them(change, message):
    broken = Plain(4)
    for name, value in change.items():
        setattr(broken, name, value)
    refused(BadParameter, message, few_shot, broken, 1, 0)


def test_harmonic_mean():
    assert fewshot.harmonic_mean(60, 40) == pytest.approx(48)
    assert fewshot.harmonic_mean(0.5, 0.5) == 0.5
    assert fewshot.harmonic_mean(0, 0) == fewshot.harmonic_mean(80, 0) == fewshot.harmonic_mean(0, 80) == 0
    for bad in (-1, float("nan")):
        refused(BadParameter, "an accuracy from 0 on", fewshot.harmonic_mean, bad, 50)
        refused(BadParameter, "novel", fewshot.harmonic_mean, 50, bad)
