"""The training loop: a training by hand, the order of images, schedules, callbacks, resumed and refused trainings."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightning_fabric.accelerators import MPSAccelerator
from lightning_fabric.plugins.precision import Precision
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from companion.data import spaced
from companion.errors import CompanionError, CorruptFile
from companion.io.papers import paper, slugs
from companion.training import checkpoints, recipe
from companion.training.callbacks import EMA, Callback, ClipNorm, ClipValue, EarlyStop, Lookahead, ema_copy
from companion.training.checkpoints import Checkpoint
from companion.training.fit import fit, outputs_of
from companion.training.hardware import CPU, PRECISIONS, Hardware, device, launcher
from companion.training.schedules import adamw, given, learning_rates, param_groups, schedule, sgd
from tests.models.common import refuses


def pairs() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, generator=generator)
    return TensorDataset(x, x @ torch.randn(5, 2, generator=generator))


def noisy_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def squared(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def run(model, loss=squared, data=None, **changes):
    settings = dict(epochs=5, batch=8, optimizer=adamw(1e-2), hardware=CPU) | changes
    return fit(model, loss, pairs() if data is None else data, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns_and_reports_every_step(precision):
    model = nn.Linear(5, 2)
    history = run(model, epochs=20, optimizer=adamw(5e-2), hardware=Hardware("cpu", precision=precision))
    assert [row["step"] for row in history] == list(range(160))
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert model.weight.dtype == torch.float32 and not model.training


def test_same_seed_same_bits_other_seed_other_bits():
    models = [noisy_model() for _ in range(3)]
    models[1].eval()  # a training is in training mode in any case
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, seed=seed)
    assert same(models[0], models[1]) and not torch.equal(models[0][0].weight, models[2][0].weight)


def test_each_step_has_its_own_random_numbers_and_the_callers_are_left_alone():
    def loss(model, batch):
        drawn.append(torch.rand(()).item())
        return squared(model, batch)

    model, drawn = noisy_model(), []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(model, loss)
    assert torch.equal(torch.rand(3), expected) and len(set(drawn)) == 40


def by_hand(last: str, epochs: int, images: int = 11, batch: int = 4) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of plain SGD over the images in `fit`'s order."""
    x, y = (t[:images] for t in pairs().tensors)
    torch.manual_seed(2)
    model, losses, waiting = nn.Linear(5, 2), [], []
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch)).permutation(images).tolist()
        for i in range(0, images, batch):
            waiting += order[i : i + batch]
            if len(order[i : i + batch]) < batch and last != "train":
                waiting = waiting if last == "carry" else []
                continue
            loss = ((model(x[waiting]) - y[waiting]) ** 2).mean(1).sum() / (batch if last == "carry" else len(waiting))
            for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
                p.data -= 0.1 * gradient
            losses.append(loss.item())
            waiting = []
    return model.state_dict(), losses


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("last", ["drop", "train", "carry"])
def test_losses_and_weights_are_those_by_hand_however_the_last_images_of_an_epoch_are_handled(last, accumulate):
    expected, losses = by_hand(last, epochs=3)
    torch.manual_seed(2)
    model, data = nn.Linear(5, 2), TensorDataset(*(t[:11] for t in pairs().tensors))
    settings = dict(epochs=3, batch=4, last=last, hardware=Hardware("cpu", accumulate=accumulate))
    settings |= dict(optimizer=sgd(0.1, momentum=0), schedule=schedule("constant", 0))
    assert [row["loss"] for row in run(model, data=data, **settings)] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=1e-5, atol=1e-6)


def test_the_mean_of_another_scalar_is_over_the_images_of_a_step_that_takes_carried_ones_too():
    def loss(model, batch):
        return {"loss": squared(model, batch), "one": torch.ones(()), "mean": batch[0].mean()}

    data = TensorDataset(*(t[:11] for t in pairs().tensors))
    history = run(nn.Linear(5, 2), loss, data, batch=4, epochs=2, last="carry", hardware=Hardware("cpu", accumulate=3))
    one, two = (np.random.default_rng((0, epoch)).permutation(11) for epoch in range(2))
    images = [one[:4], one[4:8], np.concatenate([one[8:], two[:4]]), two[4:8]]
    assert [row["one"] for row in history] == pytest.approx([1] * 4)
    means = [float(data.tensors[0][i].mean()) for i in images]
    assert [row["mean"] for row in history] == pytest.approx(means, abs=1e-6)


