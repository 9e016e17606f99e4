"""ECAMP's study: differences between the methods, and that each measure is correct."""

import pytest
import torch

from companion import backbones
from companion.models.ecamp import model as ecamp
from companion.toy import encoders
from companion.toy.ablations import SELECTION_SEEDS, study_root
from companion.toy.ablations import ecamp as study
from companion.toy.datasets import chests
from companion.toy.encoders import chest_ecamp
from companion.toy.live import ecamp as live
from tests.conftest import parameters

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("clinic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chests, "COUNTS", {"train": 160, "val": 60, "test": 60})
        chests.write(study_root(path, SEED), SEED)
        yield str(path)
    study.part.cache_clear()


@pytest.fixture(scope="module")
def words(root):
    return study.vocabulary(root, SEED)


@pytest.fixture
def model(words):
    return study.build("ECAMP", SEED, len(words)).eval()


def some(root, method, count=40):
    data = study.pairs(method, root, SEED)
    torch.manual_seed(0)
    return ecamp.Batch(*(torch.stack(values) for values in zip(*(data[i] for i in range(count)), strict=True)))


def test_all_methods_start_from_the_same_encoder(words):
    first = study.build("ECAMP", 3, len(words)).encoder.state_dict()
    for method in study.METHODS:
        other = study.build(method, 3, len(words)).encoder.state_dict()
        assert all(torch.equal(first[name], other[name]) for name in first), method
    assert study.build("MIM only", 3, len(words)).text is None
    assert study.build("MRM-like", 3, len(words)).text.fusion is None
    assert study.build("ECAMP, no super-resolution", 3, len(words)).super_resolution is None


def test_what_the_methods_are_given(root, words):
    batches = {method: some(root, method) for method in study.METHODS}
    mask = words.mask
    lengths = {method: int(b.attention.sum()) for method, b in batches.items()}
    assert lengths["ECAMP"] > lengths["ECAMP, no distillation"] == lengths["MRM-like"]
    assert (batches["ECAMP, no re-balancing"].weights == 1).all() and (batches["MRM-like"].weights == 1).all()
    for batch in batches.values():
        assert torch.allclose(batch.weights.sum(1), torch.tensor(20.0)) and (batch.window == 1).all()
        assert batch.images.shape == (40, 3, 64, 64) and batch.noise.shape == (40, 64)
    assert not torch.equal(batches["ECAMP"].weights, batches["ECAMP, no re-balancing"].weights)

    def shown(batch):  # sides that can be read: descriptors of an entity, always hidden when they are meant to be
        return (torch.isin(batch.ids, torch.tensor([words.tokenizer.token_to_id(s) for s in chests.SIDES]))).sum()

    assert shown(batches["ECAMP, descriptors hidden"]) == 0 < shown(batches["ECAMP"])
    hidden = {m: float(((b.ids == mask).sum() / (b.attention.sum() - 40)).item()) for m, b in batches.items()}
    assert 0.4 < hidden["MRM-like"] < 0.6 < hidden["ECAMP"] < 0.8


def test_the_words_of_a_report_are_found(root, words):
    data = study.part(root, SEED, "test")
    read = study.texts(data.reports, words)
    assert read.ids.shape == (60, study.LENGTH) and (read.side.sum(1) == 1).all() and (read.finding.sum(1) == 1).all()
    named = [chests.FINDINGS.index(words.pieces[int(i)]) for i in read.ids[read.finding]]
    assert named == data.labels.argmax(1).tolist()
    assert {words.pieces[int(i)] for i in read.ids[read.side]} == set(chests.SIDES)


def test_losses_of_hidden_words_depend_on_the_picture_that_is_seen(root, words, model):
    """With equal images the right one and another give the same."""
    data = study.part(root, SEED, "test")
    found = study.word_losses(model, data, words)
    assert all(losses.shape == (60,) for losses in found.values())
    assert not torch.equal(found["side, right"], found["side, other"])
    same = study.pocket.Part(data.images[:1].expand(60, -1, -1, -1), *list(vars(data).values())[1:])
    found = study.word_losses(model, same, words)
    for name in ("side", "finding"):
        assert torch.allclose(found[f"{name}, right"], found[f"{name}, other"], atol=1e-5)
    assert study.words(study.build("MIM only", 0, 18), data, words) == {}


def test_cells_are_the_patches_share_in_a_box():
    boxes = torch.tensor([[0, 0, 8, 8], [4, 8, 20, 12], [0, 0, 64, 64]])
    inside = study.cells(boxes)
    assert inside[0].tolist() == [1.0, *[0.0] * 63] and inside[2].eq(1).all()
    assert inside[1].unflatten(0, (8, 8))[1, :3].tolist() == [0.25, 0.5, 0.25] and float(inside[1].sum()) == 1


def test_attention_that_is_even_has_no_lead(root, words, model):
    data = study.part(root, SEED, "test")
    maps = study.looks(model, data, words)
    assert maps.shape == (60, 64) and torch.allclose(maps.sum(1), torch.ones(60), atol=1e-5)
    torch.nn.init.zeros_(model.text.fusion.cross.query.weight)
    found = study.lesion_share(model, data, words)
    assert found["attention lead"] == pytest.approx(0, abs=1e-3) and 2 < found["box area"] < 10
    assert study.lesion_share(study.build("MRM-like", 0, 18), data, words) == {}


def test_a_perfect_feature_is_read_perfectly(root, model, monkeypatch):
    train, test = (study.part(root, SEED, split) for split in ("train", "test"))
    monkeypatch.setattr(study, "PROBES", {50: 2, 150: 1})
    monkeypatch.setattr(study, "features", lambda method, model, images: next(known))
    known = iter([train.labels.float() + torch.rand(160, 4) / 10, test.labels.float()])
    assert study.probes("ECAMP", model, train, test) == {"AUROC 50": 100, "AUROC 150": 100, "AUROC": 100}
    known = iter([torch.rand(160, 4), torch.rand(60, 4)])
    assert all(35 < value < 65 for value in study.probes("ECAMP", model, train, test).values())
    # draws share no image: the features of the second are those of other findings, and each draw counts a half
    right, others = train.labels.float(), train.labels.roll(1, 1).float()
    found = []
    for first, second in ((right, right), (right, others), (others, right), (others, others)):
        known = iter([torch.cat([first[:50], second[50:]]) + torch.rand(160, 4) / 10, test.labels.float()])
        found.append(study.probes("ECAMP", model, train, test)["AUROC 50"])
    assert found[0] == 100 and found[3] < 50
    assert found[1:3] == pytest.approx([(100 + found[3]) / 2] * 2, abs=5)


def test_features_of_tested_images_are_standardised_by_those_of_training(root, model, monkeypatch):
    train, test, seen = *(study.part(root, SEED, split) for split in ("train", "test")), []

    class Probe:
        def __init__(self, **options):
            pass

        def fit(self, features, classes):
            seen.append(features)
            return self

        def predict_proba(self, features):
            seen.append(features)
            return test.labels.numpy()

    features = 3 + 2 * torch.randn(160, 4)
    known = iter([features, features[:60] + 2])
    monkeypatch.setattr(study, "features", lambda *_: next(known))
    monkeypatch.setattr(study, "LogisticRegression", Probe)
    monkeypatch.setattr(study, "PROBES", {160: 1})
    assert study.probes("ECAMP", model, train, test) == {"AUROC 160": 100, "AUROC": 100}
    fitted, asked = map(torch.from_numpy, seen)
    torch.testing.assert_close(fitted.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.std(0), torch.ones(4))
    torch.testing.assert_close(asked, fitted[:60] + 2 / features.std(0))


def test_lesions_are_segmented_at_the_pictures_size(root, model, monkeypatch):
    monkeypatch.setattr(study, "SEGMENT", study.SEGMENT | {"epochs": 1})
    train, test = (study.part(root, SEED, split) for split in ("train", "test"))
    before = [t.clone() for t in model.parameters()]
    decoder = study.segmenter(model, train, SEED)
    with torch.no_grad():
        assert decoder(study.tokens(model, test.images[:3])).shape == (3, 1, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the encoder is frozen"
    monkeypatch.setattr(study, "predict", lambda found, data, **options: 10 * test.masks - 5)
    monkeypatch.setattr(study, "tokens", lambda model, images: torch.zeros(len(images), 64, 96))
    assert study.dice(model, train, test, SEED) == 100


@pytest.mark.parametrize("method", ["raw pixels", "random init", "MIM only", "ECAMP"])
def test_a_row_holds_every_measure(root, method, monkeypatch):
    monkeypatch.setattr(study, "PROBES", {50: 2})
    monkeypatch.setattr(study, "SEGMENT", study.SEGMENT | {"epochs": 1})
    row = study.train(method, "chests", 1e-3, SEED, root, epochs=0.8)
    assert 0 < row["AUROC 50"] < 100 and ("Dice" in row) == (method != "raw pixels")
    assert ("side gain" in row) == ("attention lead" in row) == (method in ("random init", "ECAMP"))
    assert (row["loss"] > 0) == (method not in study.UNTRAINED)
    chosen = study.train(method, "chests", 1e-3, SEED, root, "select", epochs=0.8)
    assert set(chosen) == {"AUROC", "AUROC 50", "loss"} and chosen["loss"] == row["loss"], (
        "the same training, another split"
    )


def test_the_live_training_is_that_of_the_ablations(root, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "STEPS", 3)
    found = live.setting(parameters("ecamp", seed=3), tmp_path, {(live.TASK, method): 1e-3 for method in study.METHODS})
    assert found.learning_rates == {"MIM only": 1e-3, "ECAMP": 1e-3}
    for method in found.learning_rates:
        model, again = found.build(method), found.build(method)
        history = found.learn(model, method)
        assert len(history) == 3 and (history[0]["mlm"] > 0) == (method == "ECAMP")
        assert found.learn(again, method) == history, "the same seed gives the same bits"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_shipped_model_is_that_of_its_card():
    model, card = chest_ecamp.build(), encoders.read_card(chest_ecamp.NAME)
    assert sum(t.numel() for t in model.parameters()) == card["parameters"] and not model.training
    assert card["world"] == chests.VERSION and card["recipe"]["epochs"] == chest_ecamp.EPOCHS
    assert chest_ecamp.SEED not in (*study.SEEDS, *SELECTION_SEEDS)
    trained, untrained = card["quality"]["ECAMP"], card["quality"]["untrained"]
    assert trained["AUROC 50"] > untrained["AUROC 50"] + 5 and trained["Dice"] > untrained["Dice"]
    assert trained["side gain"] > 50 and trained["finding gain"] > 30 and trained["attention lead, hidden"] > 10
    assert abs(untrained["side gain"]) < 5


def test_the_shipped_model_has_the_words_of_every_seed(root, tmp_path):
    chests.write(tmp_path, 4)
    words = study.Vocabulary.read(tmp_path / "pocket" / "chests" / "wordpiece.json")
    assert len(words) == chest_ecamp.WORDS and words.pieces[5:] == sorted(words.pieces[5:])
    assert {words.pieces[i] for i in words.entities} == set(chests.FINDINGS)


def test_the_shipped_model_can_be_made_again(root, tmp_path, monkeypatch):
    train = chest_ecamp.train
    monkeypatch.setattr(study, "PROBES", {50: 1})
    monkeypatch.setattr(study, "SEGMENT", study.SEGMENT | {"epochs": 1})
    monkeypatch.setattr(chest_ecamp, "train", lambda root: train(root, epochs=0.7))
    path = chest_ecamp.ship(tmp_path)
    state = backbones.read_state(path)
    assert set(state) == set(chest_ecamp.build().state_dict())
    assert "# pocket_ecamp" in path.with_suffix(".md").read_text()
