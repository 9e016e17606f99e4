"""Checkpoints and weights of a run are identified by their training and data alone; a killed recipe resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from companion.errors import BadParameter
from companion.training import fit as loop
from companion.training.checkpoints import checkpoint_key, save, trained_state
from companion.training.recipe import run
from tests.conftest import interrupted, parameters
from tests.models.common import refuses
from tests.papers.common import shrink
from tests.training.test_fit import same
from tests.training.test_precision import CASES

LONG = ("dmt, detect", "dmt, segment", "sic_cads")


def test_a_killed_recipe_resumes_to_the_same_weights_and_a_finished_one_is_only_read(tmp_path, monkeypatch):
    """SA²VP on a folder of images: 16 in batches of 4, two epochs, killed in step 6."""

    def train(out):
        p = parameters("sa2vp", profile="paper", accelerator="cpu", dataset="folder", data_root=images, batch=4)
        training = recipe.training(p, recipe.data(p))
        return run(replace(training, every=2), tmp_path / out, epochs=2)

    recipe, images = shrink("sa2vp", monkeypatch), str(tmp_path / "images")
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    whole, history = train("whole")
    with interrupted(monkeypatch, recipe, "loss", 5):
        train("killed")
    (rows,) = (tmp_path / "killed" / "checkpoints").glob("*.csv")
    assert len(rows.read_text().splitlines()) == 1 + 4 and not (tmp_path / "killed" / "trained").exists()
    for loss in (recipe.loss, lambda *given: pytest.fail("a finished training is only read")):
        monkeypatch.setattr(recipe, "loss", loss)
        resumed, again = train("killed")
        assert len(again) == 8 and again == history and same(resumed, whole)
    (saved,) = (tmp_path / "killed" / "trained").iterdir()
    expected, found = trained_state(whole), load_file(saved)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CASES])
def test_a_killed_training_of_each_paper_takes_the_steps_after_its_checkpoint_alone(name, tmp_path, monkeypatch):
    """Two steps, or more trainings of two, with a checkpoint after each; killed in the second."""

    def train(out):
        if slug == "ecamp" and task == "pre-train":
            run(recipe.pretraining(p, out, real=False), out)
        elif slug == "ecamp":
            run(recipe.downstream(p, real=False)[0], out)
        elif slug == "dmt":
            run((recipe.distillation if task == "distil" else recipe.downstream)(p, out, real=False)[1], out)
        else:
            recipe.run(p, out)

    slug, _, task = name.partition(", ")
    recipe, usual = shrink(slug, monkeypatch), {"profile": "paper", "dry_run": True, "accelerator": "cpu"}
    p = parameters(slug, **usual | {"data_root": "nowhere"} | CASES[name].changes)
    monkeypatch.setattr("companion.training.checkpoints.LONGEST", 0)
    with interrupted(monkeypatch, loop, "_backward", 1):
        train(tmp_path)
    steps, backward = [], loop._backward
    monkeypatch.setattr(loop, "_backward", lambda *args: steps.append(1) or backward(*args))
    train(tmp_path)
    assert len(steps) % 2 == 1, "all but the first"


def test_a_key_is_the_same_for_the_same_facts_alone(tmp_path, monkeypatch):
    def model(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    facts = {"model": model(), "images": ["a.png"], "labels": torch.zeros(3), "root": tmp_path / "data", "width": 8}
    one = checkpoint_key(**facts)
    assert checkpoint_key(**dict(reversed(facts.items()))) == one
    monkeypatch.chdir(tmp_path)  # a path is where it is, whatever folder the run was started in
    assert checkpoint_key(**facts | {"model": model(), "labels": torch.zeros(3), "root": Path("data")}) == one
    others = {"model": model(1), "images": ["b.png"], "labels": torch.ones(3), "root": tmp_path, "width": 8.5}
    assert len({one} | {checkpoint_key(**facts | {name: value}) for name, value in others.items()}) == 6
    assert checkpoint_key(**facts | {"labels": torch.zeros(3, dtype=torch.int32)}) != one
    refuses((lambda: checkpoint_key(fact=object()), "object"))


def test_weights_are_whole_or_not_there(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    path = save(tmp_path / "trained", "ViT-L/14", {"a": tensor.mT, "b": tensor, "also b": tensor})
    assert path.name == "ViT-L-14.safetensors"
    found = load_file(path)
    assert torch.equal(found["a"], tensor.mT) and torch.equal(found["also b"], found["b"])
    with pytest.raises(BadParameter, match="state"):
        save(tmp_path / "trained", "x", {"a": 1})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
