"""TIP: training and evaluation of the `paper` profile, on Stable Diffusion.

The paper's recipe is not known; the one here is ours: the constants below, and the arguments of
`degradations.Degraded`.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...data import DATASETS, few, present, restoration
from ...errors import BadParameter, Count, MissingWeights, Whole, check_choice, check_range, typed
from ...evaluation.metrics.restoration import perceptual, psnr, ssim
from ...evaluation.tables import Cells, Results, with_measured
from ...io import papers
from ...training import checkpoints
from ...training.callbacks import ClipNorm
from ...training.hardware import CPU, Hardware, RunParameters, device, evaluating, from_processes
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import adamw, schedule
from ...training.stored import saved
from . import degradations
from . import model as tip
from .degradations import BLIND, TASKS, Degraded, Sample
from .pipeline import TIPPipeline, build, load_adaptor, save_adaptor, tokenize

# differences to TIP in training: the fusion, the prompts that are read. Prompts that are never read in training are not
# read in the test either
METHODS: dict[str, dict] = {
    "TIP": {},
    "plain ControlNet": {"fusion": "add"},
    "semantic only": {"blind_prompt": 1.0},
    "restoration only": {"no_caption": 1.0},
}
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 10, 32, 1e-5, 1e-2, 1.0
WARMUP = 500  # steps, at most half of all
MICRO_BATCH = 8  # images in a forward pass of a device; the gradients of a step's micro-batches are added up
TEST_BATCH = 32  # test images in memory at a time
WORKERS = min(16, os.cpu_count() or 1)
WEIGHTS, HUB = "stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
DRY_SIZE, DRY_STEPS = 128, 2
SHOWN = 8  # images of the figures


class Parameters(RunParameters, Protocol):
    """The notebook's parameters that are read here, see paper.yaml."""

    task: str
    dataset: str
    degradation: str
    method: str
    texts: str
    checkpoint: str
    size: int
    steps: int
    guidance: float
    scale: float


class Tested(NamedTuple):
    """A method of the `paper` profile after its training and test.

    Attributes:
        title: of the data.
        pipe: the pipeline.
        samples: the first of the test, for figures.
        restore: (samples, kind of prompts, arguments of the pipeline) to images (B, 3, S, S) in [0, 1].
        scores: of the whole test.
        missing: why a score is not among them.
    """

    title: str
    pipe: TIPPipeline
    samples: list[Sample]
    restore: Callable[..., Tensor]
    scores: dict[str, float]
    missing: dict[str, str]


def prepare(p: Parameters, out: Path) -> tuple[str, Dataset, TIPPipeline, Opened]:
    """A title, the test images, the pipeline, and the training of its adaptor with the checkpoint: all that a run reads
    is opened on the CPU, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`, `BadCheckpoint`: with what to change or get.
    """
    if p.task == "test" and not p.checkpoint:
        raise BadParameter("checkpoint", p.checkpoint, "the folder of a trained adaptor for task = 'test'")
    title, images, test = datasets(p)
    pipe = pipeline(p, p.method)
    learned = None if images is None else samples(images, size_of(p), p.method, p.seed)
    return title, test, pipe, opened(training(p, pipe, learned, out, listing(images)), out)


def size_of(p: Parameters) -> int:
    """The side of the images; of a dry run on a CPU a small one."""
    return DRY_SIZE if p.dry_run and device(p.accelerator) == "cpu" else p.size


