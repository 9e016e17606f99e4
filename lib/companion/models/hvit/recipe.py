"""H-ViT with the published settings: training on stored features, fold by fold, and the vote of the folds.

The training is the authors' for slides: Adam with the weight decay added to the gradient, the learning rate halved
every 20 epochs, 32 slides a step, 50 epochs. Of each fold the weights of the epoch with the lowest tuning loss are
taken. Their recipe for regions of 1024 px, which trains the patch level too, is not run here; its epochs and its early
stopping are options.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ...data import few, present, spaced
from ...data import slides as data
from ...data.pyramids import Slide
from ...errors import BadParameter, CompanionError, CorruptFile, MissingData, MissingWeights
from ...evaluation.metrics import quadratic_kappa
from ...evaluation.tables import Results
from ...io import papers
from ...training.callbacks import Callback, EarlyStop
from ...training.fit import History, Loop
from ...training.hardware import AUTO, Hardware, RunParameters, evaluating, loader
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import MakeOptimizer, param_groups
from . import model as hvit
from .encoders import PatchEncoder, RegionEncoder, patch_encoder
from .features import extract, identity
from .model import HViT, SlideTransformer
from .official import read_checkpoint
from .slides import PANDA, Tiling, tensor, tile

WORKERS = 8
LEARNING_RATE, DECAY, HALVED, EPOCHS, BATCH, LAST = 2e-4, 1e-5, 20, 50, 32, "carry"
REGIONS = {"epochs": 200, "patience": 20}  # of the authors' training on regions of 1024 px from pixels, all levels
EARLIEST = 52  # epochs that are trained at least; the authors' `epoch > 50` counts from 0
DRY_REGIONS = 3  # of each generated slide
EMBEDDED = 2  # slides of a split of a dry run without stored features
SPLIT: dict[str, Any] = {"folds": 5, "test": 0.2}  # of a folder of slides
Fold = tuple[Dataset, Dataset | None]  # training data, items (features, present, grade), and tuning data


class Parameters(RunParameters, Protocol):
    method: str
    dataset: str
    region: int
    head: str
    position: str
    features: str
    normalise: str
    folds: int
    sampling: str
    epochs: int
    patience: int


@dataclass(frozen=True)
class Tested:
    """The result of a run.

    Attributes:
        title: of the data.
        models: one for each fold.
        history: of the first fold's training.
        test: the test data of all folds.
        truth, grades: of the test slides (n,), the true ones and the vote of the folds.
        scores: quadratic kappa in percent, of the vote, "kappa", and the mean of single folds, "fold".
    """

    title: str
    models: list[nn.Module]
    history: History
    test: Dataset
    truth: Tensor
    grades: Tensor
    scores: dict[str, float]


def prepare(p: Parameters, out: Path) -> tuple[str, Dataset, int, list[Opened]]:
    """A title, the test slides, the number of grades, and the training of each fold with model and checkpoint: all that
    a run reads is opened, nothing is trained.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with what to change or get.
    """
    if p.devices != 1:
        raise BadParameter("devices", p.devices, "1: training on stored features, tuned after each epoch, takes one")
    made_up = p.dry_run and not present(p.dataset, p.data_root)
    title, folds, test, classes = generated(p) if made_up else stored(p)
    return title, test, classes, [opened(of_fold(p, i, fold, classes), out) for i, fold in enumerate(folds)]


def run(p: Parameters, out: Path) -> Tested:
    """Train `p.method` on every fold and test their vote, as published; the scores become a row of `out`/measured.csv.

    A training resumes from its checkpoint in `out`/checkpoints; the weights of each fold are saved under the authors'
    names in `out`/trained, for `HViT.from_official`. A dry run takes two steps a fold on a few slides, or on generated
    features where the dataset is not below `data_root`. Raises as `prepare`.
    """
    title, test, classes, folds = prepare(p, out)
    trained = [train(fold) for fold in folds]
    models = [model for model, _ in trained]
    each = [hvit.graded(p.head, outputs(model, test, hardware(p)), classes) for model in models]
    names = [item.name for item in test.items] if isinstance(test, data.Features) else None
    truth, grades = grades_of(test), voted(each, names)
    scores = {"kappa": kappa(truth, grades), "fold": float(np.mean([kappa(truth, one) for one in each]))}
    row = {"method": label(p), "dataset": p.dataset, "region": p.region, "head": p.head, "seed": p.seed}
    RESULTS.measured(out / "measured.csv", row | scores, dry_run=p.dry_run)
    return Tested(title, models, trained[0][1], test, truth, grades, scores)


def hardware(p: Parameters) -> Hardware:
    """The hardware of trainings and evaluations."""
    return Hardware.of(p, "hvit", workers=WORKERS)


# --- data -------------------------------------------------------------------------------------------------------------


def stored(p: Parameters) -> tuple[str, list[Fold], Dataset, int]:
    """Title, folds, test and number of grades of stored features; test slides are those of the first fold's list.

    A folder of slides is split here: a fifth is tested on, each fold tunes on another fifth of the rest.
    """
    classes, folds = data.GRADES, list[Fold]()
    if p.dataset == "folder":
        items = data.own(p.data_root)["train"]
        named = sorted({(item.grade, item.label) for item in items})
        print(f"classes of {p.data_root}: " + ", ".join(f"{grade} {label}" for grade, label in named))
        lists = [[fold[s] for s in data.SPLITS] for fold in data.split_folds(items, **SPLIT)[: p.folds]]
        classes = max(2, 1 + max(item.grade for item in items))
    else:
        every = data.load(p.dataset, p.data_root)
        lists = [[data.load(p.dataset, p.data_root, s, fold, every) for s in data.SPLITS] for fold in range(p.folds)]
    _check_lists(lists)
    where = stored_in(p.features, p.data_root)
    if p.dry_run and not any(where.glob("*.h5")) and not any(where.glob("*.pt")):
        folds, test = embedded(p, lists[0])
        return f"{p.dataset}, a region of {EMBEDDED} slides a split (no features are stored)", folds, test, classes
    slides = {item.name: item for fold in lists for items in fold for item in items}  # a fold has most of the others'
    whole = data.Features([*slides.values()], where, drop=True)
    parts = [[whole.of(items) for items in fold] for fold in lists]
    for fold in parts:
        for part, split in zip(fold, data.SPLITS, strict=True):
            _check_features(p, part, split)
    if p.dry_run:
        count = dry_items(p, BATCH)
        parts = [[*few(dict(zip(data.SPLITS, fold, strict=True)), count).values()] for fold in parts]
    folds = [(train, tune) for train, tune, _ in parts]
    return f"{p.dataset}, {p.folds} folds", folds, parts[0][2], classes


def embedded(p: Parameters, lists: Sequence[Sequence[data.Item]]) -> tuple[list[Fold], Dataset]:
    """The fold and the test of a dry run without stored features: `EMBEDDED` slides of each list, the first region of
    each encoded here."""
    file = Path(p.data_root) / "weights" / "vit256_small_dino.pth"
    if not file.is_file():
        print(f"no {file}; a random patch level in this dry run")
    patch, parts = patch_encoder(file) if file.is_file() else PatchEncoder(), list[TensorDataset]()
    for items in lists:
        chosen = [items[i] for i in spaced(len(items), EMBEDDED)]
        rows = torch.cat([first_region(p, patch, item.path) for item in chosen])[:, None]
        parts.append(TensorDataset(rows, torch.ones(rows.shape[:2]) > 0, torch.tensor([i.grade for i in chosen])))
    learn, tune, test = parts
    return [(learn, tune)], test


def generated(p: Parameters) -> tuple[str, list[Fold], Dataset, int]:
    """As `stored`, for a dry run: two optimiser steps on embeddings of the real shape."""
    generator = torch.Generator().manual_seed(p.seed)

    def slides(count: int) -> TensorDataset:
        features = torch.randn(count, DRY_REGIONS, (p.region // 256) ** 2, 384, generator=generator)
        there = torch.ones(count, DRY_REGIONS, dtype=torch.bool)
        there[::2, -1] = False  # ragged, as real slides are
        return TensorDataset(features, there, torch.arange(count) % data.GRADES)

    title = f"generated slides in place of {p.dataset} (dry run)"
    return title, [(slides(dry_items(p, BATCH)), slides(12))], slides(12), data.GRADES


def stored_in(features: str, data_root: str) -> Path:
    """The folder of the stored patch embeddings: `features`, else the usual one."""
    return Path(features or Path(data_root) / "features")


def _levels(p: Parameters, patch: PatchEncoder) -> HViT:
    """The whole model, to which `embed_patches` belongs; the levels above the patch level are not run."""
    if p.region % patch.image:
        raise BadParameter("region", p.region, f"a multiple of the {patch.image} pixels of a patch")
    return HViT(SlideTransformer(192), RegionEncoder(p.region // patch.image, patch.dim), patch)


@torch.inference_mode()
def first_region(p: Parameters, patch: PatchEncoder, path: str | Path) -> Tensor:
    """Patch embeddings (1, patches, width) of a slide's first region, on the CPU.

    Raises `CorruptFile`: the slide cannot be read, or has no tissue; `BadParameter` as `tile`.
    """
    with Slide(path) as slide, evaluating(Hardware(p.accelerator), whole := _levels(p, patch)) as device:
        tiles = tile(slide, dataclasses.replace(PANDA, region=p.region))
        if not len(tiles):
            raise CorruptFile(path, f"no region of {p.region} pixels with tissue was found in it")
        x, y = tiles.coords[0]
        pixels = tiles.read(slide, x, y)[None]
        return whole.embed_patches(tensor(pixels, p.normalise, device)).float().cpu()


def store(
    p: Parameters,
    patch: PatchEncoder,
    part: tuple[int, int] = (0, 1),
    batch: int = 1,
    tiling: Tiling = PANDA,
    mpp: float | None = None,
    spacing: str | Path | None = None,
    **options: Any,
) -> Iterator[tuple[str, Path | CompanionError]]:
    """Patch embeddings of the slides of `dataset`, as the paper profile reads them; a killed run is resumed.

    Args:
        patch: see `patch_encoder`.
        part: (i, n): every n-th slide from the i-th on, so that n jobs do them all.
        batch: regions a step.
        tiling: how regions are found; its size of a region is `p.region`.
        mpp: microns per pixel of level 0, where the slides do not state it, or are wrong.
        spacing: a table with that of single slides, see `data.slides.spacings`; before `mpp`.
        options: `masks`, `preview` of `extract`.

    Yields:
        The name of each slide as it is done, and its file, or the error: one slide that cannot be read does not stop
        the others.
    """
    i, n = part
    if not 0 <= i < n:
        raise BadParameter("part", f"{i}/{n}", "i/n, i from 0 to n - 1")
    if p.dataset == "folder":
        named = list(data.unlabelled(p.data_root).items())
    else:
        named = [(item.name, item.path) for item in data.load(p.dataset, p.data_root)]
    whole = _levels(p, patch)
    options |= {"tiling": dataclasses.replace(tiling, region=p.region), "normalise": p.normalise}
    options["encoder"] = identity(patch)  # once: its hash takes a third of a second
    own = data.spacings(spacing, {name for name, _ in named}) if spacing else {}
    folder = stored_in(p.features, p.data_root)
    with evaluating(Hardware(p.accelerator), whole) as device:
        for name, path in named[i::n]:
            try:
                scale = {"mpp": own.get(name, mpp), "device": device, "batch": batch}
                yield name, extract(path, whole.embed_patches, folder / f"{name}.h5", **scale, **options)
            except CompanionError as error:
                yield name, error


class ClassBalanced(Dataset):
    """As many slides as `data` has, drawn with replacement so that every grade is drawn equally often.

    The draw of an item depends on torch's seed, which `fit` sets by seed, epoch and item.

    Attributes:
        weights: (n,), a slide's share of the draws times n: the slides over those of its grade.
    """

    def __init__(self, data: Dataset):
        grades = grades_of(data)
        self.data, self.weights = data, len(grades) / torch.bincount(grades).double()[grades]
        self.collate = getattr(data, "collate", None)

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, count: int) -> Tensor:
        """Numbers of slides (count,), drawn with replacement from torch's random state."""
        return torch.multinomial(self.weights, count, replacement=True)

    def __getitem__(self, index: int) -> tuple:
        return self.data[int(self.draw(1))]


