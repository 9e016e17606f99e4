"""ECAMP with the published settings: schedules, accumulation, downstream recipes, dry runs, collected results."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import xrays
from companion.errors import BadCheckpoint, MissingData, MissingWeights
from companion.evaluation.claims import judge_measured
from companion.models.ecamp import model as ecamp
from companion.models.ecamp import recipe
from companion.models.ecamp.text import Pairs, Vocabulary
from companion.ops.papers import paper
from companion.training.checkpoints import Checkpoint
from companion.training.fit import Hardware
from tests.conftest import parameters
from tests.models.common import assert_goes_on, refuses
from tests.small import NARROW, shrink


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


def test_schedule_is_left_at_half_of_the_peak():
    """Claim 6: the cosine would end at epoch 200, training stops at 120."""
    learning_rates = recipe.pretraining_learning_rates(10 * 8192)
    assert len(learning_rates) == 1200 and learning_rates[0] == 0
    assert learning_rates[400] == learning_rates.max() == pytest.approx(1.5e-4)
    assert learning_rates[200] == pytest.approx(0.75e-4)
    assert learning_rates[1199] == pytest.approx(7.5e-5, rel=0.01)


def test_an_epoch_of_pre_training_leaves_iterations_over():
    """MIMIC's 377,110 images: 368 iterations are 46 steps; one more image a device, and the epoch never quite ends."""
    cut = recipe.pretraining_epoch(377_110, recipe.recipe())
    assert (cut.iterations, cut.steps, cut.batch) == (368, 46, 8192)
    few = recipe.pretraining_epoch(3, recipe.recipe())
    assert (few.steps, few.batch) == (1, 3) and len(recipe.pretraining_learning_rates(3)) == 120


def toy_pairs(count=8):
    generator = torch.Generator().manual_seed(0)
    labels, ones = torch.randint(5, 40, (count, 20), generator=generator), torch.ones(count, 20)
    images, noise = (torch.randn(count, *shape, generator=generator) for shape in ((3, 64, 64), (64,)))
    hidden = labels.where(torch.rand(count, 20, generator=generator) < 0.3, 3)
    return TensorDataset(images, hidden, labels, ones.long(), ones, noise, torch.ones(count, 2, dtype=torch.long))


def test_methods_are_those_that_the_parameter_offers():
    assert set(paper("ecamp")["parameters"]["method"]["choices"]) == set(ecamp.METHODS)
    assert all(ecamp.build("pocket", **options) for options, _ in ecamp.METHODS.values())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    models, histories = [], []
    for micro_batch in (8, 3):
        torch.manual_seed(0)
        models.append(ecamp.build("pocket"))
        options = {"learning_rates": np.full(3, 1e-3), "micro_batch": micro_batch, "batch": 8}
        histories.append(pd.DataFrame(recipe.pretrain(given(), models[-1], toy_pairs(), **options)))
    np.testing.assert_allclose(*histories, rtol=1e-4)
    assert list(histories[0]) == ["step", "lr", "loss", "mim", "sr", "mlm"]
    np.testing.assert_allclose(histories[0].loss, histories[0][["mim", "sr", "mlm"]].sum(axis=1), rtol=1e-6)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        # Adam divides by the size of a gradient, so the rounding of a tiny one moves a weight
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_the_optimiser_is_the_published_one(monkeypatch):
    called = {}
    monkeypatch.setattr(recipe, "fit", lambda *_, **options: called.update(options))
    recipe.pretrain(given(), model := ecamp.build("pocket"), toy_pairs(), batch=8)
    matrices, vectors = called["optimizer"](model).param_groups
    assert matrices["betas"] == (0.9, 0.95) and (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0)
    assert called["hardware"].accumulate == 1


def test_pre_training_on_a_folder(tmp_path):
    folder = tmp_path / "xrays" / "mimic-cxr"
    paths = [f"files/s{i}/a.png" for i in range(3)]
    for path in paths:
        (folder / path).parent.mkdir(parents=True)
        Image.new("L", (500, 480), 90).save(folder / path)
    xrays.write_reports(folder / "mimic-cxr-2.0.0-entity-llm.csv", paths, ["There is no mass."] * 3, ["X."] * 3)
    found = recipe.setting(pretraining(dataset="xrays/mimic-cxr", data_root=str(tmp_path)), tmp_path)
    assert found.learning_rates == {"ECAMP": 1.5e-4}
    item = found.pairs("ECAMP")[0]
    assert item.images.shape == (3, 448, 448) and item.ids.shape == (256,) and item.window.tolist() == [1, 1]
    assert torch.equal(found.pairs("MRM-like")[0].weights, torch.ones(256))
    with pytest.raises(MissingWeights, match=r"mae_vit_base\.pth"):
        found.build("ECAMP")
    (folder / "mimic-cxr-2.0.0-entity-llm.csv").rename(folder / "pretrain.csv")
    mine = recipe.setting(pretraining(data_root=str(folder)), tmp_path)
    assert mine.title == "folder, 3 images" and mine.pairs("ECAMP")[0].images.shape == (3, 448, 448)


