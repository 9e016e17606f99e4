"""SIC-CADS' scenes, whose background tells what a novel thing is, and its study: branches and the sweep of gamma."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from companion.toy import sic_cads as toy
from companion.toy.encoders import detector as encoders
from tests.small import pinned

SEED = 7


def test_every_place_has_three_base_things_and_a_novel_one_with_a_double_in_the_next():
    places, by_name = list(toy.PLACES), {thing.name: thing for thing in toy.THINGS}
    assert [*toy.BASE, *toy.NOVEL] == list(range(16)) and len(toy.NOVEL) == 4
    assert tuple(by_name) == encoders.CLASSES
    for number, place in enumerate(places):
        *base, novel = [thing for thing in toy.THINGS if thing.place == place]
        double = by_name[novel.like]
        assert [thing.like for thing in base] == [""] * 3 and double.place == places[(number + 1) % 4]
        assert double.shape == novel.shape and (novel.hue - double.hue) % 1 == pytest.approx(0.03)
    # any two base things of one shape differ in hue by far more
    for one, other in itertools.combinations(toy.THINGS[:12], 2):
        assert one.shape != other.shape or min((one.hue - other.hue) % 1, (other.hue - one.hue) % 1) > 0.08


def test_things_are_where_they_belong_and_novel_ones_are_hard():
    drawn = toy.scenes(300, "test", 7)
    here = Counter(toy.THINGS[label].place == shown.place for shown in drawn for label in shown.labels)
    # an eighth is drawn from everywhere, of which a quarter matches the background by chance
    assert here[True] / here.total() == pytest.approx(1 - 0.125 * 0.75, abs=0.04)
    looks = Counter((k in toy.NOVEL, look) for s in drawn for k, look in zip(s.labels, s.looks, strict=True))
    for novel, hard in ((True, 0.8), (False, 0.35)):
        plain, soft, hidden = (looks[novel, look] for look in toy.LOOKS)
        assert 1 - plain / (plain + soft + hidden) == pytest.approx(hard, abs=0.07)
        assert hidden / (soft + hidden) == pytest.approx(0.5, abs=0.1)


def test_the_texture_alone_tells_the_place():
    """Neither brightness nor colour does: the spread of each mean is far larger than the backgrounds' difference."""
    rng = np.random.default_rng(0)
    means = [[toy.backdrop(rng, p, "train").mean((0, 1)) for _ in range(40)] for p in toy.PLACES]
    assert (np.std(np.mean(means, 1), axis=0) < np.std(means, 1).mean(0) / 2).all()


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