class Twice(TensorDataset):
    """A data set of tensors with items of its own."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x, y


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(64))])
def test_a_subclass_of_a_tensor_data_set_is_read_by_its_items(wrap):
    def trained(data):
        torch.manual_seed(2)
        model = nn.Linear(5, 2)
        return run(model, data=data), outputs_of(model, data, hardware=CPU)

    x, y = pairs().tensors
    (history, outputs), (found, again) = trained(TensorDataset(2 * x, y)), trained(wrap(Twice(x, y)))
    assert found == history and torch.equal(again, outputs)


class Augmented(Dataset):
    """Items whose whole part is their index, and whose fraction is drawn."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        drawn = torch.rand(1) + random.random() + np.random.random()  # noqa: NPY002
        return index + drawn.expand(5) / 3, torch.zeros(2)


def test_an_augmentation_depends_on_item_and_epoch_and_not_on_the_loading_process():
    def loss(model, batch):
        seen.append(batch[0][:, 0])
        return squared(model, batch)

    found = []
    for workers in (0, 2):
        seen: list[torch.Tensor] = []
        run(nn.Linear(5, 2), loss, Augmented(), epochs=2, hardware=Hardware("cpu", workers=workers))
        found.append(torch.cat(seen))
    assert torch.equal(*found)
    one, two = (epoch.sort()[0] for epoch in found[0].chunk(2))
    assert torch.equal(one.floor(), torch.arange(64.0)) and torch.equal(two.floor(), one.floor())
    assert (one != two).all()


