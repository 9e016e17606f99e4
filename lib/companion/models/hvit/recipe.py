"""H-ViT with the published settings: training on stored features, testing, features of slides, attention maps.

The training is the authors' for slides: Adam with the weight decay added to the gradient, the learning rate halved
every 20 epochs, 32 slides a step, 50 epochs. Of each fold the weights of the epoch with the lowest tuning loss are
taken. Their recipe for regions of 1024 px, which trains the patch level too, is not run here; its epochs and its early
stopping are options.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...data import slides as data
from ...errors import BadParameter, CompanionError, MissingData, MissingWeights
from ...evaluation.tables import upsert_rows
from ...slides import PANDA, Slide, Tiles, Tiling, extract, tensor
from ...training.callbacks import EarlyStop
from ...training.checkpoints import Checkpoint, save
from ...training.fit import AUTO, Hardware, History, Loop, evaluating, fit
from ...training.schedules import MakeOptimizer, param_groups
from ...viz import heatmaps
from ..layers.pos_embed import resize_pos_embed
from . import model as hvit

METHODS = {"Local": "local", "Global": "global", "mean pooling": "mean", "gated attention": "attention"}
WORKERS = min(8, os.cpu_count() or 1)
LEARNING_RATE, DECAY, HALVED, EPOCHS, BATCH, LAST = 2e-4, 1e-5, 20, 50, 32, "carry"
REGIONS = {"epochs": 200, "patience": 20}  # of the authors' training on regions of 1024 px from pixels, all levels
EARLIEST = 52  # epochs that are trained at least; the authors' `epoch > 50` counts from 0
TITLES = {"slides/panda": "PANDA", "folder": "own slides"}
DRY_REGIONS = 3  # of each generated slide
SPLIT: dict[str, Any] = {"folds": 5, "test": 0.2}  # of a folder of slides


@dataclass(frozen=True)
class Setting:
    """The data of a run, its trainings and its predictions.

    Attributes:
        title: of the data.
        folds: of each fold the training data, items (features, ..., grade), and the tuning data, or None.
        test: of all folds.
        learning_rates: of each method that is trained.
        train: (method, fold, arguments of `fit` that differ) to the trained model and its history.
        grades: (model, method, data) to the predicted grades (n,).
    """

    title: str
    folds: list[tuple[Dataset, Dataset | None]]
    test: Dataset
    learning_rates: dict[str, float]
    train: Callable[..., tuple[nn.Module, History]]
    grades: Callable[[nn.Module, str, Dataset], Tensor]


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the checked parameters of the notebook; checkpoints and trained weights go below `out`.

    Raises `BadParameter`, `MissingData`, `MissingWeights`: with what to change or get.
    """
    if p.devices != 1:
        raise BadParameter("devices", p.devices, "1: training on stored features, tuned after each epoch, takes one")
    return _dry_run(p) if p.dry_run else _paper(p, out)


def train(found: Setting, method: str, **changes: Any) -> tuple[list[nn.Module], History]:
    """Train a method on every fold of a setting; the models, and the history of the first."""
    trained = [found.train(method, fold, **changes) for fold in range(len(found.folds))]
    return [model for model, _ in trained], trained[0][1]


def scores(found: Setting, method: str, models: list[nn.Module]) -> dict[str, float]:
    """Quadratic kappa in percent of the vote of all folds, "kappa", and the mean of single ones, "fold"."""
    each = [found.grades(model, method, found.test) for model in models]
    truth = grades_of(found.test)
    names = [item.name for item in found.test.items] if isinstance(found.test, data.Features) else None
    return {"kappa": kappa(truth, voted(each, names)), "fold": float(np.mean([kappa(truth, one) for one in each]))}


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


def quadratic_kappa(truth: Tensor, predicted: Tensor) -> float:
    """Quadratic weighted kappa; predictions that are all the same give 0."""
    from sklearn.metrics import cohen_kappa_score  # here: it takes a second to import

    labels = list(range(max(data.GRADES, 1 + int(truth.max()), 1 + int(predicted.max()))))
    value = cohen_kappa_score(truth.numpy(), predicted.numpy(), weights="quadratic", labels=labels)
    return 0.0 if math.isnan(value) else float(value)


