"""H-ViT's published recipe: samples, folds that vote, stored features, missing files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from torch.utils.data import TensorDataset

from companion import cli
from companion.data import slides as data
from companion.data.pyramids import Slide, write_pyramid
from companion.data.slides import read_features
from companion.errors import BadParameter, MissingData, MissingWeights
from companion.models import hvit
from companion.models.hvit import features, heatmaps, recipe, slides
from companion.models.hvit.encoders import patch_encoder
from companion.models.hvit.model import grids
from companion.models.hvit.official import read_checkpoint
from companion.models.hvit.slides import PANDA, tensor, tile
from companion.toy import encoders
from companion.toy import hvit as synthetic
from companion.toy.encoders import slide_dino
from companion.training.fit import fit
from companion.training.hardware import CPU
from tests.conftest import parameters
from tests.data.conftest import expect
from tests.data.test_slides import panda
from tests.models.common import refuses


def given(**changes) -> SimpleNamespace:
    few = {"profile": "paper", "dry_run": True, "seed": 1, "method": "Local", "region": 1024, "folds": 2}
    plain = {"sampling": "uniform", "patience": 0, "data_root": "nowhere", "accelerator": "cpu"}
    return parameters("hvit", **few | plain | changes)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(recipe, "WORKERS", 0)


def test_a_dry_run_without_features_embeds_regions_of_a_few_slides(tmp_path, monkeypatch, capsys):
    expect(monkeypatch, "slides/panda", sizes={})
    top = panda(tmp_path, 48)
    data.write_folds("slides/panda", tmp_path, 2, test=0.25)
    tissue = np.full((1024, 1024, 3), (200, 120, 170), np.uint8) // 2 + np.indices((1024, 1024)).sum(0)[..., None] % 90
    drawn = write_pyramid(tmp_path / "drawn.tiff", tissue.astype(np.uint8), 0.5)
    for path in (top / "train_images").iterdir():
        path.unlink()
        path.symlink_to(drawn)
    monkeypatch.setattr(recipe, "PatchEncoder", lambda: hvit.PatchEncoder(dim=384, depth=1))
    monkeypatch.setattr(recipe, "PANDA", replace(PANDA, area=0.1))
    found = recipe.run(given(dataset="slides/panda", data_root=str(tmp_path)), tmp_path / "out")
    assert "random patch level" in capsys.readouterr().out and "2 slides a split" in found.title
    assert len(found.test) == recipe.EMBEDDED and found.test[0][0].shape == (1, 16, 384)


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_sampling_is_what_the_parameter_says(sampling):
    part = TensorDataset(torch.zeros(8, 3, 16, 384), torch.ones(8, 3) > 0, torch.tensor([0] * 7 + [5]))
    shown = recipe.of_fold(given(sampling=sampling), 0, (part, None), 6).data
    torch.manual_seed(0)
    high = sum(int(shown[i % 8][2]) == 5 for i in range(64))
    assert len(shown) == 8 and (high == 8 if sampling == "uniform" else 16 < high < 48)


def test_hipts_region_level_keeps_its_positions(tmp_path):
    """Global reads the file in `weights`; Local starts from random weights unless a file is given."""
    saved, file = hvit.RegionEncoder(16), tmp_path / "weights" / "vit4k_xs_dino.pth"
    file.parent.mkdir()
    torch.save({"teacher": {f"backbone.{n}": t for n, t in saved.state_dict().items()}}, file)
    for method, weights, found in (
        ("Global", "", file),
        ("Local", "", ""),
        ("Global", "random", ""),
        ("Local", "x", "x"),
    ):
        p = given(method=method, weights=weights, data_root=str(tmp_path))
        assert recipe.region_weights(p) == found
    model = recipe.build(given(method="Global", region=2048, data_root=str(tmp_path)))
    assert torch.equal(model.region.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.region.pos_embed, saved.pos_embed)  # resized in the forward pass alone
    assert not any(t.requires_grad for t in model.region.parameters()) and not model.region.training


def test_kappa_is_over_all_grades_also_where_one_is_absent():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 4, 5], 30)
    grades = np.where(rng.random(30) < 0.6, truth, rng.choice([0, 1, 2, 4, 5], 30))
    assert recipe.kappa(*map(torch.from_numpy, (truth, grades))) == 88.77
    assert round(100 * cohen_kappa_score(truth, grades, weights="quadratic"), 2) == 86.97  # as the authors' code


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Features of one to three regions of 4 x 4 patches of 48 slides, in two folds: the parameters."""
    expect(monkeypatch, "slides/panda", sizes={})
    panda(tmp_path, 48)
    data.write_folds("slides/panda", tmp_path, 2, test=0.25)
    store(tmp_path, 16, 384)
    return given(dry_run=False, dataset="slides/panda", data_root=str(tmp_path), epochs=1)


