"""DPLQ's domains, whose sensor CLIP does not see, and its study."""

from collections import Counter

import numpy as np
import pytest
import torch
from skimage.color import rgb2hsv

from companion.data import fewshot
from companion.toy import scenes
from companion.toy.ablations import dplq as study
from companion.toy.datasets import domains
from companion.toy.tokens import UNKNOWN, Tokenizer
from tests.small import few_images

SEED = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        few_images(patch)
        patch.setattr(domains, "EACH", {"train": 16, "val": 5, "test": 10})
        study.prepare(path, SEED)
    return str(path)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_every_word_is_seen_in_training_in_half_of_its_company(domain):
    world = domains.DOMAINS[domain]
    base, novel = fewshot.halves(world.classes)
    assert len({*world.classes}) == 16 and len(base) == 8 and not {*base} & {*novel}
    for pairs in (world.pairs[:8], world.pairs[8:]):
        hues, words = (Counter(column) for column in zip(*pairs, strict=True))
        assert hues == dict.fromkeys(scenes.HUES, 2) and words == dict.fromkeys(world.words, 2)
    assert (Tokenizer()([f"a photo of a {name}" for name in world.classes]) != UNKNOWN).all()


def test_the_second_sensor_shows_the_opposite_colour():
    red, grey = np.zeros((32, 32, 3)), np.full((32, 32, 3), 0.3)
    red[..., 0] = 1
    for world in domains.DOMAINS.values():
        np.testing.assert_allclose(world.second(red), 1 - red, atol=1e-9)
        np.testing.assert_allclose(world.second(world.second(grey + 0.5 * red)), grey + 0.5 * red, atol=1e-9)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_a_sensor_is_known_by_its_lines_and_not_by_its_brightness(domain):
    lines = [domains.pattern(domain, sensor)[..., 0] for sensor in (0, 1)]
    assert abs((lines[0] * lines[1]).sum()) < 1e-9
    pictures, sensors = domains.unlabelled(domain, 300, seed=3)
    for sensor in (0, 1):
        mean = pictures[sensors == sensor].mean((0, 3)) / 255
        own, other = ((mean * lines[i]).sum() / np.square(lines[i]).sum() for i in (sensor, 1 - sensor))
        assert 0.8 < own < 1.1 and abs(other) < 0.25
    means = pictures.mean((1, 2, 3))
    assert abs(means[sensors == 0].mean() - means[sensors == 1].mean()) < 0.5 * means.std()


def test_the_parts_share_no_image_and_the_sensors_belong_to_them(root):
    base, novel = fewshot.halves(domains.DOMAINS["remote"].classes)
    parts = {"train": (128, base), "val base": (40, base), "val novel": (40, novel)}
    parts |= {"test base": (80, base), "test novel": (80, novel)}
    seen = []
    for part, (count, names) in parts.items():
        images, labels, classes = study.images("remote", root, SEED, part)
        assert len(images) == count and classes == names and set(labels.bincount().tolist()) == {count // 8}
        seen += [image.numpy().tobytes() for image in images]
        # the hue of the most coloured pixels, in quarters of the circle; the second sensor shows the opposite one
        hue, saturation, _ = np.moveaxis(rgb2hsv(((images + 1) / 2).permute(0, 2, 3, 1).numpy()), -1, 0)
        object_ = saturation >= np.quantile(saturation, 0.97, axis=(1, 2), keepdims=True)
        angle = np.angle((np.exp(2j * np.pi * hue) * object_).sum((1, 2))) / (np.pi / 2)
        named = np.array([scenes.HUES.index(classes[label].split()[0]) for label in labels])
        sensors = study.sensors("remote", root, SEED, part).numpy()
        assert 0.2 < sensors.mean() < 0.8
        assert np.mean(abs((angle - named - 2 * sensors + 2) % 4 - 2) < 0.6) > 0.85
    assert len(set(seen)) == len(seen) == 368


def test_clip_names_what_the_first_sensor_sees_and_is_misled_by_the_second(root):
    for task in domains.DOMAINS:
        row = study.train("zero-shot CLIP", task, 0.0, SEED, root)
        assert row["first sensor"] > 65 and row["second sensor"] < 35 and row["trained"] == 0


def test_what_each_method_reads_of_an_image(root):
    def read(method):
        return study.inputs(method, "remote", root, SEED, "test base").tensors

    images, labels, own = read("DPLQ")
    assert images.shape == (80, 3, 32, 32) and labels.shape == (80,) and own.shape == (80, 48)
    assert read("CoOp")[0].shape == (80, 64) and torch.equal(read("MaPLe")[0], images) and len(read("MaPLe")) == 2
    assert not read("DPLQ, no domain feature")[2].any()
    torch.testing.assert_close(read("DPLQ, CLIP's own feature")[2].square().mean(1), torch.ones(80))
    torch.testing.assert_close(read("DPLQ, mean 1")[2], own + 1)
    others = [read(f"DPLQ, {name}")[2] for name in ("untrained domain model", "the other domain's model")]
    assert not any(torch.allclose(other, own, atol=0.1) for other in others)
    counts = {m: study.build(m, ("a disc",), 0, 48).count() for m in ("DPLQ", "DPLQ, real layers", "MaPLe")}
    real = (64 + 1) * 64 + 5 * (64 + 1) * 48  # one linear layer of the text side, five of the image tower
    quaternion = 128 * 64 // 4 + 64 + 5 * (128 * 48 // 4 + 48)  # of pairs of prompt and bias
    assert counts["DPLQ, real layers"] - counts["DPLQ"] == real - quaternion
    assert counts["DPLQ"] < counts["MaPLe"]


def test_a_row_holds_what_was_measured_and_is_the_same_again(root):
    rows = [study.train("DPLQ, mean 1", "medical", 1e-2, SEED, root, "select", epochs=1) for _ in range(2)]
    row = rows[0]
    assert row == rows[1] and row["HM"] == pytest.approx(fewshot.harmonic_mean(row["base"], row["novel"]), abs=0.02)
    sensors = torch.cat([study.sensors("medical", root, SEED, f"val {half}") for half in ("base", "novel")])
    share = float(sensors.double().mean())
    both = (1 - share) * row["first sensor"] + share * row["second sensor"]
    assert both == pytest.approx((row["base"] + row["novel"]) / 2, abs=0.05)
