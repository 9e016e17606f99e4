"""H-ViT's runs and study: the published recipe, folds that vote, pocket slides, what is missing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from companion import cli
from companion.data import slides as data
from companion.errors import BadParameter, MissingData, MissingWeights
from companion.models.hvit import model as hvit
from companion.models.hvit import recipe as runs
from companion.ops.papers import paper
from companion.slides import Slide, read_features, tile, write_pyramid
from companion.toy.ablations import hvit as study
from companion.toy.datasets import slides as pocket
from companion.viz import heatmaps


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=True,
        seed=1,
        method="Local",
        dataset="slides/panda",
        region=1024,
        head="regression",
        position="none",
        features="",
        normalise="unit",
        folds=2,
        gamma=0.5,
        sampling="uniform",
        noise=0.0,
        patience=0,
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


def slides(count: int, seed: int = 0) -> TensorDataset:
    """Slides whose grade is told by the mean of their embeddings."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.arange(count) % 6
    features = 0.1 * torch.randn(count, 2, 16, 384, generator=generator) + grades[:, None, None, None] / 3
    return TensorDataset(features, torch.ones(count, 2, dtype=torch.bool), grades)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_rate_is_halved_every_20_epochs():
    p = given(method="mean pooling")
    history = runs.learn(p, runs.build(p, p.method), p.method, slides(4), None, epochs=41, batch=4)
    rates = [row["lr"] for row in history]
    assert rates[0] == rates[19] == 2e-4 and rates[20] == rates[39] == 1e-4 and rates[40] == 5e-5


def test_the_decay_is_adams_not_adamws():
    """One step by hand with torch's Adam, which adds the decay to the gradient."""
    p, part = given(method="mean pooling"), slides(4)
    model, other = runs.build(p, p.method).eval(), runs.build(p, p.method).eval()
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    runs.learn(p, model, p.method, part, None, epochs=1, batch=4)
    optimizer = torch.optim.Adam(other.parameters(), 2e-4, weight_decay=1e-5)
    hvit.loss("regression", other(part.tensors[0], part.tensors[1]), part.tensors[2]).backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.fixture
def tuning(monkeypatch):
    """Kappas and losses that the tuning slides give, one an epoch, and what was trained until then."""

    def plan(*values):
        given, seen = iter(values), []

        def score(p, model, part, classes):
            seen.append([t.detach().clone() for t in model.parameters()])
            return next(given)

        monkeypatch.setattr(runs, "_tuning", score)
        return seen

    return plan


def test_the_epoch_that_is_best_on_the_tuning_slides_is_kept(tuning):
    p, seen = given(method="mean pooling"), tuning((1.0, 3.0), (5.0, 2.0), (3.0, 1.0))
    model = runs.build(p, p.method)
    runs.learn(p, model, p.method, slides(4), slides(4), epochs=3, batch=4)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))


def test_training_ends_when_the_tuning_loss_has_not_fallen_for_long(tuning, monkeypatch):
    monkeypatch.setattr(runs, "EARLIEST", 4)
    falls = [(float(k), 9.0 - k) for k in range(3)]
    seen = tuning(*falls, *[(0.0, 8.0)] * 20)
    p = given(method="mean pooling", patience=3)
    model = runs.build(p, p.method)
    history = runs.learn(p, model, p.method, slides(4), slides(4), epochs=20, batch=4)
    # the third epoch was the best; three more bring no better one
    assert len(history) == len(seen) == 6 and set(history[0]) == {"step", "lr", "loss"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))
    assert not model.training
    monkeypatch.setattr(runs, "EARLIEST", 10)
    tuning(*falls, *[(0.0, 8.0)] * 20)
    assert len(runs.learn(p, runs.build(p, p.method), p.method, slides(4), slides(4), epochs=20, batch=4)) == 10
    tuning(*falls, *[(0.0, 8.0)] * 20)
    p.patience = 0
    assert len(runs.learn(p, runs.build(p, p.method), p.method, slides(4), slides(4), epochs=20, batch=4)) == 20


