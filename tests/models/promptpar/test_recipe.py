"""The settings that PromptPAR's notebook runs with: the published recipe, small sets, the dry run, what is missing."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.data import DATASETS
from companion.errors import BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.tables import published_table
from companion.models.promptpar import model as promptpar
from companion.models.promptpar import recipe as runs
from companion.models.promptpar.model import PromptPAR
from companion.ops.papers import paper
from companion.toy.ablations import promptpar as study
from companion.toy.datasets import pedestrians as pocket
from companion.toy.datasets.tokens import Tokenizer

WORDS = ("A person with a hat", "A person with a bag", "A person in red")


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=0,
        method="PromptPAR",
        dataset="folder",
        clip=runs.CLIP,
        release="2023",
        quirks=True,
        texts="sentences",
        checkpoint="",
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


def setting(p: SimpleNamespace) -> runs.Setting:
    """At the paper profile, which needs no study and writes no pictures; what is trained is kept with the data."""
    return runs.setting(p, Path(p.data_root), {})


def small_backbones(embed: int = 64) -> tuple[CLIP, VisionTransformer]:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(2, 64, 32, patch_size=8, image_size=64)
    clip = CLIP(embed, vision, CLIPTextCfg(16, 64, width=64, heads=1, layers=2), quick_gelu=True).eval()
    return clip, VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)


@pytest.fixture
def small(monkeypatch) -> None:
    """Small networks in the place of the real ones."""
    monkeypatch.setattr(runs, "_backbones", lambda p, clip, fusion: small_backbones())
    monkeypatch.setattr(runs.open_clip, "get_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(runs, "WORKERS", 0)


@pytest.fixture
def folder(tmp_path) -> str:
    """Own pictures: 32 to train, 8 to test; the first attribute is a bright head, the last a red picture."""
    rng, lines = np.random.default_rng(0), [f"image,split,{','.join(WORDS)}"]
    for i in range(40):
        labels = rng.integers(0, 2, 3)
        pixels = rng.integers(0, 100, (40, 20, 3))
        pixels[:10] += 150 * labels[0]
        pixels[20:30, :5] += 150 * labels[1]
        pixels[..., 0] += 50 * labels[2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'train' if i < 32 else 'test'},{','.join(map(str, labels))}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return str(tmp_path)


# --- at pocket scale --------------------------------------------------------------------------------------------------


def test_the_live_run_is_the_studys(tmp_path):
    """The same pictures, start and steps as the row of the study with this seed and rate."""
    p, rates = given(profile="pocket", seed=3), dict.fromkeys((("street", m) for m in runs.LIVE), 3e-2)
    found = runs.setting(p, tmp_path, rates)
    assert found.rates == dict.fromkeys(runs.LIVE, 3e-2) and found.trained == found.methods == runs.LIVE
    assert found.names == pocket.ATTRIBUTES and len(found.sentences) == 12
    assert {part: len(data) for part, data in found.parts.items()} == {"train": 700, "test": 600}
    assert torch.equal(found.ratio, found.parts["train"].tensors[1].mean(0))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["seed3"]
    model, history = runs.train(found, "PromptPAR", epochs=2)
    row = study.train("PromptPAR", "street", 3e-2, 3, str(tmp_path / "data"), epochs=2)
    scores = runs.scores(model, found)
    assert {name: round(value, 2) for name, value in scores.totals.items()} == {n: row[n] for n in scores.totals}
    assert len(history) == 42 and model.count() == row["trained"]
    images, truth = runs.first(found, "test", 5)
    assert images.shape == (5, 3, 64, 32) and torch.equal(truth, found.parts["test"].tensors[1][:5])
    assert model.maps(images).regions.shape == (5, 5, 8, 4)


def test_what_runs_live_is_in_the_study_and_learns(tmp_path):
    assert set(runs.LIVE) <= set(study.METHODS) and runs.TASK in study.TASKS
    rates = dict.fromkeys((("street", m) for m in runs.LIVE), 1e-2)
    found = runs.setting(given(profile="pocket"), tmp_path, rates)
    _, history = runs.train(found, "heads only", epochs=6)
    losses = [row["loss"] for row in history]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    with pytest.raises(KeyError):
        runs.setting(given(profile="pocket"), tmp_path, {})


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_published_recipe(small, folder, monkeypatch):
    """Two sides with rates of their own, clipped each; 100 epochs of 2 batches of 16."""
    found, seen = setting(given(data_root=folder)), {}
    monkeypatch.setattr(runs, "fit", lambda model, loss, data, **options: seen.update(options) or [])
    model, _ = runs.train(found, "PromptPAR")
    expected = {
        "epochs": 100,
        "batch": 16,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decay": "all",
        "clip": 10,
        "seed": 0,
    }
    assert {k: seen[k] for k in expected} == expected
    (heads, fast), (prompts, slow) = (seen["sides"][side] for side in ("heads", "prompts"))
    assert len(fast) == len(slow) == 200 and fast[0] == fast[1] != fast[2]
    assert (round(float(fast[0]), 6), round(float(slow[0]), 6)) == (1.664e-3, 4.36e-4)
    assert {id(p) for p in heads} | {id(p) for p in prompts} == {id(p) for p in model.trained().values()}


@pytest.mark.parametrize("method", runs.METHODS)
def test_methods(method, small, folder):
    found = setting(given(data_root=folder, method=method))
    model, history = runs.train(found, method, epochs=1)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    expected = {"deep prompts": (0, 50), "heads only": (0, 0), "full fine-tuning": (0, 0)}.get(method, (4, 50))
    prompts = model.prompts.shape[1] if len(model.prompts) else 0
    assert (len(model.region_tokens), prompts) == expected
    assert (model.mask is None) == (method not in ("PromptPAR", "regions, no similarity loss"))
    scores = runs.scores(model, found)
    assert list(scores.totals) == ["mA", "Acc", "Prec", "Rec", "F1", "F1 of means"]
    assert len(scores.per_attribute(found.names)) == 3


def test_without_the_similarity_loss_its_tensors_only_decay(small, folder):
    found = setting(given(data_root=folder, method="regions, no similarity loss"))
    model, _ = runs.train(found, "regions, no similarity loss", epochs=1)
    assert model.temperature.item() == 1.0 and not model.agg_bn.bias.any()
    with_it, _ = runs.train(setting(given(data_root=folder)), "PromptPAR", epochs=1)
    assert with_it.temperature.item() != 1.0 and with_it.agg_bn.bias.any()


def test_training_learns_and_a_seed_gives_the_same(small, folder, tmp_path):
    found, other = setting(given(data_root=folder)), runs.setting(given(data_root=folder), tmp_path / "other", {})
    model, history = runs.train(found, "PromptPAR", epochs=24)
    again, same = runs.train(other, "PromptPAR", epochs=24)
    assert [row["loss"] for row in history] == [row["loss"] for row in same]
    # few pictures, networks of random weights: the loss falls by an eighth to a quarter
    assert np.mean([row["loss"] for row in history[-8:]]) < 0.95 * np.mean([row["loss"] for row in history[:4]])
    assert runs.scores(model, found).totals == runs.scores(again, found).totals
    assert not torch.equal(found.parts["train"][0][0], found.parts["train"][0][0])  # cut and flipped at random
    assert torch.equal(found.parts["test"][0][0], found.parts["test"][0][0])


def test_what_was_trained_is_kept_and_can_be_tested_elsewhere(small, folder, monkeypatch):
    """A training of many hours: read when it is done, and its weights are a `checkpoint`."""
    model, history = runs.train(setting(given(data_root=folder)), "PromptPAR", epochs=1)
    monkeypatch.setattr(promptpar, "loss", lambda *given: pytest.fail("trained again"))
    again, same = runs.train(setting(given(data_root=folder)), "PromptPAR", epochs=1)
    assert same == history and all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    file = Path(folder) / "trained" / "PromptPAR, folder, seed 0.safetensors"
    p = given(data_root=folder, checkpoint=str(file))
    read, none = runs.train(setting(p), "PromptPAR")
    assert none == [] and torch.equal(read.prompts, model.prompts)
    assert runs.scores(read, setting(p)).totals == runs.scores(model, setting(given(data_root=folder))).totals


def test_a_small_folder_of_ones_own_is_trained(small, folder):
    """Fewer pictures than the sixteen of a batch."""
    lines = (Path(folder) / "labels.csv").read_text().splitlines()
    (Path(folder) / "labels.csv").write_text("\n".join([*lines[:6], *lines[-2:]]))
    _, history = runs.train(setting(given(data_root=folder)), "PromptPAR", epochs=2)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)


def test_releases_and_quirks(small, folder):
    later = setting(given(data_root=folder, release="2025", quirks=False)).build("PromptPAR")
    assert any(name.startswith("visual_embed.") for name in later.trained()) and not later.official_quirks
    first = setting(given(data_root=folder)).build("PromptPAR")
    assert not any(name.startswith("visual_embed.") for name in first.trained()) and first.official_quirks


def test_the_first_release_needs_a_clip_as_wide_as_the_fusion(small, folder, monkeypatch):
    monkeypatch.setattr(runs, "_backbones", lambda p, clip, fusion: small_backbones(embed=32))
    with pytest.raises(BadParameter, match="'2025' with ViT-L-14"):
        setting(given(data_root=folder)).build("PromptPAR")


def test_the_authors_weights_are_tested_without_training(small, folder, tmp_path):
    clip, fusion = small_backbones()
    state = PromptPAR(clip, WORDS, Tokenizer(), fusion, official_quirks=True).eval().to_official()
    parts = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("clip_model.", "model.")}
    torch.save({"ViT_model": parts["clip_model."], "model_state_dict": parts["model."]}, tmp_path / "c.pth")
    found = setting(given(data_root=folder, checkpoint=str(tmp_path / "c.pth")))
    model, history = runs.train(found, "PromptPAR")
    assert history == [] and not model.training and 0 <= runs.scores(model, found).totals["mA"] <= 100
    assert torch.equal(model.prompts, state["clip_model.visual.transformer.prompt_deep"].squeeze(2))
    images, truth = runs.first(found, "test", 3)
    assert images.shape == (3, 3, 64, 64) and torch.equal(truth, found.parts["test"].labels[:3])


def test_phrases_of_rapv1():
    p = given(dataset="par/rapv1", texts="phrases")
    with pytest.raises(MissingData, match="RAP v1"):  # as far as the data: phrases are known
        setting(p)
    with pytest.raises(BadParameter, match="par/rapv1"):
        setting(given(dataset="par/peta", texts="phrases"))


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_the_dry_run_takes_two_steps(small):
    found = setting(given(dataset="par/pa100k", dry_run=True))
    assert len(found.sentences) == 26 and "dry run" in found.title
    model, history = runs.train(found, "PromptPAR")
    assert len(history) == 2 and model.bn.num_features == 26
    assert len(runs.scores(model, found).per_attribute(found.names)) == 26
    phrases = setting(given(dataset="par/rapv1", dry_run=True, texts="phrases"))
    assert phrases.sentences[-1] == "action carry hand"


@pytest.mark.slow
def test_the_dry_run_at_full_size():
    found = setting(given(dataset="par/pa100k", dry_run=True))
    model, history = runs.train(found, "PromptPAR")
    assert len(history) == 2 and model.count(inert=True) == 2_567_043
    assert list(runs.scores(model, found).totals)


# --- what is missing --------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingData, match="PA-100K"):
        setting(given(dataset="par/pa100k"))
    with pytest.raises(MissingWeights, match="companion fetch"):
        setting(given(data_root=folder))
    with pytest.raises(MissingWeights, match=r"PETA_Checkpoint\.pth"):
        setting(given(data_root=folder, checkpoint="nothing.pth"))
    with pytest.raises(BadParameter, match="holds PromptPAR's weights"):
        setting(given(data_root=folder, checkpoint="nothing.pth", method="heads only"))
    (tmp_path / "c.pth").write_bytes(b"no")
    with pytest.raises(CorruptFile, match=r"c\.pth"):
        setting(given(data_root=folder, checkpoint=str(tmp_path / "c.pth")))


def test_clip_is_looked_for_in_the_data_root(tmp_path):
    assert runs.weights(given(data_root=str(tmp_path))) == "pretrained"
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "CLIP-ViT-L-14-openai.safetensors"
    file.touch()
    assert runs.weights(given(data_root=str(tmp_path))) == file
    assert runs.weights(given(data_root=str(tmp_path), clip="ViT-B-16-quickgelu/openai")) == "pretrained"
    assert runs.weights(given(weights="mine.pt")) == "mine.pt"


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_gather_and_stand_beside_the_published_ones(tmp_path):
    path, p = tmp_path / "measured.csv", given(dataset="par/peta")
    assert runs.measured(path).empty and len(runs.tables(runs.measured(path))) == 3
    totals = {"mA": 88.0, "Acc": 82.0, "Prec": 89.0, "Rec": 90.0, "F1": 89.1, "F1 of means": 89.5}
    for seed, shift in ((0, 0.0), (1, 1.0)):
        scores = SimpleNamespace(totals={k: v + shift for k, v in totals.items()})
        rows = runs.measured(path, runs.row(given(dataset="par/peta", seed=seed), scores))
    rows = runs.measured(path, runs.row(p, SimpleNamespace(totals=totals | {"mA": 86.0})))
    assert len(rows) == 2
    assert runs.cells(rows)["PromptPAR", "PETA mA"] == 87.5
    assert runs.cells(rows)["PromptPAR", "PETA Recall"] == 90.5
    table = runs.tables(rows)["PETA, PA100K and RAPv1, standard protocol, ViT-L/14"].set_index("method")
    assert table.loc["PromptPAR", "PETA mA"] == "88.76 / 87.50"
    assert table.loc["PromptPAR", "PA100K mA"] == "87.47 / not run"
    assert table.loc["VTB", "PETA mA"] == "85.31"


def test_what_is_not_as_published_is_in_the_name():
    assert runs.label(given()) == "PromptPAR"
    changed = given(release="2025", quirks=False, texts="phrases", clip="ViT-B-16-quickgelu/openai")
    assert runs.label(changed) == "PromptPAR, code of 2025, as meant, phrases, ViT-B-16-quickgelu/openai"
    assert runs.label(given(checkpoint="a/x.pth")) == "PromptPAR, weights of x.pth"


def test_facts_and_code_name_the_same_things():
    facts = paper("promptpar")
    tables, weights = {t["id"] for t in facts["tables"]}, {w["name"] for w in facts["weights"]}
    assert all(set(run["tables"]) <= tables and set(run["weights"]) <= weights for run in facts["runs"])
    assert set(runs.RESULTS) <= tables
    known = {name for name, dataset in DATASETS.items() if dataset.task == "attributes" and dataset.group != "pocket"}
    assert {run["data"] for run in facts["runs"]} == known == set(runs.COLUMNS)
    assert all(sum(name.startswith(run["data"]) for name in DATASETS) == 1 for run in facts["runs"])
    directional = [c for c in facts["claims"] if c["kind"] == "directional"]
    assert {c[role] for c in directional for role in ("better", "worse")} <= set(runs.METHODS)
    columns = {c for t in facts["tables"] if t["id"] in runs.RESULTS for c in t["columns"]}
    assert columns <= {f"{name} {m}" for name in runs.COLUMNS.values() for m in ("mA", "Acc", "Prec", "Recall", "F1")}


def test_the_published_average_f1_is_that_of_the_images():
    """From the published Prec and Recall the F1 of the means is above what PromptPAR and VTB report."""
    frame = published_table("promptpar", "sota_peta_pa100k_rapv1").set_index("method")
    for name in ("PETA", "PA100K", "RAPv1"):
        precision, recall = frame[f"{name} Prec"], frame[f"{name} Recall"]
        above = 2 * precision * recall / (precision + recall) - frame[f"{name} F1"]
        assert (above[["PromptPAR", "VTB"]] > 0.2).all() and (above[["PromptPAR", "VTB"]] < 0.4).all()
        assert (above[["DRFormer", "SSPNet"]].abs() < 0.02).all()


def test_counted_parameters_in_the_table_are_sums():
    frame = published_table("promptpar", "computed_params_l14")
    assert (frame["prompt side trained"] + frame["fusion side trained"] == frame["trained"]).all()
    assert ((100 * frame["trained"] / frame["all"]).round(4) == frame["trained percent"]).all()