def run(p: Parameters, out: Path) -> Tested:
    """Train and test a method; the scores become a row of `out`/measured.csv.

    COCO, DIV2K or a folder of one's own ("folder": `data_root` itself), on a released Stable Diffusion. A dry run
    takes two steps on a few of the images, or on generated ones, of 128 pixels where there is no GPU. A training
    resumes from its checkpoint in `out`/checkpoints; its adaptor is saved below
    `out`/trained, for the parameter `checkpoint`. A test resumes from the restored images in `out`/restored, which are
    deleted at its end. Raises as `prepare`.
    """
    size, steps = size_of(p), DRY_STEPS if p.dry_run else p.steps
    title, test, pipe, ready = prepare(p, out)
    _, history = train(ready)
    pipe.to(device(p.accelerator))
    if history:  # in diffusers' layout
        save_adaptor(pipe.adaptor, checkpoints.file(out / "trained", f"{p.method}, {p.dataset}, seed {p.seed}", ""))
    given = Degraded(test, size, seed=p.seed, **TASKS[p.degradation])
    options: dict[str, Any] = {"steps": steps, "guidance": p.guidance, "scale": p.scale, "seed": p.seed}
    hardware = Hardware.of(p, "tip", workers=WORKERS)
    restored = functools.partial(restore, pipe, hardware=hardware, **options)
    row = {key: getattr(p, key) for key in RESULTS.keys} | {"method": RESULTS.label(p.method, sd15=p.weights)}
    facts = row | options | {"precision": hardware.precision, "size": size, "images": listing(test)}
    key = checkpoints.checkpoint_key(**facts, adaptor=pipe.adaptor, weights=base(p))
    folder = checkpoints.file(out / "restored", f"{p.method}, {key}", "")
    pairs = whole_test(restored, given, texts_of(p.method, p.texts), pipe.device, hardware.workers, folder)
    values, missing = score(pairs)
    RESULTS.measured(out / "measured.csv", row | values, dry_run=p.dry_run)
    shutil.rmtree(folder)  # of COCO 16 GB
    return Tested(title, pipe, [given[i] for i in range(min(SHOWN, len(given)))], restored, values, missing)


def listing(images: Dataset | None) -> dict[str, list[str]] | None:
    """Names and captions of images, by which trainings and tests on them are known; None for generated ones."""
    if not isinstance(images, restoration.Captioned):
        return None
    listed = {"images": [*map(str, images.sources)], "captions": [*images.captions]}
    return listed | ({"low": [*map(str, images.low.sources)]} if isinstance(images, restoration.QualityPairs) else {})


def protocol() -> dict[str, str]:
    """What the `paper` profile runs, a fact a row. The paper's own settings could not be found: these are ours."""
    drawn = degradations.Recipe()
    ranges = ", ".join(
        f"{kind} {' to '.join(f'{end:g}' for end in getattr(drawn, kind))}" for kind in degradations.KINDS
    )
    precision = papers.paper("tip")["precision"]
    return {
        "source": "the paper's settings were not found; these are ours but for the order of the degradations (figure)",
        "optimiser": f"AdamW, betas 0.9 and 0.999, {LEARNING_RATE:g}, decay {WEIGHT_DECAY:g} on all tensors",
        "schedule": f"linear from 0 over {WARMUP} steps, then constant",
        "gradients": f"clipped to a norm of {MAX_NORM:g}",
        "batch": f"{BATCH}, in parts of {MICRO_BATCH}",
        "epochs": f"{EPOCHS}",
        "last images of an epoch": "left out, too few for a batch; others in each epoch",
        "loss": "mean squared error of the predicted noise, or of the scheduler's prediction type",
        "precision": f"{precision} on a GPU",
        "images": "the parameter size (512), a random square and a flip in training, the middle square in the test",
        "degradations": f"{drawn.passes} passes, each operation left out with {drawn.skip:g}; {ranges}",
        "blind samples": f"{degradations.SHARE_BLIND:g} by Real-ESRGAN's pipeline",
        "prompts": (
            f'"{degradations.BLIND}" for {degradations.BLIND_PROMPT:g} of the other samples; no semantic prompt '
            f"for {degradations.NO_CAPTION:g}"
        ),
        "sampler": "DDIM, the parameters steps and guidance, noise fixed by the seed and the sample",
        "selection": "the last step",
        "seeds": "the parameter seed; how many runs the paper averages was not found",
        "sweep": "none found",
        "metric": "PSNR, SSIM, LPIPS, FID",
    }


def base(p: Parameters) -> str:
    """Where the frozen model is: the parameter `weights`, the usual folder below `data_root`, or the hub's cache."""
    usual = Path(p.data_root) / "weights" / WEIGHTS
    return p.weights or (str(usual) if usual.is_dir() else HUB)


