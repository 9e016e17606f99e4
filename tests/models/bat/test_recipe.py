"""BAT's recipe: what is trained and how, weights and results by name, scores of result files."""

import numpy as np
import pytest
import torch

from companion import backbones
from companion.data import tracking as data
from companion.errors import CompanionError, CorruptFile, MissingData, MissingWeights
from companion.models.bat import BAT, OSTrack, official, recipe
from companion.toy.encoders import tracker as pocket
from companion.training import recipe as training
from companion.training.hardware import CPU
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers import bat


def given(**changes):
    return parameters("bat", **{"profile": "paper", "accelerator": "cpu"} | changes)


def trained(out, **changes):
    return training.run(recipe.training(given(**changes), CPU), out)


@pytest.fixture
def videos(monkeypatch) -> list:
    """Every dataset is one generated video of 24 frames; the list holds the sets and splits asked for."""
    video, asked = recipe.Generated("one", np.random.default_rng(0), 24), []
    monkeypatch.setattr(data, "load", lambda name, root, split: asked.append((name, split)) or [video])
    return asked


@pytest.fixture
def small(videos, monkeypatch) -> list:
    """The pocket tracker in place of OSTrack-256, two steps of four pairs; the list holds the weights asked for."""
    asked = []
    monkeypatch.setattr(recipe, "foundation", lambda weights: asked.append(weights) or pocket.build())
    for name, value in {"PAIRS": 8, "BATCH": 4, "EVENT_BATCH": 4, "EPOCHS": 1, "WORKERS": 0}.items():
        monkeypatch.setattr(recipe, name, value)
    return asked


def test_the_paper_profile_names_what_is_missing(tmp_path, videos, monkeypatch):
    refuses(
        (lambda: recipe.run(given(data_root=str(tmp_path)), tmp_path), r"OSTrack_ep0300\.pth\.tar"),
        (lambda: recipe.run(given(checkpoint=str(tmp_path / "none.pth")), tmp_path), r"BAT_rgbt\.pth"),
        error=MissingWeights,
    )
    # a checkpoint holds BAT's weights, whatever the method's name
    refuses((lambda: recipe.run(given(checkpoint="x.pth", method="RGB only"), tmp_path), "RGB only"))
    monkeypatch.undo()
    refuses((lambda: recipe.run(given(data_root=str(tmp_path)), tmp_path), "LasHeR"), error=MissingData)


def test_results_are_means_over_seeds_and_the_authors_weights_have_a_row_of_their_own(tmp_path):
    row = {"method": "BAT", "weights": "trained here", "dataset": "rgbt/lasher", "seed": 0, "PR": 70.0, "SR": 56.0}
    released = {"method": "BAT", "weights": "authors' weights", "dataset": "rgbt/rgbt234", "seed": 0, "MPR": 86.8}
    for one in (row | {"PR": 1.0}, row, row | {"seed": 1, "PR": 68.0}, released):
        rows = recipe.RESULTS.measured(tmp_path / "measured.csv", one)
    assert recipe.RESULTS.claimed(rows) == {
        ("BAT, trained here", "LasHeR_PR"): 69.0,
        ("BAT, trained here", "LasHeR_SR"): 56.0,
        ("BAT, authors' weights", "RGBT234_MPR"): 86.8,
    }


def test_trained_weights_are_a_checkpoint_and_belong_to_their_foundation(tmp_path, small, monkeypatch):
    model, history = trained(tmp_path)
    assert len(history) == 2
    file = tmp_path / "trained" / "BAT, rgbt, seed 0.safetensors"
    assert backbones.read_state(file).keys() == model.to_official().keys()
    official = BAT.from_official
    monkeypatch.setattr(BAT, "from_official", lambda state: official(state, heads=4))
    read, none = trained(tmp_path, checkpoint=str(file))
    assert none == [] and all(torch.equal(t, read.state_dict()[n]) for n, t in model.state_dict().items())
    other: OSTrack = pocket.build()
    with torch.no_grad():
        other.vit.blocks[0].mlp.fc1.weight.mul_(0.5)
    monkeypatch.setattr(recipe, "foundation", lambda weights: other)
    trained(tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2, "another foundation is another training"


def test_result_files_are_scored(tmp_path):
    truth = data.ground_truth("rgbt/rgbt234")
    for sequence in truth:
        data.write_results(tmp_path / "RGBT234" / f"{sequence.name}.txt", sequence.boxes)
    cells = recipe.rescored(given(results=str(tmp_path)).results)  # as the notebook does
    assert {column for _, column in cells} == {"RGBT234_MPR", "RGBT234_MSR"}
    assert cells["result files, scored here", "RGBT234_MPR"] > 99.9
    first = tmp_path / "RGBT234" / f"{truth[0].name}.txt"
    first.write_text("1,2,x,4\n")
    refuses((lambda: recipe.rescored(tmp_path), first.name), error=CorruptFile)
    first.unlink()
    refuses((lambda: recipe.rescored(tmp_path), truth[0].name), error=CompanionError)
    refuses((lambda: recipe.rescored(tmp_path / "RGBT234"), "LasHeR"))


def test_a_test_set_alone_is_rehearsed(tmp_path, monkeypatch):
    bat.write("rgbt/lasher", tmp_path, monkeypatch)
    bat.without_training(tmp_path)
    found = recipe.test_videos(given(dry_run=True, data_root=str(tmp_path)))
    assert [video.name for video in found] == ["bike", "head"]


@pytest.mark.parametrize("dataset", ["rgbt/lasher", "rgbt/gtot", "rgbe/visevent"])
def test_sets_without_training_videos_are_tested_after_a_training_on_lasher(dataset, tmp_path, small, videos):
    file = tmp_path / "weights" / "OSTrack_ep0300.pth.tar"
    file.parent.mkdir()
    file.touch()
    recipe.run(given(data_root=str(tmp_path), dataset=dataset), tmp_path)
    read = "rgbt/lasher" if dataset == "rgbt/gtot" else dataset
    assert small == [file] and videos == [(dataset, "test"), (read, "train")]
    assert official.ostrack_file("mine.pth", tmp_path, dry_run=False) == "mine.pth"
