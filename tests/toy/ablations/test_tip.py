"""TIP's study: inputs of the networks, equal initial weights, the scores; the live run is the study's."""

import dataclasses

import pandas as pd
import pytest
import torch

pytest.importorskip("diffusers")

from companion.data.degradations import BLIND, degrade, parse
from companion.data.restoration import TEXTS
from companion.errors import MissingData
from companion.models.tip import recipe
from companion.toy.ablations import tip as study
from companion.toy.datasets import restoration as pocket
from companion.toy.live import tip as live
from tests.conftest import parameters

SEED = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "COUNTS", {"train": (20, 4), "val": (60, 2), "test": (60, 2)})
        for name, value in {"STEPS": 2, "BATCH": 8, "EACH": 9}.items():
            patch.setattr(study, name, value)
        study.prepare(path, SEED)
        yield str(path)
    for cached in (study.part, study.tested, study.trained, study.validation_psnr):
        cached.cache_clear()


def test_all_networks_start_alike():
    built = {network: study.build(network, 3).adaptor.state_dict() for network in study.NETWORKS}
    for network, state in built.items():
        same = [torch.equal(t, built["TIP"][n]) for n, t in state.items() if "controlnet_" not in n or "cond" in n]
        assert all(same), network
    sizes = {network: sum(t.numel() for t in state.values()) for network, state in built.items()}
    assert sizes["TIP"] - sizes["plain ControlNet"] == 7872 and len(set(sizes.values())) == 2


def test_what_the_networks_read(root):
    assert set(map(study.texts_of, study.METHODS)) <= set(TEXTS)
    given = {network: study.samples(network, study.part(root, SEED, "train"), SEED) for network in study.NETWORKS}
    assert all(len(samples) == 24 * study.DRAWS for samples in given.values())
    texts = {network: ({s.semantic for s in found}, {s.restoration for s in found}) for network, found in given.items()}
    assert texts["no text"] == ({""}, {BLIND})
    assert texts["restoration only"][0] == {""} and BLIND in texts["restoration only"][1] != {BLIND}
    assert texts["semantic only"][1] == {BLIND} and len(texts["semantic only"][0]) > 3
    assert all(len(s.ops) == 4 for s in given["no skipping"])
    for other in ("semantic only", "plain ControlNet"):  # the same images, degraded in the same way
        for a, b in zip(given["TIP"], given[other], strict=True):
            assert torch.equal(a.degraded, b.degraded) and a.ops == b.ops
    first, second = given["TIP"][0], given["TIP"][24]
    assert torch.equal(first.clean, second.clean) and not torch.equal(first.degraded, second.degraded)


def test_the_tasks(root):
    heavy, found = study.tested(root, SEED, "test", "heavy")
    assert all(s.ops == pocket.HEAVY for s in heavy) and set(found.contrasts) == {1.0} and len(heavy) == 9
    mild, found = study.tested(root, SEED, "test", "mild")
    assert [(c, s.ops) for s, c in zip(mild, found.contrasts, strict=True)] == list(pocket.MILD) * 3
    drawn, found = study.tested(root, SEED, "test", "parameterised")
    assert all(found.kinds) and all(s.ops for s in drawn) and len({s.restoration for s in drawn}) > 3
    sample = drawn[4]
    again = degrade(sample.clean, parse(sample.restoration), (SEED, 4), edge=pocket.EDGE)
    assert torch.equal(again, sample.degraded), "its text and its seed rebuild it"
    own, _ = study.tested(root, SEED, "val", "parameterised")
    assert not any(torch.equal(a.clean, b.clean) for a in own for b in drawn)


def test_scores_of_clean_and_of_wrong_pictures(root):
    found = study.part(root, SEED, "test").scenes(1.0)
    right = study.followed(found.images, found, found.captions)
    assert right == {"texture": 100.0, "follows the text": 100.0}
    other = [next(pocket.caption(k) for k in pocket.KINDS if k != kind) for kind in found.kinds]
    assert study.followed(found.images, found, other)["follows the text"] == 0
    assert "follows the text" not in study.followed(found.images, found, ["Deblur with sigma 0.6"] * len(found))
    other = study.part(root, SEED, "test").scenes().images
    assert study.layout_lead(other + 0.01, other) > 0 > study.layout_lead(other.roll(-1, 0) + 0.01, other)


def test_untrained_adaptors_are_the_frozen_model_and_texts_reach_their_part(root):
    pipe = study.build("TIP", SEED)
    given, _ = study.tested(root, SEED, "test", "mild")
    own, blind = (study.restore(pipe, given, kind, seed=SEED) for kind in ("own", "blind prompt"))
    assert torch.equal(own, blind), "what reads the restoration prompt is zero at the start"
    assert not torch.equal(own, study.restore(pipe, given, "wrong semantic prompt", seed=SEED))
    assert study.held_out(pipe, given, "own", SEED) == study.held_out(pipe, given, "own", SEED, scale=0.0)


def test_rows_are_the_same_again_and_select_asks_validation_alone(root):
    row = study.train("TIP", "mild", 3e-3, SEED, root)
    names = {"PSNR", "SSIM", "layout lead", "loss gain", "smallest rise", "texture", "loss", "trained"}
    assert names <= set(row)
    assert "smallest rise" not in study.train("wrong semantic prompt", "mild", 3e-3, SEED, root)
    blind = study.train("blind prompt", "mild", 3e-3, SEED, root)
    assert blind["loss"] == row["loss"] and blind["PSNR"] != row["PSNR"], "one training, asked twice"
    asked = ("TIP", "mild"), ("TIP", "heavy"), ("blind prompt", "mild")
    chosen = [study.train(*both, 3e-3, SEED, root, "select") for both in asked]
    assert chosen[0] == chosen[1] == chosen[2] and set(chosen[0]) == {"PSNR", "loss", "trained"}
    study.trained.cache_clear()
    study.validation_psnr.cache_clear()
    assert study.train("TIP", "mild", 3e-3, SEED, root) == row


