"""TIP's ablation at toy scale: captioned textures of 16x16 pixels, the methods, one training and one score.

A scene has two coloured halves under a texture with a period of 4 pixels, rows, columns or checks, of one of four
contrasts. Degradation makes two things ambiguous, one for each prompt:

* Downscaling by four removes the kind of texture. The semantic prompt names it, for example rows.
* A faint texture, and a strong one that was blurred, look alike. The restoration prompt distinguishes them: "Deblur
  with sigma 0.9" names a blur to undo, "Dejpeg with quality 80" implies that there was none.

Kind, contrast and layout are independent, and a layout (two colours, the position and direction of their border)
belongs to one split. A fifth of the images are crops of photographs, "a photograph of a cat"; no two splits share a
tile of one.

The tasks of the test: "heavy" images have lost their texture, "mild" ones can be distinguished only by the restoration
prompt, "parameterised" ones are degraded as in training. The diffusion model is frozen and the same for all methods. An
adaptor is trained once for all tasks, so its learning rate is selected by the mean PSNR on the three.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2.functional import to_dtype

from ..evaluation.ablations import Study
from ..evaluation.metrics.restoration import psnr, ssim
from ..models.tip import model as tip
from ..models.tip import recipe
from ..models.tip.degradations import Degraded, Op, Recipe, Sample, degrade, prompt
from ..models.tip.pipeline import TIPPipeline
from ..models.tip.recipe import texts
from ..training.fit import Batch, History, fit
from ..training.hardware import CPU
from ..training.schedules import adamw
from .encoders import texture_prior as prior
from .encoders.texture_prior import KINDS
from .scenes import PHOTOGRAPHS, SPLITS, photograph, quantise, tiles

SIZE = 16  # side of every image, in pixels
CONTRASTS = (0.15, 0.4, 0.7, 1.0)
COLOURS = ((0.90, 0.30, 0.25), (0.25, 0.75, 0.35), (0.30, 0.40, 0.95), (0.95, 0.85, 0.30))
COUNTS = {"train": (2400, 600), "val": (192, 48), "test": (384, 96)}  # scenes and photographs


# --- clean images ---


class Picture(NamedTuple):
    """An image (16, 16, 3) uint8 and its annotations: kind and contrast are "" and 0 for a photograph."""

    image: np.ndarray
    caption: str
    kind: str = ""
    contrast: float = 0.0


class Layout(NamedTuple):
    """Two colours of `COLOURS`, the first row or column of the second, and whether the halves are left and right."""

    first: int
    second: int
    at: int
    upright: bool


def layouts(split: str) -> list[Layout]:
    """The layouts of a split: two thirds of all, a sixth and a sixth."""
    pairs = itertools.permutations(range(len(COLOURS)), 2)
    every = [Layout(a, b, at, upright) for a, b in pairs for at in range(4, 13) for upright in (False, True)]
    order = np.random.default_rng(0).permutation(len(every))
    parts = np.split(order, [2 * len(every) // 3, 5 * len(every) // 6])
    return [every[i] for i in parts[SPLITS.index(split)]]


def pattern(kind: str) -> np.ndarray:
    """A texture, (16, 16) of -1 and 1."""
    y, x = np.mgrid[:SIZE, :SIZE] // 2
    return 1.0 - 2.0 * ({"rows": y, "columns": x, "checks": x + y}[kind] % 2)


def paint(layout: Layout, kind: str, contrast: float) -> np.ndarray:
    """A scene, (16, 16, 3) uint8: colour times 0.6 + 0.4 contrast (+-1)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    place = (x if layout.upright else y) >= layout.at
    colour = np.where(place[..., None], COLOURS[layout.second], COLOURS[layout.first])
    return quantise(colour * (0.6 + 0.4 * contrast * pattern(kind))[..., None])


def crop(rng: np.random.Generator, name: str, split: str) -> np.ndarray:
    """A crop of a photograph, (16, 16, 3) uint8, inside one of the split's tiles, at full or half size."""
    places = tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    wide = SIZE * int(rng.integers(1, 3))  # every tile is larger
    x, y = int(rng.integers(left, right - wide + 1)), int(rng.integers(top, bottom - wide + 1))
    window = Image.fromarray(photograph(name)[y : y + wide, x : x + wide])
    return np.asarray(window.resize((SIZE, SIZE), Image.Resampling.BOX))


