"""ECAMP with the published settings: pre-training and downstream tasks from data to weights, encoders, results."""

import copy
import functools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.data import decoding, xrays
from companion.errors import BadCheckpoint, MissingWeights
from companion.evaluation.claims import judge_measured
from companion.io.papers import paper
from companion.models.ecamp import recipe, tasks, transforms
from companion.training import fit as loop
from companion.training.recipe import run
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers.common import shrink


def given(**changes) -> SimpleNamespace:
    defaults = {"profile": "paper", "task": "fine-tune", "dataset": "xrays/covidx", "labels": "1", "encoder": "random"}
    return parameters("ecamp", **defaults | {"data_root": "nowhere", "accelerator": "cpu"} | changes)


def pretraining(**changes) -> SimpleNamespace:
    return given(**{"task": "pre-train", "dataset": "folder", "encoder": "ECAMP", "labels": "100"} | changes)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(recipe, "WORKERS", 0)


@pytest.fixture
def small(monkeypatch):
    """Encoders of one narrow block instead of ViT-B/16."""
    shrink("ecamp", monkeypatch)


# --- pre-training -----------------------------------------------------------------------------------------------------


def test_fewer_pairs_than_a_batch_are_one_step_an_epoch():
    r = recipe.published()
    assert recipe.pretraining_epoch(3, r)[1:] == (1, 3) and len(recipe.pretraining_learning_rates(3, r)) == 120


@pytest.fixture
def reports(tmp_path):
    """Three images and their reports, laid out as MIMIC-CXR."""
    folder = tmp_path / "xrays" / "mimic-cxr"
    paths = [f"files/s{i}/a.png" for i in range(3)]
    for path in paths:
        (folder / path).parent.mkdir(parents=True)
        Image.new("L", (500, 480), 90).save(folder / path)
    texts = ["There is no mass."] * 3
    xrays.write_reports(folder / "mimic-cxr-2.0.0-entity-llm.csv", paths, texts, ["There is mass."] * 3)
    return folder


def test_pairs_of_mimic_and_of_ones_own_folder(tmp_path, reports, small):
    def pairs(method="ECAMP", **changes):
        p = pretraining(method=method, **{"dataset": "xrays/mimic-cxr", "data_root": str(tmp_path)} | changes)
        return recipe.pretraining(p, tmp_path).data

    item = pairs()[0]
    assert item.images.shape == (3, 448, 448) and item.window.tolist() == [1, 1]
    assert pairs().images.shortest == transforms.SHORTEST
    assert (item.weights != 1).any() and (pairs("ECAMP, no re-balancing")[0].weights == 1).all()
    (reports / "mimic-cxr-2.0.0-entity-llm.csv").rename(reports / "pretrain.csv")
    own = {"dataset": "folder", "data_root": str(reports)}
    # learned again from the same reports, the pieces have other ids: no checkpoint would fit
    assert pairs(**own).vocabulary.pieces == pairs(**own).vocabulary.pieces and len(pairs(**own)) == 3


def test_images_are_read_and_augmented_in_the_loaders_processes(tmp_path, reports, monkeypatch):
    own, read = os.getpid(), decoding.unit

    def elsewhere(*args):
        assert os.getpid() != own
        return read(*args)

    monkeypatch.setattr(recipe, "WORKERS", 1)
    training = recipe.pretraining(pretraining(dataset="xrays/mimic-cxr", data_root=str(tmp_path)), tmp_path)
    monkeypatch.setattr(decoding, "unit", elsewhere)
    (batch,) = loop._batches(training.data, 3, 1, 0, 0, 1, 0, 1, training.fit["hardware"].workers)
    assert batch[0].shape == (3, 3, 448, 448)


def test_a_pre_trained_encoder_starts_a_downstream_task(tmp_path, monkeypatch, reports):
    """From a MAE file to the file of the trained model, and to the encoder of a task."""
    own_encoder = recipe.encoder
    shrink("ecamp", monkeypatch)
    monkeypatch.setattr(recipe, "pretraining_learning_rates", lambda images, r: np.full(2, 1e-3))
    mae = VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    p = pretraining(dataset="xrays/mimic-cxr", data_root=str(tmp_path), weights=str(tmp_path / "mae.pth"))
    training = recipe.pretraining(p, tmp_path / "out")
    started = training.build().encoder
    assert torch.equal(started.blocks[0].mlp.fc1.weight, mae.blocks[0].mlp.fc1.weight)
    assert torch.equal(started.patch_embed.proj.bias, mae.patch_embed.proj.bias)  # which from scratch is 0
    weight = run(training, tmp_path / "out")[0].encoder.blocks[0].mlp.fc1.weight
    assert not torch.equal(weight, mae.blocks[0].mlp.fc1.weight)
    (file,) = (tmp_path / "out" / "trained").iterdir()
    monkeypatch.setattr(recipe, "VisionTransformer", lambda **options: copy.deepcopy(mae))
    encoder = own_encoder(given(encoder="ECAMP", weights=str(file)))
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, weight)
    torch.save({"model": {"pos_embed": torch.zeros(1, 2, 2)}}, tmp_path / "bad.pth")
    refuses((lambda: own_encoder(given(encoder="ECAMP", weights=str(tmp_path / "bad.pth"))), "."), error=BadCheckpoint)


