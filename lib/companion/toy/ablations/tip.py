"""TIP at pocket scale: what each of the two texts is worth, what a wrong one does, scaling against adding.

The diffusion model is trained once and frozen; each seed has pictures of its own, degraded once, and an adaptor of its
own for each network. All networks are trained for the same number of steps on the same pictures; their learning rate is
chosen from one grid by PSNR on validation pictures with their right texts, averaged over the tasks, never by a wrong
text. Tasks (section 14): "heavy" pictures have lost their texture, "mild" ones could be each other but for the
restoration prompt, "parameterised" ones are drawn as in training.

The texts at test are those of `data.restoration.texts`: a network is trained once, and all that is asked of it is kept.
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

from ...data.degradations import Op, degrade, prompt
from ...data.restoration import Degraded, Sample, texts
from ...evaluation.metrics.restoration import psnr, ssim
from ...models.tip import model as tip
from ...models.tip.pipeline import TIPPipeline
from ...training.fit import fit
from ..datasets import restoration as pocket
from ..encoders import texture_prior as prior

LEARNING_RATES = [1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]
SEEDS = [0, 1, 2, 3, 4]
SELECTION_SEED = 100
METRIC = "PSNR"
STEPS, BATCH = 350, 48  # section 14
RECIPE = {"batch": BATCH, "weight_decay": 0.01, "accelerator": "cpu"}
UNNAMED, UNTOLD = 0.15, 0.15  # shares of training pictures whose c_r is blind, whose c_s is empty
DRAWS = 2  # times that each training picture is degraded
SAMPLING = 10  # steps of DDIM
EACH = 96  # test pictures of a task
LOSS_TIMES = (300, 1000)  # t of the held-out loss: below it nothing is left to say (section 14)

# what is trained: what differs from TIP in fusion, in the texts that are read, and in what is skipped
NETWORKS: dict[str, dict] = {
    "TIP": {},
    "no text": {"no_caption": 1.0, "blind_prompt": 1.0},
    "semantic only": {"blind_prompt": 1.0},
    "restoration only": {"no_caption": 1.0},
    "plain ControlNet": {"fusion": "add"},
    "no skipping": {"skip": 0.0},
}
# a trained TIP that is given other texts at test
MISLED = ("blind prompt", "wrong semantic prompt", "wrong restoration prompt", "prompts swapped")
METHODS = [*NETWORKS, *MISLED]
# all heavy pictures have one restoration prompt: there is no wrong one among them
TASKS = {"heavy": [m for m in METHODS if m != "wrong restoration prompt"], "mild": METHODS, "parameterised": METHODS}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(root: str | Path) -> None:
    """Write the pictures of every seed: each seed has its own, so that the spread holds their chance too."""
    for seed in (SELECTION_SEED, *SEEDS):
        pocket.write(folder(root, seed), seed)


def folder(root: str | Path, seed: int) -> Path:
    """The data root of a seed."""
    return Path(root) / f"seed{seed}"


@functools.lru_cache(maxsize=6)
def part(root: str, seed: int, split: str) -> pocket.Part:
    """A split in memory."""
    return pocket.read(folder(root, seed), split)


def done(found: pocket.Part, ops: Sequence[tuple[Op, ...]], seed: int) -> list[Sample]:
    """Samples of pictures that are degraded as `ops` says, with their true texts."""
    return [
        Sample(image, degrade(image, o, (seed, i), edge=pocket.EDGE), caption, prompt(o), o)
        for i, ((image, caption), o) in enumerate(zip(found, ops, strict=True))
    ]


@functools.lru_cache(maxsize=12)
def tested(root: str, seed: int, split: str, task: str) -> tuple[list[Sample], pocket.Part]:
    """The samples of a task, and their pictures with what is known of them."""
    every = part(root, seed, split)
    if task == "heavy":
        found = every.scenes(1.0)
        ops = [pocket.HEAVY] * len(found)
    elif task == "mild":
        # one of each in turn: the next picture's prompt is a wrong one
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
        # a picture that nothing was done to has no text: it is left out here, not in training
        drawn = [
            next(filter(None, (pocket.RECIPE.draw((seed, i, again)) for again in range(99)))) for i in range(len(found))
        ]
        return done(found, drawn, seed), found
    return done(found, ops[: len(found)], seed), found


def samples(network: str, found: pocket.Part, seed: int) -> list[Sample]:
    """What a network is trained on: every picture `DRAWS` times, degraded anew."""
    options = {"no_caption": UNTOLD, "blind_prompt": UNNAMED} | NETWORKS[network]
    options.pop("fusion", None)
    recipe = dataclasses.replace(pocket.RECIPE, skip=options.pop("skip", pocket.RECIPE.skip))
    given = []
    for again in range(DRAWS):
        data = Degraded(
            found,
            pocket.SIZE,
            recipe,
            share_blind=0.0,
            fresh=False,
            flip=False,
            seed=DRAWS * seed + again,
            edge=pocket.EDGE,
            **options,
        )
        given += [data[i] for i in range(len(data))]
    return given


# --- training ---------------------------------------------------------------------------------------------------------


def build(network: str, seed: int) -> TIPPipeline:
    """The pipeline of a network on the shipped prior, before training. All of a seed begin alike."""
    return prior.build(NETWORKS[network].get("fusion", "modulate"), seed=seed)


def lessons(pipe: TIPPipeline, given: Sequence[Sample]) -> TensorDataset:
    """Samples as they are trained on: latents, degraded pictures in [-1, 1], states of c_s and of c_r."""
    clean, degraded = (2 * torch.stack([s[i] for s in given]) - 1 for i in (0, 1))
    states = (pipe.states([s[i] for s in given]) for i in (2, 3))
    return TensorDataset(tip.latents(pipe.vae, clean), degraded, *states)


def train_model(pipe: TIPPipeline, given: Sequence[Sample], rate: float, seed: int, **options) -> list[dict]:
    """Train the adaptor of a pipeline in place; return its history. `options` go to `fit`."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return tip.loss(model, batch, pipe.scheduler, prior.POWER)

    epochs = STEPS / (len(given) // BATCH)
    settings = RECIPE | {"epochs": epochs, "lr": rate, "seed": seed} | options
    return fit(pipe.model, loss, lessons(pipe, given), **settings)


# --- the tests --------------------------------------------------------------------------------------------------------


def noise(count: int, seed: int, side: int = pocket.SIZE) -> Tensor:
    """The start noise of `count` pictures: whatever the method and its texts, the same."""
    size = (count, prior.CHANNELS, side // prior.PATCH, side // prior.PATCH)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def asked(method: str) -> str:
    """The texts that a method is tested with, one of `data.restoration.TEXTS`: it is not given what it never read."""
    return method if method in (*MISLED, "no text", "semantic only", "restoration only") else "own"


def restore(pipe: TIPPipeline, given: Sequence[Sample], kind: str, seed: int, **options) -> Tensor:
    """Restored pictures (n, 3, 16, 16) of samples, their texts by `data.restoration.texts`."""
    semantic, restoration = texts(given, kind)
    pictures = torch.stack([s.degraded for s in given])
    settings = {"steps": SAMPLING, "latents": noise(len(given), seed, pictures.shape[-1])} | options
    return pipe(pictures, semantic, restoration, **settings).images


@torch.no_grad()
def held_out(pipe: TIPPipeline, given: Sequence[Sample], kind: str, seed: int, scale: float = 1.0) -> float:
    """The denoising loss on pictures that training has not seen, at times and with noise that are the same for all."""
    clean, degraded = (2 * torch.stack([s[i] for s in given]) - 1 for i in (0, 1))
    z, generator = tip.latents(pipe.vae, clean), torch.Generator().manual_seed(seed)
    t = torch.randint(*LOSS_TIMES, (len(z),), generator=generator)
    semantic, restoration = texts(given, kind)
    drawn = torch.randn(z.shape, generator=generator)
    found = pipe.model(
        pipe.scheduler.add_noise(z, drawn, t), t, pipe.states(semantic), pipe.states(restoration), degraded, scale
    )
    return float(F.mse_loss(found, tip.target(pipe.scheduler, z, drawn, t)))


def followed(restored: Tensor, found: pocket.Part, said: Sequence[str]) -> dict[str, float]:
    """In percent: how often the texture is the picture's own, and how often the one that the text says, if it does."""
    seen = pocket.seen_kind(restored)
    row = {"texture": 100 * sum(a == b for a, b in zip(seen, found.kinds, strict=True)) / len(seen)}
    if set(said) <= set(pocket.CAPTIONS):
        told = sum(pocket.caption(a) == text for a, text in zip(seen, said, strict=True))
        row["follows the text"] = 100 * told / len(seen)
    return row


def layout_lead(restored: Tensor, clean: Tensor) -> float:
    """At a quarter of the size: PSNR to the own clean picture less that to the next one's, dB."""
    small, own = (F.avg_pool2d(x, pocket.SIZE // 4) for x in (restored, clean))
    return float((psnr(small, own) - psnr(small, own.roll(-1, 0))).mean())


def walk(pipe: TIPPipeline, root: str, seed: int, split: str) -> list[float]:
    """Contrast of pictures restored with each number of `pocket.WALK`, in percent of their brightness."""
    contrast, op, numbers = pocket.WALK
    found = part(root, seed, split).scenes(contrast)
    found = found.where(list(range(min(EACH // 2, len(found)))))
    given = done(found, [(op,)] * len(found), seed)
    strengths = []
    for number in numbers:
        now = [s._replace(restoration=prompt((Op(op.kind, number),))) for s in given]
        seen = pocket.seen_contrast(restore(pipe, now, "own", seed), found.kinds)
        strengths.append(100 * float(seen.mean()))
    return strengths


def score(pipe: TIPPipeline, task: str, kind: str, root: str, seed: int, split: str) -> dict[str, float]:
    """All that is measured of a task with one kind of texts."""
    given, found = tested(root, seed, split, task)
    restored, clean = restore(pipe, given, kind, seed), found.images
    semantic, _ = texts(given, kind)
    frozen = held_out(pipe, given, kind, seed, scale=0.0)
    kept = held_out(pipe, given, kind, seed)
    row = {"PSNR": float(psnr(restored, clean).mean()), "SSIM": 100 * float(ssim(restored, clean).mean())}
    row["PSNR input"] = float(psnr(torch.stack([s.degraded for s in given]), clean).mean())
    row |= followed(restored, found, semantic)
    row |= {"layout lead": layout_lead(restored, clean), "held-out loss": kept, "loss gain": 100 * (1 - kept / frozen)}
    wanted = pocket.seen_contrast(clean, found.kinds)
    row["contrast off"] = 100 * float((pocket.seen_contrast(restored, found.kinds) - wanted).abs().mean())
    if task == "mild" and kind == "own":
        steps = walk(pipe, root, seed, split)
        names = [f"contrast at {number:.1f}" for number in pocket.WALK[2]]
        row |= dict(zip(names, steps, strict=True))
        row["smallest rise"] = min(b - a for a, b in itertools.pairwise(steps))
    return row


@functools.lru_cache(maxsize=12)
def trained(network: str, rate: float, root: str, seed: int) -> tuple[TIPPipeline, dict]:
    """Train a network; return its pipeline and facts of the training."""
    pipe = build(network, seed)
    history = train_model(pipe, samples(network, part(root, seed, "train"), seed), rate, seed, name=network)
    loss = sum(row["loss"] for row in history[-20:]) / 20
    return pipe, {"loss": round(loss, 4), "trained": sum(p.numel() for p in pipe.adaptor.parameters())}


@functools.lru_cache(maxsize=12)
def chosen_by(network: str, rate: float, root: str, seed: int) -> float:
    """PSNR on validation pictures with the network's own texts, over the tasks."""
    pipe, _ = trained(network, rate, root, seed)
    found = [
        psnr(restore(pipe, given, asked(network), seed), own.images).mean()
        for given, own in (tested(root, seed, "val", task) for task in TASKS)
    ]
    return float(torch.stack(found).mean())


def train(method: str, task: str, rate: float, seed: int, root: str, split: str = "test") -> dict:
    """Train the network of a method, unless that was done, and score it.

    `split` "select": PSNR on validation pictures of all tasks with the network's own texts; "test": the task's test
    pictures with the method's texts. Returns a row: PSNR and layout lead in dB; SSIM, texture, gain of the held-out
    loss over the frozen model, contrast in percent; loss of the last 20 steps and numbers trained.
    """
    network = "TIP" if method in MISLED else method
    if split == "select":
        row = {"PSNR": chosen_by(network, rate, str(root), seed)}
    else:
        row = score(trained(network, rate, str(root), seed)[0], task, asked(method), str(root), seed, "test")
    facts = trained(network, rate, str(root), seed)[1]
    return {name: round(value, 3 if name != "held-out loss" else 5) for name, value in row.items()} | facts
