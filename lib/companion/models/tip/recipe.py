"""TIP: what the notebook trains live, at pocket scale or at the size of Stable Diffusion.

The paper's recipe is not known; the one here is ours (section 5 of the spec), `RECIPE` and the arguments of
`data.restoration.Degraded`.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ...data import DATASETS, restoration
from ...data.degradations import Recipe
from ...data.restoration import Degraded, Sample
from ...errors import BadParameter
from ...evaluation.metrics.restoration import perceptual, psnr, ssim
from ...evaluation.tables import upsert_rows
from ...toy.ablations import tip as study
from ...toy.datasets import restoration as pocket
from ...training.fit import fit
from . import model as tip
from .pipeline import TIPPipeline, build, load_adaptor

# what differs from TIP in training: the fusion, which texts are read, what is skipped. The texts that are never read in
# training are not read in the test either.
METHODS: dict[str, dict] = {
    "TIP": {},
    "plain ControlNet": {"fusion": "add"},
    "no text": {"no_caption": 1.0, "blind_prompt": 1.0},
    "semantic only": {"blind_prompt": 1.0},
    "restoration only": {"no_caption": 1.0},
    "no skipping": {"skip": 0.0},
}
RECIPE = {"epochs": 10, "batch": 32, "lr": 1e-5, "weight_decay": 1e-2, "clip": 1.0}
WARMUP, AT_ONCE = 500, 8  # steps of a rate that rises; pictures that go through a device together
TOGETHER = 32  # test pictures that are in memory at a time
WORKERS = min(16, os.cpu_count() or 1)
BASES = {"sd15": "stable-diffusion-v1-5", "sd21": "stable-diffusion-2-1-base"}
HUB = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd21": "stabilityai/stable-diffusion-2-1-base"}
DRY_SIZE, DRY_STEPS = 128, 2
LIVE = ("TIP", "plain ControlNet")  # what a pocket run trains
KEYS = ("base", "mid", "dataset", "degradation", "method", "texts", "guidance", "scale")
SCORES = ("PSNR", "SSIM", "LPIPS", "FID")


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and tested on what.

    Attributes:
        title: of the data.
        methods: what is trained.
        rates: their learning rates.
        build: the pipeline of a method, before training.
        data: the training samples of a method; None where nothing is trained.
        learn: trains the adaptor of a pipeline in place: (pipeline, method, arguments of `fit`) to the history.
        test: the samples of the test.
        restore: (pipeline, samples, kind of texts, arguments of the pipeline) to pictures (B, 3, S, S) in [0, 1].
    """

    title: str
    methods: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str], TIPPipeline]
    data: Callable[[str], Dataset] | None
    learn: Callable[..., list[dict]]
    test: Dataset
    restore: Callable[..., Tensor]


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket pictures are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights, CorruptFile, BadCheckpoint: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    if p.task != "train" and not (p.checkpoint or p.dry_run):
        raise BadParameter("checkpoint", p.checkpoint, f"the folder of a trained adaptor for task = {p.task!r}")
    # said now, not after days of training
    if p.texts == "wrong restoration prompt" and p.degradation == "real-esrgan":
        raise BadParameter("texts", p.texts, "others: all restoration prompts of Real-ESRGAN's pictures are the same")
    if p.texts == "wrong semantic prompt" and p.dataset == "restoration/div2k":
        raise BadParameter("texts", p.texts, "others: the pictures of DIV2K have no captions")
    return _dry(p) if p.dry_run else _paper(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The pocket pictures of the run's seed, and the study's trainings on its shipped, frozen prior.

    The test is the study's "parameterised" one. Size, sampling steps, base and data set are the pocket's own.
    """
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    train, chosen = study.part(root, p.seed, "train"), {m: rates["parameterised", m] for m in LIVE}

    def data(method: str) -> list[Sample]:
        return study.samples(method, train, p.seed)

    def taught(pipe: TIPPipeline, method: str, **changes: object) -> list[dict]:
        return study.train_model(pipe, data(method), chosen[method], p.seed, **({"name": method} | changes))

    def restored(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", **changes: object) -> Tensor:
        return study.restore(pipe, given, kind, p.seed, **({"guidance": p.guidance, "scale": p.scale} | changes))

    return Setting(
        title="pocket pictures",
        methods=LIVE,
        rates=chosen,
        build=functools.partial(study.build, seed=p.seed),
        data=data,
        learn=taught,
        test=study.tested(root, p.seed, "test", "parameterised")[0],
        restore=restored,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def samples(pictures: Dataset, size: int, method: str, seed: int, **options) -> Degraded:
    """The training samples of a method: `Degraded` with the two dice, or without those that it never reads."""
    changed = {k: v for k, v in METHODS[method].items() if k in ("no_caption", "blind_prompt")}
    recipe = Recipe(skip=METHODS[method].get("skip", 0.5))
    return Degraded(pictures, size, recipe, seed=seed, **(changed | options))


class Tensors(Dataset):
    """`Sample`s as training reads them: clean and degraded picture in [-1, 1], ids (M,) of c_s and c_r.

    A caption that is longer than the text encoder reads is cut; a restoration prompt is refused.
    """

    def __init__(self, data: Dataset, pipe: TIPPipeline):
        self.data, self.pipe = data, pipe

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample = self.data[index]
        semantic = self.pipe.ids([sample.semantic], cut=True)[0]
        return 2 * sample.clean - 1, 2 * sample.degraded - 1, semantic, self.pipe.ids([sample.restoration])[0]


class Learner(nn.Module):
    """The loss of a batch of `Tensors`: the VAE, which is frozen too, encodes on the way."""

    def __init__(self, pipe: TIPPipeline):
        super().__init__()
        self.model, self.vae, self.scheduler = pipe.model, pipe.vae, pipe.scheduler

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, clean: Tensor, degraded: Tensor, semantic: Tensor, restoration: Tensor) -> Tensor:
        z = tip.latents(self.vae, clean).to(degraded.dtype)
        return tip.loss(self.model, (z, degraded, semantic, restoration), self.scheduler)


def learn(
    p: SimpleNamespace,
    pipe: TIPPipeline,
    data: Dataset,
    at_once: int = AT_ONCE,
    kept: Path | None = None,
    **changes: object,
) -> list[dict]:
    """Train the adaptor of a pipeline, in place; return the history.

    Args:
        data: `Sample`s.
        at_once: pictures that go through a device together; the gradients of a step's pictures are added up.
        kept: folder in which a training that was stopped goes on where it was, and one that is done is only read; what
            it depends on is in the file's name.
        changes: arguments of `fit`.
    """
    options = (
        RECIPE
        | {
            "seed": p.seed,
            "accelerator": p.accelerator,
            "devices": p.devices,
            "precision": p.precision,
            "workers": WORKERS,
            "schedule": "constant",
            "decay": "all",
        }
        | changes
    )
    options["batch"] = min(options["batch"], len(data))
    steps = max(1, round(options["epochs"] * (len(data) // options["batch"])))
    options = {"warmup": min(WARMUP, steps // 2) / steps} | options
    parts = math.ceil(options["batch"] / (options["devices"] * at_once))
    if kept is not None:
        known = (base(p), p.mid, p.dataset, str(Path(p.data_root).resolve()), p.size, parts)
        file = kept / f"{options.get('name', 'adaptor')} seed {p.seed} {zlib.crc32(repr(known).encode()):08x}.pt"
        options |= {"checkpoint": file, "checkpoint_every": 500, "resume": True}
    place = pipe.unet.device
    history = fit(Learner(pipe), lambda model, items: model(*items), Tensors(data, pipe), accumulate=parts, **options)
    pipe.to(place)  # `fit` leaves what it trained on the CPU
    return history


@torch.no_grad()
def cached(pipe: TIPPipeline, given: Sequence[Sample], batch: int = 32) -> TensorDataset:
    """Samples as `tip.loss` reads them, encoded once and kept: latents, degraded pictures in [-1, 1], both states."""
    parts = []
    for start in range(0, len(given), batch):
        some = [given[i] for i in range(start, min(start + batch, len(given)))]
        clean, degraded = (2 * torch.stack([s[i] for s in some]) - 1 for i in (0, 1))
        z = tip.latents(pipe.vae, clean.to(pipe.vae.device)).cpu()
        parts.append((z, degraded, pipe.states([s.semantic for s in some]), pipe.states([s.restoration for s in some])))
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


# --- the test ---------------------------------------------------------------------------------------------------------


def restore(
    pipe: TIPPipeline,
    given: Sequence[Sample],
    kind: str = "own",
    *,
    seed: int = 0,
    batch: int = 8,
    first: int = 0,
    **options,
) -> Tensor:
    """Restored pictures (B, 3, S, S) in [0, 1] of samples, their texts by `data.restoration.texts`.

    The start noise of a sample depends on `seed` and its place alone, counted from `first`: whatever the texts, it is
    the same.
    """
    semantic, restoration_prompts = restoration.texts(given, kind)
    found = []
    for start in range(0, len(given), batch):
        place = range(start, min(start + batch, len(given)))
        noise = [torch.Generator().manual_seed(1_000_003 * seed + first + i) for i in place]
        pictures = torch.stack([given[i].degraded for i in place])
        texts = [semantic[i] for i in place], [restoration_prompts[i] for i in place]
        found.append(pipe(pictures, *texts, generator=noise, **options).images.cpu())
    return torch.cat(found)


def texts_of(method: str, kind: str = "own") -> str:
    """The kind of texts that a method is tested with: one trained without a text is not given it."""
    return method if kind == "own" and method in ("no text", "semantic only", "restoration only") else kind


def whole_test(found: Setting, pipe: TIPPipeline, kind: str = "own") -> Iterator[tuple[Tensor, Tensor]]:
    """Restored and clean pictures of the whole test of a full-size setting, some `TOGETHER` at a time.

    A wrong text is that of another sample among those of its time.
    """
    count = len(found.test)
    for place in np.array_split(np.arange(count), max(1, count // TOGETHER)):
        given = [found.test[int(i)] for i in place]
        yield found.restore(pipe, given, kind, first=int(place[0])), torch.stack([s.clean for s in given])


@torch.no_grad()
def score(pictures: Iterable[tuple[Tensor, Tensor]], download: bool = False) -> tuple[dict[str, float], dict[str, str]]:
    """PSNR and SSIM, and LPIPS and FID where their networks are here; of the others why they are not run.

    Args:
        pictures: restored and clean ones, (B, 3, H, W) in [0, 1] each; of them no more than `AT_ONCE` are looked at
            together, and none is kept, so a test may be larger than the memory.
    """
    metrics, reasons = perceptual(download)
    sums, count = {"PSNR": 0.0, "SSIM": 0.0}, 0
    for pair in pictures:
        for restored, clean in zip(*(x.split(AT_ONCE) for x in pair), strict=True):
            count += len(clean)
            sums["PSNR"] += float(psnr(restored, clean).sum())
            sums["SSIM"] += float(ssim(restored, clean).sum())
            if "LPIPS" in metrics:
                metrics["LPIPS"].update(restored, clean)
            if "FID" in metrics:
                metrics["FID"].update(clean, real=True)
                metrics["FID"].update(restored, real=False)
    values = {name: total / count for name, total in sums.items()}
    if "FID" in metrics and count < 2:
        del metrics["FID"]
        reasons["FID"] = "not run: it wants two pictures or more"
    return values | {name: float(metric.compute()) for name, metric in metrics.items()}, reasons


# set and degradation of each published table; None: either
TABLES = {
    "comparison-parameterised": ("restoration/coco", "parameterised"),
    "comparison-real-esrgan": ("restoration/coco", "real-esrgan"),
    "comparison-div2k": ("restoration/div2k", None),
    "ablations": ("restoration/coco", "parameterised"),
}
ABLATIONS = {
    "plain ControlNet": "fusion by addition (ControlNet)",
    "TIP": "fusion by modulation (TIP)",
    "restoration only": "without the semantic prompt",
    "semantic only": "without the restoration prompt",
}
"""What the rows of the table of ablations are called there."""


def cells(rows: pd.DataFrame, table: str) -> dict[tuple[str, str], float]:
    """Of the real results those of a published table, by (method, score): true texts, no guidance, the dial at 1.

    A method's name says where it is not the default: the diffusion model, the middle, on DIV2K the degradation.
    """
    dataset, degradation = TABLES[table]
    found = {}
    for row in rows.to_dict("records"):
        plain = row["texts"] == "own" and row["guidance"] == 1 and row["scale"] == 1
        if row["dataset"] != dataset or not plain or degradation not in (None, row["degradation"]):
            continue
        if table == "ablations" and row["method"] not in ABLATIONS:
            continue
        name = ABLATIONS[row["method"]] if table == "ablations" else row["method"]
        changed = [row["base"] * (row["base"] != "sd15"), f"middle: {row['mid']}" * (row["mid"] != "modulate")]
        changed += [row["degradation"] * (degradation is None and row["degradation"] != "parameterised")]
        name = ", ".join([name, *filter(None, changed)])
        found |= {(name, score): row[score] for score in SCORES if pd.notna(row.get(score))}
    return found


def results(p: SimpleNamespace, out: Path, values: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The real results of all runs into `out`, one row for each set, degradation, method, kind of texts and dial."""
    row = {key: getattr(p, key) for key in KEYS} | dict(values or {})
    return upsert_rows(out / "measured.csv", KEYS, SCORES, [row] if values else [])


# --- at full size -----------------------------------------------------------------------------------------------------


def _setting(
    p: SimpleNamespace,
    title: str,
    make: Callable[[str], TIPPipeline],
    train: Dataset | None,
    test: Degraded,
    size: int,
    steps: int,
    **options: object,
) -> Setting:
    def data(method: str) -> Degraded:
        return samples(train, size, method, p.seed)

    def taught(pipe: TIPPipeline, method: str, **changes: object) -> list[dict]:
        return learn(p, pipe, data(method), **({"name": method} | options | changes))

    def restored(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", **changes: object) -> Tensor:
        return restore(
            pipe, given, kind, **({"steps": steps, "guidance": p.guidance, "scale": p.scale, "seed": p.seed} | changes)
        )

    return Setting(
        title=title,
        methods=(p.method,),
        rates={p.method: RECIPE["lr"]},
        build=make,
        data=None if train is None else data,
        learn=taught,
        test=test,
        restore=restored,
    )


def _fusion(p: SimpleNamespace, method: str) -> dict[str, str]:
    fusion = METHODS[method].get("fusion", "modulate")
    return {"fusion": fusion, "mid": "add" if fusion == "add" and p.mid == "modulate" else p.mid}


def base(p: SimpleNamespace) -> str:
    """Where the frozen model is: the parameter `weights`, the usual folder below `data_root`, or the hub's cache."""
    usual = Path(p.data_root) / "weights" / BASES[p.base]
    return p.weights or (str(usual) if usual.is_dir() else HUB[p.base])


def parted(own: restoration.Captioned) -> tuple[restoration.Captioned, restoration.Captioned]:
    """A folder of one's own in a part to train on and, every tenth picture, one to test on."""
    if len(own) < 2:
        raise BadParameter("data_root", f"{len(own)} picture", "two or more to train and to test on, or a `checkpoint`")

    def part(chosen: Sequence[int]) -> restoration.Captioned:
        lists = ([values[i] for i in chosen] for values in (own.sources, own.captions))
        return restoration.Captioned(own.dataset, own.root, *lists)

    return part([i for i in range(len(own)) if i % 10]), part(range(0, len(own), 10))


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """COCO, DIV2K or a folder of one's own ("folder": `data_root` itself), on a released Stable Diffusion."""
    if p.dataset == "folder":
        own = restoration.own_folder(p.data_root)
        train, test = (None, own) if p.checkpoint else parted(own)
    else:
        test = restoration.load(p.dataset, p.data_root, "test")
        train = None if p.checkpoint else restoration.load(p.dataset, p.data_root, "train")

    def make(method: str) -> TIPPipeline:
        pipe = TIPPipeline.from_stable_diffusion(base(p), **_fusion(p, method))
        if p.checkpoint:
            pipe.register_modules(adaptor=load_adaptor(p.checkpoint, pipe.unet))
        device = "cuda" if p.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
        return pipe.to(device)

    title = DATASETS[p.dataset].title if p.dataset in DATASETS else f"pictures of {p.data_root}"
    fixed = Degraded(test, p.size, seed=p.seed, **restoration.TASKS[p.degradation])
    return _setting(p, title, make, train, fixed, p.size, p.steps, kept=out / "trained")


class Generated(Dataset):
    """Pictures that are no photographs, with captions, for a dry run."""

    def __init__(self, count: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        small = torch.rand(count, 3, 8, 8, generator=generator)
        self.pictures = nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.pictures[index], f"generated picture number {index}"


def _dry(p: SimpleNamespace) -> Setting:
    """The full-size model with random weights and two optimiser steps of two generated pictures each.

    To fit a laptop's memory the frozen UNet is held in bfloat16, and pictures are 128 pixels a side (latents of 16).
    """
    pictures = Generated(4, DRY_SIZE, p.seed)

    def make(method: str) -> TIPPipeline:
        torch.manual_seed(p.seed)
        pipe = build(p.base, **_fusion(p, method))
        pipe.unet.bfloat16()
        return pipe

    test = Degraded(Generated(2, DRY_SIZE, p.seed + 1), DRY_SIZE, seed=p.seed, **restoration.TASKS[p.degradation])
    title = "generated pictures (dry run: losses and scores mean nothing)"
    options = {"epochs": 1, "batch": 2, "warmup": 0.0, "workers": 0, "accelerator": "cpu", "precision": "32-true"}
    return _setting(p, title, make, pictures, test, DRY_SIZE, DRY_STEPS, **options)
