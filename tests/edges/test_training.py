"""Every argument of a training at its edge; what a training leaves behind; a second one with the same objects."""

import contextlib
import copy
import functools
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion.errors import BadParameter, CompanionError
from companion.models.hvit.dino import WeightDecay
from companion.training import callbacks, recipe, schedules
from companion.training.callbacks import ClipNorm, ClipValue, EarlyStop, Lookahead
from companion.training.checkpoints import Checkpoint
from companion.training.fit import fit, outputs_of, same_shapes
from companion.training.hardware import ACCELERATORS, CPU, PRECISIONS, Hardware, device
from companion.training.schedules import SCHEDULES, adamw, given, schedule, sgd
from companion.training.stored import fill, saved
from tests.edges.common import Edge, check, state

torch.manual_seed(0)
MODEL, OTHER, NAN, INF = nn.Linear(3, 1), nn.Linear(3, 1), math.nan, math.inf
DATA = TensorDataset(torch.randn(8, 3), torch.arange(8.0) / 8)
NUMBERS = {"0": 0, "-1": -1, "1": 1, "2.5": 2.5, "nan": NAN, "inf": INF, "'x'": "x", "None": None}


class Items:
    """`DATA`, item by item; map-style, of no class of torch."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return DATA[index]


def squared(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def times(factor: float, after: int = 0) -> Callable:
    """The loss, `factor` times as high from a step on."""
    steps = itertools.count()
    return lambda model, batch: squared(model, batch) * (factor if next(steps) >= after else 1)


def with_terms(**terms: Any) -> Callable:
    return lambda model, batch: {
        name: squared(model, batch) if value is None else value for name, value in terms.items()
    }


def trained(model: Any = MODEL, loss: Any = squared, data: Any = DATA, **changes: Any) -> Tensor:
    """The losses and the parameters of a training of a copy."""
    options = {"epochs": 2, "batch": 4, "optimizer": adamw(1e-2), "hardware": CPU} | changes
    model = copy.deepcopy(model)
    history = fit(model, loss, data, **options)
    assert not model.training
    return torch.cat([torch.tensor([row["loss"] for row in history]), *map(torch.flatten, model.parameters())]).detach()


def rates(kind: str, **changes: Any) -> Tensor:
    return torch.tensor(schedules.learning_rates(kind, 1.0, **changes))


LOSSES = {
    **{"NaN": times(NAN), "infinite": times(INF), "NaN later": times(NAN, 2), "NaN in the last step": times(NAN, 3)},
    "no gradient": lambda model, batch: squared(model, batch).detach(),
    "a vector": lambda model, batch: model(batch[0])[:, 0],
    "one value in an axis": lambda model, batch: squared(model, batch)[None],
    **{"a number": lambda model, batch: 1.0, "nothing": lambda model, batch: None, "text": "x", "None": None},
    **{"no terms": with_terms(), "no loss": with_terms(a=None), "a number by name": with_terms(loss=None, a=1.0)},
    **{"the name step": with_terms(loss=None, step=None), "the name lr": with_terms(loss=None, lr=None)},
    "a second term": with_terms(loss=None, a=torch.ones(())),
}
MODELS = {
    "frozen": nn.Linear(3, 1).requires_grad_(False),
    **{"no parameters": nn.Identity(), "None": None, "text": "x", "a class": nn.Linear, "a function": lambda x: x},
    **{"eval": nn.Linear(3, 1).eval(), "NaN": nn.Linear(3, 1)},
}
nn.init.constant_(MODELS["NaN"].weight, NAN)
RATES = {
    **{"short": np.ones(3), "long": np.ones(5), "two axes": np.ones((4, 2)), "NaN": np.full(4, NAN), "none": []},
    **{"infinite": np.full(4, INF), "negative": -np.ones(4), "one": 1.0, "0": np.zeros(4), "a list": [1e-3] * 4},
}
CALLBACKS = {"None": None, "one": ClipNorm(1.0), "an iterator": iter([ClipNorm(1.0)]), "a tuple": (ClipNorm(1.0),) * 2}
HARDWARE = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "workers": 0, "accumulate": 1}
HARDWARE |= {"grad_checkpointing": False, "compile": False}

EDGES = {
    "fit": Edge(
        trained,
        {
            **{"model": MODEL, "loss": squared, "data": DATA, "epochs": 2, "batch": 4, "optimizer": adamw(1e-2)},
            **{"schedule": None, "callbacks": [], "checkpoint": None, "seed": 0, "hardware": CPU, "last": "drop"},
            "name": "a",
        },
        {
            **{"epochs": "1, 2.5", "batch": "1", "seed": "0, 1", "last": "train, carry"},
            **{"model": "eval", "loss": "a second term", "data": "items", "schedule": "0, a list, constant"},
            **{"callbacks": "a tuple", "optimizer": "SGD"},
        },
        fit,
        {
            **{"model": MODELS, "loss": LOSSES, "callbacks": CALLBACKS, "name": {"None": None, "1": 1}},
            "data": {
                **{"none": TensorDataset(torch.ones(0, 3), torch.ones(0)), "one": TensorDataset(*DATA[:1])},
                **{"NaN": TensorDataset(DATA.tensors[0] * NAN, DATA.tensors[1]), "items": Items()},
                **{"dictionaries": [{"x": torch.ones(3)}] * 8, "bare tensors": [torch.ones(3)] * 8},
            },
            "optimizer": {
                **{"None": None, "text": "x", "a number": 1e-3, "SGD": sgd(1e-2)},
                "nothing": lambda model: None,
                "own groups": adamw(1e-2, groups=lambda model: [{"params": model.parameters(), "weight_decay": -1}]),
                "another model's": lambda model: torch.optim.SGD(OTHER.parameters(), 0.1),
            },
            "schedule": {
                **{name: given(values) for name, values in RATES.items()},
                **{"text": "cosine", "an array": np.ones(4), "no name": {}, "another name": {"a": schedule()}},
                **{"not called": schedule, "constant": schedule("constant")},
            },
            "checkpoint": {"text": "a.pt", "a path": Path("a.pt"), "a class": Checkpoint},
            "hardware": {"None": None, "text": "cpu", "a class": Hardware, "mappings": {}},
            "last": {"train": "train", "carry": "carry", "another": "x", "None": None, "a list": ["drop"]},
        },
    ),
    "hardware": Edge(
        lambda **given: torch.tensor([float(Hardware(**given).devices)]),
        HARDWARE,
        {
            **{"accelerator": "auto, mps, cuda", "precision": "bf16-mixed, tf32, 16-mixed", "devices": "1"},
            **{"workers": "0, 1", "accumulate": "1", "grad_checkpointing": "True", "compile": "True"},
        },
        Hardware,
        {
            "accelerator": {name: name for name in ("auto", *ACCELERATORS[2:], "gpu", "tpu", "", None, 1, "CPU")},
            "precision": {name: name for name in (*PRECISIONS[1:], "paper", "32", 32, "x", None, "bf16-true")},
            **{name: {"True": True} for name in ("grad_checkpointing", "compile")},
        },
    ),
    "device": Edge(
        lambda accelerator: torch.tensor([len(device(accelerator))]),
        {"accelerator": "cpu"},
        {"accelerator": "auto"},
        others={"accelerator": {name: name for name in ("auto", "gpu", "cuda:0", "x", None, 1)}},
    ),
    "outputs": Edge(
        lambda batch: outputs_of(MODEL, DATA, batch=batch, hardware=CPU).detach(), {"batch": 4}, {"batch": "1"}
    ),
    **{
        kind: Edge(
            functools.partial(rates, kind), {"steps": 10, "warmup": 2}, {"warmup": "0, 1"}, lambda steps, warmup: None
        )
        for kind in SCHEDULES
    },
    "schedule": Edge(
        lambda **given: trained(schedule=schedule(**given)),
        {"kind": "cosine", "warmup": 0.1, "final_lr": 1e-7, "warmup_lr": 1e-3},
        {"warmup": "0, 1", "final_lr": "0, 1, 2.5", "warmup_lr": "0, 1, 2.5, None"},
        schedule,
        {
            "kind": {"None": None, "another": "x", "a list": ["cosine"]},
            "final_lr": {name: value for name, value in NUMBERS.items() if not isinstance(value, str | None)},
            "warmup_lr": {name: value for name, value in NUMBERS.items() if not isinstance(value, str)},
        },
    ),
    "AdamW": Edge(
        lambda **given: trained(optimizer=adamw(**given)),
        {"lr": 1e-2, "weight_decay": 1e-4, "decay": "all", "betas": (0.9, 0.99), "groups": None},
        {"lr": "0, 1, 2.5", "weight_decay": "0, 1, 2.5", "betas": "0"},
        adamw,
        {
            **{"decay": {"None": None, "another": "x", "a list": ["all"]}, "groups": {"3": 3}},
            "betas": {"0": (0, 0), "1": (0.9, 1), "-1": (-1, 0.9), "NaN": (NAN, 0.9), "text": "xy"},
        },
    ),
    "SGD": Edge(
        lambda **given: trained(optimizer=sgd(**given)),
        {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.9, "decay": "all", "groups": None},
        {"lr": "0, 1, 2.5", "weight_decay": "0, 1, 2.5", "momentum": "0"},
        sgd,
        {"decay": {"None": None, "another": "x", "a list": ["all"]}, "groups": {"3": 3}},
    ),
    **{
        c.__name__: Edge(lambda limit, c=c: trained(callbacks=[c(limit)]), {"limit": 1.0}, {"limit": "1, 2.5"})
        for c in (ClipNorm, ClipValue)
    },
    "Lookahead": Edge(
        lambda **given: trained(callbacks=[Lookahead(**given)]),
        {"k": 2, "alpha": 0.5},
        {"k": "1", "alpha": "0, 1"},
        Lookahead,
    ),
    "EarlyStop": Edge(
        lambda **given: trained(callbacks=[EarlyStop(**given)]),
        {
            **{"score": lambda model: 1.0, "patience": 2, "first_step": 0, "start": 0.0},
            **{"ties": False, "patient_ties": False},
        },
        {
            **{"patience": "0, 1", "first_step": "0, 1", "start": "0, -1, 1, 2.5, None"},
            **{"score": "NaN, infinite, tensor, two", "ties": "True", "patient_ties": "True"},
        },
        EarlyStop,
        {
            "score": {
                **{"NaN": lambda model: NAN, "infinite": lambda model: INF, "two": lambda model: (1.0, 2.0)},
                **{"tensor": lambda model: torch.ones(()), "text": lambda model: "x", "None": lambda model: None},
                **{"three": lambda model: (1.0,) * 3, "no function": 1.0},
            },
            **{name: {"True": True} for name in ("ties", "patient_ties")},
        },
    ),
    "EMA": Edge(
        lambda momentum: averaged(lambda step: momentum), {"momentum": 0.9}, {"momentum": "0, 1"}
    ),
    "EMA's pairs": Edge(
        lambda pairs: torch.tensor([float(len(callbacks.EMA(pairs, lambda step: 0.9).pairs))]),
        {"pairs": [(callbacks.ema_copy(MODEL), MODEL)]},
        {"pairs": "empty, less, more"},
    ),
    "own groups": Edge(
        lambda **given: torch.tensor([len(group["params"]) for group in schedules.param_groups(**given)]),
        {"parameters": list(MODEL.parameters()), "weight_decay": 0.1, "decay": "matrices"},
        {"weight_decay": "0, 1, 2.5"},
        of=lambda parameters, weight_decay, decay: None,
        others={"parameters": {"number": 3, "None": None}},
    ),
    "same shapes": Edge(
        lambda **given: torch.tensor(same_shapes(**given)),
        {"images": [torch.ones(3, 2, 2)] * 2, "most": 2},
        {"most": "1"},
        same_shapes,
        {"images": {"text": "x", "None": None, "numbers": [1, 2]}},
    ),
    "dry run": Edge(
        lambda batch: torch.tensor(recipe.dry_items(SimpleNamespace(accelerator="cpu"), batch)),
        {"batch": 2},
        {"batch": "1"},
    ),
    "recipe": Edge(
        lambda **given: torch.tensor([float(len(recipe.run(recipe.Training(**given))[1]))]),
        {
            **{"name": "a", "build": lambda: copy.deepcopy(MODEL), "loss": squared, "data": lambda: DATA},
            **{"fit": {"optimizer": adamw(1e-2), "epochs": 1, "batch": 4, "hardware": CPU}, "facts": {}},
            **{"weights": None, "metadata": None, "every": 200, "dry_run": False},
        },
        {"every": "1", "data": "None", "dry_run": "True"},
        recipe.Training,
        {
            **{name: {"None": None, "text": "x"} for name in ("build", "loss", "data", "facts", "fit")},
            **{name: {"text": "x", "3": 3} for name in ("weights", "metadata")},
            **{"name": {"None": None, "1": 1}, "dry_run": {"True": True, "None": None, "text": "x"}},
        },
    ),
    "checkpoint": Edge(
        lambda **given: torch.tensor([float(Checkpoint(**given).every)]),
        {"path": "a.pt", "every": 200},
        {"every": "1"},
        Checkpoint,
        {"path": {"none": "", "a folder": "."}},
    ),
}  # fmt: skip


def averaged(momentum: Callable[[int], float]) -> Tensor:
    model = nn.Sequential(copy.deepcopy(MODEL))
    model.average = callbacks.ema_copy(model[0])
    fit(
        model,
        lambda wrapped, batch: squared(model[0], batch),
        DATA,
        epochs=1,
        batch=4,
        optimizer=adamw(1e-2),
        callbacks=[callbacks.EMA([(model.average, model[0])], momentum)],
        hardware=CPU,
    )
    return model.average.weight


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    assert check(EDGES[name], numbers=lambda found: torch.as_tensor(found).double())


# --- before and after -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_modes_of_the_caller_have_no_effect(precision):
    options = {"epochs": 2, "batch": 4, "optimizer": adamw(1e-2), "hardware": Hardware("cpu", precision=precision)}
    models = [copy.deepcopy(MODEL) for _ in range(4)]
    modes = (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16))
    outputs = []
    for model, mode in zip(models, modes, strict=True):
        with mode:
            before = state()
            fit(model, squared, DATA, **options)
            outputs.append(outputs_of(model, DATA, hardware=options["hardware"]))
            assert state() == before
        assert model.weight.equal(models[0].weight) and outputs[-1].equal(outputs[0])


def test_callbacks_serve_several_trainings():
    """Of a first training no best weights and no slow copies remain."""
    scores = [5.0, 6.0, 1.0, 2.0, 1.0, 2.0]
    for make in (lambda: Lookahead(1), lambda: EarlyStop(lambda model: scores.pop(0))):
        again = make()
        trained(callbacks=[again])
        found = trained(OTHER, callbacks=[again])
        assert found.equal(trained(OTHER, callbacks=[make()]))


def test_a_callback_of_a_training_that_diverged_serves_another():
    clip = ClipNorm(1.0)
    with pytest.raises(CompanionError, match="diverged"):
        trained(loss=times(NAN), callbacks=[clip])
    assert trained(callbacks=[clip]).isfinite().all()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_training_that_diverges_ends_with_the_checkpoint_before(step, tmp_path):
    file = Checkpoint(tmp_path / "a.pt", 1)
    with pytest.raises(CompanionError, match="diverged"):
        trained(loss=times(INF, step), checkpoint=file, epochs=4)
    saved = torch.load(file.path, weights_only=True) if file.path.exists() else {"step": 0, "model": {}}
    assert saved["step"] == step and all(value.isfinite().all() for value in saved["model"].values())


def test_nothing_is_changed_where_the_first_loss_is_not_finite():
    model = copy.deepcopy(MODEL)
    with pytest.raises(CompanionError, match="diverged"):
        fit(model, times(NAN), DATA, epochs=1, batch=4, optimizer=adamw(1.0, 1.0), schedule=given([1, 1]), hardware=CPU)
    assert model.weight.equal(MODEL.weight) and not model.training


def test_a_training_on_two_devices_leaves_no_environment():
    before = dict(os.environ)
    trained(hardware=Hardware("cpu", 2))
    assert dict(os.environ) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "weights", "history"])
def test_a_damaged_checkpoint_is_not_trained_over(damage, tmp_path):
    file = Checkpoint(tmp_path / "a.pt", 1)
    trained(checkpoint=file)
    whole = file.path.read_bytes()
    wrong = {"truncated": whole[:200], "empty": b"", "text": b"text"}
    file.path.write_bytes(wrong.get(damage, whole))
    if damage == "weights":
        torch.save(MODEL.state_dict(), file.path)
    if damage == "history":
        file.history.write_text("step,lr,loss\n")
    there = file.path.read_bytes()
    with pytest.raises(CompanionError, match=r"a\.pt"):
        trained(checkpoint=file)
    assert file.path.read_bytes() == there


@pytest.mark.parametrize(
    "changes",
    [
        *({"epochs": 3}, {"batch": 2}, {"seed": 1}, {"optimizer": sgd(1e-2)}, {"optimizer": adamw(1.0)}),
        *({"callbacks": [Lookahead()]}, {"data": TensorDataset(*DATA[:7])}, {"last": "train"}),
        *({"model": nn.Sequential(nn.Linear(3, 1))}, {"hardware": Hardware("cpu", precision="bf16-mixed")}),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_checkpoint_of_another_training_is_refused(changes, tmp_path):
    file = Checkpoint(tmp_path / "a.pt", 1)
    trained(checkpoint=file)
    with pytest.raises(BadParameter):
        trained(checkpoint=file, **changes)


class Noise(callbacks.Callback):
    """A callback of one's own, with a hyper-parameter and without a state."""

    def __init__(self, std: float):
        self.std = std

    def on_gradients(self, loop: Any) -> None:
        loop.model.weight.grad += self.std


