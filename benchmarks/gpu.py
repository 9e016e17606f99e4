"""`make gpu`: check all papers on this GPU and measure their speed. Writes reports/gpu/<GPU>.json.

Expected to take half an hour; it has not been run on a GPU yet.

1. the tests that CI runs on a simulated GPU, here on the real one: trainings that resume to the same bits, and every
   paper's notebook at toy scale, in bf16 and as a dry run, with the host synchronisations of each training step;
2. parity: the outputs recorded from the authors' code, within 1e-3, without TF32;
3. every paper's full-size training step at its published batch (per GPU, or the recipe's micro-batch) and the authors'
   precision: images per second, peak memory, and the fraction of the GPU's peak FLOPS.

Each part runs in its own processes, and its results are written as soon as it ends. Without a GPU it prints a message
and exits.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests are not an installed package
from tests.papers.common import trainings  # noqa: E402

STEPS, WARM = 12, 4
TRAININGS = {name: training for name, training in trainings().items() if training.batch}
# ranks of attention: two positions of nearly equal attention may swap ranks
TOLERANCES = {"heatmap_blend": 1e-2, "heatmap_blend_smoothed": 1e-2}
MINUTES = {"tests": 12, "parity": 8, "speed": 4}  # for a part, or for one training of the last part


def larger(data: Dataset, batch: int) -> Dataset:
    """The first items of a data set, repeated until they make one batch."""
    which = [i % len(data) for i in range(batch)]
    if isinstance(data, TensorDataset):
        return TensorDataset(*(tensor[which] for tensor in data.tensors))
    return Subset(data, which)


def speed(name: str, small: bool = False) -> dict:
    """Images per second, memory and fraction of peak FLOPS of one training; `small`: with small models, to test this
    script."""
    import pytest

    from companion.runs.needs import GPUS, peak
    from companion.training import fit as training
    from companion.training.callbacks import Callback
    from tests.conftest import parameters
    from tests.papers.common import shrink

    slug, chosen = name.partition(",")[0], TRAININGS[name]
    recipe = shrink(slug, pytest.MonkeyPatch()) if small else importlib.import_module(f"companion.models.{slug}.recipe")
    found: dict = {}

    class Timer(Callback):
        """The time after each step, once the GPU has finished it."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, loop: training.Loop) -> None:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    def fit(model, loss, data, *, epochs, batch, callbacks=(), schedule=None, checkpoint=None, **settings):  # type: ignore[no-untyped-def]
        if found:  # a paper may train more than once; the first training is measured
            return training.fit(model, loss, data, epochs=epochs, batch=batch, schedule=schedule, **settings)
        size, timer, precision = chosen.batch, Timer(), settings["hardware"].precision
        while True:
            images = larger(data, size)
            try:
                with FlopCounterMode(display=False) as counter:
                    training.fit(copy.deepcopy(model), loss, images, epochs=1, batch=size, **settings)
                torch.cuda.reset_peak_memory_stats()
                every = [*callbacks, timer]
                training.fit(model, loss, images, epochs=STEPS, batch=size, callbacks=every, **settings)
                break
            except torch.cuda.OutOfMemoryError:
                size //= 2
                timer.times.clear()
                torch.cuda.empty_cache()
        seconds = (timer.times[-1] - timer.times[WARM - 1]) / (STEPS - WARM)
        flop = counter.get_total_flops()
        found.update(
            precision=precision,
            batch=size,
            published=chosen.batch,
            seconds_a_step=round(seconds, 4),
            images_a_second=round(size / seconds, 2),
            peak_memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            tflop_a_step=round(flop / 1e12, 3),
        )
        card = [gpu for gpu in sorted(GPUS, key=len, reverse=True) if gpu in torch.cuda.get_device_name()]
        if card:  # the peak of other GPUs is not known
            found["share_of_peak"] = round(flop / seconds / 1e12 / peak(card[0], precision), 3)
        return [{"step": 0, "lr": 0.0, "loss": 0.0}] * 2

    recipe.fit = importlib.import_module("companion.training.recipe").fit = fit
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cuda", "data_root": "nowhere"}
    changes = dict(chosen.changes) | ({} if small else chosen.full)
    with tempfile.TemporaryDirectory() as out:
        chosen.train(recipe, parameters(slug, **usual | changes), Path(out))
    return found


def parity_of(slug: str) -> dict[str, float]:
    """The largest difference of each case, relative to its outputs' largest magnitude; see
    `tests.parity.runner`."""
    from tests.parity import runner

    return {case.name: max(d.error for d in runner.compare(case, "cuda")) for case in runner.cases(slug)}


def child(minutes: float, *words: str) -> dict | str:
    """The result of `gpu.py --part WORDS` in its own process, or the end of its output when it failed."""
    command = [sys.executable, __file__, "--part", *words]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        try:
            done = subprocess.run([*command, file.name], cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return f"not done in {minutes:g} minutes"
        return json.loads(Path(file.name).read_text()) if done.returncode == 0 else done.stderr[-2000:]


def main(words: Sequence[str] | None = None) -> int:
    """Run all parts; returns 1 when one of them fails."""
    from companion.io import record
    from companion.io.files import write_json
    from tests.parity import runner

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs=3, metavar=("KIND", "NAME", "FILE"), help="one part, into a file")
    given = parser.parse_args(words)
    if given.part:
        kind, name, file = given.part
        Path(file).write_text(json.dumps(speed(name) if kind == "speed" else parity_of(name)))
        return 0
    if not torch.cuda.is_available():
        print("no GPU found: nothing was run")
        return 0
    name = torch.cuda.get_device_name()
    path = ROOT / "reports" / "gpu" / f"{name.replace(' ', '-')}.json"
    facts: dict = {"gpu": name, "cuda": torch.version.cuda, "versions": record.versions(), "commit": record.commit()}

    def keep(part: str, value: object) -> None:
        facts[part] = value
        write_json(path, facts)
        print(f"{part}: {json.dumps(value)}", flush=True)

    tests = [sys.executable, "-m", "pytest", "-q", "-m", "simulated", "-n", "4", "tests/simulated"]
    try:
        done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES["tests"])
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or " passed" in line]
    except subprocess.TimeoutExpired:
        lines = [f"FAILED: not done in {MINUTES['tests']} minutes"]
    keep("tests", lines)
    for slug in runner.papers():
        cases = child(MINUTES["parity"], "parity", slug)
        worst = cases if isinstance(cases, str) else {case: f"{error:.1e}" for case, error in cases.items()}
        keep(f"parity of {slug}", worst)
    for training in TRAININGS:
        keep(f"training of {training}", child(MINUTES["speed"], "speed", training))
    wrong = [line for line in lines if " passed" not in line or " failed" in line]
    for part, value in facts.items():
        if part.startswith("parity"):
            far = isinstance(value, str) or any(float(e) > TOLERANCES.get(case, 1e-3) for case, e in value.items())
            wrong += [part] * far
        elif part.startswith("training"):
            wrong += [part] if isinstance(value, str) else []
    print("\n".join(["failed:", *wrong]) if wrong else f"all passed; see {path.relative_to(ROOT)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
