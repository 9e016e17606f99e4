"""MetaSegNet's runs at full size: recipes, texts, zones left out, other sets, maps, results; small networks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertModel, BertTokenizer

from companion import cli, geotiff
from companion.backbones import read_state
from companion.climate import Prompts
from companion.data import landcover
from companion.data.landcover_sets import LOVEDA, OEM, POTSDAM
from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.metrics import landcover as metrics
from companion.evaluation.tables import published_table
from companion.models.metasegnet import recipe
from companion.models.metasegnet.model import SIZES, MetaSegNet, swin
from companion.models.metasegnet.text import BertText, ClipText, Words
from companion.ops import report
from companion.training import callbacks, checkpoints
from companion.training.checkpoints import Checkpoint, trained_state
from tests.conftest import parameters
from tests.data.test_landcover import earth, loveda, potsdam
from tests.models.common import assert_goes_on, refuses
from tests.small import shrink
from tests.test_geotiff import noise, written


def given(**changes) -> SimpleNamespace:
    return parameters("metasegnet", **{"profile": "paper", "accelerator": "cpu", "data_root": "nowhere"} | changes)


@pytest.fixture
def small(monkeypatch):
    """A small Swin and decoder instead of the full-size ones, and a small text encoder instead of BERT."""
    shrink("metasegnet", monkeypatch)


def part(count: int = 4, classes: int = 3, side: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes + 1, (count, side, side), generator=generator)
    return TensorDataset(torch.randn(count, 3, side, side, generator=generator), labels)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (POTSDAM, (45, 4, 768, 3, 15, 2.5e-4, 0, False)),
        (LOVEDA, (30, 8, 512, 1, 0, 0.01, 0.25, True)),
        ("folder", (45, 4, 512, 1, 15, 2.5e-4, 0, False)),
    ],
)
def test_recipes_are_the_authors_and_learning_rates_those_of_torchs_schedulers(dataset, expected):
    r = recipe.recipe(dataset)
    assert (r.epochs, r.batch, r.crop, r.copies, r.restart, r.weight_decay, r.brightness, r.every) == expected
    assert r == recipe.recipe(OEM) or dataset != "folder"
    optimizer, schedulers = torch.optim.SGD([nn.Parameter(torch.zeros(1))], r.lr), torch.optim.lr_scheduler
    if r.restart:
        schedule = schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=r.restart, T_mult=2)
    else:
        schedule = schedulers.CosineAnnealingLR(optimizer, T_max=r.epochs, eta_min=r.floor)
    rates = []
    for _ in range(r.epochs):
        rates += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(recipe.learning_rates(r, r.lr, 3, r.epochs), rates, rtol=1e-6, atol=1e-12)


def test_training_is_adamw_in_lookahead_with_two_learning_rates_and_no_decay_of_biases(small, monkeypatch):
    monkeypatch.setattr(recipe, "recipe", lambda dataset: recipe.Recipe(7, 4, 1e-2, 1e-3, 0.1, 0, 0, 32, 1, 0, 0, 0, 0))
    model, seen = MetaSegNet.build(3, size="pocket"), {}
    monkeypatch.setattr(recipe, "fit", lambda model, loss, data, **options: seen.update(options, loss=loss))
    recipe.learn(given(method="unimodal"), part(4), model)
    assert (seen["epochs"], seen["batch"]) == (7, 4)
    images, labels = part(4).tensors
    model.eval()  # without dropout
    assert torch.equal(seen["loss"](model, (images, labels)), model.loss(images, None, labels))
    (ahead,), optimizer = seen["callbacks"], seen["optimizer"](model)
    assert isinstance(ahead, callbacks.Lookahead) and (ahead.k, ahead.alpha) == (5, 0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    own = {id(t): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for t in group["params"]}
    options = {name: own[id(t)] for name, t in model.named_parameters()}
    assert options["encoder.patch_embed.proj.weight"] == options["norms.0.weight"] == (1e-3, 0.1)
    assert options["encoder.patch_embed.proj.bias"] == (1e-3, 0) and options["decoder.squeeze.0.weight"] == (1e-2, 0.1)
    assert {decay for name, (_, decay) in options.items() if name.endswith("bias")} == {0}
    half = (1 + np.cos(np.pi * np.arange(7) / 7)) / 2
    np.testing.assert_allclose(seen["schedule"](1e-3, 7, 1), 1e-3 * half)


def test_texts_of_each_method():
    prompts, zones = Prompts.read(), ["Cfa", None]
    assert recipe.texts(prompts, "unimodal", zones) is None
    assert recipe.texts(prompts, "unimodal", zones, "wrong") is None
    assert recipe.texts(prompts, "MetaSegNet", zones) == [prompts.text("Cfa"), prompts.unknown]
    assert recipe.texts(prompts, "MetaSegNet", zones, own=[None, "my own"]) == [prompts.text("Cfa"), "my own"]
    assert recipe.texts(prompts, "MetaSegNet", zones, "constant", own=["mine", "mine"]) == [prompts.constant] * 2
    assert recipe.texts(prompts, "constant text", zones) == [prompts.constant] * 2
    assert recipe.texts(prompts, "zone names", zones)[0] == prompts.text("Cfa", "name")
    assert recipe.texts(prompts, "one-hot zone", zones) == ["Cfa", "unknown"]
    assert recipe.texts(prompts, "MetaSegNet", ["Cfa", "Aw"], "wrong") == [prompts.text("Aw"), prompts.text("Cfa")]
    assert recipe.texts(prompts, "one-hot zone", ["Cfa", "Aw"], "wrong") == ["Aw", "Cfa"]
    one = recipe.texts(prompts, "zone names", ["Cfa", "Cfa", None], "wrong", own=["mine"] * 3)
    assert one[0] == one[1] != prompts.text("Cfa", "name") and one[2] == prompts.unknown
    assert sorted(recipe.texts(prompts, "one-hot zone", ["Cfa", "Aw"], "shuffled")) == ["Aw", "Cfa"]


def test_half_of_the_full_texts_lose_their_header():
    prompts = Prompts.read()
    texts = recipe.texts(prompts, "MetaSegNet", ["Cfa", "Cfb", "Cfa", None])
    encoder = Words.of(texts, length=64)
    data = recipe.Prompted(part(4), encoder, texts, 0.5)
    torch.manual_seed(0)
    drawn = torch.stack([data[0][2] for _ in range(200)])
    hidden = (drawn != encoder.ids(texts[:1])).any(1)
    assert 70 < hidden.sum() < 130 and len(drawn.unique(dim=0)) == 2
    never = recipe.Prompted(part(4), encoder, texts)
    assert all(torch.equal(never[i][2], encoder.ids(texts)[i]) for i in range(4))
    refuses((lambda: recipe.Prompted(part(4), encoder, texts[:3]), "texts"))


def test_text_encoders_and_berts_folder(tmp_path):
    prompts = Prompts.read()
    one_hot = recipe.text_encoder(given(method="one-hot zone"), prompts)
    rows = one_hot.ids(recipe.texts(prompts, "one-hot zone", [*prompts.zones, None]))
    assert rows.shape == (len(prompts.zones) + 1, 1) and len(rows.unique()) == len(prompts.zones) + 1
    assert recipe.text_encoder(given(method="unimodal"), prompts) is None
    refuses((lambda: recipe.text_encoder(given(), prompts), "bert-base-uncased"), error=MissingWeights)
    folder = tmp_path / "weights" / "bert-base-uncased"
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(**shape, vocab_size=40))
    bert.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "climate", "zone", "roofs", "."]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    encoder = recipe.text_encoder(given(data_root=str(tmp_path)), prompts)
    assert isinstance(encoder, BertText) and encoder.width == 24 and encoder.frozen
    assert torch.equal(encoder.model.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    hidden = recipe.Prompted(part(1), encoder, recipe.texts(prompts, "MetaSegNet", ["Cfa"]), 1.0)[0][2]
    assert encoder.tokenizer.convert_ids_to_tokens(hidden[:5].tolist())[1:4] == ["climate", "zone", "[UNK]"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptFile, match="bert-base-uncased"):
        recipe.text_encoder(given(data_root=str(tmp_path)), prompts)


def test_the_authors_swin_and_timms(small, tmp_path, monkeypatch):
    torch.manual_seed(3)
    theirs = MetaSegNet.build(3, size="pocket")
    state = {n.removeprefix("backbone."): t for n, t in theirs.to_official().items() if n.startswith("backbone.")}
    counters = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(2)}
    torch.save({"state_dict": state | counters}, tmp_path / "stseg.pth")
    found = recipe.build(given(method="unimodal", weights=str(tmp_path / "stseg.pth")), Prompts.read(), 3)
    for name, t in theirs.state_dict().items():
        if name.startswith(("encoder.", "norms.")):
            assert torch.equal(found.state_dict()[name], t), name
    del state["norm1.weight"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(BadCheckpoint, match=r"norm1\.weight"):
        recipe.build(given(method="unimodal", weights=str(tmp_path / "bad.pth")), Prompts.read(), 3)
    torch.manual_seed(5)
    timms = swin(**SIZES["pocket"]["swin"])
    monkeypatch.setattr(recipe.backbones, "build", lambda name, weights: timms)
    found = recipe.build(given(method="unimodal"), Prompts.read(), 3)
    assert torch.equal(found.encoder.patch_embed.proj.weight, timms.patch_embed.proj.weight)


def test_a_trained_network_is_saved_and_loaded(small, tmp_path):
    prompts, path = Prompts.read(), tmp_path / "net.safetensors"
    p = given(task="test", checkpoint=str(path))
    refuses((lambda: recipe.build(p, prompts, 3), "never released"), error=MissingWeights)
    model = recipe.build(given(seed=9, dry_run=True), prompts, 3)
    checkpoints.save(tmp_path, "net", trained_state(model))
    again = recipe.build(p, prompts, 3)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(BadCheckpoint):
        recipe.build(p, prompts, 4)
    path.write_bytes(b"1234")
    refuses((lambda: recipe.build(p, prompts, 3), r"net\.safetensors"), error=CorruptFile)


@pytest.mark.parametrize("method", list(recipe.LEVELS))
def test_dry_runs(small, method, monkeypatch, tmp_path):
    found = recipe.setting(given(dry_run=True, method=method), tmp_path)
    model, history = recipe.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history) and not model.training
    counts, test = recipe.matrix(found, model, method, "test"), found.tests["test"]
    assert test.zones == ["Cfa", "Aw"] and counts.sum() == (test.data.tensors[1] < 8).sum()
    wrong = recipe.matrix(found, model, method, "test", "wrong")
    assert (method == "unimodal") <= torch.equal(wrong, counts) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize(("dataset", "encoder"), [(OEM, "bert"), (POTSDAM, "clip")])
def test_dry_runs_at_full_size(dataset, encoder):
    found = recipe.setting(given(dry_run=True, dataset=dataset, text_encoder=encoder), Path("unused"))
    model, history = recipe.train(found, "MetaSegNet")
    assert len(history) == 2 and isinstance(model.text, BertText if encoder == "bert" else ClipText)
    counts = published_table("metasegnet", "counts").set_index("method").total
    if dataset == OEM:
        expected = int(counts["MetaSegNet (reconstruction), Swin-B, 8 classes"])
        assert sum(t.numel() for t in model.trained().values()) == expected
    assert recipe.matrix(found, model, "MetaSegNet", "test").sum() > 0


@pytest.fixture
def quick(small, monkeypatch):
    """One epoch, small crops."""
    plain = recipe.recipe

    def shortened(dataset):
        return recipe.Recipe(**(vars(plain(dataset)) | {"epochs": 1, "batch": 2, "crop": 32}))

    monkeypatch.setattr(recipe, "recipe", shortened)


def test_images_of_several_sizes_are_tested_in_batches():
    torch.manual_seed(0)
    model = MetaSegNet(swin(**SIZES["pocket"]["swin"]), 3, None, **SIZES["pocket"]["model"]).eval()
    data = [(torch.randn(3, n, 64), torch.randint(3, (n, 64))) for n in (64, 32, 64, 64, 32)]
    counts = [recipe.confusion(model, recipe.Test(data, [], ["a", "b", "c"], batch=b), None) for b in (1, 2, 5)]
    assert counts[0].sum() == 4 * 64 * 64 and torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])


def test_openearthmap_with_a_zone_left_out(quick, tmp_path):
    earth(tmp_path, ("tokyo", "kyoto", "el_rodeo", "paris"))
    p = given(data_root=str(tmp_path), held_out="Aw", augmentation="lr")
    found = recipe.setting(p, tmp_path)
    assert found.title == "landcover/openearthmap, 4 images, zone Aw left out"
    assert found.tests["seen"].zones == ["Cfa", "Cfa", "Cfb"] and found.tests["left out"].zones == ["Aw"]
    model, history = recipe.train(found, "MetaSegNet")
    assert len(history) == 1  # three images are left, of two a step
    matrices = {name: recipe.matrix(found, model, "MetaSegNet", name) for name in found.tests}
    assert matrices["seen"].sum() == sum((found.tests["seen"].data[i][1] < 8).sum() for i in range(3))
    recipe.record(tmp_path / "results.csv", p, found, matrices)
    rows = recipe.measured(tmp_path / "results.csv")
    assert list(rows.test) == ["seen", "left out"] and set(rows.held_out) == {"Aw"} and "IoU tree" in rows
    assert rows.mIoU[0] == pytest.approx(metrics.scores(matrices["seen"]).miou)
    assert set(rows.epoch) == {"last"} and set(rows.padding) == {"ignored"}
    recipe.record(tmp_path / "results.csv", p, found, matrices)
    assert len(recipe.measured(tmp_path / "results.csv")) == 2  # replaced, not doubled
    refuses((lambda: recipe.setting(given(data_root=str(tmp_path), held_out="ET"), tmp_path), r"held_out.*Cfa"))


def test_openearthmap_tested_on_loveda(quick, tmp_path, monkeypatch):
    earth(tmp_path)
    loveda(tmp_path, monkeypatch)
    p = given(data_root=str(tmp_path), test_on=LOVEDA, method="zone names")
    found = recipe.setting(p, tmp_path)
    model, _ = recipe.train(found, "zone names")
    assert list(found.tests) == ["LoveDA"] and model.ignore == 8
    part_ = found.tests["LoveDA"]
    assert part_.classes[4:6] == ["barren", "forest"] and part_.into.tolist() == [4, 0, 0, 2, 5, 3, 6, 1]
    counts = recipe.matrix(found, model, "zone names", "LoveDA")
    assert counts.shape == (7, 7) and counts.sum() == sum((part_.data[i][1] < 7).sum() for i in range(2))


def test_potsdam(quick, tmp_path, monkeypatch):
    potsdam(tmp_path, side=40)
    monkeypatch.setattr(landcover, "TILE", 40)
    p = given(data_root=str(tmp_path), dataset=POTSDAM, method="unimodal")
    found = recipe.setting(p, tmp_path)
    model, history = recipe.train(found, "unimodal")
    assert len(history) == 23 * 3 // 2 and found.tests["test"].left_out == (5,)  # three copies of each tile but 7_10
    counts = recipe.matrix(found, model, "unimodal", "test")
    recipe.record(tmp_path / "results.csv", p, found, {"test": counts})
    tables = recipe.tables(recipe.measured(tmp_path / "results.csv"))
    anchors, ours = tables.values()
    twin = anchors[(anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")].iloc[0]
    assert twin.mIoU == 87.5 and twin["mIoU here"] == pytest.approx(ours.mIoU[0])
    assert anchors["mIoU here"].notna().sum() == 1 and list(anchors["augmentation here"]).count("none") == 1
    # the share of right pixels among all that have a class, counted image by image; clutter's are among them
    right = total = 0
    with torch.no_grad():
        for image, label in (found.tests["test"].data[i] for i in range(len(found.tests["test"].data))):
            right += int((model(image[None])[0].argmax(0) == label).sum())
            total += int((label < 6).sum())
    assert twin["OA here"] == pytest.approx(100 * right / total)
    # with augmentation, and another seed without: what stands next to the author's is of one kind
    perfect = counts.diag().diag()
    assert recipe.claim_cells(recipe.measured(tmp_path / "results.csv"))["unimodal", "Potsdam mIoU"] < 50
    for changes, found_ in (({"augmentation": "d4"}, perfect), ({"seed": 1}, counts)):
        other = SimpleNamespace(**vars(p) | changes)
        recipe.record(tmp_path / "results.csv", other, found, {"test": found_})
    anchors, _ = recipe.tables(recipe.measured(tmp_path / "results.csv")).values()
    twin = anchors[(anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")].iloc[0]
    assert twin["OA here"] == 100 and twin["augmentation here"] == "d4" and twin["epoch here"] == "last"
    # the author's epoch and padding come before any augmentation
    recipe.record(tmp_path / "results.csv", SimpleNamespace(**vars(p) | {"select": "best"}), found, {"test": counts})
    recipe.record(
        tmp_path / "results.csv",
        SimpleNamespace(**vars(p) | {"select": "best", "padding": "impervious"}),
        found,
        {"test": perfect},
    )
    anchors, _ = recipe.tables(recipe.measured(tmp_path / "results.csv")).values()
    twin = anchors[(anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")].iloc[0]
    assert (twin["OA here"], twin["epoch here"], twin["padding here"]) == (100, "best", "impervious")


def test_the_claim_of_the_twin_is_judged_by_its_rows(tmp_path):
    p, path = given(dataset=POTSDAM, method="unimodal"), tmp_path / "measured.csv"
    assert recipe.claim_cells(recipe.measured(path)) == {}
    test = recipe.Test(part(), ["Cfb"] * 4, list(landcover.CLASSES[POTSDAM]), landcover.LEFT_OUT[POTSDAM])
    for errors, expected in ((0, "holds"), (40, "fails")):
        counts = (100 - errors) * torch.eye(6, dtype=torch.int64) + errors * torch.eye(6, dtype=torch.int64).roll(1, 0)
        rows = recipe.measured(path, recipe.row(p, "test", test, counts))
        run = report.start("metasegnet", out=str(tmp_path))
        run.claims_from_measured(recipe.claim_cells(rows))
        status = {claim["id"]: claim["status"] for claim in run.ledger()}
        assert status["full-twin"] == expected and status["full-potsdam"] == "not run"
    # rows of older code
    old = rows.drop(columns=["epoch", "padding"])
    old.to_csv(tmp_path / "old.csv", index=False)
    assert recipe.claim_cells(recipe.measured(tmp_path / "old.csv")) == recipe.claim_cells(rows)
    # a network with texts is not the twin
    rows = recipe.measured(tmp_path / "other.csv", recipe.row(given(dataset=POTSDAM), "test", test, counts))
    assert recipe.claim_cells(rows) == {}


def test_the_best_epoch_is_that_of_the_validation_where_the_recipe_says_so(quick, tmp_path, monkeypatch):
    loveda(tmp_path, monkeypatch)
    plain, weights, marks = recipe.recipe, [], iter([0.2, 0.5, 0.5, 0.1])
    monkeypatch.setattr(recipe, "recipe", lambda dataset: recipe.Recipe(**vars(plain(dataset)) | {"epochs": 4}))

    def marked(model, **_):
        weights.append(trained_state(model))
        return next(marks)

    monkeypatch.setattr(recipe, "validated", marked)
    for select, kept, suffix in (("recipe", 1, ""), ("last", -1, "last epoch, ")):
        p = given(data_root=str(tmp_path), dataset=LOVEDA, method="unimodal", select=select)
        model, _ = recipe.train(recipe.setting(p, tmp_path / select), "unimodal")
        saved = read_state(tmp_path / select / "trained" / f"unimodal, landcover-loveda, {suffix}seed 0.safetensors")
        state = trained_state(model)
        assert all(torch.equal(t, state[name]) for name, t in saved.items()) and len(weights) == 4
        assert all(torch.equal(t, state[name]) for name, t in weights[1].items()) == (kept == 1)


def test_scores_by_which_the_best_epoch_is_chosen(monkeypatch):
    counts = torch.tensor([[5, 1, 0], [2, 3, 0], [0, 0, 0]])
    counts[0, 2] = 1
    monkeypatch.setattr(recipe, "confusion", lambda *_, **__: counts)
    test = recipe.Test(part(), [], ["a", "b", "c"], left_out=(1,))
    found = recipe.scores(test, counts)
    assert recipe.validated(None, test, None, given(dataset=LOVEDA)) == pytest.approx(found.miou)
    assert recipe.validated(None, test, None, given(dataset=POTSDAM)) == pytest.approx(found.mf1)
    assert found.mf1 == pytest.approx(float(found.f1[0])) and found.miou == pytest.approx(
        float(found.iou[[0, 2]].mean())
    )


def test_a_checkpoint_of_lightning_is_tested(small, tmp_path):
    theirs = MetaSegNet.build(3, size="pocket")
    state = {f"net.{name}": t for name, t in theirs.to_official().items()}
    state["net.backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {}}, tmp_path / "v1.ckpt")
    options = SIZES["pocket"]["model"]
    loaded = MetaSegNet.from_official(read_state(tmp_path / "v1.ckpt"), encoder=theirs.encoder, **options)
    p = given(task="test", method="unimodal", checkpoint=str(tmp_path / "v1.ckpt"))
    for model in (loaded, recipe.build(p, Prompts.read(), 3)):
        found = model.state_dict()
        assert all(torch.equal(t, found[name]) for name, t in theirs.state_dict().items() if "tracked" not in name)


def test_a_killed_training_resumes_to_the_same_bits_wherever_it_is_started_from(quick, tmp_path, monkeypatch):
    """Slow weights and header dropout included; the same data by a relative path is the same training."""
    earth(tmp_path, ("tokyo", "kyoto", "el_rodeo", "paris"))
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))
    plain = recipe.recipe
    monkeypatch.setattr(recipe, "recipe", lambda dataset: recipe.Recipe(**vars(plain(dataset)) | {"epochs": 4}))
    p = given(data_root=str(tmp_path))

    def train(out, **changes):
        return recipe.train(recipe.setting(SimpleNamespace(**vars(p) | changes), tmp_path / out), "MetaSegNet")

    model, _ = assert_goes_on(train, tmp_path, monkeypatch, recipe, "joint_loss", 7)
    (file,) = (tmp_path / "killed" / "trained").iterdir()
    assert file.name == "MetaSegNet, landcover-openearthmap, bert, seed 0.safetensors"
    saved = read_state(file)
    assert all(torch.equal(t, saved[name]) for name, t in trained_state(model).items())
    monkeypatch.chdir(tmp_path.parent)
    train("killed", data_root=tmp_path.name)
    for changes in ({"held_out": "Aw"}, {"seed": 1}, {"text_encoder": "clip"}):
        train("killed", **changes)
    assert len(list((tmp_path / "killed" / "checkpoints").glob("*.pt"))) == 4
    assert len(list((tmp_path / "killed" / "trained").iterdir())) == 4, "none replaces another's weights"


def test_ones_own_folder_is_trained_kept_and_mapped(quick, tmp_path, capsys):
    for i in range(4):
        written(tmp_path / "images" / f"{i}.tif", noise(64, 80, i))
        ids = np.random.default_rng(i).integers(0, 2, (1, 64, 80), dtype=np.uint8)
        written(tmp_path / "labels" / f"{i}.tif", ids)
    (tmp_path / "classes.txt").write_text("field 10 200 30\nwood\n")
    (tmp_path / "places.csv").write_text('image,text\n2,"red earth"\n')
    p = given(data_root=str(tmp_path), dataset="folder", seed=4)
    found = recipe.setting(p, tmp_path)
    assert found.tests["test"].classes == ["field", "wood"]
    assert found.texts("MetaSegNet", ["Cfb"], "", ["red earth"]) == ["red earth"]
    _, history = recipe.train(found, "MetaSegNet")
    assert len(history) == 2
    (weights,) = (tmp_path / "trained").iterdir()
    for stored in (1, 2):  # other labels are another training
        model, _ = recipe.train(found, "MetaSegNet")
        assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == stored
        (tmp_path / "labels" / "0.tif").write_bytes((tmp_path / "labels" / "1.tif").read_bytes())
    p = given(data_root=str(tmp_path), dataset="folder", task="predict", checkpoint=str(weights))
    found = recipe.setting(p, tmp_path)
    again, history = recipe.train(found, "MetaSegNet")
    assert history == []
    data = landcover.own(tmp_path, landcover.read_classes(tmp_path))
    texts = found.texts("MetaSegNet", data.zones(), "", data.texts())
    assert texts[2] == "red earth" and texts[0] == Prompts.read().text("Cfb")
    files = recipe.predict(again, data, texts, tmp_path / "maps", tile=32, overlap=8)
    with rasterio.open(files[2]) as made, rasterio.open(tmp_path / "images" / "2.tif") as source:
        assert (made.transform, made.crs) == (source.transform, source.crs)
        assert made.colormap(1)[0][:3] == (10, 200, 30)
    image = geotiff.pixels(noise(64, 80, 2))
    whole = recipe.bands(lambda x: model(x, ["red earth"]), image, tile=32, overlap=8, batch=1)
    wanted = torch.cat([band.logits for band in whole], 1).argmax(0)
    with geotiff.Raster(files[2]) as made:
        assert np.array_equal(made.raw((1,))[0], wanted.numpy())
    capsys.readouterr()
    words = ["landcover", str(tmp_path), "--checkpoint", str(weights), "--tile", "32"]
    assert cli.main([*words, "--overlap", "8", "--accelerator", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "2.tif  (Cfb)" in printed and len(printed.splitlines()) == 4
    with geotiff.Raster(tmp_path / "maps" / "2.tif") as made:
        assert np.array_equal(made.raw((1,))[0], wanted.numpy())
    assert cli.main([*words, "--overlap", "40"]) == 2 and "overlap" in capsys.readouterr().err
    with pytest.raises(BadParameter, match="windows"):
        recipe.predict(model, landcover.own(tmp_path, ["a", "b"], size=32), None, tmp_path / "maps")
    before = {path: path.read_bytes() for kind in ("images", "labels") for path in (tmp_path / kind).iterdir()}
    for kind in ("images", "labels"):  # a map never replaces them
        assert cli.main([*words, "--overlap", "8", "--out", str(tmp_path / kind)]) == 2
        assert "overwrite" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_cannot_be_run_is_said(tmp_path):
    def setting(**changes):
        return lambda: recipe.setting(given(**changes), tmp_path)

    refuses(
        (setting(test_on=POTSDAM), "test_on"),
        (setting(tile=256, overlap=256), "overlap"),
        (setting(dataset=POTSDAM, held_out="Cfb"), "held_out"),
        (setting(task="test"), "checkpoint"),
        (setting(test_on=LOVEDA, select="best"), "select"),
        (setting(padding="impervious"), "padding"),
        (setting(checkpoint="net.safetensors"), "checkpoint"),
    )
    refuses((setting(data_root=str(tmp_path)), "OpenEarthMap"), error=MissingData)
    refuses((setting(data_root=str(tmp_path), dataset="folder"), r"classes\.txt"), error=CorruptFile)


def test_results_of_several_runs_gather(tmp_path):
    test = recipe.Test(part(), ["Cfa"] * 4, list(landcover.CLASSES[OEM]))
    for changes in (
        {"method": "unimodal"},
        {},
        {"seed": 1},
        {"seed": 1},
        {"text_encoder": "clip"},
        {"prompts": "mine.yaml"},
        {"method": "unimodal", "text_encoder": "clip"},
    ):
        row = recipe.row(given(**changes), "test", test, torch.eye(8, dtype=torch.int64))
        rows = recipe.measured(tmp_path / "results.csv", row)
    assert len(rows) == 5 and set(rows.prompt) == {"none", "full"} and (rows.mIoU == 100).all()
    assert list(rows[rows.method == "unimodal"].text_encoder) == ["none"] and set(recipe.KEYS) <= set(rows.columns)
