"""The settings that DPLQ's notebook runs with: the published recipe, protocols on small sets, what is missing."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import DATASETS, domains_sets
from companion.errors import BadParameter, MissingData, MissingWeights
from companion.evaluation.tables import published_table
from companion.models.dplq import recipe as runs
from companion.models.dplq.model import DPLQ, MAE, DomainModel, NoFeatures
from companion.models.layers.clip_prompting import MaPLe, ZeroShot
from companion.ops import record
from companion.ops.files import read_json
from companion.ops.papers import paper
from companion.toy import encoders
from companion.toy.ablations import dplq as study
from companion.toy.datasets.tokens import Tokenizer
from companion.training.fit import fit

EACH = 40  # pictures a class: 20 to train, 8 to validate, 12 to test


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=1,
        method="DPLQ",
        protocol="base to novel",
        dataset="medical/btmri",
        targets="",
        clip="ViT-B-16/openai",
        domain="",
        domain_weights="",
        noise="always",
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


@pytest.fixture
def pocket(monkeypatch) -> None:
    """The pocket CLIP in the place of the real one; its image tower has 6 blocks, so prompts of depth 3 fit."""
    monkeypatch.setattr(runs, "_clip", lambda p, weights: encoders.build("pocket_clip"))
    monkeypatch.setattr(runs.open_clip, "get_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(runs, "WORKERS", 0)


@pytest.fixture
def sets(tmp_path, monkeypatch) -> str:
    """Two small medical sets in the authors' layout, a class a brightness; the data root."""
    for name in ("medical/btmri", "medical/ccbtm"):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], sizes={}))
        folder = tmp_path / DATASETS[name].folders[0] / DATASETS[name].folders[-1]
        for label, key in enumerate(sorted(domains_sets.CLASSES[name])):
            (folder / key).mkdir(parents=True)
            for number in range(EACH):
                pixels = np.random.default_rng(number).integers(60 * label, 60 * label + 60, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(folder / key / f"{number}.png")
    return str(tmp_path)


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "lr", "epochs", "depth"),
    [("base to novel", 3.5e-3, 15, 9), ("cross-dataset", 2.6e-3, 25, 3), ("domain generalisation", 2.6e-3, 25, 3)],
)
def test_the_published_recipe(protocol, lr, epochs, depth):
    found = runs.published_settings(protocol)
    assert (found["learning rate"], found["epochs"], found["prompt depth"]) == (lr, epochs, depth)
    options = runs._options(given(protocol=protocol))
    expected = {
        "epochs": epochs,
        "batch": 4,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "decay": "all",
        "warmup_lr": 1e-5,
        "final_lr": 0.0,
    }
    assert {k: options[k] for k in expected} == expected
    assert options["warmup"] * epochs == pytest.approx(1)


def test_the_rates_of_a_training_are_the_authors():
    """25 epochs of 64 images in batches of 4: the first at 1e-5, then half a cosine that ends above 0."""
    p = given(protocol="cross-dataset")
    data = TensorDataset(torch.randn(64, 3), torch.zeros(64, dtype=torch.long))
    history = fit(nn.Linear(3, 2), study.loss, data, lr=runs._rates(p)["DPLQ"], **runs._options(p))
    expected = [1e-5] + [2.6e-3 * (1 + np.cos(np.pi * (e - 1) / 25)) / 2 for e in range(1, 25)]
    np.testing.assert_allclose([row["lr"] for row in history], np.repeat(expected, 16))


# --- protocols, end to end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["cross-dataset", "domain generalisation"])
def test_a_model_is_carried_over_to_other_sets(protocol, pocket, sets, tmp_path):
    p = given(protocol=protocol, targets="medical/ccbtm", domain="clip", data_root=sets)
    found = runs.setting(p, tmp_path, {})
    model, history = runs.train(found, "DPLQ", epochs=1, warmup=0.0)
    assert isinstance(model, DPLQ) and len(model.deep_text) == 2 and len(history) == 16
    scores = runs.scores(model, found, p.method)
    assert list(scores) == ["source", "medical/ccbtm"] and all(0 <= s <= 100 for s in scores.values())
    assert len(found.inputs("DPLQ", "medical/ccbtm")) == 4 * (12 if protocol == "cross-dataset" else EACH)
    assert runs.scores(model, found, p.method) == scores, "the noise is drawn from the seed"
    assert len(model.embedded) == 4 and model.length == model.ends.max() + 1, "the classes trained on are back"
    table = runs.measured(tmp_path / "measured.csv", runs.rows(p, scores))
    here = runs.cells(table, protocol)
    name = "DPLQ, domain model clip, trained on BTMRI"
    assert here == {(name, "BTMRI"): scores["source"], (name, "CCBTM"): scores["medical/ccbtm"]}
    shown = runs.tables(table, protocol)
    remote, medical = shown.values()
    assert medical.method.iloc[-1] == name and name not in set(remote.method)


