"""H-ViT's ablation at toy scale: drawn slides, the methods, one training and one score.

A slide has five regions of 128 px in one or two ragged pieces of tissue between white margins; a region is 4 x 4
patches of 32 px. Stroma is a crop of the photograph of stained tissue that ships with scikit-image. A patch may contain
a benign gland, one large ring with a white lumen, or tumour, seven small dark rings. Two tasks grade slides from 0 to
5:

* "place": a region is free of tumour, or has four tumour patches, of which three are in its centre ("core"), or all on
  its border ("rim"). The grade is the number of core regions; of the others a random number are rim. The amount of
  tumour alone gives a kappa of about 60, its position inside the region determines the grade: the task is built for a
  model with a trained region level, and favours Local H-ViT by construction.
* "count": tumour patches are at random positions, and the grade is their number: four per grade, plus or minus one. A
  bag of patches is sufficient.

In both tasks every region has four benign glands. Stroma of training, validation and test slides is cropped from
separate tiles, as in `scenes`.

All methods are trained on the embeddings of the same frozen patch level, with one optimiser, one number of epochs and
one grid of learning rates.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data.pyramids import write_pyramid
from ..errors import check_choice
from ..evaluation.ablations import Study
from ..models.hvit import model as hvit
from ..models.hvit.recipe import kappa, voted
from ..models.hvit.slides import Tiling, tensor
from ..training.fit import Batch, History, fit, outputs_of
from ..training.hardware import CPU
from ..training.schedules import adamw
from .encoders import slide_dino
from .encoders.slide_dino import SIDE
from .scenes import SPLITS, photograph, quantise, tiles

TASKS = ("place", "count")
PATCH, REGIONS = 32, 5  # pixels per patch, regions per slide
REGION = PATCH * SIDE
GRADES = 6
COUNTS = {"train": 160, "val": 40, "test": 80}
MPP = 0.5  # microns per pixel of level 0, as stated in the files
STROMA, BENIGN, TUMOUR = 1, 2, 3  # PANDA's values for Radboud
GLASS = 243

# settings with which the regions are found: HS2P's, at toy scale
TILING = Tiling(region=REGION, mpp=MPP, downsample=4, otsu=True, median=3, close=3, area=0.1, hole_area=0.05)

_GRID = 4  # every piece begins at a multiple of it, the downsample of the tissue mask
_CORE = np.array([5, 6, 9, 10])  # the inner patches of a region, row by row
_RIM = np.setdiff1d(np.arange(SIDE**2), _CORE)


@dataclass(frozen=True)
class Drawn:
    """A slide with its annotations.

    Attributes:
        image: (H, W, 3) uint8.
        corners: (5, 2), x and y of the regions.
        cells: (5, 16), the kind of each patch, row by row: `STROMA`, `BENIGN` or `TUMOUR`.
        grade: 0 to 5.
    """

    image: np.ndarray
    corners: np.ndarray
    cells: np.ndarray
    grade: int

    @property
    def cores(self) -> dict[tuple[int, int], bool | None]:
        """By the corner of each region, in the order of its file's name: is its tumour in the core; None without."""
        pairs = zip(map(tuple, self.corners.tolist()), self.cells, strict=True)
        found = {corner: is_core(cells) if (cells == TUMOUR).sum() >= 3 else None for corner, cells in pairs}
        return {corner: found[corner] for corner in sorted(found, key=lambda corner: f"{corner[0]}_{corner[1]}")}

    @property
    def regions(self) -> np.ndarray:
        """The regions (5, 128, 128, 3) uint8, in the order of `cores`, as `models.hvit.slides` finds them."""
        return np.stack([self.image[y : y + REGION, x : x + REGION] for x, y in self.cores])


def is_core(cells: Sequence[int]) -> bool:
    """Whether a region's tumour is in its centre: at least three of its four inner patches."""
    return int((np.asarray(cells)[_CORE] == TUMOUR).sum()) >= 3


# --- content of a slide -----------------------------------------------------------------------------------------------


def arrangement(rng: np.random.Generator, task: str, grade: int) -> np.ndarray:
    """The kinds of the patches of a slide of `grade`, (5, 16). Raises `BadParameter` for an unknown task or grade."""
    check_choice("task", task, TASKS)
    check_choice("grade", grade, range(GRADES))
    cells = np.full((REGIONS, SIDE**2), STROMA)
    if task == "place":
        rims = int(rng.integers(REGIONS - grade + 1))
        states = np.array(["core"] * grade + ["rim"] * rims + ["none"] * (REGIONS - grade - rims))
        for region, state in zip(cells, rng.permutation(states), strict=True):
            if state == "core":
                region[rng.choice(_CORE, 3, replace=False)] = TUMOUR
                region[rng.choice(_RIM)] = TUMOUR
            elif state == "rim":
                region[rng.choice(_RIM, 4, replace=False)] = TUMOUR
    else:
        count = 4 * grade + int(rng.integers(-1, 2)) * (grade > 0)
        cells.flat[rng.choice(cells.size, count, replace=False)] = TUMOUR
    for region in cells:
        free = np.flatnonzero(region == STROMA)
        region[rng.choice(free, min(4, len(free)), replace=False)] = BENIGN
    return cells


