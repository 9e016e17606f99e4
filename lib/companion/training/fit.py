"""One training loop for all papers, on Lightning Fabric: CPU or GPU, any precision, one device or several.

The random numbers of a step depend only on the seed and the step, those of an item's augmentation only on the seed, the
epoch and the item. So a run that was killed and resumed gives, on one machine, the bits of one that was not.
"""

from __future__ import annotations

import random
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..errors import BadParameter, CorruptFile
from ..ops.files import atomic
from ..ops.progress import progress

SCHEDULES = ("constant", "linear", "cosine", "step", "cosine by epoch")
OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("matrices", "all")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def learning_rates(
    schedule: str,
    base: float,
    steps: int,
    warmup: int = 0,
    final: float = 0.0,
    *,
    warmup_lr: float | None = None,
    epoch: int = 1,
) -> np.ndarray:
    """The learning rate of each step, (steps,).

    A warm-up over `warmup` steps, linear from exactly 0 to `base`, both ends included, or constant at `warmup_lr`. Then
    `schedule`: "constant", "linear" or "cosine" (half a period) from `base` towards `final`; "step": `final` for the
    last fifth; or "cosine by epoch": one rate for each `epoch` steps, on half a period as long as the whole training
    that begins after the warm-up, so it ends above `final` (CoOp's code and what is built on it).
    """
    if schedule not in SCHEDULES:
        raise BadParameter("schedule", schedule, SCHEDULES)
    if not 0 <= warmup <= steps:
        raise BadParameter("warmup", warmup, f"0 to {steps} steps")
    after = np.arange(steps - warmup)
    done = after / max(steps - warmup, 1)
    left = {
        "constant": np.ones_like(done),
        "linear": 1 - done,
        "cosine": (1 + np.cos(np.pi * done)) / 2,
        "step": np.where(done < 0.8, 1.0, 0.0),
        "cosine by epoch": (1 + np.cos(np.pi * (after // epoch * epoch) / steps)) / 2,
    }[schedule]
    rising = np.linspace(0, base, warmup) if warmup_lr is None else np.full(warmup, warmup_lr)
    return np.concatenate([rising, final + (base - final) * left])


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float, decay: str = "matrices") -> list[dict]:
    """The trained tensors in groups: those with two axes or more decay, vectors and biases only with `decay` "all"."""
    trained = [p for p in parameters if p.requires_grad]
    if decay == "all":
        return [{"params": trained, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trained tensors and the stored buffers, by name, on the CPU."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if name not in frozen}


def launcher(**settings) -> Fabric:
    """A `Fabric` that keeps to itself that `srun` is there but was not used: true of every notebook on a cluster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")
        return Fabric(**settings)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    data: Dataset,
    *,
    epochs: float,
    batch: int,
    accumulate: int = 1,
    lr: float | None = None,
    sides: Mapping[str, tuple[Sequence[nn.Parameter], np.ndarray]] | None = None,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-4,
    decay: str = "matrices",
    schedule: str = "cosine",
    warmup: float = 0.1,
    warmup_lr: float | None = None,
    final_lr: float = 1e-7,
    clip: float | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    workers: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    name: str = "training",
) -> list[dict[str, float]]:
    """Train the tensors of `model` that require a gradient, in place; return its history.

    Args:
        loss: from the model and a batch (the tuple that `data` gives, stacked) to a scalar.
        data: map-style; a `TensorDataset` is indexed directly, without a loader.
        epochs: passes over the data, a fraction allowed; the last partial batch of a pass is left out.
        batch: images a step, over all devices together.
        accumulate: parts in which a device takes its share of a batch, one after another, their gradients added up; a
            loss that is a mean over images comes out the same, in less memory.
        optimizer: "adamw" (with `betas`, decay apart from the gradient), or "sgd": with `momentum`, not Nesterov's, the
            decay added to the gradient.
        weight_decay, decay: see `decay_groups`.
        lr, final_lr, schedule, warmup, warmup_lr: see `learning_rates`; `warmup` is a fraction of all steps.
        sides: instead of `lr` and its schedule: by name, tensors and their learning rate at each step, (steps,).
        clip: largest norm of the gradient, of each side's by itself; None for no clipping.
        accelerator, devices, precision: as in `lightning_fabric.Fabric`.
        workers: processes that load data.
        checkpoint: file written every `checkpoint_every` steps and at the end, under a temporary name first.
        resume: go on from `checkpoint` when there is one.

    Returns:
        One row a step: {"step", "lr", "loss"}; with `sides` the rate of the first.

    Raises:
        BadParameter: a value outside its range, or a checkpoint to resume that was written under other settings.
        CorruptFile: the checkpoint cannot be read.
    """
    # NumPy's numbers, of a table's cells for example, would make a checkpoint that cannot be read back
    lr, final_lr, warmup_lr, weight_decay, momentum, clip = (
        value.item() if isinstance(value, np.generic) else value
        for value in (lr, final_lr, warmup_lr, weight_decay, momentum, clip)
    )
    betas = tuple(map(float, betas))
    if batch < 1 or batch > len(data):
        raise BadParameter("batch", batch, f"1 to {len(data)}, the images there are")
    if batch % devices:
        raise BadParameter("batch", batch, f"a multiple of devices = {devices}")
    if not 1 <= accumulate <= batch // devices:
        raise BadParameter("accumulate", accumulate, f"1 to {batch // devices}, a device's images of a step")
    if precision not in PRECISIONS:
        raise BadParameter("precision", precision, PRECISIONS)
    if decay not in DECAYS:
        raise BadParameter("decay", decay, DECAYS)
    if optimizer not in OPTIMIZERS:
        raise BadParameter("optimizer", optimizer, OPTIMIZERS)
    if not 0 <= momentum < 1:
        raise BadParameter("momentum", momentum, "0 or more and less than 1")
    if not all(0 <= beta < 1 for beta in betas):
        raise BadParameter("betas", betas, "0 or more and less than 1")
    if not 0 <= warmup <= 1:
        raise BadParameter("warmup", warmup, "a fraction of the steps, 0 to 1")
    if resume and checkpoint is None:
        raise BadParameter("resume", resume, "True only with a checkpoint file")
    per_epoch = len(data) // batch
    steps = max(1, round(epochs * per_epoch))
    if (lr is None) == (sides is None):
        raise BadParameter("lr", lr, "a number, or `sides` in its place")
    if sides is None:
        schedules = (schedule, lr, steps, round(warmup * steps), final_lr)
        rates = learning_rates(*schedules, warmup_lr=warmup_lr, epoch=per_epoch)
        sides = {"all": ([p for p in model.parameters() if p.requires_grad], rates)}
    for side, (_, rates) in sides.items():
        if len(rates) != steps:
            raise BadParameter("sides", f"{len(rates)} rates of {side!r}", f"{steps}, one for each step")
    settings = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "final_lr": final_lr,
        "schedule": schedule,
        "warmup": warmup,
        "warmup_lr": warmup_lr,
        "optimizer": optimizer,
        "momentum": momentum,
        "betas": list(betas),
        "weight_decay": weight_decay,
        "accumulate": accumulate,
        "decay": decay,
        "clip": clip,
        "seed": seed,
        "images": len(data),
        "precision": precision,
        "sides": {side: zlib.crc32(np.asarray(rates, float).tobytes()) for side, (_, rates) in sides.items()},
        "tensors": zlib.crc32(repr([(n, tuple(t.shape)) for n, t in trained_state(model).items()]).encode()),
    }
    saved = _read(checkpoint, settings) if resume and Path(checkpoint).is_file() else None

    # processes are forked, so that what a notebook defines can be trained on several devices
    strategy = "auto" if devices == 1 else DDPStrategy(start_method="fork", find_unused_parameters=True)
    fabric = launcher(accelerator=accelerator, devices=devices, precision=precision, strategy=strategy)

    def train(fabric: Fabric) -> dict | None:
        groups = [
            group | {"side": side}
            for side, (parameters, _) in sides.items()
            for group in decay_groups(parameters, weight_decay, decay)
        ]
        sgd = optimizer == "sgd"
        optim = torch.optim.SGD(groups, 0.0, momentum) if sgd else torch.optim.AdamW(groups, 0.0, betas)
        if saved:
            model.load_state_dict(saved["model"], strict=False)
        history = list(saved["history"]) if saved else []
        wrapped, optim = fabric.setup(model, optim)
        if saved:  # not before: the moments go where the tensors are
            optim.load_state_dict(saved["optimizer"])
            if saved.get("precision"):  # the scale of the losses in half precision
                fabric.strategy.precision.load_state_dict(saved["precision"])
        wrapped.train()
        start, rank, ranks = len(history), fabric.global_rank, fabric.world_size
        stream = _batches(data, batch, accumulate, seed, start, steps, rank, ranks, workers)
        shown = progress(range(start, steps), name, steps, start) if rank == 0 else range(start, steps)
        for step in shown:
            part = next(stream)
            torch.manual_seed(_mix(seed, step, rank))
            for group in optim.param_groups:
                group["lr"] = float(sides[group["side"]][1][step])
            mean = torch.zeros((), device=fabric.device)
            for i in range(accumulate):
                part = next(stream) if i else part
                with fabric.no_backward_sync(wrapped, enabled=i + 1 < accumulate):
                    value = loss(wrapped, tuple(x.to(fabric.device) for x in part))
                    value = value * (len(part[0]) / (batch // ranks))
                    fabric.backward(value)
                mean += value.detach()
            if clip is not None:
                fabric.strategy.precision.unscale_gradients(optim.optimizer)
                for side in sides:
                    own = [p for group in optim.param_groups if group["side"] == side for p in group["params"]]
                    # half precision begins with steps that overflow, which its scaler leaves out
                    nn.utils.clip_grad_norm_(own, clip, error_if_nonfinite=precision != "16-mixed")
            optim.step()
            optim.zero_grad(set_to_none=True)
            if ranks > 1:
                mean = fabric.all_reduce(mean, reduce_op="mean")
            history.append({"step": step, "lr": optim.param_groups[0]["lr"], "loss": mean})
            if checkpoint and ((step + 1) % checkpoint_every == 0 or step + 1 == steps) and rank == 0:
                _write(checkpoint, settings, model, optim, fabric.strategy.precision.state_dict(), history)
        done = {"model": trained_state(model), "history": _plain(history)}
        if ranks == 1:
            return done
        # by a file: what a process gives back is read when it has ended, and with more than a pipe holds it never ends
        if rank == 0:
            torch.save(done, result)
        return None

    with tempfile.TemporaryDirectory(prefix="fit-") as folder:
        result = Path(folder) / "result.pt"
        # of the CPU alone: asking the cards for their state would start CUDA, and then no process could be forked
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # the batches are dealt to the devices here, and the loader's workers are the caller's choice
            warnings.filterwarnings("ignore", module="lightning_fabric")
            # several devices train copies in processes of their own
            found = fabric.launch(train) or torch.load(result, weights_only=True)
    model.load_state_dict(found["model"], strict=False)
    model.to("cpu").eval()
    return found["history"]


def predict(
    model: nn.Module,
    data: Dataset,
    *,
    batch: int = 256,
    accelerator: str = "auto",
    precision: str = "32-true",
    workers: int = 0,
) -> Tensor:
    """What `model`, in eval mode, gives for the first entry of every item, stacked, on the CPU as float32.

    A model with several outputs (a tuple) gives the first. The model is on the CPU afterwards, as after `fit`.
    """
    fabric = launcher(accelerator=accelerator, devices=1, precision=precision)
    # moved outside of inference mode: tensors that are moved within it cannot be trained any more
    wrapped = fabric.setup_module(model.eval())
    if isinstance(data, TensorDataset):
        stream = data.tensors[0].split(batch)
    else:
        stream = (items[0] for items in DataLoader(data, batch, num_workers=workers))
    outputs = []
    with torch.inference_mode():
        for images in stream:
            output = wrapped(images.to(fabric.device))
            outputs.append((output[0] if isinstance(output, tuple) else output).float().cpu())
    model.to("cpu")
    return torch.cat(outputs)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbours do not share random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class _Seeded(Dataset):
    """Items whose random augmentation depends on (seed, epoch, index) alone, whatever process loads them."""

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
    data: Dataset, batch: int, parts: int, seed: int, start: int, stop: int, rank: int, ranks: int, workers: int
) -> Iterator[tuple[Tensor, ...]]:
    """The batches of steps `start` to `stop`: in an order that the seed fixes, new each epoch; a device's share.

    Each comes in `parts`, one after the other: 8,192 pictures of 448 pixels at once would be 20 GB, and every worker
    of a loader keeps two such batches ready. The indices are made as they are needed, for millions of steps.
    """
    per_epoch = len(data) // batch

    def indices() -> Iterator[list[tuple[int, int]]]:
        order, current = None, -1
        for step in range(start, stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != current:
                order, current = np.random.default_rng((seed, epoch)).permutation(len(data)), epoch
            for part in np.array_split(order[i * batch : (i + 1) * batch][rank::ranks], parts):
                yield [(epoch, int(k)) for k in part]

    if isinstance(data, TensorDataset):
        for keys in indices():
            chosen = torch.tensor([k for _, k in keys])
            yield tuple(t[chosen] for t in data.tensors)
    else:
        yield from DataLoader(_Seeded(data, seed), batch_sampler=indices(), num_workers=workers)


def _plain(history: list[dict]) -> list[dict[str, float]]:
    """Losses stay tensors while training, so that a GPU is not waited for at each step."""
    return [{**row, "loss": float(row["loss"])} for row in history]


def _write(path: str | Path, settings: dict, model: nn.Module, optimizer, precision: dict, history: list[dict]) -> None:
    with atomic(path) as temporary:
        torch.save(
            {
                "settings": settings,
                "model": trained_state(model),
                "optimizer": optimizer.state_dict(),
                "precision": precision,
                "history": _plain(history),
            },
            temporary,
        )


def _read(path: str | Path, settings: dict) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        written = saved["settings"]
    except Exception as error:
        raise CorruptFile(path, f"not a checkpoint of fit ({type(error).__name__})") from error
    for key, value in settings.items():
        if written.get(key) != value:
            raise BadParameter(key, value, f"{written.get(key)!r}, as in the checkpoint to resume ({path})")
    return saved
