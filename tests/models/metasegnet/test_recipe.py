"""MetaSegNet's runs at full size: recipes, texts, zones left out, other sets, maps, results; small networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

from companion import cli, geotiff
from companion.climate import Prompts
from companion.data import landcover
from companion.data.landcover_sets import LOVEDA, OEM, POTSDAM
from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.metrics import landcover as metrics
from companion.evaluation.tables import published_table
from companion.models.metasegnet import recipe as full
from companion.models.metasegnet.model import SIZES, MetaSegNet, swin
from companion.models.metasegnet.text import BertText, ClipText, Words
from companion.toy.ablations import metasegnet as study
from companion.toy.live import metasegnet as runs
from companion.training.fit import fit, trained_state
from tests.data.test_landcover import earth, loveda, potsdam
from tests.test_geotiff import noise, written


def given(**changes) -> SimpleNamespace:
    settings = {"profile": "paper", "accelerator": "cpu", "data_root": "nowhere"}
    return SimpleNamespace(**full.DEFAULTS | settings | changes)


@pytest.fixture
def small(monkeypatch):
    """A small Swin and decoder in the place of the full-size ones, and a small text encoder in BERT's."""
    monkeypatch.setitem(SIZES, "paper", SIZES["pocket"])
    monkeypatch.setattr(full, "WORKERS", 0)
    monkeypatch.setattr(full.backbones, "build", lambda name, weights: swin(**SIZES["pocket"]["swin"]))
    plain = full.text_encoder

    def words(p, prompts):
        found = plain(SimpleNamespace(**(vars(p) | {"dry_run": True})), prompts) if p.method == "one-hot zone" else None
        return found or (Words.of(prompts.texts(list(prompts.zones)), length=64) if full.LEVELS[p.method] else None)

    monkeypatch.setattr(full, "text_encoder", words)


def part(count: int = 4, classes: int = 3, side: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes + 1, (count, side, side), generator=generator)
    return TensorDataset(torch.randn(count, 3, side, side, generator=generator), labels)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_recipes_are_the_authors():
    potsdam_, love = full.recipe(POTSDAM), full.recipe(LOVEDA)
    assert (potsdam_.epochs, potsdam_.batch, potsdam_.crop, potsdam_.copies, potsdam_.restart) == (45, 4, 768, 3, 15)
    assert (love.epochs, love.batch, love.crop, love.weight_decay, love.brightness) == (30, 8, 512, 0.01, 0.25)
    assert full.recipe("folder") == full.recipe(OEM) and full.recipe(OEM).crop == 512


@pytest.mark.parametrize("dataset", [POTSDAM, LOVEDA])
def test_rates_are_those_of_torchs_schedulers(dataset):
    r = full.recipe(dataset)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], r.lr)
    schedulers = torch.optim.lr_scheduler
    if r.restart:
        schedule = schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=r.restart, T_mult=2)
    else:
        schedule = schedulers.CosineAnnealingLR(optimizer, T_max=r.epochs, eta_min=r.floor)
    wanted = []
    for _ in range(r.epochs):
        wanted += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(full.learning_rates(r, r.lr, 3), wanted, rtol=1e-6, atol=1e-12)


