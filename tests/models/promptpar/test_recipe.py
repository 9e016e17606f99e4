"""PromptPAR's recipe: the published settings, small datasets, resuming, the dry run, missing files, tables."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import DATASETS
from companion.data.attributes_sets import SENTENCES as SENTENCES_OF
from companion.errors import CorruptFile, MissingData, MissingWeights
from companion.evaluation.claims import SYNTHETIC
from companion.evaluation.tables import published_table
from companion.models.promptpar import PromptPAR, recipe
from companion.models.promptpar.model import Output
from companion.ops import report
from companion.ops.papers import paper
from companion.toy.datasets.tokens import Tokenizer
from companion.training.checkpoints import Checkpoint
from tests.conftest import parameters
from tests.models.common import assert_goes_on, refuses
from tests.small import shrink, small_backbones

SENTENCES = ("A person with a hat", "A person with a bag", "A person in red")


def given(**changes) -> SimpleNamespace:
    usual = {"profile": "paper", "dataset": "folder", "data_root": "nowhere", "accelerator": "cpu"}
    return parameters("promptpar", **usual | changes)


def setting(**changes) -> recipe.Setting:
    """The run's folder is that of the data."""
    p = given(**changes)
    return recipe.setting(p, Path(p.data_root))


@pytest.fixture
def networks(monkeypatch) -> None:
    """Small networks in place of the real ones."""
    shrink("promptpar", monkeypatch)


@pytest.fixture
def small(monkeypatch, networks) -> None:
    """And one epoch."""
    epochs(monkeypatch, 1)


def epochs(monkeypatch, count: int) -> None:
    """Train for `count` epochs in place of the published 100."""
    table = recipe.recipe()
    table.loc["epochs"] = count
    monkeypatch.setattr(recipe, "recipe", lambda: table)


@pytest.fixture
def folder(tmp_path) -> str:
    """Own images: 32 to train, 8 to test; the first attribute is a bright head, the last a red image."""
    rng, lines = np.random.default_rng(0), [f"image,split,{','.join(SENTENCES)}"]
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


def test_the_published_settings(networks, folder, monkeypatch):
    """Two parameter groups with their own learning rates and clipping; 100 epochs of 2 batches of 16."""
    seen = {}
    monkeypatch.setattr(recipe, "fit", lambda model, loss, data, **options: seen.update(options) or [])
    model, _ = setting(data_root=folder).train("PromptPAR")
    assert (seen["epochs"], seen["batch"], seen["seed"]) == (100, 16, 0)
    assert [callback.max_norm for callback in seen["callbacks"]] == [10] and seen["last"] == "train"
    optimizer = seen["optimizer"](model)
    assert isinstance(optimizer, torch.optim.SGD)
    facts = {g["name"]: (g["lr"], g["momentum"], g["weight_decay"], g["nesterov"]) for g in optimizer.param_groups}
    assert facts == {"prompts": (4e-3, 0.9, 1e-4, False), "heads": (8e-3, 0.9, 1e-4, False)}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.trained().values()}
    heads, prompts = (seen["schedule"][name](lr, 200, 2) for name, lr in (("heads", 8e-3), ("prompts", 4e-3)))
    assert len(heads) == len(prompts) == 200 and heads[0] == heads[1] != heads[2]
    assert (round(heads[0], 6), round(prompts[0], 6)) == (1.664e-3, 4.36e-4)  # the log in the authors' README


