"""ECAMP's chests, whose reports name side and finding, and its study: what the methods are given and its measures."""

import pytest
import torch
from torch.utils.data import default_collate

from companion.data import xrays
from companion.toy import ecamp as toy
from tests.toy.common import pinned

FEW = {"train": 160, "val": 3, "test": 60}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", FEW)
    toy.load.cache_clear()
    yield
    toy.load.cache_clear()


def test_chests_follow_the_seed_to_the_bit(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", {"train": 5, "val": 3, "test": 4})
    assert " ".join(pinned(*toy.load(7, split)) for split in FEW) == "7bfeef66d558 c36f829a4b53 baa98bb17b3e"
    assert 200 not in toy.STUDY.seeds, "the shipped model was trained on these chests"


def test_all_methods_start_from_the_same_encoder():
    built = {method: toy.build(method, 3) for method in toy.METHODS}
    first = built["ECAMP"].encoder.state_dict()
    for method, model in built.items():
        assert all(torch.equal(first[name], t) for name, t in model.encoder.state_dict().items()), method
    assert not hasattr(built["MIM only"], "text") and toy.gains(built["MIM only"], toy.load(5, "test")) == {}
    assert not hasattr(built["ECAMP, no super-resolution"], "super_resolution")


def test_what_the_methods_are_given():
    batches = {}
    for method, (_, options) in toy.METHODS.items():
        data = toy.pairs(toy.load(5, "train"), **options)
        torch.manual_seed(0)
        batches[method] = batch = default_collate([data[i] for i in range(40)])
        torch.testing.assert_close(batch.weights.sum(1), torch.full((40,), 20.0))
        assert batch.images.shape == (40, 3, 64, 64) and batch.noise.shape == (40, 64) and (batch.window == 1).all()
    lengths = {method: int(batch.attention.sum()) for method, batch in batches.items()}
    assert lengths["ECAMP"] > lengths["ECAMP, no distillation"]
    assert [m for m, batch in batches.items() if (batch.weights == 1).all()] == ["ECAMP, no re-balancing"]


def test_losses_of_hidden_words_depend_on_the_image_that_is_seen():
    """With equal images the right one and another give the same."""
    model, part = toy.build("ECAMP", 5).eval(), toy.load(5, "test")
    found = toy.word_losses(model, part)
    equal = toy.word_losses(model, part._replace(images=part.images[:1].expand(60, -1, -1, -1)))
    for name in ("side", "finding"):
        torch.testing.assert_close(equal[f"{name}, right"], equal[f"{name}, other"], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[f"{name}, right"], found[f"{name}, other"], atol=1e-3)


def test_cells_are_the_patches_share_in_a_box():
    inside = toy.cells(torch.tensor([[0, 0, 8, 8], [4, 8, 20, 12], [0, 0, 64, 64]]))
    assert inside[0].tolist() == [1.0, *[0.0] * 63] and inside[2].eq(1).all()
    assert inside[1].unflatten(0, (8, 8))[1, :3].tolist() == [0.25, 0.5, 0.25] and float(inside[1].sum()) == 1


def test_saved_chests_are_read_again(tmp_path):
    part = toy.load(5, "train")
    files = toy.save(part, tmp_path, 3)
    image, labels = xrays.own(tmp_path, toy.FINDINGS)["train"][2]
    torch.testing.assert_close((image - toy.MEAN) / toy.STD, part.images[2])
    read = xrays.own(tmp_path, task="pre-training")["train"]
    assert labels.tolist() == part.labels[2].tolist() and len(files) == len(read.texts) == 3
    assert (read.texts[1], read.statements[1]) == (part.reports[1], part.distilled[1])


def test_a_step_is_taken_and_the_encoder_is_scored(monkeypatch):
    monkeypatch.setattr(toy, "PROBES", {50: 2})
    model, history = toy.train("ECAMP", toy.TASK, toy.data(toy.TASK, 5, "trainval"), 2e-3, 5, epochs=1)
    assert len(history) == 5
    row = toy.score(model, toy.TASK, toy.data(toy.TASK, 5, "test"))
    assert row.keys() == {"AUROC 50", "AUROC", "Dice", "side gain", "finding gain"}
