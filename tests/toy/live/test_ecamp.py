"""ECAMP at pocket scale: what the notebook trains live, the shipped model, and what the committed record says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from companion import backbones
from companion.toy import encoders
from companion.toy.ablations import ecamp as study
from companion.toy.datasets import chests
from companion.toy.encoders import chest_ecamp
from companion.toy.live import ecamp as live

LEARNING_RATES = {(live.TASK, method): 1e-3 for method in study.METHODS}
TRAIN = chest_ecamp.train


@pytest.fixture
def few(monkeypatch):
    """Few chests, few steps."""
    monkeypatch.setattr(chests, "COUNTS", {"train": 96, "val": 20, "test": 30})
    monkeypatch.setattr(live, "STEPS", 3)
    study.part.cache_clear()
    yield
    study.part.cache_clear()


def test_the_live_training_is_that_of_the_ablations(tmp_path, few):
    found = live.setting(SimpleNamespace(profile="pocket", seed=3), tmp_path, LEARNING_RATES)
    assert found.learning_rates == {"MIM only": 1e-3, "ECAMP": 1e-3}
    for method in found.learning_rates:
        model, again = found.build(method), found.build(method)
        history = found.learn(model, method)
        assert len(history) == 3 and (history[0]["mlm"] > 0) == (method == "ECAMP")
        assert found.learn(again, method) == history, "the same seed gives the same bits"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_shipped_model_is_that_of_its_card():
    model, card = chest_ecamp.build(), encoders.read_card(chest_ecamp.NAME)
    assert sum(t.numel() for t in model.parameters()) == card["parameters"] and not model.training
    assert card["world"] == chests.VERSION and card["recipe"]["epochs"] == chest_ecamp.EPOCHS
    assert chest_ecamp.SEED not in (*study.SEEDS, study.SELECTION_SEED)
    trained, untrained = card["quality"]["ECAMP"], card["quality"]["untrained"]
    assert trained["AUROC 50"] > untrained["AUROC 50"] + 5 and trained["Dice"] > untrained["Dice"]
    assert trained["side gain"] > 50 and trained["finding gain"] > 30 and trained["attention lead, hidden"] > 10
    assert abs(untrained["side gain"]) < 5


def test_it_has_the_words_of_every_seed(tmp_path, few):
    chests.write(tmp_path, 4)
    words = study.Vocabulary.read(tmp_path / "pocket" / "chests" / "wordpiece.json")
    assert len(words) == chest_ecamp.WORDS and words.pieces[5:] == sorted(words.pieces[5:])
    assert {words.pieces[i] for i in words.entities} == set(chests.FINDINGS)


def test_it_can_be_made_again(tmp_path, few, monkeypatch):
    monkeypatch.setattr(study, "PROBES", {50: 1})
    monkeypatch.setattr(study, "SEGMENT", study.SEGMENT | {"epochs": 1})
    monkeypatch.setattr(chest_ecamp, "train", lambda root: TRAIN(root, epochs=0.7))
    path = chest_ecamp.ship(tmp_path)
    state = backbones.read_state(path)
    assert set(state) == set(chest_ecamp.build().state_dict())
    text = path.with_suffix(".md").read_text()
    assert "# pocket_ecamp" in text and "sha256" in text
