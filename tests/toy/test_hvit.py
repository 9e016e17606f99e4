"""H-ViT's slides, graded by the place or the amount of tumour, and its study."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from companion.data import slides as data
from companion.data.pyramids import Slide
from companion.models.hvit import HViT
from companion.models.hvit.slides import tile
from companion.toy import hvit as toy
from companion.toy.encoders import slide_dino
from tests.toy.common import pinned


@pytest.mark.parametrize(
    ("task", "expected"),
    [("count", "e4c25d25678f ec24ee95262e 0d279f88e2d4"), ("place", "9bc4be78c6e6 e097140d4889 7582c7e1127c")],
)
def test_slides_follow_the_seed_to_the_bit(task, expected):
    found = []
    for split, count in {"train": 3, "val": 2, "test": 2}.items():
        drawn = toy.slides(count, task, split, 7)
        found.append(pinned(*(x for s in drawn for x in (s.regions, np.array(list(s.cores)), s.grade))))
    assert " ".join(found) == expected


def test_the_regions_of_a_written_slide_are_those_that_were_drawn(tmp_path):
    drawn = toy.slides(3, "place", "test", 1)
    for item, slide in zip(data.own(toy.save(tmp_path, drawn))["train"], drawn, strict=True):
        with Slide(item.path) as file:
            tiles = tile(file, toy.TILING)
            pixels = np.stack([tiles.read(file, x, y) for x, y in tiles.coords])
        assert list(map(tuple, tiles.coords.tolist())) == list(slide.cores)
        assert np.array_equal(pixels, slide.regions)
        assert item.grade == slide.grade == list(slide.cores.values()).count(True)


@pytest.fixture
def few(monkeypatch) -> TensorDataset:
    """Random embeddings whose mean follows the grade; one epoch of small batches."""
    monkeypatch.setattr(toy, "BATCH", 8)
    features = torch.randn(30, 5, 16, 48, generator=torch.Generator().manual_seed(0))
    grades = torch.arange(30) % 6
    return TensorDataset(features + grades[:, None, None, None], grades)


@pytest.mark.parametrize("method", toy.METHODS)
def test_every_method_trains_what_its_name_says(method, few):
    model, history = toy.train(method, "place", few, 1e-3, 0, epochs=1)
    row = toy.score(model, "place", few)
    assert -100 <= row["kappa"] <= 100 and ("gain" in row) == (method == toy.VOTE) and history
    model = toy.build(method, 0)
    if isinstance(model, HViT):
        shipped = slide_dino.build()[1].state_dict()
        assert all(torch.equal(t, shipped[n]) for n, t in model.region.state_dict().items())
        assert any(n.startswith("region") for n in model.trained()) == method.startswith("Local")
        assert toy.head_of(model) == ("classification" if "entropy" in method else "regression")


def test_a_study_has_embeddings_of_training_and_validation_slides_for_the_test(monkeypatch):
    monkeypatch.setattr(toy, "COUNTS", {"train": 2, "val": 1, "test": 1})
    toy.embeddings.cache_clear()
    both, train, val = (toy.embeddings("count", 3, split) for split in ("trainval", "train", "val"))
    assert both.tensors[0].shape == (3, 5, 16, 48)
    for i, whole in enumerate(both.tensors):
        assert torch.equal(whole, torch.cat([train.tensors[i], val.tensors[i]]))
    toy.embeddings.cache_clear()


def test_five_folds_leave_out_each_slide_once():
    found = TensorDataset(torch.arange(20), torch.arange(20))
    left = [set(range(20)) - set(toy.without_fold(found, fold, 3).tensors[0].tolist()) for fold in range(5)]
    assert set.union(*left) == set(range(20)) and [len(part) for part in left] == [4] * 5
