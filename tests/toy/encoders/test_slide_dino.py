"""The pocket H-ViT's two lower levels: the shipped weights, that DINO trains all of them, probes of their features."""

import pytest
import torch

from companion.errors import BadParameter
from companion.toy import encoders
from companion.toy.datasets import slides as pocket
from companion.toy.encoders import slide_dino


def test_the_shipped_levels_are_those_of_the_card():
    patch, region = slide_dino.build()
    count = sum(t.numel() for level in (patch, region) for t in level.state_dict().values())
    card = encoders.read_card(slide_dino.NAME)
    assert count == card["parameters"] and card["world"] == pocket.VERSION
    assert (patch.image, patch.token, patch.dim, region.inputs, region.dim) == (32, 4, 48, 48, 48)
    assert card["quality"]["DINO"]["patch"] > 0.98, "the kinds of patches are told"
    # random ones come from their seed
    one, again, other = (slide_dino.build("random", seed)[0].cls_token for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    with pytest.raises(BadParameter, match="'dino', 'random'"):
        slide_dino.build("mae")


def test_dino_trains_every_tensor(monkeypatch):
    """Frozen encoders would come back as they were."""
    monkeypatch.setattr(slide_dino, "REGIONS", 16)
    monkeypatch.setattr(slide_dino, "BATCH", 8)
    monkeypatch.setattr(slide_dino, "STEPS", {"patch": 3, "region": 4})
    trained, before = slide_dino.train(0)[:2], slide_dino.build("random", 0)
    for ours, first in zip(trained, before, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), first.parameters(), strict=True))


def test_standardised_embeddings_have_mean_0_and_deviation_1():
    patch = slide_dino.standardise(slide_dino.build("random", 3)[0])
    found = slide_dino.embed(patch, slide_dino.unlabelled(60, "train", 5)[0]).flatten(0, 1)
    assert found.shape == (960, 48)
    assert found.mean(0).abs().max() < 0.3 and (found.std(0) - 1).abs().max() < 0.3
