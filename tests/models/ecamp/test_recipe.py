"""ECAMP with the published settings: schedules, accumulation, downstream recipes, dry runs, results that gather."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import TensorDataset

from companion.data import xrays
from companion.errors import BadCheckpoint, BadParameter, MissingData, MissingWeights
from companion.models.ecamp import model as ecamp
from companion.models.ecamp import recipe as runs
from companion.models.ecamp import text as ecamp_text
from companion.ops.papers import paper


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=0,
        task="fine-tune",
        dataset="xrays/covidx",
        labels="1",
        encoder="random",
        method="ECAMP",
        protocol="released",
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    monkeypatch.setattr(runs, "WORKERS", 0)


@pytest.fixture
def small(monkeypatch):
    """Encoders of one narrow block in the place of ViT-B/16."""

    def encoder(p):
        torch.manual_seed(p.seed)
        return VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")

    monkeypatch.setattr(runs, "encoder", encoder)


# --- pre-training -----------------------------------------------------------------------------------------------------


def test_schedule_is_left_at_half_of_the_peak():
    """Claim 6: the cosine would end at epoch 200, training stops at 120."""
    rates = runs.pretrain_rates(10)
    assert len(rates) == 1200 and rates[0] == 0
    assert rates[400] == rates.max() == pytest.approx(1.5e-4)
    assert rates[200] == pytest.approx(0.75e-4)
    assert rates[1199] == pytest.approx(7.5e-5, rel=0.01)


def pocket_pairs(count=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, 40, (count, 20), generator=generator)
    return TensorDataset(
        torch.randn(count, 3, 64, 64, generator=generator),
        labels.where(torch.rand(count, 20) < 0.3, 3),
        labels,
        torch.ones(count, 20, dtype=torch.long),
        torch.ones(count, 20),
        torch.rand(count, 64, generator=generator),
        torch.ones(count, 2, dtype=torch.long),
    )


def trained(at_once):
    torch.manual_seed(0)
    model, terms = ecamp.build("pocket"), []
    history = runs.pretrain(given(), model, pocket_pairs(), terms, np.full(3, 1e-3), at_once, batch=8)
    return model, history, terms


def test_gradients_that_are_added_up_are_those_of_the_whole_batch():
    whole, first, terms = trained(8)
    parts, second, others = trained(3)
    np.testing.assert_allclose([r["loss"] for r in first], [r["loss"] for r in second], rtol=1e-4)
    np.testing.assert_allclose(terms, others, rtol=1e-4)
    np.testing.assert_allclose([t[0] for t in terms], [r["loss"] for r in first], rtol=1e-6)
    assert all(t[0] == pytest.approx(sum(t[1:]), rel=1e-6) for t in terms)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        # Adam divides by the gradient's size, so a rounding of a tiny one moves a weight
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


class Stops(list):
    """A list that takes three entries."""

    def append(self, entry):
        if len(self) == 3:
            raise KeyboardInterrupt
        super().append(entry)


def test_a_killed_pre_training_goes_on_to_the_same_bits(tmp_path):
    """Words and patches are hidden anew each step, by the loader, from the item's seed."""
    words = ecamp_text.Vocabulary.train(["There is a small effusion. There is no mass."] * 3, 40)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reports = ["There is a small effusion.", "There is no mass.", "No effusion.", "A small mass."]
    data = ecamp_text.Pairs(images, reports, words, patches=64, length=20, window=6, statements=["There is X."] * 4)

    def run(terms=None, **options):
        torch.manual_seed(0)
        model = ecamp.build("pocket", dropout=0.1)
        runs.pretrain(given(), model, data, terms, np.full(6, 1e-3), batch=2, **options)
        return model

    whole = run()
    options = {"checkpoint": tmp_path / "x.pt", "checkpoint_every": 2, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        run(Stops(), **options)
    again = run(**options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_betas_are_the_published_ones(monkeypatch):
    asked = {}
    monkeypatch.setattr(runs, "fit", lambda *_, **options: asked.update(options))
    runs.pretrain(given(), ecamp.build("pocket"), pocket_pairs(), batch=8)
    assert asked["betas"] == (0.9, 0.95) and asked["accumulate"] == 1


def test_pre_training_on_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "xrays" / "mimic-cxr"
    paths = [f"files/s{i}/a.png" for i in range(3)]
    for path in paths:
        (folder / path).parent.mkdir(parents=True)
        Image.new("L", (500, 480), 90).save(folder / path)
    xrays.write_reports(folder / "mimic-cxr-2.0.0-entity-llm.csv", paths, ["There is no mass."] * 3, ["X."] * 3)
    p = given(task="pre-train", dataset="xrays/mimic-cxr", data_root=str(tmp_path))
    found = runs.setting(p, tmp_path, {})
    assert found.methods == ("ECAMP",) and found.rates == {"ECAMP": 1.5e-4}
    item = found.pairs("ECAMP")[0]
    assert item.images.shape == (3, 448, 448) and item.ids.shape == (256,) and item.window.tolist() == [1, 1]
    assert torch.equal(found.pairs("MRM-like")[0].weights, torch.ones(256))
    with pytest.raises(MissingWeights, match=r"mae_vit_base\.pth"):
        found.build("ECAMP")
    (folder / "mimic-cxr-2.0.0-entity-llm.csv").rename(folder / "pretrain.csv")
    mine = runs.setting(given(task="pre-train", dataset="folder", data_root=str(folder)), tmp_path, {})
    assert mine.title == "folder, 3 images" and mine.pairs("ECAMP")[0].images.shape == (3, 448, 448)


def test_a_pre_training_is_kept_and_starts_a_downstream_task(tmp_path, monkeypatch):
    """Hours of several cards: read when they are done; the encoder is what the downstream tasks take."""
    monkeypatch.setitem(ecamp.SIZES, "paper", {"depth": 1, "decoder_depth": 1, "text_depth": 1, "length": 16})
    image = torch.zeros(3, 448, 448)
    found = SimpleNamespace(
        images=Images([image] * 2), texts=["There is no mass."] * 2, statements=None, windows=None
    )
    monkeypatch.setattr(xrays, "reports", lambda *given: found)
    monkeypatch.setattr(runs, "pretrain_rates", lambda steps: np.full(2, 1e-3))
    monkeypatch.setattr(runs, "Pairs", functools.partial(ecamp_text.Pairs, length=16))
    torch.manual_seed(0)
    start = VisionTransformer(img_size=224, depth=1, num_classes=0, global_pool="")
    torch.save({"model": start.state_dict()}, tmp_path / "mae.pth")
    p = given(task="pre-train", dataset="folder", data_root=str(tmp_path), weights=str(tmp_path / "mae.pth"))
    terms, again = [], []
    for kept in (terms, again):
        setting = runs.setting(p, tmp_path / "out", {})
        model = setting.build("ECAMP")
        history = setting.learn(model, "ECAMP", kept)
    assert np.isfinite(terms).all() and [row["loss"] for row in history] == [row[0] for row in again]
    assert np.allclose([row[0] for row in terms], [row[0] for row in again]) and np.isnan(np.array(again)[:, 1:]).all()
    file = tmp_path / "out" / "trained" / "ECAMP, folder, seed 0.safetensors"
    blank = VisionTransformer(img_size=224, depth=1, num_classes=0, global_pool="")
    monkeypatch.setattr(runs, "VisionTransformer", lambda **options: blank)
    read = runs.encoder(given(encoder="ECAMP", weights=str(file)))
    assert torch.equal(read.blocks[0].mlp.fc1.weight, model.encoder.blocks[0].mlp.fc1.weight)
    assert not torch.equal(read.blocks[0].mlp.fc1.weight, start.blocks[0].mlp.fc1.weight)


class Images(list):
    """Images in memory, named as on disk."""

    paths = ("a.png", "b.png")


def test_methods_are_those_that_the_parameter_offers():
    offered = paper("ecamp")["parameters"]["method"]["choices"]
    assert set(offered) == set(runs.PRETRAINED)
    for method, (options, _) in runs.PRETRAINED.items():
        assert ecamp.build("pocket", **options), method


@pytest.mark.slow
def test_dry_run_at_full_size(tmp_path):
    p = given(task="pre-train", dataset="xrays/mimic-cxr", dry_run=True)
    found = runs.setting(p, tmp_path, {})
    model = found.build("ECAMP")
    assert sum(t.numel() for t in model.parameters()) == 183_425_240 - 590_592
    terms = []
    history = found.learn(model, "ECAMP", terms)
    assert len(history) == len(terms) == 2 and np.isfinite(terms).all()


# --- downstream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "dataset", "labels", "expected"),
    [
        ("fine-tune", "xrays/chestx-ray14", "1", (3e-2, 50, 3000, 96)),
        ("fine-tune", "xrays/chestmnist", "10", (2.4e-2, 50, 3000, 768)),
        ("linear probe", "xrays/rsna", "100", (1e-2, 150, 9000, 4096)),
        ("segment", "xrays/siim", "10", (5e-4, 150, 3000, 1024)),
        ("segment", "fundus/riga", "1", (5e-4, 15, 500, 5)),
        ("detect", "xrays/rsna", "100", (5e-4, 30, 20000, 1024)),
    ],
)
def test_published_recipes(task, dataset, labels, expected):
    assert tuple(runs.downstream_recipe(task, dataset, labels).values()) == expected


def test_a_recipe_that_was_not_found():
    with pytest.raises(BadParameter, match=r"CheXpert, 100%"):
        runs.downstream_recipe("fine-tune", "fundus/odir", "10")


@pytest.mark.parametrize(
    ("task", "dataset", "metric"),
    [
        ("fine-tune", "xrays/chestx-ray14", "AUROC"),
        ("linear probe", "xrays/covidx", "accuracy"),
        ("segment", "fundus/riga", "Dice (plain)"),
        ("segment", "xrays/siim", "Dice (plain)"),
        ("detect", "xrays/rsna", "mAP (plain)"),
    ],
)
def test_dry_runs(task, dataset, metric, small):
    found = runs.downstream(given(task=task, dataset=dataset, dry_run=True, protocol="plain"))
    assert found.metric == metric
    model = found.build()
    frozen = [n for n, t in model.named_parameters() if not t.requires_grad]
    assert bool(frozen) == (task in ("linear probe", "detect"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    history = found.learn(model)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in frozen)
    score = found.score(model, found.data["test"])
    assert 0 <= score <= 100 and not model.training


def test_a_trained_model_is_scored_on_the_device_and_comes_back(small, monkeypatch):
    """Twenty thousand test images are not left to the CPU where there is a card."""
    sent = []

    class Card(Fabric):
        def to_device(self, obj):
            if isinstance(obj, nn.Module):
                sent.append(obj)
            return super().to_device(obj)

    monkeypatch.setattr(runs, "launcher", lambda **settings: Card(**settings))
    found = runs.downstream(given(task="linear probe", dataset="xrays/covidx", dry_run=True))
    model = found.build().eval()
    moved = []
    monkeypatch.setattr(model, "to", lambda *where: moved.append(*where))
    found.score(model, found.data["test"])
    assert sent == [model] and moved[-1] == torch.device("cpu")
    wrapped = Fabric(accelerator="cpu").setup_module(model)
    found.score(wrapped, found.data["test"])
    assert sent == [model]  # in training it is where it should be


def test_nothing_left_to_be_found_is_no_score(small):
    """As released, images where nothing was found are left out; here those are all."""
    for protocol, expected in (("released", np.nan), ("plain", 0.0)):
        found = runs.downstream(given(task="detect", dataset="xrays/rsna", dry_run=True, protocol=protocol))
        model = found.build().eval()
        for output in model.outputs:
            nn.init.constant_(output.bias, -20.0)
        np.testing.assert_equal(found.score(model, found.data["test"]), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "dataset"), [("fine-tune", "xrays/chestx-ray14"), ("segment", "xrays/siim"), ("detect", "xrays/rsna")]
)
def test_dry_runs_at_full_size(task, dataset):
    found = runs.downstream(given(task=task, dataset=dataset, dry_run=True, labels="10"))
    assert len(found.learn(found.build())) == 2


def covidx(root, monkeypatch):
    monkeypatch.setattr(xrays, "SIZES", {("xrays/covidx", "classification"): {}})
    folder = root / "xrays" / "covidx"
    lines = []
    for i in range(9):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        Image.new("L", (230, 224), 30 + 80 * (i % 3)).save(folder / "train" / f"{i}.png")
        lines.append(f"train/{i}.png {i % 3}")
    for name in ("train_list_1", "val_list", "test_list"):
        (folder / f"{name}.txt").write_text("\n".join(lines))


def test_a_real_layout_is_trained_until_patience_ends(tmp_path, monkeypatch, small):
    covidx(tmp_path, monkeypatch)
    monkeypatch.setattr(runs, "PATIENCE", {"fine-tune": 2})
    found = runs.downstream(given(data_root=str(tmp_path)))
    assert found.title == "fine-tune on xrays/covidx, 1 % of the labels" and found.recipe["batch"] == 256
    history = found.learn(found.build())
    assert 3 <= len(history) < 300 and history[0]["lr"] == 0  # the published warm-up begins at 0
    assert {"step", "lr", "loss"} <= set(history[0])


def test_patience_and_the_best_state(monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    model, seen = nn.Linear(1, 1), []

    def score(one):
        seen.append(one.weight.detach().clone())
        return next(scores)

    watched = runs.Watched(lambda m, b: m(b[0]).mean(), score, per_epoch=1, steps=100, patience=2)
    with pytest.raises(runs._Enough):
        for step in range(10):
            with torch.no_grad():
                model.weight.fill_(step)
            watched(model, (torch.ones(1, 1),))
    watched.finish(model)
    assert [s for _, s in watched.scores] == [1, 3, 2, 2.5]
    assert watched.best == 3 and torch.equal(model.weight, seen[1])
    late = runs.Watched(lambda m, b: m(b[0]).mean(), score, per_epoch=1, steps=100, patience=2, first=50)
    late.look(model, 1)
    assert not late.scores


def test_a_training_that_ends_on_the_published_step():
    watched = runs.Watched(lambda m, b: m(b[0]).mean(), lambda m: 0.0, per_epoch=3, steps=6, patience=100)
    model, steps = nn.Linear(1, 1), 0
    with pytest.raises(runs._Enough):
        for _ in range(20):
            watched(model, (torch.ones(1, 1),))
            steps += 1
    assert steps == 6


def test_encoders(tmp_path, monkeypatch):
    """An authors' file gives its encoder; MAE's by its own names; what is missing is said."""
    with pytest.raises(MissingWeights, match=r"ECAMP_ViT_Base_16\.pth"):
        runs.encoder(given(encoder="ECAMP", data_root=str(tmp_path)))
    torch.manual_seed(1)
    trained = VisionTransformer(img_size=224, num_classes=0, global_pool="")
    torch.save({"model": trained.state_dict() | {"mask_token": torch.ones(1, 1, 512)}}, tmp_path / "mae.pth")
    found = runs.encoder(given(encoder="MAE", weights=str(tmp_path / "mae.pth")))
    assert torch.equal(found.blocks[3].mlp.fc1.weight, trained.blocks[3].mlp.fc1.weight)
    torch.save({"model": {"pos_embed": torch.zeros(1, 2, 2)}}, tmp_path / "bad.pth")
    for name in ("MAE", "ECAMP"):
        with pytest.raises(BadCheckpoint):
            runs.encoder(given(encoder=name, weights=str(tmp_path / "bad.pth")))


def test_what_cannot_be_run_is_said(tmp_path):
    for changes, said in (
        ({"dataset": "covidx"}, "xrays/covidx"),
        ({"dataset": "xrays/covidx", "task": "segment"}, "fundus/riga"),
        ({"task": "pre-train"}, "linear probe"),
        ({"dataset": "xrays/mimic-cxr"}, "xrays/chexpert"),
    ):
        with pytest.raises(BadParameter, match=said):
            runs.downstream(given(**changes))
    for dry_run in (False, True):
        with pytest.raises(BadParameter, match="xrays/mimic-cxr"):
            runs.setting(given(dataset="xrays/rsna", dry_run=dry_run), tmp_path, {})
    with pytest.raises(MissingData, match="COVIDx"):
        runs.downstream(given(data_root=str(tmp_path)))


def test_detection_is_tested_on_the_validation_list_as_released(monkeypatch):
    asked = []
    monkeypatch.setattr(xrays, "load", lambda *a, **o: asked.append(a[2]))
    for protocol, last in (("released", "val"), ("plain", "test")):
        asked.clear()
        runs.downstream(given(task="detect", dataset="xrays/rsna", protocol=protocol))
        assert asked == ["train", "val", last]


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_gather_and_stand_beside_the_published_ones(tmp_path):
    path = tmp_path / "measured.csv"
    row = {
        "task": "fine-tune",
        "dataset": "xrays/rsna",
        "labels": "10",
        "encoder": "ECAMP",
        "protocol": "released",
        "seed": 0,
        "score": 80.0,
    }
    runs.measured(path, row)
    rows = runs.measured(
        path,
        row | {"seed": 1, "score": 82.0},
        row | {"encoder": "random", "score": 60.0},
        row | {"dataset": "fundus/mured", "score": 70.0},
        row | {"protocol": "plain", "score": 1.0},
        row | {"dataset": "xrays/chestmnist", "score": 2.0},
    )
    assert runs.cells(rows, "classification-finetune") == {
        ("ECAMP", "RSNA 10 %"): 81.0,
        ("random init", "RSNA 10 %"): 60.0,
    }
    assert runs.cells(rows, "fundus") == {("ECAMP", "MuReD 10 %"): 70.0}
    assert runs.cells(rows, "detection") == {}
    found = runs.tables(pd.read_csv(path))
    shown = found["Classification, fine-tuned"].set_index("method")
    assert shown.loc["ECAMP", "RSNA 10 %"] == "– / 81.00" and shown.loc["MRM", "measured here"] == "not run"


def test_setting_is_a_plain_record():
    assert {f.name for f in dataclasses.fields(runs.Downstream)} >= {"data", "build", "learn", "score"}
