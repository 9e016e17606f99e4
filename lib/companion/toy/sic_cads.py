"""SIC-CADS' ablation at toy scale: scenes whose background predicts the classes, the branches, one training, one score.

There are four backgrounds of 64x64 pixels, each a crop of a photograph: a meadow (grass), a wall (brick), a path
(gravel) and the night (stars). Each has its own four objects, coloured shapes: three of base classes, one of a novel
class. A novel object has the shape and nearly the hue of a base object of the *next* background, as a tennis ball looks
like an apple: its appearance is ambiguous, its background is not. Seven of eight objects are on their own background,
the others on any. An object is plain or hard: small, blurred, faded, and half of the hard ones are partly hidden by a
post. Four of five novel objects are hard, one of three base objects. Training images keep their novel objects but not
the boxes of these, as in OV-COCO; splits share no pixel of a photograph.

Detector and CLIP are frozen: in the task "shipped detector" they are the same for all seeds, in the task "detector from
scratch" both are trained for each seed, so that its spread includes them. Each seed has its own images and its own
recogniser (MLR), trained on the labels of base classes. Both lambdas are those released for OV-COCO, gamma that of
OV-LVIS; the sweep over gamma is measured on test images, and nothing is chosen by it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import hsv2rgb
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.ops import box_convert, box_iou

from ..backbones import Input
from ..data import detection as data
from ..data import own_set
from ..data.coco import read_annotations
from ..errors import check_choice
from ..evaluation.ablations import Study
from ..evaluation.metrics.detection import evaluate
from ..io.files import write_json
from ..models.sic_cads import model as sic_cads
from ..models.sic_cads.detectors import rows as coco_rows
from ..models.sic_cads.model import Output
from ..models.sic_cads.predictions import BRANCHES, branch_scores, recognition
from ..training.fit import History, fit
from ..training.hardware import CPU
from ..training.schedules import adamw
from .encoders import detector as encoders
from .encoders.detector import SIDE
from .encoders.vit_and_clip import pixels
from .scenes import SPLITS, cut, photograph, quantise, tiles

COUNTS = {"train": 900, "val": 200, "test": 300}
LOOKS = ("plain", "hard", "hidden")
PLACES = {"meadow": "grass", "wall": "brick", "path": "gravel", "night": "stars"}
"""The kinds of background and the photographs that show them."""


# --- the classes ---


@dataclass(frozen=True)
class Thing:
    """A class: its background and its appearance. `like` names the base class that a novel one resembles."""

    name: str
    place: str
    shape: str
    hue: float
    like: str = ""


def _things() -> tuple[Thing, ...]:
    base = {
        "meadow": {"apple": "disc", "tent": "triangle", "daisy": "cross"},
        "wall": {"lamp": "disc", "sign": "square", "hook": "cross"},
        "path": {"pebble": "disc", "cone": "triangle", "crate": "square"},
        "night": {"moon": "disc", "rocket": "triangle", "star": "cross"},
    }
    known, number = {}, 0
    for place, shapes in base.items():
        for name, shape in shapes.items():
            # steps of the golden ratio: neighbours in the list are far apart in hue
            known[name] = Thing(name, place, shape, number * 0.618034 % 1)
            number += 1
    novel = {
        "ball": ("meadow", "lamp"),
        "tile": ("wall", "crate"),
        "flag": ("path", "rocket"),
        "flare": ("night", "daisy"),
    }
    for name, (place, like) in novel.items():
        known[name] = Thing(name, place, known[like].shape, (known[like].hue + 0.03) % 1, like)
    return tuple(known.values())


THINGS = _things()
"""The 16 classes: the 12 of base, then the four novel ones."""

NOVEL = tuple(index for index, thing in enumerate(THINGS) if thing.like)
BASE = tuple(index for index, thing in enumerate(THINGS) if not thing.like)
IDS = range(1, 1 + len(THINGS))  # of their COCO categories


# --- drawing ---


@dataclass(frozen=True)
class Scene:
    """One image.

    Attributes:
        image: (64, 64, 3) uint8.
        place: one of `PLACES`.
        labels: the classes of its n objects, indices of `THINGS`.
        boxes: (n, 4) x, y, w, h in pixels, of the whole object, including parts hidden by a post.
        looks: for each object, one of `LOOKS`.
    """

    image: np.ndarray
    place: str
    labels: tuple[int, ...]
    boxes: np.ndarray
    looks: tuple[str, ...]


def backdrop(rng: np.random.Generator, place: str, split: str) -> np.ndarray:
    """A window (64, 64, 3) in [0, 1] of one tile of `split` of a background's photograph, lower in contrast, tinted."""
    check_choice("place", place, PLACES)
    places = tiles(PLACES[place], split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = int(rng.integers(SIDE, min(right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph(PLACES[place])[y : y + side, x : x + side])
    pixels = np.asarray(window.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float).mean(-1) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    # equal mean and standard deviation, and no colour but a random tint: only the texture distinguishes backgrounds
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-3)
    tint = hsv2rgb(np.array([rng.random(), rng.uniform(0, 0.25), 1.0]))
    return (rng.uniform(0.35, 0.6) + rng.uniform(0.08, 0.14) * np.clip(pixels, -2.5, 2.5))[..., None] * tint


def coverage(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel an upright shape covers, (64, 64) in [0, 1]; it extends by `radius` to every side."""
    rows, columns = np.ogrid[:SIDE, :SIDE]
    u, v = columns + 0.5 - centre[0], rows + 0.5 - centre[1]
    wide, high, arm = abs(u) - radius, abs(v) - radius, 0.34 * radius
    distance = {
        "disc": lambda: np.hypot(u, v) - radius,
        "square": lambda: np.maximum(wide, high),
        # two slanted sides over a horizontal one
        "triangle": lambda: np.maximum((2 * abs(u) - v - radius) / np.sqrt(5), v - radius),
        "cross": lambda: np.minimum(np.maximum(wide, abs(v) - arm), np.maximum(high, abs(u) - arm)),
    }
    return np.clip(0.5 - distance[shape](), 0, 1)


def _layout(rng: np.random.Generator, sides: list[float]) -> list[tuple[float, float]] | None:
    """Centres of squares with these sides that are inside the image and do not touch; None when none were found."""
    placed: list[tuple[float, float]] = []
    for number, side in enumerate(sides):
        for _ in range(40):
            x, y = rng.uniform(side / 2 + 1, SIDE - side / 2 - 1, 2)
            apart = [max(abs(x - a), abs(y - b)) - (side + sides[i]) / 2 for i, (a, b) in enumerate(placed)]
            if min(apart, default=9.0) >= 2:
                placed.append((float(x), float(y)))
                break
        if len(placed) == number:
            return None
    return placed


def _draw(
    rng: np.random.Generator,
    pixels: np.ndarray,
    thing: Thing,
    centre: tuple[float, float],
    side: float,
    look: str,
    split: str,
) -> np.ndarray:
    """`pixels` with an object drawn on them."""
    hard = look != "plain"
    hue = (thing.hue + rng.uniform(-0.018, 0.018)) % 1
    saturation, value = rng.uniform(0.75, 1), rng.uniform(0.7, 1)
    if hard:
        saturation *= rng.uniform(0.25, 0.5)
    grain = cut(rng, PLACES[thing.place], split).pixels.mean(-1)
    # the surface is also a crop of any background's photograph: its luminance times the object's colour
    grain = np.tile(grain - grain.mean(), (2, 2))[..., None]
    surface = hsv2rgb(np.array([hue, saturation, value])) * (1 + rng.uniform(0, 0.4) * grain)
    covered = coverage(thing.shape, centre, side / 2)
    if hard:  # out of focus: a soft outline on a sharp background
        covered = gaussian_filter(covered, rng.uniform(0.8, 1.4))
    pixels = pixels * (1 - covered[..., None]) + surface * covered[..., None]
    if look == "hidden":
        # a post in front of it, in the image's mean grey, over about a third of its width
        wide = side * rng.uniform(0.25, 0.4)
        left = centre[0] - side / 2 + rng.uniform(0.1, 0.9) * (side - wide)
        columns = np.arange(SIDE)
        post = np.clip(np.minimum(columns + 1, left + wide) - np.maximum(columns, left), 0, 1)
        rows = np.clip(side / 2 + 3.5 - abs(columns + 0.5 - centre[1]), 0, 1)
        mask = (rows[:, None] * post)[..., None]
        pixels = pixels * (1 - mask) + rng.uniform(0.15, 0.85) * mask
    return pixels


def scene(rng: np.random.Generator, split: str, *, place: str = "", novel: bool = True) -> Scene:
    """Draw one scene with two to four objects, an eighth of them from all classes, whatever the background.

    Args:
        rng: the only source of randomness.
        split: the split whose tiles are used.
        place: one of `PLACES`; random when empty.
        novel: whether objects of novel classes may occur.
    """
    place = place or list(PLACES)[rng.integers(len(PLACES))]
    pixels = backdrop(rng, place, split)
    allowed = BASE + NOVEL if novel else BASE
    here = [index for index in allowed if THINGS[index].place == place]
    centres = None
    while centres is None:  # objects that do not fit are redrawn
        labels, looks, sides = [], [], []
        for _ in range(int(rng.integers(2, 5))):
            index = int(rng.choice(allowed if rng.random() < 0.125 else here))
            hard = rng.random() < (0.8 if index in NOVEL else 0.35)
            labels.append(index)
            looks.append(("hard", "hidden")[int(rng.random() < 0.5)] if hard else "plain")
            sides.append(rng.uniform(8, 11) if hard else rng.uniform(13, 22))
        centres = _layout(rng, sides)
    for index, look, side, centre in zip(labels, looks, sides, centres, strict=True):
        pixels = _draw(rng, pixels, THINGS[index], centre, side, look, split)
    pixels = pixels + rng.normal(0, 0.02, pixels.shape)
    boxes = np.array([(x - s / 2, y - s / 2, s, s) for (x, y), s in zip(centres, sides, strict=True)])
    return Scene(quantise(pixels), place, tuple(labels), boxes, tuple(looks))


def scenes(count: int, split: str, seed: int = 0, novel: bool = True) -> list[Scene]:
    """`count` random scenes of a split, deterministic in the arguments."""
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, SPLITS.index(split), int(novel)))
    return [scene(rng, split, novel=novel) for _ in range(count)]


# --- data ---


def annotated(split: str, drawn: Sequence[Scene]) -> dict:
    """COCO's annotations of a split; in training, the boxes of novel classes are left out.

    Two fields are ours, of an image: its "place", and the "looks" of its annotations.
    """
    images = []
    boxes: list[dict] = []
    for number, shown in enumerate(drawn, 1):
        own: dict[str, Any] = {"place": shown.place, "looks": []}
        images.append({"id": number, "file_name": f"{number:06d}.png", "width": SIDE, "height": SIDE, **own})
        for index, box, look in zip(shown.labels, shown.boxes, shown.looks, strict=True):
            if split == "train" and index in NOVEL:
                continue
            own["looks"].append(look)
            x, y, w, h = (round(float(value), 2) for value in box)
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": index + 1,
                    "bbox": [x, y, w, h],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": thing.name, "supercategory": thing.place} for i, thing in enumerate(THINGS, 1)]
    return {"images": images, "annotations": boxes, "categories": categories}


@functools.lru_cache(4)
def load(seed: int, split: str) -> data.Boxes:
    """The images of a split, "train", "val" or "test", and their boxes; the same seed gives the same ones."""
    drawn = scenes(COUNTS[split], split, seed)
    base, novel = ([index + 1 for index in group] for group in (BASE, NOVEL))
    truth = read_annotations(annotated(split, drawn))
    found = data.Boxes(own_set("scenes", "detection", ""), Path(), Path(), truth, base, novel)
    found.sources = np.stack([shown.image for shown in drawn])
    return found


def images_of(found: data.Boxes) -> Tensor:
    """All images of a split, (n, 3, 64, 64) uint8."""
    return torch.stack([image for image, _ in found])


def save(folder: Path, count: int = 96) -> Path:
    """Write images and `annotations.json`, the boxes of base classes in COCO's format; return the folder."""
    drawn = scenes(count, "train", seed=7)
    found = annotated("train", drawn)
    write_json(folder / "annotations.json", found)
    for entry, shown in zip(found["images"], drawn, strict=True):
        Image.fromarray(shown.image).save(folder / entry["file_name"])
    return folder


# --- detector and CLIP ---


def own_seed(seed: int) -> int:
    """The seed of the scenes of the toy models, which no run with seed `seed` has."""
    return 1_000_000 + seed


def stack(drawn: Sequence[Scene]) -> Tensor:
    """The images of scenes (n, 3, 64, 64), in [-1, 1]."""
    return pixels([shown.image for shown in drawn])


def named(drawn: Sequence[Scene]) -> Tensor:
    """Which classes are on each scene, (n, 16) of 0 and 1."""
    there = torch.zeros(len(drawn), len(THINGS))
    for row, shown in zip(there, drawn, strict=True):
        row[list(shown.labels)] = 1
    return there


def boxes_of(drawn: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4, 4) as x1 y1 x2 y2 and labels (n, 4) of scenes with at most four objects; label -1: none."""
    boxes, labels = torch.zeros(len(drawn), 4, 4), torch.full((len(drawn), 4), -1)
    for i, shown in enumerate(drawn):
        boxes[i, : len(shown.labels)] = box_convert(torch.from_numpy(shown.boxes).float(), "xywh", "xyxy")
        labels[i, : len(shown.labels)] = torch.tensor(shown.labels)
    return boxes, labels


def train_clip(pictures: int = 3000, seed: int = 0, **options: Any) -> encoders.SceneCLIP:
    """A CLIP trained on scenes and the names of their objects, novel classes among them, as in captions."""
    drawn = scenes(pictures, "train", own_seed(seed))
    return encoders.train_clip(stack(drawn), named(drawn), seed=seed, **options)


def train_detector(
    pictures: int = 2000, seed: int = 0, clip: encoders.SceneCLIP | None = None, **options: Any
) -> encoders.Detector:
    """A detector trained on scenes of base objects alone, with the text embeddings of `clip`, None the shipped one."""
    drawn = scenes(pictures, "train", own_seed(seed), novel=False)
    text = encoders.texts(clip or encoders.clip())[list(BASE)]
    return encoders.train_detector(stack(drawn), *boxes_of(drawn), text, seed=seed, **options)


@functools.lru_cache(2)
def foundation(task: str, seed: int) -> tuple[encoders.SceneCLIP, encoders.Detector]:
    """The frozen CLIP and detector of a task: the shipped ones, or two that are trained for this seed."""
    if task == "shipped detector":
        return encoders.clip(), encoders.detector()
    clip = train_clip(seed=1 + seed)
    return clip, train_detector(seed=1 + seed, clip=clip)


def detect(image: Tensor) -> Output:
    """All boxes of the shipped detector for an image (3, 64, 64), uint8, with the probabilities of all classes."""
    clip, detector = foundation("shipped detector", 0)
    boxes, probabilities = detector(image[None].float() / 127.5 - 1, encoders.texts(clip))
    return Output(boxes[0], probabilities[0], (image.shape[1], image.shape[2]))


@dataclass(frozen=True, eq=False)
class Detected:
    """A split, and the detector's outputs for its n images, before threshold, suppression and top-k.

    Attributes:
        found: images and boxes.
        images: (n, 3, 64, 64), uint8.
        boxes: (n, R, 4) xyxy, pixels.
        probabilities: (n, R, C).
    """

    found: data.Boxes
    images: Tensor
    boxes: Tensor
    probabilities: Tensor


@functools.lru_cache(2)
def detected(task: str, seed: int, split: str) -> Detected:
    """The outputs of a task's detector for a split."""
    clip, detector = foundation(task, seed)
    found, text = load(seed, split), encoders.texts(clip)
    images = images_of(found)
    parts = [detector(part.float() / 127.5 - 1, text) for part in images.split(100)]
    return Detected(found, images, *(torch.cat(column) for column in zip(*parts, strict=True)))


def study_data(task: str, seed: int, split: str) -> Any:
    """The images with base labels, to train; `detected`, to test."""
    return load(seed, "train") if split.startswith("train") else detected(task, seed, split)


# --- methods, training, score ---

# the released weight of the distillation, 0.01, belongs to 180,000 steps and 512 dimensions: here there are 216 and 64
LAMBDA_BASE, LAMBDA_NOVEL, GAMMA, TAU, DISTILL = 0.8, 0.5, 0.5, 20.0, 0.2
EPOCHS, BATCH, WEIGHT_DECAY = 12, 48, 1e-4
THRESHOLD, NMS, TOP = 0.01, 0.5, 50
GAMMAS = tuple(round(0.1 * i, 1) for i in range(11))
METHODS = ("no refinement", *BRANCHES)
UNTRAINED = ("no refinement", "visual+")
INPUT = Input(SIDE, (0.5,) * 3, (0.5,) * 3)
SETTINGS = sic_cads.Settings(
    indices=(1, 2, 3),
    width=32,
    lambda_base=LAMBDA_BASE,
    lambda_novel=LAMBDA_NOVEL,
    tau=TAU,
    distill=DISTILL,
    image_input=INPUT,
    teacher_input=INPUT,
    freeze_norms=False,
)


class MLR(sic_cads.MLR):
    """The recogniser without P6 and P7; its rank loss is that of the committed study, bit by bit."""

    top = None

    @functools.cached_property
    def base(self) -> Tensor:
        """The indices of the base classes."""
        return (~self.novel).nonzero().flatten()

    def ranked(self, scores: Tensor, positives: Tensor, boxes: Tensor | bool) -> Tensor:
        """The rank loss of boxes, summed over the positives alone."""
        scores, positives = scores[:, self.base], positives[:, self.base]
        image, label = positives.nonzero(as_tuple=True)
        each = (1 + scores[image] - scores[image, label, None]).clamp_min(0).mean(1)
        return (each / positives.sum(1).clamp_min(1)[image]).sum() / len(scores)


class Refined(nn.Module):
    """A recogniser and the branch whose scores refine the detector, a name of `METHODS`."""

    def __init__(self, model: sic_cads.MLR, method: str):
        super().__init__()
        self.model, self.method = model, method


def build(task: str = "shipped detector", seed: int = 0) -> MLR:
    """The recogniser of a task on a small body, its initial weights drawn from `seed`."""
    clip, _ = foundation(task, seed)
    novel = torch.tensor([bool(thing.like) for thing in THINGS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLR(encoders.Stages(), encoders.texts(clip), novel, SETTINGS, teacher=clip.visual)


def training_set(model: MLR, found: data.Boxes) -> TensorDataset:
    """Images, the base classes that they show, and CLIP's embeddings of their crops."""
    images = images_of(found)
    return TensorDataset(images, found.positives, torch.cat([model.teacher_embeddings(i) for i in images.split(100)]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The rank and the distillation loss of a batch of `training_set`, added."""
    images, positives, teacher = batch
    return sum(model.loss(images, positives, teacher=teacher))


@functools.lru_cache(2)  # the branches of one recogniser are methods that share its training
def _trained(task: str, found: data.Boxes, learning_rate: float, seed: int) -> tuple[MLR, History]:
    model = build(task, seed)
    history = fit(
        model,
        loss,
        training_set(model, found),
        epochs=EPOCHS,
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY, decay="all"),
        seed=seed,
        hardware=CPU,
        name="MLR",
    )
    return model, history


def train(method: str, task: str, found: data.Boxes, learning_rate: float, seed: int) -> tuple[Refined, History]:
    """The recogniser of a method, trained unless the method needs none, and its history."""
    model, history = (build(task, seed), []) if method in UNTRAINED else _trained(task, found, learning_rate, seed)
    return Refined(model.eval(), method), history


def score(refined: Refined, task: str, given: Detected) -> dict[str, float]:
    """The scores of a method on a split, in percent.

    AP50 of novel and base classes and of all; the mAP of the image-level scores alone; the share of objects with the
    right class, by look; AP50 over `GAMMAS`, "novel, gamma 0.3" and the like.
    """
    if refined.method == "no refinement":
        return _rounded(ap50(given, given.probabilities, "AP50 {}") | named_right(given, given.probabilities))
    p = branch_scores(refined.model, given.images)[refined.method]
    matrix = refine(given, p, GAMMA)
    row = ap50(given, matrix, "AP50 {}") | named_right(given, matrix)
    row |= {f"mAP {group}": value for group, value in recognition(given.found, p).items()}
    for gamma in GAMMAS:
        row |= ap50(given, refine(given, p, gamma), f"{{}}, gamma {gamma}", ("novel", "base"))
    return _rounded(row)


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in row.items()}


def refine(given: Detected, p: Tensor, gamma: float) -> Tensor:
    """Refined probabilities (n, R, C) of all boxes and classes: Eq. 7 on the full matrix of each image."""
    return torch.stack([sic_cads.refine(one, row, gamma) for one, row in zip(given.probabilities, p, strict=True)])


def ap50(
    given: Detected, matrix: Tensor, name: str, groups: Sequence[str] = ("novel", "base", "all")
) -> dict[str, float]:
    """AP50 by group of classes, in percent, of probabilities (n, R, C); `name`: a format of the columns."""
    rows, found = [], given.found
    for image_id, boxes, probabilities in zip(found.image_ids, given.boxes, matrix, strict=True):
        rows += coco_rows(sic_cads.detect(boxes, probabilities, THRESHOLD, NMS, TOP), image_id, IDS)
    scored = evaluate(found.truth, rows, top=TOP)
    values = {"base": scored.mean(found.base), "novel": scored.mean(found.novel), "all": scored.totals["AP50"]}
    return {name.format(group): values[group] for group in groups}


def named_right(given: Detected, matrix: Tensor) -> dict[str, float]:
    """The share of objects whose best overlapping box has its largest probability for their class, in percent.

    By group and look: "right base plain", "right novel hidden", ... An object without a box of IoU 0.5 counts as wrong.
    """
    looks = iter(look for image in given.found.images for look in image["looks"])
    hits: dict[str, list[bool]] = {}
    for number in range(len(given.found)):
        target = given.found.target(number)
        overlap, best = box_iou(target.boxes, given.boxes[number]).max(1)
        correct = (matrix[number, best].argmax(-1) == target.labels) & (overlap >= 0.5)
        for hit, label in zip(correct.tolist(), target.labels.tolist(), strict=True):
            group = "novel" if label in NOVEL else "base"
            hits.setdefault(f"right {group} {next(looks)}", []).append(hit)
    return {key: 100 * float(np.mean(values)) for key, values in sorted(hits.items())}


STUDY = Study(
    tasks={"shipped detector": METHODS, "detector from scratch": METHODS},
    # not larger: at 0.1 and 0.3 training fails (its loss ends half as high again, and twice as high), and yet the
    # metric rises: an untrained recogniser leaves the fused scores to CLIP's own, which are best for novel classes
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=study_data,
    fit=train,
    score=score,
    metric="AP50 novel",
    untrained=UNTRAINED,
)
