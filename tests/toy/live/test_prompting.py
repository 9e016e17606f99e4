"""The live trainings of SA²VP and DPLQ at toy scale are those of their ablations."""

import pytest

from companion.models.dplq import recipe as dplq
from companion.models.sa2vp import recipe as sa2vp
from companion.toy.ablations import dplq as dplq_study
from companion.toy.ablations import sa2vp as sa2vp_study
from companion.toy.live import dplq as dplq_live
from companion.toy.live import sa2vp as sa2vp_live
from tests.conftest import parameters


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


@pytest.mark.parametrize("method", ["linear probing", "SA²VP"])
def test_sa2vp(method, tmp_path):
    learning_rates = {(sa2vp_live.TASK, live): 1e-3 for live in sa2vp_live.LIVE}
    found = sa2vp_live.setting(parameters("sa2vp", seed=3), tmp_path, learning_rates)
    assert tuple(found.learning_rates) == sa2vp_live.LIVE
    model, history = sa2vp.train(found, method, epochs=0.2)
    assert len(history) == 10 and not (tmp_path / "checkpoints").exists()
    expected = sa2vp_study.train(method, sa2vp_live.TASK, 1e-3, 3, str(tmp_path / "data"), epochs=0.2)
    assert round(sum(row["loss"] for row in history) / 10, 4) == expected["loss"]
    accuracy = sa2vp.accuracy(model, found.test, found.options["hardware"])
    assert accuracy == pytest.approx(expected["accuracy"], abs=0.3)