def pipeline(p: Parameters, method: str) -> TIPPipeline:
    """The pipeline of a method: with a new adaptor, or that of the parameter `checkpoint`.

    A dry run without a Stable Diffusion has random weights, on a CPU in bfloat16 to fit in a laptop's memory.
    """
    fusion = METHODS[method].get("fusion", "modulate")
    torch.manual_seed(p.seed)
    try:
        pipe = TIPPipeline.from_stable_diffusion(base(p), fusion=fusion)
    except MissingWeights:
        if not p.dry_run or p.weights:
            raise
        print(f"{WEIGHTS}: not here; random weights in this dry run")
        pipe = build(fusion=fusion)
        if device(p.accelerator) == "cpu":
            pipe.unet.bfloat16()
    if p.checkpoint:
        adaptor = load_adaptor(p.checkpoint, pipe.unet)
        if adaptor.config.fusion != fusion:
            raise BadParameter("checkpoint", p.checkpoint, f"an adaptor with the fusion of {method!r}, {fusion!r}")
        pipe.register_modules(adaptor=adaptor)
    return pipe


def datasets(p: Parameters) -> tuple[str, Dataset | None, Dataset]:
    """Title, training images (None with a trained adaptor) and test images."""
    splits = ("test",) if p.checkpoint else ("train", "test")
    if p.dry_run and not present(p.dataset, p.data_root, *splits):
        title = f"generated images in place of {p.dataset} (dry run)"
        return title, Generated(4, DRY_SIZE, p.seed), Generated(2, DRY_SIZE, p.seed + 1)
    train: restoration.Captioned | None = None
    if p.dataset == "folder":
        title, test = f"images of {p.data_root}", restoration.own(p.data_root)["train"]
        if not p.checkpoint:  # every tenth image is tested
            if len(test) < 2:
                accepted = "two or more to train and to test on, or a `checkpoint`"
                raise BadParameter("data_root", f"{len(test)} image", accepted)
            rows = range(len(test))
            train, test = test.part([i for i in rows if i % 10]), test.part([i for i in rows if i % 10 == 0])
    else:
        title, test = DATASETS[p.dataset].title, restoration.load(p.dataset, p.data_root, "test")
        if not p.checkpoint:
            train = restoration.load(p.dataset, p.data_root, "train")
    if p.dry_run:
        parts = few({"test": test} | ({"train": train} if train else {}), dry_items(p, BATCH))
        train, test = parts.get("train"), parts["test"]
    # before, not after, days of training: a wrong prompt is that of another image of the batch
    batches = test_batches(len(test))
    same = {"wrong semantic prompt": any(len({test.captions[i] for i in batch}) < 2 for batch in batches)}
    same["wrong restoration prompt"] = (
        len(test) < 2 or p.degradation == "real-esrgan" or isinstance(test, restoration.QualityPairs)
    )
    if same.get(p.texts):
        accepted = f"others: {TEST_BATCH} test images in a row have the same prompt, or there is only one"
        raise BadParameter("texts", p.texts, accepted)
    return title, train, test


class Generated(Dataset):
    """Smooth random images with captions, for a dry run."""

    def __init__(self, count: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        small = torch.rand(count, 3, 8, 8, generator=generator)
        self.images = nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.images[index], f"generated image number {index}"


# --- training ---------------------------------------------------------------------------------------------------------


def samples(images: Dataset, size: int, method: str, seed: int) -> Degraded:
    """The training samples of a method: `Degraded`, whose prompts are dropped at random, or always."""
    options = {name: value for name, value in METHODS[method].items() if name != "fusion"}
    return Degraded(images, size, seed=seed, **options)


class Tensors(Dataset):
    """`Sample`s as training reads them: clean and degraded image in [-1, 1], ids (M,) of c_s and c_r.

    A caption that is longer than the text encoder reads is truncated; such a restoration prompt is refused.
    """

    def __init__(self, data: Dataset, pipe: TIPPipeline):
        # not the pipeline itself: a loader's processes would get its weights
        self.data, self.tokenizer = data, pipe.text_encoder if pipe.tokenizer is None else pipe.tokenizer

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample = self.data[index]
        semantic = tokenize(self.tokenizer, [sample.semantic], truncate=True)[0]
        restoration = tokenize(self.tokenizer, [sample.restoration])[0]
        return 2 * sample.clean - 1, 2 * sample.degraded - 1, semantic, restoration


class Learner(nn.Module):
    """From a batch of `Tensors` to the loss; the frozen VAE encodes the images."""

    def __init__(self, pipe: TIPPipeline):
        super().__init__()
        self.model, self.vae, self.scheduler = pipe.model, pipe.vae, pipe.scheduler

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, clean: Tensor, degraded: Tensor, semantic: Tensor, restoration: Tensor) -> Tensor:
        z = tip.to_latents(self.vae, clean).to(degraded.dtype)
        return tip.loss(self.model, (z, degraded, semantic, restoration), self.scheduler)


