"""SA²VP's recipe: settings by benchmark, images of one's own, checkpoints, tables of results."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from companion import backbones
from companion.data import DATASETS
from companion.errors import MissingData, MissingWeights
from companion.models.sa2vp import recipe, two_pathway_loss
from companion.training.checkpoints import checkpoint_key
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers.common import shrink
from tests.recipes.runner import Case
from tests.recipes.runner import folder as recorded

given = functools.partial(parameters, "sa2vp", profile="paper", accelerator="cpu", data_root="nowhere")


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The toy ViT instead of the real one, and no processes that load data."""
    shrink("sa2vp", monkeypatch)


def test_the_paper_profile_names_what_is_missing(tmp_path, monkeypatch, request):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses((lambda: recipe.prepare(given(data_root=str(tmp_path)), tmp_path), "svhn"), error=MissingData)
    generated = recipe.data(given(dry_run=True))
    refuses((lambda: recipe.training(given(), generated).build(), "companion fetch"), error=MissingWeights)


CROPPED = {"train": ["Resize", "RandomCrop", "RandomHorizontalFlip"]}
CROPPED |= {"val": ["Resize", "CenterCrop"], "test": ["Resize", "CenterCrop"]}


def test_swin_has_settings_of_its_own_and_the_same_normalisation():
    expected = {"width": 8, "scale": 1.5, "lr": 1e-3, "batch": 40}
    assert recipe.published_settings("swin_b", "vtab/dmlab") == expected
    seen = recipe.input_of("swin_b")
    assert (seen.mean, seen.std, seen.size) == ((0.5,) * 3, (0.5,) * 3, 224)


def folder(root, counts: dict[str, int]) -> str:
    for label, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    return str(root)


def test_a_small_folder_of_ones_own_trains_on_all_that_is_not_tested(tmp_path, tiny, monkeypatch):
    """Fewer images than the published batch; a val split is only held back where there is nothing else to test on."""
    monkeypatch.setattr(recipe, "EPOCHS", 1)
    p = given(dataset="folder", data_root=folder(tmp_path / "whole", {"a": 10, "b": 10}))
    found = recipe.run(p, tmp_path)
    splits, classes = found.data.splits, found.data.classes
    assert (len(splits["train"]), len(splits["test"]), classes) == (16, 4, ("a", "b"))
    assert recipe.training(p, found.data).fit["batch"] == 16 and len(found.history) == 1
    p.devices = 3  # each has as many
    assert recipe.training(p, found.data).fit["batch"] == 15
    (row,) = recipe.RESULTS.measured(tmp_path / "measured.csv").to_dict("records")
    assert (row["method"], row["dataset"], row["accuracy"]) == ("SA²VP", "folder", found.accuracy)
    split = folder(tmp_path / "split", {"train/a": 30, "train/b": 30, "test/a": 3, "test/b": 3})
    found = recipe.data(given(dataset="folder", data_root=split))
    assert (len(found.splits["train"]), len(found.splits["test"])) == (60, 6)


def test_other_images_classes_or_options_are_another_training(tmp_path, tiny, monkeypatch):
    root = tmp_path / "mine"
    folder(root, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})

    def key(where: str = str(root), **changes: object) -> str:
        p = given(dataset="folder", data_root=where, **changes)
        return checkpoint_key(**recipe.training(p, recipe.data(p)).facts)

    keys = [key(), key(attention="padded"), key(batch=3), key(precision="bf16-mixed")]
    (root / "train/a/0.png").rename(root / "train/b/9.png")
    keys.append(key())
    (root / "train/b").rename(root / "train/c")
    (root / "test/b").rename(root / "test/c")
    assert len({*keys, key()}) == 6
    monkeypatch.chdir(tmp_path)
    assert key("mine") == key()


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"width": 16, "batch": 64}, "SA²VP"),  # as published
        ({"attention": "padded", "width": 8}, "SA²VP, padded attention, r = 8"),
        ({"method": "VPT-deep", "attention": "padded", "width": 8}, "VPT-deep"),
        ({"batch": 40, "scale": 0.5}, "SA²VP, batch 40"),  # SVHN's own scale
        ({"scale": 0.1, "transform": "crops"}, "SA²VP, s = 0.1, crops images"),
        ({"method": "linear probing", "scale": 0.1}, "linear probing"),
    ],
)
def test_what_is_not_as_published_has_a_row_of_its_own(changes, label):
    assert recipe.label(given(**changes)) == label


