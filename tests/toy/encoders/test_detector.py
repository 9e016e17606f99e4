"""The pocket CLIP of scenes and the pocket detector: shipped weights match their model cards, training learns, no box
is removed."""

import pytest
import torch
import yaml
from torch.nn import functional as F
from torchvision.ops import box_iou

from companion.errors import BadCheckpoint, BadParameter
from companion.toy import encoders
from companion.toy.datasets.detection import BASE, CLASSES, NOVEL, scenes
from companion.toy.datasets.tokens import UNKNOWN
from companion.toy.encoders import detector as pocket


@pytest.fixture(scope="module")
def clip():
    return pocket.clip()


@pytest.fixture(scope="module")
def detector():
    return pocket.detector()


@pytest.mark.parametrize("name", [pocket.CLIP, pocket.DETECTOR])
def test_what_ships_is_as_good_as_its_card_says(name, clip, detector):
    card, model = encoders.read_card(name), clip if name == pocket.CLIP else detector
    assert not model.training and sum(p.numel() for p in model.parameters()) == card["parameters"]
    found = (pocket.measure_clip if name == pocket.CLIP else pocket.measure_detector)(model, 200, seed=7)
    assert found == pytest.approx(card["quality"], abs=9)
    if name == pocket.CLIP:
        assert found["novel"] > 3 * found["chance novel"] and found["base"] > 3 * found["chance base"]
    else:
        assert found["base found"] > 95 and found["novel found"] > 95
        assert found["base classified correctly"] > found["novel classified correctly"] + 10
        assert found["novel classified as the similar base class"] > 5


def test_its_texts_are_the_names_in_the_prompt_of_the_code(clip):
    read, table = pocket.tokenizer(), pocket.texts(clip)
    assert table.shape == (16, 64)
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(16))
    ids = read(["There is a apple", "There is a zebra", "apple"])
    assert (ids[:2] == UNKNOWN).sum(1).tolist() == [3, 4]
    with torch.no_grad():
        # unknown words are ignored, and order has no effect
        said = clip.encode_text(read(["There is a apple", "apple", "moon apple", "apple moon"]))
    torch.testing.assert_close(said[0], said[1])
    torch.testing.assert_close(said[2], said[3])
    assert list(pocket.WORDS) == list(CLASSES)


def test_a_novel_thing_is_told_by_its_place(clip):
    """The cosine of a whole image with the right novel class is above that with the base class it looks like."""
    drawn = [s for s in scenes(300, "test", 3) if sum(label in NOVEL for label in s.labels) == 1]
    table = pocket.texts(clip)
    with torch.no_grad():
        cosine = clip.encode_image(pocket.stack(drawn), normalize=True) @ table.T
    right = []
    for row, shown in zip(cosine, drawn, strict=True):
        label = next(label for label in shown.labels if label in NOVEL)
        like = CLASSES.index(pocket.THINGS[label].like)
        if like not in shown.labels:
            right.append(bool(row[label] > row[like]))
    assert len(right) > 50 and sum(right) > 0.9 * len(right)


def test_equal_names_in_a_batch_are_all_right_answers(clip):
    torch.manual_seed(0)
    images, there = pocket.stack(scenes(4, "val", 0)), torch.zeros(4, 16)
    there[:, 3] = 1
    with torch.no_grad():
        value = pocket.contrast(clip, (images, there))
        text = clip.encode_text(pocket.tokenizer()(["lamp"] * 4), normalize=True)
        logits = clip.logit_scale.exp().clamp(max=100) * clip.encode_image(images, normalize=True) @ text.T
        target = torch.full((4, 4), 0.25)
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_all_boxes_have_all_classes(detector, clip):
    """No box is removed by its score, for any vocabulary; equal images give the same in any batch."""
    images, text = pocket.stack(scenes(5, "val", 0)), pocket.texts(clip)
    boxes, said = detector(images, text)
    assert boxes.shape == (5, pocket.PROPOSALS, 4) and said.shape == (5, pocket.PROPOSALS, 16)
    assert (boxes >= 0).all() and (boxes <= 64).all() and ((said > 0) & (said < 1)).all()
    one, alone = detector(images[2:3], text[:3])
    torch.testing.assert_close(one[0], boxes[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(alone[0], said[2, :, :3], atol=1e-4, rtol=0)
    # an untrained head still gives as many
    assert pocket.detector("random")(images, text)[0].shape == boxes.shape
    true, labels = pocket.boxes_of(scenes(5, "val", 0))
    assert all(box_iou(t[k >= 0], b).max(1).values.min() > 0.5 for t, k, b in zip(true, labels, boxes, strict=True))


def test_a_short_training_learns_and_follows_the_seed(monkeypatch, clip):
    losses, fit = [], pocket.fit_steps
    monkeypatch.setattr(pocket, "fit_steps", lambda *args, **options: losses.append(fit(*args, **options)))
    pocket.train_clip(128, 12)
    pocket.train_detector(64, 12, 0, clip)
    assert len(losses) == 2
    for history in losses:
        values = [row["loss"] for row in history]
        assert len(values) == 12 and sum(values[-3:]) < 0.95 * sum(values[:3])
    one, again, other = (pocket.train_clip(64, 2, seed) for seed in (0, 0, 1))
    found = [pocket.train_detector(64, 2, seed, clip) for seed in (0, 0, 1)]
    images, text = pocket.stack(scenes(2, "val", 0)), pocket.texts(clip)
    with torch.no_grad():
        seen = [model.encode_image(images) for model in (one, again, other)]
        boxes = [model(images, text)[1] for model in found]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(boxes[0], boxes[1]) and not torch.equal(boxes[0], boxes[2])


def test_the_detector_learns_from_base_things_alone():
    drawn = scenes(40, "train", pocket._own(0), novel=False)
    _, labels = pocket.boxes_of(drawn)
    assert set(labels[labels >= 0].tolist()) <= set(BASE)


def test_what_is_shipped_loads_and_its_card_describes_it(tmp_path, monkeypatch, clip):
    short = {"pictures": 64, "steps": 2}
    monkeypatch.setattr(pocket.train_clip, "__defaults__", (*short.values(), 0))
    monkeypatch.setattr(pocket.train_detector, "__defaults__", (*short.values(), 0, clip))
    for name in ("measure_clip", "measure_detector"):
        monkeypatch.setattr(getattr(pocket, name), "__defaults__", (30, 1, *([None] * (name == "measure_detector"))))
    for name, load in ((pocket.CLIP, pocket.clip), (pocket.DETECTOR, pocket.detector)):
        path = pocket.ship(name, tmp_path)
        head = yaml.safe_load(path.with_suffix(".md").read_text(encoding="utf-8").split("---")[1])
        assert head["bytes"] == path.stat().st_size and head["recipe"]["seed"] == 0 and head["quality"]
        trained = load(path)
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "WEIGHTS", tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(load().parameters(), trained.parameters(), strict=True))


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(BadParameter, match="random"):
        pocket.clip(tmp_path / "none.safetensors")
    with pytest.raises(BadCheckpoint):
        pocket.clip(encoders.WEIGHTS / f"{pocket.DETECTOR}.safetensors")
    with pytest.raises(BadParameter, match="pocket_ov_detector"):
        pocket.ship("pocket_clip")
