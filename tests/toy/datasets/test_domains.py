"""The pocket domains: effects of the sensors, layout on disk, features of the models, and the study on them."""

from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from skimage.color import rgb2hsv
from torch import nn

from companion.data import domains as reader
from companion.data import fewshot
from companion.errors import BadParameter
from companion.models.layers import clip_prompting as prompting
from companion.toy import encoders
from companion.toy.ablations import SEEDS, SELECTION_SEEDS, study_root
from companion.toy.ablations import dplq as study
from companion.toy.datasets import domains, scenes
from companion.toy.datasets.tokens import UNKNOWN, Tokenizer
from companion.toy.encoders import domain_mae
from companion.toy.encoders.vit_and_clip import pixels
from companion.training.schedules import schedule

DOMAINS = list(domains.DOMAINS)
SEED = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    for domain in DOMAINS:
        domains.write(study_root(path, SEED), domain, SEED)
    return str(path)


def angle(images: np.ndarray) -> np.ndarray:
    """The hue of the most coloured pixels of each image (n, 32, 32, 3), in quarters of the circle."""
    found = []
    for image in images:
        hue, saturation, _ = np.moveaxis(rgb2hsv(image), -1, 0)
        object_ = saturation >= np.quantile(saturation, 0.97)
        found.append(np.angle(np.exp(2j * np.pi * hue[object_]).mean()) / (np.pi / 2) % 4)
    return np.array(found)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_word_is_seen_in_training_in_half_of_its_company(domain):
    world = domains.DOMAINS[domain]
    base, novel = fewshot.halves(world.classes)
    assert len(set(world.classes)) == 16 == 2 * len(base)
    for pairs in (world.pairs[:8], world.pairs[8:]):
        hues, words = (Counter(column) for column in zip(*pairs, strict=True))
        assert set(hues) == set(scenes.HUES) and set(words) == set(world.words)
        assert {*hues.values(), *words.values()} == {2}
    assert not set(base) & set(novel)
    assert (Tokenizer()([f"a photo of a {name}" for name in world.classes]) != UNKNOWN).all()


def test_the_second_sensor_shows_the_opposite_colour():
    """What is red looks cyan, green looks violet, in either domain; done twice it is undone."""
    red, grey = np.zeros((32, 32, 3)), np.full((32, 32, 3), 0.3)
    red[..., 0] = 1
    for world in domains.DOMAINS.values():
        np.testing.assert_allclose(world.second(red), 1 - red, atol=1e-9)
        np.testing.assert_allclose(world.second(world.second(grey + 0.5 * red)), grey + 0.5 * red, atol=1e-9)
    np.testing.assert_allclose(domains.false_colour(grey), grey)
    np.testing.assert_allclose(domains.negative(grey), 1 - grey)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_lines_of_the_sensors_are_apart_and_fixed(domain):
    lines = [domains.pattern(domain, sensor)[..., 0] for sensor in (0, 1)]
    for pattern in lines:
        assert abs(pattern).max() == pytest.approx(domains.AMPLITUDE, rel=0.05) and abs(pattern.mean()) < 1e-9
        np.testing.assert_allclose(np.roll(pattern, domains.PERIOD, (0, 1)), pattern, atol=1e-9)
    assert abs((lines[0] * lines[1]).sum()) < 1e-9
    # an average over many images has the sensor's own lines and not the other's
    pictures, sensors = domains.unlabelled(domain, 400, seed=3)
    for sensor in (0, 1):
        mean = pictures[sensors == sensor].mean((0, 3)) / 255
        own, other = ((mean * lines[i]).sum() / np.square(lines[i]).sum() for i in (sensor, 1 - sensor))
        assert 0.8 < own < 1.1 and abs(other) < 0.2
    # brightness does not identify the sensors
    means = pictures.mean((1, 2, 3))
    assert abs(means[sensors == 0].mean() - means[sensors == 1].mean()) < 0.5 * means.std()