@pytest.mark.parametrize("method", recipe.METHODS)
def test_methods(method, small, folder):
    found = setting(data_root=folder, method=method)
    model, history = found.train(method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    expected = {"deep prompts": (0, 50), "heads only": (0, 0), "full fine-tuning": (0, 0)}.get(method, (4, 50))
    prompts = model.prompts.shape[1] if len(model.prompts) else 0
    assert (len(model.region_tokens), prompts) == expected
    assert (model.mask is None) == (method not in ("PromptPAR", "regions, no similarity loss"))
    scores = found.scores(model)
    assert list(scores.totals) == ["mA", "Acc", "Prec", "Rec", "F1", "F1 of means"]
    assert len(scores.per_attribute(found.names)) == 3


def test_without_the_similarity_loss_its_tensors_only_decay(small, folder):
    method = "regions, no similarity loss"
    model, _ = setting(data_root=folder, method=method).train(method)
    assert model.temperature.item() == 1.0 and not model.agg_bn.bias.any()
    with_it, _ = setting(data_root=folder).train("PromptPAR")
    assert with_it.temperature.item() != 1.0 and with_it.agg_bn.bias.any()


def test_training_learns(small, folder, monkeypatch):
    epochs(monkeypatch, 24)
    found = setting(data_root=folder)
    _, history = found.train("PromptPAR")
    # few images, networks of random weights: the loss falls by an eighth to a quarter
    assert np.mean([row["loss"] for row in history[-8:]]) < 0.95 * np.mean([row["loss"] for row in history[:4]])
    assert not torch.equal(found.parts["train"][0][0], found.parts["train"][0][0])  # random crops and flips
    assert torch.equal(found.parts["test"][0][0], found.parts["test"][0][0])
    file = Path(folder) / "labels.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:6], *lines[-2:]]))  # fewer images than the batch of sixteen
    epochs(monkeypatch, 1)
    (row,) = setting(data_root=folder).train("PromptPAR")[1]
    assert np.isfinite(row["loss"])


def test_a_killed_training_resumes_and_its_weights_are_a_checkpoint(small, folder, tmp_path, monkeypatch):
    epochs(monkeypatch, 3)
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))

    def train(out):
        return recipe.setting(given(data_root=folder), out).train("PromptPAR")

    model, out = assert_goes_on(train, tmp_path, monkeypatch, recipe, "loss", 3)
    monkeypatch.setattr(recipe, "loss", None)  # a finished training is only read
    assert torch.equal(train(out)[0].prompts, model.prompts)
    found = setting(data_root=folder, checkpoint=str(out / "trained" / "PromptPAR, folder, seed 0.safetensors"))
    read, none = found.train("PromptPAR")
    assert none == [] and torch.equal(read.prompts, model.prompts)
    assert found.scores(read).totals == setting(data_root=folder).scores(model).totals


def test_releases_and_quirks(small, folder):
    later = setting(data_root=folder, release="2025", quirks=False).build("PromptPAR")
    assert any(name.startswith("visual_embed.") for name in later.trained()) and not later.official_quirks
    first = setting(data_root=folder).build("PromptPAR")
    assert not any(name.startswith("visual_embed.") for name in first.trained()) and first.official_quirks


def test_the_authors_weights_are_tested_without_training(small, folder, tmp_path):
    clip, fusion = small_backbones()
    state = PromptPAR(clip, SENTENCES, Tokenizer(), fusion, official_quirks=True).eval().to_official()
    parts = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("clip_model.", "model.")}
    torch.save({"ViT_model": parts["clip_model."], "model_state_dict": parts["model."]}, tmp_path / "c.pth")
    found = setting(data_root=folder, checkpoint=str(tmp_path / "c.pth"))
    model, history = found.train("PromptPAR")
    assert history == [] and not model.training and 0 <= found.scores(model).totals["mA"] <= 100
    assert torch.equal(model.prompts, state["clip_model.visual.transformer.prompt_deep"].squeeze(2))
    images, truth = found.first("test", 3)
    assert images.shape == (3, 3, 64, 64) and torch.equal(truth, found.parts["test"].labels[:3])


def test_the_dry_run_takes_two_steps(small):
    found = setting(dataset="par/pa100k", dry_run=True)
    assert len(found.names) == 26 and "dry run" in found.title
    model, history = found.train("PromptPAR")
    assert len(history) == 2 and model.bn.num_features == 26
    assert len(found.scores(model).per_attribute(found.names)) == 26
    for texts, last in (("released", "action carry hand"), ("sentences", SENTENCES_OF["par/rapv1"][-1])):
        assert setting(dataset="par/rapv1", dry_run=True, texts=texts).names[-1] == last


