"""MetaSegNet's land cover, whose looks depend on the zone, its texts, and its methods."""

import itertools

import numpy as np
import pytest
import torch

from companion.data import landcover as data
from companion.models.metasegnet.text import Words
from companion.toy import metasegnet as toy
from tests.toy.common import pinned


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", {"train": 4, "val": 1, "test": 2})
    monkeypatch.setattr(toy, "STEPS", 1)
    caches = (toy.land, toy._part, toy.trained)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_land_follows_the_seed_to_the_bit(few, monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", dict.fromkeys(toy.COUNTS, 1))  # of nine zones
    parts = [toy.land(7, split) for split in toy.COUNTS]
    found = " ".join(pinned(part.images, part.labels, part.zones) for part in parts)
    assert found == "bc2298039507 489a8bcb31b1 37f247254cfd"


def test_test_seeds_leave_out_all_zones_and_nothing_is_selected_on_them(few):
    assert {toy.left_out(seed) for seed in toy.STUDY.seeds} == {*toy.ORDER} == {*toy.ZONES}
    left = toy.left_out(1)
    for task, split in itertools.product(("seen", "left out"), ("train", "val", "trainval", "test")):
        part = toy.data(task, 1, split)
        assert {*part.zones} == ({left} if (task, split) == ("left out", "test") else {*toy.ZONES} - {left})
        assert part.split == split.removesuffix("val") or split == "val"


def test_networks_start_equal_and_words_of_the_zone_left_out_alone_are_unknown():
    seed = toy.ORDER.index("Csa")
    methods = ("unimodal", "constant text", "one-hot zone", "MetaSegNet")
    built = {method: toy.build(method, seed) for method in methods}
    first = built["unimodal"].state_dict()
    for method, model in built.items():
        assert all(torch.equal(first[name], t) for name, t in model.state_dict().items() if name in first), method
    words = built["MetaSegNet"].text.words(toy.prompts().text("Csa"))
    assert words[2:4] == [Words.UNKNOWN] * 2 and Words.UNKNOWN not in words[7:]  # code and name; the description
    assert built["one-hot zone"].text.ids(["Csa", "Am", "Aw"]).tolist() == [[1], [3], [4]]


def test_half_of_the_texts_are_without_their_heads_and_one_training_serves_both_tasks(few):
    part = toy.data("seen", 1, "trainval")
    model, history = toy.train("MetaSegNet", "seen", part, 4e-3, 1)
    assert len(history) == 1
    for method in ("MetaSegNet", "wrong zone's text"):
        assert toy.train(method, "left out", toy.data("left out", 1, "train"), 4e-3, 1)[0].network is model.network
    _, _, ids, hidden = toy.pairs(model.network, "MetaSegNet", part).tensors
    changed = ids != hidden
    assert changed[:, 2:4].all() and not changed[:, :2].any() and not changed[:, 8:].any()


def test_wrong_texts_are_of_other_zones_and_given_in_tests_alone(few):
    for split in ("val", "test"):
        part = toy.data("seen", 1, split)
        right, given = toy.texts("MetaSegNet", part), toy.texts("wrong zone's text", part)
        assert (right == given) == (split == "val") and not {*right} & {toy.prompts().text(part.left_out)}
    known = {toy.prompts().text(zone): zone for zone in toy.ZONES}
    for zone, text in zip(part.zones, given, strict=True):
        right, other = toy.ZONES[zone], toy.ZONES[known[text]]
        assert right.moisture != other.moisture and right.style != other.style and known[text] != part.left_out


def test_scores_are_of_the_pixels(few):
    part = toy.data("seen", 1, "test")
    model = toy.Segmenter(toy.build("MetaSegNet", 1), "MetaSegNet")
    found = toy.score(model, "seen", part)
    expected = 100 * float((model(part) == part.labels).float().mean())
    assert found["OA"] == pytest.approx(expected, abs=0.01) and len(found) == 11


def test_saved_images_lie_in_their_zones(tmp_path):
    own = data.own(toy.save(tmp_path, ("Aw", "BWh"), 3, count=2), [*toy.CLASSES])["train"]
    assert own.zones() == ["Aw", "Aw", "BWh", "BWh"]
    image, labels = toy.drawn("Aw", 1, "train", 1003)[0]
    assert np.array_equal(own[0][0].permute(1, 2, 0), image) and np.array_equal(own[0][1], labels)
