"""The training loop: resumed runs give the same bits, schedules are the paper's, errors name the accepted settings."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightning_fabric.accelerators import MPSAccelerator
from lightning_fabric.plugins.precision import Precision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.ops.papers import paper, slugs
from companion.training import fit as loop
from companion.training.callbacks import EMA, Callback, ClipNorm, ClipValue, EarlyStop, Lookahead, ema_copy
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import CPU, PRECISIONS, Hardware, fit, launcher, predict
from companion.training.schedules import adamw, given, learning_rates, param_groups, schedule, sgd


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns_and_reports_every_step(precision):
    model = nn.Linear(5, 2)
    history = run(model, epochs=20, optimizer=adamw(5e-2), hardware=Hardware("cpu", precision=precision))
    assert [row["step"] for row in history] == list(range(160))
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert model.weight.dtype == torch.float32 and not model.training


def test_same_seed_same_bits_other_seed_other_bits():
    models = [noisy_model() for _ in range(3)]
    models[1].eval()  # a training is in training mode, however the model comes
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, seed=seed)
    assert same(models[0], models[1]) and not torch.equal(models[0][0].weight, models[2][0].weight)


def test_caller_randomness_is_left_alone():
    model = noisy_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = []

    def loss(model, batch):
        drawn.append(torch.rand(()).item())
        return squared(model, batch)

    run(model, loss)
    assert torch.equal(torch.rand(3), expected)
    assert len(set(drawn)) == 40, "each step has random numbers of its own"


def test_frozen_tensors_stay_and_are_not_stored(tmp_path):
    model = noisy_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    run(model, checkpoint=Checkpoint(tmp_path / "c.pt"))
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in torch.load(tmp_path / "c.pt", weights_only=True)["model"]


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
    for changes, said in (
        ({"optimizer": adamw(0.5)}, r"lr = 0\.5 .*0\.01"),
        ({"optimizer": sgd(1e-2)}, r"optimizer = 'SGD' .*'AdamW'"),
        ({"schedule": schedule("linear")}, "schedule"),
        ({"seed": 1}, "seed = 1 .*0"),
    ):
        with pytest.raises(BadParameter, match=said):
            run(noisy_model(), checkpoint=checkpoint, **changes)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=r"c\.pt"):
        run(noisy_model(), checkpoint=checkpoint)


def test_callbacks_are_part_of_the_settings(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c.pt")
    history = run(noisy_model(), checkpoint=checkpoint, callbacks=[Lookahead(), Callback()])
    for callbacks in ([Lookahead()], [ClipNorm(1.0), Callback()]):
        with pytest.raises(BadParameter, match=r"callbacks.*Lookahead.*Callback"):
            run(noisy_model(), checkpoint=checkpoint, callbacks=callbacks)
    saved = torch.load(checkpoint.path, weights_only=True)
    del saved["settings"]["callbacks"]  # a checkpoint of an earlier version
    torch.save(saved, checkpoint.path)
    assert run(noisy_model(), checkpoint=checkpoint, callbacks=[Lookahead(), Callback()]) == history


def test_a_loss_with_other_scalars_later_is_refused_where_it_would_be_stored(tmp_path):
    def loss(model, batch):
        steps.append(0)
        return {"loss": squared(model, batch)} | ({"late": torch.ones(())} if len(steps) > 3 else {})

    steps: list[int] = []
    with pytest.raises(BadParameter, match=r"scalars of the loss = 'loss, late'.*first step, loss,"):
        run(noisy_model(), loss, checkpoint=Checkpoint(tmp_path / "c.pt"))
    steps.clear()
    assert "late" in run(noisy_model(), loss)[-1]


def test_a_training_stopped_within_an_epoch_ends_that_epoch():
    class Stops(Callback):
        ended = 0

        def on_step_end(self, loop):
            loop.stopped = loop.step == 11

        def on_epoch_end(self, loop):
            self.ended += 1

    stops = Stops()
    assert len(run(noisy_model(), callbacks=[stops])) == 11 and stops.ended == 2


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


def test_augmentation_depends_on_the_item_not_on_the_process():
    alone, shared = ([x for x, _ in loop._batches(Noisy(), 4, 1, 0, 0, 8, 0, 1, workers)] for workers in (0, 2))
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


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return nn.Sequential(
        nn.Unflatten(1, (1, 16, 16)), timm.models.VisionTransformer(in_chans=1, num_classes=2, **sizes)
    )


@pytest.mark.parametrize("way", ["grad_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_same_training_in_less_memory_or_compiled(way, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 256, generator=generator), torch.randn(16, 2, generator=generator))
    compiled, calls, found = torch._dynamo.utils.counters["frames"], [], []
    compiled.clear()
    gelu = F.gelu
    if way == "grad_checkpointing":
        monkeypatch.setattr(F, "gelu", lambda x, **how: (calls.append(1), gelu(x, **how))[1])
    for on in (False, True):
        model = vit()
        history = run(model, data=data, epochs=2, hardware=Hardware("cpu", **{way: on}))
        found.append((history, model))
    (plain, one), (other, two) = found
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in (plain, other)), rtol=1e-5)
    # not the parameters: AdamW makes steps of rounding errors, as for the bias of the keys, whose gradient is 0
    assert (one(data.tensors[0]) - two(data.tensors[0])).abs().max() < 1e-3
    # 2 blocks in 4 steps, and again in the backward pass; and the line above
    assert len(calls) == 8 + 16 + 4 if way == "grad_checkpointing" else compiled["ok"]


class Counted(Dataset):
    """Keeps how many items were asked for."""

    asked = 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int):
        self.asked += 1
        return torch.full((5,), float(index)), torch.zeros(2)


def by_hand(last, epochs, images=11, batch=4):
    """Weights after plain SGD over the images of `fit`'s order, and the images of each step."""
    x, y = (t[:images] for t in pairs().tensors)
    torch.manual_seed(2)
    model, steps, waiting = nn.Linear(5, 2), [], []
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch)).permutation(images).tolist()
        for i in range(0, images, batch):
            waiting += order[i : i + batch]
            if len(order[i : i + batch]) < batch and last != "train":
                waiting = waiting if last == "carry" else []
                continue
            terms = ((model(x[waiting]) - y[waiting]) ** 2).mean(1)
            gradients = torch.autograd.grad(
                terms.sum() / (batch if last == "carry" else len(waiting)), [*model.parameters()]
            )
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.data -= 0.1 * g
            steps.append(waiting)
            waiting = []
    return model.state_dict(), steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("last", "sizes"), [("drop", [4] * 6), ("train", [4, 4, 3] * 3), ("carry", [4, 4, 7, 4, 7, 4])]
)
def test_the_last_images_of_an_epoch(last, sizes, accumulate):
    expected, steps = by_hand(last, epochs=3)
    assert [len(step) for step in steps] == sizes
    torch.manual_seed(2)
    model = nn.Linear(5, 2)
    data = TensorDataset(*(t[:11] for t in pairs().tensors))
    history = run(
        model,
        data=data,
        epochs=3,
        batch=4,
        last=last,
        optimizer=sgd(0.1, momentum=0),
        schedule=schedule("constant", 0),
        hardware=Hardware("cpu", accumulate=accumulate),
    )
    assert len(history) == len(sizes)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_training_that_carries_images_resumes_to_the_same_bits(tmp_path):
    data = TensorDataset(*(t[:11] for t in pairs().tensors))
    whole, resumed = nn.Linear(5, 2), nn.Linear(5, 2)
    resumed.load_state_dict(whole.state_dict())
    settings = dict(data=data, epochs=3, batch=4, last="carry")
    run(whole, **settings)
    stop = Stop(2)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, checkpoint=Checkpoint(tmp_path / "run.pt", every=1), callbacks=[stop], **settings)
    stop.at = 99
    run(resumed, checkpoint=Checkpoint(tmp_path / "run.pt", every=1), callbacks=[stop], **settings)
    assert same(whole, resumed)