def test_training_is_lookahead_with_two_rates_and_no_decay_of_biases(small, monkeypatch):
    """The same steps by hand: AdamW in Lookahead, the encoder at a tenth, biases without decay."""
    monkeypatch.setattr(full, "recipe", lambda dataset: full.Recipe(3, 2, 1e-2, 1e-3, 0.1, 0, 0, 32, 1, 0, 0, 0, 0))
    data, p = part(4), given(method="unimodal")
    torch.manual_seed(0)
    model = MetaSegNet.build(3, size="pocket")
    start = {n: t.clone() for n, t in model.state_dict().items()}
    history = full.learn(p, data, model)
    assert len(history) == 6 and not model.training

    twin = MetaSegNet.build(3, size="pocket")
    twin.load_state_dict(start)
    kept: dict[str, torch.Tensor] = {}

    def slow_and_fast(optimizer, *_):
        step = slow_and_fast.steps = getattr(slow_and_fast, "steps", 0) + 1
        with torch.no_grad():
            for name, t in twin.named_parameters():
                if step == 1:
                    kept[name] = t.clone()
                elif (step - 1) % 5 == 0:
                    kept[name] += 0.5 * (t - kept[name])
                    t.copy_(kept[name])

    def hook(optimizer, *_):
        if not getattr(hook, "done", False):
            hook.done = True
            optimizer.register_step_post_hook(slow_and_fast)
            named = {id(t): n for n, t in twin.named_parameters()}
            for group in optimizer.param_groups:
                names = [named[id(t)] for t in group["params"]]
                assert len({n.endswith("bias") for n in names}) == 1
                group["weight_decay"] = 0.0 if names[0].endswith("bias") else 0.1

    r = full.recipe("")
    parts = full.sides(twin, r, 2, 3)
    assert {name: len(rates) for name, (_, rates) in parts.items()} == dict.fromkeys(
        ("encoder", "encoder biases", "rest", "rest biases"), 6
    )
    assert parts["encoder"][1][0] == 1e-3 and parts["rest biases"][1][0] == 1e-2
    handle = register_optimizer_step_pre_hook(hook)
    try:
        fit(
            twin,
            lambda m, items: m.loss(items[0], None, items[1]),
            data,
            epochs=3,
            batch=2,
            sides=parts,
            decay="all",
            weight_decay=0.1,
            accelerator="cpu",
            seed=0,
        )
    finally:
        handle.remove()
    for name, t in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], t, msg=name)


def test_a_killed_training_goes_on_to_the_same_bits(small, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "recipe", lambda dataset: full.Recipe(4, 2, 1e-2, 1e-3, 0.1, 0, 0, 32, 1, 0, 0, 0, 0))
    p, prompts, states = given(), Prompts.read(), []
    texts = full.texts(prompts, "MetaSegNet", ["Cfa", "Aw"] * 2)

    def model_and_data():
        model = full.build(given(dry_run=True), prompts, 3)
        return model, full.Prompted(part(4), model.text, texts, 0.5)

    for stop in (None, 7):
        model, data = model_and_data()
        options = {"checkpoint": tmp_path / f"{stop}.pt", "checkpoint_every": 6}
        if stop:

            class Killed(Exception):
                pass

            loss, steps = full.joint_loss, []

            def killed(*args, loss=loss, steps=steps, stop=stop, end=Killed):
                steps.append(1)
                if len(steps) > stop:
                    raise end
                return loss(*args)

            with monkeypatch.context() as patch:
                patch.setattr(full, "joint_loss", killed)
                with pytest.raises(Killed):
                    full.learn(p, data, model, **options)
            model, data = model_and_data()
        full.learn(p, data, model, resume=bool(stop), **options)
        states.append(trained_state(model))
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_of_each_method():
    prompts, zones = Prompts.read(), ["Cfa", None]
    assert full.texts(prompts, "unimodal", zones) is None
    assert full.texts(prompts, "unimodal", zones, "wrong") is None
    assert full.texts(prompts, "MetaSegNet", zones) == [prompts.text("Cfa"), prompts.unknown]
    assert full.texts(prompts, "MetaSegNet", zones, own=[None, "my own"]) == [prompts.text("Cfa"), "my own"]
    assert full.texts(prompts, "MetaSegNet", zones, "constant", own=["mine", "mine"]) == [prompts.constant] * 2
    assert full.texts(prompts, "constant text", zones) == [prompts.constant] * 2
    assert full.texts(prompts, "zone names", zones)[0] == prompts.text("Cfa", "name")
    assert full.texts(prompts, "one-hot zone", zones) == ["Cfa", "unknown"]
    assert full.texts(prompts, "MetaSegNet", ["Cfa", "Aw"], "wrong") == [prompts.text("Aw"), prompts.text("Cfa")]
    assert full.texts(prompts, "one-hot zone", ["Cfa", "Aw"], "wrong") == ["Aw", "Cfa"]
    one = full.texts(prompts, "zone names", ["Cfa", "Cfa", None], "wrong", own=["mine"] * 3)
    assert one[0] == one[1] != prompts.text("Cfa", "name") and one[2] == prompts.unknown
    assert sorted(full.texts(prompts, "one-hot zone", ["Cfa", "Aw"], "shuffled")) == ["Aw", "Cfa"]


