"""SIC-CADS' scenes, whose background tells what a novel thing is, and its study: branches and the sweep of gamma."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

from companion.toy import sic_cads as toy
from tests.toy.common import pinned

SEED = 7


CACHED = (toy.load, toy.foundation, toy.detected, toy._trained)


@pytest.fixture
def few(request, monkeypatch):
    """Few images; the caches of the study are cleared after."""
    monkeypatch.setattr(toy, "COUNTS", getattr(request, "param", {"train": 96, "val": 24, "test": 24}))
    monkeypatch.setattr(toy, "EPOCHS", 2)
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


@pytest.mark.parametrize("few", [{"train": 5, "val": 3, "test": 4}], indirect=True)
def test_scenes_follow_the_seed_to_the_bit_and_training_holds_no_novel_box(few):
    splits = {split: toy.load(SEED, split) for split in toy.COUNTS}
    found = [pinned(*(x for image, target in part for x in (image, *target))) for part in splits.values()]
    assert found == ["c77910d71d4a", "3c27776c6d49", "eca5d13b1310"]
    novel = {split: bool(part.positives[:, list(toy.NOVEL)].any()) for split, part in splits.items()}
    assert not novel["train"] and novel["test"]


def test_the_recogniser_learns_and_its_branches_refine_the_detector(few):
    learn, given = (toy.study_data("shipped detector", SEED, split) for split in ("trainval", "test"))
    model, history = toy.train("SIC-CADS", "shipped detector", learn, 3e-3, SEED)
    assert history[-1]["loss"] < history[0]["loss"]
    assert toy.train("text", "shipped detector", learn, 3e-3, SEED)[0].model is model.model
    row = toy.score(model, "shipped detector", given)
    assert row["novel, gamma 0.5"] == row["AP50 novel"] and row["base, gamma 0.5"] == row["AP50 base"]
    alone = toy.score(toy.Refined(model.model, "no refinement"), "shipped detector", given)
    assert row["novel, gamma 0.0"] == alone["AP50 novel"] and "mAP novel" not in alone
    # lambda_N = 1 - lambda_B: one formula for all classes
    model.model.settings = replace(toy.SETTINGS, lambda_base=0.3, lambda_novel=0.7)
    p = toy.branch_scores(model.model, given.images)
    torch.testing.assert_close(p["SIC-CADS"], p["text"] ** 0.3 * p["visual+"] ** 0.7, rtol=1e-4, atol=1e-5)


def test_named_right_counts_every_object_once(few):
    given = toy.detected("shipped detector", SEED, "test")
    perfect = torch.zeros_like(given.probabilities)
    for number in range(len(given.found)):
        target = given.found.target(number)
        perfect[number, box_iou(target.boxes, given.boxes[number]).argmax(1), target.labels] = 1
    shares = toy.named_right(given, perfect)
    assert set(shares) == {f"right {g} {look}" for g in ("base", "novel") for look in toy.LOOKS}
    assert min(shares.values()) > 90  # two objects may share their best box
    assert max(toy.named_right(given, 1 - perfect).values()) < 10