class Stop(Callback):
    """Interrupt the training before the checkpoint of step `at` + 1 is written."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, loop):
        if loop.step > self.at:
            raise KeyboardInterrupt


def test_a_part_of_a_batch_is_what_the_loss_sees_and_is_loaded_when_it_is_needed():
    """A batch of thousands of images need not be in memory at once."""
    data, asked, seen = Counted(), [], []

    def loss(model, batch):
        asked.append(data.asked)
        seen.append(batch[0][:, 0])
        return squared(model, batch)

    run(nn.Linear(5, 2), loss, data, epochs=1, hardware=Hardware("cpu", accumulate=3))
    assert [len(part) for part in seen] == [3, 3, 2] * 8 and asked == np.cumsum([3, 3, 2] * 8).tolist()
    assert torch.equal(torch.cat(seen).sort()[0], torch.arange(64.0))


def test_a_long_training_begins_at_once():
    """The order of a hundred thousand epochs is not made beforehand."""
    stream = loop._batches(Counted(), 8, 1, 0, 0, 10**9, 0, 1, 0)
    assert next(stream)[0].shape == (8, 5)


@pytest.mark.parametrize(("given", "betas"), [({"betas": (0.5, 0.8)}, (0.5, 0.8)), ({}, (0.9, 0.999))])
def test_betas_reach_the_optimiser(given, betas):
    """The second step of AdamW, by hand; by default with the betas of its paper."""
    data = TensorDataset(torch.ones(1, 1))
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def loss(model, batch):  # gradients of 1, then 3
        return model.weight.sum() * (1.0 if not model.weight.any() else 3.0)

    optimizer = adamw(0.1, 0.0, **given)
    run(model, loss, data, epochs=2, batch=1, optimizer=optimizer, schedule=schedule("constant", 0))
    first, second = betas
    mean = (first * (1 - first) * 1 + (1 - first) * 3) / (1 - first**2)
    square = (second * (1 - second) * 1 + (1 - second) * 9) / (1 - second**2)
    assert model.weight.item() == pytest.approx(-0.1 - 0.1 * mean / square**0.5, rel=1e-5)


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
    rates = learning_rates("cosine by epoch", 1e-2, 120, 8, warmup_lr=1e-5, epoch=8)
    assert [row["lr"] for row in history] == rates.tolist()


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


@pytest.mark.parametrize(("words", "expected"), [((), [(1, 0.1), (1, 0.0)]), (("all",), [(2, 0.1)])])
def test_decay_spares_vectors_unless_all_is_asked(words, expected):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))  # frozen tensors are in no group
    groups = param_groups(model.parameters(), 0.1, *words)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == expected


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
    assert len(norms) == 8 and same(*models), "resumed when done"
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-3)
    before, after = noisy_model(), models[0]
    assert torch.equal(before[0].weight, after[0].weight)
    assert not torch.equal(before[4].weight, after[4].weight) and not torch.equal(before[4].bias, after[4].bias)


def test_the_default_schedule_is_a_cosine_after_a_warm_up_of_a_tenth():
    history = run(nn.Linear(5, 2))
    assert [row["lr"] for row in history] == learning_rates("cosine", 1e-2, 40, 4, 1e-7).tolist()


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_ends_the_training(factor, tmp_path):
    def loss(model, batch):
        return squared(model, batch) + factor * model.weight.sum()

    checkpoint = Checkpoint(tmp_path / "c.pt")
    with pytest.raises(CompanionError, match="diverged"):  # at the end of one step: later ones would be nan in any case
        run(nn.Linear(5, 2), loss, epochs=1, batch=64, callbacks=[ClipNorm(1.0)], checkpoint=checkpoint)
    assert not checkpoint.path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: dict(schedule=given(np.ones(3))), "40, one for each step"),
        (lambda: dict(batch=65), "1 to 64"),
        (lambda: dict(batch=0), "1 to 64"),
        (lambda: dict(epochs=0), "epochs = 0.*more than 0"),
        (lambda: dict(data=TensorDataset(torch.zeros(0, 5)), last="train"), "empty data set"),
        (lambda: dict(schedule=schedule("exponential")), "'cosine'"),
        (lambda: dict(schedule=schedule(warmup=2)), "0 to 1"),
        (lambda: dict(hardware=Hardware("cpu", precision="8")), "'bf16-mixed'"),
        (lambda: dict(optimizer=adamw(1e-2, decay="biases")), "'matrices', 'all'"),
        (lambda: dict(batch=9, hardware=Hardware("cpu", devices=2)), "multiple of devices"),
        (lambda: dict(hardware=Hardware("cpu", devices=0)), "devices = 0.*1 or more"),
        (lambda: dict(hardware=Hardware("cpu", precision="16-mixed")), "precision.*bf16-mixed"),
        (lambda: dict(hardware=Hardware("cpu", accumulate=9)), "1 to 8"),
        (lambda: dict(hardware=Hardware("cpu", grad_checkpointing=True)), "Sequential has no part"),
        (lambda: dict(callbacks=[Lookahead(0)]), "1 or more steps"),
    ],
)
def test_bad_settings_name_the_accepted_ones(changes, message):
    with pytest.raises(BadParameter, match=message):
        run(noisy_model(), **changes())


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


class Weights(Callback):
    """The first weight of the model (or of its student) after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, loop):
        self.seen.append(next(loop.model.parameters()).detach().clone())