def kappa(truth: Tensor, predicted: Tensor) -> float:
    """`quadratic_kappa` in percent, to two decimals."""
    return round(100 * quadratic_kappa(truth, predicted), 2)


def grades_of(part: Dataset) -> Tensor:
    """The true grades (n,)."""
    if isinstance(part, TensorDataset):
        return part.tensors[-1]
    return torch.tensor([item.grade for item in part.items])


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with its differences from the published setting."""
    usual = {"position": "none", "normalise": "unit", "folds": 5, "sampling": "weighted", "noise": 0, "epochs": EPOCHS}
    changed = [f"{k} {getattr(p, k)}" for k, value in (usual | {"patience": 0}).items() if getattr(p, k) != value]
    return ", ".join([p.method, *changed])


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, dataset, region, head, seed); `new` joins or replaces its row."""
    keys = ["method", "dataset", "region", "head", "seed"]
    return upsert_rows(path, keys, ["kappa", "fold"], [new] if new else ())


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Kappas of the vote, means over seeds, by (method, "<data> <region> <head>"), such as "PANDA 2048 regression"."""
    groups = rows.groupby(["method", "dataset", "region", "head"])
    return {
        (str(method), f"{TITLES.get(dataset, dataset)} {region} {head}"): float(group.kappa.mean())
        for (method, dataset, region, head), group in groups
    }


def protocol() -> dict[str, str]:
    """The settings of the `paper` profile, a row each."""
    tiling = f"Otsu on the saturation at 1/{PANDA.downsample:g}, regions with {PANDA.least:.0%} tissue or more"
    return {
        "optimiser": f"Adam, learning rate {LEARNING_RATE:g}, weight decay {DECAY:g} added to every gradient",
        "schedule": f"halved every {HALVED} epochs",
        "batch": f"{BATCH} slides",
        "last batch": "the gradients of an epoch's last slides go into the next epoch's first step",
        "epochs": f"{EPOCHS}, no early stopping; the authors' training on regions, from pixels, takes up to "
        f"{REGIONS['epochs']}, patience {REGIONS['patience']} from epoch {EARLIEST} on (`epochs`, `patience`)",
        "selection": "per fold the epoch with the lowest loss on the tuning slides; of equal ones the later",
        "sampling": "with replacement, every grade equally often (`sampling`)",
        "augmentation": "none (`noise` adds Gaussian noise to the features)",
        "dropout": f"{hvit.SIZES['paper']['slide']['dropout']:g} at the slide level",
        "CORN": "averaged over each slide, then over the batch",
        "tiling": f"{tiling}; the level nearest to {PANDA.mpp:g} microns per pixel, read as it is",
        "pixels": "each region compressed as JPEG (`--raw` of `companion slides`), then scaled to [0, 1] (`normalise`)",
        "vote": "most common grade of the folds; of two the nearer to the rest, then random, seeded by the row",
        "metric": "quadratic weighted kappa",
        "data": "PANDA; the authors' folds and their list of noisy labels were not released",
        "precision": "float32",
        "seeds": "not found; the authors give mean and population std over five folds",
        "sweep": "none found",
    }


# --- training ---------------------------------------------------------------------------------------------------------


def build(
    p: SimpleNamespace,
    method: str,
    fold: int = 0,
    classes: int = data.GRADES,
    levels: Sequence[str] = ("region", "slide"),
    **slide: Any,
) -> nn.Module:
    """A method at full size on stored patch embeddings, of random weights drawn from the seed and the fold.

    The region level is HIPT's where `region_weights` has a file of it.

    Args:
        levels: that are built; ("slide",) for stored region embeddings.
        slide: further options of `SlideTransformer`.
    """
    torch.manual_seed(p.seed + 1000 * fold)
    if method in ("mean pooling", "gated attention"):
        return hvit.PatchBag(384, classes, p.head, METHODS[method])
    model = hvit.build(
        "paper",
        METHODS[method],
        p.head,
        patches=p.region // 256,
        classes=classes,
        levels=levels,
        position=p.position,
        **slide,
    )
    file = region_weights(p) if "region" in levels else ""
    if file:
        pretrained = hvit.RegionEncoder.from_official(hvit.read_checkpoint(file))
        state, side = pretrained.state_dict(), int(p.region // 256 * hvit.LARGEST_CROP)
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side))
        model.get_submodule("region").load_state_dict(state)
    return model


def region_weights(p: SimpleNamespace) -> str | Path:
    """The file of the region level: the parameter `weights`, for Global else HIPT's in `<data_root>/weights`.

    Empty for random weights: Local's own default, and Global's only when `weights` is "random".
    """
    if p.weights or p.method != "Global":
        return "" if p.weights == "random" else p.weights
    usual = Path(p.data_root) / "weights" / "vit4k_xs_dino.pth"
    return usual if usual.is_file() else ""


class ClassBalanced(Dataset):
    """As many slides as `data` has, drawn with replacement so that every grade is drawn equally often.

    The draw of an item depends on torch's seed, which `fit` sets by seed, epoch and item.

    Attributes:
        weights: (n,), a slide's share of the draws times n: the slides over those of its grade.
    """

    def __init__(self, data: Dataset):
        grades = grades_of(data)
        self.data, self.weights = data, len(grades) / torch.bincount(grades).double()[grades]

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, count: int) -> Tensor:
        """Numbers of slides (count,), drawn with replacement from torch's random state."""
        return torch.multinomial(self.weights, count, replacement=True)

    def __getitem__(self, index: int) -> tuple:
        return self.data[int(self.draw(1))]


