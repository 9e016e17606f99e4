"""H-ViT's published recipe: training, folds that vote, stored features, missing files, attention maps."""

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
from companion.models import hvit
from companion.models.hvit import recipe
from companion.models.hvit.model import read_checkpoint
from companion.models.layers.pos_embed import resize_pos_embed
from companion.ops import report
from companion.slides import PANDA, Slide, read_features, tensor, tile, write_pyramid
from companion.toy import encoders
from companion.toy.datasets import slides as synthetic
from companion.toy.encoders import slide_dino
from companion.training.checkpoints import Checkpoint
from companion.viz import heatmaps
from tests.conftest import interrupted, parameters
from tests.models.common import refuses


def given(**changes) -> SimpleNamespace:
    few = {"profile": "paper", "dry_run": True, "seed": 1, "method": "mean pooling", "region": 1024, "folds": 2}
    plain = {"sampling": "uniform", "patience": 0, "data_root": "nowhere", "accelerator": "cpu"}
    return parameters("hvit", **few | plain | changes)


def slides(count: int, seed: int = 0) -> TensorDataset:
    """Slides whose grade is the mean of their embeddings."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.arange(count) % 6
    features = 0.1 * torch.randn(count, 2, 16, 384, generator=generator) + grades[:, None, None, None] / 3
    return TensorDataset(features, torch.ones(count, 2, dtype=torch.bool), grades)


def trained(p: SimpleNamespace, epochs: int, tuned: bool = False) -> tuple[torch.nn.Module, list[dict]]:
    """A bag of patches trained on four slides, one step an epoch."""
    return recipe.train_fold(p, [(slides(4), slides(4) if tuned else None)], 6, None, p.method, 0, epochs, 4)


def test_the_learning_rate_is_halved_every_20_epochs():
    found = recipe.halved(2e-4, 41 * 3, 3)
    assert found[0] == found[59] == 2e-4 and found[60] == found[119] == 1e-4 and found[120] == 5e-5
    assert [row["lr"] for row in trained(given(), 2)[1]] == [2e-4] * 2


def test_corn_is_averaged_over_each_slide_first():
    outputs, grades = torch.randn(6, 5), torch.arange(6)
    each = torch.stack([hvit.loss("corn", outputs[i : i + 1], grades[i : i + 1]) for i in range(6)])
    batch = (outputs, None, grades)
    found = recipe.batch_loss("corn", 6, lambda features, present: features, batch)
    torch.testing.assert_close(found, each.mean())
    assert not torch.isclose(found, hvit.loss("corn", outputs, grades))


def test_a_vote_is_drawn_by_the_row_of_the_table_sorted_by_name():
    ballots = [torch.tensor([k, k]) for k in range(5)]  # five grades, each once: drawn
    drawn = [hvit.vote(range(5), seed=seed) for seed in range(2)]
    assert drawn[0] != drawn[1]
    assert recipe.voted(ballots).tolist() == recipe.voted(ballots, ["case_10", "case_2"]).tolist() == drawn
    assert recipe.voted(ballots, ["case_2", "case_10"]).tolist() == drawn[::-1]


@pytest.fixture
def tuning(monkeypatch):
    """Sets the losses of the tuning slides, one an epoch; returns the weights that were scored."""

    def plan(*values):
        given, seen = iter(values), []

        def loss(head, classes, part, model, **options):
            seen.append([t.detach().clone() for t in model.parameters()])
            return next(given)

        monkeypatch.setattr(recipe, "tuning_loss", loss)
        return seen

    return plan


@pytest.mark.parametrize(("last", "best"), [(3.0, 1), (2.0, 2), (float("nan"), 1)])
def test_the_epoch_with_the_lowest_tuning_loss_is_taken_the_later_of_two(tuning, last, best):
    seen = tuning(4.0, 2.0, last)
    model, _ = trained(given(), 3, tuned=True)
    assert len(seen) == 3 and not torch.equal(seen[1][0], seen[2][0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[best], strict=True))


@pytest.mark.parametrize(("patience", "earliest", "epochs"), [(3, 4, 6), (3, 10, 10), (0, 4, 20)])
def test_a_training_ends_when_the_tuning_loss_has_not_fallen_for_long(tuning, monkeypatch, patience, earliest, epochs):
    monkeypatch.setattr(recipe, "EARLIEST", earliest)
    seen = tuning(9.0, 8.0, 7.0, *[8.0] * 20)
    model, history = trained(given(patience=patience), 20, tuned=True)
    assert len(history) == len(seen) == epochs and set(history[0]) == {"step", "lr", "loss"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))
    assert not model.training


def test_weighted_sampling_draws_every_grade_equally_often():
    grades = torch.tensor([0] * 90 + [1] * 9 + [5])
    balanced = recipe.ClassBalanced(TensorDataset(torch.arange(100.0), torch.ones(100), grades))
    torch.manual_seed(0)
    counts = torch.bincount(torch.tensor([int(balanced[i % 100][2]) for i in range(1500)]))[[0, 1, 5]]
    assert len(balanced) == 100 and counts.min() > 400 and counts.max() < 600
    # noise is drawn for each access and spares the padding
    features, present = torch.zeros(2, 3, 16, 384), torch.tensor([[True, True, False]] * 2)
    noised = recipe.Noised(TensorDataset(features, present, torch.tensor([2, 4])), 0.5)
    (first, there, grade), again = noised[1], noised[1]
    assert len(noised) == 2 and int(grade) == 4 and torch.equal(there, present[1])
    assert abs(first[:2].std() - 0.5) < 0.02 and not first[2].any() and not torch.equal(first, again[0])


@pytest.mark.parametrize(("noise", "sampling"), [(0.0, "uniform"), (0.0, "weighted"), (0.5, "weighted")])
def test_sampling_and_noise_are_what_the_parameters_say(monkeypatch, noise, sampling):
    used = []
    monkeypatch.setattr(recipe, "fit", lambda model, loss, data, **options: used.append(data) or [])
    trained(given(noise=noise, sampling=sampling), 1)
    while isinstance(used[-1], (recipe.Noised, recipe.ClassBalanced)):
        used.append(used[-1].data)
    kinds = [recipe.Noised] * (noise > 0) + [recipe.ClassBalanced] * (sampling == "weighted") + [TensorDataset]
    assert [type(one) for one in used] == kinds


def test_kappa_is_quadratic_and_0_for_a_constant():
    truth = torch.arange(6)
    assert recipe.kappa(truth, truth) == 100 and recipe.kappa(truth, torch.zeros(6, dtype=torch.long)) == 0
    assert recipe.kappa(truth, 5 - truth) == -100
    seven = torch.arange(8)  # more grades than PANDA's
    assert recipe.kappa(seven, 7 - seven) == -100


@pytest.mark.parametrize(
    ("method", "count"), [("Global", 594_818), ("Local", 594_818 + 2_745_600), ("gated attention", None)]
)
def test_what_is_trained_at_full_size(method, count):
    model = recipe.build(given(), method)
    trainable = sum(t.numel() for t in model.parameters() if t.requires_grad)
    assert trainable == (count or sum(t.numel() for t in model.parameters()))


def test_hipts_region_level_is_loaded_with_its_positions_resized(tmp_path):
    torch.manual_seed(0)
    saved = hvit.RegionEncoder(16)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in saved.state_dict().items()}}, tmp_path / "vit4k_xs_dino.pth")
    model = recipe.build(given(method="Global", region=2048, weights=str(tmp_path / "vit4k_xs_dino.pth")), "Global")
    assert torch.equal(model.region.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.region.pos_embed, resize_pos_embed(saved.pos_embed, (7, 7)))
    # Global reads the file that `companion doctor` names; Local starts from random weights unless a file is given
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "vit4k_xs_dino.pth"
    (tmp_path / "vit4k_xs_dino.pth").rename(file)
    for found, method, weights in (
        (file, "Global", ""),
        ("", "Local", ""),
        ("", "Global", "random"),
        ("x", "Local", "x"),
    ):
        assert recipe.region_weights(given(method=method, weights=weights, data_root=str(tmp_path))) == found


@pytest.mark.parametrize("method", list(recipe.METHODS))
def test_a_dry_run_takes_two_steps(method, tmp_path):
    found = recipe.setting(given(method=method, sampling="weighted", patience=20), tmp_path)
    models, history = recipe.train(found, method)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    assert not list(tmp_path.iterdir())  # nothing is saved: a second dry run trains again
    scores = recipe.scores(found, method, models)
    assert set(scores) == {"kappa", "fold"} and scores["kappa"] == scores["fold"]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Synthetic slides in two folds, with features of one to three regions of 4 x 4 patches: the parameters."""
    monkeypatch.setattr(recipe, "WORKERS", 0)
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 12, "val": 6, "test": 6})
    synthetic.write(tmp_path, "count", 0)
    data.write_folds("pocket/slides-count", tmp_path, 2, test=0.25)
    store(tmp_path, 16, 384)
    return given(dry_run=False, dataset="pocket/slides-count", data_root=str(tmp_path))


