"""TIP's runs: the recipe on small models, resuming, what the test gives to whom, the dry run at full size."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from companion.data.degradations import BLIND
from companion.data.restoration import TASKS, Degraded
from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.metrics.restoration import psnr, ssim
from companion.models.tip import model as tip
from companion.models.tip import pipeline as tip_pipeline
from companion.models.tip import recipe as runs
from companion.models.tip.pipeline import TIPPipeline, build, load_adaptor, save_adaptor
from companion.ops.papers import convert, paper

WORDS = ["generated", "picture", "number", "deblur", "denoise", "dejpeg", "upsample", "to", "with", "sigma", "quality"]


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=True,
        seed=0,
        task="train",
        dataset="restoration/coco",
        degradation="parameterised",
        method="TIP",
        texts="own",
        base="sd15",
        mid="modulate",
        checkpoint="",
        size=32,
        steps=3,
        guidance=1.0,
        scale=1.0,
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    monkeypatch.setattr(runs, "WORKERS", 0)


def small(size: str = "pocket", **options) -> TIPPipeline:
    torch.manual_seed(0)
    return build("pocket", WORDS, text={"places": 96}, **options)


@pytest.fixture
def pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pocket models in the place of Stable Diffusion."""
    monkeypatch.setattr(runs, "build", small)
    monkeypatch.setattr(runs, "DRY_SIZE", 32)


@pytest.fixture(scope="module")
def data() -> Degraded:
    return Degraded(runs.Generated(6, 32, 0), 32, fresh=True)