def store(root, *shape: int) -> None:
    """Write features of that shape a region, whose mean follows the grade."""
    (root / "features").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for item in data.load("slides/panda", root):
        regions = int(rng.integers(1, 4))  # ragged
        with h5py.File(root / "features" / f"{item.name}.h5", "w") as file:
            values = 0.1 * rng.normal(size=(regions, *shape)) + item.grade / 3
            file["features"], file["coords"] = values.astype("float32"), np.zeros((regions, 2), "int64")
            file["shares"], file.attrs["settings"] = np.ones(regions), "{}"


def test_folds_are_trained_on_stored_features_and_vote(tmp_path, stored):
    found = recipe.run(stored, tmp_path / "run")
    model, test = found.models[0], found.test
    # a batch is filled up to its own longest slide, not to the fold's
    padded = [model(test[i][0][None], present=test[i][1][None]) for i in range(len(test))]
    truth, outputs = recipe.grades_of(test), recipe.outputs(model, test)
    torch.testing.assert_close(outputs, torch.cat(padded).float())
    each = [hvit.graded(stored.head, recipe.outputs(model, test)) for model in found.models]
    # votes are drawn by the row of the table sorted by name
    vote = recipe.voted(each, [item.name for item in test.items])
    kappas = {"kappa": recipe.kappa(truth, vote), "fold": np.mean([recipe.kappa(truth, one) for one in each])}
    assert torch.equal(found.grades, vote) and found.scores == pytest.approx(kappas)


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_a_batch_has_no_more_padding_than_its_longest_slide_and_trains_as_one_with_more(sampling, tmp_path, stored):
    part = data.Features(data.load("slides/panda", tmp_path), tmp_path / "features")
    part = part.part(sorted(range(48), key=lambda i: int(part[i][1].sum())))
    part.longest = 9  # as beside a slide of nine regions
    drawn, rows = recipe.ClassBalanced(part) if sampling == "weighted" else part, list[tuple[int, ...]]()

    def loss(model, batch):
        features, present, _ = batch
        rows.append((features.shape[1], int(present.sum(1).max())))
        return recipe.batch_loss(stored.head, 6, model, batch)

    def trained():
        options = recipe.fit_options(drawn, epochs=1, batch=4, hardware=CPU)
        model = recipe.build(stored, dropout=0.0)
        return fit(model, loss, drawn, **options), recipe.outputs(model, part, CPU)

    history, outputs = trained()
    assert len({found for found, _ in rows}) > 1 and all(found == longest for found, longest in rows)
    drawn.collate = part.collate = None
    rows.clear()
    again, padded = trained()
    assert {found for found, _ in rows} == {9}
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in history], rel=1e-5)
    torch.testing.assert_close(padded, outputs, rtol=1e-4, atol=1e-5)


def test_folds_read_the_table_and_the_shape_of_each_file_once(tmp_path, stored, monkeypatch):
    read: list[str] = []
    for owner, name in ((data, "_table"), (data.Features, "_shape")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, plain=plain: (read.append(str(given[-1])), plain(*given))[1])
    _, folds, test, _ = recipe.stored(stored)
    slides = {item.name for fold in folds for split in (*fold, test) for item in split.items}
    assert len(read) == 1 + len(slides) == len({*read})
    for k, (train, tune) in enumerate(folds):
        for split, part in (("train", train), ("tune", tune)):
            assert part.items == data.load("slides/panda", tmp_path, split, k)
            assert [file.stem for file in part.files] == [item.name for item in part.items]


def test_the_weights_of_each_fold_are_saved_under_the_authors_names(tmp_path, stored):
    models = recipe.run(stored, tmp_path).models
    files = sorted((tmp_path / "trained").iterdir())
    assert [f.stem.rpartition(", fold ")[2] for f in files] == ["0, seed 1", "1, seed 1"]
    for model, file in zip(models, files, strict=True):
        saved = hvit.HViT.from_official(read_checkpoint(file)).state_dict()
        assert not model.training and all(torch.equal(t, saved[n]) for n, t in model.state_dict().items())
    stored.sampling = "weighted"  # another training
    recipe.run(stored, tmp_path)
    assert len(list((tmp_path / "trained").iterdir())) == 4