def store(root, *shape: int) -> None:
    """Write features of that shape a region, whose mean follows the grade."""
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
    found = recipe.setting(p, tmp_path)
    assert len(found.folds) == 2
    models, _ = recipe.train(found, p.method, epochs=30, batch=6)
    # a batch is filled up to its own longest slide, not to the fold's
    padded = [models[0](found.test[i][0][None], present=found.test[i][1][None]) for i in range(len(found.test))]
    torch.testing.assert_close(recipe.outputs(models[0], found.test)[1], torch.cat(padded).float())
    batch = data.trimmed([found.test[0], found.test[0]])
    assert batch[0].shape[1] == int(found.test[0][1].sum()) == batch[1].sum() // 2
    scores = recipe.scores(found, p.method, models)
    assert len(models) == 2 and -100 <= scores["kappa"] <= 100
    assert scores["kappa"] == recipe.kappa(  # votes are drawn by the row of the table sorted by name
        recipe.grades_of(found.test),
        recipe.voted([found.grades(m, p.method, found.test) for m in models], [i.name for i in found.test.items]),
    )
    row = {"method": p.method, "dataset": p.dataset, "region": 1024, "head": p.head, "seed": 1}
    for values in ({"kappa": 1.0, "fold": 1.0}, scores):
        table = recipe.measured(tmp_path / "measured.csv", row | values)
    assert list(table.kappa) == [scores["kappa"]]


