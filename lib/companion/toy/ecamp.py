"""ECAMP's ablation at toy scale: phantom chests with reports, pre-trainings, a linear probe and a segmenter.

A chest has 64x64 pixels: two dark lungs, a bright heart, and **exactly one finding** on a random side: a nodule, an
effusion (the lung's lower part), a pneumothorax (its upper part) or an opacity. One sentence of its report names the
finding, another one states that a different finding is absent; their order is random:

    there is a left nodule . there is no evidence of effusion .

As on a radiograph, "left" is the patient's left and the right of the image. The size of a finding is random and not in
the report. With a larger vocabulary and small findings, a text decoder of this size learned the language and not the
image (the specification, section 14); so reports are short and describe visible content: with a quarter of the patches
visible, a nodule is visible in two of three views. Nothing is a photograph; each split has its own random stream.

All encoders are the same small ViT, pre-trained on the same 2,000 chests and reports with the same optimiser, number of
epochs and grid of learning rates, and then frozen. A learning rate is selected by the mean of three probes, of 50, 200
and 1,500 labels, after full trainings: after shorter ones, in which words do not attend to the image yet, all methods
prefer too low a learning rate. Scores are in percent.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ..backbones import read_state
from ..data.xrays import write_reports
from ..errors import check_choice
from ..evaluation.ablations import Study
from ..evaluation.metrics import radiology
from ..models.ecamp import model as ecamp
from ..models.ecamp import variants
from ..models.ecamp.heads import MapDecoder, segmentation_loss
from ..models.ecamp.text import ReportPairs, Vocabulary
from ..training.fit import History, fit, outputs_of
from ..training.hardware import CPU
from ..training.schedules import adamw
from .encoders import weights_file
from .scenes import SPLITS

SIZE = 64  # side of every image, in pixels
FINDINGS = ("nodule", "effusion", "pneumothorax", "opacity")
SIDES = ("left", "right")  # the patient's
COUNTS = {"train": 2000, "val": 400, "test": 800}
MEAN, STD = 0.5, 0.15  # of the grey values in 0 to 1
# the words of all reports, in the order of the alphabet: ids of the shipped model
VOCABULARY = Vocabulary.from_words(sorted((*FINDINGS, *SIDES, "a", "evidence", "is", "no", "of", "there")))

_LUNG_X = {"left": 0.7, "right": 0.3}
_LUNG_Y, _HALF_X, _HALF_Y = 0.45, 0.16, 0.33
_SIZES = {"nodule": (0.1, 0.13), "effusion": (0.2, 0.32), "pneumothorax": (0.2, 0.3), "opacity": (0.1, 0.13)}
_ROWS, _COLUMNS = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE


# --- images and reports ---


class Chest(NamedTuple):
    """An image with its annotations.

    Attributes:
        image: (64, 64) uint16.
        mask: (64, 64) bool, the lesion.
        finding: one of `FINDINGS`.
        side: "left" or "right", the patient's.
        absent: the finding that the report states is absent.
        report: two sentences.
    """

    image: np.ndarray
    mask: np.ndarray
    finding: str
    side: str
    absent: str
    report: str

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the lesion, in pixels; right and bottom are exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _oval(x: float, y: float, half_x: float, half_y: float) -> np.ndarray:
    """A soft ellipse (64, 64): 1 inside, 0 outside, half on its edge."""
    far = np.hypot((_COLUMNS - x) / half_x, (_ROWS - y) / half_y)
    return 1 / (1 + np.exp((far - 1) * 12))


def _step(distance: np.ndarray) -> np.ndarray:
    """A soft step from 0 to 1 where `distance`, in units of the image's side, crosses 0, about a pixel wide."""
    return np.clip(0.5 + distance * SIZE, 0, 1)


