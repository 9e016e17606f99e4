"""What MetaSegNet's notebook trains at pocket scale is what the study trains, on the images of the run's seed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from companion.evaluation.metrics import landcover as metrics
from companion.models.metasegnet import recipe
from companion.toy.ablations import metasegnet as study
from companion.toy.datasets import landcover
from companion.toy.live import metasegnet as live

SEED, LR = 1, 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A setting with a few images and three steps, and its folder."""
    path, counts, steps = tmp_path_factory.mktemp("run"), landcover.COUNTS, study.STEPS
    landcover.COUNTS = {"train": 4, "val": 2, "test": 3}
    study.STEPS = 3
    p = SimpleNamespace(profile="pocket", seed=SEED)
    rates = {("seen", method): LR for method in study.METHODS}
    yield live.setting(p, path, rates), str(path / "data")
    landcover.COUNTS, study.STEPS = counts, steps
    study.part.cache_clear()
    study.trained.cache_clear()


def test_the_zone_of_the_seed_is_left_out(found):
    setting, _ = found
    assert set(setting.tests["left out"].zones) == {study.left_out(SEED)}
    assert set(setting.tests["seen"].zones) == set(study.seen(SEED))
    assert setting.learning_rates == {"unimodal": LR, "MetaSegNet": LR}
    texts = (setting.texts("MetaSegNet", ["Csa"], kind)[0] for kind in ("", "wrong"))
    assert next(texts) == study.prompts().text("Csa") != next(texts) and setting.texts("unimodal", ["Csa"]) is None


@pytest.mark.parametrize("method", live.LIVE)
def test_live_training_is_the_studys(found, method):
    setting, root = found
    model, history = recipe.train(setting, method)
    assert len(history) == 3
    for task in study.TASKS:
        row = study.train(method, task, LR, SEED, root)
        assert round(metrics.scores(recipe.matrix(setting, model, method, task)).miou, 2) == row["mIoU"]
