"""SA²VP's tasks, the differences between the methods, a row, and the maps of the notebook."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from companion.errors import MissingWeights
from companion.models.layers import classifying
from companion.models.sa2vp import SA2VP, figures
from companion.toy import sa2vp as toy
from companion.toy import scenes
from companion.toy.encoders import photo_prompts
from tests.toy.common import pinned

PINNED = {
    "where": "b3c18ee8b73b a8cd28570860 437cda50eb68",
    "orient": "db737721aa76 bc72c29ff5a1 81e0f21d980e",
    "digits": "997975d4ab11 3651beff6be3 64f8baf1023f",
    "textures": "7c48b9254925 11425ec83811 6f82c2bf9924",
}


@pytest.mark.parametrize("task", toy.TASKS)
def test_images_follow_the_seed_to_the_bit(task):
    few = {"train": 5, "val": 3, "test": 4}
    drawn = {split: itertools.islice(toy.examples(task, split, 7), count) for split, count in few.items()}
    assert " ".join(pinned(*itertools.chain(*pairs)) for pairs in drawn.values()) == PINNED[task]


def test_every_digit_is_in_one_split_only(monkeypatch):
    monkeypatch.setattr(toy, "_originals", lambda: (np.zeros((1797, 8, 8)), np.arange(1797)))
    drawn = [label for split in scenes.SPLITS for _, label in toy.examples("digits", split)]
    assert sorted(drawn) == list(range(1797))


def test_a_split_is_what_the_small_vit_sees():
    toy.data.cache_clear()
    images, labels = toy.data("textures", 3, "trainval").tensors
    (first, label), (_, last) = (next(iter(toy.examples("textures", split, 3))) for split in ("train", "val"))
    assert images.shape == (1000, 3, 32, 32) and labels[0] == label and labels[800] == last
    expected = torch.from_numpy(first).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-6)


def test_crops_are_written_in_folders_of_their_classes(tmp_path):
    toy.save(tmp_path, ("moon", "cat"), 3)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [f"{name}/{number:02d}.png" for name in ("cat", "moon") for number in range(3)]
    cats = (image for image, label in toy.examples("textures", "train") if toy.TEXTURES[label] == "cat")
    assert np.array_equal(Image.open(tmp_path / "cat" / "00.png"), next(cats))


def test_what_the_methods_change():
    models = {method: toy.build(method, 4, 0) for method in toy.METHODS}
    first = models["SA²VP"].backbone.state_dict()
    for model in models.values():
        assert all(torch.equal(first[name], t) for name, t in model.backbone.state_dict().items())
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))  # nor in the frozen blocks
    ours = {method.removeprefix("SA²VP, "): m for method, m in models.items() if isinstance(m, SA2VP)}
    # the scale, and how many of its 8 x 8 positions a central position attends to
    found = {name: (model.scale, int(model.cross.mask[1 + 3 * 8 + 3, 1:].sum())) for name, model in ours.items()}
    assert found == {"SA²VP": (1.5, 9), "global attention": (1.5, 64), "s = 0.1": (0.1, 9)}
    assert sum(p.numel() for p in models["VPT-deep"].prompts) == 6 * toy.TOKENS * 48
    assert isinstance(models["full fine-tuning"], classifying.FineTuning)


def test_a_probe_trains_its_head_as_on_the_images(monkeypatch):
    learn = TensorDataset(torch.randn(40, 3, 32, 32), torch.arange(40) % 9)
    monkeypatch.setattr(toy, "OPTIONS", toy.OPTIONS | {"epochs": 2, "batch": 8})
    model, history = toy.train("linear probing", "where", learn, 1e-2, 0)
    start = toy.build("linear probing", 9, 0)
    assert len(history) == 10 and not torch.equal(model.head.weight, start.head.weight)
    for ours, theirs in zip(model.backbone.parameters(), start.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    options = toy.recipe.fit_options(1e-2, toy.CPU) | toy.OPTIONS | {"seed": 0}
    toy.fit(start, toy.recipe.loss, learn, **options)
    torch.testing.assert_close(model.head.weight, start.head.weight, rtol=1e-3, atol=1e-5)


# --- figures


def test_maps_are_those_of_the_models():
    model, images = toy.build("SA²VP", 4, 0).eval(), torch.randn(2, 3, 32, 32)
    found = figures.trace(model, images)
    reads, strength = figures.reads(model, found), figures.strength(model, found)
    assert list(reads) == ["block 0", "block 2", "block 4"] and list(strength) == ["block 1", "block 3", "block 5"]
    assert all(x.shape == (2, 8, 8) for x in (*reads.values(), *strength.values()))
    torch.testing.assert_close(reads["block 2"][1, 0, 3], found.cross[2].mean(1)[1, 0, 4])
    alike, unlike = torch.randn(1, 5, 4).expand(3, -1, -1), torch.randn(3, 1, 4).expand(-1, 5, -1)
    assert [figures.between_images(x) for x in (alike, unlike)] == pytest.approx([0, 1], abs=1e-5)


def test_without_the_real_vit_untrained_prompts_are_around_the_small_one(monkeypatch, capsys):
    def missing(*_, **__):
        raise MissingWeights("a ViT", "nowhere", ["download it"])

    monkeypatch.setattr(photo_prompts.backbones, "build", missing)
    vit, models = photo_prompts.prompted(3)
    assert vit.embed_dim == 48 and list(models) == ["VPT-deep", "SA²VP"] and not models["SA²VP"].training
    assert torch.equal(models["SA²VP"].prompt, photo_prompts.build("SA²VP", vit, 3).prompt)
    assert "untrained" in capsys.readouterr().out
