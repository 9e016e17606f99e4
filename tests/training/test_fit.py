"""The training loop: resumed runs give the same bits, schedules are the paper's, bad settings say what is accepted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import Precision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from companion.errors import BadParameter, CorruptFile
from companion.training import fit as loop
from companion.training.fit import fit, learning_rates, predict, trained_state
from tests.conftest import kill_when

SCRIPT = """
import sys, time
import torch
from tests.training.test_fit import noisy_model, pairs, squared
from companion.training.fit import fit, trained_state

model = noisy_model()
slow = float(sys.argv[3])
def loss(model, batch):
    time.sleep(slow)
    return squared(model, batch)
fit(model, loss, pairs(), epochs=10, batch=8, lr=1e-2, checkpoint=sys.argv[1], checkpoint_every=7, resume=True,
    accelerator="cpu")
torch.save(trained_state(model), sys.argv[2])
"""


def pairs() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, generator=generator)
    return TensorDataset(x, x @ torch.randn(5, 2, generator=generator))


def noisy_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def squared(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def run(model, **changes):
    settings = dict(epochs=5, batch=8, lr=1e-2, accelerator="cpu") | changes
    return fit(model, squared, pairs(), **settings)


def test_learns_and_reports_every_step():
    model = nn.Linear(5, 2)
    history = run(model, epochs=20, lr=5e-2)
    assert [row["step"] for row in history] == list(range(160))
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert not model.training


def test_same_seed_same_bits_other_seed_other_bits():
    models = [noisy_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, seed=seed)
    first, second, other = (trained_state(m) for m in models)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_caller_randomness_is_left_alone():
    model = noisy_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(model)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_tensors_stay_and_are_not_stored(tmp_path):
    model = noisy_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    run(model, checkpoint=tmp_path / "c.pt")
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in torch.load(tmp_path / "c.pt", weights_only=True)["model"]


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    """kill -9 in the middle, resume, and compare with a run that nobody disturbed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COMPANION_PROGRESS": "off"}

    def command(name, slow):
        return [sys.executable, "-c", SCRIPT, str(tmp_path / f"{name}.pt"), str(tmp_path / f"{name}.out"), str(slow)]

    victim = subprocess.Popen(command("killed", 0.05), env=environment)
    kill_when(victim, (tmp_path / "killed.pt").exists)
    assert not (tmp_path / "killed.out").exists(), "the run finished before it was killed"
    reached = len(torch.load(tmp_path / "killed.pt", weights_only=True)["history"])
    assert 0 < reached < 80
    subprocess.run(command("killed", 0), env=environment, check=True)
    subprocess.run(command("whole", 0), env=environment, check=True)
    killed, whole = (torch.load(tmp_path / f"{n}.out", weights_only=True) for n in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[n], whole[n]) for n in whole)
    assert [p.name for p in tmp_path.glob(".*")] == [], "a temporary file was left"


def test_resume_after_the_end_trains_no_more(tmp_path):
    model = noisy_model()
    history = run(model, checkpoint=tmp_path / "c.pt")
    state = trained_state(model)
    again = noisy_model()
    assert run(again, checkpoint=tmp_path / "c.pt", resume=True) == history
    assert all(torch.equal(state[n], t) for n, t in trained_state(again).items())


def test_numbers_of_numpy_make_a_checkpoint_that_can_be_read(tmp_path):
    numbers = {"lr": np.float64(0.01), "weight_decay": np.float32(0.5), "clip": np.int64(1), "final_lr": np.float64(0)}
    settings = dict(epochs=1, batch=8, accelerator="cpu", checkpoint=tmp_path / "c.pt", betas=np.array([0.9, 0.99]))
    history = fit(noisy_model(), squared, pairs(), **numbers, **settings)
    plain = {name: number.item() for name, number in numbers.items()}
    assert fit(noisy_model(), squared, pairs(), **plain, **settings, resume=True) == history


def test_resume_refuses_other_settings_and_broken_files(tmp_path):
    path = tmp_path / "c.pt"
    run(noisy_model(), checkpoint=path)
    with pytest.raises(BadParameter, match=r"lr = 0\.5 .*0\.01"):
        run(noisy_model(), checkpoint=path, resume=True, lr=0.5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=r"c\.pt"):
        run(noisy_model(), checkpoint=path, resume=True)
    with pytest.raises(BadParameter, match="resume"):
        run(noisy_model(), resume=True)