@pytest.mark.slow
@pytest.mark.large
def test_the_dry_run_at_full_size():
    found = setting(dataset="par/pa100k", dry_run=True)
    model, history = found.train("PromptPAR")
    assert len(history) == 2 and model.count(inert=True) == 2_567_043
    assert list(found.scores(model).totals)


def test_what_is_missing_or_does_not_fit_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "c.pth").write_bytes(b"no")
    refuses(
        (lambda: setting(dataset="par/pa100k"), "PA-100K"),
        (lambda: setting(dataset="par/rapv1", texts="phrases"), "RAP v1"),  # phrases are known
        error=MissingData,
    )
    refuses(
        (lambda: setting(data_root=folder), "on a machine with a network"),
        (lambda: setting(data_root=folder, checkpoint="nothing.pth"), r"PETA_Checkpoint\.pth"),
        error=MissingWeights,
    )
    refuses((lambda: setting(data_root=folder, checkpoint=str(tmp_path / "c.pth")), r"c\.pth"), error=CorruptFile)
    monkeypatch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())
    refuses(
        (lambda: setting(dataset="par/peta", texts="phrases"), "par/rapv1"),
        (lambda: setting(data_root=folder, checkpoint="x.pth", method="heads only"), "holds PromptPAR's weights"),
    )
    monkeypatch.setattr(recipe, "_backbones", lambda p, clip, fusion: small_backbones(embed=32))
    refuses((lambda: setting(data_root=folder).build("PromptPAR"), "'2025' with ViT-L-14"))


def test_clip_is_looked_for_in_the_data_root(tmp_path):
    assert recipe.weights(given(data_root=str(tmp_path))) == "pretrained"
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "CLIP-ViT-L-14-openai.safetensors"
    file.touch()
    assert recipe.weights(given(data_root=str(tmp_path))) == file
    assert recipe.weights(given(data_root=str(tmp_path), clip="ViT-B-16-quickgelu/openai")) == "pretrained"
    assert recipe.weights(given(weights="mine.pt")) == "mine.pt"


def test_results_stand_beside_the_published_ones(tmp_path):
    path = tmp_path / "measured.csv"
    assert recipe.measured(path).empty and len(recipe.tables(recipe.measured(path))) == 3
    totals = {"mA": 87.0, "Acc": 82.0, "Prec": 89.0, "Rec": 90.0, "F1": 89.1, "F1 of means": 89.5}
    for seed in (0, 1):
        scores = SimpleNamespace(totals={name: value + seed for name, value in totals.items()})
        rows = recipe.measured(path, recipe.row(given(dataset="par/peta", seed=seed), scores))
    found = recipe.cells(rows)
    assert (found["PromptPAR", "PETA mA"], found["PromptPAR", "PETA Recall"]) == (87.5, 90.5)
    table = recipe.tables(rows)["PETA, PA100K and RAPv1, standard protocol, ViT-L/14"].set_index("method")
    assert table.loc["PromptPAR", ["PETA mA", "PA100K mA"]].tolist() == ["88.76 / 87.50", "87.47 / not run"]
    assert table.loc["VTB", "PETA mA"] == "85.31"


def test_what_is_not_as_published_is_in_the_name():
    assert recipe.label(given()) == "PromptPAR"
    changed = given(release="2025", quirks=False, clip="ViT-B-16-quickgelu/openai", select="maxima")
    assert recipe.label(changed) == "PromptPAR, code of 2025, as meant, ViT-B-16-quickgelu/openai, maxima over epochs"
    assert recipe.label(given(dataset="par/rapv1", texts="sentences")) == "PromptPAR, sentences"
    assert recipe.label(given(dataset="par/rapv1", texts="phrases")) == "PromptPAR"
    assert recipe.label(given(dataset="par/peta", texts="sentences")) == "PromptPAR"
    assert recipe.label(given(checkpoint="a/x.pth")) == "PromptPAR, weights of x.pth"