def training(
    p: Parameters,
    pipe: TIPPipeline,
    data: Dataset | None,
    out: Path | None = None,
    listed: Mapping[str, Sequence[str]] | None = None,
) -> Training:
    """The training of the adaptor of a pipeline, in place.

    Args:
        data: `Sample`s; None: nothing is trained.
        out: the run's folder: `out`/checkpoints has the training in progress, from which the same call resumes.
        listed: names and captions of the images, which identify the training.
    """
    whole = Training(p.method, lambda: Learner(pipe), lambda model, batch: model(*batch), None, dry_run=p.dry_run)
    if data is None:
        return whole
    batch = min(BATCH, len(data))
    steps = max(1, round(EPOCHS * (len(data) // batch)))
    parts = math.ceil(batch / (p.devices * MICRO_BATCH))
    options: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch": batch,
        "optimizer": adamw(LEARNING_RATE, WEIGHT_DECAY, decay="all"),
        "schedule": schedule("constant", min(WARMUP, steps // 2) / steps),
        "callbacks": [ClipNorm(MAX_NORM)],
        "seed": p.seed,
        "hardware": Hardware.of(p, "tip", workers=WORKERS, accumulate=parts),
    }
    if out is not None:
        where = {"weights": base(p), "dataset": p.dataset, "data_root": Path(p.data_root), "size": p.size}
        facts = where | {"adaptor": pipe.adaptor, "micro-batches": parts, "listed": listed}
        name = f"{p.method}, seed {p.seed}"
        options["checkpoint"] = checkpoints.Checkpoint.of(out / "checkpoints", name, 500, **facts)
    return replace(whole, data=Tensors(data, pipe), fit=options, weights=None)


# --- the test ---------------------------------------------------------------------------------------------------------


@typed
def restore(
    pipe: TIPPipeline,
    data: Sequence[Sample],
    kind: str = "own",
    *,
    seed: Whole = 0,
    batch: Count = 8,
    first: Whole = 0,
    hardware: Hardware = CPU,
    **options,
) -> Tensor:
    """Restored images (B, 3, S, S) in [0, 1] of samples, their prompts by `texts`.

    The initial noise of a sample depends only on `seed` and its index, counted from `first`, not on the prompts.
    """
    check_range("data", len(data), 1)
    semantic, restoration = texts(data, kind)
    restored = []
    with evaluating(hardware, pipe.vae, pipe.text_encoder, pipe.unet, pipe.adaptor):
        for start in range(0, len(data), batch):
            some = slice(start, start + batch)
            degraded = torch.stack([sample.degraded for sample in data[some]])
            noise = [torch.Generator().manual_seed(1_000_003 * seed + first + start + i) for i in range(len(degraded))]
            images = pipe(degraded, semantic[some], restoration[some], generator=noise, **options).images
            restored.append(images.cpu())
    return torch.cat(restored)


TEXTS = (
    "own",
    "no text",
    "semantic only",
    "restoration only",
    "blind prompt",
    "wrong semantic prompt",
    "wrong restoration prompt",
    "prompts swapped",
)


def texts(samples: Sequence[Sample], kind: str = "own") -> tuple[list[str], list[str]]:
    """The two prompts of each sample, for the UNet and for the adaptor, by kind of test.

    "own": c_s and c_r. "no text": "" and `BLIND`. "semantic only", also called "blind prompt": c_s and `BLIND`.
    "restoration only": "" and c_r. "wrong ...": that of the next sample with a different one. "prompts swapped": c_r to
    the UNet, c_s to the adaptor.

    Raises `BadParameter`: "wrong ..." of samples whose prompts are all equal.
    """
    check_choice("texts", kind, TEXTS)
    semantic, restoration = [s.semantic for s in samples], [s.restoration for s in samples]

    def other(prompts: list[str]) -> list[str]:
        if len(set(prompts)) < 2:
            raise BadParameter("texts", kind, f"others: all prompts are {prompts[:1]}")
        return [next(t for t in (*prompts[i:], *prompts[:i]) if t != own) for i, own in enumerate(prompts)]

    if kind == "prompts swapped":
        return restoration, semantic
    if kind in ("no text", "restoration only"):
        semantic = [""] * len(samples)
    if kind in ("no text", "semantic only", "blind prompt"):
        restoration = [BLIND] * len(samples)
    if kind == "wrong semantic prompt":
        semantic = other(semantic)
    if kind == "wrong restoration prompt":
        restoration = other(restoration)
    return semantic, restoration


def texts_of(method: str, kind: str = "own") -> str:
    """The kind of prompts that a method is tested with: prompts never read in training are not read in the test."""
    return method if kind == "own" and method in ("semantic only", "restoration only") else kind


def test_batches(count: int) -> list[np.ndarray]:
    """The indices of `count` test images, in batches of `TEST_BATCH` or a few more."""
    return np.array_split(np.arange(count), max(1, count // TEST_BATCH))


def whole_test(
    restored: Callable[..., Tensor],
    test: Dataset,
    kind: str,
    where: torch.device,
    workers: int = 0,
    folder: Path | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Restored and clean images of a whole test, by `test_batches`, on the device `where`.

    A wrong prompt is that of another sample of the same batch.

    Args:
        workers: processes that read and degrade the images.
        folder: where the restored images are saved, batch by batch, see `stored.saved`: a killed test resumes there.
    """
    samples = iter(DataLoader(test, None, num_workers=workers))
    with from_processes():
        for indices in test_batches(len(test)):
            data, first = [next(samples) for _ in indices], int(indices[0])

            def rest(done: int, data: list[Sample] = data, first: int = first) -> Iterator[Tensor]:
                if not done:
                    yield restored(data, kind, first=first)

            (images,) = saved(folder and folder / str(first), 1, rest)
            yield images.to(where), torch.stack([s.clean for s in data]).to(where)


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # SSIM subtracts squares
def score(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], dict[str, str]]:
    """PSNR, SSIM, and LPIPS and FID where their networks are available; the reasons why the others were not run.

    Args:
        pairs: restored and clean images, (B, 3, H, W) in [0, 1] each. They are read once, and scored in batches of
            `MICRO_BATCH` on the device where they are, so a test may be larger than the memory.
    """
    metrics, reasons = perceptual()
    sums, count = {"PSNR": 0.0, "SSIM": 0.0}, 0
    for pair in pairs:
        for restored, clean in zip(*(x.split(MICRO_BATCH) for x in pair), strict=True):
            count += len(clean)
            sums["PSNR"] += float(psnr(restored, clean).sum())
            sums["SSIM"] += float(ssim(restored, clean).sum())
            for name, metric in metrics.items():
                metric.to(clean.device)
                if name == "FID":
                    metric.update(clean, real=True)
                    metric.update(restored, real=False)
                else:
                    metric.update(restored, clean)
    values = {name: total / count for name, total in sums.items()}
    if "FID" in metrics and count < 2:
        del metrics["FID"]
        reasons["FID"] = "not run: it needs two images or more"
    return values | {name: float(metric.compute()) for name, metric in metrics.items()}, reasons


# --- results ----------------------------------------------------------------------------------------------------------

RESULTS = Results.of("tip")


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published and measured numbers by title, of the tables in which something was measured."""
    measured = {name: found for name in RESULTS.cells if (found := cells(rows, name))}
    return with_measured("tip", measured)


def cells(rows: pd.DataFrame, table: str) -> Cells:
    """The real results that belong in a published table, by (method, score): own prompts, no guidance, scale 1; means
    over seeds.

    A method's name includes what is not the default: the size of the images, the steps of sampling, on DIV2K the
    degradation.
    """
    names = {"size": "{} px", "steps": "{} steps"}

    def changed(row: Mapping[str, Any]) -> str:
        return "".join(f", {text.format(row[key])}" for key, text in names.items() if row[key] != RESULTS.usual[key])

    rows = rows.assign(changed=[changed(row) for row in rows.to_dict("records")], ablation=rows.method)
    return RESULTS.filled(rows, RESULTS.cells[table])
