"""The shipped teachers: their model card, the factor that each does not encode, views, and probes."""

import pytest
import torch

from companion.errors import BadParameter
from companion.models.dmt.model import grey
from companion.toy import encoders
from companion.toy.datasets import collage
from companion.toy.encoders import teachers as taught


@pytest.fixture(scope="module")
def images():
    return taught.collages(48, "train", 3).images


def test_the_shipped_teachers_are_those_of_the_card():
    found, card = taught.load(), encoders.read_card(taught.NAME)
    assert tuple(found) == taught.TEACHERS and card["world"] == collage.VERSION
    assert card["parameters"] == sum(t.numel() for model in found.values() for t in model.state_dict().values())
    assert [model.positions for model in found.values()] == ["mae", "mocov3", "learned"]
    for call in (taught.untrained, lambda name: taught.train(name, torch.rand(4, 3, 32, 32))):
        with pytest.raises(BadParameter, match="MoCo v3"):
            call("DINO")
    assert card["recipe"]["MAE"]["steps"] == taught.RECIPES["MAE"]["steps"]
    # each is the best on a probe, where it beats the untrained too
    probes = card["quality"]["probes"]
    for name in taught.TEACHERS:
        others = [probes[other] for other in probes if other != name]
        assert any(all(probes[name][f] > other[f] for other in others) for f in collage.FACTORS), name


def test_moco_sees_no_colour(images):
    moco = taught.load()["MoCo v3"]
    with torch.no_grad():
        assert torch.allclose(moco(images), moco(grey(images)), atol=1e-4)
    model = taught.untrained("MAE")
    taught.see_grey(model)
    with torch.no_grad():
        assert torch.allclose(model(images), model(grey(images)), atol=1e-4)


@pytest.mark.parametrize("name", taught.TEACHERS)
def test_every_tensor_is_trained(name, images):
    model, history = taught.train(name, images, steps=3, batch=16)
    before = taught.untrained(name).state_dict()
    assert len(history) == 3 and not model.training
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters() if value.requires_grad)
    again, _ = taught.train(name, images, steps=3, batch=16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_views(images):
    torch.manual_seed(0)
    cut = taught.crops(images, (0.3, 1.0))
    assert cut.shape == images.shape and not torch.allclose(cut, images, atol=0.1)
    # crops of the whole image are the image, mirrored or not
    whole = taught.crops(images, (1.0, 1.0))
    assert whole.shape == images.shape
    lit = taught.light(images, (0.5, 1.5), 0.2)
    assert torch.allclose(lit - grey(lit), images - grey(images), atol=1e-5)
    assert not torch.allclose(grey(lit), grey(images), atol=0.05)


def test_a_perfect_feature_is_read_perfectly_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([torch.randint(n, (600,), generator=generator) for n in collage.FACTORS.values()], 1)
    one_hot = torch.nn.functional.one_hot
    hot = torch.cat([one_hot(factors[:, i], n) for i, n in enumerate(collage.FACTORS.values())], 1).float()
    found = taught.probe(hot[:500], factors[:500], hot[500:], factors[500:], None)
    assert found == {**dict.fromkeys(collage.FACTORS, 100.0), "mean": 100.0}
    noise = torch.randn(600, 20, generator=generator)
    chance = taught.probe(noise[:500], factors[:500], noise[500:], factors[500:])
    assert all(abs(chance[name] - 100 / n) < 8 for name, n in collage.FACTORS.items())
    place = taught.drawn(factors[:, 0], 10, 1)
    assert factors[place, 0].bincount().tolist() == [10] * 8
    assert not torch.equal(place, taught.drawn(factors[:, 0], 10, 2))