def _lesion(
    rng: np.random.Generator, finding: str, lung: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The coverage of a finding, (64, 64) in 0 to 1, and its contribution to the grey values."""
    x, y, half_x, half_y = lung
    size = _SIZES[finding][rng.integers(2)]
    if finding in ("nodule", "opacity"):
        turn, far = rng.uniform(0, 2 * np.pi), 0.7 * np.sqrt(rng.random())
        left, top = x + far * half_x * np.cos(turn), y + far * half_y * np.sin(turn)
        if finding == "nodule":
            where = _step(size - np.hypot(_COLUMNS - left, _ROWS - top))
            return where, 0.5 * where
        where = np.exp(-((_COLUMNS - left) ** 2 + (_ROWS - top) ** 2) / (2 * size**2))
        blocks = np.kron(rng.normal(0, 1, (16, 16)), np.ones((4, 4)))
        return where, where * (0.15 + 0.18 * blocks)
    inside = _oval(*lung)
    if finding == "effusion":
        slope = rng.uniform(-0.4, 0.4)
        where = inside * _step(_ROWS - (y + half_y - size) + slope * (_COLUMNS - x))
        return where, 0.45 * where
    where = inside * _step(y - half_y + size - _ROWS)
    return where, -0.3 * where


def draw(rng: np.random.Generator) -> Chest:
    """A chest with a random finding."""
    finding, side = FINDINGS[rng.integers(4)], SIDES[rng.integers(2)]
    absent = rng.choice([name for name in FINDINGS if name != finding])
    grey = np.full((SIZE, SIZE), 0.55 + rng.normal(0, 0.05)) + 0.1 * (_ROWS - 0.5) * rng.normal()
    lungs = {}
    for name, centre in _LUNG_X.items():
        jitter = rng.normal(0, 0.02, 4)
        lungs[name] = tuple(np.array([centre, _LUNG_Y, _HALF_X, _HALF_Y]) + jitter)
        grey -= 0.32 * _oval(*lungs[name])
    grey += 0.25 * _oval(*(np.array([0.55, 0.66, 0.14, 0.16]) + rng.normal(0, 0.02, 4)))
    where, added = _lesion(rng, finding, lungs[side])
    grey += added + rng.normal(0, 0.04, grey.shape)
    # random exposure
    grey = (grey - grey.mean()) / grey.std() * rng.uniform(0.9, 1.1) + rng.normal(0, 0.1)
    image = np.round(np.clip(MEAN + STD * grey, 0, 1) * 65535).astype(np.uint16)
    negation = ("there is no", "there is no evidence of")[rng.integers(2)]
    sentences = [f"there is a {side} {finding} .", f"{negation} {absent} ."]
    report = " ".join(sentences if rng.random() < 0.5 else sentences[::-1])
    return Chest(image, where > 0.5, finding, side, str(absent), report)


def chests(count: int, split: str, seed: int = 0) -> list[Chest]:
    """`count` chests of a split, deterministic in the arguments. Raises `BadParameter` for an unknown split."""
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, zlib.crc32(f"chests/{split}".encode())))
    return [draw(rng) for _ in range(count)]


# --- data ---


class Part(NamedTuple):
    """A split.

    Attributes:
        images: (n, 1, 64, 64), standardised by `MEAN` and `STD`.
        labels: (n, 4), 0 or 1 for each of `FINDINGS`.
        masks: (n, 1, 64, 64), 0 or 1.
        boxes: (n, 4), left, top, right and bottom of the lesion, in pixels.
        reports: n texts.
        distilled: n statements, as a language model would distil the reports: plain sentences on the present entity.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor
    reports: tuple[str, ...]
    distilled: tuple[str, ...]


@functools.lru_cache(4)
def load(seed: int, split: str) -> Part:
    """A split, "train", "val" or "test"; the same seed gives the same chests."""
    drawn = chests(COUNTS[split], split, seed)
    grey = np.stack([chest.image for chest in drawn]).astype(np.float32) / 65535
    masks = np.stack([chest.mask for chest in drawn]).astype(np.float32)
    return Part(
        torch.from_numpy((grey - MEAN) / STD)[:, None],
        torch.tensor([[int(chest.finding == name) for name in FINDINGS] for chest in drawn]),
        torch.from_numpy(masks)[:, None],
        torch.tensor([chest.box for chest in drawn]),
        tuple(chest.report for chest in drawn),
        tuple(f"there is {chest.finding} ." for chest in drawn),
    )


class Probed(NamedTuple):
    """What a frozen encoder is measured on: chests to learn from, chests to test, and the segmenter's seed."""

    known: Part
    tested: Part
    seed: int


def data(task: str, seed: int, split: str) -> Part | Probed:
    """The training chests, to pre-train; else them and the chests of `split`, to measure."""
    return load(seed, "train") if split.startswith("train") else Probed(load(seed, "train"), load(seed, split), seed)


def examples(part: Part, number: int = 0) -> Part:
    """The chest `number`, from 0, of each finding."""
    at = [int(part.labels[:, k].nonzero()[number]) for k in range(len(FINDINGS))]
    reports, distilled = (tuple(each[i] for i in at) for each in (part.reports, part.distilled))
    return Part(part.images[at], part.labels[at], part.masks[at], part.boxes[at], reports, distilled)


def colours(images: Tensor) -> Tensor:
    """Grey images (n, 1, H, W) as three equal channels, not copied."""
    return images.expand(-1, 3, -1, -1)


def pairs(part: Part, **options: Any) -> ReportPairs:
    """Image-report pairs for pre-training; `options` are those of `ReportPairs` that a method changes."""
    sizes: dict[str, Any] = {"patches": 64, "length": LENGTH, "window": 6, "statements": part.distilled}
    return ReportPairs(colours(part.images), part.reports, VOCABULARY, **(sizes | options))


def save(part: Part, folder: Path, count: int) -> list[Path]:
    """Write the first chests as images, `pretrain.csv` and `train_list.txt`; return the images' paths."""
    names = [f"images/{i:06d}.png" for i in range(count)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, part.images, strict=False):
        grey = (MEAN + STD * image[0].numpy()) * 65535
        Image.fromarray(grey.round().astype(np.uint16)).save(folder / name)
    lines = [" ".join([name, *map(str, row)]) for name, row in zip(names, part.labels.tolist(), strict=False)]
    (folder / "train_list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_reports(folder / "pretrain.csv", names, part.reports[:count], part.distilled[:count])
    return [folder / name for name in names]


# --- methods and pre-training ---

TASK, LENGTH = "chests", 20
# 600 steps: with fewer the words do not attend to the image yet. The published weight decay; AdamW's second beta is
# torch's 0.999
EPOCHS, BATCH, WEIGHT_DECAY = 9.68, 32, 0.05


class MaskedImages(ecamp.ECAMP):
    """Masked image modelling alone."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        del self.super_resolution, self.project, self.text

    def resolve(self, pixels: Tensor, batch: ecamp.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return pixels.new_zeros(()), {}

    def read(self, latent: Tensor, batch: ecamp.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return latent.new_zeros(()), {}


VARIANTS = ("ECAMP", "ECAMP, no super-resolution", "ECAMP, no re-balancing", "ECAMP, no distillation")
# how a method's model is built, and its options of `ReportPairs`
METHODS: dict[str, tuple[Callable[..., ecamp.ECAMP], dict[str, Any]]] = {
    "random init": (ecamp.build, {}),
    "MIM only": (MaskedImages.build, {}),
    **{name: variants.METHODS[name] for name in VARIANTS},
}
UNTRAINED = ("random init",)


def build(method: str, seed: int) -> ecamp.ECAMP:
    """The model of a method; its initial weights are those of the full ECAMP."""
    torch.manual_seed(seed)
    whole = ecamp.build("pocket", words=len(VOCABULARY))
    model = METHODS[method][0]("pocket", words=len(VOCABULARY))
    model.load_state_dict({name: t for name, t in whole.state_dict().items() if name in model.state_dict()})
    return model


def shipped() -> ecamp.ECAMP:
    """ECAMP pre-trained for 1,200 steps on chests of seed 200, in eval mode: its words attend to the image.

    Raises `MissingWeights`, `CorruptFile`: the shipped file is missing, or not the one of its model card.
    """
    model = build("ECAMP", 0)
    model.load_state_dict(read_state(weights_file("pocket_ecamp")))
    return model.eval()


def train(
    method: str, task: str, part: Part, learning_rate: float, seed: int, epochs: float = EPOCHS
) -> tuple[ecamp.ECAMP, History]:
    """A method pre-trained on chests and their reports, and its history."""
    model = build(method, seed)
    if method in UNTRAINED:
        return model, []
    return model, fit(
        model,
        ecamp.pretraining_loss,
        pairs(part, **METHODS[method][1]),
        epochs=epochs,
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )


# --- scores of the frozen encoder ---

PROBES = {50: 10, 200: 5, 1500: 1}  # number of labels: draws that the mean is over
PROBE_C = 0.05  # of the logistic regression
SEGMENT_ON = 500  # masks


class _Tokens(nn.Module):
    """The patch tokens (b, N, D) of whole images (b, 3, 2 S, 2 S)."""

    def __init__(self, model: ecamp.ECAMP):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(ecamp.shrink(images))[:, 1:]


def tokens(model: ecamp.ECAMP, images: Tensor) -> Tensor:
    """The patch tokens (n, N, D) of grey images (n, 1, 2 S, 2 S), none masked, after the encoder's norm."""
    return outputs_of(_Tokens(model), TensorDataset(colours(images)), hardware=CPU)


def score(model: ecamp.ECAMP, task: str, on: Probed) -> dict[str, float]:
    """AUROC of the probes, Dice of the segmenter, and `gains` of the text decoder, rounded."""
    known, tested = (tokens(model, part.images) for part in (on.known, on.tested))
    found = probes(known.mean(1), on.known.labels, tested.mean(1), on.tested.labels)
    found["Dice"] = dice(known[:SEGMENT_ON], on.known.masks[:SEGMENT_ON], tested, on.tested.masks, on.seed)
    return {name: round(value, 2) for name, value in (found | gains(model, on.tested)).items()}


def probes(known: Tensor, labels: Tensor, tested: Tensor, truth: Tensor) -> dict[str, float]:
    """AUROC of a logistic regression on features (n, D) with 50, 200 and 1,500 labels (also "AUROC", their mean).

    Each is the mean over findings, one against the rest, and over draws of labels that share no image.
    """
    mean, std = known.mean(0), known.std(0)
    x, asked = (((each - mean) / std).numpy() for each in (known, tested))
    classes, found = labels.argmax(1).numpy(), {}
    for count, draws in PROBES.items():
        areas = []
        for i in range(draws):
            own = slice(i * count, (i + 1) * count)
            probe = LogisticRegression(C=PROBE_C, max_iter=2000).fit(x[own], classes[own])
            areas.append(radiology.mean_auroc(truth.numpy(), probe.predict_proba(asked)))
        found[f"AUROC {count}"] = float(np.mean(areas))
    return found | {"AUROC": float(np.mean(list(found.values())))}


class Segmenter(MapDecoder):
    """The published progressive decoder at toy scale: tokens (b, 64, D), after the encoder's norm, to (b, 1, 64, 64).

    Each of three steps doubles the side.
    """

    def __init__(self, width: int):
        super().__init__(width, (32, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT.unflatten(2, (8, 8)))


def dice(known: Tensor, masks: Tensor, tested: Tensor, truth: Tensor, seed: int) -> float:
    """Dice of the lesion in percent at a threshold of 0.5, averaged over images, each of which has a lesion.

    The decoder is trained on frozen tokens (n, N, D) and masks (n, 1, 64, 64).
    """
    torch.manual_seed(seed)
    decoder = Segmenter(known.shape[-1])
    fit(
        decoder,
        lambda model, batch: segmentation_loss(model(batch[0]), batch[1]),
        TensorDataset(known, masks),
        epochs=10,
        batch=32,
        optimizer=adamw(3e-3, 0.05),
        seed=seed,
        hardware=CPU,
        name="segmenting",
    )
    logits = outputs_of(decoder, TensorDataset(tested), hardware=CPU)
    return 100 * float(radiology.dice(logits.sigmoid(), truth).mean())


# --- use of the image by the text decoder ---


class Texts(NamedTuple):
    """Reports as ids.

    Attributes:
        ids: (n, L).
        attention: (n, L), 1, or 0 for padding.
        side, finding: (n, L), True on the one word that names the side, and on the present entity.
    """

    ids: Tensor
    attention: Tensor
    side: Tensor
    finding: Tensor


def texts(reports: Sequence[str]) -> Texts:
    """The reports of the toy chests as model input."""
    ids = torch.from_numpy(np.stack([VOCABULARY.encode(report, LENGTH) for report in reports]))
    side = torch.isin(ids, torch.tensor([VOCABULARY.tokenizer.token_to_id(side) for side in SIDES]))
    return Texts(ids, (ids != VOCABULARY.pad).long(), side, side.roll(1, 1))  # the finding comes after its side


@torch.inference_mode()
def word_losses(model: ecamp.ECAMP, part: Part) -> dict[str, Tensor]:
    """Cross-entropies (n,) of the masked side and the masked finding of each report, both masked at once.

    "side, right", "side, other", "finding, right", "finding, other": with the report's own image, no patch masked, and
    with the image of the report before it.
    """
    read = texts(part.reports)
    hidden = read.ids.masked_fill(read.side | read.finding, VOCABULARY.mask)
    z = model.project(tokens(model, part.images))
    found = {}
    for image, seen in (("right", z), ("other", z.roll(1, 0))):
        rows = zip(hidden.split(200), read.attention.split(200), seen.split(200), strict=True)
        logits = torch.cat([model.text(*row)[0] for row in rows])
        for name, at in (("side", read.side), ("finding", read.finding)):
            found[f"{name}, {image}"] = F.cross_entropy(logits[at], read.ids[at], reduction="none")
    return found


def gains(model: ecamp.ECAMP, part: Part) -> dict[str, float]:
    """By how many percent the mean of `word_losses` with the right image is below that with another.

    "side gain" and "finding gain"; empty for a model without text.
    """
    if not hasattr(model, "text"):
        return {}
    means = {name: 100 * float(losses.mean()) for name, losses in word_losses(model, part).items()}
    return {f"{n} gain": 100 * (1 - means[f"{n}, right"] / means[f"{n}, other"]) for n in ("side", "finding")}


def cells(boxes: Tensor) -> Tensor:
    """The fraction of each of the 8 x 8 patches that lies inside a box (n, 4): (n, 64)."""
    edge = torch.arange(SIZE)
    columns, rows = ((edge >= boxes[:, i, None]) & (edge < boxes[:, i + 2, None]) for i in (0, 1))
    return F.avg_pool2d((rows[:, None, :, None] & columns[:, None, None]).float(), SIZE // 8).flatten(1)


def looks(model: ecamp.ECAMP, part: Part, hide: bool = False) -> Tensor:
    """Cross-attention of the finding's word, averaged over heads, (n, 64) in raster order; `hide`: it is [MASK]."""
    read = texts(part.reports)
    ids = read.ids.masked_fill(read.finding, VOCABULARY.mask) if hide else read.ids
    rows = zip(part.images.split(100), ids.split(100), read.attention.split(100), strict=True)
    maps = [model.attention(ecamp.shrink(colours(i)), w, a).mean(1) for i, w, a in rows]
    return torch.cat(maps)[read.finding]


STUDY = Study(
    tasks={TASK: tuple(METHODS)},
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=data,
    fit=train,
    score=score,
    metric="AUROC",
    untrained=UNTRAINED,
    seeds=range(201, 211),  # the shipped model was trained on the images of seed 200
)