# --- downstream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "dataset", "encoder", "frozen"),
    [
        ("fine-tune", "xrays/rsna", "MRM", False),
        ("linear probe", "xrays/rsna", "MRM", True),
        ("segment", "fundus/riga", "ECAMP", True),
        ("segment", "fundus/riga", "random", False),
        ("detect", "xrays/rsna", "random", True),
    ],
)
def test_the_encoder_is_frozen_where_the_authors_freeze_it(task, dataset, encoder, frozen, small):
    model = recipe.head(given(task=task, dataset=dataset, encoder=encoder))
    assert all(t.requires_grad for t in model.parameters()) != frozen


@pytest.mark.parametrize(("protocol", "expected"), [("released", np.nan), ("plain", 0.0)])
def test_nothing_left_to_be_found_is_no_score(protocol, expected):
    """As released, images where nothing was found are left out; here those are all."""
    heads = [torch.full((2, 18, side, side), -20.0) for side in (7, 14, 28)]
    boxes = torch.zeros(2, 10, 5)
    boxes[:, 0] = torch.tensor([0, 0.4, 0.5, 0.3, 0.3])
    np.testing.assert_equal(tasks.boxes_score([(heads, boxes)], protocol), expected)


def test_outputs_are_scored_without_autocast(small):
    """As downstream of half precision: only the network's own pass has it."""
    p = given(precision="bf16-mixed", encoder="random")
    data = torch.utils.data.TensorDataset(torch.rand(3, 3, 224, 224), torch.arange(3))
    for found, _ in recipe.outputs(p, recipe.head(p), data):
        assert found.dtype == (found @ found.T).dtype == torch.float32


@pytest.mark.parametrize(("precision", "tested"), [("paper", "32-true"), ("bf16-mixed", "bf16-mixed")])
def test_the_test_is_in_float32_as_the_authors(precision, tested, monkeypatch, tmp_path):
    """They rebuild the model for it; validation has the training's precision."""
    asked = []
    monkeypatch.setattr(recipe, "downstream", lambda p, real: (None, {"test": "images"}))
    monkeypatch.setattr(recipe, "opened", lambda training, out: training)
    monkeypatch.setattr(recipe, "train", lambda training: (training, []))
    monkeypatch.setattr(recipe, "evaluate", lambda p, model, part: asked.append(p.precision) or 50.0)
    recipe.run(given(precision=precision), tmp_path)
    assert asked == [tested]


def test_a_random_encoder_starts_as_the_authors(monkeypatch):
    small = functools.partial(VisionTransformer, patch_size=16, embed_dim=768, depth=1)
    monkeypatch.setattr(recipe, "VisionTransformer", small)
    vit = recipe.encoder(given(encoder="random"))
    assert float(vit.cls_token.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch):
    def downstream(**changes):
        return lambda: recipe.downstream(given(**changes))

    refuses(
        (downstream(task="segment"), "RIGA"),
        (downstream(dataset="xrays/mimic-cxr"), "CheXpert"),
        (downstream(devices=2), "2"),
        (lambda: recipe.pretraining(given(dataset="xrays/rsna"), tmp_path), "xrays/mimic-cxr"),
        (lambda: recipe.downstream_recipe("fine-tune", "fundus/odir", "10"), "CheXpert"),
    )
    weights = functools.partial(recipe.encoder, given(encoder="ECAMP", data_root=str(tmp_path)))
    refuses((weights, r"ECAMP_ViT_Base_16\.pth"), error=MissingWeights)
    ours, theirs = (recipe.downstream_recipe("fine-tune", f"xrays/{n}", "10") for n in ("chestmnist", "chestx-ray14"))
    assert ours == theirs
    # detection is tested on the validation list as released
    asked = []
    monkeypatch.setattr(xrays, "load", lambda *a, **o: asked.append(a[2]) or [0])
    for protocol in ("released", "plain"):
        downstream(task="detect", dataset="xrays/rsna", protocol=protocol)()
    assert asked == ["train", "val", "val", "train", "val", "test"]


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_stand_beside_the_published_ones(tmp_path):
    row = dict(zip(recipe.RESULTS.keys, ("fine-tune", "xrays/rsna", 10, "ECAMP", "released", 0), strict=True))
    others = [{"seed": 1, "score": 82.0}, {"encoder": "random", "score": 60.0}, {"protocol": "plain", "score": 1.0}]
    rows = recipe.RESULTS.measured(tmp_path / "measured.csv", row | {"score": 80.0}, *(row | other for other in others))
    cells = {table: recipe.RESULTS.filled(rows, spec) for table, spec in recipe.RESULTS.cells.items()}
    assert cells["classification-finetune"] == {("ECAMP", "RSNA 10 %"): 81.0, ("random init", "RSNA 10 %"): 60.0}
    assert not cells["segmentation"]


def test_the_comparison_with_mrm_is_judged_by_what_was_measured(tmp_path):
    (claim,) = (c for c in paper("ecamp")["claims"] if "measured" in c)
    tasks, rows = {"fine-tuned": "fine-tune", "segmentation": "segment", "detection": "detect"}, []
    for condition in claim["measured"]:
        table, _, column = condition["of"][1].partition(", ")
        title, labels, _ = column.split()
        dataset = next(name for name, own in recipe.TITLES.items() if own == title)
        facts = {"task": tasks.get(table, table), "dataset": dataset, "labels": int(labels), "protocol": "released"}
        rows += [facts | {"seed": 0, "encoder": name, "score": s} for name, s in (("ECAMP", 80.0), ("MRM", 79.5))]

    def judged(*new):
        measured = recipe.RESULTS.measured(tmp_path / "rows.csv", *new)
        return judge_measured(claim["measured"], recipe.RESULTS.claimed(measured))[0]

    assert judged(*rows) is True and judged(rows[0] | {"score": 79.0}) is False
