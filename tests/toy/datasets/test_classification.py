"""Scenes, the classification tasks on disk, and the tokenizer."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2hsv

from companion.data import classification as reader
from companion.toy.datasets import classification, scenes
from companion.toy.datasets.tokens import END, FIRST, START, UNKNOWN, WORDS, Tokenizer
from companion.toy.encoders import vit_and_clip as pocket


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    classification.write(root)
    return root


@pytest.mark.parametrize("name", scenes.PHOTOGRAPHS)
def test_every_pixel_of_a_photograph_belongs_to_one_split(name):
    owners = np.zeros(scenes.photograph(name).shape[:2], int)
    for split in scenes.SPLITS:
        for left, top, right, bottom in scenes.tiles(name, split):
            owners[top:bottom, left:right] += 1
    assert (owners == 1).all()


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_lies_in_other_splits_tiles_never_shows_in_a_cut(split, monkeypatch):
    """Paint the tiles of one split white on black photographs: its crops are white throughout, all others black."""
    painted = {}
    for name in scenes.PHOTOGRAPHS:
        painted[name] = np.zeros_like(scenes.photograph(name))
        for left, top, right, bottom in scenes.tiles(name, split):
            painted[name][top:bottom, left:right] = 255
    monkeypatch.setattr(scenes, "photograph", painted.__getitem__)
    rng = np.random.default_rng(0)
    for name in scenes.PHOTOGRAPHS:
        for other in scenes.SPLITS:
            for _ in range(20):
                assert (scenes.cut(rng, name, other).pixels == (other == split)).all()


def test_a_scene_agrees_with_its_annotations():
    drawn = scenes.scenes(300, "train", seed=3)
    small, large = (
        max(s.mask.sum() for s in drawn if s.attributes["size"] == size and s.attributes["shape"] == "disc")
        for size in scenes.SIZES
    )
    assert scenes.SIZES == ("small", "large") and small < np.pi * 5.6**2 < large
    for scene in drawn:
        left, top, right, bottom = scene.box
        assert scene.image.shape == (32, 32, 3) and scene.image.dtype == np.uint8
        inside = np.zeros_like(scene.mask)
        inside[top:bottom, left:right] = True
        assert scene.mask.any() and not (scene.mask & ~inside).any()
        assert scene.mask[top].any() and scene.mask[bottom - 1].any()
        assert scene.mask[:, left].any() and scene.mask[:, right - 1].any()
        assert scenes.CLASSES[scene.label] == f"{scene.attributes['hue']} {scene.attributes['shape']}"
        assert all(word in scene.caption for word in scene.attributes.values())
        (x, y), third, place = scene.centre, scenes.SIZE / 3, scene.attributes["place"]
        assert [side in place for side in ("left", "right", "top", "bottom")] == [
            x < third,
            x >= 2 * third,
            y < third,
            y >= 2 * third,
        ]
        # the hue inside the mask is the named one; angles on the colour circle, so that red has no seam
        angles = rgb2hsv(scene.image)[..., 0][scene.mask] * 2 * np.pi
        mean = np.angle(np.exp(1j * angles).mean()) / (2 * np.pi) % 1
        assert round(mean * 4) % 4 == scenes.HUES.index(scene.attributes["hue"])


def test_scenes_follow_the_seed():
    first, again, other = scenes.scenes(5, "train", 0), scenes.scenes(5, "train", 0), scenes.scenes(5, "train", 1)
    assert all(np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("task", classification.TASKS)
def test_the_vtab_reader_reads_the_tasks(written, task):
    for split, size in {"train": 800, "val": 200, "trainval": 1000}.items():
        assert len(reader.load(f"pocket/{task}", written, split)) == size
    test = reader.load(f"pocket/{task}", written, "test")
    assert len(test) == classification.TASKS[task].test
    labels = [int(line.split(" ")[1]) for line in (written / "pocket" / task / "test.txt").read_text().splitlines()]
    assert set(labels) == set(range(len(classification.TASKS[task].classes)))
    with Image.open(written / "pocket" / task / "images/test/0000.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        first = next(iter(classification.examples(task, "test")))
        assert np.array_equal(np.asarray(image), first[0]) and labels[0] == first[1]


def test_every_digit_is_in_one_split_only(monkeypatch):
    """On originals that are flat at a level of their own, count which originals each split drew."""
    images, labels = np.zeros((1797, 8, 8)), np.arange(1797)
    monkeypatch.setattr(classification, "_originals", lambda: (images, labels))
    drawn = {split: [label for _, label in classification.examples("digits", split)] for split in scenes.SPLITS}
    assert sorted(itertools.chain(*drawn.values())) == list(range(1797))


def test_the_tokenizer_knows_every_word_of_the_world():
    tokenizer = Tokenizer()
    texts = [template.format(word) for template, words in pocket.PROMPTS.values() for word in words]
    for scene in scenes.scenes(200, "train"):
        assert pocket.short_caption(scene, list(scene.attributes)) == scene.caption
        texts += [scene.caption, pocket.short_caption(scene, ["place"]), pocket.short_caption(scene, ["hue"])]
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), 16) and ids.dtype == torch.long
    assert (ids != UNKNOWN).all()
    assert [tokenizer.decode(row) for row in ids] == texts
    assert len(set(WORDS)) == len(WORDS) and FIRST + len(WORDS) <= END


def test_the_tokenizer_takes_what_open_clips_takes():
    tokenizer = Tokenizer()
    assert tokenizer("A Zebra!").tolist() == [[START, FIRST, UNKNOWN, END] + [0] * 12]
    assert tokenizer("red " * 40)[0, -1] == END
    assert tokenizer(["a", "the"], context_length=5).shape == (2, 5)
