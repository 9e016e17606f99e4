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
from companion.training.callbacks import EMA, Callback, ClipNorm, ClipValue, EarlyStop, Lookahead, ema_copy
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import CPU, Hardware, fit, predict
from companion.training.schedules import adamw, given, learning_rates, param_groups, schedule, sgd
from tests.conftest import kill_when

SCRIPT = """
import sys, time
import torch
from tests.training.test_fit import noisy_model, pairs, squared
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import CPU, fit
from companion.training.schedules import adamw

model = noisy_model()
slow = float(sys.argv[3])
def loss(model, batch):
    time.sleep(slow)
    return squared(model, batch)
fit(model, loss, pairs(), epochs=10, batch=8, optimizer=adamw(1e-2), checkpoint=Checkpoint(sys.argv[1], 7),
    hardware=CPU)
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
    settings = dict(epochs=5, batch=8, optimizer=adamw(1e-2), hardware=CPU) | changes
    return fit(model, squared, pairs(), **settings)


def test_learns_and_reports_every_step():
    model = nn.Linear(5, 2)
    history = run(model, epochs=20, optimizer=adamw(5e-2))
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
    run(model, checkpoint=Checkpoint(tmp_path / "c.pt"))
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
    reached = torch.load(tmp_path / "killed.pt", weights_only=True)["step"]
    assert 0 < reached < 80
    subprocess.run(command("killed", 0), env=environment, check=True)
    subprocess.run(command("whole", 0), env=environment, check=True)
    killed, whole = (torch.load(tmp_path / f"{n}.out", weights_only=True) for n in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[n], whole[n]) for n in whole)
    assert [p.name for p in tmp_path.glob(".*")] == [], "a temporary file was left"


def test_resume_after_the_end_trains_no_more(tmp_path):
    model = noisy_model()
    history = run(model, checkpoint=Checkpoint(tmp_path / "c.pt"))
    state = trained_state(model)
    again = noisy_model()
    assert run(again, checkpoint=Checkpoint(tmp_path / "c.pt")) == history
    assert all(torch.equal(state[n], t) for n, t in trained_state(again).items())


def test_numbers_of_numpy_make_a_checkpoint_that_can_be_read(tmp_path):
    def train(number):
        optimizer = adamw(number(0.01), number(0.5), betas=(number(0.9), number(0.99)))
        callbacks = [ClipNorm(number(1))]
        return run(noisy_model(), epochs=1, optimizer=optimizer, callbacks=callbacks, checkpoint=checkpoint)

    checkpoint = Checkpoint(tmp_path / "c.pt")
    assert train(np.float64) == train(float)


def test_resume_refuses_other_settings_and_broken_files(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c.pt")
    run(noisy_model(), checkpoint=checkpoint)
    with pytest.raises(BadParameter, match=r"lr = 0\.5 .*0\.01"):
        run(noisy_model(), checkpoint=checkpoint, optimizer=adamw(0.5))
    with pytest.raises(BadParameter, match=r"optimizer = 'SGD' .*'AdamW'"):
        run(noisy_model(), checkpoint=checkpoint, optimizer=sgd(1e-2))
    with pytest.raises(BadParameter, match="schedule"):
        run(noisy_model(), checkpoint=checkpoint, schedule=schedule("linear"))
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=r"c\.pt"):
        run(noisy_model(), checkpoint=checkpoint)


def test_the_history_is_appended_and_cut_to_the_checkpoint(tmp_path):
    """The cost of a checkpoint does not grow with the steps; rows after the last checkpoint of a killed run go."""
    checkpoint = Checkpoint(tmp_path / "c.pt", every=4)
    sizes = []

    class Watch(Callback):
        def on_step_end(self, loop):
            sizes.append(len(checkpoint.history.read_text().splitlines()) if checkpoint.history.exists() else 0)

    history = run(noisy_model(), checkpoint=checkpoint, callbacks=[Watch()])
    assert sizes[3:9] == [0, 5, 5, 5, 5, 9]
    lines = checkpoint.history.read_text().splitlines()
    assert len(lines) == 41 and lines[0] == "step,lr,loss"
    with checkpoint.history.open("a") as file:
        file.write("40,0.1,3.0\n41,0.")
    assert run(noisy_model(), checkpoint=Checkpoint(checkpoint.path), callbacks=[Watch()]) == history
    assert checkpoint.history.read_text().splitlines() == lines
    checkpoint.history.write_text("\n".join(lines[:9]))
    with pytest.raises(CorruptFile, match=r"8 rows, and c\.pt is at step 40"):
        run(noisy_model(), checkpoint=checkpoint, callbacks=[Watch()])


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
    history = run(whole), run(split, hardware=Hardware("cpu", accumulate=parts))
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in history), rtol=1e-5)
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_batch_is_what_the_loss_sees():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return squared(model, batch)

    hardware = Hardware("cpu", accumulate=3)
    fit(nn.Linear(5, 2), loss, pairs(), epochs=1, batch=8, optimizer=adamw(1e-2), hardware=hardware)
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
    """A batch of thousands of images need not be in memory at once."""
    data, asked, seen = Counted(), [], []

    def loss(model, batch):
        asked.append(data.asked)
        seen.append(batch[0][:, 0])
        return squared(model, batch)

    hardware = Hardware("cpu", accumulate=4)
    fit(nn.Linear(5, 2), loss, data, epochs=1, batch=32, optimizer=adamw(1e-3), hardware=hardware)
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

    optimizer = adamw(0.1, 0.0, betas=(0.5, 0.8))
    fit(model, loss, data, epochs=2, batch=1, optimizer=optimizer, schedule=schedule("constant", 0), hardware=CPU)
    mean = (0.5 * 0.5 * 1 + 0.5 * 3) / (1 - 0.5**2)
    square = (0.8 * 0.2 * 1 + 0.2 * 9) / (1 - 0.8**2)
    assert model.weight.item() == pytest.approx(-0.1 - 0.1 * mean / square**0.5, rel=1e-5)


def test_two_processes_give_the_losses_of_one():
    """The same global batch on two devices (gloo) and on one, to rounding."""
    script = (
        "import json, torch; from torch import nn; from tests.training.test_fit import ClipNorm, Hardware, run\n"
        "out = []\n"
        "for devices in (1, 2):\n"
        "    torch.manual_seed(0); model = nn.Linear(5, 2)\n"
        "    history = run(model, hardware=Hardware('cpu', devices), callbacks=[ClipNorm(1.0)])\n"
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
    history = run(model, hardware=Hardware("cpu", precision="bf16-mixed"), epochs=20, optimizer=adamw(5e-2))
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
    history = run(nn.Linear(5, 2), epochs=15, schedule=schedule("cosine by epoch", 1 / 15, 0.0, 1e-5))
    assert [row["lr"] for row in history] == list(
        learning_rates("cosine by epoch", 1e-2, 120, 8, warmup_lr=1e-5, epoch=8)
    )


def test_sgd_is_momentum_with_the_decay_in_the_gradient():
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = sgd(0.05, 0.1, decay="all")
    history = run(model, epochs=0.5, optimizer=optimizer, schedule=schedule("constant", 0))
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

    settings = dict(epochs=5, batch=8, optimizer=sgd(1e-2), hardware=CPU)
    whole, cut = noisy_model(), noisy_model()
    fit(whole, squared, pairs(), **settings)
    with pytest.raises(Stopped):
        fit(cut, interrupted, pairs(), **settings, checkpoint=Checkpoint(tmp_path / "c.pt", every=7))
    cut = noisy_model()
    fit(cut, squared, pairs(), **settings, checkpoint=Checkpoint(tmp_path / "c.pt", every=7))
    assert all(torch.equal(t, trained_state(cut)[name]) for name, t in trained_state(whole).items())


def test_decay_spares_vectors_unless_all_is_asked():
    model = nn.Linear(3, 2)
    two, one = param_groups(model.parameters(), 0.1), param_groups(model.parameters(), 0.1, "all")
    assert [(len(g["params"]), g["weight_decay"]) for g in two] == [(1, 0.1), (1, 0.0)]
    assert [(len(g["params"]), g["weight_decay"]) for g in one] == [(2, 0.1)]


def test_parameter_groups_have_schedules_of_their_own_and_are_clipped_apart(tmp_path):
    def groups(model):
        first, last = model[0].parameters(), model[4].parameters()
        return [*param_groups(first, decay="all", name="rests"), *param_groups(last, decay="all", name="learns")]

    models = [noisy_model() for _ in range(2)]
    for model in models:  # the first layer rests, and the last one makes steps of known size
        run(
            model,
            epochs=1,
            optimizer=sgd(1.0, momentum=0.0, groups=groups),
            callbacks=[ClipNorm(1e-3)],
            schedule={"rests": given(np.zeros(8)), "learns": given(np.ones(8))},
            checkpoint=Checkpoint(tmp_path / "c.pt"),
        )
    before, after = noisy_model(), models[0]
    assert torch.equal(before[0].weight, after[0].weight)
    moved = [(a - b).norm() for a, b in zip(after[4].parameters(), before[4].parameters(), strict=True)]
    assert 0 < torch.stack(moved).norm() <= 8e-3 + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True)), "resumed when done"
    one, two = noisy_model(), noisy_model()
    run(one, callbacks=[ClipNorm(0.5)])
    run(two, schedule=given(learning_rates("cosine", 1e-2, 40, 4, 1e-7)), callbacks=[ClipNorm(0.5)])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: dict(schedule=given(np.ones(3))), "40, one for each step"),
        (lambda: dict(batch=65), "1 to 64"),
        (lambda: dict(batch=0), "1 to 64"),
        (lambda: dict(schedule=schedule("exponential")), "'cosine'"),
        (lambda: dict(schedule=schedule(warmup=2)), "0 to 1"),
        (lambda: dict(hardware=Hardware("cpu", precision="8")), "'bf16-mixed'"),
        (lambda: dict(optimizer=adamw(1e-2, decay="biases")), "'matrices', 'all'"),
        (lambda: dict(batch=9, hardware=Hardware("cpu", devices=2)), "multiple of devices"),
        (lambda: dict(hardware=Hardware("cpu", accumulate=9)), "1 to 8"),
        (lambda: dict(callbacks=[Lookahead(0)]), "1 or more steps"),
    ],
)
def test_bad_settings_name_the_accepted_ones(changes, message):
    with pytest.raises(BadParameter, match=message):
        run(noisy_model(), **changes())


# --- callbacks --------------------------------------------------------------------------------------------------------


class Score:
    """A score by epoch, and the first weight of the model when it was asked for."""

    def __init__(self, *scores):
        self.scores, self.weights = list(scores), []

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        self.weights.append(model[0].weight.detach().clone())
        return self.scores[len(self.weights) - 1]


@pytest.mark.parametrize(("ties", "best"), [(False, 1), (True, 3)])
def test_early_stopping_ends_with_the_best_weights(ties, best):
    score, model = Score(1.0, 3.0, 2.0, 3.0, 0.0), noisy_model()
    stop = EarlyStop(score, patience=3, ties=ties)
    history = run(model, epochs=10, callbacks=[stop])
    assert len(history) == 5 * 8 and [row[0] for row in stop.scores] == [8, 16, 24, 32, 40]
    assert torch.equal(model[0].weight, score.weights[best])


def test_early_stopping_may_choose_by_one_score_and_stop_by_another():
    score, model = Score((1.0, -1.0), (2.0, -3.0), (5.0, -2.0), (0.0, -4.0)), noisy_model()
    assert len(run(model, epochs=4, callbacks=[EarlyStop(score, patience=2)])) == 3 * 8
    assert torch.equal(model[0].weight, score.weights[2])
    score = Score((1.0, -1.0), (2.0, -3.0), (5.0, -2.0), (0.0, -4.0))
    assert len(run(noisy_model(), epochs=4, callbacks=[EarlyStop(score, patience=2, earliest=4)])) == 4 * 8
    score = Score(9.0, 2.0)
    run(noisy_model(), epochs=4, callbacks=[EarlyStop(score, first_step=24)])
    assert len(score.weights) == 2


def test_a_score_that_is_nan_is_the_lowest():
    score, model = Score(np.nan, 1.0, np.nan, np.nan), noisy_model()
    assert len(run(model, epochs=9, callbacks=[EarlyStop(score, patience=2)])) == 4 * 8
    assert torch.equal(model[0].weight, score.weights[1])


def test_lookahead_by_hand():
    """slow += alpha (fast - slow); fast = slow, after steps k + 1, 2 k + 1, ..."""
    fast, slow, plain = [], None, nn.Linear(5, 2)
    model = nn.Linear(5, 2)
    model.load_state_dict(plain.state_dict())

    class Record(Callback):
        def on_step_end(self, loop):
            fast.append(loop.model.weight.detach().clone())

    settings = dict(epochs=1, optimizer=sgd(0.05, momentum=0.0), schedule=schedule("constant", 0))
    run(model, callbacks=[Record(), Lookahead(k=2, alpha=0.25)], **settings)
    weight = plain.weight.detach().clone()
    bias = plain.bias.detach().clone()
    for step, batch in enumerate(loop._batches(pairs(), 8, 1, 0, 0, 8, 0, 1, 0)):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        gradients = torch.autograd.grad(F.mse_loss(F.linear(batch[0], w, b), batch[1]), [w, b])
        weight, bias = weight - 0.05 * gradients[0], bias - 0.05 * gradients[1]
        torch.testing.assert_close(fast[step], weight, rtol=1e-5, atol=1e-6)
        if step == 0:
            slow = weight.clone(), bias.clone()
        elif step % 2 == 0:
            slow = tuple(s + 0.25 * (f - s) for s, f in zip(slow, (weight, bias), strict=True))
            weight, bias = slow
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-5, atol=1e-6)


def test_a_moving_average_follows_and_is_part_of_the_model():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(5, 2)
            self.teacher = ema_copy(self.student)

        def forward(self, x):
            return self.student(x)

    model = Pair()
    assert not list(model.teacher.parameters()) and "teacher.weight" in trained_state(model)
    seen, start = [], model.student.weight.detach().clone()

    class Record(Callback):
        def on_step_end(self, loop):
            seen.append(loop.model.student.weight.detach().clone())

    ema = EMA([(model.teacher, model.student)], momentum=lambda step: 1 - 1 / step)
    callbacks = [Record(), ema]
    fit(
        model,
        lambda m, b: squared(m, b),
        pairs(),
        epochs=1,
        batch=8,
        optimizer=adamw(1e-2),
        callbacks=callbacks,
        hardware=CPU,
    )
    torch.testing.assert_close(model.teacher.weight, torch.stack(seen).mean(0))  # momentum 1 - 1/n: the mean
    assert not torch.equal(model.teacher.weight, start)


def test_gradients_are_clipped_by_value_and_by_tensor():
    class Largest(Callback):
        def on_gradients(self, loop):
            found.append([p.grad.abs().max().item() for p in loop.model.parameters()])
            norms.append([p.grad.norm().item() for p in loop.model.parameters()])

    found, norms = [], []
    run(noisy_model(), epochs=1, callbacks=[ClipValue(1e-3), Largest()])
    assert max(map(max, found)) == pytest.approx(1e-3)
    found, norms = [], []
    run(noisy_model(), epochs=1, callbacks=[ClipNorm(1e-2, per_tensor=True), Largest()])
    assert sum(norm == pytest.approx(1e-2, rel=1e-3) for row in norms for norm in row) > 8


@pytest.mark.parametrize("make", [lambda: Lookahead(2), lambda: EarlyStop(lambda model: -float(model[0].bias.sum()))])
def test_a_killed_training_with_callbacks_resumes_to_the_same_bits(make, tmp_path):
    class Killed(Callback):
        def on_step_end(self, loop):
            if loop.step == 21:
                raise KeyboardInterrupt

    whole, cut = noisy_model(), noisy_model()
    history = run(whole, callbacks=[make(), Callback()])
    with pytest.raises(KeyboardInterrupt):
        run(cut, callbacks=[make(), Killed()], checkpoint=Checkpoint(tmp_path / "c.pt", every=5))
    cut = noisy_model()
    assert run(cut, callbacks=[make(), Callback()], checkpoint=Checkpoint(tmp_path / "c.pt", every=5)) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True))


def test_the_parts_of_a_loss_are_recorded(tmp_path):
    def loss(model, batch):
        value = squared(model, batch)
        return {"loss": value, "half": value / 2}

    for accumulate in (1, 2):
        checkpoint = Checkpoint(tmp_path / f"{accumulate}.pt")
        hardware = Hardware("cpu", accumulate=accumulate)
        settings = dict(epochs=1, batch=8, optimizer=adamw(1e-2), hardware=hardware, checkpoint=checkpoint)
        history = fit(nn.Linear(5, 2), loss, pairs(), **settings)
        assert all(row["half"] == pytest.approx(row["loss"] / 2) for row in history)
        assert fit(nn.Linear(5, 2), loss, pairs(), **settings) == history


def test_a_login_node_with_srun_is_no_warning(tmp_path, monkeypatch, recwarn):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    data = pairs()
    predict(nn.Identity(), data, hardware=CPU)
    run(noisy_model())
    assert not [str(warning.message) for warning in recwarn if "srun" in str(warning.message)]


def test_predict_takes_the_first_output_in_order():
    class Two(nn.Module):
        def forward(self, x):
            return x * 2, x * 3

    data = pairs()
    assert torch.equal(predict(Two(), data, batch=7, hardware=CPU), data.tensors[0] * 2)


# --- what a GPU needs, tried without one -----------------------------------------------------------------------------


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
    settings = dict(epochs=1, batch=8, optimizer=adamw(1e-2), hardware=CPU, checkpoint=Checkpoint(path, 2))
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
    settings = dict(epochs=1, batch=8, optimizer=adamw(1e-2), hardware=CPU, checkpoint=Checkpoint(path))
    for times in range(2):
        fit(nn.Linear(5, 2), lambda model, b: F.mse_loss(model(b[0]), b[1]), pairs(), **settings)
        assert given == [{"scale": 4.0}] * times


def test_training_does_not_ask_the_cards_for_their_random_state(monkeypatch):
    """That would start CUDA in this process, and processes for several GPUs could not be forked any more."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *args: pytest.fail("CUDA was started"))
    run(noisy_model())


def test_a_model_comes_back_from_predict_and_can_be_trained(monkeypatch):
    monkeypatch.setattr(loop, "launcher", lambda **settings: Card(**settings))
    model, data = Doubled(5, 2), pairs()
    said = predict(model, data, hardware=CPU)
    assert said.dtype == torch.float32 and not said.is_inference() and not said.requires_grad
    assert model.sent[-1] == "cpu" and not model.weight.is_inference()
    x = data.tensors[0].clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and model.weight.grad is not None


TWO = """
import sys
import torch
from torch import nn
from companion.training.checkpoints import trained_state
from companion.training.fit import Hardware, fit
from companion.training.schedules import adamw

data = torch.utils.data.TensorDataset(torch.randn(16, 50, generator=torch.Generator().manual_seed(0)))
torch.manual_seed(0)
model = nn.Linear(50, 4000)  # a megabyte: more than a pipe between processes holds
history = fit(model, lambda m, b: m(b[0]).square().mean(), data, epochs=2, batch=8, optimizer=adamw(1e-2),
              hardware=Hardware("cpu", int(sys.argv[1])))
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
