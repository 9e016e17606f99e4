"""The training of the small ViT and CLIP."""

import pytest
import torch

from companion.errors import BadParameter
from companion.toy import encoders
from companion.toy.datasets import scenes
from companion.toy.datasets.tokens import Tokenizer
from companion.toy.encoders import vit_and_clip as pocket


@pytest.mark.slow
def test_the_pocket_vit_learns():
    """Remade at a small part of its length it names the object well above chance (0.06) on tiles that it never saw."""
    model = pocket.train_vit(images=1000, steps=60)
    accuracy = pocket.source_accuracy(model, 500)
    assert accuracy > 0.14, accuracy  # 7 standard errors above chance; about 0.23 is usual


def test_training_follows_the_seed():
    models = [pocket.train_vit(images=64, steps=3, seed=seed) for seed in (0, 0, 1)]
    same, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(same, again) and not torch.equal(same, other)


def test_a_few_steps_of_the_pocket_clip_lower_its_loss():
    """The own caption of a training scene comes nearer to the top of 64 than chance puts it."""
    model = pocket.train_clip(images=128, steps=12)
    world = scenes.scenes(64, "train", 0)
    with torch.inference_mode():
        image, text, _ = model(pocket.pixels([s.image for s in world]), Tokenizer()([s.caption for s in world]))
    rank = ((image @ text.T) > (image * text).sum(-1, keepdim=True)).sum(-1).float().mean()
    assert rank < 20, rank  # 31.5 by chance


def test_the_clips_image_tower_starts_as_the_pocket_vit():
    vit, clip = encoders.build("pocket_vit"), encoders.build("pocket_clip", "random")
    clip.visual.load_state_dict(pocket.image_tower_from(vit) | {"proj": clip.visual.proj})
    images = pocket.pixels([s.image for s in scenes.scenes(4, "val")])
    with torch.inference_mode():
        torch.testing.assert_close(clip.visual(images), vit(images) @ clip.visual.proj, atol=1e-3, rtol=1e-3)
    with pytest.raises(BadParameter, match="'pocket_vit', 'pocket_clip'"):
        pocket.ship("pocket_swin")