@pytest.mark.parametrize("way", ["grad_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_same_training_in_less_memory_or_compiled(way, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 256, generator=generator), torch.randn(16, 2, generator=generator))
    compiled, calls, found = torch._dynamo.utils.counters["frames"], [], []
    compiled.clear()
    gelu = F.gelu
    if way == "grad_checkpointing":
        monkeypatch.setattr(F, "gelu", lambda x, **how: (calls.append(1), gelu(x, **how))[1])
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for on in (False, True):
        torch.manual_seed(0)
        vit = timm.models.VisionTransformer(in_chans=1, num_classes=2, **sizes)
        model = nn.Sequential(nn.Unflatten(1, (1, 16, 16)), vit)
        history = run(model, data=data, epochs=2, hardware=Hardware("cpu", **{way: on}))
        found.append((torch.tensor([row["loss"] for row in history]), model(data.tensors[0]).detach()))
    # outputs, not parameters: AdamW makes steps of rounding errors, as for the keys' biases, whose gradient is 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    # 2 blocks in 4 steps, and again in the backward pass; and two calls of the models
    assert len(calls) == 8 + 16 + 4 if way == "grad_checkpointing" else compiled["ok"]


def test_frozen_tensors_stay_and_are_not_stored(tmp_path):
    model = noisy_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    run(model, checkpoint=Checkpoint(tmp_path / "c.pt"))
    assert torch.equal(model[0].weight, before)
    stored = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    assert stored.keys() == model.state_dict().keys() - {"0.weight", "0.bias"}


# --- schedules and parameter groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("constant", dict(warmup=2), [0, 1, 1, 1, 1, 1]),
        ("linear", dict(warmup=2, final=0.2), [0, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", dict(warmup=2), [0, 1, 1, 0.853553, 0.5, 0.146447]),
        ("step", dict(final=0.1), [1, 1, 1, 1, 1, 0.1]),
        ("cosine by epoch", dict(warmup=2, warmup_lr=0.05, epoch=2), [0.05, 0.05, 1, 1, 0.75, 0.75]),
    ],
)
def test_the_learning_rate_of_each_step(kind, options, expected):
    np.testing.assert_allclose(learning_rates(kind, 1.0, 6, **options), expected, atol=1e-6)


def test_the_default_schedule_is_a_cosine_after_a_warm_up_of_a_tenth():
    rates = [row["lr"] for row in run(nn.Linear(5, 2))]
    assert rates[:5] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert rates[22] == pytest.approx(5e-3, rel=1e-4) and 1e-7 < rates[-1] < 1e-4


def test_parameter_groups_have_schedules_of_their_own_and_are_clipped_apart(tmp_path):
    def groups(model):  # the weight and the bias of a layer are two groups of one name
        return [*param_groups(model[0].parameters(), name="rests"), *param_groups(model[4].parameters(), name="learns")]

    class Norms(Callback):
        """The norm of the gradient of each layer, weight and bias together, after the clipping."""

        def on_gradients(self, loop):
            gradients = [[p.grad.flatten() for p in loop.model[i].parameters()] for i in (0, 4)]
            norms.append([torch.cat(layer).norm().item() for layer in gradients])

    norms, models = [], [noisy_model() for _ in range(2)]
    rates = {"rests": given(np.zeros(8)), "learns": given(np.ones(8))}
    optimizer, checkpoint = sgd(1.0, momentum=0.0, groups=groups), Checkpoint(tmp_path / "c.pt")
    for model in models:
        callbacks = [ClipNorm(1e-3), Norms()]
        run(model, epochs=1, optimizer=optimizer, schedule=rates, checkpoint=checkpoint, callbacks=callbacks)
    assert len(norms) == 8 and same(*models), "a finished training is only read"
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-3)
    before, after = noisy_model(), models[0]
    assert torch.equal(before[0].weight, after[0].weight)
    assert not torch.equal(before[4].weight, after[4].weight) and not torch.equal(before[4].bias, after[4].bias)


# --- callbacks --------------------------------------------------------------------------------------------------------


class Weights(Callback):
    """The first parameter of the model after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, loop):
        self.seen.append(next(loop.model.parameters()).detach().clone())


def test_gradients_are_clipped_by_value_and_by_tensor():
    class Sizes(Callback):
        def on_gradients(self, loop):
            found.extend((p.grad.abs().max().item(), p.grad.norm().item()) for p in loop.model.parameters())

    found: list[tuple[float, float]] = []
    run(noisy_model(), epochs=1, callbacks=[ClipValue(1e-3), Sizes()])
    assert max(value for value, _ in found) == pytest.approx(1e-3)
    found.clear()
    run(noisy_model(), epochs=1, callbacks=[ClipNorm(1e-2, per_tensor=True), Sizes()])
    assert max(norm for _, norm in found) == pytest.approx(1e-2, rel=1e-3)
    assert sum(norm == pytest.approx(1e-2, rel=1e-3) for _, norm in found) > 8  # more than one tensor a step


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_ends_the_training(factor, tmp_path):
    def loss(model, batch):
        return squared(model, batch) + factor * model.weight.sum()

    checkpoint = Checkpoint(tmp_path / "c.pt")
    with pytest.raises(CompanionError):  # at the end of one step: later ones would be nan in any case
        run(nn.Linear(5, 2), loss, epochs=1, batch=64, callbacks=[ClipNorm(1.0)], checkpoint=checkpoint)
    assert not checkpoint.path.exists()


class Score:
    """A score by epoch, and the first weight of the model when it was asked for."""

    def __init__(self, *scores):
        self.scores, self.weights = list(scores), []

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        self.weights.append(model[0].weight.detach().clone())
        return self.scores[len(self.weights) - 1]


@pytest.mark.parametrize(
    ("scores", "options", "best"),
    [
        ((1.0, 3.0, 2.0, 3.0, 0.0), {"patience": 3}, 1),
        ((1.0, 3.0, 2.0, 3.0, 0.0), {"patience": 3, "ties": True}, 3),
        ((np.nan, 1.0, np.nan, np.nan), {"patience": 2}, 1),
        (((1.0, -1.0), (2.0, -3.0), (5.0, -2.0)), {"patience": 2}, 2),  # the first selects, the second stops
        ((9.0, 2.0), {"patience": 1, "first_step": 24}, 0),
        ((1.0, 3.0, 2.0, 3.0, 0.0, 0.0), {"patience": 2, "ties": True, "patient_ties": True}, 3),
        ((-1.0, 0.0, -1.0, -1.0), {"patience": 2, "ties": True, "patient_ties": True, "start": 0.0}, 1),
        ((-1.0, 0.0, 0.0), {"patience": 3, "start": 0.0}, 2),  # nothing is above 0: the last weights
    ],
    ids=[
        *("first of ties", "last of ties", "NaN is the lowest", "two scores", "first step"),
        *("ties restart the patience", "as high as the start", "none above the start"),
    ],
)
def test_early_stopping_ends_with_the_best_weights(scores, options, best, tmp_path):
    score, model = Score(*scores), noisy_model()
    stop, first = EarlyStop(score, **options), options.get("first_step", 8)
    steps = [first + 8 * i for i in range(len(scores))]
    settings = dict(epochs=10, checkpoint=Checkpoint(tmp_path / "c.pt"))
    history = run(model, callbacks=[stop], **settings)
    assert len(history) == steps[-1] and [row[0] for row in stop.scores] == steps
    assert torch.equal(model[0].weight, score.weights[best])
    again = noisy_model()
    assert run(again, callbacks=[EarlyStop(score, **options)], **settings) == history, "what has stopped stays so"
    assert torch.equal(again[0].weight, model[0].weight) and len(score.weights) == len(scores)


class Averaged(nn.Module):
    """A model with batch norm and two layers of one weight, and its average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(5, 5, bias=False) for _ in range(2)]
        layers[1].weight = layers[0].weight
        self.model = nn.Sequential(layers[0], nn.BatchNorm1d(5), layers[1], nn.Linear(5, 2))
        self.average = ema_copy(self.model)

    def forward(self, x):
        return self.model(x)


