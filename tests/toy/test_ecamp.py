"""ECAMP's chests, whose reports name side and finding, and its study: what the methods are given and its measures."""

import numpy as np
import pytest
import torch

from companion.models.ecamp import model as ecamp
from companion.toy.ablations import ecamp as study
from companion.toy.ablations import study_root
from companion.toy.datasets import chests
from companion.toy.encoders import chest_ecamp

SEED = 5


def test_a_report_states_what_is_there_and_one_thing_that_is_not():
    drawn, columns = chests.chests(300, "val", 7), {side: [] for side in chests.SIDES}
    for chest in drawn:
        sentences = {part.strip() for part in chest.report.split(".") if part.strip()}
        negations = {f"there is no {chest.absent}", f"there is no evidence of {chest.absent}"}
        assert len(sentences) == 2 and f"there is a {chest.side} {chest.finding}" in sentences and sentences & negations
        assert chest.finding != chest.absent and chest.labels.index(1) == chests.FINDINGS.index(chest.finding)
        left, top, right, bottom = chest.box
        rows, lines = np.nonzero(chest.mask)
        assert (rows.min(), rows.max() + 1, lines.min(), lines.max() + 1) == (top, bottom, left, right)
        columns[chest.side].append((left + right) / 2)
    # the patient's left is the right of the image, and the order of the sentences is not informative
    assert np.mean(np.array(columns["left"]) > 32) > 0.97 and np.mean(np.array(columns["right"]) < 32) > 0.97
    assert 0.4 < np.mean(["no" in chest.report.split()[:3] for chest in drawn]) < 0.6


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


@pytest.fixture(scope="module")
def test(root):
    return study.part(root, SEED, "test")


def test_the_shipped_model_has_the_words_of_every_seed(words):
    assert len(words) == chest_ecamp.WORDS and words.pieces[5:] == sorted(words.pieces[5:])
    assert {words.pieces[i] for i in words.entities} == set(chests.FINDINGS)
    assert chest_ecamp.SEED not in study.SEEDS


def test_all_methods_start_from_the_same_encoder(words):
    built = {method: study.build(method, 3, len(words)) for method in study.METHODS}
    first = built["ECAMP"].encoder.state_dict()
    for method, model in built.items():
        assert all(torch.equal(first[name], t) for name, t in model.encoder.state_dict().items()), method
    assert not hasattr(built["MIM only"], "text") and not [*built["MRM-like"].text.fusion.parameters()]
    assert not hasattr(built["ECAMP, no super-resolution"], "super_resolution")


def test_what_the_methods_are_given(root, words):
    batches = {}
    for method in study.METHODS:
        data = study.pairs(method, root, SEED)
        torch.manual_seed(0)
        rows = zip(*(data[i] for i in range(40)), strict=True)
        batches[method] = batch = ecamp.Batch(*(torch.stack(values) for values in rows))
        torch.testing.assert_close(batch.weights.sum(1), torch.full((40,), 20.0))
        assert batch.images.shape == (40, 3, 64, 64) and batch.noise.shape == (40, 64) and (batch.window == 1).all()
    lengths = {method: int(b.attention.sum()) for method, b in batches.items()}
    assert lengths["ECAMP"] > lengths["ECAMP, no distillation"] == lengths["MRM-like"]
    even = {method for method, batch in batches.items() if (batch.weights == 1).all()}
    assert {"ECAMP, no re-balancing", "MRM-like"} <= even and "ECAMP" not in even
    sides = torch.tensor([words.tokenizer.token_to_id(side) for side in chests.SIDES])
    assert not torch.isin(batches["ECAMP, descriptors hidden"].ids, sides).any()
    assert torch.isin(batches["ECAMP"].ids, sides).any()
    hidden = {m: float((b.ids == words.mask).sum() / (b.attention.sum() - 40)) for m, b in batches.items()}
    assert 0.4 < hidden["MRM-like"] < 0.6 < hidden["ECAMP"] < 0.8


def test_losses_of_hidden_words_depend_on_the_image_that_is_seen(test, words):
    """With equal images the right one and another give the same."""
    model = study.build("ECAMP", SEED, len(words)).eval()
    found = study.word_losses(model, test, words)
    same = chests.Part(test.images[:1].expand(60, -1, -1, -1), *list(vars(test).values())[1:])
    equal = study.word_losses(model, same, words)
    for name in ("side", "finding"):
        torch.testing.assert_close(equal[f"{name}, right"], equal[f"{name}, other"], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[f"{name}, right"], found[f"{name}, other"], atol=1e-3)
    assert study.words(study.build("MIM only", 0, 18), test, words) == {}
    torch.nn.init.zeros_(model.text.fusion.cross.query.weight)  # even attention
    assert study.lesion_share(model, test, words)["attention lead"] == pytest.approx(0, abs=0.01)


def test_cells_are_the_patches_share_in_a_box():
    inside = study.cells(torch.tensor([[0, 0, 8, 8], [4, 8, 20, 12], [0, 0, 64, 64]]))
    assert inside[0].tolist() == [1.0, *[0.0] * 63] and inside[2].eq(1).all()
    assert inside[1].unflatten(0, (8, 8))[1, :3].tolist() == [0.25, 0.5, 0.25] and float(inside[1].sum()) == 1


def test_a_perfect_feature_is_read_perfectly_and_draws_of_labels_share_no_image(root, test, monkeypatch):
    train = study.part(root, SEED, "train")
    right, others = train.labels.float(), train.labels.roll(1, 1).float()
    monkeypatch.setattr(study, "features", lambda method, model, images: next(known))
    monkeypatch.setattr(study, "PROBES", {50: 2})
    noise, found = torch.rand(160, 4, generator=torch.Generator().manual_seed(0)) / 10, []
    for first, second in ((right, right), (right, others), (others, right), (others, others)):
        known = iter([torch.cat([first[:50], second[50:]]) + noise, test.labels.float()])
        found.append(study.probes("ECAMP", None, train, test)["AUROC 50"])
    assert found[0] == 100 and found[3] < 50
    assert found[1:3] == pytest.approx([(100 + found[3]) / 2] * 2, abs=5)
