"""SA²VP on real images: the images of each stage, and a row of every method; here on generated images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.errors import CompanionError, MissingData
from companion.toy.ablations import sa2vp_real as study
from companion.toy.ablations import selecting


def small(*_, img_size):
    vit = VisionTransformer(img_size, 14, embed_dim=24, depth=6, num_heads=2, num_classes=0, init_values=0.1)
    vit.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit.eval()


RSSCN7, CIFAR = study.TASKS


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Both sets, smaller: every image has a grey value of its own in its set."""
    for task, splits in ((RSSCN7, {"train": 4, "val": 1, "test": 2}), (CIFAR, {"train": 12, "test": 4})):
        values = iter(range(1, 200))
        for split, count in splits.items():
            for label in range(study.CLASSES[task]):
                (folder := tmp_path / study.FOLDERS[task] / split / f"class{label}").mkdir(parents=True)
                for n in range(count):
                    Image.fromarray(np.full((32, 32, 3), next(values), np.uint8)).save(folder / f"{n}.png")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(study.backbones, "build", small)
    study.images.cache_clear()
    yield
    study.images.cache_clear()


def grey_values(task, seed):
    found = {}
    for split in ("train", "val", "test"):
        images, labels = study.images(task, seed, split).tensors
        assert images.shape[1:] == (3, 112, 112) and labels.bincount().unique().numel() == 1
        found[split] = set(((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist())
    return found


def test_each_seed_draws_its_training_images_of_cifar(made):
    first, second = grey_values(CIFAR, 100), grey_values(CIFAR, 200)
    assert [len(values) for values in first.values()] == [100, 20, 40]
    assert first["train"] | first["val"] == second["train"] | second["val"] == set(range(1, 121))
    assert first["val"] != second["val"] and first["test"] == second["test"]


def test_the_split_of_rsscn7_is_that_of_its_folders(made):
    expected = {"train": set(range(1, 29)), "val": set(range(29, 36)), "test": set(range(36, 50))}
    assert grey_values(RSSCN7, 100) == grey_values(RSSCN7, 200) == expected


@pytest.mark.parametrize("task", study.TASKS)
def test_the_selection_cannot_read_the_test_split(made, task):
    with selecting(), pytest.raises(CompanionError, match="without the test split"):
        study.train("linear probing", task, 1e-3, 100, "", "test")


@pytest.mark.parametrize("task", study.TASKS)
@pytest.mark.parametrize("method", study.METHODS)
def test_a_row_of_every_method(made, method, task):
    torch.manual_seed(0)
    row = study.train(method, task, 1e-3, 200, "", "select", epochs=1)
    assert row.keys() == {"accuracy", "loss", "trained"} and 0 <= row["accuracy"] <= 100
    assert (row["trained"] == 0) == (method == "linear probing")


def test_a_missing_folder_is_named(made, tmp_path, monkeypatch):
    for name in study.FOLDERS.values():
        (tmp_path / name).rename(tmp_path / "elsewhere")
        with pytest.raises(MissingData, match=f"(?s){name}.*COMPANION_REAL_DATA"):
            study.prepare("", 0)
        (tmp_path / "elsewhere").rename(tmp_path / name)
