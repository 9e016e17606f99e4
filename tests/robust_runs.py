"""Each kind of run that can be resumed, small and slow enough to be killed in the middle: for test_robustness.py.

A kind is a function of a folder. Called again on the same folder, it resumes; it returns a digest of the result.
"""

import hashlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion import errors
from companion.data import tracking as tracking_data
from companion.data.slides import read_features
from companion.data.tracking import read_frame
from companion.models.bat import tracking
from companion.models.dmt import Teachers, build
from companion.models.dmt import cache as dmt_cache
from companion.models.ecamp import distil as ecamp_distil
from companion.models.hvit.features import extract
from companion.studies import study
from companion.training import stored
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import outputs_of
from companion.training.hardware import CPU
from tests.models.bat.test_tracking import clip, pocket_model, sequence
from tests.models.hvit.test_slides import SMALL, drawn, mean_colour, written
from tests.training.test_fit import noisy_model, run, squared

torch.set_num_threads(1)


STEPS = Path("steps")  # set by `work`


def pause(seconds: float) -> None:
    """Count a step, and make it slow enough to be killed in."""
    with STEPS.open("ab") as file:
        file.write(b".")
    time.sleep(seconds)


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def tensors(state: dict[str, torch.Tensor]) -> Iterable[bytes]:
    return (name.encode() + value.contiguous().numpy().tobytes() for name, value in sorted(state.items()))


def training(folder: Path) -> str:
    """The training loop of all papers."""

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        pause(0.01)
        return squared(model, batch)

    model = noisy_model()
    history = run(model, loss, epochs=10, checkpoint=Checkpoint(folder / "training.pt", every=3))
    return digest([*tensors(trained_state(model)), repr(history).encode()])


def studies(folder: Path) -> str:
    """A study of two methods, whose rows are saved one by one."""
    module = types.ModuleType("companion.toy.made_up")

    def train(method: str, task: str, data: int, rate: float, seed: int) -> tuple[nn.Module, list[dict[str, float]]]:
        pause(0.15)
        model = nn.Identity()
        model.score = 10 * rate + (method == "a") + seed
        return model, [{"loss": 1.0}]

    module.STUDY = study.Study(
        tasks={"t": ["a", "b"]},
        learning_rates=[0.1, 0.2, 0.3],
        budget="no steps",
        data=lambda task, seed, split: seed,
        fit=train,
        score=lambda model, task, data: {"accuracy": model.score},
        selection_seeds=[9],
        seeds=range(8),
    )
    sys.modules[module.__name__] = module
    study.sources = lambda path: [Path(errors.__file__)]  # it has no file
    study.ProcessPoolExecutor = lambda workers, context, start: ThreadPoolExecutor(1)  # the run is a process already
    rows = study.run("made_up", folder / "study", workers=1).drop(columns="seconds")
    return digest([rows.to_csv(index=False).encode()])


def features(folder: Path) -> str:
    """The features of a slide."""
    slide = folder / "slide.tiff"
    if not slide.exists():
        written(slide, drawn())

    def encode(regions: torch.Tensor) -> torch.Tensor:
        pause(0.05)
        return mean_colour(regions)

    found = read_features(extract(slide, encode, folder / "slide.h5", tiling=SMALL, encoder="mean", batch=1))
    return digest([found["features"].numpy().tobytes()])


def videos(folder: Path) -> str:
    """Tracking through six videos."""

    def read(*paths: Path) -> np.ndarray:
        pause(0.25)
        return read_frame(*paths)

    tracking_data.read_frame = read
    with tempfile.TemporaryDirectory() as data:
        parts = [sequence(Path(data), f"video{i}", *clip(6 + i, 3)) for i in range(6)]
        found = tracking.run(pocket_model(), parts, folder / "boxes")
    return digest(name.encode() + boxes.tobytes() for name, boxes in sorted(found.items()))


def distillation(folder: Path) -> str:
    """A language model's statements on each report."""

    def slow(report: str, entities: list[str], attempt: int) -> str:
        pause(0.03)
        return ecamp_distil.Rules()(report, entities)

    slow.name, ecamp_distil.COMMIT = "slow", 0.1  # a run of a second is killed several times
    reports = [f"There is a small effusion at level {i}. No pneumothorax." for i in range(40)]
    return digest([repr(ecamp_distil.distil(reports, slow, folder / "answers.sqlite")).encode()])


def cached_teachers(folder: Path) -> str:
    """Two teachers' tokens of images, on disk."""

    def slowly(image: torch.Tensor) -> torch.Tensor:
        pause(0.01)
        return image

    torch.manual_seed(1)
    stored.FLUSHED = 0.1
    teachers = Teachers({"MAE": build("pocket teacher"), "iBOT": build("pocket teacher", width=64)})
    views = dmt_cache.Views(torch.rand(96, 3, 32, 32, generator=torch.Generator().manual_seed(0)), slowly)
    cache = dmt_cache.fill(folder / "tokens", teachers, views, batch=2, hardware=CPU)
    return digest(tokens.contiguous().numpy().tobytes() for tokens in cache.tensors())


def predictions(folder: Path) -> str:
    """The features of images, and results of different sizes, as tests have."""
    stored.FLUSHED, stored.EVERY = 0.05, 4
    model = nn.Linear(3, 2)
    model.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    model.register_forward_hook(lambda *_: pause(0.02))
    images = TensorDataset(torch.rand(40, 3, generator=torch.Generator().manual_seed(0)))
    features = outputs_of(model, images, batch=2, hardware=CPU, folder=folder / "features")

    def boxes(done: int) -> Iterator[list[float]]:
        for i in range(done, 40):
            pause(0.01)
            yield features[: i % 5].flatten().tolist()

    return digest([repr((features.tolist(), [*stored.saved(folder / "boxes", 40, boxes)])).encode()])


KINDS: dict[str, Callable[[Path], str]] = {
    "training": training,
    "study": studies,
    "slide features": features,
    "tracking": videos,
    "distilled reports": distillation,
    "cached teachers": cached_teachers,
    "features and tests": predictions,
}


def work(kind: str, folder: str) -> None:
    """Run to the end; write the digest, or the error, to <folder>.out, and a byte for each step to <folder>.steps."""
    global STEPS
    STEPS = Path(folder).with_suffix(".steps")
    try:
        found = KINDS[kind](Path(folder))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    Path(folder).with_suffix(".out").write_text(found, encoding="utf-8")
