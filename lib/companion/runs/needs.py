"""Requirements of the runs of a paper's tables: GPU memory and time, disk; from `paper.yaml` and
`models/memory.yaml`."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml

from .. import data
from ..errors import CompanionError, Count, check_choice, typed
from ..io.papers import MODELS, paper, rules, slugs
from ..training.hardware import Hardware, RunParameters, device
from ..training.recipe import dry_items

# From NVIDIA's data sheets: peak matrix throughput in TFLOP/s, dense, in half precision, in TF32 (float32 on GPUs
# without it), and in float32; and GB of memory, of several sizes the smallest.
GPUS = {
    "T4": (65, 8.1, 8.1, 16),
    "V100": (125, 15.7, 15.7, 16),
    "A10": (125, 62.5, 31.2, 24),
    "L4": (121, 60, 30.3, 24),
    "L40S": (362, 183, 91.6, 48),
    "RTX 3090": (71, 35.6, 35.6, 24),
    "RTX 4090": (165, 82.6, 82.6, 24),
    "A100": (312, 156, 19.5, 40),
    "H100": (989, 494, 67, 80),
    "H200": (989, 494, 67, 141),
}
CPU_COPIES = 1.75  # times the counted memory: MetaSegNet's dry run on a CPU took 17.8 GB where 10.2 are counted
CGROUP = Path("/sys/fs/cgroup")
SHOWN = ("T4", "RTX 3090", "RTX 4090", "A100", "H100")  # GPUs of `rows`
SHARE = 0.3  # assumed fraction of the peak that a training reaches; `companion doctor` prints it


def peak(gpu: str, precision: str) -> float:
    """The peak throughput of a GPU at a precision of `Hardware`, TFLOP/s."""
    check_choice("gpu", gpu, GPUS)
    return GPUS[gpu][{"tf32": 1, "32-true": 2}.get(precision, 0)]


def sets(prefix: str) -> list[str]:
    """The data sets of a run, by `data` of its entry in `paper.yaml`: a name, or the group of several, "vtab/"."""
    return [name for name in data.DATASETS if name == prefix or (prefix.endswith("/") and name.startswith(prefix))]


def _counted(slug: str) -> dict[str, dict[str, float]]:
    """Of each run of a paper that was counted, its entry in `models/memory.yaml`."""
    return yaml.safe_load((MODELS / "memory.yaml").read_text(encoding="utf-8")).get(slug, {})


def memory(slug: str, run: dict, precision: str, where: str = "cuda", images: float = 0) -> tuple[float, str]:
    """The GB that a run needs, and their source: counted by benchmarks/memory.py for a training, or estimated.

    Args:
        where: "cuda": of a GPU; "cpu": of the host, which computes in float32.
        images: of a forward pass on one device; 0: `micro_batch` in `paper.yaml`, those of the run's largest batch as
            the recipe divides it, or the counted ones.
    """
    counted = _counted(slug).get(run["id"])
    if counted is None:
        return run["memory_gb"], " (estimated)"
    precision, images = precision if where == "cuda" else "32-true", images or run.get("micro_batch", counted["images"])
    image = counted["image_gb" if precision in ("32-true", "tf32") else "image_half_gb"]
    wanted = (counted["fixed_gb"] + images * image) * (1 if where == "cuda" else CPU_COPIES)
    how = f"{counted['fixed_gb']} of weights, gradients and moments, {image} an image;\n{'':11}"
    how += "kernels take more" if where == "cuda" else f"x {CPU_COPIES} on a CPU"
    return wanted, f" for a step of {images:.0f} images at {precision} (counted: {how})"


def disk(slug: str, run: dict) -> float:
    """The GB that a run writes below `out`: two checkpoints, since a new one is written before the old one goes, and
    `out_gb` of its entry in `paper.yaml`."""
    return 2 * _counted(slug).get(run["id"], {}).get("fixed_gb", 0) + run.get("out_gb", 0)


def check(slug: str, p: RunParameters, out: Path) -> None:
    """Raise `CompanionError` where less memory or disk is free than a step of the run with these parameters takes."""
    run = run_of(slug, p)
    counted = _counted(slug).get(run["id"]) if run else None
    if (
        run is None or counted is None or p.devices > 1
    ):  # memory of several GPUs cannot be asked for before they are forked
        return
    hardware, where = Hardware.of(p, slug), device(p.accelerator)
    images = _at_once(run, int(counted["images"]), getattr(p, "accumulate", 0))  # of several batches the smallest
    if p.dry_run:
        images = min(images, dry_items(p, images) // 2)
    wanted, available = memory(slug, run, hardware.precision, where, images)[0], free(where)
    if wanted > available:
        less = {"accumulate": "a larger `accumulate`", "grad_checkpointing": "`grad_checkpointing = True`"}
        ways = [] if p.dry_run else [way for name, way in less.items() if hasattr(p, name)]
        here = "this GPU" if where == "cuda" else "this machine, which computes on its CPU"
        raise CompanionError(
            f"a step of {images} images takes about {wanted:.1f} GB of memory, and {available:.1f} GB are free on "
            f"{here}: close other programs or notebooks, or take {', or '.join([*ways, 'another machine'])}. "
            f"`companion doctor {slug}` lists what each run needs"
        )
    room = shutil.disk_usage(next(f for f in (out, *out.parents) if f.exists())).free / 1e9
    if room < (written := disk(slug, run)):
        what = f"two checkpoints at a time, and what else the run saves, take up to {written:.1f} GB"
        raise CompanionError(f"{what}; {room:.1f} GB are free in {out}: choose another `out`, or make room")


def _at_once(run: Mapping, usual: int, accumulate: int) -> int:
    """The images of a forward pass on one GPU: the published batch divided by `accumulate`; 0: `usual`."""
    published = run.get("batch", usual)
    whole = math.prod(published) if isinstance(published, list) else published
    return -(-whole // accumulate) if accumulate else usual


def run_of(slug: str, p: RunParameters) -> dict | None:
    """The first entry of `runs` in `paper.yaml` that is the run of these parameters; None where none is."""
    given = vars(p)

    def same(run: Mapping) -> bool:
        named = run.get("parameters", {}).items()
        chosen = all(given.get(k) in (v if isinstance(v, list) else [v]) for k, v in named if "{" not in str(v))
        return chosen and (given.get("dataset") or "folder").startswith(("folder", run["data"]))

    return next(filter(same, paper(slug)["runs"]), None)


def free(where: str) -> float:
    """GB of memory that a process may still take: of a GPU, "cuda", or of the host, "cpu"."""
    return (torch.cuda.mem_get_info()[0] if where == "cuda" else _free()) / 1e9


def _free() -> float:
    """Bytes of host memory that a process may still take; in a container, below its limit."""
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max"
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # of files that were read: given up when needed
        free = min(free, limit - used + cached)
    return free


@typed
def batch(published: Count | list[int], devices: Count = 1, accumulate: Count = 1) -> str:
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


class Row(NamedTuple):
    """A run of a paper's tables on data sets with as many training images.

    Attributes:
        slug, run: the paper, and the entry of its `runs` in `paper.yaml`.
        sets: the names of the data sets.
        memory: GB that it needs of a GPU; `counted`, or else estimated.
        smallest: GB with the parameter `accumulate`, so that two images of the run's smallest batch are in a forward
            pass, which a batch norm needs; `memory`, and 0, where the notebook has no such parameter.
        hours: on each GPU of `SHOWN`, of the data set that takes least and of the one that takes most; () where its
            memory is too small.
        t4: the hours on a T4 of the row, or of a run that it needs before (`after`), the longest; inf where one of them
            does not fit: no row comes before one that it needs.
    """

    slug: str
    run: dict
    sets: list[str]
    memory: float
    counted: bool
    smallest: float
    accumulate: int
    hours: dict[str, tuple[float, float] | tuple[()]]
    t4: float

    @property
    def anchor(self) -> str:
        """The name of the row on the site's page."""
        return f"gpus-{self.slug}-{self.run['id']}-{self.sets[0].replace('/', '-')}"


