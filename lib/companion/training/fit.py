"""One training loop for all papers, on Lightning Fabric: CPU or GPU, any precision, one device or several.

    fit(model, loss, data, epochs=100, batch=40, optimizer=adamw(1e-3), schedule=schedule("cosine"),
        callbacks=[ClipNorm(1.0)], checkpoint=Checkpoint("run.pt"))

The random numbers of a step depend only on the seed and the step, those of an item's augmentation only on the seed, the
epoch and the item. On the CPU of one machine a killed and resumed run is therefore bit-identical to an uninterrupted
one; on a GPU cuDNN selects its algorithms again, and the last bits may differ.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ..errors import BadParameter, CompanionError, Count, Positive, Whole, check_choice, check_range, typed
from ..io.progress import progress
from .callbacks import Callback, Loop
from .checkpoints import Checkpoint, as_json, plain, trained_state
from .hardware import Hardware, average_over_devices, evaluating, from_processes, launcher, loader, on_device
from .schedules import MakeOptimizer, Schedule
from .schedules import schedule as scheduled
from .stored import fill, opened

if TYPE_CHECKING:  # imported only for training: it takes a second, because it imports torchmetrics
    from lightning_fabric import Fabric

LAST = ("drop", "train", "carry")
AGREED = 20  # steps between two averages of what several devices do not share

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], "Tensor | Mapping[str, Tensor]"]
History = list[dict[str, float]]


@typed
def outputs_of(
    model: nn.Module, data: Sized, *, batch: Count = 256, hardware: Hardware = Hardware(), folder: Path | None = None
) -> Tensor:
    """The outputs of `model`, in eval mode, for the first entry of every item, stacked, on the CPU as float32.

    Afterwards the model is on its former device.

    Args:
        folder: where the outputs are stored as they come, see `stored.fill`; a killed prediction resumes there. They
            are read from the disk when they are indexed. Its name must identify model, data and precision.
    """

    def outputs(done: int) -> Iterator[tuple[Tensor]]:
        with evaluating(hardware, model) as device:
            if type(data) is TensorDataset:
                stream = iter(data.tensors[0][done:].split(batch))  # type: ignore[attr-defined]
            else:
                collate = getattr(data, "collate", None)
                stream = (items[0] for items in loader(data, batch, hardware, device, done, collate))
            for images in stream:
                # inference mode here: a model moved within it, or its outputs, could not be trained any more
                with torch.inference_mode():
                    output = model(images.to(device, non_blocking=True))
                # of another number of rows it is an error, not broadcast
                yield (output.cpu().float().view(len(images), *output.shape[1:]),)

    if folder:
        fill(folder, len(data), outputs)
        return torch.from_numpy(opened(folder, 1)[0])
    found, start = torch.empty(0), 0
    for (output,) in outputs(0):
        if not start:  # as large as the result: batches that are joined at the end take twice its memory
            found = torch.empty(len(data), *output.shape[1:])
        found[start : start + len(output)].view(output.shape).copy_(output)  # of another shape it is an error too
        start += len(output)
    return found


@typed
def same_shapes(images: Sequence[Tensor], most: Count) -> list[list[int]]:
    """Indices of images by shape, in groups of at most `most` that can be stacked."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


class Plan(NamedTuple):
    """What is known of a training before its first step.

    Attributes:
        rates: (groups, steps) learning rates of the parameter groups.
        settings: identity of the training.
        saved: the checkpoint to resume.
    """

    steps: int
    per_epoch: int
    optimizer: torch.optim.Optimizer
    rates: np.ndarray
    settings: dict[str, Any]
    saved: dict[str, Any] | None


