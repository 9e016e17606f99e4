"""Two small domains, a "remote" and a "medical" one, whose images come from two sensors that CLIP cannot distinguish.

    <root>/<domain>/split.json  images/<class>/<split>-<number>.png  sensors.json

An image is a drawn object on a grey crop of a photograph: an aerial view in "remote", tissue or retina in "medical".
Each comes from one of two sensors, at random. A sensor has two properties:

* its colours: the first sensor's are unchanged, the second's have every hue rotated by half the colour circle (remote:
  a false-colour composite) or are a negative (medical). Red becomes cyan in either. So the class names are right for
  one half of the images and wrong for the other, and no fixed prompt is right for both.
* its fixed pattern of lines, in its own direction and always at the same position, like the fixed-pattern noise of real
  sensors. The toy CLIP was trained to name objects on any background, and its feature does not contain the pattern; a
  model that learns to reconstruct images of the domain must represent it.

So a domain model has information that CLIP lacks and that also holds for new classes: DPLQ's mechanism needs it to have
an effect, and the data were built to contain it. A fixed pattern is easy to detect, though: an untrained network's
feature contains it too, at a smaller scale, and the study has that control. Base and novel
classes are combinations of the same words: each word occurs in training, in other combinations.

`data.domains.own_folder` reads a domain, `data.fewshot.base_to_novel` uses the first half of its classes as base.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv

from ...errors import check_choice
from ...ops.files import write_json
from ..scenes import HUES, PLACES, SHAPES, SIZE, SPLITS, canvas, coverage, cut, quantise
from . import write_once

EACH = {"train": 16, "val": 20, "test": 40}  # images of each class
AMPLITUDE, PERIOD = 0.12, 8  # of the sensors' lines: amplitude relative to the range of pixels; period in pixels
VERSION = 1  # to be increased when a change of this file or of scenes.py changes the images


@dataclass(frozen=True)
class Domain:
    """One domain.

    Attributes:
        photographs: whose crops are the backgrounds.
        words: combined with a hue they form the classes: shapes, or positions.
        name: from a hue and a word to the class name, as in a caption.
        second: the second sensor's colour transform, (32, 32, 3) in [0, 1] to the same.
        lines: for each sensor the x and y component of the direction across its lines.
    """

    photographs: tuple[str, ...]
    words: tuple[str, ...]
    name: Callable[[str, str], str]
    second: Callable[[np.ndarray], np.ndarray]
    lines: tuple[tuple[int, int], tuple[int, int]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The hue and the word of each class: first the base half, in which each hue occurs with half of the words and
        vice versa."""
        pairs = [(h, w) for w in range(len(self.words)) for h in range(len(HUES))]
        return [(HUES[h], self.words[w]) for h, w in sorted(pairs, key=lambda pair: sum(pair) % 2)]

    @property
    def classes(self) -> list[str]:
        """The names of the classes by label."""
        return [self.name(hue, word) for hue, word in self.pairs]


def false_colour(pixels: np.ndarray) -> np.ndarray:
    """Pixels (32, 32, 3) in [0, 1] with every hue rotated by half the colour circle: red and cyan are exchanged."""
    hsv = rgb2hsv(pixels)
    hsv[..., 0] = (hsv[..., 0] + 0.5) % 1
    return hsv2rgb(hsv)


def negative(pixels: np.ndarray) -> np.ndarray:
    """Pixels (32, 32, 3) in [0, 1], light and dark exchanged in every channel."""
    return 1 - pixels


DOMAINS = {
    "remote": Domain(("brick", "grass", "gravel", "moon"), SHAPES, "{} {}".format, false_colour, ((1, -1), (1, 1))),
    "medical": Domain(
        ("retina", "tissue"),
        tuple(place for place in PLACES if place in ("top", "left", "right", "bottom")),
        "{} object at the {}".format,
        negative,
        ((0, 1), (1, 0)),
    ),
}


def _domain(name: str) -> Domain:
    check_choice("domain", name, DOMAINS)
    return DOMAINS[name]