@pytest.mark.parametrize("method", ["Local", "mean pooling"])
def test_a_killed_training_resumes_to_the_same_bits_and_its_weights_are_saved(tmp_path, stored, method, monkeypatch):
    stored.method, steps = method, {"epochs": 3, "batch": 3}
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))  # every second step
    whole, history = recipe.train(recipe.setting(stored, tmp_path / "whole"), method, **steps)
    with interrupted(monkeypatch, recipe, "batch_loss", len(history) + 5):  # in the second fold
        recipe.train(recipe.setting(stored, tmp_path), method, **steps)
    names = [path.stem for path in sorted((tmp_path / "checkpoints").glob("*.pt"))]
    assert [name[: len(method) + 16] for name in names] == [f"{method}, fold {k}, seed 1" for k in range(2)]
    calls, loss = [], recipe.batch_loss
    monkeypatch.setattr(recipe, "batch_loss", lambda *args: calls.append(1) or loss(*args))
    again, same = recipe.train(recipe.setting(stored, tmp_path), method, **steps)
    assert same == history and 0 < len(calls) < len(history) - 2
    for one, other in zip(whole, again, strict=True):
        assert not other.training
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    saved = [read_checkpoint(tmp_path / "trained" / f"{name}.safetensors") for name in names]
    if method == "Local":  # under the authors' names
        saved = [hvit.HViT.from_official(state).state_dict() for state in saved]
    assert all(torch.equal(t, saved[1][n]) for n, t in again[1].state_dict().items())
    for count, change in enumerate(({"sampling": "weighted"}, {"position": "sine"}), 2):  # other trainings
        vars(stored).update(change)
        recipe.train(recipe.setting(stored, tmp_path), method, **steps)
        assert len(list((tmp_path / "trained").iterdir())) == 2 * count


