"""Degraded images and their restoration prompts, TIP's training data. A RECONSTRUCTION.

    recipe = Recipe()
    ops = recipe.draw(seed)                    (Op("blur", 0.4), Op("noise", 0.08))
    prompt(ops)                                "Deblur with sigma 0.4; Denoise with sigma 0.08"
    y = degrade(x, ops, seed)                  (3, H, W) in [0, 1], as x
    degrade(x, parse(prompt(ops)), seed)       the same: text and degradation agree
    blind(x, seed)                             Real-ESRGAN's degradation, with the prompt `BLIND`
    train = Degraded(images, 512)              of images with captions, such as `data.restoration.load`
    train[0]                                   Sample(clean, degraded, semantic, restoration, ops)
    test = Degraded(images, 512, **TASKS["parameterised"])    deterministic

From the pipeline figure: two passes of blur, resize, noise, JPEG, P(skip) = 0.5, the verbs, "with sigma", one decimal
for blur and two for noise. The blind pipeline has Real-ESRGAN's published settings (BSD-3-Clause: read, reimplemented).
Ours: ranges, that each operation is skipped on its own, that a small image is resized back at once and by bicubic
interpolation, edges, and the wording of Upsample and Dejpeg.

The result depends on the seed and the image alone, not on the batch or earlier draws. Images are on the CPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import jpeg, resize

from ...errors import BadParameter, Count, Share, Whole, typed

BLIND = "Remove all degradation"  # figure: the restoration prompt that names no degradation

# --- degradations and their prompts -----------------------------------------------------------------------------------


class Op(NamedTuple):
    """One degradation and its strength."""

    kind: str  # one of `KINDS`
    value: float  # sigma in pixels; downscaling factor per side; sigma of pixels in [0, 1]; quality 1 to 100


class Kind(NamedTuple):
    """How a degradation is written in a prompt, and its values."""

    text: str  # with one place for the value
    decimals: int
    nothing: float  # the value of the identity
    low: float
    high: float


KINDS = {
    "blur": Kind("Deblur with sigma {}", 1, 0, 0, 100),
    "resize": Kind("Upsample to {}x", 1, 1, 1, 64),
    "noise": Kind("Denoise with sigma {}", 2, 0, 0, 1),
    "jpeg": Kind("Dejpeg with quality {}", 0, 100, 1, 100),
}
GRAMMAR = (
    f"'{BLIND}', nothing, or instructions separated by ';': 'Deblur with sigma 3.0', 'Upsample to 4.0x', "
    "'Denoise with sigma 0.08', 'Dejpeg with quality 50'"
)


def rounded(op: Op) -> Op:
    """Rounded to the decimals of its prompt. Raises `BadParameter`: a value out of range."""
    kind = KINDS[op.kind]
    value = round(float(op.value), kind.decimals)
    if not kind.low <= value <= kind.high:
        raise BadParameter(op.kind, op.value, f"{kind.low} to {kind.high}")
    return Op(op.kind, value)


def prompt(ops: Sequence[Op]) -> str:
    """The restoration prompt of degradations, in the order in which they were applied; "" for none."""
    return "; ".join(KINDS[op.kind].text.format(f"{op.value:.{KINDS[op.kind].decimals}f}") for op in map(rounded, ops))


def parse(text: str) -> tuple[Op, ...] | None:
    """The degradations in a restoration prompt; None for `BLIND`, which names none. Case is ignored.

    Raises `BadParameter` with the grammar for anything else.
    """
    plain = " ".join(text.lower().split())
    if plain == BLIND.lower():
        return None
    ops = []
    for part in filter(None, (part.strip(" .") for part in plain.split(";"))):
        matches = {
            name: re.fullmatch(kind.text.lower().format(r"(\d+(?:\.\d+)?)"), part) for name, kind in KINDS.items()
        }
        ops += [rounded(Op(name, float(match[1]))) for name, match in matches.items() if match]
        if not any(matches.values()):
            raise BadParameter("restoration prompt", text, f"{GRAMMAR}; this is not one: '{part}'")
    return tuple(ops)


# --- the parameterised pipeline ---------------------------------------------------------------------------------------


@typed
@dataclass(frozen=True)
class Recipe:
    """The distribution of degradations: passes of blur, resize, noise and JPEG, each skipped with a probability.

    Attributes:
        blur: sigma in pixels. This and the next three are the bounds of a uniform distribution.
        resize: downscaling factor per side.
        noise: sigma, pixels being in [0, 1].
        jpeg: quality.
        passes: 2 in the figure.
        skip: probability of skipping an operation; a mapping has one for each kind.
    """

    blur: tuple[float, ...] = (0.2, 6.0)
    resize: tuple[float, ...] = (1.0, 8.0)
    noise: tuple[float, ...] = (0.0, 0.25)
    jpeg: tuple[float, ...] = (20, 95)
    passes: Count = 2
    skip: float | Mapping[str, float] = 0.5

    def value(self, rng: np.random.Generator, kind: str) -> float:
        """The strength of one operation."""
        return rng.uniform(*getattr(self, kind))

    def draw(self, seed: int | Sequence[int]) -> tuple[Op, ...]:
        """The operations of one image, with values rounded as in their prompt; identities are left out."""
        rng, ops = np.random.default_rng([1, *_numbers(seed)]), []
        for name in [*KINDS] * self.passes:
            skip = self.skip[name] if isinstance(self.skip, Mapping) else self.skip
            # always drawn: whether one operation is skipped must not change the random numbers of the next
            chance = rng.random()
            op = rounded(Op(name, self.value(rng, name)))
            if op.value != KINDS[name].nothing and chance >= skip:
                ops.append(op)
        return tuple(ops)


def degrade(x: Tensor, ops: Sequence[Op], seed: int | Sequence[int], *, edge: str = "replicate") -> Tensor:
    """Apply degradations, one after the other, to an image (3, H, W) in [0, 1]; the result has its size.

    Args:
        ops: rounded first, as in their prompt.
        seed: of the noise.
        edge: padding of a blur: the border's pixels ("replicate") or the opposite side's ("circular").
    """
    y, size = checked(x)[None], x.shape[-2:]
    for place, (kind, value) in enumerate(map(rounded, ops)):
        if value == KINDS[kind].nothing:
            continue
        if kind == "blur":
            y = _blurred(y, value, edge)
        elif kind == "resize":
            y = _resized(_resized(y, [max(1, round(n / value)) for n in size]), size)
        elif kind == "noise":
            state = np.random.SeedSequence((2, *_numbers(seed), place)).generate_state(1, np.uint64)
            y = y + value * torch.randn(y.shape, generator=torch.Generator().manual_seed(int(state[0] >> 1)))
        else:
            y = _jpeg(y, int(value))
        y = y.clamp(0, 1)
    return y[0]


# --- the blind pipeline -----------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One of the two passes of Real-ESRGAN. Ranges are the bounds of a uniform distribution."""

    blur: float  # probability
    sigma: tuple[float, float]
    resize: tuple[float, float]  # probabilities of larger, smaller; otherwise the same
    factor: tuple[float, float]  # of the side
    gaussian: tuple[float, float]  # sigma of 255
    poisson: tuple[float, float]  # scale