def test_the_pocket_run_is_the_studys(root, tmp_path):
    p, rates = parameters("tip", seed=SEED), {("parameterised", method): 3e-3 for method in study.NETWORKS}
    setting = live.setting(p, tmp_path, rates)
    assert setting.learning_rates == {"TIP": 3e-3, "plain ControlNet": 3e-3}
    pipe = setting.build("TIP")
    assert len(setting.train(pipe, "TIP")) == study.STEPS
    own = study.train("TIP", "parameterised", 3e-3, SEED, root)
    restored = setting.restore(pipe, setting.test)
    found = recipe.score([(restored, torch.stack([s.clean for s in setting.test]))])[0]["PSNR"]
    assert found == pytest.approx(own["PSNR"], abs=1e-3)
    with pytest.raises(MissingData, match="COCO 2017"):
        live.setting(parameters("tip", profile="paper", data_root=str(tmp_path / "none")), tmp_path, {})


def test_live_training_and_the_examples(root, tmp_path):
    """What the notebook shows: histories, the claim on the frozen modules, images restored, scores that tell."""
    p = parameters("tip", seed=SEED)
    setting = live.setting(p, tmp_path, {("parameterised", method): 3e-3 for method in study.NETWORKS})
    pipes, histories, (holds, text) = live.train(setting, "train")
    assert holds and text.startswith("0 of ") and f"after {study.STEPS} steps, 0 have" in text
    assert pipes.keys() == histories.keys() == set(live.METHODS)
    assert live.train(setting, "test")[1:] == ({}, (None, "nothing was trained"))

    def breaks(pipe, name):
        pipe.unet.conv_out.bias.data += 1
        return [{}]

    holds, text = live.train(dataclasses.replace(setting, train=breaks), "train")[2]
    assert holds is False and text.startswith("2 of "), "one tensor of each of two methods"

    found = live.examples(p, tmp_path, setting)
    assert set(found.kinds) <= set(TEXTS) and found.samples[0].ops == pocket.HEAVY
    clean = torch.stack([s.clean for s in found.samples])
    own, other = found.scores(clean, found.samples), found.scores(clean.roll(1, 0), found.samples)
    assert own["texture (%)"] == 100 and own["PSNR (dB)"] == float("inf") and own["layout lead (dB)"] > 0
    assert other["texture (%)"] < 100 and other["SSIM (%)"] < own["SSIM (%)"] == pytest.approx(100)
    for prompts, kind in ((found.denoise, "noise"), (found.deblur, "blur")):
        ops = [parse(text) for text in prompts]
        assert [op.kind for (op,) in ops] == [kind] * 3 and sorted(ops) == ops
    assert all(s.restoration == "Deblur with sigma 0.9; Denoise with sigma 0.10" for s in found.walked)
    page = live.explorer(pipes["TIP"], setting, found).data
    assert page.count("data:image") == 4 * 3 * 3 and "(empty)" in page

    table = live.scores(p, tmp_path, setting, pipes)
    expected = study.score(pipes["plain ControlNet"], "mild", "own", root, SEED, "test")["PSNR"]
    row = table[(table.images == "mild") & (table.method == "plain ControlNet")]
    assert row.PSNR.tolist() == [expected] and len(table) == sum(len(m) for m in study.TASKS.values()) - 9


def test_reasons_are_read_off_the_rows():
    rows = [
        {"stage": "test", "task": task, "method": method, "seed": seed, "PSNR": 20 + seed * (method == "TIP"),
         "loss gain": 50 - (method == "TIP"), "contrast at 0.6": 40, "contrast at 0.9": 40 + seed,
         "contrast at 1.2": 42}
        for task in study.TASKS for method in live.METHODS for seed in range(4)
    ]  # fmt: skip
    rows += [
        {
            "stage": "test",
            "task": "mild",
            "method": method,
            "seed": seed,
            "PSNR": 20 + ahead * seed,
            "contrast off": off,
        }
        for method, ahead, off in (("blind prompt", 1, 26.0), ("wrong restoration prompt", 0, 25.5))
        for seed in range(4)
    ]
    reasons = live.reasons(pd.DataFrame(rows))
    assert (
        reasons["blind-over-wrong"].startswith("with 1 of 4 seeds") and "26.0 and 25.5" in reasons["blind-over-wrong"]
    )
    assert "rises by 2.0 points on average, and 5 of 8 single steps are rises" in reasons["walk"]
    assert "0 of 12 times, by -1.0 points, and in PSNR 9 of 12 times, by +1.50 dB" in reasons["modulation"]


def test_the_gradient_reaches_the_adaptor_in_three_steps():
    pipe = study.build("TIP", SEED)
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 12, 4, 4, generator=g), torch.rand(2, 3, 16, 16, generator=g)
    e = pipe.states(["a picture with rows", BLIND])
    table = live.gradient_order(pipe, (z, y, e, e)).set_index("step") > 0
    assert table.to_numpy().tolist() == [[True, *[False] * 4], [*[True] * 4, False], [True] * 5]


def test_an_upload_box_needs_a_live_notebook(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert live.upload_box(None, None).data.startswith("In JupyterLab")