def test_lookahead_by_hand():
    """slow += alpha (fast - slow); fast = slow, after steps k + 1, 2 k + 1, ..."""
    fast, slow, model = Weights(), None, nn.Linear(5, 2)
    weight, bias = (p.detach().clone() for p in model.parameters())
    settings = dict(epochs=1, optimizer=sgd(0.05, momentum=0.0), schedule=schedule("constant", 0))
    run(model, callbacks=[fast, Lookahead(k=2, alpha=0.25)], **settings)
    for step, batch in enumerate(loop._batches(pairs(), 8, 1, 0, 0, 8, 0, 1, 0)):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        gradients = torch.autograd.grad(F.mse_loss(F.linear(batch[0], w, b), batch[1]), [w, b])
        weight, bias = weight - 0.05 * gradients[0], bias - 0.05 * gradients[1]
        torch.testing.assert_close(fast.seen[step], weight, rtol=1e-5, atol=1e-6)
        if step == 0:
            slow = weight.clone(), bias.clone()
        elif step % 2 == 0:
            slow = weight, bias = tuple(s + 0.25 * (f - s) for s, f in zip(slow, (weight, bias), strict=True))
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-5, atol=1e-6)


def test_a_moving_average_follows_and_is_part_of_the_model():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(5, 2)
            self.teacher = ema_copy(self.student)

        def forward(self, x):
            return self.student(x)

    model, weights = Pair(), Weights()
    assert not list(model.teacher.parameters()) and "teacher.weight" in trained_state(model)
    start = model.student.weight.detach().clone()
    ema = EMA([(model.teacher, model.student)], momentum=lambda step: 1 - 1 / step)
    run(model, epochs=1, callbacks=[weights, ema])
    torch.testing.assert_close(model.teacher.weight, torch.stack(weights.seen).mean(0))  # momentum 1 - 1/n: the mean
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