def test_weighted_sampling_draws_grades_alike_often(monkeypatch):
    grades = torch.tensor([0] * 90 + [1] * 9 + [5])
    part = TensorDataset(torch.arange(100.0), torch.ones(100), grades)
    drawn, seen = runs.Drawn(part), {}
    torch.manual_seed(0)
    for i in range(1500):
        grade = int(drawn[i % 100][2])
        seen[grade] = seen.get(grade, 0) + 1
    assert len(drawn) == 100 and all(400 < count < 600 for count in seen.values())
    used = []
    monkeypatch.setattr(runs, "fit", lambda model, loss, found, **options: used.append(found) or [])
    for sampling, kind in (("weighted", runs.Drawn), ("uniform", TensorDataset)):
        p = given(method="mean pooling", sampling=sampling)
        runs.learn(p, runs.build(p, p.method), p.method, slides(4), None, epochs=1, batch=4)
        assert isinstance(used[-1], kind)


def test_noise_is_drawn_anew_and_falls_on_regions_alone(monkeypatch):
    features, present = torch.zeros(2, 3, 16, 384), torch.tensor([[True, True, False]] * 2)
    noised = runs.Noised(TensorDataset(features, present, torch.tensor([2, 4])), 0.5)
    torch.manual_seed(0)
    (first, there, grade), again = noised[1], noised[1]
    assert len(noised) == 2 and int(grade) == 4 and torch.equal(there, present[1])
    assert abs(first[:2].std() - 0.5) < 0.02 and not first[2].any() and not torch.equal(first, again[0])
    used = []
    monkeypatch.setattr(runs, "fit", lambda model, loss, found, **options: used.append(found) or [])
    for noise, sampling in ((0.0, "uniform"), (0.5, "uniform"), (0.5, "weighted")):
        p = given(method="mean pooling", noise=noise, sampling=sampling)
        runs.learn(p, runs.build(p, p.method), p.method, slides(4), slides(4), epochs=1, batch=4)
    assert [type(found) for found in used] == [TensorDataset, runs.Noised, runs.Noised]
    assert isinstance(used[2].data, runs.Drawn)


@pytest.mark.parametrize(
    ("method", "count"), [("Global", 594_818), ("Local", 594_818 + 2_745_600), ("gated attention", None)]
)
def test_what_is_trained_at_full_size(method, count):
    model = runs.build(given(), method)
    trained = sum(t.numel() for t in model.parameters() if t.requires_grad)
    assert trained == (count or sum(t.numel() for t in model.parameters()))


def test_hipts_region_level_is_loaded_with_its_positions_resized(tmp_path):
    torch.manual_seed(0)
    saved = hvit.RegionEncoder(16)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in saved.state_dict().items()}}, tmp_path / "vit4k_xs_dino.pth")
    model = runs.build(given(method="Global", region=2048, weights=str(tmp_path / "vit4k_xs_dino.pth")), "Global")
    assert torch.equal(model.region.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.region.pos_embed, hvit.resize_positions(saved.pos_embed, (7, 7)))
    # Global looks where `companion doctor` says; Local starts from random weights unless it is told
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "vit4k_xs_dino.pth"
    (tmp_path / "vit4k_xs_dino.pth").rename(file)
    for method, weights, found in (
        ("Global", "", file),
        ("Local", "", ""),
        ("Global", "random", ""),
        ("Local", "x", "x"),
    ):
        assert runs.region_weights(given(method=method, weights=weights, data_root=str(tmp_path))) == found


def test_global_does_not_freeze_random_weights_unasked(tmp_path, stored):
    stored.method = "Global"
    with pytest.raises(MissingWeights, match="vit4k_xs_dino"):
        runs.setting(stored, tmp_path, {})
    stored.weights = "random"
    assert len(runs.train(runs.setting(stored, tmp_path, {}), "Global", epochs=1, batch=6)[0]) == 2


