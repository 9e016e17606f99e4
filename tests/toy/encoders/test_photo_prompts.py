"""The prompts trained on photographs: crops, and the shipped tensors around the real ViT."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from companion import backbones
from companion.errors import MissingWeights
from companion.models.sa2vp import recipe
from companion.toy.datasets import scenes
from companion.toy.encoders import photo_prompts
from companion.training.checkpoints import trained_state
from companion.training.fit import CPU

SEEN = backbones.Input(224, (0.5,) * 3, (0.5,) * 3)


def test_crops_of_the_two_splits_share_no_pixel(monkeypatch):
    """Photographs whose left two thirds are black, and the right third white."""
    loaded = []

    def halves(name):
        loaded.append(name)
        pixels = torch.zeros(60, 90, 3, dtype=torch.uint8)
        pixels[:, 60:] = 255
        return pixels.numpy()

    monkeypatch.setattr(scenes, "photograph", halves)
    for split, value in (("train", -1), ("test", 1)):
        images, labels = photo_prompts.crops(24, split, 0, SEEN).tensors
        assert images.shape == (24, 3, 224, 224) and labels.bincount().tolist() == [2] * 12
        assert images.min() == images.max() == value
    assert {*loaded} == {*scenes.PHOTOGRAPHS} - {*photo_prompts.HELD_OUT}


def test_crops_repeat_by_seed_and_leave_the_callers_randomness_alone():
    before = torch.get_rng_state()
    first, again, other = (photo_prompts.crops(12, "train", seed, SEEN).tensors[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", photo_prompts.METHODS)
def test_the_vit_of_a_method_stays_frozen(method):
    vit = VisionTransformer(224, 14, embed_dim=24, depth=6, num_heads=2, num_classes=0, init_values=0.1)
    model = photo_prompts.build(method, vit)
    assert not model.training and not any(p.requires_grad for p in model.backbone.parameters())
    assert sum(x.numel() for x in trained_state(model).values()) < 0.5 * sum(p.numel() for p in vit.parameters())


@pytest.mark.slow
def test_the_shipped_prompts_are_trained_ones_of_the_real_vit():
    try:
        vit = backbones.build(photo_prompts.ENCODER, img_size=photo_prompts.SIZE)
    except MissingWeights:
        pytest.skip("the extra `real` is not installed")
    data = photo_prompts.crops(12, "test", 5, backbones.input_of(vit))
    for method, model in photo_prompts.load(vit).items():
        start = photo_prompts.build(method, vit)
        assert recipe.accuracy(model, data, CPU) > recipe.accuracy(start, data, CPU) + 30