class Noised(Dataset):
    """`data` with Gaussian noise of std `noise` added to the features of all regions but the padding, drawn for each
    access: an option of the released code against overfitting, off by default."""

    def __init__(self, data: Dataset, noise: float):
        self.data, self.noise = data, noise

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        features, present, grade = self.data[index]
        mask = present.view(-1, *(1,) * (features.ndim - 1))
        return features + self.noise * mask * torch.randn_like(features), present, grade


def adam(lr: float = LEARNING_RATE, weight_decay: float = DECAY) -> MakeOptimizer:
    """The authors' optimiser: one group, the decay added to the gradient of every tensor, biases and norms too."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(param_groups(model.parameters(), weight_decay, "all"), lr, weight_decay=weight_decay)

    return make


def halved(base: float, steps: int, per_epoch: int, every: int = HALVED) -> np.ndarray:
    """The learning rate of each step: `base`, halved every `every` epochs."""
    return base * 0.5 ** (np.arange(steps) // per_epoch // every)


def batch_loss(head: str, classes: int, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The mean over a batch (features, present, grades) of each slide's loss."""
    features, present, grades = batch
    return hvit.loss(head, model(features, present=present), grades, classes, per_slide=True)


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


def learn(
    model: nn.Module,
    head: str,
    classes: int,
    part: Dataset,
    tuning: Callable[[nn.Module], float] | None = None,
    *,
    epochs: float = EPOCHS,
    batch: int = BATCH,
    patience: int = 0,
    halve_every: int = HALVED,
    optimizer: MakeOptimizer | None = None,
    **options: Any,
) -> History:
    """Train a model in place on slides (features, present, grade) as the authors do; the history of `fit`.

    Args:
        tuning: the loss on the tuning slides, see `Selection`; None: the last weights are used.
        options: of `fit`: `checkpoint`, `seed`, `hardware`, `name`.
    """
    return fit(
        model,
        functools.partial(batch_loss, head, classes),
        part,
        epochs=epochs,
        batch=min(batch, len(part)),
        optimizer=optimizer or adam(),
        schedule=functools.partial(halved, every=halve_every),
        callbacks=[] if tuning is None else [Selection(tuning, patience)],
        last=LAST,
        **options,
    )