def test_half_of_the_full_texts_lose_their_header():
    prompts = Prompts.read()
    texts = full.texts(prompts, "MetaSegNet", ["Cfa", "Cfb", "Cfa", None])
    encoder = Words.of(texts, length=64)
    data = full.Prompted(part(4), encoder, texts, 0.5)
    torch.manual_seed(0)
    drawn = torch.stack([data[0][2] for _ in range(200)])
    hidden = (drawn != encoder.ids(texts[:1])).any(1)
    assert 70 < hidden.sum() < 130 and len(drawn.unique(dim=0)) == 2
    never = full.Prompted(part(4), encoder, texts)
    assert all(torch.equal(never[i][2], encoder.ids(texts)[i]) for i in range(4))
    with pytest.raises(BadParameter, match="texts"):
        full.Prompted(part(4), encoder, texts[:3])


def test_text_encoders():
    prompts = Prompts.read()
    one_hot = full.text_encoder(given(method="one-hot zone"), prompts)
    rows = one_hot.ids(full.texts(prompts, "one-hot zone", [*prompts.zones, None]))
    assert rows.shape == (len(prompts.zones) + 1, 1) and len(rows.unique()) == len(prompts.zones) + 1
    assert full.text_encoder(given(method="unimodal"), prompts) is None
    with pytest.raises(MissingWeights, match="bert-base-uncased"):
        full.text_encoder(given(), prompts)


def test_berts_folder(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder, prompts = tmp_path / "weights" / "bert-base-uncased", Prompts.read()
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(**shape, vocab_size=40))
    bert.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "climate", "zone", "roofs", "."]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    encoder = full.text_encoder(given(data_root=str(tmp_path)), prompts)
    assert isinstance(encoder, BertText) and encoder.width == 24 and encoder.frozen
    assert torch.equal(encoder.model.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    hidden = full.Prompted(part(1), encoder, full.texts(prompts, "MetaSegNet", ["Cfa"]), 1.0)[0][2]
    assert encoder.tokenizer.convert_ids_to_tokens(hidden[:5].tolist())[1:4] == ["climate", "zone", "[UNK]"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptFile, match="bert-base-uncased"):
        full.text_encoder(given(data_root=str(tmp_path)), prompts)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_authors_swin_and_timms(small, tmp_path, monkeypatch):
    torch.manual_seed(3)
    theirs = MetaSegNet.build(3, size="pocket")
    state = {n.removeprefix("backbone."): t for n, t in theirs.to_official().items() if n.startswith("backbone.")}
    torch.save(
        {"state_dict": state | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(2)}},
        tmp_path / "stseg.pth",
    )
    found = full.build(given(method="unimodal", weights=str(tmp_path / "stseg.pth")), Prompts.read(), 3)
    for name, t in theirs.state_dict().items():
        if name.startswith(("encoder.", "norms.")):
            assert torch.equal(found.state_dict()[name], t), name
    del state["norm1.weight"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(BadCheckpoint, match=r"norm1\.weight"):
        full.build(given(method="unimodal", weights=str(tmp_path / "bad.pth")), Prompts.read(), 3)
    torch.manual_seed(5)
    timms = swin(**SIZES["pocket"]["swin"])
    monkeypatch.setattr(full.backbones, "build", lambda name, weights: timms)
    found = full.build(given(method="unimodal"), Prompts.read(), 3)
    assert torch.equal(found.encoder.patch_embed.proj.weight, timms.patch_embed.proj.weight)


def test_a_trained_network_is_kept_and_loaded(small, tmp_path):
    prompts, p = Prompts.read(), given(task="test", checkpoint=str(tmp_path / "net.safetensors"))
    with pytest.raises(MissingWeights, match="never released"):
        full.build(p, prompts, 3)
    torch.manual_seed(9)
    model = full.build(given(seed=9, dry_run=True), prompts, 3)
    full.save(model, p.checkpoint)
    again = full.build(p, prompts, 3)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(BadCheckpoint):
        full.build(p, prompts, 4)
    (tmp_path / "net.safetensors").write_bytes(b"1234")
    with pytest.raises(CorruptFile, match=r"net\.safetensors"):
        full.build(p, prompts, 3)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(full.LEVELS))
