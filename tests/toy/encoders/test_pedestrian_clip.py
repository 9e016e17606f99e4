"""The pocket CLIP of pedestrians: the shipped weights have the quality of their model card, its training learns."""

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from companion.toy import encoders
from companion.toy.datasets.pedestrians import ATTRIBUTES, SENTENCES, people
from companion.toy.datasets.tokens import UNKNOWN
from companion.toy.encoders import pedestrian_clip as pocket
from companion.toy.encoders.vit_and_clip import pixels


def test_the_shipped_clip_is_as_good_as_its_card_says():
    card, model = encoders.read_card(pocket.NAME), encoders.build(pocket.NAME)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    found = pocket.measure(model, 500, seed=7)
    for camera, quality in card["quality"].items():
        for name, value in quality.items():
            assert found[camera][name] == pytest.approx(value, abs=0.07)
        assert np.mean(list(found[camera].values())) == pytest.approx(np.mean(list(quality.values())), abs=0.02)
    # there is something to adapt to: it has not seen the street camera
    assert np.mean(list(found["clear"].values())) > np.mean(list(found["street"].values())) + 0.05
    assert min(found["clear"].values()) > 0.6


def test_it_tells_apart_what_differs_in_height_alone():
    """Among sentences about one colour, the right one is nearest more often than by chance."""
    model = encoders.build(pocket.NAME)
    images, persons = people(300, "test", "clear", 11)
    asked = ["red top", "red trousers", "red shoes"]
    chosen = [i for i, p in enumerate(persons) if sum(p.labels[ATTRIBUTES.index(name)] for name in asked) == 1]
    truth = torch.tensor([[persons[i].labels[ATTRIBUTES.index(name)] for name in asked] for i in chosen])
    with torch.inference_mode():
        text = model.encode_text(pocket.tokenizer()([SENTENCES[name] for name in asked]), normalize=True)
        cosine = model.encode_image(pixels(images[chosen]), normalize=True) @ text.T
    assert len(chosen) > 60 and (cosine.argmax(1) == truth.argmax(1)).float().mean() > 0.6


def test_its_words_are_ids_in_the_order_of_the_weights():
    read = pocket.tokenizer()
    ids = read(["a pedestrian with a hat", "a pedestrian with a zebra"])
    assert ids.shape == (2, 24) and (ids[0] != UNKNOWN).all() and (ids[1] == UNKNOWN).sum() == 1
    assert len(set(pocket.WORDS)) == len(pocket.WORDS) == 23
    assert encoders.build(pocket.NAME).token_embedding.num_embeddings > int(read([" ".join(pocket.WORDS)]).max())


def test_equal_sentences_in_a_batch_are_all_right_answers():
    torch.manual_seed(0)
    clip = encoders.build(pocket.NAME)
    images = pixels(people(4, "val", "clear", 0)[0])
    sentences = pocket.tokenizer()(["a pedestrian with a hat"] * 4)[:, None]
    # one distinct sentence: every image's target is uniform, and the loss at least the logarithm of the batch
    with torch.no_grad():
        value = pocket.contrast(clip, (images, sentences))
        image = clip.encode_image(images, normalize=True)
        logits = clip.logit_scale.exp() * image @ clip.encode_text(sentences[:, 0], normalize=True).T
        target = torch.full((4, 4), 0.25)
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-5) and float(value) >= np.log(4) - 1e-4


def test_a_short_training_learns_and_follows_the_seed(monkeypatch):
    losses, fit = [], pocket.fit_steps
    monkeypatch.setattr(pocket, "fit_steps", lambda *args, **options: losses.append(fit(*args, **options)))
    pocket.train(256, 40, 1)
    classifying = [row["loss"] for row in losses[0]]
    assert len(classifying) == 40 and len(losses[1]) == 1
    assert np.mean(classifying[-8:]) < 0.95 * np.mean(classifying[:8])
    one, again, other = (pocket.train(128, 2, 2, seed) for seed in (0, 0, 1))
    images = pixels(people(2, "val", "clear", 0)[0])
    with torch.inference_mode():
        found = [model.encode_image(images) for model in (one, again, other)]
    assert not one.training and torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_is_shipped_loads_and_its_card_describes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket.train, "__defaults__", (128, 2, 2, 0))
    monkeypatch.setattr(pocket.measure, "__defaults__", (60, 1))
    path = pocket.ship(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{pocket.NAME}.md", f"{pocket.NAME}.safetensors"]
    head = yaml.safe_load(path.with_suffix(".md").read_text(encoding="utf-8").split("---")[1])
    assert head["bytes"] == path.stat().st_size and set(head["quality"]["street"]) == set(ATTRIBUTES)
    monkeypatch.setattr(encoders, "WEIGHTS", tmp_path)
    assert encoders.build(pocket.NAME).visual.output_dim == encoders.build(pocket.NAME, "random").visual.output_dim