# --- dry run and stored features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(runs.KINDS))
def test_a_dry_run_takes_two_steps(method, tmp_path):
    found = runs.setting(given(method=method, sampling="weighted", patience=20), tmp_path, {})
    models, history = runs.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    scores = runs.scores(found, method, models)
    assert set(scores) == {"kappa", "fold"} and scores["kappa"] == scores["fold"]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Pocket slides in two folds, with features of one to three regions of 4 x 4 patches: the parameters."""
    monkeypatch.setattr(runs, "WORKERS", 0)
    monkeypatch.setattr(pocket, "COUNTS", {"train": 12, "val": 6, "test": 6})
    pocket.write(tmp_path, "count", 0)
    data.write_folds("pocket/slides-count", tmp_path, 2, test=0.25)
    store(tmp_path, 16, 384)
    return given(dry_run=False, method="mean pooling", dataset="pocket/slides-count", data_root=str(tmp_path))


def store(root, *shape: int) -> None:
    """Features of that shape a region, whose mean tells the grade."""
    (root / "features").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for item in data.load("pocket/slides-count", root):
        regions = int(rng.integers(1, 4))  # ragged
        with h5py.File(root / "features" / f"{item.name}.h5", "w") as file:
            values = 0.1 * rng.normal(size=(regions, *shape)) + item.grade / 3
            file["features"], file["coords"] = values.astype("float32"), np.zeros((regions, 2), "int64")
            file["shares"], file.attrs["settings"] = np.ones(regions), "{}"


def test_folds_are_trained_on_stored_features_and_vote(tmp_path, stored):
    p = stored
    found = runs.setting(p, tmp_path, {})
    assert len(found.folds) == 2
    models, _ = runs.train(found, p.method, epochs=30, batch=6)
    scores = runs.scores(found, p.method, models)
    assert len(models) == 2 and -100 <= scores["kappa"] <= 100
    table = runs.measured(
        tmp_path / "measured.csv",
        {"method": p.method, "dataset": p.dataset, "region": 1024, "head": p.head, "seed": 1} | scores,
    )
    assert list(table.kappa) == [scores["kappa"]]


@pytest.mark.parametrize("method", ["Local", "mean pooling"])
def test_a_fold_that_is_done_is_read_and_not_trained_again(tmp_path, stored, method, monkeypatch):
    stored.method = method
    found = runs.setting(stored, tmp_path, {})
    models, history = runs.train(found, method, epochs=2, batch=6)
    kept = sorted((tmp_path / "trained").glob("*.safetensors"))
    assert [file.name[: len(method) + 16] for file in kept] == [f"{method}, fold {k}, seed 1" for k in range(2)]
    if method == "Local":  # under the authors' names
        state = hvit.read_checkpoint(kept[1])
        ours = {n: t for n, t in models[1].state_dict().items()}
        assert all(torch.equal(t, ours[n]) for n, t in hvit.HViT.from_official(state).state_dict().items())
    kept[1].unlink()  # as if the run had been killed in the second fold
    trained = []
    fit = runs.fit
    monkeypatch.setattr(runs, "fit", lambda *args, **options: trained.append(options["name"]) or fit(*args, **options))
    again, same = runs.train(found, method, epochs=2, batch=6)
    assert trained == [method] and same == history
    for one, other in zip(models, again, strict=True):
        assert not other.training
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    stored.sampling = "weighted"  # another training
    runs.train(runs.setting(stored, tmp_path, {}), method, epochs=2, batch=6)
    assert len(trained) == 3


def test_features_that_do_not_fit_are_refused(tmp_path, stored):
    with pytest.raises(BadParameter, match=r"region = 2048.*16 patches"):
        runs.setting(SimpleNamespace(**vars(stored) | {"region": 2048}), tmp_path, {})
    store(tmp_path, 192)  # of whole regions: only the slide level can be trained on them
    for method in ("Local", "gated attention"):
        with pytest.raises(BadParameter, match="Global alone"):
            runs.setting(SimpleNamespace(**vars(stored) | {"method": method}), tmp_path, {})
    assert runs.setting(SimpleNamespace(**vars(stored) | {"method": "Global"}), tmp_path, {}).folds
    empty = SimpleNamespace(**vars(stored) | {"features": str(tmp_path / "elsewhere")})
    with pytest.raises(MissingData, match="companion slides pocket/slides-count"):
        runs.setting(empty, tmp_path, {})


def test_no_slide_is_trained_and_tested_on(tmp_path, stored):
    folds = data.find("pocket/slides-count").folder(tmp_path) / "folds"
    tested = data.load("pocket/slides-count", tmp_path, "test", 0)
    # the folds test on one another's slides
    data.write_list(folds / "fold-0" / "test.csv", data.load("pocket/slides-count", tmp_path, "tune", 1)[:1])
    with pytest.raises(BadParameter, match="none of the slides that a fold tests on"):
        runs.setting(stored, tmp_path, {})
    data.write_list(folds / "fold-0" / "test.csv", tested)
    data.write_list(folds / "fold-1" / "tune.csv", data.load("pocket/slides-count", tmp_path, "train", 1)[:2])
    with pytest.raises(BadParameter, match=r"fold 1.*and 1 more.*tunes on"):
        runs.setting(stored, tmp_path, {})


@pytest.fixture
def own(tmp_path):
    """A folder with slides of one's own: a square of tissue each, of another colour by class."""
    for name, colour in (("benign", (200, 120, 160)), ("tumour", (110, 60, 140))):
        for i in range(5):
            pixels = np.full((512, 640, 3), 255, np.uint8)
            pixels[128:384, 128:384] = np.random.default_rng(i).integers(-9, 9, (256, 256, 1)) + np.array(colour)
            path = tmp_path / "own" / name / f"{name}_{i}.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pyramid(path, lambda y0, y1, p=pixels: p[y0:y1], (640, 512), 0.5)
    return tmp_path / "own"


