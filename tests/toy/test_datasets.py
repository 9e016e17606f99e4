"""All synthetic datasets: pinned by a hash, drawn from tiles of their own split, written once."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
from skimage.color import rgb2hsv

from companion.data import detection as detection_data
from companion.data import domains as domains_data
from companion.data import slides as slides_data
from companion.errors import MissingData
from companion.ops.files import read_json
from companion.toy import bat, dmt, promptpar, scenes, tip
from companion.toy.ablations import hvit
from companion.toy.datasets import chests, classification, detection, domains, landcover, slides, write_once
from companion.toy.tokens import END, FIRST, START, UNKNOWN, Tokenizer
from tests.models.common import refuses
from tests.small import pinned

SEED = 7
FEW = {"train": 5, "val": 3, "test": 4}


def task(name, split, root):
    return [x for pair in itertools.islice(classification.examples(name, split, SEED), FEW[split]) for x in pair]


def boxes(split, root):
    detection.write(root, SEED)
    return [x for image, target in detection_data.load("pocket/detection", root, split) for x in (image, *target)]


def domain(name, split, root):
    folder = domains.write(root, name, SEED)
    found = domains_data.own_folder(folder)[split]
    return [x for pair in found for x in pair] + [sorted(read_json(folder / "sensors.json").items())]


def graded(name, split, root):
    slides.write(root, name, SEED)
    items = slides_data.load(f"pocket/slides-{name}", root, slides.FILES[split])
    return [x for item in items for x in (*hvit.regions(item), item.grade)]


def part(module, split, root):
    module.write(root, SEED)
    return vars(module.read(root, split)).values()


# what a study reads of a split, and its hashes: train, val, test
READ = {
    "chests": (lambda *at: part(chests, *at), "7bfeef66d558 c36f829a4b53 baa98bb17b3e"),
    "detection": (boxes, "c77910d71d4a 3c27776c6d49 eca5d13b1310"),
    "digits": (lambda *at: task("digits", *at), "997975d4ab11 3651beff6be3 64f8baf1023f"),
    "landcover": (lambda *at: part(landcover, *at), "bc2298039507 489a8bcb31b1 37f247254cfd"),
    "medical": (lambda *at: domain("medical", *at), "8e6a04255f8d b0d29a03160f 59d0af475fb2"),
    "orient": (lambda *at: task("orient", *at), "db737721aa76 bc72c29ff5a1 81e0f21d980e"),
    "remote": (lambda *at: domain("remote", *at), "35916f45c5c2 e96f433a65c0 a475893ae935"),
    "slides, count": (lambda *at: graded("count", *at), "e4c25d25678f ec24ee95262e 0d279f88e2d4"),
    "slides, place": (lambda *at: graded("place", *at), "9bc4be78c6e6 e097140d4889 7582c7e1127c"),
    "textures": (lambda *at: task("textures", *at), "7c48b9254925 11425ec83811 6f82c2bf9924"),
    "where": (lambda *at: task("where", *at), "b3c18ee8b73b a8cd28570860 437cda50eb68"),
}


@pytest.fixture
def small(monkeypatch):
    for module in (chests, detection):
        monkeypatch.setattr(module, "COUNTS", FEW)
    monkeypatch.setattr(landcover, "COUNTS", dict.fromkeys(FEW, 1))  # of nine zones
    monkeypatch.setattr(slides, "COUNTS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(domains, "EACH", dict.fromkeys(FEW, 1))


@pytest.mark.parametrize("name", READ)
def test_what_a_study_reads_follows_the_seed_to_the_bit(name, small, tmp_path):
    read, expected = READ[name]
    assert " ".join(pinned(*read(split, tmp_path)) for split in FEW) == expected


DRAWN = {
    "classification": lambda split: [
        next(iter(classification.examples(name, split)))[0] for name in classification.TASKS
    ],
    "collage": lambda split: list(dmt.collages(6, split)[0]),
    "detection": lambda split: [each.image for each in detection.scenes(4, split)],
    "domains": lambda split: [domains.unlabelled(name, 4, split)[0] for name in domains.DOMAINS],
    "landcover": lambda split: [image for image, _ in landcover.pictures("Am", 3, split)],
    "pedestrians": lambda split: [promptpar.people(4, split, "street")[0]],
    "textures": lambda split: [each.image for each in tip.pictures(split, 0, (0, 8))],
    "scenes": lambda split: [each.image for each in scenes.scenes(6, split)],
    "slides": lambda split: [each.image for each in slides.slides(2, "place", split)],
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
def test_no_pixel_of_other_splits_tiles_shows_in_a_dataset(split, small):
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


def test_every_digit_is_in_one_split_only(monkeypatch):
    monkeypatch.setattr(classification, "_originals", lambda: (np.zeros((1797, 8, 8)), np.arange(1797)))
    drawn = [label for split in scenes.SPLITS for _, label in classification.examples("digits", split)]
    assert sorted(drawn) == list(range(1797))


def test_a_scene_agrees_with_its_annotations():
    for scene in scenes.scenes(100, "train", seed=3):
        left, top, right, bottom = scene.box
        rows, columns = np.nonzero(scene.mask)
        assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (top, bottom, left, right)
        assert scenes.CLASSES[scene.label] == f"{scene.attributes['hue']} {scene.attributes['shape']}"
        assert all(word in scene.caption for word in scene.attributes.values())
        (x, y), place = scene.centre, scene.attributes["place"]
        sides = [x < 32 / 3, x >= 64 / 3, y < 32 / 3, y >= 64 / 3]
        assert [side in place for side in ("left", "right", "top", "bottom")] == sides
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


def test_a_dataset_is_written_once_and_again_where_it_is_not_whole(tmp_path):
    calls, folder = [], tmp_path / "set"

    def write(version=1, stop=False):
        def fill(new):
            calls.append(version)
            (new / "1.png").write_bytes(b"pixels")
            if stop:
                raise KeyboardInterrupt
            return {"more": 3}

        return write_once(folder, {"version": version}, 2, fill)

    with pytest.raises(KeyboardInterrupt):
        write(stop=True)
    assert not list(tmp_path.iterdir())
    assert write() == write() == folder and calls == [1, 1]
    assert read_json(folder / "set.json") == {"version": 1, "more": 3}
    record, image = folder / "set.json", folder / "1.png"
    for number, damage in enumerate(
        (image.unlink, lambda: image.write_bytes(b""), record.unlink, lambda: record.write_text("{"))
    ):
        damage()
        write()
        assert len(calls) == 3 + number and image.read_bytes() == b"pixels"
    write(version=2)
    assert calls[-1] == 2 and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_cannot_be_drawn_or_read_is_refused(small, tmp_path):
    rng = np.random.default_rng(0)
    refuses(
        (lambda: scenes.tiles("brick", "dev"), "dev"),
        (lambda: slides.draw(rng, "place", 6, "train"), "6"),
        (lambda: classification.write(tmp_path, ["where", "colour"]), "colour"),
    )
    assert not list(tmp_path.iterdir())
    for module in (chests, landcover):
        refuses((lambda module=module: module.read(tmp_path, "train"), str(tmp_path)), error=MissingData)
