"""MetaSegNet's study: inputs of the networks, equal initial weights, and that each score is of the right images."""

import pytest
import torch

from companion.evaluation.metrics import landcover as metrics
from companion.models.metasegnet import recipe
from companion.models.metasegnet.text import Words, headless
from companion.toy.ablations import SEEDS, study_root
from companion.toy.ablations import metasegnet as study
from companion.toy.datasets import landcover
from companion.toy.live import metasegnet as live
from tests.conftest import parameters

SEED = 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("land")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landcover, "COUNTS", {"train": 4, "val": 2, "test": 3})
        patch.setattr(study, "STEPS", 3)
        landcover.write(study_root(path, SEED), SEED)
        yield str(path)
    study.part.cache_clear()
    study.trained.cache_clear()


def test_seeds_leave_out_different_zones():
    assert sorted(study.ORDER) == sorted(landcover.ZONES)
    tested = {study.left_out(seed) for seed in SEEDS}
    assert len(tested) == len(SEEDS) and not tested & {study.left_out(seed) for seed in study.SELECTION_SEEDS}
    for seed in range(9):
        assert len(study.seen(seed)) == 8 and study.left_out(seed) not in study.seen(seed)


def test_all_networks_start_from_the_same_encoder_and_decoder():
    first = study.build("unimodal", 3).state_dict()
    for network in study.NETWORKS:
        other = study.build(network, 3)
        assert all(torch.equal(first[name], t) for name, t in other.state_dict().items() if name in first), network
    words = study.build("MetaSegNet", 3).text.state_dict()
    for network in ("no header dropout", "fusion at stage 1"):
        other = study.build(network, 3).text.state_dict()
        assert all(torch.equal(words[name], other[name]) for name in words), network


def test_what_differs_between_the_networks():
    built = {network: study.build(network, 0) for network in study.NETWORKS}
    assert built["unimodal"].text is None
    stages = {network: sorted(map(int, model.fusions)) for network, model in built.items()}
    names = ("MetaSegNet", "fusion at stages 3 and 4", "fusion at stage 1", "fusion at stage 4")
    assert [stages[name] for name in names] == [[1, 2, 3, 4], [3, 4], [1], [4]]
    assert len(built["one-hot zone"].text.vocabulary) == 2 + 8 and not built["one-hot zone"].text.layers
    same = (sum(p.numel() for p in built[n].decoder.parameters()) for n in built)
    assert len(set(same)) == 1


def test_a_word_of_the_zone_left_out_alone_is_unknown():
    seed = study.ORDER.index("Csa")
    encoder = study.build("MetaSegNet", seed).text
    said = encoder.words(study.prompts().text("Csa"))
    assert said[2:4] == [Words.UNKNOWN] * 2  # its code and "mediterranean"
    assert Words.UNKNOWN not in said[7:]  # the description is made of words that others have


def test_minilm_is_frozen_and_reads_whole_texts():
    """No text is truncated, and a hidden header hides the zone from it."""
    network = study.build("MiniLM text", 0)
    texts = [study.prompts().text(zone) for zone in landcover.ZONES]
    ids = network.ids([*texts, *(headless(text, "[UNK]") for text in texts)])
    assert ids.shape == (18, study.SUBWORDS) and (network.text.mask(ids).sum(1) < study.SUBWORDS).all()
    assert len(ids[:9].unique(dim=0)) == 9
    for text, row in zip(texts, ids[9:], strict=True):
        header = text.partition(".")[0].removeprefix("climate zone ")
        hidden = network.text.tokenizer.decode(row[network.text.mask(row)])
        assert "[UNK]" in hidden and not any(word.lower() in hidden.split(".")[0] for word in header.split(", "))
    assert not any(name.startswith("text.") for name in network.trained())


def test_texts_at_test():
    zones, seed = tuple(landcover.ZONES), study.ORDER.index("Csa")
    right, wrong = (study.texts(zones, kind, seed) for kind in ("full", "wrong"))
    known = {text: code for code, text in zip(zones, right, strict=True)}
    assert len(known) == 9
    for code, text in zip(zones, wrong, strict=True):
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
    study.train_model("MetaSegNet", model, data, 1e-3, SEED, steps=6)
    assert len(seen) == 96 and 0.3 < sum(seen) / len(seen) < 0.7
    seen.clear()
    study.train_model("no header dropout", study.build("no header dropout", SEED), data, 1e-3, SEED)
    assert seen and not any(seen)


def test_rows_score_the_right_images(root):
    study.trained.cache_clear()  # trainings that other tests left in the cache
    seen = study.train("MetaSegNet", "seen", 1e-3, SEED, root)
    left = study.train("MetaSegNet", "left out", 1e-3, SEED, root)
    wrong = study.train("wrong zone's text", "seen", 1e-3, SEED, root)
    assert study.trained.cache_info().currsize == 1  # one training serves all three
    matrices, _ = study.trained("MetaSegNet", 1e-3, root, SEED, "test")
    pixels = landcover.COUNTS["test"] * 64 * 64
    assert all(int(matrix.sum()) == pixels for matrix in matrices.values())
    zone = study.left_out(SEED)
    assert left["zone left out"] == zone and f"mIoU {zone}" not in seen
    assert left["mIoU"] == round(metrics.scores(matrices["right", zone]).miou, 2)
    total = sum(matrices["wrong zone's text", z] for z in study.seen(SEED))
    assert wrong["mIoU"] == round(metrics.scores(total).miou, 2)
    assert seen["loss"] == left["loss"] == wrong["loss"] and seen["trained"] == wrong["trained"]
    # by hand, on the images themselves
    model = study.build("MetaSegNet", SEED)
    data = study.part(root, SEED, "test").of(study.seen(SEED))
    study.train_model("MetaSegNet", model, study.part(root, SEED, "train").of(study.seen(SEED)), 1e-3, SEED)
    said = study.predict(model, data.images, study.prompts().texts(data.zones))
    assert round(100 * float((said == data.labels).float().mean()), 2) == seen["OA"]


def test_selection_looks_at_no_zone_left_out_and_at_no_wrong_text(root):
    rows = [study.train("MetaSegNet", task, 1e-3, SEED, root, "select") for task in study.TASKS]
    rows.append(study.train("wrong zone's text", "left out", 1e-3, SEED, root, "select"))
    assert rows[0] == rows[1] == rows[2]


def test_the_live_run_is_the_studys(root, tmp_path):
    rates = {("seen", method): 1e-3 for method in study.METHODS}
    found = live.setting(parameters("metasegnet", seed=SEED), tmp_path, rates)
    assert set(found.tests["left out"].zones) == {study.left_out(SEED)}
    assert set(found.tests["seen"].zones) == set(study.seen(SEED))
    assert found.learning_rates == {"unimodal": 1e-3, "MetaSegNet": 1e-3}
    texts = (found.texts("MetaSegNet", ["Csa"], kind)[0] for kind in ("", "wrong"))
    assert next(texts) == study.prompts().text("Csa") != next(texts) and found.texts("unimodal", ["Csa"]) is None
    for method in live.LIVE:
        model, history = recipe.train(found, method)
        assert len(history) == 3
        for task in study.TASKS:
            row = study.train(method, task, 1e-3, SEED, str(tmp_path / "data"))
            assert round(metrics.scores(recipe.matrix(found, model, method, task)).miou, 2) == row["mIoU"]
