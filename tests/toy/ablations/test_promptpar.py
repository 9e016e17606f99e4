"""PromptPAR's ablations: inputs of the loss, cached tokens, and differences between the methods."""

import pytest
import torch
from torch.utils.data import TensorDataset

from companion.models.promptpar import loss
from companion.toy.ablations import promptpar as study
from companion.toy.datasets import pedestrians

SHARES = torch.arange(12) * 5 / 64  # of the people, with each attribute


@pytest.fixture
def data() -> TensorDataset:
    images = torch.rand(64, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TensorDataset(images, (torch.arange(64)[:, None] < 64 * SHARES).float())


@pytest.mark.parametrize(
    ("method", "similarity"), [("heads only", 0.5), ("PromptPAR", 0.5), ("regions, no similarity loss", 0.0)]
)
def test_the_loss_is_given_the_share_of_people_with_each_attribute(method, similarity, data, monkeypatch):
    given = []
    monkeypatch.setattr(study, "loss", lambda *args: given.append(args[2:]) or loss(*args))
    model = study.build(method, 0)
    history = study.train_model(model, method, data, 1e-2, 0, epochs=0.5)
    assert len(history) == len(given) == 1
    torch.testing.assert_close(given[0][0], SHARES)
    assert given[0][1] == similarity


def test_tokens_are_cached_where_the_tower_is_frozen_alone(data):
    images = data.tensors[0][:3]
    for method in ("heads only", "deep prompts", "full fine-tuning"):
        model = study.build(method, 0).eval()
        tested, inputs = study.cached(model, images)
        assert (tested is model) == (method != "heads only") == (inputs is images)
        with torch.no_grad():
            torch.testing.assert_close(tested(inputs).logits, model(images).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            study.probabilities(model, images), model(images).logits.sigmoid(), rtol=0, atol=1e-5
        )


def test_scores_of_the_parts_are_means_over_their_attributes(data, monkeypatch):
    """Of a model that is right on the head and the reverse of right elsewhere."""
    images, labels = data.tensors[0], (torch.rand(64, 12, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    part = next(iter(pedestrians.PARTS))
    own = torch.tensor([name in pedestrians.PARTS[part] for name in pedestrians.ATTRIBUTES])
    monkeypatch.setattr(study, "probabilities", lambda model, images: torch.where(own, labels, 1 - labels))
    found = study.measure(None, TensorDataset(images, labels))
    assert {name: found[name] for name in pedestrians.PARTS} == {
        name: 100.0 * (name == part) for name in pedestrians.PARTS
    }
    assert found["mA"] == pytest.approx(100 * len(pedestrians.PARTS[part]) / 12, abs=0.01)