@pytest.mark.parametrize(
    ("make", "optimizer"),
    [
        (lambda: Lookahead(2), adamw(1e-2)),
        (lambda: EarlyStop(lambda model: -float(model[0].bias.sum())), adamw(1e-2)),
        (Callback, sgd(1e-2)),
    ],
    ids=["lookahead", "early stop", "SGD"],
)
def test_a_killed_training_resumes_to_the_same_bits(make, optimizer, tmp_path):
    class Killed(Callback):
        def on_step_end(self, loop):
            if loop.step == 21:
                raise KeyboardInterrupt

    whole, checkpoint = noisy_model(), Checkpoint(tmp_path / "c.pt", every=5)
    history = run(whole, optimizer=optimizer, callbacks=[make(), Callback()])
    with pytest.raises(KeyboardInterrupt):
        run(noisy_model(), optimizer=optimizer, callbacks=[make(), Killed()], checkpoint=checkpoint)
    cut = noisy_model()
    assert torch.load(checkpoint.path, weights_only=True)["step"] == 20
    assert run(cut, optimizer=optimizer, callbacks=[make(), Callback()], checkpoint=checkpoint) == history
    assert same(whole, cut) and [*tmp_path.glob(".*")] == [], "a temporary file was left"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_parts_of_a_loss_are_recorded(tmp_path, accumulate):
    def loss(model, batch):
        value = squared(model, batch)
        return {"loss": value, "half": value / 2}

    settings = dict(hardware=Hardware("cpu", accumulate=accumulate), checkpoint=Checkpoint(tmp_path / "c.pt"))
    history = run(nn.Linear(5, 2), loss, epochs=1, **settings)
    assert all(row["half"] == pytest.approx(row["loss"] / 2) for row in history)
    assert run(nn.Linear(5, 2), loss, epochs=1, **settings) == history