def test_base_to_novel_trains_on_the_base_classes_alone(pocket, sets, tmp_path):
    p = given(method="CoCoOp", data_root=sets)
    found = runs.setting(p, tmp_path, {})
    assert found.classes == ("glioma", "meningioma")
    assert found.test_classes == {"base": ("glioma", "meningioma"), "novel": ("no brain tumor", "pituitary")}
    assert [len(found.inputs("CoCoOp", part)) for part in ("train", "base", "novel")] == [32, 24, 24]
    model, _ = runs.train(found, "CoCoOp", epochs=1, warmup=0.0)
    scores = runs.scores(model, found, p.method)
    assert list(scores) == ["base", "novel", "HM"]
    # training pictures are cropped at random, test pictures are not
    cuts = {part: [runs.first(found, "CoCoOp", part, 3)[0] for _ in range(2)] for part in ("train", "base")}
    assert not torch.equal(*cuts["train"]) and torch.equal(*cuts["base"])


def test_zero_shot_has_nothing_to_train(pocket, sets, tmp_path):
    found = runs.setting(given(method="zero-shot CLIP", data_root=sets), tmp_path, {})
    model, history = runs.train(found, "zero-shot CLIP")
    assert isinstance(model, ZeroShot) and history == [] and found.rates == {}


def test_a_folder_of_ones_own(pocket, tmp_path, sets):
    mine = tmp_path / "medical/BTMRI/BTMRI"
    found = runs.setting(given(dataset="folder", data_root=str(mine), method="CoOp"), tmp_path, {})
    assert found.title == "folder, base to novel" and found.classes == ("glioma", "meningioma")
    with pytest.raises(BadParameter, match="'remote-sensing', 'medical'"):
        runs.setting(given(dataset="folder", data_root=str(mine)), tmp_path, {})


def test_the_live_run_at_pocket_scale_is_the_studys(tmp_path):
    p = given(profile="pocket", seed=3)
    rates = {(runs.TASK, method): 1e-2 for method in study.METHODS}
    found = runs.setting(p, tmp_path, rates)
    assert found.methods == runs.LIVE and set(found.rates) == {"MaPLe", "DPLQ"}
    model, history = runs.train(found, "DPLQ", epochs=1)
    assert len(history) == 8
    scores = runs.scores(model, found, "DPLQ")
    expected = study.train("DPLQ", runs.TASK, 1e-2, 3, str(tmp_path / "data"), epochs=1)
    assert {name: round(value, 2) for name, value in scores.items()} == {n: expected[n] for n in scores}
    images, labels, domain = runs.first(found, "DPLQ", "novel", 5)
    assert images.shape == (5, 3, 32, 32) and labels.shape == (5,) and len(domain) == 5
    assert model(images, domain).shape == (5, len(found.classes))


# --- what is missing --------------------------------------------------------------------------------------------------


def test_the_domain_model_by_name_by_set_and_by_file(pocket, sets, tmp_path, monkeypatch):
    assert runs.domain_name(given(dataset="remote/aid")) == "remote-sensing"
    assert runs.domain_name(given()) == "medical"
    assert runs.domain_name(given(domain="clip")) == "clip"
    with pytest.raises(MissingWeights, match=r"vit-b-checkpoint-1599\.pth into .*weights"):
        runs.setting(given(domain="remote-sensing", data_root=sets), tmp_path, {})
    assert runs.weights(given(), "medical", "") == "pretrained"
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "vit-b-checkpoint-1599.pth"
    sizes = dict(image_size=32, patch=8, width=64, depth=1, heads=1, decoder_width=32, decoder_depth=1)
    torch.save({"model": MAE(**sizes).to_official()}, file)
    p = given(domain="remote-sensing", data_root=sets, protocol="cross-dataset", targets="medical/ccbtm")
    found = runs.setting(p, tmp_path, {})
    assert found.build("DPLQ").domain.num_features == 32
    assert runs.weights(p, "remote-sensing", "mine.pth") == "mine.pth"


