"""The recipe of the paper profile: published settings, checked names, checkpoints and weights, tables of results."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from companion import backbones
from companion.data import DATASETS
from companion.errors import MissingData, MissingWeights
from companion.evaluation import recipe_parity
from companion.evaluation.claims import PAPER
from companion.evaluation.recipe_parity import Case
from companion.models.sa2vp import recipe
from companion.models.sa2vp.model import two_pathway_loss
from companion.ops import report
from companion.training.callbacks import Callback
from companion.training.checkpoints import checkpoint_key
from companion.training.fit import Hardware
from companion.training.schedules import learning_rates
from tests.conftest import assert_resumes, parameters
from tests.small import shrink


def test_published_settings():
    for backbone, dataset, *expected in (
        ("vit_b16", "vtab/svhn", 16, 0.5, 1e-3, 64),
        ("vit_b16", "vtab/cifar100", 8, 0.1, 1e-3, 64),
        ("vit_b16", "vtab/eurosat", 16, 1.5, 1e-3, 40),
        ("vit_b16", "vtab/dmlab", 32, 1.5, 1e-3, 40),
        ("vit_b16", "vtab/pets", 8, 0.1, 5e-4, 64),
        ("vit_b16", "vtab/clevr_count", 32, 1.5, 5e-4, 40),
        ("vit_b16", "fgvc/cars196", 64, 1.5, 1e-3, 64),
        ("vit_b16", "fgvc/flowers102", 8, 0.1, 1e-3, 64),
        ("vit_b16", "hta/dtd", 64, 0.1, 1e-3, 64),
        ("swin_b", "vtab/dmlab", 8, 1.5, 1e-3, 40),
    ):
        found = recipe.published_settings(backbone, dataset)
        assert [found[name] for name in ("width", "scale", "lr", "batch")] == expected, dataset


given = functools.partial(parameters, "sa2vp", profile="paper", accelerator="cpu", data_root="nowhere")


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The toy ViT instead of the real one, and no processes that load data."""
    shrink("sa2vp", monkeypatch)


def test_the_paper_profile_says_what_is_missing(tmp_path, monkeypatch, request):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="companion fetch"):
        recipe.setting(given(), tmp_path)
    request.getfixturevalue("tiny")
    with pytest.raises(MissingData, match="svhn"):
        recipe.setting(given(data_root=str(tmp_path)), tmp_path)


CROPPED = {"train": ["Resize", "RandomCrop", "RandomHorizontalFlip"]}
CROPPED |= {"val": ["Resize", "CenterCrop"], "test": ["Resize", "CenterCrop"]}


@pytest.mark.parametrize(
    ("dataset", "steps"),
    [
        # the 1,000 images, whole images, training and test alike
        ("vtab/svhn", {"trainval": ["Resize"], "test": ["Resize"]}),
        ("fgvc/cub200", CROPPED),
        ("hta/dtd", CROPPED),
    ],
)
def test_the_published_recipe_on_each_benchmark(dataset, steps, monkeypatch, tmp_path, tiny):
    opened = {}

    def load(name, root, part, transform):
        named = [type(step).__name__ for step in transform.transforms]
        opened[part] = named[: named.index("PILToTensor")]
        return SimpleNamespace(classes=10)

    monkeypatch.setattr(recipe.classification, "load", load)
    found = recipe.setting(given(dataset=dataset, seed=3), tmp_path)
    assert opened == steps and (found.val is None) == ("val" not in opened)
    assert (found.options["epochs"], found.options["seed"], found.learning_rates) == (100, 3, {"SA²VP": 1e-3})
    model, scale = found.build("SA²VP"), recipe.published_settings("vit_b16", dataset)["scale"]
    assert (model.scale, model.dropout.p, model.frozen_dropout, len(model.new_prompts)) == (scale, 0.1, True, 2)