def test_leaks_and_features_that_do_not_fit_are_refused(tmp_path, stored):
    def running(**changes):
        return lambda: recipe.run(SimpleNamespace(**vars(stored) | changes), tmp_path)

    def listed(split, fold):
        return data.load("slides/panda", tmp_path, split, fold)

    folds = data.find("slides/panda").folder(tmp_path) / "folds"
    leaks = (("fold-0/test.csv", listed("tune", 1)[:1]), ("fold-1/tune.csv", listed("train", 1)[:2]))
    for name, wrong in leaks:
        before = (folds / name).read_text()
        data.write_list(folds / name, wrong)
        refuses((running(), wrong[0].name))
        (folds / name).write_text(before)
    refuses((running(region=2048), "2048"), (running(devices=2), "2"))
    refuses((running(method="Global"), "vit4k_xs_dino"), error=MissingWeights)  # no random level is frozen unasked
    store(tmp_path, 192)  # of whole regions: only the slide level can be trained on them
    refuses((running(), "Global"))
    model, _ = running(method="Global", weights="random")().models  # without a region level that it would not use
    assert not any(name.startswith("region") for name, _ in model.named_parameters())
    store(tmp_path, 16, 768)
    refuses((running(), "768"))
    store(tmp_path, 384)
    refuses((running(method="Global", weights="random"), "384"))
    refuses((running(features=str(tmp_path / "elsewhere")), "companion slides"), error=MissingData)


# --- features of slides -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A folder with slides of one's own: a square of tissue each, of another colour by class."""
    for name, colour in (("benign", (200, 120, 160)), ("tumour", (110, 60, 140))):
        for i in range(5):
            pixels = np.full((512, 640, 3), 255, np.uint8)
            pixels[128:384, 128:384] = np.random.default_rng(i).integers(-9, 9, (256, 256, 1)) + np.array(colour)
            path = tmp_path / "own" / name / f"{name}_{i}.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pyramid(path, pixels, 0.5)
    return tmp_path / "own"


def test_slides_of_ones_own_are_stored_in_parts_and_trained_on(own, tmp_path, capsys, monkeypatch):
    tiling = replace(PANDA, area=0.1, hole_area=0.05, close=3, median=3)
    patch, other = (hvit.PatchEncoder(64, 32, dim=384, depth=1).eval() for _ in range(2))
    p = given(dry_run=False, dataset="folder", data_root=str(own), features=str(tmp_path / "f"), region=128)
    done = [dict(recipe.store(p, patch, (i, 3), tiling=tiling)) for i in range(3)]
    assert [len(part) for part in done] == [4, 3, 3]
    found = {name: path for part in done for name, path in part.items()}
    assert sorted(found) == sorted(item.name for item in data.own(own)["train"])
    assert read_features(found["benign_0"])["features"].shape == (4, 4, 384)  # 2 x 2 regions of 2 x 2 patches
    with monkeypatch.context() as mended:  # all finished: one hash for all slides, and no slide is tiled
        mended.setattr(features, "tile", None)
        keys: list[str] = []
        plain = features.checkpoint_key
        mended.setattr(features, "checkpoint_key", lambda **facts: keys.append(plain(**facts)) or keys[-1])
        again = dict(recipe.store(p, patch, tiling=tiling))
    assert all(isinstance(file, Path) for file in again.values()) and len(again) == len(found) and len(keys) == 1
    # features of another encoder are refused
    assert isinstance(dict(recipe.store(p, other, (0, 10), tiling=tiling))["benign_0"], BadParameter)
    p.region, p.epochs = 512, 1  # 2 x 2 patches
    _, folds, test, _ = recipe.stored(p)
    assert "0 benign, 1 tumour" in capsys.readouterr().out
    assert len(test) == 2 and [len(train) + len(tune) for train, tune in folds] == [8, 8]
    assert recipe.run(p, tmp_path).models[0].num_classes == 2


@pytest.fixture
def command(tmp_path):
    """The words of `companion slides` on a folder, with a small patch level."""
    torch.save(hvit.PatchEncoder(64, 16, dim=64, depth=1, heads=1).state_dict(), tmp_path / "patch.pth")
    weights = ["--weights", str(tmp_path / "patch.pth")]
    return lambda root, *more: cli.main(["slides", "folder", "--data-root", str(root), *weights, "--region", *more])


def test_one_bad_slide_does_not_stop_the_others(own, command, capsys):
    (own / "benign" / "benign_1.tiff").write_bytes(b"no slide")
    assert command(own, "128", "--part", "0/2") == 0  # the second of the list is the other part's
    assert capsys.readouterr().out.count(".h5") == 5
    assert command(own, "128", "--part", "1/2") == 1
    printed = capsys.readouterr()
    assert "benign_1.tiff" in printed.err and printed.out.count(".h5") == 4
    # regions are compressed as the authors' are, unless --raw asks for others, which are other features
    assert command(own, "128", "--part", "0/2", "--raw") == 1
    assert "jpeg" in capsys.readouterr().err
    for more, named in ((("128", "--part", "2/2"), "2/2"), (("128", "--heads", "0"), "0"), (("100",), "64")):
        assert command(own, *more) == 2
        assert named in capsys.readouterr().err


