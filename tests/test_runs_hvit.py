"""H-ViT's runs and study: the published recipe, folds that vote, pocket slides, what is missing."""

from __future__ import annotations

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from companion import report
from companion.data import slides as data
from companion.errors import BadParameter, MissingData
from companion.models import hvit
from companion.pocket import slides as pocket
from companion.runs import hvit as runs
from companion.studies import hvit as study


def given(**changes) -> SimpleNamespace:
    settings = dict(profile="paper", dry_run=True, seed=1, method="Local", dataset="slides/panda", region=1024,
                    head="regression", position="none", features="", normalise="unit", folds=2, gamma=0.5,
                    data_root="nowhere", weights="", accelerator="cpu", devices=1, precision="32-true")  # fmt: skip
    return SimpleNamespace(**settings | changes)


def slides(count: int, seed: int = 0) -> TensorDataset:
    """Slides whose grade is told by the mean of their embeddings."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.arange(count) % 6
    features = 0.1 * torch.randn(count, 2, 16, 384, generator=generator) + grades[:, None, None, None] / 3
    return TensorDataset(features, torch.ones(count, 2, dtype=torch.bool), grades)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_rate_is_halved_every_20_epochs():
    p = given(method="mean pooling")
    history = runs.learn(p, runs.build(p, p.method), p.method, slides(4), None, epochs=41, batch=4)
    rates = [row["lr"] for row in history]
    assert rates[0] == rates[19] == 2e-4 and rates[20] == rates[39] == 1e-4 and rates[40] == 5e-5


def test_the_decay_is_adams_not_adamws():
    """One step by hand with torch's Adam, which adds the decay to the gradient."""
    p, part = given(method="mean pooling"), slides(4)
    model, other = runs.build(p, p.method).eval(), runs.build(p, p.method).eval()
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    runs.learn(p, model, p.method, part, None, epochs=1, batch=4)
    optimizer = torch.optim.Adam(other.parameters(), 2e-4, weight_decay=1e-5)
    hvit.loss("regression", other(part.tensors[0], part.tensors[1]), part.tensors[2]).backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_epoch_that_is_best_on_the_tuning_slides_is_kept(monkeypatch):
    p, values = given(method="mean pooling"), iter([1.0, 5.0, 3.0])
    seen = []

    def score(p, model, part):
        seen.append([t.detach().clone() for t in model.parameters()])
        return None, None

    monkeypatch.setattr(runs, "_said", score)
    monkeypatch.setattr(study, "kappa", lambda *said: next(values))
    model = runs.build(p, p.method)
    runs.learn(p, model, p.method, slides(4), slides(4), epochs=3, batch=4)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))


@pytest.mark.parametrize(
    ("method", "count"), [("Global", 594_818), ("Local", 594_818 + 2_745_600), ("gated attention", None)]
)
def test_what_is_trained_at_full_size(method, count):
    model = runs.build(given(), method)
    trained = sum(t.numel() for t in model.parameters() if t.requires_grad)
    assert trained == (count or sum(t.numel() for t in model.parameters()))


def test_hipts_region_level_is_loaded_with_its_positions_resized(tmp_path):
    torch.manual_seed(0)
    saved = hvit.RegionEncoder(16)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in saved.state_dict().items()}}, tmp_path / "vit4k_xs_dino.pth")
    model = runs.build(given(method="Global", region=2048, weights=str(tmp_path / "vit4k_xs_dino.pth")), "Global")
    assert torch.equal(model.region.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.region.pos_embed, hvit.resize_positions(saved.pos_embed, (7, 7)))


# --- dry run and stored features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(runs.KINDS))
def test_a_dry_run_takes_two_steps(method, tmp_path):
    found = runs.setting(given(method=method), tmp_path, {})
    models, history = runs.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    scores = runs.scores(found, method, models)
    assert set(scores) == {"kappa", "fold"} and scores["kappa"] == scores["fold"]