def test_what_is_inferred_can_be_chosen():
    """Swin's scale, of which the README has two, and HTA's transform, which it does not name."""
    swin = recipe.build(given(backbone="swin_b", scale=0.1), "SA²VP", 2, "random")
    assert swin.scale == 0.1 and recipe.build(given(backbone="swin_b"), "SA²VP", 2, "random").scale == 0.5
    seen = backbones.Input(32, (0.5,) * 3, (0.5,) * 3)
    for kind, cropped in (("recipe", True), ("crops", True), ("whole", False)):
        assert ("RandomCrop" in str(recipe.transforms("hta/dtd", seen, kind)[0])) == cropped


def test_results_are_means_over_seeds_next_to_the_published_ones(tmp_path):
    row = {"backbone": "vit_b16", "dataset": "vtab/svhn", "method": "SA²VP", "seed": 0, "accuracy": 92.5}
    others = row | {"seed": 1, "accuracy": 90.0}, row | {"dataset": "hta/dtd"}
    shown = recipe.per_task(recipe.RESULTS.measured(tmp_path / "measured.csv", row, *others))
    assert list(shown) == ["vitb_vtab_natural_per_task"]  # of HTA only the mean is published
    published = shown["vitb_vtab_natural_per_task"][1].set_index("method").loc["SA2VP"]
    assert published.svhn == "– / 91.25" and published["measured here"] == "1 of 8"


def test_benchmark_means_are_of_whole_benchmarks():
    """4 specialised tasks at 50 %, 7 natural ones at 80 %, 8 structured ones at 20 %, HTA at 90 %, no FGVC."""
    accuracy = {"VTAB-1k Natural": 80.0, "VTAB-1k Specialized": 50.0, "VTAB-1k Structured": 20.0, "HTA": 90.0}
    measured = {name: accuracy[data.group] for name, data in DATASETS.items() if data.group in accuracy}
    rows = pd.DataFrame({"dataset": measured.keys(), "accuracy": measured.values()})
    rows["backbone"], rows["method"], rows["seed"] = "vit_b16", "SA²VP", 0
    found = {
        benchmark: value for (_, benchmark), value in recipe.means(rows, "vit_b16").items() if "/" not in benchmark
    }
    expected = {"hta": 90.0, "vtab_natural": 80.0, "vtab_specialized": 50.0, "vtab_structured": 20.0}
    expected |= {"vtab_mean_19_tasks": (7 * 80 + 4 * 50 + 8 * 20) / 19, "vtab_mean_of_3_groups": 50.0}
    assert found == {benchmark: pytest.approx(value) for benchmark, value in expected.items()}
    assert recipe.group_means(rows).set_index("method").loc["SA2VP", "HTA"] == "– / 90.00"


def test_the_effects_of_the_findings():
    """Images that a sampler without `set_epoch` never returns; an overlap of two splits; a label out of range."""
    for images, batch, unseen in ((1000, 64, 40), (1000, 40, 0), (5394, 64, 18)):
        sampler = DistributedSampler(range(images), num_replicas=1, rank=0, shuffle=True)
        loader = DataLoader(range(images), batch, sampler=sampler, drop_last=True)
        assert images - len({int(one) for _ in range(3) for part in loader for one in part}) == unseen
    train, val = (np.random.default_rng(seed).permutation(75_750) for seed in (1, 2))
    assert round(100 * np.isin(val[60_600:], train[:60_600]).mean()) == 80
    with pytest.raises(IndexError):
        F.cross_entropy(torch.zeros(1, 555), torch.tensor([1010]))
    case = Case(recorded() / "sa2vp" / "metric_top1")
    on_image, on_prompt, labels = (case.data[f"in.{name}"] for name in ("logits_image", "logits_prompt", "labels"))
    assert f"{case.expected['loss']:.3f} {two_pathway_loss(on_image, on_prompt, labels):.3f}" == "1.887 1.940"
