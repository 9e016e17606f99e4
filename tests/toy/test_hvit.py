"""H-ViT's slides, graded by the place or the amount of tumour, and its study."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from companion.data import slides as data
from companion.evaluation import ablations
from companion.models.hvit import HViT
from companion.models.hvit.slides import tensor
from companion.toy.ablations import hvit as study
from companion.toy.ablations import study_root
from companion.toy.datasets import slides
from companion.toy.encoders import slide_dino
from companion.toy.live import hvit as live


@pytest.mark.parametrize("grade", range(slides.GRADES))
def test_the_place_gives_the_grade_and_the_count_does_not(grade):
    rng, counts = np.random.default_rng(grade), set()
    for _ in range(60):
        cells = slides.arrangement(rng, "place", grade)
        tumour = (cells == slides.TUMOUR).sum(1)
        assert sum(map(slides.is_core, cells)) == grade and set(tumour) <= {0, 4}
        assert set((cells == slides.BENIGN).sum(1)) == {4}
        inner = (cells.reshape(5, 4, 4)[:, 1:3, 1:3] == slides.TUMOUR).sum((1, 2))
        assert inner.tolist() == [3 * slides.is_core(region) for region in cells]
        counts.add(int(tumour.sum()))
    assert len(counts) == slides.REGIONS - grade + 1, "as many rim regions as there is room for"


@pytest.mark.parametrize("grade", range(slides.GRADES))
def test_the_count_gives_the_grade_and_the_place_does_not(grade):
    rng = np.random.default_rng(grade)
    tumour = np.array([slides.arrangement(rng, "count", grade) == slides.TUMOUR for _ in range(300)])
    assert set(tumour.sum((1, 2))) == ({4 * grade - 1, 4 * grade, 4 * grade + 1} if grade else {0})
    share = tumour.mean((0, 1))
    assert share.std() <= 0.2 * share.mean()


def test_a_bag_of_patches_knows_little_of_the_place():
    rng, grades = np.random.default_rng(0), np.arange(600) % 6
    counts = np.array([(slides.arrangement(rng, "place", g) == slides.TUMOUR).sum() for g in grades.tolist()])
    assert np.corrcoef(grades, counts)[0, 1] ** 2 < 0.5


def test_the_regions_that_were_drawn_are_found_and_embedded_as_those_of_real_slides(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "COUNTS", {"train": 3, "val": 2, "test": 2})
    found = study.embeddings(str(tmp_path), 0, "place", "trainval")
    assert found.tensors[0].shape == (5, 5, 16, 48)
    root = study_root(tmp_path, 0)
    drawn = slides.drawn_cells(root / "pocket" / "slides-place")
    for i, item in enumerate(data.load("pocket/slides-place", root, "train")):
        pixels, corners = study.regions(item)
        assert sorted(map(tuple, corners.tolist())) == sorted(drawn[item.name])
        assert item.grade == found.tensors[1][i] == sum(map(slides.is_core, drawn[item.name].values()))
        embedded = slide_dino.embed(study.encoders("dino")[0], tensor(pixels, slide_dino.NORMALISE))
        torch.testing.assert_close(embedded, found.tensors[0][i], rtol=1e-3, atol=1e-3)


@pytest.fixture
def few(tmp_path, monkeypatch) -> str:
    """Random embeddings in place of the slides' own; the study's root."""
    generator = torch.Generator().manual_seed(0)

    def embeddings(root, seed, task, split, levels="dino"):
        count = {"train": 20, "val": 8, "trainval": 28, "test": 12}[split]
        return TensorDataset(torch.randn(count, 5, 16, 48, generator=generator), torch.arange(count) % 6)

    monkeypatch.setattr(study, "embeddings", embeddings)
    monkeypatch.setattr(study, "EPOCHS", 1)
    monkeypatch.setattr(study, "BATCH", 8)
    return str(tmp_path)


@pytest.mark.parametrize("method", study.METHODS)
def test_every_method_trains_what_its_name_says(method, few):
    model = study.build(method, 0)
    row = study.train(method, "place", 1e-3, 0, few, "select")
    assert -100 <= row["kappa"] <= 100 and ("fold" in row) == ("vote" in method)
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(model, HViT):
        shipped = slide_dino.build()[1].state_dict()
        same = all(torch.equal(t, shipped[n]) for n, t in model.region.state_dict().items())
        assert same == ("random" not in method or "patch" in method)
        assert any(n.startswith("region") for n in model.trained()) == method.startswith("Local")


def test_shuffling_moves_patches_within_their_region_alone(few, monkeypatch):
    place = torch.arange(2 * 5 * 16, dtype=torch.float).reshape(2, 5, 16, 1).expand(-1, -1, -1, 48)
    monkeypatch.setattr(study, "embeddings", lambda *given: TensorDataset(place, torch.tensor([0, 1])))
    moved = study.inputs_of("Local, places shuffled", "place", few, 0, "train").tensors[0]
    assert not torch.equal(moved, place) and torch.equal(moved.sort(2).values, place)
    assert torch.equal(study.inputs_of("Local", "place", few, 0, "train").tensors[0], place)


def test_five_folds_leave_out_each_slide_once():
    found = TensorDataset(torch.arange(20), torch.arange(20))
    left = [set(range(20)) - set(study.without_fold(found, fold, 3).tensors[0].tolist()) for fold in range(5)]
    assert set.union(*left) == set(range(20)) and [len(part) for part in left] == [4] * 5


def test_the_squared_error_of_a_wrong_grade_follows_from_kappa_and_accuracy():
    rows = [
        {"stage": "test", "task": task, "method": method, "seed": seed, "kappa": kappa, "accuracy": 80.0}
        for task in study.TASKS
        for method, kappa in (("Local", 92.0), ("Local, cross-entropy", 90.0))
        for seed in (1, 2)
    ]
    wrong = live.mistakes(ablations.frame(rows, "kappa")).iloc[:, -1].tolist()
    assert wrong == pytest.approx([0.08 * 35 / 6 / 0.2, 0.1 * 35 / 6 / 0.2] * 2)
