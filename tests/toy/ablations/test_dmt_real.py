"""DMT's study on real images: a row of every method, on generated images and with small teachers."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from companion.errors import CompanionError
from companion.toy.ablations import dmt_real as study
from companion.toy.ablations import sa2vp_real, selecting


class Convolutions(nn.Module):
    """A made-up EfficientNet: the map of one stage, with a stride of 16."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Conv2d(3, 8, 16, 16)
        self.pretrained_cfg = {"input_size": (3, 256, 256), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward_intermediates(self, x, indices, intermediates_only):
        return [self.stage(x)]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Two colours in each set, which are the classes; the teachers have random weights."""
    rng = np.random.default_rng(0)
    for folder, splits in (("rsscn7_small", ("train", "val", "test")), ("cifar10_small", ("train", "test"))):
        for split in splits:
            for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
                (place := tmp_path / folder / split / label).mkdir(parents=True)
                for n in range(12):
                    noisy = np.clip(colour + rng.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(place / f"{n}.png")

    def teachers(side):
        torch.manual_seed(0)
        vit = VisionTransformer(side, 14, embed_dim=24, depth=2, num_heads=2, num_classes=0)
        vit.pretrained_cfg = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return {"ViT-S/14": vit.eval(), "EfficientNet-Lite0": Convolutions().eval()}

    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(study.photo_student, "teachers", teachers)
    monkeypatch.setattr(sa2vp_real, "CLASSES", dict.fromkeys(sa2vp_real.CLASSES, 2))
    caches = (study.images, study.tokens, study._teachers)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("method", study.METHODS)
def test_a_row_of_every_method(made, method):
    task = next(iter(study.TASKS))
    row = study.train(method, task, 1e-3, 200, "", "test", epochs=1)
    assert row.keys() == {"accuracy", "loss"} and (row["loss"] == 0) == (method in study.UNTRAINED)
    assert row["accuracy"] > 90  # two colours


def test_both_teachers_have_the_positions_of_the_student(made):
    task = list(study.TASKS)[1]
    found = {name: study.tokens(name, task, 100, "val") for name in study.TEACHERS}
    assert {name: x.shape for name, x in found.items()} == {"ViT-S/14": (4, 65, 24), "EfficientNet-Lite0": (4, 65, 8)}
    assert study.student(3).patches == 64


def test_a_seed_gives_all_methods_the_same_student():
    first, again, other = (study.student(seed).patch_embed.proj.weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("task", study.TASKS)
def test_the_selection_cannot_read_the_test_split(made, task):
    with selecting(), pytest.raises(CompanionError, match="without the test split"):
        study.train("untrained", task, 0.0, 100, "", "test")
