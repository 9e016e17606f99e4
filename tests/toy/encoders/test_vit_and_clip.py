"""The pocket world, its tasks on disk, and the training of the pocket backbones."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import classification as reader
from companion.errors import BadParameter
from companion.toy import encoders
from companion.toy.datasets import classification, scenes
from companion.toy.datasets.tokens import END, FIRST, START, UNKNOWN, WORDS, Tokenizer
from companion.toy.encoders import vit_and_clip as pocket


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    classification.write(root)
    return root


# --- cuts and scenes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scenes.PHOTOGRAPHS)
def test_every_pixel_of_a_photograph_belongs_to_one_split(name):
    owners = np.zeros(scenes.photograph(name).shape[:2], int)
    for split in scenes.SPLITS:
        for left, top, right, bottom in scenes.tiles(name, split):
            owners[top:bottom, left:right] += 1
    assert (owners == 1).all()


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_lies_in_other_splits_tiles_never_shows_in_a_cut(split, monkeypatch):
    """Paint the tiles of one split white on black photographs: its cuts are white throughout, all others black."""
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
    for scene in scenes.scenes(300, "train", seed=3):
        left, top, right, bottom = scene.box
        assert scene.image.shape == (32, 32, 3) and scene.image.dtype == np.uint8
        inside = np.zeros_like(scene.mask)
        inside[top:bottom, left:right] = True
        assert scene.mask.any() and not (scene.mask & ~inside).any()
        assert scene.mask[top].any() and scene.mask[bottom - 1].any()
        assert scene.mask[:, left].any() and scene.mask[:, right - 1].any()
        assert scenes.CLASSES[scene.label] == f"{scene.attributes['hue']} {scene.attributes['shape']}"
        assert all(word in scene.caption for word in scene.attributes.values())
        assert scenes.PLACES[scenes.cell(*scene.centre)] == scene.attributes["place"]


def test_the_object_is_where_the_mask_says():
    """The hue inside the mask is the named one; angles on the colour circle, so that red has no seam."""
    from skimage.color import rgb2hsv

    for scene in scenes.scenes(100, "val"):
        angles = rgb2hsv(scene.image)[..., 0][scene.mask] * 2 * np.pi
        mean = np.angle(np.exp(1j * angles).mean()) / (2 * np.pi) % 1
        assert round(mean * 4) % 4 == scenes.HUES.index(scene.attributes["hue"])


def test_scenes_follow_the_seed():
    first, again, other = scenes.scenes(5, "train", 0), scenes.scenes(5, "train", 0), scenes.scenes(5, "train", 1)
    assert all(np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda: scenes.photograph("lenna"),
        lambda: scenes.tiles("brick", "dev"),
        lambda: scenes.scenes(1, "dev"),
        lambda: scenes.scene(np.random.default_rng(0), "train", shape="star"),
        lambda: scenes.scene(np.random.default_rng(0), "train", hue="blue"),
        lambda: classification.examples("colour", "train"),
        lambda: classification.examples("where", "dev"),
        lambda: pocket.ship("pocket_swin"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(call):
    with pytest.raises(BadParameter, match="Accepted"):
        call()


# --- tasks on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", classification.TASKS)
def test_the_vtab_reader_reads_the_tasks(written, task):
    for split, size in {"train": 800, "val": 200, "trainval": 1000}.items():
        images = reader.load(f"pocket/{task}", written, split)
        assert len(images) == size
    test = reader.load(f"pocket/{task}", written, "test")
    assert len(test) == classification.TASKS[task].test
    labels = [int(line.split(" ")[1]) for line in (written / "pocket" / task / "test.txt").read_text().splitlines()]
    assert set(labels) == set(range(len(classification.TASKS[task].classes)))
    with Image.open(written / "pocket" / task / "images/test/0000.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        first = next(iter(classification.examples(task, "test")))
        assert np.array_equal(np.asarray(image), first[0]) and labels[0] == first[1]


def test_no_picture_is_in_two_splits(written):
    for task in classification.TASKS:
        seen = {}
        for split in scenes.SPLITS:
            for path in (written / "pocket" / task / "images" / split).iterdir():
                assert seen.setdefault(path.read_bytes(), split) == split


def test_every_digit_is_in_one_split_only(monkeypatch):
    """On originals that are flat at a level of their own, count which originals each split drew."""
    images, labels = np.zeros((1797, 8, 8)), np.arange(1797)
    monkeypatch.setattr(classification, "_originals", lambda: (images, labels))
    drawn = {split: [label for _, label in classification.examples("digits", split)] for split in scenes.SPLITS}
    assert sorted(itertools.chain(*drawn.values())) == list(range(1797))


def test_a_finished_task_is_left_alone(tmp_path):
    (folder,) = classification.write(tmp_path, ["textures"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    classification.write(tmp_path, ["textures"])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "images/test/0007.png").unlink(),
        lambda folder: (folder / "images/test/0007.png").write_bytes(b""),
        lambda folder: (folder / "val200.txt").unlink(),
        lambda folder: (folder / "test.txt").write_text("images/test/0000.png 1\n"),
        lambda folder: (folder / "task.json").unlink(),
        lambda folder: (folder / "task.json").write_text("{"),
    ],
)
def test_a_half_written_task_is_made_anew(written, tmp_path, damage):
    folder = tmp_path / "pocket" / "textures"
    shutil.copytree(written / "pocket" / "textures", folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    damage(folder)
    classification.write(tmp_path, ["textures"])
    assert before == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in folder.parent.iterdir()] == ["textures"]  # nothing temporary is left


def test_another_seed_makes_another_task(tmp_path):
    (folder,) = classification.write(tmp_path, ["textures"], seed=0)
    before = (folder / "images/test/0000.png").read_bytes()
    classification.write(tmp_path, ["textures"], seed=1)
    assert before != (folder / "images/test/0000.png").read_bytes()


def test_an_unknown_task_writes_nothing(tmp_path):
    with pytest.raises(BadParameter, match="where"):
        classification.write(tmp_path, ["where", "colour"])
    assert not list(tmp_path.iterdir())


# --- tokens -----------------------------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_pocket_vit_learns():
    """Remade at a twentieth of its length it names the object well above chance (0.06) on tiles that it never saw."""
    model = pocket.train_vit(images=2000, steps=80)
    accuracy = pocket.source_accuracy(model, 500)
    assert accuracy > 0.14, accuracy  # 7 standard errors above chance; about 0.23 is usual


def test_training_follows_the_seed():
    models = [pocket.train_vit(images=64, steps=3, seed=seed) for seed in (0, 0, 1)]
    same, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(same, again) and not torch.equal(same, other)


def test_a_few_steps_of_the_pocket_clip_lower_its_loss():
    """The own caption of a training scene comes nearer to the top of 64 than chance puts it."""
    model = pocket.train_clip(images=256, steps=25)
    world = scenes.scenes(64, "train", 0)
    with torch.inference_mode():
        image, text, _ = model(pocket.pixels([s.image for s in world]), Tokenizer()([s.caption for s in world]))
    rank = ((image @ text.T) > (image * text).sum(-1, keepdim=True)).sum(-1).float().mean()
    assert rank < 20, rank  # 31.5 by chance


def test_the_clips_image_tower_starts_as_the_pocket_vit():
    vit, clip = encoders.build("pocket_vit"), encoders.build("pocket_clip", "random")
    clip.visual.load_state_dict(pocket.image_tower_from(vit) | {"proj": clip.visual.proj})
    images = pocket.pixels([s.image for s in scenes.scenes(4, "val")])
    with torch.inference_mode():
        torch.testing.assert_close(clip.visual(images), vit(images) @ clip.visual.proj, atol=1e-3, rtol=1e-3)
