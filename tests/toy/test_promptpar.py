"""PromptPAR's pedestrians, whose attributes only their height tells, its study, and the numbers of its notebook."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from companion.models.promptpar import loss
from companion.toy.ablations import promptpar as study
from companion.toy.datasets import pedestrians
from companion.toy.datasets.tokens import UNKNOWN
from companion.toy.encoders.pedestrian_clip import tokenizer
from companion.toy.live import promptpar as live

PLAIN = pedestrians.Pedestrian("", "short", "grey", "plain", "trousers", "grey", "grey", "")
SHARES = torch.arange(12) * 5 / 64  # of the people, with each attribute


# what is worn, the attributes that follow, and the rows in which it is drawn
WORN = [
    ({}, set(), None),
    ({"hat": "red"}, {"hat"}, (0, 14)),
    ({"hair": "long"}, {"long hair"}, (2, 24)),
    ({"top": "red"}, {"red top"}, (8, 38)),
    ({"pattern": "striped"}, {"striped top"}, (8, 38)),
    ({"lower": "red"}, {"red trousers"}, (26, 62)),
    ({"lower": "blue", "legs": "shorts"}, {"shorts"}, (26, 62)),
    ({"shoes": "blue"}, {"blue shoes"}, (50, 64)),
    ({"shoes": "green", "top": "green", "lower": "green", "hat": "green"}, {"hat"}, None),
    ({"bag": "backpack"}, {"backpack"}, (8, 36)),
    ({"bag": "handbag", "shoes": "red"}, {"handbag", "red shoes"}, (24, 64)),
]


@pytest.mark.parametrize(("changes", "expected", "rows"), WORN)
def test_attributes_follow_from_what_is_worn_and_each_is_drawn_at_its_height(changes, expected, rows, monkeypatch):
    """Two persons who differ in this alone, drawn from the same random numbers."""
    person = dataclasses.replace(PLAIN, **changes)
    assert {n for n, there in zip(pedestrians.ATTRIBUTES, person.labels, strict=True) if there} == expected
    if rows:
        paints = {"red": [1, 0, 0], "blue": [0, 0, 1], "green": [0, 1, 0], "grey": [0.5, 0.5, 0.5]}
        monkeypatch.setattr(pedestrians, "_paint", lambda rng, colour: np.array(paints[colour]))  # draws no numbers
        drawn = [
            [pedestrians.draw(np.random.default_rng(seed), who, "train", "clear") for seed in range(8)]
            for who in (person, PLAIN)
        ]
        heat = (abs(np.subtract(*np.array(drawn, int))).max(-1) > 30).sum((0, 2))
        assert heat[slice(*rows)].sum() > 0.98 * heat.sum() > 60


def test_a_colour_says_little_and_its_place_everything():
    """Red is somewhere on most images, and parts are dressed independently of one another."""
    _, persons = pedestrians.people(400, "train", "clear", 2)
    assert 0.55 < np.mean(["red" in (p.hat, p.top, p.lower, p.shoes) for p in persons]) < 0.8
    labels = np.array([p.labels for p in persons])
    assert ((labels.mean(0) > 0.08) & (labels.mean(0) < 0.5)).all()
    columns = {n: labels[:, i] for i, n in enumerate(pedestrians.ATTRIBUTES) if n.startswith(("red", "blue"))}
    for one, other in itertools.combinations(columns, 2):
        if one.split()[-1] != other.split()[-1]:
            assert abs(np.corrcoef(columns[one], columns[other])[0, 1]) < 0.2
    said = [text for person in persons[:20] for text in person.captions().values()]
    assert said[2].startswith("a pedestrian in a ") and said[2].endswith(" top")
    assert (tokenizer()([*said, *pedestrians.SENTENCES.values()]) != UNKNOWN).all()


@pytest.fixture
def data() -> TensorDataset:
    images = torch.rand(64, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TensorDataset(images, (torch.arange(64)[:, None] < 64 * SHARES).float())


def test_the_loss_is_given_the_share_of_people_with_each_attribute(data, monkeypatch):
    given = []
    monkeypatch.setattr(study, "loss", lambda *args: given.append(args[2:]) or loss(*args))
    for method in ("heads only", "regions, no similarity loss"):
        assert len(study.train_model(study.build(method, 0), method, data, 1e-2, 0, epochs=0.5)) == 1
    torch.testing.assert_close(torch.stack([shares for shares, _ in given]), torch.stack([SHARES] * 2))
    assert [weight for _, weight in given] == [0.5, 0.0]


def test_tokens_are_cached_where_the_tower_is_frozen_alone(data):
    images = data.tensors[0][:3]
    for method in ("heads only", "deep prompts", "full fine-tuning"):
        model = study.build(method, 0).eval()
        tested, inputs = study.cached(model, images)
        assert (tested is model) == (method != "heads only") == (inputs is images)
        with torch.no_grad():
            logits = model(images).logits
            torch.testing.assert_close(tested(inputs).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(study.probabilities(model, images), logits.sigmoid(), rtol=1e-4, atol=1e-4)


def test_scores_of_the_parts_are_means_over_their_attributes(data, monkeypatch):
    """Of a model that is right on the head and the reverse of right elsewhere."""
    labels = (torch.rand(64, 12, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    own = torch.tensor([name in pedestrians.PARTS["head"] for name in pedestrians.ATTRIBUTES])
    monkeypatch.setattr(study, "probabilities", lambda model, images: torch.where(own, labels, 1 - labels))
    found = study.measure(None, TensorDataset(data.tensors[0], labels))
    parts = {"head": 100, "upper body": 0, "legs": 0, "feet": 0, "bags": 0}
    assert {name: found[name] for name in pedestrians.PARTS} == parts and found["mA"] == 16.67


def test_auroc_is_the_share_of_pairs_in_order():
    scores = torch.tensor([[0.1, 3], [0.4, 2], [0.3, 1], [0.9, 0]])
    first, second = live.auroc(scores, torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]]))
    assert first == 100 and np.isnan(second)
    assert live.auroc(torch.tensor([[0.2], [0.1], [0.3]]), torch.tensor([[1], [0], [0]])) == [50]
