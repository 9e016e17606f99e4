"""DPLQ's recipe of the paper profile: published settings, protocols on small datasets, checkpoints, missing files."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import DATASETS, domains_sets
from companion.errors import BadParameter, MissingData, MissingWeights
from companion.evaluation.claims import SYNTHETIC, judge_measured
from companion.evaluation.recipe_parity import Case, folder
from companion.evaluation.tables import published_table
from companion.models.dplq import DPLQ, MAE, DomainModel, loss, recipe
from companion.models.dplq.model import NoFeatures
from companion.models.layers.clip_prompting import MaPLe, ZeroShot
from companion.ops.papers import paper
from companion.toy import encoders
from companion.toy.ablations import dplq as study
from companion.training.checkpoints import checkpoint_key
from companion.training.fit import fit
from companion.training.schedules import schedule
from tests.conftest import assert_resumes, parameters
from tests.models.common import refuses
from tests.recipes import dplq_cases
from tests.small import shrink

EACH = 40  # images per class: 20 to train, 8 to validate, 12 to test
QUICK = {"epochs": 1, "schedule": schedule("cosine by epoch", 0.0, 0.0)}
given = functools.partial(
    parameters, "dplq", profile="paper", seed=1, dataset="medical/btmri", accelerator="cpu", data_root="nowhere"
)


@pytest.fixture
def pocket(monkeypatch) -> None:
    """The toy CLIP instead of the real one; its image tower has 6 blocks, so prompts of depth 3 fit."""
    shrink("dplq", monkeypatch)


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


@pytest.mark.parametrize(
    ("protocol", "lr", "epochs", "depth"),
    [("base to novel", 3.5e-3, 15, 9), ("cross-dataset", 2.6e-3, 25, 3), ("domain generalisation", 2.6e-3, 25, 3)],
)
def test_the_published_recipe(protocol, lr, epochs, depth):
    found = recipe.published_settings(protocol)
    assert (found["learning rate"], found["epochs"], found["prompt depth"]) == (lr, epochs, depth)
    options = recipe._options(given(protocol=protocol))
    assert (options["epochs"], options["batch"], options["seed"]) == (epochs, 4, 1)
    (group,) = recipe.optimizer(lr)(nn.Linear(3, 2)).param_groups
    assert [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")] == [lr, 0.9, 5e-4, False]


def test_the_learning_rates_of_a_training_are_the_authors():
    """25 epochs of 64 images in batches of 4: the first at 1e-5, then half a cosine that ends above 0."""
    p = given(protocol="cross-dataset")
    data = TensorDataset(torch.randn(64, 3), torch.zeros(64, dtype=torch.long))
    optimizer = recipe.optimizer(recipe.published_settings(p.protocol)["learning rate"])
    history = fit(nn.Linear(3, 2), loss, data, optimizer=optimizer, **recipe._options(p))
    expected = [1e-5] + [2.6e-3 * (1 + np.cos(np.pi * (e - 1) / 25)) / 2 for e in range(1, 25)]
    np.testing.assert_allclose([row["lr"] for row in history], np.repeat(expected, 16))


@pytest.mark.parametrize("protocol", ["cross-dataset", "domain generalisation"])
def test_a_model_is_carried_over_to_other_sets(protocol, pocket, sets, tmp_path):
    p = given(protocol=protocol, targets="medical/ccbtm", domain="clip", data_root=sets)
    found = recipe.setting(p, tmp_path)
    model, history = recipe.train(found, "DPLQ", **QUICK)
    assert isinstance(model, DPLQ) and len(model.deep_text) == 2 and len(history) == 16
    scores = recipe.scores(model, found, p.method)
    assert list(scores) == ["source", "medical/ccbtm"] and all(0 <= s <= 100 for s in scores.values())
    assert len(found.inputs("DPLQ", "medical/ccbtm")) == 4 * (12 if protocol == "cross-dataset" else EACH)
    assert recipe.scores(model, found, p.method) == scores, "the noise is drawn from the seed"
    assert len(model.embedded) == 4 and model.length == model.ends.max() + 1, "the classes trained on are back"
    table = recipe.measured(tmp_path / "measured.csv", recipe.rows(p, scores))
    here = recipe.cells(table, protocol)
    name = "DPLQ, domain model clip, trained on BTMRI"
    assert here == {(name, "BTMRI"): scores["source"], (name, "CCBTM"): scores["medical/ccbtm"]}
    shown = recipe.tables(table, protocol)
    remote, medical = shown.values()
    assert medical.method.iloc[-1] == name and name not in set(remote.method)


def test_both_transfers_test_the_weights_of_one_training(pocket, sets, tmp_path, monkeypatch):
    def trained(**changes):
        p = given(targets="medical/ccbtm", domain="clip", data_root=sets, **changes)
        return recipe.train(recipe.setting(p, tmp_path), "DPLQ", **QUICK)

    first, history = trained(protocol="cross-dataset")
    trained(protocol="cross-dataset", seed=2)
    files = {file.name for file in (tmp_path / "trained").iterdir()}
    assert files == {f"medical-btmri, all classes, seed {seed}, DPLQ.safetensors" for seed in (1, 2)}
    monkeypatch.setattr(recipe, "loss", lambda *_: pytest.fail("it was trained again"))
    again, read = trained(protocol="domain generalisation")
    assert read == history and torch.equal(again.ctx, first.ctx)


def test_of_few_images_all_are_trained_on(pocket, sets, tmp_path):
    found = recipe.setting(given(method="CoCoOp", data_root=sets), tmp_path)
    assert len(found.inputs("CoCoOp", "train")) == 32 and found.options["last"] == "drop"
    folder = tmp_path / "few"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / name / f"{number}.png")
    found = recipe.setting(given(dataset="folder", data_root=str(folder), method="CoCoOp"), tmp_path)
    train = found.inputs("CoCoOp", "train")
    assert len(train) == 2 and found.options["last"] == "train"  # half of the four, of the base class
    assert len(recipe.train(found, "CoCoOp", **QUICK)[1]) == 1


def test_base_to_novel_trains_on_the_base_classes_alone(pocket, sets, tmp_path):
    p = given(method="CoCoOp", data_root=sets)
    found = recipe.setting(p, tmp_path)
    assert found.classes == ("glioma", "meningioma")
    assert found.test_classes == {"base": ("glioma", "meningioma"), "novel": ("no brain tumor", "pituitary")}
    assert [len(found.inputs("CoCoOp", part)) for part in ("train", "base", "novel")] == [32, 24, 24]
    model, _ = recipe.train(found, "CoCoOp", **QUICK)
    scores = recipe.scores(model, found, p.method)
    assert list(scores) == ["base", "novel", "HM"]
    # training images are cropped at random, test images are not
    crops = {part: [recipe.first(found, "CoCoOp", part, 3)[0] for _ in range(2)] for part in ("train", "base")}
    assert not torch.equal(*crops["train"]) and torch.equal(*crops["base"])


def test_a_killed_training_resumes_to_the_same_bits_and_keeps_its_weights(pocket, sets, tmp_path, monkeypatch):
    """Noise and all; nothing of CLIP or the domain model is saved."""
    p = given(protocol="cross-dataset", targets="medical/ccbtm", domain="clip", data_root=sets)

    def train(out):
        return recipe.train(recipe.setting(p, out), "DPLQ", epochs=0.5)

    assert_resumes(train, recipe, tmp_path, monkeypatch)
    found = recipe.setting(p, tmp_path / "whole")
    (file,) = (tmp_path / "whole" / "trained").iterdir()
    state, model = load_file(file), found.build("DPLQ")
    assert set(state) == set(model.trained())
    model.load_state_dict(state, strict=False)
    assert recipe.scores(model, found, "DPLQ") == recipe.scores(train(tmp_path / "whole")[0], found, "DPLQ")
    p.noise = "off"  # not visible in any tensor
    assert recipe.setting(p, tmp_path).facts != found.facts


def test_a_folder_of_ones_own_and_nothing_to_train(pocket, tmp_path, sets):
    found = recipe.setting(given(method="zero-shot CLIP", data_root=sets), tmp_path)
    model, history = recipe.train(found, "zero-shot CLIP")
    assert isinstance(model, ZeroShot) and history == [] and found.learning_rates == {}
    mine = tmp_path / "medical/BTMRI/BTMRI"
    found = recipe.setting(given(dataset="folder", data_root=str(mine), method="CoOp"), tmp_path)
    assert found.title == "folder, base to novel" and found.classes == ("glioma", "meningioma")
    with pytest.raises(BadParameter, match="'remote-sensing', 'medical'"):
        recipe.setting(given(dataset="folder", data_root=str(mine)), tmp_path)


def test_images_in_another_class_are_another_training(pocket, tmp_path, sets, monkeypatch):
    mine = tmp_path / "medical/BTMRI/BTMRI"

    def key(where: str) -> str:
        return checkpoint_key(**recipe.setting(given(dataset="folder", data_root=where, method="CoOp"), tmp_path).facts)

    first = key(str(mine))
    for number in range(20):
        (mine / "glioma" / f"{number}.png").rename(mine / "meningioma" / f"more {number}.png")
    moved = key(str(mine))
    (mine / "glioma").rename(mine / "glioma 2")
    assert len({first, moved, key(str(mine))}) == 3
    monkeypatch.chdir(tmp_path)
    assert key("medical/BTMRI/BTMRI") == key(str(mine))


def test_the_domain_model_by_name_by_set_and_by_file(pocket, sets, tmp_path, monkeypatch):
    assert recipe.domain_name(given(dataset="remote/aid")) == "remote-sensing"
    assert recipe.domain_name(given()) == "medical"
    assert recipe.domain_name(given(domain="clip")) == "clip"
    with pytest.raises(MissingWeights, match=r"vit-b-checkpoint-1599\.pth into .*weights"):
        recipe.setting(given(domain="remote-sensing", data_root=sets), tmp_path)
    assert recipe.weights(given(), "medical", "") == "pretrained"
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "vit-b-checkpoint-1599.pth"
    sizes = dict(image_size=32, patch=8, width=64, depth=1, heads=1, decoder_width=32, decoder_depth=1)
    torch.save({"model": MAE(**sizes).to_official()}, file)
    p = given(domain="remote-sensing", data_root=sets, protocol="cross-dataset", targets="medical/ccbtm")
    found = recipe.setting(p, tmp_path)
    assert found.build("DPLQ").domain.num_features == 32
    assert recipe.weights(p, "remote-sensing", "mine.pth") == "mine.pth"


def test_the_clip_and_the_data_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="ViT-B-16/openai"):
        recipe.setting(given(data_root=str(tmp_path)), tmp_path)
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "open_clip_model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert recipe.weights(given(data_root=str(tmp_path)), "clip", "") == file
    monkeypatch.setattr(recipe, "_clip", lambda p, weights: encoders.build("pocket_clip"))
    with pytest.raises(MissingData, match="Brain tumour MRI"):
        recipe.setting(given(data_root=str(tmp_path), domain="none"), tmp_path)


def test_bad_parameters_name_the_accepted_ones(tmp_path):
    def setting(**changes):
        return lambda: recipe.setting(given(**changes), tmp_path)

    refuses(
        (setting(targets="medical/ccbtm"), "nothing with the protocol 'base to novel'"),
        (setting(protocol="cross-dataset", targets="medical/btmri"), "targets = 'medical/btmri'"),
        (setting(protocol="cross-dataset", dataset="folder"), "targets = ''"),
        (setting(clip="roberta-ViT-B-32/laion2b_s12b_b32k"), "OpenAI's vocabulary"),
        (setting(clip="ViT-B-16/nobody"), "openclip:ViT-B-16/"),
        (setting(clip="ViT-X/openai"), "open_clip.list_models"),
    )


def test_the_dry_run_takes_two_steps_and_writes_nothing(pocket, tmp_path):
    p = given(dry_run=True, protocol="cross-dataset", domain="clip")
    found = recipe.setting(p, tmp_path)
    model, history = recipe.train(found, "DPLQ")
    assert list(tmp_path.iterdir()) == []
    assert [row["lr"] for row in history] == [2.6e-3, 2.6e-3]
    assert set(recipe.scores(model, found, p.method)) == {"source", "generated"}


def test_a_domain_model_of_large_images_takes_them_one_by_one(monkeypatch):
    clip, sizes = encoders.build("pocket_clip"), []
    encoder = MAE(image_size=32, patch=8, width=64, depth=1, heads=1, decoder_width=32, decoder_depth=1).eval()
    models = {"medical": DomainModel(encoder, 32), "remote-sensing": DomainModel(encoder)}
    models["medical"].encoder.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape)))
    monkeypatch.setattr(recipe, "domain_model", lambda name, source, clip: models[name])
    images = torch.randn(3, 3, 16, 16)
    one_by_one = recipe._domain_model("medical", "random", clip)
    torch.testing.assert_close(one_by_one(images), models["medical"](images))
    assert sizes == [(1, 3, 32, 32)] * 3 + [(3, 3, 32, 32)] and one_by_one.num_features == 32
    assert recipe._domain_model("remote-sensing", "random", clip) is models["remote-sensing"]


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("method", ["DPLQ", "MaPLe"])
def test_the_dry_run_at_full_size(method, tmp_path):
    p = given(dry_run=True, dataset="remote/aid", method=method)
    found = recipe.setting(p, tmp_path)
    model, history = recipe.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    assert model.count() == (3_555_072 if isinstance(model, MaPLe) else 2_147_104)
    assert set(recipe.scores(model, found, p.method)) == {"base", "novel", "HM"}


def test_results_gather_and_are_replaced(tmp_path, monkeypatch):
    path, p = tmp_path / "measured.csv", given(dataset="remote/aid")
    titles = ["Base to novel, remote sensing", "Base to novel, medical"]
    shown = recipe.tables(layout := recipe.measured(path), "base to novel")
    assert list(shown) == titles and [frame.shape for frame in shown.values()] == [(5, 26), (5, 11)]
    for frame in shown.values():
        assert (frame.iloc[:, 1:-1] == "–").all(None) and (frame["measured here"] == "not run").all()
    recipe.measured(path, recipe.rows(p, {"base": 90.0, "novel": 60.0, "HM": 72.0}))
    p.seed = 2
    recipe.measured(path, recipe.rows(p, {"base": 10.0, "novel": 10.0}))
    table = recipe.measured(path, recipe.rows(p, {"base": 80.0, "novel": 80.0}))
    assert len(table) == 4
    found = recipe.cells(table, "base to novel")
    # HM for each seed, 72 and 80, then the mean
    assert found == {("DPLQ", "AID base"): 85.0, ("DPLQ", "AID novel"): 70.0, ("DPLQ", "AID HM"): pytest.approx(76.0)}
    shown = recipe.tables(table, "base to novel")
    assert list(shown) == ["AID", *titles] and not any("AID" in name for name in shown[titles[0]].columns)
    assert list(shown["AID"].columns) == ["method", "base", "novel", "HM", "measured here"]
    row = shown["AID"].set_index("method").loc["DPLQ"]
    assert list(row) == ["– / 85.00", "– / 70.00", "– / 76.00", "3 of 3"]
    assert recipe.cells(table, "cross-dataset") == {}
    # the tables of the paper could not be had: somebody who has them fills the YAML in
    rows = next(t for t in paper("dplq")["tables"] if t["id"] == "base-to-novel-remote")["rows"]
    assert all(row["values"] == {} for row in rows)
    monkeypatch.setitem(rows[0], "values", {"UCM base": 50.0})
    found = recipe.tables(layout, "base to novel")
    assert next(iter(found)) == "UCM" and found["UCM"].base.iloc[0] == "50"


def test_the_papers_claims_are_judged_by_what_was_measured(tmp_path):
    path = tmp_path / "measured.csv"
    medical = [name for name in domains_sets.CLASSES if name.startswith("medical/")]

    def judged(**ours: float) -> dict[str, bool | None]:
        for name in medical:
            for method in ("DPLQ", "MaPLe", "CoCoOp", "CoOp", "zero-shot CLIP"):
                value = ours.get(name.rpartition("/")[2], 60.0) if method == "DPLQ" else 50.0
                p = given(method=method, dataset=name)
                table = recipe.measured(path, recipe.rows(p, {"base": value, "novel": value}))
        claims = {c["id"]: c["measured"] for c in paper("dplq")["claims"] if "measured" in c}
        here = recipe.claim_cells(table)
        assert here["MaPLe", "base to novel, medical"] == 50 and ("MaPLe", "base to novel, remote") not in here
        return {name: judge_measured(terms, here)[0] for name, terms in claims.items()}

    # one domain alone decides nothing, unless it refutes
    assert set(judged().values()) == {None} and judged(btmri=20.0, ccbtm=40.0)["full-base-to-novel"] is False
    p = given(protocol="cross-dataset", dataset=recipe.SOURCES["medical"])
    found = {"source": 99.0, "medical/chmnist": 40.0, "medical/ccbtm": 60.0}
    here = recipe.claim_cells(recipe.measured(path, recipe.rows(p, found)))
    assert here["DPLQ", "cross-dataset, medical"] == 50.0  # the set that was trained on does not count


def test_the_protocol_is_what_runs(monkeypatch):
    monkeypatch.setattr(recipe, "MOMENTUM", 0.75)
    monkeypatch.setattr(recipe, "TEST_BATCH", 77)
    found = recipe.protocol()
    assert "0.75" in found["optimiser"] and "77" in found["test images"]
    assert found["epochs"] == "15 (base to novel), 25 (transfers)"


def test_half_precision_weights_lose_most_of_the_steps():
    """The authors' float16 tensors: entries that a first step leaves as they are, at both ends of the schedule."""
    case = Case(folder() / "dplq" / "trajectory_depth3")
    found = dplq_cases.trained_setting(case)
    model, data = found.build("DPLQ").train(), found.inputs("DPLQ", "train")
    items = [data[i] for i in range(found.options["batch"])]
    loss(model, tuple(torch.stack(column) for column in zip(*items, strict=True))).backward()
    parts = [p for name, p in model.trained().items() if name.startswith(("ctx", "meta_net", "proj", "mix_text"))]

    def lost(learning_rate: float) -> float:
        weights = [p.detach().half() for p in parts]
        steps = [(learning_rate * (p.grad + recipe.WEIGHT_DECAY * p.detach())).half() for p in parts]
        same = [(w - step == w).flatten() for w, step in zip(weights, steps, strict=True)]
        return 100 * float(torch.cat(same).double().mean())

    assert lost(1e-5) == pytest.approx(99.7, abs=0.1) and lost(0.0035) == pytest.approx(60, abs=1)


