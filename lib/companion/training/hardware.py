"""Where a training or a prediction runs: devices, precision, processes; and opening a run without computing."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException, start_processes
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import BadParameter, CompanionError, Count, Whole, check_choice, typed
from ..io.papers import paper

if TYPE_CHECKING:  # imported only for training: it takes a second, because it imports torchmetrics
    from lightning_fabric import Fabric

ACCELERATORS = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "tf32")
WORKERS = min(8, os.cpu_count() or 1)  # processes that load the data of a recipe


class RunParameters(Protocol):
    """The parameters that every notebook has; a recipe's own `Parameters` adds those that it reads."""

    profile: str
    dry_run: bool
    accelerator: str
    devices: int
    precision: str
    seed: int
    data_root: str
    weights: str


@typed
@dataclass(frozen=True)
class Hardware:
    """Device, precision and parallelism of a training or a prediction.

    Attributes:
        accelerator, devices, precision: as in `lightning_fabric.Fabric`, but "auto" is a CUDA GPU or else the CPU:
            "mps" is not tested. Several devices take equal shares of a batch, and their gradients are averaged (DDP): a
            loss that is not a mean over images, and a batch norm, are computed per device. Running statistics are
            averaged too. The precision "tf32" is "32-true" with matrix products in TF32, which no authors' code asks
            for: factors of three digits; by NVIDIA's data sheets faster on A10, A100, L4 and later of that line.
        workers: number of data loading processes.
        accumulate: number of micro-batches per batch and device, whose gradients are summed; a loss that is a mean over
            images is unchanged, with less memory.
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: run the forward pass of a training through `torch.compile`, which takes a minute or more at first.
    """

    accelerator: str = "auto"
    devices: Count = 1
    precision: str = "32-true"
    workers: Whole = 0
    accumulate: Count = 1
    grad_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("accelerator", self.accelerator, ACCELERATORS)
        check_choice("precision", self.precision, PRECISIONS)

    @classmethod
    def of(cls, p: RunParameters, slug: str, *, workers: int = 0, accumulate: int = 1) -> Hardware:
        """The `Hardware` of a notebook's parameters, for every training and evaluation of its paper.

        The precision "paper" is resolved: to the authors', `precision` of models/<slug>/paper.yaml, in the `paper`
        profile on a CUDA GPU, else to "32-true". There are at most as many `workers` as processors, in a dry run none.

        Args:
            p: the checked parameters; `accumulate` (0: the recipe's), `grad_checkpointing` and `compile` are read if
                the notebook has them.
        """
        precision, on_gpu = p.precision, device(p.accelerator) == "cuda"
        if precision == "paper":
            precision = paper(slug)["precision"] if on_gpu and p.profile == "paper" else "32-true"
        accumulate = getattr(p, "accumulate", 0) or accumulate
        extra = [getattr(p, name, False) for name in ("grad_checkpointing", "compile")]
        workers = 0 if p.dry_run else min(workers, os.cpu_count() or 1)
        return cls(p.accelerator, p.devices, precision, workers, accumulate, *extra)


def device(accelerator: str) -> str:
    """The device of a model outside of `fit`: "cuda" if there is such a GPU and `accelerator` is "auto" or "cuda".

    CUDA is not initialised: `fit` could not fork this process for several devices any more.
    """
    check_choice("accelerator", accelerator, ACCELERATORS)
    # read by every `torch.cuda.is_available()`, which otherwise initialises CUDA; lightning_fabric sets it on import
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return "cuda" if accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


AUTO, CPU = Hardware(), Hardware("cpu")


def check_devices(hardware: Hardware, devices: int = 1) -> str:
    """The accelerator of `hardware`. Raises `BadParameter`: a GPU that is not there, or a precision that Fabric would
    replace on the CPU."""
    from lightning_fabric.accelerators import MPSAccelerator

    chosen = device("auto") if hardware.accelerator == "auto" else hardware.accelerator
    there = {"cuda": torch.cuda.is_available, "mps": MPSAccelerator.is_available}.get(chosen)
    if there is not None and not there():
        raise BadParameter("accelerator", chosen, "auto or cpu: there is no such GPU here")
    if chosen == "cuda" and devices > (known := torch.cuda.device_count()):
        raise BadParameter("devices", devices, f"1 to {known}, the GPUs there are")
    if hardware.precision in {"cpu": ("16-mixed", "tf32"), "mps": ("tf32",)}.get(chosen, ()):
        raise BadParameter("precision", hardware.precision, f"32-true or bf16-mixed: this one is not for {chosen}")
    return chosen


def launcher(hardware: Hardware, devices: int = 1) -> Fabric:
    """The `Fabric` of `hardware`, for one device unless more are requested.

    Processes for several devices are forked, so that what a notebook defines can be trained on them.

    Raises `BadParameter` as `check_devices`.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

    chosen = check_devices(hardware, devices)
    # unused: a loss may leave parameters out, as PromptPAR's without regions; `fit` averages the buffers, which DDP
    # would replace by those of the first process
    ddp = {"start_method": "fork", "find_unused_parameters": True, "broadcast_buffers": False}
    strategy: Any = DDPStrategy(**ddp) if devices > 1 else "auto"
    # the processes are forked here, also in a SLURM step, whose own tasks Fabric would look for
    here: Any = [LightningEnvironment()]
    precision = "32-true" if hardware.precision == "tf32" else hardware.precision
    options = {"accelerator": chosen, "devices": devices, "precision": precision}
    fabric = Fabric(**options, strategy=strategy, plugins=here)
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
def from_processes() -> Iterator[None]:
    """Context manager: an error of ours in a process of a device or a loader is raised as a `CompanionError`."""
    try:
        yield
    except (ProcessRaisedException, RuntimeError) as error:  # its text ends with the traceback of the process
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

    with from_processes():
        start_processes(call, nprocs=1, start_method="fork")


@contextlib.contextmanager
def on_device(fabric: Fabric, hardware: Hardware, *models: nn.Module) -> Iterator[None]:
    """Context manager: moves models to a device; afterwards, also after an error, they are back on their former
    devices.

    An `autocast` around the block has no effect within: `hardware` has the precision. On a GPU, matrix products inside
    the block use TF32 if `hardware` asks for it, else float32; convolutions use the default of cuDNN, TF32, as in the
    authors' runs, and are selected by benchmarking.
    """
    homes = [next(itertools.chain(m.parameters(), m.buffers()), torch.empty(0)).device for m in models]
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if hardware.precision == "tf32" else "highest")
        torch.backends.cudnn.benchmark = True
    try:
        # without the cache of weights: it is cleared where the outermost block ends, that is after all steps
        around = torch.autocast(fabric.device.type, enabled=False, cache_enabled=False)
        with around if torch.is_autocast_enabled(fabric.device.type) else contextlib.nullcontext():
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
    with from_processes(), on_device(fabric, hardware, *models):
        for model in models:
            model.eval().to(fabric.device)
        with fabric.autocast():
            yield fabric.device


def loader(
    data: Dataset, batch: int | None, hardware: Hardware, device: torch.device, done: int = 0, collate: Any = None
) -> DataLoader:
    """A loader of the items after the first `done` for a model on `device`; batch None: one by one, not stacked."""
    options: dict[str, Any] = {"num_workers": hardware.workers, "pin_memory": device.type == "cuda"}
    options["generator"] = torch.Generator()  # a loader draws from the global one otherwise
    return DataLoader(Subset(data, range(done, len(data))), batch, collate_fn=collate, **options)
