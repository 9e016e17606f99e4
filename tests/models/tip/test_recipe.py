"""TIP's recipe on small models: the training written out, the prompts of each method, the test, tables of results."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

pytest.importorskip("diffusers")

from companion.errors import BadCheckpoint, CorruptFile, MissingData, MissingWeights
from companion.evaluation.metrics.restoration import psnr
from companion.io.files import read_json
from companion.models.tip import TIPPipeline, load_adaptor, recipe, save_adaptor
from companion.models.tip.degradations import BLIND, TASKS, Degraded
from companion.training.recipe import run
from tests.conftest import interrupted, parameters
from tests.models.common import refuses
from tests.models.tip.test_model import save_narrow
from tests.papers import tip as layouts
from tests.papers.common import shrink
from tests.papers.tip import small_pipe
from tests.recipes.runner import InOrder


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
    return Degraded(recipe.Generated(6, 32, 0), 32, **TASKS["parameterised"])


def weights(pipe: TIPPipeline) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in pipe.adaptor.state_dict().items()}


def test_a_dry_run_measures_a_step(pocket: None, tmp_path: Path) -> None:
    recipe.run(given(), tmp_path)
    step = read_json(tmp_path / "step.json")
    assert step["images"] > 0 and step["seconds"] > 0
    assert [path.is_dir() for path in (tmp_path / "trained").iterdir()] == [True]


# --- training ---------------------------------------------------------------------------------------------------------


def test_each_method_reads_its_prompts(data: Degraded) -> None:
    for method, semantic, restoration in (
        ("TIP", True, True),
        ("semantic only", True, False),
        ("restoration only", False, True),
    ):
        torch.manual_seed(0)
        found = recipe.samples(data.pictures, 16, method, 0)
        drawn = [found[i % 6] for i in range(30)]
        assert any(s.semantic for s in drawn) == semantic
        assert any(s.restoration != BLIND for s in drawn) == restoration
    assert [recipe.texts_of(m) for m in ("TIP", "restoration only")] == ["own", "restoration only"]
    assert recipe.texts_of("semantic only", "prompts swapped") == "prompts swapped"


def written_out(pipe, samples, draws, steps: int, batch: int, lr: float, warmup: int) -> list[float]:
    """The training of an adaptor, in place: the loss of each step. `draws`: u and noise of each sample."""
    parameters, kept = [*pipe.model.adaptor.parameters()], pipe.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2)  # all tensors decay
    losses = []
    for step in range(steps):
        some = slice(step * batch, (step + 1) * batch)
        clean, y = (2 * torch.stack([s[i] for s in samples[some]]) - 1 for i in (0, 1))
        u, noise = (torch.cat(part) for part in zip(*draws[some], strict=True))
        with torch.no_grad():
            z = pipe.vae.encode(clean).latent_dist.mean * pipe.vae.config.scaling_factor
            c_s, c_r = (pipe.states([getattr(s, name) for s in samples[some]]) for name in ("semantic", "restoration"))
        t = (1000 * u).long()
        a, b = (share.sqrt()[:, None, None, None] for share in (kept[t], 1 - kept[t]))
        targets = {"epsilon": noise, "sample": z, "v_prediction": a * noise - b * z}
        target = targets[pipe.scheduler.config.prediction_type]
        loss = (pipe.model(a * z + b * noise, t, c_s, c_r, y) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, step / (warmup - 1))
        optimizer.step()
    return losses


@pytest.mark.parametrize(("predicted", "micro_batch"), [("epsilon", 8), ("sample", 1), ("v_prediction", 8)])
def test_a_training_is_the_one_written_out(predicted: str, micro_batch: int, data: Degraded, monkeypatch) -> None:
    """Six steps, three of them warm-up: the same losses and the same changes of the adaptor."""
    steps, batch, lr, generator = 6, 2, 1e-3, torch.Generator().manual_seed(0)
    samples = [data[i % 6] for i in range(steps * batch)]
    draws = [(torch.rand(1, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)) for _ in samples]

    def untrained() -> TIPPipeline:
        pipe = small_pipe()
        pipe.scheduler.register_to_config(prediction_type=predicted)
        return pipe

    pipe = untrained()
    start = weights(pipe)
    losses = written_out(pipe, samples, draws, steps, batch, lr, 3)
    expected, pipe, given_ = weights(pipe), untrained(), [iter(kind) for kind in zip(*draws, strict=True)]
    uniform, normal = (lambda count, it=it: torch.cat([next(it) for _ in range(count)]) for it in given_)
    monkeypatch.setattr(recipe, "LEARNING_RATE", lr)  # the published one moves weights by less than their rounding
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda count, **options: uniform(count))
        patch.setattr(torch, "randn_like", lambda like, **options: normal(len(like)))
        for name, value in {"EPOCHS": 1, "BATCH": batch, "WARMUP": 3, "MICRO_BATCH": micro_batch}.items():
            patch.setattr(recipe, name, value)
        _, history = run(recipe.training(given(dry_run=False), pipe, InOrder(samples, steps * batch)))
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-3)
    after, still = weights(pipe), 0
    for name, tensor in after.items():
        ours, theirs = tensor - start[name], expected[name] - start[name]
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm(), name
        still += not ours.any()
    assert still < len(after) / 10


# --- own images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A narrow Stable Diffusion in the layout of the hub, below <data_root>/weights; images of one's own."""
    save_narrow(tmp_path / "weights" / recipe.WEIGHTS)
    (tmp_path / "images").mkdir()
    for i in range(3):
        save_image(recipe.Generated(1, 40, i)[0][0], tmp_path / "images" / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "caption": f"a zebra, number {i}"}) for i in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_own_images_on_a_released_model_are_trained_saved_and_tested(released: Path, tmp_path: Path) -> None:
    p = given(dry_run=False, dataset="folder", data_root=str(released), degradation="real-esrgan")
    parts = [[Path(f).name for f in part.sources] for part in recipe.datasets(p)[1:]]
    assert parts == [["1.png", "2.png"], ["0.png"]]
    first = recipe.run(p, tmp_path)
    pipe, before = first.pipe, weights(first.pipe)
    (folder,) = (tmp_path / "trained").iterdir()
    (file,) = (tmp_path / "checkpoints").glob("*.pt")
    assert all(n.startswith("model.adaptor.") for n in torch.load(file, weights_only=True)["model"]), "nothing frozen"
    again = recipe.run(p, tmp_path)  # only read
    assert len(first.samples) == 1 and again.scores == first.scores
    p.checkpoint = str(folder)
    tested = recipe.run(p, tmp_path)
    assert len(tested.samples) == 3 and all(torch.equal(t, before[n]) for n, t in weights(tested.pipe).items())
    refuses((lambda: recipe.pipeline(p, "plain ControlNet"), "plain ControlNet"))  # it would be tested as another
    refuses((lambda: save_adaptor(pipe.adaptor, released / "images"), "images"))
    assert len(list((released / "images").iterdir())) == 3
    refuses((lambda: load_adaptor(folder, small_pipe().unet), "block_out_channels"), error=BadCheckpoint)
    refuses((lambda: load_adaptor(tmp_path / "nowhere", pipe.unet), "nowhere"), error=MissingWeights)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"truncated")
    refuses((lambda: load_adaptor(folder, pipe.unet), "adaptor"), error=CorruptFile)


