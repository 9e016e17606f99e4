"""DPLQ's domains, whose sensor CLIP does not see, and the methods of its study."""

import pytest
import torch

from companion.data import domains, fewshot
from companion.models.dplq import figures
from companion.toy import dplq as toy
from companion.toy import scenes
from tests.toy.common import pinned

SEED = 7


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(toy, "EACH", {"train": 16, "val": 2, "test": 10})
    toy.data.cache_clear()
    yield
    toy.data.cache_clear()


HASHES = {"medical": "8e6a04255f8d b0d29a03160f 59d0af475fb2", "remote": "35916f45c5c2 e96f433a65c0 a475893ae935"}


@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_images_labels_and_sensors_follow_the_seed_to_the_bit(domain, monkeypatch):
    monkeypatch.setattr(toy, "EACH", dict.fromkeys(scenes.SPLITS, 1))
    found = {split: toy.examples(domain, split, SEED) for split in scenes.SPLITS}
    names = toy.DOMAINS[domain].classes
    sensors = {
        f"{names[label]}/{split}-000.png": int(sensor)
        for split, (_, labels, sensors) in found.items()
        for label, sensor in zip(labels, sensors, strict=True)
    }
    hashes = []
    for images, labels, _ in found.values():
        pixels = torch.from_numpy(images).movedim(-1, 1) / 255
        pairs = [x for pair in zip(pixels, labels.tolist(), strict=True) for x in pair]
        hashes.append(pinned(*pairs, sorted(sensors.items())))
    assert " ".join(hashes) == HASHES[domain]


def test_methods_differ_in_what_their_name_says():
    images = torch.rand(4, 3, 32, 32)
    models = {m: toy.build(m, "remote", ("a disc", "a ring"), 0) for m in toy.METHODS}
    read = {method: toy.inputs(model, images) for method, model in models.items()}
    assert read["CoCoOp"][0].shape == (4, 64) and len(read["MaPLe"]) == 1 and torch.equal(read["MaPLe"][0], images)
    own, untrained = read["DPLQ"][1], read["DPLQ, untrained domain model"][1]
    assert not torch.allclose(own, untrained, atol=0.1) and not read["DPLQ, no domain feature"][1].any()
    assert torch.equal(read["DPLQ, real layers"][1], own)
    assert models["DPLQ"].count() < models["MaPLe"].count() < models["DPLQ, real layers"].count()


def test_a_saved_domain_is_a_folder_of_ones_own(few, tmp_path):
    sets = domains.own(toy.save(tmp_path / "own", "medical", SEED))
    assert len(sets["all"]) == 256 and sorted(sets["all"].class_names) == sorted(toy.DOMAINS["medical"].classes)


def test_the_parts_share_no_image(few):
    seen, halves = [], fewshot.halves(toy.DOMAINS["remote"].classes)
    for split in ("train", "test"):
        for half, names in zip(toy.data("remote", SEED, split)[:2], halves, strict=True):
            assert half.classes == names and set(half.labels.bincount().tolist()) == {toy.EACH[split]}
            seen += [image.numpy().tobytes() for image in half.images]
    assert len(set(seen)) == len(seen) == 16 * 26


def test_a_step_and_a_score_follow_the_seed_of_the_noise(few):
    train, val = (toy.data("medical", SEED, split) for split in ("train", "val"))
    model, history = toy.train("DPLQ", "medical", train, 0.1, SEED, epochs=1)
    assert len(history) > 1 and toy.score(model, "medical", val) == toy.score(model, "medical", val)
    # figures: prompts attend elsewhere with another domain feature
    f, none = toy.inputs(model, val.base.images)[1], torch.zeros(16, 48)
    maps = figures.prompt_attention(model, val.base.images, {"own": f, "none": none})
    assert maps["prompt 1, own"].shape == (16, 8, 8)
    assert not torch.allclose(maps["prompt 1, own"], maps["prompt 1, none"])