def pictures(split: str, seed: int = 0, counts: tuple[int, int] | None = None) -> list[Picture]:
    """Scenes, then photographs, in the numbers of `counts`; deterministic in the arguments."""
    own = layouts(split)
    count, photographs = COUNTS[split] if counts is None else counts
    rng, found = np.random.default_rng((seed, SPLITS.index(split), 7)), []
    for _ in range(count):
        layout, kind = own[rng.integers(len(own))], KINDS[rng.integers(len(KINDS))]
        contrast = CONTRASTS[rng.integers(len(CONTRASTS))]
        found.append(Picture(paint(layout, kind, contrast), f"a picture with {kind}", kind, contrast))
    names = list(PHOTOGRAPHS)
    for _ in range(photographs):
        name = names[rng.integers(len(names))]
        found.append(Picture(crop(rng, name, split), f"a photograph of a {name}"))
    return found


def to_tensor(image: np.ndarray) -> Tensor:
    """An image (16, 16, 3) uint8 as (3, 16, 16) in [0, 1]."""
    return to_dtype(torch.tensor(image).permute(2, 0, 1), torch.float32, scale=True)


class Captioned(Dataset):
    """Images (3, 16, 16) in [0, 1] with captions, as `Degraded` reads them."""

    def __init__(self, found: Sequence[Picture]):
        self.found = [(to_tensor(x.image), x.caption) for x in found]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.found[index]


def save(found: Sequence[Picture], folder: Path) -> None:
    """Write images in the layout of a folder of one's own: `images/` and `captions.jsonl`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, picture in enumerate(found):
        Image.fromarray(picture.image).save(folder / "images" / f"{number:04d}.png")
        lines.append(json.dumps({"file": f"{number:04d}.png", "caption": picture.caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- degraded images ---


class Listed(Recipe):
    """A recipe whose strengths are drawn from lists of values."""

    def value(self, rng: np.random.Generator, kind: str) -> float:
        values = getattr(self, kind)
        return values[rng.integers(len(values))]


# one pass: 16 pixels allow only one operation of each kind
RECIPE = Listed(
    blur=(0.6, 0.9, 1.2),
    resize=(4.0,),
    noise=(0.05, 0.10, 0.20),
    jpeg=(20, 50, 80),
    passes=1,
    skip={"blur": 0.5, "resize": 0.75, "noise": 0.5, "jpeg": 0.5},
)
EDGE = "circular"  # the textures continue beyond the border
HEAVY = (Op("resize", 4.0), Op("noise", 0.10))
MILD = ((1.0, (Op("blur", 0.9),)), (0.15, (Op("jpeg", 80),)), (0.4, (Op("noise", 0.05),)))
"""Contrast and what was done: without the restoration prompt each could be another."""
WALK = (0.4, Op("blur", 0.6), (0.6, 0.9, 1.2))
"""Contrast, what was done, and the values of "Deblur with sigma"."""
TASKS = ("heavy", "mild", "parameterised")
EACH = 96  # test images of a task


class Test(NamedTuple):
    """Degraded scenes with their true prompts, the kinds of their textures, and the seed of the initial noise."""

    samples: list[Sample]
    kinds: tuple[str, ...]
    seed: int


def degraded(found: Sequence[Picture], ops: Sequence[tuple[Op, ...]], seed: int) -> Test:
    """Images degraded by `ops`, of which each has its own."""
    samples = []
    for i, (picture, own) in enumerate(zip(found, ops, strict=True)):
        image = to_tensor(picture.image)
        worse = degrade(image, own, (seed, i), edge=EDGE)
        samples.append(Sample(image, worse, picture.caption, prompt(own), own))
    return Test(samples, tuple(picture.kind for picture in found), seed)


def tested(task: str, seed: int, split: str) -> Test:
    """The images of a task, or of the "walk" through the numbers of a prompt."""
    scenes = [picture for picture in pictures(split, seed) if picture.kind]
    by = {contrast: [picture for picture in scenes if picture.contrast == contrast] for contrast in CONTRASTS}
    if task == "walk":
        found = by[WALK[0]][: EACH // 2]
        return degraded(found, [(WALK[1],)] * len(found), seed)
    if task == "heavy":
        found = by[1.0][:EACH]
        return degraded(found, [HEAVY] * len(found), seed)
    if task == "mild":
        rounds = zip(*(by[contrast] for contrast, _ in MILD), strict=False)
        found = [picture for group in rounds for picture in group][:EACH]
        return degraded(found, [MILD[i % len(MILD)][1] for i in range(len(found))], seed)
    found = scenes[:EACH]
    # an image without degradation has no prompt: excluded here, not in training
    draws = ((RECIPE.draw((seed, i, again)) for again in range(99)) for i in range(len(found)))
    return degraded(found, [next(filter(None, drawn)) for drawn in draws], seed)


@functools.lru_cache(maxsize=6)
def data(task: str, seed: int, split: str) -> Any:
    """Training images, `Captioned`, or tests by name: all tasks for "val", the task's own for "test"."""
    if split == "test":
        return {name: tested(name, seed, split) for name in ((task, "walk") if task == "mild" else (task,))}
    return {name: tested(name, seed, split) for name in TASKS} if split == "val" else learnt(seed)


