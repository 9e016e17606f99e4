"""Tests that run on the simulated GPU, in a separate process: test_simulated.py starts pytest on this file."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from companion.errors import BadParameter, CompanionError
from companion.io.papers import slugs
from companion.training.callbacks import EMA, Callback, ClipNorm, Lookahead, ema_copy
from companion.training.checkpoints import Checkpoint
from companion.training.fit import fit, outputs_of
from companion.training.hardware import Hardware, evaluating
from companion.training.recipe import Opened
from companion.training.schedules import adamw
from tests.conftest import parameters
from tests.simulated import simdevice

sim = simdevice.install(project=("/lib/companion/", "on_gpu.py"))
GPU = Hardware("cuda")

from companion.models.bat import recipe as bat_recipe  # noqa: E402 (after the GPU is there)
from tests.edges.test_models import called, inputs  # noqa: E402
from tests.papers.common import hooks, of_all, shrink  # noqa: E402


def x() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3).cuda()


# --- the simulation


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "a sum of two devices": (lambda: x() + torch.ones(2, 3), "same device"),
        "a list of two devices": (lambda: torch.cat([x(), torch.ones(2, 3)]), "same device"),
        "a layer on the CPU": (lambda: nn.Linear(3, 4)(x()), "same device"),
        "written from the GPU": (lambda: torch.zeros(()).add_(x().sum()), "same device"),
        "NumPy": (lambda: x().numpy(), "to numpy"),
        "NumPy, from outside": (lambda: np.asarray(x()), "to numpy"),
        "a generator of the CPU": (
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            "device type for generator",
        ),
        "a product of integers": (lambda: x().long() @ x().long().T, "not implemented"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_gpu_refuses(what, message):
    with pytest.raises((RuntimeError, TypeError), match=message):
        what()


def test_what_a_gpu_allows():
    assert (x() + torch.tensor(2.0)).is_cuda and x()[torch.tensor([1])].is_cuda  # a number, and an index
    y = x()
    y[0, 1], y[1] = 7, torch.zeros(3)
    assert y.tolist() == [[0, 7, 2], [0, 0, 0]] and torch.ones(2).cuda().cpu().numpy().sum() == 2


def trained(device: str) -> tuple[torch.Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 5)).to(device)
    optimizer, generator = torch.optim.AdamW(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(3):
        h = model(torch.randn(4, 3, 8, 8, generator=generator).to(device)) * 1
        h[:, 2:4] *= 2
        h[:, 0] = h[:, 1] * 3
        loss = F.cross_entropy(h, torch.arange(4).to(device)) + h.diagonal().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss, model


def test_gradients_are_those_of_the_cpu():
    (one, cpu), (two, gpu) = trained("cpu"), trained("cuda")
    assert two.is_cuda and torch.equal(one, two.cpu())
    assert all(b.is_cuda and torch.equal(a, b.cpu()) for a, b in zip(cpu.parameters(), gpu.parameters(), strict=True))
    twin, file = copy.deepcopy(gpu), io.BytesIO()
    assert all(t.is_cuda for t in twin.state_dict().values())
    torch.save(gpu.state_dict(), file)
    for where, cuda in (("cpu", False), (None, True)):
        file.seek(0)
        assert all(t.is_cuda == cuda for t in torch.load(file, map_location=where, weights_only=True).values())


def test_waits_are_counted_but_not_those_for_pinned_memory():
    before = sim.syncs.total()
    x().sum().item()  # to the GPU, and back
    assert sim.syncs.total() == before + 2
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    next(iter(DataLoader(torch.ones(4, 2), 2, pin_memory=True))).to("cuda", non_blocking=True)
    assert sim.syncs.total() == before + 2
    x()[x() > 1]
    assert sim.syncs.total() == before + 5


# --- training


class Items(Dataset):
    """Pairs that a loader gives."""

    def __init__(self, data: TensorDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.data[index]


def pairs() -> TensorDataset:
    inputs = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :2].sin())


def run(model: nn.Module, data: Dataset | None = None, **changes) -> list[dict]:
    settings = {"epochs": 2, "batch": 8, "optimizer": adamw(1e-2), "hardware": GPU} | changes
    return fit(model, lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), data or pairs(), **settings)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 2)


class Average(nn.Module):
    """A layer and its moving average."""

    def __init__(self):
        super().__init__()
        self.own = linear()
        self.average = ema_copy(self.own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x)


def test_training_is_that_of_the_cpu_and_gives_the_model_back():
    models = [Average(), Average()]
    histories = []
    for model, hardware in zip(models, (Hardware("cpu"), GPU), strict=True):
        callbacks = [ClipNorm(0.1), Lookahead(2), EMA([(model.average, model.own)], lambda step: 0.5)]
        histories.append(run(model, callbacks=callbacks, hardware=hardware))
    assert histories[0] == histories[1]
    state, expected = (model.state_dict() for model in models)
    assert all(torch.equal(t, expected[name]) and not t.is_cuda for name, t in state.items())


def test_a_model_on_the_gpu_stays_there():
    model = linear().cuda()
    run(model)
    assert outputs_of(model, pairs(), hardware=GPU).device.type == "cpu"
    with evaluating(Hardware("cpu"), linear().cuda()) as device:
        assert device.type == "cpu"
    assert model.weight.is_cuda


def test_a_model_comes_back_from_predict_and_can_be_trained():
    model, data = linear(), pairs()
    found = outputs_of(model, data, hardware=GPU)
    assert found.dtype == torch.float32 and not found.is_inference() and not model.weight.is_inference()
    torch.testing.assert_close(found, outputs_of(model, Items(data), hardware=Hardware("cuda", workers=1)))
    assert not model.weight.is_cuda
    model(data.tensors[0]).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("wrap", [lambda data: data, Items], ids=["tensors", "loader"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_waits_for_nothing(wrap, precision):
    run(linear(), wrap(pairs()), callbacks=[ClipNorm(0.1), ClipNorm(0.1, per_tensor=True)],
        hardware=Hardware("cuda", precision=precision))  # fmt: skip
    _, steps, waits = sim.trainings()[-1]
    assert steps == 8 and not waits


def test_half_precision_is_in_the_model_alone():
    """Boxes and positions among the inputs keep their digits, as under a plain autocast."""
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    model = Looks(5, 2)
    run(model, hardware=Hardware("cuda", precision="bf16-mixed"))
    outputs_of(model, pairs(), hardware=Hardware("cuda", precision="bf16-mixed"))
    assert set(seen[::2]) == {torch.float32} and set(seen[1::2]) == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_training_ends_with_the_same_bits(precision, tmp_path):
    class Stop(Callback):
        def on_step_end(self, loop):
            if loop.step == 5:
                raise KeyboardInterrupt

    hardware = Hardware("cuda", precision=precision)
    whole, stopped = linear(), linear()
    run(whole, hardware=hardware)
    settings = {"checkpoint": Checkpoint(tmp_path / "c.pt", 2), "hardware": hardware}
    with pytest.raises(KeyboardInterrupt):
        run(stopped, callbacks=[Stop()], **settings)
    assert not stopped.weight.is_cuda  # also after an error
    again = linear()
    run(again, callbacks=[Callback()], **settings)
    assert torch.equal(again.weight, whole.weight)


def test_gradients_are_clipped_after_they_are_unscaled():
    seen = []

    class Looks(Callback):
        def on_gradients(self, loop):
            seen.append(loop.model.weight.grad.norm().item())

    for precision in ("32-true", "16-mixed"):
        callbacks = [Looks(), ClipNorm(0.01, per_tensor=True), Looks()]
        run(linear(), callbacks=callbacks, hardware=Hardware("cuda", precision=precision))
    full, half = seen[:2], seen[len(seen) // 2 :][:2]
    assert full == pytest.approx([full[0], 0.01], rel=1e-3) and half == pytest.approx(full, rel=0.01)


def test_a_gradient_that_is_not_finite_is_said_before_it_is_saved(tmp_path):
    model, data = linear(), pairs()
    data.tensors[1][3] = math.inf
    with pytest.raises(CompanionError):
        run(model, data, callbacks=[ClipNorm(1.0)], checkpoint=Checkpoint(tmp_path / "c.pt", 1))
    if (tmp_path / "c.pt").is_file():
        saved = torch.load(tmp_path / "c.pt", weights_only=True)
        assert all(t.isfinite().all() for t in saved["model"].values())


def test_several_devices_after_cuda_was_used_are_refused():
    with pytest.raises(BadParameter):
        run(linear(), hardware=Hardware("cuda", 2))


@pytest.mark.parametrize(("precision", "products"), [("32-true", "highest"), ("16-mixed", "highest"), ("tf32", "high")])
def test_products_use_tf32_only_where_it_is_asked_for(precision, products):
    class Looks(Callback):
        def on_step_end(self, loop):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))

    seen: list = []
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    run(linear(), callbacks=[Looks()], hardware=Hardware("cuda", precision=precision))
    assert set(seen) == {(products, True)}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before == ("highest", False)


# --- the papers' models


@pytest.mark.parametrize(
    ("slug", "name"), [(slug, name) for slug, models in of_all("MODELS").items() for name in models]
)
def test_a_model_computes_where_it_is(slug, name):
    model = hooks(slug).MODELS[name]().eval()
    given = [part.cuda() if isinstance(part, torch.Tensor) else part for part in inputs(name, model)]
    found = called(name, model.cuda(), given)
    assert tensors(found) and all(part.is_cuda for part in tensors(found))


@pytest.mark.parametrize("method", bat_recipe.METHODS)
def test_a_tracker_computes_where_it_is(method):
    model = bat_recipe.METHODS[method](hooks("bat").MODELS["BAT"]().tracker).eval().cuda()
    given = [part.cuda() for part in inputs("BAT", model)]
    assert all(part.is_cuda for part in model(*given) if part is not None)


@pytest.mark.parametrize("slug", slugs())
def test_what_is_prepared_is_on_the_cpu(slug, monkeypatch, tmp_path):
    """Processes for several devices must be forked before a GPU is used."""
    recipe = shrink(slug, monkeypatch)
    found = recipe.prepare(parameters(slug, profile="paper", dry_run=True, data_root="nowhere"), tmp_path)
    ready = all_opened(found)
    assert ready and all(not part.is_cuda for one in ready for part in one.model.state_dict().values())


def all_opened(found: object) -> list[Opened]:
    if isinstance(found, Opened):
        return [found]
    return [one for part in found for one in all_opened(part)] if isinstance(found, (list, tuple)) else []


def tensors(found: object) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]
