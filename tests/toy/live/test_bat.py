"""What BAT's notebook trains and tracks live at the `pocket` profile."""

import functools

import pytest

from companion.toy.ablations import bat as ablation
from companion.toy.live import bat as live
from tests.conftest import parameters


def test_the_live_run_is_the_row_of_the_ablations(tmp_path, monkeypatch):
    assert set(live.METHODS) <= set(ablation.METHODS)
    monkeypatch.setattr(ablation, "fit", functools.partial(ablation.fit, epochs=0.02))
    monkeypatch.setattr(ablation, "PAIRS", 3200)
    settings = ablation.fit.keywords
    monkeypatch.setattr(ablation, "fit", lambda *args, fit=ablation.fit.func, **own: fit(*args, **own | settings))
    found = live.setting(parameters("bat", seed=3), tmp_path, {("videos", "BAT"): 1e-2})
    for method in ("higher peak", "BAT"):
        model, history = found.train(method)
        row = ablation.train(method, "videos", 1e-2, 3, str(tmp_path / "data"))
        totals = found.scores(found.track(method, model)).totals
        assert {name: round(value, 2) for name, value in totals.items()} == {name: row[name] for name in totals}
        assert len(history) == (2 if method == "BAT" else 0)
    with pytest.raises(KeyError):
        live.setting(parameters("bat", seed=3), tmp_path, {}).train("BAT")