def grades_of(part: Dataset) -> Tensor:
    """The true grades (n,)."""
    if isinstance(part, TensorDataset):
        return part.tensors[-1]
    return torch.tensor([item.grade for item in part.items])


# --- model ------------------------------------------------------------------------------------------------------------


def build(
    p: Parameters, fold: int = 0, classes: int = data.GRADES, levels: Sequence[str] = ("region", "slide"), **slide: Any
) -> hvit.HViT:
    """The method at full size on stored patch embeddings, of random weights drawn from the seed and the fold.

    The region level is HIPT's where `region_weights` has a file of it.

    Args:
        levels: that are built; ("slide",) for stored region embeddings.
        slide: further options of `SlideTransformer`.
    """
    torch.manual_seed(p.seed + 1000 * fold)
    patches, options = p.region // 256, {"classes": classes, "levels": levels, "position": p.position, **slide}
    model = hvit.build("paper", p.method.lower(), p.head, patches=patches, **options)
    if model.region is not None and (file := region_weights(p)):
        pretrained = hvit.RegionEncoder.from_official(read_checkpoint(file))  # with the table of its own size
        model = hvit.HViT(model.slide, pretrained, model.patch, model.variant)
    return model


def region_weights(p: Parameters) -> str | Path:
    """The file of the region level: the parameter `weights`, for Global else HIPT's in `<data_root>/weights`.

    Empty for random weights: Local's own default, and Global's only when `weights` is "random".
    """
    if p.weights or p.method != "Global":
        return "" if p.weights == "random" else p.weights
    usual = Path(p.data_root) / "weights" / "vit4k_xs_dino.pth"
    return usual if usual.is_file() else ""


