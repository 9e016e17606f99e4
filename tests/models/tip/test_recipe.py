"""TIP's runs: the recipe on small models, resuming, the prompts of each test, the dry run at full size."""

import ast
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

pytest.importorskip("diffusers")

from companion.data.degradations import BLIND
from companion.data.restoration import TASKS, Degraded
from companion.errors import BadCheckpoint, CorruptFile, MissingData, MissingWeights
from companion.evaluation.metrics.restoration import psnr, ssim
from companion.evaluation.recipe_parity import InOrder
from companion.models.tip import TIPPipeline, load_adaptor, recipe, save_adaptor
from companion.models.tip import model as tip
from companion.models.tip import pipeline as tip_pipeline
from companion.ops.papers import paper
from tests.conftest import interrupted, parameters
from tests.models.common import refuses
from tests.models.tip.test_model import save_narrow
from tests.small import shrink, small_pipe


def given(**changes) -> SimpleNamespace:
    settings = dict(profile="paper", dry_run=True, size=32, steps=3, data_root="nowhere", accelerator="cpu")
    return parameters("tip", **settings | changes)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "WORKERS", 0)


@pytest.fixture
def pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models instead of Stable Diffusion."""
    shrink("tip", monkeypatch)


@pytest.fixture(scope="module")
def data() -> Degraded:
    return Degraded(recipe.Generated(6, 32, 0), 32, fresh=True)


def weights(pipe: TIPPipeline) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in pipe.adaptor.state_dict().items()}


@pytest.mark.parametrize("method", recipe.METHODS)
def test_dry_run_trains_and_restores(pocket: None, method: str, tmp_path: Path) -> None:
    s = recipe.setting(given(method=method), tmp_path)
    pipe = s.build(method)
    before, frozen = weights(pipe), {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    history = s.train(pipe, method)
    assert list(s.learning_rates) == [method] and not list(tmp_path.iterdir())
    assert [row["lr"] for row in history] == [1e-5, 1e-5]
    assert all(row["loss"] == row["loss"] for row in history)
    assert any(not torch.equal(t, before[n]) for n, t in pipe.adaptor.state_dict().items())
    assert all(torch.equal(t, frozen[n]) for n, t in pipe.unet.state_dict().items())
    assert pipe.adaptor.config.fusion == ("add" if method == "plain ControlNet" else "modulate")
    samples = [s.test[i] for i in range(2)]
    restored = s.restore(pipe, samples, recipe.texts_of(method))
    assert restored.shape == (2, 3, 32, 32)
    values, reasons = recipe.score([(restored, torch.stack([x.clean for x in samples]))])
    assert {"PSNR", "SSIM"} <= set(values) and set(values) | set(reasons) == set(recipe.SCORES)


def test_methods_read_what_they_are_said_to(data: Degraded) -> None:
    for method, (semantic, restoration) in {
        "TIP": (True, True),
        "no text": (False, False),
        "semantic only": (True, False),
        "restoration only": (False, True),
        "no skipping": (True, True),
    }.items():
        torch.manual_seed(0)
        found = recipe.samples(data.pictures, 16, method, 0)
        drawn = [found[i % 6] for i in range(60)]
        assert any(s.semantic for s in drawn) == semantic
        assert any(s.restoration != BLIND for s in drawn) == restoration
        if method == "no skipping":
            assert all(len(s.ops) >= 6 for s in drawn if s.ops is not None)
    assert recipe.texts_of("no text") == "no text" and recipe.texts_of("TIP") == "own"
    assert recipe.texts_of("semantic only", "prompts swapped") == "prompts swapped"


def test_gradients_that_are_added_up_are_those_of_the_whole_batch(data: Degraded, monkeypatch) -> None:
    """Times and noise are drawn for each part of a batch, so here they are fixed."""
    fixed, plain = Degraded(data.pictures, 32, **TASKS["parameterised"]), tip.loss

    def still(model, batch, scheduler):
        z = batch[0]
        return plain(model, batch, scheduler, t=torch.full((len(z),), 500), noise=z.flip(-1))

    def trained(micro_batch: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        pipe, p = small_pipe(), given(dry_run=False)
        history = recipe.train(p, pipe, fixed, epochs=3, batch=4, warmup=0, micro_batch=micro_batch)
        return weights(pipe), [row["loss"] for row in history]

    with monkeypatch.context() as patch:
        patch.setattr(tip, "loss", still)
        (whole, first), (parts, second) = trained(4), trained(2)
    assert first == pytest.approx(second, rel=1e-5)
    # Adam divides by the gradient's size: rounding of a tiny one moves a weight by at most a learning rate each step
    assert all((whole[n] - t).abs().max() <= 3 * 2e-5 for n, t in parts.items())
    torch.testing.assert_close(parts["branch.controlnet_mid_block.bias"], whole["branch.controlnet_mid_block.bias"])


def written_out(pipe, samples, draws, steps: int, batch: int, lr: float, warmup: int) -> list[float]:
    """The training of an adaptor by the equations, in place: the loss of each step. `draws`: u and noise of each."""
    facts = pipe.scheduler.config
    assert facts.beta_schedule == "scaled_linear"
    betas = torch.linspace(facts.beta_start**0.5, facts.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if facts.rescale_betas_zero_snr:  # at the last time nothing of the image is left (Lin et al., WACV 2024)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    kept = root.square().float()
    parameters = [t for t in pipe.adaptor.parameters() if t.requires_grad]
    moments, losses = [(0, 0)] * len(parameters), []
    for step in range(steps):
        some = samples[step * batch : (step + 1) * batch]
        clean, y = (2 * torch.stack([s[i] for s in some]) - 1 for i in (0, 1))
        u, noise = draws[step]
        with torch.no_grad():
            z = pipe.vae.encode(clean).latent_dist.mean * pipe.vae.config.scaling_factor
            c_s, c_r = pipe.states([s.semantic for s in some]), pipe.states([s.restoration for s in some])
        t = (1000 * u).long()
        a, b = (share.sqrt()[:, None, None, None] for share in (kept[t], 1 - kept[t]))
        target = {"epsilon": noise, "sample": z, "v_prediction": a * noise - b * z}[facts.prediction_type]
        loss = (pipe.model(a * z + b * noise, t, c_s, c_r, y) - target).square().mean()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        rate = lr * min(1, step / (warmup - 1))
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            g = g * torch.clamp(1.0 / (norm + 1e-6), max=1)
            moments[i] = 0.9 * moments[i][0] + 0.1 * g, 0.999 * moments[i][1] + 0.001 * g**2
            first, second = moments[i][0] / (1 - 0.9 ** (step + 1)), moments[i][1] / (1 - 0.999 ** (step + 1))
            with torch.no_grad():  # all tensors decay
                p.mul_(1 - rate * 1e-2).sub_(rate * first / (second.sqrt() + 1e-8))
    return losses


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction"])
def test_a_training_is_the_one_written_out(predicted: str, data: Degraded, monkeypatch) -> None:
    """Six steps, three of them warm-up: the same losses and the same changes of the adaptor."""
    steps, batch, lr = 6, 2, 1e-3
    fixed = Degraded(data.pictures, 32, **TASKS["parameterised"])
    samples = [fixed[i % 6] for i in range(steps * batch)]
    generator = torch.Generator().manual_seed(0)
    latents = tip.to_latents(small_pipe().vae, torch.zeros(batch, 3, 32, 32)).shape
    draws = [(torch.rand(batch, generator=generator), torch.randn(latents, generator=generator)) for _ in range(steps)]

    def untrained() -> TIPPipeline:
        pipe = small_pipe()
        pipe.scheduler.register_to_config(prediction_type=predicted)
        return pipe

    pipe = untrained()
    start = weights(pipe)
    losses = written_out(pipe, samples, draws, steps, batch, lr, 3)
    expected = weights(pipe)

    pipe, uniform, normal = untrained(), iter([u for u, _ in draws]), iter([noise for _, noise in draws])
    monkeypatch.setattr(recipe, "LEARNING_RATE", lr)  # the published one moves weights by less than their rounding
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **options: next(uniform))
        patch.setattr(torch, "randn_like", lambda *like, **options: next(normal))
        p = given(dry_run=False)
        history = recipe.train(p, pipe, InOrder(samples, steps * batch), epochs=1, batch=batch, warmup=3)
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-3)
    after, still = weights(pipe), 0
    for name, tensor in after.items():
        ours, theirs = tensor - start[name], expected[name] - start[name]
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), (name, float((ours - theirs).norm() / theirs.norm()))
        still += not ours.any()
    assert still < len(after) / 10


def test_a_killed_training_resumes_to_the_same_bits_and_its_adaptor_is_saved(released: Path, tmp_path, monkeypatch):
    p = given(dry_run=False, dataset="folder", data_root=str(released))
    of = recipe.Checkpoint.of
    monkeypatch.setattr(recipe.Checkpoint, "of", lambda folder, name, every, **facts: of(folder, name, 2, **facts))

    def run(out: Path) -> TIPPipeline:
        s = recipe.setting(p, out)
        pipe = s.build("TIP")
        s.train(pipe, "TIP", epochs=5, batch=2)
        return pipe

    whole = weights(run(tmp_path / "whole"))
    with interrupted(monkeypatch, tip, "loss", 3):
        run(tmp_path / "cut")
    (file,) = (tmp_path / "cut" / "checkpoints").glob("*.pt")
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == 2 and all(name.startswith("model.adaptor.") for name in saved["model"]), "nothing frozen"
    pipe = run(tmp_path / "cut")
    (folder,) = (tmp_path / "cut" / "trained").iterdir()
    for adaptor in (pipe.adaptor, load_adaptor(folder, pipe.unet)):
        assert all(torch.equal(t, whole[n]) for n, t in adaptor.state_dict().items())


def test_cached_encodings_give_the_same_loss(data: Degraded) -> None:
    pipe = small_pipe()
    chosen = [Degraded(data.pictures, 32, **TASKS["parameterised"])[i] for i in range(5)]
    cached = recipe.cached(pipe, chosen, batch=2)
    assert [len(t) for t in cached.tensors] == [5] * 4
    z, y, semantic, restoration = cached.tensors
    assert z.shape == (5, 4, 8, 8) and semantic.shape == restoration.shape == (5, 96, 32)
    items = recipe.Tensors(chosen, pipe)
    clean, degraded, c_s, c_r = (torch.stack(part) for part in zip(*(items[i] for i in range(5)), strict=True))
    assert torch.equal(degraded, y)
    torch.testing.assert_close(tip.to_latents(pipe.vae, clean), z)
    drawn = {"t": torch.tensor([0, 100, 500, 700, 999]), "noise": torch.randn_like(z)}
    one = tip.loss(pipe.model, (z, y, semantic, restoration), pipe.scheduler, **drawn)
    two = tip.loss(pipe.model, (z, y, c_s, c_r), pipe.scheduler, **drawn)
    torch.testing.assert_close(one, two)


def test_start_noise_is_the_samples_own(data: Degraded) -> None:
    pipe = small_pipe()
    chosen = [Degraded(data.pictures, 32, **TASKS["parameterised"])[i] for i in range(3)]
    together = recipe.restore(pipe, chosen, steps=2)
    torch.testing.assert_close(together, recipe.restore(pipe, chosen, steps=2, batch=1), atol=1e-5, rtol=1e-5)
    # before training the texts of the adaptor do nothing: only the noise could differ
    torch.testing.assert_close(together, recipe.restore(pipe, chosen, "blind prompt", steps=2), atol=1e-6, rtol=0)
    assert not torch.allclose(together, recipe.restore(pipe, chosen, steps=2, seed=1), atol=1e-3)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A narrow Stable Diffusion in the layout of the hub, below <data_root>/weights; images of one's own."""
    save_narrow(tmp_path / "weights" / recipe.BASES["sd15"])
    (tmp_path / "images").mkdir()
    for i in range(3):
        save_image(recipe.Generated(1, 40, i)[0][0], tmp_path / "images" / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "caption": f"a zebra, number {i}"}) for i in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_own_folder_on_a_released_model_trained_saved_and_tested(released: Path, tmp_path: Path) -> None:
    p = given(dry_run=False, dataset="folder", data_root=str(released), degradation="real-esrgan")
    s = recipe.setting(p, tmp_path)
    pipe = s.build("TIP")
    history = s.train(pipe, "TIP", epochs=2, batch=2)
    assert len(history) == 2
    before, (folder,) = weights(pipe), (tmp_path / "trained").iterdir()
    refuses((lambda: save_adaptor(pipe.adaptor, released / "images"), "not exist yet"))
    assert len(list((released / "images").iterdir())) == 3
    # training and test images are disjoint
    _, train, test = recipe._datasets(p)
    assert [Path(f).name for f in train.sources] == ["1.png", "2.png"]
    assert [Path(f).name for f in s.test.pictures.sources] == ["0.png"] == [Path(f).name for f in test.sources]
    # the same run again: the training is only read, and its adaptor replaces the saved one
    again = recipe.setting(p, tmp_path)
    second = again.build("TIP")
    start = time.monotonic()
    assert again.train(second, "TIP", epochs=2, batch=2) == history and time.monotonic() - start < 5
    assert all(torch.equal(t, before[n]) for n, t in weights(second).items())
    other = recipe.setting(given(**vars(p) | {"size": 64}), tmp_path)
    assert other.train(other.build("TIP"), "TIP", epochs=2, batch=2) != history
    save_adaptor(pipe.adaptor, folder)
    chosen = [s.test[0]]
    restored = s.restore(pipe, chosen)
    tested = recipe.setting(given(**vars(p) | {"checkpoint": str(folder)}), tmp_path)
    assert tested.train is None and len(tested.test) == 3
    assert torch.equal(tested.restore(tested.build("TIP"), chosen), restored)
    for change in ({"method": "plain ControlNet"}, {"mid": "none"}):  # it would be tested under another name
        wrong = recipe.setting(given(**vars(p) | {"checkpoint": str(folder)} | change), tmp_path)
        refuses((lambda wrong=wrong, change=change: wrong.build(change.get("method", "TIP")), "this one has"))
    (released / "captions.jsonl").unlink()  # without captions it is another training
    bare = recipe.setting(p, tmp_path)
    assert bare.train(bare.build("TIP"), "TIP", epochs=2, batch=2) != history
    refuses((lambda: load_adaptor(folder, small_pipe().unet), "block_out_channels"), error=BadCheckpoint)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    refuses((lambda: load_adaptor(folder, pipe.unet), "adaptor"), error=CorruptFile)


