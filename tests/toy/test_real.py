"""The studies on real images, here on generated ones: their splits, and rows without the test split."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.errors import CompanionError, MissingData
from companion.toy.ablations import dmt_real, ecamp_real, hvit_real, sa2vp_real, selecting
from tests.models.common import refuses

RSSCN7, CIFAR = sa2vp_real.TASKS
CACHES = (sa2vp_real.images, dmt_real.images)


def small(name, weights="pretrained", *, img_size):
    vit = VisionTransformer(img_size, 14, embed_dim=24, depth=6, num_heads=2, num_classes=0, init_values=0.1)
    vit.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit.eval()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Both sets, smaller: every image has a grey value of its own in its set; a small ViT with random weights."""
    for task, splits in ((RSSCN7, {"train": 4, "val": 1, "test": 2}), (CIFAR, {"train": 12, "test": 4})):
        values = iter(range(1, 200))
        for split, count in splits.items():
            for label in range(sa2vp_real.CLASSES[task]):
                (folder := tmp_path / sa2vp_real.FOLDERS[task] / split / f"class{label}").mkdir(parents=True)
                for n in range(count):
                    Image.fromarray(np.full((32, 32, 3), next(values), np.uint8)).save(folder / f"{n}.png")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(sa2vp_real.backbones, "build", small)
    for cached in CACHES:
        cached.cache_clear()
    yield tmp_path
    for cached in CACHES:
        cached.cache_clear()


def test_each_seed_draws_its_training_images_of_cifar_and_rsscn7_has_fixed_splits(made):
    def grey(task, seed, split):
        images, labels = sa2vp_real.images(task, seed, split).tensors
        assert images.shape[1:] == (3, 112, 112) and labels.bincount().unique().numel() == 1
        return set(((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist())

    first, second = ([grey(CIFAR, seed, split) for split in ("train", "val", "test")] for seed in (100, 200))
    assert list(map(len, first)) == [100, 20, 40] and first[2] == second[2] == set(range(121, 161))
    assert first[0] | first[1] == second[0] | second[1] == set(range(1, 121)) and first[1] != second[1]
    fixed = [set(range(1, 29)), set(range(29, 36)), set(range(36, 50))]
    assert [grey(RSSCN7, 200, split) for split in ("train", "val", "test")] == fixed


@pytest.mark.parametrize(
    ("study", "method", "columns"),
    [(sa2vp_real, "SA²VP", {"accuracy", "loss", "trained"}), (dmt_real, "untrained", {"accuracy", "loss"})],
)
def test_a_row_is_selected_without_the_test_split(study, method, columns, made):
    options = {"epochs": 1} if study is sa2vp_real else {}
    with selecting():
        row = study.train(method, RSSCN7, 1e-2, 100, "", "select", **options)
        with pytest.raises(CompanionError):
            study.train(method, RSSCN7, 1e-2, 100, "", "test", **options)
    assert row.keys() == columns and 0 <= row["accuracy"] <= 100


def test_a_tenth_of_the_xrays_has_every_finding_and_follows_the_seed():
    labels = (torch.arange(60)[:, None] >> torch.arange(5)) % 2
    draws = [ecamp_real.drawn(labels, seed) for seed in range(10)]
    assert all(len(set(draw.tolist())) == 6 and labels[draw].any(0).all() for draw in draws)
    assert torch.equal(draws[3], ecamp_real.drawn(labels, 3)) and not torch.equal(draws[3], draws[4])


def test_no_smear_is_in_two_splits(monkeypatch):
    smears = torch.arange(240) // 3
    monkeypatch.setattr(hvit_real, "_patches", lambda: (None, torch.arange(240), smears))  # the label is the cell
    monkeypatch.setattr(hvit_real, "_embedded", lambda name: torch.randn(240, 4))
    parts = [hvit_real.cells("raw pixels", 100, split).tensors[1] for split in hvit_real.SPLITS]
    assert [len(smears[part].unique()) for part in parts] == [40, 20, 20]
    assert len(torch.cat([smears[part].unique() for part in parts]).unique()) == 80


def test_missing_images_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path / "nowhere"))
    calls = [(lambda s=s: s.prepare("", 0), "nowhere") for s in (sa2vp_real, dmt_real, ecamp_real, hvit_real)]
    refuses(*calls, error=MissingData)
