"""The settings that BAT's notebook runs with: the published recipe, what is missing said, result files scored."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from companion import backbones
from companion.data import tracking as data
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData, MissingWeights
from companion.models.bat import model as bat
from companion.models.bat import recipe as runs
from companion.toy.ablations import bat as study


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=0,
        method="BAT",
        dataset="rgbt/lasher",
        checkpoint="",
        results="",
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


@pytest.fixture
def videos(monkeypatch) -> None:
    """Every data set is one generated video of 24 frames."""
    frames = np.random.default_rng(0).integers(256, size=(24, 60, 80, 6), dtype=np.uint8)
    video = runs._Generated("one", frames, np.tile([20.0, 20.0, 16.0, 12.0], (24, 1)))
    video.visible = ("a frame",) * len(frames)  # that it could be read is not asked here
    monkeypatch.setattr(data, "load", lambda *args, **options: [video])


def test_the_paper_profile_says_what_is_missing(tmp_path, videos, monkeypatch):
    with pytest.raises(MissingWeights, match=r"OSTrack_ep0300\.pth\.tar"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})
    with pytest.raises(MissingWeights, match=r"BAT_rgbt\.pth"):
        runs.setting(given(checkpoint=str(tmp_path / "none.pth")), tmp_path, {})
    with pytest.raises(BadParameter, match="BAT with a checkpoint"):
        runs.setting(given(checkpoint="x.pth", method="RGB only"), tmp_path, {})
    monkeypatch.undo()
    with pytest.raises(MissingData, match="LasHeR"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})


def test_the_published_recipe(tmp_path, videos, monkeypatch):
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "OSTrack_ep0300.pth.tar"
    torch.save({"net": {}}, file)
    assert runs.weights(given(data_root=str(tmp_path))) == file
    assert runs.weights(given(data_root=str(tmp_path), weights="mine.pth")) == "mine.pth"
    monkeypatch.setattr(bat, "foundation", lambda name, weights: asked.append((name, weights)) or "tracker")
    asked = []
    found = runs.setting(given(data_root=str(tmp_path)), tmp_path, {})
    assert asked == [("ostrack_b256", file)]
    assert len(found.train) == 60_000 and found.rates == {"BAT": 4e-4}
    expected = {
        "epochs": 60,
        "batch": 96,
        "schedule": "step",
        "warmup": 0.0,
        "final_lr": 4e-5,
        "clip": 0.1,
        "weight_decay": 1e-4,
        "decay": "all",
    }
    assert {k: found.fit[k] for k in expected} == expected
    # what is not trained needs no training videos
    assert runs.setting(given(data_root=str(tmp_path), method="higher peak"), tmp_path, {}).train is None


@pytest.mark.parametrize("method", study.UNTRAINED)
def test_the_dry_run_trains_only_what_has_something_to_train(method, tmp_path, monkeypatch):
    monkeypatch.setattr(bat, "foundation", lambda name, weights: None)
    assert runs.setting(given(method=method, dry_run=True), tmp_path, {}).rates == {}
    assert runs.setting(given(dry_run=True), tmp_path, {}).rates == {"BAT": 4e-4}


def test_a_checkpoint_is_tested_and_not_trained(tmp_path, videos):
    small = bat.BAT(bat.foundation("pocket_ostrack"), width=4)
    torch.save({"net": small.to_official(), "epoch": 60}, tmp_path / "BAT.pth")
    found = runs.setting(given(checkpoint=str(tmp_path / "BAT.pth")), tmp_path, {})
    with pytest.MonkeyPatch.context() as patch:
        official = bat.BAT.from_official
        patch.setattr(bat.BAT, "from_official", lambda state: official(state, heads=4))
        model, history = runs.train(found, "BAT")
    assert history == [] and len(model.trained()) == len(small.trained())
    boxes = runs.track(found, "BAT", model, tmp_path)
    assert boxes["one"].shape == (24, 4) and set(runs.scores(found, boxes).totals) == {"PR", "NPR", "SR"}


@pytest.fixture
def small(tmp_path, videos, monkeypatch):
    """The paper profile's setting by seed, at pocket size: eight pairs of noise, two steps an epoch."""
    official = bat.foundation
    monkeypatch.setattr(bat, "foundation", lambda name, weights: official("pocket_ostrack"))
    generator = torch.Generator().manual_seed(0)
    noise = TensorDataset(
        *(torch.randint(256, (8, 6, side, side), generator=generator, dtype=torch.uint8) for side in (32, 64)),
        torch.tensor([[0.4, 0.4, 0.2, 0.2]]).repeat(8, 1),
    )

    def setting(seed: int = 0):
        found = runs.setting(given(seed=seed, data_root=str(tmp_path)), tmp_path, {})
        return replace(found, train=noise, loss=study.loss, fit=found.fit | {"batch": 4, "epochs": 3, "workers": 0})

    return setting


