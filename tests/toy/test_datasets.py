"""All synthetic datasets: pinned by a hash, drawn from tiles of their own split."""

from contextlib import contextmanager

import numpy as np
import pytest
from skimage.color import rgb2hsv

from companion.toy import bat, dmt, dplq, hvit, metasegnet, promptpar, sa2vp, scenes, sic_cads, tip
from companion.toy.tokens import END, FIRST, START, UNKNOWN, Tokenizer
from tests.models.common import refuses

DRAWN = {
    "classification": lambda split: [next(sa2vp.examples(name, split))[0] for name in sa2vp.TASKS],
    "collage": lambda split: list(dmt.collages(6, split)[0]),
    "detection": lambda split: [each.image for each in sic_cads.scenes(4, split)],
    "domains": lambda split: [dplq.unlabelled(name, 4, split)[0] for name in dplq.DOMAINS],
    "landcover": lambda split: [image for image, _ in metasegnet.drawn("Am", 3, split)],
    "pedestrians": lambda split: [promptpar.people(4, split, "street")[0]],
    "textures": lambda split: [each.image for each in tip.pictures(split, 0, (0, 8))],
    "scenes": lambda split: [each.image for each in scenes.scenes(6, split)],
    "slides": lambda split: [each.image for each in hvit.slides(2, "place", split)],
    "videos": lambda split: [bat.Clip(bat.plan(split, 0), np.random.default_rng(0)).frame(0)],
}
ORIGINALS = {name: scenes.photograph(name) for name in scenes.PHOTOGRAPHS}


@contextmanager
def photographs(changed):
    """Other photographs for all datasets: `changed(name, pixels)` changes a copy in place."""
    caches = (scenes.photograph, dmt._photograph)
    with pytest.MonkeyPatch.context() as patch:
        for name, original in ORIGINALS.items():
            changed(name, pixels := original.copy())
            patch.setitem(scenes.PHOTOGRAPHS, name, scenes.Photograph(lambda pixels=pixels: pixels))
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_no_pixel_of_other_splits_tiles_shows_in_a_dataset(split):
    """With the photographs inverted there all images are the same, with their own tiles inverted none of them is."""
    tiles = {name: scenes.tiles(name, split) for name in ORIGINALS}

    def invert(name, pixels, own):
        inside = np.zeros(pixels.shape[:2], bool)
        for left, top, right, bottom in tiles[name]:
            inside[top:bottom, left:right] = True
        pixels[inside == own] ^= 255

    expected = {name: draw(split) for name, draw in DRAWN.items()}
    with photographs(lambda name, pixels: invert(name, pixels, own=False)):
        for name, draw in DRAWN.items():
            assert all(map(np.array_equal, draw(split), expected[name])), name
    with photographs(lambda name, pixels: invert(name, pixels, own=True)):
        for name, draw in DRAWN.items():
            assert not any(map(np.array_equal, draw(split), expected[name])), name


def test_every_pixel_of_a_photograph_belongs_to_one_split():
    for name, pixels in ORIGINALS.items():
        owners = np.zeros(pixels.shape[:2], int)
        for left, top, right, bottom in (tile for split in scenes.SPLITS for tile in scenes.tiles(name, split)):
            owners[top:bottom, left:right] += 1
        assert (owners == 1).all(), name


def test_a_scene_agrees_with_its_annotations():
    for scene in scenes.scenes(100, "train", seed=3):
        left, top, right, bottom = scene.box
        rows, columns = np.nonzero(scene.mask)
        assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (top, bottom, left, right)
        assert scenes.CLASSES[scene.label] == f"{scene.attributes['hue']} {scene.attributes['shape']}"
        assert all(word in scene.caption for word in scene.attributes.values())
        # the hue inside the mask is the named one; angles on the colour circle, so that red has no seam
        angles = rgb2hsv(scene.image)[..., 0][scene.mask] * 2 * np.pi
        quarter = np.angle(np.exp(1j * angles).mean()) / (np.pi / 2) % 4
        assert round(quarter) % 4 == scenes.HUES.index(scene.attributes["hue"])


def test_the_tokenizer_takes_what_open_clips_takes():
    tokenizer = Tokenizer()
    assert tokenizer("A Zebra!").tolist() == [[START, FIRST, UNKNOWN, END] + [0] * 12]
    assert tokenizer("red " * 40)[0, -1] == END and tokenizer(["a", "the"], context_length=5).shape == (2, 5)
    captions = [scene.caption for scene in scenes.scenes(50, "train")]
    assert (tokenizer(captions) != UNKNOWN).all() and [*map(tokenizer.decode, tokenizer(captions))] == captions


def test_what_cannot_be_drawn_or_read_is_refused():
    rng = np.random.default_rng(0)
    refuses((lambda: scenes.tiles("brick", "dev"), "dev"), (lambda: hvit.draw(rng, "place", 6, "train"), "6"))