def test_the_schedule_of_a_training_is_the_authors():
    """A warm-up from 0 over a tenth of the steps, half a cosine towards 1e-7; decay 1e-4 on matrices alone."""
    data, model = TensorDataset(torch.randn(20, 3), torch.zeros(20, dtype=torch.long)), nn.Linear(3, 2)
    groups = []

    class Watch(Callback):
        def on_step_end(self, loop):
            groups.append([(len(g["params"]), g["weight_decay"]) for g in loop.optimizer.param_groups])

    options = {"epochs": 20, "batch": 10, "seed": 0, "hardware": Hardware("cpu"), "callbacks": [Watch()]}
    history = recipe.train_model(model, data, 1e-3, **options)
    np.testing.assert_allclose([row["lr"] for row in history], learning_rates("cosine", 1e-3, 40, 4, 1e-7))
    assert groups[0] == [(1, 1e-4), (1, 0.0)]


def folder(root, counts: dict[str, int]) -> str:
    for label, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    return str(root)


def test_a_small_folder_of_ones_own_trains_on_all_that_is_not_tested(tmp_path, tiny):
    """Fewer images than the published batch; a val split is only held back where there is nothing else to test on."""
    whole = folder(tmp_path / "whole", {"a": 10, "b": 10})
    found = recipe.setting(given(dataset="folder", data_root=whole), tmp_path)
    assert (len(found.train), len(found.test), found.options["batch"]) == (16, 4, 16)
    split = folder(tmp_path / "split", {"train/a": 30, "train/b": 30, "test/a": 3, "test/b": 3})
    found = recipe.setting(given(dataset="folder", data_root=split), tmp_path)
    assert (len(found.train), len(found.test), found.options["batch"]) == (60, 6, 60)
    model, history = recipe.train(found, "SA²VP", epochs=1)
    assert len(history) == 1 and 0 <= recipe.accuracy(model, found.test, found.options["hardware"]) <= 100


def test_images_in_another_class_are_another_training(tmp_path, tiny, monkeypatch):
    root = tmp_path / "mine"
    folder(root, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})

    def key(where: str) -> str:
        return checkpoint_key(**recipe.setting(given(dataset="folder", data_root=where), tmp_path).facts)

    first = key(str(root))
    (root / "train/a/0.png").rename(root / "train/b/9.png")
    moved = key(str(root))
    (root / "train/b").rename(root / "train/c")
    (root / "test/b").rename(root / "test/c")
    assert len({first, moved, key(str(root))}) == 3
    monkeypatch.chdir(tmp_path)
    assert key("mine") == key(str(root))


@pytest.mark.parametrize(("method", "chosen"), [("SA²VP", False), ("SA²VP", True), ("linear probing", False)])
def test_a_killed_training_resumes_to_the_same_bits_and_keeps_its_weights(method, chosen, tmp_path, tiny, monkeypatch):
    """`chosen`: the best epoch on val is selected, as on FGVC."""
    images = folder(tmp_path / "images", {"a": 10, "b": 10})

    def setting(out, **changes):
        found = recipe.setting(given(dataset="folder", data_root=images, method=method, **changes), out)
        return dataclasses.replace(found, val=found.test if chosen else None)

    assert_resumes(lambda out: recipe.train(setting(out), method, epochs=5), recipe, tmp_path, monkeypatch)
    # a training with other settings, not visible in any tensor, does not resume from its checkpoint
    for changes in ({"attention": "padded"}, {"batch": 8}):
        assert setting(tmp_path, **changes).facts != setting(tmp_path).facts


def test_normalisation_is_the_released_one_or_the_backbones(monkeypatch):
    swin = backbones.build("swin_b", "random")
    released, own = (recipe.input_of(given(normalisation=name), swin) for name in recipe.NORMALISATIONS)
    assert (released.mean, released.std, own.mean) == ((0.5,) * 3, (0.5,) * 3, (0.485, 0.456, 0.406))
    assert released.size == own.size == 224