def test_facts_and_code_name_the_same_things():
    facts = paper("promptpar")
    tables = {t["id"]: t["columns"] for t in facts["tables"]}
    known = {name for name, dataset in DATASETS.items() if dataset.task == "attributes" and dataset.group != "pocket"}
    assert {run["data"] for run in facts["runs"]} == known == set(recipe.COLUMNS)
    claims = [c for c in facts["claims"] if c["kind"] == SYNTHETIC]
    assert {c[role] for c in claims for role in ("better", "worse")} <= set(recipe.METHODS)
    columns = {column for name in recipe.RESULTS for column in tables[name]}
    assert columns <= {f"{name} {m}" for name in recipe.COLUMNS.values() for m in ("mA", "Acc", "Prec", "Recall", "F1")}


def test_counted_parameters_are_sums_and_the_published_average_f1_is_that_of_the_images():
    """From the published Prec and Recall the F1 of the means is above what PromptPAR and VTB report."""
    frame = published_table("promptpar", "computed_params_l14")
    assert (frame["prompt side trained"] + frame["fusion side trained"] == frame["trained"]).all()
    assert ((100 * frame["trained"] / frame["all"]).round(4) == frame["trained percent"]).all()
    frame = published_table("promptpar", "sota_peta_pa100k_rapv1").set_index("method")
    for name in ("PETA", "PA100K", "RAPv1"):
        precision, recall = frame[f"{name} Prec"], frame[f"{name} Recall"]
        above = 2 * precision * recall / (precision + recall) - frame[f"{name} F1"]
        assert (above[["PromptPAR", "VTB"]] > 0.2).all() and (above[["PromptPAR", "VTB"]] < 0.4).all()
        assert (above[["DRFormer", "SSPNet"]].abs() < 0.02).all()


def test_the_last_images_of_an_epoch_are_trained_on(small, folder):
    file = Path(folder) / "labels.csv"
    lines = file.read_text().splitlines()
    for count, steps in ((19, 2), (17, 1)):  # a single image is none for a batch norm
        file.write_text("\n".join([*lines[: 1 + count], *lines[-2:]]))
        assert len(setting(data_root=folder).train("PromptPAR")[1]) == steps


def test_every_part_of_a_step_has_two_images_for_the_batch_norms(small, folder):
    """A step is split into micro-batches, and these over devices."""
    file = Path(folder) / "labels.csv"
    lines = file.read_text().splitlines()
    for count, accumulate, steps in ((20, 2, 2), (19, 2, 1), (23, 4, 1), (24, 4, 2)):
        file.write_text("\n".join([*lines[: 1 + count], *lines[-2:]]))
        assert len(setting(data_root=folder, accumulate=accumulate).train("PromptPAR")[1]) == steps
    refuses((lambda: setting(data_root=folder, accumulate=9).train("PromptPAR"), "accumulate = 9 .*batch of 16"))


def test_maxima_over_epochs_are_those_that_the_authors_print(small, folder, tmp_path, monkeypatch):
    epochs(monkeypatch, 3)
    found = setting(data_root=folder, select="maxima")
    model, _ = found.train("PromptPAR")
    assert len(found.epochs) == 3 and found.epochs[-1] == found.scores(model).totals
    row = recipe.row(given(select="maxima"), found.scores(model), found.epochs)
    assert row["mA"] == max(e["mA"] for e in found.epochs) and np.isnan(row["Prec"])
    cells = recipe.claim_cells(recipe.measured(tmp_path / "m.csv", row | {"dataset": "par/peta"}))
    assert cells["PromptPAR", "PETA mA"] == row["mA"] and ("PromptPAR", "PETA Prec") not in cells
    assert setting(data_root=folder).epochs == []