def test_dry_runs(small, method, monkeypatch):
    monkeypatch.setattr(full, "DRY_SIDE", 64)
    found = runs.setting(given(dry_run=True, method=method), Path("unused"), {})
    model, history = runs.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history) and not model.training
    counts = runs.matrix(found, model, method, "test")
    images, labels, zones = runs.sample(found, "test", [0, 1])
    assert images.shape == (2, 3, 64, 64) and zones == ["Cfa", "Aw"] and counts.sum() == (labels < 8).sum()
    wrong = runs.matrix(found, model, method, "test", "wrong")
    assert (method == "unimodal") <= torch.equal(wrong, counts)


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "encoder"), [(OEM, "bert"), (POTSDAM, "clip")])
def test_dry_runs_at_full_size(dataset, encoder):
    found = runs.setting(given(dry_run=True, dataset=dataset, text_encoder=encoder), Path("unused"), {})
    model, history = runs.train(found, "MetaSegNet")
    assert len(history) == 2 and isinstance(model.text, BertText if encoder == "bert" else ClipText)
    counts = published_table("metasegnet", "counts").set_index("method").total
    if dataset == OEM:
        wanted = int(counts["MetaSegNet (reconstruction), Swin-B, 8 classes"])
        assert sum(t.numel() for t in model.trained().values()) == wanted
    assert runs.matrix(found, model, "MetaSegNet", "test").sum() > 0


@pytest.fixture
def quick(small, monkeypatch):
    """One epoch, small crops."""
    plain = full.recipe

    def recipe(dataset):
        return full.Recipe(**(vars(plain(dataset)) | {"epochs": 1, "batch": 2, "crop": 32}))

    monkeypatch.setattr(full, "recipe", recipe)


def test_openearthmap_with_a_zone_left_out(quick, tmp_path):
    earth(tmp_path, ("tokyo", "kyoto", "el_rodeo", "paris"))
    p = given(data_root=str(tmp_path), held_out="Aw", augmentation="lr")
    found = runs.setting(p, tmp_path, {})
    assert found.title == "landcover/openearthmap, 4 images, zone Aw left out" and found.ignore == 8
    assert found.tests["seen"].zones == ["Cfa", "Cfa", "Cfb"] and found.tests["left out"].zones == ["Aw"]
    model, history = runs.train(found, "MetaSegNet")
    assert len(history) == 1  # three images are left, of two a step
    matrices = {name: runs.matrix(found, model, "MetaSegNet", name) for name in found.tests}
    assert matrices["seen"].sum() == sum((found.tests["seen"].data[i][1] < 8).sum() for i in range(3))
    runs.keep(tmp_path / "results.csv", p, found, matrices)
    rows = full.measured(tmp_path / "results.csv")
    assert list(rows.test) == ["seen", "left out"] and set(rows.held_out) == {"Aw"} and "IoU tree" in rows
    assert rows.mIoU[0] == pytest.approx(metrics.scores(matrices["seen"]).miou)
    runs.keep(tmp_path / "results.csv", p, found, matrices)
    assert len(full.measured(tmp_path / "results.csv")) == 2  # replaced, not doubled
    with pytest.raises(BadParameter, match=r"held_out.*Cfa"):
        runs.setting(given(data_root=str(tmp_path), held_out="ET"), tmp_path, {})


def test_openearthmap_tested_on_loveda(quick, tmp_path, monkeypatch):
    earth(tmp_path)
    loveda(tmp_path, monkeypatch)
    p = given(data_root=str(tmp_path), test_on=LOVEDA, method="zone names")
    found = runs.setting(p, tmp_path, {})
    model, _ = runs.train(found, "zone names")
    assert list(found.tests) == ["LoveDA"] and len(found.classes) == 8
    part_ = found.tests["LoveDA"]
    assert part_.classes[4:6] == ["barren", "forest"] and part_.into.tolist() == [4, 0, 0, 2, 5, 3, 6, 1]
    counts = runs.matrix(found, model, "zone names", "LoveDA")
    assert counts.shape == (7, 7) and counts.sum() == sum((part_.data[i][1] < 7).sum() for i in range(2))


