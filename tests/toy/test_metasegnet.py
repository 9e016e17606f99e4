"""MetaSegNet's land cover, whose looks depend on the zone, its study, and its attention by class."""

import itertools

import numpy as np
import pytest
import torch

from companion.evaluation.metrics import landcover as metrics
from companion.models.metasegnet.climate import Prompts, headless
from companion.models.metasegnet.text import Words
from companion.toy.ablations import SEEDS, study_root
from companion.toy.ablations import metasegnet as study
from companion.toy.datasets import landcover
from companion.toy.live import metasegnet as live

SEED = 1
FIELDS = ("bareland", "rangeland", "agriculture")


def test_every_zone_has_its_own_look_of_all_colours():
    looks = {zone: landcover.look(zone) for zone in landcover.ZONES}
    assert {(z.moisture, z.style) for z in landcover.ZONES.values()} == {*itertools.product(range(3), repeat=2)}
    assert len({tuple(look.values()) for look in looks.values()}) == 9
    for look in looks.values():
        assert {look[name] for name in FIELDS} == {"green", "red-brown", "straw"}
        assert [look[name] for name in ("tree", "road", "water")] == ["tree", "road", "water"]
    # the colour of bare land in the desert is rangeland's in a temperate zone and ripe crops' in a wet one
    where = [("BWh", "bareland"), ("Csa", "rangeland"), ("Aw", "agriculture")]
    assert {looks[zone][name] for zone, name in where} == {"straw"}


def test_the_layout_does_not_know_the_zone(monkeypatch):
    def layouts():
        return [labels for zone in ("BWh", "Aw") for _, labels in landcover.pictures(zone, 5, "val", 7)]

    before = layouts()
    monkeypatch.setattr(landcover, "FIELDS", landcover.FIELDS[::-1])
    monkeypatch.setattr(landcover, "TINTED", 1.0)
    assert all(map(np.array_equal, before, layouts()))
    # classes that swap colours have one surface
    owner = {name: photograph for photograph, names in landcover.SURFACES.items() for name in names}
    assert len({owner[name] for name in FIELDS}) == 1 and owner["building"] == owner["developed"]


def test_texts_describe_the_looks_and_a_wrong_one_differs_in_all_of_them():
    prompts, zones = Prompts.read(landcover.PROMPTS), landcover.ZONES
    sentences = {zone: prompts.zones[zone][1].split(". ") for zone in zones}
    for a, b in itertools.combinations(zones, 2):
        assert (sentences[a][:3] == sentences[b][:3]) == (zones[a].moisture == zones[b].moisture)
        assert (sentences[a][3:] == sentences[b][3:]) == (zones[a].style == zones[b].style)
    for code in zones:
        others = {word for zone in zones if zone != code for word in prompts.zones[zone][1].split()}
        assert {*prompts.zones[code][1].split()} <= others and len(prompts.text(code).split()) <= study.LENGTH
        first = landcover.other_zone(code)
        for other in (first, landcover.other_zone(code, avoid=first)):
            assert zones[code].moisture != zones[other].moisture and zones[code].style != zones[other].style
        assert landcover.other_zone(code, avoid=first) != first


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("land")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landcover, "COUNTS", {"train": 4, "val": 1, "test": 2})
        patch.setattr(study, "STEPS", 3)
        landcover.write(study_root(path, SEED), SEED)
        for cached in (study.part, study.trained):
            cached.cache_clear()
        yield str(path)
    study.part.cache_clear()
    study.trained.cache_clear()


def test_seeds_leave_out_different_zones():
    tested, chosen = ({study.left_out(seed) for seed in seeds} for seeds in (SEEDS, study.SELECTION_SEEDS))
    assert sorted(study.ORDER) == sorted(landcover.ZONES) and len(tested) == len(SEEDS) and not tested & chosen
    assert all({*study.seen(seed), study.left_out(seed)} == {*landcover.ZONES} for seed in range(9))


def test_networks_differ_in_their_texts_alone():
    built = {network: study.build(network, 3) for network in study.NETWORKS}
    first, words = built["unimodal"].state_dict(), built["MetaSegNet"].text.state_dict()
    for network, model in built.items():
        assert all(torch.equal(first[name], t) for name, t in model.state_dict().items() if name in first), network
    for network in ("no header dropout", "fusion at stage 1"):
        assert all(torch.equal(words[n], t) for n, t in built[network].text.state_dict().items())
    stages = {network: sorted(map(int, model.fusions)) for network, model in built.items()}
    assert stages["MetaSegNet"] == [1, 2, 3, 4] and stages["fusion at stages 3 and 4"] == [3, 4]
    assert stages["fusion at stage 4"] == [4] and built["unimodal"].text is None