def test_an_average_predicts_as_torchs_with_the_running_statistics_of_batch_norm():
    class Torchs(Callback):
        def on_step_end(self, loop):
            expected.update_parameters(loop.model.model)

    model = Averaged()
    expected = AveragedModel(model.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    expected.n_averaged += 1  # else the first step is copied
    run(model, callbacks=[EMA([(model.average, model.model)], lambda step: 0.9), Torchs()])
    images = pairs().tensors[0] + 3
    torch.testing.assert_close(model.average(images), expected.eval()(images))
    assert not same(model.average, model.model)


def test_a_training_stopped_within_an_epoch_ends_that_epoch():
    class Stops(Callback):
        ended = 0

        def on_step_end(self, loop):
            loop.stopped = loop.step == 11

        def on_epoch_end(self, loop):
            self.ended += 1

    stops = Stops()
    assert len(run(noisy_model(), callbacks=[stops])) == 11 and stops.ended == 2


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Killed(Callback):
    """Interrupts the training in step 22, when the checkpoint of step 20 was the last."""

    def on_step_end(self, loop):
        if loop.step == 21:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (Callback, {"optimizer": sgd(np.float64(1e-2), np.float64(1e-4))}),  # numbers of NumPy can be stored too
        (lambda: Lookahead(2), {}),
        (lambda: EarlyStop(lambda model: -float(model[0].bias.sum())), {}),
        (Callback, {"last": "carry", "batch": 6, "hardware": Hardware("cpu", accumulate=3)}),  # step 20 ends an epoch
    ],
    ids=["SGD", "lookahead", "selection of an epoch", "images carried into the next epoch"],
)
def test_a_killed_training_resumes_to_the_same_bits(make, changes, tmp_path):
    whole, checkpoint = noisy_model(), Checkpoint(tmp_path / "c.pt", every=5)
    history = run(whole, callbacks=[make(), Callback()], **changes)
    with pytest.raises(KeyboardInterrupt):
        run(noisy_model(), callbacks=[make(), Killed()], checkpoint=checkpoint, **changes)
    cut = noisy_model()
    assert torch.load(checkpoint.path, weights_only=True)["step"] == 20
    assert run(cut, callbacks=[make(), Callback()], checkpoint=checkpoint, **changes) == history
    assert same(whole, cut) and [*tmp_path.glob(".*")] == [], "a temporary file was left"