def test_potsdam(quick, tmp_path):
    potsdam(tmp_path, side=40)
    p = given(data_root=str(tmp_path), dataset=POTSDAM, method="unimodal")
    found = runs.setting(p, tmp_path, {})
    found.tests["test"].data.size = 40  # tests would be padded to 1,024
    model, history = runs.train(found, "unimodal")
    assert len(history) == 24 * 3 // 2 and found.left_out == (5,)  # three copies of each tile
    counts = runs.matrix(found, model, "unimodal", "test")
    runs.keep(tmp_path / "results.csv", p, found, {"test": counts})
    tables = runs.tables(tmp_path / "results.csv")
    anchors, ours = tables.values()
    twin = anchors[(anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")].iloc[0]
    assert twin.mIoU == 87.5 and twin["mIoU here"] == pytest.approx(ours.mIoU[0])
    assert anchors["mIoU here"].notna().sum() == 1 and list(anchors["augmentation here"]).count("none") == 1
    assert twin["OA here"] == pytest.approx(metrics.scores(counts, (5,)).oa)
    # with augmentation, and another seed without: what stands beside the author's is of one kind
    perfect = counts.diag().diag()
    for changes, found_ in (({"augmentation": "d4"}, perfect), ({"seed": 1}, counts)):
        other = SimpleNamespace(**vars(p) | changes)
        runs.keep(tmp_path / "results.csv", other, found, {"test": found_})
    anchors, _ = runs.tables(tmp_path / "results.csv").values()
    twin = anchors[(anchors.method == "FT-UNetFormer") & (anchors["set"] == "Potsdam")].iloc[0]
    assert twin["OA here"] == 100 and twin["augmentation here"] == "d4"


def test_a_training_goes_on_after_a_stop(quick, tmp_path, monkeypatch):
    earth(tmp_path, ("tokyo", "kyoto", "el_rodeo", "paris"))
    p, steps, forward = given(data_root=str(tmp_path)), [], MetaSegNet.forward

    def stopped(*args):
        steps.append(0)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(MetaSegNet, "forward", stopped)
    weights = []
    for name, stop in (("whole", 0), ("parts", 2)):
        found = runs.setting(p, tmp_path / name, {})
        steps.clear()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                runs.train(found, "MetaSegNet", checkpoint_every=1)
        model, history = runs.train(found, "MetaSegNet", checkpoint_every=1)
        assert len(history) == 2 and len(steps) == (3 if stop else 2)
        weights.append(trained_state(model))
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    for changes in ({"held_out": "Aw"}, {"seed": 1}, {"text_encoder": "clip"}):
        runs.train(runs.setting(given(**vars(p) | changes), tmp_path / "parts", {}), "MetaSegNet")
    assert len(list((tmp_path / "parts" / "trained").iterdir())) == 4


def test_ones_own_folder_is_trained_kept_and_mapped(quick, tmp_path, capsys):
    for i in range(4):
        written(tmp_path / "images" / f"{i}.tif", noise(64, 80, i))
        ids = np.random.default_rng(i).integers(0, 2, (1, 64, 80), dtype=np.uint8)
        written(tmp_path / "labels" / f"{i}.tif", ids)
    (tmp_path / "classes.txt").write_text("field 10 200 30\nwood\n")
    (tmp_path / "places.csv").write_text('image,text\n2,"red earth"\n')
    p = given(data_root=str(tmp_path), dataset="folder", seed=4)
    found = runs.setting(p, tmp_path, {})
    assert found.classes == ("field", "wood") and found.texts("MetaSegNet", ["Cfb"], "", ["red earth"]) == ["red earth"]
    model, history = runs.train(found, "MetaSegNet")
    assert len(history) == 2
    full.save(model, tmp_path / "net.safetensors")
    p = given(data_root=str(tmp_path), dataset="folder", task="predict", checkpoint=str(tmp_path / "net.safetensors"))
    found = runs.setting(p, tmp_path, {})
    again, history = runs.train(found, "MetaSegNet")
    assert history == []
    data = landcover.own(tmp_path, landcover.read_classes(tmp_path))
    texts = found.texts("MetaSegNet", data.zones(), "", data.texts())
    assert texts[2] == "red earth" and texts[0] == found.prompts.text("Cfb")
    files = full.predict(again, data, texts, tmp_path / "maps", tile=32, overlap=8)
    with rasterio.open(files[2]) as made, rasterio.open(tmp_path / "images" / "2.tif") as source:
        assert (
            made.transform == source.transform and made.crs == source.crs and made.colormap(1)[0][:3] == (10, 200, 30)
        )
    image = geotiff.pixels(noise(64, 80, 2))
    whole = full.bands(lambda x: model(x, ["red earth"]), image, tile=32, overlap=8, batch=1)
    wanted = torch.cat([band.logits for band in whole], 1).argmax(0)
    with geotiff.Raster(files[2]) as made:
        assert np.array_equal(made.raw((1,))[0], wanted.numpy())
    capsys.readouterr()
    words = ["landcover", str(tmp_path), "--checkpoint", str(tmp_path / "net.safetensors"), "--tile", "32"]
    assert cli.main([*words, "--overlap", "8", "--accelerator", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "2.tif  (Cfb)" in said and len(said.splitlines()) == 4
    with geotiff.Raster(tmp_path / "maps" / "2.tif") as made:
        assert np.array_equal(made.raw((1,))[0], wanted.numpy())
    assert cli.main([*words, "--overlap", "40"]) == 2 and "overlap" in capsys.readouterr().err
    with pytest.raises(BadParameter, match="windows"):
        full.predict(model, landcover.own(tmp_path, ["a", "b"], size=32), None, tmp_path / "maps")


def test_what_cannot_be_run_is_said(tmp_path):
    wrong = [
        ({"test_on": POTSDAM}, "test_on"),
        ({"tile": 256, "overlap": 256}, "overlap"),
        ({"dataset": POTSDAM, "held_out": "Cfb"}, "held_out"),
        ({"task": "test"}, "checkpoint"),
        ({"checkpoint": "net.safetensors"}, "checkpoint"),
    ]
    for changes, name in wrong:
        with pytest.raises(BadParameter, match=name):
            runs.setting(given(**changes), tmp_path, {})
    with pytest.raises(MissingData, match="OpenEarthMap"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})
    with pytest.raises(CorruptFile, match=r"classes\.txt"):
        runs.setting(given(data_root=str(tmp_path), dataset="folder"), tmp_path, {})


def test_results_of_several_runs_gather(tmp_path):
    path = tmp_path / "results.csv"
    matrix = torch.eye(8, dtype=torch.int64)
    names = landcover.CLASSES[OEM]
    for method, seed in (("unimodal", 0), ("MetaSegNet", 0), ("MetaSegNet", 1), ("MetaSegNet", 1)):
        part_ = full.Test(part(), ["Cfa"] * 4, list(names))
        full.measured(path, full.row(given(method=method, seed=seed), "test", part_, matrix))
    rows = full.measured(path)
    assert len(rows) == 3 and set(rows.prompt) == {"none", "full"} and (rows.mIoU == 100).all()
    for changes in ({"text_encoder": "clip"}, {"prompts": "mine.yaml"}, {"method": "unimodal", "text_encoder": "clip"}):
        full.measured(path, full.row(given(**changes), "test", part_, matrix))
    rows = full.measured(path)
    assert len(rows) == 5 and list(rows[rows.method == "unimodal"].text_encoder) == ["none"]
    assert isinstance(rows, pd.DataFrame) and set(full.KEYS) <= set(rows.columns)


def test_the_pocket_run_is_the_studys(tmp_path):
    found = runs.setting(SimpleNamespace(profile="pocket", seed=0), tmp_path, {("seen", m): 2e-3 for m in runs.LIVE})
    assert found.methods == runs.LIVE and {zone for zone in found.tests["left out"].zones} == {study.left_out(0)}
    assert study.left_out(0) not in found.tests["seen"].zones and found.texts("unimodal", ["Csa"]) is None
    right, wrong = (found.texts("MetaSegNet", ["Csa"], kind)[0] for kind in ("", "wrong"))
    assert right == found.prompts.text("Csa") != wrong and wrong in study.texts(("Csa",), "wrong", 0)
    model, history = runs.train(found, "MetaSegNet", epochs=2 / 15)
    assert len(history) == 2
    counts = runs.matrix(found, model, "MetaSegNet", "left out")
    part_ = found.tests["left out"].data
    said = study.predict(model, part_.tensors[0], found.texts("MetaSegNet", found.tests["left out"].zones))
    assert torch.equal(counts, metrics.confusion(part_.tensors[1], said, 8))
    images, labels, zones = runs.sample(found, "seen", [0, 5])
    assert images.shape == (2, 3, 64, 64) and labels.shape == (2, 64, 64) and len(zones) == 2
