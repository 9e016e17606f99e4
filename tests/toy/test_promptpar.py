"""PromptPAR's pedestrians, whose attributes only their height tells, its study, and its notebook's tables."""

import numpy as np
import pytest
import torch

from companion.models.promptpar import figures
from companion.toy import encoders
from companion.toy import promptpar as toy
from tests.toy.common import pinned

# what is worn, the attributes that follow, and the rows in which it is drawn


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", {"train": 5, "val": 3, "test": 4})
    toy.images.cache_clear()
    yield
    toy.images.cache_clear()


def test_images_and_labels_follow_the_seed_to_the_bit(few):
    found = {split: toy.images(7, split).tensors for split in ("train", "val", "test", "trainval")}
    hashes = {s: pinned(*(v for x, y in zip(*found[s], strict=True) for v in (x / 2 + 0.5, y))) for s in found}
    assert [*hashes.values()][:3] == ["f20037cbed3a", "184f75f85236", "429bcbd34095"]
    for whole, *parts in zip(found["trainval"], found["train"], found["val"], strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_methods_train_what_their_name_says(few, monkeypatch):
    """One step of each method: CLIP stays, and only full fine-tuning changes its image tower."""
    monkeypatch.setattr(toy, "BATCH", 8)
    before = encoders.build("pocket_pedestrian_clip").visual.proj
    for method in toy.METHODS:
        model, history = toy.train(method, "street", toy.images(7, "trainval"), 1e-3, 0, epochs=1)
        assert len(history) == 1 and torch.equal(model.clip.visual.proj, before) == (method != "full fine-tuning")
        # the tokens of a frozen tower are cached
        images, labels = toy.images(7, "test").tensors
        with torch.no_grad():
            expected = toy.scores(model.eval()(images).sigmoid(), labels)
        assert toy.score(model, "street", toy.images(7, "test")) == pytest.approx(expected, abs=0.02)


def test_scores_of_the_parts_are_means_over_their_attributes():
    """Of a model that is right on the head and the reverse of right elsewhere."""
    labels = (torch.rand(64, 12, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    own = torch.tensor([name in toy.PARTS["head"] for name in toy.ATTRIBUTES])
    found = toy.scores(torch.where(own, labels, 1 - labels), labels)
    parts = {"head": 100, "upper body": 0, "legs": 0, "feet": 0, "bags": 0}
    assert {name: found[name] for name in toy.PARTS} == parts and found["mA"] == 16.67


# --- figures


def test_auroc_is_the_share_of_pairs_in_order():
    scores = torch.tensor([[0.1, 3], [0.4, 2], [0.3, 1], [0.9, 0]])
    first, second = figures.auroc(scores, torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]]))
    assert first == 100 and np.isnan(second)
    assert figures.auroc(torch.tensor([[0.2], [0.1], [0.3]]), torch.tensor([[1], [0], [0]])) == [50]


def test_tables_are_shares_and_have_a_row_for_each_token(few):
    model, (images, truth) = toy.build("PromptPAR", 0).eval(), toy.images(7, "test").tensors
    rows = figures.attention_by_row(model, images, truth, toy.ATTRIBUTES)
    assert rows.shape == (8, 12) and rows.loc[:, truth.any(0).numpy()].sum().to_numpy() == pytest.approx(100)
    table = figures.similarity(model, images, truth, toy.ATTRIBUTES)
    assert [*table.index] == ["frozen CLIP", "[CLS]", "strip 1", "strip 2", "strip 3", "strip 4"]