def small_patches() -> hvit.PatchEncoder:
    torch.manual_seed(0)
    return hvit.PatchEncoder(64, 32, dim=384, depth=1).eval()


def test_slides_of_ones_own_are_stored_in_parts_and_trained_on(own, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WORKERS", 0)
    monkeypatch.setattr(runs, "PANDA", replace(runs.PANDA, area=0.1, hole_area=0.05, close=3, median=3))
    p = given(dry_run=False, dataset="folder", data_root=str(own), features=str(tmp_path / "f"), region=128, folds=2)
    done = [dict(runs.store(p, small_patches(), (i, 3))) for i in range(3)]
    assert [len(part) for part in done] == [4, 3, 3]
    found = {name: path for part in done for name, path in part.items()}
    assert sorted(found) == sorted(item.name for item in data.folder(own))
    features = read_features(found["benign_0"])
    assert features["features"].shape == (4, 4, 384)  # 2 x 2 regions of 2 x 2 patches
    # the same in one go, and with more regions a step
    again = dict(runs.store(SimpleNamespace(**vars(p) | {"features": str(tmp_path / "g")}), small_patches(), batch=3))
    torch.testing.assert_close(read_features(again["benign_0"])["features"], features["features"])
    # what is there is kept, unless another encoder made it
    before = found["benign_0"].stat().st_mtime_ns
    assert dict(runs.store(p, small_patches()))["benign_0"].stat().st_mtime_ns == before
    other = hvit.PatchEncoder(64, 32, dim=384, depth=1).eval()
    assert isinstance(dict(runs.store(p, other))["benign_0"], BadParameter)
    p.region = 512  # 2 x 2 patches
    for method in ("Local", "mean pooling"):
        p.method = method
        monkeypatch.setattr(runs, "build", lambda p, method, fold, classes: hvit.PatchBag(384, classes, p.head, "mean"))
        setting = runs.setting(p, tmp_path, {})
        sizes = [(len(train), len(tune)) for train, tune in setting.folds]
        assert len(setting.test) == 2 and len(sizes) == 2 and all(sum(pair) == 8 for pair in sizes)
        models, _ = runs.train(setting, method, epochs=2, batch=4)
        assert set(runs.scores(setting, method, models)) == {"kappa", "fold"}
        assert models[0].classes == 2


def test_one_bad_slide_does_not_keep_the_others_back(own, tmp_path, capsys):
    (own / "benign" / "benign_1.tiff").write_bytes(b"no slide")
    torch.save(hvit.PatchEncoder(64, 16, dim=64, depth=1, heads=1).state_dict(), tmp_path / "patch.pth")
    words = ["slides", "folder", "--data-root", str(own), "--weights", str(tmp_path / "patch.pth"), "--region", "128"]
    assert cli.main([*words, "--part", "0/2"]) == 0  # the second of the list is the other part's
    assert capsys.readouterr().out.count(".h5") == 5
    assert cli.main([*words, "--part", "1/2"]) == 1
    said = capsys.readouterr()
    assert (
        "benign_1.tiff" in said.err and "no features of 1 slides: benign_1" in said.err and said.out.count(".h5") == 4
    )
    for wrong, right in (("2/2", "0 to n - 1"), ("x", "0/8")):
        assert cli.main([*words, "--part", wrong]) == 2
        assert right in capsys.readouterr().err
    assert cli.main([*words[:-1], "100"]) == 2
    assert "multiple of the 64 pixels" in capsys.readouterr().err


def test_pocket_slides_have_their_own_tiling(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "COUNTS", {"train": 1, "val": 1, "test": 1})
    pocket.write(tmp_path, "count", 0)
    words = [
        "slides",
        "pocket/slides-count",
        "--data-root",
        str(tmp_path),
        "--weights",
        "pocket",
        "--region",
        "128",
        "--normalise",
        "half",
    ]
    assert cli.main(words) == 0
    item = data.load("pocket/slides-count", tmp_path)[0]
    found = read_features(tmp_path / "features" / f"{item.name}.h5")["features"]
    pixels, _ = study.regions(item)
    expected = study.slide_dino.embed(study.encoders("dino")[0], study.tensor(pixels, "half"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(MissingData, match="kaggle"):
        runs.setting(given(dry_run=False, data_root=str(tmp_path)), tmp_path, {})
    with pytest.raises(MissingData, match="no slide"):
        runs.setting(given(dry_run=False, dataset="folder", data_root=str(tmp_path)), tmp_path, {})
    with pytest.raises(BadParameter, match="'learned'"):
        runs.setting(given(position="2d sine"), tmp_path, {})
    for dry_run in (True, False):
        with pytest.raises(BadParameter, match="devices = 2"):
            runs.setting(given(devices=2, dry_run=dry_run), tmp_path, {})


# --- where it looks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["local", "global"])
def test_attention_of_all_levels_is_read_region_by_region(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "COUNTS", {"train": 1, "val": 1, "test": 1})
    pocket.write(tmp_path, "place", 0)
    item = data.load("pocket/slides-place", tmp_path, "test")[0]
    torch.manual_seed(0)
    model = hvit.build("pocket", variant, "regression", patches=4, levels=("region", "slide"))
    patch, before = study.encoders("dino")[0], set(model.trained())
    with Slide(item.path) as slide:
        tiles = tile(slide, pocket.TILING)
        found = runs.look(model, patch, slide, tiles, "half")
        pixels = study.tensor(np.stack([slide.region(x, y, tiles) for x, y in tiles.coords]), "half")
    assert set(model.trained()) == before  # what is trained stays so
    trace, whole = {}, hvit.HViT(model.slide, model.region, patch, variant)
    with torch.no_grad():
        torch.testing.assert_close(found.output, whole(pixels[None], trace=trace), atol=1e-5, rtol=1e-4)
    assert found.patch.shape == found.region.shape == (5, 32, 32)
    np.testing.assert_allclose(found.alpha, trace["pooling"][0], atol=1e-5)
    assert sorted(found.slide) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert found.region.min() >= 0 and found.region.max() < 1
    np.testing.assert_allclose(
        found.region[2], heatmaps.region_map(trace["region_attention"][0, 2].numpy(), 32).mean(0)
    )
    np.testing.assert_allclose(
        found.factorised(0.5, variant), (found.patch + found.region + found.slide[:, None, None]) / 3, atol=1e-6
    )


# --- the study --------------------------------------------------------------------------------------------------------


def test_the_facts_name_what_there_is():
    """Claims name methods and tasks of the study."""
    for claim in paper("hvit")["claims"]:
        if claim["kind"] == "directional":
            for task in claim["tasks"]:
                assert {claim["better"], claim["worse"]} <= set(study.TASKS[task])


@pytest.fixture
def few(tmp_path, monkeypatch) -> str:
    """Embeddings of random slides in the place of those of the pocket slides; the study's root."""
    generator = torch.Generator().manual_seed(0)

    def embeddings(root, seed, task, split, levels="dino"):
        count = {"train": 20, "val": 8, "trainval": 28, "test": 12}[split]
        return TensorDataset(torch.randn(count, 5, 16, 48, generator=generator), torch.arange(count) % 6)

    monkeypatch.setattr(study, "embeddings", embeddings)
    monkeypatch.setattr(study, "RECIPE", study.RECIPE | {"epochs": 1, "batch": 8})
    return str(tmp_path)


@pytest.mark.parametrize("method", list(study.METHODS))
def test_every_method_trains_what_its_name_says(method, few):
    model = study.build(method, 0)
    row = study.train(method, "place", 1e-3, 0, few, "select")
    assert -100 <= row["kappa"] <= 100 and row["trained"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    if isinstance(model, hvit.HViT):
        kept = study.slide_dino.build()[1].state_dict()
        same = all(torch.equal(t, kept[n]) for n, t in model.region.state_dict().items())
        assert same == ("random" not in method or "patch" in method)
        assert any(n.startswith("region") for n in model.trained()) == method.startswith("Local")
    assert ("fold" in row) == ("vote" in method)


def test_shuffling_moves_patches_within_their_region_alone(few, monkeypatch):
    place = torch.arange(2 * 5 * 16, dtype=torch.float).reshape(2, 5, 16, 1).expand(-1, -1, -1, 48)
    whole = TensorDataset(place, torch.tensor([0, 1]))
    monkeypatch.setattr(study, "embeddings", lambda *given: whole)
    moved = study.pictures("Local, places shuffled", "place", few, 0, "train").tensors[0]
    assert not torch.equal(moved, place) and torch.equal(moved.sort(2).values, place)
    assert torch.equal(study.pictures("Local", "place", few, 0, "train").tensors[0], place)


def test_kappa_is_quadratic_and_0_for_a_constant():
    truth = torch.arange(6)
    assert study.kappa(truth, truth) == 100 and study.kappa(truth, torch.zeros(6, dtype=torch.long)) == 0
    assert study.kappa(truth, 5 - truth) == -100


def test_slides_go_the_real_way_into_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "COUNTS", {"train": 3, "val": 2, "test": 2})
    found = study.embeddings(str(tmp_path), 0, "place", "trainval")
    assert found.tensors[0].shape == (5, 5, 16, 48) and len(found.tensors[1]) == 5
    item = data.load("pocket/slides-place", study.folder(tmp_path, 0), "train")[0]
    pixels, corners = study.regions(item)
    assert pixels.shape == (5, 128, 128, 3) and len(corners) == 5
    tensors = study.tensor(pixels, study.slide_dino.NORMALISE)
    torch.testing.assert_close(study.slide_dino.embed(study.encoders("dino")[0], tensors), found.tensors[0][0])
