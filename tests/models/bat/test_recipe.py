"""BAT's recipe: the published settings, resuming, missing files, result files, tables of results."""

import numpy as np
import pytest
import torch

from companion import backbones
from companion.data import tracking as data
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData, MissingWeights
from companion.models.bat import BAT, OSTrack, recipe
from companion.models.bat import model as bat
from companion.ops import report
from companion.toy.encoders import tracker as pocket
from companion.training.checkpoints import Checkpoint
from tests.conftest import parameters
from tests.models.common import assert_goes_on, refuses


def given(**changes):
    return parameters("bat", **{"profile": "paper", "accelerator": "cpu"} | changes)


@pytest.fixture
def videos(monkeypatch) -> None:
    """Every dataset is one generated video of 24 frames."""
    video = recipe._Generated("one", np.random.default_rng(0), 24)
    video.visible = ("a frame",) * 24  # only its length is read
    monkeypatch.setattr(data, "load", lambda *args, **options: [video])


@pytest.fixture
def small(videos, monkeypatch) -> list:
    """The pocket tracker in place of OSTrack-256, six steps of four pairs; the list holds the weights asked for."""
    asked = []
    monkeypatch.setattr(bat, "foundation", lambda weights: asked.append(weights) or pocket.build())
    for name, value in {"PAIRS": 8, "BATCH": 4, "EPOCHS": 3, "WORKERS": 0}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(Checkpoint.of.__func__, "__defaults__", (2,))
    return asked


def test_the_paper_profile_names_what_is_missing(tmp_path, videos, monkeypatch):
    refuses(
        (lambda: recipe.setting(given(data_root=str(tmp_path)), tmp_path), r"OSTrack_ep0300\.pth\.tar"),
        (lambda: recipe.setting(given(checkpoint=str(tmp_path / "none.pth")), tmp_path), r"BAT_rgbt\.pth"),
        error=MissingWeights,
    )
    refuses((lambda: recipe.setting(given(checkpoint="x.pth", method="RGB only"), tmp_path), "BAT with a checkpoint"))
    monkeypatch.undo()
    refuses((lambda: recipe.setting(given(data_root=str(tmp_path)), tmp_path), "LasHeR"), error=MissingData)


def test_results_are_means_over_seeds_and_the_authors_weights_have_a_row_of_their_own(tmp_path):
    row = {"method": "BAT", "weights": "trained here", "dataset": "rgbt/lasher", "seed": 0, "PR": 70.0, "SR": 56.0}
    released = {"method": "BAT", "weights": "authors' weights", "dataset": "rgbt/rgbt234", "seed": 0, "MPR": 86.8}
    for one in (row | {"PR": 1.0}, row, row | {"seed": 1, "PR": 68.0}, released):
        rows = recipe.measured(tmp_path / "measured.csv", one)
    assert recipe.cells(rows) == {
        ("BAT, trained here", "LasHeR_PR"): 69.0,
        ("BAT, trained here", "LasHeR_SR"): 56.0,
        ("BAT, authors' weights", "RGBT234_MPR"): 86.8,
    }


def test_the_published_settings(tmp_path, videos, monkeypatch):
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "OSTrack_ep0300.pth.tar"
    torch.save({"net": {}}, file)
    assert recipe.weights(given(data_root=str(tmp_path))) == file
    assert recipe.weights(given(data_root=str(tmp_path), weights="mine.pth")) == "mine.pth"
    asked, seen = [], {}
    monkeypatch.setattr(bat, "foundation", lambda weights: asked.append(weights) or pocket.build())
    monkeypatch.setattr(recipe, "fit", lambda model, loss, pairs, **options: seen.update(options, pairs=pairs) or [])
    model, _ = recipe.setting(given(data_root=str(tmp_path)), tmp_path).train("BAT")
    assert asked == [file] and len(seen["pairs"]) == 60_000
    assert (seen["epochs"], seen["batch"], seen["hardware"].workers) == (60, 96, 8)
    assert [callback.max_norm for callback in seen["callbacks"]] == [0.1]
    (group,) = seen["optimizer"](model).param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (4e-4, 1e-4, len(model.trained()))
    assert seen["schedule"](4e-4, 60, 1).tolist() == [4e-4] * 48 + [4e-5] * 12


@pytest.mark.parametrize("method", recipe.METHODS)
def test_only_two_methods_are_trained(method, tmp_path, small):
    """And what is not trained needs no training videos."""
    found = recipe.setting(given(method=method), tmp_path)
    model, history = found.train(method)
    trained = method in ("BAT", "full fine-tuning")
    assert len(history) == (6 if trained else 0) and (tmp_path / "trained").exists() == trained
    if trained:
        assert {"loss", "focal", "giou", "l1"} <= history[0].keys()
    boxes = recipe.follow_in_memory(model, found.videos, method, recipe.Hardware("cpu"))
    assert boxes["one"].shape == (24, 4) and set(found.scores(boxes).totals) == {"PR", "NPR", "SR"}


def test_crops_are_normalised_where_the_loss_is_computed():
    model, generator = BAT(pocket.build()).eval(), torch.Generator().manual_seed(0)
    crops = [torch.randint(256, (2, 6, side, side), dtype=torch.uint8, generator=generator) for side in (32, 64)]
    boxes = torch.tensor([[0.4, 0.4, 0.2, 0.2]]).repeat(2, 1)
    found = [recipe.loss(model, (*batch, boxes))["loss"] for batch in (crops, map(data.normalise, crops))]
    assert torch.equal(*found) and found[0].isfinite()


