"""One training loop for all papers, on Lightning Fabric: CPU or GPU, any precision, one device or several.

    fit(model, loss, data, epochs=100, batch=40, optimizer=adamw(1e-3), schedule=schedule("cosine"),
        callbacks=[ClipNorm(1.0)], checkpoint=Checkpoint("run.pt"))

The random numbers of a step depend only on the seed and the step, those of an item's augmentation only on the seed, the
epoch and the item. On the CPU of one machine a killed and resumed run is therefore bit-identical to an uninterrupted
one; on a GPU cuDNN selects its algorithms again, and the last bits may differ.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException, start_processes
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..errors import BadParameter, CompanionError, check_choice
from ..ops.papers import paper
from ..ops.progress import progress
from .callbacks import Callback
from .checkpoints import Checkpoint, plain, trained_state
from .schedules import MakeOptimizer, Schedule
from .schedules import schedule as scheduled

# PyTorch then detects GPUs without initialising CUDA, after which processes could not be forked for several devices
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

if TYPE_CHECKING:  # imported only for training: it takes a second, because it imports torchmetrics
    from lightning_fabric import Fabric

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
LAST = ("drop", "train", "carry")

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], "Tensor | Mapping[str, Tensor]"]
History = list[dict[str, float]]


@dataclass(frozen=True)
class Hardware:
    """Device, precision and parallelism of a training or a prediction.

    Attributes:
        accelerator, devices, precision: as in `lightning_fabric.Fabric`, but "auto" is a CUDA GPU or else the CPU:
            "mps" is not tested. Several devices take equal shares of a batch, and their gradients are averaged (DDP): a
            loss that is not a mean over images, and a batch norm, are computed per device. Running statistics are
            averaged too.
        workers: number of data loading processes.
        accumulate: number of micro-batches per batch and device, whose gradients are summed; a loss that is a mean over
            images is unchanged, with less memory.
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: run the forward pass of a training through `torch.compile`, which takes a minute or more at first.
    """

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    workers: int = 0
    accumulate: int = 1
    grad_checkpointing: bool = False
    compile: bool = False

    @classmethod
    def of(cls, p: SimpleNamespace, slug: str, *, workers: int = 0, accumulate: int = 1) -> Hardware:
        """The `Hardware` of a notebook's parameters, for every training and evaluation of its paper.

        The precision "paper" is resolved: to the authors', `precision` of models/<slug>/paper.yaml, in the `paper`
        profile on a CUDA GPU, else to "32-true". A dry run has no `workers`.

        Args:
            p: the checked parameters; `profile`, `dry_run`, `accelerator`, `devices` and `precision` are read, and
                `accumulate` (0: the recipe's), `grad_checkpointing` and `compile` if the notebook has them.
        """
        precision = p.precision
        if precision == "paper":
            on_gpu = p.profile == "paper" and device(p.accelerator) == "cuda"
            precision = paper(slug)["precision"] if on_gpu else "32-true"
        accumulate = getattr(p, "accumulate", 0) or accumulate
        extra = [getattr(p, name, False) for name in ("grad_checkpointing", "compile")]
        return cls(p.accelerator, p.devices, precision, 0 if p.dry_run else workers, accumulate, *extra)


def device(accelerator: str) -> str:
    """The device of a model outside of `fit`: "cuda" if there is such a GPU and `accelerator` is "auto" or "cuda"."""
    return "cuda" if accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


AUTO, CPU = Hardware(), Hardware("cpu")


@dataclass
class Loop:
    """The state of a training, passed to callbacks.

    Attributes:
        model: on its device, without Fabric's wrapper.
        step: finished optimiser steps; `steps` of the whole training, `per_epoch` of an epoch.
        precision: of `Hardware`.
        stopped: set to True to end the training after this step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    fabric: Fabric
    steps: int
    per_epoch: int
    precision: str
    step: int = 0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.per_epoch


def launcher(hardware: Hardware, devices: int = 1, **settings: Any) -> Fabric:
    """The `Fabric` of `hardware`, for one device unless more are requested.

    Raises `BadParameter`: a GPU that is not there, or a precision that Fabric would replace on the CPU.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators import MPSAccelerator

    chosen = device("auto") if hardware.accelerator == "auto" else hardware.accelerator
    there = {"cuda": torch.cuda.is_available, "mps": MPSAccelerator.is_available}.get(chosen)
    if there is not None and not there():
        raise BadParameter("accelerator", chosen, "auto or cpu: there is no such GPU here")
    if chosen == "cuda" and devices > (known := torch.cuda.device_count()):
        raise BadParameter("devices", devices, f"1 to {known}, the GPUs there are")
    if chosen == "cpu" and hardware.precision == "16-mixed":
        raise BadParameter("precision", "16-mixed", "32-true or bf16-mixed: on the CPU there is no float16 training")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")
        fabric = Fabric(accelerator=chosen, devices=devices, precision=hardware.precision, **settings)
    # inputs stay float32, as under plain `torch.autocast`: boxes and positions would lose precision
    fabric.strategy.precision.convert_input = lambda data: data
    return fabric


def average_over_devices(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all training devices, in place; with one device the tensor itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)  # summed and divided, because gloo has no mean
        tensor /= torch.distributed.get_world_size()
    return tensor


@contextlib.contextmanager
def _forked() -> Iterator[None]:
    """Context manager: an error of ours in a process forked in the block is raised as a `CompanionError`."""
    try:
        yield
    except ProcessRaisedException as error:  # its text ends with the traceback of the process
        _, ours, told = str(error).rpartition("\ncompanion.errors.")
        if not ours:
            raise
        raise CompanionError(told.partition(": ")[2].strip()) from error


def apart(function: Callable[[], object]) -> None:
    """Call a function in a separate process, so that its use of a GPU does not prevent `fit` from forking this one.

    Raises `CompanionError`: the function raised one.
    """

    def call(rank: int) -> None:
        torch.set_num_threads(1)  # see `fit`
        function()

    with _forked():
        start_processes(call, nprocs=1, start_method="fork")


@contextlib.contextmanager
def on_device(fabric: Fabric, *models: nn.Module) -> Iterator[None]:
    """Context manager: moves models to a device; afterwards, also after an error, they are back on their former
    devices.

    On a GPU, matrix products inside the block may use TF32, and cuDNN selects its convolutions by benchmarking.
    """
    homes = [next(itertools.chain(m.parameters(), m.buffers()), torch.empty(0)).device for m in models]
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        for model, home in zip(models, homes, strict=True):
            model.to(home)


@contextlib.contextmanager
def evaluating(hardware: Hardware, *models: nn.Module) -> Iterator[torch.device]:
    """Context manager: models in eval mode on the device of `hardware`, at its precision; yields the device.

    They stay in eval mode and return to their former devices.
    """
    fabric = launcher(hardware)
    with on_device(fabric, *models):
        for model in models:
            model.eval().to(fabric.device)
        with fabric.autocast():
            yield fabric.device


def fit(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
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
    find_unused_parameters: bool = False,
    name: str = "training",
) -> History:
    """Train the parameters of `model` that require a gradient, in place; return the history.

    Afterwards the model is in eval mode on its former device.

    Args:
        loss: from the model and a batch (the stacked tuples of `data`) to a scalar, or to named scalars, of which
            "loss" is minimised and the others are recorded. With a `checkpoint` each step has the same names.
        data: map-style; a `TensorDataset` is indexed directly, without a loader.
        epochs: passes over the data, more than 0; may be a fraction.
        batch: images per step, over all devices.
        optimizer: from the model to its optimiser, see `schedules.adamw` and `schedules.sgd`.
        schedule: learning rates, see `schedules`; a mapping by the `name` of the parameter groups if they differ. None:
            a cosine after a warm-up of a tenth of the steps.
        callbacks: called in this order, see `callbacks`.
        last: handling of an epoch's last images, too few for a batch: "drop": left out; "train": a smaller batch;
            "carry": their gradients are added to those of the next epoch's first batch, and the sum is divided by
            `batch` (what a loop that accumulates gradients over images does unless it clears them).
        checkpoint: saves the training, and resumes it if the file exists.
        seed: of the order of the items, their augmentation and the random numbers of a step.
        hardware: accelerator, devices and precision.
        name: of the training, shown with its progress.
        find_unused_parameters: as DDP's: whether the loss may leave trainable parameters without a gradient. With
            several devices, each step then searches the graph for them.

    Returns:
        One row per step: {"step", "lr" of the first parameter group, "loss", and the other scalars of `loss`}.

    Raises:
        BadParameter: a value outside its range, or a checkpoint written with other settings.
        CorruptFile: the checkpoint cannot be read.
    """
    devices, accumulate, precision = hardware.devices, hardware.accumulate, hardware.precision
    check_choice("last", last, LAST)
    if not epochs > 0:  # NaN too
        raise BadParameter("epochs", epochs, "more than 0")
    if not len(data):
        raise BadParameter("data", "an empty data set", "one with images")
    if batch < 1 or (batch > len(data) and last != "train"):
        raise BadParameter("batch", batch, f"1 to {len(data)}, the images there are")
    if devices < 1:
        raise BadParameter("devices", devices, "1 or more")
    if batch % devices:
        raise BadParameter("batch", batch, f"a multiple of devices = {devices}")
    if not 1 <= accumulate <= batch // devices:
        raise BadParameter("accumulate", accumulate, f"1 to {batch // devices}, a device's images of a step")
    check_choice("precision", precision, PRECISIONS)
    if devices > 1 and "fork" not in multiprocessing.get_all_start_methods():
        accepted = "1: processes for several devices are forked, which Windows cannot do, and WSL can"
        raise BadParameter("devices", devices, accepted)
    if devices > 1 and hardware.accelerator != "cpu" and torch.cuda.is_initialized():
        accepted = "1: this process has used a GPU already, and cannot be forked; more in a new process or kernel"
        raise BadParameter("devices", devices, accepted)
    per_epoch = -(-len(data) // batch) if last == "train" else len(data) // batch
    steps = max(1, round(epochs * per_epoch))
    optim = optimizer(model)
    rates = _learning_rates(optim, schedule or scheduled(), steps, per_epoch)
    settings: dict[str, Any] = {"steps": steps, "batch": batch, "images": len(data), "seed": seed}
    settings |= {"accumulate": accumulate, "precision": precision} | _settings(optim, rates)
    # by the class that defines their state: those without a state replace each other
    settings["callbacks"] = [type(callback).state_dict.__qualname__.split(".")[-2] for callback in callbacks]
    if last != "drop":
        settings["last"] = last
    saved = checkpoint.read(model, settings) if checkpoint else None

    strategy: Any = "auto"
    if devices > 1:
        from lightning_fabric.strategies import DDPStrategy

        # processes are forked, so that what a notebook defines can be trained on several devices
        # buffers are averaged below, not replaced by those of the first process
        options = {"start_method": "fork", "find_unused_parameters": find_unused_parameters, "broadcast_buffers": False}
        strategy = DDPStrategy(**options)
    fabric = launcher(hardware, devices, strategy=strategy)

    def train(fabric: Fabric) -> dict | None:
        if fabric.world_size > 1:
            # forks do not inherit the threads of this process and would wait for them forever
            torch.set_num_threads(1)
        if saved:
            model.load_state_dict(saved["model"], strict=False)
        if hardware.grad_checkpointing:
            _checkpoint_activations(model)
        wrapped, wrapped_optim = fabric.setup(torch.compile(model) if hardware.compile else model, optim)
        loop = Loop(model, optim, fabric, steps, per_epoch, precision)
        for group in optim.param_groups:
            if fabric.device.type == "cuda" and "fused" in group:  # one kernel for all tensors
                group |= {"fused": True, "foreach": False}
        if saved:  # after setup, so that the moments are on the parameters' device
            for group, own in zip(saved["optimizer"]["param_groups"], optim.param_groups, strict=True):
                group |= {kind: own[kind] for kind in ("fused", "foreach") if kind in own}
            optim.load_state_dict(saved["optimizer"])
            if saved["scaler"]:
                fabric.strategy.precision.load_state_dict(saved["scaler"])
            for callback, state in zip(callbacks, saved["callbacks"], strict=True):
                callback.load_state_dict(state)
            loop.history, loop.step, loop.stopped = saved["history"], saved["step"], saved["stopped"]
        wrapped.train()
        rank, ranks, start = fabric.global_rank, fabric.world_size, loop.step
        pin = fabric.device.type == "cuda"
        stream = _batches(data, batch, accumulate, seed, start, steps, rank, ranks, hardware.workers, pin, last)
        remaining = range(start, start if loop.stopped else steps)
        for step in progress(remaining, name, steps, start) if rank == 0 else remaining:
            part = next(stream)
            torch.manual_seed(_mix(seed, step, rank))
            for group, lrs in zip(optim.param_groups, rates, strict=True):
                group["lr"] = float(lrs[step])
            row: dict[str, Any] = {"step": step, "lr": float(rates[0][step])}
            images = max(_size(len(data), batch, step, last), ranks)
            parts = min(accumulate, images // ranks)
            whole = batch if last == "carry" else images  # divisor of the sum over images
            for i in range(parts):
                part = next(stream) if i else part
                share = len(part[0]) * ranks / whole
                with fabric.no_backward_sync(wrapped, enabled=i + 1 < parts):
                    found = loss(wrapped, tuple(x.to(fabric.device, non_blocking=True) for x in part))
                    terms = found if isinstance(found, Mapping) else {"loss": found}
                    value = terms["loss"] * share
                    fabric.backward(value)
                for term, number in terms.items():
                    row[term] = row.get(term, 0) + (value if term == "loss" else number * share).detach()
            if callbacks:
                fabric.strategy.precision.unscale_gradients(optim)
                for callback in callbacks:
                    callback.on_gradients(loop)
            wrapped_optim.step()
            optim.zero_grad(set_to_none=True)
            if ranks > 1:
                named = {name: value for name, value in row.items() if isinstance(value, Tensor)}
                row |= zip(named, average_over_devices(torch.stack([*named.values()])), strict=True)
            if checkpoint and loop.history and row.keys() != loop.history[0].keys():
                first, now = (", ".join(list(columns)[2:]) for columns in (loop.history[0], row))
                raise BadParameter("scalars of the loss", now, f"those of the first step, {first}, with a checkpoint")
            loop.history.append(row)  # losses stay tensors, to avoid synchronising with a GPU at each step
            loop.step += 1
            for callback in callbacks:
                callback.on_step_end(loop)
            saves = checkpoint is not None and loop.step % checkpoint.every == 0
            if ranks > 1 and (saves or loop.stopped or loop.step % per_epoch == 0 or loop.step == steps):
                for buffer in model.buffers():  # running statistics differ between devices
                    if buffer.is_floating_point():
                        average_over_devices(buffer)
            if loop.step % per_epoch == 0 or loop.step == steps or loop.stopped:
                for callback in callbacks:
                    callback.on_epoch_end(loop)
            ended = loop.stopped or loop.step == steps
            if checkpoint and rank == 0 and (ended or saves):
                checkpoint.write(loop, settings, callbacks)
            if ended:
                break
        for callback in callbacks:
            callback.on_fit_end(loop)
        done = {"model": trained_state(model), "history": plain(loop.history)}
        if ranks == 1:
            return done
        # through a file: a process that returns more than a pipe's capacity never ends
        if rank == 0:
            torch.save(done | {"callbacks": [callback.state_dict() for callback in callbacks]}, result)
        return None

    with tempfile.TemporaryDirectory(prefix="fit-") as folder:
        result = Path(folder) / "result.pt"
        # for the CPU alone: reading the GPUs' state would initialise CUDA, and then no process could be forked
        with _forked(), on_device(fabric, model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # batches are distributed to the devices here, and the caller chooses the loader's workers
            warnings.filterwarnings("ignore", module="lightning_fabric")
            found = fabric.launch(train)
        if found is None:  # with several devices, separate processes trained copies
            found = torch.load(result, map_location="cpu", weights_only=True)
            for callback, state in zip(callbacks, found["callbacks"], strict=True):
                callback.load_state_dict(state)
    model.load_state_dict(found["model"], strict=False)
    model.eval()
    return found["history"]


def predict(model: nn.Module, data: Dataset, *, batch: int = 256, hardware: Hardware = Hardware()) -> Tensor:
    """The outputs of `model`, in eval mode, for the first entry of every item, stacked, on the CPU as float32.

    For a model with several outputs (a tuple), the first. Afterwards the model is on its former device.
    """
    outputs = []
    # inference mode inside: a model moved within it could not be trained any more
    with evaluating(hardware, model) as device, torch.inference_mode():
        if isinstance(data, TensorDataset):
            stream = data.tensors[0].split(batch)
        else:
            loader = DataLoader(data, batch, num_workers=hardware.workers, pin_memory=device.type == "cuda")
            stream = (items[0] for items in loader)
        for images in stream:
            output = model(images.to(device, non_blocking=True))
            outputs.append((output[0] if isinstance(output, tuple) else output).float().cpu())
    return torch.cat(outputs)


def _checkpoint_activations(model: nn.Module, within: str = "") -> bool:
    """Enable gradient checkpointing in the outermost trainable modules that support it, by timm's method name."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        return True
    parts = [part for part in model.children() if any(p.requires_grad for p in part.parameters())]
    found = any([_checkpoint_activations(part, within or type(model).__name__) for part in parts])
    if not found and not within:
        raise BadParameter("grad_checkpointing", True, f"False: {type(model).__name__} has no part that can do it")
    return found


def same_shapes(images: Sequence[Tensor], most: int) -> list[list[int]]:
    """Indices of images by shape, in groups of at most `most` that can be stacked."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def _learning_rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule | Mapping[str, Schedule], steps: int, per_epoch: int
) -> list[np.ndarray]:
    """The learning rate of each step, for each parameter group."""
    found = []
    for group in optimizer.param_groups:
        of = schedule[group["name"]] if isinstance(schedule, Mapping) else schedule
        rates = of(group["lr"], steps, per_epoch)
        if len(rates) != steps:
            where = f"{len(rates)} learning rates of parameter group {group.get('name', 0)!r}"
            raise BadParameter("schedule", where, f"{steps}, one for each step")
        found.append(rates)
    return found


def _settings(optimizer: torch.optim.Optimizer, rates: Sequence[np.ndarray]) -> dict[str, Any]:
    """The identity of an optimiser: its class, and the options, learning rates and shapes of each group."""
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for i, (group, lrs) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        options = {key: value for key, value in group.items() if key != "params"}
        options |= {"lr": float(max(lrs)), "schedule": zlib.crc32(np.asarray(lrs, float).tobytes())}
        options["shapes"] = [list(p.shape) for p in group["params"]]
        for key, value in options.items():
            value = (
                value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value
            )
            found[key if i == 0 else f"{key} of group {i}"] = value
    return found


def _size(images: int, batch: int, step: int, last: str) -> int:
    """Images per step, over all devices, for a data set of `images`; `last` as in `fit`."""
    full, left = divmod(images, batch)
    if last == "train":
        return batch if step % -(-images // batch) < full else left
    return batch + left if last == "carry" and step and step % full == 0 else batch


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that consecutive seeds do not share random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class _Seeded(Dataset):
    """Items whose random augmentation depends on (seed, epoch, index) alone, in any loading process."""

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        seed = _mix(self.seed, epoch, index)
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - augmentations may draw from it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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

    def order(epoch: int) -> np.ndarray:
        """The (epoch, image) pairs of an epoch."""
        images = np.random.default_rng((seed, epoch)).permutation(len(data))
        return np.stack([np.full_like(images, epoch), images], 1)

    def indices() -> Iterator[list[tuple[int, int]]]:
        pairs, current = np.empty((0, 2), int), -1
        for step in range(start, stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != current:
                pairs, current = order(epoch), epoch
            chosen = pairs[i * batch : (i + 1) * batch]
            if last == "carry" and epoch and i == 0:
                chosen = np.concatenate([order(epoch - 1)[full * batch :], chosen])
            if len(chosen) < ranks:  # each device needs an image, so it is repeated
                chosen = np.resize(chosen, (ranks, 2))
            # consecutive images, as in a part: two devices process what one device does in two parts
            share = np.array_split(chosen, ranks)[rank]
            for part in np.array_split(share, min(parts, len(chosen) // ranks)):
                yield [(int(of), int(k)) for of, k in part]

    if isinstance(data, TensorDataset):
        for keys in indices():
            chosen = torch.tensor([k for _, k in keys])
            yield tuple(t[chosen].pin_memory() if pin else t[chosen] for t in data.tensors)
    else:
        yield from DataLoader(_Seeded(data, seed), batch_sampler=indices(), num_workers=workers, pin_memory=pin)