def test_a_trained_adaptor_needs_the_test_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.write("restoration/coco", tmp_path, monkeypatch)
    for path in ((tmp_path / "coco/annotations/captions_train2017.json"), *(tmp_path / "coco/train2017").iterdir()):
        path.unlink()
    p = given(dataset="restoration/coco", data_root=str(tmp_path), checkpoint="trained")
    title, train, test = recipe.datasets(p)
    assert "generated" not in title and train is None and len(test) == 3
    p.checkpoint = ""
    refuses((lambda: recipe.datasets(p), "captions_train2017"), error=MissingData)


def test_what_is_missing_or_would_mean_nothing_is_refused_before_training(released: Path, tmp_path: Path) -> None:
    def asked(**changes: object) -> Callable[[], object]:
        return lambda: recipe.run(given(**{"dry_run": False} | changes), tmp_path)

    own = {"dataset": "folder", "data_root": str(released)}
    refuses((asked(), "COCO 2017"), error=MissingData)
    p = given(dry_run=False, dataset="folder", data_root=str(released / "images"))
    assert recipe.base(p) == recipe.HUB and recipe.base(given(weights="x")) == "x"
    refuses((asked(weights=str(tmp_path / "none"), **own), "none"), error=MissingWeights)
    refuses((asked(task="test"), "test"), (asked(texts="wrong restoration prompt", **own), "only one"))
    (released / "captions.jsonl").write_text('{"file": "0.png", "caption": ""}')
    for i in (1, 2):
        (released / "images" / f"{i}.png").unlink()
    refuses((asked(**own), "1"))


def test_images_in_a_row_of_one_caption_have_no_wrong_prompt(released: Path) -> None:
    lines = [json.dumps({"file": f"{i}.png", "caption": text}) for i, text in enumerate(["a cat", "a cat", "a dog"])]
    (released / "captions.jsonl").write_text("\n".join(lines))
    p = given(
        dry_run=False, dataset="folder", data_root=str(released), checkpoint="trained", texts="wrong semantic prompt"
    )
    assert len(recipe.datasets(p)[2]) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "TEST_BATCH", 1)
        refuses((lambda: recipe.datasets(p), "wrong semantic prompt"))


# --- test and results -------------------------------------------------------------------------------------------------