# the published settings (train_realesrnet_x4plus.yml at a4abfb2); JPEG qualities are whole here
PASSES = (
    Pass(1.0, (0.2, 3.0), (0.2, 0.7), (0.15, 1.5), (1, 30), (0.05, 3.0)),
    Pass(0.8, (0.2, 1.5), (0.3, 0.4), (0.3, 1.2), (1, 25), (0.05, 2.5)),
)
KERNELS = {  # and their probabilities, where no sinc kernel is drawn
    "iso": 0.45,
    "aniso": 0.25,
    "generalised iso": 0.12,
    "generalised aniso": 0.03,
    "plateau iso": 0.12,
    "plateau aniso": 0.03,
}
SHAPES = {"generalised": (0.5, 4.0), "plateau": (1.0, 2.0)}
SINC, FINAL_SINC, SINC_FIRST = 0.1, 0.8, 0.5  # probabilities: a sinc kernel, a last one, and that before the last JPEG
GAUSSIAN, GREY = 0.5, 0.4  # probabilities: Gaussian instead of Poisson noise, the same in all channels
QUALITY = (30, 95)  # of a JPEG
SCALE = 4


def blind(x: Tensor, seed: int | Sequence[int]) -> Tensor:
    """Real-ESRGAN's second-order degradation of an image (3, H, W) in [0, 1].

    The result, 1 / `SCALE` per side, is resized back to the size of x by bicubic interpolation (ours: TIP's inputs have
    the size of their targets)."""
    y, (height, width) = checked(x)[None], x.shape[-2:]
    small = max(1, height // SCALE), max(1, width // SCALE)
    rng = np.random.default_rng([3, *_numbers(seed)])

    def mode() -> str:
        return str(rng.choice(["area", "bilinear", "bicubic"]))

    for number, p in enumerate(PASSES):
        kernel = _kernel(rng, p)
        if rng.random() < p.blur:
            y = _filtered(y, kernel)
        up, down = p.resize
        chance = rng.random()
        low, high = (1.0, p.factor[1]) if chance < up else (p.factor[0], 1.0) if chance < up + down else (1.0, 1.0)
        factor, base = rng.uniform(low, high), small if number else (height, width)
        y = _interpolated(y, [max(1, int(n * factor)) for n in base], mode())
        y = _noisy(rng, y, p)
        if number == 0:
            y = _jpeg(y, round(rng.uniform(*QUALITY)))
    quality, last = round(rng.uniform(*QUALITY)), mode()
    sinc = _sinc(rng.uniform(math.pi / 3, math.pi), _odd(rng)) if rng.random() < FINAL_SINC else None

    def filtered(y: Tensor) -> Tensor:
        y = _interpolated(y, small, last)
        return y if sinc is None else _filtered(y, sinc)

    y = _jpeg(filtered(y), quality) if rng.random() < SINC_FIRST else filtered(_jpeg(y, quality))
    y = (y.clamp(0, 1) * 255).round() / 255
    return _resized(y, (height, width)).clamp(0, 1)[0]


def _noisy(rng: np.random.Generator, y: Tensor, p: Pass) -> Tensor:
    """Gaussian or scaled Poisson noise; grey noise is the same in all channels. Clamped."""
    gaussian, grey = rng.random() < GAUSSIAN, rng.random() < GREY
    if gaussian:
        sigma = rng.uniform(*p.gaussian) / 255
        noise = sigma * rng.standard_normal((1, 1 if grey else 3, *y.shape[2:]))
        return (y + torch.from_numpy(noise).to(y)).clamp(0, 1)
    scale = rng.uniform(*p.poisson)
    clean = y.clamp(0, 1)
    if grey:
        clean = (clean * clean.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    clean = (clean * 255).round() / 255  # after the mean: the more values, the weaker the noise
    levels = 2.0 ** math.ceil(math.log2(max(2, len(clean.unique()))))
    counts = rng.poisson((clean * levels).double().numpy()) / levels
    return (y + scale * (torch.from_numpy(counts).to(y) - clean)).clamp(0, 1)


def _odd(rng: np.random.Generator) -> int:
    return 2 * int(rng.integers(3, 11)) + 1  # 7, 9, ... 21


def _kernel(rng: np.random.Generator, p: Pass) -> np.ndarray:
    """A blur kernel of odd size and sum 1."""
    side = _odd(rng)
    if rng.random() < SINC:
        return _sinc(rng.uniform(math.pi / (3 if side < 13 else 5), math.pi), side)
    name = [*KERNELS][rng.choice(len(KERNELS), p=np.divide([*KERNELS.values()], sum(KERNELS.values())))]
    across = rng.uniform(*p.sigma)
    along, turn = (rng.uniform(*p.sigma), rng.uniform(-math.pi, math.pi)) if "aniso" in name else (across, 0.0)
    low, high = SHAPES["generalised" if "generalised" in name else "plateau"]
    shape = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    ys, xs = np.mgrid[:side, :side] - side // 2
    u, v = xs * math.cos(turn) + ys * math.sin(turn), ys * math.cos(turn) - xs * math.sin(turn)
    distance = (u / across) ** 2 + (v / along) ** 2
    if "plateau" in name:
        kernel = 1 / (distance**shape + 1)
    else:
        kernel = np.exp(-0.5 * distance ** (shape if "generalised" in name else 1))
    return kernel / kernel.sum()


def _sinc(cutoff: float, side: int) -> np.ndarray:
    """A circular low-pass filter, which causes ringing."""
    ys, xs = np.mgrid[:side, :side] - side // 2
    r = np.hypot(xs, ys)
    with np.errstate(invalid="ignore"):
        kernel = np.where(r == 0, cutoff**2 / (4 * math.pi), cutoff * j1(cutoff * r) / (2 * math.pi * r))
    return kernel / kernel.sum()


# --- samples of training and test -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A clean image, its degraded copy, and the two prompts."""

    clean: Tensor  # (3, S, S) in [0, 1]
    degraded: Tensor  # (3, S, S) in [0, 1]
    semantic: str  # c_s: the caption, or ""
    restoration: str  # c_r: what was done, or BLIND
    ops: tuple[Op, ...] | None  # the degradations; None for Real-ESRGAN's, which has no prompt


SHARE_BLIND, BLIND_PROMPT, NO_CAPTION = 0.5, 0.5, 0.3  # see `Degraded`
TASKS: dict[str, dict[str, Any]] = {
    "parameterised": {"share_blind": 0.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False},
    "real-esrgan": {"share_blind": 1.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False},
}
"""Arguments of `Degraded` for a test: every sample has its true texts and is the same every time (ours)."""


@typed
@dataclass
class Degraded(Dataset):
    """Square images and degraded copies: `samples[i]` is a `Sample`.

    The figure has two random choices: whether c_r describes the degradations or is `BLIND`, and whether c_s is the
    caption or empty; it does not give their probabilities. All numbers here are ours; a sample depends on
    `seed` and its index.

    Attributes:
        pictures: images with captions, such as `data.restoration.Captioned`. Of `data.restoration.QualityPairs` the
            image of low quality is the degraded copy, at the size of the other one, and c_r is `BLIND`.
        size: S. An image's shorter side is resized to S, then a square is cropped. So the caption still describes most
            of the crop.
        recipe: of the parameterised pipeline.
        share_blind: share of samples degraded by Real-ESRGAN's pipeline; their c_r is `BLIND`.
        blind_prompt: probability that c_r of another sample is also `BLIND`.
        no_caption: probability that c_s is empty.
        fresh: for training: a new draw each time a sample is loaded, from torch's random state, which `fit.fit` sets by
            seed, epoch and index; a random crop, flipped with probability 0.5. Otherwise the centre.
        seed: of all random draws.
        edge: see `degrade`.
    """

    pictures: Dataset
    size: Count
    recipe: Recipe = Recipe()
    _: KW_ONLY
    share_blind: Share = SHARE_BLIND
    blind_prompt: Share = BLIND_PROMPT
    no_caption: Share = NO_CAPTION
    fresh: bool = True
    seed: Whole = 0
    edge: str = "replicate"

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture, caption, *low = self.pictures[index]
        numbers = (self.seed, index, *([int(torch.randint(2**31, ()))] if self.fresh else []))
        # all numbers are always drawn: one probability must not change the draws of another
        where, turned, is_blind, unnamed, untold = np.random.default_rng([4, *numbers]).random(5)
        images = [picture, *(resize(x, picture.shape[-2:], interpolation=3, antialias=True).clamp(0, 1) for x in low)]
        clean, *low = (_square(image, self.size, where if self.fresh else 0.5) for image in images)
        if self.fresh and turned < 0.5:
            clean, *low = (image.flip(-1) for image in (clean, *low))
        if low:
            ops, degraded, restoration = None, low[0], BLIND
        elif is_blind < self.share_blind:
            ops, degraded, restoration = None, blind(clean, numbers), BLIND
        else:
            ops = self.recipe.draw(numbers)
            degraded = degrade(clean, ops, numbers, edge=self.edge)
            restoration = BLIND if unnamed < self.blind_prompt else prompt(ops)
        return Sample(clean, degraded, "" if untold < self.no_caption else caption, restoration, ops)


def _square(picture: Tensor, size: int, where: float) -> Tensor:
    """(3, size, size): the shorter side resized to `size`, then cropped at `where`, 0 to 1, along the longer side."""
    height, width = picture.shape[-2:]
    if min(height, width) != size:
        by = size / min(height, width)
        height, width = max(size, round(height * by)), max(size, round(width * by))
        picture = resize(picture, [height, width], interpolation=3, antialias=True).clamp(0, 1)
    top, left = round(where * (height - size)), round(where * (width - size))
    return picture[:, top : top + size, left : left + size].contiguous()


# --- operations on (1, 3, H, W) ---------------------------------------------------------------------------------------


def checked(x: Tensor) -> Tensor:
    """The image. Raises `BadParameter`: it is no float tensor in [0, 1]."""
    if not (x.is_floating_point() and x.amin() >= 0 and x.amax() <= 1):
        raise BadParameter("image", f"{x.dtype}, {x.amin():g} to {x.amax():g}", "a float tensor in [0, 1]")
    return x


def _blurred(y: Tensor, sigma: float, edge: str) -> Tensor:
    """Gaussian, truncated at 3 sigma, separable."""
    radius = math.ceil(3 * sigma)
    if edge == "circular":
        radius = min(radius, *y.shape[-2:])
    places = torch.arange(-radius, radius + 1, dtype=y.dtype)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(y.shape[1], 1, -1)
    y = F.conv2d(F.pad(y, (radius, radius, 0, 0), edge), kernel[:, :, None], groups=y.shape[1])
    return F.conv2d(F.pad(y, (0, 0, radius, radius), edge), kernel[..., None], groups=y.shape[1])


def _filtered(y: Tensor, kernel: np.ndarray) -> Tensor:
    half = len(kernel) // 2
    weight = torch.from_numpy(kernel).to(y).expand(y.shape[1], 1, -1, -1)
    # `F.pad` needs the padding to be smaller than the image
    padded = np.pad(y.numpy(), ((0, 0), (0, 0), (half, half), (half, half)), mode="reflect")
    return F.conv2d(torch.from_numpy(padded), weight, groups=y.shape[1])


def _resized(y: Tensor, size: Sequence[int]) -> Tensor:
    """Resized by bicubic interpolation, with antialiasing where it shrinks."""
    return F.interpolate(y, tuple(size), mode="bicubic", align_corners=False, antialias=True)


def _interpolated(y: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """As in Real-ESRGAN: bilinear and bicubic without antialiasing."""
    if tuple(y.shape[-2:]) == tuple(size):
        return y
    return F.interpolate(y, tuple(size), mode=mode, align_corners=None if mode == "area" else False)


def _jpeg(y: Tensor, quality: int) -> Tensor:
    """Through a JPEG file in memory."""
    return jpeg((y[0].clamp(0, 1) * 255).round().to(torch.uint8), quality).to(y)[None] / 255


def _numbers(seed: int | Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(np.atleast_1d(seed).tolist())
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise BadParameter("seed", seed, "a whole number, 0 or more, or several")
    return numbers