@pytest.mark.parametrize(
    ("step", "write", "every", "written"),
    [
        (1, 0.5, 7, [7, 14, 21, 28, 35, 40]),  # each is quick: by steps alone
        (1, 3.1, 7, [7, 40]),  # a minute follows one of three seconds
        (10, 3.1, 7, [7, 14, 21, 28, 35, 40]),
        (200, 3.1, 200, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 40]),  # eight minutes
        (200, 40.0, 1, [1, *range(4, 40, 3), 40]),  # twenty times 40 seconds are more than eight minutes
    ],
)
def test_checkpoints_are_written_by_steps_and_by_time(step, write, every, written, tmp_path, monkeypatch):
    class Clocked(Checkpoint):
        def write(self, state):
            found.append(state["step"])
            super().write(state)

    class Hours(Callback):
        def on_step_end(self, loop):
            clock[0] += step

    def save(state, path):
        clock[0] += write
        plain(state, path)

    found, clock, plain, whole, model = [], [0.0], torch.save, noisy_model(), noisy_model()
    history = run(whole, callbacks=[Hours()])
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(torch, "save", save)
    checkpoint = Clocked(tmp_path / "c.pt", every=every)
    assert run(model, callbacks=[Hours()], checkpoint=checkpoint) == history and same(whole, model)
    assert found == written
    # killed where time alone was the reason
    killed, cut = Clocked(tmp_path / "killed.pt", every=every), noisy_model()
    found.clear()
    with pytest.raises(KeyboardInterrupt):
        run(noisy_model(), callbacks=[Hours(), Killed()], checkpoint=killed)
    assert torch.load(killed.path, weights_only=True)["step"] == found[-1] == max(s for s in written if s < 21)
    assert run(cut, callbacks=[Hours(), Callback()], checkpoint=killed) == history and same(whole, cut)


def test_a_training_does_not_resume_from_one_with_other_settings_or_from_a_damaged_file(tmp_path):
    def again(**changes):
        return lambda: run(noisy_model(), checkpoint=checkpoint, **{"callbacks": [Lookahead()]} | changes)

    checkpoint = Checkpoint(tmp_path / "c.pt")
    again()()
    refuses(
        (again(optimizer=adamw(0.5)), r"lr = 0\.5 .*0\.01"),
        (again(optimizer=sgd(1e-2)), "SGD.*AdamW"),
        (again(schedule=schedule("linear")), "schedule"),
        (again(seed=1), "seed = 1 .*0"),
        (again(callbacks=[ClipNorm(1.0)]), "callbacks.*Lookahead"),
    )
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    refuses((again(), r"c\.pt"), error=CorruptFile)


def test_the_history_is_appended_and_cut_to_the_checkpoint(tmp_path):
    """The cost of a checkpoint does not grow with the steps; rows after the last checkpoint of a killed run go."""

    class Watch(Callback):
        def on_step_end(self, loop):
            sizes.append(len(checkpoint.history.read_text().splitlines()) if checkpoint.history.exists() else 0)

    def again():
        return run(noisy_model(), checkpoint=Checkpoint(checkpoint.path), callbacks=[Watch()])

    checkpoint, sizes = Checkpoint(tmp_path / "c.pt", every=4), []
    history = run(noisy_model(), checkpoint=checkpoint, callbacks=[Watch()])
    assert sizes[3:9] == [0, 5, 5, 5, 5, 9]
    lines = checkpoint.history.read_text().splitlines()
    assert len(lines) == 41 and lines[0] == "step,lr,loss"
    with checkpoint.history.open("a") as file:
        file.write("40,0.1,3.0\n41,0.")
    assert again() == history and checkpoint.history.read_text().splitlines() == lines
    checkpoint.history.write_text("\n".join(lines[:9]))
    refuses((again, r"8 .*c\.pt.* 40"), error=CorruptFile)


