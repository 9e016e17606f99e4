"""What MetaSegNet's notebook trains at pocket scale is what the study trains, on the images of the run's seed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from companion.evaluation.metrics import landcover as metrics
from companion.toy.ablations import metasegnet as study
from companion.toy.datasets import landcover
from companion.toy.live import metasegnet as runs

SEED, RATE = 1, 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A setting with a few images and three steps, and its folder."""
    path, counts, steps = tmp_path_factory.mktemp("run"), landcover.COUNTS, study.STEPS
    landcover.COUNTS = {"train": 4, "val": 2, "test": 3}
    study.STEPS = 3
    p = SimpleNamespace(profile="pocket", seed=SEED)
    rates = {("seen", method): RATE for method in study.METHODS}
    yield runs.setting(p, path, rates), str(path / "data")
    landcover.COUNTS, study.STEPS = counts, steps
    study.part.cache_clear()
    study.trained.cache_clear()


def test_the_zone_of_the_seed_is_left_out(found):
    setting, _ = found
    assert set(setting.tests["left out"].zones) == {study.left_out(SEED)}
    assert set(setting.tests["seen"].zones) == set(study.seen(SEED))
    assert setting.methods == ("unimodal", "MetaSegNet") and setting.rates == dict.fromkeys(setting.methods, RATE)


@pytest.mark.parametrize("method", runs.LIVE)
def test_live_training_is_the_studys(found, method):
    setting, root = found
    model, history = runs.train(setting, method)
    assert len(history) == 3
    for task in study.TASKS:
        row = study.train(method, task, RATE, SEED, root)
        assert round(metrics.scores(runs.matrix(setting, model, method, task)).miou, 2) == row["mIoU"]
