"""The pocket collages: images match the list, grey hides colour, splits are disjoint; reading."""

import shutil

import numpy as np
import pytest
import torch

from companion.data.classification import image_folder
from companion.errors import BadParameter, CorruptFile, MissingData
from companion.models.dmt.model import grey
from companion.toy.datasets import collage
from tests.data.conftest import refused

SEED = 7


def draw(shape=0, hue=0, quadrant=0, seed=0):
    return collage.collage(np.random.default_rng(seed), "train", (1, shape, hue, quadrant)).image.astype(float) / 255


def test_all_factors_are_drawn_evenly_and_apart():
    drawn = np.array([c.factors for c in collage.collages(800, "train", SEED)])
    for i, (name, count) in enumerate(collage.FACTORS.items()):
        shares = np.bincount(drawn[:, i], minlength=count) / len(drawn)
        assert abs(shares - 1 / count).max() < 0.06, name
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.12


def test_a_tint_leaves_the_luma_alone():
    colours = collage.tint(np.linspace(0, 1, 50), 0.6)
    assert np.allclose(colours @ collage.LUMA, 1) and colours.std(0).min() > 0.1
    assert np.allclose(collage.tint(0.3, 0.0), 1)


def test_grey_hides_the_hue_and_the_square_but_not_the_shape():
    def as_grey(**factors):
        pixels = torch.from_numpy(draw(**factors)).permute(2, 0, 1)[None]
        return grey(pixels)[0, 0].numpy()

    first = as_grey()
    # what is left of the colours is what rounding and clipping do to them
    for other in ({"hue": 4}, {"quadrant": 3}):
        assert abs(first - as_grey(**other)).mean() < 0.001
        assert abs(draw() - draw(**other)).mean() > 0.02
    assert abs(first - as_grey(shape=1)).mean() > 0.003


def test_the_square_lies_in_its_quadrant_and_the_object_has_its_hue():
    for quadrant in range(4):
        drawn = [[draw(quadrant=(quadrant + i) % 4, seed=s) for s in range(20)] for i in (0, 1)]
        mean = np.mean(np.subtract(*drawn), 0)
        red = (mean[..., 0] - mean[..., 1]).reshape(2, 16, 2, 16).mean((1, 3))
        assert red.argmax() == quadrant
    middle = [np.array([draw(0, hue, seed=s)[14:18, 14:18].mean((0, 1)) for s in range(12)]) for hue in (0, 4)]
    assert (middle[0][:, 0] - middle[0][:, 1]).min() > 0 > (middle[1][:, 0] - middle[1][:, 1]).max()


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setattr(collage, "COUNTS", {"train": 40, "val": 40, "test": 40})
    monkeypatch.setattr(collage, "TEXTURES", ("brick", "page"))
    monkeypatch.setitem(collage.FACTORS, "texture", 2)
    collage.write(tmp_path, SEED)
    return tmp_path


def test_it_is_read_in_the_order_drawn_with_the_pixels_drawn(few):
    for split in collage.SPLITS:
        part, drawn = collage.read(few, split), collage.collages(40, split, SEED)
        assert part.factors.tolist() == [list(c.factors) for c in drawn]
        pixels = ((part.images + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, np.stack([c.image for c in drawn]))
    sets = image_folder(few / "pocket" / "collage")
    assert sets["train"].class_names == ("brick", "page") and len(sets["test"]) == 40


def test_bad_input_says_what_and_where(few, tmp_path):
    refused(BadParameter, "train", collage.read, few, "all")
    refused(MissingData, r"factors\.csv", collage.read, tmp_path / "nowhere", "train")
    folder = few / "pocket" / "collage"
    listing = folder / "factors.csv"
    whole = listing.read_text()
    for text, words in ((whole.replace(",hue", ",tone", 1), "factors"), (whole[: len(whole) // 2], "images of")):
        listing.write_text(text)
        refused(CorruptFile, words, collage.read, few, "test")
    listing.write_text(whole)
    picture = next(folder.glob("train/*/*.png"))
    picture.write_bytes(picture.read_bytes()[:60])
    refused(CorruptFile, picture.name, collage.read, few, "train")
    shutil.rmtree(folder / "val")
    refused(CorruptFile, r"factors\.csv", collage.read, few, "val")