def weights(pipe: TIPPipeline) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in pipe.adaptor.state_dict().items()}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", runs.METHODS)
def test_dry_run_trains_and_restores(pocket: None, method: str, tmp_path: Path) -> None:
    s = runs.setting(given(method=method), tmp_path, {})
    pipe = s.build(method)
    before, frozen = weights(pipe), {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    history = s.learn(pipe, method)
    assert [row["lr"] for row in history] == [1e-5, 1e-5]
    assert all(row["loss"] == row["loss"] for row in history)
    assert any(not torch.equal(t, before[n]) for n, t in pipe.adaptor.state_dict().items())
    assert all(torch.equal(t, frozen[n]) for n, t in pipe.unet.state_dict().items())
    assert pipe.adaptor.config.fusion == ("add" if method == "plain ControlNet" else "modulate")
    samples = [s.test[i] for i in range(2)]
    restored = s.restore(pipe, samples, runs.texts_of(method))
    assert restored.shape == (2, 3, 32, 32)
    values, reasons = runs.score([(restored, torch.stack([x.clean for x in samples]))])
    assert {"PSNR", "SSIM"} <= set(values) and set(values) | set(reasons) == set(runs.SCORES)


def test_methods_read_what_they_are_said_to(data: Degraded) -> None:
    for method, (semantic, restoration) in {
        "TIP": (True, True),
        "no text": (False, False),
        "semantic only": (True, False),
        "restoration only": (False, True),
        "no skipping": (True, True),
    }.items():
        torch.manual_seed(0)
        found = runs.samples(data.pictures, 16, method, 0)
        drawn = [found[i % 6] for i in range(60)]
        assert any(s.semantic for s in drawn) == semantic
        assert any(s.restoration != BLIND for s in drawn) == restoration
        if method == "no skipping":
            assert all(len(s.ops) >= 6 for s in drawn if s.ops is not None)
    assert runs.texts_of("no text") == "no text" and runs.texts_of("TIP") == "own"
    assert runs.texts_of("semantic only", "prompts swapped") == "prompts swapped"


def test_methods_and_texts_are_those_of_the_papers_file() -> None:
    facts = paper("tip")["parameters"]
    for kind in facts["texts"]["choices"]:
        convert("texts", kind, facts["texts"])
    named = {c[k] for c in paper("tip")["claims"] for k in ("better", "worse") if k in c}
    assert named <= {*runs.METHODS, *facts["texts"]["choices"]}


def test_gradients_that_are_added_up_are_those_of_the_whole_batch(data: Degraded, monkeypatch) -> None:
    """Times and noise are drawn anew for each part of a batch, so here they are given."""
    fixed, plain = Degraded(data.pictures, 32, **TASKS["parameterised"]), tip.loss

    def still(model, batch, scheduler):
        z = batch[0]
        return plain(model, batch, scheduler, t=torch.full((len(z),), 500), noise=z.flip(-1))

    def trained(at_once: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        pipe = small()
        history = runs.learn(given(), pipe, fixed, at_once, epochs=3, batch=4, warmup=0.0)
        return weights(pipe), [row["loss"] for row in history]

    with monkeypatch.context() as patch:
        patch.setattr(tip, "loss", still)
        (whole, first), (parts, second) = trained(4), trained(2)
    assert first == pytest.approx(second, rel=1e-5)
    # Adam divides by the gradient's size, so a rounding of a tiny one moves a weight by at most a rate each step
    assert all((whole[n] - t).abs().max() <= 3 * 2e-5 for n, t in parts.items())
    torch.testing.assert_close(parts["branch.controlnet_mid_block.bias"], whole["branch.controlnet_mid_block.bias"])


class _Killed(Exception):
    pass


def test_a_killed_training_goes_on_to_the_same_bits(data: Degraded, tmp_path: Path, monkeypatch) -> None:
    options = {"epochs": 2, "batch": 2, "checkpoint_every": 2}
    whole = small()
    runs.learn(given(), whole, data, **options)
    plain, calls = tip.loss, []

    def killed(*args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise _Killed
        return plain(*args, **more)

    options |= {"checkpoint": tmp_path / "fit.pt", "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(tip, "loss", killed)
        with pytest.raises(_Killed):
            runs.learn(given(), small(), data, **options)
    again = small()
    runs.learn(given(), again, data, **options)
    assert all(torch.equal(t, whole.adaptor.state_dict()[n]) for n, t in again.adaptor.state_dict().items())
    saved = torch.load(tmp_path / "fit.pt", weights_only=True)["model"]
    assert saved and all(name.startswith("model.adaptor.") for name in saved)  # nothing of what is frozen


def test_kept_encodings_give_the_same_loss(data: Degraded) -> None:
    pipe = small()
    fixed = Degraded(data.pictures, 32, **TASKS["parameterised"])
    chosen = [fixed[i] for i in range(5)]
    kept = runs.cached(pipe, chosen, batch=2)
    assert [len(t) for t in kept.tensors] == [5] * 4
    z, y, semantic, restoration = kept.tensors
    assert z.shape == (5, 4, 8, 8) and semantic.shape == restoration.shape == (5, 96, 32)
    items = [runs.Tensors(chosen, pipe)[i] for i in range(5)]
    clean, degraded, c_s, c_r = (torch.stack([item[k] for item in items]) for k in range(4))
    assert torch.equal(degraded, y)
    torch.testing.assert_close(tip.latents(pipe.vae, clean), z)
    drawn = {"t": torch.tensor([0, 100, 500, 700, 999]), "noise": torch.randn_like(z)}
    one = tip.loss(pipe.model, (z, y, semantic, restoration), pipe.scheduler, **drawn)
    two = tip.loss(pipe.model, (z, y, c_s, c_r), pipe.scheduler, **drawn)
    torch.testing.assert_close(one, two)


# --- the test ---------------------------------------------------------------------------------------------------------


def test_start_noise_is_the_samples_own(data: Degraded) -> None:
    pipe = small()
    fixed = Degraded(data.pictures, 32, **TASKS["parameterised"])
    chosen = [fixed[i] for i in range(3)]
    together = runs.restore(pipe, chosen, steps=2)
    torch.testing.assert_close(together, runs.restore(pipe, chosen, steps=2, batch=1), atol=1e-5, rtol=1e-5)
    # before training the texts of the adaptor do nothing: only the noise could differ
    torch.testing.assert_close(together, runs.restore(pipe, chosen, "blind prompt", steps=2), atol=1e-6, rtol=0)
    assert not torch.allclose(together, runs.restore(pipe, chosen, steps=2, seed=1), atol=1e-3)


def test_results_gather(tmp_path: Path) -> None:
    runs.results(given(), tmp_path, {"PSNR": 20.0, "SSIM": 0.5})
    runs.results(given(texts="blind prompt"), tmp_path, {"PSNR": 19.0, "SSIM": 0.4})
    rows = runs.results(given(), tmp_path, {"PSNR": 21.0, "SSIM": 0.6})
    assert sorted(rows.PSNR) == [19.0, 21.0]
    assert len(runs.results(given(), tmp_path)) == 2


# --- at full size -----------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A narrow Stable Diffusion in the layout of the hub, below <data_root>/weights; pictures of one's own."""
    torch.manual_seed(0)
    made = build(
        "sd15",
        unet={
            "block_out_channels": (8, 16, 32, 32),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        vae={"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
        text={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    folder = tmp_path / "weights" / runs.BASES["sd15"]
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        getattr(made, name).save_pretrained(folder / name)
    from torchvision.utils import save_image

    (tmp_path / "images").mkdir()
    for i in range(3):
        save_image(runs.Generated(1, 40, i)[0][0], tmp_path / "images" / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "caption": f"a zebra, number {i}"}) for i in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_own_folder_on_a_released_model_trained_saved_and_tested(released: Path, tmp_path: Path) -> None:
    p = given(dry_run=False, dataset="folder", data_root=str(released), degradation="real-esrgan")
    s = runs.setting(p, tmp_path, {})
    pipe = s.build("TIP")
    history = s.learn(pipe, "TIP", epochs=2, batch=2)
    assert len(history) == 2
    before = weights(pipe)
    folder = save_adaptor(pipe.adaptor, tmp_path / "adaptor")
    with pytest.raises(BadParameter, match="not there yet"):
        save_adaptor(pipe.adaptor, released / "images")
    assert len(list((released / "images").iterdir())) == 3
    # what was trained on is not tested on
    assert len(s.test) == 1 and s.test.pictures.sources[0].endswith("0.png")
    assert [Path(f).name for f in s.data("TIP").pictures.sources] == ["1.png", "2.png"]
    # the run again: the training is only read, and its adaptor replaces the one that stands there
    again = runs.setting(p, tmp_path, {})
    second = again.build("TIP")
    start = time.monotonic()
    assert again.learn(second, "TIP", epochs=2, batch=2) == history and time.monotonic() - start < 5
    assert all(torch.equal(t, before[n]) for n, t in weights(second).items())
    assert save_adaptor(second.adaptor, folder) == folder
    other = runs.setting(given(**vars(p) | {"size": 64}), tmp_path, {})
    assert other.learn(other.build("TIP"), "TIP", epochs=2, batch=2) != history
    chosen = [s.test[0]]
    restored = s.restore(pipe, chosen)
    tested = runs.setting(given(**vars(p) | {"checkpoint": str(folder)}), tmp_path, {})
    assert tested.data is None and len(tested.test) == 3
    assert torch.equal(tested.restore(tested.build("TIP"), chosen), restored)
    with pytest.raises(BadCheckpoint, match="block_out_channels"):
        load_adaptor(folder, small().unet)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CorruptFile, match="adaptor"):
        load_adaptor(folder, pipe.unet)


def test_what_is_missing_is_said(released: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="COCO 2017"):
        runs.setting(given(dry_run=False), tmp_path, {})
    p = given(dry_run=False, dataset="folder", data_root=str(released / "images"))
    assert runs.base(p) == runs.HUB["sd15"]
    assert runs.base(given(weights="x")) == "x"
    with pytest.raises(MissingWeights, match="adaptor"):
        load_adaptor(tmp_path / "nowhere", small().unet)
    with pytest.raises(MissingWeights):
        runs.setting(given(**vars(p) | {"weights": str(tmp_path / "no")}), tmp_path, {}).build("TIP")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "test"}, "trained adaptor"),
        ({"task": "restore"}, "trained adaptor"),
        ({"texts": "wrong restoration prompt", "degradation": "real-esrgan"}, "the same"),
        ({"texts": "wrong semantic prompt", "dataset": "restoration/div2k"}, "no captions"),
    ],
)
def test_what_cannot_be_tested_is_said_before_training(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        runs.setting(given(**{"dry_run": False} | changes), tmp_path, {})


def test_one_picture_cannot_be_trained_and_tested_on(released: Path, tmp_path: Path) -> None:
    (released / "captions.jsonl").write_text('{"file": "0.png", "caption": ""}')
    with pytest.raises(BadParameter, match="two or more"):
        runs.setting(given(dry_run=False, dataset="folder", data_root=str(released)), tmp_path, {})


def test_a_test_larger_than_the_memory(pocket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a set are those of all its pictures at once, and no more than twice `TOGETHER` are there at a time."""
    s = runs.setting(given(), tmp_path, {})
    pipe, pictures = s.build("TIP"), runs.Generated(11, 32, 5)
    s = dataclasses.replace(s, test=Degraded(pictures, 32, **TASKS["parameterised"]))
    every = [s.test[i] for i in range(11)]
    at_once = s.restore(pipe, every), torch.stack([x.clean for x in every])
    monkeypatch.setattr(runs, "TOGETHER", 3)
    monkeypatch.setattr(runs, "AT_ONCE", 2)
    parts = list(runs.whole_test(s, pipe))
    assert [len(clean) for _, clean in parts] == [4, 4, 3]
    torch.testing.assert_close(torch.cat([r for r, _ in parts]), at_once[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([c for _, c in parts]), at_once[1])
    values, _ = runs.score(iter(parts))
    assert values["PSNR"] == pytest.approx(float(psnr(*at_once).mean()), abs=1e-3)
    assert values["SSIM"] == pytest.approx(float(ssim(*at_once).mean()), abs=1e-5)
    assert len(list(runs.whole_test(s, pipe, "wrong restoration prompt"))) == 3


def test_results_stand_in_the_tables_they_belong_to(tmp_path: Path) -> None:
    scores = {"PSNR": 20.0, "SSIM": 0.5, "LPIPS": 0.25}
    for value, changes in enumerate(
        (
            {},
            {"method": "semantic only"},
            {"method": "plain ControlNet", "mid": "add"},
            {"guidance": 3.0},
            {"texts": "blind prompt"},
            {"scale": 0.5},
            {"base": "sd21"},
            {"degradation": "real-esrgan"},
            {"dataset": "restoration/div2k"},
            {"dataset": "restoration/div2k", "degradation": "real-esrgan"},
        )
    ):
        rows = runs.results(given(**changes), tmp_path, scores | {"LPIPS": value / 100})
    assert len(rows) == 10
    names = {t: {m: v for (m, s), v in runs.cells(rows, t).items() if s == "LPIPS"} for t in runs.TABLES}
    assert names["comparison-parameterised"] == {
        "TIP": 0.0,
        "semantic only": 0.01,
        "plain ControlNet, middle: add": 0.02,
        "TIP, sd21": 0.06,
    }
    assert names["comparison-real-esrgan"] == {"TIP": 0.07}
    assert names["comparison-div2k"] == {"TIP": 0.08, "TIP, real-esrgan": 0.09}
    published = {t["id"]: t for t in paper("tip")["tables"]}
    assert set(runs.TABLES) <= set(published)
    assert set(runs.ABLATIONS.values()) == {row["method"] for row in published["ablations"]["rows"]}
    assert names["ablations"]["without the restoration prompt"] == 0.01


def test_modulated_middle_of_a_plain_controlnet_is_added(pocket: None, tmp_path: Path) -> None:
    p = given(method="plain ControlNet")
    assert runs.setting(p, tmp_path, {}).build("plain ControlNet").adaptor.config.mid == "add"
    p = given(mid="none")
    assert runs.setting(p, tmp_path, {}).build("TIP").adaptor.config.mid == "none"


FULL = """
from types import SimpleNamespace
from pathlib import Path
from companion import record
from companion.runs import tip
p = SimpleNamespace(**{settings!r})
s = tip.setting(p, Path("."), {{}})
pipe = s.build(p.method)
history = s.learn(pipe, p.method)
assert sum(t.numel() for t in pipe.adaptor.parameters()) == 372_758_800
assert len(history) == 2
assert s.restore(pipe, [s.test[0]]).shape == (1, 3, tip.DRY_SIZE, tip.DRY_SIZE)
print(record.peak_memory_mb())
"""


@pytest.mark.slow
def test_dry_run_at_the_size_of_stable_diffusion() -> None:
    start = time.monotonic()
    code = FULL.format(settings=vars(given(guidance=3.0)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 300
    assert float(done.stdout.splitlines()[-1]) < 12_000
    assert done.stderr == ""


def test_sizes_are_those_of_the_spec() -> None:
    assert set(runs.BASES) == set(runs.HUB) == set(tip_pipeline.SIZES) - {"pocket"}
