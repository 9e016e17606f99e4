"""The pocket scenes with boxes: backgrounds identify the objects, novel ones resemble neighbours, COCO's tools read
them."""

import contextlib
import io
import itertools
from collections import Counter

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image
from skimage.color import rgb2hsv

from companion.data import detection as reader
from companion.toy.datasets import detection as pocket

SEED = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "COUNTS", {"train": 60, "val": 8, "test": 12})
        pocket.write(path, SEED)
    return path


@pytest.fixture(scope="module")
def drawn():
    return pocket.scenes(400, "test", SEED)


def test_every_place_has_three_base_things_and_a_novel_one_with_a_double_in_the_next():
    places, by_name = list(pocket.PLACES), {thing.name: thing for thing in pocket.THINGS}
    assert len(pocket.CLASSES) == len(set(pocket.CLASSES)) == 16
    assert [*pocket.BASE, *pocket.NOVEL] == list(range(16)) and len(pocket.NOVEL) == 4
    for number, place in enumerate(places):
        here = [thing for thing in pocket.THINGS if thing.place == place]
        assert [bool(thing.like) for thing in here] == [False, False, False, True]
        novel, double = here[-1], by_name[here[-1].like]
        assert double.place == places[(number + 1) % 4] and double.shape == novel.shape and not double.like
        assert (novel.hue - double.hue) % 1 == pytest.approx(0.03)
    # any two base things of one shape differ in hue by far more
    for one, other in itertools.combinations(pocket.THINGS[:12], 2):
        if one.shape == other.shape:
            apart = abs(one.hue - other.hue) % 1
            assert min(apart, 1 - apart) > 0.08


def test_things_are_where_they_belong_and_novel_ones_are_hard(drawn):
    here = Counter(pocket.THINGS[label].place == shown.place for shown in drawn for label in shown.labels)
    assert not {label for s in pocket.scenes(60, "train", 0, novel=False) for label in s.labels} & {*pocket.NOVEL}
    # an eighth is drawn from everywhere, of which a quarter matches the background by chance
    assert here[True] / here.total() == pytest.approx(1 - 0.125 * 0.75, abs=0.03)
    looks = {novel: Counter() for novel in (False, True)}
    for shown in drawn:
        assert 2 <= len(shown.labels) <= 4 and set(shown.looks) <= set(pocket.LOOKS)
        for label, look, side in zip(shown.labels, shown.looks, shown.boxes[:, 2], strict=True):
            looks[label in pocket.NOVEL][look] += 1
            assert (13 <= side <= 22) if look == "plain" else (8 <= side <= 11)
    for novel, hard in ((True, 0.8), (False, 0.35)):
        found = looks[novel]
        assert 1 - found["plain"] / found.total() == pytest.approx(hard, abs=0.06)
        assert found["hidden"] / (found["hard"] + found["hidden"]) == pytest.approx(0.5, abs=0.08)


def test_boxes_lie_in_the_picture_and_do_not_touch(drawn):
    for shown in drawn:
        x, y, w, h = shown.boxes.T
        assert (x > 0).all() and (y > 0).all() and (x + w < 64).all() and (y + h < 64).all()
        for i, j in itertools.combinations(range(len(x)), 2):
            apart = max(x[i] - x[j] - w[j], x[j] - x[i] - w[i], y[i] - y[j] - h[j], y[j] - y[i] - h[i])
            assert apart >= 2 - 1e-9


@pytest.mark.parametrize("shape", ["disc", "square", "triangle", "cross"])
def test_a_shape_fills_its_box(shape):
    covered = pocket.coverage(shape, (30.5, 24.5), 8.0) > 0.5
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    assert abs(columns[[0, -1]] - [23, 37]).max() <= 1 and abs(rows[[0, -1]] - [17, 31]).max() <= 1
    assert 0.3 < covered.sum() / 256 <= 1


def test_hue_is_told_and_a_hard_thing_is_paler():
    found = {}
    for look in pocket.LOOKS:
        pixels = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            canvas = np.full((64, 64, 3), 0.5)
            shown = pocket._draw(rng, canvas, pocket.THINGS[0], (32.0, 32.0), 11.0, look, "train")
            covered = pocket.coverage("disc", (32.0, 32.0), 4.0) > 0.9
            pixels.append(rgb2hsv(np.clip(shown, 0, 1))[covered])
        found[look] = np.concatenate(pixels)
    hue = found["plain"][:, 0]
    assert np.minimum(hue, 1 - hue).max() < 0.03
    saturation = {look: rows[:, 1].mean() for look, rows in found.items()}
    assert saturation["plain"] > 1.5 * saturation["hard"] > 1.5 * saturation["hidden"]


def test_the_texture_alone_tells_the_place():
    """Neither brightness nor colour does: the spread of each mean is far larger than the backgrounds' difference."""
    rng = np.random.default_rng(0)
    means = {p: np.array([pocket.backdrop(rng, p, "train").mean((0, 1)) for _ in range(40)]) for p in pocket.PLACES}
    between = np.std([m.mean(0) for m in means.values()], axis=0)
    within = np.mean([m.std(0) for m in means.values()], axis=0)
    assert (between < within / 2).all()


def test_cocos_own_reader_reads_it_and_training_holds_no_novel_box(root):
    folder = root / "pocket" / "detection"
    for split, count in (("train", 60), ("val", 8), ("test", 12)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(folder / "annotations" / f"instances_{split}.json")
        assert len(truth.getImgIds()) == count
        assert [c["name"] for c in truth.loadCats(range(1, 17))] == [*pocket.CLASSES]
        seen = {row["category_id"] for row in truth.loadAnns(truth.getAnnIds())}
        assert (split == "train") == (not seen & {13, 14, 15, 16})
        shown = pocket.scenes(count, split, SEED)
        file = folder / split / truth.loadImgs(1)[0]["file_name"]
        assert np.array_equal(np.asarray(Image.open(file)), shown[0].image)


def test_the_projects_reader_reads_it(root):
    sets = reader.splits("pocket/detection", root)
    assert {split: len(part) for split, part in sets.items()} == {"train": 60, "val": 8, "test": 12}
    assert sets["test"].base == tuple(range(1, 13)) and sets["test"].novel == (13, 14, 15, 16)
    image, target = sets["test"][3]
    shown = pocket.scenes(12, "test", SEED)[3]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), shown.image)
    assert target.labels.tolist() == list(shown.labels)
    corners = np.concatenate([shown.boxes[:, :2], shown.boxes[:, :2] + shown.boxes[:, 2:]], 1)
    np.testing.assert_allclose(target.boxes.numpy(), corners, atol=0.011)
    assert not sets["train"].positives[:, 12:].any() and sets["test"].positives[:, 12:].any()