# --- loss, optimiser, schedule, selection -----------------------------------------------------------------------------


def batch_loss(head: str, classes: int, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The mean over a batch (features, present, grades) of each slide's loss."""
    features, present, grades = batch
    return hvit.loss(head, model(features, present=present), grades, classes, per_slide=True)


def adam(lr: float = LEARNING_RATE, weight_decay: float = DECAY) -> MakeOptimizer:
    """The authors' optimiser: one group, the decay added to the gradient of every tensor, biases and norms too."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(param_groups(model.parameters(), weight_decay, "all"), lr, weight_decay=weight_decay)

    return make


def halved(base: float, steps: int, per_epoch: int, every: int = HALVED) -> np.ndarray:
    """The learning rate of each step: `base`, halved every `every` epochs."""
    return base * 0.5 ** (np.arange(steps) // per_epoch // every)


class Selection(EarlyStop):
    """Keep the weights of the epoch with the lowest tuning loss, the later of equal ones; stop as the authors' code.

    An epoch whose loss is higher than the lowest before it is a miss. `patience` misses in a row end the training, from
    epoch `EARLIEST` on. An epoch whose loss is nan neither counts as a miss nor ends the training, and is not selected.

    Args:
        loss: from the model, in eval mode and without autograd, to its loss on the tuning slides.
        patience: 0: never.
    """

    def __init__(self, loss: Callable[[nn.Module], float], patience: int = 0):
        super().__init__(lambda model: -loss(model), ties=True)
        self.allowed = patience

    def on_epoch_end(self, loop: Loop) -> None:
        """Score, keep, maybe stop."""
        super().on_epoch_end(loop)
        misses, best = 0, -math.inf
        for _, value, _ in self.scores:
            if value > -math.inf:
                misses, best = (0, value) if value >= best else (misses + 1, best)
        missed = -math.inf < self.scores[-1][1] < best
        if self.allowed and missed and misses >= self.allowed and loop.epoch >= EARLIEST:
            loop.stopped = True


def fit_options(part: Dataset, *callbacks: Callback, **changes: Any) -> dict[str, Any]:
    """The authors' training on slides (features, present, grade), as arguments of `fit`, with `changes`."""
    options = {"epochs": EPOCHS, "batch": min(BATCH, len(part)), "last": LAST, "optimizer": adam(), "schedule": halved}
    return options | {"callbacks": callbacks} | changes


def of_fold(p: Parameters, number: int, fold: Fold, classes: int) -> Training:
    """The training of the method on a fold.

    Its weights are saved under the authors' names, for `HViT.from_official`.
    """
    part, tuning = fold
    drawn = ClassBalanced(part) if p.sampling == "weighted" else part
    # of stored region embeddings Global reads the slide level alone
    levels = ("slide",) if p.method == "Global" and part[0][0].ndim == 2 else ("region", "slide")

    def tuned(model: nn.Module) -> float:
        """The mean loss of the tuning slides, which selects the epoch."""
        return float(hvit.loss(p.head, outputs(model, tuning, hardware(p)), grades_of(tuning), classes, per_slide=True))

    selection = [] if tuning is None else [Selection(tuned, p.patience)]
    facts: dict[str, Any] = {}
    if isinstance(part, data.Features):
        facts = {k: getattr(p, k) for k in ("head", "position", "sampling", "patience", "seed", "epochs")}
        slides = [[(item.name, item.grade) for item in split.items] for split in fold if split is not None]
        facts |= {"precision": hardware(p).precision, "slides": slides, "features": part.made_by}
    names = [label(p), p.dataset, f"{p.region} px", p.head, *filter(None, [Path(p.weights).stem]), f"fold {number}"]
    return Training(
        name=", ".join([*names, f"seed {p.seed}"]),
        build=functools.partial(build, p, number, classes, levels),
        loss=functools.partial(batch_loss, p.head, classes),
        data=drawn,
        fit=fit_options(drawn, *selection, epochs=p.epochs, seed=p.seed, hardware=hardware(p)),
        facts=facts,
        weights=hvit.HViT.to_official,
        dry_run=p.dry_run,
    )


# --- test -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, part: Dataset, hardware: Hardware = AUTO) -> Tensor:
    """The outputs (n, ...) for slides (features, present, grade), on the CPU."""
    logits = []
    with evaluating(hardware, model) as device:
        collate = getattr(part, "collate", None)
        for features, present, _ in loader(part, 8, hardware, device, collate=collate):
            features, present = (x.to(device, non_blocking=True) for x in (features, present))
            logits.append(model(features, present=present).float().cpu())
    return torch.cat(logits)


def voted(each: Sequence[Tensor], names: Sequence[str] | None = None, isup: bool = True) -> Tensor:
    """The vote of the folds (n,) of their grades (n,) each, see `model.vote`.

    Args:
        names: of the slides. A vote's random choice is seeded with the slide's row in the table sorted by name, as in
            the authors' code; without names with its position in the list.
        isup: see `model.vote`.
    """
    rows = range(len(each[0])) if names is None else np.argsort(np.argsort(np.array(names, str))).tolist()
    ballots = torch.stack([*each], 1).tolist()
    return torch.tensor([hvit.vote(one, isup=isup, seed=i) for i, one in zip(rows, ballots, strict=True)])


def kappa(truth: Tensor, predicted: Tensor) -> float:
    """`quadratic_kappa` in percent, to two decimals."""
    return round(100 * quadratic_kappa(truth, predicted), 2)


# --- results ----------------------------------------------------------------------------------------------------------

RESULTS = Results.of("hvit")


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The measured rows: the paper's tables were not found."""
    return {"measured on real slides, kappa in percent": rows}


def label(p: Parameters) -> str:
    """The method's name in the tables, with its differences from the published setting."""
    published = {k: rule["published"] for k, rule in papers.paper("hvit")["parameters"].items() if "published" in rule}
    changes = {f"{name} {getattr(p, name)}": getattr(p, name) != value for name, value in published.items()}
    return RESULTS.label(p.method, changes, patch=p.features)


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, a row each."""
    return {
        "optimiser": f"Adam, learning rate {LEARNING_RATE:g}, weight decay {DECAY:g} added to every gradient",
        "schedule": f"halved every {HALVED} epochs",
        "batch": f"{BATCH} slides",
        "last batch": "the gradients of an epoch's last slides go into the next epoch's first step",
        "epochs": (
            f"{EPOCHS}, no early stopping; the authors' training on regions, from pixels, takes up to "
            f"{REGIONS['epochs']}, patience {REGIONS['patience']} from epoch {EARLIEST} on (epochs, patience)"
        ),
        "selection": "per fold the epoch with the lowest loss on the tuning slides; of equal ones the later",
        "sampling": "with replacement, every grade equally often (sampling)",
        "augmentation": "none",
        "dropout": f"{hvit.SIZES['paper']['slide']['dropout']:g} at the slide level",
        "CORN": "averaged over each slide, then over the batch",
        "tiling": (
            f"Otsu on the saturation of the level nearest to 1/{PANDA.downsample:g} (1/16 in PANDA), regions with "
            f"{PANDA.least:.0%} tissue or more; the level nearest to {PANDA.mpp:g} microns per pixel, read as it is"
        ),
        "pixels": "each region compressed as JPEG (--raw of companion slides), then scaled to [0, 1] (normalise)",
        "vote": "most common grade of the folds; of two the nearer to the rest, then random, seeded by the row",
        "metric": "quadratic weighted kappa",
        "data": "PANDA; the authors' folds and their list of noisy labels were not released",
        "precision": "float32",
        "seeds": "not found; the authors give mean and population std over five folds",
        "sweep": "none found",
    }


# --- checks of what is read -------------------------------------------------------------------------------------------


def _check_lists(lists: list[list[list[data.Item]]]) -> None:
    """Raises `BadParameter` when a fold trains on slides that it tunes on, or that any fold tests on."""
    train, tune, test = ([{item.name for item in fold[k]} for fold in lists] for k in range(3))
    for k in range(len(lists)):
        for seen, held, what in ((train[k], tune[k], "tunes"), (train[k] | tune[k], set().union(*test), "tests")):
            if both := sorted(seen & held):
                overlap = f"fold {k} trains or tunes on {both[0]} and {len(both) - 1} more"
                raise BadParameter("folds", overlap, f"disjoint lists: none of the slides that a fold {what} on")


def _check_features(p: Parameters, part: data.Features, split: str) -> None:
    """Raises `MissingData` when there are none, `BadParameter` when they are of another level or size of region, and
    `MissingWeights` when Global lacks the weights of its region level."""
    if not len(part):
        store = f"`companion slides {p.dataset} --data-root {p.data_root} --weights FILE` stores them"
        layout, detail = "<slide_id>.h5    or <slide_id>.pt", f"none of the slides of the list {split} has any"
        raise MissingData("features of slides", part.path, layout, store, "that of the slides", detail)
    patches = ((p.region // 256) ** 2, 384)
    if part.shape != patches and not (p.method == "Global" and part.shape == (192,)):
        accepted = f"{patches} for regions of {p.region} px; for Global also (192,), of whole regions"
        raise BadParameter("features", f"embeddings {part.shape} in {part.path}", accepted)
    if p.method == "Global" and part.shape == patches and not (p.weights or region_weights(p)):
        if p.dry_run:
            print("H-ViT's region level: its weights are not here; random ones in this dry run")
            return
        ways = [
            f"put vit4k_xs_dino.pth of github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints) into {p.data_root}/weights",
            "give the file of another region level as `weights`, such as one that DINO trained",
            'weights = "random" freezes a random one; method = "Local" trains it',
        ]
        raise MissingWeights("H-ViT's region level", f"{p.data_root}/weights", ways)