def test_what_is_missing_is_said(released: Path, tmp_path: Path) -> None:
    refuses((lambda: recipe.setting(given(dry_run=False), tmp_path), "COCO 2017"), error=MissingData)
    p = given(dry_run=False, dataset="folder", data_root=str(released / "images"))
    assert recipe.base(p) == recipe.HUB["sd15"]
    assert recipe.base(given(weights="x")) == "x"
    refuses((lambda: load_adaptor(tmp_path / "nowhere", small_pipe().unet), "adaptor"), error=MissingWeights)
    with pytest.raises(MissingWeights):
        recipe.setting(given(**vars(p) | {"weights": str(tmp_path / "no")}), tmp_path).build("TIP")


def test_what_cannot_be_run_is_said_before_training(released: Path, tmp_path: Path) -> None:
    def setting(**changes: object) -> Callable[[], object]:
        return lambda: recipe.setting(given(**{"dry_run": False} | changes), tmp_path)

    (released / "captions.jsonl").write_text('{"file": "0.png", "caption": ""}')
    refuses(
        (setting(task="test"), "trained adaptor"),
        (setting(task="restore"), "trained adaptor"),
        (setting(texts="wrong restoration prompt", degradation="real-esrgan"), "the same"),
        (setting(texts="wrong semantic prompt", dataset="restoration/div2k"), "no captions"),
        (setting(dataset="folder", data_root=str(released)), "two or more"),
    )
    (released / "captions.jsonl").unlink()
    own = {"dataset": "folder", "data_root": str(released)}
    refuses(*((setting(texts=f"wrong {kind} prompt", **own), "1 test images") for kind in ("semantic", "restoration")))