def test_folds_are_trained_on_stored_features_and_vote(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WORKERS", 0)
    monkeypatch.setattr(runs, "check_dataset", lambda p: None)
    monkeypatch.setattr(pocket, "COUNTS", {"train": 12, "val": 6, "test": 6})
    folder = pocket.write(tmp_path, "count", 0)
    data.write_folds("pocket/slides-count", tmp_path, 2, test=0.25)
    (tmp_path / "features").mkdir()
    rng = np.random.default_rng(0)
    for item in data.load("pocket/slides-count", tmp_path):
        regions = int(rng.integers(1, 4))  # ragged
        with h5py.File(tmp_path / "features" / f"{item.name}.h5", "w") as file:
            values = 0.1 * rng.normal(size=(regions, 16, 384)) + item.grade / 3
            file["features"], file["coords"] = values.astype("float32"), np.zeros((regions, 2), "int64")
            file["shares"], file.attrs["settings"] = np.ones(regions), "{}"
    p = given(dry_run=False, method="mean pooling", dataset="pocket/slides-count", data_root=str(tmp_path))
    found = runs.setting(p, tmp_path, {})
    assert len(found.folds) == 2 and folder.is_dir()
    models, _ = runs.train(found, p.method, epochs=30, batch=6)
    scores = runs.scores(found, p.method, models)
    assert len(models) == 2 and -100 <= scores["kappa"] <= 100
    table = runs.measured(tmp_path / "measured.csv", {"method": p.method, "dataset": p.dataset, "region": 1024,
                                                      "head": p.head, "seed": 1} | scores)  # fmt: skip
    assert list(table.kappa) == [scores["kappa"]]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(MissingData, match="kaggle"):
        runs.setting(given(dry_run=False, data_root=str(tmp_path)), tmp_path, {})
    with pytest.raises(BadParameter, match="slides/panda"):
        runs.setting(given(dataset="rgbt/lasher"), tmp_path, {})
    with pytest.raises(BadParameter, match="'learned'"):
        runs.setting(given(position="2d sine"), tmp_path, {})


# --- the study --------------------------------------------------------------------------------------------------------


def test_the_facts_name_what_there_is():
    """Claims name methods and tasks of the study."""
    for claim in report.paper("hvit")["claims"]:
        if claim["kind"] == "directional":
            for task in claim["tasks"]:
                assert {claim["better"], claim["worse"]} <= set(study.TASKS[task])
    assert set(report.paper("hvit")["parameters"]["method"]["choices"]) == set(runs.KINDS)


@pytest.fixture
def few(tmp_path, monkeypatch) -> str:
    """Embeddings of random slides in the place of those of the pocket slides; the study's root."""
    generator = torch.Generator().manual_seed(0)

    def embeddings(root, seed, task, split, levels="dino"):
        count = {"train": 20, "val": 8, "trainval": 28, "test": 12}[split]
        return TensorDataset(torch.randn(count, 5, 16, 48, generator=generator), torch.arange(count) % 6)

    monkeypatch.setattr(study, "embeddings", embeddings)
    monkeypatch.setattr(study, "RECIPE", study.RECIPE | {"epochs": 1, "batch": 8})
    return str(tmp_path)


@pytest.mark.parametrize("method", list(study.METHODS))
def test_every_method_trains_what_its_name_says(method, few):
    model = study.build(method, 0)
    row = study.train(method, "place", 1e-3, 0, few, "select")
    assert -100 <= row["kappa"] <= 100 and row["trained"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    if isinstance(model, hvit.HViT):
        kept = study.slide_dino.build()[1].state_dict()
        same = all(torch.equal(t, kept[n]) for n, t in model.region.state_dict().items())
        assert same == ("random" not in method or "patch" in method)
        assert any(n.startswith("region") for n in model.trained()) == method.startswith("Local")
    assert ("fold" in row) == ("vote" in method)


def test_shuffling_moves_patches_within_their_region_alone(few, monkeypatch):
    place = torch.arange(2 * 5 * 16, dtype=torch.float).reshape(2, 5, 16, 1).expand(-1, -1, -1, 48)
    whole = TensorDataset(place, torch.tensor([0, 1]))
    monkeypatch.setattr(study, "embeddings", lambda *given: whole)
    moved = study.pictures("Local, places shuffled", "place", few, 0, "train").tensors[0]
    assert not torch.equal(moved, place) and torch.equal(moved.sort(2).values, place)
    assert torch.equal(study.pictures("Local", "place", few, 0, "train").tensors[0], place)


def test_kappa_is_quadratic_and_0_for_a_constant():
    truth = torch.arange(6)
    assert study.kappa(truth, truth) == 100 and study.kappa(truth, torch.zeros(6, dtype=torch.long)) == 0
    assert study.kappa(truth, 5 - truth) == -100


def test_slides_go_the_real_way_into_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "COUNTS", {"train": 3, "val": 2, "test": 2})
    found = study.embeddings(str(tmp_path), 0, "place", "trainval")
    assert found.tensors[0].shape == (5, 5, 16, 48) and len(found.tensors[1]) == 5
    item = data.load("pocket/slides-place", study.folder(tmp_path, 0), "train")[0]
    pixels, corners = study.regions(item)
    assert pixels.shape == (5, 128, 128, 3) and len(corners) == 5
    tensors = study.tensor(pixels, study.slide_dino.NORMALISE)
    torch.testing.assert_close(study.slide_dino.embed(study.encoders("dino")[0], tensors), found.tensors[0][0])