def test_a_stopped_training_goes_on_and_a_finished_one_is_kept(tmp_path, small):
    whole, history = runs.train(replace(small(), kept=None), "BAT")
    assert len(history) == 6 and not (tmp_path / "trained").exists()

    class Killed(Exception):
        pass

    steps = itertools.count()

    def killed(model, batch):
        if next(steps) == 3:
            raise Killed
        return study.loss(model, batch)

    with pytest.raises(Killed):
        runs.train(replace(small(), loss=killed), "BAT", checkpoint_every=2)
    asked = itertools.count()
    counted = replace(small(), loss=lambda model, batch: (next(asked), study.loss(model, batch))[1])
    model, history = runs.train(counted, "BAT")
    assert len(history) == 6 and next(asked) == 4  # from the checkpoint of the second step on
    again, history = runs.train(counted, "BAT")
    assert len(history) == 6 and next(asked) == 5  # nothing was trained
    kept = backbones.read_state(tmp_path / "trained" / "BAT, seed 0.safetensors")
    read = bat.BAT.from_official(kept, heads=4)
    for one in (model, again, read):
        assert all(torch.equal(t, one.state_dict()[n]) for n, t in whole.state_dict().items())


def test_what_was_trained_on_another_foundation_is_not_taken(tmp_path, small, monkeypatch):
    first, _ = runs.train(small(), "BAT")
    other = bat.foundation("pocket_ostrack", "")
    with torch.no_grad():
        other.vit.blocks[0].mlp.fc1.weight.mul_(0.5)
    monkeypatch.setattr(bat, "foundation", lambda name, weights: other)
    second, _ = runs.train(small(), "BAT")
    assert len(list((tmp_path / "trained").glob("*.pt"))) == 2
    name = "exchanges.0.mlp.adapters.0.up.weight"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])


def test_seeds_and_released_weights_have_results_of_their_own(tmp_path, small, monkeypatch):
    followed = []
    monkeypatch.setattr(runs, "run", lambda model, videos, folder, **options: followed.append(folder))
    for found in (small(0), small(1), replace(small(), rates={}, train=None)):
        found.videos[:] = ["a video on disk"]
        runs.track(found, "BAT", None, tmp_path)
    assert [folder.name for folder in followed] == ["BAT, seed 0", "BAT, seed 1", "BAT"]


@pytest.mark.parametrize("method", ["BAT", "full fine-tuning", "sum of features", "higher peak", "thermal only"])
def test_every_method_is_built_on_the_foundation(method):
    model = runs.build(given(), method, bat.foundation("pocket_ostrack"))
    with torch.inference_mode():
        assert model.eval()(torch.randn(2, 6, 32, 32), torch.randn(2, 6, 64, 64)).box.shape == (2, 4)


def test_result_files_are_scored(tmp_path):
    truth = data.ground_truth("rgbt/rgbt234")
    for sequence in truth:
        data.write_results(tmp_path / "RGBT234" / f"{sequence.name}.txt", sequence.boxes)
    found = runs.rescore(tmp_path)
    assert list(found) == ["rgbt/rgbt234"] and found["rgbt/rgbt234"].totals["MPR"] > 99.9
    table = runs.attributes(found["rgbt/rgbt234"], "rgbt/rgbt234")
    assert table.attribute.iloc[0] == "BC" and table.sequences.iloc[0] == 54
    (tmp_path / "RGBT234" / f"{truth[0].name}.txt").write_text("1,2,x,4\n")
    with pytest.raises(CorruptFile, match="line 1"):
        runs.rescore(tmp_path)
    (tmp_path / "RGBT234" / f"{truth[0].name}.txt").unlink()
    with pytest.raises(CompanionError, match=truth[0].name):
        runs.rescore(tmp_path)
    with pytest.raises(BadParameter, match="LasHeR/<sequence>"):
        runs.rescore(tmp_path / "RGBT234")


def test_results_gather(tmp_path):
    path = tmp_path / "measured.csv"
    row = {"method": "BAT", "weights": "trained here", "dataset": "rgbt/lasher", "seed": 0, "PR": 70.0, "SR": 56.0}
    runs.measured(path, row)
    rows = runs.measured(path, row | {"seed": 1, "PR": 68.0})
    rows = runs.measured(
        path, {"method": "BAT", "weights": "authors' weights", "dataset": "rgbt/rgbt234", "seed": 0, "MPR": 86.8}
    )
    assert runs.cells(rows) == {
        ("BAT, trained here", "LasHeR_PR"): 69.0,
        ("BAT, trained here", "LasHeR_SR"): 56.0,
        ("BAT, authors' weights", "RGBT234_MPR"): 86.8,
    }
    pd.testing.assert_frame_equal(pd.read_csv(path), rows.reset_index(drop=True), check_dtype=False)
