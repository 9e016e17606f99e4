"""What DPLQ's notebook shows: tables of the ablations, the model taken apart, texts, attention, noise."""

import functools
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from companion.evaluation import ablations
from companion.models.dplq import figures
from companion.models.dplq.recipe import Setting
from companion.models.layers.quaternion import real_matrix
from companion.toy.ablations import dplq as study
from companion.toy.live import dplq as live
from companion.training.schedules import adamw
from companion.viz.style import COLOURS
from tests.conftest import parameters

CLASSES = {"base": ("red disc", "cyan disc"), "novel": ("red ring", "cyan ring")}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def model():
    return study.build("DPLQ", CLASSES["base"], 0, 12).eval()


@pytest.fixture
def setting():
    """Eight images a test set; the first channel of the domain feature is 5 or -5, as the sensor."""
    torch.manual_seed(0)
    feature = torch.randn(8, 12)
    feature[:, 0] = torch.tensor([5.0, -5] * 4)
    parts = {half: TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) // 4, feature) for half in CLASSES}
    return Setting(
        "made up", CLASSES["base"], CLASSES, live.LIVE, {"DPLQ": 0.1}, lambda method: None,
        lambda method, part: parts[part], adamw, {}, functools.partial(study.accuracy, seed=0),
    )  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    """The sensors of `setting`'s images."""
    monkeypatch.setattr(live, "sensors", lambda p, out, half: torch.tensor([0, 1] * 4))


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two seeds; real layers beat DPLQ on the second seed of remote, the untrained model is worst on seed 2."""
    found = []
    for task, methods in study.TASKS.items():
        for method in methods:
            for seed in (0, 2):
                hm = {"DPLQ": 80.0, "DPLQ, real layers": 70.0 + 6 * seed}.get(method, 50.0 - seed)
                row = {"stage": "test", "task": task, "method": method, "learning_rate": 0.1, "seed": seed}
                row |= {"base": hm, "novel": hm, "HM": hm, "loss": 0.25, "trained": 1000}
                found.append(row | dict.fromkeys(study.SENSORS, hm))
                found.append(row | {"stage": "select", "seed": 9})
    return ablations.frame(found, "HM")


def test_tables_of_the_study(rows):
    table = live.study_table(rows, live.FIRST_TABLE, ("HM", *study.SENSORS)).set_index(["domain", "method"])
    assert table.loc[("remote", "DPLQ"), "HM"] == "80.0 ± 0.0" == table.loc[("remote", "DPLQ"), study.SENSORS[0]]
    assert table.loc[("medical", "CoOp"), "HM"] == "49.0 ± 1.4" and len(table) == 2 * len(live.FIRST_TABLE)
    found = live.study_table(rows, live.CONTROLS, ("HM", "base"), "DPLQ").set_index(["domain", "method"])
    assert found.loc[("remote", "DPLQ, real layers"), "seeds won"] == "1 of 2"
    assert found.loc[("remote", "DPLQ, real layers"), "lead of DPLQ, HM"] == "+4.0 ± 8.5"
    assert found.index[0] == ("remote", "DPLQ") and ("medical", "DPLQ, an axis each") not in found.index
    assert live.lottery(rows).set_index(["task", "method"]).loc[("medical", live.OTHER), "seed 2"] == "48.0 (0.25)"
    assert live.reasons(rows)["quaternions"].endswith("ahead with 1 seeds on remote and 1 seeds on medical")


def test_the_poorest_training_is_repeated_with_a_standardised_feature(rows, monkeypatch, tmp_path):
    data = TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), 0.1 * torch.randn(4, 12) + 3)
    monkeypatch.setattr(live.pocket, "write", lambda *_: None)
    monkeypatch.setattr(study, "inputs", lambda *_: data)
    monkeypatch.setattr(study, "images", lambda *_: (None, None, CLASSES["base"]))
    monkeypatch.setattr(study, "accuracy", lambda *_: 60.0)
    seen = {}

    def train_model(model, given, rate, **options):
        seen.update(options, feature=given.tensors[-1], rate=rate)

    monkeypatch.setattr(study, "train_model", train_model)
    poorest = rows.method.eq(live.OTHER) & rows.task.eq("medical") & rows.seed.eq(0)
    rows.loc[poorest, "HM"] = 40.0
    assert live.rescaled(tmp_path, rows) == ("medical", live.OTHER, 0, 40.0, 60.0)
    assert seen["seed"] == 0 and seen["rate"] == 0.1 and "epochs" not in seen  # as in the ablations
    torch.testing.assert_close(seen["feature"].std(0), torch.ones(12))
    torch.testing.assert_close(seen["feature"].mean(0), torch.zeros(12), atol=1e-5, rtol=0)


def test_one_direction_of_the_bias_is_found(model, setting, known, tmp_path):
    with torch.no_grad():
        model.meta_net.linear1.weight.zero_()
        model.meta_net.linear1.weight[0, 0] = 1  # the bias depends on the first channel of the feature alone
        model.meta_net.linear2.weight[:, 0] = torch.randn(64)
    before = model.embedded.clone()
    table, share, correlation = live.taken_apart(SimpleNamespace(profile="pocket"), tmp_path, model, setting)
    assert share == pytest.approx(100) and correlation == pytest.approx(1)
    hm = table.set_index("domain feature of an image")["HM (%)"]
    assert hm["its own"] == hm["the mean of its sensor"]  # all features of a sensor give the same bias
    own = {half: setting.inputs("DPLQ", half).tensors[2] for half in CLASSES}
    assert live.judged(model, setting, own.get) == hm["its own"]
    assert torch.equal(model.embedded, before)  # the training classes are set again


def test_noise_changes_predictions_more_the_larger_it_is(model, setting):
    curves = live.noise_curves(model, setting, [0, 50])
    assert curves["predictions that change"][0] == 0 < curves["predictions that change"][1]
    figure = figures.noise([0, 50], curves)
    assert [line.get_label() for line in figure.axes[0].lines] == list(curves)


def test_shown_images_have_their_texts(model, setting, known, tmp_path):
    p = SimpleNamespace(profile="pocket")
    shown = live.shown(p, tmp_path, model, setting, "novel")
    assert shown.classes == CLASSES["novel"] and len(shown.images) == 1 and shown.texts.shape[:2] == (1, 2)
    with torch.inference_mode():
        zero = model.prompts(shown.feature, torch.zeros(1, 64))
    torch.testing.assert_close(shown.prompts.context, zero.context)
    paper = live.shown(SimpleNamespace(profile="paper"), tmp_path, model, setting, "novel")
    assert len(paper.images) == 6
    many = live.Shown(*(torch.cat([x] * 3) if i < 4 else x for i, x in enumerate(vars(paper).values())))
    picked, partner = live.pairs(many)
    assert set(many.sensors[picked].tolist()) == {0, 1} and not (many.sensors[picked] == many.sensors[partner]).any()
    maps, shares, uniform = live.prompt_attention(model, many, picked, picked)
    assert torch.equal(maps["prompt 1, own feature"], maps["prompt 1, other sensor's"])
    assert len(shares["own feature"]) == 6 and uniform == pytest.approx(2 / 67)
    assert figures.attention_share(shares, uniform).axes[0].lines[-1].get_label() == "uniform"
    assert len(live.halves(model, paper)) == len(model.deep_text)


def test_classes_named_by_colour_have_shades_of_it():
    red, cyan = live.SHADES["red"], live.SHADES["cyan"]
    assert live.class_colours(["red disc", "cyan disc", "red ring"]) == [red[0], cyan[0], red[1]]
    for others in (["red a", "red b", "red c"], ["red disc", "forest"]):  # of your own folder
        assert live.class_colours(others) == COLOURS


def test_axes_between_texts_of_opposite_colours(model, setting, known, tmp_path):
    table, points, titles = live.opposites(SimpleNamespace(profile="pocket"), tmp_path, model, setting, "base")
    model.set_classes(CLASSES["base"])
    assert table.pair.tolist() == ["red disc − cyan disc"] and [len(x) for x in points] == [4, 4]
    for x, title in zip(points, titles, strict=True):
        first = 100 * np.mean(np.sign(x[:, 0]) == x[:, 2])
        assert re.search(rf"axis 1: {first:.0f} %", title)
    assert [ax.get_title() for ax in figures.axes_of_opposites(points, titles).axes] == titles


def test_without_a_dplq_untrained_prompts_are_shown_with_a_note(setting, capsys, monkeypatch):
    monkeypatch.setattr(live.recipe, "published_settings", lambda protocol: {"prompt depth": 3})
    p = parameters("dplq")
    own = study.build("DPLQ", CLASSES["base"], 0, 12)
    assert live.drawn_model(p, {"DPLQ": own}, setting) is own and not capsys.readouterr().out
    other = live.drawn_model(p, {"MaPLe": study.build("MaPLe", CLASSES["base"], 0, 12)}, setting)
    assert other.count() > 0 and "untrained prompts" in capsys.readouterr().out


def test_scores_are_checked_or_recorded(setting, tmp_path, capsys, monkeypatch):
    models = {name: SimpleNamespace(count=lambda: 1234) for name in live.LIVE}
    scored = {name: {"base": 90.0, "novel": 10.0, "HM": 18.0} for name in live.LIVE}
    frame = live.results(parameters("dplq"), tmp_path, models, setting, scored).set_index("method")
    assert frame.loc["DPLQ", "trainable parameters"] == "1,234" and frame.loc["MaPLe", "learning rate"] == "–"
    assert capsys.readouterr().out.count("NOT as expected") == 3 and not any(tmp_path.iterdir())
    live.results(parameters("dplq", profile="paper"), tmp_path, models, setting, scored)
    assert "base to novel,remote/aid,novel,0,10.0" in (tmp_path / "measured.csv").read_text()


def test_blocks_and_probabilities():
    weight = torch.arange(16.0).view(4, 2, 2)
    figure = figures.blocks(real_matrix(weight))
    assert "".join(text.get_text() for text in figure.axes[0].texts) == "".join(map("".join, figures.BLOCKS))
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), real_matrix(weight))
    for (row, column), text in np.ndenumerate(np.array(figures.BLOCKS)):  # the letters are those of the matrix
        block = real_matrix(weight)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        sign = -1 if text.startswith("−") else 1
        assert torch.equal(block, sign * weight["RIJK".index(text[-1])])
    bars = figures.probabilities(np.zeros((4, 4, 3)), "a", [0.2, 0.8], ["a", "b"], 0).axes[1].patches
    assert [bar.get_width() for bar in bars] == [0.2, 0.8] and bars[0].get_facecolor() != bars[1].get_facecolor()


def test_texts_of_each_sensor_and_without_bias():
    features, unbiased = torch.randn(12, 2, 8), torch.randn(2, 8)
    names = [
        t.get_text()
        for t in figures.texts(features, unbiased, torch.tensor([0, 1] * 6), ["a", "b"])
        .axes[0]
        .get_legend()
        .get_texts()
    ]
    assert names == ["a", "b", "first sensor", "second sensor", "no bias"]
    legend = figures.texts(features, unbiased, torch.zeros(12, dtype=torch.long), ["a", "b"]).axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "with bias", "no bias"]
