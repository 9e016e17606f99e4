"""TIP's ablations on synthetic images: the value of each prompt, the effect of wrong ones, modulation against addition.

The diffusion model is trained once and frozen. Each seed has its own images, degraded once, and for each network its
own adaptor. All networks are trained for the same number of steps on the same images; their learning rate is chosen
from one grid by PSNR on validation images with their own prompts, averaged over the tasks. Tasks:
"heavy" images have lost their texture, "mild" ones can be distinguished only by the restoration prompt, "parameterised"
ones are degraded as in training.

The prompts at test are those of `degradations.texts`: a network is trained once, for all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ...evaluation.metrics.restoration import psnr, ssim
from ...models.tip import model as tip
from ...models.tip import recipe
from ...models.tip.degradations import Degraded, Op, Sample, degrade, prompt, texts
from ...models.tip.pipeline import TIPPipeline
from ...training.fit import CPU, History, fit
from ...training.schedules import adamw
from ..datasets import restoration as pocket
from ..encoders import texture_prior as prior
from . import last_loss, reader, study_root

LEARNING_RATES = [1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]
METRIC = "PSNR"
STEPS, BATCH, WEIGHT_DECAY = 350, 48, 0.01
BUDGET = f"{STEPS} steps, batch {BATCH}"
BLIND_PROMPT, NO_CAPTION = 0.15, 0.15  # shares of training images whose c_r is blind, whose c_s is empty
DRAWS = 2  # degradations of each training image
SAMPLING = 10  # steps of DDIM
EACH = 96  # test images of a task
LOSS_TIMES = (300, 1000)  # t of the held-out loss: at smaller t the prompts make no difference

NETWORKS = ("TIP", "no text", "semantic only", "restoration only", "plain ControlNet", "no skipping")
# a trained TIP with other prompts at test
MISLED = ("blind prompt", "wrong semantic prompt", "wrong restoration prompt", "prompts swapped")
METHODS = [*NETWORKS, *MISLED]
# all heavy images have the same restoration prompt, so none of them is a wrong one
TASKS = {"heavy": [m for m in METHODS if m != "wrong restoration prompt"], "mild": METHODS, "parameterised": METHODS}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(root: str | Path, seed: int) -> None:
    """Write the images of a seed."""
    pocket.write(study_root(root, seed), seed)


@reader(6)
def part(root: str, seed: int, split: str) -> pocket.Part:
    """A split in memory."""
    return pocket.read(study_root(root, seed), split)


def degraded(found: pocket.Part, ops: Sequence[tuple[Op, ...]], seed: int) -> list[Sample]:
    """Samples of images degraded by `ops`, with their true prompts."""
    return [
        Sample(image, degrade(image, o, (seed, i), edge=pocket.EDGE), caption, prompt(o), o)
        for i, (image, caption, o) in enumerate(zip(found.images, found.captions, ops, strict=True))
    ]


@functools.lru_cache(maxsize=12)
def tested(root: str, seed: int, split: str, task: str) -> tuple[list[Sample], pocket.Part]:
    """The samples of a task, and their clean images with captions, textures and contrasts."""
    every = part(root, seed, split)
    if task == "heavy":
        found = every.scenes(1.0)
        ops: Sequence[tuple[Op, ...]] | None = [pocket.HEAVY] * len(found)
    elif task == "mild":
        # alternating, so that the next image's prompt is a wrong one
        groups = [every.scenes(contrast) for contrast, _ in pocket.MILD]
        count = min(map(len, groups))
        order = [
            (group.images[i], *(a[i] for a in (group.captions, group.kinds, group.contrasts)))
            for i in range(count)
            for group in groups
        ]
        images, *rest = zip(*order, strict=True)
        found = pocket.Part(torch.stack(images), *map(tuple, rest))
        ops = [op for _, op in pocket.MILD] * count
    else:
        found, ops = every.scenes(), None
    found = found.where(list(range(min(EACH, len(found)))))
    if ops is None:
        # an image without degradation has no prompt: excluded here, not in training
        drawn = [
            next(filter(None, (pocket.RECIPE.draw((seed, i, again)) for again in range(99)))) for i in range(len(found))
        ]
        return degraded(found, drawn, seed), found
    return degraded(found, ops[: len(found)], seed), found


def samples(network: str, found: pocket.Part, seed: int) -> list[Sample]:
    """The training samples of a network: every image with `DRAWS` random degradations."""
    options = {"no_caption": NO_CAPTION, "blind_prompt": BLIND_PROMPT} | recipe.METHODS[network]
    options.pop("fusion", None)
    ops = dataclasses.replace(pocket.RECIPE, skip=options.pop("skip", pocket.RECIPE.skip))
    options |= {"share_blind": 0.0, "fresh": False, "edge": pocket.EDGE}
    draws = (Degraded(found, pocket.SIZE, ops, seed=DRAWS * seed + i, **options) for i in range(DRAWS))
    return [data[i] for data in draws for i in range(len(data))]


# --- training ---------------------------------------------------------------------------------------------------------


def build(network: str, seed: int) -> TIPPipeline:
    """The pipeline of a network on the shipped prior, before training; equal initialisation for all of a seed."""
    return prior.build(recipe.METHODS[network].get("fusion", "modulate"), seed=seed)


def train_model(pipe: TIPPipeline, data: Sequence[Sample], learning_rate: float, seed: int, name: str) -> History:
    """Train the adaptor of a pipeline in place; return its history."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return tip.loss(model, batch, pipe.scheduler, prior.times(len(batch[0]), batch[0].device))

    return fit(
        pipe.model,
        loss,
        cached(pipe, data),
        epochs=STEPS / (len(data) // BATCH),
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=name,
    )


@torch.no_grad()
def cached(pipe: TIPPipeline, data: Sequence[Sample]) -> TensorDataset:
    """Samples encoded in advance, as `tip.loss` reads them: latents, degraded images in [-1, 1], states of c_s, c_r."""
    clean, degraded = (2 * torch.stack([s[i] for s in data]) - 1 for i in (0, 1))
    states = (pipe.states([s.semantic for s in data]), pipe.states([s.restoration for s in data]))
    return TensorDataset(tip.to_latents(pipe.vae, clean), degraded, *states)


# --- the tests --------------------------------------------------------------------------------------------------------


def noise(count: int, seed: int, side: int = pocket.SIZE) -> Tensor:
    """The initial noise of `count` images, the same for all methods and prompts."""
    size = (count, prior.CHANNELS, side // prior.PATCH, side // prior.PATCH)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def texts_of(method: str) -> str:
    """The kind of prompts that a method is tested with, one of `degradations.TEXTS`."""
    return method if method in MISLED else recipe.texts_of(method)


def restore(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", *, seed: int, **options) -> Tensor:
    """Restored images (n, 3, 16, 16) of samples, their prompts by `degradations.texts`."""
    semantic, restoration = texts(given, kind)
    images = torch.stack([s.degraded for s in given])
    settings = {"steps": SAMPLING, "latents": noise(len(given), seed, images.shape[-1])} | options
    return pipe(images, semantic, restoration, **settings).images


@torch.no_grad()
def held_out(pipe: TIPPipeline, given: Sequence[Sample], kind: str, seed: int, scale: float = 1.0) -> float:
    """The denoising loss on held-out images, with the same times and noise for all methods and prompts."""
    clean, bad = (2 * torch.stack([s[i] for s in given]) - 1 for i in (0, 1))
    z, generator = tip.to_latents(pipe.vae, clean), torch.Generator().manual_seed(seed)
    t = torch.randint(*LOSS_TIMES, (len(z),), generator=generator)
    semantic, restoration = texts(given, kind)
    drawn = torch.randn(z.shape, generator=generator)
    found = pipe.model(
        pipe.scheduler.add_noise(z, drawn, t), t, pipe.states(semantic), pipe.states(restoration), bad, scale
    )
    return float(F.mse_loss(found, tip.target(pipe.scheduler, z, drawn, t)))


def followed(restored: Tensor, found: pocket.Part, captions: Sequence[str]) -> dict[str, float]:
    """In percent: how often the restored texture is the clean image's, and how often that of its semantic prompt."""
    seen = pocket.seen_kind(restored)
    row = {"texture": 100 * sum(a == b for a, b in zip(seen, found.kinds, strict=True)) / len(seen)}
    if set(captions) <= set(pocket.CAPTIONS):
        same = sum(pocket.caption(a) == text for a, text in zip(seen, captions, strict=True))
        row["follows the text"] = 100 * same / len(seen)
    return row


def layout_lead(restored: Tensor, clean: Tensor) -> float:
    """At a quarter of the size: PSNR to the own clean image minus PSNR to the next one, dB."""
    small, own = (F.avg_pool2d(x, pocket.SIZE // 4) for x in (restored, clean))
    return float((psnr(small, own) - psnr(small, own.roll(-1, 0))).mean())


def walk(pipe: TIPPipeline, root: str, seed: int, split: str) -> list[float]:
    """Contrast of images restored with each number of `pocket.WALK`, in percent of their brightness."""
    contrast, op, numbers = pocket.WALK
    found = part(root, seed, split).scenes(contrast)
    found = found.where(list(range(min(EACH // 2, len(found)))))
    given = degraded(found, [(op,)] * len(found), seed)
    strengths = []
    for number in numbers:
        now = [s._replace(restoration=prompt((Op(op.kind, number),))) for s in given]
        seen = pocket.seen_contrast(restore(pipe, now, seed=seed), found.kinds)
        strengths.append(100 * float(seen.mean()))
    return strengths


def score(pipe: TIPPipeline, task: str, kind: str, root: str, seed: int, split: str) -> dict[str, float]:
    """All measures of a task with one kind of prompts."""
    given, found = tested(root, seed, split, task)
    restored, clean = restore(pipe, given, kind, seed=seed), found.images
    semantic, _ = texts(given, kind)
    frozen = held_out(pipe, given, kind, seed, scale=0.0)
    own = held_out(pipe, given, kind, seed)
    row = {"PSNR": float(psnr(restored, clean).mean()), "SSIM": 100 * float(ssim(restored, clean).mean())}
    row["PSNR input"] = float(psnr(torch.stack([s.degraded for s in given]), clean).mean())
    row |= followed(restored, found, semantic)
    row |= {"layout lead": layout_lead(restored, clean), "held-out loss": own, "loss gain": 100 * (1 - own / frozen)}
    wanted = pocket.seen_contrast(clean, found.kinds)
    row["contrast off"] = 100 * float((pocket.seen_contrast(restored, found.kinds) - wanted).abs().mean())
    if task == "mild" and kind == "own":
        steps = walk(pipe, root, seed, split)
        names = [f"contrast at {number:.1f}" for number in pocket.WALK[2]]
        row |= dict(zip(names, steps, strict=True))
        row["smallest rise"] = min(b - a for a, b in itertools.pairwise(steps))
    return row


@functools.lru_cache(maxsize=12)
def trained(network: str, learning_rate: float, root: str, seed: int) -> tuple[TIPPipeline, dict]:
    """Train a network; return its pipeline, its loss and its trainable parameters."""
    pipe = build(network, seed)
    history = train_model(pipe, samples(network, part(root, seed, "train"), seed), learning_rate, seed, network)
    return pipe, {"loss": last_loss(history), "trained": sum(p.numel() for p in pipe.adaptor.parameters())}


@functools.lru_cache(maxsize=12)
def validation_psnr(network: str, learning_rate: float, root: str, seed: int) -> float:
    """PSNR on validation images with the network's own prompts, mean over the tasks."""
    pipe, _ = trained(network, learning_rate, root, seed)
    found = [
        psnr(restore(pipe, given, texts_of(network), seed=seed), own.images).mean()
        for given, own in (tested(root, seed, "val", task) for task in TASKS)
    ]
    return float(torch.stack(found).mean())


def train(method: str, task: str, learning_rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Train the network of a method, once, and score it.

    `split` "select": PSNR on validation images of all tasks with the network's own prompts; "test": the task's test
    images with the method's prompts. Returns a row: PSNR and layout lead in dB; SSIM, texture, gain in held-out
    loss over the frozen model, contrast in percent; loss of the last 20 steps and trainable parameters.
    """
    network, root = "TIP" if method in MISLED else method, str(root)
    pipe, facts = trained(network, learning_rate, root, seed)
    if split == "select":
        row = {"PSNR": validation_psnr(network, learning_rate, root, seed)}
    else:
        row = score(pipe, task, texts_of(method), root, seed, "test")
    return {name: round(value, 3 if name != "held-out loss" else 5) for name, value in row.items()} | facts