class Noisy(Dataset):
    """Items with an augmentation that draws from torch."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.rand(1) + index, torch.tensor([0.0])


def seen(workers: int) -> list[torch.Tensor]:
    return [x for x, _ in loop._batches(Noisy(), 4, 1, 0, 0, 8, 0, 1, workers)]


def test_augmentation_depends_on_the_item_not_on_the_process():
    alone, shared = seen(0), seen(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    epochs = torch.cat(alone[:4]).sort(0)[0], torch.cat(alone[4:]).sort(0)[0]
    assert torch.equal(epochs[0].floor(), epochs[1].floor()), "each epoch sees every item once"
    assert not torch.equal(epochs[0], epochs[1]), "an item is augmented anew each epoch"


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_gives_the_training_of_a_whole_one(parts):
    whole, split = nn.Linear(5, 2), nn.Linear(5, 2)
    split.load_state_dict(whole.state_dict())
    history = run(whole), run(split, accumulate=parts)
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in history), rtol=1e-5)
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_batch_is_what_the_loss_sees():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return squared(model, batch)

    fit(nn.Linear(5, 2), loss, pairs(), epochs=1, batch=8, lr=1e-2, accumulate=3, accelerator="cpu")
    assert sizes == [3, 3, 2] * 8


class Counted(Dataset):
    """Keeps how many items were asked for."""

    asked = 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int):
        self.asked += 1
        return torch.full((5,), float(index)), torch.zeros(2)


def test_a_part_is_loaded_when_it_is_needed():
    """A batch of thousands of pictures need not be in memory at once."""
    data, asked, seen = Counted(), [], []

    def loss(model, batch):
        asked.append(data.asked)
        seen.append(batch[0][:, 0])
        return squared(model, batch)

    fit(nn.Linear(5, 2), loss, data, epochs=1, batch=32, lr=1e-3, accumulate=4, accelerator="cpu")
    assert asked == [8 * (i + 1) for i in range(8)]
    assert torch.equal(torch.cat(seen).sort()[0], torch.arange(64.0))


def test_a_long_training_begins_at_once():
    """The order of a hundred thousand epochs is not made beforehand."""
    stream = loop._batches(Counted(), 8, 1, 0, 0, 10**9, 0, 1, 0)
    assert next(stream)[0].shape == (8, 5)


def test_betas_reach_the_optimiser():
    """The second step of AdamW, by hand."""
    data = TensorDataset(torch.ones(1, 1))
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def loss(model, batch):  # gradients of 1, then 3
        return model.weight.sum() * (1.0 if not model.weight.any() else 3.0)

    settings = dict(epochs=2, batch=1, lr=0.1, schedule="constant", warmup=0, weight_decay=0, accelerator="cpu")
    fit(model, loss, data, betas=(0.5, 0.8), **settings)
    mean = (0.5 * 0.5 * 1 + 0.5 * 3) / (1 - 0.5**2)
    square = (0.8 * 0.2 * 1 + 0.2 * 9) / (1 - 0.8**2)
    assert model.weight.item() == pytest.approx(-0.1 - 0.1 * mean / square**0.5, rel=1e-5)


def test_two_processes_give_the_losses_of_one():
    """The same global batch on two devices (gloo) and on one, to rounding."""
    script = (
        "import json, torch; from torch import nn; from tests.training.test_fit import run\n"
        "out = []\n"
        "for devices in (1, 2):\n"
        "    torch.manual_seed(0); model = nn.Linear(5, 2)\n"
        "    history = run(model, devices=devices, clip=1.0)\n"
        "    out.append([[row['loss'] for row in history], model.weight.flatten().tolist()])\n"
        "print(json.dumps(out))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-3, atol=1e-6)


def test_mixed_precision_trains():
    model = nn.Linear(5, 2)
    history = run(model, precision="bf16-mixed", epochs=20, lr=5e-2)
    assert model.weight.dtype == torch.float32
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]


def test_schedules():
    rates = learning_rates("cosine", 1.0, 100, 10, 0.1)
    assert rates[0] == 0 and rates[9] == 1 and rates[10] == 1
    assert rates.argmax() in (9, 10) and 0.1 < rates[-1] < 0.102
    assert (learning_rates("constant", 2.0, 5) == 2).all()
    np.testing.assert_allclose(learning_rates("linear", 1.0, 4), [1, 0.75, 0.5, 0.25])
    # BAT's: a tenth after epoch 48 of 60
    np.testing.assert_allclose(learning_rates("step", 1.0, 60, final=0.1), [1] * 48 + [0.1] * 12)


def test_cosine_by_epoch_is_the_schedule_of_coops_code():
    """One constant warm-up epoch, then lr (1 + cos(π (e - 1) / E)) / 2 for all the steps of epoch e = 1 ... E - 1."""
    epochs, per_epoch = 15, 6
    warm = dict(warmup=per_epoch, warmup_lr=1e-5, epoch=per_epoch)
    rates = learning_rates("cosine by epoch", 3.5e-3, epochs * per_epoch, **warm).reshape(epochs, per_epoch)
    assert (rates == rates[:, :1]).all()
    expected = [1e-5] + [3.5e-3 * (1 + np.cos(np.pi * (e - 1) / epochs)) / 2 for e in range(1, epochs)]
    np.testing.assert_allclose(rates[:, 0], expected)
    assert rates[1, 0] == 3.5e-3 and rates[-1, 0] == pytest.approx(1.5e-4, abs=1e-5), "it does not come to 0"
    # in `fit`, the warm-up is a fraction of the steps and an epoch is a pass over the data
    history = run(nn.Linear(5, 2), epochs=15, schedule="cosine by epoch", warmup=1 / 15, warmup_lr=1e-5, final_lr=0.0)
    assert [row["lr"] for row in history] == list(
        learning_rates("cosine by epoch", 1e-2, 120, 8, warmup_lr=1e-5, epoch=8)
    )


def test_sgd_is_momentum_with_the_decay_in_the_gradient():
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    settings = dict(optimizer="sgd", momentum=0.9, weight_decay=0.1, decay="all", schedule="constant", warmup=0)
    history = run(model, epochs=0.5, lr=0.05, **settings)
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    for row, batch in zip(history, loop._batches(pairs(), 8, 1, 0, 0, 4, 0, 1, 0), strict=True):
        value = F.mse_loss(F.linear(batch[0], weights["weight"], weights["bias"]), batch[1])
        assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
        for (name, p), grad in zip(weights.items(), torch.autograd.grad(value, [*weights.values()]), strict=True):
            velocity[name] = 0.9 * velocity[name] + grad + 0.1 * p.detach()
            p.data -= 0.05 * velocity[name]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name].detach(), rtol=1e-5, atol=1e-7)


def test_sgd_resumes_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def interrupted(model, batch, seen=[]):  # noqa: B006 - it counts over calls
        seen.append(0)
        if len(seen) > 20:
            raise Stopped
        return squared(model, batch)

    settings = dict(epochs=5, batch=8, lr=1e-2, optimizer="sgd", accelerator="cpu")
    whole, cut = noisy_model(), noisy_model()
    fit(whole, squared, pairs(), **settings)
    kept = dict(checkpoint=tmp_path / "c.pt", checkpoint_every=7)
    with pytest.raises(Stopped):
        fit(cut, interrupted, pairs(), **settings, **kept)
    cut = noisy_model()
    fit(cut, squared, pairs(), **settings, **kept, resume=True)
    assert all(torch.equal(t, trained_state(cut)[name]) for name, t in trained_state(whole).items())
    with pytest.raises(BadParameter, match=r"optimizer = 'adamw' .*'sgd'"):
        fit(noisy_model(), squared, pairs(), **(settings | {"optimizer": "adamw"}), **kept, resume=True)


def test_decay_spares_vectors_unless_all_is_asked():
    model = nn.Linear(3, 2)
    two, one = loop.decay_groups(model.parameters(), 0.1), loop.decay_groups(model.parameters(), 0.1, "all")
    assert [(len(g["params"]), g["weight_decay"]) for g in two] == [(1, 0.1), (1, 0.0)]
    assert [(len(g["params"]), g["weight_decay"]) for g in one] == [(2, 0.1)]


def test_sides_have_rates_of_their_own_and_are_clipped_apart(tmp_path):
    models = [noisy_model() for _ in range(2)]
    for model in models:  # the first layer rests, and the last one makes steps of known size
        sides = {
            "rests": (list(model[0].parameters()), np.zeros(8)),
            "learns": (list(model[4].parameters()), np.ones(8)),
        }
        kept = dict(checkpoint=tmp_path / "c.pt", resume=model is models[1])
        run(model, lr=None, sides=sides, epochs=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1e-3, **kept)
    before, after = noisy_model(), models[0]
    assert torch.equal(before[0].weight, after[0].weight)
    moved = [(a - b).norm() for a, b in zip(after[4].parameters(), before[4].parameters(), strict=True)]
    assert 0 < torch.stack(moved).norm() <= 8e-3 + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True)), "resumed when done"
    one, two = noisy_model(), noisy_model()
    run(one, clip=0.5)
    rates = learning_rates("cosine", 1e-2, 40, 4, 1e-7)
    run(two, lr=None, sides={"all": (list(two.parameters()), rates)}, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=None), "or `sides` in its place"),
        (dict(lr=None, sides={"all": ([], np.ones(3))}), "40, one for each step"),
        (dict(batch=65), "1 to 64"),
        (dict(batch=0), "1 to 64"),
        (dict(schedule="exponential"), "'cosine'"),
        (dict(precision="8"), "'bf16-mixed'"),
        (dict(warmup=2), "0 to 1"),
        (dict(optimizer="lion"), "'adamw', 'sgd'"),
        (dict(optimizer="sgd", momentum=1.0), "less than 1"),
        (dict(decay="biases"), "'matrices', 'all'"),
        (dict(batch=9, devices=2), "multiple of devices"),
        (dict(accumulate=9), "1 to 8"),
        (dict(betas=(0.9, 1.0)), "less than 1"),
    ],
)
def test_bad_settings_name_the_accepted_ones(changes, message):
    with pytest.raises(BadParameter, match=message):
        run(noisy_model(), **changes)


def test_a_login_node_with_srun_is_no_warning(tmp_path, monkeypatch, recwarn):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    data = pairs()
    predict(nn.Identity(), data, accelerator="cpu")
    run(noisy_model())
    assert not [str(warning.message) for warning in recwarn if "srun" in str(warning.message)]


def test_predict_takes_the_first_output_in_order():
    class Two(nn.Module):
        def forward(self, x):
            return x * 2, x * 3

    data = pairs()
    assert torch.equal(predict(Two(), data, batch=7, accelerator="cpu"), data.tensors[0] * 2)


# --- what a card needs, tried without one -----------------------------------------------------------------------------


class Card(Fabric):
    """Stands for a device: what it is given becomes float64, so what stayed elsewhere shows as an error of types."""

    def to_device(self, obj):
        return obj.double() if isinstance(obj, nn.Module) else super().to_device(obj)


class Doubled(nn.Linear):
    """A model that takes its inputs along to where it is, and keeps the places it was sent to."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))

    def to(self, *args, **options):
        self.sent = [*getattr(self, "sent", []), *args]
        return super().to(*args, **options)