def test_the_parts_of_a_loss_are_recorded_and_are_the_same_at_each_step_of_a_checkpoint(tmp_path):
    def loss(model, batch):
        value = squared(model, batch)
        return {"loss": value, "half": value / 2} | late

    late: dict[str, torch.Tensor] = {}
    settings = dict(hardware=Hardware("cpu", accumulate=2), checkpoint=Checkpoint(tmp_path / "c.pt"))
    history = run(nn.Linear(5, 2), loss, epochs=1, **settings)
    assert all(row["half"] == pytest.approx(row["loss"] / 2) for row in history)
    assert run(nn.Linear(5, 2), loss, epochs=1, **settings) == history, "read from the file"

    class Later(Callback):
        def on_step_end(self, loop):
            late["late"] = torch.ones(())

    settings |= {"callbacks": [Later()]}
    refuses((lambda: run(nn.Linear(5, 2), loss, **settings | {"checkpoint": Checkpoint(tmp_path / "d.pt")}), "late"))


# --- refusals and hardware --------------------------------------------------------------------------------------------


def test_settings_that_would_train_on_other_images_or_numbers_are_refused():
    def trained(**changes):
        return lambda: run(noisy_model(), **changes)

    refuses(
        (trained(schedule=given(np.ones(3))), "3 .*40"),
        (trained(batch=65), "1 to 64"),
        (trained(hardware=Hardware("cpu", accumulate=9)), "1 to 8"),
        (trained(batch=9, hardware=Hardware("cpu", devices=2)), "batch = 9.* 2"),
        (trained(hardware=Hardware("cpu", precision="16-mixed")), "precision.*bf16-mixed"),
        # 0 would remove the gradient, a negative limit turn it round, a negative patience stop after an epoch
        *((lambda clip=clip: clip(-1.0), "-1.0") for clip in (ClipNorm, ClipValue, Lookahead)),
        (lambda: EarlyStop(lambda model: 0.0, patience=-1), "patience"),
    )


def test_predict_takes_outputs_in_order_without_dropout():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = nn.Dropout(0.5)

        def forward(self, x):
            return self.noise(x * 2)

    data, model = pairs(), Noisy().train()
    assert torch.equal(outputs_of(model, data, batch=7, hardware=CPU), data.tensors[0] * 2)
    assert not model.training

    class Pooled(nn.Module):  # a row for a batch, which would be broadcast to its images
        def forward(self, x):
            return x.mean(0, keepdim=True)

    with pytest.raises(RuntimeError, match="shape"):
        outputs_of(Pooled(), data, batch=7, hardware=CPU)


class Ragged(Dataset):
    """One to four rows of an item's number, padded to nine; a batch has those of its longest item."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        rows = 1 + index % 4
        return F.pad(torch.full((rows, 5), float(index)), (0, 0, 0, 9 - rows)), torch.zeros(2)

    def collate(self, items):
        rows, targets = default_collate(items)
        return rows[:, : max(1 + int(x[0, 0]) % 4 for x, _ in items)], targets


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_makes_its_own_batches(workers):
    def loss(model, batch):
        shapes.append((batch[0].shape[1], max(1 + int(x) % 4 for x in batch[0][:, 0, 0])))
        return model(batch[0]).square().mean()

    shapes: list[tuple[int, int]] = []
    hardware = Hardware("cpu", workers=workers)
    run(nn.Linear(5, 2), loss, Ragged(), batch=3, epochs=2, hardware=hardware)
    assert len({found for found, _ in shapes}) > 1 and all(found == longest for found, longest in shapes)
    sums = outputs_of(nn.Flatten(2), Ragged(), batch=4, hardware=hardware)
    assert sums.shape == (24, 4, 5)


def test_the_scale_of_half_precision_is_in_the_checkpoint(tmp_path, monkeypatch):
    """Initialised again, it would skip other steps than an uninterrupted run."""
    given = []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 4.0})
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: given.append(state))
    for times in range(2):
        run(nn.Linear(5, 2), epochs=1, checkpoint=Checkpoint(tmp_path / "c.pt"))
        assert given == [{"scale": 4.0}] * times


def test_a_checkpoint_serves_several_trainings(tmp_path):
    checkpoint = Checkpoint(tmp_path / "a.pt", 5)
    run(noisy_model(), checkpoint=checkpoint)
    for file in (checkpoint.path, checkpoint.history):
        file.unlink()
    whole = run(noisy_model(), checkpoint=checkpoint)
    assert run(noisy_model(), checkpoint=Checkpoint(checkpoint.path, 5)) == whole


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build looks for the GPUs itself")
def test_a_training_on_the_cpu_does_not_start_cuda(monkeypatch):
    """Processes for several GPUs could not be forked any more."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *args: pytest.fail("CUDA was started"))
    run(noisy_model())