def test_a_test_larger_than_the_memory(pocket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are those of all images at once, and at most twice `TEST_BATCH` are in memory."""
    s = recipe.setting(given(), tmp_path)
    pipe, images = s.build("TIP"), recipe.Generated(11, 32, 5)
    s = dataclasses.replace(s, test=Degraded(images, 32, **TASKS["parameterised"]))
    every = [s.test[i] for i in range(11)]
    at_once = s.restore(pipe, every), torch.stack([x.clean for x in every])
    monkeypatch.setattr(recipe, "TEST_BATCH", 3)
    monkeypatch.setattr(recipe, "MICRO_BATCH", 2)
    parts = list(recipe.whole_test(s, pipe))
    assert [len(clean) for _, clean in parts] == [4, 4, 3]
    torch.testing.assert_close(torch.cat([r for r, _ in parts]), at_once[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([c for _, c in parts]), at_once[1])
    values, _ = recipe.score(iter(parts))
    assert values["PSNR"] == pytest.approx(float(psnr(*at_once).mean()), abs=1e-3)
    assert values["SSIM"] == pytest.approx(float(ssim(*at_once).mean()), abs=1e-5)
    assert len(list(recipe.whole_test(s, pipe, "wrong restoration prompt"))) == 3


def test_results_stand_in_the_tables_they_belong_to(tmp_path: Path) -> None:
    runs = (
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
        {"size": 256, "steps": 20},
    )
    for value, changes in enumerate(runs):
        p = given(**{"size": 512, "steps": 50} | changes)
        rows = recipe.results(p, tmp_path, {"PSNR": 20.0, "SSIM": 0.5, "LPIPS": value / 100})
    assert len(rows) == 11 == len(recipe.results(given(), tmp_path))
    names = {t: {m: v for (m, s), v in recipe.cells(rows, t).items() if s == "LPIPS"} for t in recipe.TABLES}
    ours = {"TIP": 0.0, "semantic only": 0.01, "plain ControlNet, middle: add": 0.02, "TIP, sd21": 0.06}
    ours |= {"TIP, 256 px, 20 steps": 0.1}
    assert names["comparison-parameterised"] == ours
    assert names["comparison-real-esrgan"] == {"TIP": 0.07}
    assert names["comparison-div2k"] == {"TIP": 0.08, "TIP, real-esrgan": 0.09}
    assert names["ablations"]["without the restoration prompt"] == 0.01
    published = {t["id"]: t for t in paper("tip")["tables"]}
    assert set(recipe.TABLES) <= set(published)
    assert set(recipe.ABLATIONS.values()) == {row["method"] for row in published["ablations"]["rows"]}
    assert set(recipe.BASES) == set(recipe.HUB) == set(tip_pipeline.SIZES) - {"pocket"}


def test_results_of_several_seeds_are_averaged_and_older_rows_are_of_the_default_size(tmp_path: Path) -> None:
    values, runs = {"SSIM": 0.5}, [given(size=512, steps=50, seed=seed) for seed in (0, 1)]
    recipe.results(runs[0], tmp_path, values | {"PSNR": 18.0}).drop(columns=["size", "steps", "seed"]).to_csv(
        tmp_path / "measured.csv", index=False
    )
    assert recipe.results(runs[0], tmp_path)[["size", "steps", "seed"]].to_numpy().tolist() == [[512, 50, 0]]
    for p, found in zip(runs, (20.0, 22.0), strict=True):  # the first one replaces the older row
        rows = recipe.results(p, tmp_path, values | {"PSNR": found})
    assert recipe.cells(rows, "comparison-parameterised") == {("TIP", "PSNR"): 21.0, ("TIP", "SSIM"): 0.5}


def test_the_usual_size_steps_and_seed_are_the_notebooks_defaults(root: Path) -> None:
    cells = json.loads((root / "notebooks" / "tip.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    defaults = {line.targets[0].id: line.value.value for line in ast.parse(source).body}
    assert {name: defaults[name] for name in recipe.USUAL} == recipe.USUAL


def test_modulated_middle_of_a_plain_controlnet_is_added(pocket: None, tmp_path: Path) -> None:
    for method, changes, mid in (("plain ControlNet", {}, "add"), ("TIP", {"mid": "none"}, "none")):
        found = recipe.setting(given(method=method, **changes), tmp_path)
        assert found.build(method).adaptor.config.mid == mid


FULL = """
from pathlib import Path
from types import SimpleNamespace
from companion.models.tip import recipe
from companion.ops import record
p = SimpleNamespace(**{settings!r})
s = recipe.setting(p, Path("."))
pipe = s.build(p.method)
history = s.train(pipe, p.method)
assert sum(t.numel() for t in pipe.adaptor.parameters()) == 372_758_800
assert len(history) == 2
assert s.restore(pipe, [s.test[0]]).shape == (1, 3, recipe.DRY_SIZE, recipe.DRY_SIZE)
print(record.peak_memory_mb())
"""


@pytest.mark.slow
@pytest.mark.large
def test_dry_run_at_the_size_of_stable_diffusion() -> None:
    start = time.monotonic()
    code = FULL.format(settings=vars(given(guidance=3.0)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 300
    assert float(done.stdout.splitlines()[-1]) < 12_000
    assert done.stderr == ""


def test_the_protocol_is_that_of_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are read off what is run."""
    found = recipe.protocol()
    assert found["optimiser"] == "AdamW, betas 0.9 and 0.999, 1e-05, decay 0.01 on all tensors"
    assert found["prompts"] == f'"{BLIND}" for 0.5 of the other samples; no semantic prompt for 0.3'
    monkeypatch.setattr(recipe, "LEARNING_RATE", 0.5)
    assert "0.5, decay" in recipe.protocol()["optimiser"]
