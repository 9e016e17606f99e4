"""DPLQ's domains, whose sensor CLIP does not see, and the methods of its study."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2hsv

from companion.data import domains, fewshot
from companion.toy import dplq as toy
from companion.toy import scenes
from tests.small import pinned

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


def test_the_parts_share_no_image_and_the_sensors_belong_to_them(few):
    seen, halves = [], fewshot.halves(toy.DOMAINS["remote"].classes)
    for split in ("train", "test"):
        for half, names in zip(toy.data("remote", SEED, split)[:2], halves, strict=True):
            images, labels, sensors, classes = half
            assert classes == names and set(labels.bincount().tolist()) == {toy.EACH[split]}
            seen += [image.numpy().tobytes() for image in images]
            # the hue of the most coloured pixels, in quarters of the circle; the second sensor shows the opposite one
            hue, saturation, _ = np.moveaxis(rgb2hsv(((images + 1) / 2).permute(0, 2, 3, 1).numpy()), -1, 0)
            coloured = saturation >= np.quantile(saturation, 0.97, axis=(1, 2), keepdims=True)
            angle = np.angle((np.exp(2j * np.pi * hue) * coloured).sum((1, 2))) / (np.pi / 2)
            named = np.array([scenes.HUES.index(classes[label].split()[0]) for label in labels])
            assert 0.2 < sensors.double().mean() < 0.8
            assert np.mean(abs((angle - named - 2 * sensors.numpy() + 2) % 4 - 2) < 0.6) > 0.85
    assert len(set(seen)) == len(seen) == 16 * 26
    assert all(
        map(torch.equal, toy.data("remote", SEED, "trainval").base[:3], toy.data("remote", SEED, "train").base[:3])
    )


def test_methods_differ_in_what_their_name_says():
    images = torch.rand(4, 3, 32, 32)
    models = {m: toy.build(m, "remote", ("a disc", "a ring"), 0) for m in toy.METHODS}
    read = {method: toy.inputs(model, images) for method, model in models.items()}
    assert read["CoCoOp"][0].shape == (4, 64) and len(read["MaPLe"]) == 1 and torch.equal(read["MaPLe"][0], images)
    own, untrained = read["DPLQ"][1], read["DPLQ, untrained domain model"][1]
    assert own.shape == untrained.shape == (4, 48) and not torch.allclose(own, untrained, atol=0.1)
    assert not read["DPLQ, no domain feature"][1].any() and torch.equal(read["DPLQ, real layers"][1], own)
    counts = {method: model.count() for method, model in models.items()}
    real = (64 + 1) * 64 + 5 * (64 + 1) * 48  # one linear layer of the text side, five of the image tower
    quaternion = 128 * 64 // 4 + 64 + 5 * (128 * 48 // 4 + 48)  # of pairs of prompt and bias
    assert counts["DPLQ, real layers"] - counts["DPLQ"] == real - quaternion
    assert counts["DPLQ"] < counts["MaPLe"]


def test_a_saved_domain_is_a_folder_of_ones_own(few, tmp_path):
    sets = domains.own_folder(toy.save(tmp_path / "own", "medical", SEED))
    assert len(sets["all"]) == 256 and sorted(sets["all"].class_names) == sorted(toy.DOMAINS["medical"].classes)
