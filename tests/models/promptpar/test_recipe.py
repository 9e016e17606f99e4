"""PromptPAR's recipe: what is trained and how, own images, the authors' weights, tables of results."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from companion.errors import CorruptFile, MissingData, MissingWeights
from companion.models.promptpar import recipe
from companion.models.promptpar.model import Output
from companion.models.promptpar.transforms import PadToSquare
from companion.toy.tokens import Tokenizer
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers import promptpar as rehearsal
from tests.papers.common import shrink
from tests.papers.promptpar import small_backbones
from tests.recipes import runner


def given(**changes) -> SimpleNamespace:
    usual = {"profile": "paper", "dataset": "folder", "data_root": "nowhere", "accelerator": "cpu"}
    return parameters("promptpar", **usual | changes)


def run(**changes) -> recipe.Tested:
    """The run's folder is that of the data."""
    p = given(**changes)
    return recipe.run(p, Path(p.data_root))


@pytest.fixture
def small(monkeypatch) -> None:
    """Small networks in place of the real ones, and one epoch."""
    shrink("promptpar", monkeypatch)
    epochs(monkeypatch, 1)


def epochs(monkeypatch, count: int) -> None:
    """Train for `count` epochs in place of the published 100."""
    table = recipe.published()
    table.loc["epochs"] = count
    monkeypatch.setattr(recipe, "published", lambda: table)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    """Own images: 20 to train, 4 to test."""
    rehearsal.write("folder", tmp_path, monkeypatch)
    return str(tmp_path)


@pytest.mark.parametrize(("count", "accumulate", "steps"), [(17, 1, 1), (20, 2, 2), (19, 2, 1)])
def test_the_last_images_of_an_epoch_are_trained_on_where_each_part_has_two(count, accumulate, steps, small, folder):
    """A step is split into micro-batches; a single image is none for a batch norm."""
    file = Path(folder) / "labels.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[: 1 + count], *lines[-2:]]))
    history = run(data_root=folder, accumulate=accumulate).history
    assert len(history) == steps and all(np.isfinite(row["loss"]) for row in history)


def test_trained_weights_are_a_checkpoint(small, folder, tmp_path):
    found = run(data_root=folder)
    again = run(data_root=folder, checkpoint=str(tmp_path / "trained" / "PromptPAR, folder, seed 0.safetensors"))
    assert again.history == [] and torch.equal(again.model.prompts, found.model.prompts)
    assert again.scores.totals == found.scores.totals and not again.model.training
    images, truth = again.examples(3)
    assert images.shape == (3, 3, 64, 64) and torch.equal(truth, again.test.labels[:3])
    for changes in ({"quirks": False}, {"select": "maxima"}, {"seed": 1}):
        run(data_root=folder, **changes)
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 4, "other settings are another training"


def test_what_is_missing_or_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "c.pth").write_bytes(b"no")
    refuses((lambda: run(dataset="par/pa100k"), "PA-100K"), error=MissingData)
    refuses(
        (lambda: run(data_root=folder), "ViT-L-14-quickgelu"),
        (lambda: run(data_root=folder, checkpoint="nothing.pth"), r"PETA_Checkpoint\.pth"),
        error=MissingWeights,
    )
    refuses((lambda: run(data_root=folder, checkpoint=str(tmp_path / "c.pth")), r"c\.pth"), error=CorruptFile)
    monkeypatch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(recipe, "_backbones", lambda p: small_backbones(embed=32))
    refuses(
        (lambda: run(data_root=folder, checkpoint="x.pth", method="heads only"), "heads only"),
        (lambda: run(data_root=folder), "'2025'"),
    )


def test_clip_is_looked_for_in_the_data_root(tmp_path):
    assert recipe.weights(given(data_root=str(tmp_path))) == "pretrained"
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "CLIP-ViT-L-14-openai.safetensors"
    file.touch()
    assert recipe.weights(given(data_root=str(tmp_path))) == file
    assert recipe.weights(given(data_root=str(tmp_path), clip="ViT-B-16-quickgelu/openai")) == "pretrained"
    assert recipe.weights(given(weights="mine.pt")) == "mine.pt"