def test_the_clip_and_the_data_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="ViT-B-16/openai"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "open_clip_model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert runs.weights(given(data_root=str(tmp_path)), "clip", "") == file
    monkeypatch.setattr(runs, "_clip", lambda p, weights: encoders.build("pocket_clip"))
    with pytest.raises(MissingData, match="Brain tumour MRI"):
        runs.setting(given(data_root=str(tmp_path), domain="none"), tmp_path, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(targets="medical/ccbtm"), "nothing with the protocol 'base to novel'"),
        (dict(protocol="cross-dataset", targets="medical/btmri"), "targets = 'medical/btmri'"),
        (dict(protocol="cross-dataset", dataset="folder"), "targets = ''"),
        (dict(clip="roberta-ViT-B-32/laion2b_s12b_b32k"), "OpenAI's vocabulary"),
        (dict(clip="ViT-B-16/nobody"), "openclip:ViT-B-16/"),
        (dict(clip="ViT-X/openai"), "open_clip.list_models"),
    ],
)
def test_bad_parameters_name_the_accepted_ones(changes, message, tmp_path):
    with pytest.raises(BadParameter, match=message):
        runs.setting(given(**changes), tmp_path, {})


def test_targets_are_the_other_sets_of_the_domain():
    assert runs.targets(given()) == ["medical/chmnist", "medical/ccbtm"]
    assert len(runs.targets(given(dataset="remote/rsicd"))) == 7
    assert runs.targets(given(targets=" remote/aid, remote/ucm")) == ["remote/aid", "remote/ucm"]


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_the_dry_run_takes_two_steps(pocket, tmp_path):
    p = given(dry_run=True, protocol="cross-dataset", domain="clip")
    found = runs.setting(p, tmp_path, {})
    model, history = runs.train(found, "DPLQ")
    assert [row["lr"] for row in history] == [2.6e-3, 2.6e-3]
    assert set(runs.scores(model, found, p.method)) == {"source", "generated"}


def test_a_domain_model_of_large_pictures_takes_them_one_by_one(monkeypatch):
    clip, sizes = encoders.build("pocket_clip"), []
    encoder = MAE(image_size=32, patch=8, width=64, depth=1, heads=1, decoder_width=32, decoder_depth=1).eval()
    encoder.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape)))
    models = {"medical": DomainModel(encoder, 32), "remote-sensing": DomainModel(encoder)}
    monkeypatch.setattr(runs.dplq, "domain_model", lambda name, source, clip: models[name])
    images = torch.randn(3, 3, 16, 16)
    one_by_one = runs._domain_model("medical", "random", clip)
    torch.testing.assert_close(one_by_one(images), models["medical"](images))
    assert sizes == [(1, 3, 32, 32)] * 3 + [(3, 3, 32, 32)] and one_by_one.num_features == 32
    assert runs._domain_model("remote-sensing", "random", clip) is models["remote-sensing"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["DPLQ", "MaPLe"])
def test_the_dry_run_at_full_size(method, tmp_path):
    p = given(dry_run=True, dataset="remote/aid", method=method)
    found = runs.setting(p, tmp_path, {})
    model, history = runs.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    assert model.count() == (3_555_072 if isinstance(model, MaPLe) else 2_147_104)
    assert set(runs.scores(model, found, p.method)) == {"base", "novel", "HM"}


# --- results that gather ----------------------------------------------------------------------------------------------


def test_results_gather_and_are_replaced(tmp_path):
    path, p = tmp_path / "measured.csv", given(dataset="remote/aid")
    assert runs.measured(path).empty
    titles = ["Base to novel, remote sensing", "Base to novel, medical"]
    layout = runs.tables(runs.measured(path), "base to novel")
    assert list(layout) == titles and [frame.shape for frame in layout.values()] == [(5, 26), (5, 11)]
    for frame in layout.values():
        assert (frame.iloc[:, 1:-1] == "–").all(None) and (frame["measured here"] == "not run").all()
    runs.measured(path, runs.rows(p, {"base": 90.0, "novel": 60.0, "HM": 72.0}))
    p.seed = 2
    runs.measured(path, runs.rows(p, {"base": 10.0, "novel": 10.0}))
    table = runs.measured(path, runs.rows(p, {"base": 80.0, "novel": 80.0}))
    assert len(table) == 4
    found = runs.cells(table, "base to novel")
    # HM for each seed, 72 and 80, then the mean
    assert found == {("DPLQ", "AID base"): 85.0, ("DPLQ", "AID novel"): 70.0, ("DPLQ", "AID HM"): pytest.approx(76.0)}
    shown = runs.tables(table, "base to novel")
    assert list(shown) == ["AID", *titles] and not any("AID" in name for name in shown[titles[0]].columns)
    assert list(shown["AID"].columns) == ["method", "base", "novel", "HM", "measured here"]
    row = shown["AID"].set_index("method").loc["DPLQ"]
    assert list(row) == ["– / 85.00", "– / 70.00", "– / 76.00", "3 of 3"]
    assert runs.cells(table, "cross-dataset") == {}
    pd.testing.assert_frame_equal(pd.read_csv(path), table.reset_index(drop=True))