@functools.lru_cache(maxsize=2)
def learnt(seed: int) -> Captioned:
    """The training images of a seed."""
    return Captioned(pictures("train", seed))


# --- methods, training, score ---

STEPS, BATCH, WEIGHT_DECAY = 350, 48, 0.01
DROPPED = {"blind_prompt": 0.15, "no_caption": 0.15}  # shares of training images whose c_r is blind, c_s empty
DRAWS = 2  # degradations of each training image
SAMPLING = 10  # steps of DDIM

# the last two are TIP with the blind prompt at test, and no restoration at all
METHODS = ("TIP", "plain ControlNet", "restoration only", "semantic only", "blind prompt", "degraded image")


class Restorer(nn.Module):
    """A trained pipeline and the kind of prompts, of `recipe.TEXTS`, that it is tested with.

    Without a pipeline, the degraded images are returned as they are.
    """

    def __init__(self, pipe: TIPPipeline | None, kind: str = "own"):
        super().__init__()
        self.pipe, self.kind, self.model = pipe, kind, pipe.model if pipe else None

    def forward(self, test: Test, kind: str = "") -> Tensor:
        """Restored images (n, 3, 16, 16)."""
        if self.pipe is None:
            return torch.stack([sample.degraded for sample in test.samples])
        return restore(self.pipe, test.samples, kind or self.kind, seed=test.seed)


