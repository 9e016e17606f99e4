"""H-ViT's ablations on the synthetic slides, and the live run of the notebook."""

import pytest
import torch
from torch.utils.data import TensorDataset

from companion.data import slides as data
from companion.models.hvit import HViT, recipe
from companion.slides import tensor
from companion.toy.ablations import hvit as ablation
from companion.toy.ablations import study_root
from companion.toy.datasets import slides as synthetic
from companion.toy.encoders import slide_dino
from companion.toy.live import hvit as live
from tests.conftest import parameters


@pytest.fixture
def few(tmp_path, monkeypatch) -> str:
    """Random embeddings in place of the synthetic slides' own; the ablation's root."""
    generator = torch.Generator().manual_seed(0)

    def embeddings(root, seed, task, split, levels="dino"):
        count = {"train": 20, "val": 8, "trainval": 28, "test": 12}[split]
        return TensorDataset(torch.randn(count, 5, 16, 48, generator=generator), torch.arange(count) % 6)

    monkeypatch.setattr(ablation, "embeddings", embeddings)
    monkeypatch.setattr(ablation, "EPOCHS", 1)
    monkeypatch.setattr(ablation, "BATCH", 8)
    return str(tmp_path)


@pytest.mark.parametrize("method", list(ablation.METHODS))
def test_every_method_trains_what_its_name_says(method, few):
    model = ablation.build(method, 0)
    row = ablation.train(method, "place", 1e-3, 0, few, "select")
    assert -100 <= row["kappa"] <= 100
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(model, HViT):
        shipped = slide_dino.build()[1].state_dict()
        same = all(torch.equal(t, shipped[n]) for n, t in model.region.state_dict().items())
        assert same == ("random" not in method or "patch" in method)
        assert any(n.startswith("region") for n in model.trained()) == method.startswith("Local")
    assert ("fold" in row) == ("vote" in method)


def test_shuffling_moves_patches_within_their_region_alone(few, monkeypatch):
    place = torch.arange(2 * 5 * 16, dtype=torch.float).reshape(2, 5, 16, 1).expand(-1, -1, -1, 48)
    whole = TensorDataset(place, torch.tensor([0, 1]))
    monkeypatch.setattr(ablation, "embeddings", lambda *given: whole)
    moved = ablation.inputs_of("Local, places shuffled", "place", few, 0, "train").tensors[0]
    assert not torch.equal(moved, place) and torch.equal(moved.sort(2).values, place)
    assert torch.equal(ablation.inputs_of("Local", "place", few, 0, "train").tensors[0], place)


def test_the_live_run_is_the_ablations(few, tmp_path):
    rates = {("place", method): 1e-3 for method in ablation.MAIN}
    found = live.setting(parameters("hvit"), tmp_path, rates)
    models, history = recipe.train(found, "Local")
    assert list(found.learning_rates) == list(ablation.MAIN) and len(history) == 3
    model = ablation.build("Local", 0)
    assert ablation.train_model(model, "Local", found.folds[0][0], 1e-3, 0) == history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))
    scores = recipe.scores(found, "Local", models)
    assert scores["kappa"] == scores["fold"] and len(recipe.grades_of(found.test)) == 12
    published = live.setting(parameters("hvit", profile="paper", dry_run=True, region=1024), tmp_path, {})
    assert list(published.learning_rates) == ["Local"]


def test_slides_are_read_as_real_ones_are(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 3, "val": 2, "test": 2})
    found = ablation.embeddings(str(tmp_path), 0, "place", "trainval")
    assert found.tensors[0].shape == (5, 5, 16, 48) and len(found.tensors[1]) == 5
    item = data.load("pocket/slides-place", study_root(tmp_path, 0), "train")[0]
    pixels, corners = ablation.regions(item)
    assert pixels.shape == (5, 128, 128, 3) and len(corners) == 5
    tensors = tensor(pixels, slide_dino.NORMALISE)
    torch.testing.assert_close(slide_dino.embed(ablation.encoders("dino")[0], tensors), found.tensors[0][0])