def train_fold(
    p: SimpleNamespace,
    folds: list[tuple[Dataset, Dataset | None]],
    classes: int,
    out: Path | None,
    method: str,
    fold: int,
    epochs: float = EPOCHS,
    batch: int = BATCH,
    workers: int = 0,
) -> tuple[nn.Module, History]:
    """Train a method on one fold by the authors' recipe; the model and its history.

    `p.sampling` "weighted" trains on `ClassBalanced` slides; `p.noise` adds noise to the features (`Noised`);
    `p.patience` ends a training whose tuning loss no longer falls, see `Selection`. With `out` a killed training is
    resumed, one that is done is only read, and the weights are written as `out`/trained/*.safetensors under the
    authors' names (a bag's under ours), for `HViT.from_official`.
    """
    part, tuning = folds[fold]
    # of stored region embeddings Global reads the slide level alone
    whole = isinstance(part, data.Features) and len(part.shape) == 1
    levels = ("slide",) if method == "Global" and whole else ("region", "slide")
    model, batch = build(p, method, fold, classes, levels), min(batch, len(part))
    name, checkpoint = f"{method}, fold {fold}, seed {p.seed}", None
    hardware = replace(Hardware.of(p, "hvit", workers=workers), devices=1)
    if out is not None:
        facts = {k: getattr(p, k) for k in ("head", "position", "sampling", "noise", "patience", "seed")}
        facts["precision"] = hardware.precision
        slides = [[(item.name, item.grade) for item in one.items] for one in folds[fold] if one is not None]
        facts |= {"model": model, "slides": slides, "features": part.made_by, "epochs": epochs, "batch": batch}
        checkpoint = Checkpoint.of(out / "checkpoints", name, **facts)
    shown = ClassBalanced(part) if p.sampling == "weighted" else part
    history = learn(
        model,
        p.head,
        classes,
        Noised(shown, p.noise) if p.noise else shown,
        None if tuning is None else functools.partial(tuning_loss, p.head, classes, tuning, hardware=hardware),
        epochs=epochs,
        batch=batch,
        patience=p.patience,
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=hardware,
        name=method,
    )
    if out is not None and checkpoint is not None:
        state = model.to_official() if isinstance(model, hvit.HViT) else model.state_dict()
        save(out / "trained", checkpoint.path.stem, state)
    return model, history


@torch.no_grad()
def outputs(model: nn.Module, part: Dataset, hardware: Hardware = AUTO) -> tuple[Tensor, Tensor]:
    """True grades (n,) and outputs (n, ...) of slides (features, present, grade), on the CPU."""
    truth, found = [], []
    with evaluating(hardware, model) as device:
        pad = data.trimmed if isinstance(part, data.Features) else None
        options = {"num_workers": hardware.workers, "pin_memory": device.type == "cuda", "collate_fn": pad}
        for features, present, grade in DataLoader(part, 8, **options):
            features, present = (x.to(device, non_blocking=True) for x in (features, present))
            found.append(model(features, present=present).float().cpu())
            truth.append(torch.as_tensor(grade))
    return torch.cat(truth), torch.cat(found)


def tuning_loss(head: str, classes: int, part: Dataset, model: nn.Module, hardware: Hardware = AUTO) -> float:
    """The mean loss of slides, which chooses the epoch."""
    truth, found = outputs(model, part, hardware)
    return float(hvit.loss(head, found, truth, classes, per_slide=True))


def _setting(
    p: SimpleNamespace, title: str, folds: list, test: Dataset, classes: int, out: Path | None, **changes: Any
) -> Setting:
    hardware = Hardware.of(p, "hvit", workers=changes.get("workers", 0))

    def grades(model: nn.Module, method: str, part: Dataset) -> Tensor:
        return hvit.predict(p.head, outputs(model, part, hardware)[1], classes)

    return Setting(
        title=title,
        folds=folds,
        test=test,
        learning_rates={p.method: LEARNING_RATE},
        train=functools.partial(train_fold, p, folds, classes, out, **changes),
        grades=grades,
    )