class Images(list):
    """Images in memory, named as on disk."""

    paths = ("a.png", "b.png")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A narrow model at the `paper` size, two pairs, six steps, and a MAE file; returns the MAE."""
    monkeypatch.setitem(ecamp.SIZES, "paper", NARROW | {"length": 16})
    images = Images(torch.zeros(2, 3, 448, 448))
    found = SimpleNamespace(images=images, texts=["There is no mass."] * 2, statements=None, windows=None)
    monkeypatch.setattr(xrays, "reports", lambda *given: found)
    # stored: learned in two folders, the pieces are in two orders
    Vocabulary.train(found.texts).tokenizer.save(str(tmp_path / "mimic_wordpiece.json"))
    monkeypatch.setattr(recipe, "pretraining_learning_rates", lambda images, r: np.full(6, 1e-3))
    monkeypatch.setattr(recipe, "Pairs", functools.partial(Pairs, length=16))
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))
    torch.manual_seed(0)
    mae = VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    return mae


def test_a_learned_vocabulary_is_kept(tmp_path, start):
    """Learned again from the same reports, its pieces have other ids: no checkpoint would fit."""
    (tmp_path / "mimic_wordpiece.json").unlink()
    p = pretraining(data_root=str(tmp_path), weights=str(tmp_path / "mae.pth"))
    one, two = (recipe._pairs(p, tmp_path)[1].pieces for _ in range(2))
    assert one == two and len(list(tmp_path.glob("vocabulary *.json"))) == 1


def test_a_killed_pre_training_resumes_and_its_encoder_starts_a_downstream_task(tmp_path, monkeypatch, start):
    """Masks of words and patches are drawn again each step, by the loader, from the item's seed."""
    p = pretraining(data_root=str(tmp_path), weights=str(tmp_path / "mae.pth"))

    def train(out):
        setting = recipe.setting(p, out)
        model = setting.build("ECAMP")
        history = setting.learn(model, "ECAMP")
        assert len(history) == 6 and all(row["mlm"] > 0 for row in history)
        return model, history

    model, out = assert_goes_on(train, tmp_path, monkeypatch, ecamp, "pretraining_loss", 3)
    (file,) = (out / "trained").iterdir()
    monkeypatch.setattr(recipe, "VisionTransformer", lambda **options: copy.deepcopy(start))
    encoder = recipe.encoder(given(encoder="ECAMP", weights=str(file)))
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, model.encoder.blocks[0].mlp.fc1.weight)
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, start.blocks[0].mlp.fc1.weight)


@pytest.mark.slow
@pytest.mark.large
def test_dry_run_at_full_size(tmp_path):
    found = recipe.setting(pretraining(dataset="xrays/mimic-cxr", dry_run=True), tmp_path)
    model = found.build("ECAMP")
    assert sum(t.numel() for t in model.parameters()) == 183_425_240 - 590_592
    history = found.learn(model, "ECAMP")
    assert len(history) == 2 and np.isfinite([row["mlm"] for row in history]).all() and not list(tmp_path.iterdir())


def test_published_recipes():
    for task, dataset, labels, *expected in (
        ("fine-tune", "xrays/chestx-ray14", "1", 3e-2, 50, 3000, 96),
        ("fine-tune", "xrays/chestmnist", "10", 2.4e-2, 50, 3000, 768),
        ("linear probe", "xrays/rsna", "100", 1e-2, 150, 9000, 4096),
        ("segment", "xrays/siim", "10", 5e-4, 150, 3000, 1024),
        ("segment", "fundus/riga", "1", 5e-4, 15, 500, 5),
        ("detect", "xrays/rsna", "100", 5e-4, 30, 20000, 1024),
    ):
        assert list(recipe.downstream_recipe(task, dataset, labels).values()) == expected, dataset


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
def test_dry_runs(task, dataset, metric, small, tmp_path):
    found = recipe.downstream(given(task=task, dataset=dataset, dry_run=True, protocol="plain"), tmp_path)
    assert found.metric == metric
    model = found.build()
    frozen = [n for n, t in model.named_parameters() if not t.requires_grad]
    # the encoders are random: the authors train such a one on RIGA alone
    assert bool(frozen) == ((task, dataset) not in (("fine-tune", "xrays/chestx-ray14"), ("segment", "fundus/riga")))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    history = found.learn(model)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in frozen)
    score = found.score(model, found.data["test"])
    assert 0 <= score <= 100 and not model.training


