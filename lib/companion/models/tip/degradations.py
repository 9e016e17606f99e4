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

The result depends on the seed and the image alone, not on the batch, the device or earlier draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2.functional import resize

from ...errors import BadParameter, check_choice

KINDS = ("blur", "resize", "noise", "jpeg")
EDGES = ("replicate", "circular")
BLIND = "Remove all degradation"  # figure: the restoration prompt that names no degradation

# --- degradations and their prompts -----------------------------------------------------------------------------------


class Op(NamedTuple):
    """One degradation and its strength."""

    kind: str  # "blur", "resize", "noise" or "jpeg"
    value: float  # sigma in pixels; downscaling factor per side; sigma of pixels in [0, 1]; quality 1 to 100


_WORDS = {
    "blur": ("Deblur with sigma {:.1f}", r"deblur with sigma (\d+(?:\.\d+)?)"),
    "resize": ("Upsample to {:.1f}x", r"upsample to (\d+(?:\.\d+)?)x"),
    "noise": ("Denoise with sigma {:.2f}", r"denoise with sigma (\d+(?:\.\d+)?)"),
    "jpeg": ("Dejpeg with quality {:.0f}", r"dejpeg with quality (\d+)"),
}
_DECIMALS = {"blur": 1, "resize": 1, "noise": 2, "jpeg": 0}
_NOTHING = {"blur": 0.0, "resize": 1.0, "noise": 0.0, "jpeg": 100.0}  # the values of the identity
_LIMITS = {"blur": (0, 100), "resize": (1, 64), "noise": (0, 1), "jpeg": (1, 100)}
GRAMMAR = (
    f"'{BLIND}', nothing, or instructions separated by ';': 'Deblur with sigma 3.0', 'Upsample to 4.0x', "
    "'Denoise with sigma 0.08', 'Dejpeg with quality 50'"
)


def rounded(op: Op) -> Op:
    """Rounded to the decimals of its prompt. Raises `BadParameter` for another kind or a value out of range."""
    check_choice("degradation", op.kind, KINDS)
    value, (low, high) = round(float(op.value), _DECIMALS[op.kind]), _LIMITS[op.kind]
    if not low <= value <= high:
        raise BadParameter(op.kind, op.value, f"{low} to {high}")
    return Op(op.kind, value)


def prompt(ops: Sequence[Op]) -> str:
    """The restoration prompt of degradations, in the order in which they were applied; "" for none."""
    return "; ".join(_WORDS[op.kind][0].format(op.value) for op in map(rounded, ops))


def parse(text: str) -> tuple[Op, ...] | None:
    """The degradations in a restoration prompt; None for `BLIND`, which names none. Case is ignored.

    Raises `BadParameter` with the grammar for anything else.
    """
    plain = " ".join(text.lower().split())
    if plain == BLIND.lower():
        return None
    ops = []
    for part in filter(None, (part.strip(" .") for part in plain.split(";"))):
        found = [(kind, re.fullmatch(pattern, part)) for kind, (_, pattern) in _WORDS.items()]
        hits = [(kind, match[1]) for kind, match in found if match]
        if not hits:
            raise BadParameter("restoration prompt", text, f"{GRAMMAR}; this is not one: '{part}'")
        ops.append(rounded(Op(hits[0][0], float(hits[0][1]))))
    return tuple(ops)


def scaled(text: str, kind: str, by: float) -> str:
    """A restoration prompt with one strength scaled: ("noise", 0.5) requests the removal of half of the noise.

    Strength is sigma for blur and noise, factor - 1 for downscaling, and 100 - quality for JPEG; an instruction of
    strength 0 is removed. Controlling strength in this way is the paper's (figure of prompt interpolation); the scales
    of Upsample and Dejpeg are ours.

    Raises `BadParameter` when the prompt does not name that degradation.
    """
    ops = parse(text)
    check_choice("kind", kind, KINDS)
    if by < 0:
        raise BadParameter("by", by, "0 or more")
    if not ops or kind not in [op.kind for op in ops]:
        raise BadParameter("restoration prompt", text, f"one that names a degradation '{kind}' with its number")
    low, high = _LIMITS[kind]
    zero = _NOTHING[kind]

    def less(op: Op) -> Op:
        return rounded(Op(kind, min(max(zero + by * (op.value - zero), low), high))) if op.kind == kind else op

    return prompt([op for op in map(less, ops) if op.value != _NOTHING[op.kind]])