def restore(pipe: TIPPipeline, given: Sequence[Sample], kind: str = "own", *, seed: int, **options: Any) -> Tensor:
    """Restored images (n, 3, 16, 16), their prompts by `recipe.texts`; the noise is the same for all prompts."""
    semantic, restoration = texts(given, kind)
    images = torch.stack([sample.degraded for sample in given])
    size = (len(images), prior.CHANNELS, SIZE // prior.PATCH, SIZE // prior.PATCH)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return pipe(images, semantic, restoration, **{"steps": SAMPLING, "latents": noise} | options).images


def samples(method: str, found: Captioned, seed: int) -> list[Sample]:
    """The training samples of a method: every image with `DRAWS` random degradations."""
    options: dict[str, Any] = {"share_blind": 0.0, "fresh": False, "edge": EDGE} | DROPPED | recipe.METHODS[method]
    options.pop("fusion", None)
    draws = (Degraded(found, SIZE, RECIPE, seed=DRAWS * seed + i, **options) for i in range(DRAWS))
    return [drawn[i] for drawn in draws for i in range(len(drawn))]


@torch.no_grad()
def encoded(pipe: TIPPipeline, found: Sequence[Sample]) -> TensorDataset:
    """Samples encoded in advance, as `tip.loss` reads them: latents, degraded images in [-1, 1], states of c_s, c_r."""
    clean, worse = (2 * torch.stack([sample[i] for sample in found]) - 1 for i in (0, 1))
    states = (pipe.states([s.semantic for s in found]), pipe.states([s.restoration for s in found]))
    return TensorDataset(tip.to_latents(pipe.vae, clean), worse, *states)


@functools.lru_cache(maxsize=12)
def adaptor(method: str, found: Captioned, learning_rate: float, seed: int) -> tuple[TIPPipeline, History]:
    """A pipeline with a trained adaptor, and the history; all methods of a seed start equal."""
    pipe = prior.build(recipe.METHODS[method].get("fusion", "modulate"), seed=seed)
    drawn = samples(method, found, seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:  # noisy timesteps are drawn more often
        return tip.loss(model, batch, pipe.scheduler, prior.times(len(batch[0]), batch[0].device))

    return pipe, fit(
        pipe.model,
        loss,
        encoded(pipe, drawn),
        epochs=STEPS / (len(drawn) // BATCH),
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )


def train(method: str, task: str, found: Captioned, learning_rate: float, seed: int) -> tuple[Restorer, History]:
    """A method and its history; one training serves all tasks, and TIP's the blind prompt too."""
    if method == "degraded image":
        return Restorer(None), []
    blind = method == "blind prompt"
    pipe, history = adaptor("TIP" if blind else method, found, learning_rate, seed)
    return Restorer(pipe, method if blind else recipe.texts_of(method)), history


def score(model: Restorer, task: str, tests: Mapping[str, Test]) -> dict[str, float]:
    """PSNR in dB; SSIM, images with the true texture, and the error of its contrast in percent.

    Of TIP and a plain ControlNet on mild images also the contrast of the walk's images, restored with each number of
    the prompt. On validation data only the mean PSNR of all tasks, with the prompts of the training.
    """
    if len(tests) == len(TASKS):
        kind = "own" if model.kind == "blind prompt" else model.kind
        found = [psnr(model(test, kind), clean(test)).mean() for test in tests.values()]
        return {"PSNR": round(float(torch.stack(found).mean()), 3)}
    test = tests[task]
    restored, true = model(test), clean(test)
    right = [a == b for a, b in zip(seen_kind(restored), test.kinds, strict=True)]
    off = (seen_contrast(restored, test.kinds) - seen_contrast(true, test.kinds)).abs()
    row = {"PSNR": float(psnr(restored, true).mean()), "SSIM": 100 * float(ssim(restored, true).mean())}
    row |= {"texture": 100 * sum(right) / len(right), "contrast off": 100 * float(off.mean())}
    if "walk" in tests and model.pipe and model.kind == "own":
        steps = walk(model.pipe, tests["walk"])
        row |= {f"contrast at {number:.1f}": step for number, step in steps.items()}
        row["smallest rise"] = min(b - a for a, b in itertools.pairwise(steps.values()))
    return {name: round(value, 3) for name, value in row.items()}


def walk(pipe: TIPPipeline, test: Test) -> dict[float, float]:
    """Contrast of images restored with each number of `WALK`, in percent of their brightness."""
    steps = {}
    for number in WALK[2]:
        text = prompt((Op(WALK[1].kind, number),))
        now = [sample._replace(restoration=text) for sample in test.samples]
        steps[number] = 100 * float(seen_contrast(restore(pipe, now, seed=test.seed), test.kinds).mean())
    return steps


def clean(test: Test) -> Tensor:
    """The clean images of a test, (n, 3, 16, 16)."""
    return torch.stack([sample.clean for sample in test.samples])


def seen_kind(images: Tensor) -> list[str]:
    """The strongest texture of each image (n, 3, 16, 16): the largest |mean(grey pattern)|."""
    patterns = torch.from_numpy(np.stack([pattern(kind) for kind in KINDS])).to(images)
    strength = torch.einsum("nhw,khw->nk", images.mean(1), patterns).abs()
    return [KINDS[i] for i in strength.argmax(1).tolist()]


def seen_contrast(images: Tensor, kinds: Sequence[str]) -> Tensor:
    """The strength of the texture of that kind, (n,): mean(grey pattern) / mean(grey); for a scene 2/3 of its
    contrast."""
    patterns = torch.from_numpy(np.stack([pattern(kind) for kind in kinds])).to(images)
    grey = images.mean(1)
    return (grey * patterns).mean((1, 2)) / grey.mean((1, 2)).clamp_min(1e-6)


STUDY = Study(
    tasks=dict.fromkeys(TASKS, METHODS),
    learning_rates=(1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    budget=f"{STEPS} steps, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    metric="PSNR",
    untrained=("degraded image",),
)