AVERAGE = callbacks.ema_copy(MODEL)


@pytest.mark.parametrize(
    ("make", "saved", "given"),
    [
        (ClipNorm, 0.125, 10.0),
        (lambda each: ClipNorm(1.0, per_tensor=each), False, True),
        (ClipValue, 0.125, 10.0),
        (Lookahead, 3, 4),
        (lambda alpha: Lookahead(5, alpha), 0.25, 0.75),
        (lambda patience: EarlyStop(lambda model: 1.0, patience), 3, 4),
        (lambda decay: callbacks.EMA([(AVERAGE, MODEL)], lambda step: decay), 0.25, 0.75),
        (lambda start: WeightDecay(start, 1.0), 0.25, 0.75),
        (Noise, 0.25, 0.75),
    ],
)
def test_a_checkpoint_with_another_setting_of_a_callback_is_refused_with_both_values(make, saved, given, tmp_path):
    file = Checkpoint(tmp_path / "a.pt", 1)
    once = trained(checkpoint=file, callbacks=[make(saved)])
    assert trained(checkpoint=file, callbacks=[make(saved)]).equal(once)
    for changed, named in (([make(given)], given), ([], []), ([make(saved), ClipValue(0.5)], 0.5)):
        with pytest.raises(BadParameter) as error:
            trained(checkpoint=file, callbacks=changed)
        assert all(str(value) in str(error.value) for value in (named, saved, file.path))


@pytest.mark.parametrize("rows", [3, 5])
def test_a_store_is_complete_or_an_error(rows, tmp_path):
    with pytest.raises((CompanionError, ValueError)):
        fill(tmp_path / "a", 4, lambda done: [(torch.ones(rows, 2),)])
    for folder in (None, tmp_path / "b"):
        with pytest.raises(CompanionError, match=f"{rows}.*4"):
            list(saved(folder, 4, lambda done: [1.0] * rows))