def test_what_does_not_fit_is_refused(tmp_path, stored):
    def setting(**changes):
        return lambda: recipe.setting(SimpleNamespace(**vars(stored) | changes), tmp_path)

    refuses((setting(method="Global"), "vit4k_xs_dino"), error=MissingWeights)  # no random level is frozen unasked
    found = setting(method="Global", weights="random")()
    assert len(recipe.train(found, "Global", epochs=1, batch=6)[0]) == 2
    # no slide is trained and tested on
    folds = data.find("pocket/slides-count").folder(tmp_path) / "folds"
    tested = data.load("pocket/slides-count", tmp_path, "test", 0)
    data.write_list(folds / "fold-0" / "test.csv", data.load("pocket/slides-count", tmp_path, "tune", 1)[:1])
    refuses((setting(), "none of the slides that a fold tests on"))
    data.write_list(folds / "fold-0" / "test.csv", tested)
    tuned = data.load("pocket/slides-count", tmp_path, "tune", 1)
    data.write_list(folds / "fold-1" / "tune.csv", data.load("pocket/slides-count", tmp_path, "train", 1)[:2])
    refuses((setting(), r"fold 1.*and 1 more.*tunes on"))
    data.write_list(folds / "fold-1" / "tune.csv", tuned)
    refuses((setting(region=2048), r"region = 2048.*16 patches"))
    store(tmp_path, 192)  # of whole regions: only the slide level can be trained on them
    refuses((setting(method="Local"), "Global alone"), (setting(method="gated attention"), "Global alone"))
    whole = setting(method="Global", weights="random")()
    model, _ = recipe.train(whole, "Global", epochs=1, batch=6)[0]  # without a region level that it would not use
    assert not any(name.startswith("region") for name, _ in model.named_parameters())
    store(tmp_path, 16, 768)
    refuses(*((setting(method=method), "width 384.*768") for method in ("Local", "gated attention")))
    store(tmp_path, 384)
    refuses((setting(method="Global", weights="random"), "width 192.*384"))
    elsewhere = setting(features=str(tmp_path / "elsewhere"))
    refuses((elsewhere, "companion slides pocket/slides-count"), error=MissingData)


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
    monkeypatch.setattr(recipe, "WORKERS", 0)
    tiling = replace(PANDA, area=0.1, hole_area=0.05, close=3, median=3)
    p = given(dry_run=False, dataset="folder", data_root=str(own), features=str(tmp_path / "f"), region=128)
    done = [dict(recipe.store(p, small_patches(), (i, 3), tiling=tiling)) for i in range(3)]
    assert [len(part) for part in done] == [4, 3, 3]
    found = {name: path for part in done for name, path in part.items()}
    assert sorted(found) == sorted(item.name for item in data.folder(own))
    features = read_features(found["benign_0"])
    assert features["features"].shape == (4, 4, 384)  # 2 x 2 regions of 2 x 2 patches
    # the same in one go, and with more regions a step
    other = SimpleNamespace(**vars(p) | {"features": str(tmp_path / "g")})
    again = dict(recipe.store(other, small_patches(), batch=3, tiling=tiling))
    torch.testing.assert_close(read_features(again["benign_0"])["features"], features["features"])
    # a file that is there stays, and features of another encoder are refused
    before = found["benign_0"].stat().st_mtime_ns
    assert dict(recipe.store(p, small_patches(), tiling=tiling))["benign_0"].stat().st_mtime_ns == before
    other = hvit.PatchEncoder(64, 32, dim=384, depth=1).eval()
    assert isinstance(dict(recipe.store(p, other, tiling=tiling))["benign_0"], BadParameter)
    p.region = 512  # 2 x 2 patches
    for method in ("Local", "mean pooling"):
        p.method = method
        monkeypatch.setattr(
            recipe, "build", lambda p, _, fold, classes, levels: hvit.PatchBag(384, classes, p.head, "mean")
        )
        setting = recipe.setting(p, tmp_path)
        sizes = [(len(train), len(tune)) for train, tune in setting.folds]
        assert len(setting.test) == 2 and len(sizes) == 2 and all(sum(pair) == 8 for pair in sizes)
        models, _ = recipe.train(setting, method, epochs=2, batch=4)
        assert set(recipe.scores(setting, method, models)) == {"kappa", "fold"}
        assert models[0].classes == 2


