"""The pocket pedestrians: labels match the images, vertical position identifies them, splits share nothing; reading."""

import dataclasses
import itertools

import numpy as np
import pytest
from skimage.color import rgb2hsv

from companion.data import attributes as reader
from companion.toy.datasets import pedestrians
from companion.toy.datasets.tokens import UNKNOWN
from companion.toy.encoders.pedestrian_clip import tokenizer

SEED = 7
PLAIN = pedestrians.Pedestrian("", "short", "grey", "plain", "trousers", "grey", "grey", "")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("street")
    pedestrians.write(path, SEED)
    return path


def wearing(**changes) -> pedestrians.Pedestrian:
    return dataclasses.replace(PLAIN, **changes)


def drawn(person, seed=0, camera="clear") -> np.ndarray:
    return pedestrians.draw(np.random.default_rng(seed), person, "train", camera).astype(float)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"hat": "red"}, {"hat"}),
        ({"hair": "long"}, {"long hair"}),
        ({"top": "red"}, {"red top"}),
        ({"top": "blue", "pattern": "striped"}, {"blue top", "striped top"}),
        ({"lower": "red"}, {"red trousers"}),
        ({"lower": "blue", "legs": "shorts"}, {"shorts"}),
        ({"shoes": "blue"}, {"blue shoes"}),
        ({"shoes": "green", "top": "green", "lower": "green", "hat": "green"}, {"hat"}),
        ({"bag": "backpack"}, {"backpack"}),
        ({"bag": "handbag", "shoes": "red"}, {"handbag", "red shoes"}),
    ],
)
def test_labels_follow_from_what_is_worn(changes, expected):
    labels = wearing(**changes).labels
    assert {name for name, there in zip(pedestrians.ATTRIBUTES, labels, strict=True) if there} == expected


def test_a_colour_says_little_and_its_place_everything():
    """Red is somewhere on most images, about as often where it is asked for as not."""
    _, persons = pedestrians.people(400, "train", "clear", 2)
    anywhere = ["red" in (p.hat, p.top, p.lower, p.shoes) for p in persons]
    assert 0.55 < np.mean(anywhere) < 0.8  # bags, drawn in a colour of their own, come on top
    labels = np.array([p.labels for p in persons])
    assert ((labels.mean(0) > 0.08) & (labels.mean(0) < 0.5)).all()
    assert sum(pedestrians.PARTS.values(), ()) == pedestrians.ATTRIBUTES and len(pedestrians.ATTRIBUTES) == 12
    # parts are dressed independently of one another: the trousers' colour is not informative about the shoes'
    columns = {n: labels[:, i] for i, n in enumerate(pedestrians.ATTRIBUTES) if n.startswith(("red", "blue"))}
    for one, other in itertools.combinations(columns, 2):
        if one.split()[-1] != other.split()[-1]:
            assert abs(np.corrcoef(columns[one], columns[other])[0, 1]) < 0.2


def test_captions_are_in_words_that_the_clip_knows():
    said = wearing(hat="red", top="blue", bag="handbag").captions()
    assert said["top"] == "a pedestrian in a blue top" and said["bag"] == "a pedestrian with a handbag"
    assert said["all"].startswith("a pedestrian with short hair and a hat in a plain blue top and grey trousers")
    _, persons = pedestrians.people(20, "val", "clear", 0)
    texts = [text for person in persons for text in person.captions().values()]
    assert (tokenizer()([*texts, *pedestrians.SENTENCES.values()]) != UNKNOWN).all()


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"hat": "red"}, 0, 14),
        ({"hair": "long"}, 2, 24),
        ({"top": "red"}, 8, 38),
        ({"pattern": "striped"}, 8, 38),
        ({"legs": "shorts"}, 34, 62),
        ({"lower": "red"}, 26, 62),
        ({"shoes": "red"}, 50, 64),
        ({"bag": "backpack"}, 8, 36),
        ({"bag": "handbag"}, 24, 46),
    ],
)
def test_each_thing_is_drawn_at_its_height(changes, low, high, monkeypatch):
    """Two persons who differ in one thing alone, drawn from the same random numbers."""
    paints = {"red": [1, 0, 0], "blue": [0, 0, 1], "green": [0, 1, 0], "grey": [0.5, 0.5, 0.5]}
    monkeypatch.setattr(pedestrians, "_paint", lambda rng, colour: np.array(paints[colour]))  # draws no numbers
    changed = [np.abs(drawn(wearing(**changes), seed) - drawn(PLAIN, seed)).max(2) > 30 for seed in range(12)]
    heat = np.sum(changed, axis=(0, 2))
    assert heat[low:high].sum() > 0.98 * heat.sum() and heat.sum() > 12 * 8


@pytest.mark.parametrize(("part", "rows"), [("top", (18, 28)), ("lower", (36, 48))])
@pytest.mark.parametrize("colour", ["red", "blue", "green"])
def test_colours_are_what_they_are_called(part, rows, colour):
    hues = []
    for seed in range(20):
        shown = drawn(wearing(**{part: colour}), seed)[slice(*rows), 12:20] / 255
        hue, saturation, _ = np.moveaxis(rgb2hsv(shown), -1, 0)
        hues += [hue[saturation > 0.4]]
    hue = np.concatenate(hues)
    expected = {"red": 0.0, "blue": 0.62, "green": 0.36}[colour]
    assert len(hue) > 500 and np.mean(np.abs((hue - expected + 0.5) % 1 - 0.5) < 0.06) > 0.9


def test_the_street_is_darker_noisier_and_coarser():
    clear, street = (pedestrians.people(60, "train", camera, 1)[0].astype(float) for camera in pedestrians.CAMERAS)
    assert street.mean() < 0.85 * clear.mean()

    def fine(images):  # what neighbours three pixels apart share, and direct ones do not
        return np.abs(np.diff(images, axis=1)).mean() / np.abs(images[:, 3:] - images[:, :-3]).mean()

    assert fine(street) > fine(clear)  # noise: neighbours differ nearly as much as distant pixels


def test_the_reader_of_pa100k_reads_them(root):
    sets = reader.splits("pocket/pedestrians", root)
    assert {split: len(part) for split, part in sets.items()} == pedestrians.COUNTS | {"trainval": 700}
    assert sets["train"].sentences == tuple(pedestrians.SENTENCES.values())
    shown, named = pedestrians.people(pedestrians.COUNTS["val"], "val", "street", SEED)
    image, labels = sets["val"][17]
    assert np.array_equal((255 * image).round().numpy().astype(np.uint8).transpose(1, 2, 0), shown[17])
    assert labels.tolist() == named[17].labels
    pictures = [source for split in pedestrians.COUNTS for source in sets[split].sources]
    assert len(set(pictures)) == sum(pedestrians.COUNTS.values())
