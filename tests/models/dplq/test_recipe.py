"""DPLQ's recipe of the paper profile: published settings, protocols on small datasets, checkpoints, missing files."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from companion import backbones
from companion.data import DATASETS, domains
from companion.errors import CorruptFile, MissingData, MissingWeights
from companion.evaluation.tables import published_table
from companion.models.dplq import loss, recipe
from companion.models.dplq.model import NoFeatures
from companion.models.layers import mae
from companion.models.layers.clip_prompting import similarity
from companion.toy import encoders
from companion.training.checkpoints import checkpoint_key
from tests.conftest import parameters
from tests.models.common import refuses
from tests.papers.common import shrink
from tests.recipes import dplq_cases
from tests.recipes.runner import Case, folder

EACH = 40  # images per class: 20 to train, 8 to validate, 12 to test
given = functools.partial(
    parameters, "dplq", profile="paper", seed=1, dataset="medical/btmri", accelerator="cpu", data_root="nowhere"
)


@pytest.fixture
def pocket(monkeypatch) -> None:
    """The toy CLIP instead of the real one; its image tower has 6 blocks, so prompts of depth 3 fit. One epoch."""
    shrink("dplq", monkeypatch)
    published = recipe.published_settings
    quick = {"epochs": 1, "warm-up epochs": 0}
    monkeypatch.setattr(recipe, "published_settings", lambda protocol: published(protocol) | quick)


def training(p):
    """The training of a run, with the toy CLIP and no domain model."""
    clip = recipe._clip("random")
    return recipe.training(p, recipe.data(p, clip)[1]["train"], clip, None)


@pytest.fixture
def sets(tmp_path, monkeypatch) -> str:
    """Two small medical sets in the authors' layout, a class a brightness; the data root."""
    for name in ("medical/btmri", "medical/ccbtm"):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], sizes={}))
        folder = tmp_path / DATASETS[name].folders[0] / DATASETS[name].folders[-1]
        for label, key in enumerate(sorted(domains.CLASSES[name])):
            (folder / key).mkdir(parents=True)
            for number in range(EACH):
                pixels = np.random.default_rng(number).integers(60 * label, 60 * label + 60, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(folder / key / f"{number}.png")
    return str(tmp_path)


def test_both_transfers_test_the_weights_of_one_training(pocket, sets, tmp_path, monkeypatch):
    def run(**changes):
        return recipe.run(given(targets="medical/ccbtm", domain="clip", data_root=sets, **changes), tmp_path)

    first = run(protocol="cross-dataset")
    (file,) = (tmp_path / "trained").iterdir()
    assert file.name == "medical-btmri, all classes, seed 1, DPLQ.safetensors"
    state = load_file(file)  # nothing of CLIP or the domain model
    assert state.keys() == first.model.trained().keys() and torch.equal(state["ctx"], first.model.ctx)
    monkeypatch.setattr(recipe, "loss", lambda *_: pytest.fail("it was trained again"))
    again = run(protocol="domain generalisation")
    assert again.history == first.history and torch.equal(again.model.ctx, first.model.ctx)
    # noise is not visible in any tensor
    facts = [training(given(data_root=sets, noise=noise)).facts for noise in ("always", "off")]
    assert facts[0] != facts[1]


def test_base_to_novel_trains_on_the_base_classes_alone(pocket, sets, tmp_path):
    p = given(method="CoCoOp", data_root=sets)
    tests, train = recipe.run(p, tmp_path).tests, training(p).data
    assert [len(data) for data in tests.values()] == [24, 24] and list(tests) == ["base", "novel"]
    assert tuple(tests["novel"].class_names) == ("no brain tumor", "pituitary")
    assert tuple(train.class_names) == tuple(tests["base"].class_names) == ("glioma", "meningioma")
    # training images are cropped at random, test images are not
    assert not torch.equal(train[0][0], train[0][0]) and torch.equal(tests["base"][0][0], tests["base"][0][0])


def test_images_in_another_class_are_another_training(pocket, tmp_path, sets, monkeypatch):
    mine = tmp_path / "medical/BTMRI/BTMRI"

    def key(where: str) -> str:
        return checkpoint_key(**training(given(dataset="folder", data_root=where, method="CoOp")).facts)

    first = key(str(mine))
    for number in range(20):
        (mine / "glioma" / f"{number}.png").rename(mine / "meningioma" / f"more {number}.png")
    moved = key(str(mine))
    (mine / "glioma").rename(mine / "glioma 2")
    assert len({first, moved, key(str(mine))}) == 3
    monkeypatch.chdir(tmp_path)
    assert key("medical/BTMRI/BTMRI") == key(str(mine))


def test_the_domain_model_by_name_by_set_and_by_file(pocket, sets, tmp_path, monkeypatch):
    assert recipe.domain_name(given(dataset="remote/aid")) == "remote-sensing"
    assert recipe.domain_name(given()) == "medical"
    assert recipe.domain_name(given(domain="clip")) == "clip"
    assert recipe.weights(given(), "medical", "") == "pretrained"
    assert recipe.targets(given()) == ["medical/chmnist", "medical/ccbtm"]
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "vit-b-checkpoint-1599.pth"
    torch.save(
        {
            "model": mae.MAE(
                mae.encoder(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1), (32, 1, 16)
            ).to_official()
        },
        file,
    )
    p = given(domain="remote-sensing", data_root=sets, protocol="cross-dataset", targets="medical/ccbtm")
    assert recipe._domain(p, recipe._clip("random")).num_features == 32
    elsewhere = file.rename(tmp_path / "mine.pth")
    p = given(domain="remote-sensing", data_root=sets, domain_weights=str(elsewhere))
    assert recipe._domain(p, recipe._clip("random")).num_features == 32
    refuses(
        (lambda: recipe._domain(given(domain_weights="no.pth"), recipe._clip("random")), "no.pth"), error=CorruptFile
    )


def test_what_is_missing_or_contradicts_is_refused(tmp_path, monkeypatch):
    def run(**changes):
        return lambda: recipe.run(given(data_root=str(tmp_path), **changes), tmp_path)

    refuses(
        (run(targets="medical/ccbtm"), "base to novel"),
        (run(protocol="cross-dataset", targets="medical/btmri"), "medical/btmri"),
        (run(protocol="cross-dataset", dataset="folder"), "targets"),
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses((run(), "ViT-B-16/openai"), error=MissingWeights)
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "open_clip_model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert recipe.weights(given(data_root=str(tmp_path)), "clip", "") == file
    monkeypatch.setattr(recipe, "_clip", lambda weights: encoders.build("pocket_clip"))
    refuses((run(domain="remote-sensing"), r"vit-b-checkpoint-1599\.pth"), error=MissingWeights)
    refuses((run(domain="none"), "Brain tumour MRI"), error=MissingData)
    refuses((run(dataset="folder"), "'remote-sensing', 'medical'"))


def test_results_are_means_over_seeds_in_the_published_tables_and_judge_claims_by_whole_domains(tmp_path):
    path, p = tmp_path / "measured.csv", given(dataset="remote/aid", noise="off")
    for seed, base, novel, mean in ((1, 90.0, 60.0, 72.0), (2, 10.0, 10.0, 10.0), (2, 80.0, 80.0, 80.0)):
        p.seed = seed
        table = recipe.RESULTS.measured(path, *recipe.rows(p, {"base": base, "novel": novel, "HM": mean}))
    (shown,) = recipe.tables(table).values()
    assert list(shown.set_index("method").loc["DPLQ, noise off"]) == ["– / 85.00", "– / 70.00", "– / 76.00", "3 of 3"]
    for name, value in (("medical/btmri", 50.0), ("medical/chmnist", 60.0), ("medical/ccbtm", 70.0)):
        table = recipe.RESULTS.measured(path, *recipe.rows(given(dataset=name), {"HM": value}))
        assert len(recipe.claim_cells(table)) == (name == "medical/ccbtm")
    assert recipe.claim_cells(table) == {("DPLQ", "base to novel, medical"): pytest.approx(60.0)}


def test_half_precision_weights_lose_most_of_the_steps():
    """The authors' float16 tensors: entries that a first step leaves as they are, at both ends of the schedule."""
    case = Case(folder() / "dplq" / "trajectory_depth3")
    training = dplq_cases.training(case)
    model, data = training.build().train(), training.data
    items = [data[i] for i in range(training.fit["batch"])]
    loss(model, tuple(torch.stack(column) for column in zip(*items, strict=True))).backward()
    parts = [p for name, p in model.trained().items() if name.startswith(("ctx", "meta_net", "proj", "mix_text"))]

    def lost(learning_rate: float) -> float:
        weights = [p.detach().half() for p in parts]
        steps = [(learning_rate * (p.grad + recipe.WEIGHT_DECAY * p.detach())).half() for p in parts]
        same = [(w - step == w).flatten() for w, step in zip(weights, steps, strict=True)]
        return 100 * float(torch.cat(same).double().mean())

    assert lost(1e-5) == pytest.approx(99.7, abs=0.1) and lost(0.0035) == pytest.approx(60, abs=1)


def test_half_precision_logits_change_a_few_predictions():
    """The authors' normalisation and logits in float16, on drawn features with cosines of about 0.25 and 0.02 apart."""
    draw, unit = torch.Generator().manual_seed(0), functools.partial(torch.nn.functional.normalize, dim=-1)
    common, own, noise = (unit(torch.randn(n, 512, generator=draw)) for n in (1, 45, 20_000))
    text, labels = unit(2 * common + own), torch.randint(45, (20_000,), generator=draw)
    images = unit(0.25 * common + 0.08 * unit(text - (text @ common.T) * common)[labels] + 0.96 * noise)
    clip = SimpleNamespace(logit_scale=torch.tensor(100.0).log())
    logits = similarity(clip, images, text)
    halves = [x.half() / x.half().norm(dim=-1, keepdim=True) for x in (images, text)]
    rounded = torch.tensor(100.0).half() * halves[0] @ halves[1].T
    assert 24 < logits.max(1).values.mean() < 32 and 1.5 < logits.std(1).mean() < 2.5
    assert 100 * float((rounded.argmax(1) != logits.argmax(1)).double().mean()) == pytest.approx(0.4, abs=0.1)


def test_every_method_is_built_at_the_published_depth():
    """Counts of the authors' modules, at the size of ViT-B/16."""
    counted = published_table("dplq", "code-params").set_index("method")
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    rows = {"CoOp": "CoOp (16 tokens, shared)", "CoCoOp": "CoCoOp (4 tokens)"}
    rows |= {"MaPLe": "MaPLe prompt learner total", "DPLQ": "prompt learner total"}
    for protocol, column in (("base to novel", "depth9"), ("cross-dataset", "depth3")):
        for method, row in rows.items():
            model = recipe.build(given(protocol=protocol), method, ("a", "b"), clip, NoFeatures(512))
            assert model.count() == counted.loc[row, column]