def test_the_dry_run_of_a_set_whose_epoch_is_chosen(tmp_path, tiny):
    for method in ("SA²VP", "linear probing"):
        found = recipe.setting(given(dry_run=True, dataset="fgvc/cub200", method=method), tmp_path)
        model, history = recipe.train(found, method)
        assert len(history) == 2 and 0 <= recipe.accuracy(model, found.val, found.options["hardware"]) <= 100
    assert recipe.setting(given(dry_run=True), tmp_path).val is None


def test_a_linear_probe_on_images_in_memory_is_trained_on_their_features(tmp_path, tiny):
    """The dry run, whose images are in memory: the encoder runs once, and only the head is trained."""
    found = recipe.setting(given(dry_run=True, method="linear probing"), tmp_path)
    model, history = recipe.train(found, "linear probing")
    assert len(history) == 2 and not model.training and list(tmp_path.iterdir()) == []
    again = found.build("linear probing")
    features = TensorDataset(again.backbone(found.train.tensors[0]).detach(), found.train.tensors[1])
    recipe.train_model(again.head, features, found.learning_rates["linear probing"], **found.options)
    torch.testing.assert_close(again.head.weight, model.head.weight)


def test_what_is_not_as_published_has_a_row_of_its_own(tmp_path):
    assert recipe.label(given()) == recipe.label(given(width=16)) == "SA²VP"
    padded = recipe.label(given(attention="padded", width=8))
    assert padded == "SA²VP, padded attention, r = 8"
    assert recipe.label(given(method="VPT-deep", attention="padded", width=8)) == "VPT-deep"
    assert recipe.label(given(batch=64)) == "SA²VP" and recipe.label(given(batch=40)) == "SA²VP, batch 40"
    assert recipe.label(given(normalisation="backbone")) == "SA²VP"  # ViT-B/16 was trained with 0.5
    own = given(normalisation="backbone", backbone="swin_b")
    assert recipe.label(own) == "SA²VP, normalised as its backbone"
    row = {"backbone": "vit_b16", "dataset": "fgvc/cub200", "method": "SA²VP", "seed": 0, "accuracy": 84.0}
    for changes in ({"accuracy": 1.0}, {}, {"seed": 1, "accuracy": 82.0}, {"method": padded, "accuracy": 70.0}):
        rows = recipe.measured(tmp_path / "measured.csv", row | changes)
    found = recipe.cells(rows, "vit_b16", "fgvc")
    assert found == {("SA2VP", "cub200"): 83.0, ("SA2VP, padded attention, r = 8", "cub200"): 70.0}
    assert recipe.with_mean(found, ["method", "cub200", "mean"])["SA2VP", "mean"] == 83.0
    assert ("SA2VP", "mean") not in recipe.with_mean(found, ["method", "cub200", "nabirds", "mean"])


def test_benchmark_means_are_of_whole_benchmarks():
    """4 specialised tasks at 50 %, 7 natural ones at 80 %, 8 structured ones at 20 %, HTA at 90 %, no FGVC."""
    accuracy = {"VTAB-1k Natural": 80.0, "VTAB-1k Specialized": 50.0, "VTAB-1k Structured": 20.0, "HTA": 90.0}
    known = {name: accuracy.get(one.group, 0.0) for name, one in DATASETS.items() if one.group in (*accuracy, "FGVC")}
    rows = pd.DataFrame({"dataset": known.keys(), "accuracy": known.values()})
    rows["backbone"], rows["method"] = "vit_b16", "SA²VP"
    found = recipe.benchmark_means(rows[rows.dataset != "fgvc/cars196"], "vit_b16")
    expected = {
        "hta": 90.0,
        "vtab_natural": 80.0,
        "vtab_specialized": 50.0,
        "vtab_structured": 20.0,
        "vtab_mean_19_tasks": (7 * 80 + 4 * 50 + 8 * 20) / 19,
        "vtab_mean_of_3_groups": 50.0,
    }
    assert found == {("SA2VP", benchmark): pytest.approx(value) for benchmark, value in expected.items()}
    assert recipe.benchmark_means(rows, "vit_b16")["SA2VP", "fgvc"] == 0
    assert recipe.benchmark_means(rows, "swin_b") == {}


