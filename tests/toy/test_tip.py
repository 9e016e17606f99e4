"""TIP's images, in which degradation takes what the two prompts tell, and its study."""

import pytest
import torch

pytest.importorskip("diffusers")

from companion.models.tip.degradations import BLIND, degrade, parse
from companion.models.tip.recipe import TEXTS
from companion.toy import scenes
from companion.toy import tip as toy
from companion.toy.encoders.words import WordText, split
from tests.toy.common import pinned

SEED = 2


def stacked(found):
    return torch.stack([toy.to_tensor(p.image) for p in found])


def test_what_the_study_reads_follows_the_seed_to_the_bit():
    hashes = []
    for name, counts in {"train": (6, 4), "val": (4, 2), "test": (4, 2)}.items():
        found = toy.pictures(name, 7, counts)
        hashes.append(pinned(stacked(found), *(tuple(p[i] for p in found) for i in (1, 2, 3))))
    assert hashes == ["6b1a7aa8f784", "5cb945100d7d", "15f05e39caf6"]


@pytest.fixture(scope="module")
def few():
    caches = toy.data, toy.learnt, toy.adaptor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "COUNTS", {"train": (20, 4), "val": (60, 2), "test": (60, 2)})
        for name, value in {"STEPS": 1, "BATCH": 8, "EACH": 9}.items():
            patch.setattr(toy, name, value)
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def test_what_the_methods_read(few):
    given = {method: toy.samples(method, toy.learnt(SEED), SEED) for method in toy.METHODS[:4]}
    texts = {method: ({s.semantic for s in found}, {s.restoration for s in found}) for method, found in given.items()}
    assert texts["semantic only"][1] == {BLIND} and len(texts["semantic only"][0]) > 2
    assert texts["restoration only"][0] == {""} and BLIND in texts["restoration only"][1] != {BLIND}
    for found in given.values():  # the same images, degraded in the same way
        assert all(torch.equal(a.degraded, b.degraded) for a, b in zip(given["TIP"], found, strict=True))
    first, second = given["TIP"][0], given["TIP"][24]
    assert len(given["TIP"]) == 48 and torch.equal(first.clean, second.clean)
    assert not torch.equal(first.degraded, second.degraded)


def test_the_tasks(few):
    heavy, _, _ = toy.tested("heavy", SEED, "test")
    assert {s.ops for s in heavy} == {toy.HEAVY} and len(heavy) == 9
    assert [s.ops for s in toy.tested("mild", SEED, "test")[0]] == [ops for _, ops in toy.MILD] * 3
    drawn, kinds, _ = toy.tested("parameterised", SEED, "test")
    assert all(kinds) and all(s.ops for s in drawn)
    again = degrade(drawn[4].clean, parse(drawn[4].restoration), (SEED, 4), edge=toy.EDGE)
    assert torch.equal(again, drawn[4].degraded), "its text and its seed rebuild it"


def test_one_training_serves_all_tasks_and_prompts(few):
    rows = {method: toy.STUDY.row("test", "mild", method, 3e-3, SEED) for method in toy.METHODS}
    walked = {method for method, row in rows.items() if "smallest rise" in row}
    assert walked == {"TIP", "plain ControlNet"} and toy.adaptor.cache_info().misses == 4
    assert rows["blind prompt"]["loss"] == rows["TIP"]["loss"] and rows["degraded image"]["trained"] == 0
    assert rows["TIP"]["trained"] - rows["plain ControlNet"]["trained"] == 7872
    chosen = [toy.STUDY.row("select", *both, 3e-3, SEED) for both in (("mild", "TIP"), ("heavy", "blind prompt"))]
    assert chosen[0]["PSNR"] == chosen[1]["PSNR"] and "SSIM" not in chosen[0]
    assert toy.Restorer(None)(toy.tested("heavy", SEED, "test")).shape == (9, 3, 16, 16)
    assert {toy.train(method, "heavy", toy.learnt(SEED), 3e-3, SEED)[0].kind for method in toy.METHODS} <= {*TEXTS}


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


def test_no_layout_is_in_two_splits():
    own = [set(toy.layouts(split)) for split in scenes.SPLITS]
    assert sum(map(len, own)) == len(set.union(*own)) == 216