# --- the parameterised pipeline ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The distribution of degradations: passes of blur, resize, noise and JPEG, each skipped with a probability.

    Attributes:
        blur: sigma in pixels. This and the next three are the bounds of a uniform distribution, or with `listed` the
            values themselves.
        resize: downscaling factor per side.
        noise: sigma, pixels being in [0, 1].
        jpeg: quality.
        passes: 2 in the figure.
        skip: probability of skipping an operation; a mapping has one for each kind.
        listed: see `blur`.
    """

    blur: tuple[float, ...] = (0.2, 6.0)
    resize: tuple[float, ...] = (1.0, 8.0)
    noise: tuple[float, ...] = (0.0, 0.25)
    jpeg: tuple[float, ...] = (20, 95)
    passes: int = 2
    skip: float | Mapping[str, float] = 0.5
    listed: bool = False

    def __post_init__(self):
        for kind in KINDS:
            values = getattr(self, kind)
            if not values or (not self.listed and (len(values) != 2 or values[0] > values[1])):
                raise BadParameter(kind, values, "a lower and an upper end, or with listed=True one value or more")
            for value in values:
                rounded(Op(kind, value))
        if self.passes < 1:
            raise BadParameter("passes", self.passes, "1 or more")
        if any(not 0 <= self._skips(kind) <= 1 for kind in KINDS):
            raise BadParameter("skip", self.skip, "probabilities, one or one for each kind")

    def _skips(self, kind: str) -> float:
        return self.skip if isinstance(self.skip, (int, float)) else self.skip.get(kind, -1)

    def draw(self, seed: int | Sequence[int]) -> tuple[Op, ...]:
        """The operations of one image, with values rounded as in their prompt; identities are left out."""
        rng, ops = np.random.default_rng([1, *_numbers(seed)]), []
        for _ in range(self.passes):
            for kind in KINDS:
                values = getattr(self, kind)
                # always drawn: whether one operation is skipped must not change the random numbers of the next
                chance = rng.random()
                value = values[rng.integers(len(values))] if self.listed else rng.uniform(*values)
                op = rounded(Op(kind, value))
                if op.value != _NOTHING[kind] and chance >= self._skips(kind):
                    ops.append(op)
        return tuple(ops)


def degrade(x: Tensor, ops: Sequence[Op], seed: int | Sequence[int], *, edge: str = "replicate") -> Tensor:
    """Apply degradations, one after the other, to an image (3, H, W) in [0, 1]; the result has its size.

    Args:
        ops: rounded first, as in their prompt.
        seed: of the noise.
        edge: padding of a blur: the border's pixels ("replicate") or the opposite side's ("circular").
    """
    check_choice("edge", edge, EDGES)
    y, size = _checked(x)[None], x.shape[-2:]
    for place, op in enumerate(map(rounded, ops)):
        if op.value == _NOTHING[op.kind]:
            continue
        if op.kind == "blur":
            y = _blurred(y, op.value, edge)
        elif op.kind == "resize":
            y = _resized(_resized(y, [max(1, round(n / op.value)) for n in size]), size)
        elif op.kind == "noise":
            generator = torch.Generator().manual_seed(_mixed(2, *_numbers(seed), place))
            y = y + op.value * torch.randn(y.shape, generator=generator).to(y)
        else:
            y = _jpeg(y, int(op.value))
        y = y.clamp(0, 1)
    return y[0]


# --- the blind pipeline -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One of the two passes of Real-ESRGAN. Ranges are the bounds of a uniform distribution."""

    blur: float  # probability
    sigma: tuple[float, float]
    resize: tuple[float, float, float]  # probabilities of larger, smaller, same
    factor: tuple[float, float]  # of the side
    gaussian: tuple[float, float]  # sigma of 255
    poisson: tuple[float, float]  # scale
    sinc: float = 0.1
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # of `KERNELS`
    generalised: tuple[float, float] = (0.5, 4.0)  # shape of the generalised Gaussians
    plateau: tuple[float, float] = (1.0, 2.0)
    is_gaussian: float = 0.5
    grey: float = 0.4
    jpeg: tuple[float, float] = (30, 95)