def _dry_run(p: SimpleNamespace) -> Setting:
    """The full-size model with random weights, two optimiser steps on generated embeddings of the real shape."""
    generator = torch.Generator().manual_seed(p.seed)
    patches = (p.region // 256) ** 2

    def generated(count: int) -> TensorDataset:
        features = torch.randn(count, DRY_REGIONS, patches, 384, generator=generator)
        present = torch.ones(count, DRY_REGIONS, dtype=torch.bool)
        present[::2, -1] = False  # ragged, as real slides are
        return TensorDataset(features, present, torch.arange(count) % data.GRADES)

    title = "generated slides (dry run: kappas mean nothing)"
    folds = [(generated(2 * BATCH), generated(12))]
    return _setting(p, title, folds, generated(12), data.GRADES, None, epochs=1)


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on stored features of real slides; test slides are those of the first fold's list.

    A folder of slides is split here: a fifth is tested on, each fold tunes on another fifth of the rest.
    """
    stored, classes = stored_in(p), data.GRADES
    if p.dataset == "folder":
        items = data.folder(p.data_root)
        lists = [[fold[s] for s in data.SPLITS] for fold in data.split_folds(items, **SPLIT)[: p.folds]]
        classes = max(2, 1 + max(item.grade for item in items))
    else:
        lists = [[data.load(p.dataset, p.data_root, s, fold) for s in data.SPLITS] for fold in range(p.folds)]
    _check_lists(lists)
    folds, test = [], None
    for fold in lists:
        longest = data.Features([item for part in fold for item in part], stored, drop=True).longest
        parts = [data.Features(items, stored, longest, drop=True) for items in fold]
        for part, split, items in zip(parts, data.SPLITS, fold, strict=True):
            _check_features(p, part, f"none of the {len(items)} slides of the list {split}")
        folds.append((parts[0], parts[1]))
        test = test or parts[2]
    return _setting(p, f"{p.dataset}, {p.folds} folds", folds, test, classes, out, epochs=p.epochs, workers=WORKERS)


def _check_lists(lists: list[list[list[data.Item]]]) -> None:
    """Raises `BadParameter` when a fold trains on slides that it tunes on, or that any fold tests on."""
    train, tune, test = ([{item.name for item in fold[k]} for fold in lists] for k in range(3))
    for k in range(len(lists)):
        for seen, held, what in ((train[k], tune[k], "tunes"), (train[k] | tune[k], set().union(*test), "tests")):
            if both := sorted(seen & held):
                found = f"fold {k} trains or tunes on {both[0]} and {len(both) - 1} more"
                raise BadParameter("folds", found, f"disjoint lists: none of the slides that a fold {what} on")


def _check_features(p: SimpleNamespace, part: data.Features, none_found: str) -> None:
    """Raises `MissingData` when there are none, `BadParameter` when they are of another level or size of region, and
    `MissingWeights` when Global lacks the weights of its region level."""
    if not len(part):
        store = f"`companion slides {p.dataset} --data-root {p.data_root} --weights FILE` stores them"
        raise MissingData(
            "features of slides",
            part.path,
            "<slide_id>.h5    or <slide_id>.pt",
            store,
            "that of the slides",
            none_found + " has any",
        )
    patches = (p.region // 256) ** 2
    if p.method == "Global" and len(part.shape) == 2 and not (p.weights or region_weights(p)):
        ways = [
            f"put vit4k_xs_dino.pth of github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints) into {p.data_root}/weights",
            "give the file of another region level as `weights`, such as one that DINO trained",
            'weights = "random" freezes a random one; method = "Local" trains it',
        ]
        raise MissingWeights("H-ViT's region level", f"{p.data_root}/weights", ways)
    if len(part.shape) == 1 and p.method != "Global":
        accepted = f"patch embeddings (M, {patches}, 384): those of whole regions serve Global alone"
        raise BadParameter("features", str(part.path), accepted)
    level, width = ("patches", 384) if len(part.shape) == 2 else ("regions", 192)
    if part.shape[-1] != width:
        accepted = f"embeddings of {level} of width {width}; the features in {part.path} have {part.shape[-1]}"
        raise BadParameter("features", str(part.path), accepted)
    if len(part.shape) == 2 and part.shape[0] != patches:
        accepted = f"the region that the features in {part.path} are of, which have {part.shape[0]} patches each"
        raise BadParameter("region", p.region, accepted)


# --- features, slide by slide -----------------------------------------------------------------------------------------


def stored_in(p: SimpleNamespace) -> Path:
    """The folder of the stored patch embeddings."""
    return Path(p.features or Path(p.data_root) / "features")


def patch_encoder(weights: str | Path, heads: int | None = None) -> hvit.PatchEncoder:
    """The frozen patch level of a file of HIPT's or the authors', or of a file of several levels, "patch." first.

    Args:
        heads: attention heads; by default one for each 64 channels.
    """
    state = hvit.read_checkpoint(weights)
    own = {name.partition(".")[2]: t for name, t in state.items() if name.startswith(("patch.", "vit_patch."))}
    return hvit.PatchEncoder.from_official(own or state, heads)


def store(
    p: SimpleNamespace,
    patch: hvit.PatchEncoder,
    part: tuple[int, int] = (0, 1),
    batch: int = 1,
    tiling: Tiling = PANDA,
    mpp: float | None = None,
) -> Iterator[tuple[str, Path | CompanionError]]:
    """Patch embeddings of the slides of `dataset`, as the paper profile reads them; a killed run is resumed.

    Args:
        p: `dataset`, `data_root`, `features`, `region`, `normalise` and `accelerator` of the notebook's parameters.
        patch: see `patch_encoder`.
        part: (i, n): every n-th slide from the i-th on, so that n jobs do them all.
        batch: regions a step.
        tiling: how regions are found; its size of a region is `p.region`.
        mpp: microns per pixel of level 0, where the slides do not state it, or are wrong.

    Yields:
        The name of each slide as it is done, and its file, or the error: one slide that cannot be read does not stop
        the others.
    """
    i, n = part
    if not 0 <= i < n:
        raise BadParameter("part", f"{i}/{n}", "i/n, i from 0 to n - 1")
    if p.region % patch.image:
        raise BadParameter("region", p.region, f"a multiple of the {patch.image} pixels of a patch")
    if p.dataset == "folder":
        named = list(data.unlabelled(p.data_root).items())
    else:
        named = [(item.name, item.path) for item in data.load(p.dataset, p.data_root)]
    # `embed_patches` belongs to the whole model; the levels above are not run
    whole = hvit.HViT(hvit.SlideTransformer(192), hvit.RegionEncoder(p.region // patch.image, patch.dim), patch)
    options = {"tiling": replace(tiling, region=p.region), "encoder": patch, "normalise": p.normalise}
    options |= {"batch": batch, "mpp": mpp}
    with evaluating(Hardware(p.accelerator), whole) as device:
        for name, path in named[i::n]:
            target = stored_in(p) / f"{name}.h5"
            try:
                yield name, extract(path, whole.embed_patches, target, device=device, **options)
            except CompanionError as error:
                yield name, error


# --- attention maps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMaps:
    """Ranked attention on a slide of M regions, the mean over heads (see `heatmaps`).

    Attributes:
        patch, region: (M, s, s), s tokens along a region's side.
        slide: (M,).
        alpha: (M,), the pooling weights themselves.
        output: (1, ...), of the slide level.
    """

    patch: np.ndarray
    region: np.ndarray
    slide: np.ndarray
    alpha: np.ndarray
    output: Tensor

    def factorised(self, gamma: float, variant: str) -> np.ndarray:
        """All levels in one map (M, s, s)."""
        return heatmaps.factorised(self.patch, self.region, self.slide[:, None, None], gamma, variant)


@torch.inference_mode()
def attention_maps(
    model: hvit.HViT, patch: hvit.PatchEncoder, slide: Slide, tiles: Tiles, normalise: str
) -> AttentionMaps:
    """The attention of all levels on a slide, `patch` being the level below `model`; one region in memory at a time."""
    whole = hvit.HViT(model.slide, model.region, patch, model.variant)
    low, high, embedded = [], [], []
    for x, y in tiles.coords:
        trace: dict[str, Tensor] = {}
        found = whole.embed_patches(tensor(slide.region(x, y, tiles)[None], normalise), trace=trace)
        embedded.append(whole.embed_regions(found, trace=trace))
        maps = heatmaps.patch_map(trace["patch_attention"][0].numpy())
        low.append(maps.mean(0))
        high.append(heatmaps.region_map(trace["region_attention"][0].numpy(), maps.shape[-1]).mean(0))
    trace = {}
    output = whole.slide(torch.cat(embedded)[None], trace=trace)
    alpha = trace["pooling"][0].numpy()
    return AttentionMaps(np.stack(low), np.stack(high), heatmaps.ranks(alpha, axes=1), alpha, output)
