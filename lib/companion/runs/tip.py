"""TIP: what the notebook trains live, at pocket scale or at the size of Stable Diffusion.

The paper's recipe is not known; the one here is ours (section 5 of the spec), `RECIPE` and the arguments of
`data.restoration.Degraded`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from .. import report
from ..data import DATASETS, restoration
from ..data.degradations import Recipe
from ..data.restoration import Degraded, Sample
from ..errors import BadParameter
from ..fit import fit
from ..metrics.restoration import perceptual, psnr, ssim
from ..models import tip
from ..models.tip_pipeline import TIPPipeline, build, load_adaptor
from ..pocket import restoration as pocket
from ..studies import tip as study

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
WORKERS = min(16, os.cpu_count() or 1)
BASES = {"sd15": "stable-diffusion-v1-5", "sd21": "stable-diffusion-2-1-base"}
HUB = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1-base",
}
SETS = ("restoration/coco", "restoration/div2k", "folder")
DRY_SIZE, DRY_STEPS = 128, 2
LIVE = ("TIP", "plain ControlNet")  # what a pocket run trains
KEYS = ("base", "dataset", "degradation", "method", "texts")
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
    if p.method not in METHODS:
        raise BadParameter("method", p.method, tuple(METHODS))
    if p.dataset not in SETS:
        raise BadParameter("dataset", p.dataset, SETS)
    return _dry(p) if p.dry_run else _paper(p)


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
    p: SimpleNamespace, pipe: TIPPipeline, data: Dataset, at_once: int = AT_ONCE, **changes: object
) -> list[dict]:
    """Train the adaptor of a pipeline, in place; return the history.

    Args:
        data: `Sample`s.
        at_once: pictures that go through a device together; the gradients of a step's pictures are added up.
        changes: arguments of `fit`.
    """
    options = RECIPE | {"seed": p.seed, "accelerator": p.accelerator, "devices": p.devices, "precision": p.precision,
                        "workers": WORKERS, "schedule": "constant", "decay": "all"} | changes  # fmt: skip
    options["batch"] = min(options["batch"], len(data))
    steps = max(1, round(options["epochs"] * (len(data) // options["batch"])))
    options = {"warmup": min(WARMUP, steps // 2) / steps} | options
    parts = math.ceil(options["batch"] / (options["devices"] * at_once))
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


def restore(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", *, seed: int = 0, batch: int = 8,
            **options) -> Tensor:  # fmt: skip
    """Restored pictures (B, 3, S, S) in [0, 1] of samples, their texts by `data.restoration.texts`.

    The start noise of a sample depends on `seed` and its place alone: whatever the texts, it is the same.
    """
    semantic, restoration_prompts = restoration.texts(given, kind)
    found = []
    for start in range(0, len(given), batch):
        place = range(start, min(start + batch, len(given)))
        noise = [torch.Generator().manual_seed(1_000_003 * seed + i) for i in place]
        pictures = torch.stack([given[i].degraded for i in place])
        texts = [semantic[i] for i in place], [restoration_prompts[i] for i in place]
        found.append(pipe(pictures, *texts, generator=noise, **options).images.cpu())
    return torch.cat(found)


def texts_of(method: str, kind: str = "own") -> str:
    """The kind of texts that a method is tested with: one trained without a text is not given it."""
    return method if kind == "own" and method in ("no text", "semantic only", "restoration only") else kind


def score(restored: Tensor, clean: Tensor, download: bool = False) -> tuple[dict[str, float], dict[str, str]]:
    """PSNR and SSIM, and LPIPS and FID where their networks are here; of the others why they are not run."""
    values = {"PSNR": float(psnr(restored, clean).mean()), "SSIM": float(ssim(restored, clean).mean())}
    metrics, reasons = perceptual(download)
    if "LPIPS" in metrics:
        metrics["LPIPS"].update(restored, clean)
        values["LPIPS"] = float(metrics["LPIPS"].compute())
    if "FID" in metrics:
        if len(clean) < 2:
            reasons["FID"] = "not run: it wants two pictures or more"
        else:
            metrics["FID"].update(clean, real=True)
            metrics["FID"].update(restored, real=False)
            values["FID"] = float(metrics["FID"].compute())
    return values, reasons


def results(p: SimpleNamespace, out: Path, values: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The real results of all runs into `out`, one row for each set, degradation, method and kind of texts."""
    row = {key: getattr(p, key) for key in KEYS} | dict(values or {})
    return report.gather(out / "results.csv", KEYS, SCORES, [row] if values else [])


# --- at full size -----------------------------------------------------------------------------------------------------


def _setting(p: SimpleNamespace, title: str, make: Callable[[str], TIPPipeline], train: Dataset | None, test: Degraded,
             size: int, steps: int, **options: object) -> Setting:  # fmt: skip
    def data(method: str) -> Degraded:
        return samples(train, size, method, p.seed)

    def taught(pipe: TIPPipeline, method: str, **changes: object) -> list[dict]:
        return learn(p, pipe, data(method), **({"name": method} | options | changes))

    def restored(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", **changes: object) -> Tensor:
        return restore(pipe, given, kind, **({"steps": steps, "guidance": p.guidance, "scale": p.scale, "seed": p.seed}
                                             | changes))  # fmt: skip

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


def _paper(p: SimpleNamespace) -> Setting:
    """COCO, DIV2K or a folder of one's own ("folder": `data_root` itself), on a released Stable Diffusion."""
    if p.dataset == "folder":
        train = test = restoration.own_folder(p.data_root)
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
    return _setting(p, title, make, None if p.checkpoint else train, fixed, p.size, p.steps)


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