def test_a_gpu_is_looked_for_without_initialising_cuda(monkeypatch):
    """PyTorch reads the variable at each call; a process that has initialised CUDA cannot be forked."""
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1")
    assert device("auto") == "cuda" and device("cpu") == "cpu"


def test_gpus_that_are_not_there_are_refused_and_apple_silicon_is_used_only_on_request(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
    refuses(*((lambda kind=kind: launcher(Hardware(kind)), kind) for kind in ("cuda", "mps")))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert launcher(Hardware()).device.type == "cpu" and launcher(Hardware("mps")).device.type == "mps"
    refuses(*((lambda kind=kind: launcher(Hardware(kind, precision="tf32")), "tf32") for kind in ("cpu", "mps")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuses((lambda: launcher(Hardware("cuda"), 2), "devices = 2.* 1"))


def test_the_precision_of_the_authors_is_that_of_the_paper_profile_on_a_gpu(monkeypatch):
    def used(**changes):
        return Hardware.of(SimpleNamespace(**p | changes), slug, workers=1)

    p = {"profile": "paper", "dry_run": False, "accelerator": "auto", "devices": 2, "precision": "paper"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slug = "sa2vp"
    assert used() == Hardware("auto", 2, "32-true", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for slug in slugs():
        authors = used(dry_run=True)
        assert authors == Hardware("auto", 2, paper(slug)["precision"], 0) and authors.precision in PRECISIONS
    assert used(profile="pocket").precision == used(accelerator="cpu").precision == "32-true"
    assert used(precision="bf16-mixed").precision == "bf16-mixed"
    assert not used().compile and used(compile=True).compile


def test_a_dry_run_takes_two_steps_whose_micro_batches_are_those_of_the_training():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return squared(model, batch)

    hardware = Hardware("cpu", accumulate=8)
    options = {"epochs": 90, "batch": 64, "optimizer": adamw(1e-2), "hardware": hardware, "last": "train"}
    for images, expected in ((64, [8] * 8), (9, [4, 4])):
        data = TensorDataset(*(t[:images] for t in pairs().tensors))
        recipe.run(recipe.Training("a", noisy_model, loss, lambda data=data: data, options, dry_run=True))
        assert sizes == expected
        sizes.clear()
    assert spaced(5, 8) == [0, 1, 2, 3, 4] and spaced(100, 3)[::2] == [0, 99]


class Items(list, Dataset):
    """Items as they are."""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("item", [(torch.zeros(5), Path("a.png")), (torch.zeros(5), {"label": 1}), torch.zeros(5)])
def test_items_of_what_is_no_tensor_are_named(item, workers):
    with pytest.raises(CompanionError, match="items of the data"):
        run(nn.Linear(5, 2), data=Items([item] * 8), hardware=Hardware("cpu", workers=workers))


def test_optimisers_with_a_closure_and_models_without_weights_are_named():
    model = nn.Linear(5, 2)
    refuses(
        (lambda: run(model, optimizer=lambda model: torch.optim.LBFGS(model.parameters())), "LBFGS"),
        (lambda: run(nn.Linear(5, 2, device="meta")), "meta"),
    )


class Damaged(Dataset):
    """Items of which the last cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == 3:
            raise CorruptFile("3.jpg", "truncated")
        return torch.zeros(2), i


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_from_a_loaders_process_too(workers):
    hardware, model = Hardware("cpu", workers=workers), nn.Linear(2, 1)
    options = {"epochs": 1, "batch": 4, "optimizer": adamw(0.1), "hardware": hardware}
    for run in (
        lambda: outputs_of(model, Damaged(), hardware=hardware),
        lambda: fit(model, lambda model, batch: model(batch[0]).mean(), Damaged(), **options),
    ):
        with pytest.raises(CompanionError) as error:
            run()
        assert str(error.value) == "cannot read 3.jpg: truncated"