def plan(
    model: nn.Module,
    data: Sized,
    *,
    epochs: float,
    batch: int,
    optimizer: MakeOptimizer,
    schedule: Schedule | Mapping[str, Schedule] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    seed: int = 0,
    hardware: Hardware = Hardware(),
    last: str = "drop",
    name: str = "",
) -> Plan:
    """The `Plan` of `fit` with the same arguments, and its errors: the checkpoint is read, nothing is computed."""
    _check_batches(len(data), batch, last, hardware)
    per_epoch = -(-len(data) // batch) if last == "train" else len(data) // batch
    steps = max(1, round(epochs * per_epoch))
    if any(p.is_meta for p in model.parameters()):
        raise BadParameter("model", type(model).__name__, "one with weights, none on the device 'meta'")
    optim = optimizer(model)
    if isinstance(optim, torch.optim.LBFGS):
        raise BadParameter("optimizer", "LBFGS", "one that needs no closure, such as `adamw` and `sgd` make")
    given = {p for group in getattr(optim, "param_groups", ()) for p in group["params"]}
    if given - {*model.parameters()} or not any(p.requires_grad and not p.is_inference() for p in given):
        accepted = "one of the model's own parameters, of which some require a gradient"
        raise BadParameter("optimizer", type(optim).__name__, accepted)
    rates = _learning_rates(optim, scheduled() if schedule is None else schedule, steps, per_epoch)
    settings: dict[str, Any] = {"steps": steps, "batch": batch, "images": len(data), "seed": seed, "last": last}
    settings |= {"accumulate": hardware.accumulate, "precision": hardware.precision} | _settings(optim, rates)
    settings["callbacks"] = [_callback_settings(callback, steps) for callback in callbacks]
    saved = checkpoint.read(model, settings) if checkpoint else None
    return Plan(steps, per_epoch, optim, rates, settings, saved)


@typed
@torch.inference_mode(False)  # whatever the modes of the caller are
@torch.enable_grad()
def fit(
    model: nn.Module,
    loss: Loss,
    data: Sized,
    *,
    epochs: Positive,
    batch: Count,
    optimizer: MakeOptimizer,
    schedule: Schedule | Mapping[str, Schedule] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    seed: Whole = 0,
    hardware: Hardware = Hardware(),
    last: str = "drop",
    name: str = "training",
) -> History:
    """Train the parameters of `model` that require a gradient, in place; return the history.

    Afterwards, also after an error, the model is in eval mode on its former device. `no_grad`, `inference_mode` and
    `autocast` around the call have no effect on it.

    Args:
        loss: from the model and a batch (the stacked tuples of `data`) to a scalar, or to named scalars, of which
            "loss" is minimised and the others are recorded. With a `checkpoint` each step has the same names.
        data: map-style; a `TensorDataset` itself, none of a subclass, is read without a loader. Its `collate`, if it
            has one, makes a batch from a list of items.
        epochs: passes over the data, more than 0; may be a fraction.
        batch: images per step, over all devices.
        optimizer: from the model to its optimiser, see `schedules.adamw` and `schedules.sgd`.
        schedule: learning rates, see `schedules`; a mapping by the `name` of the parameter groups if they differ. None:
            a cosine after a warm-up of a tenth of the steps.
        callbacks: called in this order, see `callbacks`.
        last: handling of an epoch's last images, too few for a batch: "drop": left out; "train": a smaller batch;
            "carry": their gradients are added to those of the next epoch's first batch, and the sum is divided by
            `batch` (what a loop that accumulates gradients over images does unless it clears them).
        checkpoint: saves the training, and resumes it if the file exists. Several devices save by the clock where an
            epoch ends, or at a multiple of the checkpoint's steps or of `AGREED`.
        seed: of the order of the items, their augmentation and the random numbers of a step.
        hardware: accelerator, devices and precision.
        name: of the training, shown with its progress.

    Returns:
        One row per step: {"step", "lr" of the first parameter group, "loss", and the other scalars of `loss`}.

    Raises:
        BadParameter: a value outside its range, or a checkpoint written with other settings.
        CompanionError: the training diverged: at its first step, the end of an epoch or a checkpoint the losses and
            parameters were not finite. The checkpoint before remains.
        CorruptFile: the checkpoint cannot be read.
    """
    options: dict[str, Any] = {"epochs": epochs, "batch": batch, "last": last, "seed": seed, "hardware": hardware}
    options |= {"optimizer": optimizer, "schedule": schedule, "callbacks": callbacks, "checkpoint": checkpoint}
    steps, per_epoch, optim, rates, settings, saved = plan(model, data, **options)
    given = [p for group in optim.param_groups for p in group["params"]]
    for callback in callbacks:
        callback.begin()

    def train(fabric: Fabric) -> History:
        rank, ranks, pin = fabric.global_rank, fabric.world_size, fabric.device.type == "cuda"
        loop = Loop(model, optim, fabric, steps, per_epoch, hardware.precision)
        wrapped, wrapped_optim = _set_up(loop, hardware)
        if saved:
            _restore(loop, callbacks, saved)
        start, most, losses = loop.step, hardware.accumulate, torch.zeros((), device=fabric.device)
        batches = _batches(data, batch, most, seed, start, steps, rank, ranks, hardware.workers, pin, last)
        remaining = range(start, start if loop.ended else steps)
        for step in progress(remaining, name, steps, start) if rank == 0 else remaining:
            torch.manual_seed(_mix(seed, step, rank))
            lrs = rates[:, step].tolist()
            for group, lr in zip(optim.param_groups, lrs, strict=True):
                group["lr"] = lr
            images = max(_images(step, len(data), batch, per_epoch, last), ranks)
            whole = batch if last == "carry" else images  # divisor of the sum over images
            terms = _backward(fabric, wrapped, loss, batches, min(most, images // ranks), images, whole)
            if hardware.precision != "16-mixed":  # there a step that overflows is skipped by the gradient scaler
                losses += terms["loss"]
            if step == start:
                _check_finite(losses)
            if callbacks:
                fabric.strategy.precision.unscale_gradients(optim)
                for callback in callbacks:
                    callback.on_gradients(loop)
            wrapped_optim.step()
            optim.zero_grad(set_to_none=True)
            # losses stay tensors: a number would wait for the GPU at each step
            loop.history.append({"step": step, "lr": lrs[0]} | terms)
            loop.step += 1
            for callback in callbacks:
                callback.on_step_end(loop)
            # the devices' clocks differ: several agree on steps, when what they do not share is averaged; the first one
            # alone then decides by its clock whether to write
            agreed = ranks == 1 or loop.epoch_ended or loop.step % AGREED == 0
            agreed |= checkpoint is not None and loop.step % checkpoint.every == 0
            if ranks > 1 and agreed:
                for buffer in filter(torch.is_floating_point, model.buffers()):  # running statistics differ
                    average_over_devices(buffer)
            if loop.epoch_ended:  # not at each step, because it waits for a GPU
                _check_finite(losses, *given)
                for callback in callbacks:
                    callback.on_epoch_end(loop)
            if checkpoint and rank == 0 and (loop.ended or (agreed and checkpoint.due(loop.step))):
                _check_finite(losses, *given)
                checkpoint.append(loop.history)
                checkpoint.write(_state(loop, callbacks, settings))
            if loop.ended:
                break
        for callback in callbacks:
            callback.on_fit_end(loop)
        return plain(loop.history)

    fabric = launcher(hardware, hardware.devices)
    # for the CPU alone: reading the GPUs' state would initialise CUDA, and then no process could be forked
    with on_device(fabric, hardware, model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # batches are distributed to the devices here, and the caller chooses the loader's workers
        warnings.filterwarnings("ignore", module="lightning_fabric")
        try:
            return fabric.launch(train) if hardware.devices == 1 else _fork(fabric, train, model, callbacks)
        finally:
            model.eval()


def _check_batches(images: int, batch: int, last: str, hardware: Hardware) -> None:
    """Raise `BadParameter` unless `fit` can train on a data set of `images` with these arguments."""
    devices, accumulate = hardware.devices, hardware.accumulate
    check_choice("last", last, LAST)
    if not images or (batch > images and last != "train"):
        raise BadParameter("batch", batch, f"1 to {images}, the images there are")
    if batch % devices:
        raise BadParameter("batch", batch, f"a multiple of devices = {devices}, 1 or more")
    if accumulate > batch // devices:
        raise BadParameter("accumulate", accumulate, f"1 to {batch // devices}, a device's images of a step")
    if devices > 1 and "fork" not in multiprocessing.get_all_start_methods():
        accepted = "1: processes for several devices are forked, which Windows cannot do, and WSL can"
        raise BadParameter("devices", devices, accepted)
    if devices > 1 and hardware.accelerator != "cpu" and torch.cuda.is_initialized():
        accepted = "1: this process has used a GPU already, and cannot be forked; more in a new process or kernel"
        raise BadParameter("devices", devices, accepted)


def _learning_rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule | Mapping[str, Schedule], steps: int, per_epoch: int
) -> np.ndarray:
    """The learning rate of each step, for each parameter group, (groups, steps)."""
    found = []
    for group in optimizer.param_groups:
        name = group.get("name")
        if isinstance(schedule, Mapping):
            check_choice("parameter group of the schedule", name, schedule)
        of = schedule[name] if isinstance(schedule, Mapping) else schedule
        check_range("weight_decay", group.get("weight_decay", 0), 0)
        rates = np.asarray(of(group["lr"], steps, per_epoch), float)
        if rates.shape != (steps,) or not np.isfinite(rates).all() or rates.min() < 0:
            where = f"{rates.size} learning rates of parameter group {name!r}"
            raise BadParameter("schedule", where, f"{steps}, one for each step, finite and 0 or more")
        found.append(rates)
    return np.stack(found)


def _settings(optimizer: torch.optim.Optimizer, rates: np.ndarray) -> dict[str, Any]:
    """The identity of an optimiser: its class, and the options, learning rates and shapes of each group."""
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for i, (group, lrs) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        options = {**group, "lr": lrs.max(), "schedule": zlib.crc32(lrs.tobytes())}
        options["shapes"] = [p.shape for p in options.pop("params")]
        found |= {key if i == 0 else f"{key} of group {i}": as_json(value) for key, value in options.items()}
    return found


def _callback_settings(callback: Callback, steps: int) -> dict[str, Any]:
    """The identity of a callback: its class and settings; nothing if it has neither settings nor a state."""
    settings = as_json(callback.settings(steps))
    if settings or type(callback).state_dict is not Callback.state_dict:
        return {type(callback).__name__: settings}
    return {}


def _set_up(loop: Loop, hardware: Hardware) -> tuple[Any, Any]:
    """The model on its device, in training mode, and the optimiser, both as wrapped by Fabric."""
    if hardware.grad_checkpointing and not _checkpoint_activations(loop.model):
        name = type(loop.model).__name__
        raise BadParameter("grad_checkpointing", True, f"False: {name} has no part that can do it")
    model = torch.compile(loop.model) if hardware.compile else loop.model
    wrapped, optimizer = loop.fabric.setup(model, loop.optimizer)
    for group in loop.optimizer.param_groups:
        if loop.fabric.device.type == "cuda" and "fused" in group:  # one kernel for all tensors
            group |= {"fused": True, "foreach": False}
    return wrapped.train(), optimizer


def _checkpoint_activations(model: nn.Module) -> bool:
    """Enable gradient checkpointing in the outermost trainable modules that support it, by timm's method name; whether
    there is one."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        return True
    parts = [part for part in model.children() if any(p.requires_grad for p in part.parameters())]
    return any([_checkpoint_activations(part) for part in parts])


def _state(loop: Loop, callbacks: Sequence[Callback], settings: dict[str, Any]) -> dict[str, Any]:
    """The state of a training for its checkpoint, without the history."""
    return {
        "settings": settings,
        "step": loop.step,
        "stopped": loop.stopped,
        "model": trained_state(loop.model),
        "optimizer": loop.optimizer.state_dict(),
        "scaler": loop.fabric.strategy.precision.state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
    }


def _restore(loop: Loop, callbacks: Sequence[Callback], saved: dict[str, Any]) -> None:
    """Restore a `_state` and its history, after `_set_up`, so that the moments are on the parameters' device."""
    loop.step, loop.stopped, loop.history = saved["step"], saved["stopped"], saved["history"]
    loop.model.load_state_dict(saved["model"], strict=False)
    for group, own in zip(saved["optimizer"]["param_groups"], loop.optimizer.param_groups, strict=True):
        group |= {kind: own[kind] for kind in ("fused", "foreach") if kind in own}
    loop.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:
        loop.fabric.strategy.precision.load_state_dict(saved["scaler"])
    for callback, state in zip(callbacks, saved["callbacks"], strict=True):
        callback.load_state_dict(state)


def _backward(
    fabric: Fabric, wrapped: nn.Module, loss: Loss, batches: Iterator[Batch], parts: int, images: int, whole: int
) -> dict[str, Tensor]:
    """Add the gradients of a step's next `parts` micro-batches; return the scalars of the loss, over all devices.

    A micro-batch counts by its share: of `whole` images in "loss", of the step's `images` in the mean of the others.
    """
    total: dict[str, Tensor] = {}
    for i in range(parts):
        part = next(batches)
        if not isinstance(part, tuple | list):
            raise BadParameter("what `collate` makes", type(part).__name__, "a tuple of tensors")
        count = len(part[0]) * fabric.world_size
        with fabric.no_backward_sync(wrapped, enabled=i + 1 < parts):
            found = loss(wrapped, tuple(x.to(fabric.device, non_blocking=True) for x in part))
            named = found if isinstance(found, Mapping) else {"loss": found}
            good = all(isinstance(value, Tensor) and value.ndim == 0 for value in named.values())
            if not good or "loss" not in named or not named["loss"].requires_grad or {"step", "lr"} & named.keys():
                accepted = (
                    'one that returns a scalar with a gradient, or scalar tensors named "loss", not "step", "lr", ...'
                )
                raise BadParameter("loss", named, accepted)
            terms = {term: value * (count / (whole if term == "loss" else images)) for term, value in named.items()}
            fabric.backward(terms["loss"])
        for term, value in terms.items():
            total[term] = total.get(term, 0) + value.detach()
    if fabric.world_size > 1:
        total = dict(zip(total, average_over_devices(torch.stack([*total.values()])), strict=True))
    return total


def _check_finite(*values: Tensor) -> None:
    """Raise `CompanionError` unless all values are finite."""
    if not torch.stack([value.detach().float().sum() for value in values]).isfinite().all():
        raise CompanionError("the training diverged: a loss or parameter is not finite; a lower learning rate may help")


def _images(step: int, images: int, batch: int, per_epoch: int, last: str) -> int:
    """Images of a step, over all devices, for a data set of `images`; `last` as in `fit`."""
    i = step % per_epoch
    if last == "train":
        return min(batch, images - i * batch)
    return batch + images % batch if last == "carry" and step and i == 0 else batch


def _fork(
    fabric: Fabric, train: Callable[[Fabric], History], model: nn.Module, callbacks: Sequence[Callback]
) -> History:
    """Train copies of the model in a forked process per device; the first one's state becomes that of the model."""

    def call(fabric: Fabric) -> None:
        torch.set_num_threads(1)  # forks do not inherit the threads of this process and would wait for them forever
        history = train(fabric)
        if fabric.global_rank == 0:
            torch.save((history, trained_state(model), [callback.state_dict() for callback in callbacks]), result)

    # through a file: a process that returns more than a pipe's capacity never ends
    with tempfile.TemporaryDirectory(prefix="fit-") as folder, from_processes():
        result = Path(folder) / "result.pt"
        with mock.patch.dict(os.environ):  # it sets a port, which the next training must not take over
            fabric.launch(call)
        history, trained, states = torch.load(result, map_location="cpu", weights_only=True)
    model.load_state_dict(trained, strict=False)
    for callback, state in zip(callbacks, states, strict=True):
        callback.load_state_dict(state)
    return history


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that consecutive seeds do not share random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class _Seeded(Dataset):
    """Items whose random augmentation depends on (seed, epoch, index) alone, in any loading process."""

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed, self.collate = data, seed, getattr(data, "collate", None)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        seed = _mix(self.seed, epoch, index)
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - augmentations may draw from it
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # a GPU's belongs to the step
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            item = self.data[index]
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        return item


def _batches(
    data: Dataset,
    batch: int,
    parts: int,
    seed: int,
    start: int,
    stop: int,
    rank: int,
    ranks: int,
    workers: int,
    pin: bool = False,
    last: str = "drop",
) -> Iterator[Batch]:
    """The batches of steps `start` to `stop` for one device, in an order set by the seed and different in each epoch.

    Each is split into `parts`: 8,192 images of 448 pixels at once would be 20 GB, and every worker of a loader
    prefetches two such batches. Indices are generated lazily, for millions of steps. Batches in pinned memory (`pin`)
    are copied to a GPU while it computes.
    """
    full, left = divmod(len(data), batch)
    per_epoch = full + (last == "train" and left > 0)

    @functools.lru_cache(2)  # of an epoch and of the one before
    def order(epoch: int) -> np.ndarray:
        """The (epoch, image) pairs of an epoch."""
        images = np.random.default_rng((seed, epoch)).permutation(len(data))
        return np.stack([np.full_like(images, epoch), images], 1)

    def indices() -> Iterator[list[list[int]]]:
        for step in range(start, stop):
            epoch, i = divmod(step, per_epoch)
            chosen = order(epoch)[i * batch : (i + 1) * batch]
            if last == "carry" and epoch and i == 0:
                chosen = np.concatenate([order(epoch - 1)[full * batch :], chosen])
            if len(chosen) < ranks:  # each device needs an image, so it is repeated
                chosen = np.resize(chosen, (ranks, 2))
            # consecutive images, as in a part: two devices process what one device does in two parts
            share = np.array_split(chosen, ranks)[rank]
            for part in np.array_split(share, min(parts, len(chosen) // ranks)):
                yield part.tolist()

    if type(data) is TensorDataset:
        for keys in indices():
            chosen = torch.tensor(keys)[:, 1]
            yield tuple(t[chosen].pin_memory() if pin else t[chosen] for t in data.tensors)
    else:
        # a generator of its own: loading draws nothing from the random numbers of a step
        options = {"num_workers": workers, "pin_memory": pin, "generator": torch.Generator()}
        items = _Seeded(data, seed)
        with from_processes():
            collate = items.collate or _stacked
            yield from DataLoader(items, batch_sampler=indices(), collate_fn=collate, **options)


def _stacked(items: list) -> Batch:
    """Items, tuples of tensors, arrays or numbers, as one batch."""
    kinds = Tensor | np.ndarray | np.number | int | float
    if not isinstance(items[0], tuple | list) or not all(isinstance(value, kinds) for value in items[0]):
        found = [type(value).__name__ for value in items[0]] if isinstance(items[0], tuple | list) else items[0]
        raise BadParameter("items of the data", found, "tuples of tensors and numbers, or data with its own `collate`")
    return tuple(default_collate(items))
