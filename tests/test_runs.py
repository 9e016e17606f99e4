"""The settings that the notebook trains with: published ones by data set, checked names, results that gather."""

from types import SimpleNamespace

import pandas as pd
import pytest

from companion.errors import BadParameter, MissingData, MissingWeights
from companion.runs import sa2vp as runs


@pytest.mark.parametrize(
    ("backbone", "dataset", "width", "scale", "lr", "batch"),
    [
        ("vit_b16", "vtab/svhn", 16, 0.5, 1e-3, 40),
        ("vit_b16", "vtab/cifar100", 8, 0.1, 1e-3, 40),
        ("vit_b16", "vtab/eurosat", 16, 1.5, 1e-3, 40),
        ("vit_b16", "vtab/dmlab", 32, 1.5, 1e-3, 40),
        ("vit_b16", "vtab/pets", 8, 0.1, 5e-4, 40),
        ("vit_b16", "vtab/clevr_count", 32, 1.5, 5e-4, 40),
        ("vit_b16", "fgvc/cars196", 64, 1.5, 1e-3, 64),
        ("vit_b16", "fgvc/flowers102", 8, 0.1, 1e-3, 64),
        ("vit_b16", "hta/dtd", 64, 0.1, 1e-3, 64),
        ("swin_b", "vtab/dmlab", 8, 1.5, 1e-3, 40),
    ],
)
def test_published_settings(backbone, dataset, width, scale, lr, batch):
    expected = {"width": width, "scale": scale, "lr": lr, "batch": batch}
    assert runs.published_settings(backbone, dataset) == expected


def given(**changes) -> SimpleNamespace:
    settings = dict(profile="paper", dry_run=False, seed=0, method="SA²VP", backbone="vit_b16", dataset="vtab/svhn",
                    attention="aligned", width=0, data_root="nowhere", weights="", accelerator="cpu", devices=1,
                    precision="32-true")  # fmt: skip
    return SimpleNamespace(**settings | changes)


def test_names_of_data_sets_are_checked():
    runs.check_dataset(given())
    runs.check_dataset(given(dataset="folder"))
    with pytest.raises(BadParameter, match="vtab/svhn"):
        runs.check_dataset(given(dataset="svhn"))


def test_the_paper_profile_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="companion fetch"):
        runs.setting(given(), tmp_path, {})
    monkeypatch.setattr(runs.backbones, "build", lambda name, weights, **options: runs.backbones._pocket_vit())
    with pytest.raises(MissingData, match="svhn"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})


def test_results_gather_and_are_replaced(tmp_path):
    path = tmp_path / "measured.csv"
    assert runs.measured(path).empty
    row = {"backbone": "vit_b16", "method": "SA²VP", "dataset": "fgvc/cub200", "seed": 0, "accuracy": 80.0}
    runs.measured(path, row)
    runs.measured(path, row | {"seed": 1, "accuracy": 82.0})
    rows = runs.measured(path, row | {"accuracy": 84.0})
    assert len(rows) == 2
    found = runs.cells(rows, "vit_b16", "fgvc")
    assert found == {("SA2VP", "cub200"): 83.0}
    assert runs.with_mean(found, ["method", "cub200", "mean"])["SA2VP", "mean"] == 83.0
    assert ("SA2VP", "mean") not in runs.with_mean(found, ["method", "cub200", "nabirds", "mean"])
    pd.testing.assert_frame_equal(pd.read_csv(path), rows.reset_index(drop=True))