def test_a_login_node_with_srun_is_no_warning(tmp_path, monkeypatch, recwarn):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    predict(nn.Identity(), pairs(), hardware=CPU)
    run(noisy_model())
    assert not [str(warning.message) for warning in recwarn if "srun" in str(warning.message)]


def test_predict_takes_the_first_output_in_order_without_dropout():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = nn.Dropout(0.5)

        def forward(self, x):
            return self.noise(x * 2), x * 3

    data, model = pairs(), Two().train()
    assert torch.equal(predict(model, data, batch=7, hardware=CPU), data.tensors[0] * 2)
    assert not model.training


def test_the_scale_of_half_precision_is_kept(tmp_path, monkeypatch):
    """Initialised again, it would skip other steps than an uninterrupted run."""
    given = []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 4.0})
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: given.append(state))
    for times in range(2):
        run(nn.Linear(5, 2), epochs=1, checkpoint=Checkpoint(tmp_path / "c.pt"))
        assert given == [{"scale": 4.0}] * times


def test_training_does_not_ask_gpus_for_their_random_state(monkeypatch):
    """That would start CUDA in this process, and processes for several GPUs could not be forked any more."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *args: pytest.fail("CUDA was started"))
    run(noisy_model())


def test_apple_silicon_is_used_only_on_request(monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launcher(Hardware()).device.type == "cpu" and launcher(Hardware("mps")).device.type == "mps"


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
        with pytest.raises(BadParameter, match=f"accelerator = '{kind}'.*no such GPU"):
            predict(nn.Identity(), pairs(), hardware=Hardware(kind))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadParameter, match=r"devices = 2.*1 to 1"):
        launcher(Hardware("cuda"), 2)


@pytest.mark.parametrize("slug", slugs())
def test_the_precision_of_the_authors_is_that_of_the_paper_profile_on_a_gpu(slug, monkeypatch):
    def used(**changes):
        return Hardware.of(SimpleNamespace(**p | changes), slug, workers=4)

    p = {"profile": "paper", "dry_run": False, "accelerator": "auto", "devices": 2, "precision": "paper"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert used() == Hardware("auto", 2, "32-true", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    authors = used(dry_run=True)
    assert authors == Hardware("auto", 2, paper(slug)["precision"], 0) and authors.precision in PRECISIONS
    assert used(profile="pocket").precision == used(accelerator="cpu").precision == "32-true"
    assert used(precision="bf16-mixed").precision == "bf16-mixed"
