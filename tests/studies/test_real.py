"""The studies on real images, here on generated ones: their splits, and a row."""

import numpy as np
import pytest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion import backbones
from companion.errors import MissingData
from companion.studies import dmt_real, real, sa2vp_real
from tests.models.common import refuses

RSSCN7, CIFAR = real.CLASSES


def small(name, weights="pretrained", *, img_size=32):
    vit = VisionTransformer(img_size, 14, embed_dim=24, depth=6, num_heads=2, num_classes=0, init_values=0.1)
    vit.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit.eval()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Both sets, smaller: every image has a grey value of its own in its set; a small ViT with random weights."""
    for task, splits in ((RSSCN7, {"train": 4, "val": 1, "test": 2}), (CIFAR, {"train": 12, "test": 4})):
        values = iter(range(1, 200))
        for split, count in splits.items():
            for label in range(real.CLASSES[task]):
                (folder := tmp_path / real.FOLDERS[task] / split / f"class{label}").mkdir(parents=True)
                for n in range(count):
                    Image.fromarray(np.full((32, 32, 3), next(values), np.uint8)).save(folder / f"{n}.png")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(backbones, "build", small)
    caches = (real.images, dmt_real._teachers, dmt_real.tokens, sa2vp_real.features)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_each_seed_draws_its_training_images_of_cifar_and_rsscn7_has_fixed_splits(made):
    seen = backbones.Input(112, (0.5,) * 3, (0.5,) * 3)

    def grey(task, seed, split):
        images, labels = real.images(task, seed, split, seen).tensors
        assert images.shape[1:] == (3, 112, 112) and labels.bincount().unique().numel() == 1
        return set(((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist())

    first, second = ([grey(CIFAR, seed, split) for split in ("train", "val", "test")] for seed in (100, 200))
    assert list(map(len, first)) == [100, 20, 40] and first[2] == second[2] == set(range(121, 161))
    assert first[0] | first[1] == second[0] | second[1] == set(range(1, 121)) and first[1] != second[1]
    fixed = [set(range(1, 29)), set(range(29, 36)), set(range(36, 50))]
    assert [grey(RSSCN7, 200, split) for split in ("train", "val", "test")] == fixed


def test_rows_of_prompts_and_of_a_probe_on_features(made, monkeypatch):
    row = dmt_real.STUDY.row("select", RSSCN7, "untrained", 0.0, 100)
    assert row["loss"] == row["trained"] == 0
    for name, epochs in (("EPOCHS", 1), ("PROBE_EPOCHS", 2)):
        monkeypatch.setattr(sa2vp_real, name, epochs)
    for method in sa2vp_real.METHODS:
        model, history = sa2vp_real.train(method, RSSCN7, sa2vp_real.data(RSSCN7, 100, "trainval"), 1e-2, 100)
        steps = 28 // sa2vp_real.BATCH  # of an epoch
        assert len(history) == steps * (2 if method == sa2vp_real.PROBE else 1) and not model.training
        assert 0 <= sa2vp_real.score(model, RSSCN7, sa2vp_real.data(RSSCN7, 100, "test"))["accuracy"] <= 100


def test_missing_images_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path / "nowhere"))
    refuses((lambda: dmt_real.STUDY.row("test", CIFAR, "DMT", 1e-3, 200), "nowhere"), error=MissingData)