# --- drawing ----------------------------------------------------------------------------------------------------------


def _stroma(rng: np.random.Generator, split: str) -> np.ndarray:
    """The stroma of a region (128, 128, 3) in [0, 1]: a crop of one tile of `split` of the tissue, tinted pink."""
    places = tiles("tissue", split)
    left, top, right, bottom = places[rng.integers(len(places))]
    side = int(rng.integers(64, min(right - left, bottom - top) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    # cropped before resizing: the resampling filter must not use pixels of the neighbouring tile
    window = Image.fromarray(photograph("tissue")[y : y + side, x : x + side])
    pixels = np.asarray(window.resize((REGION, REGION), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = np.rot90(pixels, int(rng.integers(4)))
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return np.array([0.85, 0.62, 0.76]) + rng.uniform(0.35, 0.6) * (pixels - pixels.mean((0, 1)))


def _rings(centres: np.ndarray, radius: np.ndarray, thick: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fractions of each pixel of a patch that are wall and lumen of round glands: two (32, 32) in [0, 1]."""
    rows, columns = np.mgrid[:PATCH, :PATCH] + 0.5
    far = np.hypot(columns[..., None] - centres[:, 0], rows[..., None] - centres[:, 1])
    whole = np.clip(0.5 - (far - radius), 0, 1)
    lumen = np.clip(0.5 - (far - radius + thick), 0, 1)
    return (whole - lumen).max(-1), lumen.max(-1)


def _gland(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wall, lumen (32, 32) and the colour of the wall of a benign gland or of a patch of tumour."""
    middle = PATCH / 2 + rng.uniform(-2, 2, 2)
    if kind == BENIGN:
        wall, lumen = _rings(middle[None], rng.uniform(9, 12, 1), rng.uniform(3, 4.5, 1))
        return wall, lumen, np.array([0.56, 0.36, 0.64]) * rng.uniform(0.9, 1.1)
    turns = rng.uniform(0, 2 * np.pi) + np.arange(6) * np.pi / 3
    around = middle + rng.uniform(8, 9.5) * np.stack([np.cos(turns), np.sin(turns)], -1)
    centres = np.concatenate([middle[None], around]) + rng.normal(0, 0.6, (7, 2))
    wall, lumen = _rings(centres, rng.uniform(2.8, 4.2, 7), rng.uniform(1.6, 2.6, 7))
    return wall, lumen, np.array([0.36, 0.2, 0.48]) * rng.uniform(0.85, 1.15)


def region(rng: np.random.Generator, cells: Sequence[int], split: str) -> np.ndarray:
    """A region (128, 128, 3) in [0, 1] of the patches `cells` (16,)."""
    pixels = _stroma(rng, split)
    for index, kind in enumerate(cells):
        if kind == STROMA:
            continue
        row, column = (PATCH * i for i in divmod(index, SIDE))
        window = np.s_[row : row + PATCH, column : column + PATCH]
        wall, lumen, colour = _gland(rng, kind)
        for covered, paint in ((wall[..., None], colour), (lumen[..., None], np.array([0.95, 0.93, 0.95]))):
            pixels[window] = pixels[window] * (1 - covered) + paint * covered
    return pixels


def _edge(rng: np.random.Generator, length: int) -> np.ndarray:
    """How far an edge recedes along its length, in pixels: bays between straight segments."""
    points = np.arange(length)
    wave = sum(np.sin(2 * np.pi * (points / rng.uniform(70, 160) + rng.random())) for _ in range(2))
    depth = np.clip(wave - np.quantile(wave, 0.45), 0, None)
    return rng.uniform(4, 8) * depth / max(depth.max(), 1e-6)


def _ragged(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The mask of a piece of tissue, (height, width) bool; it touches all four sides of the rectangle."""
    rows, columns = np.mgrid[:height, :width]
    inside = (rows >= _edge(rng, width)) & (rows < height - _edge(rng, width))
    return inside & (columns >= _edge(rng, height)[:, None]) & (columns < width - _edge(rng, height)[:, None])


def draw(rng: np.random.Generator, task: str, grade: int, split: str) -> Drawn:
    """A slide of a grade; stroma is cropped from tiles of `split`. Raises `BadParameter` for an unknown name or
    grade."""
    check_choice("split", split, SPLITS)
    cells = arrangement(rng, task, grade)
    first = int(rng.integers(2, REGIONS + 1))
    pieces = [n for n in (first, REGIONS - first) if n]
    margin, gap = (_GRID * rng.integers(8, 20, 4)).tolist(), _GRID * int(rng.integers(10, 20))
    width = REGION * max(pieces) + margin[0] + margin[1]
    height = REGION * len(pieces) + gap * (len(pieces) - 1) + margin[2] + margin[3]
    image = np.full((height, width, 3), GLASS / 255)
    stain = rng.uniform(0.92, 1.04, 3)
    corners: list[tuple[int, int]] = []
    row = margin[2]
    for count in pieces:
        column = margin[0] + _GRID * int(rng.integers((max(pieces) - count) * REGION // _GRID + 1))
        pixels = np.concatenate([region(rng, cells[len(corners) + i], split) for i in range(count)], 1)
        here = _ragged(rng, REGION, REGION * count)
        window = np.s_[row : row + REGION, column : column + REGION * count]
        pixels = pixels * stain + rng.normal(0, 0.015, pixels.shape)
        image[window] = np.where(here[..., None], pixels, image[window])
        corners += [(column + REGION * i, row) for i in range(count)]
        row += REGION + gap
    image, turned = _turned(rng, image, np.array(corners))
    return Drawn(quantise(image), turned, cells, grade)


def _turned(rng: np.random.Generator, image: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transposes the pieces of half of the slides: regions change their position, not their content."""
    if rng.random() < 0.5:
        return image, corners
    upright = np.full((*image.shape[1::-1], 3), GLASS / 255)
    for x, y in corners:
        upright[x : x + REGION, y : y + REGION] = image[y : y + REGION, x : x + REGION]
    return upright, corners[:, ::-1].copy()


# --- data -------------------------------------------------------------------------------------------------------------


def slides(count: int, task: str, split: str, seed: int = 0) -> list[Drawn]:
    """`count` slides of random, balanced grades, deterministic in the arguments. Raises as `draw`."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{task}/{split}".encode())))
    grades = rng.permutation(np.arange(count) % GRADES)
    return [draw(rng, task, int(grade), split) for grade in grades]


def unlabelled(count: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Regions of slides of both tasks, normalised (count, 3, 128, 128), and the kinds of their patches (count, 16).

    The encoders are trained on them; the kinds are for measuring, DINO does not get them.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), 11))
    pixels: list[np.ndarray] = []
    cells = []
    while len(pixels) < count:
        task = TASKS[rng.integers(len(TASKS))]
        for row in arrangement(rng, task, int(rng.integers(GRADES))):
            shown = region(rng, row, split) * rng.uniform(0.92, 1.04, 3) + rng.normal(0, 0.015, (REGION, REGION, 3))
            pixels.append(quantise(shown))
            cells.append(row)
    return tensor(np.stack(pixels[:count]), slide_dino.NORMALISE), torch.from_numpy(np.stack(cells[:count]))


@functools.cache
def encoders() -> tuple[hvit.PatchEncoder, hvit.RegionEncoder]:
    """The frozen patch level and the region level, both trained by DINO."""
    return slide_dino.build()


@functools.lru_cache(maxsize=8)
def embeddings(task: str, seed: int, split: str) -> TensorDataset:
    """The patch embeddings (n, 5, 16, 48) and grades (n,) of a split, "train", "val", "trainval" or "test"."""
    if split == "trainval":
        parts = (embeddings(task, seed, part).tensors for part in ("train", "val"))
        return TensorDataset(*map(torch.cat, zip(*parts, strict=True)))
    drawn = slides(COUNTS[split], task, split, seed)
    pixels = tensor(np.concatenate([slide.regions for slide in drawn]), slide_dino.NORMALISE)
    features = slide_dino.embed(encoders()[0], pixels).unflatten(0, (len(drawn), -1))
    return TensorDataset(features, torch.tensor([slide.grade for slide in drawn]))


def save(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """Write slides as a user has them: pyramids `folder`/slide_<i>.tiff and labels.csv; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, slide in enumerate(drawn):
        write_pyramid(folder / f"slide_{i}.tiff", slide.image, MPP, (1, 4), tile=REGION)
    lines = ["slide_id,label", *(f"slide_{i},{slide.grade}" for i, slide in enumerate(drawn))]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# --- methods, training, score -----------------------------------------------------------------------------------------

# AdamW instead of Adam, and a cosine instead of steps: at this length they hardly differ
EPOCHS, BATCH, WEIGHT_DECAY = 40, 16, 1e-5
FOLDS = 5
VOTE = "Local, vote of five"
METHODS = ("mean pooling", "gated attention", "Global", "Local", "Local, cross-entropy", VOTE)


class PatchBag(nn.Module):
    """The baselines: a slide (b, m, p, d) as a bag of patch embeddings, their mean or gated attention over them."""

    def __init__(self, pooling: str, dim: int = 48, dropout: float = 0.1):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.pool = hvit.GatedPool(dim, dropout) if pooling == "gated attention" else None
        self.classifier = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The grades (b, 1)."""
        h = self.phi(x).flatten(1, 2)  # (b, m p, d)
        return self.classifier(h.sum(1) / h.shape[1] if self.pool is None else self.pool(h)[0])


def build(method: str, seed: int) -> nn.Module:
    """The model of a method, of one fold for `VOTE`; its new tensors are drawn from `seed`."""
    torch.manual_seed(seed)
    if method in ("mean pooling", "gated attention"):
        return PatchBag(method)
    variant = "global" if method == "Global" else "local"
    head = "classification" if method == "Local, cross-entropy" else "regression"
    model = hvit.build("pocket", variant, head, patches=SIDE, levels=("region", "slide"))
    model.level("region").load_state_dict(encoders()[1].state_dict())
    return model


def inputs(model: nn.Module, features: Tensor) -> Tensor:
    """The input of a training: the region embeddings, computed once, where that level is frozen; else `features`."""
    if not isinstance(model, hvit.HViT) or model.variant != "global":
        return features
    with torch.inference_mode():
        return model.embed_regions(features.flatten(0, 1)).unflatten(0, features.shape[:2]).clone()


def head_of(model: nn.Module) -> str:
    """The meaning of a model's outputs, one of `hvit.HEADS`."""
    return model.slide.head if isinstance(model, hvit.HViT) else "regression"


def loss(head: str, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch (inputs, grades)."""
    return hvit.loss(head, model(batch[0]), batch[1], GRADES)


def train(
    method: str, task: str, data: TensorDataset, learning_rate: float, seed: int, epochs: int = EPOCHS
) -> tuple[nn.Module, History]:
    """A trained method, for `VOTE` the models of all folds, and the last ten steps of its history, their mean."""
    if method == VOTE:
        folds = [
            train("Local", task, without_fold(data, fold, seed), learning_rate, seed + 1000 * fold, epochs)
            for fold in range(FOLDS)
        ]
        steps = zip(*(history for _, history in folds), strict=True)
        mean = [{"loss": float(np.mean([step["loss"] for step in each]))} for each in steps]
        return nn.ModuleList(model for model, _ in folds), mean
    model = build(method, seed)
    history = fit(
        model,
        functools.partial(loss, head_of(model)),
        TensorDataset(inputs(model, data.tensors[0]), data.tensors[1]),
        epochs=epochs,
        batch=BATCH,
        optimizer=adamw(learning_rate, WEIGHT_DECAY),
        seed=seed,
        hardware=CPU,
        name=method,
    )
    return model, history[-10:]


def without_fold(data: TensorDataset, fold: int, seed: int) -> TensorDataset:
    """The slides that fold `fold` of five trains on: all but one in five."""
    order = torch.from_numpy(np.random.default_rng((seed, 5)).permutation(len(data)))
    others = order[torch.arange(len(data)) % FOLDS != fold]
    return TensorDataset(*(t[others] for t in data.tensors))


def grades(model: nn.Module, features: Tensor) -> Tensor:
    """The predicted grades (n,) of patch embeddings (n, 5, 16, 48)."""
    outputs = outputs_of(model, TensorDataset(inputs(model, features)), hardware=CPU)
    return hvit.graded(head_of(model), outputs, GRADES)


def score(model: nn.Module, task: str, data: TensorDataset) -> dict[str, float]:
    """Quadratic kappa and accuracy in percent; of folds those of their vote, and its "gain": kappa less the mean kappa
    of a single fold."""
    features, truth = data.tensors
    each = [grades(one, features) for one in (model if isinstance(model, nn.ModuleList) else [model])]
    vote = voted(each)
    found = {"kappa": kappa(truth, vote), "accuracy": round(100 * float((vote == truth).float().mean()), 2)}
    if len(each) > 1:
        single = round(float(np.mean([kappa(truth, one) for one in each])), 2)
        found["gain"] = round(found["kappa"] - single, 2)
    return found


STUDY = Study(
    tasks={"place": METHODS, "count": METHODS[:5]},
    learning_rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    budget=f"{EPOCHS} epochs, batch {BATCH}",
    data=embeddings,
    fit=train,
    score=score,
    metric="kappa",
)
