"""TIP's images, in which degradation takes what the two prompts tell, and its study."""

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from companion.models.tip.degradations import BLIND, TEXTS, degrade, parse, prompt
from companion.toy.ablations import tip as study
from companion.toy.datasets import restoration, scenes
from companion.toy.encoders.words import WordText, split

SEED = 2


def stacked(found):
    return torch.from_numpy(np.stack([p.image for p in found])).permute(0, 3, 1, 2).float() / 255


def test_no_layout_is_in_two_splits_and_kind_and_contrast_are_drawn_independently():
    own = [set(map(repr, restoration.layouts(split))) for split in scenes.SPLITS]
    assert sum(map(len, own)) == len(set.union(*own)) == 216
    counts = Counter((p.kind, p.contrast) for p in restoration.pictures("train", 0, (1200, 0)))
    table = np.array([[counts[k, c] for c in restoration.CONTRASTS] for k in restoration.KINDS])
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert (abs(table - expected) < 4 * np.sqrt(expected)).all()


def test_kind_and_contrast_are_read_off_a_clean_scene_and_lost_by_degradation():
    found = restoration.pictures("test", 0, (400, 0))
    kinds, contrasts = tuple(p.kind for p in found), torch.tensor([p.contrast for p in found])
    seen = np.array(restoration.seen_kind(stacked(found))) == np.array(kinds)
    # where the halves meet is a step, which a very faint texture can be taken for
    assert seen[contrasts > 0.15].all() and seen.mean() > 0.9
    assert (restoration.seen_contrast(stacked(found), kinds) - contrasts * 2 / 3).abs().mean() < 0.02
    strong = [p for p in found if p.contrast == 1]
    kinds, clean = tuple(p.kind for p in strong), stacked(strong)
    heavy = torch.stack([degrade(x, restoration.HEAVY, i, edge=restoration.EDGE) for i, x in enumerate(clean)])
    assert restoration.seen_contrast(heavy, kinds).abs().mean() < 0.15
    blurred = torch.stack([degrade(x, restoration.MILD[0][1], i, edge=restoration.EDGE) for i, x in enumerate(clean)])
    assert 0.15 < restoration.seen_contrast(blurred, kinds).mean() * 1.5 < 0.7  # looks like a fainter one
    drawn = [restoration.RECIPE.draw(seed) for seed in range(100)]
    assert {len(ops) for ops in drawn} == {0, 1, 2, 3, 4} and all(parse(prompt(ops)) == ops for ops in drawn)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tip")
    caches = (study.part, study.tested, study.trained, study.validation_psnr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoration, "COUNTS", {"train": (20, 4), "val": (60, 2), "test": (60, 2)})
        for name, value in {"STEPS": 2, "BATCH": 8, "EACH": 9}.items():
            patch.setattr(study, name, value)
        study.prepare(path, SEED)
        for cached in caches:
            cached.cache_clear()
        yield str(path)
    for cached in caches:
        cached.cache_clear()


def test_all_networks_start_alike():
    built = {network: study.build(network, 3).adaptor.state_dict() for network in study.NETWORKS}
    for network, state in built.items():
        same = [torch.equal(t, built["TIP"][n]) for n, t in state.items() if "controlnet_" not in n or "cond" in n]
        assert all(same), network
    sizes = {network: sum(t.numel() for t in state.values()) for network, state in built.items()}
    assert sizes["TIP"] - sizes["plain ControlNet"] == 7872 and len(set(sizes.values())) == 2


def test_what_the_networks_read(root):
    given = {network: study.samples(network, study.part(root, SEED, "train"), SEED) for network in study.NETWORKS}
    texts = {network: ({s.semantic for s in found}, {s.restoration for s in found}) for network, found in given.items()}
    assert texts["no text"] == ({""}, {BLIND}) and texts["semantic only"][1] == {BLIND}
    assert texts["restoration only"][0] == {""} and BLIND in texts["restoration only"][1] != {BLIND}
    assert all(len(s.ops) == 4 for s in given["no skipping"]) and set(map(study.texts_of, study.METHODS)) <= set(TEXTS)
    for other in ("semantic only", "plain ControlNet"):  # the same images, degraded in the same way
        assert all(torch.equal(a.degraded, b.degraded) for a, b in zip(given["TIP"], given[other], strict=True))
    first, second = given["TIP"][0], given["TIP"][24]
    assert len(given["TIP"]) == 48 and torch.equal(first.clean, second.clean)
    assert not torch.equal(first.degraded, second.degraded)


def test_the_tasks(root):
    heavy, found = study.tested(root, SEED, "test", "heavy")
    assert {s.ops for s in heavy} == {restoration.HEAVY} and set(found.contrasts) == {1.0} and len(heavy) == 9
    mild, found = study.tested(root, SEED, "test", "mild")
    assert [(c, s.ops) for s, c in zip(mild, found.contrasts, strict=True)] == list(restoration.MILD) * 3
    drawn, found = study.tested(root, SEED, "test", "parameterised")
    assert all(found.kinds) and all(s.ops for s in drawn) and len({s.restoration for s in drawn}) > 3
    again = degrade(drawn[4].clean, parse(drawn[4].restoration), (SEED, 4), edge=restoration.EDGE)
    assert torch.equal(again, drawn[4].degraded), "its text and its seed rebuild it"


def test_scores_of_clean_and_of_wrong_images(root):
    found = study.part(root, SEED, "test").scenes(1.0)
    right = study.followed(found.images, found, found.captions)
    assert right == {"texture": 100.0, "follows the text": 100.0}
    other = [next(restoration.caption(k) for k in restoration.KINDS if k != kind) for kind in found.kinds]
    assert study.followed(found.images, found, other)["follows the text"] == 0
    images = study.part(root, SEED, "test").scenes().images
    assert study.layout_lead(images + 0.01, images) > 0 > study.layout_lead(images.roll(-1, 0) + 0.01, images)


def test_one_training_serves_all_prompts_and_selection_asks_validation_alone(root):
    row = study.train("TIP", "mild", 3e-3, SEED, root)
    blind = study.train("blind prompt", "mild", 3e-3, SEED, root)
    assert blind["loss"] == row["loss"] and "smallest rise" in row and "smallest rise" not in blind
    asked = ("TIP", "mild"), ("TIP", "heavy"), ("blind prompt", "mild")
    chosen = [study.train(*both, 3e-3, SEED, root, "select") for both in asked]
    assert chosen[0] == chosen[1] == chosen[2] and set(chosen[0]) == {"PSNR", "loss", "trained"}
    assert study.trained.cache_info().misses == 1


def test_words_are_repeated_and_digits_apart(tmp_path):
    rows, deblur = "a picture with rows", "Deblur with sigma 0.9"
    assert split("Deblur with sigma 3.05; Dejpeg!") == ["deblur", "with", "sigma", "3", ".", "0", "5", ";", "dejpeg"]
    bag = WordText.of([rows, deblur], width=8, length=10)
    assert bag.words("A zebra") == ["a", "<unknown>"] and bag.words("") == ["<empty>"]
    ids = bag.ids([rows, ""])
    assert ids.shape == (2, 10) and torch.equal(ids[0, :4], ids[0, 4:8]) and len(ids[1].unique()) == 1
    states = bag(ids)[0]
    assert torch.equal(states, bag.embedding.weight[ids]) and not any(p.requires_grad for p in bag.parameters())
    bag.save_pretrained(tmp_path)
    assert torch.equal(WordText.from_pretrained(tmp_path, low_cpu_mem_usage=False)(ids)[0], states)