def rows(slug: str) -> list[Row]:
    """The runs of a paper's tables, each on each of its data sets, with what they need at the authors' precision."""
    facts, found = paper(slug), list[Row]()
    precision, products = facts["precision"], facts.get("products", facts["precision"])
    for run in facts["runs"]:
        wanted, how = memory(slug, run, precision)
        accumulate, smallest = 0, wanted
        if (counted := _counted(slug).get(run["id"])) and "accumulate" in rules(slug):
            accumulate = _at_once(run, int(counted["images"]), 2)
            images = _at_once(run, run.get("micro_batch", int(counted["images"])), accumulate)
            smallest = memory(slug, run, precision, images=images)[0]
        together = "dataset" in run.get("parameters", {})  # one data set is trained on, the others are tested
        groups: dict[object, list[str]] = {}
        for name in sets(run["data"]):
            known = data.DATASETS[name]
            groups.setdefault(together or (known.fetchable, known.sizes.get("trainval")), []).append(name)
        for names in groups.values():
            each = [run] if together else [run | {"data": name} for name in names]
            taken = {gpu: [hours(one, peak(gpu, products))[0] for one in each] for gpu in SHOWN}
            fitting = {gpu: (min(h), max(h)) if smallest <= GPUS[gpu][3] else () for gpu, h in taken.items()}
            before = [row.t4 for row in found if row.run["id"] == run.get("after")]
            t4 = max(*fitting["T4"], *before, 0) if fitting["T4"] else math.inf
            found.append(Row(slug, run, names, wanted, "counted" in how, smallest, accumulate, fitting, t4))
    return found


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
