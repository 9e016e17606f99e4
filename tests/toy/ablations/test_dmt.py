"""DMT's ablations: equal initial students, the tensors that each method trains, probes and leads."""

import pytest
import torch

from companion.models.dmt import Teachers
from companion.toy.ablations import dmt as study
from companion.toy.datasets import collage
from companion.toy.encoders import teachers as taught
from companion.toy.live import dmt as live
from tests.conftest import parameters

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collage, "COUNTS", {"train": 320, "val": 60, "test": 60})
        study.write(path, SEED)
        yield str(path)
    study.part.cache_clear()


@pytest.mark.parametrize("method", [m for m in study.METHODS if m not in study.UNTRAINED])
def test_all_students_start_alike_and_every_tensor_is_trained(root, method):
    model = study.assemble(method, SEED, root)[0]
    encoder = model.student if method in study.STUDENTS else model.encoder
    first = study.student(SEED).state_dict()
    assert all(torch.equal(first[name], value) for name, value in encoder.state_dict().items())
    trained, whole, history = study.train_model(method, 2e-3, SEED, root, 3)
    assert len(history) == 3 and not trained.training
    assert all(not torch.equal(first[name], value) for name, value in trained.named_parameters() if value.requires_grad)
    if method == "same view":
        for name, shipped in taught.load().items():
            found = whole.teachers.models[name].state_dict()
            assert all(torch.equal(value, found[key]) for key, value in shipped.state_dict().items())


def test_what_the_methods_change(root):
    models = {method: study.assemble(method, SEED, root)[0] for method in study.STUDENTS}
    assert [len(models[m].widths) for m in ("DMT", "MAE only", "MAE + iBOT", "gate")] == [3, 1, 2, 3]
    fusions = [models[m].fusion for m in ("gate", "averaged teachers", "DMT")]
    assert fusions == ["gate", "mean", "separate"]
    assert models["LN targets"].target_norms[0].kind == "ln" and models["DMT"].target_norms[0].kind == "channel"
    assert models["token loss only"].decoder is None and models["map loss only"].adapters is None
    assert models["same view"].teachers.view == "same" and models["DMT"].teachers is None


def test_cached_tokens_are_those_of_the_teachers(root):
    cache, data = study.cached_tokens(root, SEED), study.part(root, SEED, "train")
    expected = Teachers(taught.load())(data.images[:20]).tokens
    for cached, tokens in zip(cache.tensors(), expected, strict=True):
        assert cached.shape == (320, 17, 48) and torch.allclose(cached[:20], tokens, atol=1e-5)
    pair = study.assemble("MAE + iBOT", SEED, root)[2].tensors
    assert torch.equal(pair[1], cache.tensors()[0]) and torch.equal(pair[2], cache.tensors()[2])


def test_rows_hold_every_measure(root):
    row = study.train("untrained", study.TASK, 0.0, SEED, root)
    assert row["loss"] == 0 and {*collage.FACTORS, "mean", "mean all"} <= set(row) and "own-probe lead" not in row
    assert row["mean"] == pytest.approx(sum(row[name] for name in collage.FACTORS) / 4, abs=0.02)
    teachers = {m: study.train(m, study.TASK, 0.0, SEED, root) for m in study.THEMSELVES}
    for method, found in teachers.items():
        others = [teachers[m] for m in teachers if m != method]
        lead = max(found[name] - max(other[name] for other in others) for name in collage.FACTORS)
        assert found["own-probe lead"] == pytest.approx(lead, abs=0.02)
    assert study.METRIC in row


def test_learning_rates_are_chosen_on_validation_after_whole_trainings(root, monkeypatch):
    asked, split_of = [], []
    real_part = study.part
    monkeypatch.setattr(study, "STEPS", 6)
    monkeypatch.setattr(study, "part", lambda root, seed, split: split_of.append(split) or real_part(root, seed, split))
    real = study.fit
    monkeypatch.setattr(study, "fit", lambda *a, **o: asked.append(o["epochs"] * (320 // 128)) or real(*a, **o))
    chosen = study.train("MAE only", study.TASK, 1e-3, SEED, root, "select")
    assert asked == [6] and "test" not in split_of and "mean all" not in chosen
    study.train("MAE only", study.TASK, 1e-3, SEED, root)
    assert asked[1] == 6 and "test" in split_of


def test_the_live_run_is_the_studys(root, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "STEPS", 3)
    found = live.setting(parameters("dmt", seed=3), tmp_path, {(study.TASK, method): 1e-3 for method in study.METHODS})
    assert found.learning_rates == dict.fromkeys(live.METHODS, 1e-3) and found.trained is None
    for method in found.learning_rates:
        model, again = found.build(method), found.build(method)
        history = found.learn(model, method)
        assert len(history) == 3 and len(model.widths) == len(study.STUDENTS[method][0])
        assert history[0]["loss"] == pytest.approx(history[0]["token loss"] + history[0]["map loss"], rel=1e-5)
        assert found.learn(again, method) == history, "the same seed gives the same bits"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