def test_one_bad_slide_does_not_stop_the_others(own, tmp_path, capsys, monkeypatch):
    (own / "benign" / "benign_1.tiff").write_bytes(b"no slide")
    torch.save(hvit.PatchEncoder(64, 16, dim=64, depth=1, heads=1).state_dict(), tmp_path / "patch.pth")
    words = ["slides", "folder", "--data-root", str(own), "--weights", str(tmp_path / "patch.pth"), "--region", "128"]
    assert cli.main([*words, "--part", "0/2"]) == 0  # the second of the list is the other part's
    assert capsys.readouterr().out.count(".h5") == 5
    assert cli.main([*words, "--part", "1/2"]) == 1
    said = capsys.readouterr()
    assert "benign_1.tiff" in said.err and "no features of 1 slides: benign_1" in said.err
    assert said.out.count(".h5") == 4
    # regions are compressed as the authors' are, unless --raw asks for others, which are other features
    assert cli.main([*words, "--part", "0/2", "--raw"]) == 1
    assert "jpeg = False" in capsys.readouterr().err
    for wrong, right in (("2/2", "0 to n - 1"), ("x", "0/8")):
        assert cli.main([*words, "--part", wrong]) == 2
        assert right in capsys.readouterr().err
    for heads in ("-1", "0"):
        assert cli.main([*words, "--heads", heads]) == 2
        assert "1 or more heads" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*words, "--accelerator", "cuda"]) == 2
    assert "accelerator = 'cuda'" in capsys.readouterr().err
    assert cli.main([*words[:-1], "100"]) == 2
    assert "multiple of the 64 pixels" in capsys.readouterr().err