def test_the_moments_of_a_resumed_run_are_where_the_tensors_are(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"

    def loss(model, batch):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return F.mse_loss(model(batch[0]), batch[1].double())

    monkeypatch.setattr(loop, "launcher", lambda **settings: Card(**settings))
    settings = dict(epochs=1, batch=8, lr=1e-2, accelerator="cpu", checkpoint=path, checkpoint_every=2, resume=True)
    for done in ([], [1] * 6):
        torch.manual_seed(0)
        model = Doubled(5, 2)
        if not done:
            with pytest.raises(KeyboardInterrupt):
                fit(model, loss, pairs(), **settings)
        else:
            assert len(fit(model, loss, pairs(), **settings)) == 8


def test_the_scale_of_half_precision_is_kept(tmp_path, monkeypatch):
    """Begun anew, it would leave out other steps than a run that was not stopped."""
    path, given = tmp_path / "c.pt", []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 4.0})
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: given.append(state))
    settings = dict(epochs=1, batch=8, lr=1e-2, accelerator="cpu", checkpoint=path, resume=True)
    for times in range(2):
        fit(nn.Linear(5, 2), lambda model, b: F.mse_loss(model(b[0]), b[1]), pairs(), **settings)
        assert given == [{"scale": 4.0}] * times


def test_training_does_not_ask_the_cards_for_their_random_state(monkeypatch):
    """That would start CUDA in this process, and processes for several cards could not be forked any more."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *args: pytest.fail("CUDA was started"))
    run(noisy_model())


def test_a_model_comes_back_from_predict_and_can_be_trained(monkeypatch):
    monkeypatch.setattr(loop, "launcher", lambda **settings: Card(**settings))
    model, data = Doubled(5, 2), pairs()
    said = predict(model, data, accelerator="cpu")
    assert said.dtype == torch.float32 and not said.is_inference() and not said.requires_grad
    assert model.sent[-1] == "cpu" and not model.weight.is_inference()
    x = data.tensors[0].clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and model.weight.grad is not None


TWO = """
import sys
import torch
from torch import nn
from companion.training.fit import fit, trained_state

data = torch.utils.data.TensorDataset(torch.randn(16, 50, generator=torch.Generator().manual_seed(0)))
torch.manual_seed(0)
model = nn.Linear(50, 4000)  # a megabyte: more than a pipe between processes holds
history = fit(model, lambda m, b: m(b[0]).square().mean(), data, epochs=2, batch=8, lr=1e-2, accelerator="cpu",
              devices=int(sys.argv[1]))
torch.save({"model": trained_state(model), "history": history}, sys.argv[2])
"""


def test_two_devices_give_back_what_one_gives(tmp_path):
    found = []
    for devices in ("1", "2"):
        path = tmp_path / f"{devices}.pt"
        code = [sys.executable, "-c", TWO, devices, str(path)]
        done = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(path, weights_only=True))
    one, two = found
    assert [row["step"] for row in two["history"]] == [0, 1, 2, 3]
    np.testing.assert_allclose(*([row["loss"] for row in each["history"]] for each in found), rtol=1e-4)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=1e-4)