def test_the_dry_run_takes_two_steps(tmp_path, small):
    found = recipe.setting(given(dry_run=True), tmp_path)
    model, history = found.train("BAT")
    assert small == ["random"] and len(history) == 2 and "dry run" in found.title
    assert found.track("BAT", model)["generated 2"].shape == (4, 4)
    assert recipe.setting(given(dry_run=True, method="higher peak"), tmp_path).train("higher peak")[1] == []


def test_a_killed_training_resumes_and_its_weights_are_a_checkpoint(tmp_path, small, monkeypatch):
    def train(out, **changes):
        return recipe.setting(given(**changes), out).train("BAT")

    model, out = assert_goes_on(train, tmp_path, monkeypatch, recipe, "loss", 3)
    monkeypatch.setattr(recipe, "loss", None)  # a finished training is only read
    official, file = BAT.from_official, out / "trained" / "BAT, rgbt, seed 0.safetensors"
    monkeypatch.setattr(BAT, "from_official", lambda state: official(state, heads=4))
    assert train(tmp_path, checkpoint=str(file))[1] == []
    for read in (train(out)[0], train(tmp_path, checkpoint=str(file))[0]):
        assert all(torch.equal(t, read.state_dict()[n]) for n, t in model.state_dict().items())
    assert backbones.read_state(file).keys() == model.to_official().keys()


def test_a_training_on_another_foundation_has_a_checkpoint_of_its_own(tmp_path, small, monkeypatch):
    recipe.setting(given(), tmp_path).train("BAT")
    other: OSTrack = pocket.build()
    with torch.no_grad():
        other.vit.blocks[0].mlp.fc1.weight.mul_(0.5)
    monkeypatch.setattr(bat, "foundation", lambda weights: other)
    recipe.setting(given(), tmp_path).train("BAT")
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2


def test_seeds_and_released_weights_have_results_of_their_own(tmp_path, small, monkeypatch):
    folders = []
    monkeypatch.setattr(recipe, "run", lambda model, videos, folder, **options: folders.append(folder.name))
    (tmp_path / "BAT.pth").write_bytes(b"")
    monkeypatch.setattr(backbones, "read_state", lambda path: {})
    for changes in ({}, {"seed": 1}, {"checkpoint": str(tmp_path / "BAT.pth")}):
        recipe.setting(given(**changes), tmp_path).track("BAT", None)
    assert folders == ["BAT, rgbt, seed 0", "BAT, rgbt, seed 1", "BAT"]


def test_result_files_are_scored(tmp_path):
    truth = data.ground_truth("rgbt/rgbt234")
    for sequence in truth:
        data.write_results(tmp_path / "RGBT234" / f"{sequence.name}.txt", sequence.boxes)
    found = recipe.rescore(tmp_path)
    assert list(found) == ["rgbt/rgbt234"] and found["rgbt/rgbt234"].totals["MPR"] > 99.9
    table = recipe.attributes(found["rgbt/rgbt234"], "rgbt/rgbt234")
    assert table.attribute.iloc[0] == "BC" and table.sequences.iloc[0] == 54
    first = tmp_path / "RGBT234" / f"{truth[0].name}.txt"
    first.write_text("1,2,x,4\n")
    with pytest.raises(CorruptFile, match="line 1"):
        recipe.rescore(tmp_path)
    first.unlink()
    with pytest.raises(CompanionError, match=truth[0].name):
        recipe.rescore(tmp_path)
    with pytest.raises(BadParameter, match="LasHeR/<sequence>"):
        recipe.rescore(tmp_path / "RGBT234")


@pytest.mark.parametrize(("sr", "status"), [(55.8, "holds"), (55.7, "fails")])
def test_the_papers_result_is_judged_from_what_was_measured(tmp_path, sr, status):
    file, row = tmp_path / "measured.csv", {"method": "BAT", "weights": "trained here"}
    for seed, more in ((0, 0.2), (1, -0.2)):  # means over seeds
        lasher = {"dataset": "rgbt/lasher", "seed": seed, "PR": 70.0, "NPR": 66.0, "SR": sr + more}
        rows = recipe.measured(file, row | lasher)
        rows = recipe.measured(file, row | {"dataset": "rgbt/rgbt234", "seed": seed, "MPR": 86.5, "MSR": 64.0})

    def judged(cells) -> str:
        run = report.start("bat", profile="pocket", out=str(tmp_path))
        run.claims_from_measured(cells)
        return {entry["id"]: entry["status"] for entry in run.ledger()}["retrained"]

    assert judged(recipe.claim_cells(rows)) == status
    other = rows.assign(weights="weights of BAT_rgbt.pth")  # the authors' weights are no training
    assert judged(recipe.claim_cells(other)) == "not run"


def test_visevent_has_the_batch_of_four_processes(tmp_path, videos, monkeypatch):
    seen = {}
    monkeypatch.setattr(bat, "foundation", lambda weights: pocket.build())
    monkeypatch.setattr(recipe, "fit", lambda model, loss, pairs, **options: seen.update(options) or [])
    recipe.setting(given(dataset="rgbe/visevent", data_root=str(tmp_path)), tmp_path).train("BAT")
    assert seen["batch"] == 128