def test_a_trained_model_is_scored_where_and_as_it_was_trained(small, monkeypatch, tmp_path):
    """Twenty thousand test images are not scored on the CPU where there is a GPU."""
    used, evaluating = [], recipe.evaluating
    monkeypatch.setattr(recipe, "evaluating", lambda *given: used.append(given) or evaluating(*given))
    p = given(task="linear probe", dry_run=True, precision="bf16-mixed")
    found = recipe.downstream(p, tmp_path)
    model = found.build().eval()
    found.score(model, found.data["test"])
    assert used == [(Hardware(p.accelerator, precision="bf16-mixed"), model)]


def test_nothing_left_to_be_found_is_no_score(small, tmp_path):
    """As released, images where nothing was found are left out; here those are all."""
    for protocol, expected in (("released", np.nan), ("plain", 0.0)):
        found = recipe.downstream(given(task="detect", dataset="xrays/rsna", dry_run=True, protocol=protocol), tmp_path)
        model = found.build().eval()
        for output in model.outputs:
            nn.init.constant_(output.bias, -20.0)
        np.testing.assert_equal(found.score(model, found.data["test"]), expected)


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize(
    ("task", "dataset"), [("fine-tune", "xrays/chestx-ray14"), ("segment", "xrays/siim"), ("detect", "xrays/rsna")]
)
def test_dry_runs_at_full_size(task, dataset, tmp_path):
    found = recipe.downstream(given(task=task, dataset=dataset, dry_run=True, labels="10"), tmp_path)
    assert len(found.learn(found.build())) == 2


def covidx(root, monkeypatch):
    monkeypatch.setattr(xrays, "SIZES", {("xrays/covidx", "classification"): {}})
    folder = root / "xrays" / "covidx"
    (folder / "train").mkdir(parents=True)
    for i in range(9):
        Image.new("L", (230, 224), 30 + 80 * (i % 3)).save(folder / "train" / f"{i}.png")
    for name in ("train_list_1", "val_list", "test_list"):
        (folder / f"{name}.txt").write_text("\n".join(f"train/{i}.png {i % 3}" for i in range(9)))


def test_a_real_layout_is_trained_until_patience_ends(tmp_path, monkeypatch, small):
    covidx(tmp_path, monkeypatch)
    monkeypatch.setattr(recipe, "PATIENCE", {"fine-tune": 2})
    found = recipe.downstream(given(data_root=str(tmp_path)), tmp_path / "out")
    assert found.title == "fine-tune on xrays/covidx, 1 % of the labels" and found.recipe["batch"] == 256
    history = found.learn(model := found.build())
    assert 3 <= len(history) < 300 and history[0]["lr"] == pytest.approx(0.03 / 50)  # not 0
    assert {"step", "lr", "loss"} <= set(history[0])
    (file,) = (tmp_path / "out" / "trained").iterdir()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in backbones.read_state(file).items())


@pytest.mark.parametrize("kill", ["in training", "in validation"])
def test_a_killed_downstream_training_resumes_to_the_same_bits(tmp_path, monkeypatch, small, kill):
    """The best weights and the epochs without a new best are in the checkpoint; drop path draws at each step."""
    covidx(tmp_path, monkeypatch)
    monkeypatch.setattr(recipe, "PATIENCE", {"fine-tune": 4})
    monkeypatch.setattr(recipe, "downstream_recipe", lambda *_: {"lr": 0.1, "warmup_steps": 1, "steps": 60, "batch": 3})
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))
    scores = {3: 40.0, 6: 70.0, 9: 60.0, 12: 65.0, 15: 66.0, 18: 67.0}  # by step, which is not visible in the weights
    monkeypatch.setattr(recipe, "_classified", lambda *_: scores[step[0]])
    step, on_epoch_end = [0], recipe.EarlyStop.on_epoch_end

    def counted(self, loop):
        step[0] = loop.step
        on_epoch_end(self, loop)

    monkeypatch.setattr(recipe.EarlyStop, "on_epoch_end", counted)

    def train(out):
        found = recipe.downstream(given(data_root=str(tmp_path)), out)
        model = found.build()
        history = found.learn(model)
        assert len(history) == 6 * 3, "the best was the second of six epochs"
        return model, history

    where = (recipe.heads, "classification_loss", 13) if kill == "in training" else (recipe, "_classified", 4)
    assert_goes_on(train, tmp_path, monkeypatch, *where)