def test_unknown_names_are_refused_with_the_known_ones():
    load, ship = domain_mae.load, domain_mae.ship
    for function, *names in ((load, "radar"), (load, "remote", "imagenet"), (ship, "radar")):
        with pytest.raises(BadParameter, match="Accepted"):
            function(*names)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_reader_of_ones_own_folder_reads_a_domain(root, domain):
    sets = reader.own_folder(study_root(root, SEED) / domain)
    assert sets["train"].class_names == tuple(domains.DOMAINS[domain].classes)
    for split, each in domains.EACH.items():
        assert Counter(sets[split].labels) == Counter({label: each for label in range(16)})
    image, label = sets["test"][0]
    assert image.shape == (3, 32, 32) and label == 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_model_is_as_good_as_its_card_says(domain):
    card = encoders.read_card(domain_mae.NAMES[domain])
    model = domain_mae.load(domain)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert card["world"] == domains.VERSION
    found = domain_mae.measure(domain, model)
    for name, said in card["quality"].items():
        assert found[name] == pytest.approx(said, abs=0.02)
    # DPLQ's advantage: the domain model encodes the sensor, at a larger scale than an untrained one; CLIP does not
    assert found["domain model"]["read"] > 0.98 and abs(found["CLIP"]["read"] - 0.5) < 0.06
    assert found["domain model"]["share"] > 1.5 * found["untrained"]["share"] > 20 * found["CLIP"]["share"]


def test_what_is_measured_is_what_it_says():
    sensors = np.arange(200) % 2
    rng = torch.Generator().manual_seed(0)
    noise, told = torch.randn(200, 4, generator=rng), torch.from_numpy(sensors)[:, None] * torch.ones(200, 4)
    assert domain_mae.share(told, sensors) == pytest.approx(1) and domain_mae.share(noise, sensors) < 0.05
    assert domain_mae.probe(noise + 5 * told, sensors, noise + 5 * told, sensors) > 0.98
    assert abs(domain_mae.probe(noise[:100], sensors[:100], noise[100:], sensors[100:]) - 0.5) < 0.2


def test_a_short_training_learns_and_follows_the_seed():
    images = pixels(domains.unlabelled("medical", 64, "val", 5)[0])

    def error(model):
        torch.manual_seed(0)
        with torch.inference_mode():
            return float(model.loss(images, domain_mae.RECIPE["masked"]))

    assert error(domain_mae.train("medical", 256, 60)) < 0.6 * error(domain_mae.load("medical", "random"))
    one, again, other = (domain_mae.train("medical", 256, 3, seed) for seed in (0, 0, 1))
    assert not one.training and one(images).shape == (64, one.num_features)
    assert torch.equal(one(images), again(images)) and not torch.equal(one(images), other(images))


