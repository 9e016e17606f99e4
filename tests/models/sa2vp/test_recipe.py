"""The settings that the notebook trains with: published ones by data set, checked names, results that gather."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from companion.data import DATASETS
from companion.errors import MissingData, MissingWeights
from companion.models.sa2vp import recipe as runs
from companion.toy import encoders


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
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=0,
        method="SA²VP",
        backbone="vit_b16",
        dataset="vtab/svhn",
        attention="aligned",
        width=0,
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


def test_the_paper_profile_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="companion fetch"):
        runs.setting(given(), tmp_path, {})
    monkeypatch.setattr(
        runs.backbones, "build", lambda name, weights, **options: encoders.build("pocket_vit", "random")
    )
    with pytest.raises(MissingData, match="svhn"):
        runs.setting(given(data_root=str(tmp_path)), tmp_path, {})


@pytest.mark.parametrize(
    ("dataset", "split", "steps"),
    [
        ("vtab/svhn", "trainval", ["Resize"]),  # the 1,000 images, whole pictures, training and test alike
        ("fgvc/cub200", "train", ["Resize", "RandomCrop", "RandomHorizontalFlip"]),
        ("hta/dtd", "train", ["Resize", "RandomCrop", "RandomHorizontalFlip"]),
    ],
)
def test_the_published_recipe_on_each_benchmark(dataset, split, steps, monkeypatch, tmp_path):
    opened = {}

    def load(name, root, part, transform):
        named = [type(step).__name__ for step in transform.transforms]
        opened[part] = named[: named.index("PILToTensor")]
        return SimpleNamespace(classes=10)

    monkeypatch.setattr(runs.classification, "load", load)
    monkeypatch.setattr(
        runs.backbones, "build", lambda name, weights, **options: encoders.build("pocket_vit", "random")
    )
    found = runs.setting(given(dataset=dataset, seed=3), tmp_path, {})
    assert opened == {split: steps, "test": ["Resize"] if split == "trainval" else ["Resize", "CenterCrop"]}
    recipe = {"epochs": 100, "schedule": "cosine", "warmup": 0.1, "final_lr": 1e-7, "weight_decay": 1e-4, "seed": 3}
    assert {name: found.fit[name] for name in recipe} == recipe and found.rates == {"SA²VP": 1e-3}
    model = found.build("SA²VP")
    assert (model.scale, model.dropout.p, model.frozen_dropout, len(model.new_prompts)) == (
        runs.published_settings("vit_b16", dataset)["scale"],
        0.1,
        True,
        2,
    )


def folder(root, counts: dict[str, int]) -> str:
    for label, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    return str(root)


def test_a_small_folder_of_ones_own_trains_on_all_that_is_not_tested(tmp_path, monkeypatch):
    """Fewer pictures than the published batch; a val part is only held back where there is nothing else to test on."""
    monkeypatch.setattr(
        runs.backbones, "build", lambda name, weights, **options: encoders.build("pocket_vit", "random")
    )
    monkeypatch.setattr(runs, "WORKERS", 0)
    whole = folder(tmp_path / "whole", {"a": 10, "b": 10})
    found = runs.setting(given(dataset="folder", data_root=whole), tmp_path, {})
    assert (len(found.train), len(found.test), found.fit["batch"]) == (16, 4, 16)
    split = folder(tmp_path / "split", {"train/a": 30, "train/b": 30, "test/a": 3, "test/b": 3})
    found = runs.setting(given(dataset="folder", data_root=split), tmp_path, {})
    assert (len(found.train), len(found.test), found.fit["batch"]) == (60, 6, 40)
    model, history = runs.train(found, "SA²VP", epochs=1)
    assert len(history) == 1 and 0 <= runs.accuracy(model, found) <= 100
    assert runs.label(given(dataset="folder")) == "SA²VP"


def test_testing_takes_the_precision_and_the_loaders_of_the_training(monkeypatch):
    given_to = {}

    def predict(model, data, **options):
        given_to.update(options)
        return torch.tensor([[0.0, 1.0]])

    monkeypatch.setattr(runs, "predict", predict)
    test = torch.utils.data.TensorDataset(torch.zeros(1, 1), torch.tensor([1]))
    options = {"epochs": 3, "accelerator": "cuda", "precision": "bf16-mixed", "workers": 5}
    found = runs.Setting("t", test, test, ("a", "b"), (), {}, lambda method: nn.Identity(), options)
    assert runs.accuracy(nn.Identity(), found) == 100
    assert given_to == {"batch": 64, "accelerator": "cuda", "precision": "bf16-mixed", "workers": 5}


def test_what_is_not_as_published_has_a_row_of_its_own():
    assert runs.label(given()) == runs.label(given(width=16)) == "SA²VP"
    assert runs.label(given(attention="padded", width=8)) == "SA²VP, padded attention, r = 8"
    assert runs.label(given(method="VPT-deep", attention="padded", width=8)) == "VPT-deep"
    row = {"backbone": "vit_b16", "dataset": "vtab/svhn", "seed": 0}
    rows = pd.DataFrame(
        [
            row | {"method": runs.label(given(attention=a)), "accuracy": v}
            for a, v in (("aligned", 80.0), ("padded", 70.0))
        ]
    )
    expected = {("SA2VP", "svhn"): 80.0, ("SA2VP, padded attention", "svhn"): 70.0}
    assert runs.cells(rows, "vit_b16", "vtab") == expected


def test_benchmark_means_are_of_whole_benchmarks():
    """4 specialised tasks at 50 %, 7 natural ones at 80 %, 8 structured ones at 20 %, HTA at 90 %, no FGVC."""
    accuracy = {"VTAB-1k Natural": 80.0, "VTAB-1k Specialized": 50.0, "VTAB-1k Structured": 20.0, "HTA": 90.0}
    rows = pd.DataFrame(
        [
            {
                "backbone": "vit_b16",
                "method": "SA²VP",
                "dataset": name,
                "seed": 0,
                "accuracy": accuracy.get(found.group, 0.0),
            }
            for name, found in DATASETS.items()
            if found.group in (*accuracy, "FGVC")
        ]
    )
    found = runs.benchmark_means(rows[rows.dataset != "fgvc/cars196"], "vit_b16")
    expected = {
        "hta": 90.0,
        "vtab_natural": 80.0,
        "vtab_specialized": 50.0,
        "vtab_structured": 20.0,
        "vtab_mean_19_tasks": (7 * 80 + 4 * 50 + 8 * 20) / 19,
        "vtab_mean_of_3_groups": 50.0,
    }
    assert found == {("SA2VP", benchmark): pytest.approx(value) for benchmark, value in expected.items()}
    assert runs.benchmark_means(rows, "vit_b16")["SA2VP", "fgvc"] == 0
    assert runs.benchmark_means(rows, "swin_b") == {}


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