def test_the_start_noise_of_a_sample_is_its_own(data: Degraded) -> None:
    pipe, chosen, close = small_pipe(), [data[i] for i in range(3)], {"rtol": 1e-4, "atol": 1e-4}
    together = recipe.restore(pipe, chosen, steps=2)
    torch.testing.assert_close(together, recipe.restore(pipe, chosen, steps=2, batch=1), **close)
    torch.testing.assert_close(together[2:], recipe.restore(pipe, chosen[2:], steps=2, first=2), **close)
    # before training the texts of the adaptor do nothing: only the noise could differ
    torch.testing.assert_close(together, recipe.restore(pipe, chosen, "blind prompt", steps=2), **close)
    assert not torch.allclose(together, recipe.restore(pipe, chosen, steps=2, seed=1), atol=0.01)
    refuses(
        (lambda: recipe.restore(pipe, chosen, batch=-1), "batch"),
        (lambda: recipe.restore(pipe, []), "data"),
        (lambda: recipe.restore(pipe, chosen, steps=0), "steps"),
    )


def test_fid_sees_which_images_are_restored_and_lpips_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(list):
        def to(self, device: torch.device) -> None:
            pass

        def update(self, *images: torch.Tensor, **real: bool) -> None:
            self.append((*(float(x[0, 0, 0, 0]) for x in images), *real.values()))

        def compute(self) -> float:
            return 7.0

    metrics = {"FID": Seen(), "LPIPS": Seen()}
    monkeypatch.setattr(recipe, "perceptual", lambda: (dict(metrics), {}))
    values, _ = recipe.score([(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16))])
    assert metrics == {"FID": [(1.0, True), (0.0, False)], "LPIPS": [(0.0, 1.0)]}
    assert (values["FID"], values["LPIPS"]) == (7.0, 7.0)


def test_scores_of_a_test_larger_than_the_memory_are_those_of_all_images_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    test = Degraded(recipe.Generated(11, 32, 5), 32, **TASKS["parameterised"])
    restore = functools.partial(recipe.restore, small_pipe(), steps=2)
    every = [test[i] for i in range(11)]
    restored, clean = restore(every), torch.stack([x.clean for x in every])
    monkeypatch.setattr(recipe, "TEST_BATCH", 3)
    monkeypatch.setattr(recipe, "MICRO_BATCH", 2)
    parts = list(recipe.whole_test(restore, test, "own", torch.device("cpu")))
    assert [len(clean) for _, clean in parts] == [4, 4, 3]
    torch.testing.assert_close(torch.cat([r for r, _ in parts]), restored, atol=1e-4, rtol=1e-4)
    assert recipe.score(iter(parts))[0]["PSNR"] == pytest.approx(float(psnr(restored, clean).mean()), abs=1e-2)
    for (images, truth), (again, same) in zip(
        recipe.whole_test(restore, test, "own", torch.device("cpu"), workers=2), parts, strict=True
    ):
        assert torch.equal(images, again) and torch.equal(truth, same)


def test_a_killed_test_restores_no_saved_image_again(released: Path, tmp_path: Path, monkeypatch) -> None:
    """Of three images, one a batch, two are restored when it is killed; the restored ones are deleted at the end."""
    monkeypatch.setattr(recipe, "TEST_BATCH", 1)
    p = given(dry_run=False, dataset="folder", data_root=str(released), degradation="real-esrgan")
    recipe.run(p, tmp_path)
    p.checkpoint = str(next((tmp_path / "trained").iterdir()))
    expected = recipe.run(p, tmp_path / "whole").scores
    with interrupted(monkeypatch, recipe, "restore", 2):
        recipe.run(p, tmp_path)
    with interrupted(monkeypatch, recipe, "restore", 1):
        recipe.run(SimpleNamespace(**vars(p) | {"scale": 0.5}), tmp_path)  # of which none is saved
    restored, seen = recipe.restore, []

    def counted(pipe, data, *args, **options):
        seen.append(options["first"])
        return restored(pipe, data, *args, **options)

    monkeypatch.setattr(recipe, "restore", counted)
    assert recipe.run(p, tmp_path).scores == expected and seen == [2]
    assert len(list((tmp_path / "restored").iterdir())) == 1, "of the other scale"


def test_results_stand_in_the_tables_they_belong_to(tmp_path: Path) -> None:
    for value, changes in enumerate(
        (
            {},
            {"method": "semantic only"},
            {"guidance": 3.0},  # in no table
            {"degradation": "real-esrgan"},
            {"dataset": "restoration/div2k", "degradation": "real-esrgan", "size": 256, "steps": 20},
            {"seed": 1},  # averaged with the first row
        )
    ):
        p = given(**{"size": 512, "steps": 50} | changes)
        scores = {"PSNR": 20.0, "SSIM": 0.5, "LPIPS": value / 100}
        row = {key: getattr(p, key) for key in recipe.RESULTS.keys}
        rows = recipe.RESULTS.measured(tmp_path / "measured.csv", row | scores)
    names = {t: {m: v for (m, s), v in recipe.cells(rows, t).items() if s == "LPIPS"} for t in recipe.RESULTS.cells}
    assert names["comparison-parameterised"] == pytest.approx({"TIP": 0.025, "semantic only": 0.01})
    assert names["comparison-real-esrgan"] == {"TIP": 0.03}
    assert names["comparison-div2k"] == {"TIP, real-esrgan, 256 px, 20 steps": 0.04}
    assert names["ablations"]["without the restoration prompt"] == 0.01