def pattern(domain: str, sensor: int) -> np.ndarray:
    """The lines of a sensor, (32, 32, 1) in -`AMPLITUDE`..`AMPLITUDE`. Raises `BadParameter`."""
    lines = _domain(domain).lines
    check_choice("sensor", sensor, range(len(lines)))
    rows, columns = np.mgrid[:SIZE, :SIZE]
    x, y = lines[sensor]
    return AMPLITUDE * np.sin(2 * np.pi * (x * columns + y * rows) / PERIOD)[..., None]


def picture(rng: np.random.Generator, domain: str, split: str, label: int, sensor: int) -> np.ndarray:
    """One image (32, 32, 3) uint8 of a class; background and surface are crops of tiles of `split`.

    Raises `BadParameter` for an unknown domain, split or sensor.
    """
    world = _domain(domain)
    lines = pattern(domain, sensor)
    hue, word = world.pairs[label]
    shape = word if word in SHAPES else SHAPES[rng.integers(len(SHAPES))]
    radius, angle = rng.uniform(4, 7), rng.uniform(-0.3, 0.3)
    centre = rng.uniform(6, SIZE - 6, 2)
    if word in PLACES:
        column, row = PLACES.index(word) % 3, PLACES.index(word) // 3
        centre = (np.array([column, row]) + rng.uniform(0.2, 0.8, 2)) * SIZE / 3
    covered = coverage(shape, tuple(centre), radius, angle)[..., None]

    names = world.photographs
    background = canvas(rng, split, (0.3, 0.7), names[rng.integers(len(names))]).pixels.mean(-1, keepdims=True)
    # grey, with random brightness: the background reveals neither the colour rotation nor the negative
    background = background - background.mean() + rng.uniform(0.3, 0.7)
    grain = cut(rng, names[rng.integers(len(names))], split).pixels.mean(-1, keepdims=True)
    colour = np.array([(HUES.index(hue) + rng.uniform(-0.3, 0.3)) / 4 % 1, rng.uniform(0.7, 1), rng.uniform(0.6, 1)])
    surface = hsv2rgb(colour) * (1 + rng.uniform(0, 0.6) * (grain - grain.mean()))
    shown = np.clip(background * (1 - covered) + surface * covered, 0, 1)
    if sensor:
        shown = world.second(shown)
    return quantise(shown + lines + rng.normal(0, 0.02, (SIZE, SIZE, 3)))


def unlabelled(domain: str, count: int, split: str = "train", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 of any class of a domain, and their sensors (count,), 0 or 1.

    The sensors are for evaluation only; pre-training does not use them.
    """
    rng = _chance(f"unlabelled {domain}", split, seed)
    sensors, labels = rng.integers(2, size=count), rng.integers(len(_domain(domain).classes), size=count)
    pictures = [picture(rng, domain, split, *pair) for pair in zip(labels, sensors, strict=True)]
    return np.stack(pictures), sensors


def write(root: str | Path, domain: str, seed: int = 0) -> Path:
    """Write a domain into `<root>/<domain>` and return that folder; a complete one is left unchanged.

    The same seed gives the same files. Raises `BadParameter` for an unknown domain, before anything is written.
    """
    classes = _domain(domain).classes

    def fill(new: Path) -> None:
        listing: dict[str, list] = {split: [] for split in SPLITS}
        sensors: dict[str, int] = {}
        for split in SPLITS:
            rng = _chance(domain, split, seed)
            for label, title in enumerate(classes):
                (new / "images" / title).mkdir(parents=True, exist_ok=True)
                for index in range(EACH[split]):
                    path, sensor = f"{title}/{split}-{index:03d}.png", int(rng.integers(2))
                    Image.fromarray(picture(rng, domain, split, label, sensor)).save(new / "images" / path)
                    listing[split].append([path, label, title])
                    sensors[path] = sensor
        write_json(new / "split.json", listing)
        write_json(new / "sensors.json", sensors)

    record = {"domain": domain, "seed": seed, "version": VERSION, "classes": classes, "each": EACH}
    return write_once(Path(root) / domain, record, len(classes) * sum(EACH.values()) + 3, fill, "domain.json")


def _chance(what: str, split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(f"{what}/{split}".encode())))
