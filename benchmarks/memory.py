"""Memory of a training step of each paper, counted on the CPU, for `companion doctor`.

    python benchmarks/memory.py "ecamp, pre-train"     # prints it; without a name: all papers, and writes
    models/memory.yaml

For full-size models with random weights: gigabytes of weights, gradients and optimiser moments, and gigabytes that the
forward pass of one image saves for the backward pass, in float32 and under autocast (counted with bfloat16). Kernel
workspaces and memory fragmentation are not included.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from gpu import TRAININGS, larger
from torch.utils.data import default_collate

from companion.io.files import atomic
from companion.io.papers import MODELS
from tests.conftest import parameters  # gpu.py puts the checkout in the path

RUNS = {name: training for name, training in TRAININGS.items() if training.runs}
SIZES = 2, 4  # two batch sizes: they differ by two images


class Counted(Exception):
    """The counts of one training."""


def saved(run: object, model: torch.nn.Module, half: bool) -> int:
    """Bytes that a forward pass saves, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # references are held so that no memory is counted twice or freed

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in own:
            kept[where] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        found = run()  # type: ignore[operator]
    del found
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def fit(model, loss, data, *, optimizer, **_):  # type: ignore[no-untyped-def]
    """Replaces `training.fit`: counts, then stops the run."""
    optim = optimizer(model.train())
    moments = 2 if isinstance(optim, (torch.optim.AdamW, torch.optim.Adam)) else 1
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.nbytes for group in optim.param_groups for p in group["params"])
    counts: dict[str, float] = {"fixed_gb": (weights + (1 + moments) * trained) / 1e9}
    for name, half in (("image_gb", False), ("image_half_gb", True)):
        sizes = []
        for size in SIZES:
            images = larger(data, size)
            batch = tuple(default_collate([images[i] for i in range(size)]))
            torch.manual_seed(0)
            sizes.append(saved(lambda batch=batch: loss(model, batch), model, half))
        counts[name] = (sizes[1] - sizes[0]) / (SIZES[1] - SIZES[0]) / 1e9
    raise Counted(counts)


def count(name: str) -> dict[str, float]:
    """Gigabytes of a training, and the number of images per step."""
    slug = name.partition(",")[0]
    recipe = importlib.import_module(f"companion.models.{slug}.recipe")
    recipe.fit = fit
    importlib.import_module("companion.training.recipe").fit = fit
    training = TRAININGS[name]
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": "nowhere"}
    with tempfile.TemporaryDirectory() as out:
        try:
            training.train(recipe, parameters(slug, **usual | training.changes | training.full), Path(out))
        except Counted as counted:
            return {key: float(f"{value:.3g}") for key, value in counted.args[0].items()} | {"images": training.batch}
    raise RuntimeError(f"{name} trained nothing")


def main(names: list[str]) -> None:
    """Count and print; without a name also write the file."""
    found: dict[str, dict] = {}
    for name in names or RUNS:
        counts = count(name)
        print(f"{name}: {counts}".replace("'", ""), flush=True)
        found.setdefault(name.partition(",")[0], {}).update(dict.fromkeys(RUNS[name].runs.split(), counts))
    if not names:
        write(found)


def write(found: dict[str, dict]) -> None:
    """The file that `companion doctor` reads."""
    lines = ["# GB that a step of each run's training wants on one GPU, counted by benchmarks/memory.py."]
    for slug, runs in found.items():
        lines += [f"{slug}:", *(f"  {run}: {counts}".replace("'", "") for run, counts in runs.items())]
    with atomic(MODELS / "memory.yaml") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