def test_results_are_means_over_seeds_next_to_the_published_ones(tmp_path):
    for seed in (0, 1):
        scores = SimpleNamespace(totals={"mA": 87.0 + seed, "Acc": 82.0, "Prec": 89.0, "Rec": 90.0, "F1": 89.1})
        rows = recipe.RESULTS.measured(tmp_path / "m.csv", recipe.row(given(dataset="par/peta", seed=seed), scores))
    table = next(iter(recipe.RESULTS.tables(rows).values())).set_index("method")
    assert table.loc["PromptPAR", ["PETA mA", "PA100K mA"]].tolist() == ["88.76 / 87.50", "87.47 / not run"]
    assert table.loc["VTB", "PETA mA"] == "85.31"


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"texts": "sentences"}, "PromptPAR"),
        ({"texts": "sentences", "dataset": "par/rapv1"}, "PromptPAR, sentences"),
        ({"release": "2025", "quirks": False}, "PromptPAR, code of 2025, as meant"),
        ({"padding": "white"}, "PromptPAR, white padding"),
        ({"select": "maxima", "clip": "x"}, "PromptPAR, x, maxima over epochs"),
        ({"checkpoint": "a/x.pth", "release": "2025", "select": "maxima"}, "PromptPAR, weights of x.pth"),
    ],
)
def test_what_is_not_as_published_has_a_row_of_its_own(changes, label):
    assert recipe.label(given(**changes)) == label


def test_clip_is_in_half_precision_where_the_authors_precision_runs(small, folder, monkeypatch):
    monkeypatch.setattr(recipe, "device", lambda accelerator: "cuda")
    assert recipe.hardware(given()).precision == "32-true"
    assert not recipe.half(given(precision="32-true"))
    found = run(data_root=folder, dry_run=True)
    model, history = found.model, found.history
    visual = model.clip.visual
    assert visual.conv1.weight.dtype == visual.proj.dtype == torch.float16
    assert visual.ln_pre.weight.dtype == model.prompts.dtype == torch.float32
    assert all(np.isfinite(row["loss"]) for row in history)


def test_unclear_labels_of_rap_count_as_released_or_not_at_all():
    logits, labels = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]])
    ratio = torch.tensor([0.2, 0.2, 0.2])
    whole = recipe.loss(Output(logits, logits), labels, ratio)
    without = recipe.loss(Output(logits, logits), labels, ratio, unclear=False)
    two = np.exp(0.8) * np.log(2)  # at logit 0 the cross-entropy of any target is log 2
    assert float(whole - without) == pytest.approx(1.5 * two, rel=1e-5)


@pytest.mark.parametrize("method", recipe.METHODS)
def test_methods_have_the_parts_of_their_names(method, small, folder):
    model = run(data_root=folder, method=method, dry_run=True).model
    expected = {"deep prompts": (0, 50), "heads only": (0, 0)}.get(method, (4, 50))
    prompts = model.prompts.shape[1] if len(model.prompts) else 0
    assert (len(model.region_tokens), prompts) == expected
    assert (model.mask is None) == (method not in ("PromptPAR", "regions, no similarity loss"))
    # without a loss on the similarity its tensors only decay
    assert not expected[0] or model.agg_bn.bias.any() == (method != "regions, no similarity loss")


def test_what_the_findings_say_of_padded_images():
    (case,) = [case for case in runner.cases("promptpar") if case.name == "preprocess_tall_padded"]
    square = PadToSquare(224)(Image.fromarray(case.data["in.image"].numpy()))
    square.save(coded := io.BytesIO(), "JPEG", quality=95)
    pixels, again = (np.asarray(image, float) for image in (square, Image.open(coded)))
    bars = pixels.max((0, 2)) == 0
    assert bars.sum() == 148 and abs(pixels - again)[:, ~bars].mean() == pytest.approx(2.8, abs=0.15)
    assert sum(height / (height / 224) > 224 for height in range(50, 501)) == 35
