"""The tables and maps of MetaSegNet's notebook show what the networks predict and what the study measured."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from companion import climate, geotiff
from companion.data import landcover as data
from companion.evaluation import ablations
from companion.evaluation.metrics import landcover as metrics
from companion.toy.ablations import metasegnet as study
from companion.toy.datasets import landcover
from companion.toy.live import metasegnet as live
from tests.conftest import parameters

SEED = 3  # leaves out Cfb
RATES = {("seen", method): 1e-3 for method in study.METHODS}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("land")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landcover, "COUNTS", {"train": 1, "val": 1, "test": 4})
        study.part.cache_clear()
        yield live.toy(SEED, out, RATES), study.part(str(out / "data"), SEED, "test")
    study.part.cache_clear()


@pytest.fixture(scope="module")
def models():
    return {name: study.build(name, SEED).eval() for name in live.LIVE}


def test_the_table_scores_each_network_with_its_text(found, models):
    setting, test = found
    table = live.scores(setting, models).set_index("network")
    assert list(table.index) == ["unimodal", "MetaSegNet", "MetaSegNet, wrong prompt", "MetaSegNet, empty prompt"]
    part = test.of([study.left_out(SEED)])
    wrong = study.texts(part.zones, "wrong", SEED)
    predicted = study.predict(models["MetaSegNet"], part.images, wrong)
    matrix = metrics.confusion(part.labels, predicted, len(landcover.CLASSES))
    assert table["mIoU, left out"]["MetaSegNet, wrong prompt"] == pytest.approx(metrics.scores(matrix).miou)
    assert table.loc["MetaSegNet", "building"] != table.loc["MetaSegNet, wrong prompt", "building"]
    left = live.scores(setting, models, ("wrong",), "left out").set_index("network")
    iou = metrics.scores(matrix).iou[landcover.CLASSES.index("building")]
    assert len(left) == 3 and left.loc["MetaSegNet, wrong prompt", "building"] == pytest.approx(float(iou))
    assert left["mIoU, seen"].equals(table["mIoU, seen"][:3])


def test_the_images_shown_are_of_their_zones(found):
    test = found[1]
    shown = live.shown(test, "Cfb")
    assert [*shown] == ["BSh", "Aw", "Am", "Cfb"] and all(test.zones[i] == zone for zone, i in shown.items())


def test_figures_of_predictions(found, models):
    test = found[1]
    shown = live.shown(test, "Cfb")
    figure = live.predictions(models, test, shown)
    assert len(figure.axes) == 20 and figure.axes[15].get_ylabel().replace("\n", " ") == "Cfb, left out"
    titles = [
        ax.get_title().replace("\n", " ") for ax in live.under_texts(models["MetaSegNet"], test, shown, "Cfb").axes
    ]
    share = (live.predict(models["MetaSegNet"], test, shown["BSh"], "") == test.labels[shown["BSh"]]).float().mean()
    assert titles[5] == f"empty: {100 * share:.0f} % correct"
    assert titles[3].startswith(f"wrong ({landcover.other_zone('BSh', avoid='Cfb')})")
    plt.close("all")


def test_attention_by_class_is_the_mean_over_the_pixels_of_the_class(found, models):
    test = found[1]
    words, table = live.attention_by_class(models["MetaSegNet"], test, "Am")
    assert words[:2] == ["climate", "zone"] and np.allclose(table.sum(1), 100, atol=1e-3)
    own = [i for i, zone in enumerate(test.zones) if zone == "Am"]
    _, attention = live.attended(models["MetaSegNet"], test, own)
    assert attention[1].shape == (4, 16, 16, len(words)) and attention[4].shape[:3] == (4, 2, 2)
    total = sum(
        attention[1][k, y // 4, x // 4] for k, i in enumerate(own) for y, x in (test.labels[i] == 3).nonzero().tolist()
    )
    assert np.allclose(table[3], 100 * total / (test.labels[own] == 3).sum(), atol=1e-3)
    assert live.pooled(models["MetaSegNet"]).shape == (9, 48)


def rows(better=1.0):
    """A study whose methods differ by 1 point each, and MiniLM by `better` from MetaSegNet in the zone left out."""
    table = []
    for stage, seeds in {"select": (100, 106), "test": (200, 201)}.items():
        for task, (k, method), seed in itertools.product(study.TASKS, enumerate(study.METHODS), seeds):
            lower = 1 - better if method == "MiniLM text" and task == "left out" else k
            row = {"stage": stage, "task": task, "method": method, "learning_rate": 4e-3, "seed": seed}
            row |= {name: 50.0 - lower + seed % 2 for name in ("mIoU", *(f"IoU {c}" for c in landcover.CLASSES))}
            table.append(row | {"trained": 1000 + k, "loss": 0.5 + k})
    return ablations.frame(table, "mIoU")


def test_tables_of_the_study():
    table = live.study_table(rows()).set_index("method")
    assert list(table.index) == study.METHODS
    assert table["mIoU, seen"]["unimodal"] == "50.5 ± 0.7" and table["trainable parameters"]["unimodal"] == "1,000"
    assert list(table.columns)[:2] == ["mIoU, seen", "mIoU, left out"] and set(table["learning rate"]) == {"0.004"}
    classes = live.class_table(rows(), ["unimodal", "MetaSegNet"])
    assert list(classes.task) == ["seen"] * 2 + ["left out"] * 2
    assert list(classes.columns) == ["task", "method", *landcover.CLASSES]
    left = live.left_out_table(rows(), ["MetaSegNet", "MiniLM text"]).set_index("seed")
    assert left.zone.to_dict() == {200: study.left_out(200), 201: study.left_out(201)}
    assert left["known words, code and name"].to_dict() == {
        200: "1 of 3",
        201: "0 of 3",
    }  # "steppe" of "BSk, cold steppe"
    assert left["known words, description"][201] == "19 of 19" and left["MiniLM text"][201] == 51
    assert live.lead(rows(), "left out", "MiniLM text", "MetaSegNet") == "+1.0 ± 0.0 points"


def test_reasons_are_of_claims_of_the_paper():
    from companion.ops.papers import paper

    found = live.reasons(rows(better=-2.0))
    assert found.keys() <= {claim["id"] for claim in paper("metasegnet")["claims"]}
    assert "-2.0 ± 0.0" in found["pretrained"] or "loss" in found["pretrained"]


def test_full_size_trains_and_records_nothing_in_a_dry_run(tmp_path, monkeypatch):
    assert live.full_size(parameters("metasegnet"), tmp_path, {}).shape == (1, 1)
    p = parameters("metasegnet", profile="paper", dry_run=True, method="unimodal")
    from companion.models.metasegnet.model import SIZES

    monkeypatch.setitem(SIZES, "paper", SIZES["pocket"])
    table = live.full_size(p, tmp_path, {})
    assert list(table.test) == ["test"] and 0 <= table.mIoU[0] <= 100 and not (tmp_path / "measured.csv").exists()


def test_an_area_of_your_own(tmp_path):
    folder = live.own_area(tmp_path / "area", ("Aw", "BWh"), SEED, count=2)
    own = data.own(folder, landcover.CLASSES)
    assert own.zones() == ["Aw", "Aw", "BWh", "BWh"]
    image, labels = own.pair(1)
    expected = landcover.pictures("Aw", 2, "train", 1000 + SEED)[1][1]
    assert image.shape == (3, 64, 64) and torch.equal(labels, torch.from_numpy(expected).to(labels))
    with geotiff.Raster(folder / "new.tif") as raster:
        assert raster.size == (64, 64) and climate.zone(*raster.place) == "Aw"


def test_regions_by_zone():
    table, unplaced = live.regions_by_zone()
    assert table.to_numpy().sum() + len(unplaced) == len(data.read_places())


def test_the_study_has_the_methods_that_the_tables_name():
    assert isinstance(rows(), pd.DataFrame) and {*live.LIVE, live.PRETRAINED} <= set(study.METHODS)