def test_targets_are_the_other_sets_of_the_domain_and_what_is_not_as_published_has_a_row_of_its_own():
    assert recipe.targets(given()) == ["medical/chmnist", "medical/ccbtm"]
    assert len(recipe.targets(given(dataset="remote/rsicd"))) == 7
    assert recipe.targets(given(targets=" remote/aid, remote/ucm")) == ["remote/aid", "remote/ucm"]
    assert recipe.label(given()) == recipe.label(given(domain="medical")) == "DPLQ"
    changed = given(domain="none", noise="off", clip="ViT-L-14/openai")
    assert recipe.label(changed) == "DPLQ, domain model none, noise off, ViT-L-14/openai"
    assert recipe.label(given(method="MaPLe", noise="off")) == "MaPLe"


def test_the_facts_name_what_there_is():
    """Claims name methods and tasks of the study, runs name tables and weights, tables name the register's sets."""
    facts = paper("dplq")
    for claim in facts["claims"]:
        if claim["kind"] == SYNTHETIC:
            for task in claim["tasks"]:
                assert {claim["better"], claim["worse"]} <= set(study.TASKS[task])
    columns = {name: DATASETS[name].folders[-1] for name in domains_sets.CLASSES}
    counted = published_table("dplq", "code-datasets").set_index("method").classes
    assert {columns[name]: len(found) for name, found in domains_sets.CLASSES.items()} == counted.to_dict()
    for protocol in ("cross-dataset", "domain-generalisation"):
        named = [set(published_table("dplq", f"{protocol}-{d}").columns) - {"method"} for d in recipe.DOMAINS]
        assert set.union(*named) == set(columns.values())


def test_every_method_is_built_at_the_published_depth():
    """Counts of the authors' modules, at the size of ViT-B/16."""
    counted = published_table("dplq", "code-params").set_index("method")
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    rows = {"CoOp": "CoOp (16 tokens, shared)", "CoCoOp": "CoCoOp (4 tokens)"}
    rows |= {"MaPLe": "MaPLe prompt learner total", "DPLQ": "prompt learner total"}
    for protocol, column in (("base to novel", "depth9"), ("cross-dataset", "depth3")):
        for method, row in rows.items():
            model = recipe.build(given(protocol=protocol), method, ("a", "b"), clip, NoFeatures(512))
            assert model.count() == counted.loc[row, column]