def test_text_prompts_only_decay(small, folder):
    before = setting(data_root=folder).build("PromptPAR")
    after, history = setting(data_root=folder).train("PromptPAR")
    twin = before.text_prompts.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([twin], 1.0, momentum=0.9, weight_decay=1e-4)
    rates = recipe.by_epoch(10)(4e-3, len(history), len(history))
    for rate in rates:
        optimizer.param_groups[0]["lr"], twin.grad = rate, torch.zeros_like(twin)
        optimizer.step()
    torch.testing.assert_close(after.text_prompts, twin.detach(), rtol=1e-6, atol=0)
    assert not torch.equal(after.text_prompts, before.text_prompts)


def test_clip_is_in_half_precision_where_the_authors_precision_runs(small, folder, monkeypatch):
    monkeypatch.setattr(recipe, "device", lambda accelerator: "cuda")
    assert recipe.hardware(given()).precision == "32-true"
    for changes in ({"precision": "32-true"}, {"method": "full fine-tuning"}):
        assert not recipe.half(given(**changes))
    found = setting(data_root=folder)
    model, history = found.train("PromptPAR")
    visual = model.clip.visual
    assert (
        visual.conv1.weight.dtype == visual.proj.dtype == torch.float16 and visual.ln_pre.weight.dtype == torch.float32
    )
    assert all(np.isfinite(row["loss"]) for row in history) and model.prompts.dtype == torch.float32
    images = found.first("test", 2)[0]
    half = model(images).logits
    model.clip.float()
    assert (half - model(images).logits).abs().max() < 0.05 and model.maps(images).cosines.shape[0] == 2


def test_unclear_labels_of_rap(networks):
    logits, labels = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]])
    ratio = torch.tensor([0.2, 0.2, 0.2])
    whole = recipe.loss(Output(logits, logits), labels, ratio)
    without = recipe.loss(Output(logits, logits), labels, ratio, unclear=False)
    two = np.exp(0.8) * np.log(2)  # at logit 0 the cross-entropy of any target is log 2
    assert float(whole - without) == pytest.approx(1.5 * two, rel=1e-5)
    high = torch.full((1, 3), 30.0)
    assert float(recipe.loss(Output(high, high), labels[:, 2:].expand(1, 3), ratio)) < 0  # no lower bound


def test_paper_results_are_judged_from_measurements(tmp_path):
    path, totals = tmp_path / "measured.csv", {"mA": 90.0, "Acc": 85.0, "Prec": 91.0, "Rec": 92.0, "F1": 91.0}

    def status(claim):
        run = report.start("promptpar", out=str(tmp_path))
        run.claims_from_measured(recipe.claim_cells(recipe.measured(path)))
        return {row["id"]: row["status"] for row in run.ledger()}[claim]

    assert status("full") == "not run"
    for name in ("par/peta", "par/pa100k", "par/rapv1"):
        recipe.measured(path, recipe.row(given(dataset=name), SimpleNamespace(totals=totals)))
    assert status("full") == "holds" and status("full-b16") == status("full-sota") == "not run"
    b16 = given(dataset="par/rapv1", release="2025", clip="ViT-B-16-quickgelu/openai")
    recipe.measured(path, recipe.row(b16, SimpleNamespace(totals=totals)))
    recipe.measured(path, recipe.row(given(dataset="par/peta"), SimpleNamespace(totals=totals | {"mA": 88.0})))
    assert status("full") == "fails" and status("full-b16") == "holds"


def test_the_f1_of_means_separates_two_definitions():
    """DRFormer printed it, to rounding; PromptPAR and VTB printed the mean of the images' F1, which is lower."""
    found = recipe.f1_definitions().set_index("method")
    assert found.loc["PromptPAR", "PETA F1 of means"] == pytest.approx(2 * 89.04 * 89.74 / (89.04 + 89.74))
    assert abs(found.loc["DRFormer", "PETA difference"]) < 0.02
    assert all(0.15 < found.loc[method, "PETA difference"] < 0.5 for method in ("PromptPAR", "VTB"))
