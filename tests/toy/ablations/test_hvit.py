"""H-ViT's ablations on the synthetic slides, and the live run of the notebook."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import slides as data
from companion.evaluation import ablations
from companion.models.hvit import HViT, recipe
from companion.models.hvit.model import PatchEncoder
from companion.ops.papers import paper
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


def rows(lead: float) -> pd.DataFrame:
    """An ablation in which every method has kappa 90, and a method named before "cross-entropy" `lead` more."""
    found = [
        {"stage": stage, "task": task, "method": method, "learning_rate": 1e-3, "seed": seed, "trained": 10}
        | {"kappa": 90.0 + lead * ("cross" not in method), "accuracy": 80.0, "loss": 0.5, "fold": 89.0}
        for stage, seeds in (("select", (7, 8)), ("test", (1, 2, 3)))
        for task, methods in ablation.TASKS.items()
        for method in methods
        for seed in seeds
    ]
    return ablations.frame(found, "kappa")


def test_tables_of_the_ablations():
    found = rows(2.0)
    table = live.study_table(found).set_index(["task", "method"])
    assert list(table.index) == [(task, method) for task, known in ablation.TASKS.items() for method in known]
    assert table.loc[("place", "Local"), "kappa"] == "92.0 ± 0.0"
    leads = live.leads(found).set_index("variant")
    assert leads.loc["Local, cross-entropy"].to_list() == ["Local", "-2.0 ± 0.0", "0 of 3"]
    assert leads.loc["Global, random region level", "compared with"] == "Global"
    # kappa 1 - (squared error a slide) / (35 / 6): 0.08 of 35 / 6, over the share of wrong grades
    wrong = live.mistakes(found).set_index(["task", "method"]).iloc[:, -1]
    assert wrong["place", "Local"] == pytest.approx(0.08 * 35 / 6 / 0.2)
    assert live.selection(found).shape == (5, 2) and live.selection(found).iloc[0, 1] == 92
    assert live.vote(found)[0] and live.vote(found)[1].startswith("place +3.0 ± 0.0")
    assert not live.vote(found.assign(fold=92.0))[0] and "+0.00" in live.vote(found.assign(fold=92.0))[3]


def test_reasons_are_those_of_claims_and_hold_what_was_measured():
    claims = {claim["id"] for claim in paper("hvit")["claims"]}
    probes = pd.DataFrame({"what is read": ["nothing", "patches, concatenated", "DINO, frozen", "trained by Local"]})
    probes.loc[4] = "random, frozen (mean of 5)"
    probes["core or rim (%)"], probes["shuffled"] = [64.0, 100.0, 71.0, 99.0, 76.0], 0.5
    found = live.reasons(rows(2.0), probes)
    assert found.keys() <= claims and "71 %" in found["global-attention"] and "92 to 92" in found["dino"]
    left_out = live.probes(parameters("hvit", profile="paper"), None, None, None)
    assert "left out" in left_out and "global-attention" not in live.reasons(rows(2.0), left_out)


def test_what_the_notebook_shows_of_the_synthetic_slides(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 2, "val": 2, "test": 48})
    p = parameters("hvit")
    items = live.held_out(p, tmp_path)
    for item in items[:6]:
        assert list(live.cores(p, tmp_path, item).values()).count(True) == item.grade
    shown = live.shown(p, tmp_path, None)
    assert list(shown.cores.values()).count(True) == 2 and shown.title == "synthetic slide, grade 2"
    models = {"Local": [ablation.build("Local", 0)], "mean pooling": [ablation.build("mean pooling", 0)]}
    looks = live.attention(models, shown)
    assert list(looks) == ["Local"] and looks["Local"].slide.shape == (5,)
    table = live.attention_by_content(p, tmp_path, models, count=3).set_index("patch shows")
    assert "tumour, core region" in table.index and table["region level"].between(0, 1).all()


def test_real_tissue_is_seen_by_a_pretrained_vit_or_the_patch_level_of_the_run(monkeypatch, capsys):
    own = live.Shown("slide", synthetic.TILING, PatchEncoder(64, 16, 48, 1, 3), "half", "a slide of PANDA")
    assert live.on_tissue(parameters("hvit", profile="paper"), own) == (own.patch, "half")
    assert "PANDA" in capsys.readouterr().out
    vit = timm.models.VisionTransformer(224, 14, num_classes=0, embed_dim=48, depth=1, num_heads=3).eval()
    vit.pretrained_cfg = {"description": "made up"}
    monkeypatch.setattr(backbones, "build", lambda *_, **options: vit)
    level, normalise = live.on_tissue(parameters("hvit"), own)
    assert (level.image, level.dim, normalise) == (224, 48, "imagenet") and level is not own.patch
    assert "equal to the ViT: tokens: at most" in capsys.readouterr().out


def test_regions_by_kind_show_each_kind():
    kinds = live.regions_by_kind(0)
    assert list(kinds) == ["core region", "rim region", "no tumour"]
    dark = {name: (image[32:96, 32:96].mean(-1) < 100).mean() for name, image in kinds.items()}
    assert dark["core region"] > 2 * max(dark["rim region"], dark["no tumour"])


def test_own_slides_are_a_folder_that_trains(tmp_path):
    folder = live.own_slides(tmp_path / "own", 0, count=3)
    own = data.Features(data.folder(folder), folder / "features")
    features, present, grade = own[0]
    assert len(own) == 3 and features.shape == (5, 16, 48) and present.all() and 0 <= grade < 6
    pixels = tensor(ablation.regions(data.folder(folder)[0])[0], slide_dino.NORMALISE)
    expected = slide_dino.embed(ablation.encoders("dino")[0], pixels)
    np.testing.assert_allclose(features, expected.unflatten(0, (5, 16)) if expected.ndim == 2 else expected, atol=1e-4)