KERNELS = ("iso", "aniso", "generalised iso", "generalised aniso", "plateau iso", "plateau aniso")


@dataclass(frozen=True)
class RealESRGAN:
    """The published settings (train_realesrnet_x4plus.yml at a4abfb2). JPEG qualities are whole here."""

    first: Pass = field(
        default_factory=lambda: Pass(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
    )
    second: Pass = field(
        default_factory=lambda: Pass(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))
    )
    final_sinc: float = 0.8
    sinc_first: float = 0.5  # probability that the last filter precedes the last JPEG
    scale: int = 4


def blind(x: Tensor, seed: int | Sequence[int], settings: RealESRGAN | None = None, *, restore: bool = True) -> Tensor:
    """Real-ESRGAN's second-order degradation of an image (3, H, W) in [0, 1].

    Args:
        restore: resize the result, 1 / scale per side, back to the size of x by bicubic interpolation (ours: TIP's
            inputs have the size of their targets). False: (3, H / scale, W / scale), as released.
    """
    s = settings or RealESRGAN()
    y, (height, width) = _checked(x)[None], x.shape[-2:]
    small = max(1, height // s.scale), max(1, width // s.scale)
    rng = np.random.default_rng([3, *_numbers(seed)])

    def filters() -> str:
        return str(rng.choice(["area", "bilinear", "bicubic"]))

    for number, p in enumerate((s.first, s.second)):
        kernel = _kernel(rng, p)
        if rng.random() < p.blur:
            y = _filtered(y, kernel)
        up, down, _ = p.resize
        chance = rng.random()
        low, high = (1.0, p.factor[1]) if chance < up else (p.factor[0], 1.0) if chance < up + down else (1.0, 1.0)
        factor, base = rng.uniform(low, high), small if number else (height, width)
        y = _interpolated(y, [max(1, int(n * factor)) for n in base], filters())
        y = _noisy(rng, y, p)
        if number == 0:
            y = _jpeg(y, round(rng.uniform(*p.jpeg)))
    quality, kind = round(rng.uniform(*s.second.jpeg)), filters()
    sinc = _sinc(rng.uniform(math.pi / 3, math.pi), _odd(rng)) if rng.random() < s.final_sinc else None

    def filtered(y: Tensor) -> Tensor:
        y = _interpolated(y, small, kind)
        return y if sinc is None else _filtered(y, sinc)

    y = _jpeg(filtered(y), quality) if rng.random() < s.sinc_first else filtered(_jpeg(y, quality))
    y = (y.clamp(0, 1) * 255).round() / 255
    return (_resized(y, (height, width)).clamp(0, 1) if restore else y)[0]


def _noisy(rng: np.random.Generator, y: Tensor, p: Pass) -> Tensor:
    """Gaussian or scaled Poisson noise; grey noise is the same in all channels. Clamped."""
    gaussian, grey = rng.random() < p.is_gaussian, rng.random() < p.grey
    if gaussian:
        sigma = rng.uniform(*p.gaussian) / 255
        noise = sigma * rng.standard_normal((1, *y.shape[1:]) if not grey else (1, 1, *y.shape[2:]))
        return (y + torch.from_numpy(noise).to(y)).clamp(0, 1)
    scale = rng.uniform(*p.poisson)
    clean = y.clamp(0, 1)
    if grey:
        clean = (clean * clean.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    clean = (clean * 255).round() / 255  # after the mean: the more values, the weaker the noise
    levels = 2.0 ** math.ceil(math.log2(max(2, len(clean.unique()))))
    counts = rng.poisson((clean * levels).cpu().double().numpy()) / levels
    return (y + scale * (torch.from_numpy(counts).to(y) - clean)).clamp(0, 1)


def _odd(rng: np.random.Generator) -> int:
    return 2 * int(rng.integers(3, 11)) + 1  # 7, 9, ... 21


def _kernel(rng: np.random.Generator, p: Pass) -> np.ndarray:
    """A blur kernel of odd size and sum 1."""
    side = _odd(rng)
    if rng.random() < p.sinc:
        return _sinc(rng.uniform(math.pi / (3 if side < 13 else 5), math.pi), side)
    name = KERNELS[rng.choice(len(KERNELS), p=np.divide(p.kernels, sum(p.kernels)))]
    across = rng.uniform(*p.sigma)
    along, turn = (rng.uniform(*p.sigma), rng.uniform(-math.pi, math.pi)) if "aniso" in name else (across, 0.0)
    low, high = p.generalised if "generalised" in name else p.plateau
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


TASKS: dict[str, dict[str, Any]] = {
    "parameterised": {"share_blind": 0.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False, "flip": False},
    "real-esrgan": {"share_blind": 1.0, "blind_prompt": 0.0, "no_caption": 0.0, "fresh": False, "flip": False},
}
"""Arguments of `Degraded` for a test: every sample has its true texts and is the same every time (ours)."""


class Degraded(Dataset):
    """Square images and degraded copies: `samples[i]` is a `Sample`.

    The figure has two random choices: whether c_r describes the degradations or is `BLIND`, and whether c_s is the
    caption or empty; it does not give their probabilities. All numbers here are ours; a sample depends on
    `seed` and its index.

    Args:
        pictures: images with captions, such as `data.restoration.Captioned`.
        size: S. An image's shorter side is resized to S, then a square is cropped: at random if `fresh` is set,
            otherwise the centre. So the caption still describes most of the crop.
        recipe: of the parameterised pipeline.
        share_blind: share of samples degraded by Real-ESRGAN's pipeline; their c_r is `BLIND`.
        blind_prompt: probability that c_r of another sample is also `BLIND`.
        no_caption: probability that c_s is empty.
        fresh: a new draw each time a sample is loaded, from torch's random state, which `fit.fit` sets by seed, epoch
            and index.
        flip: horizontal flip with probability 0.5.
        seed: of all random draws.
        edge: see `degrade`.
    """

    def __init__(
        self,
        pictures: Dataset,
        size: int,
        recipe: Recipe | None = None,
        *,
        share_blind: float = 0.5,
        blind_prompt: float = 0.5,
        no_caption: float = 0.3,
        fresh: bool = True,
        flip: bool = True,
        seed: int = 0,
        edge: str = "replicate",
    ):
        for name, value in (("share_blind", share_blind), ("blind_prompt", blind_prompt), ("no_caption", no_caption)):
            if not 0 <= value <= 1:
                raise BadParameter(name, value, "a probability, 0 to 1")
        if size < 1:
            raise BadParameter("size", size, "1 pixel or more")
        self.pictures, self.size, self.recipe = pictures, size, recipe or Recipe()
        self.share_blind, self.blind_prompt, self.no_caption = share_blind, blind_prompt, no_caption
        self.fresh, self.flip, self.seed, self.edge = fresh, flip, seed, edge

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture, caption = self.pictures[index]
        numbers = (self.seed, index, *([int(torch.randint(2**31, ()))] if self.fresh else []))
        # all numbers are always drawn: one probability must not change the draws of another
        where, turned, is_blind, unnamed, untold = np.random.default_rng([4, *numbers]).random(5)
        clean = _square(picture, self.size, where if self.fresh else 0.5)
        if self.flip and turned < 0.5:
            clean = clean.flip(-1)
        if is_blind < self.share_blind:
            ops, degraded, restoration = None, blind(clean, numbers), BLIND
        else:
            ops = self.recipe.draw(numbers)
            degraded = degrade(clean, ops, numbers, edge=self.edge)
            restoration = BLIND if unnamed < self.blind_prompt else prompt(ops)
        return Sample(clean, degraded, "" if untold < self.no_caption else caption, restoration, ops)


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

    Raises `BadParameter` for another kind, or where no sample has another text.
    """
    check_choice("texts", kind, TEXTS)
    semantic, restoration = [s.semantic for s in samples], [s.restoration for s in samples]

    def other(given: list[str]) -> list[str]:
        if len(set(given)) < 2:
            raise BadParameter("samples", f"{len(given)} with the same text", f"some with another, for {kind!r}")
        return [next(t for t in (*given[i:], *given[:i]) if t != given[i]) for i in range(len(given))]

    none, blind_only = [""] * len(samples), [BLIND] * len(samples)
    return {
        "own": lambda: (semantic, restoration),
        "no text": lambda: (none, blind_only),
        "semantic only": lambda: (semantic, blind_only),
        "restoration only": lambda: (none, restoration),
        "blind prompt": lambda: (semantic, blind_only),
        "wrong semantic prompt": lambda: (other(semantic), restoration),
        "wrong restoration prompt": lambda: (semantic, other(restoration)),
        "prompts swapped": lambda: (restoration, semantic),
    }[kind]()


def _square(picture: Tensor, size: int, where: float) -> Tensor:
    """(3, size, size): the shorter side resized to `size`, then cropped at `where`, 0 to 1, along the longer side."""
    height, width = picture.shape[-2:]
    if min(height, width) != size:
        by = size / min(height, width)
        wanted = [max(size, round(height * by)), max(size, round(width * by))]
        picture = resize(picture, wanted, interpolation=3, antialias=True).clamp(0, 1)
        height, width = wanted
    top, left = round(where * (height - size)), round(where * (width - size))
    return picture[:, top : top + size, left : left + size].contiguous()


# --- operations on (1, 3, H, W) ---------------------------------------------------------------------------------------


def _checked(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point() or x.numel() == 0:
        raise BadParameter("picture", getattr(x, "shape", type(x)), "a float tensor (3, H, W) in [0, 1]")
    if not (x.amin() >= 0 and x.amax() <= 1):
        raise BadParameter("picture", "values outside [0, 1]", "a float tensor (3, H, W) in [0, 1]")
    return x


def _blurred(y: Tensor, sigma: float, edge: str) -> Tensor:
    """Gaussian, truncated at 3 sigma, separable."""
    radius = math.ceil(3 * sigma)
    if edge == "circular":
        radius = min(radius, *y.shape[-2:])
    places = torch.arange(-radius, radius + 1, dtype=y.dtype, device=y.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(y.shape[1], 1, -1)
    y = F.conv2d(F.pad(y, (radius, radius, 0, 0), edge), kernel[:, :, None], groups=y.shape[1])
    return F.conv2d(F.pad(y, (0, 0, radius, radius), edge), kernel[..., None], groups=y.shape[1])


def _filtered(y: Tensor, kernel: np.ndarray) -> Tensor:
    half = len(kernel) // 2
    weight = torch.from_numpy(kernel).to(y).expand(y.shape[1], 1, -1, -1)
    return F.conv2d(_mirrored(y, half), weight, groups=y.shape[1])


def _mirrored(y: Tensor, pad: int) -> Tensor:
    """Reflection padding of any size (`F.pad` needs the padding to be smaller than the image)."""
    for dim in (-2, -1):
        n = y.shape[dim]
        place = torch.arange(-pad, n + pad, device=y.device) % max(2 * n - 2, 1)
        y = y.index_select(dim, torch.minimum(place, (2 * n - 2 - place).abs()))
    return y


def _resized(y: Tensor, size: Sequence[int]) -> Tensor:
    """Resized by bicubic interpolation, with antialiasing where it shrinks."""
    return F.interpolate(y, tuple(size), mode="bicubic", align_corners=False, antialias=True)


def _interpolated(y: Tensor, size: Sequence[int], filter: str) -> Tensor:
    """As in Real-ESRGAN: bilinear and bicubic without antialiasing."""
    if tuple(y.shape[-2:]) == tuple(size):
        return y
    return F.interpolate(y, tuple(size), mode=filter, **({} if filter == "area" else {"align_corners": False}))


def _jpeg(y: Tensor, quality: int) -> Tensor:
    """Through a JPEG file in memory."""
    pixels = (y[0].clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return decode_jpeg(encode_jpeg(pixels, quality), mode=ImageReadMode.RGB).to(y)[None] / 255


def _numbers(seed: int | Sequence[int]) -> tuple[int, ...]:
    return (seed,) if isinstance(seed, int) else tuple(seed)


def _mixed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