def test_validation_images_are_decoded_once(tmp_path, monkeypatch, small):
    covidx(tmp_path, monkeypatch)
    monkeypatch.setattr(recipe, "WORKERS", 0)
    p, read, grey = given(data_root=str(tmp_path)), [], recipe.xrays.Pictures.grey
    monkeypatch.setattr(recipe.xrays.Pictures, "grey", lambda self, i: (read.append(i), grey(self, i))[1])
    found = recipe.downstream(p, tmp_path / "out")
    model, part = found.build(), found.data["val"]
    held = recipe._held(part, 0)
    count = len(read)
    assert count == len(part) + 1
    one, other = (list(recipe._outputs(p, model, data)) for data in (held, part))
    assert len(read) == count + len(part)  # by the last
    assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    monkeypatch.setattr(recipe, "HELD", 1000)
    assert recipe._held(part, 0) is part


def test_colours_are_held_too():
    class Colours(torch.utils.data.Dataset):
        colour = True

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return torch.arange(3.0)[:, None, None].expand(3, 4, 4) + i, torch.zeros(1)

    images, _ = recipe._held(Colours(), 0).tensors
    assert images[:, :, 0, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_patience_and_masks_differ_by_set():
    expected = {("fundus/riga", "ECAMP"): 40, ("fundus/riga", "MRM"): 20, ("xrays/siim", "MRM"): 40}
    for (dataset, encoder), epochs in expected.items():
        assert recipe.patience(given(task="segment", dataset=dataset, encoder=encoder)) == epochs
    assert recipe.patience(given(task="detect")) == recipe.patience(given()) == 20
    for dataset, warped in (("xrays/siim", False), ("xrays/rsna", True), ("fundus/riga", True)):
        assert recipe.mask_transform(dataset, True).warp_mask == warped


@pytest.mark.parametrize(("steps", "expected"), [(6, 6), (4, 12), (5, 15), (1, 3)])
def test_a_training_ends_with_the_epoch_that_is_a_multiple_of_the_published_steps(
    steps, expected, tmp_path, monkeypatch, small
):
    """Three steps per epoch; beyond the published steps the learning rate rises again."""
    covidx(tmp_path, monkeypatch)
    numbers = {"lr": 0.01, "warmup_steps": 0, "steps": steps, "batch": 3}
    monkeypatch.setattr(recipe, "downstream_recipe", lambda *_: numbers)
    found = recipe.downstream(given(data_root=str(tmp_path)), tmp_path / "out")
    learning_rates = [row["lr"] for row in found.learn(found.build())]
    after = 1 + np.arange(expected)  # the scheduler is called before the optimiser
    np.testing.assert_allclose(learning_rates, 0.005 * (1 + np.cos(np.pi * after / steps)), atol=1e-9)


def test_encoders(tmp_path, monkeypatch):
    """Encoders from the authors' files, here narrow ones, and from MAE's; missing tensors are named."""
    narrow = functools.partial(VisionTransformer, embed_dim=48, depth=4, num_heads=2)
    monkeypatch.setattr(recipe, "VisionTransformer", narrow)
    with pytest.raises(MissingWeights, match=r"ECAMP_ViT_Base_16\.pth"):
        recipe.encoder(given(encoder="ECAMP", data_root=str(tmp_path)))
    torch.manual_seed(1)
    trained = narrow(img_size=224, num_classes=0, global_pool="")
    torch.save({"model": trained.state_dict() | {"mask_token": torch.ones(1, 1, 512)}}, tmp_path / "mae.pth")
    found = recipe.encoder(given(encoder="MAE", weights=str(tmp_path / "mae.pth")))
    assert torch.equal(found.blocks[3].mlp.fc1.weight, trained.blocks[3].mlp.fc1.weight)
    torch.save({"model": {"pos_embed": torch.zeros(1, 2, 2)}}, tmp_path / "bad.pth")
    for name in ("MAE", "ECAMP"):
        with pytest.raises(BadCheckpoint):
            recipe.encoder(given(encoder=name, weights=str(tmp_path / "bad.pth")))


def test_what_cannot_be_run_is_said(tmp_path, monkeypatch):
    def downstream(**changes):
        return lambda: recipe.downstream(given(**changes), tmp_path)

    refuses(
        (downstream(dataset="covidx"), "xrays/covidx"),
        (downstream(dataset="xrays/covidx", task="segment"), "fundus/riga"),
        (downstream(task="pre-train"), "linear probe"),
        (downstream(dataset="xrays/mimic-cxr"), "xrays/chexpert"),
        (downstream(devices=2), "only pre-training"),
        (lambda: recipe.setting(given(dataset="xrays/rsna"), tmp_path), "xrays/mimic-cxr"),
        (lambda: recipe.setting(given(dataset="xrays/rsna", dry_run=True), tmp_path), "xrays/mimic-cxr"),
        (lambda: recipe.downstream_recipe("fine-tune", "fundus/odir", "10"), r"CheXpert, 100%"),
    )
    refuses((downstream(data_root=str(tmp_path)), "COVIDx"), error=MissingData)
    # detection is tested on the validation list as released
    asked = []
    monkeypatch.setattr(xrays, "load", lambda *a, **o: asked.append(a[2]))
    for protocol in ("released", "plain"):
        downstream(task="detect", dataset="xrays/rsna", protocol=protocol)()
    assert asked == ["train", "val", "val", "train", "val", "test"]


def test_results_stand_beside_the_published_ones(tmp_path):
    row = dict(zip(recipe.KEYS, ("fine-tune", "xrays/rsna", "10", "ECAMP", "released", 0), strict=True))
    others = [
        {"seed": 1, "score": 82.0},
        {"encoder": "random", "score": 60.0},
        {"dataset": "fundus/mured", "score": 70.0},
        {"protocol": "plain", "score": 1.0},
        {"dataset": "xrays/chestmnist", "score": 2.0},
    ]
    rows = recipe.measured(tmp_path / "measured.csv", row | {"score": 80.0}, *(row | other for other in others))
    found = {("ECAMP", "RSNA 10 %"): 81.0, ("random init", "RSNA 10 %"): 60.0}
    assert recipe.cells(rows, "classification-finetune") == found
    assert recipe.cells(rows, "fundus") == {("ECAMP", "MuReD 10 %"): 70.0}
    assert recipe.cells(rows, "detection") == {}
    shown = recipe.tables(pd.read_csv(tmp_path / "measured.csv"))["Classification, fine-tuned"].set_index("method")
    assert shown.loc["ECAMP", "RSNA 10 %"] == "– / 81.00" and shown.loc["MRM", "measured here"] == "not run"


def test_the_comparison_with_mrm_is_judged_by_what_was_measured(tmp_path):
    (claim,) = (c for c in paper("ecamp")["claims"] if "measured" in c)
    rows = []
    for condition in claim["measured"]:
        table, _, column = condition["of"][1].partition(", ")
        title, labels, _ = column.split()
        task = {"fine-tuned": "fine-tune", "segmentation": "segment", "detection": "detect"}.get(table, table)
        dataset = next(name for name, own in recipe.TITLES.items() if own == title)
        facts = {"task": task, "dataset": dataset, "labels": labels, "protocol": "released", "seed": 0}
        rows += [facts | {"encoder": name, "score": score} for name, score in (("ECAMP", 80.0), ("MRM", 79.5))]

    def judged(file, *new):
        return judge_measured(claim["measured"], recipe.claim_cells(recipe.measured(tmp_path / file, *new)))

    holds, value = judged("measured.csv", *rows)
    assert holds and value.count("+0.50") == len(claim["measured"]) == 33
    assert judged("measured.csv", rows[0] | {"score": 79.0})[0] is False
    assert judged("few.csv", *rows[:2])[0] is None


def test_the_protocol_is_that_of_the_constants(monkeypatch):
    before = recipe.protocol()
    monkeypatch.setattr(recipe, "CLIP", 2.0)
    monkeypatch.setattr(recipe, "PATIENCE", {"segment": 7})
    changed = {name for name, value in recipe.protocol().items() if value != before[name]}
    assert changed == {"clipping downstream", "stopping"} and "8,192 pairs" in before["pre-training, batch"]
