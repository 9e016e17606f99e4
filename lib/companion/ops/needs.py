"""Requirements of the runs of a paper's tables: GPU memory and time, disk; from `paper.yaml` and
`models/memory.yaml`."""

from __future__ import annotations

import math

import yaml

from .. import data
from .papers import MODELS, paper, slugs

# Peak matrix throughput in TFLOP/s, dense, from NVIDIA's data sheets: in half precision, in TF32 (float32 on GPUs
# without it), and in float32.
GPUS = {
    "T4": (65, 8.1, 8.1),
    "V100": (125, 15.7, 15.7),
    "A10": (125, 62.5, 31.2),
    "L4": (121, 60, 30.3),
    "L40S": (362, 183, 91.6),
    "RTX 3090": (71, 35.6, 35.6),
    "RTX 4090": (165, 82.6, 82.6),
    "A100": (312, 156, 19.5),
    "H100": (989, 494, 67),
    "H200": (989, 494, 67),
}
SHARE = 0.3  # assumed fraction of the peak that a training reaches; `companion doctor` prints it


def peak(gpu: str, precision: str) -> float:
    """The peak throughput of a GPU at a precision of `Hardware`, TFLOP/s."""
    return GPUS[gpu][{"tf32": 1, "32-true": 2}.get(precision, 0)]


def sets(prefix: str) -> list[str]:
    """The data sets of a run, by the `data` of its entry in `paper.yaml`."""
    return [name for name in data.DATASETS if name.startswith(prefix)]


def memory(slug: str, run: dict, precision: str) -> tuple[float, str]:
    """The GB that a run needs, and their source: counted by benchmarks/memory.py for a training, or estimated."""
    counted = yaml.safe_load((MODELS / "memory.yaml").read_text(encoding="utf-8")).get(slug, {}).get(run["id"])
    if counted is None:
        return run["memory_gb"], " (estimated)"
    image = counted["image_gb" if precision in ("32-true", "tf32") else "image_half_gb"]
    wanted = counted["fixed_gb"] + counted["images"] * image
    how = f"{counted['fixed_gb']} of weights, gradients and moments, {image} an image;\n{'':11}kernels take more"
    return wanted, f" for a step of {counted['images']} images at {precision} (counted: {how})"


def batch(published: int | list[int], devices: int = 1, accumulate: int = 1) -> str:
    """The effective batch of a training as text: the authors', and how it is divided here; a warning if it is not.

    Args:
        published: the images of a step, or [images, devices, accumulation] of the authors.
    """
    parts = published if isinstance(published, list) else [published]
    whole, shares = math.prod(parts), devices * accumulate
    how = f" = {parts[0]} images x {parts[1]} devices x {parts[2]} accumulated" if len(parts) > 1 else ""
    text = f"{whole:,} images a step{how}, as published, whatever `devices` and `accumulate` are; "
    if whole % shares:
        return text + f"WARNING: {devices} devices x {accumulate} parts do not divide it, choose others"
    return text + f"at once {whole // shares:,} = {whole:,} / ({devices} devices x {accumulate} parts)"


def hours(run: dict, throughput: float) -> tuple[float, float]:
    """Hours of a run on one GPU with a peak of `throughput` TFLOP/s, of which it reaches `SHARE`; and the FLOPs."""
    flop = 0.0
    for name in sets(run["data"]):
        sizes = data.DATASETS[name].sizes
        # a tracker's epoch is a number of pairs, and its test a number of frames, both in the paper's file
        seen = {"train": sizes.get("trainval"), "test": sizes.get("test")} | run.get("images", {})
        flop += run["gflop"] * 1e9 * (3 * seen["train"] * run["epochs"] + seen["test"])
    return flop / (SHARE * throughput * 1e12) / 3600, flop


def measured(run: dict, step: dict) -> float:
    """Hours of a run's training, without its tests, by the `step.json` of a dry run."""
    seen = sum(
        run.get("images", {}).get("train") or data.DATASETS[name].sizes["trainval"] for name in sets(run["data"])
    )
    return seen * run["epochs"] * step["seconds"] / step["images"] / 3600


def longest(slug: str, gpu: str = "A100") -> tuple[dict, str, float]:
    """The longest run of a paper's tables: its facts, its GPU memory at the authors' precision, its hours on a GPU."""
    facts = paper(slug)
    precision, throughput = facts["precision"], peak(gpu, facts.get("products", facts["precision"]))
    run = max(facts["runs"], key=lambda run: hours(run, throughput))
    wanted, how = memory(slug, run, precision)
    return run, f"{wanted:.3g} GB{'' if 'counted' in how else ' (estimate)'}", hours(run, throughput)[0]


def summary(slug: str) -> str:
    """What the longest run of a paper needs, in a few words."""
    run, memory, time = longest(slug)
    return f"`{run['data']}`, {run['disk_gb']} GB of disk; a GPU of {memory}, {time:.1f} h on an A100"


def table(gpu: str = "A100") -> str:
    """The longest run of each paper with its requirements at the authors' precision, as a Markdown table."""
    lines = [f"| paper | run | data, disk | GPU memory | time on one {gpu} |", "| --- | --- | ---: | ---: | ---: |"]
    for slug in slugs():
        run, memory, time = longest(slug, gpu)
        lines.append(f"| `{slug}` | {run['title']} | {run['disk_gb']} GB | {memory} | {time:.1f} h |")
    return "\n".join(lines)
