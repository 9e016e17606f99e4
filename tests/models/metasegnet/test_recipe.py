"""MetaSegNet's recipe on small networks: training, texts, weights, held-out zones, other sets, maps, results."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertModel, BertTokenizer

from companion import cli
from companion.data import landcover
from companion.data.landcover import LOVEDA, POTSDAM
from companion.data.rasters import pixels
from companion.errors import BadCheckpoint, MissingWeights
from companion.evaluation.metrics import landcover as metrics
from companion.models.metasegnet import Prompts, recipe, segment
from companion.models.metasegnet.model import SIZES, MetaSegNet, swin
from companion.models.metasegnet.prompts import Prompted, text_encoder
from companion.models.metasegnet.text import Words
from companion.training import checkpoints, hardware
from companion.training.checkpoints import trained_state
from companion.training.hardware import CPU
from companion.training.recipe import run as train
from tests.conftest import parameters
from tests.data.test_landcover import earth, loveda
from tests.data.test_rasters import noise, written
from tests.models.common import refuses
from tests.papers.common import shrink

PROMPTS = Prompts.read()


def given(**changes) -> SimpleNamespace:
    return parameters("metasegnet", **{"profile": "paper", "accelerator": "cpu", "data_root": "nowhere"} | changes)


@pytest.fixture
def small(monkeypatch):
    """A small Swin and decoder instead of the full-size ones, and a small text encoder instead of BERT."""
    shrink("metasegnet", monkeypatch)


@pytest.fixture
def quick(small, monkeypatch):
    """One epoch, small crops."""
    change(monkeypatch, epochs=1, batch=2, crop=32)


def test_training_without_xbd(tmp_path):
    earth(tmp_path, ("tokyo", landcover.XBD[0]))
    for without, regions in ((False, {"tokyo", landcover.XBD[0]}), (True, {"tokyo"})):
        p = given(dataset=landcover.OEM, data_root=str(tmp_path), without_xbd=without)
        assert {picture.region for picture in recipe.train_data(p).pictures} == regions


def change(monkeypatch, **settings):
    """Other published settings, of every data set."""
    plain = recipe.published
    monkeypatch.setattr(recipe, "published", lambda dataset: replace(plain(dataset), **settings))


def network(p, classes=3):
    files = {"data_root": p.data_root, "weights": p.weights, "checkpoint": p.checkpoint}
    return recipe.network(p.method, PROMPTS, classes, **files, seed=p.seed, random=p.dry_run)


def part(count: int = 4, classes: int = 3, side: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes + 1, (count, side, side), generator=generator)
    return TensorDataset(torch.randn(count, 3, side, side, generator=generator), labels)


def same(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if not n.endswith("tracked"))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_of_each_method():
    text, name = PROMPTS.text("Cfa"), PROMPTS.text("Cfa", "name")
    for method, zones, options, expected in (
        ("unimodal", ["Cfa", None], {}, None),
        ("MetaSegNet", ["Cfa", None], {"own": [None, "mine"]}, [text, "mine"]),
        ("MetaSegNet", ["Cfa", None], {"own": ["mine"] * 2, "kind": "constant"}, [PROMPTS.constant] * 2),
        ("constant text", ["Cfa", None], {}, [PROMPTS.constant] * 2),
        ("zone names", ["Cfa", None], {"own": ["mine"] * 2}, [name, PROMPTS.unknown]),
        ("one-hot zone", ["Cfa", None], {}, ["Cfa", "unknown"]),
        ("MetaSegNet", ["Cfa", "Aw"], {"kind": "wrong", "own": ["mine"] * 2}, [PROMPTS.text("Aw"), text]),
        ("one-hot zone", ["Cfa", "Aw"], {"kind": "wrong"}, ["Aw", "Cfa"]),
    ):
        assert PROMPTS.of_method(method, zones, **options) == expected, (method, options)


def test_texts_of_a_file_replace_the_included_ones(tmp_path):
    words = {"constant": "land", "unknown": "somewhere", "zones": {"Cfa": {"name": "warm", "text": "rice fields"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(words))
    p = given(dataset=POTSDAM, prompts=str(tmp_path / "mine.yaml"))
    part = SimpleNamespace(zones=["Cfa", None], texts=None)
    mine = Prompts.read(p.prompts)
    assert recipe.texts_of(p, part) == [mine.text("Cfa"), "somewhere"] != recipe.texts_of(given(), part)
    assert "mine" in recipe._name(p) and "mine" not in recipe._name(given(dataset=POTSDAM))


def test_a_share_of_the_full_texts_loses_its_header():
    texts = PROMPTS.of_method("MetaSegNet", ["Cfa", "Cfb", "Cfa", None])
    encoder = Words.of(texts, length=64)
    never, always, half = (Prompted(part(4), encoder, texts, share) for share in (0.0, 1.0, recipe.DROPPED))
    kept, hidden = never[0][2], always[0][2]
    assert [torch.equal(never[i][2], encoder.ids(texts)[i]) for i in range(4)] == [True] * 4
    assert (kept != hidden).sum() == 3, "code and two words of the name"
    drawn = [torch.equal(half[0][2], hidden) for _ in range(200)]
    assert recipe.DROPPED == 0.5 and 60 < sum(drawn) < 140


# --- weights ----------------------------------------------------------------------------------------------------------


def test_text_encoders_and_berts_folder(tmp_path):
    encoder = text_encoder("one-hot zone", PROMPTS)
    rows = encoder.ids(PROMPTS.of_method("one-hot zone", [*PROMPTS.zones, None]))
    assert rows.shape == (len(PROMPTS.zones) + 1, 1) and len(rows.unique()) == len(rows)
    folder, bert = tmp_path / "weights" / "bert-base-uncased", ("MetaSegNet", PROMPTS, tmp_path)
    refuses((lambda: text_encoder(*bert), str(folder)), error=MissingWeights)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    theirs = BertModel(BertConfig(**sizes, vocab_size=8))
    theirs.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "climate", "zone", "cfa"]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    encoder = text_encoder(*bert)
    assert torch.equal(encoder.model.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight)
    hidden = Prompted(part(1), encoder, ["climate zone cfa."], 1.0)[0][2]
    assert hidden[:5].tolist() == [2, 5, 6, 1, 1], "the zone is BERT's unknown word, as is the point here"


def test_the_authors_swin_and_timms_are_loaded(small, tmp_path, monkeypatch):
    torch.manual_seed(3)
    theirs = MetaSegNet.build(3, size="pocket")
    state = {n.removeprefix("backbone."): t for n, t in theirs.to_official().items() if n.startswith("backbone.")}
    counters = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(2)}
    torch.save({"state_dict": state | counters}, tmp_path / "stseg.pth")
    p = given(method="unimodal", weights=str(tmp_path / "stseg.pth"))
    found = network(p)
    assert same(theirs.encoder, found.encoder) and same(theirs.norms, found.norms)
    del state["norm1.weight"]
    torch.save(state, tmp_path / "stseg.pth")
    refuses((lambda: network(p), "norm1.weight"), error=BadCheckpoint)
    timms = swin(**SIZES["pocket"]["swin"])
    monkeypatch.setattr(recipe.backbones, "build", lambda name, weights: timms)
    assert same(network(given(method="unimodal")).encoder, timms)


def test_trained_networks_are_loaded_ours_and_lightnings(small, tmp_path):
    model = network(given(seed=9, dry_run=True))
    path = checkpoints.save(tmp_path, "net", trained_state(model))
    p = given(task="test", checkpoint=str(path))
    assert same(model, network(p))
    with pytest.raises(BadCheckpoint):
        network(p, 4)
    refuses((lambda: network(given(checkpoint="nowhere")), "nowhere"), error=MissingWeights)
    theirs = MetaSegNet.build(3, size="pocket")
    state = {f"net.{name}": t for name, t in theirs.to_official().items()}
    state["net.backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {}}, tmp_path / "v1.ckpt")
    found = network(given(task="test", method="unimodal", checkpoint=str(tmp_path / "v1.ckpt")))
    assert same(theirs, found)


# --- real data sets ---------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """A network that returns its images as logits."""

    def forward(self, images, texts=None):
        return images


def test_images_of_several_sizes_are_tested_in_batches_by_the_workers_of_the_hardware(monkeypatch):
    torch.manual_seed(0)
    data = [(torch.randn(3, n, 64), torch.randint(3, (n, 64))) for n in (64, 32, 64, 64, 32)]
    expected = sum(metrics.confusion(labels, image.argmax(0), 3) for image, labels in data)
    asked, loader = [], hardware.DataLoader
    monkeypatch.setattr(hardware, "DataLoader", lambda *a, **o: asked.append(o["num_workers"]) or loader(*a, **o))
    for workers in (0, 1):
        recipe.confusion(Echo(), recipe.Part(data, [], [*"abc"]), None, hardware=replace(CPU, workers=workers))
    assert asked == [0, 1]
    for batch in (1, 2, 5):
        monkeypatch.setattr(recipe, "TEST_BATCH", batch)
        assert torch.equal(recipe.confusion(Echo(), recipe.Part(data, [], [*"abc"]), None), expected)


def test_openearthmap_with_a_zone_left_out(quick, tmp_path):
    earth(tmp_path, ("tokyo", "kyoto", "el_rodeo", "paris"))
    p, out = given(data_root=str(tmp_path), held_out="Aw", augmentation="lr"), tmp_path / "out"
    _, _, tests = recipe.setting(p)
    assert [test.zones for test in tests.values()] == [["Cfa", "Cfa", "Cfb"], ["Aw"]]
    assert recipe.run(p, out).scores.steps.tolist() == [1, 1]  # three images are left, of two a step
    (file,) = (out / "trained").iterdir()
    assert file.name == "MetaSegNet, landcover-openearthmap, without Aw, seed 0.safetensors"
    rows = recipe.RESULTS.measured(out / "measured.csv")
    network, seen = recipe.network("MetaSegNet", PROMPTS, 8, checkpoint=str(file)), tests["seen"]
    matrix = recipe.confusion(network, seen, recipe.texts_of(p, seen), "lr", CPU)
    assert matrix.sum() == sum((seen.data[i][1] < 8).sum() for i in range(3))
    assert rows.mIoU[0] == pytest.approx(metrics.scores(matrix, undefined=True).miou, nan_ok=True)
    refuses((lambda: recipe.setting(given(data_root=str(tmp_path), held_out="ET")), "Cfa"))


def test_views_are_those_of_the_readme_unless_they_are_asked_for():
    asked = ({"dataset": POTSDAM}, {"dataset": LOVEDA}, {"test_on": LOVEDA}, {}, {"augmentation": "d4"})
    assert [recipe.views(given(**one)) for one in asked] == ["lr", "d4 loveda", "d4 loveda", "none", "d4"]


def test_openearthmap_tested_on_loveda(quick, tmp_path, monkeypatch):
    earth(tmp_path)
    loveda(tmp_path, monkeypatch)
    p = given(data_root=str(tmp_path), test_on=LOVEDA, method="zone names")
    _, training, tests = recipe.setting(p)
    (test,) = tests.values()
    assert test.classes[4:6] == ["barren", "forest"] and test.into.tolist() == [4, 0, 0, 2, 5, 3, 6, 1]
    counts = recipe.confusion(training.build(), test, recipe.texts_of(p, test), hardware=CPU)
    assert counts.shape == (7, 7) and counts.sum() == sum((test.data[i][1] < 7).sum() for i in range(2))


def test_ones_own_folder_is_trained_and_mapped_and_its_files_are_never_overwritten(quick, tmp_path, capsys):
    for i in range(4):
        written(tmp_path / "images" / f"{i}.tif", noise(64, 80, i))
        ids = np.random.default_rng(i).integers(0, 2, (1, 64, 80), dtype=np.uint8)
        written(tmp_path / "labels" / f"{i}.tif", ids)
    (tmp_path / "classes.txt").write_text("field 10 200 30\nwood\n")
    (tmp_path / "places.csv").write_text('image,text\n2,"red earth"\n')
    for stored in (1, 2):  # other labels are another training
        model, _ = train(recipe.setting(given(data_root=str(tmp_path), dataset="folder", seed=4))[1], tmp_path)
        assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == stored
        (tmp_path / "labels" / "0.tif").write_bytes((tmp_path / "labels" / "1.tif").read_bytes())
    (weights,) = (tmp_path / "trained").iterdir()
    wanted = segment(lambda x: model(x, ["red earth"]), pixels(noise(64, 80, 2)), tile=32, overlap=8, batch=1)
    words = ["landcover", str(tmp_path), "--checkpoint", str(weights), "--tile", "32", "--overlap", "8"]
    capsys.readouterr()
    assert cli.main([*words, "--accelerator", "cpu"]) == 0 and "2.tif  (Cfb)" in capsys.readouterr().out
    with rasterio.open(tmp_path / "maps" / "2.tif") as made, rasterio.open(tmp_path / "images" / "2.tif") as source:
        assert (made.transform, made.crs) == (source.transform, source.crs)
        assert made.colormap(1)[0][:3] == (10, 200, 30) and (made.read(1) == wanted.numpy()).mean() > 0.999
    before = {path: path.read_bytes() for kind in ("images", "labels") for path in (tmp_path / kind).iterdir()}
    for kind in ("images", "labels"):
        assert cli.main([*words, "--out", str(tmp_path / kind)]) == 2 and kind in capsys.readouterr().err
    Image.fromarray(noise(8, 8).transpose(1, 2, 0)).save(tmp_path / "images" / "new.png")
    assert cli.main([*words, "--out", str(tmp_path / "images")]) == 2, "its preview would replace the image"
    assert all(path.read_bytes() == content for path, content in before.items())


def test_settings_that_leak_or_mix_up_data_are_refused():
    def setting(**changes):
        return lambda: recipe.setting(given(**changes))

    refuses(
        (setting(test_on=LOVEDA, select="best"), "best"),
        (setting(test_on=POTSDAM), POTSDAM),
        (setting(padding="impervious"), "impervious"),
        (setting(checkpoint="net.safetensors"), "net.safetensors"),
    )


# --- results ----------------------------------------------------------------------------------------------------------


def test_rows_of_the_settings_closest_to_the_authors_judge_the_claim(tmp_path):
    results, path, twin = (
        recipe.RESULTS,
        tmp_path / "measured.csv",
        {"dataset": POTSDAM, "method": "unimodal", "weights": "stseg_base.pth"},
    )
    test = recipe.Part(part(), ["Cfb"] * 4, list(landcover.CLASSES[POTSDAM]), landcover.LEFT_OUT[POTSDAM])
    eye, accuracies = torch.eye(6, dtype=torch.int64), []
    for percent, changes in (
        (99, {"method": "MetaSegNet"}),  # not the twin
        (98, {"weights": ""}),  # from another file than the author's
        (5, {"augmentation": "none"}),
        (10, {}),
        (20, {"seed": 1}),  # averaged
        (15, {"augmentation": "d4"}),  # more views than the README's example
        (50, {"select": "best", "padding": "impervious"}),  # the author's epoch and padding come before augmentation
    ):
        counts = percent * eye + (100 - percent) * eye.roll(1, 0)
        rows = results.measured(path, recipe.row(given(**twin | changes), "test", test, counts))
        accuracies.append(results.claimed(recipe.closest(rows)).get(("unimodal", "Potsdam OA"), 0))
    assert accuracies == pytest.approx([0, 0, 5, 10, 15, 15, 50])