def test_paper_results_are_judged_from_the_measured_rows(tmp_path):
    """Benchmark means of rows as runs write them: at the published values, then one of them 0.6 points below."""
    published = {"VTAB-1k Natural": 80.97, "VTAB-1k Specialized": 85.73, "VTAB-1k Structured": 60.8}
    published |= {"FGVC": 90.08, "HTA": 91.5}

    def statuses(short: str, baselines: float, folder: str) -> dict[str, str]:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "measured.csv"
        for name, one in DATASETS.items():
            if one.task == "classification" and one.group in published:
                row = {"backbone": "vit_b16", "dataset": name, "seed": 0}
                accuracy = published[one.group] - 0.6 * (one.group == short)
                rows = recipe.measured(path, row | {"method": "SA²VP", "accuracy": accuracy})
                for method in ("VPT-deep", "full fine-tuning"):
                    rows = recipe.measured(path, row | {"method": method, "accuracy": accuracy - baselines})
        run = report.start("sa2vp", profile="pocket", out=str(tmp_path / folder))
        run.claims_from_measured(recipe.claim_cells(rows))
        return {row["id"]: row["status"] for row in run.ledger() if row["kind"] == PAPER}

    reached = {"full-fgvc": "holds", "full-vtab": "holds", "full-hta": "holds"}
    assert statuses("", 6.0, "reached") == reached
    assert statuses("VTAB-1k Structured", 6.0, "structured") == reached | {"full-vtab": "fails"}
    assert statuses("FGVC", 6.0, "fgvc") == reached | {"full-fgvc": "fails"}
    assert statuses("", 5.0, "baselines") == reached | {"full-hta": "fails"}


def test_the_protocol_is_that_of_the_profile(monkeypatch):
    """Its numbers are read off what is run."""
    found = recipe.protocol()
    assert found["batch"] == "FGVC 64, HTA 64, VTAB-1k Natural 64, VTAB-1k Specialized 40, VTAB-1k Structured 40"
    assert found["learning rate"].startswith("0.001, but 0.0005")
    monkeypatch.setattr(recipe, "EPOCHS", 7)
    monkeypatch.setitem(recipe.SCRIPT_BATCH, "natural", 40)
    assert recipe.protocol()["epochs"] == "7" and "Natural 40" in recipe.protocol()["batch"]


def test_the_effects_of_the_findings():
    """Images that a sampler without `set_epoch` never returns; an overlap of two splits; a label out of range."""
    for images, batch, unseen in ((1000, 64, 40), (1000, 40, 0), (5394, 64, 18)):
        sampler = DistributedSampler(range(images), num_replicas=1, rank=0, shuffle=True)
        loader = DataLoader(range(images), batch, sampler=sampler, drop_last=True)
        seen = {int(one) for _ in range(3) for part in loader for one in part}
        assert images - len(seen) == unseen
    train, val = (np.random.default_rng(seed).permutation(75_750) for seed in (1, 2))
    assert round(100 * np.isin(val[60_600:], train[:60_600]).mean()) == 80
    with pytest.raises(IndexError):
        nn.functional.cross_entropy(torch.zeros(1, 555), torch.tensor([1010]))
    case = Case(recipe_parity.folder() / "sa2vp" / "metric_top1")
    on_image, on_prompt, labels = (case.data[f"in.{name}"] for name in ("logits_image", "logits_prompt", "labels"))
    assert f"{case.expected['loss']:.3f} {two_pathway_loss(on_image, on_prompt, labels):.3f}" == "1.887 1.940"