def test_spacings_and_masks_of_single_slides_are_files(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr(slides, "PANDA", replace(PANDA, area=0.1))
    own = tmp_path / "own"
    (tmp_path / "masks").mkdir()
    for name, mpp in (("a", 0.25), ("b", None), ("c", None)):  # a states a wrong one
        write_pyramid(own / f"{name}.tiff", np.full((256, 256, 3), (200, 60, 120), np.uint8), mpp, (1, 4))
        Image.fromarray(np.full((16, 16), name != "c")).save(tmp_path / "masks" / f"{name}.png")
    table = tmp_path / "spacings.csv"
    table.write_text("slide_id,mpp\na,0.5\nb.tiff,0.45\n")
    words = ["128", "--spacing", str(table), "--masks", str(tmp_path / "masks"), "--preview"]
    assert command(own, *words) == 1
    assert "c.tiff" in (error := capsys.readouterr().err) and "--mpp" in error and "--spacing" in error
    assert command(own, *words, "--mpp", "0.55") == 0
    kept = [read_features(own / "features" / f"{name}.h5") for name in "abc"]
    assert [json.loads(found["settings"])["slide_mpp"] for found in kept] == [0.5, 0.45, 0.55]
    assert [len(found["features"]) for found in kept] == [4, 4, 0]
    assert {file.name for file in own.glob("features/*.png")} == {"a.png", "b.png", "c.png"}
    (tmp_path / "masks" / "b.png").unlink()
    assert command(own, *words, "--mpp", "0.55") == 1 and "masks/b.png" in capsys.readouterr().err
    table.write_text("slide_id,mpp\nd,0.5\n")
    assert command(own, *words) == 1 and "'d'" in capsys.readouterr().err


def test_the_patch_level_of_a_file_of_several_levels(tmp_path):
    """Such as the shipped toy encoders, or a model of the authors'."""
    (drawn,) = synthetic.slides(1, "count", "train")
    folder = synthetic.save(tmp_path / "own", [drawn])
    p = given(dataset="folder", data_root=str(folder), features=str(tmp_path / "f"), region=128, normalise="half")
    patch = patch_encoder(encoders.weights_file(slide_dino.NAME), heads=3)
    files = dict(recipe.store(p, patch, tiling=synthetic.TILING))
    expected = slide_dino.embed(slide_dino.build()[0], tensor(drawn.regions, "half"))
    torch.testing.assert_close(read_features(files["slide_0"])["features"], expected, atol=1e-5, rtol=1e-4)


def test_attention_of_all_levels_is_read_region_by_region(tmp_path):
    path = synthetic.save(tmp_path, synthetic.slides(1, "place", "test")) / "slide_0.tiff"
    torch.manual_seed(0)
    model = hvit.build("pocket", "local", "regression", patches=4, levels=("region", "slide"))
    patch = slide_dino.build()[0]
    with Slide(path) as slide:
        tiles = tile(slide, synthetic.TILING)
        found = heatmaps.attention_maps(model, patch, slide, tiles, "half")
        pixels = tensor(np.stack([tiles.read(slide, x, y) for x, y in tiles.coords]), "half")
    whole = hvit.HViT(model.slide, model.region, patch, "local").eval()
    with torch.no_grad():
        torch.testing.assert_close(found.output, whole(pixels[None]), atol=1e-5, rtol=1e-4)
        regions, out = whole.region.forward_intermediates(grids(whole.embed_patches(pixels)))
        _, top = whole.slide.forward_intermediates(regions[None])
    assert found.patch.shape == found.region.shape == (5, 32, 32)
    np.testing.assert_allclose(found.alpha, top["pooling"][0], atol=1e-5)
    third = heatmaps.region_map(heatmaps.cls_maps(out["attention"][2]), 32).mean(0)
    assert np.abs(found.region[2] - third).mean() < 0.01  # rounding may change a few ranks
    mean = (found.patch + found.region + found.slide[:, None, None]) / 3
    np.testing.assert_allclose(found.factorised(0.5, "local"), mean, atol=1e-6)
    other = hvit.PatchEncoder(dim=128, depth=1, heads=2)
    refuses(
        (lambda: found.factorised(2, "local"), "gamma"),
        (lambda: heatmaps.attention_maps(model, other, slide, tiles, "half"), "128"),
    )


def test_a_variant_is_not_measured_as_the_published_method():
    assert recipe.label(parameters("hvit")) == "Local, from vit256_small_dino.pth"
    changed = parameters("hvit", position="sine", epochs=3, features="a/b")
    assert recipe.label(changed) == "Local, position sine, epochs 3, from b"