def test_published_numbers_are_shown_as_soon_as_they_are_there(monkeypatch, tmp_path):
    """The tables of the paper could not be had: somebody who has them fills the YAML in."""
    tables = paper("dplq")["tables"]
    rows = next(t for t in tables if t["id"] == "base-to-novel-remote")["rows"]
    assert all(row["values"] == {} for row in rows)
    monkeypatch.setitem(rows[0], "values", {"UCM base": 50.0})
    found = runs.tables(runs.measured(tmp_path / "measured.csv"), "base to novel")
    assert next(iter(found)) == "UCM" and found["UCM"].base.iloc[0] == "50"


def test_what_is_not_as_published_has_a_row_of_its_own():
    assert runs.label(given()) == runs.label(given(domain="medical")) == "DPLQ"
    changed = given(domain="none", noise="off", clip="ViT-L-14/openai")
    assert runs.label(changed) == "DPLQ, domain model none, noise off, ViT-L-14/openai"
    assert runs.label(given(method="MaPLe", noise="off")) == "MaPLe"


# --- the facts --------------------------------------------------------------------------------------------------------


def test_the_facts_name_what_there_is():
    """Claims name methods and tasks of the study, runs name tables and weights, tables name the register's sets."""
    facts = paper("dplq")
    for claim in facts["claims"]:
        if claim["kind"] == "directional":
            for task in claim["tasks"]:
                assert {claim["better"], claim["worse"]} <= set(study.TASKS[task])
    tables, weights = {t["id"] for t in facts["tables"]}, {w["name"] for w in facts["weights"]}
    assert all(set(run["tables"]) <= tables and set(run["weights"]) <= weights for run in facts["runs"])
    columns = {name: DATASETS[name].folders[-1] for name in domains_sets.CLASSES}
    counted = published_table("dplq", "code-datasets").set_index("method").classes
    assert {columns[name]: len(found) for name, found in domains_sets.CLASSES.items()} == counted.to_dict()
    for protocol in ("cross-dataset", "domain-generalisation"):
        named = [set(published_table("dplq", f"{protocol}-{d}").columns) - {"method"} for d in runs.DOMAINS]
        assert set.union(*named) == set(columns.values())


def test_every_method_is_built_at_the_published_depth():
    """Counts of the authors' modules, at the size of ViT-B/16."""
    counted = published_table("dplq", "code-params").set_index("method")
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    rows = {
        "CoOp": "CoOp (16 tokens, shared)",
        "CoCoOp": "CoCoOp (4 tokens)",
        "MaPLe": "MaPLe prompt learner total",
        "DPLQ": "prompt learner total",
    }
    for protocol, column in (("base to novel", "depth9"), ("cross-dataset", "depth3")):
        for method, row in rows.items():
            model = runs.build(given(protocol=protocol), method, ("a", "b"), clip, NoFeatures(512))
            assert model.count() == counted.loc[row, column]


def test_the_committed_record_says_of_every_claim_what_came_out():
    """Exact claims hold, every directional one was judged on all seeds, and one that fails gives its reason."""
    facts = paper("dplq")
    ledger = {c["id"]: c for c in read_json(record.root() / "reports" / "pocket" / "dplq" / "claims.json")}
    assert list(ledger) == [c["id"] for c in facts["claims"]]
    for claim in ledger.values():
        if claim["kind"] == "exact":
            assert claim["status"] == "holds", claim["id"]
        elif claim["kind"] == "directional":
            assert claim["status"] in ("holds", "fails") and claim["seeds"] == study.SEEDS
            assert bool(claim["why"]) == (claim["status"] == "fails"), claim["id"]
        else:
            assert claim["status"] == "not run"
