"""The live trainings of BAT, PromptPAR, SA²VP and DPLQ at toy scale are those of their ablations, on few images."""

import pytest
import torch

from companion.models.dplq import recipe as dplq
from companion.models.sa2vp import recipe as sa2vp
from companion.toy.ablations import bat as bat_study
from companion.toy.ablations import dplq as dplq_study
from companion.toy.ablations import promptpar as promptpar_study
from companion.toy.ablations import sa2vp as sa2vp_study
from companion.toy.datasets import pedestrians
from companion.toy.live import bat as bat_live
from companion.toy.live import dplq as dplq_live
from companion.toy.live import promptpar as promptpar_live
from companion.toy.live import sa2vp as sa2vp_live
from tests.conftest import parameters
from tests.small import few_images

RATES = dict.fromkeys((("street", method) for method in promptpar_live.METHODS), 3e-2)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    few_images(monkeypatch)


def test_bat(tmp_path, monkeypatch):
    assert set(bat_live.METHODS) <= set(bat_study.METHODS)
    monkeypatch.setattr(bat_study, "PAIRS", 64)
    found = bat_live.setting(parameters("bat", seed=3), tmp_path, {("videos", "BAT"): 1e-2})
    for method in ("higher peak", "BAT"):
        model, history = found.train(method)
        row = bat_study.train(method, "videos", 1e-2, 3, str(tmp_path / "data"))
        totals = found.scores(found.track(method, model)).totals
        assert {name: round(value, 2) for name, value in totals.items()} == {name: row[name] for name in totals}
        assert len(history) == (2 if method == "BAT" else 0)
    with pytest.raises(KeyError):
        bat_live.setting(parameters("bat", seed=3), tmp_path, {}).train("BAT")
    own = bat_live.own_video(parameters("bat", seed=3), tmp_path)
    assert own.name == found.videos[0].name and len(own.visible) == len(own.infrared) == len(own.boxes)


def test_dplq(tmp_path):
    learning_rates = {(dplq_live.TASK, method): 1e-2 for method in dplq_study.METHODS}
    found = dplq_live.setting(parameters("dplq", seed=3), tmp_path, learning_rates)
    assert found.methods == dplq_live.LIVE and set(found.learning_rates) == {"MaPLe", "DPLQ"}
    model, history = dplq.train(found, "DPLQ", epochs=1)
    assert len(history) == 8
    scores = dplq.scores(model, found, "DPLQ")
    expected = dplq_study.train("DPLQ", dplq_live.TASK, 1e-2, 3, str(tmp_path / "data"), epochs=1)
    assert {name: round(value, 2) for name, value in scores.items()} == {n: expected[n] for n in scores}
    images, labels, domain = dplq.first(found, "DPLQ", "novel", 5)
    assert images.shape == (5, 3, 32, 32) and labels.shape == (5,) and len(domain) == 5
    assert model(images, domain).shape == (5, len(found.classes))


def test_promptpar(tmp_path, monkeypatch):
    """The same images, initialisation and steps as the row with this seed and learning rate."""
    assert set(promptpar_live.METHODS) <= set(promptpar_study.TASKS[promptpar_live.TASK])
    found = promptpar_live.setting(parameters("promptpar", seed=3), tmp_path, RATES)
    assert found.methods == promptpar_live.METHODS and found.names == pedestrians.ATTRIBUTES
    assert {part: len(data) for part, data in found.parts.items()} == {"train": 200, "test": 40}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["seed3"]
    monkeypatch.setattr(promptpar_study, "EPOCHS", 2)
    model, history = found.train("PromptPAR")
    row = promptpar_study.train("PromptPAR", "street", 3e-2, 3, str(tmp_path / "data"))
    scores = found.scores(model)
    assert {name: round(value, 2) for name, value in scores.totals.items()} == {n: row[n] for n in scores.totals}
    assert len(history) == 12 and model.count() == row["trained"]
    images, truth = found.first("test", 5)
    assert images.shape == (5, 3, 64, 32) and torch.equal(truth, found.parts["test"].tensors[1][:5])
    assert model.maps(images).regions.shape == (5, 5, 8, 4)
    with pytest.raises(KeyError):
        promptpar_live.setting(parameters("promptpar", seed=3), tmp_path, {}).train("heads only")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The images are written once."""
    return tmp_path_factory.mktemp("sa2vp")


@pytest.mark.parametrize("method", ["linear probing", "SA²VP"])
def test_sa2vp(method, out, monkeypatch):
    monkeypatch.setattr(sa2vp_study, "TASKS", [sa2vp_live.TASK])
    learning_rates = {(sa2vp_live.TASK, live): 1e-3 for live in sa2vp_live.LIVE}
    found = sa2vp_live.setting(parameters("sa2vp", seed=3), out, learning_rates)
    assert tuple(found.learning_rates) == sa2vp_live.LIVE
    model, history = sa2vp.train(found, method, epochs=0.2)
    assert len(history) == 10 and not (out / "checkpoints").exists()
    expected = sa2vp_study.train(method, sa2vp_live.TASK, 1e-3, 3, str(out / "data"), epochs=0.2)
    assert round(sum(row["loss"] for row in history) / 10, 4) == expected["loss"]
    accuracy = sa2vp.accuracy(model, found.test, found.options["hardware"])
    assert accuracy == pytest.approx(expected["accuracy"], abs=0.3)