def test_a_word_of_the_zone_left_out_alone_is_unknown_and_wrong_texts_are_of_other_zones():
    zones, seed = tuple(landcover.ZONES), study.ORDER.index("Csa")
    said = study.build("MetaSegNet", seed).text.words(study.prompts().text("Csa"))
    assert said[2:4] == [Words.UNKNOWN] * 2 and Words.UNKNOWN not in said[7:]  # code and name; the description
    right = study.texts(zones, "full", seed)
    known = dict(zip(right, zones, strict=True))
    for code, text in zip(zones, study.texts(zones, "wrong", seed), strict=True):
        given = landcover.ZONES[known[text]]
        assert given.moisture != landcover.ZONES[code].moisture and given.style != landcover.ZONES[code].style
        assert known[text] != "Csa"
    assert set(study.texts(zones, "empty", seed)) == {""}
    assert sorted(study.texts(zones, "shuffled", seed)) == sorted(right)


def test_header_dropout_hides_half_of_the_heads(root, monkeypatch):
    model = study.build("MetaSegNet", SEED)
    data = study.part(root, SEED, "train").of(study.seen(SEED))
    headers = [headless(text) for text in study.prompts().texts(data.zones)]
    seen, hidden = [], set(map(tuple, model.text.ids(headers).tolist()))
    loss = type(model).loss

    def spy(self, images, texts, labels):
        seen.extend(tuple(row) in hidden for row in texts.tolist())
        return loss(self, images, texts, labels)

    monkeypatch.setattr(type(model), "loss", spy)
    study.train_model("MetaSegNet", model, data, 1e-3, SEED, steps=4)
    assert len(seen) == 64 and 0.25 < sum(seen) / len(seen) < 0.75
    seen.clear()
    study.train_model("no header dropout", study.build("no header dropout", SEED), data, 1e-3, SEED)
    assert seen and not any(seen)


def test_rows_score_the_right_images_and_selection_none_of_the_zone_left_out(root):
    seen = study.train("MetaSegNet", "seen", 1e-3, SEED, root)
    left = study.train("MetaSegNet", "left out", 1e-3, SEED, root)
    wrong = study.train("wrong zone's text", "seen", 1e-3, SEED, root)
    assert study.trained.cache_info().currsize == 1  # one training serves all three
    matrices, _ = study.trained("MetaSegNet", 1e-3, root, SEED, "test")
    assert {int(matrix.sum()) for matrix in matrices.values()} == {2 * 64 * 64}
    zone = study.left_out(SEED)
    assert left["mIoU"] == round(metrics.scores(matrices["right", zone]).miou, 2) and f"mIoU {zone}" not in seen
    total = sum(matrices["wrong zone's text", z] for z in study.seen(SEED))
    assert wrong["mIoU"] == round(metrics.scores(total).miou, 2) and seen["loss"] == left["loss"] == wrong["loss"]
    # by hand, on the images themselves
    model = study.build("MetaSegNet", SEED)
    data = study.part(root, SEED, "test").of(study.seen(SEED))
    study.train_model("MetaSegNet", model, study.part(root, SEED, "train").of(study.seen(SEED)), 1e-3, SEED)
    said = study.predict(model, data.images, study.prompts().texts(data.zones))
    assert seen["OA"] == pytest.approx(100 * float((said == data.labels).float().mean()), abs=0.05)
    asked = [("MetaSegNet", "seen"), ("MetaSegNet", "left out"), ("wrong zone's text", "left out")]
    chosen = [study.train(*job, 1e-3, SEED, root, "select") for job in asked]
    assert chosen[0] == chosen[1] == chosen[2]


def test_attention_by_class_is_the_mean_over_the_pixels_of_the_class(root):
    model, test = study.build("MetaSegNet", SEED).eval(), study.part(root, SEED, "test")
    words, table = live.attention_by_class(model, test, "Am")
    assert words[:2] == ["climate", "zone"] and np.allclose(table.sum(1), 100, atol=1e-3)
    own = [i for i, zone in enumerate(test.zones) if zone == "Am"]
    _, attention = live.attended(model, test, own)
    road = (test.labels[own] == 3).nonzero().tolist()
    total = sum(attention[1][k, y // 4, x // 4] for k, y, x in road)
    assert np.allclose(table[3], 100 * total / len(road), atol=1e-3)
