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
    vit = VisionTransformer(img_size, 14, embed_dim=24, depth=3, num_heads=2, num_classes=0, init_values=0.1)
    vit.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit.eval()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Twelve training and four test images of each of ten classes: every image has a grey value of its own."""
    values = iter(range(1, 200))
    for split, count in (("train", 12), ("test", 4)):
        for label in range(10):
            (folder := tmp_path / "cifar10_small" / split / f"class{label}").mkdir(parents=True)
            for n in range(count):
                Image.fromarray(np.full((32, 32, 3), next(values), np.uint8)).save(folder / f"{n}.png")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(study.backbones, "build", small)
    study.images.cache_clear()
    yield
    study.images.cache_clear()


def test_each_seed_draws_its_training_images_and_the_selection_never_sees_the_test(made):
    values = {}
    for seed in (100, 200):
        for split in ("train", "val", "test"):
            images, labels = study.images(seed, split).tensors
            assert images.shape[1:] == (3, 112, 112) and labels.bincount().unique().numel() == 1
            values[seed, split] = set(((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist())
        assert [len(values[seed, split]) for split in ("train", "val", "test")] == [100, 20, 40]
        assert values[seed, "train"] | values[seed, "val"] == set(range(1, 121))
    assert values[100, "val"] != values[200, "val"] and values[100, "test"] == values[200, "test"]
    with selecting(), pytest.raises(CompanionError, match="without the test split"):
        study.train("linear probing", study.TASK, 1e-3, 100, "", "test")


@pytest.mark.parametrize("method", study.METHODS)
def test_a_row_of_every_method(made, method):
    torch.manual_seed(0)
    row = study.train(method, study.TASK, 1e-3, 200, "", "select", epochs=1)
    assert row.keys() == {"accuracy", "loss", "trained"} and 0 <= row["accuracy"] <= 100
    assert (row["trained"] == 0) == (method == "linear probing")


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    with pytest.raises(MissingData, match="COMPANION_REAL_DATA"):
        study.prepare("", 0)