def test_what_is_shipped_loads_and_its_card_describes_it(tmp_path, monkeypatch):
    monkeypatch.setitem(domain_mae.RECIPE, "steps", 2)
    monkeypatch.setattr(domain_mae.train, "__defaults__", (128, 2, 0))
    path = domain_mae.ship("remote", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pocket_mae_remote.md", "pocket_mae_remote.safetensors"]
    head = yaml.safe_load(path.with_suffix(".md").read_text(encoding="utf-8").split("---")[1])
    assert head["bytes"] == path.stat().st_size and head["recipe"]["steps"] == 2
    monkeypatch.setattr(encoders, "WEIGHTS", tmp_path)
    assert domain_mae.load("remote").num_features == domain_mae.SHAPE["decoder_width"]


def test_the_parts_are_what_they_say(root):
    base, novel = fewshot.halves(domains.DOMAINS["remote"].classes)
    images, labels, names = study.images("remote", root, SEED, "train")
    assert images.shape == (128, 3, 32, 32) and images.min() >= -1 and images.max() <= 1 and names == base
    assert Counter(labels.tolist()) == Counter({label: study.SHOTS for label in range(8)})
    seen = {image.numpy().tobytes() for image in images}
    for part, expected in (("val base", 160), ("val novel", 160), ("test base", 320), ("test novel", 320)):
        images, labels, names = study.images("remote", root, SEED, part)
        assert len(images) == expected and names == (novel if "novel" in part else base) and labels.max() == 7
        assert not seen & {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("part", ["train", "test novel"])
def test_the_sensors_belong_to_the_pictures(root, part):
    images, labels, names = study.images("remote", root, SEED, part)
    sensors = study.sensors("remote", root, SEED, part)
    shown = angle(((images + 1) / 2).permute(0, 2, 3, 1).numpy())
    named = np.array([scenes.HUES.index(names[label].split()[0]) for label in labels])
    # quarters of the circle off, -2 to 2; the second sensor shows the opposite hue
    assert 0.3 < sensors.double().mean() < 0.7
    assert np.mean(abs((shown - named - 2 * sensors.numpy() + 2) % 4 - 2) < 0.6) > 0.9


def test_clip_names_what_the_first_sensor_sees_and_is_misled_by_the_second(root):
    for task in DOMAINS:
        row = study.train("zero-shot CLIP", task, 0.0, SEED, root)
        assert row["first sensor"] > 70 and row["second sensor"] < 30 and row["trained"] == 0


def test_what_each_method_reads_of_a_picture(root):
    def read(method, task="remote"):
        return study.inputs(method, task, root, SEED, "test base").tensors

    images, labels, own = read("DPLQ")
    assert images.shape == (320, 3, 32, 32) and labels.shape == (320,) and own.shape == (320, 48)
    assert [len(read(method)) for method in ("CoOp", "CoCoOp", "MaPLe")] == [2, 2, 2]
    assert read("CoOp")[0].shape == (320, 64) and torch.equal(read("MaPLe")[0], images)
    assert not read("DPLQ, no domain feature")[2].any()
    torch.testing.assert_close(read("DPLQ, CLIP's own feature")[2].square().mean(1), torch.ones(320))
    torch.testing.assert_close(read("DPLQ, mean 1")[2], own + 1)
    others = [read(f"DPLQ, {name}")[2] for name in ("untrained domain model", "the other domain's model")]
    assert all(other.shape == own.shape and not torch.allclose(other, own) for other in others)


@pytest.mark.parametrize("method", [m for m in study.METHODS if m not in study.UNTRAINED])
def test_a_method_trains_its_prompts_and_nothing_of_clip(root, method):
    data = study.inputs(method, "remote", root, SEED, "train")
    classes = study.images("remote", root, SEED, "train")[2]
    model = study.build(method, classes, SEED, data.tensors[-1].shape[-1])
    assert isinstance(model, prompting.PromptedCLIP)
    trained = set(model.trained())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = study.train_model(model, data, 1e-2, seed=SEED, epochs=1, schedule=schedule(warmup=0.0))
    assert len(history) == 8 and all(np.isfinite(row["loss"]) for row in history)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # a domain feature of zeros leaves the small net its biases
    silent = {"meta_net.linear1.weight"} if method == "DPLQ, no domain feature" else set()
    assert trained - silent <= changed <= trained


def test_quaternions_have_the_fewer_parameters(root):
    counts = {m: study.build(m, ("a disc",), 0, 48).count() for m in ("DPLQ", "DPLQ, real layers", "MaPLe")}
    real = nn.Linear(64, 64), *(nn.Linear(64, 48) for _ in range(5))
    quaternion = 128 * 64 // 4 + 64 + 5 * (128 * 48 // 4 + 48)
    more = sum(p.numel() for layer in real for p in layer.parameters()) - quaternion
    assert counts["DPLQ, real layers"] - counts["DPLQ"] == more
    assert counts["DPLQ"] < counts["MaPLe"]


def test_a_row_is_the_same_again_and_holds_what_was_measured(root):
    rows = [study.train("DPLQ, mean 1", "medical", 1e-2, SEED, root, "select", epochs=1) for _ in range(2)]
    assert rows[0] == rows[1]
    assert list(rows[0]) == ["base", "novel", "HM", *study.SENSORS, "loss", "trained"]
    row = rows[0]
    assert row["HM"] == pytest.approx(fewshot.harmonic_mean(row["base"], row["novel"]), abs=0.02)
    sensors = torch.cat([study.sensors("medical", root, SEED, f"val {half}") for half in ("base", "novel")]).double()
    share = float(sensors.mean())
    both = (1 - share) * row["first sensor"] + share * row["second sensor"]
    assert both == pytest.approx((row["base"] + row["novel"]) / 2, abs=0.05)
    assert study.train("DPLQ, mean 1", "medical", 1e-2, SEED, root, "test", epochs=1) != row


def test_every_seed_has_pictures_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "EACH", dict.fromkeys(domains.EACH, 1))
    for seed in (*SELECTION_SEEDS, *SEEDS):
        study.prepare(tmp_path, seed)
    folders = [study_root(tmp_path, seed) / "remote" for seed in (*SELECTION_SEEDS, *SEEDS)]
    assert len({(folder / "split.json").read_bytes() for folder in folders}) == 1
    pictures = [next(iter(sorted((folder / "images").rglob("*.png")))).read_bytes() for folder in folders]
    assert len(set(pictures)) == len(folders)