def test_slides_in_one_folder_need_no_classes_and_may_be_given_their_scale(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    pixels = np.full((256, 256, 3), (200, 60, 120), np.uint8)
    write_pyramid(tmp_path / "flat" / "a.tiff", lambda y0, y1: pixels[y0:y1], (256, 256), None)
    torch.save(hvit.PatchEncoder(64, 16, dim=64, depth=1, heads=1).state_dict(), tmp_path / "patch.pth")
    words = ["slides", "folder", "--data-root", str(tmp_path / "flat"), "--weights", str(tmp_path / "patch.pth")]
    assert cli.main([*words, "--region", "128"]) == 1
    assert "a.tiff does not contain them" in (said := capsys.readouterr().err) and "--mpp" in said
    assert cli.main([*words, "--region", "128", "--mpp", "0.5"]) == 0
    assert '"mpp": 0.5' in read_features(tmp_path / "flat" / "features" / "a.h5")["settings"]
    (tmp_path / "file").touch()
    assert cli.main([*words, "--features", str(tmp_path / "file")]) == 2
    assert "a folder that you may write to" in capsys.readouterr().err


def test_the_patch_level_of_a_file_of_several_levels(tmp_path, monkeypatch):
    """Such as the shipped toy encoders, or a model of the authors'."""
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 1, "val": 1, "test": 1})
    synthetic.write(tmp_path, "count", 0)
    p = given(dataset="pocket/slides-count", data_root=str(tmp_path), region=128, normalise="half")
    patch = recipe.patch_encoder(encoders.weights_file(slide_dino.NAME), heads=3)
    files = dict(recipe.store(p, patch, tiling=synthetic.TILING))
    item = data.load("pocket/slides-count", tmp_path)[0]
    with Slide(item.path) as slide:
        tiles = tile(slide, synthetic.TILING)
        pixels = np.stack([slide.region(x, y, tiles) for x, y in tiles.coords])
    expected = slide_dino.embed(slide_dino.build()[0], tensor(pixels, "half"))
    torch.testing.assert_close(read_features(files[item.name])["features"], expected, atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    region, patch = hvit.RegionEncoder(4, 64, 48, 1, 3), hvit.PatchEncoder(64, 32, 64, 1, 1)
    theirs = hvit.HViT(hvit.SlideTransformer(48), region, patch)
    torch.save(theirs.to_official(), tmp_path / "local.pt")
    found = recipe.patch_encoder(tmp_path / "local.pt").state_dict()
    assert all(torch.equal(t, found[name]) for name, t in theirs.patch.state_dict().items())


def test_what_is_missing_is_said(tmp_path):
    def setting(**changes):
        return lambda: recipe.setting(given(**{"dry_run": False} | changes), tmp_path)

    root = str(tmp_path)
    refuses(
        (setting(data_root=root), "kaggle"), (setting(dataset="folder", data_root=root), "no slide"), error=MissingData
    )
    refuses((setting(devices=2), "devices = 2"), (setting(devices=2, dry_run=True), "devices = 2"))


@pytest.mark.parametrize("variant", ["local", "global"])
def test_attention_of_all_levels_is_read_region_by_region(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 1, "val": 1, "test": 1})
    synthetic.write(tmp_path, "place", 0)
    item = data.load("pocket/slides-place", tmp_path, "test")[0]
    torch.manual_seed(0)
    model = hvit.build("pocket", variant, "regression", patches=4, levels=("region", "slide"))
    patch, before = slide_dino.standardise(slide_dino.build()[0]).requires_grad_(True), set(model.trained())
    with Slide(item.path) as slide:
        tiles = tile(slide, synthetic.TILING)
        found = recipe.attention_maps(model, patch, slide, tiles, "half")
        pixels = tensor(np.stack([slide.region(x, y, tiles) for x, y in tiles.coords]), "half")
    assert set(model.trained()) == before and all(t.requires_grad for t in patch.parameters())  # nothing is frozen
    trace, whole = {}, hvit.HViT(model.slide, model.region, patch, variant)
    with torch.no_grad():
        torch.testing.assert_close(found.output, whole(pixels[None], trace=trace), atol=1e-5, rtol=1e-4)
    assert found.patch.shape == found.region.shape == (5, 32, 32)
    np.testing.assert_allclose(found.alpha, trace["pooling"][0], atol=1e-5)
    assert sorted(found.slide) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert found.region.min() >= 0 and found.region.max() < 1
    third = heatmaps.region_map(trace["region_attention"][0, 2].numpy(), 32).mean(0)
    np.testing.assert_allclose(found.region[2], third)
    mean = (found.patch + found.region + found.slide[:, None, None]) / 3
    np.testing.assert_allclose(found.factorised(0.5, variant), mean, atol=1e-6)


def test_a_variant_is_not_measured_as_the_published_method():
    assert recipe.label(parameters("hvit")) == "Local"
    assert recipe.label(parameters("hvit", position="sine", epochs=3)) == "Local, position sine, epochs 3"


@pytest.mark.parametrize(("local", "status"), [(90.0, "holds"), (88.0, "fails")])
def test_the_papers_result_is_judged_from_what_was_measured(tmp_path, local, status):
    file, row = tmp_path / "measured.csv", {"dataset": "slides/panda", "region": 2048, "head": "regression"}
    for seed, more in ((0, 1.0), (1, -1.0)):  # means over seeds
        for method, kappa in (("Local", local + more), ("Global", 89.0), ("mean pooling", 99.0)):
            rows = recipe.measured(file, row | {"method": method, "seed": seed, "kappa": kappa, "fold": 0.0})
    recipe.measured(file, row | {"method": "Global", "dataset": "folder", "seed": 0, "kappa": 99.0, "fold": 0.0})
    cells = recipe.claim_cells(recipe.measured(file))
    assert cells["Local", "PANDA 2048 regression"] == local and len(rows) == 6
    run = report.start("hvit", profile="pocket", out=str(tmp_path))
    run.claims_from_measured(cells)
    assert {entry["id"]: entry["status"] for entry in run.ledger()}["full-local"] == status
